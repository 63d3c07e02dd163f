"""`seal`: from the ask to a frozen envelope, its canonical bytes and its digest."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from bench.rounds import Run, interleave
from bench.table import Row, row
from bench.work import ask
from execution_envelope.envelope import seal

_NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
_ID = "0191f9d2-2222-7000-8000-000000000000"


def measure(run: Run) -> Iterator[Row]:
    count = run.scale(3000, 50)
    fields = msgspec.json.decode(seal(ask(), id=_ID, now=_NOW).body)
    assert peer(_built(fields))[0] == seal(ask(), id=_ID, now=_NOW).body, "expected the peer to write the same bytes"
    body = {"model": "smollm2", "replicas": 2, "env": {"LOG": "info"}, "args": ["--threads", "2"], "lb_port": 0}

    def ours() -> None:
        seal(ask(), id=_ID, now=_NOW)

    def with_body() -> None:
        seal(dataclasses.replace(ask(), schema="example.Deploy", body=body), id=_ID, now=_NOW)

    found = interleave(
        run,
        "seal",
        {
            "ours": lambda: _each(ours, count),
            "peer": lambda: _each(lambda: peer(_built(fields)), count),
            "with body": lambda: _each(with_body, count),
        },
        rounds=run.scale(15, 2),
    )
    size = len(seal(ask(), id=_ID, now=_NOW).body)
    yield row(
        "seal",
        found.median("ours"),
        found.median("peer"),
        found.ratio("ours", "peer"),
        bytes=size,
        with_request_body_us=round(found.median("with body"), 1),
    )


def _each(call: Callable[[], object], count: int) -> float:
    """Microseconds of processor time for one call."""
    gc.collect()
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count * 1e6


# The peer: what a competent engineer writes who wants a validated, frozen record with a digest, and nothing else. Plain
# frozen structs of the same fields; no redaction, no units, no bounds, no frozen mappings.


class _Plain(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    pass


class Party(_Plain, frozen=True):
    type: str
    id: str


class Authentication(_Plain, frozen=True):
    method: str
    issuer: str | None = None
    session: str | None = None


class Identity(_Plain, frozen=True):
    subject: Party
    tenant: str | None = None
    roles: tuple[str, ...] = ()
    delegation: tuple[Party, ...] = ()
    authentication: Authentication | None = None


class Target(_Plain, frozen=True):
    type: str
    id: str
    version: str | None = None


class Execution(_Plain, frozen=True):
    kind: Literal["model.deploy", "inference", "evaluation", "data.move", "agent.run", "maintenance"]
    operation: str
    target: Target
    entrypoint: str | None = None


class Scoped(_Plain, frozen=True):
    value: str | int | tuple[str, ...]
    provenance: Literal["asserted", "established"] = "asserted"
    by: str | None = None


class Scope(_Plain, frozen=True):
    project: Scoped | None = None
    workroom: Scoped | None = None
    environment: Scoped | None = None
    purpose: Scoped | None = None
    hints: dict[str, Scoped] | None = None


class Amount(_Plain, frozen=True):
    amount: int | Literal["unknown", "unlimited"]
    floor: int | None = None
    ceiling: int | None = None
    per: Literal["total", "replica", "device"] = "total"
    provenance: Literal["asserted", "client_default"] = "asserted"


class Constraint(_Plain, frozen=True):
    value: Any
    provenance: Literal["asserted", "client_default"] = "asserted"


class Requested(_Plain, frozen=True):
    resources: dict[str, Amount] = {}
    constraints: dict[str, Constraint] = {}


class Correlation(_Plain, frozen=True):
    id: str
    schema_version: str
    created_at: str
    request_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    idempotency_key: str | None = None
    facets: dict[str, Any] | None = None


class Envelope(_Plain, frozen=True):
    identity: Identity
    execution: Execution
    scope: Scope
    requested: Requested
    correlation: Correlation


_encoder = msgspec.json.Encoder(order="sorted")


def peer(fields: dict[str, Any]) -> tuple[bytes, str]:
    """Validate into frozen structs, canonical bytes, digest."""
    envelope = msgspec.convert(fields, Envelope)
    body = _encoder.encode(envelope)
    return body, hashlib.sha256(body).hexdigest()


def _built(fields: dict[str, Any]) -> dict[str, Any]:
    """The peer's ask is built for each call too, as ours is: a dictionary for each family."""
    return {
        "identity": dict(fields["identity"]),
        "execution": dict(fields["execution"]),
        "scope": dict(fields["scope"]),
        "requested": dict(fields["requested"]),
        "correlation": dict(fields["correlation"]),
    }
