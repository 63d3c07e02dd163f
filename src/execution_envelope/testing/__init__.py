"""The public kit for tests: a clock, an ask, a ledger that fails on purpose, and contracts of ledgers, hooks, adapters.

::

    from execution_envelope.testing import HookContract, LedgerContract

    class TestMyLedger(LedgerContract):
        def make_ledger(self, folder):
            return MyLedger(folder / "ledger")

    class TestMyHook(HookContract):
        def make_hook(self):
            return MyHook()
"""

from __future__ import annotations

from execution_envelope.testing.adapters import AdapterContract
from execution_envelope.testing.contract import LedgerContract
from execution_envelope.testing.hooks import HookContract
from execution_envelope.testing.kit import START, FakeClock, FaultyLedger, ask

__all__ = ["START", "AdapterContract", "FakeClock", "FaultyLedger", "HookContract", "LedgerContract", "ask"]
