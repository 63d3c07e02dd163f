"""The picture of one record: everything on it, for a terminal of 80 columns and more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final

from msgspec.structs import asdict
from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from execution_envelope.envelope import Constraint
from execution_envelope.lifecycle import Late, ended
from execution_envelope.presentation import facts
from execution_envelope.presentation.facts import Line, Part, target
from execution_envelope.presentation.lists import finding_text
from execution_envelope.presentation.text import (
    STYLES,
    ago,
    amounts,
    because,
    clean,
    counted,
    marks,
    milliseconds,
    pairs,
    plain_value,
    safe,
    span,
    styled,
    when,
)
from execution_envelope.record import Attempts, Record
from execution_envelope.resources import UNKNOWN, Quantity, human
from execution_envelope.review import ChainStatus
from execution_envelope.sentences import sentence

#: Below this width the difference stands under its row instead of in a column of its own.
_WIDE: Final = 96
_COLUMNS: Final = ("", "requested", "effective", "granted", "used")
_BASES: Final = {
    "reserved": "reserved (a scheduler's promise)",
    "allocated": "allocated",
    "enforced": "enforced (a limit that holds)",
}


def sheet(
    record: Record, *, now: datetime, width: int, children: Sequence[str] = (), chain: ChainStatus | None = None
) -> Group:
    """The record from the top: who asked, what was given, why, what was said, and when."""
    lines, held = [*facts.resource_lines(record), *facts.constraint_lines(record)], facts.parts(record)
    return Group(
        _header(record, now),
        _grid(
            [
                (Text("identity"), _identity(record)),
                (Text("execution"), _execution(record)),
                (Text("scope"), _scope(record)),
                (Text("correlation"), _correlation(record, children)),
            ]
        ),
        _title("resources", facts.short_delta(record) if lines else ""),
        _resources(record, lines, width),
        *_standing(record, held),
        *_section("route", _route(record, held)),
        *_section("verdicts", _verdicts(record)),
        *_section("hints", _hints(record)),
        *_section("obligations", _obligations(record)),
        *_section("budgets", _budgets(record)),
        *_section("noted", _noted(record)),
        _title("timeline"),
        _timeline(record),
        *(_chain(chain) if chain is not None else ()),
    )


# Layout


def _title(name: str, said: str = "", style: str = "yellow") -> RenderableType:
    return Padding(Text.assemble((name, "bold underline"), "  " if said else "", (said, style)), (1, 1, 0, 1))


def _inset(picture: RenderableType) -> RenderableType:
    return Padding(picture, (0, 1))


def _grid(rows: Sequence[tuple[Text, Text]]) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=11)
    grid.add_column(overflow="fold", ratio=1)
    for row in rows:
        grid.add_row(*row)
    return _inset(grid)


def _section(name: str, rows: Iterator[tuple[Text, Text]]) -> Sequence[RenderableType]:
    found = list(rows)
    return (_title(name), _grid(found)) if found else ()


# Who asked


def _header(record: Record, now: datetime) -> RenderableType:
    execution, created = record.envelope.execution, record.envelope.correlation.created_at
    style = STYLES[record.state]
    first = Table.grid(expand=True, padding=(0, 1))
    first.add_column(ratio=1, overflow="fold")
    first.add_column(justify="right", no_wrap=True)
    first.add_row(
        Text.assemble((clean(execution.kind), "bold"), clean(f"  {execution.operation}  {target(record)}")),
        Text(f" {', '.join(facts.states(record)).upper()} ", style=f"bold reverse {style}"),
    )
    delegation = " > ".join(f"{party.type}:{party.id}" for party in record.envelope.identity.delegation)
    end = facts.ended_at(record)
    took = span(milliseconds(created, end or now))
    rows: list[RenderableType] = [
        first,
        safe(record.id, "dim"),
        Text.assemble(
            "asked by ", (clean(facts.who(record)), "bold"), clean(f", acting for {delegation}" if delegation else "")
        ),
        Text(
            f"{when(created)}, {ago(milliseconds(created, now))}; "
            + (f"{record.state} after {took}" if end else f"open for {took}")
        ),
    ]
    if record.bound is not None:
        references = ", ".join(f"{kind}:{reference}" for kind, reference in record.references.items())
        rows.append(safe(f"bound to {references}, owned by {record.bound.owner}"))
    rows += [safe(sentence(e.data), "cyan") for e in record.events if e.data.type == "observed"]
    rows += [safe(sentence(e.data), style) for e in record.events if ended(e.data) or e.data.type == "held"][-1:]
    return Panel(Group(*rows), border_style=style, box=box.ROUNDED)


def _identity(record: Record) -> Text:
    identity = record.envelope.identity
    tenant = f" of tenant {identity.tenant}" if identity.tenant is not None else ", no tenant"
    roles = f"roles {', '.join(identity.roles)}" if identity.roles else "no roles"
    proof = identity.authentication
    how = "how it was authenticated is not recorded"
    if proof is not None:
        how = f"authenticated by {proof.method}"
        how += f", issuer {proof.issuer}" if proof.issuer else ""
        how += f", session {proof.session}" if proof.session else ""
    return safe(f"{identity.subject.type}:{identity.subject.id}{tenant}, {roles}; {how}")


def _execution(record: Record) -> Text:
    execution = record.envelope.execution
    said = safe(f"{execution.operation} ({execution.kind}) on {target(record)}")
    if execution.entrypoint:
        said.append(clean(f", entered by {execution.entrypoint}"))
    if execution.request:
        request = execution.request
        said.append(f"\nrequest {clean(request.schema)}, sha256 {clean(request.sha256[:12])}...", style="dim")
    return said


def _scope(record: Record) -> Text:
    values = asdict(record.envelope.scope)
    hints = values.pop("hints")
    values |= {f"hint {name}": value for name, value in hints.items()}
    found = []
    for name, scoped in values.items():
        if scoped is None:
            continue
        content = ", ".join(scoped.value) if isinstance(scoped.value, tuple) else scoped.value
        source = f"({scoped.provenance} by {scoped.by})" if scoped.by else f"({scoped.provenance})"
        style = "green" if scoped.provenance == "established" else "dim"
        found.append(Text.assemble(clean(f"{name} {plain_value(content)} "), (clean(source), style)))
    return Text("; ").join(found) if found else Text("none", style="dim")


def _correlation(record: Record, children: Sequence[str]) -> Text:
    correlation = record.envelope.correlation
    named = {
        "request": correlation.request_id,
        "trace": correlation.traceparent and correlation.traceparent.split("-")[1],
        "idempotency key": correlation.idempotency_key,
        "part of": correlation.part_of,
        "runs on": correlation.runs_on,
        "supersedes": correlation.supersedes,
    }
    found = [f"{name} {value}" for name, value in named.items() if value is not None]
    if children:
        newest = ", ".join(child[-12:] for child in children[-8:])
        found.append(f"{len(children)} children{', the newest' if len(children) > 8 else ''}: {newest}")
    for name, facet in correlation.facets.items():
        found.append(f"facet {name} by {facet.producer}: {plain_value(facet.text)}")
    return safe("; ".join(found)) if found else Text("no request id, trace, key or link", style="dim")


# What was asked and given


def _resources(record: Record, lines: Sequence[Line], width: int) -> RenderableType:
    if not lines:
        return _inset(Text("no resources or constraints were asked for, granted or used", style="dim"))
    rows = [(_cells(record, line), _difference(line)) for line in lines]
    if width < _WIDE:
        return _narrow(rows)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), expand=True)
    table.add_column("", overflow="fold", style="bold", max_width=20)
    for name in _COLUMNS[1:]:
        table.add_column(name, overflow="fold", max_width=18)
    table.add_column("difference", overflow="fold", ratio=1)
    for cells, difference in rows:
        table.add_row(*cells, difference)
    return table


def _narrow(rows: Sequence[tuple[list[Text], Text]]) -> RenderableType:
    """The difference under its row, over the whole width."""
    heads = [Text(name, style="bold") for name in _COLUMNS]
    columns = zip(heads, *(cells for cells, _ in rows), strict=True)
    widths = [min(16, max(cell_len(line) for cell in cells for line in cell.plain.split("\n"))) for cells in columns]
    pictures: list[RenderableType] = []
    for cells, difference in ((heads, Text()), *rows):
        grid = Table.grid(padding=(0, 2))
        for width in widths:
            grid.add_column(width=width, overflow="fold")
        grid.add_row(*cells)
        pictures.append(grid)
        if difference:
            pictures.append(Padding(difference, (0, 0, 0, 4)))
    return Padding(Group(*pictures), (1, 1, 0, 1))


def _cells(record: Record, line: Line) -> list[Text]:
    requested, effective = _value(line.key, line.requested), _value(line.key, line.effective)
    if line.requested is not None:
        if line.effective == line.requested:
            effective = Text("same", style="dim")
        if line.requested.provenance == "client_default":
            requested.append("\nclient default", style="cyan")
    return [safe(line.key, "bold"), requested, effective, _granted(record, line), _used(line)]


def _value(key: str, value: Quantity | Constraint | None) -> Text:
    if value is None:
        return Text("-", style="dim")
    if isinstance(value, Constraint):
        return safe(plain_value(value.value))
    said = Text(human(key, value.amount))
    for mark in marks(key, value):
        said.append(f"\n{mark}", style="dim")
    return said


def _granted(record: Record, line: Line) -> Text:
    said = _value(line.key, line.granted)
    if line.granted is None:
        if record.grants:
            return said
        word = facts.nothing_granted(record)
        if word not in ("pending", "held", "denied", UNKNOWN):
            word = "none"
        return styled("-" if line.requested is None and word != "pending" else word)
    if isinstance(line.granted, Quantity):
        if line.total is None:
            said.append("\nas asked", style="dim")
        elif line.granted.per != "total" and line.total != line.granted.amount:
            said.append(f"\n{human(line.key, line.total)} in all", style="dim")
    return said


def _used(line: Line) -> Text:
    if line.used is None:
        return Text("-", style="dim")
    amount, bound = line.used.amount, line.total
    said = Text(human(line.key, amount))
    said.append(f"\n{line.used.how}", style="cyan" if line.used.how == "estimated" else "dim")
    if isinstance(amount, int) and isinstance(bound, int) and amount != bound:
        style = "bold red" if amount > bound else "yellow" if _idle(line) else "dim"
        said.append(f"\nof {human(line.key, bound)}", style=style)
    return said


def _idle(line: Line) -> str:
    """Devices held and left idle are what nobody sees; memory and time are rarely used to the last byte."""
    used = line.used and line.used.amount
    if line.key in ("gpu", "replicas") and isinstance(used, int) and isinstance(line.total, int) and used < line.total:
        return f"used {human(line.key, used)} of {human(line.key, line.total)}"
    return ""


def _difference(line: Line) -> Text:
    """The outcome and why; empty where the columns already say it all."""
    if line.outcome == "none":
        return safe(line.words if line.words != "only reported" else "", "dim")
    if line.difference is None and ";" not in line.words:
        return Text()
    said = Text.assemble(styled(line.outcome), ": ", clean(line.words))
    if idle := _idle(line):
        said.append(f"; {idle}", style="bold yellow")
    return said


# How firm it is, and where it went


def _standing(record: Record, held: Sequence[Part]) -> Iterator[RenderableType]:
    facts: list[Text] = []
    if held:
        bases = {f"{_BASES[part.grant.basis]}, granted by {part.by}": None for part in held}
        facts.append(safe(f"basis: {next(iter(bases)) if len(bases) == 1 else 'differs, see each part'}"))
    if record.is_open and record.held != record.granted:
        facts.append(safe(f"held now: {amounts(record.held) or 'nothing'}; granted: {amounts(record.granted)}"))
    for name, (amount, hook) in record.limits.items():
        facts.append(safe(f"limit: at most {name} {human(name, amount)}, set by {hook}"))
    for name, (values, hook) in record.allowed.items():
        facts.append(safe(f"limit: {name} only {' or '.join(map(plain_value, values))}, set by {hook}"))
    if record.state == "held" and record.hold is not None:
        facts += [safe(line) for line in _waiting(record)]
    unstated = sum(difference.unstated for difference in record.differences)
    if unstated:
        facts.append(Text(f"unstated: {unstated} without a reason given", style="red"))
    if record.undecided:
        facts.append(Text("undecided: no decider covers this kind", style="yellow"))
    if facts:
        yield _inset(Group(*facts))
    if any(part.name for part in held):
        yield _each_part(record, held)


def _waiting(record: Record) -> Iterator[str]:
    """What a held request waits for."""
    hold, approval = record.hold, record.approval
    assert hold is not None
    if approval is not None and approval.sequence > hold.sequence:
        yield sentence(approval.data)
        yield "its caller has to send it again, with the same key"
    else:
        expires = getattr(hold.data, "expires_at", None)
        until = f" until {when(expires)}" if expires else ""
        yield f"it waits for approval{until}: envelope approve {record.id} --reason WHY"


def _each_part(record: Record, held: Sequence[Part]) -> RenderableType:
    first = held[0]
    standing = [(part.grant.resources, part.released, part.ready, part.grant.basis) for part in held]
    if len(held) > 1 and standing.count(standing[0]) == len(held) and not first.grant.route:
        names = ", ".join(part.name or "the whole" for part in held)
        return _inset(safe(f"parts: {names}, each {amounts(first.grant.resources)}"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=True)
    for name in ("part", "now", "basis", "granted", "route"):
        table.add_column(name, overflow="fold", no_wrap=name in ("now", "basis"))
    for part in held:
        now = "ended" if not record.is_open else "released" if part.released else "held"
        serves = "" if not part.ready else ", serves" if now == "held" else ", served"
        table.add_row(
            safe(part.name or "the whole", "bold"),
            Text(now + serves, style="green" if now == "held" else "dim"),
            Text(part.grant.basis),
            safe(amounts(part.grant.resources)),
            safe(pairs(part.grant.route)),
        )
    return table


def _route(record: Record, held: Sequence[Part]) -> Iterator[tuple[Text, Text]]:
    for part in held:
        # Parts with a name say where they went in their own table.
        if part.grant.route and not part.name:
            yield Text("went to"), safe(pairs(part.grant.route))
    for candidate in dict.fromkeys(candidate for part in held for candidate in part.grant.candidates):
        yield styled(candidate.outcome), safe(because(candidate.name, candidate.reason))
    for found in record.attempts:
        yield Text("no room", style="yellow"), _attempts(found)


def _attempts(found: Attempts) -> Text:
    often, times = "once", f"at {when(found.first)}"
    if found.times > 1:
        often, times = f"{found.times} times", f"first {when(found.first)}, last {when(found.last)}"
    said = Text.assemble(clean(f"{often}: {found.reason}"), (f"\n{times}", "dim"))
    for candidate in found.candidates:
        reasoned = clean(because(candidate.name, candidate.reason))
        said.append_text(Text.assemble("\n", styled(candidate.outcome), f" {reasoned}"))
    return said


# What was said


def _verdicts(record: Record) -> Iterator[tuple[Text, Text]]:
    for verdict in record.verdicts:
        said = safe(f"{verdict.hook} {verdict.version}", "bold")
        said.append(f", {verdict.duration_us / 1000:.1f} ms", style="dim")
        if verdict.failure:
            said.append(f"; {verdict.failure}, failure mode {verdict.failure_mode} applied", style="red")
        if verdict.code:
            said.append(f"; {clean(verdict.code)}")
        if verdict.message:
            said.append(f": {clean(verdict.message)}")
        if verdict.limits:
            said.append(f"; at most {amounts(verdict.limits)}")
        for name, values in verdict.allowed.items():
            said.append(clean(f"; {name} only {' or '.join(map(plain_value, values))}"))
        if verdict.policies:
            said.append(clean(f"; by {', '.join(verdict.policies)}"))
        if verdict.revision:
            said.append(clean(f"; revision {verdict.revision}"), style="dim")
        for error in verdict.errors:
            said.append(clean(f"; {error}"), style="red")
        if verdict.answer:
            said.append(clean(f"; answered {verdict.answer}"), style="dim")
        if verdict.retryable:
            said.append("; trying later can help", style="dim")
        if verdict.shadow:
            said.append("; in shadow, not enforced", style="yellow")
        yield styled(verdict.decision), said


def _hints(record: Record) -> Iterator[tuple[Text, Text]]:
    """Who read each governance hint, and what they made of the request then."""
    said = {verdict.hook: verdict for verdict in record.verdicts}
    for name, hooks in record.hints_read.items():
        if not hooks:
            yield safe(name), Text("read by no hook", style="red")
            continue
        made = []
        for hook in hooks:
            limits = f", at most {amounts(said[hook].limits)}" if said[hook].limits else ""
            made.append(f"{hook}: {said[hook].decision}{limits}")
        yield safe(name), safe("read by " + "; ".join(made))


def _obligations(record: Record) -> Iterator[tuple[Text, Text]]:
    for name, duty in record.obligations.items():
        waits = name in record.open_obligations
        said = Text(f"{duty.state}", style="red" if waits else "green")
        said.append(clean(f", attached by {duty.hook}" + ("" if duty.required else ", optional")))
        if duty.text:
            said.append(clean(f": {duty.text}"))
        yield safe(name), said


def _budgets(record: Record) -> Iterator[tuple[Text, Text]]:
    for entry in record.budgets.values():
        said = f"{human(entry.resource, entry.reserved)} reserved, {human(entry.resource, entry.spent)} spent"
        unknown = ", amount unknown" if entry.unknown else ""
        of = f" of {human(entry.resource, entry.limit)} {entry.resource} ({entry.window}){unknown}"
        yield safe(entry.account), safe(said + of + (", not enforced" if entry.shadow else ""))


def _noted(record: Record) -> Iterator[tuple[Text, Text]]:
    """What must not be overlooked."""
    for violation in record.violations:
        source = "" if violation.source in violation.text else f" ({violation.source})"
        yield styled("violation"), safe(violation.text + source)
    sealed = facts.sealed(record)
    if sealed is not None and sealed.redacted:
        yield Text("redacted"), safe(", ".join(sealed.redacted))
    for event in record.events:
        if event.data.type == "error":
            yield styled("error"), safe(sentence(event.data))
        if isinstance(event.data, Late):
            yield styled("late"), safe(sentence(event.data.fact))


def _timeline(record: Record) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True, style="dim")
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold", style="dim", max_width=18)
    grid.add_column(overflow="fold", ratio=1)
    for event in record.events:
        offset = milliseconds(record.envelope.correlation.created_at, event.at)
        grid.add_row(
            Text(f"+{span(offset)}" if offset >= 0 else span(offset)),
            styled(event.data.type),
            safe(event.by),
            safe(sentence(event.data)),
        )
    return _inset(grid)


def _chain(chain: ChainStatus) -> Iterator[RenderableType]:
    if chain.findings:
        yield _title("chain", "NOT SOUND", "bold red")
        yield from (_inset(finding_text(finding)) for finding in chain.findings)
    else:
        yield _title("chain", "sound", "green")
        of = f"{counted(chain.entries, 'entry')} in {counted(len(chain.chains), 'chain')}"
        yield _inset(Text(f"{of}, all hashes recomputed", style="dim"))
