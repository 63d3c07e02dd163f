"""Whether the record itself is well: reachable, up to date, sealed by checkpoints; what was refused before it began."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from execution_envelope.console.rows import Listed, listed
from execution_envelope.console.who import Reader, Shared
from execution_envelope.counters import COUNTERS
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger.contract import ChainHead
from execution_envelope.presentation import counted

router = APIRouter(include_in_schema=False)

MAX_CHAINS: Final = 20
MAX_ATTEMPTED: Final = 30
MAX_REVOKING: Final = 20
#: A projection that is behind by more entries than this is said to be behind.
BEHIND: Final = 1000


@router.get("/health")
def health(request: Request, shared: Shared, who: Reader) -> HTMLResponse:
    """The page. What is said of the ledger as a whole is for who sees all."""
    review, everything = shared.review, who.tenants is None
    values: dict[str, Any] = {"chains": [], "attempted": [], "counters": [], "lag": None, "checkpoint": None}
    reachable = problem = None
    try:
        values["lag"] = review.lag()
        if everything:
            heads = review.chains()
            values |= {
                "chains": [_chain(head) for head in reversed(heads[-MAX_CHAINS:])],
                "more_chains": max(0, len(heads) - MAX_CHAINS),
                "log": f"{counted(sum(head.length for head in heads), 'entry')} in {counted(len(heads), 'chain')}",
                "checkpoint": review.checkpoint(),
            }
        if who.may("audit"):
            values["attempted"] = review.attempted(MAX_ATTEMPTED, tenants=who.tenants)
        reachable = True
    except LedgerUnavailable as error:
        reachable, problem = False, str(error) if everything else "the ledger does not answer"
    revoking: list[Listed] = []
    behind = values["lag"] is not None and values["lag"].entries > BEHIND
    if reachable:
        page = review.find("revoking", limit=MAX_REVOKING, tenants=who.tenants, fresh=not behind)
        revoking = listed(page.rows, shared.clock())
    if shared.controller is not None and everything:
        counts = shared.controller.counters
        values["counters"] = [(name, counts[name], said) for name, said in COUNTERS.items() if counts[name]]
    return shared.page(
        request,
        "health.html",
        title="Health",
        here="/health",
        everything=everything,
        audits=who.may("audit") and everything,
        reachable=reachable,
        problem=problem,
        behind=behind,
        revoking=revoking,
        **values,
    )


def _chain(head: ChainHead) -> dict[str, Any]:
    return {"id": head.id, "length": head.length, "head": head.head.hex()[:16]}
