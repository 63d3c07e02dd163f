"""A backend that is killed between the end of a revoked deployment's engines and its confirmation, as by kill -9."""

import os
import signal

from proving_ground.__main__ import main
from proving_ground.admission import EnvelopeRecorder
from proving_ground.deployment import Deployment


async def _die(self: EnvelopeRecorder, deployment: Deployment, sentence: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    EnvelopeRecorder.revoked = _die  # type: ignore[method-assign]
    main()
