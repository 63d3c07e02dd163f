"""Real engines, held to what they were granted."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from backend import SOURCE, until

from proving_ground import procfs, weights
from proving_ground.catalog import smollm2
from proving_ground.engine import Engine, read_back
from proving_ground.failures import EngineFailed, classify
from proving_ground.host import EngineHost, EngineSpec
from proving_ground.logfile import tail
from proving_ground.quantities import MIB

MODEL = smollm2()


def _spec(directory: Path, context: int = 512, **changes: object) -> EngineSpec:
    fields: dict[str, object] = {
        "weights": MODEL.weights,
        "alias": MODEL.name,
        "memory": MODEL.need.bytes_for(context),
        "cpu_ids": (min(os.sched_getaffinity(0)),),
        "context": context,
        "log": directory / "engine.log",
        **changes,
    }
    return EngineSpec(**fields)  # type: ignore[arg-type]


@asynccontextmanager
async def _started(spec: EngineSpec) -> AsyncIterator[Engine]:
    host = EngineHost()
    engine = await host.start(spec)
    try:
        yield engine
    finally:
        await engine.stop(1)
        host.close()


async def _chat(http: httpx.AsyncClient, engine: Engine, words: int, answer: int) -> int:
    body = {"messages": [{"role": "user", "content": "river " * words}], "max_tokens": answer, "ignore_eos": True}
    found = await http.post(
        f"{engine.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {engine.api_key}"}
    )
    assert found.status_code == 200, found.text
    return int(found.json()["usage"]["total_tokens"])


def _run(test: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def wrapped() -> None:
        async with httpx.AsyncClient(timeout=120, trust_env=False) as http:
            await test(http)

    asyncio.run(wrapped())


def test_the_grant_is_enforced_and_read_back(tmp_path: Path) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        spec = _spec(tmp_path)
        async with _started(spec) as engine:
            await engine.wait_ready()
            found = await read_back(engine, http)
            assert (found.memory_limit, found.cpu_ids, found.context) == (spec.memory, spec.cpu_ids, 512)
            assert 0 < found.data < spec.memory and found.rss > 100 * MIB
            assert "Max core file size        0                    0" in _proc(engine, "limits")
            usage = await engine.stop(5)
            assert usage.basis == "measured" and 0 < usage.peak_memory < spec.memory
            assert usage.cpu_ms > 0 and usage.wall_ms > 100
            assert not procfs.is_running(engine.pid, engine.started)

    _run(test)


@pytest.mark.parametrize(("context", "share"), [(512, 0.9), (2048, 0.5), (8192, 0.1)])
def test_an_engine_survives_in_exactly_what_it_needs(tmp_path: Path, context: int, share: float) -> None:
    """Its context filled to a share, which takes a core a second per 150 tokens, and all connections of the proxy."""

    async def test(http: httpx.AsyncClient) -> None:
        async with _started(_spec(tmp_path, context)) as engine:
            await engine.wait_ready()
            others = [_chat(http, engine, 10, 5) for _ in range(7)]
            filled, *_ = await asyncio.gather(_chat(http, engine, int(context * share), 16), *others)
            engine.sample()
            assert engine.running and filled > context * share
            assert engine.usage("measured").peak_memory < MODEL.need.bytes_for(context)

    _run(test)


def test_too_little_memory_is_named(tmp_path: Path) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        async with _started(_spec(tmp_path, memory=90 * MIB)) as engine:
            with pytest.raises(EngineFailed) as caught:
                await engine.wait_ready()
            assert caught.value.code == "OUT_OF_MEMORY"

    _run(test)


@pytest.mark.parametrize(
    ("content", "code"), [(None, "WEIGHTS_MISSING"), (b"not a model", "WEIGHTS_CORRUPT"), (b"GGUF", "WEIGHTS_CORRUPT")]
)
def test_bad_weights_are_named_by_their_check(tmp_path: Path, content: bytes | None, code: str) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineFailed) as caught:
        weights.verify(path, MODEL.sha256)
    assert caught.value.code == code


def test_bad_weights_are_named_by_the_engine(tmp_path: Path) -> None:
    """What the check would have found, should the file change after it."""

    async def test(http: httpx.AsyncClient) -> None:
        (tmp_path / "short.gguf").write_bytes(MODEL.weights.read_bytes()[:50_000_000])
        for name, code in (("missing.gguf", "WEIGHTS_MISSING"), ("short.gguf", "WEIGHTS_CORRUPT")):
            spec = _spec(tmp_path, weights=tmp_path / name, log=tmp_path / f"{name}.log")
            async with _started(spec) as engine:
                with pytest.raises(EngineFailed) as caught:
                    await engine.wait_ready()
                assert caught.value.code == code

    _run(test)


def test_the_right_weights_pass_and_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weights.verify(MODEL.weights, MODEL.sha256)
    begun = time.perf_counter()
    weights.verify(MODEL.weights, MODEL.sha256)
    assert time.perf_counter() - begun < 0.01


def test_a_killed_engine_names_the_signal_and_has_usage(tmp_path: Path) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        async with _started(_spec(tmp_path)) as engine:
            await engine.wait_ready()
            engine.sample()
            os.kill(engine.pid, signal.SIGKILL)
            failure = await engine.ended()
            assert (failure.code, failure.message) == ("ENGINE_KILLED", "the engine was killed by SIGKILL")
            usage = await engine.stop(1)
            assert usage.basis == "estimated" and usage.peak_memory > 0 and usage.cpu_ms > 0

    _run(test)


def test_an_engine_that_is_not_ready_in_time(tmp_path: Path) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        async with _started(_spec(tmp_path)) as engine:
            with pytest.raises(EngineFailed) as caught:
                await engine.wait_ready(0.01)
            assert caught.value.code == "START_TIMEOUT"

    _run(test)


def test_an_engine_listens_on_the_address_it_is_told_and_no_other(tmp_path: Path) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        async with _started(_spec(tmp_path, host="127.0.0.2")) as engine:
            await engine.wait_ready()
            assert engine.url == f"http://127.0.0.2:{engine.port}" and await _chat(http, engine, 5, 5) > 5
            with pytest.raises(httpx.ConnectError):
                await http.get(f"http://127.0.0.1:{engine.port}/health")

    _run(test)


def test_a_cancelled_start_leaves_no_process(tmp_path: Path) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        host, before = EngineHost(), _children(os.getpid())
        starting = asyncio.create_task(host.start(_spec(tmp_path)))
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        host.close()
        assert _children(os.getpid()) == before

    _run(test)


def test_secrets_are_neither_in_the_arguments_nor_in_the_log(tmp_path: Path) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        async with _started(_spec(tmp_path, env={"HF_TOKEN": "hf-secret", "PATH": "/nowhere"})) as engine:
            await engine.wait_ready()
            assert "HF_TOKEN=hf-secret" in _proc(engine, "environ")
            written = _proc(engine, "cmdline") + tail(tmp_path / "engine.log")
            assert "hf-secret" not in written and engine.api_key not in written
            refused = await http.post(f"{engine.url}/v1/chat/completions", json={"messages": []})
            assert refused.status_code == 401

    _run(test)


SPAWN = """
import asyncio, sys, time
from pathlib import Path
from proving_ground.catalog import smollm2
from proving_ground.host import EngineHost, EngineSpec
async def main():
    model = smollm2()
    spec = EngineSpec(model.weights, model.name, model.need.bytes_for(512), (0,), 512, Path(sys.argv[1]), keep={keep})
    engine = await EngineHost().start(spec)
    if {ready}:
        await engine.wait_ready()
    print(engine.pid, engine.started, engine.port, engine.api_key, flush=True)
    time.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("ready", [True, False])
def test_an_engine_ends_with_its_backend(tmp_path: Path, ready: bool) -> None:
    """Also when the backend ends before the engine could ask for that."""
    parent = _parent(tmp_path, keep=False, ready=ready)
    pid, started, *_ = _printed(parent)
    parent.kill()
    parent.communicate()
    until(lambda: not procfs.is_running(int(pid), int(started)), 5)


def test_a_kept_engine_is_found_again_by_pid_and_start_time(tmp_path: Path) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        parent = _parent(tmp_path, keep=True, ready=True)
        pid, started, port, api_key = _printed(parent)
        parent.kill()
        parent.communicate()
        host = EngineHost()
        log = tmp_path / "engine.log"
        assert host.adopt(int(pid), int(started) + 1, int(port), api_key, log) is None
        engine = host.adopt(int(pid), int(started), int(port), api_key, log)
        assert engine is not None
        assert await _chat(http, engine, 5, 5) > 5
        os.kill(engine.pid, signal.SIGKILL)
        assert (await engine.ended()).code == "ENGINE_EXITED"
        assert host.adopt(int(pid), int(started), int(port), api_key, log) is None
        host.close()

    _run(test)


@pytest.mark.parametrize(
    ("returncode", "log", "code"),
    [
        (1, "couldn't bind HTTP server socket, port: 1", "PORT_IN_USE"),
        (1, "insufficient memory for the model", "OUT_OF_MEMORY"),
        (-6, "what():  std::bad_alloc", "OUT_OF_MEMORY"),
        (-6, "assertion failed", "ENGINE_KILLED"),
        (-9, "insufficient memory once, survived", "ENGINE_KILLED"),
        (3, "something else", "ENGINE_EXITED"),
        (None, "", "ENGINE_EXITED"),
    ],
)
def test_how_an_end_is_named(returncode: int | None, log: str, code: str) -> None:
    assert classify(returncode, log).code == code


def _proc(engine: Engine, name: str) -> str:
    return Path(f"/proc/{engine.pid}/{name}").read_text()


def _parent(directory: Path, keep: bool, ready: bool) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SPAWN.format(keep=keep, ready=ready), str(directory / "engine.log")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        text=True,
    )


def _printed(parent: "subprocess.Popen[str]") -> list[str]:
    assert parent.stdout is not None
    return parent.stdout.readline().split()


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
