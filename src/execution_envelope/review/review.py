"""`Review`: the questions that people ask of a ledger, each of them only about what they may see.

Every method takes `tenants`: None sees everything; a set sees the envelopes of these tenants, and no trace of any
other, in no answer, count or error. An envelope that names no tenant is seen by None alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from execution_envelope.budgets import Balance, Budgets, Holding, Key
from execution_envelope.budgets import window as window_of
from execution_envelope.credentials import shown
from execution_envelope.criteria import FLAGS
from execution_envelope.errors import Damaged, Exported, NotFound
from execution_envelope.family import read_tree
from execution_envelope.ledger import AttemptedRequest, Finding, Ledger
from execution_envelope.ledger.checkpoint import NotProven, Statement, decode_checkpoint
from execution_envelope.ledger.contract import ChainHead
from execution_envelope.ledger.projection import COVERAGE, DAMAGED, Coverage, Lag, Page, ProjectedEnvelope
from execution_envelope.ledger.rollups import By, Dimension, Question
from execution_envelope.ledger.verification import of_envelope
from execution_envelope.query import Query
from execution_envelope.record import Record
from execution_envelope.review.accounting import Accounting, window
from execution_envelope.review.catching_up import PATIENCE, CatchingUp
from execution_envelope.review.explain import Explanation, accounts, explain
from execution_envelope.tree import Tree

#: So many are counted one by one; of more it is said that there are more.
MAX_COUNTED: Final = 500
#: Whose envelopes are seen; None is everybody's.
Tenants = frozenset[str] | None


@dataclass(frozen=True, slots=True)
class ChainStatus:
    """What recomputing one envelope's entries says, in the chains that they are in."""

    entries: int
    chains: tuple[str, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Counted:
    """How many, or with `more` at least how many; and ids of the newest."""

    count: int
    more: bool = False
    newest: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """``17``, or ``1000+``."""
        return f"{self.count}{'+' if self.more else ''}"


@dataclass(frozen=True, slots=True)
class Known:
    """What there is of each sort of `COVERAGE`; `whole` is what is said of the whole ledger, to who sees all."""

    of: Mapping[str, Counted]
    whole: Coverage | None

    @property
    def queries(self) -> Mapping[str, str]:
        """Sort -> the query that finds it."""
        return {name: _asking(name) for name in self.of}


class Review:
    """Questions about a ledger. Does I/O: call it from a thread. `clock` says what time it is, in UTC."""

    def __init__(self, ledger: Ledger, *, clock: Callable[[], datetime]) -> None:
        self.ledger = ledger
        self.clock = clock
        self._catching_up: CatchingUp | None = None

    def patient(self, seconds: float = PATIENCE) -> Review:
        """The same for those who cannot wait: lists and sums are brought up to date beside them.

        Where that takes longer than so many seconds they get what is there; `behind` says so.
        """
        found = Review(self.ledger, clock=self.clock)
        found._catching_up = CatchingUp(self.ledger.projection, patience=seconds)
        return found

    @property
    def behind(self) -> int | None:
        """How many entries lists and sums did not know when somebody waited for them in vain, until they do; else None.

        Of the whole ledger: the number is for who sees all.
        """
        return None if self._catching_up is None else self._catching_up.behind

    def current(self) -> bool:
        """Whether lists and sums know all that is recorded now; waits for it as long as `patient` says."""
        return self._catching_up is None or self._catching_up.current()

    def _fresh(self, asked: bool) -> bool:
        """Whether a read has to catch up itself."""
        if not asked or self._catching_up is None:
            return asked
        return self._catching_up.current() and self._catching_up.failed

    def record(self, reference: str, *, tenants: Tenants = None) -> Record:
        """One envelope, by its id or ``kind:reference``. Raises `NotFound`, `Exported` and `Damaged`.

        Another tenant's is said not to exist, in the same words; so is what cannot be read, to who does not see all.
        """
        try:
            kind, colon, name = reference.partition(":")
            id = self.ledger.find(kind, name) if colon else reference
            stored = None if id is None else self.ledger.read(id)
            record = None if stored is None else stored.record()
        except (Exported, Damaged):
            if tenants is None:
                raise
            record = None  # whose it was is not known any more
        if record is None or not _seen(record, tenants):
            raise NotFound(f"expected an envelope, none is known by {shown(reference, 200)}")
        return record

    def row(self, id: str, *, tenants: Tenants = None, fresh: bool = True) -> ProjectedEnvelope | None:
        """One envelope as it is listed; None where there is none to see."""
        row = self.ledger.projection().get(id, fresh=self._fresh(fresh))
        return row if row is not None and (tenants is None or row.tenant in tenants) else None

    def find(
        self, query: str = "", *, limit: int, after: str | None = None, tenants: Tenants = None, fresh: bool = True
    ) -> Page:
        """Envelopes that a query finds, newest first; all without one. Raises `InvalidField`, see `Projection.search`.

        With `fresh` false they are as the last read left them.
        """
        parsed = Query.parse(query, self.clock()) if query.strip() else None
        projection = self.ledger.projection()
        return projection.search(parsed, limit=limit, after=after, tenants=tenants, fresh=self._fresh(fresh))

    def stream(self, query: str = "", *, tenants: Tenants = None) -> Iterator[ProjectedEnvelope]:
        """All envelopes that a query finds, newest first, read page by page. Raises `InvalidField` at once."""
        parsed = Query.parse(query, self.clock()) if query.strip() else None
        return self.ledger.projection().stream(parsed, tenants=tenants, fresh=self._fresh(True))

    def counted(self, query: str, *, tenants: Tenants = None) -> Counted:
        """How many envelopes a query finds, up to `MAX_COUNTED`."""
        page = self.find(query, limit=MAX_COUNTED, tenants=tenants, fresh=False)
        return Counted(len(page.rows), page.next is not None)

    def coverage(self, *, newest: int, tenants: Tenants = None) -> Known:
        """What the record does not know, with the newest ids of each sort.

        To who does not see all: of their tenants only, counted up to `MAX_COUNTED`, and nothing of entries and requests
        that belong to no envelope.
        """
        projection = self.ledger.projection()
        names = [name for name in COVERAGE if tenants is None or name != DAMAGED]
        if tenants is None:
            whole = projection.coverage(newest, fresh=self._fresh(True))
            of = {name: Counted(whole.of[name].count, False, whole.of[name].newest) for name in names}
            return Known(of, whole)
        found = {}
        for number, name in enumerate(names):
            page = self.find(_asking(name), limit=MAX_COUNTED, tenants=tenants, fresh=not number)
            ids = tuple(row.id for row in page.rows[:newest])
            found[name] = Counted(len(page.rows), page.next is not None, ids)
        return Known(found, None)

    def balances(self, budgets: Budgets, *, account: str | None = None, tenants: Tenants = None) -> list[Balance]:
        """What stands in the accounts of now, of today and of this month; with `account` in all windows of that.

        To who does not see all: where `budgets` tell that an account is of their tenants.
        """
        windows = (
            ("now", window_of("day", self.clock()), window_of("month", self.clock())) if account is None else (None,)
        )
        found = [one for name in windows for one in self.ledger.balances(account=account, window=name)]
        return [one for one in found if tenants is None or _whose(budgets, one.account) <= tenants]

    def holders(self, balance: Balance, limit: int, *, tenants: Tenants = None) -> tuple[list[Holding], int]:
        """Who holds most of a balance of `balances`, and how many more. Others' are left out, and not counted."""
        key = Key(balance.account, balance.window, balance.resource)
        held, more = self.ledger.holders(key, limit)
        seen = [one for one in held if tenants is None or self.row(one.envelope, tenants=tenants) is not None]
        return seen, more if len(seen) == len(held) else 0

    def lag(self) -> Lag:
        """How far lists and sums are behind the log. Of the whole ledger: for who sees all."""
        return self.ledger.projection().lag()

    def chains(self) -> Sequence[ChainHead]:
        """Every chain, in the order in which they were opened. Of the whole ledger, as `checkpoint`."""
        return self.ledger.chains()

    def checkpoint(self) -> Statement | None:
        """What the newest copy of a checkpoint in the ledger says, by itself: it proves nothing."""
        kept = self.ledger.checkpoints(last=1)
        with suppress(NotProven):
            return decode_checkpoint(kept[0]).statement if kept else None
        return None

    def attempted(self, limit: int, *, tenants: Tenants = None) -> list[AttemptedRequest]:
        """Requests that never became an envelope, newest first: nobody knows whose they are, so who does not see all
        sees none."""
        return self.ledger.attempted(limit) if tenants is None else []

    def explain(self, record: Record, budgets: Budgets, *, tenants: Tenants = None) -> Explanation:
        """The record in sentences, with how the budgets that it names stand now: where all of them may be seen."""
        named = accounts(record)
        balances: list[Balance] | None = None
        if tenants is None or all(_whose(budgets, account) <= tenants for account, _ in named):
            balances = [
                one for account, window in named for one in self.ledger.balances(account=account, window=window)
            ]
        return explain(record, now=self.clock(), children=self.children(record), balances=balances)

    def children(self, record: Record) -> Sequence[str]:
        """The ids of those that are part of it: always of the same tenant."""
        return self.ledger.children(record.id)

    async def tree(self, reference: str, *, tenants: Tenants = None) -> Tree:
        """An envelope with all that are part of it. Raises as `record`, and `InvalidField` where it is too large."""
        return await read_tree(_Trees(self, tenants), self.record(reference, tenants=tenants).id)

    def chain(self, record: Record) -> ChainStatus:
        """What recomputing its own entries, and the links that they hang on, says."""
        rows = list(self.ledger.rows_of(record.id))
        chains = tuple(dict.fromkeys(row.chain for row in rows))
        return ChainStatus(len(rows), chains, tuple(of_envelope(self.ledger, record.id)))

    def accounting(
        self,
        since: str,
        until: str | None = None,
        *,
        by: Sequence[By] = (),
        where: Mapping[Dimension, str | None] | None = None,
        tenants: Tenants = None,
        fresh: bool = True,
    ) -> Accounting:
        """What was asked for, granted and used over a window of UTC days, by group; see `accounting.window`.

        `where` names what is added up alone, with None for what names none. Raises `InvalidField`.
        """
        now = self.clock()
        question = Question(*window(since, until, now=now), tuple(by), where or {}, tenants)
        found = self.ledger.projection().totals(question, fresh=self._fresh(fresh))
        return Accounting(question, found if tenants is None else found.narrowed(), now)


def _asking(name: str) -> str:
    return name if name in FLAGS else f"state={name}"


def _whose(budgets: Budgets, account: str) -> frozenset[str | None]:
    """The tenants of an account; that it is of none who can be named where it cannot be told."""
    budget = budgets.of(account)
    found = None if budget is None else budget.tenants_of(account)
    return frozenset({None}) if found is None else found


def _seen(record: Record, tenants: Tenants) -> bool:
    return tenants is None or record.envelope.identity.tenant in tenants


class _Trees:
    """A ledger as trees are read."""

    def __init__(self, review: Review, tenants: Tenants) -> None:
        self._review = review
        self._tenants = tenants
        self.ended: dict[str, Tree] = {}

    async def read(self, *reference: str) -> Record:
        return self._review.record(":".join(reference), tenants=self._tenants)

    async def children(self, id: str) -> Sequence[str]:
        return self._review.ledger.children(id)

    def remember_ended(self, tree: Tree) -> None:
        """Each is read once anyway."""
