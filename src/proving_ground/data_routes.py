"""The routes that move data: ingestion, retrieval, and the look-ups of data sets that clients make around them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID, uuid4

import anyio
from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from execution_envelope import Admission, Ask, InvalidAsk, InvalidField, established
from execution_envelope.adapters import Context
from execution_envelope.adapters.kamiwaza import describe_ingestion, describe_retrieval
from execution_envelope.integrations.fastapi import admit
from proving_ground.admission import envelope_caller
from proving_ground.auth import Caller, CurrentCaller
from proving_ground.data_schemas import (
    ActiveIngestRequest,
    CatalogEntryOut,
    DatasetOut,
    IngestJobCreate,
    IngestOut,
    IngestStatusOut,
    InlineOut,
    OperationOut,
    ProgressOut,
    RetrievalOut,
    RetrievalRequest,
    RetrievalStatusOut,
)
from proving_ground.jobs import JOBS, Full, Job, Status
from proving_ground.movement import INGESTION
from proving_ground.reading import found_at
from proving_ground.retrieval import INLINE_BYTES, RETRIEVAL, Stream, described
from proving_ground.sources import NotAllowed, Place, check_texts, check_urn
from proving_ground.state import Backend, BackendState

router = APIRouter(tags=["data"])

#: Paths that start an execution.
SEALED: Final = ("/ingestion/ingest/run", "/ingestion/ingest/jobs", "/retrieval/jobs")

#: What of `kwargs` a move needs; nothing else of them is kept.
_KEPT: Final = ("path", "url", "bucket", "format", "destination")
#: What of `kwargs` is on the record and may be an address.
_ADDRESSES: Final = (*_KEPT, "prefix", "pattern")
_INGEST_STATUS: Final[Mapping[Status, str]] = {
    "REQUESTED": "pending",
    "RUNNING": "running",
    "COMPLETED": "success",
    "FAILED": "failed",
    "CANCELLED": "cancelled",
}
#: What an answer says of a retrieval that came to nothing; 500 for all else.
_HTTP_STATUS: Final = {
    "SOURCE_NOT_FOUND": 404,
    "SOURCE_FORBIDDEN": 403,
    "SOURCE_NOT_ALLOWED": 403,
    "NOT_ALLOWED": 403,
    "NOTHING_LEFT": 403,
    "FORMAT_UNSUPPORTED": 400,
    "ROW_UNREADABLE": 400,
    "LIMIT_REACHED": 504,
    "SOURCE_FAILED": 502,
    "BACKEND_RESTARTED": 503,
    "BACKEND_STOPPED": 503,
}


@router.get("/ingestion/health")
@router.get("/retrieval/health")
async def health(caller: CurrentCaller) -> dict[str, str]:
    """The service answers."""
    return {"status": "ok"}


@router.post("/ingestion/ingest/run")
async def run_ingestion(
    body: ActiveIngestRequest, request: Request, caller: CurrentCaller, backend: BackendState
) -> IngestOut:
    """Move one file, and answer when that has ended, well or badly. A client that leaves does not end it."""
    with _asking():
        ask = describe_ingestion(await request.json(), _context(request))
    job = await _ingestion(request, caller, backend, ask, body.source_type, body.kwargs, None)
    await backend.jobs.wait(job)
    names = ("rows", "sha256", "truncated")
    return IngestOut(
        urns=_urns(job),
        status=_INGEST_STATUS[job.status],
        errors=_errors(job),
        job_id=job.id,
        bytes=job.done,
        **{name: job.result.get(name) for name in names},
    )


@router.post("/ingestion/ingest/jobs", status_code=202)
async def schedule_ingestion(
    body: IngestJobCreate, request: Request, caller: CurrentCaller, backend: BackendState
) -> OperationOut:
    """The same without waiting: look at `GET /ingestion/ingest/status/{job_id}`. There are no schedules but `@once`."""
    written = {"source_type": body.source_type, "kwargs": body.conn_args}
    with _asking():
        ask = describe_ingestion(written, _context(request))
    ask = replace(
        ask,
        operation="ingestion.schedule_job",
        entrypoint="POST /ingestion/ingest/jobs",
        schema="kamiwaza.IngestJobCreate/1",
        constraints={**ask.constraints, "job_id": body.job_id, "schedule": body.schedule},
        body=await request.json(),
        secrets=[name.replace("kwargs", "conn_args", 1) for name in ask.secrets],
    )
    job = await _ingestion(request, caller, backend, ask, body.source_type, body.conn_args, body)
    return OperationOut(status="scheduled", job_id=job.id)


@router.get("/ingestion/ingest/status/{job_id}")
async def get_ingestion(job_id: str, caller: CurrentCaller, backend: BackendState) -> IngestStatusOut:
    """How far an ingestion is, by its id or by the one that the caller gave it."""
    job = _named(backend, caller, job_id)
    errors = _errors(job)
    return IngestStatusOut(
        job_id=job_id,
        last_run=job.started_at,
        status=_INGEST_STATUS[job.status],
        error_count=len(errors),
        created_urns=_urns(job),
        errors=errors,
        bytes_moved=job.done,
        bytes_total=job.total,
    )


@router.delete("/ingestion/ingest/jobs/{job_id}")
async def cancel_ingestion(job_id: str, caller: CurrentCaller, backend: BackendState) -> bool:
    """End an ingestion, and answer when it has ended: whether that ended it. What came of it is removed."""
    return await backend.cancelled(caller, _named(backend, caller, job_id))


@router.post("/retrieval/jobs")
async def create_retrieval(
    body: RetrievalRequest, request: Request, caller: CurrentCaller, backend: BackendState
) -> RetrievalOut:
    """Rows of a data set: in the answer, or by `GET /retrieval/jobs/{id}/stream`; with `auto` the size decides."""
    place, refused = None, None
    with _asking():
        check_urn(body.dataset_urn)
        for name in ("transport", "format_hint", "columns"):
            check_texts(getattr(body, name), name)
        try:
            place = backend.sources.dataset(caller.tenant, body.dataset_urn)
        except NotAllowed as error:
            refused = str(error)
        ask = describe_retrieval(await request.json(), _context(request))
    admission = await admit(request, _asked(ask, caller, [place]))
    if admission.replayed:
        raise HTTPException(409, "answers are not kept: use a new Idempotency-Key")
    if refused is not None:
        raise await _rejected(admission, "SOURCE_NOT_ALLOWED", refused, 403)
    assert place is not None
    transport = body.transport
    if transport == "auto":
        with contextlib.suppress(OSError, NotAllowed):  # the job says so
            size = (await found_at(backend.sources, caller.tenant, place)).size
            transport = "inline" if size is not None and size <= INLINE_BYTES else "sse"
        transport = "inline" if transport == "auto" else transport
    if transport not in ("inline", "sse"):
        said = f"expected the transport inline, sse or auto, got `{transport[:32]}` - at transport"
        raise await _rejected(admission, "TRANSPORT_UNSUPPORTED", said, 422)
    if body.credential_override is not None:
        said = "credentials come from the configuration of this backend only - at credential_override"
        raise await _rejected(admission, "CREDENTIAL_REFUSED", said, 400)
    kept = body.model_dump(exclude={"options", "credential_override", "sdk_session"}, exclude_none=True)
    job = _new(RETRIEVAL, caller, {**kept, "transport": transport})
    job.result = {"dataset": described(place, None, body.format_hint)}
    async with _placed(backend, admission, job):
        delivery = backend.retrievals.open(job, backend.jobs.jobs, Stream() if transport == "sse" else None)
        backend.jobs.submit(job)
    if delivery.stream is not None:
        return _retrieval_out(job, None)
    await _while_there(request, backend, job)
    if job.status != "COMPLETED":
        raise HTTPException(_HTTP_STATUS.get(job.error_code or "", 500), job.error_message or "it did not end well")
    metadata = {name: job.result[name] for name in ("bytes", "truncated")}
    return _retrieval_out(job, InlineOut(data=delivery.rows, row_count=len(delivery.rows), metadata=metadata))


@router.get("/retrieval/jobs/{job_id}")
async def get_retrieval(job_id: UUID, caller: CurrentCaller, backend: BackendState) -> RetrievalStatusOut:
    """How far a retrieval is."""
    job = backend.job_of(caller, RETRIEVAL, job_id)
    return RetrievalStatusOut(
        job_id=job.id,
        status=job.status,
        transport=job.body["transport"],
        dataset=DatasetOut(**job.result["dataset"]),
        progress=ProgressOut(rows_processed=job.done, bytes_processed=job.result.get("bytes")),
        created_at=job.requested_at,
        updated_at=job.ended_at or job.started_at or job.requested_at,
        error=next(iter(_errors(job)), None),
    )


@router.delete("/retrieval/jobs/{job_id}")
async def cancel_retrieval(job_id: UUID, caller: CurrentCaller, backend: BackendState) -> bool:
    """End a retrieval, and answer when it has ended: whether that ended it."""
    return await backend.cancelled(caller, backend.job_of(caller, RETRIEVAL, job_id))


@router.get("/retrieval/jobs/{job_id}/stream")
async def stream_retrieval(job_id: UUID, caller: CurrentCaller, backend: BackendState) -> Response:
    """The rows as server-sent events: `chunk`, then `complete` or `error`. Fetched once, by who asked for them; whoever
    leaves cancels it."""
    job = backend.job_of(caller, RETRIEVAL, job_id)
    if not _owns(caller, job):
        raise HTTPException(404, f"no {RETRIEVAL} `{job_id}`")
    delivery = backend.retrievals.deliveries.get(job.id)
    if delivery is None or delivery.stream is None or delivery.stream.fetched.is_set():
        raise HTTPException(409, "there is no stream to fetch: it was fetched before, or has ended")
    delivery.stream.fetched.set()
    return _Events(backend, job, delivery.stream)


@router.get("/catalog/datasets/")
async def list_datasets(caller: CurrentCaller, backend: BackendState, query: str = "") -> list[CatalogEntryOut]:
    """The data sets that ingestions of the caller's tenant made, oldest first."""
    found: dict[str, CatalogEntryOut] = {}
    for job in backend.jobs.of(caller, INGESTION):
        for urn in _urns(job):
            with contextlib.suppress(NotAllowed):
                found[urn] = _entry(backend.sources.dataset(caller.tenant, urn), job.ended_at, None)
    return [entry for urn, entry in found.items() if query.lower() in urn.lower()]


@router.get("/catalog/datasets/by-urn")
async def get_dataset(urn: str, caller: CurrentCaller, backend: BackendState) -> CatalogEntryOut:
    """One data set, whoever made it, as long as its file is there."""
    try:
        place = backend.sources.dataset(caller.tenant, urn)
        found = await found_at(backend.sources, caller.tenant, place)
    except (OSError, NotAllowed) as error:
        raise HTTPException(404, "no such data set") from error
    return _entry(place, None, found.size)


class _Events(StreamingResponse):
    """Passes events on, and cancels the job when nobody takes them any more."""

    def __init__(self, backend: Backend, job: Job, stream: Stream) -> None:
        super().__init__(stream.events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._backend = backend
        self._job = job
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ending = asyncio.create_task(self._end())
        try:
            await super().__call__(scope, receive, send)
        finally:
            ending.cancel()
            if not self._stream.ended:
                with anyio.CancelScope(shield=True):
                    await self._backend.jobs.cancel(self._job, "its client, which went away")

    async def _end(self) -> None:
        """When the job has ended in any other way than well, the stream says how."""
        await self._backend.jobs.wait(self._job)
        if not self._stream.ended:
            self._stream.end("error", {"code": self._job.error_code, "message": self._job.error_message})


async def _ingestion(
    request: Request,
    caller: Caller,
    backend: Backend,
    ask: Ask,
    source_type: str,
    kwargs: Mapping[str, Any],
    named: IngestJobCreate | None,
) -> Job:
    """Seal it and start it; or the job of the first request with the same key."""
    with _asking():
        check_texts(source_type, "source_type")
        for name in _ADDRESSES:
            check_texts(kwargs.get(name), f"kwargs.{name}", is_url=name in ("url", "destination"))
        if not isinstance(kwargs.get("format"), str | None):
            raise InvalidField("kwargs.format", "expected text, got another thing")
        if named is not None:
            check_texts(named.schedule, "schedule")
    body = {"source_type": source_type, "kwargs": {name: kwargs[name] for name in _KEPT if name in kwargs}}
    job = _new(INGESTION, caller, body if named is None else {**body, "name": named.job_id})
    places: tuple[Place, ...] = ()
    refused = None
    try:
        places = backend.ingestions.places(caller, body, str(job.id))
    except NotAllowed as error:
        refused = str(error)
    admission = await admit(request, _asked(ask, caller, places))
    if admission.replayed:
        return _moved_before(admission, caller, backend)
    if refused is not None:
        raise await _rejected(admission, "SOURCE_NOT_ALLOWED", refused, 403)
    if named is not None and named.schedule != "@once":
        said = "expected `@once`, this backend keeps no schedules - at schedule"
        raise await _rejected(admission, "SCHEDULE_UNSUPPORTED", said, 400)
    if named is not None and any(one.body.get("name") == named.job_id for one in backend.jobs.of(caller, INGESTION)):
        raise await _rejected(admission, "NAME_TAKEN", f"`{named.job_id}` is the id of another job - at job_id", 409)
    async with _placed(backend, admission, job):
        backend.jobs.submit(job)
    return job


@contextlib.asynccontextmanager
async def _placed(backend: Backend, admission: Admission, job: Job) -> AsyncIterator[None]:
    """A place is kept for the job while it is bound; inside it is submitted, and nothing else is waited for."""
    try:
        with backend.jobs.place(job.owner):
            await admission.bind(job.kind, str(job.id), owner=JOBS)
            yield
    except Full as full:
        raise await _rejected(admission, "TOO_MANY_JOBS", str(full), 429) from full


async def _rejected(admission: Admission, code: str, sentence: str, status: int) -> HTTPException:
    """Record why, and give what says so to the client."""
    await admission.reject(code, sentence)
    return HTTPException(status, sentence)


def _asked(ask: Ask, caller: Caller, places: Any) -> Ask:
    """With who asks, and the regions of source and destination where the backend knows them."""
    found = envelope_caller(caller)
    known = sorted({place.region or "unknown" for place in places if place is not None})
    # Where it knows one of two, the other is said to be unknown; where it knows none, what was asserted stays.
    regions = {} if not set(known) - {"unknown"} else {"regions": established(known, by="sources")}
    return replace(ask, subject=found.subject, scope={**ask.scope, **found.scope, **regions}, part_of=found.part_of)


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """What is no ask is refused as such, and nothing of it is kept."""
    try:
        yield
    except InvalidField as error:
        raise InvalidAsk(error) from error


def _context(request: Request) -> Context:
    return Context(f"{request.method} {request.url.path}", request.path_params, request.query_params, {}, None)


def _new(kind: str, caller: Caller, body: dict[str, Any]) -> Job:
    return Job(uuid4(), kind, caller, body, datetime.now(UTC))


def _moved_before(admission: Admission, caller: Caller, backend: Backend) -> Job:
    reference = admission.references.get(INGESTION)
    if reference is None:
        raise HTTPException(409, f"the first request with this Idempotency-Key was {admission.state}, use a new key")
    return backend.job_of(caller, INGESTION, UUID(reference))


def _named(backend: Backend, caller: Caller, name: str) -> Job:
    for job in backend.jobs.of(caller, INGESTION):
        if name in (str(job.id), job.body.get("name")):
            return job
    raise HTTPException(404, "no such ingestion")


def _owns(caller: Caller, job: Job) -> bool:
    return (caller.type, caller.subject) == (job.owner.type, job.owner.subject)


async def _while_there(request: Request, backend: Backend, job: Job) -> None:
    """Wait for a job as long as its client does."""
    running = asyncio.ensure_future(backend.jobs.wait(job))
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((running, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            await backend.jobs.cancel(job, "its client, which went away")
    finally:
        for task in (running, leaving):
            task.cancel()
        await asyncio.wait((running, leaving))


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _urns(job: Job) -> list[str]:
    return [job.result["urn"]] if job.status == "COMPLETED" else []


def _errors(job: Job) -> list[str]:
    return [] if job.error_code is None else [f"{job.error_code}: {job.error_message}"]


def _retrieval_out(job: Job, inline: InlineOut | None) -> RetrievalOut:
    return RetrievalOut(
        job_id=job.id,
        transport=job.body["transport"],
        status=job.status,
        dataset=DatasetOut(**job.result["dataset"]),
        inline=inline,
    )


def _entry(place: Place, made: datetime | None, size: int | None) -> CatalogEntryOut:
    properties = {"path": place.name, "size": size, "region": place.region}
    return CatalogEntryOut(
        urn=place.urn,
        name=place.name.rpartition("/")[2],
        platform=place.scheme,
        properties={name: value for name, value in properties.items() if value is not None},
        created_at=made,
    )
