"""The filter language: what it reads, what it refuses and how it says so, and what matches."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execution_envelope import query as language
from execution_envelope.criteria import FIELDS, FLAGS
from execution_envelope.errors import InvalidField
from execution_envelope.ledger.projection import ProjectedEnvelope, damaged
from execution_envelope.query import Query, quoted

NOW = datetime(2026, 5, 20, 12, tzinfo=UTC)
ROW = ProjectedEnvelope(
    id="0190-1",
    state="granted",
    tenant="acme",
    subject="user:Dana",
    kind="model.deploy",
    operation="serving.deploy_model",
    target="model:smollm2@q4",
    created_at="2026-05-18T00:00:00.000000Z",
    unstated=1,
    requested={"gpu": 2000, "memory": "unknown", "cpu": "unlimited", "rows": 0},
    granted={"gpu": 1000, "cpu": "unlimited", "memory": 2**31},
    used={"gpu": 1000},
    outcomes=("reduced",),
    causes=("quota", "unstated"),
    hooks=("policy", "quota"),
    refused_by=("policy",),
    codes=("quota_exhausted",),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind=model.deploy and state in (granted, admitted) and outcome=reduced and cause=quota", True),
        ("state=open", True),
        ("state=ended or state=damaged", False),
        ("kind=inference or kind=model.deploy and state=held", False),
        ("(kind=inference or kind=model.deploy) and not state=held", True),
        ("NOT Kind=inference AND unstated", True),
        ("late", False),
        ("hook=quota and refused_by=policy and not refused_by=quota", True),
        ("code=quota_exhausted and resource=memory and resource!=bytes", True),
        ("subject~DANA and target~'SMOLLM2@' and operation!~gpu", True),
        ("subject='user:dana'", False),
        ("target~'%' or target~_x", False),
        ("project='' and owner=\"\" and not tenant=''", True),
        ("requested.gpu>=2 and granted.gpu<2 and granted.gpu=1000m", True),
        ("granted.memory>=2GiB and granted.memory<'2.5 GiB'", True),
        ("granted.gpu<requested.gpu and used.gpu=granted.gpu", True),
        # Absent, zero, unknown and unlimited.
        ("requested.steps=absent and not requested.steps=0 and requested.steps!=0", True),
        ("requested.rows=0 and requested.rows!=absent and requested.rows<1", True),
        ("requested.memory=unknown and requested.memory!=0", True),
        ("requested.memory>=0 or requested.memory<1GiB or requested.memory<granted.memory", False),
        ("requested.cpu>1000000 and requested.cpu=unlimited and requested.cpu=granted.cpu", True),
        ("requested.cpu<1 or requested.cpu=7 or requested.cpu=unknown", False),
        ("requested.steps>=0 or requested.steps<1 or used.steps=requested.steps", False),
        ("requested.gpu in (1, 2, absent)", True),
        # Times.
        ("created>=7d and created<2d", True),
        ("created>=1d or created>2026-05-18", False),
        ("created=2026-05-18 and created<=2026-05-18 and created>=2026-05-18 and created!=2026-05-17", True),
        ("created=2026-05-18T02:00:00+02:00 and created<2026-05-18T00:00:00.000001Z", True),
        ("ended<1d or ended>=1d or ended=2026-05-18", False),
        ("ended!=2026-05-18", True),
    ],
)
def test_what_matches(text: str, expected: bool) -> None:
    assert Query.parse(text, NOW).matches(ROW) is expected


def test_of_a_damaged_one_there_is_only_the_id() -> None:
    row = damaged("0190-2")
    for text in ("id=0190-2", "id~0190", "state=damaged", "not kind=inference", "requested.gpu=absent"):
        assert Query.parse(text, NOW).matches(row)
    for text in ("state=open", "state=ended", "kind=inference", "created>=1970-01-01", "granted.gpu<1"):
        assert not Query.parse(text, NOW).matches(row)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a condition, such as `state=open`, got the end, at character 1 - at `query`"),
        ("kynd=x", "expected a field, got `kynd`: did you mean `kind`, at character 1"),
        ("state=open and requsted.gpu>1", "did you mean `requested.gpu`, at character 16"),
        ("zzzzz=1", "expected a field (id, tenant, subject"),
        ("kind=deploy", "expected model.deploy, inference"),
        ("kind~deploy", "expected one of = != in, got `~`, at character 5"),
        ("tenant<a", "expected one of = != ~ !~ in, got `<`"),
        ("tenant", "got the end, at character 7"),
        ("tenant=", "expected a value, in quotes where it is not one plain word, got the end"),
        ("tenant=and", "expected a value, in quotes where it is not one plain word, got `and`"),
        ("tenant='a", "expected a closing quote"),
        ("tenant in a", "expected `(` and values, got `a`"),
        ("tenant in (a, b", "expected `,` or `)`, got the end"),
        ("tenant=a tenant=b", "expected `and`, `or` or the end, got `tenant`, at character 10"),
        ("(tenant=a", "expected `and`, `or` or `)`, got the end"),
        ("late=1", "expected the flag `late` alone, without a comparison, at character 1"),
        ("target~''", "expected some text to look for"),
        ("requested.gpu>=8Gi", "expected `2`, `0.5` or `500m` for gpu, got `8Gi`, at character 16"),
        ("requested.gpus>=1", "expected a resource (gpu, "),
        ("requested.gpu<unlimited", "expected `=` or `!=` before `unlimited`"),
        ("requested.gpu<granted.memory", "expected an amount in milli, memory is in bytes, at character 15"),
        ("created>soon", "a time such as `2026-05-01T12:00:00Z` or an age such as `7d` or `30m`, got `soon`"),
        ("created=7d", "expected a day such as `2026-05-01`, a time such as `2026-05-01T12:00:00Z`, got `7d`"),
        ("created>2026-05-01T12:00:00", "got `2026-05-01T12:00:00`"),
        ("created>1969-12-31", "expected a time from 1970 on"),
        ("created>9999-12-31", "expected a day"),
        ("tenant=\0", "expected text without the character zero and without halves of characters, at character 8"),
        ("tenant=\ud800", "expected text without the character zero and without halves"),
        ("x" * 2001, "expected up to 2000 characters, got 2001"),
        ("not " * 17 + "late", "expected parentheses and `not` up to 16 deep"),
        ("(" * 500 + "late", "expected parentheses and `not` up to 16 deep"),
        (f"id in ({','.join('a' * 101)})", "expected up to 100 values and flags"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidField) as refused:
        Query.parse(text, NOW)
    assert message in str(refused.value) and refused.value.field == "query"


PIECES = [*FIELDS, *FLAGS, *language._JOINS, "requested.gpu", "used.rows", "7d", "2026-05-01", "absent", "8GiB", "x"]
PIECES += ["=", "!=", "~", "<=", "(", ")", ",", '"', "'", "\\", " ", "\n", "\u2028", "\0", "é", "9" * 400, "1e5"]


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(PIECES), max_size=14).map(" ".join)
    | st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
)
def test_whatever_is_written_is_read_or_refused(text: str) -> None:
    try:
        query = Query.parse(text, NOW)
    except InvalidField as refused:
        assert refused.field == "query"
    else:
        assert query.text == text and query.matches(ROW) in (True, False)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60))
def test_any_value_can_be_quoted(value: str) -> None:
    query = Query.parse(f"subject={quoted(value)}", NOW)
    assert query.matches(ProjectedEnvelope("1", "granted", subject=value))
    assert not query.matches(ProjectedEnvelope("1", "granted", subject=f"{value}."))
