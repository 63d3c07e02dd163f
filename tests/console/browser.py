"""The browser of the tests: the system's Chromium, or the one that Playwright brings. Without either they fail."""

from __future__ import annotations

import shutil

from playwright.sync_api import Browser, Playwright

#: Nothing of the browser's own reaches for the network.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def launched(playwright: Playwright) -> Browser:
    """A Chromium without a window."""
    return playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(FLAGS))
