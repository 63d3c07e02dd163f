"""The console in a real browser: found, understood, decided; by keyboard, without scripts, in schemes and widths."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.console.browser import launched, violations
from tests.console.test_pages import paths
from tests.console.world import World, run

#: A folder in which every page is kept as a picture, to be looked at; none where it is not set.
SCREENSHOTS = os.environ.get("SCREENSHOTS")


class Served:
    """The world, served on loopback."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder)
        self._server = uvicorn.Server(
            uvicorn.Config(self.world.app, port=0, log_level="warning", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)
        self.base = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        """Let the server go."""
        self._server.should_exit = True
        self._thread.join()

    def close(self) -> None:
        self.stop()
        self.world.close()

    def signed_in(self, context: BrowserContext, who: str, to: str = "/") -> Page:
        """A page of a browser in which this one has signed in."""
        page = context.new_page()
        page.goto(f"{self.base}{to}")
        page.get_by_role("link", name="Sign in").click()
        page.get_by_label("Token").fill(self.world.token[who])
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("button", name="Sign out")).to_be_visible()
        return page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = launched(playwright)
        yield found
        found.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)])
def test_every_page_is_accessible_and_fits(browser: Browser, served: Served, scheme: Any, width: int) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    page, errors = served.signed_in(context, "all"), list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if "Content Security Policy" in said.text else None)
    # Colours and widths do not depend on each other: all pages in two of the four, some in each.
    every = [*paths(served.world), "/signin", "/envelopes/nope"]
    for number, path in enumerate(every if (scheme, width) in (("light", 1280), ("dark", 390)) else every[:9]):
        page.goto(served.base + path)
        for details in page.locator("details").all():
            details.locator("summary").click()
        assert violations(page) == [], path
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), path
        if SCREENSHOTS:
            page.screenshot(path=f"{SCREENSHOTS}/{number:02}-{scheme}-{width}.png", full_page=True)
    assert errors == []
    background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, background[4:-1].split(", "))) > 380) == (scheme == "light")
    context.close()


def test_less_than_asked_is_found_and_understood_and_a_held_one_approved(browser: Browser, tmp_path: Path) -> None:
    served = Served(tmp_path)
    try:
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        page = served.signed_in(context, "acme", to="/envelopes?q=outcome%3Dreduced%20and%20kind%3Dmodel.deploy")
        expect(page.get_by_role("heading", name="Envelopes")).to_be_visible()  # whereto one came
        expect(page.get_by_text("▼ gpu: 1 of 2")).to_be_visible()
        page.get_by_role("link", name="serving.deploy_model").click()
        why = page.get_by_role("region", name="Why")
        expect(why.get_by_text("one GPU was free").first).to_be_visible()
        expect(page.get_by_role("img", name="gpu in all")).to_be_visible()
        why.get_by_role("link", name="event").first.click()
        assert "#event-" in page.url

        page.get_by_role("link", name="Approvals").click()
        queue = page.get_by_role("article").filter(has_text="omar")
        queue.get_by_label("Reason").fill("the launch is tomorrow")
        queue.get_by_role("button", name="Approve").click()
        expect(page.get_by_role("status").filter(has_text="Approved")).to_be_visible()
        page.get_by_role("link", name="The envelope").click()
        expect(page.get_by_text("the launch is tomorrow").first).to_be_visible()
        record = run(served.world.controller.read, served.world.ids["held"])
        assert record.approval is not None and record.approval.data.approver == "user:dana"

        page.goto(f"{served.base}/envelopes/{served.world.ids['less']}")
        page.get_by_label("Reason").fill("the node goes away")
        page.get_by_role("button", name="Revoke").click()
        expect(page.get_by_role("status").filter(has_text="when the owner confirms")).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        page.goto(f"{served.base}/approvals")
        expect(page.get_by_role("heading", name="Sign in first")).to_be_visible()
        context.close()
    finally:
        served.close()


def test_the_keyboard_is_enough(browser: Browser, served: Served) -> None:
    context = browser.new_context()
    page = served.signed_in(context, "reader", to="/envelopes")
    page.goto(f"{served.base}/envelopes")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("/")
    expect(page.get_by_label("Query")).to_be_focused()
    page.keyboard.type("state=granted")
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="agents.run")).to_be_visible()
    page.keyboard.press("j")
    page.keyboard.press("j")
    rows = page.locator("a.row")
    expect(rows.nth(1)).to_be_focused()
    page.keyboard.press("k")
    expect(rows.nth(0)).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("agents.run")
    context.close()


def test_it_works_without_scripts(browser: Browser, tmp_path: Path) -> None:
    served = Served(tmp_path)
    try:
        context = browser.new_context(java_script_enabled=False)
        page = served.signed_in(context, "acme", to="/approvals")
        assert page.get_by_role("button", name="Copy the command").count() == 0
        queue = page.get_by_role("article").filter(has_text="ines")
        queue.get_by_label("Reason").fill("not now")
        queue.get_by_role("button", name="Deny").click()
        assert "it stays denied" in page.content()
        page.goto(f"{served.base}/envelopes")
        page.get_by_label("state").select_option("denied")
        page.get_by_role("button", name="Show").click()
        assert served.world.ids["held_again"][-12:] in page.content()
        page.get_by_role("link", name="Reload").click()
        assert served.world.ids["held_again"][-12:] in page.content()
        context.close()
    finally:
        served.close()


def test_a_page_follows_what_happens_and_says_when_it_does_not(browser: Browser, tmp_path: Path) -> None:
    served = Served(tmp_path)
    world, stopped = served.world, False
    try:
        context = browser.new_context()
        page = served.signed_in(context, "acme", to="/envelopes?q=state%3Dadmitted")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        status = page.locator("#live")
        expect(status).to_have_text("live")
        page.wait_for_timeout(3500)  # the first reading, that nothing is missed between page and stream
        page.get_by_label("Query").focus()
        asked.clear()
        for number in range(5):
            run(world._begin, f"new-{number}")
        expect(page.get_by_role("link", name="serving.deploy_model")).to_have_count(5, timeout=15_000)
        expect(page.get_by_label("Query")).to_be_focused()
        read = [url for url in asked if "/live" not in url]
        assert 1 <= len(read) <= 3  # five changes, not five readings
        queue = context.new_page()
        queue.goto(f"{served.base}/approvals")
        note = queue.get_by_text("load the queue again")
        expect(note).to_be_hidden()
        queue.wait_for_timeout(1500)
        run(lambda: world._hold("late"))
        expect(note).to_be_visible(timeout=15_000)  # a form that somebody writes in is never replaced
        served.stop()
        stopped = True
        expect(status).to_have_text("not live: reload to see what is new", timeout=30_000)
        context.close()
    finally:
        if not stopped:
            served.stop()
        world.close()
