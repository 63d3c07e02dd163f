"""A backend that also offers `test/corrupt`: SmolLM2 with overwritten bytes, under the SHA-256 of the real file."""

import dataclasses
import os
import shutil
from pathlib import Path

from proving_ground.__main__ import main
from proving_ground.catalog import Catalog, smollm2

if __name__ == "__main__":
    real = smollm2()
    copy = Path(os.environ["DATA"]) / "corrupt.gguf"
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(real.weights, copy)
    with copy.open("r+b") as file:
        file.seek(50_000_000)
        file.write(b"overwritten" * 1000)
    main(Catalog([dataclasses.replace(real, repo_id="test/corrupt", weights=copy)]))
