"""A backend that also offers `test/scripted`: the answers of the file SCRIPT, by `scripted_engine.py`."""

import hashlib
import os
from pathlib import Path

from proving_ground.__main__ import main
from proving_ground.catalog import Catalog, CatalogModel, MemoryNeed
from proving_ground.quantities import MIB

if __name__ == "__main__":
    script = Path(os.environ["SCRIPT"])
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    # Its need is that of the catalogue's rules only: this process takes next to nothing.
    need = MemoryNeed(base=64 * MIB, per_token=1024, per_extra_core=0)
    main(Catalog([CatalogModel("test/scripted", script, digest, 8192, need, program="scripted_engine")]))
