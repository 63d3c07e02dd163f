"""The SQL of each database, from .sql files: named queries, the present schema, and the migrations that lead to it."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Final

from execution_envelope.errors import LedgerUnavailable

#: The schema that this version makes; it works with the two older ones, as far as they have room for what is recorded,
#: and with one newer, so that rolling deploys pass.
VERSION: Final = 4
OLDEST: Final = 2
NEWEST: Final = VERSION + 1
#: Chain numbers of a segment, from its number times this on.
CHAINS_PER_SEGMENT: Final = 1_000_000
#: The last position that a place has room for.
MAX_POSITION: Final = 2**32 - 1

_SECTION: Final = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name:|\Z)", re.M | re.S)


def queries(database: str, name: str = "queries.sql") -> dict[str, str]:
    """Name -> query, of ``sqlite`` or ``postgres``."""
    return {name: query.strip() for name, query in _SECTION.findall(_text(database, name))}


def projection(database: str) -> str:
    """What a projection is made with."""
    return _text(database, "projection.sql")


def schema(database: str) -> str:
    """What an empty database is made with."""
    return _text(database, "schema.sql")


def migrations(database: str) -> dict[int, str]:
    """Version -> the script that leads to it from the one before; the first makes an empty database."""
    folder = files("execution_envelope.ledger") / "sql" / database / "migrations"
    return {int(file.name[:4]): file.read_text() for file in sorted(folder.iterdir(), key=lambda file: file.name)}


def check_version(version: int | None, place: str) -> None:
    """Raises `LedgerUnavailable` for a schema that this version does not work with; None where there is none."""
    if version is not None and OLDEST <= version <= NEWEST:
        return
    got = "none" if version is None else str(version)
    if version is not None and version > NEWEST:
        advice = "install a newer version of execution-envelope"
    elif version == 1:
        advice = "it was made before the first release and cannot be migrated: start a new ledger"
    else:
        advice = "this is not a whole ledger"
    raise LedgerUnavailable(
        f"expected ledger schema {OLDEST} to {NEWEST}, {place} has {got}: {advice}", retryable=False
    )


def _text(database: str, name: str) -> str:
    return (files("execution_envelope.ledger") / "sql" / database / name).read_text()
