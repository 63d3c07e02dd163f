"""A Ray cluster on this machine: `python ray_nodes.py`, whose raylets end when its standard input does.

Each line of input is a command, each line of output the answer to one:

    add {"num_cpus": 1, "memory": 1000000}      -> the id of the new node
    remove <id>                                 -> ok; as if its machine had gone: nobody there is told
    groups                                      -> how many placement groups hold or wait for something
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "src"
MIB = 1024**2


class RayNodes:
    """The cluster as tests have it: two nodes of four cores and 1 GiB each, logical as everything that Ray counts."""

    def __init__(self) -> None:
        inherited = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": str(SOURCE)}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**inherited, "RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address = self._answer()
        self.nodes = [self._answer(), self._answer()]

    def add(self, **node: Any) -> str:
        """One more node; its id."""
        return self._asked(f"add {json.dumps(node)}")

    def remove(self, node: str) -> None:
        """Kill a raylet."""
        assert self._asked(f"remove {node}") == "ok"

    def groups(self) -> int:
        """How many placement groups hold something, or wait for it."""
        return int(self._asked("groups"))

    def close(self) -> None:
        """End all of them."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def _asked(self, command: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("> "):
                return line[2:].strip()
        raise RuntimeError("the Ray cluster has ended")


def main() -> None:
    directory = tempfile.mkdtemp(prefix="ray-")  # short: the paths of sockets in it are
    # Ray writes the cluster's address to a folder of its own, which it makes only where it keeps its sessions there.
    os.environ["RAY_TMPDIR"] = directory
    Path(directory, "ray").mkdir()
    import ray
    from ray.cluster_utils import Cluster
    from ray.util import placement_group_table

    usual = {"num_cpus": 4, "memory": 1024 * MIB, "object_store_memory": 80 * MIB}
    cluster = Cluster()
    try:
        # A node that goes silent is found within seconds, where Ray would wait for half a minute.
        quick = {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 2,
        }
        nodes = {}
        head = cluster.add_node(**usual, include_dashboard=False, temp_dir=directory, _system_config=quick)
        say(cluster.address)
        for node in (head, cluster.add_node(**usual)):
            nodes[node.node_id] = node
            say(node.node_id)
        for line in sys.stdin:
            command, _, rest = line.strip().partition(" ")
            if command == "add":
                node = cluster.add_node(**{**usual, **json.loads(rest)})
                nodes[node.node_id] = node
                say(node.node_id)
            elif command == "groups":
                ray.init(cluster.address, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
                say(str(sum(group["state"] != "REMOVED" for group in placement_group_table().values())))
            else:
                cluster.remove_node(nodes.pop(rest), allow_graceful=False)
                say("ok")
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


def say(text: str) -> None:
    print(f"> {text}", flush=True)


if __name__ == "__main__":
    main()
