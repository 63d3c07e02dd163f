"""What was asked and by whom, what was decided of it, and why it waits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from execution_envelope import approvals
from execution_envelope.decision import CODES
from execution_envelope.lifecycle import (
    LEVELS,
    Admitted,
    Approval,
    Attempt,
    Bound,
    Budgeted,
    BudgetEntry,
    Denied,
    Error,
    Event,
    Held,
    Limit,
    Observed,
    Reported,
    Sealed,
    Verdict,
)
from execution_envelope.review.explain.remedies import account_of
from execution_envelope.review.explain.teller import Teller, keys_of, part_name
from execution_envelope.review.explain.wording import (
    ASKED_TO,
    amount,
    asker,
    bare_value,
    candidates,
    deadline,
    listed,
    moment,
    name,
    names,
    party,
    passed,
    quantity,
    quoted,
    some_times,
    target,
    value,
)
from execution_envelope.words import span

_SAID: Final = {
    "allow": "allowed it",
    "deny": "denied it",
    "hold": "held it",
    "warn": "allowed it with a warning",
    "abstain": "abstained",
}
_SCOPE: Final = ("project", "workroom", "environment", "purpose", "classification", "regions", "priority")


# Who asked, and for what


def asked(teller: Teller) -> None:
    """Who, when, what, with which resources; what the client always sends; under which scope."""
    envelope = teller.envelope
    execution, observed = envelope.execution, teller.of(Observed)
    what = f"{ASKED_TO.get(execution.kind, 'for')} {target(execution)} ({name(execution.operation)})"
    when = moment(envelope.correlation.created_at)
    text = f"{asker(envelope)} asked {when} {what}"
    for _, seen in observed:
        began = f"began {moment(seen.began_at)} and ended" if seen.began_at else "ended"
        text = (
            f"{asker(envelope)} was seen {what}: by entry {name(seen.key)} of {name(seen.source)} it {began} "
            f"{moment(seen.ended_at)}, and it was recorded after the fact {when}; no decider was asked"
        )
    wanted, sent = _wanted(teller, "asserted"), _wanted(teller, "client_default")
    text += f", with {listed(wanted.values())}" if wanted else ", and named no resources"
    teller.say("asked", "ask", text, events=[event for event, _ in observed], keys=wanted, named=True)
    if sent:
        text = (
            f"its client always sends {listed(sent.values())}: that is not counted as ignored where nobody speaks of it"
        )
        teller.say("asked", "client_default", text, keys=sent)
    _identity(teller)
    _scope(teller)
    for event, sealed in teller.of(Sealed):
        key = ", under an idempotency key" if sealed.key is not None else ""
        text = f"that was sealed{key}, sha256 {name(sealed.digest[:12])}..., and does not change since"
        teller.say("asked", "event", text, events=[event])


def _wanted(teller: Teller, provenance: str) -> dict[str, str]:
    requested = teller.envelope.requested
    return {
        f"resources.{key}": quantity(key, one)
        for key, one in sorted(requested.resources.items())
        if one.provenance == provenance
    } | {
        f"constraints.{key}": value(key, one.value)
        for key, one in sorted(requested.constraints.items())
        if one.provenance == provenance
    }


def _identity(teller: Teller) -> None:
    identity = teller.envelope.identity
    proof = identity.authentication
    how = "how it was authenticated is not on the record"
    if proof is not None:
        issuer = f", issuer {name(proof.issuer)}" if proof.issuer else ""
        how = f"it was authenticated by {name(proof.method)}{issuer}"
    word = "role" if len(identity.roles) == 1 else "roles"
    roles = f"the {word} {names(identity.roles)}" if identity.roles else "no roles"
    teller.say("asked", "asker", f"{party(identity.subject)} had {roles}; {how}", named=True)


def _scope(teller: Teller) -> None:
    for provenance, who in (("asserted", "the caller said"), ("established", "the backend established")):
        said = []
        for field in _SCOPE:
            scoped = getattr(teller.envelope.scope, field)
            if scoped is not None and scoped.provenance == provenance:
                said.append(f"{field} {bare_value(scoped.value)}" + (f" (by {name(scoped.by)})" if scoped.by else ""))
        if said:
            teller.say("asked", "scope", f"{who} {listed(said)}")


# What was decided


def decided(teller: Teller) -> None:
    """Every verdict, what they came to, what was said of a held one, the limits, what budgets hold."""
    quiet: dict[str, list[tuple[Event, Verdict]]] = {}
    for event, verdict in teller.of(Verdict):
        loud = verdict.message or verdict.failure or verdict.shadow or verdict.errors or verdict.policies
        if verdict.decision in ("allow", "abstain") and not loud:
            quiet.setdefault(verdict.decision, []).append((event, verdict))
        else:
            _verdict(teller, event, verdict)
    for decision, some in quiet.items():
        hooks = list(dict.fromkeys(verdict.hook for _, verdict in some))
        text = f"{'hook' if len(hooks) == 1 else 'hooks'} {names(hooks)} {_SAID[decision]}"
        teller.say("decided", "verdict", text, events=[event for event, _ in some], by=hooks)
    for event in teller.record.events:
        _decision(teller, event)
    for event, limit in teller.of(Limit):
        most = [f"at most {amount(key, one)}" for key, one in sorted(limit.resources.items())]
        most += [
            f"{name(key)} {listed(map(bare_value, some), 'or')}" for key, some in sorted(limit.constraints.items())
        ]
        why = f", because {quoted(limit.text)}" if limit.text else ""
        text = f"hook {name(limit.hook)} lets it have {listed(most)}{why}"
        teller.say("decided", "limit", text, events=[event], keys=keys_of(limit), by=[limit.hook])
    for entry in teller.record.budgets.values():
        _holding(teller, entry)


def _verdict(teller: Teller, event: Event, verdict: Verdict) -> None:
    account = account_of(verdict)
    who = f"budget account {name(account)}" if account else f"hook {name(verdict.hook)} {name(verdict.version)}"
    if verdict.failure is not None:
        mode = f", and its failure mode, {verdict.failure_mode}, was applied" if verdict.failure_mode else ""
        text = f"{who} did not decide ({verdict.failure}){mode}"
        text += f": {quoted(verdict.message)}" if verdict.message else ""
    else:
        text = f"{who} {_SAID[verdict.decision]}{_because(verdict.code, verdict.message)}"
    if verdict.policies and not account:
        text += f"; {names(verdict.policies)} determined that"
    if verdict.revision is not None:
        text += f"; its policy was of revision {name(verdict.revision)}"
    if verdict.decision == "deny":
        text += f"; {_later(verdict.retryable)}"
    if verdict.errors:
        text += f"; its engine reported {listed(quoted(error, 200) for error in verdict.errors)}"
    if verdict.shadow:
        text += "; that was in shadow: recorded, and not enforced"
    teller.say("decided", "verdict", text, events=[event], by=[verdict.hook], codes=[verdict.code])


def _later(retryable: bool) -> str:
    return "trying later can help" if retryable else "trying later alone does not help"


def _because(code: str | None, message: str | None) -> str:
    said = f", because {quoted(message)}" if message else ""
    if code is None:
        return said
    meaning = "" if message or code not in CODES else f": {CODES[code][1]}"
    return f"{said} ({name(code)}{meaning})"


def _news(teller: Teller, message: str) -> str | None:
    """A message, unless a verdict says the same."""
    return None if any(verdict.message == message for verdict in teller.record.verdicts) else message


def _decision(teller: Teller, event: Event) -> None:
    data, when = event.data, moment(event.at)
    if isinstance(data, Denied):
        text = f"{when} it was denied{_because(data.code, _news(teller, data.message))}; {_later(data.retryable)}"
        teller.say("decided", "decision", text, events=[event], codes=[data.code])
    elif isinstance(data, Held):
        until = f" until {deadline(data.expires_at)}" if data.expires_at else ", without an end,"
        text = f"{when} it was held{until}{_because(data.code, _news(teller, data.message))}"
        text += "; the caller sent no idempotency key and was given one" if data.key is not None else ""
        teller.say("decided", "hold", text, events=[event], codes=[data.code])
    elif isinstance(data, Approval):
        said = "approved it" if data.decision == "approve" else "refused it"
        until = f", to be taken up until {deadline(data.expires_at)}" if data.expires_at else ""
        text = (
            f"{when} {name(data.approver)} {said}, because {quoted(data.reason)}{until}; "
            f"saying so was a request of its own, envelope {name(data.admission)}"
        )
        teller.say("decided", "approval", text, events=[event], by=[data.approver], envelope=data.admission)
    elif isinstance(data, Admitted):
        text = f"{when} it was admitted"
        text += f", undecided: no decider covers {name(teller.envelope.execution.kind)}" if data.undecided else ""
        text += f"; had everything been enforced it would have been {data.shadow}" if data.shadow is not None else ""
        teller.say("decided", "decision", text, events=[event])
        for account, above in sorted(data.covered.items()):
            text = f"of budget account {name(account)} envelope {name(above)}, above it, has reserved for this one too"
            teller.say("decided", "budget", text, events=[event], envelope=above)


def _holding(teller: Teller, entry: BudgetEntry) -> None:
    key = entry.resource
    place = (entry.account, entry.window, key)
    events = [
        event
        for event, fact in teller.facts(Budgeted)
        if any((one.account, one.window, one.resource) == place for one in fact.entries)
    ]
    first = teller.record.reserved[place]
    spent = "" if entry.window == "now" else f" and {amount(key, entry.spent)} spent"
    text = (
        f"of budget account {name(entry.account)} ({name(entry.window)}) {amount(key, first.reserved)} were reserved, "
        f"where the limit was {amount(key, entry.limit)}; it has {amount(key, entry.reserved)} reserved{spent} by now"
    )
    text += "; how much it takes is not known" if entry.unknown else ""
    text += "; that is counted, and not enforced" if entry.shadow else ""
    teller.say("decided", "budget", text, events=events, keys=[f"resources.{key}"])


# Why it waits


def waits(teller: Teller) -> None:
    """Of one that is held, or admitted and not granted: since when, for whom or what; else why nothing was granted."""
    state = teller.record.state
    if state == "held":
        _waits_for_approval(teller)
    elif state == "admitted":
        _waits_for_grant(teller)
    elif state == "asked":
        teller.say("waits", "unsaid", "the record ends before anything was decided: what it waits for it does not say")
    _attempts(teller, "waits" if state == "admitted" else "course")


def _waits_for_approval(teller: Teller) -> None:
    record, hold, now = teller.record, teller.record.hold, teller.stamp
    holds = approvals.holds(record)
    if holds:
        events = [event for event, verdict in teller.of(Verdict) if verdict.hook in holds]
        said = [name(hook) + (f" (by {names(why)})" if why else "") for hook, why in holds.items()]
        text = f"{'hook' if len(said) == 1 else 'hooks'} {listed(said)} would have it approved first"
        teller.say("waits", "hold", text, events=events, by=holds)
    who = dict.fromkeys(party(one) for one in (*teller.envelope.identity.delegation, teller.envelope.identity.subject))
    text = f"who may approve it the record does not say, policy does; who asked for it may not: {listed(who)}"
    teller.say("waits", "hold", text)
    if hold is None or not isinstance(hold.data, Held):
        return
    said_of_it = [event for event in [record.approval] if event is not None]
    if approvals.lifted(record, now):
        text = "it is approved: the caller has to send the same request again, under the same key, to be admitted"
        teller.say("waits", "hold", text, events=said_of_it)
    elif lapsed := approvals.lapsed(record, now):
        teller.say("waits", "hold", f"{quoted(lapsed)}: that has passed, and it holds again", events=said_of_it)
    waited = passed(hold.at, teller.now)
    text = f"it has waited for {span(waited)}" if waited is not None else "since when it waits cannot be read"
    if hold.data.expires_at:
        over = approvals.expired(record, now)
        text += f"; it waits until {deadline(hold.data.expires_at)}" + (", which has passed" if over else "")
    teller.say("waits", "hold", f"{text}; nothing is reserved for it meanwhile", events=[hold])


def _waits_for_grant(teller: Teller) -> None:
    admissions, bindings, errors = teller.of(Admitted), teller.of(Bound), teller.of(Error)
    for event, _ in admissions:
        waited = passed(event.at, teller.now)
        text = "it was admitted, and nothing is granted to it yet"
        text += f": it has waited for {span(waited)}" if waited is not None else ""
        teller.say("waits", "waiting", text, events=[event])
    for event, bound in bindings[-1:]:
        text = (
            f"{name(bound.owner)} has it as {name(bound.kind)} {name(bound.reference)}, and is asked from "
            f"{deadline(bound.check_by)} on whether it still knows it"
        )
        teller.say("waits", "waiting", text, events=[event], by=[bound.owner], named=True)
    if not bindings:
        for event, _ in admissions:
            text = f"nothing of the backend is bound to it yet: it belongs to the process of {name(event.by)}"
            teller.say("waits", "waiting", text, events=[event], by=[event.by])
    newest = {report.part: (event, report) for event, report in teller.of(Reported)}
    for event, report in newest.values():
        why = f", because {quoted(report.reason)}" if report.reason else ""
        text = f"{part_name(report.part)} is {report.state}, says the backend: {LEVELS[report.state]}{why}"
        teller.say("waits", "waiting", text, events=[event], by=[event.by])
    for event, error in errors[-1:]:
        text = f"the newest error was {moment(event.at)}: {quoted(error.text)}"
        teller.say("waits", "error", text, events=[event], by=[error.hook or event.by])
    if not newest and not teller.of(Attempt):
        teller.say("waits", "unsaid", "nobody recorded an attempt: what it waits for the record does not say")


def _attempts(teller: Teller, section: str) -> None:
    """Resolutions that found no room, equal ones together."""
    alike: dict[tuple[Any, ...], list[Event]] = {}
    for event, attempt in teller.of(Attempt):
        alike.setdefault((attempt.candidates, attempt.reason), []).append(event)
    for (seen, reason), events in alike.items():
        by = _once(event.by for event in events)
        first, last = moment(events[0].at), moment(events[-1].at)
        when = first if len(events) == 1 else f"{some_times(len(events))}, first {first} and last {last},"
        text = f"{when} {names(by)} found no room, because {quoted(reason)}"
        text += f": {candidates(seen)}" if seen else "; which places were considered the record does not say"
        teller.say(section, "attempt", text, events=events, by=by)


def _once(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
