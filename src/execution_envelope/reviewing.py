"""Ongoing review: rounds over live executions, a person's revoke, and carrying revokes to the owners."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Final, TypeVar

import anyio

from execution_envelope.admission import MAX_CONFLICTS, Admission
from execution_envelope.credentials import scrub, shown
from execution_envelope.envelope import Ask, Subject
from execution_envelope.errors import Damaged, InvalidField, LedgerUnavailable, NotFound, OpenObligations
from execution_envelope.family import read_tree
from execution_envelope.journal import Journal
from execution_envelope.ledger.commit import SequenceConflict
from execution_envelope.lifecycle import Error, Review, Revocation, Revoked
from execution_envelope.record import Record
from execution_envelope.reviewer import (
    LIVE,
    PART_OF,
    REVOKE_TIMEOUT,
    Carried,
    Reviewed,
    Reviewer,
    ReviewRound,
    Revokers,
    Stop,
    check_live,
    is_news,
    of_parent,
    request,
    understood,
    why,
)
from execution_envelope.threads import Threads

#: How many executions are looked at, and owners asked, at the same time.
MAX_REVIEWS: Final = 8
#: How many times a reviewer may leave unanswered in one round; after that it is not asked in it any more.
MAX_SILENCE: Final = 3
#: How many threads one reviewer that is not async may keep busy.
MAX_THREADS: Final = 8
_PAGE: Final = 1000

T = TypeVar("T")


class Reviewing:
    """`admit` lets a person's request through the seam that somebody has to decide on."""

    def __init__(self, journal: Journal, admit: Callable[[Ask], Awaitable[Admission]]) -> None:
        self._journal = journal
        self._admit = admit
        self._threads: dict[str, Threads] = {}

    # A person

    async def revoke(self, record: Record, by: Subject, reason: str) -> Record:
        """See `AdmissionController.revoke`."""
        asked = request(record, by, reason)
        before = record.reviews.get(scrub(f"{by.type}:{by.id}"))
        if before is not None and isinstance(before.data, Review) and before.data.verdict == "revoke":
            return record  # said once more, by the same one: nothing new
        admission = await self._admit(asked)
        try:
            if admission.record.open_obligations:  # before anything is said: nobody could fulfil them for a review
                raise OpenObligations(admission.id, admission.record.open_obligations)
            subject = admission.envelope.identity.subject
            who = scrub(f"{subject.type}:{subject.id}")
            said = Review(who, "1", "revoke", text=scrub(reason), admission=admission.id)
            record = await self._said(record, said)
        except Exception as error:
            await admission.leave(failed=(type(error).__name__, str(error)))
            raise
        except BaseException:
            await admission.leave(cancelled="cancelled while saying revoke")
            raise
        try:
            await admission.complete(f"revoke {record.id}")
        except LedgerUnavailable:
            await admission.leave()  # what was said stands; its end is recorded when the ledger answers again
        return record

    async def _said(self, record: Record, said: Review) -> Record:
        for _ in range(MAX_CONFLICTS):
            check_live(record)
            try:
                await self._journal.write([(record, [said])], by=self._journal.component)
                return record
            except SequenceConflict:
                record = await self._journal.read(record.id)
        raise _conflicts(record)

    # A round

    async def review(
        self, reviewers: Sequence[Reviewer], *, by: str, progress: Callable[[int], None] | None = None
    ) -> ReviewRound:
        """See `AdmissionController.review`."""
        askers = [_Asker(reviewer, self._threads) for reviewer in reviewers]
        names = [asker.name for asker in askers]
        if len(set(names)) != len(names):
            raise InvalidField("reviewers", f"expected reviewers with different names, got {', '.join(names)}")
        result = ReviewRound()

        async def look(id: str) -> None:
            try:
                record = await self._journal.read(id)
            except (Damaged, NotFound):
                result.unreadable.append(id)
                return
            if record.state not in LIVE:
                return
            result.looked_at += 1
            for asker in askers:
                if asker.covers(record):
                    await self._asked(asker, record, result, by)
            if progress is not None:
                progress(result.looked_at)

        await _each(await self._journal.call(self._journal.ledger.unfinished), look)
        return result

    async def _asked(self, asker: _Asker, record: Record, result: ReviewRound, by: str) -> None:
        if asker.unanswered >= MAX_SILENCE:
            result.left_out += 1
            self._journal.counters["reviews_left_out"] += 1
            return
        said = await asker.ask(record)
        self._journal.counters["reviews_failed" if isinstance(said, Error) else "reviewed"] += 1
        news = await self._note(record, said, by)
        result.recorded += news
        if isinstance(said, Error):
            result.found.append(Reviewed(record.id, asker.name, "failed", said.text, news))
        elif said.verdict == "keep" and not (news and _took_back(record, said)):
            result.kept += 1
        else:
            result.found.append(Reviewed(record.id, asker.name, said.verdict, said.text, news))

    async def _note(self, record: Record, fact: Review | Revocation | Error, by: str) -> bool:
        """Record a fact of a live execution, if it is news; of one that has ended meanwhile it is none."""
        for _ in range(MAX_CONFLICTS):
            if record.state not in LIVE or not is_news(record, fact):
                return False
            try:
                await self._journal.write([(record, [fact])], by=by)
                return True
            except SequenceConflict:
                record = await self._journal.read(record.id)
        raise _conflicts(record)

    # Carrying out

    async def carry_out(self, revokers: Revokers, *, by: str) -> Carried:
        """See `AdmissionController.carry_out`."""
        result, round_ = Carried(), _Round(revokers)
        ids = await self._journal.call(self._journal.ledger.unfinished)

        async def carry(id: str) -> None:
            try:
                await self._carry(id, round_, result, by)
            except (Damaged, NotFound, InvalidField):
                result.unreadable.append(id)

        for start in range(0, len(ids), _PAGE):
            await _each(await self._journal.call(self._reviewed, ids[start : start + _PAGE]), carry)
        return result

    def _reviewed(self, ids: Sequence[str]) -> list[str]:
        """Those of which a reviewer has said something: reading all that is open would take longer."""
        return list(dict.fromkeys(step.envelope for step in self._journal.ledger.events_of(ids, ["review"])))

    async def _carry(self, id: str, round_: _Round, result: Carried, by: str) -> None:
        record = await self._journal.read(id)
        await self._take_back(record, by)
        asked = record.revoking
        if asked is None or record.state not in LIVE:
            return
        tree = await read_tree(self._journal, id, whole=False)
        # The parts before what they are part of; that in any case: with it may end what nobody else can stop.
        for depth, part in reversed(list(tree.walk())):
            if part.state not in LIVE:
                continue
            if (answered := round_.asked.get(part.id)) is not None:
                if depth:  # its own turn came first; what it is part of is asked for after it nevertheless
                    await answered.wait()
                    asked = (await self._journal.read(id)).revoking
                    if asked is None:
                        return
                continue
            answered = round_.asked[part.id] = anyio.Event()
            try:
                newest = await self._journal.read(part.id)  # walking a tree may remember less than the record
                if depth:
                    await self._note(newest, of_parent(record, asked), by)
                await self._ask(await self._journal.read(part.id), round_, result, by)
            finally:
                answered.set()

    async def _take_back(self, record: Record, by: str) -> None:
        """A part is not to be revoked any more when what it is part of is not."""
        for reviewer, event in record.reviews.items():
            said = event.data
            if not reviewer.startswith(PART_OF) or not isinstance(said, Review) or said.verdict == "keep":
                continue
            parent = await self._journal.read(reviewer.removeprefix(PART_OF))
            if parent.is_open and parent.revoking is None:
                kept = Review(reviewer, said.version, "keep", text=f"{parent.id} is not to be revoked any more")
                await self._note(record, kept, by)

    async def _ask(self, record: Record, round_: _Round, result: Carried, by: str) -> None:
        asked = record.revoking
        if asked is None or record.state not in LIVE:
            if not record.is_open:
                _ended(record, result)
            return
        bound = record.bound
        if bound is None:
            answer = Stop.unknown("it is not bound: the process that admitted it stops it, or is found to be gone")
            owner = "process"
        else:
            owner = bound.owner
            answer = await round_.ask(owner, record, why(asked))
        if answer.status == "stopped":
            await self._confirm(record, owner, answer.text, result)
            return
        self._journal.counters["revocations_unconfirmed"] += 1
        result.unconfirmed.append((record.id, answer))
        if owner in round_.revokers or bound is None:
            # What this process has nobody to ask about, another one has.
            said = Revocation(owner, answer.status, scrub(answer.text))
            await self._note(await self._journal.read(record.id), said, by)

    async def _confirm(self, record: Record, owner: str, evidence: str, result: Carried) -> None:
        """The owner confirmed. The first end counts: the owner may have recorded one itself."""
        for _ in range(MAX_CONFLICTS):
            if not record.is_open:
                _ended(record, result)
                return
            try:
                await self._journal.write([(record, [Revoked(scrub(evidence))])], by=owner)
            except SequenceConflict:
                record = await self._journal.read(record.id)
                continue
            self._journal.counters["revoked"] += 1
            result.revoked.append((record.id, evidence))
            return
        raise _conflicts(record)


class _Round:
    """Whom to ask in one round, who was asked about, and which owners do not answer."""

    def __init__(self, revokers: Revokers) -> None:
        self.revokers = revokers
        #: Those whose turn has come, each set when it is over.
        self.asked: dict[str, anyio.Event] = {}
        self._silent = set[str]()

    async def ask(self, owner: str, record: Record, reason: str) -> Stop:
        """Within `REVOKE_TIMEOUT`; an error, nonsense or no answer is unknown."""
        revoker = self.revokers.get(owner)
        if revoker is None:
            return Stop.unknown(f"no revoker for owner {owner}")
        if owner in self._silent:
            return Stop.unknown(f"owner {owner} did not answer before in this round")
        try:
            with anyio.fail_after(REVOKE_TIMEOUT) as scope:
                answer: object = await revoker(Record(record.envelope, record.events), reason)
        except TimeoutError as error:
            if not scope.cancelled_caught:
                return Stop.unknown(f"asking the owner failed: TimeoutError: {error}")
            self._silent.add(owner)
            return Stop.unknown(f"the owner did not answer within {REVOKE_TIMEOUT:g} s")
        except Exception as error:
            return Stop.unknown(f"asking the owner failed: {type(error).__name__}: {error}")
        if not isinstance(answer, Stop):
            return Stop.unknown(f"expected a Stop of the owner, got `{type(answer).__name__}`")
        return answer


class _Asker:
    """Asks one reviewer within its time, and makes what is recorded of whatever comes."""

    def __init__(self, reviewer: Reviewer, threads: dict[str, Threads]) -> None:
        declared = getattr(reviewer, "declaration", None)
        if not callable(getattr(reviewer, "review", None)) or not callable(getattr(declared, "check", None)):
            raise InvalidField("reviewers", f"expected `declaration` and `review`, got {shown(reviewer)}")
        reviewer.declaration.check()
        self.name = reviewer.declaration.name
        #: How often it did not answer in time.
        self.unanswered = 0
        self._reviewer = reviewer
        self._threads = threads.setdefault(self.name, Threads(f"reviewer {self.name}", MAX_THREADS))

    def covers(self, record: Record) -> bool:
        """Whether it is asked about an execution of this kind."""
        kinds = self._reviewer.declaration.kinds
        return kinds is None or record.envelope.execution.kind in kinds

    async def ask(self, record: Record) -> Review | Error:
        """What it says, or how it failed."""
        declared = self._reviewer.declaration
        seen = Record(record.envelope, record.events)
        try:
            with anyio.fail_after(declared.timeout) as scope:
                said = await self._called(seen)
            return understood(declared, said)
        except TimeoutError as error:
            if scope.cancelled_caught:
                self.unanswered += 1
                return self._failed(f"no answer within {declared.timeout:g} s")
            return self._failed(f"TimeoutError: {error}")
        except Exception as error:
            return self._failed(f"{type(error).__name__}: {error}")

    async def _called(self, seen: Record) -> object:
        review = self._reviewer.review
        if inspect.iscoroutinefunction(review):
            return await review(seen)
        call = self._threads.start(partial(review, seen))
        await call.wait()
        said = call.answer()
        return await said if inspect.isawaitable(said) else said

    def _failed(self, how: str) -> Error:
        return Error(scrub(f"reviewer {self.name} failed, nothing is known: {how}"), self.name)


async def _each(ids: Iterable[str], work: Callable[[str], Awaitable[None]]) -> None:
    """`work` for all of them, `MAX_REVIEWS` at a time. Raises what the first one raised, alone."""
    waiting, problems = iter(ids), list[Exception]()

    async def some() -> None:
        for id in waiting:
            if problems:
                return
            try:
                await work(id)
            except Exception as error:
                problems.append(error)

    async with anyio.create_task_group() as group:
        for _ in range(MAX_REVIEWS):
            group.start_soon(some)
    if problems:
        raise problems[0]


def _took_back(record: Record, said: Review) -> bool:
    """Whether the same reviewer had flagged or revoked it before."""
    return any(
        isinstance(e.data, Review) and e.data.reviewer == said.reviewer and e.data.verdict != "keep"
        for e in record.events
    )


def _ended(record: Record, result: Carried) -> None:
    if record.state == "revoked":
        said = next((e.data.message for e in record.events if isinstance(e.data, Revoked)), None)
        result.revoked.append((record.id, said or ""))
    else:
        result.ended.append((record.id, record.state))


def _conflicts(record: Record) -> LedgerUnavailable:
    problem = f"expected to record a fact, other writers came first {MAX_CONFLICTS} times"
    return LedgerUnavailable(problem, envelope_id=record.id)
