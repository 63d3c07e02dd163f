"""A reader of one tenant gets the same answers, to the byte, whether or not there is another tenant: in every route.

Two ledgers hold the same envelopes of *acme*; one holds *globex* too. Whatever is asked of either, of whichever page,
filter, count or name, is answered alike.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import uuid_utils
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from execution_envelope import AdmissionController, Ask, Decision, Grant, Rule, Subject, Target
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.console import pages
from execution_envelope.console.app import create_app
from execution_envelope.console.limits import RateLimits
from execution_envelope.console.tokens import TokenFile
from execution_envelope.errors import Refused
from execution_envelope.review import Review
from tests.console.test_access import Clock, token

BUDGETS = Budgets(
    [
        Budget(name="gpu", resource="gpu", limit=64, per=("tenant",)),
        Budget(name="tokens", resource="output_tokens", limit=10_000_000, window="day", per=("tenant", "project")),
        Budget(name="all", resource="gpu", limit=1000, per=()),
    ]
)
#: What differs between any two ledgers: the names of their chains, and how long hooks took.
CHAIN = re.compile(r"(?!019d0)[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")
TOOK = re.compile(r"(\"duration_us\": ?)[0-9]+|[0-9.,]+ ?(?:us|µs|ms)\b")


def judge(envelope: Any) -> Decision | None:
    asked = envelope.execution.target.id
    if asked.endswith("denied"):
        return Decision.deny("policy", f"no {asked}")
    return Decision.hold(f"look at {asked}") if asked.endswith("held") else None


class Side:
    """A server over a ledger with the envelopes of these tenants."""

    def __init__(self, folder: Path, *tenants: str) -> None:
        folder.mkdir()
        clock, self.numbers = Clock(), {name: itertools.count(1) for name in ("acme", "globex")}
        self.controller = AdmissionController.open(
            f"sqlite:///{folder / 'e.db'}",
            hooks=[Rule("policy", judge, kinds=frozenset({"inference", "model.deploy"}))],
            budgets=BUDGETS,
            clock=clock,
            new_id=lambda: self.id(),
        )
        self.ids: dict[str, list[str]] = {"acme": [], "globex": []}
        # Interleaved, so that places in chains and lists differ.
        anyio.run(self.fill, tenants)
        self.app = create_app(
            Review(self.controller.ledger, clock=clock),
            authenticators=[TokenFile(folder / "t.toml", clock=clock)] if token_made(folder) else [],
            controller=self.controller,
            limits=RateLimits(requests="1000000/minute", failures="1000000/minute"),
        )
        self.bearer = token(folder / "t.toml", "user:reader", ["acme"], ["operator", "auditor"])
        self.client = TestClient(self.app, headers={"authorization": f"Bearer {self.bearer}"})

    def id(self) -> str:
        """Of each tenant its own, in the order of time, whatever the other does."""
        number = next(self.numbers[self.tenant])
        high = 0x019D_0000_0000 + number * 10 + (self.tenant == "globex")
        return str(uuid_utils.UUID(int=(high << 80) | (7 << 76) | (0b10 << 62) | number))

    async def fill(self, tenants: tuple[str, ...]) -> None:
        for number in range(12):
            for self.tenant in tenants:
                await self.one(self.tenant, number)
        self.tenant = "acme"
        await self.controller.aclose()

    async def one(self, tenant: str, number: int) -> None:
        end = ("ok", "denied", "held", "open")[number % 4]
        ask = Ask(
            kind="model.deploy" if number % 3 else "inference",
            operation=f"{tenant}.run",
            subject=Subject("user", f"{tenant}-{number % 2}", tenant=tenant),
            target=Target("model", f"{tenant}-{end}"),
            scope={"project": f"{tenant}-project"},
            requested={"gpu": 8, "output_tokens": 100},
        )
        try:
            admission = await self.controller.begin(ask)
        except Refused as refused:
            assert refused.envelope_id is not None
            self.ids[tenant].append(refused.envelope_id)
            return
        self.ids[tenant].append(admission.id)
        await admission.bind("deployment", f"{tenant}-{number}", owner=f"{tenant}-owner")
        await admission.grant(Grant({"gpu": 2}, because={"gpu": ("capacity", f"{tenant} has no more")}))
        if end == "ok":
            await admission.complete(used={"gpu": 1, "output_tokens": 60})


def token_made(folder: Path) -> bool:
    token(folder / "t.toml", "user:other", ["globex"], ["reader"])
    return True


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Side, Side]]:
    folder = tmp_path_factory.mktemp("sides")
    alone, beside = Side(folder / "alone", "acme"), Side(folder / "beside", "acme", "globex")
    assert alone.ids["acme"] == beside.ids["acme"] and beside.ids["globex"]
    yield alone, beside
    for side in (alone, beside):
        anyio.run(side.controller.aclose)


def answer(side: Side, method: str, path: str, **options: Any) -> tuple[Any, ...]:
    found = side.client.request(method, path, **options)
    text = TOOK.sub(r"\1", CHAIN.sub("chain", found.text))
    headers = {name: value for name, value in found.headers.items() if name not in ("date", "content-length")}
    return found.status_code, headers, text


def alike(sides: tuple[Side, Side], method: str, path: str, **options: Any) -> tuple[Any, ...]:
    """What both answer."""
    alone, beside = sides
    one, other = answer(alone, method, path, **options), answer(beside, method, path, **options)
    if one != other:
        differing = [pair for pair in zip(one[2].split(","), other[2].split(","), strict=False) if pair[0] != pair[1]]
        raise AssertionError(f"{method} {path} {options}: {one[0]} {other[0]} {differing[:4]}")
    assert one[0] < 500, one
    return one


def routes(side: Side) -> list[tuple[str, str]]:
    """Every route that is read: of the API as it is described, and of the pages."""
    described = [path for path, methods in side.app.openapi()["paths"].items() if "get" in methods]
    shown = [route.path for module in pages._ROUTES for route in module.router.routes if "GET" in route.methods]
    return [("GET", path) for path in (*described, *shown)]


def test_every_route_answers_alike(sides: tuple[Side, Side]) -> None:
    alone, beside = sides
    asked = routes(alone)
    assert len(asked) > 12, asked
    for method, path in asked:
        names = [*alone.ids["acme"], *beside.ids["globex"], "deployment:acme-3", "deployment:globex-3", "nothing"]
        for name in names if "{" in path else [""]:
            status, _, text = alike(sides, method, re.sub(r"\{[^}]*\}", name, path))
            if "globex" not in name and name not in beside.ids["globex"]:
                assert "globex" not in text, path
            if name in beside.ids["globex"] or "globex" in name:
                assert status == 404, path


def test_what_is_said_of_others_envelopes_is_said_of_none(sides: tuple[Side, Side]) -> None:
    for id in (*sides[1].ids["globex"], "deployment:globex-3"):
        for what in ("approve", "deny", "revoke"):
            status, _, _ = alike(sides, "POST", f"/api/envelopes/{id}/{what}", json={"reason": "r"})
            assert status == 404


FIELDS = ("tenant", "subject", "operation", "target", "project", "owner", "hook", "code", "cause", "state", "kind")
VALUES = ("acme", "globex", "user:globex-0", "globex.run", "model:globex-held", "globex-project", "policy", "capacity")
SIMPLE = st.builds(
    lambda field, op, value: f"{field}{op}{value}",
    st.sampled_from(FIELDS),
    st.sampled_from(("=", "!=", "~")),
    st.sampled_from((*VALUES, "held", "denied", "open", "model.deploy")),
) | st.sampled_from(("requested.gpu>=8", "granted.gpu<8", "ungranted", "created>=2026-04-01", "id>=019d"))
QUERIES = st.recursive(
    SIMPLE,
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(("and", "or")), inner) | st.builds("not {}".format, inner)
    ),
    max_leaves=4,
)


@given(QUERIES, st.integers(1, 8))
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_filter_and_page_answers_alike(sides: tuple[Side, Side], where: str, limit: int) -> None:
    after: str | None = None
    for _ in range(20):
        asked = {"where": where, "limit": str(limit)} | ({} if after is None else {"after": after})
        status, _, text = alike(sides, "GET", "/api/envelopes", params=asked)
        alike(sides, "GET", "/envelopes", params={"q": where})
        if status != 200:
            return
        found = re.search(r'"next":"([^"]*)"', text)
        after = None if found is None else found[1]
        if after is None:
            return
    raise AssertionError("expected an end")


@given(
    st.lists(
        st.sampled_from(("tenant", "project", "kind", "operation", "subject", "target", "day", "week")), max_size=3
    ),
    st.sampled_from((None, "acme", "globex")),
    st.sampled_from(("400d", "2026", "2026-05", "x")),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_sum_answers_alike(sides: tuple[Side, Side], by: list[str], tenant: str | None, since: str) -> None:
    more = {} if tenant is None else {"tenant": tenant}
    alike(sides, "GET", "/api/accounting", params={"by": by or ["kind"], "since": since, **more})
    alike(
        sides,
        "GET",
        "/api/accounting",
        params={"by": by[:1] or ["tenant"], "of": "gpu", "side": "granted", "top": 3, **more},
    )
    alike(sides, "GET", "/api/budgets", params={"account": f"gpu/{tenant or 'acme'}"})
