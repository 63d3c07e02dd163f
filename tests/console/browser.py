"""The browser of the tests: the system's Chromium, or the one that Playwright brings. Without either they fail."""

from __future__ import annotations

import shutil

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Playwright

#: Nothing of the browser's own reaches for the network.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def launched(playwright: Playwright) -> Browser:
    """A Chromium without a window."""
    return playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(FLAGS))


def violations(page: Page) -> list[tuple[str, list[str]]]:
    """What axe finds that keeps somebody out: which rule, and where."""
    found = Axe().run(page).response["violations"]
    return [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in found]
