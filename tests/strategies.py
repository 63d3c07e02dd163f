"""Random asks, amounts and events for the property tests. A failing test prints the blob that repeats it."""

from __future__ import annotations

import json
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from execution_envelope.envelope import KINDS, Ask, Scoped, Subject, Target
from execution_envelope.resources import MAX_AMOUNT, VOCABULARY

settings.register_profile(
    "house", print_blob=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")


def examples(few: int) -> int:
    """How many of a property that takes long: twenty times as many in a soak."""
    return few * 20 if "SOAK" in os.environ else few


texts = st.text(max_size=40) | st.sampled_from(["", '\x00\n\t"\\', "🌲é\u2028", "[redacted:", "a" * 2000])
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,12}", fullmatch=True)
resources = st.sampled_from(sorted(VOCABULARY))
numbers = st.integers(0, MAX_AMOUNT) | st.sampled_from([0, 1, 999, 1000, 1024, 60_000, 10**6, 2**30, MAX_AMOUNT])
amounts = numbers | st.sampled_from(["unknown", "unlimited"])


@st.composite
def base_values(draw: st.DrawFn, resource: str) -> object:
    """A value that `parse_amount` reads as some amount of `resource`."""
    amount = draw(amounts)
    if isinstance(amount, int) and VOCABULARY[resource].unit == "milli":
        return f"{amount}m"
    return amount


@st.composite
def quantities(draw: st.DrawFn, resource: str) -> object:
    value = draw(base_values(resource))
    if draw(st.booleans()):
        return value
    per = draw(st.sampled_from(["total", "replica", "device"]))
    # A floor is not above the amount, a ceiling not below it.
    ceilings = st.none() if value == "unlimited" else st.sampled_from([None, MAX_AMOUNT // 1000])
    if isinstance(value, int | str) and str(value).removesuffix("m").isdigit():
        ceilings = st.sampled_from([None, value])
    return {"amount": value, "floor": draw(st.sampled_from([None, 0])), "ceiling": draw(ceilings), "per": per}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=12,
)
optional_text = st.none() | texts
scoped = (
    texts
    | st.integers(-(2**60), 2**60)
    | st.lists(texts, max_size=3)
    | st.builds(Scoped, texts, st.sampled_from(["asserted", "established"]), optional_text)
)
subjects = st.builds(
    Subject,
    texts,
    texts,
    tenant=optional_text,
    roles=st.lists(texts, max_size=3),
    delegation=st.lists(st.tuples(texts, texts), max_size=2),
    method=optional_text,
    issuer=optional_text,
    session=optional_text,
)
scopes = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("project", "workroom", "environment", "purpose", "classification"), st.none() | scoped),
        "regions": st.lists(texts, max_size=3),
        "priority": st.none() | st.integers(0, 9),
        "hints": st.dictionaries(names, st.none() | scoped, max_size=2),
    },
)


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    chosen = draw(st.lists(resources, unique=True, max_size=4))
    return Ask(
        kind=draw(st.sampled_from(KINDS)),
        operation=draw(texts),
        target=Target(draw(texts), draw(texts), draw(optional_text)),
        subject=draw(subjects),
        scope=draw(scopes),
        requested={name: draw(st.none() | quantities(name)) for name in chosen},
        constraints=draw(st.dictionaries(names, json_values, max_size=3)),
        entrypoint=draw(optional_text),
        schema=draw(optional_text),
        body=draw(json_values),
        request_id=draw(optional_text),
        traceparent=draw(st.none() | st.just("00-" + "a" * 32 + "-" + "b" * 16 + "-01") | texts),
        tracestate=draw(optional_text),
        idempotency_key=draw(st.none() | texts.filter(bool)),
        facets=draw(st.dictionaries(names, st.tuples(texts, optional_text, json_values), max_size=2)),
    )


_expressions = st.sampled_from(
    [
        "requested.resources.gpu.amount <= 4000",
        'has(requested.resources.gpu) && requested.resources.gpu.stated == "amount"',
        'scope.environment == "prod"',
        'scope.environment != "prod" || "operator" in identity.roles',
        'scope.hints.a == "x"',
        "size(scope.hints) < 2",
        "has(scope.hints.b)",
        'execution.operation == "chat"',
        "size(identity.roles) > 0",
        "true",
        "1",
    ]
)
_rules = st.fixed_dictionaries(
    {"expression": _expressions},
    optional={
        "when": _expressions,
        "match": st.fixed_dictionaries(
            {},
            optional={
                "kinds": st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
                "operations": st.just(["chat"]),
                "environments": st.just(["prod"]),
            },
        ),
        "action": st.sampled_from(["deny", "hold", "warn", "audit"]),
        "message": st.just("said"),
        "messageExpression": st.sampled_from(['"with " + execution.kind', "scope.environment", "1"]),
        "limits": st.sampled_from(
            [{"gpu": 1}, {"memory": "1GiB", "gpu": 2}, {"region": ["eu", "us"]}, {"region": ["us"]}]
        ),
        "obligations": st.sampled_from([[{"name": "log"}], [{"name": "log", "required": False}, {"name": "tell"}]]),
    },
)


@st.composite
def policies(draw: st.DrawFn) -> str:
    """The text of a policy file that is right: rules that refuse, hold, warn, limit, oblige, or cannot be evaluated."""
    rules = draw(st.lists(_rules, max_size=5))
    return json.dumps({"rules": [{"name": f"rule-{place}", **rule} for place, rule in enumerate(rules)]})
