"""What was given and why it differs, what was used, how it ended, and what must not be overlooked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from execution_envelope.delta import Difference
from execution_envelope.lifecycle import (
    LEVELS,
    Abandoned,
    Bound,
    Denied,
    Effective,
    Error,
    Event,
    Granted,
    Late,
    Obligation,
    Ready,
    Released,
    Reported,
    Sealed,
    Used,
    Violation,
    ended,
)
from execution_envelope.resources import VOCABULARY, exceeds
from execution_envelope.review.explain.teller import Teller, keys_of, part_name, path
from execution_envelope.review.explain.wording import (
    amount,
    bare_value,
    candidates,
    deadline,
    listed,
    moment,
    name,
    names,
    quantity,
    quoted,
    value,
)
from execution_envelope.sentences import sentence

_BASES: Final = {"reserved": "a scheduler's promise", "allocated": "set aside", "enforced": "a limit that holds"}


_ENDS: Final = {
    "cancelled": "was cancelled",
    "rejected": "was rejected",
    "revoked": "was revoked",
    "abandoned": "was abandoned",
}


# What was given


def given(teller: Teller) -> None:
    """What the backend made of the ask, every grant, and each difference with who made it and why."""
    for event, made in teller.of(Effective):
        what = [quantity(key, one) for key, one in sorted(made.resources.items())]
        what += [value(key, one) for key, one in sorted(made.constraints.items())]
        text = f"{name(event.by)} took it for {listed(what)}, because {quoted(made.text)} ({made.cause})"
        by, codes = [event.by], [made.cause]
        teller.say("given", "effective", text, events=[event], keys=keys_of(made), by=by, codes=codes, named=True)
    for event, grant in teller.of(Granted):
        _grant(teller, event, grant)
    equal = [difference for difference in teller.differences if difference.outcome == "equal"]
    if equal:
        events = [event for one in equal for event in teller.behind(one)]
        text = f"as asked: {listed(teller.shown(one, one.granted) for one in equal)}"
        teller.say("given", "equal", text, events=events, keys=map(path, equal), codes=["equal"])
    for difference in teller.differences:
        if difference.outcome != "equal":
            _difference(teller, difference)


def _grant(teller: Teller, event: Event, grant: Granted) -> None:
    what = [quantity(key, one) for key, one in sorted(grant.resources.items())]
    what += [value(key, one) for key, one in sorted(grant.constraints.items())]
    what += [f"{name(key)} as asked" for key in sorted(grant.honoured)]
    text = f"{moment(event.at)} {name(event.by)} granted {part_name(grant.part)} {listed(what)}"
    if grant.route:
        text += f", on {listed(value(key, one) for key, one in sorted(grant.route.items()))}"
    text += f" ({grant.basis}: {_BASES[grant.basis]})"
    if grant.candidates:
        text += f"; of the places considered, {candidates(grant.candidates)}"
    if event.sequence not in teller.standing:
        text += "; a later grant replaced that"
    teller.say("given", "grant", text, events=[event], keys=keys_of(grant), by=[event.by], codes=[grant.basis])


def _difference(teller: Teller, difference: Difference) -> None:
    givers, reasons = teller.givers(difference), difference.reasons
    text = OUTCOMES[difference.outcome](
        names(givers), teller.shown(difference, difference.requested), teller.shown(difference, difference.granted)
    )
    if difference.effective not in (None, difference.granted):
        text += f" (it had been taken for {teller.shown(difference, difference.effective)})"
    steps = []
    for reason in reasons:
        who = "" if givers == [reason.by] and len(reasons) == 1 else f"{name(reason.by)} says "
        if reason.cause == "unstated":
            steps.append(f"; nobody said why{f' ({quoted(reason.text)})' if reason.text else ''} (unstated)")
        else:
            steps.append(f", {'and ' if steps else ''}because {who}{quoted(reason.text)} ({reason.cause})")
    text += "".join(dict.fromkeys(steps))
    if difference.breach is not None:
        text += (
            f"; that is {'below the least' if difference.breach == 'floor' else 'above the most'} that was asked for"
        )
    teller.say(
        "given",
        "difference",
        text,
        events=teller.behind(difference),
        keys=[path(difference)],
        by=[*givers, *(reason.by for reason in reasons)],
        codes=[difference.outcome, *(reason.cause for reason in reasons)],
        named=True,
    )


#: Outcome -> how it is told, of who gave, what was asked, and what was given.
OUTCOMES: Final[Mapping[str, Callable[[str, str, str], str]]] = {
    "reduced": lambda by, asked, given: f"{by} gave {given} instead of {asked}",
    "raised": lambda by, asked, given: f"{by} gave {given}, more than the {asked} that was asked for",
    "substituted": lambda by, asked, given: f"{by} gave {given} instead of {asked}",
    "added": lambda by, asked, given: f"{by} gave {given}, which was not asked for",
    "withheld": lambda by, asked, given: f"{by} gave nothing of the {asked} that was asked for",
    "ignored": lambda by, asked, given: f"{by} passed over {asked}, which was asked for and which no grant speaks of",
    "unknown": lambda by, asked, given: f"{by} gave {given} where {asked} was asked for, which cannot be compared",
}


# What was used, and how it ended


def ended_or_used(teller: Teller) -> None:
    """The end, by whom it was recorded, and what was used against what was granted."""
    record = teller.record
    ending = next((event for event in record.events if ended(event.data)), None)
    if ending is not None and not isinstance(ending.data, Denied):
        code: str | None = getattr(ending.data, "code", None)
        why = getattr(ending.data, "evidence", None) or getattr(ending.data, "message", None)
        text = f"{moment(ending.at)} {name(ending.by)} recorded that it {_ENDS.get(record.state, record.state)}"
        text += (f", because {quoted(why)}" if why else "") + (f" ({name(code)})" if code else "")
        teller.say("ended", "end", text, events=[ending], by=[ending.by], codes=[code])
    if ending is not None and isinstance(ending.data, Abandoned):
        owner = f"its owner, {name(record.bound.owner)}," if record.bound is not None else "who had it"
        text = f"{owner} knows it no more: what became of the work the record does not say"
        teller.say("ended", "unsaid", text, events=[ending])
    if record.ungranted:
        text = "nobody ever said what it was granted"
        teller.say("ended", "unsaid", text, events=[ending] if ending is not None else ())
    _used(teller, "course" if ending is None else "ended")


def happened(teller: Teller) -> None:
    """What its backend did with it, and every event of which nothing was said yet."""
    for event, bound in teller.of(Bound):
        if teller.told(event):
            continue
        text = f"{moment(event.at)} {name(event.by)} bound it to {name(bound.kind)} {name(bound.reference)} of "
        text += f"{name(bound.owner)}, which is asked from {deadline(bound.check_by)} on whether it still knows it"
        teller.say("course", "event", text, events=[event], by=[event.by, bound.owner])
    for event, ready in teller.of(Ready):
        text = f"{moment(event.at)} {name(event.by)} said that {part_name(ready.part)} serves"
        teller.say("course", "event", text, events=[event], by=[event.by])
    if teller.record.state == "granted" and not teller.record.ready:
        teller.say("course", "unsaid", "nobody said that it serves")
    for event, report in teller.of(Reported):
        if not teller.told(event):
            text = f"{moment(event.at)} {name(event.by)} said that {part_name(report.part)} is {report.state}"
            text += f" ({LEVELS[report.state]})" + (f", because {quoted(report.reason)}" if report.reason else "")
            teller.say("course", "event", text, events=[event], by=[event.by])
    for event, released in teller.of(Released):
        why = f", because {quoted(released.reason)}" if released.reason else ""
        text = f"{moment(event.at)} {name(event.by)} released {part_name(released.part)}{why}"
        teller.say("course", "event", text, events=[event], by=[event.by])
    for event in teller.untold():
        text = f"{moment(event.at)} {name(event.by)} recorded: {fact(event)}"
        teller.say("course", "event", text, events=[event], by=[event.by])


def _used(teller: Teller, section: str) -> None:
    record = teller.record
    reports, granted = teller.facts(Used), record.granted
    for key, usage in sorted(record.used.items()):
        events = [event for event, report in reports if key in report.resources]
        given, used = granted.get(key), usage.amount
        text = f"{amount(key, used)} used"
        if given is not None:
            text += f" of the {amount(key, given)} granted"
            if isinstance(given, int) and isinstance(used, int) and used < given:
                text += f": {amount(key, given - used)} not used"
            elif exceeds(used, given):
                text += ", which is more than that"
        by = [event.by for event in events]
        teller.say(section, "used", f"{text} ({usage.how})", events=events, keys=[f"resources.{key}"], by=by)
    unheard = [key for key in sorted(granted) if key not in record.used]
    if unheard and (record.used or not record.is_open):
        text = f"of the {listed(amount(key, granted[key]) for key in unheard)} granted nobody said what was used"
        teller.say(section, "unsaid", text, keys=[f"resources.{key}" for key in unheard])


# What must not be overlooked


def noted(teller: Teller) -> None:
    """Violations, errors, obligations, what was taken out or may be lost, hints, what came late."""
    for event, broken in teller.facts(Violation):
        text = f"beyond a bound of {name(broken.source)}, {moment(event.at)}: {quoted(broken.text)}"
        keys = [f"{'resources' if broken.resource in VOCABULARY else 'constraints'}.{broken.resource}"]
        teller.say("noted", "violation", text, events=[event], keys=keys, by=[broken.source])
    for event, error in teller.facts(Error):
        if teller.told(event):
            continue
        who = f"observer {name(error.hook)}" if error.hook else name(event.by)
        text = f"{moment(event.at)} {who} met an error that did not end it: {quoted(error.text)}"
        teller.say("noted", "error", text, events=[event], by=[error.hook or event.by])
    _obligations(teller)
    for event, sealed in teller.of(Sealed):
        if sealed.redacted:
            text = f"before it was sealed credentials were taken out at {names(sealed.redacted)}: they are on no record"
            teller.say("noted", "redacted", text, events=[event])
        if sealed.window_ms is not None:
            early = f"its events were acknowledged up to {sealed.window_ms} ms before they were stored"
            text = f"{early}: a crash may have lost some"
            teller.say("noted", "unsaid", text, events=[event])
    for hint, hooks in teller.record.hints_read.items():
        read = f"read by {names(hooks)}" if hooks else "read by nobody: no decision rests on it"
        text = f"the governance hint {name(hint)} ({bare_value(teller.envelope.scope.hints[hint].value)}) was {read}"
        teller.say("noted", "hint", text, by=hooks)
    late = [event for event in teller.record.events if isinstance(event.data, Late)]
    for event in late:
        text = f"{moment(event.at)}, after the end, {name(event.by)} recorded: {fact(event)}; that changes no state"
        teller.say("noted", "late", text, events=[event], by=[event.by])


def _obligations(teller: Teller) -> None:
    record, open_ones = teller.record, teller.record.open_obligations
    for named, duty in record.obligations.items():
        events = [event for event, one in teller.facts(Obligation) if one.name == named]
        text = f"obligation {name(named)} of hook {name(duty.hook)} is {duty.state}"
        text += f" ({quoted(duty.text)})" if duty.text else ""
        if named in open_ones:
            text += ": while that is so there is no clean end" if record.is_open else ": it was open at the end"
        elif not duty.required:
            text += ", and not required"
        teller.say("noted", "obligation", text, events=events, by=[duty.hook])


def fact(event: Event) -> str:
    """What an event says by itself. It holds what others wrote, so that all of it is a quote."""
    return quoted(sentence(event.data.fact if isinstance(event.data, Late) else event.data))
