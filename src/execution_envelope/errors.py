"""Everything this package raises, one tree.

::

    EnvelopeError
    ├── InvalidField        a value cannot be sealed or recorded; names the field (also a ValueError)
    ├── Refused             the seam did not admit the request
    │   ├── Denied          a decider said no; stays no under the same idempotency key
    │   ├── Held            somebody has to approve first; send the same request with the same key again
    │   ├── KeyConflict     the idempotency key is taken by another request, or its first request is in flight
    │   ├── InvalidAsk      the request cannot be sealed; names the field
    │   ├── Unidentified    nobody was named as the subject
    │   └── LedgerUnavailable   the envelope could not be recorded, so nothing was started
    ├── Violation           a grant went beyond a limit or a parent; it *is* recorded
    ├── IllegalTransition   the lifecycle has no such step; nothing was recorded
    ├── NotHeld             there is no held request to approve or deny; nothing was recorded
    ├── NotLive             there is no live execution to revoke, or nobody asked to revoke it; nothing was recorded
    ├── SelfApproval        nobody approves what they asked for themselves; nothing was recorded
    ├── OpenObligations     a required obligation is open, so there is no clean end; nothing was recorded
    ├── OpenChildren        an envelope that is part of it is open, so there is no clean end; nothing was recorded
    ├── ReadOnly            a replayed admission was written to; nothing was recorded
    ├── ReferenceTaken      the reference leads to another envelope; link with `supersedes`
    ├── Damaged             the rows of an envelope were changed and cannot be read any more
    └── NotFound            no envelope has this id or reference
        └── Exported        its entries were exported and dropped; names the segments and their manifests
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a decider did not simply allow: `code` from the documented vocabulary, `hook` that said it."""

    hook: str
    code: str
    message: str


class EnvelopeError(Exception):
    """Base of everything raised here."""


class InvalidField(EnvelopeError, ValueError):
    """A value cannot be sealed or recorded. `field` is its path, such as `requested.memory`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{message} - at `{field}`")
        self.field = field


class Refused(EnvelopeError):
    """The seam did not admit the request; nothing was started.

    Attributes: `envelope_id` (None when nothing could be recorded), `reasons`, `retryable` (whether sending the same
    request later can help), `status` (the HTTP status integrations answer with), `type` (the problem type's name).
    """

    status = 403
    type = "refused"
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        envelope_id: str | None = None,
        reasons: tuple[Reason, ...] = (),
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.envelope_id = envelope_id
        self.reasons = reasons
        if retryable is not None:
            self.retryable = retryable


class Denied(Refused):
    """A decider said no. `retryable` when every reason is of the "try later" sort."""

    type = "denied"


class Held(Refused):
    """An approval is needed first. `idempotency_key` is the key to send the same request with again."""

    type = "held"
    retryable = True

    def __init__(
        self, message: str, *, envelope_id: str, reasons: tuple[Reason, ...] = (), idempotency_key: str
    ) -> None:
        super().__init__(message, envelope_id=envelope_id, reasons=reasons)
        self.idempotency_key = idempotency_key


class KeyConflict(Refused):
    """The idempotency key belongs to another request, or (`retryable`) its first request is still in flight."""

    status = 409
    type = "key-conflict"


class InvalidAsk(Refused):
    """What the request asks for cannot be sealed; `field` says what. Integrations raise it for `InvalidField`."""

    status = 422
    type = "invalid-ask"

    def __init__(self, error: InvalidField) -> None:
        super().__init__(str(error))
        self.field = error.field


class Unidentified(Refused):
    """No subject was named, so there is nobody to record as asking."""

    status = 401
    type = "unidentified"


class LedgerUnavailable(Refused):
    """The ledger could not record. At admission: nothing was started. Later: the fact is not on the record yet."""

    status = 503
    type = "ledger-unavailable"
    retryable = True


class Violation(EnvelopeError):
    """A grant went beyond what bounds it. The grant and the violation are both recorded before this is raised."""

    def __init__(self, message: str, *, envelope_id: str, resource: str) -> None:
        super().__init__(message)
        self.envelope_id = envelope_id
        self.resource = resource


class IllegalTransition(EnvelopeError):
    """The lifecycle table has no such step from the present state; nothing was recorded."""

    def __init__(self, message: str, *, state: str, event: str) -> None:
        super().__init__(message)
        self.state = state
        self.event = event


class NotHeld(EnvelopeError):
    """There is no held request to approve or deny: it was decided already. Nothing was recorded."""

    def __init__(self, message: str, *, envelope_id: str) -> None:
        super().__init__(message)
        self.envelope_id = envelope_id


class NotLive(EnvelopeError):
    """There is no live execution to revoke: it is held, was only observed, has ended, or, where somebody confirms,
    nobody asked to revoke it. Nothing was recorded."""

    def __init__(self, message: str, *, envelope_id: str) -> None:
        super().__init__(message)
        self.envelope_id = envelope_id


class SelfApproval(EnvelopeError):
    """Whoever asked, or acts for whoever asked, does not approve it. Nothing was recorded."""

    def __init__(self, message: str, *, envelope_id: str) -> None:
        super().__init__(message)
        self.envelope_id = envelope_id


class OpenObligations(EnvelopeError):
    """A required obligation is open, so there is no clean end: fulfil it, waive it, or end it another way.

    `names` are those that are open. Nothing was recorded.
    """

    def __init__(self, envelope: str, names: Sequence[str]) -> None:
        super().__init__(f"expected no open obligation for a clean end of {envelope}, got {', '.join(names)}")
        self.envelope_id = envelope
        self.names = tuple(names)


class OpenChildren(EnvelopeError):
    """An envelope that is part of it is open, so there is no clean end: end those first, or end it another way.

    `children` are the ids of those that are open. Nothing was recorded.
    """

    def __init__(self, envelope: str, children: Sequence[str]) -> None:
        some = ", ".join(children[:3]) + (f" and {len(children) - 3} more" if len(children) > 3 else "")
        super().__init__(f"expected no open part of {envelope} for a clean end, got {some}")
        self.envelope_id = envelope
        self.children = tuple(children)


class ReadOnly(EnvelopeError):
    """A replayed admission belongs to the first caller; use `controller.resume` to continue it as yourself."""


class ReferenceTaken(EnvelopeError):
    """The reference already leads to another envelope that the new one does not supersede."""


class NotFound(EnvelopeError, LookupError):
    """No envelope has this id, or no envelope is bound to this reference."""


class Exported(NotFound):
    """The envelope has ended, and entries of it were exported and dropped from the ledger: it can be read from there.

    `envelope_id` names it; `segments` are (number, name of the manifest) of where it is, or where its id has to be.
    """

    def __init__(self, envelope: str, segments: Sequence[tuple[int, str]]) -> None:
        where = ", ".join(f"segment {number} (`{name}`)" for number, name in segments)
        super().__init__(f"expected envelope {envelope} in the ledger, it was exported with {where}")
        self.envelope_id = envelope
        self.segments = tuple(segments)


class Damaged(EnvelopeError):
    """The rows of an envelope were changed in the database, and cannot be read any more. `envelope_id` names it."""

    def __init__(self, envelope: str) -> None:
        super().__init__(
            f"expected a readable record of envelope {envelope}, its rows were changed: run `envelope verify`"
        )
        self.envelope_id = envelope
