"""The console of the proving ground in a real browser, over real deployments: found, understood, approved, revoked.

Everything is real: the backend is a process as `make run` starts it, its engines are children, the SDK asks for
deployments, and people sign in with the tokens that the backend printed.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backend import SOURCE, Backend, until
from kamiwaza_sdk.exceptions import APIError
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from execution_envelope.console.tokens import add_token
from proving_ground import procfs
from proving_ground.settings import EXAMPLE
from tests.console.browser import launched, violations

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Those whose lines have a page of their own to look at.
SCREENS = [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)]
Start = Callable[..., Backend]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = launched(playwright)
        yield found
        found.close()


@pytest.fixture
def backend(start: Start) -> Backend:
    return start(POLICY=str(EXAMPLE), NODE_CORES="2", NODE_MEMORY="2GiB")


@pytest.fixture
def signed_in(browser: Browser, backend: Backend) -> Iterator[Callable[..., Page]]:
    """A page of a browser of its own in which somebody has signed in, by the form."""
    contexts: list[BrowserContext] = []

    def _signed_in(who: str) -> Page:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 800}))
        return enter(contexts[-1], backend, who)

    yield _signed_in
    for context in contexts:
        context.close()


def enter(context: BrowserContext, backend: Backend, who: str) -> Page:
    page = context.new_page()
    page.goto(f"{backend.url}/console/signin")
    page.get_by_label("Token").fill(backend.token(who))
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    return page


def deploy(backend: Backend, **wishes: Any) -> Any:
    return backend.client().serving.deploy_model(repo_id=MODEL, poll_interval_seconds=0.1, timeout_seconds=60, **wishes)


def held_in_production(backend: Backend) -> dict[str, Any]:
    """What the SDK is told of a deployment that waits for an approver."""
    with pytest.raises(APIError) as caught:
        backend.client().workroom_scope("production").serving.deploy_model(repo_id=MODEL)
    found: dict[str, Any] = json.loads(str(caught.value).partition(": ")[2])
    assert found["title"] == "held"
    return found


def accessible(page: Page) -> None:
    """Nothing that axe finds, in either scheme, and no page wider than its window, down to that of a telephone."""
    for scheme, width in SCREENS:
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.set_viewport_size({"width": width, "height": 800})
        if (scheme, width) in (SCREENS[0], SCREENS[3]):
            assert violations(page) == [], page.url
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), page.url
        if folder := os.environ.get("SCREENSHOTS"):  # for somebody who wants to look at them
            name = re.sub(r"\W+", "-", page.url.partition("/console/")[2])[:60] or "overview"
            page.screenshot(path=Path(folder) / f"{name}-{scheme}-{width}.png", full_page=True)
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 800})


def shown_command(page: Page, beginning: str) -> str:
    """The command that a page shows for the same."""
    found = page.locator(".cli code").filter(has_text=beginning).first.inner_text()
    assert found.startswith(beginning)
    return found


def ran(backend: Backend, command: str, code: int = 0, *, server: str | None = None) -> str:
    """It, run as somebody would who copied it: where the database is, or by a server, with ada's token."""
    words = shlex.split(command)
    assert words[0] == "envelope"
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(SOURCE),
        "COLUMNS": "200",
        "EXECUTION_ENVELOPE_LEDGER": server or f"sqlite:///{backend.data}/envelopes.db",
        "EXECUTION_ENVELOPE_TOKEN": backend.token("ada"),
    }
    command_line = [sys.executable, "-m", "execution_envelope.cli", *words[1:]]
    found = subprocess.run(command_line, env=env, capture_output=True, text=True)
    assert found.returncode == code, found.stdout + found.stderr
    return found.stdout


def words(text: str) -> str:
    """Without line breaks, signs and columns."""
    return " ".join(text.split())


def test_less_than_asked_is_found_and_explained(
    backend: Backend, signed_in: Callable[..., Page], tmp_path: Path
) -> None:
    deploy(backend)  # one place of two is taken
    deployment = deploy(backend, starting_copies=4)
    page = signed_in("dana")
    accessible(page)
    page.get_by_role("link", name="Envelopes", exact=True).click()
    page.get_by_label("Query").fill("outcome=reduced")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("a.row")).to_have_count(1)
    expect(page.get_by_text("replicas: 1 of 4")).to_be_visible()
    assert "outcome=reduced" in shown_command(page, "envelope list")
    accessible(page)
    id = json.loads(ran(backend, f"envelope show deployment:{deployment} --json"))["envelope"]["correlation"]["id"]
    listed = ran(backend, shown_command(page, "envelope list") + " --json")
    assert [json.loads(line)["id"] for line in listed.splitlines()] == [id]

    page.locator("a.row").click()
    assert page.url.endswith(f"/envelopes/{id}")
    resources = page.get_by_role("region", name="Resources", exact=True)
    row = resources.get_by_role("row").filter(has=page.get_by_role("rowheader", name="replicas"))
    cells = [words(text) for text in row.get_by_role("cell").all_inner_texts()]
    assert [cell.split()[0] for cell in cells[1:4]] == ["4", "same", "1"]
    picture = row.get_by_role("img", name="replicas in all")
    assert "requested 4" in picture.text_content() and "granted 1" in picture.text_content()
    why = words(page.get_by_role("region", name="Why").inner_text())
    for cause in ("policy", "at most 2 replicas", "capacity", "2 replicas were allowed; 1 fit"):
        assert cause in why and cause in cells[5], cause
    timeline = page.get_by_role("region", name="Timeline", exact=True)
    types = timeline.locator("tbody th").all_inner_texts()
    assert types[0] == "sealed" and {"verdict", "admitted", "granted", "ready"} <= set(types)
    accessible(page)

    said = words(ran(backend, shown_command(page, "envelope show")))
    assert "asked 4, given 1; policy (policy): at most 2 replicas; capacity (resolver)" in said
    assert cells[5].partition(" ")[2] in said or "asked 4, given 1" in cells[5]
    explained = words(ran(backend, shown_command(page, "envelope explain")))
    for sentence in page.get_by_role("region", name="Why").locator("li").all():
        own = words(sentence.evaluate("node => node.firstChild.textContent"))
        assert own in explained, own

    # What another policy would have said, tried over what happened just now.
    policy = tmp_path / "stricter.yaml"
    policy.write_text(EXAMPLE.read_text().replace("limits: {replicas: 2}", "limits: {replicas: 1}"))
    assert policy.read_text() != EXAMPLE.read_text()
    ran(backend, f"envelope replay --policy {policy} --jobs 1 --out {backend.data}/replays/stricter.json", code=1)
    ada = signed_in("ada")
    server = ada.locator("footer code").last.inner_text().removeprefix("export EXECUTION_ENVELOPE_LEDGER=")
    assert server == f"{backend.url}/console"
    for command, said in (
        ("envelope list --where outcome=reduced", "reduced"),
        (f"envelope show {id}", "asked 4, given 1"),
    ):
        assert said in words(ran(backend, command, server=server))
    ada.get_by_role("link", name="Replays").click()
    ada.get_by_role("link", name="stricter.json").click()
    expect(ada.locator("figure.chart")).to_be_visible()
    expect(ada.get_by_text("replicas").first).to_be_visible()
    accessible(ada)


def test_a_held_deployment_is_approved_by_somebody_else(backend: Backend, signed_in: Callable[..., Page]) -> None:
    answer = held_in_production(backend)
    dana, kim = signed_in("dana"), signed_in("kim")
    dana.get_by_role("link", name="Approvals").click()
    expect(dana.get_by_role("article")).to_have_count(1)
    expect(dana.get_by_text("a deployment to production waits for an approver")).to_be_visible()
    expect(dana.get_by_text("You asked for this yourself: somebody else decides on it")).to_be_visible()
    expect(dana.get_by_role("button", name="Approve")).to_have_count(0)
    accessible(dana)
    # And not by hand either.
    path = f"{backend.url}/console/envelopes/{answer['envelope']}/approve"
    csrf = dana.locator("input[name=csrf]").first.get_attribute("value") or ""
    refused = dana.request.post(path, form={"csrf": csrf, "reason": "it is mine"})
    assert refused.status == 403 and "Nobody decides on what they asked for themselves" in refused.text()

    kim.get_by_role("link", name="Approvals").click()
    accessible(kim)
    held = kim.get_by_role("article")
    held.get_by_label("Reason").fill("the load test passed")
    held.get_by_role("button", name="Approve").click()
    expect(kim.get_by_role("status").filter(has_text="Approved")).to_be_visible()
    accessible(kim)
    kim.get_by_role("link", name="The envelope").click()
    expect(kim.get_by_text("the load test passed").first).to_be_visible()

    production = backend.client().workroom_scope("production")
    with production.request_headers({"Idempotency-Key": answer["idempotency_key"]}):
        deployment = production.serving.deploy_model(repo_id=MODEL, poll_interval_seconds=0.1, timeout_seconds=60)
    assert backend.client().serving.get_deployment_status(deployment) == "DEPLOYED"
    expect(kim.locator("#head .state").filter(has_text="granted")).to_be_visible(timeout=15_000)
    kim.goto(f"{backend.url}/console/approvals")
    expect(kim.get_by_text("Nothing waits for approval.")).to_be_visible()


def test_what_is_revoked_goes_while_one_looks(backend: Backend, signed_in: Callable[..., Page]) -> None:
    deployment = deploy(backend)
    [(pid, started)] = backend.engines()
    page = signed_in("dana")
    page.goto(f"{backend.url}/console/envelopes?q=state%3Dgranted")
    page.locator("a.row").click()
    expect(page.locator("#live")).to_have_text("live")
    watching = page.context.new_page()  # the same one, elsewhere
    watching.goto(page.url)
    expect(watching.locator("#live")).to_have_text("live")
    budgets = page.context.new_page()
    budgets.goto(f"{backend.url}/console/budgets")
    expect(budgets.get_by_role("cell", name="216 MiB", exact=True)).to_be_visible()

    page.get_by_label("Reason").fill("it leaks")
    begun = time.monotonic()
    page.get_by_role("button", name="Revoke").click()
    expect(page.get_by_role("status").filter(has_text="To be revoked: its owner is asked to stop it")).to_be_visible()
    until(lambda: not procfs.is_running(pid, started))
    gone = time.monotonic() - begun
    for one in (page, watching):  # without a reload
        expect(one.locator("#head .state").filter(has_text="revoked").first).to_be_visible(timeout=15_000)
    print(f"gone after {gone:.2f} s, seen after {time.monotonic() - begun:.2f} s")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    expect(watching.get_by_text(f"engines with pid {pid} have ended").first).to_be_visible()
    expect(watching.get_by_role("button", name="Revoke")).to_have_count(0)
    accessible(page)
    accessible(watching)
    found = backend.client().serving.get_deployment(deployment)
    assert (found.status, found.last_error_message) == ("ERROR", "revoked by user:dana: it leaks")
    budgets.reload()
    assert "216 MiB" not in budgets.get_by_role("main").inner_text()
    accessible(budgets)


def test_each_sees_what_is_theirs(backend: Backend, signed_in: Callable[..., Page]) -> None:
    deploy(backend)
    held = held_in_production(backend)["envelope"]
    lee = signed_in("lee")
    pages = ("", "envelopes", "approvals", "budgets", "accounting", "coverage", "replays", f"envelopes?q=id%3D{held}")
    for path in pages:
        lee.goto(f"{backend.url}/console/{path}")
        text = lee.get_by_role("main").inner_text()
        assert "acme" not in text and "dana" not in text and MODEL not in text, path
        assert lee.locator("a.row").count() == 0 and lee.get_by_role("article").count() == 0
        if path in ("budgets", "envelopes"):
            accessible(lee)
    answer = lee.goto(f"{backend.url}/console/envelopes/{held}")
    assert answer is not None and answer.status == 404
    accessible(lee)
    lee.goto(f"{backend.url}/console/budgets?account=memory/acme")
    assert "MiB" not in lee.get_by_role("main").inner_text()

    ada = signed_in("ada")
    for path in ("envelopes", "approvals", "budgets", "accounting", "coverage", "health", f"envelopes/{held}"):
        ada.goto(f"{backend.url}/console/{path}")
        assert ada.get_by_role("button", name=re.compile("Approve|Deny|Revoke")).count() == 0
        accessible(ada)
    expect(ada.get_by_text("user:dana").first).to_be_visible()
    ada.goto(f"{backend.url}/console/envelopes?q=kind%3Dmaintenance")
    assert ada.locator("a.row").count()  # the backend's own, which belong to no tenant
    csrf = ada.locator("form input[name=csrf]").first.get_attribute("value") or ""
    live = json.loads(ran(backend, "envelope list --where state=granted --json").splitlines()[0])["id"]
    for id, what in ((held, "approve"), (held, "deny"), (live, "revoke")):
        path = f"{backend.url}/console/envelopes/{id}/{what}"
        assert ada.request.post(path, form={"csrf": csrf, "reason": "by hand"}).status == 403
    assert backend.engines()


@pytest.mark.parametrize("server", ["proving ground", "envelope serve"])
def test_it_waits_for_nobody_who_looks(start: Start, browser: Browser, tmp_path: Path, server: str) -> None:
    backend = start(POLICY=str(EXAMPLE))
    context = browser.new_context()
    process: Any = backend.process
    try:
        if server == "proving ground":
            page = enter(context, backend, "dana")
        else:
            token = add_token(tmp_path / "tokens", subject="user:dana", tenants="*", roles=["reader"], expires=None)
            ledger = f"sqlite:///{backend.data}/envelopes.db"
            command = ["serve", "--ledger", ledger, "--port", "0", "--tokens", str(tmp_path / "tokens")]
            process = subprocess.Popen(
                [sys.executable, "-m", "execution_envelope.cli", *command],
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE)},
                stderr=subprocess.PIPE,
                text=True,
            )
            assert process.stderr is not None
            url = re.search(r"http://\S+/", process.stderr.readline())
            assert url is not None
            page = context.new_page()
            page.goto(f"{url[0]}signin")
            page.get_by_label("Token").fill(token)
            page.get_by_role("button", name="Sign in").click()
        expect(page.locator("#live")).to_have_text("live")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        said = (tmp_path / "data.stderr").read_text() if process is backend.process else process.stderr.read()
        assert "Traceback" not in said and "Cancel" not in said, said  # as uvicorn says when it waited in vain
    finally:
        if process is not backend.process:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
        context.close()
