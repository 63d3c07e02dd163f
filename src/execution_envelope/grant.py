"""What a backend says it gave: the words of people on one side, the recorded fact on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, overload

from execution_envelope.credentials import scrub
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
            raise InvalidField("grant.basis", f"expected one of {', '.join(BASES)}, got `{self.basis}`")
        if self.part == "":
            raise InvalidField("grant.part", "expected a name, got an empty one; leave it out for the whole")
        return Granted(
            resources={
                name: parse_quantity(name, value, field=f"grant.{name}")
                for name, value in _few(self.resources, "grant.resources").items()
            },
            basis=self.basis,
            part=label(self.part),
            constraints=constraints(self.constraints, "grant.constraints"),
            honoured=tuple(label(name) for name in _few(self.honoured, "grant.honoured")),
            because={
                label(name): why(*said, path=f"grant.because.{label(name)}")
                for name, said in _few(self.because, "grant.because").items()
            },
            route={label(name): scrub(value) for name, value in _few(self.route, "grant.route").items()},
            candidates=candidates(self.candidates),
        )


@overload
def label(name: str) -> str: ...
@overload
def label(name: None) -> None: ...
def label(name: str | None) -> str | None:
    """A name as it may be recorded; the same name always gives the same one."""
    return None if name is None else scrub(str(name), MAX_NAME)


def why(cause: str, text: str, *, path: str) -> Why:
    """A cause of the closed list with its sentence. Raises `InvalidField`."""
    if cause not in CAUSES:
        raise InvalidField(path, f"expected one of {', '.join(CAUSES)}, got `{str(cause)[:64]}`")
    return Why(cast(Cause, cause), scrub(text))


def constraints(values: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Constraint values as they are recorded: bounded JSON without floats. Raises `InvalidField`."""
    for name in _few(values, path):
        if name in VOCABULARY:
            raise InvalidField(f"{path}.{name}", f"expected a constraint, `{name}` is a resource")
    return {label(name): bounded(value, f"{path}.{label(name)}") for name, value in values.items()}


def candidates(values: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Candidates as they are recorded. Raises `InvalidField` for an unknown outcome."""
    known = ("considered", "refused", "tried", "chosen")
    for candidate in _few(values, "candidates"):
        if candidate.outcome not in known:
            raise InvalidField("candidates.outcome", f"expected one of {', '.join(known)}, got `{candidate.outcome}`")
    return tuple(Candidate(scrub(c.name), c.outcome, None if c.reason is None else scrub(c.reason)) for c in values)


def _few(values: Any, path: str) -> Any:
    if len(values) > MAX_NAMES:
        raise InvalidField(path, f"expected at most {MAX_NAMES} entries, got {len(values)}")
    return values
