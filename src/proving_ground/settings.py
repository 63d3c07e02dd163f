"""What the backend is told by its environment; read once, at start."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from proving_ground.quantities import memory_bytes

EXAMPLE = Path(__file__).parents[2] / "examples" / "policy.yaml"
"""The policy of a checkout: the file that people copy."""


@dataclass(frozen=True)
class Settings:
    """Every setting of the backend; `from_env` names the environment variable of each."""

    data: Path
    """Directory for the database, engine logs and the token file; made when missing, readable by its owner only."""
    tokens: Path
    """JSON file that names who holds which bearer token; see `auth.py`."""
    port: int = 8787
    """TCP port on 127.0.0.1; 0 lets the system choose."""
    keep_engines: bool = False
    """Engines outlive the backend and are found again by the next one."""
    node_memory: int | None = None
    """Bytes this node may promise; None takes half of what is available, at most 4 GiB."""
    node_cores: int | None = None
    """Cores this node may promise; more than the real ones over-commits them."""
    retry_seconds: float = 5.0
    """Pause between two attempts to place a deployment for which there was no room."""
    policy: Path = EXAMPLE
    """The policy file: who may do what, limits, budgets, prices, approval. Looked at each second."""
    log: Path | None = None
    """File for one JSON line for each event of an envelope; None writes them to standard error."""
    tools: Path | None = None
    """JSON file that names the tool servers agents may use; see `agent_tools.py`. None offers the built-in one."""
    sources: Path | None = None
    """JSON file that says which hosts and buckets data may come from and go to; see `sources.py`. None: no others than
    the tenant's own directory and memory."""
    cluster: Literal["local", "ray"] = "local"
    """Where engines run: as children of the backend, or on a Ray cluster."""
    review: Literal["flag", "revoke"] = "flag"
    """What becomes of running executions that a changed policy would not admit any more."""
    ray_address: str = "auto"
    """`host:port` of the cluster's head; `auto` finds the cluster that this machine is a node of."""
    placement_seconds: float = 300.0
    """How long Ray may take to place a deployment before that is rejected."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Settings":
        """Read PORT, DATA, TOKENS, KEEP_ENGINES, NODE_MEMORY (`600MiB`), NODE_CORES, RETRY_SECONDS, POLICY, LOG,
        CLUSTER, RAY_ADDRESS, PLACEMENT_SECONDS, TOOLS, SOURCES and REVIEW."""
        data = Path(env.get("DATA", ".data"))
        return cls(
            data=data,
            tokens=Path(env["TOKENS"]) if "TOKENS" in env else data / "tokens.json",
            port=int(_number(env, "PORT", 8787, 0, 65535)),
            keep_engines=_switch(env, "KEEP_ENGINES"),
            node_memory=memory_bytes(env["NODE_MEMORY"]) if "NODE_MEMORY" in env else None,
            node_cores=int(_number(env, "NODE_CORES", 1, 1, 1024)) if "NODE_CORES" in env else None,
            retry_seconds=_number(env, "RETRY_SECONDS", 5.0, 0.01, 3600),
            policy=Path(env["POLICY"]) if "POLICY" in env else EXAMPLE,
            review=_review(env),
            cluster=_cluster(env),
            ray_address=_address(env),
            placement_seconds=_number(env, "PLACEMENT_SECONDS", 300.0, 1, 86_400),
            log=None if env.get("LOG") == "-" else Path(env.get("LOG", data / "log.jsonl")),
            tools=Path(env["TOOLS"]) if "TOOLS" in env else None,
            sources=Path(env["SOURCES"]) if "SOURCES" in env else None,
        )


def _number(env: Mapping[str, str], name: str, default: float, least: float, most: float) -> float:
    text = env.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise ValueError(f"expected a number from {least:g} to {most:g}, got `{text}` - at {name}")
    return value


def _switch(env: Mapping[str, str], name: str) -> bool:
    text = env.get(name, "0").lower()
    if text not in ("0", "1", "false", "true", "no", "yes"):
        raise ValueError(f"expected 0 or 1, got `{text}` - at {name}")
    return text in ("1", "true", "yes")


def _review(env: Mapping[str, str]) -> Literal["flag", "revoke"]:
    text = env.get("REVIEW", "flag")
    if text == "flag":
        return "flag"
    if text != "revoke":
        raise ValueError(f"expected flag or revoke, got `{text}` - at REVIEW")
    return "revoke"


def _cluster(env: Mapping[str, str]) -> Literal["local", "ray"]:
    text = env.get("CLUSTER", "local")
    if text == "local":
        return "local"
    if text != "ray":
        raise ValueError(f"expected local or ray, got `{text}` - at CLUSTER")
    if _switch(env, "KEEP_ENGINES"):
        raise ValueError("expected 0 with CLUSTER=ray, where engines end with their backend, got 1 - at KEEP_ENGINES")
    return "ray"


def _address(env: Mapping[str, str]) -> str:
    text = env.get("RAY_ADDRESS", "auto")
    host, _, port = text.rpartition(":")
    if text != "auto" and not (host and "/" not in host and port.isdecimal()):
        raise ValueError(f"expected `host:port` of the cluster's head, or auto, got `{text}` - at RAY_ADDRESS")
    return text
