"""The guided tour, as anybody runs it: against a running backend, with the policy that people copy."""

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import Start

from proving_ground.settings import EXAMPLE

KINDS = ("agent.run", "data.move", "evaluation", "inference", "model.deploy")


def tour(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "proving_ground.tour", *words]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)


def test_all_five_kinds_and_what_they_come_to(start: Start) -> None:
    backend = start(POLICY=str(EXAMPLE), NODE_CORES="2")
    done = tour("--url", backend.url, "--data", str(backend.data))
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    # Narrowed by policy, and kept apart from what was asked.
    assert "replicas 3, 2, -" in shown
    assert re.search(r"4 x chat\.completions .*user:dana > evaluation:", shown)
    assert re.search(r"chat\.completions .*user:dana > agent:", shown)
    assert shown.count("0 open") == 3
    totals = shown[shown.index("by kind") :]
    for kind in KINDS:
        assert f" {kind} " in totals
    assert re.search(r"samples 4 4 4", totals) and re.search(r"rows 50 50 \+ 1 unlimited 550", totals)
    assert not backend.engines()


def test_what_policy_refuses_is_said_and_the_rest_goes_on(start: Start) -> None:
    backend = start(POLICY=str(Path(__file__).parent / "refusing.yaml"), NODE_CORES="2")
    done = tour("--url", backend.url, "--data", str(backend.data))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    shown = " ".join(done.stdout.split())
    # Of stages: a call of the agent may be refused as well, its model decides how many it wants.
    assert len(re.findall(r"(?m)^ +refused: ", done.stdout)) == 2
    assert "nobody evaluates" in shown and "nobody moves data" in shown
    # The deployment with its answers, and the agent's run.
    assert "$ envelope show --tree deployment:" in shown and "$ envelope show --tree agent:" in shown
    assert "--tree evaluation:" not in shown and shown.count("0 open") == 2
    totals = shown[shown.index("by kind") :]
    for kind in KINDS:
        assert f" {kind} " in totals
    assert not backend.engines()


def test_without_a_deployment_what_needs_one_is_left_out(start: Start) -> None:
    policy = Path(__file__).parent / "refusing.yaml"
    backend = start(POLICY=str(policy), NODE_MEMORY="1MiB")
    done = tour("--url", backend.url, "--data", str(backend.data))
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert len(re.findall(r"(?m)^ +refused: ", done.stdout)) == 2 and shown.count(": there is no deployment") == 3
    assert "$ envelope totals" in shown


def test_without_a_backend_it_says_what_it_needs(tmp_path: Path) -> None:
    done = tour("--url", "http://127.0.0.1:1", "--data", str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("Error: expected the backend of `make run` at")
    assert len(done.stderr.splitlines()) == 1
