"""Writes the reference pages that are drawn from the code: `make docs`. A test holds them equal."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from execution_envelope import (
    answers,
    budgets,
    counters,
    credentials,
    envelope,
    grant,
    hooks,
    journal,
    lifecycle,
    resources,
)
from execution_envelope.admission import MAX_CONFLICTS
from execution_envelope.controller import ATTEMPTED_BURST, ATTEMPTED_PER_SECOND, AdmissionController
from execution_envelope.decision import CODES
from execution_envelope.ledger.chain import Entry
from execution_envelope.ledger.contract import MAX_ATTEMPTED
from execution_envelope.ledger.postgres_database import TIMEOUT
from execution_envelope.ledger.projection_sqlite import MAX_IN_MEMORY
from execution_envelope.ledger.recomputation import MAX_FINDINGS
from execution_envelope.ledger.segments import PATIENCE as SEGMENT_PATIENCE
from execution_envelope.ledger.spool import MAX_SPOOLED
from execution_envelope.ledger.sqlite_database import BUSY_TIMEOUT, MAX_SEGMENTS
from execution_envelope.ledger.writer import MAX_GROUP, MAX_WAITING
from execution_envelope.observers import MAX_WAITING as MAX_UNTOLD
from execution_envelope.reconciliation import PATIENCE, PROBE_TIMEOUT

HERE = Path(__file__).parent / "reference"


def pages() -> dict[Path, str]:
    """Path -> text of every generated page."""
    return {
        HERE / "lifecycle.md": _lifecycle(),
        HERE / "resources.md": _resources(),
        HERE / "limits.md": _limits(),
        HERE / "reason-codes.md": _codes(),
        HERE / "counters.md": _counters(),
        HERE / "credentials.md": _credentials(),
        HERE / "envelope.schema.json": _schema(envelope.Envelope),
        HERE / "event.schema.json": _schema(Entry),
    }


def _schema(of: type) -> str:
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(of), order="sorted"), indent=2).decode() + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _lifecycle() -> str:
    rows = [
        (
            f"**{state}**" if state in lifecycle.TERMINAL else state,
            ", ".join(sorted(lifecycle.TRANSITIONS[state])) or "nothing: this is an end",
            ", ".join(sorted(lifecycle.NOTES[state])),
        )
        for state in lifecycle.TRANSITIONS
    ]
    events = [
        (f"`{event.__struct_config__.tag}`", " ".join((event.__doc__ or "").split()))
        for event in msgspec.inspect.type_info(lifecycle.EventData).types  # type: ignore[attr-defined]
        for event in [event.cls]
    ]
    return (
        "# Lifecycle\n\nAn event that changes the state is named after the state it leads to. Ends are bold; what "
        "comes after an end is kept as `late`.\n\n"
        + _table(("state", "may become", "may also record"), rows)
        + "\n## Events\n\nTheir fields: [event.schema.json](event.schema.json).\n\n"
        + _table(("event", "what it says"), events)
    )


def _resources() -> str:
    parts = {"sum": "added up", "min": "the smallest part counts"}
    reports = {"sum": "added up", "max": "the highest counts"}
    rows = [
        (f"`{name}`", r.meaning, r.unit, parts[r.across_parts], reports[r.across_reports])
        for name, r in resources.VOCABULARY.items()
    ]
    return (
        "# Resources\n\nOne closed vocabulary for all kinds of execution. Inside, amounts are integers in the base "
        'unit; at the face they may be written `"512MiB"`, `"500m"`, `0.5`, `"30s"`. Absent, `0`, `"unknown"` and '
        '`"unlimited"` are four different things. A bare amount is a total; `per_replica(...)` and `per_device(...)` '
        "are compared per part.\n\n"
        + _table(("name", "meaning", "base unit", "parts of a grant", "reports of usage"), rows)
        + "\n`gpu` and `cpu` count whole devices and cores when written as a bare number: `2` is 2000 milli. `cost` is "
        "written in whole millionths.\n"
    )


def _limits() -> str:
    deadline = inspect.signature(AdmissionController).parameters["deadline"].default
    rows = [
        ("text in the sealed part", f"{credentials.MAX_TEXT} characters", "cut, with its length and SHA-256"),
        ("messages and reasons of events", f"{credentials.MAX_MESSAGE} characters", "cut, with its length and SHA-256"),
        ("one constraint or facet", f"{envelope.MAX_VALUE_BYTES} bytes", "replaced by its size and SHA-256"),
        ("depth of a constraint", f"{envelope.MAX_DEPTH} levels", "what is deeper is replaced by its SHA-256"),
        ("amounts", f"0 to {resources.MAX_AMOUNT}", "refused, the field is named"),
        *(
            (f"entries in `{name}`", str(count), "refused, the field is named")
            for name, count in envelope.MAX_ENTRIES.items()
        ),
        ("names of constraints, hints and facets", "128 characters", "refused, the field is named"),
        ("idempotency key", "255 characters", "cut, with its length and SHA-256; what counts as the key is the whole"),
        ("paths named as taken out of one request", str(envelope.MAX_REDACTED), "the last one says how many more"),
        ("names in one grant or effective value", str(grant.MAX_NAMES), "refused, the field is named"),
        (
            "names of parts, owners, components and routes",
            f"{grant.MAX_NAME} characters",
            "refused, the field is named",
        ),
        ("a reference", "200 characters, with its kind", "refused, the field is named"),
        ("budgets of a controller", str(budgets.MAX_BUDGETS), "refused when they are made"),
        ("the name of an account", f"{budgets.MAX_ACCOUNT} bytes", "cut, and ends in a digest of the whole"),
        (
            "limits, obligations, policies, errors and hints of one decision, each",
            str(answers.MAX_SAID),
            "limits and obligations: the hook failed; the others: the last one says how many more",
        ),
        (
            "the raw answer of an engine elsewhere",
            f"{answers.MAX_ANSWER} characters",
            "cut, with its length and SHA-256",
        ),
        (
            "values that one decision allows for constraints",
            f"{answers.MAX_ALLOWED} bytes together",
            "the hook failed, its failure mode applies",
        ),
        (
            "threads of one hook, and processes of an isolated one",
            f"{hooks.MAX_THREADS} and {hooks.MAX_PROCESSES}",
            "the next ones wait within the deadline",
        ),
        (
            "holding the event loop, by one hook",
            f"{hooks.BLOCKED:g} s",
            f"named on the record and counted; then asked in a thread, or, async, not for {hooks.QUARANTINE:g} s",
        ),
        ("all deciders of one request", f"{deadline:g} s unless set", "each one's failure mode, on the record"),
        ("one call of a ledger that others write", f"{BUSY_TIMEOUT:g} s", "`LedgerUnavailable`: 503, nothing started"),
        ("one call of a ledger in PostgreSQL", f"{TIMEOUT:g} s", "`LedgerUnavailable`: 503, nothing started"),
        ("writes that are committed as one group", str(MAX_GROUP), "the next ones are the next group"),
        ("writes of a process that wait for the ledger", str(MAX_WAITING), "`LedgerUnavailable`: 503, nothing started"),
        ("window of a relaxed write", f"1 to {journal.MAX_WINDOW_MS} ms", "`write_modes` are refused"),
        (
            "relaxed writes that wait for longer than their window",
            "none is added",
            "`LedgerUnavailable` for the next ones until those are stored",
        ),
        ("writes in a spool", str(MAX_SPOOLED), "as if there were no spool: `LedgerUnavailable`"),
        ("one fact that other writers come before", f"{MAX_CONFLICTS} tries", "`LedgerUnavailable`, nothing recorded"),
        ("calls of a ledger at once in a process", str(journal.MAX_CALLS), "the next ones wait their turn"),
        ("waiting for such a turn", f"{journal.MAX_WAIT:g} s", "`LedgerUnavailable`: 503, nothing started"),
        ("attempted requests kept", str(MAX_ATTEMPTED), "the oldest go"),
        (
            "attempted requests recorded",
            f"{ATTEMPTED_PER_SECOND} a second, {ATTEMPTED_BURST} at once",
            "left out and counted: `dropped` of the next one, `attempted_dropped` of the process",
        ),
        ("commits that one observer was not told of yet", str(MAX_UNTOLD), "left out and counted: `observer_dropped`"),
        ("answer of an owner to reconciliation", f"{PROBE_TIMEOUT:g} s", "*unknown*: nothing is ended"),
        (
            "lease of a process that cannot be looked at from here",
            f"{PATIENCE:g} s without being renewed",
            "*gone*: what it admitted and did not bind is abandoned",
        ),
        (
            "lease of a chain in a segment that is exported",
            f"{SEGMENT_PATIENCE:g} s without being renewed",
            "its process is taken to have left it",
        ),
        ("segments of an SQLite ledger that are not dropped", str(MAX_SEGMENTS), "the next one is refused"),
        ("envelopes of a projection in memory", str(MAX_IN_MEMORY), "`LedgerUnavailable`: make the folder writable"),
        ("findings of a verification", str(MAX_FINDINGS), "counted, not listed"),
    ]
    return "# Limits\n\n" + _table(("what", "limit", "beyond it"), rows)


def _codes() -> str:
    rows = [(f"`{code}`", "yes" if later else "no", meaning) for code, (later, meaning) in CODES.items()]
    return "# Reason codes\n\nWhy a decider denied or held.\n\n" + _table(("code", "can later help", "meaning"), rows)


def _counters() -> str:
    rows = [(f"`{name}`", meaning) for name, meaning in counters.COUNTERS.items()]
    return (
        "# Counters\n\nWhat each process counts, under `AdmissionController.counters`; one that is not there is 0.\n\n"
        + _table(("counter", "counts"), rows)
    )


def _credentials() -> str:
    rows = [(f"`{name}`", f"`{credentials.marker(name)}`") for name in credentials.FORMATS]
    return (
        "# Credentials that are taken out\n\nA value in one of these documented formats is replaced by its marker "
        "before anything is sealed or recorded. The request is not refused. A secret in no such format is taken out "
        "only when the adapter names its field (`Ask.secrets`).\n\n" + _table(("format", "marker"), rows)
    )


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
