"""A made-up backend: its tenants and what they have deployed, what stands in its budgets, and all the chance there is.

Every name begins with ``sim``.
"""

from __future__ import annotations

import heapq
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from random import Random
from typing import Any, Final, TypeVar

from execution_envelope.budgets import Budget, Budgets, Key
from execution_envelope.envelope import Scoped, SealedEnvelope, Subject, established
from execution_envelope.ledger.commit import Commit
from execution_envelope.lifecycle import (
    BudgetEntry,
)
from execution_envelope.record import Record
from execution_envelope.resources import Amount

T = TypeVar("T")

#: Microseconds.
MS: Final = 1_000
SECOND: Final = 1_000_000
MINUTE: Final = 60 * SECOND
HOUR: Final = 60 * MINUTE
DAY: Final = 24 * HOUR

#: Who records: the seam of the made-up backend, and what runs behind it.
SEAM: Final = "simulation"
RUNNER: Final = "simulation-runner"
#: The hook that decides, as a policy file names itself, and what stood in the file one after the other.
HOOK: Final = "sim-policy"
REVISIONS: Final = ("sim-r1", "sim-r2", "sim-r3")

TENANTS: Final = tuple(
    f"sim-{name}"
    for names in (
        "atlas borealis cygnus dorado eridanus fornax gemini hydra indus",
        "juno kepler lyra mensa norma orion pavo quasar rigel",
        "sagitta taurus umbra vela wega xenon yildun zeta altair",
        "bellatrix castor deneb electra fomalhaut gacrux hadar izar jabbah",
        "kochab lesath mizar nashira",
    )
    for name in names.split()
)
#: The share of the largest tenant; the others divide the rest by Zipf's law.
LARGEST: Final = 0.5
MODELS: Final = tuple(
    f"sim/{family}-{size}"
    for family in ("llama", "mistral", "qwen", "phi", "gemma", "smol")
    for size in ("1b", "4b", "8b", "32b")
)
FORBIDDEN_MODEL: Final = "sim/unlicensed-70b"
ENVIRONMENTS: Final = ("dev", "dev", "staging", "prod", "prod", "prod")
PURPOSES: Final = ("customer support", "research", "search", "code assistance", "reporting", "fraud detection")
CLASSES: Final = ("public", "internal", "internal", "confidential")
REGIONS: Final = ("eu-central", "eu-west", "us-east", "ap-south")
NODES: Final = tuple(f"sim-node-{number:02d}" for number in range(48))
_ROLES: Final = (("developer",), ("operator", "developer"), ("analyst",), ("viewer",), ("operator",))
#: Of these tenants budgets are kept.
_BUDGETED: Final = TENANTS[1:7]


@dataclass(slots=True)
class Deployment:
    """A model that serves: the envelope, its id at the backend, until when, and the end that is recorded then."""

    envelope: str
    reference: str
    model: str
    since: int
    until: int
    end: Commit | None


@dataclass(slots=True)
class Tenant:
    """Its people and projects, of which the first are the busiest, and what it has deployed."""

    name: str
    people: list[Subject]
    viewers: list[Subject]
    agents: list[Subject]
    scopes: list[Mapping[str, Scoped]]
    deployments: list[Deployment] = field(default_factory=list)


class World:
    """Who there is, what time it is, and what stands in budgets. `choose` and `id_at` use the one source of chance."""

    def __init__(self, seed: int, count: int, start: int, until: int) -> None:
        self.random = Random(f"execution-envelope {seed}")
        self.start, self.until = start, until
        self._thirds = (until - start) / len(REVISIONS)
        rest = [1 / rank for rank in range(1, len(TENANTS))]
        weights = [LARGEST, *((1 - LARGEST) * weight / sum(rest) for weight in rest)]
        self._shares = list(accumulate(weights))
        self.tenants = [self._tenant(name, weight) for name, weight in zip(TENANTS, weights, strict=True)]
        days = (until - start) / DAY
        self.budgets = Budgets(_budgets(count, days, dict(zip(TENANTS, weights, strict=True))), revision=REVISIONS[0])
        self._standing: dict[Key, int] = {}
        self._frees: list[tuple[int, Key, int]] = []

    def _tenant(self, name: str, weight: float) -> Tenant:
        people = [self._person(name, number) for number in range(3 + int(400 * weight))]
        agents = [Subject("agent", f"sim-agent-{number}", tenant=name) for number in range(2 + int(20 * weight))]
        scopes = [self._scope(number) for number in range(4 + int(60 * weight))]
        viewers = [one for one in people if one.roles == ("viewer",)]
        return Tenant(name, people, viewers or people[:1], agents, scopes)

    def _person(self, tenant: str, number: int) -> Subject:
        roles = _ROLES[number % len(_ROLES)]
        issuer = "https://login.simulation.invalid"
        return Subject("user", f"sim-user-{number:03d}", tenant=tenant, roles=roles, method="oidc", issuer=issuer)

    def _scope(self, number: int) -> Mapping[str, Scoped]:
        scope: dict[str, Any] = {
            "project": established(f"sim-project-{number // 2:02d}", by="token"),
            "environment": established(self.choose(ENVIRONMENTS), by="server default"),
        }
        if number % 2:
            scope["purpose"] = Scoped(self.choose(PURPOSES))
            scope["classification"] = Scoped(self.choose(CLASSES))
        if number % 3 == 0:
            scope["priority"] = Scoped(self.random.randrange(1, 10))
        if number % 7 == 2:
            scope["hints"] = {"cost_center": f"sim-cost-{number % 4}"}
        if number % 5 == 0:
            scope["regions"] = Scoped((self.choose(REGIONS),))
        return scope

    # Chance

    def choose(self, some: Sequence[T]) -> T:
        """One of them, each as likely."""
        return some[int(self.random.random() * len(some))]

    def busy(self, some: Sequence[T]) -> T:
        """One of them, the first ones far more often."""
        return some[int(self.random.random() ** 2.5 * len(some))]

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def spread(self, middle: int, most: float = 8.0) -> int:
        """Around `middle`, skewed: half of it is below, and some `most` times as much."""
        draw = self.random.random()
        return max(1, int(middle * (0.25 + draw * 1.5 if draw < 0.5 else 1 + (draw - 0.5) ** 4 * 16 * (most - 1))))

    def tenant(self) -> Tenant:
        return self.tenants[min(bisect(self._shares, self.random.random()), len(self.tenants) - 1)]

    def id_at(self, at: int) -> str:
        """A UUIDv7 of that time."""
        bits = self.random.getrandbits(74)
        text = f"{at // MS:012x}7{bits >> 62:03x}{0x8 | bits >> 60 & 0x3:x}{bits & (1 << 60) - 1:015x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

    def reference(self) -> str:
        """The backend's own id of something."""
        return f"sim-{self.random.getrandbits(48):012x}"

    def key(self) -> str:
        """An idempotency key."""
        return f"sim-key-{self.random.getrandbits(60):015x}"

    def revision(self, at: int) -> str:
        """Of the policy that judged then."""
        return REVISIONS[min(len(REVISIONS) - 1, int((at - self.start) / self._thirds))]

    # Deployments

    def serving(self, tenant: Tenant, at: int) -> Deployment | None:
        """One that serves just now."""
        live = tenant.deployments
        while live:
            place = int(self.random.random() * len(live))
            if live[place].until > at:
                return live[place] if live[place].since <= at else None
            live[place] = live[-1]
            live.pop()
        return None

    # Budgets

    def reserved(self, sealed: SealedEnvelope, limits: Mapping[str, Amount], at: int) -> tuple[BudgetEntry, ...]:
        """What a request takes of budgets; nothing for most."""
        if sealed.envelope.identity.tenant not in _BUDGETED:
            return ()
        return self.budgets.reserve(sealed.envelope, limits, moment(at)).entries

    def exhausted(self, entries: Sequence[BudgetEntry], at: int) -> BudgetEntry | None:
        """The first of which there is no room."""
        while self._frees and self._frees[0][0] <= at:
            _, key, amount = heapq.heappop(self._frees)
            self._standing[key] -= amount
        return next((one for one in entries if self.free(one) < one.reserved), None)

    def free(self, entry: BudgetEntry) -> int:
        return entry.limit - self._standing.get(Key(entry.account, entry.window, entry.resource), 0)

    def took(self, entries: Sequence[BudgetEntry], record: Record, end: int) -> None:
        """What an execution holds until its end, or spent for good."""
        for entry in entries:
            key = Key(entry.account, entry.window, entry.resource)
            if entry.window == "now":
                amount = entry.reserved
                heapq.heappush(self._frees, (end, key, amount))
            else:
                amount = record.budgets[key].reserved + record.budgets[key].spent
            self._standing[key] = self._standing.get(key, 0) + amount


def _budgets(count: int, days: float, weights: Mapping[str, float]) -> list[Budget]:
    """Limits about what is asked for at that pace, so that there is no room now and then."""
    found = []
    for tenant in _BUDGETED:
        tokens = int(count * 0.7 * weights[tenant] / days * 700) + 2000
        gpus = int(count * 0.03 * weights[tenant] / days * 4.5) + 8
        match = {"tenant": tenant}
        kinds = frozenset({"model.deploy"})
        found.append(
            Budget(name=f"{tenant}-gpu", resource="gpu", limit=gpus, match=match, kinds=kinds, unknown="admit")
        )
        if tenant in _BUDGETED[:3]:
            found.append(
                Budget(
                    name=f"{tenant}-tokens",
                    resource="output_tokens",
                    limit=tokens,
                    window="day",
                    match=match,
                    per=("tenant", "environment"),
                    kinds=frozenset({"inference"}),
                    unknown="admit",
                )
            )
    return found


def moment(at: int) -> datetime:
    """Microseconds since 1970 as a time."""
    return _EPOCH + timedelta(microseconds=at)


def micros(when: datetime) -> int:
    """The other way."""
    return (when - _EPOCH) // timedelta(microseconds=1)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
