"""What would have to change for an execution to get all that it asked for: from causes on the record, never guessed.

Where the record does not say what would have to change, the sentence says that it does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from execution_envelope.delta import Difference, Stated
from execution_envelope.lifecycle import Attempt, Candidate, Denied, Event, Granted, Limit, Verdict
from execution_envelope.resources import Amount, exceeds
from execution_envelope.review.explain.teller import Teller, path
from execution_envelope.review.explain.wording import (
    amount,
    asker,
    bare_value,
    candidates,
    listed,
    name,
    names,
    quantity,
    quoted,
    target,
)


def differences(teller: Teller) -> None:
    """One sentence for each reason of each thing that was not given as asked."""
    missing = [one for one in teller.differences if one.outcome not in ("equal", "added")]
    if not missing:
        teller.say("change", "change", "nothing: all that was asked for was given", events=teller.grants)
    for difference in missing:
        asked = teller.shown(difference, difference.requested)
        if difference.outcome == "ignored":
            givers = teller.givers(difference)
            text = (
                f"for {asked}: {names(givers)} would have to honour it, or say why not; "
                "why it was passed over the record does not say"
            )
            _say(teller, difference, text, givers, ["unstated"])
        elif difference.outcome == "unknown":
            side = "the request" if difference.requested == "unknown" else names(teller.givers(difference))
            text = f"for {asked}: {side} would have to state an amount, so that the two can be compared"
            _say(teller, difference, text, teller.givers(difference), [])
        elif difference.outcome == "raised":
            text = f"nothing is missing of {asked}; for no more than that: {_reasons(teller, difference)}"
            _say(teller, difference, text, [r.by for r in difference.reasons], [r.cause for r in difference.reasons])
        else:
            text = f"for {asked}: {_reasons(teller, difference)}"
            _say(teller, difference, text, [r.by for r in difference.reasons], [r.cause for r in difference.reasons])


def _say(teller: Teller, difference: Difference, text: str, by: list[str], codes: list[str]) -> None:
    teller.say("change", "change", text, events=teller.behind(difference), keys=[path(difference)], by=by, codes=codes)


def _reasons(teller: Teller, difference: Difference) -> str:
    said = [_CAUSES[reason.cause](teller, difference, reason) for reason in difference.reasons]
    return "; and ".join(dict.fromkeys(said)) or f"what would have to change the record does not say{_ask(teller)}"


def _ask(teller: Teller) -> str:
    return f": ask {names(event.by for event in teller.grants)}" if teller.grants else ""


def _policy(teller: Teller, difference: Difference, reason: Stated) -> str:
    key, hook = difference.key, name(reason.by)
    of_hook = [limit for _, limit in teller.of(Limit) if limit.hook == reason.by]
    if difference.sort == "resource":
        limits = [limit.resources[key] for limit in of_hook if key in limit.resources]
        if limits:
            return _raise(reason.by, key, limits[-1], teller.shown(difference, difference.requested))
    else:
        allowed = [limit.constraints[key] for limit in of_hook if key in limit.constraints]
        if allowed:
            only = listed(map(bare_value, allowed[-1]), "or")
            return f"hook {hook} would have to allow that value, or {only} be asked for, which it allows"
    return f"{hook} would have to change its policy; which rule that is the record does not say"


def _raise(hook: str, key: str, most: Amount, asked: str) -> str:
    limit = amount(key, most)
    return f"hook {name(hook)} would have to raise its limit of {limit} to {asked}, or at most {limit} be asked for"


def _quota(teller: Teller, difference: Difference, reason: Stated) -> str:
    found = [entry for entry in teller.record.budgets.values() if entry.resource == difference.key]
    if found:
        return " and ".join(
            f"budget account {name(entry.account)} ({name(entry.window)}) would have to have room; "
            f"its limit was {amount(entry.resource, entry.limit)}, and of this execution "
            f"{amount(entry.resource, entry.reserved)} stand reserved in it and "
            f"{amount(entry.resource, entry.spent)} spent, as recorded"
            for entry in found
        )
    parent = teller.envelope.correlation.part_of
    if parent is not None:
        return f"envelope {name(parent)}, of which it is part, would have to be granted more, or have more left"
    return f"the quota of which {name(reason.by)} speaks would have to have room; its account is not on the record"


def _capacity(teller: Teller, difference: Difference, reason: Stated) -> str:
    seen = considered(teller, difference)
    need = f"a place with room for {teller.shown(difference, difference.requested)} would be needed"
    if not seen:
        return f"{need}; which places were considered the record does not say"
    return f"{need}; of those considered, {candidates(seen)}"


def _balancing(teller: Teller, difference: Difference, reason: Stated) -> str:
    return f"{name(reason.by)} would have to share out otherwise; against what it balanced the record does not say"


def _fallback(teller: Teller, difference: Difference, reason: Stated) -> str:
    seen = considered(teller, difference)
    tried = f"; of those considered, {candidates(seen)}" if seen else "; what that is the record does not say further"
    return f"what {name(reason.by)} fell back from would have to work{tried}"


def _unsupported(teller: Teller, difference: Difference, reason: Stated) -> str:
    return f"the backend would have to support it, which {name(reason.by)} says it does not, or it be left out"


def _alias(teller: Teller, difference: Difference, reason: Stated) -> str:
    return f"the alias of {name(reason.by)} would have to be changed, or another name than this one be asked for"


def _default(teller: Teller, difference: Difference, reason: Stated) -> str:
    return f"the default of {name(reason.by)} would have to be changed, or give way to what was asked"


def _estimate(teller: Teller, difference: Difference, reason: Stated) -> str:
    return f"the estimate of {name(reason.by)} would have to give way to a stated amount"


def _unstated(teller: Teller, difference: Difference, reason: Stated) -> str:
    where = f" ({quoted(reason.text)})" if reason.text else ""
    return f"nobody said why{where}, so what would have to change the record does not say: ask {name(reason.by)}"


_CAUSES: Final[Mapping[str, Callable[[Teller, Difference, Stated], str]]] = {
    "policy": _policy,
    "quota": _quota,
    "capacity": _capacity,
    "balancing": _balancing,
    "fallback": _fallback,
    "unsupported": _unsupported,
    "alias": _alias,
    "default": _default,
    "estimate": _estimate,
    "unstated": _unstated,
}


def considered(teller: Teller, difference: Difference) -> list[Candidate]:
    """The places that the grants name, or where they name none, those that the newest attempt did."""
    behind = [event.data for event in teller.behind(difference)]
    seen = [one for grant in behind if isinstance(grant, Granted) for one in grant.candidates]
    attempts = teller.of(Attempt)
    return list(dict.fromkeys(seen)) or (list(attempts[-1][1].candidates) if attempts else [])


# What was refused


def refused(teller: Teller, verdicts: Sequence[tuple[Event, Verdict]]) -> None:
    """One sentence for each verdict that refused it: what would have to change for that to fall away."""
    if len(verdicts) > 1:
        text = f"each of these {len(verdicts)} refusals would have to fall away"
        teller.say("change", "change", text, events=[event for event, _ in verdicts])
    for event, verdict in verdicts:
        later = "trying later can help" if verdict.retryable else "trying later alone does not help"
        advice = ADVICE.get(verdict.code or "", _unsaid)(teller, verdict)
        text = f"{_hook(verdict)}: {advice}; {later}"
        teller.say("change", "change", text, events=[event], by=[verdict.hook], codes=[verdict.code])


def denied(teller: Teller, event: Event, said: Denied) -> None:
    """Of one that no hook denied by itself: every decider abstained, or an approver refused."""
    advice = ADVICE.get(said.code, _unsaid)(teller, Verdict(event.by, "", "deny", said.code))
    teller.say("change", "change", advice, events=[event], by=[event.by], codes=[said.code])


def _hook(verdict: Verdict) -> str:
    if account := account_of(verdict):
        return f"budget account {name(account)}"
    rules = (
        f", {'rule' if len(verdict.policies) == 1 else 'rules'} {names(verdict.policies)}," if verdict.policies else ""
    )
    return f"hook {name(verdict.hook)}{rules}"


def account_of(verdict: Verdict) -> str | None:
    """The account of the budget that refuses; None of a verdict that a hook gave."""
    return verdict.policies[0] if verdict.hook.startswith("budget:") and verdict.policies else None


def _role(teller: Teller, verdict: Verdict) -> str:
    roles = teller.envelope.identity.roles
    has = f"the {'role' if len(roles) == 1 else 'roles'} {names(roles)}" if roles else "no role"
    return f"{asker(teller.envelope).rstrip(',')} asked with {has}; which one is needed only its reason can say"


def _tenant(teller: Teller, verdict: Verdict) -> str:
    tenant = teller.envelope.identity.tenant
    who = "a request of no tenant" if tenant is None else f"tenant {name(tenant)}"
    return f"it would have to allow {who}"


def _scope(teller: Teller, verdict: Verdict) -> str:
    scope = teller.envelope.scope
    fields = ("project", "workroom", "environment", "purpose", "classification", "regions")
    values = [f"{field} {bare_value(found.value)}" for field in fields if (found := getattr(scope, field)) is not None]
    return (
        f"it would have to allow {listed(values) if values else 'a request without any scope'}, or another be asked in"
    )


def _target(teller: Teller, verdict: Verdict) -> str:
    return f"it would have to allow {target(teller.envelope.execution)}, or another target be asked for"


def _resource(teller: Teller, verdict: Verdict) -> str:
    if account_of(verdict):
        return "the limit of this budget would have to be raised, or less be asked for: it never has room for so much"
    over = [
        f"at most {amount(key, most)}"
        for key, most in verdict.limits.items()
        if (asked := teller.envelope.requested.resources.get(key)) and exceeds(asked.amount, most)
    ]
    return f"it allows {listed(over)}" if over else "less would have to be asked for, or its rule allow as much"


def _policies(teller: Teller, verdict: Verdict) -> str:
    if verdict.policies:
        return f"it would have to be allowed by {names(verdict.policies)}"
    return "which rule that is the record does not say"


def _undecidable(teller: Teller, verdict: Verdict) -> str:
    return f"a decider would have to allow {name(teller.envelope.execution.kind)}"


def _approval_refused(teller: Teller, verdict: Verdict) -> str:
    return "it would have to be asked anew, under another key, and be approved"


def _amount_unknown(teller: Teller, verdict: Verdict) -> str:
    return "the request would have to state the amount that this budget counts"


def _exhausted(teller: Teller, verdict: Verdict) -> str:
    return "it would have to have room again, its limit be raised, or less be asked for"


def _room(teller: Teller, verdict: Verdict) -> str:
    return "there would have to be room"


def _open(teller: Teller, verdict: Verdict) -> str:
    return "the backend would have to be open again"


def _approve(teller: Teller, verdict: Verdict) -> str:
    return "somebody else would have to approve it"


def _failed(teller: Teller, verdict: Verdict) -> str:
    mode = f", {verdict.failure_mode}," if verdict.failure_mode else ""
    return f"it did not decide: it would have to answer, or its failure mode{mode} be another"


def _unsaid(teller: Teller, verdict: Verdict) -> str:
    return "what would have to change the record does not say"


#: Reason code -> what would have to change, as far as the record says. A test holds that every code has one.
ADVICE: Final[Mapping[str, Callable[[Teller, Any], str]]] = {
    "role_required": _role,
    "tenant_forbidden": _tenant,
    "scope_forbidden": _scope,
    "target_forbidden": _target,
    "resource_forbidden": _resource,
    "policy": _policies,
    "undecidable": _undecidable,
    "approval_refused": _approval_refused,
    "amount_unknown": _amount_unknown,
    "quota_exhausted": _exhausted,
    "capacity": _room,
    "maintenance": _open,
    "approval_required": _approve,
    "hook_error": _failed,
    "hook_timeout": _failed,
    "hook_quarantined": _failed,
}


def waiting(teller: Teller) -> None:
    """Of one that was admitted, and to which nothing is granted yet."""
    attempts, asked = teller.of(Attempt), teller.envelope.requested.resources
    for key, (most, hook) in sorted(teller.record.limits.items()):
        if key in asked and asked[key].per == "total" and exceeds(asked[key].amount, most):
            text = f"for {quantity(key, asked[key])}: {_raise(hook, key, most, quantity(key, asked[key]))}"
            by = [event for event, limit in teller.of(Limit) if limit.hook == hook]
            teller.say("change", "change", text, events=by, keys=[f"resources.{key}"], by=[hook], codes=["policy"])
    if not attempts:
        text = "the backend would have to grant it; what it needs for that the record does not say"
        teller.say("change", "unsaid", text)
        return
    event, newest = attempts[-1]
    what = listed(quantity(key, one) for key, one in sorted(asked.items())) if asked else "it"
    seen = f"; of those considered last, {candidates(newest.candidates)}" if newest.candidates else ""
    text = f"a place with room for {what} would be needed{seen}"
    teller.say("change", "change", text, events=[event], by=[event.by], codes=["capacity"])
