"""Reads engine logs, never more than a fixed amount of them into memory."""

from pathlib import Path

TAIL = 256 * 1024


def tail(path: Path, most: int = TAIL) -> str:
    """The last `most` bytes, from the start of a line; empty when there is no file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - most))
            data = file.read(most)
    except FileNotFoundError:
        return ""
    if size > most:
        data = data.partition(b"\n")[2]
    return data.decode("utf-8", "replace")


def count_lines(path: Path) -> int:
    """Lines in the whole file, read in blocks."""
    try:
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except FileNotFoundError:
        return 0
