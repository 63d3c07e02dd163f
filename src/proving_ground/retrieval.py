"""Reads rows of a data set, within what is granted, into one answer or into a stream of events.

Rows are counted as they are delivered: as JSON, without what the transport adds. Of a stream that is when the
connection has taken the event; what a client that left had not taken is not counted.
"""

import asyncio
import csv
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from proving_ground.allowance import Bound, Pace, amounts, granted, refuse_unkept
from proving_ground.jobs import Job, JobFailed, Work
from proving_ground.movement import ROW_FORMATS, whole
from proving_ground.reading import Reader, looked_at, reading
from proving_ground.sources import Found, NotAllowed, Place, Sources

#: The kind of these jobs, and of their references on the record.
RETRIEVAL: Final = "retrieval"
#: The largest source that is answered in one piece unless the caller says how.
INLINE_BYTES: Final = 1024 * 1024
#: The most that one answer may hold, whatever is asked: it is kept in memory.
MAX_INLINE_BYTES: Final = 16 * 1024 * 1024
#: Rows of one event: as many as are asked for, up to so many.
BATCH: Final = 100
MAX_BATCH: Final = 1000
#: An event is full with so many bytes: clients that look for the end of a line in small pieces take long for long ones.
EVENT_BYTES: Final = 16 * 1024
#: How long a stream waits for its client to fetch it.
FETCHED_SECONDS: Final = 30.0
#: How long one event waits for its client to take it: whoever reads no more holds a turn of others.
TAKEN_SECONDS: Final = 30.0
#: How often what was delivered is reported while it goes on.
REPORT_SECONDS: Final = 1.0


class Stream:
    """Hands events from the job that makes them to the one connection that takes them, one at a time."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[tuple[str, Any, asyncio.Future[None]] | None] = asyncio.Queue()
        self.fetched = asyncio.Event()
        self.ended = False
        """Whether nothing but the last event is left to be taken."""

    async def send(self, event: str, data: Any) -> None:
        """Return when the connection has taken it. Raises `JobFailed` when it does not in time."""
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._events.put_nowait((event, data, taken))
        await asyncio.wait([taken], timeout=TAKEN_SECONDS)
        if not taken.done():
            raise JobFailed("NOT_FETCHED", f"nobody took the next event of the stream within {TAKEN_SECONDS:g} s")

    def end(self, event: str, data: Any) -> None:
        """The last event. Nobody has to take it: a client that leaves at the last row has all of them."""
        self.ended = True
        self._events.put_nowait((event, data, asyncio.get_running_loop().create_future()))
        self._events.put_nowait(None)

    async def events(self) -> AsyncIterator[bytes]:
        """The events as they go over the wire. What asks for the next one has passed on the one before."""
        while (item := await self._events.get()) is not None:
            event, data, taken = item
            yield f"event: {event}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
            if not taken.done():
                taken.set_result(None)


@dataclass
class Delivery:
    """What a job has delivered: the rows of an answer, or a stream of them."""

    stream: Stream | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    chunks: int = 0


class Retrievals:
    """Runs jobs of kind `retrieval`; their body is the request, without secrets."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self.deliveries: dict[UUID, Delivery] = {}
        """Of the jobs that run here, until they have ended and were answered."""

    async def run(self, work: Work) -> None:
        """Grant, then deliver. Raises `JobFailed`."""
        delivery = self.deliveries[work.job.id]
        await _Reading(work, self._sources, delivery).run()
        if delivery.stream is not None:
            delivery.stream.end("complete", {name: work.job.result[name] for name in ("rows", "bytes", "truncated")})

    def open(self, job: Job, jobs: Mapping[UUID, Job], stream: Stream | None) -> Delivery:
        """Where a job that is about to start delivers to. Streams that nobody fetched in time are forgotten here."""
        for other in list(self.deliveries):
            if other not in jobs or jobs[other].ended:
                del self.deliveries[other]
        found = self.deliveries[job.id] = Delivery(stream)
        return found


class _Reading:
    def __init__(self, work: Work, sources: Sources, delivery: Delivery) -> None:
        self._work = work
        self._sources = sources
        self._delivery = delivery
        self._admission = work.admission
        self._rows = 0
        self._bytes = 0
        self._told = (0, 0)
        self._truncated = False
        self._started = time.monotonic()
        self._since = self._started

    async def run(self) -> None:
        job, body = self._work.job, self._work.job.body
        try:
            place = self._sources.dataset(job.owner.tenant, body["dataset_urn"])
        except NotAllowed as error:
            raise JobFailed("SOURCE_NOT_ALLOWED", str(error)) from error
        found = await looked_at(self._sources, job.owner.tenant, place)
        format = body.get("format_hint") or {"ndjson": "jsonl"}.get(place.suffix, place.suffix)
        if format not in ROW_FORMATS:
            said = f"expected a data set of {' or '.join(ROW_FORMATS)}, got `{str(format)[:32]}` - at format_hint"
            raise JobFailed("FORMAT_UNSUPPORTED", said)
        job.result = {"dataset": described(place, found, format)}
        await self._grant(place, found, format)
        most = amounts(self._admission)
        stream = self._delivery.stream
        if stream is not None:
            try:
                await asyncio.wait_for(stream.fetched.wait(), FETCHED_SECONDS)
            except TimeoutError:
                raise JobFailed("NOT_FETCHED", f"nobody fetched the stream within {FETCHED_SECONDS:g} s") from None
        self._started = self._since = time.monotonic()
        duration, delivered = most.get("duration"), False
        try:
            async with asyncio.timeout(None if duration is None else duration / 1000):
                with reading(place):
                    await self._deliver(place, format, most)
            delivered = True
        except TimeoutError:
            text = f"not delivered within the {duration} ms that were granted; {self._rows} rows were"
            raise JobFailed("LIMIT_REACHED", text) from None
        finally:
            if stream is None and not delivered:
                self._rows = self._bytes = 0  # there is no answer, so there is nothing in it
            job.done = self._rows
            await whole(self._report())
        job.result |= {"rows": self._rows, "bytes": self._bytes, "truncated": self._truncated}

    async def _grant(self, place: Place, found: Found, format: str) -> None:
        admission, body = self._admission, self._work.job.body
        asked = admission.envelope.requested
        counted = ("bytes", "rows", "bandwidth", "duration")
        transport = "inline" if self._delivery.stream is None else "sse"
        batch = _batch(body)
        given: dict[str, Any] = {}
        because: dict[str, tuple[str, str]] = {}
        for name, value, why in (
            ("transport", transport, f"a data set of up to {INLINE_BYTES} bytes is answered in one piece"),
            ("format", format, "by the name of the data set"),
            ("batch_size", batch, f"an event has up to {MAX_BATCH} rows"),
        ):
            if name in asked.constraints and asked.constraints[name].value != value:
                given[name], because[name] = value, ("balancing" if name == "transport" else "capacity", why)
        honoured = [
            name
            for name in ("transport", "format", "columns", "offset", "batch_size")
            if name in asked.constraints and name not in given
        ]
        kept = {name: asked.constraints[name].value for name in honoured}
        refuse_unkept(admission, counted, kept | {"transport": transport, "format": format})
        if "bytes" not in asked.resources:
            size = "unknown" if found.size is None else found.size
            await admission.effective({"bytes": size}, cause="estimate", because="what the source says of its size")
        if "rows" not in asked.resources:
            await admission.effective({"rows": "unknown"}, cause="estimate", because="nobody counts them before")
        route = {"source": place.name} | ({} if place.region is None else {"from_region": place.region})
        room = Bound(MAX_INLINE_BYTES, "capacity", f"one answer holds up to {MAX_INLINE_BYTES} bytes")
        grant = granted(
            admission,
            counted,
            room if transport == "inline" else None,
            honoured=honoured,
            constraints=given,
            because=because,
            route=route,
        )
        await admission.grant(grant)

    async def _deliver(self, place: Place, format: str, most: Mapping[str, int | None]) -> None:
        body, pace = self._work.job.body, Pace(most.get("bandwidth"))
        async with Reader.opening(self._sources, self._work.job.owner.tenant, place) as reader:
            source = _Rows(reader, format, body)
            while rows := await source.next(_batch(body), _left(most.get("rows"), self._rows)):
                kept: list[dict[str, Any]] = []
                room, count = _left(most.get("bytes"), self._bytes), 0
                for row, length in rows:
                    if room is not None and count + length > room:
                        break
                    kept.append(row)
                    count += length
                if kept:
                    await pace.take(count)
                    await self._hand_over(kept, count)
                if len(kept) < len(rows):
                    self._truncated = True
                    return
            self._truncated = bool(await source.next(1, 1))

    async def _hand_over(self, rows: list[dict[str, Any]], size: int) -> None:
        delivery = self._delivery
        if delivery.stream is None:
            delivery.rows += rows
        else:
            await delivery.stream.send("chunk", {"index": delivery.chunks, "rows": rows, "row_count": len(rows)})
        delivery.chunks += 1
        self._rows += len(rows)
        self._bytes += size
        self._work.job.done = self._rows
        if delivery.stream is not None and time.monotonic() - self._since >= REPORT_SECONDS:
            await whole(self._report())

    async def _report(self) -> None:
        """What was delivered since the last report."""
        now = time.monotonic()
        rows, size = self._rows - self._told[0], self._bytes - self._told[1]
        used = {"rows": rows, "bytes": size, "duration": int((now - self._started) * 1000)}
        if now - self._since >= 0.001 and size:
            used["bandwidth"] = int(size / (now - self._since))
        key = f"rows {self._told[0]}-{self._rows}"
        self._told, self._since = (self._rows, self._bytes), now
        await self._admission.used(used, key=key)


class _Rows:
    """The rows of a file that a request is about, a batch at a time, read in threads."""

    def __init__(self, reader: Reader, format: str, body: Mapping[str, Any]) -> None:
        self._reader = reader
        self._skip = int(body.get("offset") or 0)
        self._filters: Mapping[str, Any] = body.get("filters") or {}
        self._columns: list[str] | None = body.get("columns")
        self._all = _parsed(reader.lines(), format)

    async def next(self, size: int, left: int | None) -> list[tuple[dict[str, Any], int]]:
        """Up to `size` rows, an event full, of those `left`, each with its length as JSON; none at the end."""
        most = size if left is None else min(size, left)
        return await self._reader.run(lambda: self._next(most)) if most > 0 else []

    def _next(self, most: int) -> list[tuple[dict[str, Any], int]]:
        found: list[tuple[dict[str, Any], int]] = []
        total = 0
        for row in self._all:
            if any(str(row.get(name)) != str(value) for name, value in self._filters.items()):
                continue
            if self._skip:
                self._skip -= 1
                continue
            if self._columns is not None:
                row = {name: row.get(name) for name in self._columns}
            size = len(json.dumps(row, separators=(",", ":")).encode())
            found.append((row, size))
            total += size
            if len(found) == most or total >= EVENT_BYTES:
                break
        return found


def _parsed(lines: Iterator[bytes], format: str) -> Iterator[dict[str, Any]]:
    try:
        if format == "csv":
            yield from csv.DictReader((line.decode() for line in lines), restkey="")
            return
        for line in lines:
            if line.strip():
                row = json.loads(line, parse_constant=_no_number)
                yield row if isinstance(row, dict) else {"value": row}
    except (ValueError, csv.Error, RecursionError) as error:
        raise JobFailed("ROW_UNREADABLE", f"expected rows of {format}, got another thing") from error


def _no_number(written: str) -> None:
    raise ValueError(f"expected JSON, got {written}")


def _left(most: int | None, done: int) -> int | None:
    return None if most is None else most - done


def _batch(body: Mapping[str, Any]) -> int:
    return min(int(body.get("batch_size") or BATCH), MAX_BATCH)


def described(place: Place, found: Found | None, format: str | None) -> dict[str, Any]:
    """A data set as the SDK reads it."""
    size = None if found is None else found.size
    return {"urn": place.urn, "platform": place.scheme, "path": place.name, "format": format, "estimated_bytes": size}
