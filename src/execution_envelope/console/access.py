"""Who may look, and what at: principals with rights over tenants. Pure; `tokens` and `signin` say who is one.

A right is what a person or service may do here. Seeing an envelope is never a right in itself: tenants say whose are
seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias, get_args

from execution_envelope.credentials import invalid, shown
from execution_envelope.envelope import Subject

Right: TypeAlias = Literal["read", "approve", "revoke", "admit", "write", "audit"]
RIGHTS: Final[tuple[str, ...]] = get_args(Right)

#: Role -> its rights. Roles are what tokens and OIDC claims name.
ROLES: Final[Mapping[str, frozenset[Right]]] = {
    "reader": frozenset({"read"}),
    "approver": frozenset({"read", "approve"}),
    "operator": frozenset({"read", "approve", "revoke"}),
    "auditor": frozenset({"read", "audit"}),
    "requester": frozenset({"read", "admit"}),
    "service": frozenset({"read", "admit", "write"}),
}
#: What each right is for.
MEANINGS: Final[Mapping[Right, str]] = {
    "read": "see the envelopes of one's tenants",
    "approve": "say yes or no to what is held; the policy still decides who may",
    "revoke": "ask for an execution to be stopped; the policy still decides who may",
    "admit": "ask as a backend service, the server's policy decides; and say what became of it",
    "write": "decide as a backend service too: seal, grant and close with hooks of its own",
    "audit": "see what belongs to no tenant: chains, verification, attempted requests",
}


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody or something that is known by a credential.

    `tenants` are those whose envelopes it sees, None all. `roles` are names of `ROLES` that it has, `method` and
    `issuer` say how it was authenticated.
    """

    type: str
    id: str
    tenants: frozenset[str] | None
    roles: tuple[str, ...]
    method: str
    issuer: str | None = None

    @property
    def rights(self) -> frozenset[Right]:
        return frozenset().union(*(ROLES[role] for role in self.roles))

    @property
    def name(self) -> str:
        """``type:id``."""
        return f"{self.type}:{self.id}"

    def may(self, right: Right) -> bool:
        return right in self.rights

    def acting_in(self, tenant: str | None) -> Subject:
        """This principal as the subject of a request of its own, such as an approval, in the tenant that it is about.

        The caller has seen to it that the principal sees that tenant.
        """
        return Subject(self.type, self.id, tenant=tenant, roles=self.roles, method=self.method, issuer=self.issuer)


class Authenticator(Protocol):
    """Tells who holds a bearer token. Called in a thread; may do I/O; must not raise for a token that is wrong."""

    def principal(self, token: str) -> Principal | None: ...


def checked_roles(names: Iterable[str], path: str) -> tuple[str, ...]:
    """Roles as they were configured. Raises `InvalidField` for one that is not there."""
    roles = tuple(names)
    for name in roles:
        if name not in ROLES:
            raise invalid(path, f"expected roles of {', '.join(ROLES)}, got {shown(name)}")
    return roles
