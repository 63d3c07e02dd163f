"""Moves one file from a source to a destination, within what is granted, and goes on where a killed backend stopped.

What has come is staged on this node, and put in its place as a whole when it is all there. Every 64 MiB, or once a
second, it is made durable: first the bytes, then the checkpoint, then the report of what was used, under a key that
names the range. Killed between any two of them, the next backend counts each byte once.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import IO, Any, Final

from execution_envelope import Grant
from proving_ground.allowance import Bound, Pace, amounts, granted, refuse_unkept
from proving_ground.auth import Caller
from proving_ground.jobs import Job, JobFailed, Work
from proving_ground.reading import Reader, looked_at, reading
from proving_ground.sources import Found, NoRoom, NotAllowed, Place, Sources
from proving_ground.threads import T

#: The kind of these jobs, and of their references on the record.
INGESTION: Final = "ingestion"
#: How much may be moved, and how long, between two checkpoints.
CHECKPOINT_BYTES: Final = 64 * 1024 * 1024
CHECKPOINT_SECONDS: Final = 1.0
#: What a move writes of its own is named so below the data directory.
STAGING: Final = "moving"
#: Formats whose rows are counted.
ROW_FORMATS: Final = ("csv", "jsonl")
#: What a source is named by.
_NAMED_BY: Final = {
    "file": ("path",),
    "memory": ("path",),
    "http": ("url",),
    "https": ("url",),
    "s3": ("bucket", "path"),
}


class RowCount:
    """Counts the rows of a file as it passes. A CSV has a header, and line ends in quotes end no row."""

    def __init__(self, format: str, state: Mapping[str, Any]) -> None:
        self._csv = format == "csv"
        self._head = bool(state.get("head", self._csv))
        self._quoted = bool(state.get("quoted", False))
        self._open = bool(state.get("open", False))
        self.rows = int(state.get("rows", 0))

    def state(self) -> dict[str, Any]:
        """What a later count goes on from."""
        return {"head": self._head, "quoted": self._quoted, "open": self._open, "rows": self.rows}

    def feed(self, data: bytes, most: int | None) -> int:
        """Count, up to `most` rows in all; how many of the bytes belong to them."""
        start = 0
        while most is None or self.rows < most:
            end = data.find(b"\n", start)
            line = data[start : len(data) if end < 0 else end + 1]
            if self._csv and line.count(b'"') % 2:
                self._quoted = not self._quoted
            if end < 0:
                self._open = self._open or bool(line.strip())
                return len(data)
            self._open, start = self._open or bool(line.strip()), end + 1
            if not self._quoted:
                self._ended()
        return start

    def finish(self) -> None:
        """The source has ended, maybe without a line end."""
        self._ended()

    def _ended(self) -> None:
        if self._open and self._head:
            self._head = False
        elif self._open:
            self.rows += 1
        self._open = False


async def whole(step: Coroutine[Any, Any, None]) -> None:
    """Do a short step to its end, also when whoever waits for it is cancelled meanwhile."""
    task = asyncio.ensure_future(step)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error from None
        raise


class Ingestions:
    """Runs jobs of kind `ingestion`; their body holds `source_type`, and `kwargs` that say from where and whither."""

    def __init__(self, sources: Sources, data: Path) -> None:
        self._sources = sources
        self._staging = data / STAGING

    def places(self, caller: Caller, body: Mapping[str, Any], job: str) -> tuple[Place, Place]:
        """From where and whither; without a destination that is a file named after the source. Raises `NotAllowed`."""
        source = self._sources.source(caller.tenant, body["source_type"], body["kwargs"])
        written = body["kwargs"].get("destination")
        if written is not None and not isinstance(written, str):
            raise NotAllowed("expected text - at kwargs.destination")
        written = written or f"ingested/{job}/{Path(source.path).name or 'data'}"
        return source, self._sources.destination(caller.tenant, written)

    async def run(self, work: Work) -> None:
        """Move it, from the checkpoint on. Raises `JobFailed`."""
        self._staging.mkdir(exist_ok=True, mode=0o700)
        try:
            source, destination = self.places(work.job.owner, work.job.body, str(work.job.id))
        except NotAllowed as error:
            raise JobFailed("SOURCE_NOT_ALLOWED", str(error)) from error
        move = Move(work, self._sources, source, destination, self._staging / f"{work.job.id}.part")
        try:
            await move.run()
        except asyncio.CancelledError:
            if work.job.stopped_by is not None:
                move.clean()  # else the next backend goes on with it
            raise
        except Exception:
            move.clean()
            raise

    def clean(self, jobs: Mapping[Any, Job]) -> None:
        """Remove what jobs that have ended, or that nobody knows, left when their backend was killed."""
        going_on = {str(job.id) for job in jobs.values() if not job.ended}
        for path in self._staging.glob("*.part"):
            if path.stem not in going_on:
                path.unlink(missing_ok=True)


class Move:
    """One move, of which the job's checkpoint says how far it has come."""

    def __init__(self, work: Work, sources: Sources, source: Place, destination: Place, staged: Path) -> None:
        self._job = work.job
        self._tenant = work.job.owner.tenant
        self._save = work.save
        self._admission = work.admission
        self._sources = sources
        self._source = source
        self._destination = destination
        self._staged = staged
        state = work.job.checkpoint
        self._format = _format(work.job.body, source)
        self._rows = RowCount(self._format, state.get("rows", {})) if self._format in ROW_FORMATS else None
        self._moved = int(state.get("offset", 0))
        self._digest = hashlib.sha256()
        self._ms = float(state.get("ms", 0))
        self._since = time.monotonic()

    async def run(self) -> None:
        """Grant, move, put in place. Raises `JobFailed`."""
        job, state = self._job, self._job.checkpoint
        found = Found(self._moved, "")
        if not state.get("whole"):
            found = await looked_at(self._sources, self._tenant, self._source)
        if "stamp" in state and not state.get("whole") and state["stamp"] != found.stamp:
            raise JobFailed("SOURCE_CHANGED", f"{self._source.name} is another one than when the move began")
        job.total = found.size if found.size is not None else job.total
        await self._grant(found)
        most = amounts(self._admission)
        if not state.get("whole"):
            job.checkpoint = {**state, "stamp": state.get("stamp", found.stamp)}
            await self._all(most)
            job.result = {"truncated": self._cut(found.size, most)}
            job.checkpoint = {**job.checkpoint, "whole": True}
            self._save()
        await self._place()
        rows = {} if self._rows is None else {"rows": self._rows.rows}
        job.result = {
            **job.result,
            "urn": self._destination.urn,
            "bytes": self._moved,
            "sha256": job.checkpoint["sha256"],
            **rows,
        }

    def clean(self) -> None:
        """Remove what was staged."""
        self._staged.unlink(missing_ok=True)

    def _cut(self, size: int | None, most: Mapping[str, int | None]) -> bool:
        limit = most.get("bytes")
        return self._moved != size and (self._full(most) or (limit is not None and self._moved >= limit))

    def _full(self, most: Mapping[str, int | None]) -> bool:
        rows = most.get("rows")
        return self._rows is not None and rows is not None and self._rows.rows >= rows

    async def _grant(self, found: Found) -> None:
        admission, asked = self._admission, self._admission.envelope.requested
        counted = ("bytes", "bandwidth", "duration", *(("rows",) if self._rows is not None else ()))
        named = {"destination": self._destination.name, "format": self._format or "unknown"}
        names = (*_NAMED_BY[self._source.scheme], "format", "destination", "job_id", "schedule")
        honoured = [name for name in names if name in asked.constraints]
        if admission.state == "granted":
            # Another process goes on with what was granted; that it does is on the record.
            before = admission.record.grants[""]
            route = {**before.route, "pid": str(os.getpid()), "from": f"byte {self._moved}"}
            given = dict(before.resources)
            why = {name: (said.cause, said.text) for name, said in before.because.items()}
            await admission.grant(Grant(given, basis="enforced", route=route, honoured=honoured, because=why))
            return
        refuse_unkept(admission, counted, {name: asked.constraints[name].value for name in honoured})
        if "bytes" not in asked.resources:
            size = "unknown" if found.size is None else found.size
            await admission.effective({"bytes": size}, cause="estimate", because="what the source says of its size")
        unnamed = {name: value for name, value in named.items() if name not in asked.constraints}
        if unnamed:
            await admission.effective(constraints=unnamed, cause="default", because="by the name of the source")
        free, text = await asyncio.to_thread(self._sources.room, self._destination)
        room = Bound(free, "capacity", text)
        regions = {"from_region": self._source.region, "to_region": self._destination.region}
        route = {
            "source": self._source.name,
            "destination": self._destination.name,
            **{name: region for name, region in regions.items() if region is not None},
        }
        await admission.grant(granted(admission, counted, room, honoured=honoured, route=route))

    async def _all(self, most: Mapping[str, int | None]) -> None:
        await self._resume()
        pace, started = Pace(most.get("bandwidth")), time.monotonic()
        duration = most.get("duration")
        left = None if duration is None else max(0.0, (duration - self._ms) / 1000)
        self._since = started
        try:
            async with asyncio.timeout(left):
                with reading(self._source):
                    async with Reader.opening(self._sources, self._tenant, self._source, self._moved) as reader:
                        await self._copy(reader, pace, most)
        except TimeoutError:
            raise JobFailed(
                "LIMIT_REACHED", f"not moved within the {duration} ms that were granted; {self._moved} bytes were"
            ) from None
        finally:
            await whole(self._checkpoint())

    async def _copy(self, reader: Reader, pace: Pace, most: Mapping[str, int | None]) -> None:
        limit = most.get("bytes")
        staged = await asyncio.to_thread(self._staged.open, "ab", buffering=0)
        with staged:
            while not self._full(most) and (limit is None or self._moved < limit):
                want = pace.chunk() if limit is None else min(pace.chunk(), limit - self._moved)
                data = await reader.read(want)
                if not data:
                    if self._rows is not None:
                        self._rows.finish()
                    if self._job.total is not None and self._moved < self._job.total:
                        raise OSError("the source ended before its end")
                    return
                await pace.take(len(data))
                await whole(self._keep(staged, data, most.get("rows")))
                first = self._job.checkpoint.get("offset", 0)
                if self._moved - first >= CHECKPOINT_BYTES or time.monotonic() - self._since >= CHECKPOINT_SECONDS:
                    await whole(self._checkpoint())

    async def _keep(self, staged: IO[bytes], data: bytes, rows: int | None) -> None:
        kept = data if self._rows is None else data[: self._rows.feed(data, rows)]
        await asyncio.to_thread(staged.write, kept)
        self._digest.update(kept)
        self._moved += len(kept)
        self._job.done = self._moved

    async def _resume(self) -> None:
        """Go back to the checkpoint: what was staged beyond it was not counted. What is before it must be as it was."""
        state = self._job.checkpoint
        self._digest = await asyncio.to_thread(_cut_back, self._staged, self._moved)
        if self._digest.hexdigest() != state.get("sha256", hashlib.sha256().hexdigest()):
            raise JobFailed("STAGED_CHANGED", "what was moved before the restart is not what it was")
        if "last" in state:
            await self._report(state["last"])

    async def _checkpoint(self) -> None:
        """The bytes, the checkpoint, the report, in this order: see the head of this file."""
        job, now = self._job, time.monotonic()
        spent, first = (now - self._since) * 1000, int(job.checkpoint.get("offset", 0))
        self._since, self._ms = now, self._ms + spent
        rows = 0 if self._rows is None else self._rows.rows - int(job.checkpoint.get("rows", {}).get("rows", 0))
        if self._moved == first and not rows and "last" in job.checkpoint:
            return  # else it is said that nothing was moved
        await asyncio.to_thread(_synced, self._staged)
        last = {"from": first, "to": self._moved, "rows": rows, "range_ms": spent, "ms": self._ms}
        job.checkpoint = {
            **job.checkpoint,
            "offset": self._moved,
            "rows": {} if self._rows is None else self._rows.state(),
            "sha256": self._digest.hexdigest(),
            "ms": self._ms,
            "last": last,
        }
        self._save()
        await self._report(last)

    async def _report(self, last: Mapping[str, Any]) -> None:
        """A range counts once, however often it is told."""
        size = last["to"] - last["from"]
        used = {"bytes": size, "duration": int(last["ms"])}
        if self._rows is not None:
            used["rows"] = last["rows"]
        if last["range_ms"] >= 1:
            used["bandwidth"] = int(size * 1000 / last["range_ms"])
        await self._admission.used(used, key=f"bytes {last['from']}-{last['to']}")

    async def _place(self) -> None:
        if not self._staged.exists():
            # It was put there just before the backend before was killed.
            if not await self._in_thread(lambda: self._sources.has(self._destination, self._moved)):
                raise JobFailed("DESTINATION_FAILED", f"{self._destination.name} is not there any more")
            return
        try:
            # Not left halfway: cancelled here, it may arrive all the same.
            await whole(self._in_thread(lambda: self._sources.put(self._staged, self._destination)))
        except NoRoom as error:
            raise JobFailed("NOTHING_LEFT", f"{self._destination.name} has no room any more: {error}") from error
        except Exception as error:
            sentence = f"{self._destination.name} cannot be written: {type(error).__name__}"
            raise JobFailed("DESTINATION_FAILED", sentence) from error

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await self._sources.threads.run(self._tenant, call)


def _format(body: Mapping[str, Any], source: Place) -> str:
    asked = body["kwargs"].get("format")
    return asked if isinstance(asked, str) else {"ndjson": "jsonl"}.get(source.suffix, source.suffix)


def _cut_back(path: Path, size: int) -> Any:
    """Make it no longer than `size`; the digest of what is in it."""
    digest = hashlib.sha256()
    with path.open("ab+") as file:
        file.truncate(min(size, file.tell()))
        file.seek(0)
        while part := file.read(1024 * 1024):
            digest.update(part)
    return digest


def _synced(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
