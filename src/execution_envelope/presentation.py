"""A record as people and programs see it: pictures for a terminal, and plain JSON data. No I/O, no clock.

Everything in a record was written by somebody: `clean` takes out what a terminal would obey, and no text is ever read
as markup. The JSON data keeps it all as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

import msgspec
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from execution_envelope.delta import Difference, in_words
from execution_envelope.envelope import Constraint, Scoped
from execution_envelope.ledger import AttemptedRequest, Finding
from execution_envelope.ledger.chain import Opened
from execution_envelope.lifecycle import (
    Admitted,
    Candidate,
    Effective,
    Event,
    EventData,
    Granted,
    Late,
    Ready,
    Released,
    Sealed,
    ended,
)
from execution_envelope.record import WHOLE, Attempts, Record, Usage
from execution_envelope.resources import UNKNOWN, VOCABULARY, Amount, Quantity, human

STATE_STYLES: Final[Mapping[str, str]] = {
    "asked": "white",
    "held": "yellow",
    "admitted": "cyan",
    "granted": "green",
    "completed": "green",
    "denied": "red",
    "expired": "red",
    "rejected": "red",
    "failed": "red",
    "cancelled": "yellow",
    "revoked": "magenta",
    "abandoned": "magenta",
}
OUTCOME_STYLES: Final[Mapping[str, str]] = {
    "equal": "green",
    "reduced": "yellow",
    "raised": "cyan",
    "substituted": "magenta",
    "added": "cyan",
    "withheld": "red",
    "ignored": "bold red",
    "unknown": "yellow",
    "pending": "yellow",
    "held": "yellow",
    "none": "dim",
}
_VERDICT_STYLES: Final = {"allow": "green", "deny": "red", "hold": "yellow", "warn": "yellow", "abstain": "dim"}
_CANDIDATE_STYLES: Final = {"chosen": "green", "refused": "red", "tried": "yellow", "considered": "dim"}
_EVENT_STYLES: Final = {**STATE_STYLES, "violation": "bold red", "error": "red", "attempt": "yellow", "late": "magenta"}
_BASES: Final = {
    "reserved": "reserved (a scheduler's promise)",
    "allocated": "allocated",
    "enforced": "enforced (a limit that holds)",
}
#: Below this width the difference stands under its row instead of in a column of its own.
_WIDE: Final = 96
#: Below this width an envelope takes two lines of a list.
_WIDE_LIST: Final = 160
#: The longest a constraint or another open value gets in a picture.
_MAX_VALUE: Final = 120


def clean(text: str) -> str:
    """Untrusted text as it may reach a terminal: one line, without control, direction and invisible characters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else "" for c in text)


def _text(text: str, style: str = "") -> Text:
    return Text(clean(text), style=style)


def counted(count: int, noun: str) -> str:
    """``1 entry``, ``2 entries``."""
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count} {noun if count == 1 else many}"


# Sentences


def amounts(resources: Mapping[str, Amount] | Mapping[str, Quantity]) -> str:
    """``memory 512 MiB, context 8192``."""
    return ", ".join(
        f"{name} {quantity(name, value) if isinstance(value, Quantity) else human(name, value)}"
        for name, value in resources.items()
    )


def quantity(name: str, value: Quantity) -> str:
    """A quantity on one line, with what it is counted for and its bounds."""
    return " ".join([human(name, value.amount), *_marks(name, value)])


def _marks(name: str, value: Quantity) -> list[str]:
    found = [] if value.per == "total" else [f"per {value.per}"]
    if value.floor is not None:
        found.append(f"floor {human(name, value.floor)}")
    if value.ceiling is not None:
        found.append(f"ceiling {human(name, value.ceiling)}")
    return found


def plain_value(value: Any) -> str:
    """An open value for people: text bare, the rest as JSON, cut when long."""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}... ({len(text)} characters)"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {plain_value(value)}" for name, value in values.items())


def _candidate(candidate: Candidate) -> str:
    return f"{candidate.name} {candidate.outcome}" + (f": {candidate.reason}" if candidate.reason else "")


def _coded(word: str, code: str, message: str) -> str:
    return f"{word} ({code}): {message}" if message else f"{word} ({code})"


def _with(word: str, message: str | None) -> str:
    return f"{word}: {message}" if message else word


def _sealed(data: Any) -> str:
    said = f"the five families were sealed, sha256 {data.digest[:12]}..."
    if data.key is not None:
        said += ", under an idempotency key"
    if data.redacted:
        said += f"; credentials were taken out at {', '.join(data.redacted)}"
    return said


def _verdict(data: Any) -> str:
    hook = f"{data.hook} {data.version}"
    if data.failure is not None:
        said = f"{hook} failed ({_with(data.failure, data.message)}); its failure mode {data.failure_mode} was applied"
        return said + (f" ({data.code})" if data.code else "")
    said = f"{hook} says {data.decision}" + (f" ({data.code})" if data.code else "")
    said = _with(said, data.message)
    return said + (f"; at most {amounts(data.limits)}" if data.limits else "")


def _admitted(data: Any) -> str:
    if data.observed is not None:
        return f"admitted, not enforced: enforcing would have {data.observed} it"
    return "admitted undecided: no decider covers this kind" if data.undecided else "admitted, it may go on"


def _denied(data: Any) -> str:
    return _coded("denied", data.code, data.message) + ("; trying later can help" if data.retryable else "")


def _held(data: Any) -> str:
    said = _coded("held until somebody approves", data.code, data.message)
    return said + (f"; to be sent again under the key {data.key}" if data.key else "")


def _effective_sentence(data: Any) -> str:
    what = ", ".join(filter(None, (amounts(data.resources), _pairs(data.constraints))))
    return f"taken for {what or 'the same'}; {data.cause}: {data.text}"


def _attempt(data: Any) -> str:
    seen = "; ".join(_candidate(candidate) for candidate in data.candidates)
    return f"found no room: {data.reason}" + (f" ({seen})" if seen else "")


def _granted_sentence(data: Any) -> str:
    said = f"{data.part or 'the whole'} is granted {amounts(data.resources) or 'nothing countable'}"
    if data.constraints:
        said += f", {_pairs(data.constraints)}"
    if data.route:
        said += f", on {_pairs(data.route)}"
    return f"{said} ({data.basis})"


def _used_sentence(data: Any) -> str:
    said = f"{data.part or 'it'} used {amounts(data.resources)} ({data.how})"
    return said + (f", report {data.key}" if data.key else "")


def _completed(data: Any) -> str:
    said = "completed, what was granted is unknown" if data.granted == UNKNOWN else "completed"
    return _with(said, data.message)


#: Event type -> the sentence that says what happened. A test holds that every type of event has one.
SENTENCES: Final[Mapping[str, Callable[[Any], str]]] = {
    "sealed": _sealed,
    "verdict": _verdict,
    "admitted": _admitted,
    "denied": _denied,
    "held": _held,
    "expired": lambda data: "expired: nobody approved in time",
    "limit": lambda data: f"{data.hook} allows at most {amounts(data.resources)}",
    "effective": _effective_sentence,
    "attempt": _attempt,
    "bound": lambda data: (
        f"bound to {data.kind}:{data.reference}, owned by {data.owner}, to be asked after from {when(data.check_by)}"
    ),
    "granted": _granted_sentence,
    "released": lambda data: _with(f"{data.part or 'the whole'} was released", data.reason),
    "ready": lambda data: f"{data.part or 'it'} serves",
    "used": _used_sentence,
    "violation": lambda data: f"beyond a bound: {data.text}",
    "error": lambda data: f"an error that did not end it: {data.text}",
    "rejected": lambda data: _coded("rejected", data.code, data.message),
    "completed": _completed,
    "failed": lambda data: _coded("failed", data.code, data.message),
    "cancelled": lambda data: _with("cancelled", data.message),
    "revoked": lambda data: _with("revoked", data.message),
    "abandoned": lambda data: f"abandoned: {data.evidence}",
    "late": lambda data: f"after the end: {sentence(data.fact)}",
}


def sentence(data: EventData | Opened) -> str:
    """What happened, in one sentence; untrusted text in it is as it was recorded."""
    if isinstance(data, Opened):
        return f"a chain was opened by {data.process}, version {data.version}"
    return SENTENCES[data.type](data)


# Time


def when(at: str) -> str:
    """A recorded time for people: to the second, in UTC."""
    return f"{at[:10]} {at[11:19]}Z"


def moment(at: str) -> datetime:
    return datetime.fromisoformat(at)


def milliseconds(start: str, end: str | datetime) -> int:
    """From one recorded time to another."""
    stop = moment(end) if isinstance(end, str) else end
    return round((stop - moment(start)).total_seconds() * 1000)


def span(ms: int) -> str:
    """A length of time for people, in its two largest units."""
    if ms < 0:
        return f"-{span(-ms)}"
    if ms < 1000:
        return f"{ms} ms"
    if ms < 60_000:
        return f"{ms / 1000:.1f} s"
    units = (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000))
    first = next(n for n, (_, size) in enumerate(units) if ms >= size)
    (large, size), (small, part) = units[first], units[first + 1]
    rest = ms % size // part
    return f"{ms // size} {large} {rest} {small}" if rest else f"{ms // size} {large}"


def ago(ms: int) -> str:
    """How long ago, in its largest unit."""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000)):
        if ms >= size:
            return f"{ms // size} {unit} ago"
    return "just now"


# What a record comes to


@dataclass(frozen=True, slots=True)
class Line:
    """One resource or constraint: the four values side by side, and the difference.

    `outcome` is the difference's; without one it says why there is none: *pending*, *denied*, ..., or *none*.
    `granted` is counted as the ask was (`per`), `total` over all parts; for a constraint it is the value.
    """

    key: str
    sort: str
    requested: Quantity | Constraint | None
    effective: Any
    granted: Any
    total: Amount | None
    used: Usage | None
    outcome: str
    words: str
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class Part:
    """What one part holds or held; the whole has the name ``""``."""

    name: str
    by: str
    at: str
    grant: Granted
    released: bool
    ready: bool


@dataclass(frozen=True, slots=True)
class ChainStatus:
    """What recomputing the hash chains says of one envelope; `findings` is None when it was not recomputed."""

    entries: int
    chains: tuple[str, ...]
    findings: tuple[Finding, ...] | None
    elsewhere: int = 0


def lines(record: Record) -> list[Line]:
    """One for each resource and constraint that anybody spoke of, in the order they were spoken of."""
    requested = record.envelope.requested
    found = {(difference.sort, difference.key): difference for difference in record.differences}
    effective, granted, used = record.effective, record.granted, record.used
    result: list[Line] = []
    for name in dict.fromkeys([*requested.resources, *effective, *granted, *used]):
        difference = found.get(("resource", name))
        given = difference.granted if difference else granted.get(name)
        outcome, words = _difference(record, name, requested.resources.get(name), difference, "resource")
        result.append(
            Line(
                name,
                "resource",
                requested.resources.get(name),
                effective.get(name),
                given,
                granted.get(name),
                used.get(name),
                outcome,
                words,
                difference,
            )
        )
    meant = {name: constraint.value for name, constraint in requested.constraints.items()}
    for _, data in _effectives(record):
        meant.update(data.constraints)
    given_constraints = [name for grant in record.grants.values() for name in grant.constraints]
    for name in dict.fromkeys([*meant, *given_constraints]):
        difference = found.get(("constraint", name))
        asked = requested.constraints.get(name)
        outcome, words = _difference(record, name, asked, difference, "constraint")
        value = difference.granted if difference else None
        result.append(Line(name, "constraint", asked, meant.get(name), value, None, None, outcome, words, difference))
    return result


def _effectives(record: Record) -> Iterator[tuple[str, Effective]]:
    for event in record.events:
        if isinstance(event.data, Effective):
            yield event.by, event.data


def _difference(
    record: Record, name: str, asked: Quantity | Constraint | None, difference: Difference | None, sort: str
) -> tuple[str, str]:
    """The outcome and its sentence."""
    if difference is not None:
        return difference.outcome, in_words(difference)
    steps = "; ".join(
        f"{data.cause} ({by}): {data.text}"
        for by, data in _effectives(record)
        if name in (data.resources if sort == "resource" else data.constraints)
    )
    if record.grants:
        if asked is not None:
            return "none", "client default, nobody spoke of it"
        return "none", _with("not asked, not in the grant", steps) if steps else "only reported"
    outcome = nothing_granted(record) if asked is not None or steps else "none"
    said = {"pending": "nothing granted yet", UNKNOWN: "nobody said what was granted", "none": "only reported"}
    return outcome, "; ".join(filter(None, (said.get(outcome, "nothing was granted"), steps)))


def nothing_granted(record: Record) -> str:
    """Why no grant stands on the record: *pending* while it may come, else the state; *unknown* when completed."""
    if record.state in ("asked", "admitted"):
        return "pending"
    return UNKNOWN if record.ungranted else record.state


def parts(record: Record) -> list[Part]:
    """The newest grant of every part, with whether it was released and whether it serves."""
    found = []
    for name, grant in record.grants.items():
        after: list[Event] = []
        for event in reversed(record.events):
            if isinstance(event.data, Granted) and (event.data.part or WHOLE) == name:
                said = [e.data for e in after]
                released = any(isinstance(d, Released) and (d.part or WHOLE) == name for d in said)
                served = any(
                    isinstance(e.data, Ready) and (e.data.part or WHOLE) in (name, WHOLE) for e in record.events
                )
                found.append(Part(name, event.by, event.at, grant, released, served))
                break
            after.append(event)
    return found


def tally(record: Record) -> dict[str, int]:
    """How many differences of each outcome, how many unstated, and how many violations."""
    outcomes: Counter[str] = Counter(difference.outcome for difference in record.differences)
    return {
        **{name: outcomes[name] for name in OUTCOME_STYLES if name in outcomes},
        "unstated": sum(difference.unstated for difference in record.differences),
        "violations": len(record.violations),
    }


def short_delta(record: Record) -> str:
    """``2 reduced, 1 ignored, 1 unstated``; ``as asked``; or why there is nothing to compare."""
    counts = tally(record)
    counts.pop("equal", None)
    violations = counts.pop("violations")
    said = [f"{count} {name}" for name, count in counts.items() if count]
    if violations:
        said.append(counted(violations, "violation"))
    if said:
        return ", ".join(said)
    if record.grants:
        return "as asked"
    outcome = nothing_granted(record)
    return "granted unknown" if outcome == UNKNOWN else "pending" if outcome == "pending" else "nothing granted"


def ended_at(record: Record) -> str | None:
    return next((event.at for event in record.events if ended(event.data)), None)


def _sealed_fact(record: Record) -> Sealed | None:
    return next((event.data for event in record.events if isinstance(event.data, Sealed)), None)


def _who(record: Record) -> str:
    identity = record.envelope.identity
    subject = f"{identity.subject.type}:{identity.subject.id}"
    return f"{identity.tenant}/{subject}" if identity.tenant is not None else subject


def _target(record: Record) -> str:
    target = record.envelope.execution.target
    return f"{target.type}:{target.id}" + (f" version {target.version}" if target.version else "")


# JSON


def _plain(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


def summary(record: Record, *, now: datetime) -> dict[str, Any]:
    """One envelope of a list, as JSON data; documented in docs/reference/cli.md."""
    envelope = record.envelope
    target = envelope.execution.target
    return {
        "id": record.id,
        "created_at": envelope.correlation.created_at,
        "age_ms": milliseconds(envelope.correlation.created_at, now),
        "ended_at": ended_at(record),
        "kind": envelope.execution.kind,
        "operation": envelope.execution.operation,
        "tenant": envelope.identity.tenant,
        "subject": {"type": envelope.identity.subject.type, "id": envelope.identity.subject.id},
        "target": {"type": target.type, "id": target.id, "version": target.version},
        "state": record.state,
        "open": record.is_open,
        "delta": tally(record),
        "delta_in_words": short_delta(record),
        "references": record.references,
    }


def attempted_data(request: AttemptedRequest, *, now: datetime) -> dict[str, Any]:
    """An attempted request as JSON data."""
    return {**asdict(request), "age_ms": milliseconds(request.at, now)}


def entry_data(data: EventData | Opened) -> dict[str, Any]:
    """The type, the sentence and the fact of one entry, as JSON data."""
    plain = _plain(data)
    return {"type": plain["type"], "sentence": sentence(data), "data": plain}


def details(
    record: Record, *, now: datetime, children: Sequence[str] = (), chain: ChainStatus | None = None
) -> dict[str, Any]:
    """Everything on the record as JSON data, amounts in base units; documented in docs/reference/cli.md."""
    created = record.envelope.correlation.created_at
    sealed = _sealed_fact(record)
    return {
        **summary(record, now=now),
        "duration_ms": milliseconds(created, ended_at(record) or now),
        "bound": None if record.bound is None else _plain(record.bound),
        "digest": None if sealed is None else sealed.digest,
        "request_digest": None if sealed is None else sealed.request,
        "redacted": [] if sealed is None else list(sealed.redacted),
        "undecided": record.undecided,
        "observed": next((e.data.observed for e in record.events if isinstance(e.data, Admitted)), None),
        "ungranted": record.ungranted,
        "ready": record.ready,
        "envelope": _plain(record.envelope),
        "children": list(children),
        "resources": [_line_data(line) for line in lines(record) if line.sort == "resource"],
        "constraints": [_line_data(line) for line in lines(record) if line.sort == "constraint"],
        "granted": record.granted,
        "held": record.held,
        "limits": {name: {"amount": amount, "hook": hook} for name, (amount, hook) in record.limits.items()},
        "parts": [_part_data(part) for part in parts(record)],
        "attempts": [
            {
                "reason": attempts.reason,
                "candidates": [_candidate_data(candidate) for candidate in attempts.candidates],
                "first": attempts.first,
                "last": attempts.last,
                "times": attempts.times,
            }
            for attempts in record.attempts
        ],
        "verdicts": [
            {
                "hook": verdict.hook,
                "version": verdict.version,
                "decision": verdict.decision,
                "code": verdict.code,
                "message": verdict.message,
                "retryable": verdict.retryable,
                "duration_us": verdict.duration_us,
                "limits": dict(verdict.limits),
                "failure": verdict.failure,
                "failure_mode": verdict.failure_mode,
            }
            for verdict in record.verdicts
        ],
        "violations": [{n: getattr(v, n) for n in v.__struct_fields__} for v in record.violations],
        "late": sum(isinstance(event.data, Late) for event in record.events),
        "timeline": [
            {
                "sequence": event.sequence,
                "at": event.at,
                "offset_ms": milliseconds(created, event.at),
                "by": event.by,
                **entry_data(event.data),
            }
            for event in record.events
        ],
        "chain": None if chain is None else chain_data(chain),
    }


def chain_data(chain: ChainStatus) -> dict[str, Any]:
    """A chain status as JSON data."""
    findings = chain.findings
    return {
        "checked": findings is not None,
        "sound": None if findings is None else not findings,
        "entries": chain.entries,
        "chains": list(chain.chains),
        "findings": [] if findings is None else [finding_data(finding) for finding in findings],
        "findings_elsewhere": chain.elsewhere,
    }


def finding_data(finding: Finding) -> dict[str, str]:
    """A finding of verification as JSON data."""
    return {"row": finding.row, "problem": finding.problem}


def _quantity_data(value: Quantity) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__struct_fields__}


def _candidate_data(candidate: Candidate) -> dict[str, Any]:
    return {"name": candidate.name, "outcome": candidate.outcome, "reason": candidate.reason}


def _line_data(line: Line) -> dict[str, Any]:
    difference = line.difference
    said = {
        "outcome": line.outcome,
        "in_words": line.words,
        "reasons": [] if difference is None else [_plain(reason) for reason in difference.reasons],
        "unstated": difference is not None and difference.unstated,
    }
    if line.sort == "constraint":
        asked = line.requested
        assert asked is None or isinstance(asked, Constraint)
        return {
            "key": line.key,
            "requested": None if asked is None else {"value": _plain(asked.value), "provenance": asked.provenance},
            "effective": _plain(line.effective),
            "granted": _plain(line.granted),
            **said,
        }
    assert line.requested is None or isinstance(line.requested, Quantity)
    return {
        "key": line.key,
        "unit": VOCABULARY[line.key].unit,
        "requested": None if line.requested is None else _quantity_data(line.requested),
        "effective": None if line.effective is None else _quantity_data(line.effective),
        "granted": None
        if line.granted is None
        else {
            "amount": line.granted,
            "per": "total" if difference is None else difference.per,
            "total": line.total,
        },
        "used": None if line.used is None else {"amount": line.used.amount, "how": line.used.how},
        **said,
        "breach": None if difference is None else difference.breach,
    }


def _part_data(part: Part) -> dict[str, Any]:
    grant = part.grant
    return {
        "part": part.name or None,
        "by": part.by,
        "at": part.at,
        "basis": grant.basis,
        "released": part.released,
        "ready": part.ready,
        "resources": {name: _quantity_data(value) for name, value in grant.resources.items()},
        "constraints": _plain(grant.constraints),
        "honoured": list(grant.honoured),
        "because": _plain(grant.because),
        "route": dict(grant.route),
        "candidates": [_candidate_data(candidate) for candidate in grant.candidates],
    }


# Pictures


class Listing:
    """Envelopes in a table: one line each on a wide terminal, two on a narrow one."""

    def __init__(self, rows: Iterable[Mapping[str, Text]]) -> None:
        self._rows = list(rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self._rows:
            yield Text("no envelopes", style="dim")
            return
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        if options.max_width >= _WIDE_LIST:
            for name in ("id", "when", "kind", "operation", "who", "target", "state", "delta", "references"):
                table.add_column(name, overflow="fold", no_wrap=name in ("id", "when", "kind", "operation", "state"))
            for row in self._rows:
                table.add_row(*row.values())
        else:
            table.add_column("id\nwhen", no_wrap=True)
            table.add_column("kind, operation,\ntarget", overflow="fold", min_width=20)
            table.add_column("who\nreferences", overflow="fold")
            table.add_column("state\ndelta", overflow="fold", max_width=24)
            for row in self._rows:
                table.add_row(
                    Group(row["id"], row["when"]),
                    Group(row["kind"], row["operation"], row["target"]),
                    Group(row["who"], row["references"]),
                    Group(row["state"], row["delta"]),
                )
        yield table


def list_row(record: Record, *, now: datetime) -> dict[str, Text]:
    """The cells of one envelope in a `Listing`."""
    execution, created = record.envelope.execution, record.envelope.correlation.created_at
    references = " ".join(f"{kind}:{reference}" for kind, reference in record.references.items())
    delta = short_delta(record)
    return {
        "id": _text(record.id[-12:], "bold"),
        "when": Text(ago(milliseconds(created, now)), style="dim"),
        "kind": _text(execution.kind),
        "operation": _text(execution.operation, "dim"),
        "who": _text(_who(record)),
        "target": _text(_target(record)),
        "state": Text(record.state, style=STATE_STYLES[record.state]),
        "delta": Text(delta, style="dim" if delta in ("as asked", "pending", "nothing granted") else "yellow"),
        "references": _text(references, "dim"),
    }


def attempted_table(requests: Iterable[AttemptedRequest], *, now: datetime) -> RenderableType:
    """Requests that never became an envelope."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("when", "status", "reason", "surface", "detail", "request id"):
        table.add_column(name, overflow="fold", no_wrap=name in ("when", "status"))
    for request in requests:
        detail = _text(request.detail)
        if request.dropped:
            detail.append(f" ({request.dropped} more before it were not kept)", style="red")
        table.add_row(
            Text(ago(milliseconds(request.at, now)), style="dim"),
            Text(str(request.status)),
            _text(request.reason),
            _text(request.surface),
            detail,
            _text(request.request_id or "", "dim"),
        )
    return table if table.row_count else Text("no attempted requests", style="dim")


def entry_line(at: str, envelope: str | None, by: str, data: EventData | Opened) -> Text:
    """One entry of the ledger on one line."""
    type_ = str(data.__struct_config__.tag)
    return Text.assemble(
        (clean(when(at)), "dim"),
        "  ",
        (clean((envelope or "-")[-12:]).ljust(12), "bold"),
        "  ",
        (type_.ljust(9), _EVENT_STYLES.get(type_, "")),
        "  ",
        (clean(by), "dim"),
        "  ",
        clean(sentence(data)),
    )


class Sheet:
    """Everything on one record, for a terminal of 80 columns and more."""

    def __init__(
        self, record: Record, *, now: datetime, children: Sequence[str] = (), chain: ChainStatus | None = None
    ) -> None:
        self._record = record
        self._now = now
        self._children = children
        self._chain = chain
        # Derived here, so that a damaged record fails before anything of it is on the screen.
        self._lines = lines(record)
        self._parts = parts(record)
        created = record.envelope.correlation.created_at
        self._timeline = [(milliseconds(created, event.at), event, sentence(event.data)) for event in record.events]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._header()
        yield self._families()
        yield _title("resources", self._verdict_in_short())
        yield self._wide() if options.max_width >= _WIDE else self._narrow()
        yield from self._standing()
        yield from self._route()
        yield from self._judged()
        yield from self._noted()
        yield _title("timeline")
        yield self._history()
        if self._chain is not None:
            yield from _chain_lines(self._chain)

    def _header(self) -> RenderableType:
        record = self._record
        execution, created = record.envelope.execution, record.envelope.correlation.created_at
        style = STATE_STYLES[record.state]
        first = Table.grid(expand=True, padding=(0, 1))
        first.add_column(ratio=1, overflow="fold")
        first.add_column(justify="right", no_wrap=True)
        first.add_row(
            Text.assemble(
                (clean(execution.kind), "bold"), "  ", clean(execution.operation), "  ", clean(_target(record))
            ),
            Text(f" {record.state.upper()} ", style=f"bold reverse {style}"),
        )
        end = ended_at(record)
        took = span(milliseconds(created, end or self._now))
        times = f"{when(created)}, {ago(milliseconds(created, self._now))}; "
        times += f"{record.state} after {took}" if end else f"open for {took}"
        rows: list[RenderableType] = [
            first,
            _text(record.id, "dim"),
            Text.assemble("asked by ", (clean(_who(record)), "bold"), *self._delegation()),
            Text(times),
        ]
        if record.bound is not None:
            bound = record.bound
            references = ", ".join(f"{kind}:{reference}" for kind, reference in record.references.items())
            rows.append(_text(f"bound to {references}, owned by {bound.owner}"))
        rows += [_text(sentence(e.data), style) for e in record.events if ended(e.data) or e.data.type == "held"][-1:]
        return Panel(Group(*rows), border_style=style, box=box.ROUNDED)

    def _delegation(self) -> list[str]:
        chain = self._record.envelope.identity.delegation
        return [f", acting for {' > '.join(clean(f'{party.type}:{party.id}') for party in chain)}"] if chain else []

    def _families(self) -> RenderableType:
        envelope = self._record.envelope
        grid = _grid()
        grid.add_row("identity", self._identity())
        execution = f"{envelope.execution.operation} ({envelope.execution.kind}) on {_target(self._record)}"
        if envelope.execution.entrypoint:
            execution += f", entered by {envelope.execution.entrypoint}"
        said = _text(execution)
        if envelope.execution.request:
            request = envelope.execution.request
            said.append(f"\nrequest {clean(request.schema)}, sha256 {clean(request.sha256[:12])}...", style="dim")
        grid.add_row("execution", said)
        grid.add_row("scope", self._scope())
        grid.add_row("correlation", self._correlation())
        return Padding(grid, (0, 1))

    def _identity(self) -> Text:
        identity = self._record.envelope.identity
        said = f"{identity.subject.type}:{identity.subject.id}"
        said += f" of tenant {identity.tenant}" if identity.tenant is not None else ", no tenant"
        said += f", roles {', '.join(identity.roles)}" if identity.roles else ", no roles"
        proof = identity.authentication
        if proof is None:
            return _text(f"{said}; how it was authenticated is not recorded")
        said += f"; authenticated by {proof.method}"
        said += f", issuer {proof.issuer}" if proof.issuer else ""
        return _text(said + (f", session {proof.session}" if proof.session else ""))

    def _scope(self) -> Text:
        scope = self._record.envelope.scope
        values: dict[str, Scoped] = {
            name: getattr(scope, name)
            for name in scope.__struct_fields__
            if name != "hints" and getattr(scope, name) is not None
        }
        values |= {f"hint {name}": value for name, value in scope.hints.items()}
        said = Text()
        for name, scoped in values.items():
            content = scoped.value if isinstance(scoped.value, str | int) else ", ".join(scoped.value)
            said.append(f"{'; ' if said else ''}{clean(name)} {clean(plain_value(content))} ")
            source = f"{scoped.provenance} by {scoped.by}" if scoped.by else scoped.provenance
            said.append(f"({clean(source)})", style="green" if scoped.provenance == "established" else "dim")
        return said or Text("none", style="dim")

    def _correlation(self) -> Text:
        correlation = self._record.envelope.correlation
        named = {
            "request": correlation.request_id,
            "trace": correlation.traceparent and correlation.traceparent.split("-")[1],
            "idempotency key": correlation.idempotency_key,
            "part of": correlation.part_of,
            "runs on": correlation.runs_on,
            "supersedes": correlation.supersedes,
        }
        found = [f"{name} {value}" for name, value in named.items() if value is not None]
        if self._children:
            newest = ", ".join(child[-12:] for child in self._children[-8:])
            found.append(f"{len(self._children)} children{', the newest' if len(self._children) > 8 else ''}: {newest}")
        found += [
            f"facet {name} by {facet.producer}: {plain_value(facet.text)}" for name, facet in correlation.facets.items()
        ]
        return _text("; ".join(found)) if found else Text("no request id, trace, key or link", style="dim")

    def _verdict_in_short(self) -> str:
        return "" if not self._lines else short_delta(self._record)

    def _wide(self) -> RenderableType:
        if not self._lines:
            return _nothing_asked()
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), expand=True)
        table.add_column("", overflow="fold", style="bold", max_width=20)
        for name in ("requested", "effective", "granted", "used"):
            table.add_column(name, overflow="fold", max_width=18)
        table.add_column("difference", overflow="fold", ratio=1)
        for line in self._lines:
            table.add_row(*self._values(line), _difference_text(line))
        return table

    def _narrow(self) -> RenderableType:
        """Numbers in columns, and the difference under them over the whole width."""
        if not self._lines:
            return _nothing_asked()
        names = ("", "requested", "effective", "granted", "used")
        cells = [self._values(line) for line in self._lines]
        widths = [
            min(16, max(cell_len(text) for row in cells for text in (names[n], *row[n].plain.split("\n"))))
            for n in range(5)
        ]

        def row(values: Sequence[Text]) -> Table:
            grid = Table.grid(padding=(0, 2))
            for width in widths:
                grid.add_column(width=width, overflow="fold")
            grid.add_row(*values)
            return grid

        rows: list[RenderableType] = [row([Text(name, style="bold") for name in names])]
        for line, values in zip(self._lines, cells, strict=True):
            rows.append(row(values))
            if difference := _difference_text(line):
                rows.append(Padding(difference, (0, 0, 0, 4)))
        return Padding(Group(*rows), (1, 1, 0, 1))

    def _values(self, line: Line) -> list[Text]:
        """Key, requested, effective, granted and used of one line, marks below the amounts."""
        if isinstance(line.requested, Constraint) or line.sort == "constraint":
            return self._constraint_values(line)
        asked, meant = line.requested, line.effective
        assert asked is None or isinstance(asked, Quantity)
        requested = _stacked(human(line.key, asked.amount if asked else None), _marks(line.key, asked) if asked else [])
        if asked is not None and asked.provenance == "client_default":
            requested.append("\nclient default", style="cyan")
        effective = (
            Text("same", style="dim")
            if asked is not None and meant == asked
            else _stacked(human(line.key, meant.amount if meant else None), _marks(line.key, meant) if meant else [])
        )
        return [_text(line.key, "bold"), requested, effective, self._granted_value(line), _used_value(line)]

    def _granted_value(self, line: Line) -> Text:
        if line.granted is None:
            return self._not_granted(line)
        per = "total" if line.difference is None else line.difference.per
        marks = [] if per == "total" else [f"per {per}"]
        if per != "total" and line.total is not None and line.total != line.granted:
            marks.append(f"{human(line.key, line.total)} in all")
        if line.sort == "resource" and line.total is None:
            marks.append("as asked")
        return _stacked(human(line.key, line.granted), marks)

    def _not_granted(self, line: Line) -> Text:
        if self._record.grants:
            return Text("-", style="dim")
        outcome = nothing_granted(self._record)
        word = outcome if outcome in ("pending", "held", "denied", UNKNOWN) else "none"
        if line.requested is None and word != "pending":
            word = "-"
        return Text(word, style=OUTCOME_STYLES.get(word, STATE_STYLES.get(word, "")))

    def _constraint_values(self, line: Line) -> list[Text]:
        asked = line.requested
        requested = Text("-", style="dim")
        if isinstance(asked, Constraint):
            requested = _text(plain_value(asked.value))
            if asked.provenance == "client_default":
                requested.append("\nclient default", style="cyan")
        if line.effective is None and asked is None:
            effective = Text("-", style="dim")
        elif isinstance(asked, Constraint) and _plain(asked.value) == _plain(line.effective):
            effective = Text("same", style="dim")
        else:
            effective = _text(plain_value(line.effective))
        given = line.difference is not None and line.outcome not in ("withheld", "ignored")
        granted = _text(plain_value(line.granted)) if given else self._not_granted(line)
        return [_text(line.key, "bold"), requested, effective, granted, Text("-", style="dim")]

    def _standing(self) -> Iterator[RenderableType]:
        """How firm the grant is, what each part holds, what is held now, what limits apply."""
        record = self._record
        facts: list[Text] = []
        if self._parts:
            bases = dict.fromkeys((_BASES[part.grant.basis], part.by) for part in self._parts)
            each = "; ".join(f"{basis}, granted by {by}" for basis, by in bases)
            facts.append(_text(f"basis: {each if len(bases) == 1 else 'differs, see each part'}"))
        if record.is_open and record.held != record.granted:
            facts.append(_text(f"held now: {amounts(record.held) or 'nothing'}; granted: {amounts(record.granted)}"))
        for name, (amount, hook) in record.limits.items():
            facts.append(_text(f"limit: at most {name} {human(name, amount)}, set by {hook}"))
        unstated = sum(difference.unstated for difference in record.differences)
        if unstated:
            facts.append(Text(f"unstated: {unstated} without a reason given", style="red"))
        if record.undecided:
            facts.append(Text("undecided: no decider covers this kind", style="yellow"))
        if facts:
            yield Padding(Group(*facts), (0, 1))
        if len(self._parts) > 1 or (self._parts and self._parts[0].name):
            yield from self._each_part()

    def _each_part(self) -> Iterator[RenderableType]:
        same = {
            (_plain(p.grant.resources) == _plain(self._parts[0].grant.resources), p.released, p.ready, p.grant.basis)
            for p in self._parts
        }
        names = ", ".join(part.name or "the whole" for part in self._parts)
        if len(same) == 1 and len(self._parts) > 1 and not self._parts[0].grant.route:
            yield Padding(_text(f"parts: {names}, each {amounts(self._parts[0].grant.resources)}"), (0, 1))
            return
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=True)
        for name in ("part", "now", "basis", "granted", "route"):
            table.add_column(name, overflow="fold", no_wrap=name in ("now", "basis"))
        for part in self._parts:
            now = "ended" if not self._record.is_open else "released" if part.released else "held"
            state = Text(now, style="green" if now == "held" else "dim")
            if part.ready:
                state.append(", served" if now != "held" else ", serves")
            table.add_row(
                _text(part.name or "the whole", "bold"),
                state,
                Text(part.grant.basis),
                _text(amounts(part.grant.resources)),
                _text(_pairs(part.grant.route)),
            )
        yield table

    def _route(self) -> Iterator[RenderableType]:
        considered = list(dict.fromkeys(c for part in self._parts for c in part.grant.candidates))
        # Parts with a name say where they went in their own table.
        routes = [part.grant.route for part in self._parts if part.grant.route and not part.name]
        attempts = self._record.attempts
        if not (considered or routes or attempts):
            return
        yield _title("route")
        grid = _grid()
        for route in routes:
            grid.add_row("went to", _text(_pairs(route)))
        for candidate in considered:
            grid.add_row(
                Text(candidate.outcome, style=_CANDIDATE_STYLES[candidate.outcome]), _text(_reasoned(candidate))
            )
        for found in attempts:
            grid.add_row(Text("no room", style="yellow"), _attempts(found))
        yield Padding(grid, (0, 1))

    def _judged(self) -> Iterator[RenderableType]:
        if not self._record.verdicts:
            return
        yield _title("verdicts")
        grid = _grid()
        for verdict in self._record.verdicts:
            said = _text(f"{verdict.hook} {verdict.version}", "bold")
            said.append(f", {verdict.duration_us / 1000:.1f} ms", style="dim")
            if verdict.failure:
                said.append(f"; {verdict.failure}, failure mode {verdict.failure_mode} applied", style="red")
            if verdict.code:
                said.append(f"; {clean(verdict.code)}")
            if verdict.message:
                said.append(f": {clean(verdict.message)}")
            if verdict.limits:
                said.append(f"; at most {amounts(verdict.limits)}")
            if verdict.retryable:
                said.append("; trying later can help", style="dim")
            grid.add_row(Text(verdict.decision, style=_VERDICT_STYLES[verdict.decision]), said)
        yield Padding(grid, (0, 1))

    def _noted(self) -> Iterator[RenderableType]:
        """What must not be overlooked: violations, redactions, errors, what came late."""
        grid = _grid()
        for violation in self._record.violations:
            grid.add_row(Text("violation", style="bold red"), _text(_sourced(violation.text, violation.source)))
        sealed = _sealed_fact(self._record)
        if sealed is not None and sealed.redacted:
            grid.add_row("redacted", _text(", ".join(sealed.redacted)))
        for event in self._record.events:
            if event.data.type == "error":
                grid.add_row(Text("error", style="red"), _text(sentence(event.data)))
            if isinstance(event.data, Late):
                grid.add_row(Text("late", style="magenta"), _text(sentence(event.data.fact)))
        if grid.row_count:
            yield _title("noted")
            yield Padding(grid, (0, 1))

    def _history(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(justify="right", no_wrap=True, style="dim")
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold", style="dim", max_width=18)
        grid.add_column(overflow="fold", ratio=1)
        for offset, event, said in self._timeline:
            grid.add_row(
                Text(f"+{span(offset)}" if offset >= 0 else span(offset)),
                Text(event.data.type, style=_EVENT_STYLES.get(event.data.type, "")),
                _text(event.by),
                _text(said),
            )
        return Padding(grid, (0, 1))


def _chain_lines(chain: ChainStatus) -> Iterator[RenderableType]:
    of = f"{counted(chain.entries, 'entry')} in {counted(len(chain.chains), 'chain')}"
    if chain.findings is None:
        yield _title("chain", "not recomputed here, the ledger is large: run `envelope verify`")
        return
    yield _title("chain", "sound" if not chain.findings else "NOT SOUND", "green" if not chain.findings else "bold red")
    if not chain.findings:
        yield Padding(Text(f"{of}, all hashes recomputed", style="dim"), (0, 1))
    yield from (Padding(finding_text(finding), (0, 1)) for finding in chain.findings)
    if chain.elsewhere:
        said = f"{counted(chain.elsewhere, 'finding')} elsewhere: run `envelope verify`"
        yield Padding(Text(said, style="yellow"), (0, 1))


def finding_text(finding: Finding) -> Text:
    """``row: problem``."""
    return Text.assemble((clean(finding.row), "red"), ": ", clean(finding.problem))


def _title(name: str, said: str = "", style: str = "yellow") -> RenderableType:
    title = Text.assemble((name, "bold underline"))
    if said:
        title.append("  ").append(clean(said), style=style)
    return Padding(title, (1, 1, 0, 1))


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=11)
    grid.add_column(overflow="fold", ratio=1)
    return grid


def _stacked(amount: str, marks: Sequence[str]) -> Text:
    text = _text(amount, "dim" if amount == "-" else "")
    for mark in marks:
        text.append(f"\n{clean(mark)}", style="dim")
    return text


def _used_value(line: Line) -> Text:
    if line.used is None:
        return Text("-", style="dim")
    text = Text(human(line.key, line.used.amount))
    amount, bound = line.used.amount, line.total
    style = "cyan" if line.used.how == "estimated" else "dim"
    text.append(f"\n{line.used.how}", style=style)
    if isinstance(amount, int) and isinstance(bound, int) and amount != bound:
        over = amount > bound
        text.append(f"\nof {human(line.key, bound)}", style="bold red" if over else "yellow" if _idle(line) else "dim")
    return text


def _idle(line: Line) -> bool:
    """Devices held and left idle are what nobody sees; memory and time are rarely used to the last byte."""
    used = None if line.used is None else line.used.amount
    return (
        line.key in ("gpu", "replicas") and isinstance(used, int) and isinstance(line.total, int) and used < line.total
    )


def _difference_text(line: Line) -> Text:
    """The outcome and why; empty where the columns already say it all."""
    words = clean(line.words)
    style = OUTCOME_STYLES.get(line.outcome, STATE_STYLES.get(line.outcome, ""))
    if line.outcome == "none":
        return Text(words if line.words != "only reported" else "", style="dim")
    if line.difference is None and ";" not in line.words:
        return Text()
    text = Text.assemble((line.outcome, style), ": ", words)
    if _idle(line):
        assert line.used is not None
        text.append(f"; used {human(line.key, line.used.amount)} of {human(line.key, line.total)}", style="bold yellow")
    return text


def _reasoned(candidate: Candidate) -> str:
    return _with(candidate.name, candidate.reason)


def _sourced(text: str, source: str) -> str:
    return text if source in text else f"{text} ({source})"


def _attempts(found: Attempts) -> Text:
    times = "once" if found.times == 1 else f"{found.times} times"
    said = _text(f"{times}: {found.reason}")
    said.append(
        f"\nat {when(found.first)}" if found.times == 1 else f"\nfirst {when(found.first)}, last {when(found.last)}",
        style="dim",
    )
    for candidate in found.candidates:
        said.append("\n").append(candidate.outcome, style=_CANDIDATE_STYLES[candidate.outcome])
        said.append(f" {clean(_reasoned(candidate))}")
    return said


def _nothing_asked() -> RenderableType:
    return Padding(Text("no resources or constraints were asked for, granted or used", style="dim"), (0, 1))
