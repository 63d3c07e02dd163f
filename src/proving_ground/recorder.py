"""The seam: the supervisor tells a `Recorder` each fact at the moment it becomes one.

For one deployment the calls come in this order, one at a time:

    effective -> attempt* -> placed -> (enforced -> ready) per instance -> released per instance -> stopped | failed
    effective? -> attempt* -> rejected | stopped                (nothing was granted)

Exactly one of `stopped`, `failed`, `rejected` or, in the place of any of them, `revoked` comes, last. An exception out
of any call before `released` fails the deployment with code RECORDER_FAILED; out of the later ones it is logged, as the
engines have ended by then.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from proving_ground.deployment import Deployment, Instance
from proving_ground.engine import Enforced, Usage
from proving_ground.resolver import NoRoom, Placement
from proving_ground.wanted import Difference


class Recorder(Protocol):
    """What the supervisor calls; every method may wait."""

    async def effective(self, deployment: Deployment, values: Mapping[str, int], why: Sequence[Difference]) -> None:
        """Defaults and estimates were filled in; `values` per replica, see `Effective.values`."""

    async def attempt(self, deployment: Deployment, no_room: NoRoom) -> None:
        """A placement found no room; it will be tried again."""

    async def placed(self, deployment: Deployment, placement: Placement) -> None:
        """Reserved on a node; `deployment.instances` has one instance per grant."""

    async def enforced(self, deployment: Deployment, instance: Instance, read_back: Enforced) -> None:
        """The engine runs, and this is what the operating system holds it to."""

    async def ready(self, deployment: Deployment, instance: Instance) -> None:
        """The instance answers requests."""

    async def rejected(self, deployment: Deployment, code: str, sentence: str) -> None:
        """It ended before anything was granted."""

    async def failed(self, deployment: Deployment, code: str, sentence: str) -> None:
        """It ended by a failure after something was granted."""

    async def released(self, deployment: Deployment, instance: Instance) -> None:
        """The engine has ended and its reservation is given back; `instance.usage` is None when nobody saw it."""

    async def stopped(self, deployment: Deployment, usage: Sequence[Usage]) -> None:
        """It was asked to end, and has; one usage per instance that ran."""

    async def revoked(self, deployment: Deployment, sentence: str) -> None:
        """Its record asked for its end, as `sentence` says, and it has ended."""
