"""The public kit for tests: a clock, an ask, a ledger that fails on purpose, and the contract every ledger keeps.

::

    from execution_envelope.testing import LedgerContract

    class TestMyLedger(LedgerContract):
        def make_ledger(self, folder):
            return MyLedger(folder / "ledger")
"""

from __future__ import annotations

from execution_envelope.testing.contract import LedgerContract
from execution_envelope.testing.kit import START, FakeClock, FaultyLedger, ask

__all__ = ["START", "FakeClock", "FaultyLedger", "LedgerContract", "ask"]
