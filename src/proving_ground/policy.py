"""The policy file of this backend: rules, limits, budgets, prices and approval, reloaded while it runs."""

import asyncio

from execution_envelope.budgets import Budgets
from execution_envelope.policy.file import PolicyFile
from proving_ground.settings import Settings

LOOK_SECONDS = 0.25
"""The file itself is looked at once a second; asked more often, none of those looks is missed by much."""


class BackendPolicy:
    """What the file says now. Raises `ValueError` naming the file when it is wrong at first, or cannot be read."""

    def __init__(self, settings: Settings) -> None:
        try:
            self.file = PolicyFile(settings.policy, watch=True)
        except ValueError as error:
            raise ValueError(f"policy file `{settings.policy}`: {error}") from error
        self._policy = self.file.policy
        self._budgets = Budgets(self._policy.budgets, prices=self._policy.prices)

    def budgets(self) -> Budgets:
        """Made anew only when another policy judges: it is asked for with each request."""
        if self._policy is not (policy := self.file.policy):
            self._budgets, self._policy = Budgets(policy.budgets, prices=policy.prices), policy
        return self._budgets

    async def watch(self) -> None:
        """Look at the file for ever, so that a change counts, or is complained about, before anybody asks."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.file.look()
