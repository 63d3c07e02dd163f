"""The placement brain, as a table: an ask and a node on the left, what comes of it on the right."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proving_ground.catalog import SMOLLM2_NEED, CatalogModel
from proving_ground.node import Node, NodeFree, NodesFree
from proving_ground.quantities import MIB
from proving_ground.resolver import CONTEXT_STEP, LEAST_CONTEXT, NoRoom, Placement, Unsatisfiable, effective, plan
from proving_ground.wanted import Limits, Wanted

MODEL = CatalogModel("org/small", Path("small.gguf"), "0" * 64, 8192, SMOLLM2_NEED)

# ask: replicas/min, cpu (m), memory (MiB), context, gpu, `f` GPU floor, `alt`, `cpu!` force_cpu, `m` minutes; - is not
#   asked; with `<` what policy allows at most
# node: free of total cores, free of total MiB
# result: replicas x MiB, cores, context, minutes where it ends, then the differences as key:cause;
#   or no-room / never with the reason
TABLE = """
ask                                 | node            | result
-                                   | 2/2 4096/4096   | 1 x 216 1 2048 cpu:default context:default memory:estimate
3                                   | 8/8 4096/4096   | 3 x 216 1 2048 cpu:default context:default memory:estimate
cpu=1000 mem=216 ctx=2048           | 2/2 4096/4096   | 1 x 216 1 2048
cpu=500 mem=216 ctx=2048            | 2/2 4096/4096   | 1 x 216 1 2048 cpu:policy
cpu=2000 ctx=2048                   | 2/2 4096/4096   | 1 x 224 2 2048 memory:estimate
cpu=4000 ctx=2048                   | 2/2 4096/4096   | 1 x 224 2 2048 memory:estimate cpu:capacity
cpu=1000 ctx=8192                   | 2/2 4096/4096   | 1 x 360 1 8192 memory:estimate
cpu=1000 ctx=9000                   | 2/2 4096/4096   | 1 x 360 1 8192 context:unsupported memory:estimate
cpu=1000 ctx=1000                   | 2/2 4096/4096   | 1 x 186 1 768 context:policy memory:estimate
cpu=1000 ctx=100                    | 2/2 4096/4096   | 1 x 180 1 512 context:policy memory:estimate
cpu=1000 mem=200 ctx=2048           | 2/2 4096/4096   | 1 x 200 1 1280 context:capacity
cpu=1000 mem=100 ctx=512            | 2/2 4096/4096   | 1 x 180 1 512 memory:estimate
cpu=1000 mem=1024 ctx=512           | 2/2 4096/4096   | 1 x 1024 1 512
cpu=1000 mem=9000 ctx=512           | 2/2 4096/4096   | 1 x 4096 1 512 memory:capacity
cpu=1000 ctx=2048                   | 2/2 200/4096    | 1 x 198 1 1280 memory:estimate memory:capacity context:capacity
2 cpu=1000 ctx=2048                 | 2/2 400/4096    | 2 x 198 1 1280 memory:estimate memory:capacity context:capacity
2 cpu=1000 ctx=2048                 | 2/2 300/4096    | 1 x 216 1 2048 memory:estimate replicas:capacity
4 cpu=1000 ctx=2048                 | 2/2 4096/4096   | 2 x 216 1 2048 memory:estimate replicas:capacity
2 cpu=2000 ctx=2048                 | 2/2 4096/4096   | 2 x 216 1 2048 memory:estimate cpu:capacity
cpu=2000 mem=180 ctx=512            | 2/2 4096/4096   | 1 x 180 1 512 cpu:capacity
-                                   | 1/2 170/4096    | no-room memory 180 170
-                                   | 0/2 4096/4096   | no-room cpu 1 0
3/3                                 | 2/4 4096/4096   | no-room cpu 3 2
3/2                                 | 2/4 300/4096    | no-room memory 360 300
3/3                                 | 2/2 4096/4096   | never NODE_TOO_SMALL
-                                   | 2/2 100/100     | never NODE_TOO_SMALL
gpu=1 f=1                           | 2/2 4096/4096   | never GPU_FLOOR
f=1                                 | 2/2 4096/4096   | never GPU_FLOOR
gpu=8 cpu=1000 mem=180 ctx=512      | 2/2 4096/4096   | 1 x 180 1 512 gpu:unsupported gpu_memory:unsupported
gpu=1 cpu=1000 ctx=512 alt          | 2/2 4096/4096   | 1 x 180 1 512 memory:estimate gpu:fallback gpu_memory:fallback
gpu=1 cpu=1000 ctx=512 cpu!         | 2/2 4096/4096   | 1 x 180 1 512 memory:estimate gpu:policy gpu_memory:policy
arch=arm64 cpu=1000 mem=180 ctx=512 | 2/2 4096/4096   | 1 x 180 1 512 architecture:unsupported
conc=4 cpu=1000 mem=180 ctx=512     | 2/2 4096/4096   | 1 x 180 1 512 concurrency:unsupported
4 cpu=1000 mem=180 ctx=512          | 8/8:2 4096/4096 | 4 x 180 1 512 cpu:balancing
4 cpu=1000 mem=180 ctx=512 <n=2     | 8/8 4096/4096   | 2 x 180 1 512
4 cpu=1000 mem=180 ctx=512 <n=2     | 1/8 4096/4096   | 1 x 180 1 512 replicas:capacity
4/3 cpu=1000 mem=180 ctx=512 <n=2   | 8/8 4096/4096   | never LIMIT_BELOW_FLOOR
cpu=1000 mem=180 ctx=512 <n=0       | 8/8 4096/4096   | never LIMIT_BELOW_FLOOR
cpu=1000 mem=400 ctx=512 <mem=300   | 8/8 4096/4096   | 1 x 300 1 512
cpu=1000 ctx=512 <mem=179           | 8/8 4096/4096   | never LIMIT_BELOW_FLOOR
4 cpu=1000 mem=180 ctx=512 <mem=400 | 8/8 4096/4096   | 2 x 180 1 512 replicas:policy
2 cpu=1000 mem=300 ctx=512 <mem=401 | 8/8 4096/4096   | 2 x 200 1 512 memory:policy
cpu=1000 ctx=2048 <mem=200          | 8/8 4096/4096   | 1 x 198 1 1280 memory:estimate memory:policy context:policy
2 cpu=2000 mem=200 ctx=512 <cpu=3000 | 8/8 4096/4096  | 2 x 200 1 512 cpu:policy
2 cpu=2000 mem=200 ctx=512 <cpu=2000 | 8/8 4096/4096  | 2 x 200 1 512
cpu=1000 ctx=512 <cpu=999           | 8/8 4096/4096   | never LIMIT_BELOW_FLOOR
cpu=1000 mem=300 ctx=2048 <ctx=1024 | 8/8 4096/4096   | 1 x 300 1 1024
cpu=1000 mem=300 ctx=2048 <ctx=1000 | 8/8 4096/4096   | 1 x 300 1 768 context:policy
cpu=1000 mem=300 <ctx=1024          | 8/8 4096/4096   | 1 x 300 1 1024 context:default
cpu=1000 ctx=512 <ctx=100           | 8/8 4096/4096   | never LIMIT_BELOW_FLOOR
cpu=1000 mem=180 ctx=512 <ms=90000  | 8/8 4096/4096   | 1 x 180 1 512 for 1 duration:policy
cpu=1000 mem=180 ctx=512 m=2 <ms=90000 | 8/8 4096/4096 | 1 x 180 1 512 for 1 duration:policy
cpu=1000 mem=180 ctx=512 m=2 <ms=60000 | 8/8 4096/4096 | 1 x 180 1 512 for 1
cpu=1000 mem=180 ctx=512 m=1 <ms=60000 | 8/8 4096/4096 | 1 x 180 1 512 for 1
cpu=1000 ctx=512 <ms=59999          | 8/8 4096/4096   | never LIMIT_BELOW_FLOOR
4 conc=4 cpu=1000 mem=180 ctx=512 <conc=2 | 8/8 4096/4096 | 2 x 180 1 512 replicas:policy concurrency:unsupported
cpu=1000 ctx=512 <forbidden         | 8/8 4096/4096   | never NOT_ALLOWED
"""


def _ask(words: list[str]) -> Wanted:
    numbers = {
        "cpu": "cpu",
        "ctx": "context",
        "gpu": "gpu",
        "f": "gpu_floor",
        "share": "gpu_share",
        "conc": "concurrency",
        "m": "minutes",
    }
    limited = {
        "n": "replicas",
        "cpu": "cpu",
        "mem": "memory",
        "ctx": "context",
        "ms": "duration",
        "conc": "concurrency",
    }
    wanted, limits = Wanted(), Limits()
    for word in words:
        key, _, value = word.partition("=")
        if word == "<forbidden":
            limits = Limits(forbidden="not here")
            continue
        if word.startswith("<"):
            limits = replace(limits, **{limited[key[1:]]: int(value) * (MIB if key == "<mem" else 1)})
            continue
        if key in numbers:
            wanted = replace(wanted, **{numbers[key]: int(value)})
        elif key == "mem":
            wanted = replace(wanted, memory=int(value) * MIB)
        elif key == "arch":
            wanted = replace(wanted, architecture=value)
        elif word == "alt":
            wanted = replace(wanted, alternative=True)
        elif word == "cpu!":
            wanted = replace(wanted, force_cpu=True)
        elif word != "-":
            copies, _, least = word.partition("/")
            wanted = replace(wanted, replicas=int(copies), min_copies=int(least or 1))
    return replace(wanted, limits=limits)


def _node(cores: str, memory: str) -> NodeFree:
    counted, _, real = cores.partition(":")
    free, total = (int(part) for part in counted.split("/"))
    free_memory, total_memory = (int(part) * MIB for part in memory.split("/"))
    cpu_ids = tuple(range(int(real or total)))
    whole = Node("n1", total, total_memory, cpu_ids=cpu_ids).free()
    return replace(whole, free_cores=tuple(range(free)), free_memory=free_memory)


def _result(found: Placement | NoRoom | Unsatisfiable) -> str:
    if isinstance(found, Unsatisfiable):
        return f"never {found.code}"
    if isinstance(found, NoRoom):
        last = found.candidates[-1]
        amounts = (last.needed, last.free) if last.key == "cpu" else (last.needed // MIB, last.free // MIB)
        return f"no-room {last.key} {amounts[0]} {amounts[1]}"
    first = found.instances[0]
    assert all(grant.memory == first.memory and grant.context == first.context for grant in found.instances)
    shape = f"{len(found.instances)} x {first.memory // MIB} {first.cores} {first.context}"
    shape += "" if first.minutes is None else f" for {first.minutes}"
    return " ".join([shape, *(f"{why.key}:{why.cause}" for why in found.differences)])


def _rows() -> list[tuple[str, str, str]]:
    rows = [line.split("|") for line in TABLE.strip().splitlines()[1:]]
    return [(ask.strip(), node.strip(), result.strip()) for ask, node, result in rows]


@pytest.mark.parametrize(("ask", "node", "result"), _rows())
def test_table(ask: str, node: str, result: str) -> None:
    assert _result(plan(_ask(ask.split()), MODEL, _node(*node.split()))) == result


WANTED = st.builds(
    Wanted,
    replicas=st.integers(4, 16),
    min_copies=st.integers(1, 4),
    cpu=st.none() | st.integers(1, 9000),
    memory=st.none() | st.integers(1, 3000).map(lambda mib: mib * MIB),
    context=st.none() | st.integers(1, 20_000),
    gpu=st.integers(0, 8),
    limits=st.builds(
        Limits,
        replicas=st.none() | st.integers(0, 16),
        memory=st.none() | st.integers(0, 4000).map(lambda mib: mib * MIB),
        cpu=st.none() | st.integers(0, 9000),
        context=st.none() | st.integers(0, 20_000),
    ),
)


@given(WANTED, st.integers(0, 12), st.integers(0, 6000 * MIB))
def test_what_is_placed_fits(wanted: Wanted, cores: int, memory: int) -> None:
    """No grant is beyond what is free, no core is given twice, and every engine survives in what it gets."""
    node = replace(Node("n1", 16, 8000 * MIB).free(), free_cores=tuple(range(cores)), free_memory=memory)
    found = plan(wanted, MODEL, node)
    if not isinstance(found, Placement):
        return
    given_cores = [core for grant in found.instances for core in grant.core_indexes]
    assert len(given_cores) == len(set(given_cores)) and set(given_cores) <= set(node.free_cores)
    assert sum(grant.memory for grant in found.instances) <= memory
    assert wanted.min_copies <= len(found.instances) <= wanted.replicas
    for grant in found.instances:
        assert LEAST_CONTEXT <= grant.context <= MODEL.trained_context and grant.context % CONTEXT_STEP == 0
        assert grant.memory >= MODEL.need.bytes_for(grant.context, grant.cores)
    limits, given = wanted.limits, found.instances
    assert limits.replicas is None or len(given) <= limits.replicas
    assert limits.memory is None or sum(grant.memory for grant in given) <= limits.memory
    assert limits.cpu is None or sum(grant.cores for grant in given) * 1000 <= limits.cpu
    assert limits.context is None or given[0].context <= limits.context


@given(WANTED)
def test_a_shortfall_always_has_a_reason(wanted: Wanted) -> None:
    """What differs from the ask is named by its key; what a limit does is on the record with the limit."""
    found = plan(replace(wanted, limits=Limits()), MODEL, Node("n1", 3, 900 * MIB).free())
    if not isinstance(found, Placement):
        return
    keys = {why.key for why in found.differences}
    first = found.instances[0]
    assert "replicas" in keys or len(found.instances) == wanted.replicas
    assert "cpu" in keys or first.cores * 1000 == wanted.cpu
    assert "memory" in keys or first.memory == wanted.memory
    assert "context" in keys or first.context == wanted.context
    assert "gpu" in keys or wanted.gpu == 0


def test_both_numbers_are_in_the_sentence() -> None:
    found = plan(_ask(["3/2"]), MODEL, _node("2/4", "300/4096"))
    assert isinstance(found, NoRoom)
    assert [candidate.sentence for candidate in found.candidates] == [
        "3 replicas need 3 cores or more, 2 are free on node `n1`",
        "2 replicas of 180 MiB or more need 360 MiB, 300 MiB are free on node `n1`",
    ]


def test_effective_values_are_per_replica() -> None:
    values = effective(Wanted(replicas=2), MODEL).values
    assert values == {"replicas": 2, "cpu": 1000, "memory": 216 * MIB, "context": 2048, "gpu": 0}


def test_a_released_reservation_is_free_again() -> None:
    node = Node("n1", 2, 1000)
    found = plan(Wanted(), MODEL, Node("n1", 2, 4096 * MIB).free())
    assert isinstance(found, Placement)
    node.reserve("a", found.instances[0].reservation())
    assert node.free().free_cores == (1,) and node.free().free_memory == 0
    assert node.release("a") and not node.release("a")
    assert node.free().free_cores == (0, 1) and node.free().free_memory == 1000


def _nodes(*nodes: str) -> NodesFree:
    """Each as `cores MiB` or `cores MiB thousandths-of-a-GPU`, all of it free."""
    found = []
    for index, node in enumerate(nodes):
        cores, memory, gpu = [*map(int, node.split()), 0][:3]
        bytes_ = memory * MIB
        found.append(
            NodeFree(
                name=f"n{index}",
                architecture="amd64",
                cores=cores,
                memory=bytes_,
                gpus=-(-gpu // 1000),
                free_cores=tuple(range(cores)),
                free_memory=bytes_,
                free_gpus=gpu // 1000,
                cpu_ids=(0,),
                shared_gpu=gpu % 1000,
            )
        )
    return NodesFree("ray", tuple(found), "amd64", f"the {len(found)} nodes of Ray")


# On several nodes a replica is on one of them, and all replicas are alike.
@pytest.mark.parametrize(
    ("ask", "nodes", "result"),
    [
        ("2 cpu=1000 mem=600 ctx=512", ("4 1024", "4 1024"), "2 x 600 1 512 gpu 0"),
        ("3 cpu=1000 mem=600 ctx=512", ("4 1024", "4 1024"), "3 x 512 1 512 gpu 0 memory:capacity"),
        ("2 cpu=3000 mem=600 ctx=512", ("4 1024", "2 1024"), "2 x 600 2 512 gpu 0 cpu:capacity"),
        ("2 cpu=2000 mem=200 ctx=512", ("2 1024", "2 1024"), "2 x 200 2 512 gpu 0"),
        ("3 cpu=1000 mem=180 ctx=512", ("1 1024", "1 1024"), "2 x 180 1 512 gpu 0 replicas:capacity"),
        ("3/3 cpu=1000 mem=180 ctx=512", ("1 1024", "1 1024"), "never NODE_TOO_SMALL"),
        # 360 MiB are free, and no node has 180 of them.
        ("cpu=1000 mem=180 ctx=512", ("4 170", "4 170"), "never NODE_TOO_SMALL"),
        (
            "2 gpu=1 cpu=1000 mem=180 ctx=512",
            ("4 1024 1000", "4 1024 1000"),
            "2 x 180 1 512 gpu 1000 gpu_memory:unsupported",
        ),
        (
            "2 gpu=2 cpu=1000 mem=180 ctx=512",
            ("4 1024 1000", "4 1024 1000"),
            "2 x 180 1 512 gpu 1000 gpu:capacity gpu_memory:capacity",
        ),
        ("f=1 cpu=1000 mem=180 ctx=512", ("4 1024", "1 1024 1000"), "1 x 180 1 512 gpu 1000 gpu_memory:unsupported"),
        ("2/2 f=1 cpu=1000 mem=180 ctx=512", ("4 1024", "4 1024 1000"), "never NODE_TOO_SMALL"),
        ("f=2 cpu=1000 mem=180 ctx=512", ("4 1024 1000", "4 1024 1000"), "never GPU_FLOOR"),
        ("2 share=400 cpu=1000 mem=180 ctx=512", ("4 1024 1000",), "2 x 180 1 512 gpu 400 gpu:balancing"),
        (
            "3 share=400 cpu=1000 mem=180 ctx=512",
            ("4 1024 1000",),
            "3 x 180 1 512 gpu 333 gpu_allocation:capacity gpu:balancing",
        ),
        ("2 share=400 cpu=1000 mem=180 ctx=512", ("4 1024",), "2 x 180 1 512 gpu 0"),
    ],
)
def test_placing_on_several_nodes(ask: str, nodes: tuple[str, ...], result: str) -> None:
    found = plan(_ask(ask.split()), MODEL, _nodes(*nodes))
    if isinstance(found, Placement):
        (first, *others) = found.instances
        assert all(
            (one.memory, one.cores, one.gpu_millis) == (first.memory, first.cores, first.gpu_millis) for one in others
        )
        whole = f"{len(found.instances)} x {first.memory // MIB} {first.cores} {first.context} gpu {first.gpu_millis}"
        assert " ".join([whole, *(f"{why.key}:{why.cause}" for why in found.differences)]) == result
    else:
        assert isinstance(found, Unsatisfiable)
        assert f"never {found.code}" == result


def test_more_cores_than_any_node_has_are_no_work_to_plan() -> None:
    """What is asked is a number from outside."""
    found = plan(Wanted(cpu=2**50, memory=512 * MIB, context=512), MODEL, _nodes("4 1024", "2 1024"))
    assert isinstance(found, Placement) and found.instances[0].cores == 4
