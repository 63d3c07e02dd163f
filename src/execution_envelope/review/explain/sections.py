"""A record in sentences, section by section. From the record alone: nothing else is read, and nothing is guessed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from execution_envelope import approvals
from execution_envelope.budgets import Balance, window
from execution_envelope.delta import Difference
from execution_envelope.lifecycle import Attempt, Denied, Event, Expired, Rejected, Review, Verdict, Violation
from execution_envelope.record import Record
from execution_envelope.review.explain import remedies
from execution_envelope.review.explain.asking import asked, decided, waits
from execution_envelope.review.explain.explanation import Explanation
from execution_envelope.review.explain.outcome import ended_or_used, given, happened, noted
from execution_envelope.review.explain.teller import Teller
from execution_envelope.review.explain.wording import amount, listed, name, names, some_times
from execution_envelope.words import counted

#: Of so many accounts of budgets it is told how they stand now.
MAX_ACCOUNTS: Final = 8
#: So many of what is part of it are named.
MAX_CHILDREN: Final = 8


def explain(
    record: Record, *, now: datetime, children: Sequence[str] = (), balances: Sequence[Balance] | None = None
) -> Explanation:
    """The record in sentences. `now` says how long it has waited, and whether a deadline has passed.

    `children` are the ids of envelopes that are part of it, oldest first. `balances` are what stands now in the budgets
    that `accounts` names: that is not on the record, and is told apart. None leaves it out.
    """
    teller = Teller(record, now)
    _short(teller)
    asked(teller)
    decided(teller)
    waits(teller)
    given(teller)
    _change(teller)
    ended_or_used(teller)
    noted(teller)
    _related(teller, children)
    if balances is not None:
        _now(teller, balances)
    happened(teller)
    return teller.explanation()


def accounts(record: Record) -> list[tuple[str, str]]:
    """(account, window) of the budgets that the record speaks of: what it holds of, and what refused it.

    Of a refusal the window is not on the record: it is one of three. At most those of `MAX_ACCOUNTS` accounts.
    """
    found = [(account, of) for account, of, _ in record.budgets]
    named = [account for verdict in record.verdicts if (account := remedies.account_of(verdict)) is not None]
    try:
        asked_at = datetime.fromisoformat(record.envelope.correlation.created_at)
        windows = [window("now", asked_at), window("day", asked_at), window("month", asked_at)]
    except ValueError:
        windows = ["now"]
    found += [(account, of) for account in [*named, *record.covered] for of in windows]
    kept = list(dict.fromkeys(account for account, _ in found))[:MAX_ACCOUNTS]
    return [place for place in dict.fromkeys(found) if place[0] in kept]


# In short


_STATES: Final[Mapping[str, str]] = {
    "asked": "what was decided of it is not on the record",
    "held": "it is held: it waits until somebody approves it",
    "admitted": "it was admitted, and waits: nothing is granted to it yet",
    "observed": "it was recorded after the fact: nobody admitted it",
    "granted": "it was admitted and granted, and has not ended",
    "denied": "it was denied",
    "expired": "it expired: it was not approved, or the approval was not taken up, in time",
    "rejected": "the backend rejected it, and had granted nothing",
    "completed": "it completed",
    "failed": "it failed",
    "cancelled": "it was cancelled: whoever asked no longer wanted it",
    "revoked": "it was revoked: the backend confirmed that it took it away",
    "abandoned": "it was abandoned: its owner no longer knows it, and nobody knows how it ended",
}


_REVOKING: Final = "it is to be revoked, as {} asked, and its owner has not confirmed that it ended"
_FLAGGED: Final = "it is flagged by {}: somebody should look at it"


def _short(teller: Teller) -> None:
    record = teller.record
    text = _STATES[record.state]
    if record.state == "held" and approvals.lifted(record, teller.stamp):
        text = "it was held and is approved: it waits to be sent again"
    attempts = teller.of(Attempt)
    if record.state == "admitted" and attempts:
        text += f", and no room was found {some_times(len(attempts))}"
    denying = denials(teller)
    if record.state == "denied" and denying:
        text += f" by {listed(f'{name(one.hook)} ({name(one.code or one.decision)})' for _, one in denying)}"
    state = [event for event in record.events if event.data.type == record.state][-1:]
    teller.say("short", "state", text, events=state)
    if record.grants:
        teller.say("short", "state", _outcomes(teller.differences), events=teller.grants)
    for event, text in ((record.revoking, _REVOKING), (record.flagged, _FLAGGED)):
        if event is not None and isinstance(event.data, Review):
            by = event.data.reviewer
            teller.say("short", "review", text.format(name(by)), events=[event], by=[by])
    broken = teller.facts(Violation)
    if broken:
        text = f"it went beyond a bound {some_times(len(broken))}"
        teller.say("short", "violation", text, events=[event for event, _ in broken])


def _outcomes(differences: Sequence[Difference]) -> str:
    counts = Counter(difference.outcome for difference in differences)
    if not counts:
        return "nothing that can be compared was asked for or given"
    if set(counts) == {"equal"}:
        return "it was given all that it asked for"
    unstated = sum(difference.unstated for difference in differences)
    why = f"; of {unstated} nobody said why" if unstated else ""
    said = [f"{count} {'as asked' if outcome == 'equal' else outcome}" for outcome, count in counts.items()]
    return f"of {counted(len(differences), 'thing')} asked for or given: {listed(said)}{why}"


def denials(teller: Teller) -> list[tuple[Event, Verdict]]:
    """The verdicts that refused it."""
    return [(event, one) for event, one in teller.of(Verdict) if one.decision == "deny" and not one.shadow]


# What would have to change


def _change(teller: Teller) -> None:
    record, state = teller.record, teller.record.state
    denying = denials(teller)
    if state == "denied" and denying:
        remedies.refused(teller, denying)
    elif state == "denied":
        for event, denied in teller.of(Denied):
            remedies.denied(teller, event, denied)
    elif record.grants:
        remedies.differences(teller)
    elif state == "held":
        approve = "" if approvals.lifted(record, teller.stamp) else "somebody else would have to approve it, "
        text = f"{approve}the caller would have to send it again, and the backend to grant it"
        teller.say("change", "change", text, events=[record.hold] if record.hold is not None else ())
    elif state == "admitted":
        remedies.waiting(teller)
    elif state == "expired":
        text = "it would have to be asked for anew, under another key, and be approved in time"
        teller.say("change", "change", text, events=[event for event, _ in teller.of(Expired)])
    elif state == "rejected":
        for event, said in teller.of(Rejected):
            text = "the backend would have to be able to resolve it; beside its reason the record does not say how"
            teller.say("change", "unsaid", text, events=[event], by=[event.by], codes=[said.code])
    if teller.silent("change"):
        text = "no grant is on the record, so what would have to change it does not say"
        teller.say("change", "unsaid", text)


# What belongs to it, and how it stands now


def _related(teller: Teller, children: Sequence[str]) -> None:
    links = teller.envelope.correlation
    for above, text in (
        (links.part_of, "it is part of envelope {}, whose grant bounds it in what that was granted"),
        (links.runs_on, "it runs on envelope {}, which does not bound it"),
        (links.supersedes, "it supersedes envelope {}, which is completed when this one is granted"),
    ):
        if above is not None:
            teller.say("related", "link", text.format(name(above)), envelope=above)
    if children:
        more = (
            f", the newest {names(children[-MAX_CHILDREN:])}"
            if len(children) > MAX_CHILDREN
            else f": {names(children)}"
        )
        count = "one envelope is" if len(children) == 1 else f"{len(children)} envelopes are"
        only = children[0] if len(children) == 1 else None
        teller.say("related", "link", f"{count} part of it{more}", envelope=only)


def _now(teller: Teller, balances: Sequence[Balance]) -> None:
    for balance in balances:
        key, free = balance.resource, balance.free
        text = f"budget account {name(balance.account)} ({name(balance.window)}) has at this moment "
        text += f"{amount(key, free)} free" if free >= 0 else f"{amount(key, -free)} too much taken"
        text += f", of a limit of {amount(key, balance.limit)}: {amount(key, balance.reserved)} reserved, "
        text += f"{amount(key, balance.spent)} spent"
        text += f"; of {counted(balance.unknown, 'execution')} the amount is not known" if balance.unknown else ""
        teller.say("now", "now", text, keys=[f"resources.{key}"])
    silent = {account for account, _ in accounts(teller.record)} - {balance.account for balance in balances}
    for account in sorted(silent):
        teller.say(
            "now", "now", f"budget account {name(account)} has at this moment nothing reserved and nothing spent"
        )
