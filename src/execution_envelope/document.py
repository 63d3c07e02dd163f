"""An ask as JSON: what `envelope plan` reads of a file, and what services in other languages send.

::

    {"kind": "model.deploy", "operation": "serving.deploy_model", "target": {"type": "model", "id": "smollm2-135m"},
     "subject": {"type": "user", "id": "dana", "tenant": "acme"}, "requested": {"gpu": 1, "memory": "2GiB"}}
"""

from __future__ import annotations

from typing import Any

import msgspec

from execution_envelope.envelope import Ask, Subject, Target, established


class SubjectDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """See `Subject`. `delegation` lists ``[type, id]`` of those on whose behalf the subject acts, outermost first."""

    type: str
    id: str
    tenant: str | None = None
    roles: list[str] = []
    delegation: list[tuple[str, str]] = []
    method: str | None = None
    issuer: str | None = None
    session: str | None = None

    def subject(self) -> Subject:
        """As an ask has it."""
        return Subject(
            self.type,
            self.id,
            tenant=self.tenant,
            roles=self.roles,
            delegation=self.delegation,
            method=self.method,
            issuer=self.issuer,
            session=self.session,
        )


class FacetDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An extension: who produced it, its schema's URL, and any JSON."""

    producer: str
    data: Any
    schema: str | None = None


class AskDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """See `Ask`. Amounts are numbers in base units, texts such as ``"2GiB"``, or objects with ``amount`` and
    ``floor``, ``ceiling`` or ``per``. `established` are scope values that whoever sends this found out itself."""

    kind: str
    operation: str
    target: Target
    subject: SubjectDocument
    scope: dict[str, Any] = {}
    established: dict[str, Any] = {}
    requested: dict[str, Any] = {}
    constraints: dict[str, Any] = {}
    client_defaults: dict[str, Any] = {}
    entrypoint: str | None = None
    schema: str | None = None
    body: Any = None
    secrets: list[str] = []
    request_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    part_of: str | None = None
    runs_on: str | None = None
    supersedes: str | None = None
    facets: dict[str, FacetDocument] = {}

    def ask(self, *, by: str, subject: Subject | None = None, key: str | None = None) -> Ask:
        """As the seam takes it; `by` is who established what is, `subject` stands in place of the one that is named."""
        found = {name: established(value, by=by) for name, value in self.established.items() if name != "hints"}
        return Ask(
            kind=self.kind,
            operation=self.operation,
            target=self.target,
            subject=subject or self.subject.subject(),
            scope={**self.scope, **found},
            requested=self.requested,
            constraints=self.constraints,
            client_defaults=self.client_defaults,
            entrypoint=self.entrypoint,
            schema=self.schema,
            body=self.body,
            secrets=self.secrets,
            request_id=self.request_id,
            traceparent=self.traceparent,
            tracestate=self.tracestate,
            idempotency_key=key,
            part_of=self.part_of,
            runs_on=self.runs_on,
            supersedes=self.supersedes,
            facets={name: (one.producer, one.schema, one.data) for name, one in self.facets.items()},
        )
