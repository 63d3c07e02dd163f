"""What stands in the accounts of budgets, and who holds it."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from execution_envelope.budgets import Balance, window_ends
from execution_envelope.console.access import Principal
from execution_envelope.console.charts import stacked
from execution_envelope.console.shared import Console
from execution_envelope.console.who import Reader, Shared
from execution_envelope.resources import human

router = APIRouter(include_in_schema=False)

#: Balances on the page, and executions that are named for each of one account.
MAX_BALANCES: Final = 40
MAX_HOLDERS: Final = 12
#: Balances of one account whose holders are named.
MAX_HELD: Final = 8
_NOTE: Final = (
    "Accounts of your tenants, as far as the policy says whose they are; those of everybody together are not shown."
)


@router.get("/budgets")
def budgets(
    request: Request, shared: Shared, who: Reader, account: Annotated[str | None, Query(max_length=400)] = None
) -> HTMLResponse:
    """Balances; of one account with its holders."""
    found = shared.review.balances(shared.budgets, account=account or None, tenants=who.tenants)
    # Those that are fullest first; of one account the newest windows.
    found.sort(key=(lambda one: one.window) if account else _full, reverse=True)
    holders = [_holders(shared, who, balance) for balance in found[:MAX_HELD]] if account else []
    nothing = "Nothing was ever entered for this account." if account else "Nothing was ever reserved of any budget."
    return shared.page(
        request,
        "budgets.html",
        title="Budgets",
        here="/budgets",
        hidden_note="" if who.tenants is None else _NOTE,
        balances=[_balance(one) for one in found[:MAX_BALANCES]],
        more=max(0, len(found) - MAX_BALANCES),
        holders=holders,
        account=account,
        nothing=nothing,
        # An account comes from an address: it is not to become an option of the command.
        words=("envelope", "budgets", *(("--",) if (account or "").startswith("-") else ()), *filter(None, (account,))),
    )


def _full(one: Balance) -> float:
    return (one.reserved + one.spent) / one.limit if one.limit else float(one.reserved + one.spent)


def _balance(one: Balance) -> dict[str, Any]:
    ends = window_ends(one.window)
    reserved, spent = human(one.resource, one.reserved), human(one.resource, one.spent)
    pieces = {"spent": (one.spent, spent), "reserved": (one.reserved, reserved)}
    return {
        "account": one.account,
        "window": one.window,
        "resource": one.resource,
        "reserved": reserved,
        "spent": spent,
        "unknown": one.unknown,
        "limit": human(one.resource, one.limit),
        "free": ("-" if one.free < 0 else "") + human(one.resource, abs(one.free)),
        "over": one.free < 0,
        "frees": None if ends is None else ends.isoformat(),
        "pieces": stacked(pieces, one.limit),
    }


def _holders(shared: Console, who: Principal, balance: Balance) -> dict[str, Any]:
    held, more = shared.review.holders(balance, MAX_HOLDERS, tenants=who.tenants)
    lines = []
    for one in held:
        row = shared.review.row(one.envelope, tenants=who.tenants)
        lines.append(
            {
                "id": one.envelope,
                "what": "" if row is None else f"{row.operation} {row.target}",
                "who": "" if row is None else f"{row.tenant or 'no tenant'}/{row.subject}",
                "state": "unknown" if row is None else row.state,
                "holds": human(balance.resource, one.reserved),
            }
        )
    return {
        "account": balance.account,
        "resource": balance.resource,
        "window": balance.window,
        "held": lines,
        "more": more,
    }
