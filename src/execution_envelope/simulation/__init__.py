"""A made-up record, for trying and measuring: `Simulation` makes it, `store` puts it into a ledger.

Pure but for `store`: everything follows from the settings. What is made is sealed, settled and stored by the parts that
make real records, so that chains, keys, bindings and balances are real; and it says that it is simulated.
"""

from execution_envelope.simulation.run import (
    GROUP,
    MAX_COUNT,
    MAX_DAYS,
    MAX_SEED,
    Settings,
    Simulation,
    store,
)

__all__ = ["GROUP", "MAX_COUNT", "MAX_DAYS", "MAX_SEED", "Settings", "Simulation", "store"]
