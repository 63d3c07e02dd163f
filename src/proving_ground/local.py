"""Engines on the machine that the backend runs on: its children, within what this node promises."""

import asyncio
from pathlib import Path

from proving_ground import weights
from proving_ground.catalog import CatalogModel
from proving_ground.deployment import Deployment, Instance
from proving_ground.engine import Engine
from proving_ground.host import EngineHost, EngineSpec
from proving_ground.node import Node
from proving_ground.resolver import NoRoom, Placement, Unsatisfiable, plan


class LocalCluster:
    """One node, whose book is kept here. See `Cluster`."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._host = EngineHost()

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def architecture(self) -> str:
        return self.node.architecture

    async def connect(self) -> None:
        """See `Cluster`."""

    async def place(self, deployment: Deployment, model: CatalogModel) -> Placement | NoRoom | Unsatisfiable:
        """See `Cluster`. No await between the plan and the reservation: nobody else can have taken the room."""
        found = plan(deployment.wanted, model, self.node.free())
        if isinstance(found, Placement):
            for grant in found.instances:
                self.node.reserve(f"{deployment.id}/{grant.part}", grant.reservation())
        return found

    async def prepare(self, deployment: Deployment, model: CatalogModel) -> None:
        """See `Cluster`."""
        await asyncio.to_thread(weights.verify, model.weights, model.sha256)

    async def start(self, deployment: Deployment, instance: Instance, spec: EngineSpec) -> Engine:
        """See `Cluster`."""
        return await self._host.start(spec)

    async def release(self, deployment: Deployment) -> None:
        """See `Cluster`."""
        for instance in deployment.instances:
            self.node.release(f"{deployment.id}/{instance.part}")

    async def adopt(self, instance: Instance, log: Path) -> Engine | None:
        """See `Cluster`."""
        if instance.grant.placement_group or instance.pid is None or instance.start_time is None:
            return None
        return self._host.adopt(instance.pid, instance.start_time, instance.port or 0, instance.api_key or "", log)

    def keep(self, deployment: Deployment) -> None:
        """See `Cluster`."""
        for instance in deployment.instances:
            self.node.reserve(f"{deployment.id}/{instance.part}", instance.grant.reservation())

    async def left(self, deployment: Deployment) -> str:
        """See `Cluster`."""
        found = []
        for instance in deployment.instances:
            state = "is gone" if instance.engine is None else "was left, and is ended now"
            if instance.grant.placement_group:
                state = f"on Ray node {instance.grant.node}, which ends what a backend started with it"
            if instance.pid is not None:
                found.append(f"{instance.part}: pid {instance.pid} {state}")
        return ", ".join(found) or "no engine had been started"

    async def close(self) -> None:
        """See `Cluster`."""
        self._host.close()
