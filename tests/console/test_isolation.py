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
from execution_envelope.errors import Damaged, Refused
from execution_envelope.review import Review
from execution_envelope.review.candidate import Source
from execution_envelope.review.replay import replay
from execution_envelope.review.replay_result import encode
from tests.console.test_access import Clock, token
from tests.strategies import examples

BUDGETS = Budgets(
    [
        Budget(name="gpu", resource="gpu", limit=64, per=("tenant",)),
        Budget(name="tokens", resource="output_tokens", limit=10_000_000, window="day", per=("tenant", "project")),
        Budget(name="all", resource="gpu", limit=1000, per=()),
    ]
)
#: When a page was made, by the clock of the process.
AFTER = re.compile(r' data-after="[0-9a-f]{8}-[0-9]+"')
#: What is tried out over what is recorded.
POLICY = b"""
rules:
  - name: little
    match: {kinds: [model.deploy]}
    expression: requested.resources.gpu.amount < 4
    reason: resource_forbidden
    message: only little
"""
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
        self.replays = folder / "replays"
        self.replays.mkdir()
        for name, whose in (("all", None), *((tenant, frozenset({tenant})) for tenant in tenants)):
            source = Source(POLICY, kinds=("model.deploy",))
            found = replay(self.controller.ledger, source, now=clock(), tenants=whose, jobs=1)
            (self.replays / f"{name}.json").write_bytes(encode(found))
        self.app = create_app(
            Review(self.controller.ledger, clock=clock),
            authenticators=[TokenFile(folder / "t.toml", clock=clock)] if token_made(folder) else [],
            controller=self.controller,
            replays=self.replays,
            limits=RateLimits(requests="1000000/minute", failures="1000000/minute"),
        )
        self.bearer = token(folder / "t.toml", "user:reader", ["acme"], ["operator", "auditor"])
        self.whole = token(folder / "t.toml", "user:root", "*", ["operator", "auditor"])
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
    text = TOOK.sub(r"\1", CHAIN.sub("chain", AFTER.sub("", found.text)))
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
        names = [
            *alone.ids["acme"],
            *beside.ids["globex"],
            "deployment:acme-3",
            "deployment:globex-3",
            "nothing",
            "globex.json",
            "all.json",
        ]
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
@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
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
@settings(max_examples=examples(25), deadline=None, suppress_health_check=list(HealthCheck))
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


NAMED = st.sampled_from(("", "acme", "globex", "user:globex-0", "model:globex-held", "globex-project", "held", "zz"))
PAGED: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/envelopes": dict.fromkeys(
        ("q", "state", "kind", "tenant", "project", "subject", "target", "created", "after"), NAMED
    ),
    "/approvals": {"after": NAMED},
    "/budgets": {"account": st.sampled_from(("", "all", "gpu/acme", "gpu/globex", "tokens/globex/globex-project"))},
    "/accounting": {
        "days": st.sampled_from((1, 7, 30, 90)),
        "by": st.sampled_from(("tenant", "subject", "project", "kind", "operation", "target", "day")),
        "resource": st.sampled_from(("", "gpu", "output_tokens", "memory", "globex")),
    },
    "/": {"x": NAMED},
    "/coverage": {"newest": NAMED},
    "/health": {"x": NAMED},
    "/replays": {"x": NAMED},
}


@given(st.data())
@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
def test_every_page_with_whatever_is_asked_of_it_answers_alike(sides: tuple[Side, Side], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(PAGED)))
    asked = {name: value for name, values in PAGED[path].items() if (value := data.draw(values)) != ""}
    for accept in ("text/html", "*/*"):
        alike(sides, "GET", path, params=asked, headers={"accept": accept})


def test_where_others_pages_end_is_a_place_like_any(sides: tuple[Side, Side]) -> None:
    whole = {"authorization": f"Bearer {sides[1].whole}"}
    pages = [
        sides[1].client.get("/api/envelopes", params={"limit": limit}, headers=whole).json() for limit in range(1, 12)
    ]
    ends = [page["next"] for page in pages]
    assert any(page["rows"][-1]["tenant"] == "globex" for page in pages)
    for after in ends:
        for path in ("/api/envelopes", "/envelopes", "/approvals"):
            status, _, _ = alike(sides, "GET", path, params={"after": after})
            assert status == 200


def test_a_replay_of_others_alone_is_none(sides: tuple[Side, Side]) -> None:
    status, _, text = alike(sides, "GET", "/replays")
    assert status == 200 and "acme.json" in text and "all.json" in text and "globex" not in text
    assert alike(sides, "GET", "/replays/globex.json")[0] == 404
    for name in ("all.json", "acme.json"):
        status, _, text = alike(sides, "GET", f"/replays/{name}")
        assert status == 200 and "acme-" in text and "globex" not in text


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "POST"])
def test_every_method_answers_alike(sides: tuple[Side, Side], method: str) -> None:
    for path in ("/envelopes/{}", "/api/envelopes/{}", "/api/envelopes/{}/tree", "/replays/globex.json", "/live"):
        for id in (sides[1].ids["globex"][0], "deployment:globex-3"):
            status, headers, _ = alike(sides, method, path.format(id))
            assert status == 405 and headers["allow"] == "GET"


def test_a_damaged_one_of_others_is_none_either(tmp_path: Path) -> None:
    side = Side(tmp_path / "damaged", "acme", "globex")
    read = side.controller.ledger.read

    def damaged(id: str) -> Any:
        if id in side.ids["globex"]:
            raise Damaged(id)
        return read(id)

    side.controller.ledger.read = damaged  # type: ignore[method-assign]
    for id in (side.ids["globex"][0], "deployment:globex-3"):
        for path in ("/api/envelopes/{}", "/api/envelopes/{}/explanation", "/api/envelopes/{}/tree", "/envelopes/{}"):
            assert side.client.get(path.format(id)).status_code == 404, path
    whole = {"authorization": f"Bearer {side.whole}"}
    assert side.client.get(f"/api/envelopes/{side.ids['globex'][0]}", headers=whole).status_code == 409
    anyio.run(side.controller.aclose)
