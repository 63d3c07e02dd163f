"""The `envelope` command, on ledgers written through the seam."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import pytest
from click.testing import CliRunner, Result

from execution_envelope import (
    AdmissionController,
    Ask,
    Decision,
    Denied,
    Grant,
    Rule,
    Subject,
    Target,
    cli,
    cli_shared,
    cli_upkeep,
)
from execution_envelope.ledger import SqliteLedger, open_ledger, search
from execution_envelope.testing import FakeClock

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"
COMMANDS = (
    *("", "list", "show", "explain", "verify", "tail"),
    *("hooks", "plan", "approve", "deny", "budgets", "review", "revoke"),
    *("keygen", "checkpoint", "prove", "check"),
    *("project", "rebuild", "coverage", "totals", "relay", "replay"),
    *("serve", "token", "simulate"),
    *("migrate", "segment", "segment new", "segment list", "segment export", "segment check", "segment drop"),
)


@dataclass
class Sample:
    path: Path
    granted: str
    denied: str
    pending: str

    @property
    def url(self) -> str:
        return f"sqlite:///{self.path}"


def ask(subject: str = "dana", tenant: str = "acme", kind: str = "model.deploy") -> Ask:
    return Ask(
        kind=kind,
        operation="serving.deploy_model",
        target=Target("model", "smollm2"),
        subject=Subject("user", subject, tenant=tenant),
        requested={"memory": "512MiB", "context": 32768},
    )


async def write(path: Path) -> Sample:
    no_eve = Rule(
        "no-eve",
        lambda envelope: (
            Decision.deny("policy", "\x1b[31m[bold]not you[/bold]") if envelope.identity.subject.id == "eve" else None
        ),
    )
    ids = (f"01980000-0000-7000-8000-{number:012x}" for number in count(1))
    controller = AdmissionController.open(f"sqlite:///{path}", hooks=[no_eve], new_id=lambda: next(ids))
    first = await controller.begin(ask())
    await first.bind("deployment", "dep-1")
    await first.grant(
        Grant({"memory": "512MiB", "context": 8192}, because={"context": ("capacity", "8192 tokens fit")})
    )
    denied = ""
    try:
        await controller.begin(ask("eve"))
    except Denied as refusal:
        denied = refusal.envelope_id or ""
    pending = await controller.begin(ask(tenant="globex", kind="inference"))
    await controller.attempted("POST /deploy", "invalid_body", status=422, detail="memory: expected \x1b[1ma number")
    await controller.aclose()
    return Sample(path, first.id, denied, pending.id)


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return anyio.run(write, tmp_path / "envelopes.db")


def run(*arguments: str, env: dict[str, str | None] | None = None) -> Result:
    return CliRunner().invoke(
        cli.cli, arguments, prog_name="envelope", env={cli_shared.ENV: None, "COLUMNS": "100"} | (env or {})
    )


def in_order(*arguments: str, sample: Sample) -> Result:
    return run("--ledger", sample.url, *arguments)


def json_lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def complains(result: Result, *said: str) -> None:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("envelope: ")
    assert not lines[0].endswith(".")
    assert all(text in lines[0] for text in said), lines[0]


def tamper(path: Path, *statements: str) -> None:
    """Change rows as somebody with an editor would, and put the guards back."""
    with sqlite3.connect(path) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        for statement in (*statements, *(sql for _, sql in triggers)):
            connection.execute(statement)
    connection.close()


def place(sample: Sample, envelope: str, sequence: int) -> int:
    """Where an event is kept."""
    with closing(sqlite3.connect(sample.path)) as connection:
        query = "SELECT place FROM places WHERE envelope = ? AND sequence = ?"
        [found] = connection.execute(query, (envelope, sequence)).fetchone()
    return int(found)


def spawn(*arguments: str, url: str, prelude: str = "") -> subprocess.Popen[str]:
    code = f"{prelude}\nfrom execution_envelope.cli import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, cli_shared.ENV: url, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Which ledger


def test_the_ledger_is_named_before_or_after_the_command_or_by_the_environment(sample: Sample) -> None:
    assert run("--ledger", sample.url, "list").exit_code == 0
    assert run("list", "--ledger", sample.url).exit_code == 0
    assert run("list", env={cli_shared.ENV: sample.url}).exit_code == 0
    assert run("--ledger", "sqlite:////nowhere.db", "list", "--ledger", sample.url).exit_code == 0


MISSED = [["list"], ["list", "--attempted"], ["show", "x" * 8], ["verify"], ["tail"], ["project"], ["rebuild"]]
MISSED += [["coverage"], ["migrate"], ["segment", "new"], ["segment", "list"], ["segment", "export", "1", "--out", "."]]


@pytest.mark.parametrize("command", MISSED, ids=" ".join)
def test_a_missing_ledger_is_named_and_never_created(tmp_path: Path, command: Sequence[str]) -> None:
    path = tmp_path / "missing.db"
    complains(run(*command, "--ledger", f"sqlite:///{path}"), f"there is no file `{path}`")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_ledger_is_refused_and_left_alone(tmp_path: Path) -> None:
    other, text, empty = tmp_path / "other #1?.db", tmp_path / "text.db", tmp_path / "empty.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (id)")
    connection.close()
    text.write_text("not a database, but long enough to be taken for one" * 10)
    empty.touch()
    before = {path: path.read_bytes() for path in (other, text, empty)}
    complains(run("list", "--ledger", f"sqlite:///{other}"), f"`{other}` is another database")
    complains(run("list", "--ledger", f"sqlite:///{text}"), f"`{text}` is not an SQLite database")
    complains(run("verify", "--ledger", f"sqlite:///{empty}"), f"`{empty}` is an empty database")
    complains(run("list", "--ledger", f"sqlite:///{tmp_path}"), "is not a file")
    assert {path: path.read_bytes() for path in sorted(tmp_path.iterdir())} == before


def test_a_ledger_without_a_version_is_said_without_a_traceback(sample: Sample) -> None:
    tamper(sample.path, "DELETE FROM ledger_schema")
    complains(in_order("list", sample=sample), f"expected ledger schema 2 to 5, `{sample.path}` has none")


@pytest.mark.parametrize("command", [["list"], ["list", "--attempted"], ["show", "deployment:dep-1"], ["verify"]])
def test_it_reads_while_somebody_holds_the_write_lock(sample: Sample, command: Sequence[str]) -> None:
    with closing(sqlite3.connect(sample.path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        assert in_order(*command, sample=sample).exit_code == 0
        assert time.monotonic() - began < 2
        writer.execute("ROLLBACK")


def test_bad_input_is_one_line(sample: Sample) -> None:
    complains(run("list"), "expected a ledger, none is named", cli_shared.ENV)
    complains(run("list", "--ledger", "memory://"), "memory://")
    complains(run("list", "--ledger", "mysql://dana:s3cret@db/x"), "expected `sqlite:///path`")
    assert "s3cret" not in run("list", "--ledger", "mysql://dana:s3cret@db/x").stderr
    complains(run("bogus"), "no such command 'bogus'")
    complains(in_order("list", "--limit", "0", sample=sample), "--limit")
    complains(in_order("list", "--state", "bogus", sample=sample), "bogus")
    complains(in_order("list", "--attempted", "--tenant", "acme", sample=sample), "--attempted without")
    complains(in_order("show", sample=sample), "missing argument")
    complains(in_order("show", "deployment:\x1b[31mnone", sample=sample), "none is bound to `deployment:[31mnone`")


def test_bad_input_for_upkeep_and_projections_is_one_line(sample: Sample, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path))
    complains(in_order("coverage", "--limit", "-1", sample=sample), "--limit")
    complains(in_order("project", "--bogus", sample=sample), "no such option")
    complains(in_order("rebuild", "now", sample=sample), "unexpected extra argument")
    complains(in_order("migrate", "4", sample=sample), "unexpected extra argument")
    complains(in_order("segment", "bogus", sample=sample), "no such command 'bogus'")
    complains(in_order("segment", "new", "2", sample=sample), "unexpected extra argument")
    complains(in_order("segment", "export", "one", *out, sample=sample), "'one'")
    complains(in_order("segment", "export", "7", *out, sample=sample), "expected a segment of 1, there is no 7")
    complains(in_order("segment", "export", "1", *out, sample=sample), "expected segment 1 to be ready to go")
    complains(in_order("segment", "export", "1", "--out", str(sample.path), sample=sample), "is a file")
    complains(in_order("segment", "check", str(tmp_path / "none"), sample=sample), "expected a manifest to read")
    complains(in_order("segment", "check", str(sample.path), sample=sample), "expected a manifest")
    complains(in_order("segment", "check", "x", "--against", "x", sample=sample), "--against and --public-key together")
    complains(in_order("segment", "drop", "1", sample=sample), "missing option")
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("events")] == []


def test_without_a_command_it_says_what_it_can() -> None:
    result = run()
    assert result.exit_code == 0
    assert "Usage: envelope" in result.stdout


@pytest.mark.parametrize("module", ["click", "rich"])
def test_without_the_extra_it_says_which_to_install(module: str) -> None:
    process = spawn(url="", prelude=f"import sys; sys.modules[{module!r}] = None")
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (
        2,
        "",
        "expected the extra: pip install 'execution-envelope[cli]'\n",
    )


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("cryptography", "signing", ["keygen", "--out", "."]),
        ("pyarrow", "parquet", ["segment", "export", "1", "--out", "."]),
        ("psycopg", "postgres", ["list", "--ledger", "postgresql://nobody@localhost/nothing"]),
        ("cloudevents", "cloudevents", ["relay", "--to", "http://127.0.0.1:1/"]),
        ("httpx", "cloudevents", ["relay", "--to", "http://127.0.0.1:1/"]),
        ("nats", "nats", ["relay", "--to", "nats://127.0.0.1:1", "--subject", "s"]),
    ],
)
def test_without_another_extra_only_what_needs_it_says_so(
    sample: Sample, module: str, extra: str, command: list[str]
) -> None:
    for arguments, status in ((["list"], 0), (["verify"], 0), (command, 2)):
        process = spawn(*arguments, url=sample.url, prelude=f"import sys; sys.modules[{module!r}] = None")
        _, error = process.communicate(timeout=30)
        assert process.returncode == status, error
        assert error == "" if status == 0 else f"execution-envelope[{extra}]" in error
        assert len(error.splitlines()) == bool(status)


# list


def test_list_is_newest_first(sample: Sample) -> None:
    found = json_lines(in_order("list", "--json", sample=sample))
    assert [item["id"] for item in found] == [sample.pending, sample.denied, sample.granted]
    assert found[2]["references"] == {"deployment": "dep-1"}
    assert found[2]["delta_in_words"] == "1 reduced"
    text = in_order("list", sample=sample).stdout
    assert text.index(sample.pending[-12:]) < text.index(sample.denied[-12:]) < text.index(sample.granted[-12:])


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        (["--limit", "1"], ["pending"]),
        (["--state", "denied"], ["denied"]),
        (["--state", "denied", "--state", "granted"], ["denied", "granted"]),
        (["--kind", "inference"], ["pending"]),
        (["--tenant", "acme", "--limit", "1"], ["denied"]),
        (["--tenant", "nobody"], []),
    ],
)
def test_list_filters(sample: Sample, filters: list[str], names: list[str]) -> None:
    found = json_lines(in_order("list", "--json", *filters, sample=sample))
    assert [item["id"] for item in found] == [getattr(sample, name) for name in names]


def test_list_takes_a_query(sample: Sample) -> None:
    def ids(*arguments: str) -> list[str]:
        return [item["id"] for item in json_lines(in_order("list", "--json", *arguments, sample=sample))]

    assert ids("--where", "outcome=reduced and kind=model.deploy") == [sample.granted]
    assert ids("--where", "state=denied or kind=inference", "--kind", "inference") == [sample.pending]
    assert ids("--where", "state=denied or state=granted", "--all", "--limit", "1") == [sample.denied, sample.granted]
    assert ids("--after", sample.denied) == [sample.granted]
    complains(in_order("list", "--where", "kynd=x", sample=sample), "did you mean `kind`, at character 1 - at `query`")
    complains(in_order("list", "--all", sample=sample), "--all with --json")
    complains(in_order("list", "--attempted", "--where", "late", sample=sample), "--attempted without")
    complains(in_order("list", "--after", "x" * 201, sample=sample), "at `after`")


def test_list_says_how_to_go_on(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "LOOK", 1)
    where = ["--where", "not target~'no such'  and tenant=acme and target~q", "--limit", "2"]
    seen = []
    command = ["list", "--json", *where]
    for _ in range(9):
        result = in_order(*command, sample=sample)
        assert result.exit_code == 0
        seen += [json.loads(line)["id"] for line in result.stdout.splitlines()]
        if not result.stderr:
            break
        assert result.stderr.startswith("envelope: looked back to 20")
        command = shlex.split(result.stderr.partition("to go on: envelope ")[2])
        assert command[:-2] == ["list", "--json", *where]
    monkeypatch.undo()
    assert len(command) > 6
    assert seen == [item["id"] for item in json_lines(in_order("list", "--json", *where, sample=sample))]


def test_list_names_what_is_damaged_whatever_is_looked_for(sample: Sample) -> None:
    assert in_order("list", sample=sample).exit_code == 0
    # What the projection knows already, and what it finds damaged.
    for again in (False, True):
        if again:
            sample.path.with_name(f"{sample.path.name}-projection").unlink()
        else:
            tamper(sample.path, f"UPDATE events_1 SET sealed = x'7b' WHERE place = {place(sample, sample.denied, 0)}")
        found = in_order("list", "--json", "--tenant", "acme", sample=sample)
        complains(found, sample.denied, "run `envelope verify`")
        assert [json.loads(line)["id"] for line in found.stdout.splitlines()] == [sample.granted]


def test_list_writes_beside_the_ledger_or_nowhere(sample: Sample) -> None:
    file = sample.path.with_name(f"{sample.path.name}-projection")
    file.mkdir()
    assert len(json_lines(in_order("list", "--json", sample=sample))) == 3
    file.rmdir()
    assert len(json_lines(in_order("list", "--json", sample=sample))) == 3
    assert file.is_file()
    file.write_text("somebody else's" * 1000)
    complains(in_order("list", sample=sample), str(file))


def test_list_attempted(sample: Sample) -> None:
    assert "\x1b" not in in_order("list", "--attempted", sample=sample).stdout
    (found,) = json_lines(in_order("list", "--attempted", "--json", sample=sample))
    assert (found["surface"], found["status"], found["reason"]) == ("POST /deploy", 422, "invalid_body")


# show


def test_show_takes_an_id_a_reference_or_a_piece_of_an_id(sample: Sample) -> None:
    for name in (sample.granted, "deployment:dep-1", sample.granted[-8:], sample.granted[-20:].upper()):
        result = in_order("show", name, sample=sample)
        assert result.exit_code == 0, result.stderr
        assert sample.granted in result.stdout
        assert "sound" in result.stdout


def test_show_names_what_an_ambiguous_piece_stands_for(sample: Sample) -> None:
    ids = (sample.granted, sample.denied, sample.pending)
    complains(in_order("show", sample.granted[: cli_shared.MIN_PIECE], sample=sample), "expected one envelope", *ids)
    complains(in_order("show", sample.granted[-7:], sample=sample), "at least 8 characters")
    complains(in_order("show", "0" * 36, sample=sample), "none has the id")


def test_show_is_inert(sample: Sample) -> None:
    text = in_order("show", sample.denied, sample=sample).stdout
    assert "\x1b" not in text
    assert "[31m[bold]not you[/bold]" in text


def test_show_json_is_everything(sample: Sample) -> None:
    result = in_order("show", "--json", "deployment:dep-1", sample=sample)
    data = json.loads(result.stdout)
    context = next(line for line in data["resources"] if line["key"] == "context")
    assert context["granted"] == {"amount": 8192, "per": "total", "total": 8192}
    assert context["reasons"] == [{"cause": "capacity", "by": "backend", "text": "8192 tokens fit"}]
    assert [event["type"] for event in data["timeline"]] == ["sealed", "verdict", "admitted", "bound", "granted"]
    assert data["chain"]["sound"] is True
    assert data["envelope"]["identity"]["subject"] == {"type": "user", "id": "dana"}


def test_show_recomputes_what_is_shown_and_nothing_else(sample: Sample) -> None:
    tamper(sample.path, f"UPDATE events_1 SET hash = x'00' WHERE place = {place(sample, sample.denied, 1)}")
    result = in_order("show", sample.denied, "--json", sample=sample)
    assert result.exit_code == 1
    found = json.loads(result.stdout)["chain"]
    # The entry behind it hangs on it.
    assert [finding["row"] for finding in found["findings"]] == [f"event {found['chains'][0]}/{n}" for n in (7, 8)]
    assert in_order("show", sample.granted, sample=sample).exit_code == 0


def test_show_names_what_is_not_sound(sample: Sample) -> None:
    changed = "CAST(replace(CAST(body AS TEXT), '8192 tokens fit', '4096 tokens fit') AS BLOB)"
    tamper(sample.path, f"UPDATE events_1 SET body = {changed}")
    result = in_order("show", "deployment:dep-1", sample=sample)
    assert result.exit_code == 1
    assert "NOT SOUND" in result.stdout
    assert "its hash does not follow" in " ".join(result.stdout.split())


# Tampered rows


@pytest.mark.parametrize("body", ["x'7b22'", "x'7b2278223a22ff227d'", "'not json'", "x''", "'{}'", "42"])
@pytest.mark.parametrize("column", ["body", "sealed"])
def test_a_tampered_row_is_said_without_a_traceback(sample: Sample, column: str, body: str) -> None:
    tamper(sample.path, f"UPDATE events_1 SET {column} = {body} WHERE place = {place(sample, sample.denied, 0)}")
    complains(in_order("show", sample.denied, sample=sample), sample.denied, "run `envelope verify`")
    listed = in_order("list", sample=sample)
    complains(listed, sample.denied, "run `envelope verify`")
    assert sample.granted[-12:] in listed.stdout
    tailed = in_order("tail", "--no-follow", sample=sample)
    assert tailed.exit_code == (2 if column == "body" else 0)
    assert all(line.startswith("envelope: expected a readable entry") for line in tailed.stderr.splitlines())
    verified = in_order("verify", sample=sample)
    assert (
        verified.exit_code == 1 and (f"envelope {sample.denied}" if column == "sealed" else "event ") in verified.stdout
    )
    assert sample.granted in in_order("show", sample.granted, sample=sample).stdout


@pytest.mark.parametrize("table", ["events_1", "places"])
def test_a_missing_beginning_is_said_without_a_traceback(sample: Sample, table: str) -> None:
    tamper(sample.path, f"DELETE FROM {table} WHERE place = {place(sample, sample.granted, 0)}")
    complains(in_order("show", sample.granted, sample=sample), sample.granted, "run `envelope verify`")


# verify


def test_verify_a_sound_ledger(sample: Sample) -> None:
    result = in_order("verify", sample=sample)
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert text.startswith("sound: 3 envelopes, 13 entries in 1 chain recomputed")
    assert "cannot be known from the ledger alone: whether the newest entries were cut off" in text
    assert "whether the newest chains were removed as a whole from the end" in text
    assert result.stderr == ""
    (data,) = json_lines(in_order("verify", "--json", sample=sample))
    assert data == {
        "sound": True,
        "envelopes": 3,
        "entries": 13,
        "chains": 1,
        "findings": [],
        "more": 0,
        "against": None,
        "copy": None,
        "unknowable": list(cli.UNKNOWABLE),
        "unknowable_after": None,
    }


def test_verify_names_the_rows_and_the_first_bad_one_first(sample: Sample) -> None:
    last, first = place(sample, sample.pending, 1), place(sample, sample.granted, 2)
    tamper(sample.path, f"UPDATE events_1 SET hash = x'00' WHERE place IN ({last}, {first})")
    with closing(open_ledger(sample.url, read_only=True)) as ledger:
        [head] = ledger.chains()
    rows = [f"event {head.id}/{position & 0xFFFFFFFF}" for position in (first, first + 1, last, last + 1)]
    problem = "its hash does not follow from the entry before it and its bytes"
    for jobs in ("1", "2"):
        result = in_order("verify", "--jobs", jobs, sample=sample)
        assert result.exit_code == 1
        assert result.stdout.splitlines()[1] == f"{rows[0]}: {problem}"
        result = in_order("verify", "--jobs", jobs, "--json", sample=sample)
        assert result.exit_code == 1
        assert json.loads(result.stdout)["findings"] == [{"row": row, "problem": problem} for row in rows]


def test_verify_with_no_jobs_is_refused(sample: Sample) -> None:
    complains(in_order("verify", "--jobs", "0", sample=sample), "--jobs")


# tail


def test_tail_prints_what_was_recorded_last(sample: Sample) -> None:
    lines = in_order("tail", "--no-follow", sample=sample).stdout.splitlines()
    assert len(lines) == 13
    assert "a chain was opened by pid" in lines[0]
    assert "the chain was closed in order, 11 events stored in it" in lines[-1]
    found = json_lines(in_order("tail", "--no-follow", "--json", "--since", "3", sample=sample))
    assert [(item["envelope"], item["type"]) for item in found] == [
        (sample.pending, "verdict"),
        (sample.pending, "admitted"),
        (None, "closed"),
    ]
    assert [item["position"] for item in found] == [10, 11, 12]
    assert in_order("tail", "--no-follow", "--since", "0", sample=sample).stdout == ""


def test_tail_of_one_envelope(sample: Sample) -> None:
    found = json_lines(in_order("tail", "--no-follow", "--json", "--since", "2", "deployment:dep-1", sample=sample))
    assert [(item["envelope"], item["sequence"]) for item in found] == [(sample.granted, 3), (sample.granted, 4)]


def note(sample: Sample, part: str) -> None:
    async def resume() -> None:
        controller = AdmissionController.open(sample.url)
        await (await controller.resume(sample.granted, by="test")).ready(part)
        await controller.aclose()

    anyio.run(resume)


def test_tail_orders_the_entries_of_all_chains_by_time(sample: Sample) -> None:
    """Two processes write at once; one that was opened first may be the last to write."""

    async def write() -> None:
        clock = FakeClock(datetime.now(UTC) + timedelta(hours=1))
        with (
            closing(SqliteLedger(sample.path, clock=clock)) as one,
            closing(SqliteLedger(sample.path, clock=clock)) as two,
        ):
            for number, ledger in enumerate((one, two, one, two, one)):
                clock.advance(seconds=1)
                controller = AdmissionController(ledger, clock=clock)
                await (await controller.resume(sample.granted, by=f"n{number}")).ready(f"p{number}")

    anyio.run(write)
    found = json_lines(in_order("tail", "--no-follow", "--json", "--since", "9", sample=sample))
    assert [item["at"] for item in found] == sorted(item["at"] for item in found)
    assert [item["type"] for item in found] == ["opened", "ready", "opened", *["ready"] * 4, *["closed"] * 2]
    assert [item["by"] for item in found if item["type"] == "ready"] == [f"n{number}" for number in range(5)]
    assert len({item["chain"] for item in found}) == 2 and "cursor" not in found[0]
    assert found[-4:] == json_lines(in_order("tail", "--no-follow", "--json", "--since", "4", sample=sample))


def test_tail_follows_until_interrupted(sample: Sample) -> None:
    with spawn("tail", "--since", "1", url=sample.url) as process:
        assert process.stdout is not None
        assert "the chain was closed" in process.stdout.readline()
        for part in ("p0", "p1"):
            note(sample, part)
            assert "a chain was opened" in process.stdout.readline()
            assert f"{part} serves" in process.stdout.readline()
            assert "the chain was closed in order, 1 event stored" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
        assert (process.returncode, out, error) == (0, "", "")


def test_tail_ends_in_silence_when_nobody_reads(sample: Sample) -> None:
    with spawn("tail", "--since", "1", url=sample.url) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) in (0, -signal.SIGPIPE)


def test_reading_leaves_the_ledger_as_it_is(sample: Sample) -> None:
    ledger = open_ledger(sample.url, read_only=True)
    before = [row for head in ledger.chains() for row in ledger.rows(head.id)]
    ledger.close()
    for arguments in (["list"], ["show", sample.granted], ["verify"], ["tail", "--no-follow"]):
        in_order(*arguments, sample=sample)
    assert [row for head in ledger.chains() for row in ledger.rows(head.id)] == before and len(before) == 13
    ledger.close()


def test_a_terminal_without_unicode_gets_escapes(tmp_path: Path) -> None:
    path = tmp_path / "envelopes.db"

    async def fill() -> None:
        controller = AdmissionController.open(f"sqlite:///{path}")
        await controller.begin(ask("Zoë"))
        await controller.aclose()

    anyio.run(fill)
    process = spawn("list", url=f"sqlite:///{path}", prelude="import sys; sys.stdout.reconfigure(encoding='ascii')")
    out, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, "")
    assert r"acme/user:Zo\xeb" in out


# The page


MORE = ("migrate", "segment list")


def help_of(command: str) -> str:
    result = CliRunner().invoke(cli.cli, [*command.split(), "--help"], prog_name="envelope", terminal_width=100)
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_shows_the_real_help(command: str) -> None:
    assert set(COMMANDS) == {"", *cli.cli.commands, *(f"segment {name}" for name in cli_upkeep.segment.commands)}
    blocks = re.findall(r"```console\n\$ (envelope(?: \w+)*) --help\n(.*?)```", PAGE.read_text(), re.S)
    assert dict(blocks)[f"envelope {command}".strip()] == help_of(command)


def test_the_page_names_every_key_of_the_json(sample: Sample) -> None:
    page = PAGE.read_text()
    shown = json.loads(in_order("show", "--json", "deployment:dep-1", sample=sample).stdout)
    listed = json_lines(in_order("list", "--json", sample=sample))[0]
    attempted = json_lines(in_order("list", "--json", "--attempted", sample=sample))[0]
    entry = json_lines(in_order("tail", "--no-follow", "--json", "--since", "1", sample=sample))[0]
    verified = json_lines(in_order("verify", "--json", sample=sample))[0]
    nested = [*shown["resources"], *shown["parts"], *shown["verdicts"], *shown["timeline"], shown["chain"]]
    covered = json.loads(in_order("coverage", "--json", sample=sample).stdout)
    migrated, segment = (json_lines(in_order(*name.split(), "--json", sample=sample))[0] for name in MORE)
    nested += [covered, covered["open"], migrated, segment]
    keys = {key for data in (shown, listed, attempted, entry, verified, *nested) for key in data}
    assert {key for key in keys if f"`{key}`" not in page} == set()
