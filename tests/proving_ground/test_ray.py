"""Engines on a Ray cluster, where it is not as on one machine. What is the same is tested over both hosts, by the
fixtures `hosted` and `start_on`.

The cluster is real: two raylets on this machine, and more where a test adds them. The GPUs are logical ones: there are
none here, and Ray counts what a node says it has.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backend import SOURCE, Backend, until
from ray_nodes import MIB, RayNodes
from test_record import becomes, cpu, deploy, gpus, show, sound, state, status, stop

from proving_ground import procfs
from proving_ground.app import open_cluster
from proving_ground.settings import Settings

Start = Callable[..., Backend]


@pytest.fixture
def gpu_node(ray_nodes: RayNodes) -> Iterator[str]:
    """A node that says it has a GPU."""
    node = ray_nodes.add(num_cpus=4, num_gpus=1)
    yield node
    ray_nodes.remove(node)


def parent(pid: int) -> int:
    """Of an engine: Ray's worker, which is the actor."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_requested_reserved_and_enforced_are_three_statements(shared_on_ray: Backend, ray_nodes: RayNodes) -> None:
    real = len(os.sched_getaffinity(0))
    deployment = deploy(shared_on_ray, inferenceResources=cpu("256Mi", cores=str(real + 1)))
    becomes(shared_on_ray, deployment, "DEPLOYED")
    shown = show(shared_on_ray, deployment)
    granted = [event for event in shown.data["timeline"] if event["type"] == "granted"]
    assert [(event["by"], event["data"]["basis"]) for event in granted] == [
        ("ray", "reserved"),
        ("resolver", "enforced"),
    ]
    reserved, enforced = (event["data"] for event in granted)

    # Ray counts cores, and the kernel has real ones.
    assert shown.rows["cpu"]["requested"]["amount"] == reserved["resources"]["cpu"]["amount"] == (real + 1) * 1000
    assert enforced["resources"]["cpu"]["amount"] == shown.rows["cpu"]["granted"]["total"] == real * 1000
    assert [reason["cause"] for reason in shown.rows["cpu"]["reasons"]] == ["balancing"]

    assert reserved["route"]["node"] in ray_nodes.nodes
    assert reserved["route"]["bundle"] == f"{real + 1} CPU, {256 * MIB} bytes of memory; reserved, which limits nothing"
    assert reserved["route"].items() <= enforced["route"].items() and "pid" not in reserved["route"]

    # The kernel holds the engine to it, and not the actor, which Ray granted as much.
    pid = int(enforced["route"]["pid"])
    actor = parent(pid)
    assert (procfs.data_limit(pid), procfs.data_limit(actor)) == (256 * MIB, None)
    assert procfs.read(actor).data > 256 * MIB
    stop(shared_on_ray, deployment)
    assert state(shared_on_ray, deployment, "completed").rows["memory"]["used"]["how"] == "measured"


def test_replicas_that_do_not_fit_on_one_node_are_on_two(shared_on_ray: Backend, ray_nodes: RayNodes) -> None:
    deployment = deploy(shared_on_ray, starting_copies=3, inferenceResources=cpu("600Mi"))
    becomes(shared_on_ray, deployment, "DEPLOYED")
    shown = show(shared_on_ray, deployment)
    parts = shown.data["parts"]
    assert len({part["route"]["placement_group"] for part in parts}) == 1
    assert {part["route"]["node"] for part in parts} == set(ray_nodes.nodes)
    # Three of them fit as something smaller: copies come before memory.
    assert (shown.rows["replicas"]["outcome"], shown.rows["memory"]["outcome"]) == ("equal", "reduced")
    assert shown.rows["memory"]["granted"]["total"] == 3 * 512 * MIB
    said = "600 MiB per replica were wanted; 2048 MiB are free for 3 replicas on the 2 nodes of Ray"
    assert [reason["text"] for reason in shown.rows["memory"]["reasons"]] == [said]
    stop(shared_on_ray, deployment)


def test_what_ray_never_places_is_attempts_and_then_a_rejection_in_its_words(
    shared_on_ray: Backend, ray_nodes: RayNodes
) -> None:
    copies = deploy(shared_on_ray, min_copies=9, inferenceResources=cpu("200Mi"))
    floor = deploy(shared_on_ray, gpu_floor=1)
    for deployment, bundle, has in (
        (copies, "9 bundles of 1 CPU, 200 MiB memory", "4 of 9 bundles fit: 4 of 4 CPU are free"),
        (floor, "1 bundles of 1 CPU, 216 MiB memory, 1 GPU", "0 of 1 bundles fit: 0 of 0 GPU are free"),
    ):
        shown = state(shared_on_ray, deployment, "rejected")
        (attempts,) = shown.data["attempts"]
        assert attempts["times"] >= 2
        assert {found["name"].split()[0] for found in attempts["candidates"]} == set(ray_nodes.nodes)
        for found in attempts["candidates"]:
            assert found["outcome"] == "refused" and found["reason"].startswith(has)
        said = rf"Ray says PENDING, (INFEASIBLE|NO_RESOURCES) of placement group \w+: {bundle}"
        assert re.fullmatch(said, attempts["reason"])
        assert shown.last("rejected")["code"] == "NOT_PLACED"
        assert re.fullmatch(rf"not placed within 8 s; {said}", shown.last("rejected")["message"])
        assert "granted" not in shown.events
    until(lambda: ray_nodes.groups() == 0)


def test_what_waits_is_placed_on_a_node_that_comes_and_fails_with_one_that_goes(
    start: Start, ray_nodes: RayNodes
) -> None:
    backend = start(CLUSTER="ray", RAY_ADDRESS=ray_nodes.address)
    waiting, deployment = (deploy(backend, gpu_floor=1, inferenceResources=gpus(1)) for _ in range(2))
    until(lambda: all(show(backend, one).data["attempts"] for one in (waiting, deployment)))
    stop(backend, waiting)
    assert state(backend, waiting, "cancelled").data["held"] == {}
    node = ray_nodes.add(num_cpus=1, num_gpus=1)
    becomes(backend, deployment, "DEPLOYED")
    shown = show(backend, deployment)
    held = {part["part"]: part for part in shown.data["parts"]}
    # Nothing but Ray's count stands behind a GPU, also when the rest is enforced.
    assert {name: (part["basis"], part["by"]) for name, part in held.items()} == {
        "replica-0": ("enforced", "resolver"),
        "replica-0/gpu": ("reserved", "ray"),
    }
    assert shown.rows["gpu"]["outcome"] == "equal" and "gpu" not in held["replica-0"]["resources"]
    assert shown.rows["gpu_memory"]["outcome"] == "withheld"
    assert {part["route"]["node"] for part in held.values()} == {node}
    ((pid, started),) = backend.engines()

    ray_nodes.remove(node)
    shown = state(backend, deployment, "failed")
    assert shown.last("failed")["code"] == "NODE_LOST"
    assert f"Ray node {node} is dead, and the engine with it" in shown.last("failed")["message"]
    assert not procfs.is_running(pid, started)
    assert shown.data["held"] == {}
    assert shown.events.count("released") == 2
    assert shown.rows["memory"]["used"]["how"] == "estimated" and shown.rows["memory"]["used"]["amount"] > 100 * MIB
    assert status(backend, deployment) == "FAILED" and sound(backend)
    until(lambda: ray_nodes.groups() == 0)


def test_an_engine_ends_with_its_actor_and_its_deployment_fails(shared_on_ray: Backend, ray_nodes: RayNodes) -> None:
    deployment = deploy(shared_on_ray, context=512)
    becomes(shared_on_ray, deployment, "DEPLOYED")
    ((pid, started),) = shared_on_ray.engines()
    os.kill(parent(pid), signal.SIGKILL)
    shown = state(shared_on_ray, deployment, "failed")
    assert shown.last("failed")["code"] == "ENGINE_LOST"
    assert re.search(r"the actor that ran the engine on Ray node \w+ is dead: ", shown.last("failed")["message"])
    assert not procfs.is_running(pid, started)
    assert shown.data["held"] == {} and ray_nodes.groups() == 0


def test_shares_of_logical_gpus_that_add_up_to_more_than_one(shared_on_ray: Backend, gpu_node: str) -> None:
    fitting = deploy(shared_on_ray, starting_copies=2, gpu_allocation=0.4, context=512)
    becomes(shared_on_ray, fitting, "DEPLOYED")
    rows = show(shared_on_ray, fitting).rows
    assert (rows["gpu_allocation"]["outcome"], rows["gpu"]["granted"]["total"]) == ("equal", 800)
    assert "shares of 0.4 for 2 replicas add up to 0.8 GPUs" in rows["gpu"]["in_words"]
    stop(shared_on_ray, fitting)

    beyond = deploy(shared_on_ray, starting_copies=3, gpu_allocation=0.4, context=512)
    becomes(shared_on_ray, beyond, "DEPLOYED")
    shown = show(shared_on_ray, beyond)
    assert shown.rows["gpu_allocation"]["outcome"] == "substituted"
    said = (
        "0.4 of a GPU for each of 3 replicas are 1.2 GPUs; 1 are free on the 3 nodes of Ray, so 0.333 is given to each"
    )
    assert [reason["text"] for reason in shown.rows["gpu_allocation"]["reasons"]] == [said]
    assert shown.rows["gpu"]["granted"]["total"] == 999
    assert {part["basis"] for part in shown.data["parts"] if part["part"].endswith("/gpu")} == {"reserved"}
    stop(shared_on_ray, beyond)
    assert state(shared_on_ray, beyond, "completed").data["held"] == {}


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"CLUSTER": "slurm"}, "expected local or ray, got `slurm` - at CLUSTER"),
        ({"CLUSTER": "ray", "KEEP_ENGINES": "1"}, "where engines end with their backend, got 1 - at KEEP_ENGINES"),
        ({"CLUSTER": "ray", "RAY_ADDRESS": "ray://head:10001"}, "got `ray://head:10001` - at RAY_ADDRESS"),
        ({"CLUSTER": "ray", "PLACEMENT_SECONDS": "0"}, "at PLACEMENT_SECONDS"),
    ],
)
def test_settings_that_cannot_be_are_named(env: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Settings.from_env(env)


def test_ray_is_imported_where_it_is_chosen_and_missed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, proving_ground.app; print('ray' in sys.modules)"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("False", "")
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "proving_ground.ray_cluster", raising=False)
    with pytest.raises(ValueError, match=re.escape("pip install 'execution-envelope[ray]' - at CLUSTER")):
        open_cluster(Settings.from_env({"CLUSTER": "ray"}))


def test_no_cluster_at_the_address_ends_the_start_and_says_so(start: Start, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with"):
        start(CLUSTER="ray", RAY_ADDRESS="127.0.0.1:9")
    assert "no Ray cluster answers at `127.0.0.1:9`" in (tmp_path / "data.stderr").read_text()
