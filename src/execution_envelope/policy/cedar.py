"""Cedar policies as a decider, validated against the published schema of the envelope before they are ever asked.

``Cedar(text)``; the subject is the principal, the operation the action (in the group of its kind), the target the
resource, and the rest is in the context; see `docs/reference/policy.md`. Needs the extra ``cedar``.

Cedar denies what nothing permits, and so does this. It also skips a policy that cannot be evaluated, a ``forbid`` like
any other (cedar-policy/cedar#2428); here a ``forbid`` that errors denies.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import cedarpy
import msgspec

from execution_envelope.credentials import brief, invalid, shown
from execution_envelope.decision import ABOUT_OTHERS, CODES, Decision, Declaration
from execution_envelope.envelope import KINDS, Envelope
from execution_envelope.policy.cedar_schema import ANY, entities, request, schema, wanted
from execution_envelope.policy.limits import least, read_limits
from execution_envelope.policy.watched import MAX_BYTES, check_depth

#: What an annotation may be called, and on which policies it stands.
ANNOTATIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "id": ("permit", "forbid"),
    "reason": ("forbid",),
    "message": ("forbid",),
    "limits": ("permit",),
}

#: Characters of one policy, without texts and comments. The parser recurses, and a process has one stack.
MAX_POLICY: Final = 16_384
_TEXT_OR_COMMENT: Final = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*', re.S)

_ERRING: Final = re.compile(r"policy `([^`]*)`")


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a policy from its text."""

    name: str
    effect: Literal["permit", "forbid"]
    reason: str = "policy"
    message: str | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    #: Whether it names approving, or the kind of that.
    about: frozenset[str] = frozenset()


class Cedar:
    """A decider from the text of Cedar policies. Raises `InvalidField` for what is not valid by the schema.

    `operations` names the operations of each kind that policies name as actions: ``{"model.deploy":
    ["serving.deploy_model"]}``. A policy that names another is not valid; ``action in Action::"model.deploy"`` covers
    all of a kind. `kinds` are the kinds that are asked about at all.
    """

    def __init__(
        self,
        text: str,
        *,
        name: str = "cedar",
        operations: Mapping[str, Collection[str]] | None = None,
        kinds: frozenset[str] | None = None,
        revision: str | None = None,
    ) -> None:
        self.declaration = Declaration(name=name, kinds=kinds, side_effects=False, inline=True)
        encoded = text.encode("utf-8", "replace")
        if len(encoded) > MAX_BYTES:
            raise invalid("cedar", f"expected up to {MAX_BYTES} bytes, got {len(encoded)}")
        for kind, names in (operations or {}).items():
            if kind not in KINDS:
                raise invalid("cedar.operations", f"expected {', '.join(KINDS)}, got {shown(kind)}")
            if reserved := [one for one in names if one.endswith(ANY)]:
                raise invalid("cedar.operations", f"expected no name that ends in `{ANY}`, got {shown(reserved[0])}")
        self.revision = revision or hashlib.sha256(encoded).hexdigest()[:12]
        _check_size(text)
        plain = _plain(text)
        self._known = _read(plain)
        self._attributes, self._hints = _names(plain)
        self._wanted = wanted(self._attributes)
        checked = cedarpy.validate_policies(text, schema(operations))
        for error in checked.errors:
            known = self._known.get(error.policy_id)
            said = error.error.replace(f"for policy `{error.policy_id}`, ", "")
            raise invalid(
                _path(known.name if known else error.policy_id), f"expected a valid policy, {brief(said, 200)}"
            )
        try:
            self._policies = cedarpy.PolicySet.from_str(text)
        except ValueError as error:
            raise invalid("cedar", f"expected Cedar policies, {brief(str(error), 200)}") from None

    def inputs(self, envelope: Envelope) -> tuple[dict[str, str], str]:
        """The request and the entities, as the engine is asked."""
        return request(envelope, self._wanted), entities(envelope, self._attributes)

    def decide(self, envelope: Envelope) -> Decision:
        """Allows what a ``permit`` permits and no ``forbid`` forbids, or could not be evaluated. Of who may approve it
        has no opinion where no ``permit`` names that."""
        asked, some = self.inputs(envelope)
        heard = cedarpy.is_authorized(asked, self._policies, some)
        hints = envelope.scope.hints
        read = tuple(name for name in hints if self._hints is None or name in self._hints) if hints else ()
        said = heard.diagnostics
        errors, failed = [], []
        for error in said.errors:
            match = _ERRING.search(error)
            known = self._known.get(match[1]) if match else None
            errors.append(error if known is None else error.replace(match[1], known.name, 1))  # type: ignore[index]
            if known is None or known.effect == "forbid":
                failed.append("one that is not named" if known is None else known.name)
        determining = [self._known[one] for one in said.reasons]
        names = [known.name for known in determining]
        if not heard.allowed and determining:
            code = min((known.reason for known in determining), key=lambda code: CODES[code][0])
            message = "; ".join(known.message or f"policy {known.name} forbids it" for known in determining)
            return self._decision("deny", code, message, names, errors, read)
        if failed:
            message = f"policy {', '.join(failed)} could not be evaluated"
            return self._decision("deny", "hook_error", message, names, errors, read)
        if heard.decision is cedarpy.Decision.NoDecision:
            # The request itself was refused by the engine, which is a defect of this adapter.
            return self._decision("deny", "hook_error", "the engine came to no decision", names, errors, read)
        if not heard.allowed:
            return self._decision("deny", "policy", "no policy permits it", names, errors, read)
        operation = envelope.execution.operation
        if operation in ABOUT_OTHERS and not any(operation in known.about for known in determining):
            return self._decision("abstain", None, None, [], errors, read)
        return self._decision("allow", None, None, names, errors, read, least([known.limits for known in determining]))

    def _decision(
        self,
        outcome: Literal["allow", "deny", "abstain"],
        code: str | None,
        message: str | None,
        names: list[str],
        errors: list[str],
        read: tuple[str, ...],
        limits: Mapping[str, Any] | None = None,
    ) -> Decision:
        return Decision(outcome, code, message, limits or {}, (), self.revision, names, errors, read)


def _check_size(text: str) -> None:
    """Raises `InvalidField` for what the parser would not come back from."""
    code = _TEXT_OR_COMMENT.sub('""', text)
    check_depth(code, "cedar")
    for policy in code.split(";"):
        if len(policy) > MAX_POLICY:
            raise invalid("cedar", f"expected policies of up to {MAX_POLICY} characters, got one of {len(policy)}")


def _plain(text: str) -> Any:
    """The policies as JSON data. Raises `InvalidField`."""
    try:
        plain = msgspec.json.decode(cedarpy.policies_to_json_str(text))
    except (ValueError, RecursionError) as error:
        raise invalid("cedar", f"expected Cedar policies, {brief(str(error), 200)}") from None
    if plain.get("templates"):
        raise invalid("cedar", "expected policies without slots, got a template, which permits and forbids nothing")
    return plain


def _names(plain: Any) -> tuple[frozenset[str], frozenset[str] | None]:
    """The attributes that policies name, and the governance hints; None for hints whose names are computed."""
    attributes, hints = set[str](), set[str]()
    computed = False
    for node in _nodes(plain):
        if node.get("type") in ("Hints", "Constraints"):
            # It is named itself, and not as an attribute of the context.
            attributes.add(node["type"].lower())
            computed = computed or node["type"] == "Hints"
        for operator, inner in node.items():
            if operator in (".", "has") and "attr" in inner:
                attributes.add(inner["attr"])
            elif operator in ("hasTag", "getTag") and '"hints"' in msgspec.json.encode(inner["left"]).decode():
                name = inner["right"].get("Value")
                computed = computed or not isinstance(name, str)
                hints.add(str(name))
    return frozenset(attributes), None if computed else frozenset(hints)


def _nodes(plain: Any) -> Iterator[dict[str, Any]]:
    """Every object in JSON data."""
    pending = [plain]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield node
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)


def _read(plain: Any) -> dict[str, _Known]:
    """What is known of the policies, by the engine's id. Raises `InvalidField`."""
    known = {}
    for id, policy in plain["staticPolicies"].items():
        known[id] = _policy(id, policy)
        if any(node.get("type") == "Action" and str(node.get("id")).endswith(ANY) for node in _nodes(policy)):
            raise invalid(_path(known[id].name), f"expected an operation or a kind, got an action that ends in `{ANY}`")
    names = [one.name for one in known.values()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise invalid("cedar", f"expected policies with different ids, got {shown(twice[0])} again")
    return known


def _policy(id: str, policy: Mapping[str, Any]) -> _Known:
    annotations: Mapping[str, str | None] = policy.get("annotations") or {}
    effect: Literal["permit", "forbid"] = policy["effect"]
    name = annotations.get("id") or id
    for annotation in annotations:
        if effect not in ANNOTATIONS.get(annotation, ()):
            allowed = ", ".join(one for one, on in ANNOTATIONS.items() if effect in on)
            raise invalid(_path(name), f"expected the annotations {allowed} on {effect}, got {shown(annotation)}")
        if not annotations[annotation]:
            raise invalid(f"{_path(name)}.{annotation}", "expected an annotation with a text, got none")
    reason = annotations.get("reason") or "policy"
    if reason not in CODES:
        raise invalid(f"{_path(name)}.reason", f"expected one of {', '.join(CODES)}, got {shown(reason)}")
    limits = annotations.get("limits")
    read = {} if limits is None else read_limits(_pairs(limits, f"{_path(name)}.limits"), f"{_path(name)}.limits")
    code = msgspec.json.encode([policy.get("action"), policy.get("conditions")])
    by_kind = b'"maintenance"' in code
    about = frozenset(name for name in ABOUT_OTHERS if by_kind or f'"{name}"'.encode() in code)
    return _Known(name, effect, reason, annotations.get("message"), read, about)


def _path(name: str) -> str:
    return f"cedar.{brief(name)}"


def _pairs(text: str, path: str) -> dict[str, Any]:
    """``replicas=2, region=[eu-west|eu-north]`` as a mapping."""
    pairs: dict[str, Any] = {}
    for part in text.split(","):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not (name and sign and value) or name in pairs:
            raise invalid(path, f"expected `replicas=2, region=[eu-west|eu-north]`, got {shown(text)}")
        pairs[name] = value[1:-1].split("|") if value.startswith("[") and value.endswith("]") else value
    return pairs
