"""Engines on a Ray cluster: a placement group for each deployment, in each of its bundles an actor that runs an engine.

Three statements are kept apart: what was asked for is the envelope's, what Ray reserved is a placement group's bundle,
and what holds is what the operating system enforces on the engine (`ray_engine.py`). Importing this imports Ray.
"""

import asyncio
import logging
import os
import platform
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from proving_ground.catalog import CatalogModel
from proving_ground.deployment import Deployment, Instance
from proving_ground.engine import LOOPBACK, START_SECONDS, Engine
from proving_ground.failures import EngineFailed
from proving_ground.host import EngineHost, EngineSpec
from proving_ground.machine import architecture
from proving_ground.node import NodeFree, NodesFree
from proving_ground.quantities import in_words
from proving_ground.ray_engine import RAY, EngineActor, Here, RayEngine, lost
from proving_ground.resolver import Candidate, InstanceGrant, NoRoom, Placement, Unsatisfiable, effective, plan

CONNECT_SECONDS = 5.0
PLACE_SECONDS = 1.0
"""How long one attempt waits for Ray; the placement group stays with Ray until the next."""
LEAVE_SECONDS = 10.0
"""How long Ray may take to end what a backend that is gone had started."""
_POLL_SECONDS = 0.05
_MOST_CORES = 1024
"""That a replica is asked for in Ray; no node has more."""
_NOT_NOW = ("NODE_TOO_SMALL", "GPU_FLOOR")
"""What the nodes of now cannot give. Ray is asked all the same: nodes may come, and it is Ray's to say so."""

log = logging.getLogger(__name__)
Found = TypeVar("Found")


@dataclass
class _Group:
    """A placement group, and what is in it."""

    group: PlacementGroup
    placement: Placement
    actors: list[Any] = field(default_factory=list)
    here: list[Here] = field(default_factory=list)

    @property
    def id(self) -> str:
        return str(self.group.id.hex())


class RayCluster:
    """All nodes of a Ray cluster. See `Cluster`.

    The backend is a driver of the cluster: it runs on one of the nodes, and what it started ends with it. `patience` is
    how many seconds Ray may take to place a deployment. Calls of Ray are made by one thread, in order.
    """

    def __init__(self, address: str, *, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = "ray"
        self.architecture = architecture(platform.machine())
        self._address = address
        self._patience = patience
        self._clock = clock
        self._caller = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray")
        self._groups: dict[UUID, _Group] = {}
        self._since: dict[UUID, float] = {}
        """When a deployment first waited for room."""
        self._cores: dict[tuple[UUID, str], tuple[str, tuple[int, ...]]] = {}
        """(deployment, part) -> node and counted cores; Ray counts cores and does not say which."""
        self._actor = ray.remote(EngineActor)
        self._ours = ""

    async def connect(self) -> None:
        """See `Cluster`."""
        await self._call(self._connect)

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            if self._address != "auto":  # Ray itself would try for minutes
                host, _, port = self._address.rpartition(":")
                socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:300]
            raise ConnectionError(f"no Ray cluster answers at `{self._address}`: {said} - at RAY_ADDRESS") from error
        self._ours = RAY.util.get_node_ip_address()

    async def place(self, deployment: Deployment, model: CatalogModel) -> Placement | NoRoom | Unsatisfiable:
        """See `Cluster`. What does not fit now waits with Ray; what fits by then as something smaller is asked anew."""
        since = self._since.setdefault(deployment.id, self._clock())
        held = self._groups.get(deployment.id)
        if held is not None and (table := await self._call(_table, held))["state"] == "CREATED":
            return self._settled(deployment, held, table)
        nodes = await self._call(_nodes)
        found = plan(deployment.wanted, model, _room(nodes, self.architecture))
        if isinstance(found, Unsatisfiable) and found.code not in _NOT_NOW:
            return found
        # Where there is no room for even the least, Ray is asked for all that was asked.
        wished = (
            found
            if isinstance(found, Placement)
            else plan(deployment.wanted, model, self._boundless(deployment, model))
        )
        if not isinstance(wished, Placement):
            raise RuntimeError(f"expected a placement on a node without bounds, got {wished}")
        if held is None or _bundles(held.placement) != _bundles(wished):
            await self.release(deployment)
            self._since[deployment.id] = since
            held = await self._call(self._ask, deployment.id, wished)
        await asyncio.to_thread(held.group.wait, PLACE_SECONDS)
        if (table := await self._call(_table, held))["state"] == "CREATED":
            return self._settled(deployment, held, table)
        bundles = _bundles(wished)
        reason = (
            f"Ray says {table['state']}, {table['stats']['scheduling_state']} of placement group {held.id}: "
            f"{len(bundles)} bundles of {_words(bundles[0])}"
        )
        if self._clock() - since >= self._patience:
            return Unsatisfiable("NOT_PLACED", f"not placed within {self._patience:g} s; {reason}")
        return NoRoom(tuple(_refused(node, bundles) for node in nodes), reason)

    def _ask(self, deployment: UUID, wished: Placement) -> _Group:
        # Kept here, in the thread that asks: who waits for it may be cancelled, and what is asked is to be released.
        held = self._groups[deployment] = _Group(placement_group(_bundles(wished), "PACK"), wished)
        return held

    def _settled(self, deployment: Deployment, held: _Group, table: dict[str, Any]) -> Placement:
        """What Ray reserved: each bundle with the node it is on, and with cores of that node that are ours alone."""
        grants = []
        for index, grant in enumerate(held.placement.instances):
            node = table["bundles_to_node_id"][index]
            taken = {core for where, cores in self._cores.values() if where == node for core in cores}
            free = (core for core in range(len(taken) + grant.cores) if core not in taken)
            cores = tuple(core for core, _ in zip(free, range(grant.cores), strict=False))
            self._cores[deployment.id, grant.part] = (node, cores)
            grants.append(replace(grant, node=node, core_indexes=cores, placement_group=held.id))
        held.placement = replace(held.placement, instances=tuple(grants))
        self._since.pop(deployment.id, None)
        return held.placement

    def _boundless(self, deployment: Deployment, model: CatalogModel) -> NodesFree:
        """A node on which all fits that is asked."""
        ask = effective(deployment.wanted, model)
        cores = min(ask.cores, _MOST_CORES) * ask.replicas
        gpus = max(ask.gpu, deployment.wanted.gpu_floor, 1 if deployment.wanted.gpu_share else 0) * ask.replicas
        memory = (ask.memory + model.need.bytes_for(ask.context, ask.cores)) * ask.replicas
        node = NodeFree("", self.architecture, cores, memory, gpus, tuple(range(cores)), memory, gpus, (0,))
        return NodesFree(self.name, (node,), self.architecture, "a node of Ray")

    async def prepare(self, deployment: Deployment, model: CatalogModel) -> None:
        """See `Cluster`. Starts the actors: the weights count on the nodes where they will be read."""
        held = self._groups[deployment.id]
        await self._call(self._spawn, held)
        held.here = list(
            await asyncio.gather(
                *(
                    self._ready(actor, grant, model)
                    for actor, grant in zip(held.actors, held.placement.instances, strict=True)
                )
            )
        )
        for instance, here in zip(deployment.instances, held.here, strict=True):
            cores = {here.cpu_ids[core % len(here.cpu_ids)] for core in instance.grant.core_indexes}
            instance.grant = replace(instance.grant, cpu_ids=tuple(sorted(cores)))

    def _spawn(self, held: _Group) -> None:
        for index, grant in enumerate(held.placement.instances):
            actor = self._actor.options(
                num_cpus=grant.cores,
                memory=grant.memory,
                num_gpus=grant.gpu_millis / 1000,
                scheduling_strategy=PlacementGroupSchedulingStrategy(held.group, placement_group_bundle_index=index),
                max_restarts=0,
            ).remote()
            held.actors.append(actor)

    async def _ready(self, actor: Any, grant: InstanceGrant, model: CatalogModel) -> Here:
        try:
            async with asyncio.timeout(START_SECONDS):
                here: Here = await actor.here.remote()
                failure = await actor.verify.remote(model.weights, model.sha256)
        except (RayError, TimeoutError) as error:
            raise await self._call(lost, grant.node, error) from error
        if failure is not None:
            raise EngineFailed(*failure)
        return here

    async def start(self, deployment: Deployment, instance: Instance, spec: EngineSpec) -> Engine:
        """See `Cluster`."""
        held = self._groups[deployment.id]
        index = deployment.instances.index(instance)
        actor, here = held.actors[index], held.here[index]
        ours = here.address == self._ours
        try:
            async with asyncio.timeout(START_SECONDS):
                started = await actor.start.remote(replace(spec, host=LOOPBACK if ours else here.address))
        except (RayError, TimeoutError) as error:
            raise await self._call(lost, instance.grant.node, error) from error
        return RayEngine(actor, instance.grant.node, here, ours, spec.log, started)

    async def release(self, deployment: Deployment) -> None:
        """See `Cluster`."""
        self._since.pop(deployment.id, None)
        for key in [key for key in self._cores if key[0] == deployment.id]:
            del self._cores[key]
        try:
            await self._call(self._end, deployment.id)
        except Exception:
            log.exception("what deployment %s holds in Ray could not be released", deployment.id)

    def _end(self, deployment: UUID) -> None:
        held = self._groups.pop(deployment, None)
        if held is None:
            return
        for actor in held.actors:
            ray.kill(actor)
        remove_placement_group(held.group)

    async def adopt(self, instance: Instance, log: Path) -> Engine | None:
        """See `Cluster`. Actors end with their driver; what a backend without Ray kept here is found, to be ended."""
        if instance.grant.placement_group or instance.pid is None or instance.start_time is None:
            return None
        return EngineHost().adopt(instance.pid, instance.start_time, instance.port or 0, instance.api_key or "", log)

    def keep(self, deployment: Deployment) -> None:
        """See `Cluster`."""
        raise NotImplementedError("engines on Ray end with their backend")

    async def left(self, deployment: Deployment) -> str:
        """See `Cluster`. As Ray says it, once it has ended what it is to end."""
        found = []
        for instance in deployment.instances:
            where = f"{instance.part}: pid {instance.pid}"
            if instance.grant.placement_group:
                state = await self._gone(instance.grant.placement_group)
                found.append(f"{where} on Ray node {instance.grant.node}, placement group {state}")
            elif instance.pid is not None:
                found.append(f"{where} {'is gone' if instance.engine is None else 'was left, and is ended now'}")
        return ", ".join(found) or "nothing had been placed"

    async def _gone(self, group: str) -> str:
        """The state of a placement group of a driver that is gone; what Ray does not end in time is ended here."""
        until = self._clock() + LEAVE_SECONDS
        while True:
            table = (await self._call(placement_group_table)).get(group)
            state = f"{group} is {'unknown to Ray' if table is None else table['state']}"
            if table is None or table["state"] == "REMOVED":
                return state
            if self._clock() >= until:
                await self._call(_remove, group)
                return f"{state}, and is removed now"
            await asyncio.sleep(_POLL_SECONDS)

    async def close(self) -> None:
        """See `Cluster`."""
        await self._call(ray.shutdown)
        self._caller.shutdown()

    async def _call(self, function: Callable[..., Found], *words: Any) -> Found:
        return await asyncio.get_running_loop().run_in_executor(self._caller, function, *words)


def _table(held: _Group) -> dict[str, Any]:
    found: dict[str, Any] = placement_group_table(held.group)
    return found


def _remove(group: str) -> None:
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


def _nodes() -> tuple[NodeFree, ...]:
    """The living nodes as Ray sees them. What is available on each has no other way to be asked than Ray's own."""
    available = RAY._private.state.available_resources_per_node()
    return tuple(
        _node(node["NodeID"], node["Resources"], available.get(node["NodeID"], {}))
        for node in sorted(RAY.nodes(), key=lambda node: str(node["NodeID"]))
        if node["Alive"]
    )


def _node(name: str, total: dict[str, float], free: dict[str, float]) -> NodeFree:
    gpu = round(free.get("GPU", 0) * 1000)
    return NodeFree(
        name=name,
        architecture="",
        cores=int(total.get("CPU", 0)),
        memory=int(total.get("memory", 0)),
        gpus=int(total.get("GPU", 0)),
        free_cores=tuple(range(int(free.get("CPU", 0)))),
        free_memory=int(free.get("memory", 0)),
        free_gpus=gpu // 1000,
        cpu_ids=(0,),
        shared_gpu=gpu % 1000,
    )


def _room(nodes: Sequence[NodeFree], architecture: str) -> NodesFree:
    return NodesFree("ray", tuple(nodes), architecture, f"the {len(nodes)} nodes of Ray")


def _bundles(placement: Placement) -> list[dict[str, float]]:
    bundles: list[dict[str, float]] = []
    for grant in placement.instances:
        gpu = {"GPU": grant.gpu_millis / 1000} if grant.gpu_millis else {}
        bundles.append({"CPU": grant.cores, "memory": grant.memory, **gpu})
    return bundles


def _words(bundle: dict[str, float]) -> str:
    gpu = f", {bundle['GPU']:g} GPU" if "GPU" in bundle else ""
    return f"{bundle['CPU']:g} CPU, {in_words(int(bundle['memory']))} memory{gpu}"


def _refused(node: NodeFree, bundles: Sequence[dict[str, float]]) -> Candidate:
    """Why a node does not take all bundles, by what Ray says is free on it."""
    count, bundle = len(bundles), bundles[0]
    cores, memory, gpu = int(bundle["CPU"]), int(bundle["memory"]), round(bundle.get("GPU", 0) * 1000)
    fit = node.copies(cores, memory, gpu)
    gpus_free = node.free_gpus * 1000 + node.shared_gpu
    key, needed, free, has = min(
        (
            ("cpu", cores, len(node.free_cores), f"{len(node.free_cores)} of {node.cores} CPU"),
            ("memory", memory, node.free_memory, f"{in_words(node.free_memory)} of {in_words(node.memory)} memory"),
            *((("gpu", gpu, gpus_free, f"{gpus_free / 1000:g} of {node.gpus} GPU"),) if gpu else ()),
        ),
        key=lambda found: found[2] // found[1],
    )
    takes = f"{fit} of {count} bundles fit" if fit < count else "Ray did not take it, though all would fit"
    return Candidate(
        node.name, count, key, needed, free, f"{takes}: {has} are free, {_words(bundle)} is needed for each"
    )
