"""The engine process: `python -m proving_ground.engine_child <ready-fd>`.

Takes one JSON line on standard input (see `Orders`), lets the operating system hold it to what was granted, and only
then loads the model and serves. Writes `{"port": 40123, "pid": 77}` to the descriptor when it answers requests.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from typing import Any, TypedDict

STACK = 2 * 1024**2
"""Bytes of stack per thread. Stacks count against RLIMIT_DATA; with the usual 8 MiB, 20 connections kill an engine."""

BATCH = 64
"""Tokens that are computed at once. An engine that embeds too keeps room for the logits of a whole batch, 192 KiB for
each token of this vocabulary: with the usual 512 tokens 90 MiB of the grant, with these 9, and answers take as long."""

_PR_SET_PDEATHSIG = 1


class Orders(TypedDict):
    """What an engine is told: memory in bytes, context in tokens; `parent` is 0 for one that outlives its parent."""

    model: str
    alias: str
    api_key: str
    memory: int
    cpu_ids: list[int]
    context: int
    parent: int
    host: str


def main() -> None:
    # The C library takes the stack size of all later threads from the limit it finds when a program starts.
    if resource.getrlimit(resource.RLIMIT_STACK)[0] != STACK:
        resource.setrlimit(resource.RLIMIT_STACK, (STACK, resource.getrlimit(resource.RLIMIT_STACK)[1]))
        os.execv(sys.executable, [sys.executable, "-m", "proving_ground.engine_child", *sys.argv[1:]])
    orders: Orders = json.loads(sys.stdin.readline())
    if orders["parent"]:
        die_with(orders["parent"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.sched_setaffinity(0, orders["cpu_ids"])
    resource.setrlimit(resource.RLIMIT_DATA, (orders["memory"], orders["memory"]))

    server = _serve(orders)
    port = int(server.listening_address.rpartition(":")[2])
    with os.fdopen(int(sys.argv[1]), "w") as ready:
        ready.write(json.dumps({"port": port, "pid": os.getpid()}) + "\n")
    while True:
        signal.pause()


def die_with(parent: int) -> None:
    """Be killed when the parent's spawning thread ends; it may have ended before we asked."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit("the backend ended before its engine started")


def _serve(orders: Orders) -> Any:
    """Load and serve on a free port of the address; returns when requests are answered."""
    xllamacpp = importlib.import_module("xllamacpp")
    threads = len(orders["cpu_ids"])
    params = xllamacpp.CommonParams()
    params.model.path = orders["model"]
    params.model_alias = {orders["alias"]}
    params.hostnames = [orders["host"]]
    params.port = 0
    params.api_keys = [orders["api_key"]]
    params.n_ctx = orders["context"]
    params.n_parallel = 1
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.n_threads_http = 4
    params.embedding = True  # beside completions: it is switched on for each request that embeds
    # Of a model that reads from left to right only the last token has seen all of the text.
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
    params.n_batch = params.n_ubatch = BATCH
    params.cache_ram_mib = 0  # the default is a prompt cache of 8 GiB
    params.endpoint_slots = False  # it would show other callers' prompts
    params.ui = False
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
