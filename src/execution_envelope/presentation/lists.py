"""Many at once: envelopes and attempted requests in tables, entries of the ledger one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from execution_envelope.ledger import AttemptedRequest, Finding
from execution_envelope.ledger.chain import Entry
from execution_envelope.presentation.facts import short_delta, states, target, who
from execution_envelope.presentation.text import STYLES, ago, clean, milliseconds, safe, styled, when
from execution_envelope.record import Record
from execution_envelope.sentences import sentence

#: Below this width an envelope takes two lines.
_WIDE: Final = 160


def list_row(record: Record, *, now: datetime) -> dict[str, Text]:
    """The cells of one envelope in a `list_table`."""
    execution, delta = record.envelope.execution, short_delta(record)
    return {
        "id": safe(record.id[-12:], "bold"),
        "when": Text(ago(milliseconds(record.envelope.correlation.created_at, now)), style="dim"),
        "kind": safe(execution.kind),
        "operation": safe(execution.operation, "dim"),
        "who": safe(who(record)),
        "target": safe(target(record)),
        "state": Text("\n").join(styled(word) for word in states(record)),
        "delta": Text(delta, style="dim" if delta in ("as asked", "pending", "nothing granted") else "yellow"),
        "references": safe(" ".join(f"{kind}:{id}" for kind, id in record.references.items()), "dim"),
    }


def list_table(rows: Sequence[Mapping[str, Text]], *, width: int) -> RenderableType:
    """Envelopes, one line each on a wide terminal, two on a narrow one."""
    if not rows:
        return Text("no envelopes", style="dim")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    if width >= _WIDE:
        for name in rows[0]:
            table.add_column(name, overflow="fold", no_wrap=name in ("id", "when", "kind", "operation", "state"))
        for row in rows:
            table.add_row(*row.values())
        return table
    table.add_column("id\nwhen", no_wrap=True)
    table.add_column("kind, operation,\ntarget", overflow="fold", min_width=20)
    table.add_column("who\nreferences", overflow="fold")
    table.add_column("state\ndelta", overflow="fold", max_width=24)
    columns = (("id", "when"), ("kind", "operation", "target"), ("who", "references"), ("state", "delta"))
    for row in rows:
        table.add_row(*(Group(*(row[name] for name in names)) for names in columns))
    return table


def attempted_table(requests: Sequence[AttemptedRequest], *, now: datetime) -> RenderableType:
    """Requests that never became an envelope."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("when", "status", "reason", "surface", "detail", "request id"):
        table.add_column(name, overflow="fold", no_wrap=name in ("when", "status"))
    for request in requests:
        detail = safe(request.detail)
        if request.dropped:
            detail.append(f" ({request.dropped} more before it were not kept)", style="red")
        table.add_row(
            Text(ago(milliseconds(request.at, now)), style="dim"),
            Text(str(request.status)),
            safe(request.reason),
            safe(request.surface),
            detail,
            safe(request.request_id or "", "dim"),
        )
    return table if requests else Text("no attempted requests", style="dim")


def entry_line(entry: Entry) -> Text:
    """One entry of the ledger."""
    kind = str(entry.data.__struct_config__.tag)
    return Text("  ").join(
        (
            safe(when(entry.at), "dim"),
            Text(clean((entry.envelope or "-")[-12:]).ljust(12), style="bold"),
            Text(kind.ljust(9), style=STYLES.get(kind, "")),
            safe(entry.by, "dim"),
            safe(sentence(entry.data)),
        )
    )


def finding_text(finding: Finding) -> Text:
    """``row: problem``."""
    return Text.assemble((clean(finding.row), "red"), ": ", clean(finding.problem))
