"""Redaction of what goes out: it works on a copy, lists what it removed, and when it fails it leaves who and what.

A record never holds a credential in a documented format. What goes to a log or to another team may have to hold less:
rules name what is removed by its path, written as in `Ask.secrets`: ``data.message`` is one value, ``subject.*`` every
value below, ``*.text`` one below any name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from execution_envelope import credentials
from execution_envelope.credentials import MIN_LITERAL, marker, shown, strings
from execution_envelope.errors import InvalidField
from execution_envelope.lifecycle import Verdict
from execution_envelope.record import Record

#: How many rules there may be, and how many paths an output lists; the last one then says how many more there were.
MAX_RULES: Final = 100
MAX_LISTED: Final = 100
#: What an output keeps of itself when its redaction failed, where it has it: names of the vocabulary, numbers, ids that
#: the seam made, and no text that anybody wrote.
KEPT: Final = ("envelope_id", "sequence", "at", "event_type", "kind", "state", "decision")


def check_rules(rules: Sequence[str]) -> tuple[str, ...]:
    """The rules, when each is a path. Raises `InvalidField`."""
    if isinstance(rules, str) or not isinstance(rules, Sequence) or len(rules) > MAX_RULES:
        raise InvalidField("redact", f"expected a list of up to {MAX_RULES} paths, got {shown(rules)}")
    for number, rule in enumerate(rules):
        if not isinstance(rule, str) or not all(rule.split(".")):
            raise InvalidField(f"redact.{number}", f"expected a path such as `data.message`, got {shown(rule)}")
    return tuple(rules)


def redact(data: Any, rules: Sequence[str] = ()) -> tuple[Any, list[str]]:
    """A copy of plain JSON data without what the rules name and without credentials, and the paths of what is missing.

    Texts that a rule removed are removed wherever else they are quoted, from 6 characters on. Paths at which something
    was removed before it was recorded are listed too. Raises `InvalidField` for a rule that is none.
    """
    removed: dict[str, None] = {}
    quoted: set[str] = set()

    def found(path: str, value: Any) -> None:
        removed[path] = None
        quoted.update(text for text in strings(value) if len(text) >= MIN_LITERAL)

    copy = credentials.remove_fields(data, check_rules(rules), found=found)
    if not removed and (clean := _clean_copy(copy)) is not None:
        return clean, []
    for text in sorted(quoted, key=len, reverse=True):
        copy = _without(copy, text)
    copy = credentials.redact(copy, path="", found=lambda path: removed.setdefault(path.lstrip(".")))
    paths = [credentials.redact_text(path) for path in removed]
    if len(paths) > MAX_LISTED:
        paths[MAX_LISTED - 1 :] = [f"and {len(paths) - MAX_LISTED + 1} more"]
    return copy, paths


def outgoing(data: Mapping[str, Any], rules: Sequence[str] = ()) -> dict[str, Any]:
    """One output after redaction: `redacted` lists the paths that were removed, where there are any.

    Never raises. When redaction fails, what is `KEPT` stays, and `redaction_failed` names the error.
    """
    try:
        copy, removed = redact(data, rules)
        return {**copy, "redacted": removed} if removed else dict(copy)
    except Exception as error:
        # Its message may quote what was to be removed.
        return {name: data[name] for name in KEPT if name in data} | {"redaction_failed": type(error).__name__}


def exported(record: Record, rules: Sequence[str] = ()) -> dict[str, Any]:
    """A record as plain JSON data to be given away: envelope, events and state, after redaction.

    Paths are of the whole: ``envelope.identity.subject.id``, ``events.*.data.message``. Never raises; when redaction
    fails there are id, state, and which hook decided what.
    """
    verdicts = [event.data for event in record.events if isinstance(event.data, Verdict)]
    try:
        data = {
            "envelope_id": record.id,
            "kind": record.envelope.execution.kind,
            "state": record.state,
            "decision": [{"hook": verdict.hook, "decision": verdict.decision} for verdict in verdicts],
            "envelope": msgspec.to_builtins(record.envelope),
            "events": msgspec.to_builtins(record.events),
        }
    except Exception as error:
        return {"envelope_id": record.id, "state": record.state, "redaction_failed": type(error).__name__}
    return outgoing(data, rules)


def _clean_copy(data: Any) -> Any:
    """A copy by way of JSON when there is certainly no credential in it, as in most: ten times as fast as to look at
    each text. None for what may hold one, and for what is no plain JSON data."""
    try:
        text = msgspec.json.encode(data)
        return msgspec.json.decode(text) if credentials.clean((text.decode(),)) else None
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        return None


def _without(value: Any, text: str) -> Any:
    if isinstance(value, str):
        return value.replace(text, marker("field"))
    if isinstance(value, Mapping):
        return {_without(key, text): _without(item, text) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without(item, text) for item in value]
    return value
