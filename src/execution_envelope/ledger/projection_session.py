"""How a projection speaks to its database: named queries, in SQL of each database's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Session(Protocol):
    """One connection to the tables, which makes them when they are missing or of another version.

    Everything raises `LedgerUnavailable`. An error ends the transaction.
    """

    def writing(self) -> AbstractContextManager[None]:
        """A transaction of which there is one at a time; stored at the end of the block."""
        ...

    def reading(self) -> AbstractContextManager[None]:
        """One state of everything."""
        ...

    def all(self, query: str, **values: Any) -> list[Any]:
        """What a named query finds. Lists of texts are given as JSON."""
        ...

    def template(self, query: str) -> str:
        """The text of a named query or a piece of one, to be completed with other pieces."""
        ...

    def found(self, sql: str, values: Mapping[str, Any]) -> list[Any]:
        """What a query finds that was put together of such pieces."""
        ...

    def many(self, query: str, rows: Iterable[Sequence[Any]]) -> None:
        """A named statement, once for each row."""
        ...

    def forget(self, queries: Sequence[str]) -> None:
        """Empty the tables by these statements, and begin a new epoch."""
        ...

    def close(self) -> None:
        """Let go of the connection; the next call opens it again."""
        ...
