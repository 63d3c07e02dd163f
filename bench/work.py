"""What is appended, and callers that wait for it: the same for ours and for every peer."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Final, TypeAlias, TypeVar

import msgspec
import uuid_utils

from execution_envelope import Ask, Subject, Target
from execution_envelope.envelope import SealedEnvelope, canonical, seal, sha256, timestamp
from execution_envelope.ledger import Ledger
from execution_envelope.ledger.commit import Commit
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.lifecycle import Admitted, Completed, EventData, Sealed

T = TypeVar("T")
#: Called with an item and with whom to tell, from another thread.
Submit: TypeAlias = Callable[[T, Callable[[object], None]], None]

_NOW: Final = datetime(2026, 5, 1, 12, tzinfo=UTC)


def ask() -> Ask:
    """An ask of ordinary size: 28 fields, about 1.2 kB when sealed."""
    return Ask(
        kind="model.deploy",
        operation="serving.deploy_model",
        target=Target("model", "HuggingFaceTB/SmolLM2-135M-Instruct", "q4_1"),
        subject=Subject(
            "user",
            "dana@example.com",
            tenant="acme",
            roles=("operator", "developer"),
            method="oidc",
            issuer="https://login.example.com",
            session="0191f9d2-1111",
        ),
        scope={"project": "support-bot", "workroom": "w-42", "environment": "prod", "purpose": "customer support"},
        requested={"replicas": 2, "memory": "2GiB", "cpu": "500m", "gpu": 1, "context": 32768},
        constraints={"engine": "llama.cpp", "region": "eu-central", "quantization": "q4_1", "autoscaling": False},
        entrypoint="POST /serving/deploy_model",
        request_id="0191f9d2-aaaa-7000-8000-000000000000",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )


def commits(count: int, *, tenants: int = 1, keys: bool = False, ended: bool = False) -> Iterator[Commit]:
    """Admissions of `count` envelopes of their own. They are sealed beforehand, so that nobody waits for that.

    With `keys` every fourth has an idempotency key; with `ended` all are completed at once, a third event.
    """
    template = seal(ask(), id="0", now=_NOW)
    at = timestamp(_NOW)
    for number in range(count):
        sealed = _another(template, number % tenants, keyed=keys and number % 4 == 0)
        facts: list[EventData] = [
            Sealed(sealed.digest, sealed.request_digest, sealed.key_digest),
            Admitted(undecided=True),
            *([Completed("unknown")] if ended else []),
        ]
        yield Commit(sealed.envelope.id, 0, at, "bench", facts, sealed)


def _another(template: SealedEnvelope, tenant: int, *, keyed: bool) -> SealedEnvelope:
    """The same envelope with an id, a tenant and a key of its own: sealing each anew would take most of the time."""
    change = msgspec.structs.replace
    id = str(uuid_utils.uuid7())
    envelope = change(
        template.envelope,
        identity=change(template.envelope.identity, tenant=tenant_name(tenant)),
        correlation=change(template.envelope.correlation, id=id, idempotency_key=id if keyed else None),
    )
    body = canonical(envelope)
    key = sha256(id.encode()) if keyed else None
    return SealedEnvelope(envelope, body, sha256(body), template.request_digest, key, ())


def tenant_name(number: int) -> str:
    return f"tenant-{number}"


class Wakeups:
    """Wakes tasks of a loop from another thread, once for all that were told meanwhile."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._told: deque[tuple[asyncio.Future[object], object]] = deque()
        self._called = False

    def tell(self, future: asyncio.Future[object], outcome: object) -> None:
        self._told.append((future, outcome))
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First: whoever tells from now on calls once more.
        self._called = False
        while self._told:
            future, outcome = self._told.popleft()
            future.set_result(outcome)


async def waiting(items: Sequence[T], submit: Submit[T], callers: int) -> float:
    """Items per second when so many callers each wait for theirs to be durable before they submit the next."""
    loop, wakeups, rest = asyncio.get_running_loop(), Wakeups(), iter(items)

    async def call() -> None:
        for item in rest:
            future: asyncio.Future[object] = loop.create_future()
            submit(item, partial(wakeups.tell, future))
            outcome = await future
            if isinstance(outcome, Exception):
                raise outcome

    start = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(callers)))
    return len(items) / (time.perf_counter() - start)


def submit_to(ledger: Ledger) -> Submit[Commit]:
    """How callers submit to a ledger of ours."""

    def submit(commit: Commit, told: Callable[[object], None]) -> None:
        ledger.submit(Submission((commit,), told))

    return submit


def append_rate(ledger: Ledger, items: Sequence[Commit], callers: int) -> float:
    """Appends per second that so many callers get out of a ledger. The ledger is warm before the clock starts."""
    ledger.commit(*commits(1))
    return asyncio.run(waiting(items, submit_to(ledger), callers))


def stored_bytes(items: Iterable[Commit], ledger: Ledger) -> int:
    """How many bytes of ours one append puts into the log: entries, hashes and what is sealed beside them."""
    sizes = []
    for commit in items:
        rows = list(ledger.rows_of(commit.envelope))
        sizes.append(sum(len(row.body) + len(row.hash) + len(row.sealed or b"") for row in rows))
    return round(sum(sizes) / len(sizes))


def ignore(_: Outcome) -> None:
    """For submissions that nobody waits for."""
