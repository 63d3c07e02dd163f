"""The commands of `envelope` for signed checkpoints and for proofs that are checked without the ledger.

Exit status: 0 all right, 1 something does not fit, 2 the question could not be answered.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
from rich.text import Text

from execution_envelope import presentation
from execution_envelope.cli_shared import (
    ENV,
    FILE,
    FOLDER,
    Problem,
    json_option,
    ledger_option,
    new_console,
    opened,
    print_json,
    print_text,
    progress_bar,
    say,
    signed_checkpoint,
    unreadable,
    utc_now,
)
from execution_envelope.envelope import canonical, timestamp
from execution_envelope.errors import LedgerUnavailable, NotFound
from execution_envelope.ledger import Finding, Ledger, open_ledger
from execution_envelope.ledger.checkpoint import (
    Checkpoint,
    Contradicted,
    KeyUnusable,
    NotProven,
    PublicKey,
    SigningKey,
    Statement,
    compare,
    decode_checkpoint,
    entries_after,
    newest_checkpoint,
    read_checkpoint,
    take,
    write_checkpoint,
)
from execution_envelope.ledger.commit import DAMAGED, SequenceConflict
from execution_envelope.ledger.proof import Checked, check_proof, decode_proof, prove
from execution_envelope.ledger.segments import compare_exports, exported_chains

SIGNING_KEY: Final = "signing-key.pem"
PUBLIC_KEY: Final = "public-key.pem"
NOT_SHOWN: Final = (
    "whether more was recorded of it (behind an end: what came late)",
    "whether what was recorded is true",
)


def add_to(group: click.Group) -> None:
    """Make them commands of the group; its context's object is the URL of the ledger, or None."""
    for command in (keygen, checkpoint, prove_, check):
        group.add_command(command)


@click.command(short_help="Make a key to sign checkpoints with.")
@click.option("--out", "folder", type=FOLDER, required=True, metavar="DIR", help="An existing folder of its own.")
@click.pass_context
def keygen(context: click.Context, folder: Path) -> None:
    """Make a key to sign checkpoints with, and the public key to check them with.

    Keep DIR away from the ledger: who can write to both can rewrite the ledger and sign it again.
    """
    private, public = folder / SIGNING_KEY, folder / PUBLIC_KEY
    url = context.obj or os.environ.get(ENV)
    if url:
        _check_apart(private, open_ledger(url, read_only=True))
    if public.exists():
        raise Problem(f"expected no file `{public}`, there is one: no key is overwritten")
    key = SigningKey.generate()
    key.save(private)
    key.public.save(public)
    print_text(f"key {key.public.id}\nsigns with {private}\nis checked with {public}")


@click.command(short_help="Sign how far the ledger has come.")
@ledger_option
@json_option
@click.option(
    "--key", "key_file", type=FILE, required=True, metavar="FILE", help="The signing key; never beside the ledger."
)
@click.option(
    "--out", "folder", type=FOLDER, required=True, metavar="DIR", help="Where checkpoints are kept, outside of it."
)
@click.option(
    "--previous-key",
    type=FILE,
    metavar="FILE",
    help="The public key of the checkpoint before, after a change of keys.",
)
@click.pass_context
def checkpoint(
    context: click.Context, url: str | None, as_json: bool, key_file: Path, folder: Path, previous_key: Path | None
) -> None:
    """Sign how far the ledger has come, into DIR/checkpoint-N.json and, where it may be written to, into the ledger.

    Only entries behind the newest checkpoint, of DIR or the ledger, are read; they are recomputed. Exit status: 0
    signed, 1 the ledger contradicts that checkpoint or itself and nothing was signed, 2 cannot be done.
    """
    with opened(context, url) as ledger:
        _check_apart(key_file, ledger)
        signer = SigningKey.load(key_file)
        before_key = None if previous_key is None else PublicKey.load(previous_key)
        before = _newest(folder, ledger)
        total = ledger.count() if before is None else entries_after(ledger, before)
        try:
            with progress_bar("reading", total) as progress:
                taken = take(
                    ledger,
                    signer,
                    at=utc_now(),
                    before=before,
                    before_key=before_key,
                    exported=exported_chains(ledger),
                    progress=progress,
                )
        except Contradicted as contradicted:
            say(f"nothing was signed: {contradicted}")
            context.exit(1)
        except DAMAGED as error:
            raise unreadable(error) from error
        inside = _keep_inside(ledger, taken)
        if _beside(folder, ledger):
            say(f"`{folder}` is beside the ledger: what takes the one away, or puts an older copy back, takes both")
    try:
        path = write_checkpoint(folder, taken)
    except FileExistsError:
        raise Problem(f"expected no checkpoint {taken.statement.number} in `{folder}`, there is another") from None
    except OSError as error:
        raise Problem(f"expected to write to `{folder}`: {error.strerror or error}") from error
    if as_json:
        print_json({**_said(taken.statement), "file": str(path), "inside": inside})
    else:
        print_text(f"{_told(taken.statement)}\n{path}")


@click.command("prove", short_help="Write a proof of one envelope, to check without the ledger.")
@ledger_option
@click.option(
    "--against",
    type=FILE,
    required=True,
    metavar="CHECKPOINT",
    help="A checkpoint, or a folder for the newest in it.",
)
@click.option("--out", "file", type=FILE, required=True, metavar="FILE", help="The proof; must not be there yet.")
@click.argument("id", metavar="ID|KIND:REFERENCE")
@click.pass_context
def prove_(context: click.Context, url: str | None, against: Path, file: Path, id: str) -> None:
    """Write a proof of one envelope, which anybody with the public key can check without the ledger.

    It holds the sealed envelope and its events as of the checkpoint: give it to nobody who may not see them.
    """
    known = read_checkpoint(against)
    with opened(context, url) as ledger:
        envelope = _named(ledger, id)
        try:
            with progress_bar("reading", known.statement.entries) as progress:
                proven = prove(ledger, envelope, known, progress=progress)
        except (NotFound, NotProven):
            # Says where an exported one is, or a part of it.
            ledger.read(envelope)
            raise
        except Contradicted as contradicted:
            say(f"nothing was proven: {contradicted}")
            context.exit(1)
        except DAMAGED as error:
            raise unreadable(error) from error
    try:
        with file.open("xb") as out:
            out.write(canonical(proven.proof))
    except FileExistsError:
        raise Problem(f"expected no file `{file}`, there is one") from None
    except OSError as error:
        raise Problem(f"expected to write `{file}`: {error.strerror or error}") from error
    events = presentation.counted(len(proven.proof.entries), "event")
    left = ""
    if proven.left_out:
        left = f"\n{presentation.counted(proven.left_out, 'later event')} left out: not in the checkpoint"
    print_text(f"{events} of envelope {envelope} in checkpoint {known.statement.number}{left}")


@click.command(short_help="Check a proof with nothing but the public key.")
@json_option
@click.option("--public-key", "key_file", type=FILE, required=True, metavar="FILE", help="The key to check with.")
@click.argument("proof", type=FILE, metavar="PROOF")
@click.pass_context
def check(context: click.Context, as_json: bool, key_file: Path, proof: Path) -> None:
    """Check a proof with nothing but the public key, and show the record that it proves.

    Opens no ledger. Exit status: 0 everything fits, 1 something does not, 2 cannot be read.
    """
    key = PublicKey.load(key_file)
    try:
        body = proof.read_bytes()
    except OSError as error:
        raise Problem(f"expected a file to read, got `{proof}`: {error.strerror or error}") from error
    try:
        checked = check_proof(decode_proof(body), key)
        shown = _checked_data(checked) if as_json else _checked_sheet(checked)
    except NotProven as problem:
        if as_json:
            print_json({"proven": False, "problem": str(problem)})
        else:
            say(f"not proven: {problem}")
        context.exit(1)
    if as_json:
        print_json(shown, indent=2)
    else:
        new_console().print(*shown, sep="\n")


class Against(NamedTuple):
    """What a checkpoint says of a ledger: where the two differ, and how many entries it does not vouch for yet."""

    statement: Statement
    findings: list[Finding]
    after: int

    def data(self) -> dict[str, Any]:
        """For `envelope verify --json`."""
        return {**_said(self.statement), "after": self.after}

    def sentence(self) -> str:
        """For `envelope verify`."""
        behind = f"{presentation.counted(self.after, 'entry')} behind it, for which it says nothing"
        return f"{_told(self.statement)}; {behind if self.after else 'nothing behind it'}"


def compare_against(ledger: Ledger, file: Path, key_file: Path) -> Against:
    """For `envelope verify --against`: a checkpoint, or the newest in a folder, whose signature is verified first.

    Raises `NotProven` and `KeyUnusable`.
    """
    known = signed_checkpoint(file, key_file)
    with progress_bar("comparing", known.statement.entries) as progress:
        findings = compare(ledger, known, exported=exported_chains(ledger), progress=progress)
    findings += compare_exports(ledger, known)
    return Against(known.statement, findings, entries_after(ledger, known))


def kept_inside(ledger: Ledger) -> Against | None:
    """The newest checkpoint of which the ledger keeps a copy: nothing is compared, by itself it proves nothing.

    Raises `NotProven` where it cannot be read.
    """
    known = _newest_inside(ledger)
    return None if known is None else Against(known.statement, [], entries_after(ledger, known))


# Reading and keeping


def _named(ledger: Ledger, name: str) -> str:
    kind, colon, reference = name.partition(":")
    if not colon:
        return name
    bound = ledger.find(kind, reference)
    if bound is None:
        raise NotFound(f"expected an envelope, none is bound to `{name[:200]}`")
    return bound


def _newest(folder: Path, ledger: Ledger) -> Checkpoint | None:
    """The newest checkpoint that is kept outside or inside."""
    outside = newest_checkpoint(folder)
    inside = _newest_inside(ledger)
    if outside is None or inside is None:
        return outside or inside
    if outside.statement.ledger != inside.statement.ledger:
        raise Problem(f"expected checkpoints of ledger {inside.statement.ledger}, `{folder}` has those of another")
    numbers = outside.statement.number, inside.statement.number
    if numbers[0] == numbers[1] and outside != inside:
        raise Problem(f"expected one checkpoint {numbers[0]}, `{folder}` and the ledger have different ones")
    return inside if numbers[1] > numbers[0] else outside


def _newest_inside(ledger: Ledger) -> Checkpoint | None:
    copies = ledger.checkpoints(last=1)
    try:
        return decode_checkpoint(copies[0]) if copies else None
    except (NotProven, TypeError) as error:
        raise NotProven(f"expected a readable copy of the newest checkpoint in the ledger: {error}") from error


def _keep_inside(ledger: Ledger, taken: Checkpoint) -> bool:
    """Keep a copy in the ledger, where it may be written to."""
    assert ledger.url is not None
    writable = open_ledger(ledger.url)
    try:
        kept = writable.keep_checkpoint(taken.statement.number, canonical(taken))
    except SequenceConflict:
        number = taken.statement.number
        raise Problem(f"expected to take checkpoint {number}, somebody else took it meanwhile: try again") from None
    except LedgerUnavailable as error:
        say(f"no copy in the ledger: {error}")
        return False
    finally:
        writable.close()
    if not kept:
        say("no copy in the ledger: its schema is too old, run `envelope migrate`")
    return kept


def _check_apart(key_file: Path, ledger: Ledger) -> None:
    if _beside(key_file.resolve().parent, ledger) or _beside(key_file.absolute().parent, ledger):
        raise KeyUnusable(
            f"expected the signing key apart from the ledger, `{key_file}` is in its folder or below: "
            f"who can write to both can sign what they rewrote"
        )


def _beside(folder: Path, ledger: Ledger) -> bool:
    """Whether a folder is that of the ledger's file, or below it."""
    url = ledger.url or ""
    if not url.startswith("sqlite:///"):
        return False
    path = Path(url.removeprefix("sqlite:///")).absolute()
    return any(folder.resolve().is_relative_to(home) for home in (path.parent.resolve(), path.resolve().parent))


# Printing


def _said(statement: Statement) -> dict[str, Any]:
    return {
        "checkpoint": statement.number,
        "ledger": statement.ledger,
        "at": timestamp(statement.at.astimezone(UTC)),
        "chains": statement.chains,
        "entries": statement.entries,
        "root": statement.root,
        "key": statement.key,
    }


def _told(statement: Statement) -> str:
    return (
        f"checkpoint {statement.number} of {timestamp(statement.at.astimezone(UTC))}: "
        f"{presentation.counted(statement.entries, 'entry')} in {presentation.counted(statement.chains, 'chain')}"
    )


def _checked_data(checked: Checked) -> dict[str, Any]:
    with _presentable():
        record = presentation.details(checked.record, now=checked.statement.at.astimezone(UTC))
    return {
        "proven": True,
        "digest": checked.digest,
        "events": len(checked.record.events),
        **_said(checked.statement),
        "record": record,
        "not_shown": list(NOT_SHOWN),
    }


def _checked_sheet(checked: Checked) -> list[Any]:
    with _presentable():
        sheet = presentation.sheet(checked.record, now=checked.statement.at.astimezone(UTC), width=new_console().width)
    said = (
        f": {presentation.counted(len(checked.record.events), 'event')} of this envelope in {_told(checked.statement)}"
    )
    signed = f"signed with key {checked.statement.key}, in ledger {checked.statement.ledger}"
    return [
        sheet,
        Text.assemble(("proven", "bold green"), said),
        Text(presentation.clean(signed)),
        Text(f"not shown by a proof: {'; '.join(NOT_SHOWN)}", style="dim"),
    ]


@contextmanager
def _presentable() -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise NotProven(f"expected a record that can be shown: {type(error).__name__}: {error}") from error
