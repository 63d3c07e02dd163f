"""Where engines run: what the supervisor asks of it. `local.py` is this machine, `ray_cluster.py` a Ray cluster."""

from pathlib import Path
from typing import Protocol

from proving_ground.catalog import CatalogModel
from proving_ground.deployment import Deployment, Instance
from proving_ground.engine import Engine
from proving_ground.host import EngineSpec
from proving_ground.resolver import NoRoom, Placement, Unsatisfiable


class Cluster(Protocol):
    """A place for engines. All methods run on one event loop.

    For a deployment the calls come in this order, and `release` comes last whatever came before:

        place* -> prepare -> start per instance -> release
        adopt per instance -> keep | left -> release            (of an earlier backend)
    """

    @property
    def name(self) -> str:
        """For callers: the node's name, or what the nodes together are called."""
        ...

    @property
    def architecture(self) -> str: ...

    async def connect(self) -> None:
        """Before all else. Raises `OSError` or `ValueError` when there is nothing to connect to."""
        ...

    async def place(self, deployment: Deployment, model: CatalogModel) -> Placement | NoRoom | Unsatisfiable:
        """Find room and reserve it; asked again after *no room*, until it is there or can never be."""
        ...

    async def prepare(self, deployment: Deployment, model: CatalogModel) -> None:
        """Before engines start, and before the reservation is told: are the weights right where they will run?

        Raises `EngineFailed`.
        """
        ...

    async def start(self, deployment: Deployment, instance: Instance, spec: EngineSpec) -> Engine:
        """Start an engine within the reservation; returns before it has loaded. Cancelled, it leaves nothing."""
        ...

    async def release(self, deployment: Deployment) -> None:
        """Give back all that is reserved or waited for. Harmless when nothing is; never raises."""
        ...

    async def adopt(self, instance: Instance, log: Path) -> Engine | None:
        """Find an engine of an earlier backend again; None when it no longer runs, or cannot outlive its backend."""
        ...

    def keep(self, deployment: Deployment) -> None:
        """Reserve what adopted engines hold."""
        ...

    async def left(self, deployment: Deployment) -> str:
        """What is left of what an earlier backend started, for people and as evidence."""
        ...

    async def close(self) -> None:
        """At the very end; engines that are not kept end with it."""
        ...
