"""What a backend says it gave: the words of people on one side, the recorded fact on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, overload

from execution_envelope.credentials import brief, group, invalid, listed, mapped, redact_text, scrub, shown
from execution_envelope.envelope import bounded
from execution_envelope.errors import InvalidField
from execution_envelope.lifecycle import BASES, CAUSES, Basis, Candidate, Cause, Granted, Why
from execution_envelope.resources import VOCABULARY, parse_quantity

#: How many names one fact may speak of.
MAX_NAMES = 64
#: How long such a name may be, and the name of a part, an owner, a component or a reference.
MAX_NAME = 256


@dataclass(frozen=True, slots=True)
class Grant:
    """What the backend gave, for the whole or for one `part`. A new grant for a part replaces that part's.

    The whole and its parts never count side by side: a grant for the whole replaces those of all parts, and the first
    grant for a part replaces that of the whole. A release of the whole ends every part.

    `resources` maps resource names to amounts as in `Ask.requested`; zero means withheld. `constraints` holds what was
    given in place of a constraint; `honoured` lists keys that were given as asked. `because` maps a key to
    ``(cause, sentence)``. `basis` says how firm it is: *reserved* (a scheduler's promise), *allocated*, or *enforced*
    (a limit that holds). `route` says where it went, `candidates` what else was considered. `by` is the component
    that decided; the admission's own when None.
    """

    resources: Mapping[str, Any]
    part: str | None = None
    route: Mapping[str, str] = field(default_factory=dict)
    honoured: Sequence[str] = ()
    by: str | None = None
    basis: Basis = "reserved"
    because: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    constraints: Mapping[str, Any] = field(default_factory=dict)
    candidates: Sequence[Candidate] = ()

    def fact(self) -> Granted:
        """The grant as it is recorded. Raises `InvalidField` naming what cannot be."""
        if self.basis not in BASES:
            raise InvalidField("grant.basis", f"expected one of {', '.join(BASES)}, got {shown(self.basis)}")
        if self.part == "":
            raise InvalidField("grant.part", "expected a name, got an empty one; leave it out for the whole")
        return Granted(
            resources={
                name: parse_quantity(name, value, field=f"grant.{brief(name)}")
                for name, value in mapped(self.resources, "grant.resources", MAX_NAMES).items()
            },
            basis=self.basis,
            part=label(self.part, "grant.part"),
            constraints=constraints(self.constraints, "grant.constraints"),
            honoured=tuple(
                label(name, "grant.honoured") for name in listed(self.honoured, "grant.honoured", MAX_NAMES)
            ),
            because={
                label(name, "grant.because"): _said(said, f"grant.because.{brief(name)}")
                for name, said in mapped(self.because, "grant.because", MAX_NAMES).items()
            },
            route={
                label(name, "grant.route"): scrub(value, field=f"grant.route.{name}")
                for name, value in mapped(self.route, "grant.route", MAX_NAMES).items()
            },
            candidates=candidates(self.candidates),
        )


@overload
def label(name: str, field: str = ...) -> str: ...
@overload
def label(name: None, field: str = ...) -> None: ...
def label(name: str | None, field: str = "name") -> str | None:
    """A name as it is recorded: as it is, or refused, because two names must never become one.

    Raises `InvalidField` at `field` for what is not text in valid Unicode of up to `MAX_NAME` characters, and for a
    name that holds a credential: it is written by the backend's own code.
    """
    if name is None:
        return None
    if not isinstance(name, str):
        raise invalid(field, f"expected a name, got `{type(name).__name__}`")
    if redact_text(name) != name:
        raise invalid(field, f"expected a name without a credential, got {shown(name)}")
    if len(name) > MAX_NAME:
        raise invalid(field, f"expected a name of up to {MAX_NAME} characters, got {len(name)}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise invalid(field, "expected a name in valid Unicode, got a lone surrogate") from None
    return name


def why(cause: str, text: str, *, path: str) -> Why:
    """A cause of the closed list with its sentence. Raises `InvalidField`."""
    if cause not in CAUSES:
        raise invalid(path, f"expected one of {', '.join(CAUSES)}, got {shown(cause)}")
    return Why(cast(Cause, cause), scrub(text, field=path))


def _said(said: Any, path: str) -> Why:
    cause, text = group(said, 2, path)
    return why(cause, text, path=path)


def constraints(values: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Constraint values as they are recorded: bounded JSON without floats. Raises `InvalidField`."""
    for name in mapped(values, path, MAX_NAMES):
        if name in VOCABULARY:
            raise invalid(f"{path}.{name}", f"expected a constraint, `{name}` is a resource")
    return {label(name, path): bounded(value, f"{path}.{name}") for name, value in values.items()}


def candidates(values: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Candidates as they are recorded. Raises `InvalidField` for an unknown outcome."""
    known = ("considered", "refused", "tried", "chosen")
    for candidate in listed(values, "candidates", MAX_NAMES):
        if not isinstance(candidate, Candidate):
            raise invalid("candidates", f"expected a Candidate, got {shown(candidate)}")
        if candidate.outcome not in known:
            raise invalid("candidates.outcome", f"expected one of {', '.join(known)}, got {shown(candidate.outcome)}")
    return tuple(
        Candidate(
            scrub(c.name, field="candidates.name"),
            c.outcome,
            None if c.reason is None else scrub(c.reason, field="candidates.reason"),
        )
        for c in values
    )
