"""Log lines, the same with both loggers; and redaction, which never leaves the secret and never nothing."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from execution_envelope import credentials
from execution_envelope.decision import Observation
from execution_envelope.envelope import seal
from execution_envelope.errors import InvalidField
from execution_envelope.lifecycle import (
    Admitted,
    Denied,
    Error,
    Event,
    EventData,
    Failed,
    Granted,
    Late,
    Sealed,
    Used,
    Verdict,
    Violation,
)
from execution_envelope.record import Record
from execution_envelope.resources import Quantity
from execution_envelope.telemetry import redaction
from execution_envelope.telemetry.log import KEYS, LogObserver
from execution_envelope.telemetry.redaction import KEPT, exported, outgoing, redact
from execution_envelope.testing import START, ask

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "sk-ant-" + "a1b2" * 8
AT = "2026-05-01T12:00:00.000000Z"


def record_of(*facts: EventData, **overrides: Any) -> Record:
    envelope = seal(ask(traceparent=TRACE, request_id="r-1", **overrides), id="e-1", now=START).envelope
    return Record(envelope, [Event("e-1", n, AT, "backend", fact) for n, fact in enumerate(facts)])


GRANTED = (
    Sealed("d", "r"),
    Verdict("h", "1", "allow"),
    Verdict("broken", "1", "allow", failure="error", failure_mode="allow", message="it broke"),
    Admitted(),
    Granted({"gpu": Quantity(1000)}, "reserved"),
    Violation("gpu", 500, 1000, "h", "beyond"),
    Error("the observer raised", hook="o"),
    Error("on the way out"),
    Failed("boom", "it ended badly"),
    Late(Used({"gpu": 1})),
)
LEVELS = ["info", "info", "error", "info", "info", "warning", "error", "warning", "warning", "info"]


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def stdlib(record: Record, level: int = logging.DEBUG, **options: Any) -> list[dict[str, Any]]:
    logger, lines = logging.Logger("test", level), Lines()
    logger.addHandler(lines)
    LogObserver(logger, **options).observe(Observation(record, record.events))
    own = vars(logging.LogRecord("", 0, "", 0, "", None, None)).keys()
    return [
        {"event": line.getMessage(), "level": line.levelname.lower()}
        | {key: value for key, value in vars(line).items() if key not in own and key != "taskName"}
        for line in lines.records
    ]


def with_structlog(record: Record, **options: Any) -> list[dict[str, Any]]:
    stream = io.StringIO()
    logger = structlog.wrap_logger(
        structlog.PrintLogger(stream),
        processors=[structlog.processors.add_log_level, structlog.processors.JSONRenderer()],
    )
    LogObserver(logger, **options).observe(Observation(record, record.events))
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_both_loggers_write_the_same_lines() -> None:
    lines = stdlib(record_of(*GRANTED))
    assert json.loads(json.dumps(lines)) == with_structlog(record_of(*GRANTED))
    assert [line["level"] for line in lines] == LEVELS
    assert lines[4] == {
        "event": "envelope.granted",
        "level": "info",
        "envelope_id": "e-1",
        "sequence": 4,
        "at": AT,
        "by": "backend",
        "event_type": "granted",
        "state": "failed",
        "kind": "model.deploy",
        "operation": "serving.deploy_model",
        "target": "model:smollm2-135m",
        "tenant": "acme",
        "subject": "user:dana",
        "project": "research",
        "request_id": "r-1",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "data": {"type": "granted", "resources": {"gpu": {"amount": 1000}}, "basis": "reserved"},
    }


def test_every_key_is_documented_and_clashes_with_none_of_the_logger() -> None:
    seen = {key for line in stdlib(record_of(*GRANTED), redact=["subject"]) for key in line}
    failed = outgoing({"envelope_id": "e"}, ["no..path"])
    assert (seen | failed.keys()) - {"event", "level"} == set(KEYS)
    assert not set(KEYS) & (
        vars(logging.LogRecord("", 0, "", 0, "", None, None)).keys() | {"message", "asctime", "event"}
    )


def test_what_the_logger_does_not_want_is_not_made() -> None:
    assert [line["level"] for line in stdlib(record_of(*GRANTED), level=logging.ERROR)] == ["error", "error"]


def test_a_line_lists_what_was_removed_from_it() -> None:
    record = record_of(Sealed("d", "r"), Denied("policy", f"dana-the-operator said {SECRET}"))
    line = stdlib(record, redact=["subject", "data.code"])[1]
    assert line["subject"] == line["data"]["code"] == "[redacted:field]"
    assert line["data"]["message"] == "dana-the-operator said [redacted:anthropic]"
    assert line["redacted"] == ["subject", "data.code", "data.message"]
    assert record.events[1].data.code == "policy"  # a copy


def test_a_text_that_a_rule_removed_is_removed_where_it_is_quoted() -> None:
    copy, removed = redact({"subject": "user:dana", "data": {"message": "user:dana lacks a role"}}, ["subject"])
    assert copy == {"subject": "[redacted:field]", "data": {"message": "[redacted:field] lacks a role"}}
    assert removed == ["subject", "data.message"]


@pytest.mark.parametrize("rules", ["subject", ["a..b"], [""], [3], ["a"] * 101])
def test_rules_that_are_none_are_refused_at_once(rules: Any) -> None:
    with pytest.raises(InvalidField, match="redact"):
        LogObserver(logging.getLogger("test"), redact=rules)


@pytest.mark.parametrize("logger", [None, print, logging.LoggerAdapter(logging.getLogger("test"), {})])
def test_what_is_no_logger_is_refused(logger: Any) -> None:
    with pytest.raises(InvalidField, match="logger"):
        LogObserver(logger)


@pytest.mark.parametrize("rules", [(), ["data.message"], ["data..message"]], ids=["none", "a path", "no path"])
def test_when_redaction_fails_the_line_still_says_who_and_what(rules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"cannot say {SECRET}")

    monkeypatch.setattr(redaction.credentials, "redact", fail)
    whole = {
        "envelope_id": "e",
        "sequence": 3,
        "state": "denied",
        "decision": "deny",
        "subject": SECRET,
        "data": SECRET,
    }
    left = outgoing(whole, rules)
    error = "InvalidField" if rules == ["data..message"] else "RuntimeError"
    assert left == {
        "envelope_id": "e",
        "sequence": 3,
        "state": "denied",
        "decision": "deny",
        "redaction_failed": error,
    }


def test_the_observer_survives_a_redaction_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction.credentials, "redact", lambda *_, **__: 1 / 0)
    lines = stdlib(record_of(Sealed("d", "r"), Verdict("h", "1", "deny", "policy", SECRET), Denied("policy", SECRET)))
    assert [(line["envelope_id"], line["event_type"], line["state"]) for line in lines] == [
        ("e-1", type, "denied") for type in ("sealed", "verdict", "denied")
    ]
    assert lines[1]["decision"] == "deny"
    assert [line.get("redaction_failed") for line in lines] == [None, "ZeroDivisionError", "ZeroDivisionError"]
    assert SECRET not in str(lines)


def test_what_is_too_deep_to_copy_fails_as_any_other() -> None:
    deep: Any = "x"
    for _ in range(10_000):
        deep = [deep]
    assert outgoing({"envelope_id": "e", "data": deep}) == {"envelope_id": "e", "redaction_failed": "RecursionError"}


def test_an_export_is_a_copy_after_redaction(monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of(Sealed("d", "r"), Verdict("h", "1", "deny", "policy", SECRET), Denied("policy", SECRET))
    given = exported(record, ["envelope.identity.subject.id", "events.*.data.request"])
    assert given["redacted"] == [
        "envelope.identity.subject.id",
        "events.0.data.request",
        "events.1.data.message",
        "events.2.data.message",
    ]
    assert SECRET not in json.dumps(given)
    assert msgspec.convert(given["events"], list[Event])[1].data.decision == "deny"  # type: ignore[union-attr]
    monkeypatch.setattr(redaction.credentials, "redact", lambda *_, **__: 1 / 0)
    assert exported(record) == {
        "envelope_id": "e-1",
        "kind": "model.deploy",
        "state": "denied",
        "decision": [{"hook": "h", "decision": "deny"}],
        "redaction_failed": "ZeroDivisionError",
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.just(f"x {SECRET} y"),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("ab.*", min_size=1, max_size=4), inner, max_size=4)
    ),
    max_leaves=20,
)
RULES = st.lists(st.lists(st.sampled_from(["a", "b", "*", "ab"]), min_size=1, max_size=3).map(".".join), max_size=4)


@given(JSON, RULES)
def test_no_data_and_no_rules_let_a_secret_through_or_change_what_they_are_given(data: Any, rules: list[str]) -> None:
    before = json.dumps(data)
    copy, removed = redact(data, rules)
    assert SECRET not in json.dumps(copy)
    assert json.dumps(data) == before
    assert bool(removed) == (copy != data)
    again, _ = redact(copy, rules)
    assert again == copy
    assert credentials.contains(json.dumps(copy)) == ("[redacted:" in json.dumps(copy))


AROUND = st.text(st.sampled_from("a1_-.\"'\\\n\t\u0130\u017f\u20ac:/@ []{}"), max_size=4)
SECRETS = st.sampled_from(
    [SECRET, "ghp_" + "a" * 36, "AKIA" + "A" * 16, f"https://u:{'p' * 8}@h/", "Bearer " + "a1B2" * 8]
)


@given(st.tuples(AROUND, SECRETS, AROUND).map("".join), AROUND)
def test_the_quick_look_finds_what_the_thorough_one_finds(text: str, key: str) -> None:
    for data in ({"a": [text]}, {text: key}, [key, {key: text}]):
        found: list[str] = []
        thorough = credentials.redact(data, path="", found=found.append)
        copy, removed = redact(data)
        assert copy == thorough
        assert bool(removed) == bool(found)


def test_what_is_kept_is_what_a_line_has() -> None:
    assert set(KEPT) <= set(KEYS)
