"""The pages: what is on them and for whom, that nothing on them does harm, and what is said by a form."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote

import anyio
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from execution_envelope.console.headers import POLICY
from execution_envelope.console.markup import SIGNS, command, printed, short
from execution_envelope.console.pages import PAGES
from execution_envelope.lifecycle import OPEN, TERMINAL
from execution_envelope.review import Review
from tests.console.world import BUDGETS, HOSTILE, World
from tests.strategies import examples

#: How heavy a page may be, in bytes, and style sheet and script together.
MAX_PAGE = 60_000
MAX_FILES = 40_000
VOID = frozenset(
    [
        "area",
        "base",
        "br",
        "col",
        "embed",
        "hr",
        "img",
        "input",
        "link",
        "meta",
        "source",
        "track",
        "wbr",
        "rect",
        "path",
    ]
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    found = World(tmp_path_factory.mktemp("console"))
    yield found
    found.close()


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One that may be changed."""
    found = World(tmp_path_factory.mktemp("console"))
    yield found
    found.close()


def paths(world: World) -> list[str]:
    """Every page that there is, with what it may be asked."""
    ids = world.ids
    return [
        *(path for path, _ in PAGES),
        *(f"/envelopes/{ids[name]}" for name in ("less", "held", "held_globex", "denied", "run", "hostile", "call-0")),
        f"/envelopes/{ids['run']}/tree",
        "/envelopes/deployment:dep-1",
        "/envelopes?q=state%3Dheld",
        "/envelopes?tenant=globex",
        "/envelopes?q=not%20tenant%3Dnobody&state=completed",
        "/envelopes?q=state%3D%3D",
        "/budgets?account=devices/acme",
        "/budgets?account=everybody",
        "/budgets?account=tokens/globex/research",
        "/accounting?days=30&by=tenant&resource=bytes",
        "/accounting?by=subject",
        f"/replays/{world.replay}",
    ]


class Page(HTMLParser):
    """Tags that close, headings in order, no handlers and no styles inside, each id once, labels for all inputs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.problems: list[str] = []
        self.labels: set[str] = set()
        self.inputs: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append(int(tag[1]))
        if tag == "script" and not values.get("src"):
            self.problems.append("a script inside")
        self.problems += [f"{tag} {name}" for name in values if name.startswith("on") or name == "style"]
        if "id" in values:
            self.ids.append(str(values["id"]))
        self.links += [str(values[name]) for name in ("href", "src", "action", "formaction") if name in values]
        if tag == "label":
            self.labels.add(str(values.get("for")))
        if tag in ("input", "select") and values.get("type") != "hidden":
            self.inputs.append(values)
        if tag == "svg" and values.get("aria-hidden") != "true" and not values.get("aria-label"):
            self.problems.append("a picture without a name")

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")


@pytest.mark.parametrize("who", ["all", "acme", "reader", "globex", "nobody"])
def test_every_page_is_whole_light_and_does_as_it_is_told(world: World, who: str) -> None:
    client = world.client(who)
    for path in paths(world):
        answer = client.get(path)
        assert answer.status_code in (200, 404, 422), (path, answer.status_code)
        assert answer.headers["content-security-policy"] == POLICY
        assert len(answer.content) < MAX_PAGE, path
        page = Page(answer.text)
        assert (page.problems, page.open) == ([], []), path
        assert page.headings[0] == 1 and page.headings.count(1) == 1, path
        assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False)), path
        assert len(page.ids) == len(set(page.ids)), path
        assert {str(one.get("id")) for one in page.inputs} <= page.labels, path
        assert all(link.startswith(("/", "#")) or link == "" for link in page.links), path
        assert 'lang="en"' in answer.text and 'class="skip"' in answer.text


def test_whoever_has_no_token_sees_no_page_and_every_file(world: World) -> None:
    stranger = TestClient(world.app, headers={"accept": "text/html"})
    for path in [*paths(world), "/live"]:
        answer = stranger.get(path)
        assert answer.status_code == 401, path
        assert "/signin?to=" in answer.text and "deploy_model" not in answer.text
    page = world.client("all").get("/").text
    files = re.findall(r'(?:href|src)="(/static/[^"]+)"', page)
    assert len(files) == 3
    weight = 0
    for file in files:
        answer = stranger.get(file)
        assert answer.status_code == 200 and "immutable" in answer.headers["cache-control"]
        weight += len(answer.content)
    assert weight < MAX_FILES
    assert stranger.get("/static/console.0000000000000000.js").status_code == 404
    assert stranger.get("/static/..%2fapp.py").status_code == 404


def test_a_tenant_sees_nothing_of_another_on_any_page(world: World) -> None:
    others = {name: world.ids[name] for name in ("held_globex", "hostile", "move-0-1", "move-1-1")}
    own = ("less", "held", "run")
    for who in ("acme", "reader"):
        client = world.client(who)
        for path in paths(world):
            text = html.unescape(client.get(path).text)
            asked = html.unescape(path)
            for name, id in others.items():
                assert id not in text.replace(asked, "") or id in path, (path, name)
                assert id[-12:] not in text.replace(asked, "") or id in path, (path, name)
            for word in ("user:gus", "alert(1)", "user:gil"):
                assert word not in text.replace(asked, ""), (path, word)
            assert "at this moment" not in text or "everybody" not in text, path
            if "globex" not in path:
                assert "globex" not in text, path
        listed = client.get("/envelopes").text
        assert all(world.ids[name][-12:] in listed for name in own)
    everything = world.client("all").get("/envelopes").text
    assert all(id[-12:] in everything for id in others.values())


def test_numbers_are_of_ones_own_tenants(world: World) -> None:
    def numbers(who: str) -> dict[str, str]:
        text = world.client(who).get("/").text
        return {name: count for count, name in re.findall(r"<b>([^<]+)</b> <span>([^<]+)</span>", text)}

    assert numbers("all")["wait for approval"] == "4" and numbers("acme")["wait for approval"] == "3"
    assert numbers("globex")["wait for approval"] == "1" and numbers("globex")["open"] == "1"
    assert set(numbers("nobody").values()) == {"0"}
    assert "damaged" in numbers("all") and "damaged" not in numbers("acme")
    whole, own = world.client("all").get("/accounting").text, world.client("acme").get("/accounting").text
    assert "26 envelopes" in whole and "19 envelopes" in own
    assert "0 envelopes" in world.client("nobody").get("/accounting").text


def test_what_belongs_to_the_whole_ledger_is_for_who_sees_all(world: World) -> None:
    chain = world.controller.ledger.chains()[0].id
    assert chain in world.client("all").get("/health").text
    for who in ("acme", "globex"):  # one of them is an auditor, of one tenant
        text = world.client(who).get("/health").text
        assert chain not in text and "Chains" not in text and "never became" not in text and "Counted" not in text
        assert "unreadable" not in world.client(who).get("/coverage").text
    assert "never became" in world.client("all").get("/health").text


def test_what_is_another_tenants_and_what_is_not_there_are_the_same(world: World) -> None:
    client = world.client("acme")
    other, absent = world.ids["hostile"], world.ids["hostile"][:-1] + "f"
    for suffix in ("", "/tree"):
        there, not_there = client.get(f"/envelopes/{other}{suffix}"), client.get(f"/envelopes/{absent}{suffix}")
        assert there.status_code == not_there.status_code == 404
        # But for when each was made, by the clock of the process.
        texts = [re.sub(r' data-after="\w+-\d+"', "", answer.text) for answer in (there, not_there)]
        assert texts[0].replace(other, "ID") == texts[1].replace(absent, "ID")
    for what in ("approve", "deny", "revoke"):
        said = client.post(f"/envelopes/{world.ids['held_globex']}/{what}", data={"reason": "x"})
        none = client.post(f"/envelopes/{absent}/{what}", data={"reason": "x"})
        assert said.status_code == none.status_code == 404
    assert anyio.run(world.controller.read, world.ids["held_globex"]).approval is None


def test_budgets_are_shown_where_the_policy_says_whose_they_are(world: World) -> None:
    text = world.client("acme").get("/budgets").text
    assert "devices/acme" in text and "devices/globex" not in text
    assert "everybody</a>" in world.client("all").get("/budgets").text and "everybody</a>" not in text
    now = "has at this moment"  # of a record that names an account which is not one's own, nothing is said of now
    page = f"/envelopes/{world.ids['less']}"
    assert now in world.client("all").get(page).text and now not in world.client("acme").get(page).text
    account = world.client("all").get("/budgets?account=everybody").text
    assert world.ids["less"][-12:] in account
    none = world.client("globex").get("/budgets?account=devices/acme").text
    assert "Nothing was ever entered" in none and world.ids["less"][-12:] not in none


def test_holders_of_other_tenants_are_left_out_and_not_counted(world: World) -> None:
    """An account that is read by a newer policy than it was kept by may have been of somebody else."""
    review = Review(world.controller.ledger, clock=lambda: world.clock.now)
    balance = next(one for one in review.balances(BUDGETS) if one.account == "everybody")
    assert [one.envelope for one in review.holders(balance, 5)[0]] == [world.ids["less"]]
    assert review.holders(balance, 5, tenants=frozenset({"acme"}))[0] != []
    assert review.holders(balance, 5, tenants=frozenset({"globex"})) == ([], 0)


# What is on a page


def test_one_that_got_less_is_found_and_says_why(world: World) -> None:
    client = world.client("reader")
    overview = client.get("/").text
    assert "▼ gpu: 1 of 2" in overview
    found = client.get("/envelopes", params={"q": "outcome=reduced and cause=capacity"}).text
    assert world.ids["less"][-12:] in found and world.ids["run"][-12:] not in found
    text = re.sub(r"<[^>]+>|\s+", " ", client.get(f"/envelopes/{world.ids['less']}").text)
    for said in ("one GPU was free", "2 GiB for each replica of acme", "no GPU is free", "the engine rounds up"):
        assert said in text, said
    assert "requested 8 GiB, effective 8 GiB, granted 2 GiB, used 1536 MiB" in text
    assert re.search(r"sound \d+ entries in 1 chain", re.sub(r"\s+", " ", text))


def test_the_tree_says_what_it_comes_to(world: World) -> None:
    text = world.client("reader").get(f"/envelopes/{world.ids['run']}/tree").text
    assert "7 envelopes, 1 open" in text
    assert "requested 4000, granted 4000, used 1320" in re.sub(r"\s+", " ", text)


def test_pages_of_a_list_hold_each_once(world: World) -> None:
    client, seen, path = world.client("all"), list[str](), "/envelopes?state=completed"
    import execution_envelope.console.pages.envelopes as module

    before, module.SIZE = module.SIZE, 4  # type: ignore[misc]
    try:
        while path:
            text = client.get(path).text
            seen += re.findall(r'class="row" href="/envelopes/([^"]+)"', text)
            further = re.search(r'rel="next" href="([^"]+)"', text)
            path = html.unescape(further[1]) if further else ""
    finally:
        module.SIZE = before  # type: ignore[misc]
    assert len(seen) == len(set(seen)) == 15


def test_the_form_and_the_query_are_one_and_the_command_asks_the_same(world: World) -> None:
    asked = {"q": "state=held or state=granted", "tenant": "ac\"me' or $(reboot)", "kind": "model.deploy"}
    text = world.client("all").get("/envelopes", params=asked).text
    line = next(line for line in re.findall(r"<code>([^<]+)</code>", text) if "--where" in line)
    words = shlex.split(html.unescape(line))
    assert words[:2] == ["envelope", "list"]
    query = words[words.index("--where") + 1]
    assert query == '(state=held or state=granted) and kind="model.deploy" and tenant="ac\\"me\' or $(reboot)"'
    assert "No envelopes" in text


def test_it_works_where_it_is_mounted(world: World) -> None:
    outer = FastAPI()
    outer.mount("/console", world.app)
    client = TestClient(outer, headers=dict(world.client("all").headers))
    page = Page(client.get("/console/").text)
    assert all(link.startswith(("/console/", "#")) or link == "" for link in page.links)
    assert {client.get(link).status_code for link in page.links if link.startswith("/console")} == {200}


# What does no harm


def test_names_that_would_do_harm_are_text(world: World) -> None:
    for path in ("/envelopes", f"/envelopes/{world.ids['hostile']}", "/accounting?by=project&resource=memory"):
        text = world.client("all").get(path).text
        assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text, path
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\0]", text), path
    assert HOSTILE not in html.unescape(text)


HARD = st.text(st.characters(), max_size=300) | st.sampled_from(
    ["\0", "\ud800", "a" * 5000, "%00", "../..", "' or 1=1"]
)


@given(HARD, HARD, HARD)
@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_asked_is_answered_and_not_by_an_error(world: World, one: str, two: str, name: str) -> None:
    client = world.client("acme")

    def encoded(text: str) -> str:
        return quote(text.encode("utf-8", "surrogatepass"), safe="")

    asked = (
        f"/envelopes?q={encoded(one)}&tenant={encoded(two)}&after={encoded(name)}",
        f"/envelopes/{encoded(one)}",
        f"/envelopes/{encoded(two)}/tree",
        f"/budgets?account={encoded(one)}",
        f"/accounting?days={encoded(two)}&by={encoded(one)}&resource={encoded(name)}",
        f"/replays/{encoded(name)}",
        f"/approvals?after={encoded(one)}",
    )
    for path in asked:
        answer = client.get(path)
        assert answer.status_code < 500, path
        assert "globex" not in answer.text or "globex" in path
        if answer.headers["content-type"].startswith("text/html"):
            assert Page(answer.text).problems == []


@given(st.text())
def test_what_is_printed_is_short_and_clean(text: str) -> None:
    for made in (printed(text), short(text)):
        assert made.isprintable() and len(made) < 700
    assert shlex.split(html.unescape(command("envelope", "show", text)))[:2] == ["envelope", "show"]


def test_every_state_has_a_sign_that_is_not_a_colour() -> None:
    assert SIGNS.keys() >= OPEN | TERMINAL
    by_tone = dict[str, set[str]]()
    for sign, tone in SIGNS.values():
        by_tone.setdefault(sign, set()).add(tone)
    assert all(len(tones) == 1 for tones in by_tone.values())


# What is said


def say(world: World, who: str, name: str, what: str, reason: str = "looked at it") -> Any:
    return world.client(who).post(f"/envelopes/{world.ids[name]}/{what}", data={"reason": reason})


def test_approving_denying_and_what_refuses(fresh: World) -> None:
    queue = fresh.client("acme").get("/approvals").text
    assert queue.count("<article") == 3 and fresh.ids["held"] in queue
    assert "formaction" not in fresh.client("reader").get("/approvals").text

    refused = say(fresh, "acme", "held", "approve", "because")
    assert refused.status_code == 403 and "this reason is not good enough" in refused.text
    assert say(fresh, "acme", "held", "approve", "   ").status_code == 422
    assert say(fresh, "reader", "held", "approve").status_code == 403
    own = say(fresh, "acme", "own", "approve")
    assert own.status_code == 403 and "Nobody decides on what they asked for themselves" in own.text
    assert anyio.run(fresh.controller.read, fresh.ids["held"]).approval is None

    approved = say(fresh, "acme", "held", "approve")
    assert approved.status_code == 200 and "Approved: its caller may send it again until" in approved.text
    record = anyio.run(fresh.controller.read, fresh.ids["held"])
    assert record.approval is not None and record.approval.data.approver == "user:dana"
    assert "Approved by user:dana: looked at it" in fresh.client("acme").get("/approvals").text

    denied = say(fresh, "acme", "held_again", "deny")
    assert denied.status_code == 200 and "it stays denied" in denied.text
    assert anyio.run(fresh.controller.read, fresh.ids["held_again"]).state == "denied"
    late = say(fresh, "acme", "held_again", "approve")
    assert late.status_code == 409 and "does not wait any more" in late.text


def test_revoking_asks_the_owner(fresh: World) -> None:
    page = fresh.client("acme").get(f"/envelopes/{fresh.ids['less']}").text
    assert f'action="/envelopes/{fresh.ids["less"]}/revoke"' in page
    said = say(fresh, "acme", "less", "revoke", "no longer wanted")
    assert said.status_code == 200 and "revoked when the owner confirms" in said.text
    assert anyio.run(fresh.controller.read, fresh.ids["less"]).revoking is not None
    assert fresh.ids["less"][-12:] in fresh.client("acme").get("/health").text
    text = fresh.client("acme").get("/").text
    assert "revoking" in text.partition("Flagged, or being revoked")[2].partition("Newest differences")[0]
    assert say(fresh, "reader", "less", "revoke").status_code == 403
    assert say(fresh, "acme", "denied", "revoke").status_code == 409


def test_a_browser_says_it_with_the_form_of_its_session_alone(fresh: World) -> None:
    browser = TestClient(fresh.app, headers={"accept": "text/html"}, base_url="http://testserver")
    signed = browser.post("/signin", data={"token": fresh.token["acme"], "to": "/approvals"})
    assert signed.status_code == 200 and "<h1>Approvals</h1>" in signed.text
    path = f"/envelopes/{fresh.ids['held']}/approve"
    assert browser.post(path, data={"reason": "x"}).status_code == 403
    assert anyio.run(fresh.controller.read, fresh.ids["held"]).approval is None
    csrf = re.search(r'name="csrf" value="([^"]+)"', signed.text)
    assert csrf is not None
    assert browser.post(path, data={"reason": "x", "csrf": csrf[1]}).status_code == 200
    assert anyio.run(fresh.controller.read, fresh.ids["held"]).approval is not None


# Replays


def test_a_replay_says_what_changes_to_each_what_they_may_see(world: World) -> None:
    path = f"/replays/{world.replay}"
    whole = world.client("all").get(path).text
    assert "globex" in whole and "Before and after" in whole and "no-gpu" in whole
    listed = world.client("all").get("/replays").text
    assert world.replay in listed
    own = world.client("acme").get(path).text
    assert "globex" not in own and "Of your tenants only" in own and "By rule" not in own and "By day" not in own
    assert world.ids["less"][-12:] in own
    assert "0</b> of 0" in world.client("nobody").get(path).text
    assert world.client("all").get("/replays/none.json").status_code == 404
    assert world.client("all").get("/replays/..%2ftokens.toml").status_code == 404


def test_what_is_no_result_is_counted_and_not_shown(world: World) -> None:
    (world.replays / "broken.json").write_text("{}")
    (world.replays / "link.json").symlink_to(world.replays / world.replay)
    text = world.client("all").get("/replays").text
    assert "1 files could not be read" in text and "link.json" not in text
    assert world.client("all").get("/replays/link.json").status_code == 404
    assert world.client("all").get("/replays/broken.json").status_code == 422
    assert "could not be read" not in world.client("acme").get("/replays").text
    (world.replays / "broken.json").unlink()
