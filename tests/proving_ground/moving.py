"""What the tests of data movement share: a backend with sources, and its records."""

import json
from pathlib import Path
from typing import Any

from backend import Backend, until
from click.testing import CliRunner
from servers import KEY, SECRET

from execution_envelope.cli import cli

POLICY = Path(__file__).parent / "moves.yaml"


def sources(directory: Path, *hosts: str, **buckets: str) -> str:
    """Write the file of SOURCES, where everything of ours is in eu-west and the host that serves files in us-east."""
    http = [{"scheme": "http", "host": host, "region": "us-east"} for host in hosts]
    s3 = [
        {"bucket": name, "endpoint": at, "key": KEY, "secret": SECRET, "region": "eu-west", "tenants": ["acme"]}
        for name, at in buckets.items()
    ]
    path = directory / "sources.json"
    path.write_text(json.dumps({"region": "eu-west", "http": http, "s3": s3}))
    return str(path)


class Told:
    """One record as `envelope show` tells it: its data, its rows by key, the types of its events."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in data["resources"] + data["constraints"]}
        self.events = [event["type"] for event in data["timeline"]]
        # A reason is given for everything but what nobody looks at.
        assert {row["outcome"] for row in self.rows.values() if row["unstated"]} <= {"ignored"}, self.rows

    def last(self, kind: str) -> dict[str, Any]:
        found: dict[str, Any] = [event["data"] for event in self.data["timeline"] if event["type"] == kind][-1]
        return found

    def amount(self, key: str, side: str) -> Any:
        found = self.rows[key][side]
        return None if found is None else found["amount"]


class Mover:
    """A backend that moves data, and a real client of it."""

    def __init__(self, directory: Path, *hosts: str, **buckets: str) -> None:
        self._env = {"POLICY": str(POLICY), "SOURCES": sources(directory, *hosts, **buckets)}
        self.backend = Backend.start(directory / "data", **self._env)
        self.files = self.backend.data / "files" / "acme"
        self.files.mkdir(parents=True)
        self.client = self.backend.client()

    def again(self) -> None:
        """Another backend on the same data, after the one before was killed."""
        self.backend.kill9()
        self.backend.stop()
        self.backend = Backend.start(self.backend.data, **self._env)
        self.client = self.backend.client()

    def schedule(self, name: str, source_type: str = "file", **conn_args: Any) -> str:
        """Start a move that nobody waits for; its job's id."""
        from kamiwaza_sdk.schemas.ingestion import IngestJobCreate

        job = IngestJobCreate(job_id=name, schedule="@once", source_type=source_type, conn_args=conn_args)
        said = self.client.ingestion.schedule_job(job)
        assert said.status == "scheduled"
        return str(said.job_id)

    def status(self, name: str) -> dict[str, Any]:
        """With what the SDK drops: how much was moved."""
        with self.backend.http() as http:
            answer: dict[str, Any] = http.get(f"/ingestion/ingest/status/{name}").json()
        return answer

    def becomes(self, name: str, wanted: str) -> None:
        until(lambda: self.client.ingestion.get_job_status(name).status == wanted)

    def envelope(self, *words: str) -> str:
        """What the command prints, beside the backend."""
        ran = CliRunner().invoke(cli, ["--ledger", f"sqlite:///{self.backend.data}/envelopes.db", *words, "--json"])
        assert ran.exit_code == 0, ran.output
        return ran.output

    def envelopes(self) -> list[dict[str, Any]]:
        """All moves, the newest first."""
        return [json.loads(line) for line in self.envelope("list", "--kind", "data.move").splitlines()]

    def newest(self) -> Told:
        """The record of what was asked for last."""
        return self.shown(self.envelopes()[0]["id"])

    def shown(self, reference: str) -> Told:
        return Told(json.loads(self.envelope("show", reference)))

    def ended(self, reference: str, wanted: str) -> Told:
        """Its record, once it says so."""
        return until(lambda: (shown := self.shown(reference)).data["state"] == wanted and shown)

    def held(self) -> bytes:
        """Every byte that the backend wrote of its own: ledger, jobs, log, what it said."""
        data = self.backend.data
        paths = [*data.glob("*.db*"), data / "log.jsonl", data.parent / f"{data.name}.stderr"]
        return b"".join(path.read_bytes() for path in paths)

    def verified(self) -> bool:
        return bool(json.loads(self.envelope("verify"))["sound"])
