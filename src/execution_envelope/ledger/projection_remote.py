"""The projection of a ledger that is elsewhere: asked there, and caught up there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger.projection import Accounts, Coverage, Lag, Page, Progress, ProjectedEnvelope
from execution_envelope.ledger.remote_http import Server, elsewhere
from execution_envelope.ledger.rollups import Question
from execution_envelope.ledger.wire import MAX_CAUGHT, Caught
from execution_envelope.query import Query


class RemoteProjection:
    """See `Projection`. It shows what the token's tenants have, and is neither dropped nor rebuilt from here.

    To who does not see all tenants `lag` says whether anything is missing, and `coverage` counts theirs only.
    """

    def __init__(self, server: Server) -> None:
        self._server = server

    def catch_up(self, limit: int | None = None, *, progress: Progress | None = None) -> Lag:
        """The server catches up, some entries at a time."""
        lag = self.lag()
        behind = lag.entries  # what comes meanwhile is not waited for
        while lag.entries and (limit is None or limit > 0) and behind > 0:
            most = MAX_CAUGHT if limit is None else min(limit, MAX_CAUGHT)
            caught = self._server.get("projection/catch_up", Caught, limit=most)
            lag, limit = caught.lag, None if limit is None else limit - most
            if caught.taken is not None:
                behind -= caught.taken
                if progress is not None and caught.taken:
                    progress(caught.taken)
        return lag

    def lag(self) -> Lag:
        return self._server.get("projection/lag", Lag)

    def rebuild(self, *, progress: Progress | None = None) -> None:
        raise self._elsewhere()

    def drop(self) -> None:
        raise self._elsewhere()

    def get(self, id: str, *, fresh: bool = True) -> ProjectedEnvelope | None:
        return self._server.get("projection/get", ProjectedEnvelope | None, id=id, fresh=fresh)  # type: ignore[arg-type]

    def search(
        self,
        query: Query | None,
        *,
        limit: int,
        after: str | None = None,
        tenants: frozenset[str] | None = None,
        fresh: bool = True,
    ) -> Page:
        """See `Projection`. Ages in the query are counted back from the server's time."""
        asked = _asked(query, tenants, fresh)
        return self._server.get("projection/search", Page, limit=limit, after=after, **asked)

    def stream(
        self, query: Query | None, *, tenants: frozenset[str] | None = None, fresh: bool = True
    ) -> Iterator[ProjectedEnvelope]:
        yield from self._server.pieces("projection/stream", ProjectedEnvelope, **_asked(query, tenants, fresh))

    def open(self, *, fresh: bool = True) -> list[str]:
        return list(self._server.pieces("projection/open", str, fresh=fresh))

    def coverage(self, limit: int = 5, *, fresh: bool = True) -> Coverage:
        return self._server.get("projection/coverage", Coverage, limit=limit, fresh=fresh)

    def totals(self, question: Question, *, fresh: bool = True) -> Accounts:
        asked = msgspec.json.encode(question).decode()
        return self._server.get("projection/totals", Accounts, question=asked, fresh=fresh)

    @property
    def temporary(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing is held here."""

    def _elsewhere(self) -> LedgerUnavailable:
        return elsewhere(self._server, "work on the projection")


def _asked(query: Query | None, tenants: frozenset[str] | None, fresh: bool) -> dict[str, Any]:
    """What narrows a search. Within the token's tenants, whatever is asked for."""
    return {
        "query": None if query is None else query.text,
        "tenants": None if tenants is None else msgspec.json.encode(sorted(tenants)).decode(),
        "fresh": fresh,
    }
