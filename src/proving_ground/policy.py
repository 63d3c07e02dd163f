"""The policy file of this backend: rules, limits, budgets, prices and approval, reloaded while it runs."""

import asyncio

from execution_envelope.policy.file import PolicyFile
from proving_ground.settings import Settings

LOOK_SECONDS = 0.25
"""The file itself is looked at once a second; asked more often, none of those looks is missed by much."""


def open_policy(settings: Settings) -> PolicyFile:
    """What the file says, now and later. Raises `ValueError` naming the file when it is wrong, or cannot be read."""
    try:
        return PolicyFile(settings.policy, watch=True)
    except ValueError as error:
        raise ValueError(f"policy file `{settings.policy}`: {error}") from error


async def watch(policy: PolicyFile) -> None:
    """Look at the file for ever, so that a change counts, or is complained about, before anybody asks."""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        policy.look()
