"""One policy file in YAML: rules in CEL, budgets, prices, how long approvals wait. Reloaded without a restart.

``PolicyFile("policy.yaml")``: its `decider` goes to the controller's hooks, `budgets` and `approvals` to its
parameters of those names. Needs the extra ``policy``. All keys are in `docs/reference/policy.md`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import msgspec

from execution_envelope.approvals import Approvals
from execution_envelope.budgets import MAX_BUDGETS, Budget, Budgets, Prices
from execution_envelope.credentials import brief, invalid, shown
from execution_envelope.decision import CODES, Decision, Declaration, Duty
from execution_envelope.envelope import KINDS, Envelope
from execution_envelope.errors import InvalidField
from execution_envelope.policy.cel import ACTIONS, MATCHABLE, Action, CelRule, CelRules
from execution_envelope.policy.expression import Expression, compile_expression, written_out
from execution_envelope.policy.limits import read_limits
from execution_envelope.policy.watched import FileDecider, WatchedFile
from execution_envelope.policy.yaml_text import read_yaml
from execution_envelope.resources import parse_amount

MAX_RULES: Final = 512
MAX_VARIABLES: Final = 64
#: Characters of all expressions, with what variables stand for: while they are compiled, requests wait.
MAX_WRITTEN: Final = 524_288
#: How many values one list of `match`, or of allowed values, may have.
MAX_VALUES: Final = 256
MAX_NAME: Final = 128
MAX_MESSAGE: Final = 500
#: How many different limits, and obligations, all rules of a file may set together.
MAX_SET: Final = 64

_T = TypeVar("_T")


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the file. The fields are its keys."""


class ObligationKeys(_Section, frozen=True):
    """What has to be done along with the execution."""

    name: str
    text: str | None = None
    required: bool = True


class RuleKeys(_Section, frozen=True, rename={"message_expression": "messageExpression"}):
    """One rule."""

    name: str
    match: dict[str, list[str]] = {}
    when: str | None = None
    expression: str | None = None
    message: str | None = None
    message_expression: str | None = None
    reason: str | None = None
    action: str | None = None
    limits: dict[str, Any] = {}
    obligations: list[ObligationKeys] = []


class VariableKeys(_Section, frozen=True):
    """An expression that has a name: ``variables.NAME`` stands for it in what comes after."""

    name: str
    expression: str


class BudgetKeys(_Section, frozen=True):
    """One budget, see `budgets.Budget`."""

    name: str
    resource: str
    limit: Any
    window: str = "now"
    per: list[str] = msgspec.field(default_factory=lambda: ["tenant"])
    match: dict[str, str | list[str]] = {}
    kinds: list[str] | None = None
    unknown: Any = "deny"
    mode: str = "enforce"


class PriceKeys(_Section, frozen=True):
    """The price table, see `budgets.Prices`."""

    version: str
    currency: str
    per_million: dict[str, dict[str, str | int]] = {}


class ApprovalKeys(_Section, frozen=True):
    """How long a hold waits, and for how long an approval may be taken up."""

    expires: Any = None
    valid: Any = None


class FileKeys(_Section, frozen=True):
    """The whole file."""

    revision: str | None = None
    variables: list[VariableKeys] = []
    rules: list[RuleKeys] = []
    budgets: list[BudgetKeys] = []
    prices: PriceKeys | None = None
    approval: ApprovalKeys | None = None


#: Every part of the file.
SECTIONS: Final = (FileKeys, VariableKeys, RuleKeys, ObligationKeys, BudgetKeys, PriceKeys, ApprovalKeys)


@dataclass(frozen=True, slots=True)
class Policy:
    """What a policy file says. `decide` is what a decider answers; `revision` names it on the record."""

    rules: CelRules
    budgets: Budgets
    approvals: Approvals
    revision: str

    def decide(self, envelope: Envelope) -> Decision:
        return self.rules.decide(envelope)


def parse(text: str | bytes) -> Policy:
    """Read a policy. Raises `InvalidField` with the path of what is wrong: ``policy.rules[2].expression``."""
    try:
        data = text if isinstance(text, bytes) else text.encode("utf-8")
    except UnicodeEncodeError:
        raise invalid("policy", "expected text in UTF-8") from None
    plain = read_yaml(data, "policy")
    keys = _converted({} if plain is None else plain)
    revision = keys.revision or hashlib.sha256(data).hexdigest()[:12]
    if len(revision) > MAX_NAME:
        raise invalid("policy.revision", f"expected up to {MAX_NAME} characters, got {len(revision)}")
    variables = _variables(keys.variables)
    _some(keys.rules, MAX_RULES, "policy.rules")
    rules: list[CelRule] = []
    written = 0
    for place, one in enumerate(keys.rules):
        rules.append(_rule(one, f"policy.rules[{place}]", variables))
        written += rules[-1].size
        if written > MAX_WRITTEN:
            raise invalid(
                "policy.rules", f"expected up to {MAX_WRITTEN} characters of expressions with their variables"
            )
    _different((rule.name for rule in rules), "policy.rules")
    for what, names in (
        ("limits", {name for rule in rules for name in rule.limits}),
        ("obligations", {duty.name for rule in rules for duty in rule.obligations}),
    ):
        if len(names) > MAX_SET:
            raise invalid("policy.rules", f"expected up to {MAX_SET} different {what}, got {len(names)}")
    return Policy(
        CelRules(rules, revision=revision),
        Budgets(_budgets(keys.budgets), prices=_prices(keys.prices), revision=revision),
        _approvals(keys),
        revision,
    )


# The keys of the file


#: Words of the decoder -> ours.
_WORDS: Final = (
    (" | null`", "`"),
    ("`null`", "nothing"),
    ("`object`", "keys with values"),
    ("`array`", "a list"),
    ("`str`", "text"),
    ("`bool`", "true or false"),
    ("`int`", "a number"),
)
_PROBLEM: Final = re.compile(r"(.*?)(?: - at `(?:key in )?\$(.*)`)?", re.S)


def _converted(plain: Any) -> FileKeys:
    try:
        return msgspec.convert(plain, FileKeys)
    except msgspec.ValidationError as error:
        match = _PROBLEM.fullmatch(str(error))
        said, where = (match[1], match[2] or "") if match else (str(error), "")
        unknown = re.fullmatch(r"Object contains unknown field `(.*)`", said, re.S)
        if unknown:
            said, where = "expected a key that is documented, got another", f"{where}.{brief(unknown[1])}"
        missing = re.fullmatch(r"Object missing required field `(.*)`", said)
        if missing:
            said = f"expected the key `{missing[1]}`, it is missing"
        for theirs, ours in _WORDS:
            said = said.replace(theirs, ours)
        raise invalid(f"policy{where}", said[:1].lower() + said[1:]) from None
    except (UnicodeError, RecursionError, ValueError) as error:
        raise invalid("policy", f"expected plain data, {brief(str(error), 120)}") from None


def _text(value: str, path: str, most: int) -> str:
    if not value.strip() or len(value) > most or not value.isprintable():
        raise invalid(path, f"expected up to {most} printable characters, got {shown(value)}")
    return value


def _some(values: Sequence[_T] | Mapping[Any, Any], most: int, path: str) -> None:
    if len(values) > most:
        raise invalid(path, f"expected up to {most}, got {len(values)}")


def _different(names: Any, path: str) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise invalid(path, f"expected different names, got {shown(twice[0])} again")


def _variables(keys: Sequence[VariableKeys]) -> dict[str, str]:
    _some(keys, MAX_VARIABLES, "policy.variables")
    _different((one.name for one in keys), "policy.variables")
    variables: dict[str, str] = {}
    for place, one in enumerate(keys):
        path = f"policy.variables[{place}]"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", one.name):
            raise invalid(f"{path}.name", f"expected a name as in CEL, got {shown(one.name)}")
        compile_expression(one.expression, f"{path}.expression", variables)
        # A comment at its end would take in what comes after it.
        variables[one.name] = f"{written_out(one.expression, f'{path}.expression', variables)}\n"
    return variables


def _rule(keys: RuleKeys, path: str, variables: Mapping[str, str]) -> CelRule:
    def compiled(name: str, source: str | None) -> Expression | None:
        return None if source is None else compile_expression(source, f"{path}.{name}", variables)

    name = _text(keys.name, f"{path}.name", MAX_NAME)
    for field, value in (
        ("action", keys.action),
        ("reason", keys.reason),
        ("message", keys.message),
        ("messageExpression", keys.message_expression),
    ):
        if value is not None and keys.expression is None:
            raise invalid(f"{path}.{field}", "expected `expression` beside it, there is none that could be violated")
    if keys.expression is None and not keys.limits and not keys.obligations:
        raise invalid(path, "expected `expression`, `limits` or `obligations`, got a rule that does nothing")
    action = keys.action or "deny"
    if action not in ACTIONS:
        raise invalid(f"{path}.action", f"expected {', '.join(ACTIONS)}, got {shown(action)}")
    reason = keys.reason or ("approval_required" if action == "hold" else "policy")
    if reason not in CODES:
        raise invalid(f"{path}.reason", f"expected one of {', '.join(CODES)}, got {shown(reason)}")
    if keys.reason is not None and action not in ("deny", "hold"):
        raise invalid(f"{path}.reason", f"expected `action` deny or hold beside it, got {action}")
    return CelRule(
        name=name,
        match=_match(keys.match, f"{path}.match"),
        when=compiled("when", keys.when),
        expression=compiled("expression", keys.expression),
        message=None if keys.message is None else _text(keys.message, f"{path}.message", MAX_MESSAGE),
        message_expression=compiled("messageExpression", keys.message_expression),
        reason=reason,
        action=cast(Action, action),
        limits=read_limits(keys.limits, f"{path}.limits"),
        obligations=_obligations(keys.obligations, f"{path}.obligations"),
    )


def _match(keys: Mapping[str, list[str]], path: str) -> dict[str, frozenset[str]]:
    for name, values in keys.items():
        where = f"{path}.{brief(name)}"
        if name not in MATCHABLE:
            raise invalid(where, f"expected one of {', '.join(MATCHABLE)}, got {shown(name)}")
        if not values:
            raise invalid(where, "expected at least one value: nothing matches none, leave it out to match all")
        _some(values, MAX_VALUES, where)
        unknown = [value for value in values if name == "kinds" and value not in KINDS]
        if unknown:
            raise invalid(where, f"expected {', '.join(KINDS)}, got {shown(unknown[0])}")
    return {name: frozenset(values) for name, values in keys.items()}


def _obligations(keys: Sequence[ObligationKeys], path: str) -> tuple[Duty, ...]:
    _different((one.name for one in keys), path)
    for place, one in enumerate(keys):
        _text(one.name, f"{path}[{place}].name", MAX_NAME)
        if one.text is not None:
            _text(one.text, f"{path}[{place}].text", MAX_MESSAGE)
    return tuple(Duty(one.name, one.text, one.required) for one in keys)


def _budgets(keys: Sequence[BudgetKeys]) -> tuple[Budget, ...]:
    _some(keys, MAX_BUDGETS, "policy.budgets")
    _different((one.name for one in keys), "policy.budgets")
    budgets = []
    for place, one in enumerate(keys):
        fields: dict[str, Any] = msgspec.structs.asdict(one)
        fields["kinds"] = None if one.kinds is None else frozenset(one.kinds)
        path = f"policy.budgets[{place}]"
        budgets.append(_within(path, f"budgets.{one.name}", Budget(**fields).checked))
    return tuple(budgets)


def _prices(keys: PriceKeys | None) -> Prices | None:
    if keys is None:
        return None
    return _within("policy.prices", "prices", Prices(keys.version, keys.currency, keys.per_million).checked)


def _approvals(keys: FileKeys) -> Approvals:
    given = keys.approval or ApprovalKeys()
    times = {}
    for name in ("expires", "valid"):
        value = getattr(given, name)
        if value is None:
            continue
        path = f"policy.approval.{name}"
        amount = parse_amount("duration", value, field=path)
        if not isinstance(amount, int) or not 0 < amount < timedelta.max // timedelta(milliseconds=1):
            raise invalid(path, f"expected a time longer than none, got {shown(value)}")
        times[name] = timedelta(milliseconds=amount)
    return Approvals(**times)


def _within(path: str, theirs: str, check: Callable[[], _T]) -> _T:
    """What `check` returns; what it raises is raised with the path in the file in the place of theirs."""
    try:
        return check()
    except InvalidField as error:
        said = str(error).removesuffix(f" - at `{error.field}`")
        below = error.field.removeprefix(theirs) if error.field.startswith(theirs) else ""
        raise invalid(f"{path}{below}", said) from None


# The file


class PolicyFile:
    """The policy in a file, and what it says now. Raises `InvalidField` when it is wrong at first, or cannot be read.

    `kinds` are the kinds that its decider, `name`, is asked about at all; about others it has no opinion, where None
    means all of them and it abstains where no rule covers the kind. `watch` reloads the file when it changed, see
    `watched.WatchedFile`. May be used by several threads.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str = "policy",
        kinds: frozenset[str] | None = None,
        watch: bool = False,
    ) -> None:
        self._file = WatchedFile(path, parse, watch=watch)
        # On the event loop: rules take microseconds.
        self.decider = FileDecider(self._file, Declaration(name=name, kinds=kinds, side_effects=False, inline=True))

    def reload(self) -> bool:
        """Read the file again. True when another policy judges from now on; all of it, or nothing of it."""
        return self._file.reload()

    def look(self) -> None:
        """With `watch`: look at the file when nobody is asked, as the decider does whenever it is."""
        self._file.look()

    @property
    def policy(self) -> Policy:
        return self._file.policy

    @property
    def problem(self) -> str | None:
        """What is wrong with the file as it is now; None when it is the one that judges."""
        return self._file.problem

    @property
    def budgets(self) -> Budgets:
        """With the price table."""
        return self.policy.budgets

    @property
    def approvals(self) -> Approvals:
        return self.policy.approvals

    @property
    def revision(self) -> str:
        return self.policy.revision
