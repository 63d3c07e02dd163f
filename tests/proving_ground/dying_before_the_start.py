"""A backend that is killed between binding a deployment and starting it, as by kill -9."""

import os
import signal

from proving_ground.__main__ import main
from proving_ground.deployment import Deployment
from proving_ground.supervisor import Supervisor


async def _die(self: Supervisor, deployment: Deployment) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    Supervisor.submit = _die  # type: ignore[method-assign]
    main()
