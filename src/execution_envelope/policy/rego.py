"""Rego policies as a decider, compiled once. Needs the extra ``rego`` (`regopy`).

``Rego(text)``: the policy is of package ``envelope``. It says ``allow``, with optional ``reasons``, ``message``,
``limits`` and ``obligations`` beside it, or all of that in one object ``decision``. `input` is the envelope as all
engines see it. What is undefined denies.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import regopy

from execution_envelope.credentials import brief, invalid, shown
from execution_envelope.decision import ABOUT_OTHERS, CODES, Decision, Declaration, Duty
from execution_envelope.envelope import Envelope
from execution_envelope.policy.limits import least, read_limits
from execution_envelope.policy.view import SHAPE, Wanted, view
from execution_envelope.policy.watched import MAX_BYTES, check_depth
from execution_envelope.values import canonical

#: What of the document is read.
DOCUMENT: Final = ("allow", "decision", "reasons", "message", "limits", "obligations")

_QUERY: Final = "data.envelope"
_HINTS: Final = re.compile(r"\bhints\b(?:\.([A-Za-z_]\w*)|\[\s*\"([^\"\\]*)\"\s*\])?")
#: `input`, and the family that is read of it when that is named.
_INPUT: Final = re.compile(r"\binput\b(?:\s*\.\s*([A-Za-z_]\w*))?")
#: The engine's Python face does not tell what its own errors were.
_UNNAMED: Final = "a builtin failed, or a rule has two values; the engine does not say which"
#: Characters of a policy, without texts and comments. The parser recurses, and takes a time that grows with the square.
MAX_CODE: Final = 32_768
_MAINTENANCE: Final = re.compile(r"\bmaintenance\b")
_TEXT_OR_COMMENT: Final = re.compile(r'"(?:[^"\\\n]|\\.)*"|`[^`]*`|#[^\n]*')
_ERROR: Final = re.compile(r"errormsg \d+:([^)]*)")


class Rego:
    """A decider from the text of a Rego policy (version 1 of the language). Raises `InvalidField` for one that does not
    compile.

    The interpreter lets other threads run, and takes as long as the policy takes: it is asked in a thread. An error of
    a builtin, such as a division by zero, denies with ``hook_error``, where Rego by itself would read it as undefined.
    """

    def __init__(
        self, text: str, *, name: str = "rego", kinds: frozenset[str] | None = None, revision: str | None = None
    ) -> None:
        self.declaration = Declaration(name=name, kinds=kinds, side_effects=False)
        encoded = text.encode("utf-8", "replace")
        if len(encoded) > MAX_BYTES:
            raise invalid("rego", f"expected up to {MAX_BYTES} bytes, got {len(encoded)}")
        self.revision = revision or hashlib.sha256(encoded).hexdigest()[:12]
        code = _TEXT_OR_COMMENT.sub('""', text)
        check_depth(code, "rego")
        if len(code) > MAX_CODE:
            raise invalid("rego", f"expected up to {MAX_CODE} characters beside texts and comments, got {len(code)}")
        by_kind = _MAINTENANCE.search(text) is not None
        self._about = frozenset(name for name in ABOUT_OTHERS if by_kind or name in text)
        self._hints = _hints(text)
        self._wanted = _wanted(text)
        self._local = threading.local()
        builder = _interpreter()
        try:
            builder.add_module("envelope.rego", text)
            self._bundle = builder.build(_QUERY)
        except (regopy.RegoError, ValueError) as error:
            raise invalid("rego", f"expected a policy in Rego, {_said(str(error))}") from None
        if not self._bundle.ok():
            raise invalid("rego", "expected a policy in Rego that compiles")
        # What names a function that does not exist is found only when it is asked.
        try:
            interpreter = _interpreter()
            interpreter.set_input({})
            interpreter.query_bundle(self._bundle)
        except ValueError:
            raise invalid("rego", "expected functions that exist, the compiled policy cannot be asked") from None

    def decide(self, envelope: Envelope) -> Decision:
        """Allows where `allow` is true; denies where it is false or undefined, and where anything fails. Of who may
        approve a policy that nowhere names that has no opinion, where it does not deny."""
        interpreter = getattr(self._local, "interpreter", None)
        if interpreter is None:
            # An interpreter holds the input, so each thread has its own.
            interpreter = self._local.interpreter = _interpreter()
        hints = envelope.scope.hints
        read = [name for name in hints if self._hints is None or name in self._hints] if hints else []
        # As JSON text: what the engine is given as data it does not escape, and a quote in it would end a text.
        interpreter.set_input_term(canonical(view(envelope, self._wanted)).decode())
        try:
            output = interpreter.query_bundle(self._bundle)
            problem = None if output.ok() else _UNNAMED
        except (regopy.RegoError, ValueError) as error:
            problem = _said(str(error))
        if problem is not None:
            return self._failed(problem, read)
        results = output.results[0].expressions if output.results else []
        document = results[0] if results else {}
        if not isinstance(document, dict):
            return self._failed(f"expected the document of package envelope, got {shown(document)}", read)
        try:
            decision = self._decision(document, read)
            operation = envelope.execution.operation
            if decision.outcome == "allow" and operation in ABOUT_OTHERS:
                return decision if operation in self._about else Decision("abstain", revision=self.revision, hints=read)
            return decision
        except ValueError as error:
            return self._failed(str(error), read)

    def _failed(self, problem: str, read: list[str]) -> Decision:
        text = "the policy could not be evaluated"
        return Decision("deny", "hook_error", text, revision=self.revision, errors=[problem], hints=read)

    def _decision(self, document: Mapping[str, Any], read: list[str]) -> Decision:
        if "decision" in document:
            document = document["decision"]
            if not isinstance(document, dict) or (unknown := [name for name in document if name not in DOCUMENT]):
                got = document if not isinstance(document, dict) else unknown[0]
                raise invalid("decision", f"expected an object with {', '.join(DOCUMENT)}, got {shown(got)}")
        allow = document.get("allow", False)
        if not isinstance(allow, bool):
            raise invalid("allow", f"expected true or false, got {shown(allow)}")
        reasons = document.get("reasons", [])
        if not isinstance(reasons, list) or any(not isinstance(one, str) for one in reasons):
            raise invalid("reasons", f"expected a list of texts, got {shown(reasons)}")
        message = document.get("message")
        if message is not None and not isinstance(message, str):
            raise invalid("message", f"expected a text, got {shown(message)}")
        if not allow:
            codes = [one for one in reasons if one in CODES]
            code = min(codes, key=lambda code: CODES[code][0]) if codes else "policy"
            said = message or "; ".join(one for one in reasons if one not in CODES) or "the policy does not allow it"
            return Decision("deny", code, said, revision=self.revision, policies=reasons, hints=read)
        limits = least([read_limits(document.get("limits", {}), "limits")])
        duties = _duties(document.get("obligations", []))
        return Decision("allow", None, message, limits, duties, self.revision, reasons, (), read)


class _Obligation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    text: str | None = None
    required: bool = True


def _duties(said: Any) -> tuple[Duty, ...]:
    try:
        read = msgspec.convert(said, list[_Obligation])
    except msgspec.ValidationError as error:
        raise invalid("obligations", f"expected a list of objects with name, text and required: {error}") from None
    return tuple(Duty(one.name, one.text, one.required) for one in read)


def _interpreter() -> Any:
    interpreter = regopy.Interpreter()
    interpreter.log_level = regopy.LogLevel.NONE
    interpreter.strict_built_in_errors = True
    return interpreter


def _wanted(text: str) -> Wanted | None:
    """The families that the policy names: to hand over the others costs more than to ask. None for all of them."""
    found = set(_INPUT.findall(text))
    if not found <= SHAPE.keys():
        return None
    return dict.fromkeys(sorted(found)) or None


def _hints(text: str) -> frozenset[str] | None:
    """The governance hints that the policy names; None where it may read any."""
    found = _HINTS.findall(text)
    if any(not (dotted or indexed) for dotted, indexed in found) or re.search(r"\bwalk\b|input\s*\[|scope\s*\[", text):
        return None
    return frozenset(dotted or indexed for dotted, indexed in found)


def _said(text: str) -> str:
    match = _ERROR.search(text)
    return brief((match[1] if match else text.partition("\n")[0]).strip() or "it failed", 200)
