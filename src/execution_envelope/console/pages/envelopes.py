"""The list of envelopes, by a query and a form of fields that make one together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from execution_envelope.console.rows import listed
from execution_envelope.console.who import Reader, Shared
from execution_envelope.criteria import FIELDS
from execution_envelope.errors import InvalidField
from execution_envelope.query import MAX_LENGTH, quoted

router = APIRouter(include_in_schema=False)

#: Envelopes on one page.
SIZE: Final = 40
#: Fields of the form: the field of the query language, and how it is compared.
_FIELDS: Final = {
    "state": "=",
    "kind": "=",
    "tenant": "=",
    "project": "=",
    "subject": "~",
    "target": "~",
    "created": ">=",
}
HELP: Final = (
    "Such as kind=model.deploy and granted.memory<2GiB and created>=7d. Words: "
    f"{', '.join(FIELDS)}; joined by and, or, not and parentheses."
)


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    value: str
    choices: tuple[str, ...] = ()


@router.get("/envelopes")
def envelopes(
    request: Request,
    shared: Shared,
    who: Reader,
    q: Annotated[str, Query(max_length=MAX_LENGTH)] = "",
    state: Annotated[str, Query(max_length=200)] = "",
    kind: Annotated[str, Query(max_length=200)] = "",
    tenant: Annotated[str, Query(max_length=200)] = "",
    project: Annotated[str, Query(max_length=200)] = "",
    subject: Annotated[str, Query(max_length=200)] = "",
    target: Annotated[str, Query(max_length=200)] = "",
    created: Annotated[str, Query(max_length=200)] = "",
    after: Annotated[str | None, Query(max_length=200)] = None,
) -> HTMLResponse:
    """A page of the list, newest first. What cannot be asked is said, and 422."""
    given = {
        "state": state,
        "kind": kind,
        "tenant": tenant,
        "project": project,
        "subject": subject,
        "target": target,
        "created": created,
    }
    given = {name: value.strip() for name, value in given.items()}
    text = composed(q.strip(), given)
    problem, page = None, None
    try:
        page = shared.review.find(text, limit=SIZE, after=after or None, tenants=who.tenants)
    except InvalidField as error:
        problem = str(error)
    answer = shared.page(
        request,
        "envelopes.html",
        title="Envelopes",
        here="/envelopes",
        q=q,
        fields=[_Field(name, given[name], _choices(name)) for name in _FIELDS],
        help=HELP,
        problem=problem,
        rows=[] if page is None else listed(page.rows, shared.clock()),
        text=text,
        after=after,
        next=None if page is None else page.next,
        looked=None if page is None else page.looked_back_to,
        chosen={"q": q, **{name: value for name, value in given.items() if value}},
        words=("envelope", "list", "--limit", str(SIZE), *(("--where", text) if text else ())),
    )
    if problem is not None:
        answer.status_code = 422
    return answer


def composed(query: str, fields: dict[str, str]) -> str:
    """One query of a text and of fields, which are quoted: nothing in them is taken for the language."""
    terms = [f"{name}{_FIELDS[name]}{quoted(value)}" for name, value in fields.items() if value]
    if not terms:
        return query
    return " and ".join(([f"({query})"] if query else []) + terms)


def _choices(name: str) -> tuple[str, ...]:
    return tuple(FIELDS[name].words)
