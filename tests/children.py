"""What the tests run as processes of their own: ``python -m tests.children write|race PATH ...``."""

from __future__ import annotations

import sys

import anyio

from execution_envelope import AdmissionController, Grant
from execution_envelope.testing import ask


async def write(url: str) -> None:
    """Admit and grant until killed; print an id and what is recorded of it after each acknowledgement."""
    controller = AdmissionController.open(url)
    while True:
        async with controller.admit(ask()) as admission:
            print(admission.id, "admitted", flush=True)
            await admission.grant(Grant({"gpu": 1}))
            print(admission.id, "granted", flush=True)
        print(admission.id, "completed", flush=True)


async def race(url: str, shared: str, me: str, times: str) -> None:
    """Write envelopes of its own, and facts of one that all share."""
    controller = AdmissionController.open(url)
    for number in range(int(times)):
        async with controller.admit(ask(request_id=f"{me}-{number}")) as admission:
            await admission.grant(Grant({"gpu": 1}))
        handle = await controller.resume(shared, by=f"writer-{me}")
        await handle.used({"steps": 1}, key=f"{me}-{number}")
        await handle.grant(Grant({"gpu": 1}, part=f"{me}-{number}"))
    await controller.aclose()


if __name__ == "__main__":
    anyio.run({"write": write, "race": race}[sys.argv[1]], *sys.argv[2:])
