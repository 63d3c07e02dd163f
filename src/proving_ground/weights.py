"""Checks weights before an engine loads them: overwritten weights load without complaint and answer nonsense."""

import hashlib
from pathlib import Path

from proving_ground.failures import EngineFailed

_verified: dict[tuple[Path, int, int], str] = {}
"""(path, mtime in ns, size) -> SHA-256, so that a file is read once and again only when it changes."""


def verify(path: Path, sha256: str) -> None:
    """Read the file in blocks and compare. Blocks for as long as the disk takes: call it in a thread."""
    try:
        found = path.stat()
        key = (path, found.st_mtime_ns, found.st_size)
        if key not in _verified:
            with path.open("rb") as file:
                _verified[key] = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise EngineFailed("WEIGHTS_MISSING", f"no weights at `{path.name}`; install the model again") from None
    if _verified[key] != sha256:
        raise EngineFailed("WEIGHTS_CORRUPT", f"expected SHA-256 `{sha256}`, got `{_verified[key]}` - at `{path.name}`")
