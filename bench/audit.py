"""The peer of `http_vs_audit`: an audit trail as it is usually added to a backend, one row for each request.

`usual` is what the documentation of FastAPI and SQLAlchemy shows: a function under ``@app.middleware("http")``, and an
ORM session that adds one object and commits, in the thread pool. `tuned` is what is left when everything that can be
taken out was taken out: pure ASGI, a prepared Core insert, one thread with one connection, so that nothing waits for
SQLite's lock. In both the answer is sent when the row is on disk: WAL, synchronous=FULL.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Engine, create_engine, event, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from bench.seam import bare_app


class Base(DeclarativeBase):
    pass


class Audit(Base):
    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[str]
    subject: Mapped[str]
    method: Mapped[str]
    path: Mapped[str]
    status: Mapped[int]
    body: Mapped[str]


def usual(folder: Path) -> FastAPI:
    app, engine = bare_app(), _engine(folder / "usual.db")

    def record(values: dict[str, Any]) -> None:
        with Session(engine) as session:
            session.add(Audit(**values))
            session.commit()

    @app.middleware("http")
    async def audit(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        body = await request.body()
        response = await call_next(request)
        await run_in_threadpool(record, _values(request.method, request.url.path, response.status_code, body))
        return response

    return app


def tuned(folder: Path) -> FastAPI:
    app = bare_app()
    app.add_middleware(_Tuned, engine=_engine(folder / "tuned.db", pool_size=1, max_overflow=0))
    return app


class _Tuned:
    def __init__(self, app: Callable[..., Awaitable[None]], engine: Engine) -> None:
        self._app = app
        self._engine = engine
        self._statement = insert(Audit)
        self._limiter: CapacityLimiter | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = b""
        limiter = self._limiter = self._limiter or CapacityLimiter(1)

        async def receiving() -> MutableMapping[str, Any]:
            nonlocal body
            message: MutableMapping[str, Any] = await receive()
            body += message.get("body", b"")
            return message

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                values = _values(scope["method"], scope["path"], message["status"], body)
                await to_thread.run_sync(self._record, values, limiter=limiter)
            await send(message)

        await self._app(scope, receiving, sending)

    def _record(self, values: dict[str, Any]) -> None:
        with self._engine.begin() as connection:
            connection.execute(self._statement, values)


def _values(method: str, path: str, status: int, body: bytes) -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).isoformat(),
        "subject": "dana",
        "method": method,
        "path": path,
        "status": status,
        "body": body.decode(),
    }


def _engine(path: Path, **options: int) -> Engine:
    engine = create_engine(f"sqlite:///{path}", **options)

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    Base.metadata.create_all(engine)
    return engine
