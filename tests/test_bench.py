"""The measurements run, and say what they found in one shape. Nothing here looks at a time."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import table
from bench.__main__ import MEASURES, main
from bench.table import GOALS, PAGE, RESULTS

ROOT = Path(__file__).parent.parent
#: What starts servers of its own takes longer than a smoke test should: for a soak.
SLOW = {name for name in GOALS if name.startswith(("http_", "inference_")) or "postgres" in name}
QUICK = [name for name in GOALS if name not in SLOW or "SOAK" in os.environ]


@pytest.mark.parametrize("module", sorted(path.stem for path in (ROOT / "bench").glob("*.py")))
def test_every_module_is_one_that_can_be_imported(module):
    importlib.import_module(f"bench.{module}")


def test_every_row_is_measured_by_one_measurement():
    assert sorted(name for rows in MEASURES for name in rows) == sorted(GOALS)


def test_the_quick_scale_of_the_rows_runs_and_writes_its_results(tmp_path):
    output = tmp_path / "results.json"
    ran = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--rows", ",".join(QUICK), "--output", str(output)],
        cwd=ROOT,
        env={"BENCH_DATA": str(tmp_path / "data"), "PATH": "/usr/bin:/bin", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    kept = json.loads(output.read_text())
    assert kept["scale"] == "quick"
    check_machine(kept["machine"])
    assert [row["name"] for row in kept["rows"]] == QUICK
    for row in kept["rows"]:
        check_row(row)
        assert row["name"] in ran.stdout
    assert list((tmp_path / "data").iterdir()) == [], "expected nothing to be left behind"


def check_machine(machine):
    assert {
        "cpu",
        "cores",
        "memory",
        "kernel",
        "python",
        "sqlite",
        "postgres",
        "filesystem",
        "fsync_per_second",
    } == set(machine)
    assert machine["fsync_per_second"] > 0


def check_row(row):
    goal = GOALS[row["name"]]
    assert set(row) == {"name", "ours", "peer", "ratio", "unit", "better", "must", "aim", "met", "more"}
    assert (row["unit"], row["better"], row["must"], row["aim"]) == (goal.unit, goal.better, goal.must, goal.aim)
    assert row["ours"] > 0
    assert (row["peer"] is None) == (row["ratio"] is None) == (goal.peer is None)
    assert row["met"] == goal.met(row["ours"] if row["ratio"] is None else row["ratio"])


def test_what_a_goal_takes_for_met():
    less, more = GOALS["seal"], GOALS["growth"]
    assert [less.met(value) for value in (1.3, 1.31, 2.0, 2.01)] == ["aim", "must", "must", "no"]
    assert [more.met(value) for value in (0.98, 0.97, 0.9, 0.89)] == ["aim", "must", "must", "no"]


def test_some_rows_measured_again_take_the_place_of_theirs_only(tmp_path):
    path = tmp_path / "results.json"
    machine = {"cpu": "x", "cores": 2, "memory": "1 GiB", "filesystem": "ext4"}

    def ran(on, *rows):
        table.save(table.Results("2026-05-01", "full", on, rows), path)
        return [(row.name, row.ours) for row in table.load(path).rows]

    assert ran(machine, table.row("verify", 5, 10), table.row("seal", 2, 1)) == [("seal", 2), ("verify", 5)]
    assert ran(machine, table.row("verify", 7, 10)) == [("seal", 2), ("verify", 7)]
    # Rows of two machines do not stand in one table.
    assert ran({**machine, "cores": 8}, table.row("verify", 9, 10)) == [("verify", 9)]


def test_an_unknown_row_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        main(["--rows", "seal,nothing"])
    assert "got `nothing`" in capsys.readouterr().err


def test_the_page_shows_the_committed_results():
    results = table.load()
    check_machine(results.machine)
    for row in json.loads(RESULTS.read_text())["rows"]:
        check_row(row)
    assert PAGE.read_text() == table.page(results, PAGE.read_text()), "run `make bench-docs`"


def test_the_page_says_what_each_row_means():
    text = PAGE.read_text()
    assert [name for name in GOALS if f"\n### `{name}`" not in text] == []
