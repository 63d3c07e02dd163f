"""The rows of the table: what each has to reach, how they are printed, and how they are kept as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from rich.table import Table

Met = Literal["aim", "must", "no"]

RESULTS: Final = Path(__file__).parent / "results" / "latest.json"
PAGE: Final = Path(__file__).parent.parent / "docs" / "benchmarks.md"
#: Between these lines of the page stands the table that is drawn from the results.
_MARKED: Final = re.compile(r"(?<=<!-- results: make bench-docs -->\n).*?(?=<!-- end of results -->)", re.S)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a row has to reach: `must`, and better `aim`, for its ratio ours/peer, or for ours where there is no peer.

    `better` says which way.
    """

    unit: str
    better: Literal["less", "more"]
    must: float
    aim: float
    peer: str | None

    def met(self, value: float) -> Met:
        sign = 1 if self.better == "less" else -1
        if value * sign <= self.aim * sign:
            return "aim"
        return "must" if value * sign <= self.must * sign else "no"


GOALS: Final[Mapping[str, Goal]] = {
    "seal": Goal("µs", "less", 2.0, 1.3, "msgspec convert + encode + sha256 of the same fields"),
    "seam_in_process": Goal("µs/request", "less", 1.15, 1.08, "the same endpoint with a no-op yield dependency"),
    "hooks_none": Goal("µs/request", "less", 15, 1, None),
    "hooks_inline": Goal("µs/hook", "less", 15, 5, None),
    "hooks_recorded": Goal("µs/hook", "less", 15, 10, None),
    "hooks_thread": Goal("µs", "less", 1.5, 1.0, "AnyIO's worker thread, same function"),
    "hooks_isolated": Goal("µs", "less", 2.0, 1.3, "AnyIO's worker process, same function"),
    "hooks_cel": Goal("µs", "less", 1.3, 1.15, "the five rules that match, compiled, bare"),
    "hooks_cedar": Goal("µs/hook", "less", 15, 10, None),
    "budget": Goal("µs", "less", 200, 100, None),
    "append_sqlite_64": Goal("appends/s", "more", 0.50, 0.80, "raw sqlite3 group writer, same bytes, FULL"),
    "append_sqlite_1": Goal("µs", "less", 2.0, 1.3, "one raw committed insert, same bytes, FULL"),
    "append_postgres_16": Goal("appends/s", "more", 0.50, 0.80, "raw batched insert, one pipelined connection"),
    "http_lifecycle": Goal("requests/s", "more", 0.35, 0.55, "the same endpoint bare"),
    "http_vs_audit": Goal("requests/s", "more", 3.0, 4.5, "the same endpoint with a SQLAlchemy audit middleware"),
    "inference_rate": Goal("requests/s", "more", 0.70, 0.85, "the same proxy without the seam"),
    "inference_p99_ms": Goal("ms added", "less", 1.0, 0.5, None),
    "inference_first_byte_ms": Goal("ms added", "less", 1.0, 0.5, None),
    "growth": Goal("appends/s", "more", 0.90, 0.98, "the same ledger when empty"),
    "newest_50": Goal("ms", "less", 5.0, 1.0, None),
    "by_id": Goal("ms", "less", 1.0, 0.2, None),
    "verify": Goal("events/cpu-s", "more", 0.40, 0.70, "sha256 + decode of the same rows"),
    "replay": Goal("envelopes/cpu-s", "more", 20_000, 40_000, None),
    "relaxed_p99_ms": Goal("ms", "less", 1.0, 0.5, None),
    "memory": Goal("MiB", "less", 1.10, 1.02, "itself, half-way through a million appends"),
    "console_page_ms": Goal("ms", "less", 100, 50, None),
    "explain_ms": Goal("ms", "less", 10, 3, None),
    "accounting_30d_ms": Goal("ms", "less", 500, 100, None),
    "replay_per_core": Goal("envelopes/cpu-s", "more", 20_000, 40_000, None),
    "console_page_ms_postgres": Goal("ms", "less", 100, 50, None),
    "explain_ms_postgres": Goal("ms", "less", 10, 3, None),
    "accounting_30d_ms_postgres": Goal("ms", "less", 500, 100, None),
    "replay_per_core_postgres": Goal("envelopes/cpu-s", "more", 20_000, 40_000, None),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One measured row. `ratio` is ours/peer; `more` is what else was seen on the way."""

    name: str
    ours: float
    peer: float | None
    ratio: float | None
    unit: str
    better: str
    must: float
    aim: float
    met: str
    more: Mapping[str, Any] = field(default_factory=dict)


def row(name: str, ours: float, peer: float | None = None, ratio: float | None = None, **more: Any) -> Row:
    """A row with its goal. Without a `ratio` of the rounds it is that of the two medians."""
    goal = GOALS[name]
    if peer is not None and ratio is None:
        ratio = ours / peer
    value = ours if ratio is None else ratio
    figures = (_digits(ours), None if peer is None else _digits(peer), None if ratio is None else _digits(ratio))
    return Row(name, *figures, goal.unit, goal.better, goal.must, goal.aim, goal.met(value), more)


def _digits(value: float) -> float:
    """Four digits are more than the measurement knows."""
    return float(f"{value:.4g}")


# Kept


@dataclass(frozen=True, slots=True)
class Results:
    """What a run found. `at` is the day; `scale` says whether it was the whole measurement or a try."""

    at: str
    scale: str
    machine: Mapping[str, Any]
    rows: tuple[Row, ...]


def load(path: Path = RESULTS) -> Results:
    """Raises `FileNotFoundError` before the first run."""
    kept = json.loads(path.read_text())
    return Results(kept["at"], kept["scale"], kept["machine"], tuple(Row(**entry) for entry in kept["rows"]))


def save(results: Results, path: Path = RESULTS) -> None:
    """Write the results; rows that were not run again stay, when they were measured on the same machine."""
    rows = {found.name: found for found in results.rows}
    if path.exists() and _same_machine(before := load(path), results):
        rows = {found.name: found for found in before.rows} | rows
    ordered = tuple(rows[name] for name in GOALS if name in rows)
    results = Results(results.at, results.scale, results.machine, ordered)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(results), indent=2, ensure_ascii=False) + "\n")


def _same_machine(one: Results, other: Results) -> bool:
    def same(results: Results) -> list[Any]:
        return [results.scale, *(results.machine.get(name) for name in ("cpu", "cores", "memory", "filesystem"))]

    return same(one) == same(other)


# Shown

_HEAD: Final = ("row", "ours", "peer", "unit", "ratio", "must", "aim", "met")


def cells(found: Row) -> tuple[str, ...]:
    """A row as it is shown."""
    goal = GOALS[found.name]
    value = "" if found.ratio is None else _ratio(found.ratio)
    sign = "≤" if goal.better == "less" else "≥"
    bound = _number if goal.peer is None else _ratio
    met = {"aim": "yes", "must": "must", "no": "NO"}[found.met]
    peer = "" if found.peer is None else _number(found.peer)
    limits = (f"{sign} {bound(found.must)}", f"{sign} {bound(found.aim)}")
    return (found.name, _number(found.ours), peer, found.unit, value, *limits, met)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _ratio(value: float) -> str:
    return f"{value:.2f}x"


def shown(results: Results) -> Table:
    """The table on the terminal."""
    title = f"{results.machine.get('cpu')}, {results.machine.get('cores')} cores, fsync {_fsync(results)}/s"
    table = Table(title=title, title_justify="left")
    for name in _HEAD:
        table.add_column(name, justify="left" if name in ("row", "unit", "met") else "right")
    for found in results.rows:
        style = {"aim": "green", "must": "yellow", "no": "red"}[found.met]
        table.add_row(*cells(found)[:-1], f"[{style}]{cells(found)[-1]}[/]")
    return table


def _fsync(results: Results) -> str:
    """The disk's pace; from the slowest to the fastest run, where rows were measured again."""
    paces = {found.more.get("fsync_per_second", results.machine["fsync_per_second"]) for found in results.rows}
    return " to ".join(_number(pace) for pace in sorted({min(paces), max(paces)})) if paces else "?"


def markdown(results: Results) -> str:
    """The same for the page."""
    machine = results.machine
    facts = [
        f"Measured {results.at} ({results.scale} scale) on {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory']}; Linux {machine['kernel']}, {machine['filesystem']}, "
        f"**{_fsync(results)} fsync/s**; Python {machine['python']}, SQLite {machine['sqlite']}, "
        f"PostgreSQL {machine['postgres']}."
    ]
    lines = ["| " + " | ".join((*_HEAD, "peer in the same run")) + " |", "|---|--:|--:|---|--:|--:|--:|---|---|"]
    for found in results.rows:
        name, *rest = cells(found)
        lines.append("| " + " | ".join((f"`{name}`", *rest, GOALS[name].peer or "none")) + " |")
    return "\n".join((*facts, "", *lines)) + "\n"


def page(results: Results, text: str) -> str:
    """The page with the table of these results."""
    return _MARKED.sub(lambda _: markdown(results), text)


def names_of(text: str, known: Iterable[str]) -> list[str]:
    """The rows of a comma-separated list. Raises `ValueError` for one that there is not."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in GOALS:
            raise ValueError(f"expected rows of {', '.join(known)}, got `{name}`")
    return names
