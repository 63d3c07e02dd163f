"""Deployments in a small SQLite file, so that a restarted backend knows what it had."""

import fcntl
import json
import os
import sqlite3
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from proving_ground.deployment import Deployment, Instance
from proving_ground.engine import Enforced, Usage
from proving_ground.resolver import InstanceGrant
from proving_ground.schemas import CreateModelDeployment
from proving_ground.wanted import Difference, wanted_from

_SCHEMA = """
CREATE TABLE IF NOT EXISTS deployments (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, owner TEXT NOT NULL, workroom TEXT, body TEXT NOT NULL,
    status TEXT NOT NULL, requested_at TEXT NOT NULL, deployed_at TEXT, ended_at TEXT,
    last_error_code TEXT, last_error_message TEXT, differences TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS instances (
    id TEXT PRIMARY KEY, deployment_id TEXT NOT NULL REFERENCES deployments (id) ON DELETE CASCADE,
    "grant" TEXT NOT NULL, log TEXT NOT NULL, status TEXT NOT NULL, deployed_at TEXT,
    pid INTEGER, start_time INTEGER, port INTEGER, api_key TEXT, enforced TEXT, usage TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS instances_of ON instances (deployment_id);
"""


class Store:
    """One open database, held by one backend at a time.

    Calls block for well under a millisecond and happen a few times in the life of a deployment, never per inference,
    so they run on the event loop, in the order of the facts. `keep_keys` stores engine API keys, which only a backend
    that is to find its engines again needs.
    """

    def __init__(self, directory: Path, keep_keys: bool) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._keep_keys = keep_keys
        self._lock = os.open(directory / "backend.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise RuntimeError(f"another backend uses `{directory}`; set DATA to a directory of its own") from None
        path = directory / "backend.db"
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives its side files the mode of this one
        self._db = sqlite3.connect(path)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.executescript(_SCHEMA)

    def save(self, deployment: Deployment) -> None:
        """Write a deployment and all its instances in one transaction."""
        with self._db:
            self._db.execute(
                "INSERT INTO deployments VALUES (:id, :tenant, :owner, :workroom, :body, :status, :requested_at,"
                " :deployed_at, :ended_at, :last_error_code, :last_error_message, :differences)"
                " ON CONFLICT (id) DO UPDATE SET status = :status, deployed_at = :deployed_at, ended_at = :ended_at,"
                " last_error_code = :last_error_code, last_error_message = :last_error_message,"
                " differences = :differences",
                _deployment_row(deployment),
            )
            self._db.executemany(
                "INSERT INTO instances VALUES (:id, :deployment_id, :grant, :log, :status, :deployed_at, :pid,"
                " :start_time, :port, :api_key, :enforced, :usage)"
                " ON CONFLICT (id) DO UPDATE SET status = :status, deployed_at = :deployed_at, pid = :pid,"
                " start_time = :start_time, port = :port, api_key = :api_key, enforced = :enforced, usage = :usage",
                [_instance_row(instance, self._keep_keys) for instance in deployment.instances],
            )

    def load(self) -> list[Deployment]:
        """All deployments, oldest first; what only lived in memory (engines, `env` values) is gone."""
        instances: dict[str, list[Instance]] = {}
        for row in self._db.execute("SELECT * FROM instances ORDER BY rowid"):
            instances.setdefault(row["deployment_id"], []).append(_instance(row))
        rows = self._db.execute("SELECT * FROM deployments ORDER BY requested_at, id")
        return [_deployment(row, instances.get(row["id"], [])) for row in rows]

    def forget(self, deployment_id: UUID) -> None:
        """Delete a deployment and its instances."""
        with self._db:
            self._db.execute("DELETE FROM deployments WHERE id = ?", (str(deployment_id),))

    def close(self) -> None:
        """Close the database and let another backend have the directory."""
        self._db.close()
        os.close(self._lock)


def _deployment_row(deployment: Deployment) -> dict[str, Any]:
    return {
        "id": str(deployment.id),
        "tenant": deployment.tenant,
        "owner": deployment.owner,
        "workroom": deployment.workroom,
        "body": json.dumps(deployment.body),
        "status": deployment.status,
        "requested_at": deployment.requested_at.isoformat(),
        "deployed_at": _text(deployment.deployed_at),
        "ended_at": _text(deployment.ended_at),
        "last_error_code": deployment.last_error_code,
        "last_error_message": deployment.last_error_message,
        "differences": json.dumps([asdict(difference) for difference in deployment.differences]),
    }


def _instance_row(instance: Instance, keep_key: bool) -> dict[str, Any]:
    return {
        "id": str(instance.id),
        "deployment_id": str(instance.deployment_id),
        "grant": json.dumps(asdict(instance.grant)),
        "log": instance.log,
        "status": instance.status,
        "deployed_at": _text(instance.deployed_at),
        "pid": instance.pid,
        "start_time": instance.start_time,
        "port": instance.port,
        "api_key": instance.api_key if keep_key else None,
        "enforced": json.dumps(asdict(instance.enforced)) if instance.enforced else None,
        "usage": json.dumps(asdict(instance.usage)) if instance.usage else None,
    }


def _deployment(row: sqlite3.Row, instances: list[Instance]) -> Deployment:
    body = json.loads(row["body"])
    request = CreateModelDeployment.model_validate({**body, "env": None})
    return Deployment(
        id=UUID(row["id"]),
        owner=row["owner"],
        tenant=row["tenant"],
        workroom=row["workroom"],
        body=body,
        model_id=request.m_id,
        wanted=wanted_from(request),
        requested_at=datetime.fromisoformat(row["requested_at"]),
        status=row["status"],
        deployed_at=_time(row["deployed_at"]),
        ended_at=_time(row["ended_at"]),
        last_error_code=row["last_error_code"],
        last_error_message=row["last_error_message"],
        differences=tuple(Difference(**difference) for difference in json.loads(row["differences"])),
        instances=instances,
    )


def _instance(row: sqlite3.Row) -> Instance:
    enforced = json.loads(row["enforced"]) if row["enforced"] else None
    return Instance(
        id=UUID(row["id"]),
        deployment_id=UUID(row["deployment_id"]),
        grant=InstanceGrant(**_with_tuples(json.loads(row["grant"]))),
        log=row["log"],
        status=row["status"],
        deployed_at=_time(row["deployed_at"]),
        pid=row["pid"],
        start_time=row["start_time"],
        port=row["port"],
        api_key=row["api_key"],
        enforced=Enforced(**_with_tuples(enforced)) if enforced else None,
        usage=Usage(**json.loads(row["usage"])) if row["usage"] else None,
    )


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def _text(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
