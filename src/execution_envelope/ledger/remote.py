"""A ledger that another process hosts: `envelope serve`, over HTTPS.

It keeps the same contract as the databases behind it: what a call acknowledged is as durable as there, a process writes
a chain of its own, which names it and the service that its token is of, and a lost answer is found out about. No call
waits for longer than `TIMEOUT`. The token comes from the environment, see `remote_http.token`.
"""

from __future__ import annotations

import base64
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from execution_envelope.budgets import Balance, Holding, Key
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import wire
from execution_envelope.ledger.commit import Commit, KeyRow, Stored
from execution_envelope.ledger.contract import (
    AttemptedRequest,
    ChainHead,
    Conservation,
    Deciding,
    Moment,
    Row,
    Step,
    decisions_of,
)
from execution_envelope.ledger.exports import Segments
from execution_envelope.ledger.projection import Projection
from execution_envelope.ledger.projection_remote import RemoteProjection
from execution_envelope.ledger.remote_http import TIMEOUT, Lost, Server, elsewhere
from execution_envelope.ledger.remote_segments import RemoteSegments
from execution_envelope.ledger.remote_store import RemoteStore
from execution_envelope.ledger.submission import Submission
from execution_envelope.ledger.verification import Finding
from execution_envelope.ledger.writer import Writer
from execution_envelope.lifecycle import Event
from execution_envelope.process import Process


class RemoteLedger:
    """See `Ledger`. `url` is ``https://host:port/prefix``; plain ``http`` for this machine only.

    With `read_only` `commit` and `note` raise `LedgerUnavailable`. Raises `InvalidField` for another URL. What belongs
    to no tenant - chains, entries, verification - only a token with the right `audit` for all tenants may read;
    `LedgerUnavailable` says so.
    """

    inline = False

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        self._server = Server(url)
        self._read_only = read_only
        self._forget()
        _open_ledgers.add(self)

    def _forget(self) -> None:
        """Start afresh: at first, and in a forked child, which must use neither its parent's connections nor chain."""
        self._writer = Writer(RemoteStore(self._server))
        self._projection = RemoteProjection(self._server)

    # Writing

    def commit(self, *commits: Commit) -> list[list[Event]]:
        self._check_writable()
        return self._writer.commit(commits, TIMEOUT)

    def submit(self, submission: Submission) -> None:
        self._check_writable()
        self._writer.submit(submission)

    def flush(self) -> None:
        if self._writer.pending:
            self._writer.commit((), TIMEOUT)

    def conservation(self) -> Conservation:
        return self._writer.conservation()

    def note(self, request: AttemptedRequest) -> None:
        self._check_writable()
        try:
            self._server.post("note", request, bool)
        except Lost as lost:
            raise LedgerUnavailable(str(lost)) from lost

    def keep_checkpoint(self, number: int, body: bytes) -> bool:
        self._check_writable()
        return self._server.put(f"checkpoints/{number}", body, bool)

    def currency(self, code: str) -> str:
        return self._server.put("currency", code, str)

    def move_cursor(self, consumer: str, positions: Mapping[str, int]) -> None:
        self._check_writable()
        self._server.put("cursor", [consumer, dict(positions)], bool)

    def _check_writable(self) -> None:
        if self._read_only:
            problem = f"expected a ledger to write to, `{self._server.url}` is open read-only"
            raise LedgerUnavailable(problem, retryable=False)

    # Reading one's own writes

    def read(self, envelope: str) -> Stored | None:
        self.flush()
        found = self._server.get("read", wire.SentStored | None, envelope=envelope)  # type: ignore[arg-type]
        return None if found is None else Stored(found.body.encode(), found.events)

    def read_many(self, envelopes: Sequence[str]) -> dict[str, Stored | Exception | None]:
        """See `ReadsMany`."""
        self.flush()
        found: dict[str, Stored | Exception | None] = {}
        for one in self._server.pieces("read_many", wire.SentRead, envelopes=_packed(envelopes)):
            stored = None if one.stored is None else Stored(one.stored.body.encode(), one.stored.events)
            found[one.envelope] = stored if one.refused is None else wire.error_of(one.refused)
        return found

    def find(self, kind: str, reference: str) -> str | None:
        self.flush()
        return self._server.get("find", str | None, kind=kind, reference=reference)  # type: ignore[arg-type]

    def key(self, digest: str) -> KeyRow | None:
        return self._server.get("key", KeyRow | None, digest=digest)  # type: ignore[arg-type]

    def children(self, envelope: str) -> list[str]:
        self.flush()
        return list(self._server.pieces("children", str, envelope=envelope))

    # Looking around

    def newest(self, limit: int, *, before: str | None = None) -> list[str]:
        return self._server.get("newest", list[str], limit=limit, before=before)

    def unfinished(self) -> list[str]:
        return list(self._server.pieces("unfinished", str))

    def writer(self, chain: str) -> Process | None:
        return self._server.get("writer", Process | None, chain=chain)  # type: ignore[arg-type]

    def lease(self, chain: str) -> int | None:
        return self._server.get("lease", int | None, chain=chain)  # type: ignore[arg-type]

    def chain_of(self, envelope: str, sequence: int) -> str | None:
        return self._server.get("chain_of", str | None, envelope=envelope, sequence=sequence)  # type: ignore[arg-type]

    def balances(self, *, account: str | None = None, window: str | None = None) -> list[Balance]:
        return list(self._server.pieces("balances", Balance, account=account, window=window))

    def holders(self, key: Key, limit: int) -> tuple[list[Holding], int]:
        return self._server.get("holders", tuple[list[Holding], int], limit=limit, **key._asdict())

    def cursor(self, consumer: str) -> dict[str, int]:
        return self._server.get("cursor", dict[str, int], consumer=consumer)

    def attempted(self, limit: int) -> list[AttemptedRequest]:
        return list(self._server.pieces("attempted", AttemptedRequest, limit=limit))

    def checkpoints(self, *, last: int | None = None) -> list[bytes]:
        return list(self._server.pieces("checkpoints", bytes, last=last))

    def chains(self) -> list[ChainHead]:
        return list(self._server.pieces("chains", ChainHead))

    def moment(self) -> Moment:
        chains: list[ChainHead] = []
        balances: list[Balance] = []
        holdings: list[tuple[Key, Holding]] = []
        for piece in self._server.pieces("moment", wire.MomentPiece):
            chains += () if piece.chain is None else (piece.chain,)
            balances += () if piece.balance is None else (piece.balance,)
            holdings += () if piece.holding is None else (piece.holding,)
        return Moment(chains, balances, holdings)

    def rows(self, chain: str, *, after: int = -1, until: int | None = None) -> Iterator[Row]:
        yield from self._server.pieces("rows", Row, chain=chain, after=after, until=until)

    def findings_of(self, envelope: str) -> list[Finding]:
        """See `verification.Recomputing`."""
        return self._server.get("findings_of", list[Finding], envelope=envelope)

    def rows_of(self, envelope: str) -> Iterator[Row]:
        yield from self._server.pieces("rows_of", Row, envelope=envelope)

    def steps(self, *, after: str = "", until: str | None = None) -> Iterator[Step]:
        yield from self._server.pieces("steps", Step, after=after, until=until)

    def events_of(self, envelopes: Sequence[str], types: Sequence[str]) -> Iterator[Step]:
        ids = sorted(envelopes)
        for place in range(0, len(ids), wire.MAX_MANY):
            some = _packed(ids[place : place + wire.MAX_MANY])
            yield from self._server.pieces("events_of", Step, envelopes=some, types=_packed(types))

    def decisions(self, *, after: str = "", until: str | None = None) -> Iterator[Deciding]:
        yield from decisions_of(self.steps(after=after, until=until))

    def splits(self, size: int) -> list[str]:
        return list(self._server.pieces("splits", str, size=size))

    def strays(self) -> list[tuple[int, int]]:
        return self._server.get("strays", list[tuple[int, int]])

    @property
    def url(self) -> str | None:
        return self._server.url

    def key_rows(self) -> Iterator[KeyRow]:
        yield from self._server.pieces("key_rows", KeyRow)

    def references(self) -> Iterator[tuple[str, str, int, str]]:
        yield from self._server.pieces("references", tuple[str, str, int, str])

    def families(self) -> Iterator[tuple[str, str]]:
        yield from self._server.pieces("families", tuple[str, str])

    def closings(self, *, after: str = "", until: str | None = None) -> Iterator[str]:
        yield from self._server.pieces("closings", str, after=after, until=until)

    def count(self) -> int:
        return self._server.get("count", int)

    def migrate(self) -> tuple[int, int]:
        raise elsewhere(self._server, "a migration")

    def segments(self) -> Segments | None:
        return RemoteSegments(self._server)

    def tampered_schema(self) -> list[str]:
        return self._server.get("tampered_schema", list[str])

    def projection(self) -> Projection:
        return self._projection

    def close(self) -> None:
        """Store what is pending, end the chain and let go of the server; a later call opens it again."""
        self._writer.close()
        self._projection.close()
        self._server.close()


def _packed(names: Sequence[str]) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(list(names))).decode()


_open_ledgers: weakref.WeakSet[RemoteLedger] = weakref.WeakSet()


def _after_fork() -> None:
    for ledger in _open_ledgers:
        ledger._server.forked()
        ledger._forget()


os.register_at_fork(after_in_child=_after_fork)
