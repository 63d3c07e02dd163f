"""A record as plain JSON data, amounts in base units. The shapes are documented in docs/reference/cli.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import msgspec

from execution_envelope.ledger import AttemptedRequest
from execution_envelope.ledger.chain import Closed, Opened
from execution_envelope.lifecycle import Admitted, EventData, Late
from execution_envelope.presentation import facts
from execution_envelope.presentation.text import milliseconds
from execution_envelope.record import Record
from execution_envelope.resources import VOCABULARY
from execution_envelope.review import ChainStatus
from execution_envelope.sentences import sentence


def summary(record: Record, *, now: datetime) -> dict[str, Any]:
    """One envelope of a list."""
    identity, execution = record.envelope.identity, record.envelope.execution
    created = record.envelope.correlation.created_at
    return {
        "id": record.id,
        "created_at": created,
        "age_ms": milliseconds(created, now),
        "ended_at": facts.ended_at(record),
        "kind": execution.kind,
        "operation": execution.operation,
        "tenant": identity.tenant,
        "subject": whole(identity.subject),
        "target": whole(execution.target),
        "state": record.state,
        "observed": record.observed is not None,
        "flagged": record.flagged is not None,
        "revoking": record.revoking is not None,
        "open": record.is_open,
        "delta": facts.tally(record),
        "delta_in_words": facts.short_delta(record),
        "references": record.references,
    }


def details(
    record: Record, *, now: datetime, children: Sequence[str] = (), chain: ChainStatus | None = None
) -> dict[str, Any]:
    """Everything on the record."""
    created, sealed = record.envelope.correlation.created_at, facts.sealed(record)
    return {
        **summary(record, now=now),
        "duration_ms": milliseconds(created, facts.ended_at(record) or now),
        "bound": _stored(record.bound),
        "digest": sealed and sealed.digest,
        "request_digest": sealed and sealed.request,
        "redacted": sealed.redacted if sealed else (),
        "undecided": record.undecided,
        "shadow": next((e.data.shadow for e in record.events if isinstance(e.data, Admitted)), None),
        "ungranted": record.ungranted,
        "ready": record.ready,
        "reviews": [_stored(event.data) for event in record.reviews.values()],
        "reported": whole(list(record.reported.values())),
        "envelope": _stored(record.envelope),
        "children": children,
        "resources": [_resource(line) for line in facts.resource_lines(record)],
        "constraints": [_constraint(line) for line in facts.constraint_lines(record)],
        "granted": record.granted,
        "held": record.held,
        "limits": {name: {"amount": amount, "hook": hook} for name, (amount, hook) in record.limits.items()},
        "allowed": {name: {"values": values, "hook": hook} for name, (values, hook) in record.allowed.items()},
        "obligations": whole(list(record.obligations.values())),
        "hints_read": record.hints_read,
        "budgets": whole(list(record.budgets.values())),
        "parts": [_part(part) for part in facts.parts(record)],
        "attempts": [{"reason": found.reason, **whole(found)} for found in record.attempts],
        "verdicts": whole(record.verdicts),
        "violations": whole(record.violations),
        "late": sum(isinstance(e.data, Late) for e in record.events),
        "timeline": [
            {"sequence": e.sequence, "at": e.at, "offset_ms": milliseconds(created, e.at), "by": e.by}
            | entry_data(e.data)
            for e in record.events
        ],
        "chain": chain and _chain(chain),
    }


def entry_data(data: EventData | Opened | Closed) -> dict[str, Any]:
    """The type, the sentence and the fact of one entry."""
    stored = _stored(data)
    return {"type": stored["type"], "sentence": sentence(data), "data": stored}


def attempted_data(request: AttemptedRequest, *, now: datetime) -> dict[str, Any]:
    """One request that never became an envelope."""
    return {**asdict(request), "age_ms": milliseconds(request.at, now)}


def whole(value: Any) -> Any:
    """Plain data with the fields that are at their defaults."""
    if isinstance(value, msgspec.Struct):
        return {name: whole(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list | tuple) else value


def _stored(value: Any) -> Any:
    """Plain data as it is stored: without fields that are at their defaults."""
    return msgspec.json.decode(msgspec.json.encode(value))


def _resource(line: facts.Line) -> dict[str, Any]:
    granted = line.granted
    return {
        "key": line.key,
        "unit": VOCABULARY[line.key].unit,
        "requested": whole(line.requested),
        "effective": whole(line.effective),
        "granted": granted and {"amount": granted.amount, "per": granted.per, "total": line.total},
        "used": whole(line.used),
        **_outcome(line),
        "breach": line.difference and line.difference.breach,
    }


def _constraint(line: facts.Line) -> dict[str, Any]:
    return {
        "key": line.key,
        "requested": whole(line.requested),
        "effective": line.effective and whole(line.effective.value),
        "granted": line.granted and whole(line.granted.value),
        **_outcome(line),
    }


def _outcome(line: facts.Line) -> dict[str, Any]:
    return {
        "outcome": line.outcome,
        "in_words": line.words,
        "reasons": whole(line.difference.reasons) if line.difference else [],
        "unstated": line.difference is not None and line.difference.unstated,
    }


def _part(part: facts.Part) -> dict[str, Any]:
    return {
        "part": part.grant.part,
        "by": part.by,
        "at": part.at,
        "basis": part.grant.basis,
        "released": part.released,
        "ready": part.ready,
        **whole(part.grant),
    }


def _chain(chain: ChainStatus) -> dict[str, Any]:
    return {
        "sound": not chain.findings,
        "entries": chain.entries,
        "chains": chain.chains,
        "findings": whole(chain.findings),
    }
