"""A backend with a scripted model and tool servers, and what tests of agents ask it."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from backend import SOURCE, Backend, until

from execution_envelope import AdmissionController, Tree

HERE = Path(__file__).parent


def calls(*wanted: tuple[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A reply that calls tools."""
    return {"calls": [{"tool": tool, "arguments": arguments} for tool, arguments in wanted], **more}


def clocks(times: int, tool: str = "wiki/clock") -> dict[str, Any]:
    return calls(*[(tool, {})] * times)


def done(text: str = "done", **more: Any) -> dict[str, Any]:
    return {"answer": text, **more}


class World:
    """A backend that serves the script, with the tool servers `wiki` (HTTP) and `desk`, `hasty`, `blocking` (stdio)."""

    def __init__(self, folder: Path, script: dict[str, list[dict[str, Any]]], wiki: str) -> None:
        self.folder = folder
        (folder / "script.json").write_text(json.dumps(script))
        desk = [sys.executable, "-P", str(SOURCE / "proving_ground" / "tool_server.py")]
        # The last word does nothing but mark the process as one of this world.
        blocking = [sys.executable, "-P", str(HERE / "blocking_tools.py"), str(folder)]
        servers = {
            "wiki": {"url": wiki},
            "desk": {"command": desk},
            "hasty": {"command": desk, "seconds": 0.5},
            "blocking": {"command": blocking, "seconds": 20},
            "broken": {"command": [sys.executable, "-c", "import sys; sys.exit('no such disk')"]},
        }
        (folder / "tools.json").write_text(json.dumps(servers))
        self.backend = self.start()
        self.http = self.backend.http()
        self.deployment = self.deploy()

    def start(self) -> Backend:
        files = {"SCRIPT": "script.json", "TOOLS": "tools.json"}
        env = {name: str(self.folder / file) for name, file in files.items()}
        settings = {"POLICY": str(HERE / "agents.yaml"), "NODE_CORES": "4", "NODE_MEMORY": "2GiB"}
        return Backend.start(self.folder / "data", script=HERE / "offering_script.py", **env, **settings)

    def deploy(self) -> str:
        models = self.http.get("/models/").json()
        model = next(model for model in models if model["repo_modelId"] == "test/scripted")
        (config,) = self.http.get("/model_configs/", params={"model_id": model["id"]}).json()
        body = {"m_id": model["id"], "m_config_id": config["id"]}
        deployment: str = self.http.post("/serving/deploy_model", json=body).json()
        until(lambda: self.http.get(f"/serving/deployment/{deployment}/status").json() == "DEPLOYED")
        return deployment

    def body(self, task: str, **more: Any) -> dict[str, Any]:
        return {"deployment_id": self.deployment, "task": task, **more}

    def run(self, task: str, *, headers: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
        """Run an agent to its end."""
        headers = {"Prefer": "wait", **(headers or {})}
        answer = self.http.post("/agents/runs", json=self.body(task, **more), headers=headers)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def begin(self, task: str, **more: Any) -> str:
        """Run an agent in the background."""
        answer = self.http.post("/agents/runs", json=self.body(task, **more))
        assert answer.status_code == 202, answer.text
        run: str = answer.json()["id"]
        assert answer.headers["location"] == f"/agents/runs/{run}"
        return run

    def get(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/agents/runs/{run}").json()
        return found

    def ended(self, run: str) -> dict[str, Any]:
        return until(lambda: (found := self.get(run))["status"] in ("COMPLETED", "FAILED", "CANCELLED") and found)

    def tree(self, run: str) -> Tree:
        """Read from the file of the ledger, when all of it is there and has ended."""
        return until(lambda: (tree := read_tree(self.backend, run)) and not opened(tree) and tree)

    def processes(self) -> list[int]:
        """Tool servers over stdio that block."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(self.folder).encode() in words:
                found.append(int(folder.name))
        return found


def read_tree(backend: Backend, run: str) -> Tree:
    """The tree of a run as it is on the disk now."""

    async def read() -> Tree:
        controller = AdmissionController.open(f"sqlite:///{backend.data}/envelopes.db")
        try:
            return await controller.tree("agent", run)
        finally:
            await controller.aclose()

    return asyncio.run(read())


def opened(tree: Tree) -> list[str]:
    return [record.id for _, record in tree.walk() if record.is_open]


@contextmanager
def tool_server() -> Iterator[str]:
    """The proving ground's own tool server over HTTP; its URL."""
    command = [sys.executable, "-P", str(SOURCE / "proving_ground" / "tool_server.py"), "--http", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def wait_for(world: World, run: str, target: str) -> None:
    """Until the run, or one below, has granted something on this target that has not ended."""

    def granted() -> bool:
        found = [record for _, record in read_tree(world.backend, run).walk() if record.state == "granted"]
        return any(record.envelope.execution.target.id == target for record in found)

    until(granted)


def first_event(stream: httpx.Response, name: str) -> dict[str, Any]:
    """The data of the first event of that name."""
    lines = stream.iter_lines()
    for line in lines:
        if line == f"event: {name}":
            found: dict[str, Any] = json.loads(next(lines).removeprefix("data: "))
            return found
    raise AssertionError(f"no event {name}")
