"""Trees of envelopes: a picture that fits a screen, and as JSON data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from execution_envelope.presentation import facts
from execution_envelope.presentation.data import summary, whole
from execution_envelope.presentation.text import STYLES, counted, safe, span, styled
from execution_envelope.record import Record, Usage
from execution_envelope.resources import Amount, human
from execution_envelope.tree import Tree, asked, together

#: From so many on, parts that are alike and have no parts themselves are one line.
_ALIKE: Final = 3
#: From this width on there is room to say who acts for whom.
_WIDE: Final = 110
#: The most lines of a picture; the rest is counted.
MAX_LINES: Final = 200


@dataclass(frozen=True, slots=True)
class _Line:
    """One envelope, or several that are alike, with what stands before it."""

    guide: str
    nodes: Sequence[Tree]


def tree_picture(tree: Tree, *, width: int) -> RenderableType:
    """Every envelope of the tree with what it used itself, those that are alike in one line, and the sums.

    On a narrow terminal it is left out who acts for whom.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("envelope", overflow="fold", min_width=30)
    if width >= _WIDE:
        table.add_column("who", overflow="fold")
    table.add_column("state", overflow="fold")
    table.add_column("asked, granted, used", overflow="fold")
    lines = list(_lines(tree, "", ""))
    for line in lines[:MAX_LINES]:
        what, who, *rest = _cells(line)
        table.add_row(what, *([who] if width >= _WIDE else []), *rest)
    said = [Text(counted(len(list(tree.walk())), "envelope")), Text(f", {_open(tree)} open", style="dim")]
    more = [Text(f"and {len(lines) - MAX_LINES} lines more: --json has all", style="yellow")]
    return Group(table, *(more if len(lines) > MAX_LINES else []), Text.assemble(*said), _sums(tree))


def tree_data(tree: Tree, *, now: datetime) -> dict[str, Any]:
    """The tree with the summary of each envelope, what each asked, was granted and used itself, and the sums."""
    return {
        **_node(tree, now),
        "totals": {
            "envelopes": len(list(tree.walk())),
            "open": _open(tree),
            "requested": tree.requested,
            "granted": tree.granted,
            "used": whole(tree.used),
        },
    }


def _node(tree: Tree, now: datetime) -> dict[str, Any]:
    record = tree.record
    return {
        **summary(record, now=now),
        "delegation": whole(record.envelope.identity.delegation),
        "requested": asked(record),
        "granted": record.granted,
        "used": whole(record.used),
        "violations": whole(record.violations),
        "children": [_node(child, now) for child in tree.children],
    }


def _open(tree: Tree) -> int:
    return sum(record.is_open for _, record in tree.walk())


def _lines(tree: Tree, guide: str, below: str) -> Iterator[_Line]:
    yield _Line(guide, [tree])
    groups = _grouped(tree.children)
    for number, nodes in enumerate(groups):
        last = number == len(groups) - 1
        guide, further = ("└─ ", "   ") if last else ("├─ ", "│  ")
        if len(nodes) > 1:
            yield _Line(below + guide, nodes)
        else:
            yield from _lines(nodes[0], below + guide, below + further)


def _grouped(children: Sequence[Tree]) -> list[list[Tree]]:
    """In order; those that are alike stand where the first of them does."""
    found: dict[tuple[object, ...], list[Tree]] = {}
    for child in children:
        record = child.record
        alike: tuple[object, ...] = (record.id,)
        if not child.children and not record.violations:
            execution = record.envelope.execution
            alike = (
                execution.kind,
                execution.operation,
                execution.target,
                *facts.states(record),
                facts.who(record),
                _why(record),
            )
        found.setdefault(alike, []).append(child)
    return [
        group for nodes in found.values() for group in ([nodes] if len(nodes) >= _ALIKE else [[node] for node in nodes])
    ]


def _cells(line: _Line) -> tuple[Text, ...]:
    record, several = line.nodes[0].record, len(line.nodes)
    execution = record.envelope.execution
    what = Text(line.guide, style="dim")
    what.append_text(Text(f"{several} x " if several > 1 else f"{record.id[-12:]} ", style="bold"))
    what.append_text(safe(f"{execution.operation} {facts.target(record)}"))
    state = Text("\n").join(styled(word) for word in facts.states(record))
    for text in filter(None, (_why(record), *(violation.text for violation in record.violations))):
        state.append_text(Text("\n")).append_text(safe(text, STYLES["violation"] if record.violations else "dim"))
    return what, safe(_acting(record)), state, _amounts([node.record for node in line.nodes])


def _acting(record: Record) -> str:
    """The subject, after those that it acts for."""
    identity = record.envelope.identity
    chain = [*identity.delegation, identity.subject]
    return " > ".join(f"{one.type}:{one.id[:8] if len(one.id) == 36 else one.id}" for one in chain)


def _why(record: Record) -> str | None:
    """What is said of an end that is not a good one."""
    data = record.events[-1].data if record.events and not record.is_open else None
    code = getattr(data, "code", None)
    return code if isinstance(code, str) else None


def _amounts(records: Sequence[Record]) -> Text:
    """``output_tokens 64, 32, 30; requests 1, 1, 1``: asked, granted and used, of all those that are alike."""
    sides = [_side([asked(r) for r in records]), _side([r.granted for r in records])]
    sides.append(_side([{name: usage.amount for name, usage in r.used.items()} for r in records]))
    estimated = {name for r in records for name, usage in r.used.items() if usage.how == "estimated"}
    found = Text()
    for name in dict.fromkeys(name for side in sides for name in side):
        if name in ("duration", "context", "cpu_time") and name not in sides[0]:
            continue  # there is room for what was bounded
        found.append("; " if found else "").append(name, style="dim")
        found.append(" " + ", ".join(human(name, side.get(name)) for side in sides))
        found.append(" (estimated)" if name in estimated else "")
    return found


def _side(values: Sequence[dict[str, Amount]]) -> dict[str, Amount]:
    names = dict.fromkeys(name for each in values for name in each)
    return {name: together(name, [each[name] for each in values if name in each]) for name in names}


def _sums(tree: Tree) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("in all")
    for name in ("asked", "granted", "used"):
        table.add_column(name, justify="right")
    requested, granted, used = tree.requested, tree.granted, tree.used
    for name in dict.fromkeys([*requested, *granted, *used]):
        table.add_row(
            name, _amount(name, requested.get(name)), _amount(name, granted.get(name)), _used(name, used.get(name))
        )
    return table


def _amount(name: str, amount: Amount | None) -> str:
    if name in ("duration", "cpu_time") and isinstance(amount, int):
        return span(amount)
    return human(name, amount)


def _used(name: str, usage: Usage | None) -> str:
    if usage is None:
        return "-"
    return _amount(name, usage.amount) + (" (estimated)" if usage.how == "estimated" else "")
