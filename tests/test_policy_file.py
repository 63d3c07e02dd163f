"""The policy file: what its rules come to, what it refuses, and how it is reloaded."""

from __future__ import annotations

import json
import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import cel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from execution_envelope import AdmissionController, Decision, Denied, InvalidField
from execution_envelope.decision import Duty
from execution_envelope.envelope import KINDS, Envelope, seal
from execution_envelope.ledger import MemoryLedger
from execution_envelope.policy import file as module
from execution_envelope.policy import watched
from execution_envelope.policy.cel import CelRule, CelRules
from execution_envelope.policy.expression import FUNCTIONS, compile_expression
from execution_envelope.policy.file import SECTIONS, PolicyFile, parse
from execution_envelope.policy.view import view
from execution_envelope.resources import VOCABULARY
from execution_envelope.testing import START, ask

TRUE = {"name": "true", "expression": "true"}


def sealed(**fields: Any) -> Envelope:
    return seal(ask(**fields), id="x", now=START).envelope


def decide(*rules: dict[str, Any], **fields: Any) -> Decision:
    return parse(json.dumps({"revision": "r", "rules": rules})).decide(sealed(**fields))


def refused(text: str) -> InvalidField:
    with pytest.raises(InvalidField) as caught:
        parse(text)
    return caught.value


def rule(name: str, action: str = "deny", expression: str = "false", **more: Any) -> dict[str, Any]:
    return {"name": name, "action": action, "expression": expression, **more}


_WHOLE = sealed(scope={"environment": "test", "hints": {"x": "acme", "acme": 1}}, requested={"gpu": 1, "memory": 5})


# What rules come to


def test_deny_beats_hold_beats_warn_and_all_that_are_violated_are_named() -> None:
    rules = [rule("w", "warn"), rule("a", "audit"), rule("h", "hold"), rule("d", reason="capacity"), TRUE]
    assert decide(*rules) == Decision(
        "deny", "capacity", "rule d is violated", {}, (), "r", ["w", "a", "h", "d"], (), ()
    )
    held = decide(*rules[:3], rules[4])
    assert (held.outcome, held.code, held.policies) == ("hold", "approval_required", ["w", "a", "h"])
    warned = decide(rules[0], rules[1])
    assert (warned.outcome, warned.message, warned.policies) == (
        "warn",
        "rule w is violated; rule a is violated",
        ["w", "a"],
    )
    audited = decide(rules[1])
    assert (audited.outcome, audited.policies, audited.message) == ("allow", ["a"], "rule a is violated")


def test_a_rule_that_does_not_match_or_whose_when_does_not_hold_says_nothing() -> None:
    assert decide(rule("d", match={"tenants": ["other"]})).outcome == "allow"
    assert decide(rule("d", when="identity.tenant == 'other'")).outcome == "allow"
    assert decide(rule("d", match={"kinds": ["inference"]})).outcome == "abstain"
    assert decide().outcome == "abstain"
    # Rules that are for other operations alone say nothing of this one.
    assert decide(rule("d", match={"operations": ["envelope.approve"]})).outcome == "abstain"
    assert decide(rule("d", match={"operations": ["x"]}), rule("e", match={"tenants": ["x"]})).outcome == "allow"


def test_matching_is_by_every_field_that_a_rule_names() -> None:
    """Against what each rule says, one after the other: the index over all rules has to find the same."""
    values = {
        "kinds": ["model.deploy", "inference"],
        "operations": ["serving.deploy_model", "chat"],
        "tenants": ["acme", "other"],
        "environments": ["test", "prod"],
        "projects": ["research"],
        "targets": ["smollm2-135m"],
    }
    names = list(values)
    rules = []
    for number in range(60):
        match = {
            name: values[name][: 1 + number % len(values[name])]
            if number & 1
            else values[name][number % len(values[name]) :]
            for place, name in enumerate(names)
            if number >> place & 1
        }
        rules.append(rule(f"r{number}", "audit", match={name: some for name, some in match.items() if some}))
    for kind in KINDS:
        for scope in ({"environment": "prod"}, {"environment": "test", "project": "research"}, {}):
            facts = {
                "kinds": kind,
                "operations": "serving.deploy_model",
                "tenants": "acme",
                "targets": "smollm2-135m",
                "environments": scope.get("environment"),
                "projects": scope.get("project"),
            }
            want = [r["name"] for r in rules if all(facts[name] in some for name, some in r["match"].items())]
            assert list(decide(*rules, kind=kind, scope=scope).policies) == want


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("identity.authentication.method == 'oidc'", "expected `authentication`, it is absent"),
        ("identity.tenant > 3", "No such overload"),
        ("identity.roles[7] == 'a'", "index out of bounds"),
        ("identity.tenant", "expected true or false, got `acme`"),
        ("1 / 0 == 1", "division by zero"),
    ],
)
def test_an_expression_that_cannot_be_evaluated_denies(expression: str, said: str) -> None:
    for name in ("expression", "when"):
        decision = decide({"name": "broken", "expression": "true", name: expression}, TRUE)
        assert (decision.outcome, decision.code) == ("deny", "hook_error")
        assert decision.message == "rule broken could not be evaluated"
        [error] = decision.errors
        assert error.startswith("rule broken: ") and said in error and error.endswith(f"at `{name}`")


def test_an_error_of_a_rule_that_refuses_nothing_is_recorded_only() -> None:
    decision = decide(rule("w", "warn", "1 / 0 == 1"), rule("a", "audit", "1 / 0 == 1"))
    assert decision.outcome == "allow" and len(decision.errors) == 2
    # It would have set a limit, which would be missing.
    assert decide(rule("w", "warn", "1 / 0 == 1", limits={"replicas": 1})).code == "hook_error"


def test_limits_apply_where_the_expression_holds_and_combine_to_the_least() -> None:
    rules = [
        {"name": "a", "limits": {"replicas": 4, "memory": "2GiB", "region": ["x", "y", 1]}},
        {"name": "b", "expression": "true", "limits": {"replicas": 2, "region": ["y", "z", True]}},
        {"name": "c", "when": "false", "limits": {"replicas": 0}},
        rule("d", "audit", limits={"replicas": 1}),
    ]
    decision = decide(*rules)
    assert decision.limits == {"replicas": 2, "memory": 2 * 1024**3, "region": ("y",)}
    assert decision.policies == ["d", "a", "b"]
    assert decide(*rules, rule("e")).limits == {}
    assert decide(*rules, rule("e", "hold")).limits == decision.limits


def test_obligations_are_attached_once() -> None:
    rules = [
        {"name": "a", "obligations": [{"name": "tell", "required": False}]},
        {"name": "b", "obligations": [{"name": "tell", "text": "tell them"}, {"name": "log", "required": False}]},
    ]
    assert decide(*rules).obligations == (Duty("tell", "tell them", True), Duty("log", None, False))


def test_a_message_may_be_computed_and_falls_back() -> None:
    said = rule("d", message="no", messageExpression="'not for ' + identity.tenant")
    assert decide(said).message == "not for acme"
    said = rule("d", message="no", messageExpression="scope.purpose")
    decision = decide(said)
    assert (decision.message, len(decision.errors), decision.code) == ("no", 1, "policy")


def test_the_hints_that_were_read_are_those_of_the_expressions_that_ran() -> None:
    hints = {"hints": {"a": 1, "b": 2, "c": 3, "d": 4}}
    rules = [
        {"name": "1", "when": "scope.hints.a == 2", "expression": "scope.hints.b == 2"},
        {"name": "2", "expression": 'has(scope.hints.zz) || scope.hints["c"] == 3 || "scope.hints.d" == ""'},
        {"name": "3", "match": {"tenants": ["other"]}, "expression": "scope.hints.d == 4"},
    ]
    assert decide(*rules, scope=hints).hints == ("a", "c")
    assert decide(rule("all", expression="scope.hints.all(h, h != '')"), scope=hints).hints == ("a", "b", "c", "d")


def test_variables_stand_for_expressions() -> None:
    text = """
    variables:
      - {name: prod, expression: 'has(scope.environment) && scope.environment == "prod" // sic'}
      - {name: free, expression: '!variables.prod || identity.tenant == "acme"'}
    rules: [{name: a, expression: 'variables.free && "variables.x" != ""'}]
    """
    assert parse(text).decide(sealed(scope={"environment": "prod"})).outcome == "allow"
    assert parse(text.replace("acme", "other")).decide(sealed(scope={"environment": "prod"})).outcome == "deny"
    error = refused("rules: [{name: a, expression: variables.nope}]")
    assert "expected a variable that is declared before (none), got `nope`" in str(error)


def test_what_is_read_is_all_that_an_expression_can_need() -> None:
    everything = {"name": "a", "expression": "size(requested) == 2 && size(requested.resources.gpu) == 5"}
    assert decide(everything).outcome == "allow"
    for expression in (
        "has(requested.resources.gpu)",
        "has(requested.resources) && !has(requested.resources.cpu)",
        "has(identity.subject) && has(execution.target.version) && !has(identity.authentication)",
        "!has(scope.hints.x) && !has(scope.purpose) && has(scope.hints)",
        'requested.resources.exists(name, name == "memory")',
        'requested["resources"]["gpu"].amount == 1000 && requested.resources.memory.per == "total"',
        '[scope].all(s, s.environment == "test" && s.project == "research")',
        "has(correlation.id) && size(correlation.facets) == 0",
    ):
        assert decide({"name": "a", "expression": expression}).outcome == "allow", expression


# What a file may say


@pytest.mark.parametrize(
    ("text", "field", "said"),
    [
        ("rules: 5", "policy.rules", "expected a list, got a number"),
        ("- 1", "policy", "expected keys with values, got a list"),
        ("ruels: []", "policy.ruels", "expected a key that is documented"),
        ("rules: [{name: a, expression: 'true', exression: x}]", "policy.rules[0].exression", "documented"),
        ("rules: [{expression: 'true'}]", "policy.rules[0]", "the key `name`, it is missing"),
        ("rules: [{name: a}]", "policy.rules[0]", "a rule that does nothing"),
        ("rules: [{name: a, action: deny, limits: {replicas: 1}}]", "policy.rules[0].action", "expected `expression`"),
        ("rules: [{name: a, expression: true}]", "policy.rules[0].expression", "expected text, got true or false"),
        ("rules: [{name: a, expression: 1 +}]", "policy.rules[0].expression", "expected a CEL expression"),
        ("rules: [{name: a, expression: scope.envronment}]", "policy.rules[0].expression", "a field of scope (project"),
        ("rules: [{name: a, expression: nope.x}]", "policy.rules[0].expression", "expected one of identity, execution"),
        ("rules: [{name: a, expression: f(1)}]", "policy.rules[0].expression", "a function of CEL, got `f`"),
        (
            "rules: [{name: a, when: '[1].all(scope, true)', expression: 'true'}]",
            "policy.rules[0].when",
            "another name",
        ),
        (
            "rules: [{name: a, expression: 'true', reason: no}]",
            "policy.rules[0].reason",
            "expected one of role_required",
        ),
        ("rules: [{name: a, expression: 'true', action: no}]", "policy.rules[0].action", "deny, warn, audit, hold"),
        ("rules: [{name: a, expression: 'true', action: warn, reason: policy}]", "policy.rules[0].reason", "got warn"),
        ("rules: [{name: a, expression: 'true', match: {kind: [x]}}]", "policy.rules[0].match.kind", "expected one of"),
        ("rules: [{name: a, expression: 'true', match: {kinds: [x]}}]", "policy.rules[0].match.kinds", "model.deploy"),
        ("rules: [{name: a, expression: 'true', match: {tenants: []}}]", "policy.rules[0].match.tenants", "at least"),
        ("rules: [{name: a, limits: {replcas: 1}}]", "policy.rules[0].limits.replcas", "expected a resource"),
        ("rules: [{name: a, limits: {memory: lots}}]", "policy.rules[0].limits.memory", "536870912"),
        ("rules: [{name: a, limits: {memory: unlimited}}]", "policy.rules[0].limits.memory", "expected an amount"),
        ("rules: [{name: a, expression: 'true'}, {name: a, expression: 'true'}]", "policy.rules", "`a` again"),
        ("budgets: [{name: m, resource: memry, limit: 1}]", "policy.budgets[0].resource", "expected a resource"),
        ("budgets: [{name: m, resource: memory, limit: 1, window: week}]", "policy.budgets[0].window", "now, day"),
        ("prices: {version: v, currency: EUR, per_million: {a: {cost: 1}}}", "policy.prices.a.cost", "a million"),
        ("approval: {expires: 0}", "policy.approval.expires", "longer than none"),
        ("a: 1\na: 2", "policy", "expected each key once, got `a` again (line 2, column 1)"),
        ("a: &x [1]\nb: *x", "policy", "expected no alias"),
        ("1: 2", "policy", "expected a text as key, got `1`"),
        ("[[[[[[[[[[[[[]]]]]]]]]]]]]", "policy", "expected up to 12 levels"),
        ("a: !!python/object:os.system {}", "policy", "expected YAML"),
        ("a: 1\n---\nb: 2", "policy", "expected YAML, "),
        ("x" * 300_000, "policy", "expected up to 262144 bytes"),
    ],
)
def test_what_is_wrong_is_named(text: str, field: str, said: str) -> None:
    error = refused(text)
    assert error.field == field
    assert said in str(error)


def test_counts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RULES", 2)
    assert "expected up to 2, got 3" in str(refused(json.dumps({"rules": [rule(str(n)) for n in range(3)]})))
    long = json.dumps({"rules": [rule("a", expression=f"'{'x' * 5000}' == ''")]})
    assert "up to 4096 characters" in str(refused(long))
    many = [{"name": str(n), "limits": {f"c{n}-{k}": [1] for k in range(40)}} for n in range(2)]
    assert "expected up to 64 different limits, got 80" in str(refused(json.dumps({"rules": many})))


def test_a_budget_of_whole_devices_is_read_once() -> None:
    policy = parse("budgets: [{name: g, resource: gpu, limit: 16}, {name: c, resource: cpu, limit: 2, unknown: 1}]")
    gpus, cores = policy.budgets.budgets
    assert (gpus.limit, cores.limit, cores.unknown) == (16_000, 2_000, 1_000)


def test_budgets_prices_and_approval() -> None:
    policy = parse("""
    budgets:
      - {name: memory, resource: memory, limit: 1GiB, per: [tenant, project], kinds: [model.deploy], unknown: 1MiB}
      - {name: tokens, resource: output_tokens, limit: 1000, window: day, match: {tenant: acme}, mode: shadow}
    prices: {version: "2026-11", currency: EUR, per_million: {"smollm2-*": {output_tokens: "0.60"}}}
    approval: {expires: 2h, valid: 90s}
    """)
    memory, tokens = policy.budgets.budgets
    assert (memory.limit, memory.unknown, memory.per, memory.kinds) == (
        1024**3,
        1024**2,
        ("tenant", "project"),
        frozenset({"model.deploy"}),
    )
    assert (tokens.limit, tokens.window, tokens.match, tokens.mode) == (1000, "day", {"tenant": ("acme",)}, "shadow")
    prices = policy.budgets.prices
    assert prices is not None and prices.cost("smollm2-135m", {"output_tokens": 1_000_000}) == 600_000
    assert (policy.approvals.expires, policy.approvals.valid) == (timedelta(hours=2), timedelta(seconds=90))


def test_the_revision_is_that_of_the_file_or_of_its_bytes() -> None:
    assert parse("revision: v7").revision == "v7"
    assert parse("# a").revision != parse("# b").revision
    assert len(parse("").revision) == 12


def test_every_function_that_may_be_named_exists() -> None:
    def unknown(source: str) -> bool:
        try:
            cel.compile(source).execute({})
        except Exception as error:
            return "spelled correctly" in str(error)
        return False

    now = 'timestamp("2026-05-01T12:00:00Z")'
    for name in FUNCTIONS:
        assert not all(unknown(form) for form in (f"{name}('1')", f"'1'.{name}('1')", f"{now}.{name}()")), name
    assert unknown("lowerAscii('1')") and unknown("'1'.lowerAscii()")


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_words = st.sampled_from([name for keys in SECTIONS for name in keys.__struct_fields__] + list(VOCABULARY))
_trees = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_words | st.text(max_size=5), inner, max_size=4),
)


@settings(max_examples=150, deadline=None)
@given(st.text() | st.binary() | _trees.map(json.dumps))
def test_whatever_the_text_it_is_read_or_refused(text: str | bytes) -> None:
    try:
        policy = parse(text)
    except InvalidField as error:
        assert error.field.startswith("policy")
    else:
        policy.decide(sealed())


_PIECES = """scope hints .x ["y"] . ( ) [ ] { } ' " r" // && || ! == < + 1 1.5e3 true has( .all(x, variables identity"""
_pieces = st.sampled_from([*_PIECES.split(" "), "\n", '"' * 3])


@settings(max_examples=150, deadline=None)
@given(st.lists(_pieces | st.characters(), max_size=20).map("".join))
def test_whatever_the_expression_it_is_compiled_or_refused(source: str) -> None:
    try:
        expression = compile_expression(source, "policy.x")
    except InvalidField as error:
        assert error.field == "policy.x"
        return
    assert CelRules([CelRule(name="a", expression=expression)]).decide(_WHOLE).outcome in ("allow", "deny")


_PATHS = """identity|identity.subject|identity.subject.id|identity["roles"]|identity.delegation[0].type|scope
identity.authentication|identity.authentication.issuer|execution.target|execution.request.sha256|scope.environment
scope.hints|scope.hints.x|scope.hints["y"]|scope.hints[identity.tenant]|provenance.hints|provenance.environment
requested|requested.resources|requested.resources.gpu|requested.resources.gpu.most|requested["resources"].memory
requested.resources.cpu|requested.constraints.engine|requested.constraints|correlation.id|correlation.facets"""
_paths = st.sampled_from(_PATHS.replace("\n", "|").split("|"))
_conditions = st.recursive(
    st.one_of(
        _paths.map("has({})".format),
        _paths.map("size({}) > 1".format),
        st.tuples(_paths, _paths).map(" == ".join),
        st.tuples(_paths, st.sampled_from(['"acme"', "1000", '"test"', "[]"])).map(" != ".join),
        _paths.map("{}.exists(v, v == 'memory' || v == 'x')".format),
        _paths.map("[{}].all(v, v.environment == 'test')".format),
        _paths.map("{}.startsWith('a')".format),
    ),
    lambda inner: (
        st.tuples(inner, st.sampled_from([" && ", " || ", " == "]), inner).map(lambda t: f"({''.join(t)})")
        | inner.map("!({})".format)
    ),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(_conditions)
def test_an_expression_says_the_same_of_what_is_handed_over_as_of_the_whole_envelope(source: str) -> None:
    try:
        compile_expression(source, "policy.x")
    except InvalidField:
        return  # what does not parse, such as `has` of an index
    try:
        whole = cel.compile(source).execute(cel.Context(view(_WHOLE)))
    except Exception:
        whole = None
    decision = parse(json.dumps({"rules": [{"name": "a", "expression": source}]})).decide(_WHOLE)
    assert (decision.outcome, decision.code) == {
        True: ("allow", None),
        False: ("deny", "policy"),
        None: ("deny", "hook_error"),
    }[whole]


# Reload


GOOD = """
revision: '{}'
rules: [{{name: a, expression: 'identity.tenant == "{}"'}}]
budgets: [{{name: m, resource: memory, limit: {}}}]
"""


def test_reload_is_all_or_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(GOOD.format(1, "acme", 5))
    file = PolicyFile(path)
    assert (file.revision, file.budgets.budgets[0].limit, file.decider.decide(sealed()).outcome) == ("1", 5, "allow")
    assert not file.reload()
    path.write_text(GOOD.format(2, "other", 6))
    assert file.decider.decide(sealed()).outcome == "allow"  # nobody asked for it yet
    assert file.reload()
    assert (file.revision, file.budgets.budgets[0].limit, file.decider.decide(sealed()).outcome) == ("2", 6, "deny")

    path.write_text(GOOD.format(3, "acme", "lots"))
    assert not file.reload() and not file.reload()
    assert (file.revision, file.budgets.budgets[0].limit) == ("2", 6)
    assert (
        file.problem is not None and "revision 2 judges" in file.problem and "policy.budgets[0].limit" in file.problem
    )
    decision = file.decider.decide(sealed())
    assert (decision.outcome, decision.revision, decision.errors) == ("deny", "2", (file.problem,))
    assert [record.levelname for record in caplog.records] == ["WARNING"]

    path.unlink()
    assert not file.reload() and "can be read" in (file.problem or "")
    path.write_text(GOOD.format(3, "acme", 7))
    assert file.reload() and file.problem is None and file.decider.decide(sealed()).errors == ()


def test_a_file_that_is_wrong_at_first_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="expected a file that can be read"):
        PolicyFile(tmp_path / "none.yaml")
    (tmp_path / "policy.yaml").write_text("rules: 1")
    with pytest.raises(InvalidField, match=r"policy\.rules"):
        PolicyFile(tmp_path / "policy.yaml")


def test_a_file_that_is_watched_is_reloaded_while_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "WATCHED", 0.01)
    path = tmp_path / "policy.yaml"
    path.write_text(GOOD.format(1, "acme", 5))
    file = PolicyFile(path, watch=True)
    path.write_text(GOOD.format(2, "other", 5))
    os.utime(path, ns=(1, 1))
    end = time.monotonic() + 10
    while file.decider.decide(sealed()).revision != "2":
        assert time.monotonic() < end
        time.sleep(0.005)
    assert file.decider.decide(sealed()).outcome == "deny"


def test_a_file_that_is_written_right_now_is_not_taken_by_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(GOOD.format(1, "acme", 5))
    file = PolicyFile(path, watch=True)
    moment = [time.monotonic() + 10]
    monkeypatch.setattr(watched.time, "monotonic", lambda: moment[0])

    def look() -> str | None:
        moment[0] += 1.1
        return file.decider.decide(sealed()).revision

    path.write_text("rules: []")  # the beginning of what is being written
    assert look() == "1"
    path.write_text(GOOD.format(2, "acme", 5))
    assert look() == "1"
    assert look() == "2"
    # One that was put there a while ago is taken at once, even with the time and size of the one before.
    before = path.stat()
    other = tmp_path / "other.yaml"
    other.write_text(GOOD.format(3, "acme", 5))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    now = time.time_ns()
    monkeypatch.setattr(watched.time, "time_ns", lambda: now + 2_000_000_000)
    assert look() == "3"


def test_what_a_parser_raises_by_mistake_leaves_the_policy_before(tmp_path: Path) -> None:
    def read(data: bytes) -> Any:
        return parse(data) if b"acme" in data else [][1]

    path = tmp_path / "policy.yaml"
    path.write_text(GOOD.format(1, "acme", 5))
    file: watched.WatchedFile[Any] = watched.WatchedFile(path, read)
    path.write_text("x")
    assert file.reload() is False
    assert file.decide(sealed()).revision == "1"
    assert "not read, list index out of range" in (file.problem or "")


def test_variables_that_write_out_to_too_much_are_refused() -> None:
    lines = ["variables:", f"  - {{name: a, expression: '{' || '.join(['1 == 1'] * 400)}'}}", "rules:"]
    lines += [f"  - {{name: r{n}, expression: variables.a || variables.a || variables.a}}" for n in range(100)]
    with pytest.raises(InvalidField, match="characters of expressions"):
        parse("\n".join(lines))


def test_reloads_and_decisions_at_the_same_time_see_one_policy_or_the_other(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(GOOD.format("acme", "acme", 5))
    file = PolicyFile(path)
    seen, done = set[tuple[str | None, str]](), threading.Event()

    def ask_on() -> None:
        while not done.is_set():
            decision = file.decider.decide(sealed())
            seen.add((decision.revision, decision.outcome))

    threads = [threading.Thread(target=ask_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    for tenant in ["other", "acme"] * 10:
        path.write_text(GOOD.format(tenant, tenant, 5))
        file.reload()
        time.sleep(0.002)
    done.set()
    for thread in threads:
        thread.join()
    assert seen == {("acme", "allow"), ("other", "deny")}


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.anyio
async def test_at_the_seam(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("""
    revision: r1
    rules:
      - {name: limit, limits: {replicas: 2}}
      - {name: hint, expression: "!has(scope.hints.team) || scope.hints.team == 'a'", message: not your team}
    """)
    controller = AdmissionController(MemoryLedger(), hooks=[PolicyFile(path).decider])
    async with controller.admit(ask(scope={"hints": {"team": "a", "other": 1}})) as admission:
        assert admission.limits == {"replicas": 2}
    with pytest.raises(Denied, match="not your team"):
        async with controller.admit(ask(scope={"hints": {"team": "b"}})):
            pass
    await controller.aclose()


@pytest.mark.anyio
async def test_about_other_kinds_it_is_not_asked(tmp_path: Path, anyio_backend: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("rules: [{name: a, match: {kinds: [model.deploy]}, expression: 'true'}]")
    inference = ask(kind="inference", operation="chat")
    controller = AdmissionController(MemoryLedger(), hooks=[PolicyFile(path).decider])
    with pytest.raises(Denied) as denied:
        await controller.begin(inference)
    assert "abstained" in str(denied.value)
    await controller.aclose()
    only = PolicyFile(path, kinds=frozenset({"model.deploy"})).decider
    controller = AdmissionController(MemoryLedger(), hooks=[only])
    async with controller.admit(inference) as admission:
        assert admission.record.verdicts == ()
    await controller.aclose()
