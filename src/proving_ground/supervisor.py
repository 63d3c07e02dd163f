"""Drives deployments: one asyncio task each, from the ask to the end."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx

from proving_ground.catalog import Catalog, CatalogModel
from proving_ground.cluster import Cluster
from proving_ground.deployment import Deployment, Instance, Status
from proving_ground.engine import STOP_SECONDS, Engine, read_back
from proving_ground.failures import EngineFailed
from proving_ground.host import EngineSpec
from proving_ground.recorder import Recorder
from proving_ground.resolver import Placement, Unsatisfiable, effective
from proving_ground.store import Store

SAMPLE_SECONDS = 1.0
REVOKED = "REVOKED"
"""The last error code of a deployment that was taken away because a review asked for that."""
KEPT_ENDED = 1000
"""Ended deployments that stay listed; older ones are forgotten, with their logs."""

log = logging.getLogger(__name__)


class _Failure(Exception):
    """Ends a deployment; `code` and `sentence` become its last error."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


def _now() -> datetime:
    return datetime.now(UTC)


class Supervisor:
    """The one place that owns engines and the status of deployments; what is reserved for them is the cluster's.

    All methods run on one event loop. `recorder` is told each fact, see `recorder.py`.
    """

    def __init__(
        self,
        *,
        data: Path,
        store: Store,
        cluster: Cluster,
        catalog: Catalog,
        recorder: Recorder,
        http: httpx.AsyncClient,
        keep_engines: bool = False,
        retry_seconds: float = 5.0,
        now: Callable[[], datetime] = _now,
        new_id: Callable[[], UUID] = uuid4,
    ) -> None:
        self.cluster = cluster
        self.deployments: dict[UUID, Deployment] = {}
        self._data = data
        self._store = store
        self._catalog = catalog
        self._recorder = recorder
        self._http = http
        self._keep = keep_engines
        self._retry_seconds = retry_seconds
        self._now = now
        self._new_id = new_id
        self._tasks: dict[UUID, asyncio.Task[None]] = {}
        self._room = asyncio.Event()
        """Replaced by a new one each time something is given back; who waits for room waits for the current one."""
        self._ending: dict[UUID, asyncio.Task[None]] = {}

    async def submit(self, deployment: Deployment) -> None:
        """Take a new deployment on; returns before it is resolved."""
        self._store.save(deployment)  # first: what is not on disk nobody may take for alive
        self.deployments[deployment.id] = deployment
        self._begin(deployment, self._deploy(deployment))

    async def stop(self, deployment: Deployment, *, force: bool = False) -> None:
        """End it and wait for its end; harmless when it has ended. `force` kills engines without patience."""
        await self._interrupt(deployment, "STOPPED", None, "", force=force)

    async def revoke(self, deployment: Deployment, sentence: str) -> None:
        """The same because its record asks for it: its users see an error that says so."""
        await self._interrupt(deployment, "ERROR", REVOKED, sentence)

    async def _interrupt(
        self, deployment: Deployment, status: Status, code: str | None, sentence: str, *, force: bool = False
    ) -> None:
        task = self._tasks.get(deployment.id)
        if task is not None and deployment.id not in self._ending:
            task.cancel()
            await asyncio.wait([task])
        if deployment.id in self._ending or not deployment.ended:
            await self._end(deployment, status, code, sentence, force=force)

    async def recover(self) -> None:
        """At start: take over engines that were kept, and fail what was lost with the last backend."""
        for deployment in self._store.load():
            self.deployments[deployment.id] = deployment
            if deployment.ended:
                continue
            lost = await self._adopt(deployment)
            if lost is None:
                self._begin(deployment, self._watch_over(deployment))
            else:
                # Nobody saw it end, so no end is told: who looks after open records finds it, with this as evidence.
                await self._end(deployment, "FAILED", lost.code, lost.sentence, tell=False)

    async def close(self) -> None:
        """At shutdown: end everything, except serving engines that are kept."""
        for deployment in list(self.deployments.values()):
            if self._keep and deployment.status == "DEPLOYED" and deployment.id not in self._ending:
                await self._leave(deployment)
            else:
                await self.stop(deployment)
        await self.cluster.close()

    def _begin(self, deployment: Deployment, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except EngineFailed as failure:
                await self._end(deployment, "FAILED", failure.code, failure.message)
            except _Failure as failure:
                await self._end(deployment, "FAILED", failure.code, failure.sentence)
            except Exception as error:
                log.exception("deployment %s failed", deployment.id)
                await self._end(deployment, "ERROR", "INTERNAL_ERROR", f"{type(error).__name__}: {error}"[:500])

        task = asyncio.create_task(guarded(), name=f"deployment-{deployment.id}")
        self._tasks[deployment.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(deployment.id, None))

    async def _deploy(self, deployment: Deployment) -> None:
        model = self._catalog.model(deployment.model_id)
        if model is None:
            raise _Failure("MODEL_UNKNOWN", f"no model `{deployment.model_id}` is offered any more")
        ask = effective(deployment.wanted, model)
        await self._tell(self._recorder.effective(deployment, ask.values, ask.why))
        placement = await self._place(deployment, model)
        await self.cluster.prepare(deployment, model)
        await self._tell(self._recorder.placed(deployment, placement))
        for instance in deployment.instances:  # all load at the same time
            await self._start(deployment, instance, model)
        deployment.env.clear()
        self._become(deployment, "INITIALIZING")
        for instance in deployment.instances:
            await self._get_ready(deployment, instance)
        deployment.deployed_at = self._now()
        self._become(deployment, "DEPLOYED")
        await self._watch_over(deployment)

    async def _place(self, deployment: Deployment, model: CatalogModel) -> Placement:
        """Plan and reserve, waiting for room as long as it takes."""
        while True:
            room = self._room
            found = await self.cluster.place(deployment, model)
            if isinstance(found, Unsatisfiable):
                raise _Failure(found.code, found.sentence)
            if isinstance(found, Placement):
                deployment.take(found, [self._new_id() for _ in found.instances])
                deployment.last_error_code = deployment.last_error_message = None
                self._become(deployment, "DEPLOYING")
                return found
            deployment.last_error_code, deployment.last_error_message = "NO_ROOM", found.sentence
            self._store.save(deployment)
            await self._tell(self._recorder.attempt(deployment, found))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._retry_seconds):
                    await room.wait()

    async def _start(self, deployment: Deployment, instance: Instance, model: CatalogModel) -> None:
        grant = instance.grant
        engine = await self.cluster.start(
            deployment,
            instance,
            EngineSpec(
                weights=model.weights,
                alias=model.name,
                memory=grant.memory,
                cpu_ids=grant.cpu_ids,
                context=grant.context,
                log=self._data / instance.log,
                keep=self._keep,
                env=deployment.env,
                program=model.program,
            ),
        )
        instance.engine, instance.pid = engine, engine.pid
        instance.start_time, instance.api_key = engine.started, engine.api_key
        self._store.save(deployment)

    async def _get_ready(self, deployment: Deployment, instance: Instance) -> None:
        engine = _engine(instance)
        await engine.wait_ready()
        engine.sample()
        instance.port = engine.port
        try:
            instance.enforced = await read_back(engine, self._http)
        except (httpx.HTTPError, ProcessLookupError) as error:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    raise await engine.ended() from error
            raise _Failure("ENGINE_EXITED", f"{instance.part}: the engine runs and does not answer") from error
        self._store.save(deployment)
        await self._tell(self._recorder.enforced(deployment, instance, instance.enforced))
        instance.status, instance.deployed_at = "DEPLOYED", self._now()
        await self._tell(self._recorder.ready(deployment, instance))

    async def _watch_over(self, deployment: Deployment) -> None:
        """Until an engine ends by itself, which is a failure, or the duration is over."""
        watches = [asyncio.create_task(_ended(instance)) for instance in deployment.instances]
        begun = deployment.deployed_at or self._now()
        minutes = deployment.duration_minutes
        until = None if minutes is None else begun + timedelta(minutes=minutes)
        try:
            while until is None or self._now() < until:
                done, _ = await asyncio.wait(watches, timeout=SAMPLE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for watch in done:
                    raise watch.result()
                for instance in deployment.instances:
                    _engine(instance).sample()
        finally:
            for watch in watches:
                watch.cancel()
        await self._end(deployment, "STOPPED", None, "")

    async def _end(
        self,
        deployment: Deployment,
        status: Status,
        code: str | None,
        sentence: str,
        *,
        force: bool = False,
        tell: bool = True,
    ) -> None:
        """Wind down once, whoever asks and how often; the first reason stands. Not interrupted by cancelling."""
        ending = self._ending.get(deployment.id)
        if ending is None:
            ending = asyncio.create_task(self._wind_down(deployment, status, code, sentence, force, tell))
            self._ending[deployment.id] = ending
            ending.add_done_callback(lambda _: self._ending.pop(deployment.id, None))
        await asyncio.shield(ending)

    async def _wind_down(
        self, deployment: Deployment, status: Status, code: str | None, sentence: str, force: bool, tell: bool
    ) -> None:
        deployment.last_error_code, deployment.last_error_message = code, sentence or None
        if code not in (None, REVOKED):  # callers learn of a failure before the other replicas have ended
            self._become(deployment, status)
        engines = [instance.engine for instance in deployment.instances if instance.engine is not None]
        patience = 0.0 if force else STOP_SECONDS
        used = dict(zip(engines, await asyncio.gather(*(engine.stop(patience) for engine in engines)), strict=True))
        for instance in deployment.instances:
            if instance.engine is not None:
                instance.usage = used[instance.engine]
            instance.status, instance.engine, instance.api_key = status, None, None
        await self.cluster.release(deployment)
        deployment.env.clear()
        deployment.ended_at = self._now()
        self._become(deployment, status)
        self._room.set()
        self._room = asyncio.Event()
        if tell:
            await self._tell_all_of_the_end(deployment, code, sentence)

    async def _tell_all_of_the_end(self, deployment: Deployment, code: str | None, sentence: str) -> None:
        for instance in deployment.instances:
            await self._tell_of_the_end(self._recorder.released(deployment, instance))
        if code is None:
            usage = [instance.usage for instance in deployment.instances if instance.usage is not None]
            await self._tell_of_the_end(self._recorder.stopped(deployment, usage))
        elif code == REVOKED:
            await self._tell_of_the_end(self._recorder.revoked(deployment, sentence))
        elif deployment.instances:
            await self._tell_of_the_end(self._recorder.failed(deployment, code, sentence))
        else:
            await self._tell_of_the_end(self._recorder.rejected(deployment, code, sentence))

    async def _adopt(self, deployment: Deployment) -> _Failure | None:
        """Find the engines of a deployment of the last backend; None when all serve, else what was lost."""
        for instance in deployment.instances:
            instance.engine = await self.cluster.adopt(instance, self._data / instance.log)
        if not self._keep or deployment.status != "DEPLOYED":
            left = await self.cluster.left(deployment)
            return _Failure("BACKEND_RESTARTED", f"the backend ended; {left}; deploy again")
        for instance in deployment.instances:
            if instance.engine is None or not instance.api_key:
                return _Failure("ENGINE_EXITED", f"{instance.part}: the engine ended while no backend ran")
        self.cluster.keep(deployment)
        return None

    async def _leave(self, deployment: Deployment) -> None:
        """Stop watching, leave the engines running for the next backend."""
        task = self._tasks.get(deployment.id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        for instance in deployment.instances:
            if instance.engine is not None:
                instance.engine.forget()

    async def _tell(self, call: Awaitable[None]) -> None:
        try:
            await call
        except Exception as error:
            log.exception("the recorder failed")
            raise _Failure("RECORDER_FAILED", f"{type(error).__name__}: {error}"[:500]) from error

    async def _tell_of_the_end(self, call: Awaitable[None]) -> None:
        try:
            await call
        except Exception:
            log.exception("the recorder failed at the end of a deployment")

    def _become(self, deployment: Deployment, status: Status) -> None:
        deployment.status = status
        self._store.save(deployment)

    def forget_old(self, most: int) -> int:
        """Forget the oldest ended deployments beyond `KEPT_ENDED`, with their logs, at most so many; how many."""
        ended = [deployment for deployment in self.deployments.values() if deployment.ended]
        gone = ended[: min(most, max(0, len(ended) - KEPT_ENDED))]
        for deployment in gone:
            del self.deployments[deployment.id]
            self._store.forget(deployment.id)
            for instance in deployment.instances:
                (self._data / instance.log).unlink(missing_ok=True)
        return len(gone)


def _engine(instance: Instance) -> Engine:
    if instance.engine is None:
        raise RuntimeError(f"{instance.part} has no engine")
    return instance.engine


async def _ended(instance: Instance) -> EngineFailed:
    failure = await _engine(instance).ended()
    return EngineFailed(failure.code, f"{instance.part}: {failure.message}")
