"""Pages that are followed from their beginning to their end, as written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.postgres import Server
from tests.shown import ROOT, Page, fits

FOLLOWED = sorted(path for path in (ROOT / "docs").rglob("*.md") if "<!-- runs -->" in path.read_text())


DATABASE = "postgresql://envelope@localhost/envelopes"
SQLITE = [path for path in FOLLOWED if DATABASE not in path.read_text()]


@pytest.mark.parametrize("path", SQLITE, ids=lambda path: path.stem)
def test_a_page_runs_as_written(path: Path, tmp_path: Path) -> None:
    follow(path.read_text(), tmp_path)


def test_the_page_of_postgresql_runs_as_written(tmp_path: Path, postgres: Server) -> None:
    (page,) = [path for path in FOLLOWED if path not in SQLITE]
    follow(page.read_text().replace(DATABASE, postgres.schema()), tmp_path)


def follow(text: str, folder: Path) -> None:
    for command, expected, printed in Page(text, folder).follow():
        assert fits(expected, printed), f"$ {command}\n{printed}\nexpected:\n{expected}"


def test_the_tutorial_is_followed() -> None:
    assert ROOT / "docs" / "tutorial.md" in FOLLOWED


def test_what_differs_is_found() -> None:
    assert fits("a ... c\n", "a b  \nx c") and fits("", "\n")
    assert not fits("a ... c", "a b d") and not fits("", "x") and not fits("a.c", "abc")
