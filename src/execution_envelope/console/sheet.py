"""One record as a page has it: plain texts and pictures, section by section. Pure.

What is long is cut here, and counted: the command shows it whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from msgspec.structs import asdict

from execution_envelope.console.charts import Bar, bars, positions
from execution_envelope.delta import granted_totals
from execution_envelope.envelope import Constraint
from execution_envelope.lifecycle import Granted, Late, Verdict, ended
from execution_envelope.presentation import facts
from execution_envelope.presentation.text import (
    amounts,
    because,
    counted,
    marks,
    milliseconds,
    pairs,
    plain_value,
    span,
    when,
)
from execution_envelope.record import Record
from execution_envelope.resources import Quantity, human
from execution_envelope.sentences import sentence
from execution_envelope.tree import asked

#: Lines of the longest sections. Of a timeline that is longer, the middle is left out.
MAX_EVENTS: Final = 80
MAX_PARTS: Final = 24
MAX_VERDICTS: Final = 40
MAX_ROUTES: Final = 40


@dataclass(frozen=True, slots=True)
class Line:
    """One resource or constraint; each cell is its texts, the first of them the value."""

    key: str
    bars: Sequence[Bar]
    cells: Sequence[Sequence[str]]
    outcome: str
    words: str


#: What stands at the top while nothing has ended: the newest of these.
_WAITING: Final = ("held", "approval")


def view(record: Record, *, now: datetime) -> dict[str, Any]:
    """What the template of a record is given beside the record itself."""
    envelope = record.envelope
    created, end = envelope.correlation.created_at, facts.ended_at(record)
    parts, sealed = facts.parts(record), facts.sealed(record)
    last = [event.data for event in record.events if ended(event.data) or event.data.type in _WAITING][-1:]
    said = [event.data for event in record.events if event.data.type == "observed"]
    return {
        "record": record,
        "now": now,
        "target": facts.target(record),
        "states": facts.states(record),
        "delta": facts.short_delta(record),
        "asker": facts.who(record),
        "delegation": " > ".join(f"{party.type}:{party.id}" for party in envelope.identity.delegation),
        "ended": end is not None,
        "took": span(milliseconds(created, end or now)),
        "said": [sentence(data) for data in (*said, *last)],
        "lines": list(lines(record)),
        "standing": list(_standing(record)),
        "held_parts": [_part(record, part) for part in parts[:MAX_PARTS]] if any(part.name for part in parts) else [],
        "more_parts": max(0, len(parts) - MAX_PARTS),
        "families": list(_families(record)),
        "scope": list(_scope(record)),
        "verdicts": [_verdict(verdict) for verdict in record.verdicts[-MAX_VERDICTS:]],
        "obligations": list(_obligations(record)),
        "budgets": list(_budgets(record)),
        "noted": list(_noted(record)),
        "routes": list(_routes(record, parts))[:MAX_ROUTES],
        "above": envelope.correlation.part_of,
        "links": [
            (name, id)
            for name, id in (("Runs on", envelope.correlation.runs_on), ("Supersedes", envelope.correlation.supersedes))
            if id is not None
        ],
        "digest": sealed and sealed.digest,
        **_timeline(record, created),
    }


# What was asked and given


def lines(record: Record) -> Iterator[Line]:
    """Resources with pictures, then constraints."""
    totals = asked(record)
    effective = granted_totals([Granted(record.effective, "reserved")])
    for line in facts.resource_lines(record):
        picture = bars(
            line.key,
            {
                "requested": totals.get(line.key),
                "effective": effective.get(line.key),
                "granted": line.total,
                "used": None if line.used is None else line.used.amount,
            },
        )
        yield Line(line.key, picture, _cells(record, line), _outcome(line), _words(line))
    for line in facts.constraint_lines(record):
        yield Line(line.key, (), _cells(record, line), _outcome(line), _words(line))


def _cells(record: Record, line: facts.Line) -> list[list[str]]:
    requested, effective = _value(line.key, line.requested), _value(line.key, line.effective)
    if line.requested is not None:
        if line.effective == line.requested:
            effective = ["same"]
        if line.requested.provenance == "client_default":
            requested.append("client default")
    granted = _value(line.key, line.granted)
    if line.granted is None and not record.grants:
        granted = [facts.nothing_granted(record) if line.requested is not None else "-"]
    elif isinstance(line.granted, Quantity):
        if line.total is None:
            granted.append("as asked")
        elif line.granted.per != "total" and line.total != line.granted.amount:
            granted.append(f"{human(line.key, line.total)} in all")
    used = ["-"]
    if line.used is not None:
        used = [human(line.key, line.used.amount), line.used.how]
    return [requested, effective, granted, used]


def _value(key: str, value: Quantity | Constraint | None) -> list[str]:
    if value is None:
        return ["-"]
    if isinstance(value, Constraint):
        return [plain_value(value.value)]
    return [human(key, value.amount), *marks(key, value)]


def _outcome(line: facts.Line) -> str:
    return line.outcome


def _words(line: facts.Line) -> str:
    return "" if line.outcome == "equal" else line.words


def _standing(record: Record) -> Iterator[str]:
    bases = dict.fromkeys(f"{part.grant.basis}, granted by {part.by}" for part in facts.parts(record))
    if len(bases) == 1:
        yield f"basis: {next(iter(bases))}"
    if record.is_open and record.held != record.granted:
        yield f"held now: {amounts(record.held) or 'nothing'}"
    for name, (amount, hook) in record.limits.items():
        yield f"limit: at most {name} {human(name, amount)}, set by {hook}"
    for name, (values, hook) in record.allowed.items():
        yield f"limit: {name} only {' or '.join(map(plain_value, values))}, set by {hook}"
    unstated = sum(difference.unstated for difference in record.differences)
    if unstated:
        yield f"{counted(unstated, 'difference')} without a reason given"
    if record.undecided:
        yield "undecided: no decider covers this kind"


def _part(record: Record, part: facts.Part) -> Mapping[str, str]:
    now = "ended" if not record.is_open else "released" if part.released else "held"
    serves = "" if not part.ready else ", serves" if now == "held" else ", served"
    return {
        "name": part.name,
        "now": now + serves,
        "basis": part.grant.basis,
        "granted": amounts(part.grant.resources),
        "route": pairs(part.grant.route),
        "by": part.by,
    }


# Who asked, and under what


def _families(record: Record) -> Iterator[tuple[str, str]]:
    envelope = record.envelope
    identity, execution, correlation = envelope.identity, envelope.execution, envelope.correlation
    tenant = f"of tenant {identity.tenant}" if identity.tenant is not None else "no tenant"
    proof = identity.authentication
    how = "how it was authenticated is not recorded"
    if proof is not None:
        how = f"authenticated by {proof.method}" + (f", issuer {proof.issuer}" if proof.issuer else "")
    roles = f"roles {', '.join(identity.roles)}" if identity.roles else "no roles"
    yield "identity", f"{identity.subject.type}:{identity.subject.id} {tenant}, {roles}; {how}"
    entered = f", entered by {execution.entrypoint}" if execution.entrypoint else ""
    yield "execution", f"{execution.operation} ({execution.kind}) on {facts.target(record)}{entered}"
    yield "scope", f"{sum(1 for _ in _scope(record))} values, in the table below"
    requested = envelope.requested
    demands = pairs({name: value.value for name, value in requested.constraints.items()})
    yield "requested", "; ".join(filter(None, (amounts(requested.resources), demands))) or "nothing"
    named = {
        "request": correlation.request_id,
        "trace": correlation.traceparent and correlation.traceparent.split("-")[1],
        "idempotency key": correlation.idempotency_key,
        "part of": correlation.part_of,
        "runs on": correlation.runs_on,
        "supersedes": correlation.supersedes,
    }
    found = [f"{name} {value}" for name, value in named.items() if value is not None]
    found += [f"{kind}:{reference}" for kind, reference in record.references.items()]
    found += [
        f"facet {name} by {facet.producer}: {plain_value(facet.text)}" for name, facet in correlation.facets.items()
    ]
    yield "correlation", "; ".join(found) or "no request id, trace, key or link"
    if record.bound is not None:
        yield "owner", f"{record.bound.owner} closes it, to be asked after from {when(record.bound.check_by)}"


def _scope(record: Record) -> Iterator[Mapping[str, str]]:
    values = asdict(record.envelope.scope)
    hints = values.pop("hints")
    read = record.hints_read
    for name, scoped in [*values.items(), *((f"hint {name}", hint) for name, hint in hints.items())]:
        if scoped is None:
            continue
        content = ", ".join(scoped.value) if isinstance(scoped.value, tuple) else scoped.value
        hooks = ""
        if name.startswith("hint "):
            hooks = ", ".join(read.get(name.removeprefix("hint "), [])) or "no hook"
        yield {
            "name": name,
            "value": plain_value(content),
            "provenance": f"{scoped.provenance} by {scoped.by}" if scoped.by else scoped.provenance,
            "read": hooks,
        }


# What was said, and when


def _verdict(verdict: Verdict) -> Mapping[str, Any]:
    more = []
    if verdict.failure:
        more.append(f"{verdict.failure}: failure mode {verdict.failure_mode} applied")
    if verdict.limits:
        more.append(f"at most {amounts(verdict.limits)}")
    more += [f"{name} only {' or '.join(map(plain_value, values))}" for name, values in verdict.allowed.items()]
    more += verdict.errors[:8]
    if verdict.hints:
        more.append(f"read the hints {', '.join(verdict.hints)}")
    if verdict.answer:
        more.append(f"answered {verdict.answer}")
    if verdict.retryable:
        more.append("trying later can help")
    return {
        "hook": verdict.hook,
        "version": verdict.version,
        "decision": verdict.decision,
        "why": because(verdict.code, verdict.message) if verdict.code else verdict.message or "",
        "more": more,
        "policies": ", ".join(verdict.policies),
        "revision": verdict.revision,
        "shadow": verdict.shadow,
        "took": f"{verdict.duration_us / 1000:.1f} ms",
    }


def _obligations(record: Record) -> Iterator[str]:
    for name, duty in record.obligations.items():
        said = f"{name}: {duty.state}, attached by {duty.hook}" + ("" if duty.required else ", optional")
        yield because(said, duty.text)


def _budgets(record: Record) -> Iterator[str]:
    for entry in record.budgets.values():
        said = f"{human(entry.resource, entry.reserved)} reserved, {human(entry.resource, entry.spent)} spent"
        unknown = ", amount unknown" if entry.unknown else ""
        of = f" of {human(entry.resource, entry.limit)} {entry.resource} ({entry.window}){unknown}"
        yield f"{entry.account}: {said}{of}" + (", not enforced" if entry.shadow else "")


def _noted(record: Record) -> Iterator[str]:
    for review in (record.flagged, record.revoking):
        if review is not None:
            yield sentence(review.data)
    for violation in record.violations:
        yield f"violation: {violation.text} ({violation.source})"
    sealed = facts.sealed(record)
    if sealed is not None and sealed.redacted:
        yield f"credentials were taken out at {', '.join(sealed.redacted)}"
    for event in record.events:
        if event.data.type == "error" or isinstance(event.data, Late):
            yield sentence(event.data)


def _routes(record: Record, parts: Sequence[facts.Part]) -> Iterator[Mapping[str, str]]:
    for part in parts:
        if part.grant.route:
            yield {
                "outcome": "chosen",
                "name": pairs(part.grant.route),
                "reason": f"{part.name or 'the whole'}, granted by {part.by}",
                "when": when(part.at),
            }
    for candidate in dict.fromkeys(candidate for part in parts for candidate in part.grant.candidates):
        yield {"outcome": candidate.outcome, "name": candidate.name, "reason": candidate.reason or "", "when": ""}
    for found in record.attempts:
        often = f"{when(found.first)}"
        if found.times > 1:
            often = f"{found.times} times, {when(found.first)} to {when(found.last)}"
        for candidate in found.candidates:
            reason = f"{candidate.reason or ''} ({found.reason})".strip()
            yield {"outcome": candidate.outcome, "name": candidate.name, "reason": reason, "when": often}
        if not found.candidates:
            yield {"outcome": "refused", "name": "nowhere", "reason": found.reason, "when": often}


def _timeline(record: Record, created: str) -> Mapping[str, Any]:
    events = record.events
    offsets = [milliseconds(created, event.at) for event in events]
    kept = list(range(len(events)))
    if len(events) > MAX_EVENTS:
        kept = [*kept[: MAX_EVENTS // 2], *kept[-MAX_EVENTS // 2 :]]
    return {
        "events": [
            {
                "sequence": events[at].sequence,
                "offset": f"+{span(offsets[at])}" if offsets[at] >= 0 else span(offsets[at]),
                "type": events[at].data.type,
                "words": sentence(events[at].data),
                "by": events[at].by,
                "at": events[at].at,
            }
            for at in kept
        ],
        "more_events": len(events) - len(kept),
        "marks": sorted(set(positions(offsets)))[:200],
    }
