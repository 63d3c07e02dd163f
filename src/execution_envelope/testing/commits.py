"""What tests of ledgers commit: envelopes, their admissions, what they reserve; and what a ledger makes of it."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, TypeVar

import uuid_utils

from execution_envelope import lifecycle
from execution_envelope.budgets import Key
from execution_envelope.envelope import SealedEnvelope, seal, timestamp
from execution_envelope.ledger import Ledger
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.commit import Commit
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.lifecycle import Budgeted, BudgetEntry, Event, EventData
from execution_envelope.testing.kit import START, ask

T = TypeVar("T")

#: Balances that are changed.
GPUS: Final = Key("gpus/acme", "now", "gpu")
TOKENS: Final = Key("tokens/acme", "2026-05-01", "output_tokens")


@contextmanager
def raises(kind: type[T]) -> Iterator[list[T]]:
    """That the block raises this: the list holds it then."""
    caught: list[T] = []
    try:
        yield caught
    except Exception as error:
        if not isinstance(error, kind):
            raise
        caught.append(error)
    else:
        raise AssertionError(f"expected {kind.__name__}, nothing was raised")


def outcome_of(ledger: Ledger, *commits: Commit) -> Outcome:
    """What a submission of these is told."""
    told: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    ledger.submit(Submission(commits, told.put))
    return told.get(timeout=10)


def types_in(ledger: Ledger) -> list[list[str]]:
    """What each chain holds."""
    return [
        [str(chains.decode(row.body).data.__struct_config__.tag) for row in ledger.rows(head.id)]
        for head in ledger.chains()
    ]


def closings_in(ledger: Ledger) -> list[chains.Closed]:
    """The entries that end chains."""
    entries = (chains.decode(row.body).data for head in ledger.chains() for row in ledger.rows(head.id))
    return [data for data in entries if isinstance(data, chains.Closed)]


def events_of(ledger: Ledger, sealed: SealedEnvelope) -> tuple[Event, ...]:
    """What is stored of an envelope."""
    stored = ledger.read(sealed.envelope.id)
    assert stored is not None
    return stored.events


def sealed_ask(**overrides: Any) -> SealedEnvelope:
    """See `ask`."""
    return seal(ask(**overrides), id=str(uuid_utils.uuid7()), now=START)


def commit_of(sealed: SealedEnvelope, sequence: int, *facts: EventData) -> Commit:
    """What happens to an envelope later."""
    return Commit(sealed.envelope.id, sequence, timestamp(START), "test", facts)


def admission_of(sealed: SealedEnvelope, *more: EventData) -> Commit:
    """An envelope that is admitted, with whatever else is recorded at once."""
    key = sealed.key_digest
    facts: Sequence[EventData] = (
        lifecycle.Sealed(sealed.digest, sealed.request_digest, key),
        lifecycle.Admitted(undecided=True),
        *more,
    )
    return replace(commit_of(sealed, 0, *facts), sealed=sealed)


def budgeted(reserved: int, spent: int = 0, *, key: Key = GPUS, limit: int = 10, unknown: int = 0) -> Budgeted:
    """A change of one balance."""
    return Budgeted("adjust", (BudgetEntry(*key, limit, reserved, spent, unknown),))


def reservation_of(sealed: SealedEnvelope, amount: int, limit: int = 10) -> Commit:
    """An admission that has to fit into the account."""
    entry = BudgetEntry(*GPUS, limit, amount)
    return replace(admission_of(sealed, Budgeted("reserve", (entry,))), within=frozenset({GPUS.account}))
