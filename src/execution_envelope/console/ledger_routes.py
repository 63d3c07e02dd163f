"""The ledger over HTTP, for `RemoteLedger`: what a client reads and writes, by the rights of its token.

These routes are the protocol of our own client, versioned by `wire.PROTOCOL`, and are not in the OpenAPI document:
who writes in another language uses ``/api/admissions``. Bodies are bounded before they are read, and everything that
may wait for a disk runs in a thread. Names of a service's own components are as it said them, see `wire.relative`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Annotated, Any, Final, TypeVar

import msgspec
from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.routing import APIRoute
from starlette.responses import Response, StreamingResponse

from execution_envelope.budgets import Balance, Holding, Key
from execution_envelope.console.access import Principal
from execution_envelope.console.asserted import Service
from execution_envelope.console.clients import Clients, OutOfTurn, UnknownSession, opening_of
from execution_envelope.console.problems import MEDIA_TYPE, PROBLEM, Problem, problem
from execution_envelope.console.shared import Console
from execution_envelope.console.who import Reader, Shared, Writer
from execution_envelope.credentials import scrub
from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.errors import Damaged, EnvelopeError, Exported, InvalidField, LedgerUnavailable
from execution_envelope.ledger import AttemptedRequest, Ledger, wire
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.commit import DAMAGED, KeyRow, SequenceConflict
from execution_envelope.ledger.exports import exports_of
from execution_envelope.ledger.verification import of_envelope
from execution_envelope.process import Process

T = TypeVar("T")

#: Items in one line of a long answer.
_LINE: Final = 500
#: Ids that are looked through at once for those that a service sees, and at most for one answer.
_LOOK: Final = 1000
MAX_LOOKED: Final = 100_000
#: The most items that one question may ask for.
MAX_LIMIT: Final = 10_000
#: Of an integer in a question: what every database has room for.
_MOST: Final = 2**53


class Route(APIRoute):
    """Answers what the ledger raises as a problem with the refusal in it, for the client to raise again."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See `APIRoute`."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except UnknownSession:
                return problem(404, "expected a session that is open", type="no-session")
            except OutOfTurn:
                return problem(409, "expected the next group, this one came too late", type="out-of-turn")
            except (EnvelopeError, SequenceConflict) as error:
                said = wire.refusal(error)
                status = getattr(error, "status", 409 if isinstance(error, SequenceConflict) else 422)
                kind = f"{PROBLEM}{said.type}"
                body = _Refused(kind, said.type.replace("-", " "), status, said.message, refusal=said)
                return Response(msgspec.json.encode(body), status, media_type=MEDIA_TYPE)

        return handled


class _Refused(Problem, frozen=True, omit_defaults=True):
    """A problem with the refusal that the client raises again."""

    refusal: wire.Refusal | None = None


router: Final = APIRouter(prefix="/api/ledger", route_class=Route, include_in_schema=False)


# Who asks, and what was sent


def service(who: Writer, shared: Shared) -> Service:
    """A dependency: the backend service that writes. 403 for a person, who asks for nothing in a service's name."""
    return service_of(who, shared)


def service_of(who: Principal, shared: Console) -> Service:
    """A principal as a service. 403 for another, and for one with the name under which this server itself records."""
    if who.type != "service":
        raise HTTPException(403, f"expected a service, {who.name} is none")
    if "/" in who.id or not 1 <= len(who.id) <= 64:
        raise HTTPException(403, "expected a service with a name of up to 64 characters, without a slash")
    if shared.controller is not None and who.id == shared.controller.component:
        raise HTTPException(403, f"expected a service with a name of its own, {who.id} is the server's")
    return Service(who.id, who.tenants)


Writing = Annotated[Service, Depends(service)]


def whole(who: Reader) -> Principal:
    """A dependency: somebody who may see what belongs to no tenant, and so everything."""
    if who.tenants is not None or not who.may("audit"):
        raise HTTPException(403, f"expected the right `audit` for all tenants, {who.name} does not have it")
    return who


Whole = Depends(whole)


async def body(request: Request) -> bytes:
    """A dependency: the body; 413 beyond `wire.MAX_BODY`, whatever the headers say."""
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > wire.MAX_BODY:
            raise HTTPException(413, f"expected a body of up to {wire.MAX_BODY} bytes")
        pieces.append(piece)
    return b"".join(pieces)


Body = Annotated[bytes, Depends(body)]


def clients(shared: Shared) -> Clients:
    """A dependency: those of this server."""
    return shared.clients


Open = Annotated[Clients, Depends(clients)]


def ledger(shared: Shared) -> Ledger:
    """A dependency: the ledger behind it all."""
    return shared.review.ledger


Behind = Annotated[Ledger, Depends(ledger)]


def parsed(body: bytes, type: Any) -> Any:
    """A body as one of the structs of the protocol. 400 for another."""
    try:
        return msgspec.json.decode(body, type=type)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise HTTPException(400, f"expected a body of protocol {wire.PROTOCOL}: {scrub(str(error), 300)}") from None


def told(said: Any) -> Response:
    """An answer."""
    return Response(msgspec.json.encode(said), media_type="application/json")


def streamed(found: Iterable[Any]) -> StreamingResponse:
    """An answer of any length; see `Server.pieces`. What is wrong before the first line is a problem of its own."""
    items = iter(found)
    first = list(islice(items, _LINE))

    def lines() -> Iterator[bytes]:
        some = first
        try:
            while some:
                yield msgspec.json.encode(some) + b"\n"
                some = list(islice(items, _LINE)) if len(some) == _LINE else []
            yield b'"end"\n'
        except Exception as error:
            yield msgspec.json.encode(wire.refusal(error)) + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


# Writing


@router.post("/sessions")
def open_session(who: Writing, open: Open, sent: Body) -> Response:
    """Open a session: a chain of its own for a client."""
    protocol = parsed(sent, _Protocol).protocol
    if protocol != wire.PROTOCOL:
        text = f"expected protocol {wire.PROTOCOL}, the client speaks {protocol}: use the same version on both sides"
        raise LedgerUnavailable(text, retryable=False)
    return told(open.open(who, parsed(sent, wire.Opening)))


class _Protocol(msgspec.Struct):
    protocol: int


@router.post("/sessions/{id}/groups")
def write(id: str, who: Writing, open: Open, sent: Body) -> Response:
    """Store a group of submissions."""
    group = parsed(sent, wire.Group)
    if len(group.submissions) > wire.MAX_GROUP:
        raise InvalidField("submissions", f"expected up to {wire.MAX_GROUP} submissions")
    return told(open.write(id, who, group))


@router.post("/sessions/{id}/settled")
def settled(id: str, who: Writing, open: Open, sent: Body) -> Response:
    """What became of a group whose answer was lost."""
    return told(open.settled(id, who, parsed(sent, wire.Asked).number))


@router.post("/sessions/{id}/alive")
def alive(id: str, who: Writing, open: Open, sent: Body) -> Response:
    """The client lives: renew the lease of its chains."""
    open.alive(id, who, parsed(sent, wire.Said))
    return told(True)


@router.post("/sessions/{id}/end")
def end(id: str, who: Writing, open: Open, sent: Body) -> Response:
    """End a session, and its chain, in order."""
    open.end(id, who, parsed(sent, wire.Said))
    return told(True)


@router.get("/own")
def own(who: Writing, open: Open, chain: str, after: int) -> Response:
    """What stands in a chain of the service's own behind a position."""
    return told(open.own(who, chain, _bounded(after)))


@router.post("/note")
def note(who: Writing, behind: Behind, sent: Body) -> Response:
    """See `Ledger.note`."""
    said = parsed(sent, AttemptedRequest)
    if not 100 <= said.status <= 599 or not 0 <= said.dropped <= _MOST:
        raise InvalidField("status", "expected the status of an HTTP answer")
    at, id = scrub(said.at, 40), said.request_id
    surface, reason, detail = scrub(f"{who.name}: {said.surface}", 300), scrub(said.reason, 200), scrub(said.detail)
    behind.note(
        AttemptedRequest(at, surface, reason, said.status, detail, None if id is None else scrub(id, 200), said.dropped)
    )
    return told(True)


@router.post("/currency")
def currency(who: Writing, behind: Behind, sent: Body) -> Response:
    """See `Ledger.currency`."""
    code = parsed(sent, str)
    if not (len(code) == 3 and code.isascii() and code.isalpha() and code.isupper()):
        raise InvalidField("currency", "expected a currency such as EUR")
    return told(behind.currency(code))


@router.post("/cursor", dependencies=[Whole])
def move_cursor(who: Writing, behind: Behind, sent: Body) -> Response:
    """See `Ledger.move_cursor`."""
    consumer, positions = parsed(sent, tuple[str, dict[str, int]])
    if not 1 <= len(consumer) <= 256 or "\0" in consumer + "".join(positions):
        raise InvalidField("consumer", "expected a name of up to 256 characters")
    behind.move_cursor(consumer, {chain: _bounded(position) for chain, position in positions.items()})
    return told(True)


@router.post("/checkpoints/{number}", dependencies=[Whole])
def keep_checkpoint(number: int, who: Writing, behind: Behind, sent: Body) -> Response:
    """See `Ledger.keep_checkpoint`."""
    return told(behind.keep_checkpoint(_bounded(number), parsed(sent, bytes)))


# Reading: what a service sees


def seen_by(who: Principal) -> Service:
    """Whose envelopes a reader sees. Only a service's own names are relative to it."""
    return Service(who.id if who.type == "service" else "", who.tenants)


def _sees(who: Principal, behind: Ledger, envelope: str) -> bool:
    """Whether there is such an envelope that the reader sees; what cannot be read is seen by who sees all."""
    if who.tenants is None:
        return True
    try:
        stored = behind.read(envelope)
        return stored is not None and seen_by(who).sees(decode_envelope(stored.body))
    except (Exported, *DAMAGED):
        return False  # whose it was is not known any more
    except EnvelopeError as error:
        if isinstance(error, LedgerUnavailable):
            raise
        return False


@router.get("/read")
def read(who: Reader, behind: Behind, envelope: str) -> Response:
    """See `Ledger.read`."""
    return told(_read(who, behind, envelope))


@router.get("/read_many")
def read_many(who: Reader, behind: Behind, envelopes: str) -> Response:
    """See `ReadsMany`."""

    def found() -> Iterator[wire.SentRead]:
        for envelope in _unpacked(envelopes)[: wire.MAX_MANY]:
            try:
                yield wire.SentRead(envelope, _read(who, behind, envelope))
            except LedgerUnavailable:
                raise
            except EnvelopeError as error:
                yield wire.SentRead(envelope, refused=wire.refusal(error))

    return streamed(found())


def _read(who: Principal, behind: Ledger, envelope: str) -> wire.SentStored | None:
    try:
        stored = behind.read(envelope) if _sees(who, behind, envelope) else None
        if stored is None:
            return None
        reader = seen_by(who)
        events = wire.relative(reader.name, stored.events) if reader.name else stored.events
        return wire.SentStored(stored.body.decode(), events)
    except DAMAGED as error:
        raise Damaged(envelope) from error


@router.get("/find")
def find(who: Reader, behind: Behind, kind: str, reference: str) -> Response:
    """See `Ledger.find`."""
    found = behind.find(kind, reference)
    return told(found if found is not None and _sees(who, behind, found) else None)


@router.get("/key")
def key(who: Reader, behind: Behind, digest: str) -> Response:
    """See `Ledger.key`."""
    found: KeyRow | None = behind.key(digest)
    return told(found if found is not None and _sees(who, behind, found.envelope) else None)


@router.get("/children")
def children(who: Reader, behind: Behind, envelope: str) -> Response:
    """See `Ledger.children`."""
    return streamed(_seen(who, behind, behind.children(envelope) if _sees(who, behind, envelope) else []))


@router.get("/newest")
def newest(who: Reader, behind: Behind, limit: int, before: str | None = None) -> Response:
    """See `Ledger.newest`."""
    limit = max(0, min(limit, MAX_LIMIT))
    if who.tenants is None:
        return told(behind.newest(limit, before=before))
    found: list[str] = []
    for _ in range(MAX_LOOKED // _LOOK):
        page = behind.newest(_LOOK, before=before)
        found += _seen(who, behind, page)
        if len(page) < _LOOK or len(found) >= limit:
            break
        before = page[-1]
    return told(found[:limit])


@router.get("/unfinished")
def unfinished(who: Reader, behind: Behind) -> Response:
    """Of a service its own only: it cannot look after those of others."""
    return streamed(_seen(who, behind, behind.unfinished(), own=who.type == "service"))


def _seen(who: Principal, behind: Ledger, ids: Sequence[str], *, own: bool = False) -> list[str]:
    """Those of these that the reader sees, and with `own` those that it recorded or owns, in their order."""
    if who.tenants is None and not own:
        return list(ids)
    reader, seen, of_its_own = seen_by(who), set[str](), set[str]()
    for start in range(0, len(ids), _LOOK):
        types = ["sealed", "bound"] if own else ["sealed"]
        for step in behind.events_of(ids[start : start + _LOOK], types):
            try:
                if step.row is None:
                    continue
                if step.row.sealed is not None and reader.sees(decode_envelope(step.row.sealed)):
                    seen.add(step.envelope)
                if own:
                    event = chains.decode(step.row.body).event()
                    if reader.names(event.by) or getattr(event.data, "owner", None) == reader.name:
                        of_its_own.add(step.envelope)
            except DAMAGED:
                continue
    return [id for id in ids if id in seen and (not own or id in of_its_own)]


@router.get("/chain_of")
def chain_of(who: Reader, behind: Behind, envelope: str, sequence: int) -> Response:
    """See `Ledger.chain_of`."""
    found = behind.chain_of(envelope, _bounded(sequence)) if _sees(who, behind, envelope) else None
    return told(found)


@router.get("/writer")
def writer(who: Reader, behind: Behind, chain: str) -> Response:
    """See `Ledger.writer`."""
    found: Process | None = behind.writer(chain) if _may_see_chain(who, behind, chain) else None
    return told(found)


@router.get("/lease")
def lease(who: Reader, behind: Behind, chain: str) -> Response:
    """See `Ledger.lease`."""
    return told(behind.lease(chain) if _may_see_chain(who, behind, chain) else None)


def _may_see_chain(who: Principal, behind: Ledger, chain: str) -> bool:
    """Everybody who sees all; a service sees its own."""
    if who.tenants is None:
        return True
    opened = opening_of(behind, chain)
    return opened is not None and who.type == "service" and opened.service == who.id


@router.get("/balances")
def balances(who: Reader, behind: Behind, account: str | None = None, window: str | None = None) -> Response:
    """See `Ledger.balances`."""
    found: list[Balance] = behind.balances(account=account, window=window)
    # Who decides itself has to know what stands in the accounts that it enters, those of everybody together too.
    shown = seen_by(who).keeps if who.may("write") else seen_by(who).shows
    return streamed([one for one in found if shown(one.account)])


@router.get("/holders")
def holders(who: Reader, behind: Behind, account: str, window: str, resource: str, limit: int) -> Response:
    """See `Ledger.holders`."""
    if not seen_by(who).shows(account):
        return told(([], 0))
    found, more = behind.holders(Key(account, window, resource), max(0, min(limit, _LOOK)))
    ids = set(_seen(who, behind, [holding.envelope for holding in found]))
    shown: list[Holding] = [holding for holding in found if holding.envelope in ids]
    return told((shown, more + len(found) - len(shown)))


# Reading: the whole ledger


@router.get("/cursor", dependencies=[Whole])
def cursor(behind: Behind, consumer: str) -> Response:
    """See `Ledger.cursor`."""
    return told(behind.cursor(consumer))


@router.get("/attempted", dependencies=[Whole])
def attempted(who: Reader, behind: Behind, limit: int) -> Response:
    """See `Ledger.attempted`."""
    found = behind.attempted(max(0, min(limit, MAX_LIMIT)))
    mine = f"{seen_by(who).name}: "
    return streamed([replace(one, surface=one.surface.removeprefix(mine)) for one in found])


@router.get("/checkpoints", dependencies=[Whole])
def checkpoints(behind: Behind, last: int | None = None) -> Response:
    """See `Ledger.checkpoints`."""
    return streamed(behind.checkpoints(last=None if last is None else max(0, _bounded(last))))


@router.get("/chains", dependencies=[Whole])
def all_chains(behind: Behind) -> Response:
    """See `Ledger.chains`."""
    return streamed(behind.chains())


@router.get("/moment", dependencies=[Whole])
def moment(behind: Behind) -> Response:
    """See `Ledger.moment`."""
    found = behind.moment()

    def pieces() -> Iterator[wire.MomentPiece]:
        for chain in found.chains:
            yield wire.MomentPiece(chain=chain)
        for balance in found.balances:
            yield wire.MomentPiece(balance=balance)
        for holding in found.holdings:
            yield wire.MomentPiece(holding=holding)

    return streamed(pieces())


@router.get("/rows", dependencies=[Whole])
def rows(behind: Behind, chain: str, after: int = -1, until: int | None = None) -> Response:
    """See `Ledger.rows`."""
    return streamed(behind.rows(chain, after=_bounded(after), until=None if until is None else _bounded(until)))


@router.get("/rows_of")
def rows_of(who: Reader, behind: Behind, envelope: str) -> Response:
    """See `Ledger.rows_of`."""
    return streamed(behind.rows_of(envelope) if _sees(who, behind, envelope) else ())


@router.get("/findings_of")
def findings_of(who: Reader, behind: Behind, envelope: str) -> Response:
    """See `verification.of_envelope`."""
    return told(of_envelope(behind, envelope) if _sees(who, behind, envelope) else [])


@router.get("/steps", dependencies=[Whole])
def steps(behind: Behind, after: str = "", until: str | None = None) -> Response:
    """See `Ledger.steps`."""
    return streamed(behind.steps(after=after, until=until))


@router.get("/events_of", dependencies=[Whole])
def events_of(behind: Behind, envelopes: str, types: str) -> Response:
    """See `Ledger.events_of`."""
    return streamed(behind.events_of(_unpacked(envelopes), _unpacked(types)))


@router.get("/splits", dependencies=[Whole])
def splits(behind: Behind, size: int) -> Response:
    """See `Ledger.splits`."""
    return streamed(behind.splits(max(1, _bounded(size))))


@router.get("/strays", dependencies=[Whole])
def strays(behind: Behind) -> Response:
    """See `Ledger.strays`."""
    return told(behind.strays())


@router.get("/key_rows", dependencies=[Whole])
def key_rows(behind: Behind) -> Response:
    """See `Ledger.key_rows`."""
    return streamed(behind.key_rows())


@router.get("/references", dependencies=[Whole])
def references(behind: Behind) -> Response:
    """See `Ledger.references`."""
    return streamed(behind.references())


@router.get("/families", dependencies=[Whole])
def families(behind: Behind) -> Response:
    """See `Ledger.families`."""
    return streamed(behind.families())


@router.get("/closings", dependencies=[Whole])
def closings(behind: Behind, after: str = "", until: str | None = None) -> Response:
    """See `Ledger.closings`."""
    return streamed(behind.closings(after=after, until=until))


@router.get("/count", dependencies=[Whole])
def count(behind: Behind) -> Response:
    """See `Ledger.count`."""
    return told(behind.count())


@router.get("/tampered_schema", dependencies=[Whole])
def tampered_schema(behind: Behind) -> Response:
    """See `Ledger.tampered_schema`."""
    return told(behind.tampered_schema())


@router.get("/segments", dependencies=[Whole])
def segments(behind: Behind) -> Response:
    """See `Ledger.segments`."""
    found = behind.segments()
    return told([] if found is None else found.numbers())


@router.get("/exports", dependencies=[Whole])
def exports(behind: Behind) -> Response:
    """See `Ledger.exports`."""
    return streamed(list(exports_of(behind).rows.values()))


def _bounded(number: int) -> int:
    if not -_MOST <= number <= _MOST:
        raise InvalidField("number", f"expected a number within {_MOST}")
    return number


def _unpacked(packed: str) -> list[str]:
    try:
        found: list[str] = msgspec.json.decode(base64.urlsafe_b64decode(packed.encode("ascii")), type=list[str])
    except (ValueError, msgspec.MsgspecError):
        raise HTTPException(400, "expected a list of texts in JSON, as base64") from None
    return found[:_LOOK]
