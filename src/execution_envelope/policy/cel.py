"""Rules in CEL, in the style of Kubernetes' ValidatingAdmissionPolicy, and what they come to for one envelope.

What a rule is matched by is looked up, for all rules together, before any expression runs: rules that cannot match
cost nothing. Of the envelope only what the expressions of the matching rules name is handed to the engine, once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, TypeAlias, cast, get_args

import cel

from execution_envelope.credentials import brief, shown
from execution_envelope.decision import ABOUT_OTHERS, CODES, Decision, Duty
from execution_envelope.envelope import KINDS, Envelope, Scoped
from execution_envelope.policy.expression import Expression, wanted
from execution_envelope.policy.limits import least
from execution_envelope.policy.view import Wanted, view

Action: TypeAlias = Literal["deny", "warn", "audit", "hold"]
ACTIONS: Final[tuple[str, ...]] = get_args(Action)

#: How many combinations of matching rules are remembered with what has to be read for them.
MAX_PLANS: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CelRule:
    """One rule. `match` maps names of `MATCHABLE` to the values that match.

    Where it matches and `when` holds, `expression` has to hold too; else `action` applies, for `reason` (one of
    `decision.CODES`), with `message`, or what `message_expression` comes to. Where it holds, or there is none, `limits`
    and `obligations` apply: of a resource the most, in base units, and of a constraint the values that are allowed.
    """

    name: str
    match: Mapping[str, frozenset[str]] = field(default_factory=dict)
    when: Expression | None = None
    expression: Expression | None = None
    message: str | None = None
    message_expression: Expression | None = None
    reason: str = "policy"
    action: Action = "deny"
    limits: Mapping[str, Any] = field(default_factory=dict)
    obligations: tuple[Duty, ...] = ()

    @property
    def refuses(self) -> bool:
        """Whether it may not be passed over: it can refuse, or sets something that would be missing."""
        return self.action in ("deny", "hold") or bool(self.limits or self.obligations)

    @property
    def size(self) -> int:
        """Characters of its expressions, with what variables stand for."""
        found = (self.when, self.expression, self.message_expression)
        return sum(one.size for one in found if one is not None)

    @property
    def reads(self) -> frozenset[tuple[str, ...]]:
        """The paths in the view that its expressions may read."""
        found = (self.when, self.expression, self.message_expression)
        return frozenset[tuple[str, ...]]().union(*(one.reads for one in found if one is not None))

    def is_about(self, operation: str) -> bool:
        """Whether it says who may approve, or revoke: it names that operation, or the kind alone."""
        operations = self.match.get("operations")
        if operations is not None:
            return operation in operations
        return "maintenance" in self.match.get("kinds", ())


def _scoped(name: str) -> Callable[[Envelope], str | None]:
    def read(envelope: Envelope) -> str | None:
        scoped: Scoped | None = getattr(envelope.scope, name)
        return None if scoped is None else str(scoped.value)

    return read


#: What a rule can be matched by -> how it is read.
MATCHABLE: Final[Mapping[str, Callable[[Envelope], str | None]]] = {
    "kinds": lambda envelope: envelope.execution.kind,
    "operations": lambda envelope: envelope.execution.operation,
    "tenants": lambda envelope: envelope.identity.tenant,
    "subject_types": lambda envelope: envelope.identity.subject.type,
    "target_types": lambda envelope: envelope.execution.target.type,
    "targets": lambda envelope: envelope.execution.target.id,
    "projects": _scoped("project"),
    "workrooms": _scoped("workroom"),
    "environments": _scoped("environment"),
    "purposes": _scoped("purpose"),
    "classifications": _scoped("classification"),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The rules that match together, and what of the envelope their expressions read.

    Most requests violate nothing. Where the rules set nothing either, `checks`, the compiled `when` and `expression` of
    each, are enough to say so; else it is None.
    """

    rules: tuple[CelRule, ...]
    wanted: Wanted | None
    checks: tuple[tuple[Any, Any], ...] | None

    def holds(self, context: Any) -> bool:
        """Whether certainly nothing is violated, fails, or is set."""
        if self.checks is None:
            return False
        try:
            for when, expression in self.checks:
                if when is not None and (asked := when(context)) is not True:
                    if asked is False:
                        continue
                    return False
                if expression(context) is not True:
                    return False
        except Exception:  # it is evaluated again, where what failed is named
            return False
        return True


class _Index:
    """The rules that cover one kind. A set of them is a number with a bit for each."""

    def __init__(self, rules: Sequence[CelRule]) -> None:
        self._rules = rules
        self._all = (1 << len(rules)) - 1
        self._plans: dict[int, Plan] = {}
        self._fields: list[tuple[Callable[[Envelope], str | None], Mapping[str | None, int], int]] = []
        for name, read in MATCHABLE.items():
            free = sum(1 << place for place, rule in enumerate(rules) if name not in rule.match)
            if name == "kinds" or free == self._all:
                continue
            of_value: dict[str | None, int] = {}
            for place, rule in enumerate(rules):
                for value in rule.match.get(name, ()):
                    of_value[value] = of_value.get(value, free) | 1 << place
            self._fields.append((read, of_value, free))

    def matching(self, envelope: Envelope) -> Plan:
        chosen = self._all
        for read, of_value, free in self._fields:
            chosen &= of_value.get(read(envelope), free)
        plan = self._plans.get(chosen)
        if plan is None:
            plan = self._planned(chosen)
            if len(self._plans) < MAX_PLANS:
                self._plans[chosen] = plan
        return plan

    def _planned(self, chosen: int) -> Plan:
        rules = tuple(rule for place, rule in enumerate(self._rules) if chosen >> place & 1)
        expressions = [
            one for rule in rules for one in (rule.when, rule.expression, rule.message_expression) if one is not None
        ]
        reads = frozenset[tuple[str, ...]]().union(*(one.reads for one in expressions))
        checks = None
        if not any(rule.limits or rule.obligations for rule in rules):
            checks = tuple((_execute(rule.when), _execute(rule.expression)) for rule in rules)
        return Plan(rules, wanted(reads) if expressions else None, checks)


def _execute(expression: Expression | None) -> Any:
    return None if expression is None else expression.program.execute


class _Failed(Exception):
    """An expression came to nothing that can be used."""


class CelRules:
    """Rules in order. `decide` is what a decider answers; `revision` is recorded with it."""

    def __init__(self, rules: Sequence[CelRule], *, revision: str | None = None) -> None:
        self.rules = tuple(rules)
        self.revision = revision
        self._abstain = Decision("abstain", revision=revision, hints=())
        self._allow = Decision("allow", revision=revision, hints=())
        covering = {kind: [rule for rule in rules if kind in rule.match.get("kinds", KINDS)] for kind in KINDS}
        self._indexes = {kind: _Index(some) for kind, some in covering.items() if some}
        #: A rule covers the kinds that it names, else all; one that names operations says something of these alone.
        self._covered = frozenset[str]().union(
            *(rule.match.get("kinds", KINDS) for rule in rules if "operations" not in rule.match)
        )

    def decide(self, envelope: Envelope) -> Decision:
        """Abstains where no rule covers the kind, and none matches; else allows what no rule refuses. Deny beats hold
        beats warn.

        Who may approve, or revoke, is allowed by a rule that names ``maintenance`` or the operation, and by no other: a
        rule for everything that nobody wrote for that is no answer to it.

        A rule that cannot be evaluated is named in `errors`; where it might have refused, or set a limit, it denies
        with ``hook_error``.
        """
        plan = self.plan(envelope)
        if plan is None or not plan.rules:
            return self.unmatched(envelope)
        operation = envelope.execution.operation
        about_others = operation in ABOUT_OTHERS
        context = None if plan.wanted is None else cel.Context(view(envelope, plan.wanted))
        if not (envelope.scope.hints or about_others) and plan.holds(context):
            return self._allow
        heard = Heard(context, envelope.scope.hints)
        for rule in plan.rules:
            heard.judge(rule)
        if about_others:
            return heard.about_another(operation, self.revision)
        if heard.plain:
            return self._allow
        return heard.decision(self.revision)

    def plan(self, envelope: Envelope) -> Plan | None:
        """The rules that match; None where none covers the kind."""
        index = self._indexes.get(envelope.execution.kind)
        return None if index is None else index.matching(envelope)

    def unmatched(self, envelope: Envelope) -> Decision:
        """What is said where no rule matches."""
        # Rules that are only for other operations say nothing of this one.
        covered = envelope.execution.kind in self._covered and envelope.execution.operation not in ABOUT_OTHERS
        return self._allow if covered else self._abstain


class Heard:
    """What the rules said of one envelope so far."""

    __slots__ = ("_applied", "_context", "_errors", "_failed", "_hints", "_kept", "_read", "_violated")

    def __init__(self, context: Any, hints: Mapping[str, Any]) -> None:
        self._context = context
        self._hints = hints
        self._read: dict[str, None] = {}
        self._violated: list[tuple[CelRule, str]] = []
        self._kept: list[CelRule] = []
        self._errors: list[str] = []
        self._failed: list[str] = []
        self._applied: list[CelRule] = []

    def add(self, other: Heard) -> None:
        """What was heard of other rules, that come after these."""
        for mine, its in (
            (self._violated, other._violated),
            (self._kept, other._kept),
            (self._errors, other._errors),
            (self._failed, other._failed),
            (self._applied, other._applied),
        ):
            cast(list[Any], mine).extend(its)
        self._read.update(other._read)

    @property
    def content(self) -> Hashable:
        """All that was heard, by which what is the same is equal: rules are objects of one `CelRules`."""
        return (
            tuple([(id(rule), said) for rule, said in self._violated]),
            tuple(map(id, self._kept)),
            tuple(self._errors),
            tuple(self._failed),
            tuple(map(id, self._applied)),
            tuple(self._read),
        )

    @property
    def silent(self) -> bool:
        """Nothing to say at all, and no hint was read."""
        return not (self._violated or self._kept or self._errors or self._read)

    def forget(self) -> None:
        """Keep what was heard, and nothing of the envelope."""
        self._context, self._hints = None, {}

    @property
    def plain(self) -> bool:
        """Nothing to say but that it is allowed."""
        return not (self._violated or self._kept or self._errors or self._hints)

    def judge(self, rule: CelRule) -> None:
        try:
            if rule.when is not None and not self._bool(rule, "when", rule.when):
                return
            if rule.expression is not None and not self._bool(rule, "expression", rule.expression):
                self._violated.append((rule, self._message(rule)))
                return
            self._applied.append(rule)
            if rule.limits or rule.obligations:
                self._kept.append(rule)
        except _Failed as failed:
            self._errors.append(str(failed))
            if rule.refuses:
                self._failed.append(rule.name)

    def _bool(self, rule: CelRule, name: str, expression: Expression) -> bool:
        value = self._run(rule, name, expression)
        if value is True or value is False:
            return value
        raise _Failed(f"rule {rule.name}: expected true or false, got {shown(value)} - at `{name}`")

    def _run(self, rule: CelRule, name: str, expression: Expression) -> Any:
        if self._hints:
            named = self._hints if expression.hints is None else expression.hints
            self._read.update((hint, None) for hint in named if hint in self._hints)
        try:
            return expression.program.execute(self._context)
        except Exception as error:
            raise _Failed(f"rule {rule.name}: {_said(error)} - at `{name}`") from error

    def _message(self, rule: CelRule) -> str:
        if rule.message_expression is not None:
            try:
                said = self._run(rule, "messageExpression", rule.message_expression)
                if isinstance(said, str) and said.strip():
                    return said
                raise _Failed(f"rule {rule.name}: expected text, got {shown(said)} - at `messageExpression`")
            except _Failed as failed:
                self._errors.append(str(failed))
        return rule.message or f"rule {rule.name} is violated"

    def about_another(self, operation: str, revision: str | None) -> Decision:
        """All of it together, where it takes a rule that is about this operation to allow it."""
        decision = self.decision(revision)
        if decision.outcome not in ("allow", "warn"):
            return decision
        # One that was violated and only warns, or could not be evaluated, allows nobody.
        about = [rule.name for rule in self._applied if rule.is_about(operation)]
        if not about:
            return Decision("abstain", revision=revision, errors=decision.errors, hints=decision.hints)
        return replace(decision, policies=tuple(dict.fromkeys((*decision.policies, *about))))

    def decision(self, revision: str | None) -> Decision:
        """All of it together."""
        by_action = {name: [(r, said) for r, said in self._violated if r.action == name] for name in ACTIONS}
        read, errors = tuple(self._read), tuple(self._errors)
        names = [rule.name for rule, _ in self._violated]
        if by_action["deny"]:
            denying = by_action["deny"]
            # "Never" is said before "not now".
            code = min((rule.reason for rule, _ in denying), key=lambda code: CODES[code][0])
            return self._refusal("deny", code, denying, names, revision, read, errors)
        if self._failed:
            text = f"rule {', '.join(self._failed)} could not be evaluated"
            return Decision("deny", "hook_error", text, {}, (), revision, names, errors, read)
        limits, duties = least([rule.limits for rule in self._kept]), _duties(self._kept)
        kept = [rule.name for rule in self._kept]
        if by_action["hold"]:
            held = self._refusal(
                "hold", by_action["hold"][0][0].reason, by_action["hold"], names + kept, revision, read, errors
            )
            return Decision("hold", held.code, held.message, limits, duties, revision, held.policies, errors, read)
        message = "; ".join(said for _, said in by_action["warn"] + by_action["audit"]) or None
        outcome: Literal["warn", "allow"] = "warn" if by_action["warn"] else "allow"
        return Decision(outcome, None, message, limits, duties, revision, names + kept, errors, read)

    @staticmethod
    def _refusal(
        outcome: Literal["deny", "hold"],
        code: str,
        violated: Sequence[tuple[CelRule, str]],
        names: Sequence[str],
        revision: str | None,
        read: Sequence[str],
        errors: Sequence[str],
    ) -> Decision:
        message = "; ".join(said for _, said in violated)
        return Decision(outcome, code, message, {}, (), revision, names, errors, read)


def _duties(rules: Sequence[CelRule]) -> tuple[Duty, ...]:
    """Each obligation once, required when any rule requires it."""
    duties: dict[str, Duty] = {}
    for rule in rules:
        for duty in rule.obligations:
            before = duties.get(duty.name, duty)
            duties[duty.name] = Duty(duty.name, before.text or duty.text, before.required or duty.required)
    return tuple(duties.values())


def _said(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"expected `{brief(error.args[0])}`, it is absent"
    return brief(str(error).partition(". ")[0], 200)
