"""One envelope: its families, what was given of what was asked and why, its ledgers, its tree and its proof."""

from __future__ import annotations

from typing import Annotated, Any, Final

import anyio
from fastapi import APIRouter, Path, Request
from fastapi.responses import HTMLResponse

from execution_envelope.approvals import request
from execution_envelope.console.access import Principal
from execution_envelope.console.charts import bars
from execution_envelope.console.shared import Console
from execution_envelope.console.sheet import view
from execution_envelope.console.who import Reader, Shared
from execution_envelope.errors import SelfApproval
from execution_envelope.presentation import facts
from execution_envelope.presentation.text import counted
from execution_envelope.record import Record
from execution_envelope.resources import human
from execution_envelope.tree import Tree, asked

router = APIRouter(include_in_schema=False)

Reference = Annotated[str, Path(max_length=512)]
#: The sections of the page, for its own navigation.
SECTIONS: Final = (
    ("resources", "resources"),
    ("why", "why"),
    ("families", "families"),
    ("hooks", "hook ledger"),
    ("route", "route ledger"),
    ("timeline", "timeline"),
    ("tree", "tree"),
    ("chain", "chain proof"),
)
#: Children that are named on the page, lines of a tree, and how deep it is drawn.
MAX_CHILDREN: Final = 40
MAX_NODES: Final = 150
MAX_DEPTH: Final = 5
#: Sentences of one section of the explanation.
MAX_WHY: Final = 25
#: Sections of the explanation that have a place of their own on the page.
_ELSEWHERE: Final = ("asked", "course", "related", "noted")


@router.get("/envelopes/{reference}")
def envelope(reference: Reference, request: Request, shared: Shared, who: Reader) -> HTMLResponse:
    """The page of one."""
    review, now = shared.review, shared.clock()
    record = review.record(reference, tenants=who.tenants)
    children, chain = review.children(record), review.chain(record)
    why, may = _why(shared, record, who), acts(shared, who, record)
    in_chains = f"{counted(chain.entries, 'entry')} in {counted(len(chain.chains), 'chain')}"
    return shared.page(
        request,
        "envelope.html",
        title=f"{record.envelope.execution.operation} {record.id[-12:]}",
        here="/envelopes",
        sections=(*(("act", "decide"),) * bool(may), *SECTIONS),
        why=why,
        children=children[-MAX_CHILDREN:],
        children_said=counted(len(children), "envelope") + (" is" if len(children) == 1 else " are") + " part of it",
        chain=chain,
        chain_said=f"{in_chains}, all hashes recomputed",
        acts=may,
        **view(record, now=now),
    )


@router.get("/envelopes/{reference}/tree")
def tree(reference: Reference, request: Request, shared: Shared, who: Reader) -> HTMLResponse:
    """All that is part of it."""
    found = anyio.run(lambda: shared.review.tree(reference, tenants=who.tenants))
    nodes = list(found.walk())
    is_open = sum(record.is_open for _, record in nodes)
    return shared.page(
        request,
        "tree.html",
        title=f"Tree {found.record.id[-12:]}",
        here="/envelopes",
        id=found.record.id,
        said=f"{counted(len(nodes), 'envelope')}, {is_open} open.",
        nodes=[_node(depth, record) for depth, record in nodes[:MAX_NODES]],
        more=max(0, len(nodes) - MAX_NODES),
        sums=_sums(found),
    )


def acts(shared: Console, who: Principal, record: Record) -> list[dict[str, Any]]:
    """What this principal may ask of it here, as forms; one that says nothing where they asked for it themselves."""
    if shared.controller is None:
        return []
    of = f"{record.envelope.execution.operation} {record.id[-12:]}"
    if record.state == "held" and who.may("approve"):
        if _asked(record, who):
            return [{"id": record.id, "of": of, "says": ()}]
        return [{"id": record.id, "of": of, "says": (("approve", "Approve"), ("deny", "Deny"))}]
    if record.state in ("admitted", "granted") and record.revoking is None and who.may("revoke"):
        return [{"id": record.id, "of": of, "says": (("revoke", "Revoke"),)}]
    return []


def _asked(record: Record, who: Principal) -> bool:
    """Whether this principal asked for it, and so may not decide on it."""
    try:
        request(record, "approve", who.acting_in(record.envelope.identity.tenant), "to see whether one may")
    except SelfApproval:
        return True
    return False


def _why(shared: Console, record: Record, who: Principal) -> list[dict[str, Any]]:
    known = shared.budgets
    explanation = shared.review.explain(record, known, tenants=who.tenants)
    return [
        {
            "title": section.title,
            "sentences": section.sentences[:MAX_WHY],
            "more": max(0, len(section.sentences) - MAX_WHY),
        }
        for section in explanation.sections
        if section.name not in _ELSEWHERE
    ]


def _node(depth: int, record: Record) -> dict[str, Any]:
    execution = record.envelope.execution
    wanted, used = asked(record), record.used
    said = [
        f"{name} {human(name, wanted.get(name))}, {human(name, record.granted.get(name))}, "
        f"{human(name, used[name].amount if name in used else None)}"
        for name in dict.fromkeys([*wanted, *record.granted, *used])
    ]
    return {
        "depth": min(depth, MAX_DEPTH),
        "level": depth + 1,
        "id": record.id,
        "what": f"{execution.operation} {facts.target(record)}",
        "who": facts.who(record),
        "state": record.state,
        "amounts": "; ".join(said),
    }


def _sums(tree: Tree) -> list[dict[str, Any]]:
    requested, granted, used = tree.requested, tree.granted, tree.used
    return [
        {
            "key": name,
            "bars": bars(
                name,
                {
                    "requested": requested.get(name),
                    "granted": granted.get(name),
                    "used": used[name].amount if name in used else None,
                },
            ),
        }
        for name in dict.fromkeys([*requested, *granted, *used])
    ]
