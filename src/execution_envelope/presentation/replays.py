"""The result of a replay as pictures for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from execution_envelope.presentation.text import clean, counted, styled
from execution_envelope.review.replay_result import ReplayResult

#: How many lines of each list are shown; `--json` has them all.
MAX_SHOWN: Final = 10
#: Characters of a reason that are shown.
MAX_WHY: Final = 100


def _percent(part: int, whole: int) -> str:
    """With two digits where it is less than ten."""
    share = 100 * part / whole
    return f"{share:.2g}" if share < 9.95 else f"{share:.0f}"


def replay_sheet(result: ReplayResult) -> list[RenderableType]:
    """What changes, for whom, with samples; what is live and would not be; and what cannot be said."""
    share = f" ({_percent(result.changed, result.compared)} %)" if result.changed else ""
    decisions = f"{result.changed} of {counted(result.compared, 'decision')} change"
    if result.changed:
        head = Text.assemble((decisions + share, "bold red"))
    else:
        head = Text.assemble(
            ("no decision changes", "bold green"), f": {counted(result.compared, 'decision')} compared"
        )
    named = f"policy {clean(result.revision)} in the place of hook {clean(result.hook)}"
    span = f"{result.since or 'the beginning'} to {result.until}"
    found: list[RenderableType] = [head, Text(f"{named}, {counted(result.envelopes, 'envelope')} from {span}", "dim")]
    if result.changed:
        rows: list[tuple[str, ...]] = [
            (*_pair(one), str(one.count)) for one in result.decisions if one.before != one.after
        ]
        found += _list("", ("before", "after", "decisions"), rows, number=2)
        found += _list(
            "by rule",
            ("rule", "", "before", "after", "decisions"),
            (
                (
                    one.rule or "-",
                    "refuses now" if one.of == "candidate" else "refused then",
                    *_pair(one),
                    str(one.count),
                )
                for one in result.rules
            ),
            number=4,
        )
        found += _list(
            "by tenant",
            ("tenant", "before", "after", "decisions", "of"),
            ((one.tenant or "-", *_pair(one), str(one.count), str(one.compared)) for one in result.tenants_affected),
            number=3,
        )
        found += _list(
            "by subject",
            ("subject", "tenant", "before", "after", "decisions"),
            ((one.subject or "", one.tenant or "-", *_pair(one), str(one.count)) for one in result.subjects_affected),
            number=4,
        )
        found += _list(
            "samples",
            ("envelope", "before", "after", "who", "why"),
            ((one.id, *_pair(one), one.subject, _why(one.rule, one.reason)) for one in result.samples),
        )
    found += _list(
        "limits on what is admitted before and after",
        ("limit", "", "envelopes", "granted more"),
        ((one.name, one.change, str(one.count), str(one.below) if one.below else "-") for one in result.limits),
        number=2,
    )
    found += _list(
        "obligations of what is admitted before and after",
        ("obligation", "", "envelopes"),
        ((one.name, one.change, str(one.count)) for one in result.obligations),
        number=2,
    )
    if result.live:
        title = f"{counted(result.live, 'live envelope')} would not be admitted"
        rows = [(one.id, one.after, one.subject, _why(one.rule, one.reason)) for one in result.live_listed]
        found += _list(title, ("envelope", "after", "who", "why"), rows, style="bold yellow", whole=result.live)
    found += _list(
        "what cannot be replayed, or only so far",
        ("envelopes", "", ""),
        ((str(one.count), one.name, one.text) for one in result.cannot),
        most=len(result.cannot),
    )
    found += _list(
        "what could not be evaluated",
        (
            "envelopes",
            "",
        ),
        ((str(one.count), one.text) for one in result.errors),
    )
    return found


def _pair(one: object) -> tuple[str, str]:
    return str(getattr(one, "before", "")), str(getattr(one, "after", ""))


def _why(rule: str | None, reason: str | None) -> str:
    why = reason or rule or "-"
    return why if len(why) <= MAX_WHY else f"{why[:MAX_WHY]}..."


def _list(
    title: str,
    columns: Iterable[str],
    rows: Iterable[tuple[str, ...]],
    *,
    number: int | None = None,
    most: int = MAX_SHOWN,
    style: str = "bold",
    whole: int | None = None,
) -> list[RenderableType]:
    lines = list(rows)
    if not lines:
        return []
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(
            name, justify="right" if place == number else "left", no_wrap=name == "envelope", overflow="fold"
        )
    for line in lines[:most]:
        table.add_row(*(_cell(text) for text in line))
    found: list[RenderableType] = [Text(""), Text(title, style=style)] if title else []
    more = (len(lines) if whole is None else whole) - min(len(lines), most)
    return [*found, table, *([Text(f"and {more} more, see --json", style="dim")] if more > 0 else [])]


def _cell(text: str) -> Text:
    return styled(text) if text in ("admitted", "denied", "held") else Text(clean(text))
