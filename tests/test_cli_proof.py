"""`envelope keygen`, `checkpoint`, `prove` and `check`, and what `verify --against` calls."""

from __future__ import annotations

import json
import shutil
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from execution_envelope import cli, cli_proof, cli_shared
from execution_envelope.envelope import canonical
from execution_envelope.errors import NotFound
from execution_envelope.ledger import SqliteLedger, schema
from execution_envelope.ledger.checkpoint import (
    KeyUnusable,
    NotProven,
    PublicKey,
    SigningKey,
    decode_checkpoint,
    read_checkpoint,
    verify_signature,
)
from execution_envelope.lifecycle import Bound, Completed
from tests.test_checkpoint import admit, cut, edit, more, numbers, rewrite


class Place:
    """A ledger with a bound envelope, keys and a folder for checkpoints, each in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / "ledger" / "l.db"
        self.keys, self.kept = root / "keys", root / "kept"
        for folder in (self.path.parent, self.keys, self.kept):
            folder.mkdir(parents=True)
        with closing(SqliteLedger(self.path)) as ledger:
            self.id = admit(ledger)
            more(ledger, self.id, 2, Bound("deployment", "dep-1", "supervisor", "2026-05-01T13:00:00Z"))
        self.key, self.public = self.keys / "signing-key.pem", self.keys / "public-key.pem"
        key = SigningKey.generate()
        key.save(self.key)
        key.public.save(self.public)

    def run(self, *arguments: str | Path, url: str | None = None) -> Result:
        return run("--ledger", url or f"sqlite:///{self.path}", *arguments)

    def checkpoint(self, *more: str | Path) -> Result:
        return self.run("checkpoint", "--key", self.key, "--out", self.kept, *more)

    def prove(self, file: Path, name: str | None = None) -> Result:
        return self.run("prove", name or self.id, "--against", self.kept, "--out", file)

    def write(self) -> str:
        with closing(SqliteLedger(self.path)) as ledger:
            return admit(ledger)


def run(*arguments: str | Path) -> Result:
    env = {cli_shared.ENV: None, "COLUMNS": "100"}
    return CliRunner().invoke(cli.cli, [str(argument) for argument in arguments], prog_name="envelope", env=env)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def complains(result: Result, *said: str, status: int = 2) -> None:
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    assert line.startswith("envelope: ") and not line.endswith(".")
    assert all(text in line for text in said), line


def fine(result: Result) -> str:
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


# Keys


def test_keygen_makes_a_pair(tmp_path: Path) -> None:
    said = fine(run("keygen", "--out", tmp_path))
    private, public = tmp_path / "signing-key.pem", tmp_path / "public-key.pem"
    assert PublicKey.load(public).id == SigningKey.load(private).public.id
    assert f"key {PublicKey.load(public).id}" in said and str(private) in said
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    complains(run("keygen", "--out", tmp_path), "no key is overwritten")
    public.unlink()
    complains(run("keygen", "--out", tmp_path), "no key is overwritten")
    assert private.read_bytes() == before and not public.exists()
    complains(run("keygen", "--out", tmp_path / "missing"), "does not exist")


def test_a_key_beside_the_ledger_is_refused(place: Place) -> None:
    home = place.path.parent
    (home / "below").mkdir()
    complains(place.run("keygen", "--out", home), "expected the signing key apart from the ledger")
    link = place.root / "link"
    link.symlink_to(home)
    for folder in (home, home / "below", link):
        key = folder / "key.pem"
        shutil.copy(place.key, key)
        complains(
            place.run("checkpoint", "--key", key, "--out", place.kept), "expected the signing key apart", str(key)
        )
        key.unlink()
    # The file elsewhere, with its name beside the ledger, and the other way round.
    (home / "key.pem").symlink_to(place.key)
    complains(place.run("checkpoint", "--key", home / "key.pem", "--out", place.kept), "apart from the ledger")
    shutil.copy(place.key, home / "real.pem")
    (place.keys / "name.pem").symlink_to(home / "real.pem")
    complains(place.run("checkpoint", "--key", place.keys / "name.pem", "--out", place.kept), "apart from the ledger")
    shutil.copy(place.key, place.path.parent.parent / "above.pem")
    fine(place.run("checkpoint", "--key", place.root / "above.pem", "--out", place.kept))


# Checkpoints


def test_checkpoints_follow_each_other(place: Place) -> None:
    said = fine(place.checkpoint())
    assert (
        "checkpoint 1 of " in said and "5 entries in 1 chain" in said and str(place.kept / "checkpoint-1.json") in said
    )
    place.write()
    data = json.loads(fine(place.checkpoint("--json")))
    assert (data["checkpoint"], data["entries"], data["chains"], data["inside"]) == (2, 9, 2, True)
    assert data["file"] == str(place.kept / "checkpoint-2.json")
    key = PublicKey.load(place.public)
    with closing(SqliteLedger(place.path, read_only=True)) as ledger:
        copies = ledger.checkpoints()
    for number, copy in enumerate(copies, start=1):
        assert (place.kept / f"checkpoint-{number}.json").read_bytes() == copy
        verify_signature(decode_checkpoint(copy), key)
    assert len(copies) == 2


def test_the_newest_is_that_outside_or_that_inside(place: Place) -> None:
    fine(place.checkpoint())
    fine(place.checkpoint())
    other = place.root / "other"
    other.mkdir()
    fine(place.run("checkpoint", "--key", place.key, "--out", other))
    assert [file.name for file in other.iterdir()] == ["checkpoint-3.json"]
    edit(place.path, lambda c: c.execute("DELETE FROM checkpoints") and None)
    fine(place.checkpoint())
    assert read_checkpoint(place.kept).statement.number == 3
    complains(
        place.run("checkpoint", "--key", place.key, "--out", other), "expected one checkpoint 3", "different ones"
    )


def test_a_ledger_that_contradicts_the_newest_is_not_signed(place: Place) -> None:
    fine(place.checkpoint())
    ((number, id),) = numbers(place.path)
    edit(place.path, lambda connection: cut(connection, number, 3))
    complains(place.checkpoint(), "nothing was signed", f"chain {id}", "expected 5 entries, got 3", status=1)
    assert [file.name for file in place.kept.iterdir()] == ["checkpoint-1.json"]


def test_checkpoints_of_another_ledger_or_key_are_not_gone_on_from(place: Place, tmp_path: Path) -> None:
    fine(place.checkpoint())
    other = Place(tmp_path / "other")
    complains(
        other.run("checkpoint", "--key", place.key, "--out", place.kept),
        "nothing was signed",
        "expected ledger",
        status=1,
    )
    fine(other.checkpoint())
    complains(other.run("checkpoint", "--key", other.key, "--out", place.kept), "has those of another")
    complains(place.run("checkpoint", "--key", other.key, "--out", place.kept), "expected key")
    fine(place.run("checkpoint", "--key", other.key, "--out", place.kept, "--previous-key", place.public))


def test_a_forged_copy_inside_is_refused(place: Place) -> None:
    fine(place.checkpoint())
    with closing(SqliteLedger(place.path)) as ledger:
        ledger.keep_checkpoint(2, b"{}")
    complains(place.checkpoint(), "expected a readable copy of the newest checkpoint")
    forged = read_checkpoint(place.kept)
    edit(
        place.path,
        lambda c: (
            c.execute(
                "UPDATE checkpoints SET body = ? WHERE number = 2",
                (canonical(forged).replace(b'"number":1', b'"number":2'),),
            )
            and None
        ),
    )
    complains(place.checkpoint(), "expected a signature by key")


def test_where_the_ledger_has_no_room_or_is_not_writable_the_copy_outside_is_enough(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = place.root / "old" / "l.db"
    old.parent.mkdir()
    with closing(sqlite3.connect(old)) as connection:
        connection.executescript(schema.migrations("sqlite")[2])
    with closing(SqliteLedger(old)) as ledger:
        admit(ledger)
    result = place.run("checkpoint", "--key", place.key, "--out", place.kept, url=f"sqlite:///{old}")
    assert (
        result.exit_code == 0
        and "no copy in the ledger: its schema is too old, run `envelope migrate`" in result.stderr
    )
    assert [file.name for file in place.kept.iterdir()] == ["checkpoint-1.json"]
    open_ledger, fresh = cli_proof.open_ledger, place.root / "fresh"
    fresh.mkdir()
    monkeypatch.setattr(cli_proof, "open_ledger", lambda url, read_only=True: open_ledger(url, read_only=True))
    result = place.run("checkpoint", "--key", place.key, "--out", fresh, "--json")
    assert result.exit_code == 0 and "no copy in the ledger: expected a ledger to write to" in result.stderr
    assert json.loads(result.stdout)["inside"] is False and (fresh / "checkpoint-1.json").exists()


def test_checkpoints_beside_the_ledger_are_warned_of(place: Place) -> None:
    result = place.run("checkpoint", "--key", place.key, "--out", place.path.parent)
    assert result.exit_code == 0 and "is beside the ledger" in result.stderr


@pytest.mark.parametrize("command", ["checkpoint", "prove", "check"])
def test_what_is_missing_is_named(place: Place, command: str) -> None:
    missing = place.root / "missing"
    arguments: dict[str, list[Any]] = {
        "checkpoint": ["--key", missing, "--out", place.kept],
        "prove": [place.id, "--against", missing, "--out", place.root / "proof"],
        "check": [missing, "--public-key", place.public],
    }
    complains(place.run(command, *arguments[command]), "expected a file to read", str(missing))
    arguments["check"] = [place.public, "--public-key", missing]
    complains(place.run("check", *arguments["check"]), "expected a file to read", str(missing))
    if command != "check":
        arguments["checkpoint"][1] = place.key
        fine(place.checkpoint())
        arguments["prove"][2] = place.kept
        result = run(command, *arguments[command])
        complains(result, "expected a ledger, none is named")
        url = f"sqlite:///{place.path.parent}/none.db"
        complains(run("--ledger", url, command, *arguments[command]), "there is no file")


# Proofs


def test_a_proof_is_written_and_checked_without_the_ledger(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fine(place.checkpoint())
    with closing(SqliteLedger(place.path)) as ledger:
        more(ledger, place.id, 3, Completed())
    file = place.root / "proof.json"
    said = fine(place.prove(file, "deployment:dep-1"))
    assert f"3 events of envelope {place.id} in checkpoint 1" in said
    assert "1 later event left out: not in the checkpoint" in said
    complains(place.prove(file), "expected no file")

    def connect(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(sqlite3, "connect", connect)
    shutil.rmtree(place.path.parent)
    shown = fine(run("check", file, "--public-key", place.public))
    assert place.id in shown and "proven: 3 events of this envelope in checkpoint 1" in shown
    assert "dana" in shown and "not shown by a proof: whether more was recorded of it" in shown
    data = json.loads(fine(run("check", file, "--public-key", place.public, "--json")))
    assert (data["proven"], data["events"], data["checkpoint"]) == (True, 3, 1)
    assert data["record"]["state"] == "admitted" and data["record"]["id"] == place.id
    assert data["key"] == PublicKey.load(place.public).id


def test_what_does_not_fit_is_named(place: Place) -> None:
    fine(place.checkpoint())
    file, changed = place.root / "proof.json", place.root / "changed.json"
    fine(place.prove(file))
    changed.write_text(file.read_text().replace("dana", "erin", 1))
    complains(run("check", changed, "--public-key", place.public), "not proven: expected digest", status=1)
    result = run("check", changed, "--public-key", place.public, "--json")
    assert result.exit_code == 1 and result.stderr == ""
    data = json.loads(result.stdout)
    assert data["proven"] is False and "expected digest of the sealed envelope" in data["problem"]
    changed.write_bytes(b"\xff\x00")
    complains(run("check", changed, "--public-key", place.public), "expected a proof", status=1)
    fine(run("keygen", "--out", place.root))
    complains(run("check", file, "--public-key", place.root / "public-key.pem"), "expected key", status=1)
    complains(run("check", file, "--public-key", file), "expected an Ed25519 public key")


def test_what_cannot_be_proven_is_named(place: Place) -> None:
    fine(place.checkpoint())
    file = place.root / "proof.json"
    complains(place.prove(file, place.write()), "it came later: take another checkpoint")
    complains(place.prove(file, "nobody"), "none has the id `nobody`")
    complains(place.prove(file, "deployment:other"), "none is bound to `deployment:other`")
    complains(place.prove(place.root / "missing" / "file"), "expected to write")
    number, id = numbers(place.path)[0]
    edit(place.path, lambda connection: rewrite(connection, number, 4))
    complains(place.prove(file), "nothing was proven", f"chain {id}", "it was rewritten", status=1)
    assert not file.exists()


# For `verify --against`


def test_what_verify_is_told(place: Place) -> None:
    fine(place.checkpoint())
    place.write()
    with closing(SqliteLedger(place.path, read_only=True)) as ledger:
        for file in (place.kept, place.kept / "checkpoint-1.json"):
            against = cli_proof.compare_against(ledger, file, place.public)
            assert (against.findings, against.after) == ([], 4)
            assert against.data()["checkpoint"] == 1 and against.data()["after"] == 4
            assert "checkpoint 1 of" in against.sentence() and "4 entries behind it" in against.sentence()
        fine(run("keygen", "--out", place.root))
        with pytest.raises(NotProven, match="expected key"):
            cli_proof.compare_against(ledger, place.kept, place.root / "public-key.pem")
        with pytest.raises(KeyUnusable, match="expected a file to read"):
            cli_proof.compare_against(ledger, place.kept, place.root / "missing.pem")
        with pytest.raises(NotProven, match="has none"):
            cli_proof.compare_against(ledger, place.keys, place.public)
        with pytest.raises(NotFound):
            cli_proof._named(ledger, "deployment:other")
    number, id = numbers(place.path)[0]
    edit(place.path, lambda connection: cut(connection, number, 3))
    with closing(SqliteLedger(place.path, read_only=True)) as ledger:
        (finding,) = cli_proof.compare_against(ledger, place.kept, place.public).findings
        assert finding.row == f"chain {id}" and "it was cut off from position 3 on" in finding.problem


def test_verify_holds_the_ledger_against_a_checkpoint(place: Place) -> None:
    alone = "cannot be known from the ledger alone: "
    assert alone in fine(place.run("verify")) and "copy inside" not in fine(place.run("verify"))
    fine(place.checkpoint())
    said = fine(place.run("verify"))
    assert "copy inside: checkpoint 1 of " in said and "nothing behind it" in said and alone in said
    assert "a copy inside the ledger proves nothing by itself" in said
    place.write()
    copy = json.loads(fine(place.run("verify", "--json")))["copy"]
    assert (copy["checkpoint"], copy["after"]) == (1, 4)
    against = ("--against", place.kept, "--public-key", place.public)
    said = fine(place.run("verify", *against))
    assert "held against checkpoint 1 of " in said and "4 entries behind it" in said and "copy inside" not in said
    assert alone not in said and "cannot be known of what came after checkpoint 1: " in said
    data = json.loads(fine(place.run("verify", "--json", *against)))
    assert data["sound"] and data["unknowable_after"] == data["against"]["checkpoint"] == 1 and data["copy"] is None
    page = (Path(__file__).parent.parent / "docs" / "reference" / "cli.md").read_text()
    checkpoint, checked = json.loads(place.checkpoint("--json").stdout), place.root / "p"
    fine(place.prove(checked))
    proven = json.loads(fine(run("check", checked, "--public-key", place.public, "--json")))
    assert [key for key in {*data["against"], *checkpoint, *proven} if f"`{key}`" not in page] == []


def test_verify_finds_what_the_ledger_alone_cannot_know(place: Place) -> None:
    older = place.path.read_bytes()
    place.write()
    fine(place.checkpoint())
    against = ("--against", place.kept, "--public-key", place.public)
    place.path.write_bytes(older)
    for file in place.path.parent.glob("l.db-*"):
        file.unlink()
    fine(place.run("verify"))
    result = place.run("verify", *against)
    assert (result.exit_code, result.stderr) == (1, "") and "1 finding" in result.stdout
    assert "chain " in result.stdout and "cannot be known from the ledger alone" in result.stdout
    result = place.run("verify", "--json", *against)
    data = json.loads(result.stdout)
    assert (result.exit_code, data["sound"], len(data["findings"]), data["unknowable_after"]) == (1, False, 1, None)


def test_what_both_find_is_said_once_and_a_ledger_that_cannot_be_compared_is_said(place: Place) -> None:
    fine(place.checkpoint())
    against = ("--against", place.kept, "--public-key", place.public, "--json")
    edit(place.path, lambda c: c.execute("UPDATE events_1 SET hash = x'00' WHERE place & 4294967295 = 3") and None)
    findings = json.loads(place.run("verify", *against).stdout)["findings"]
    rows = [(finding["row"], finding["problem"]) for finding in findings]
    assert len(rows) == len(set(rows)) >= 2
    with closing(sqlite3.connect(place.path, isolation_level=None)) as connection:
        connection.execute("DROP TABLE chains")
    result = place.run("verify", *against)
    data = json.loads(result.stdout)
    assert result.exit_code == 1 and data["against"] is None
    assert [finding["row"] for finding in data["findings"]][0 :: len(data["findings"]) - 1] == ["schema", "checkpoint"]


def test_verify_against_nothing_usable_is_one_line(place: Place) -> None:
    fine(place.checkpoint())
    for half in (("--against", place.kept), ("--public-key", place.public)):
        complains(place.run("verify", *half), "expected --against and --public-key together")
    complains(place.run("verify", "--against", place.keys, "--public-key", place.public), "has none")
    complains(place.run("verify", "--against", place.kept, "--public-key", place.key), "expected an Ed25519 public key")
    fine(run("keygen", "--out", place.root))
    other = place.root / "public-key.pem"
    complains(place.run("verify", "--against", place.kept, "--public-key", other), "expected key")
    with closing(SqliteLedger(place.path)) as ledger:
        ledger.keep_checkpoint(2, b"{}")
    result = place.run("verify")
    assert result.exit_code == 0 and "expected a readable copy of the newest checkpoint" in result.stderr


def test_every_command_and_option_says_what_it_is() -> None:
    for name, command in cli.cli.commands.items():
        assert name == command.name
        text = fine(run(name, "--help"))
        assert command.help and text.splitlines()[2].strip()
        assert all(option.help for option in command.params if isinstance(option, click.Option))
