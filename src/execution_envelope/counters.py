"""What is counted in each process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: What is counted in each process, under `AdmissionController.counters`.
COUNTERS: Final[Mapping[str, str]] = {
    "admitted": "requests that were admitted",
    "denied": "requests that were denied, those denied again under their key too",
    "held": "requests that were held, those held again under their key too",
    "recorded": "executions that were recorded after the fact",
    "recorded_again": "executions that were to be recorded after the fact once more: nothing was recorded",
    "reported": "reports of backends on what a part is now that said something new",
    "reported_again": "such reports that changed nothing",
    "undecided": "requests that were admitted because no decider covers their kind",
    "replayed": "requests that were answered with an earlier admission of the same key",
    "key_conflicts": "requests that came with the idempotency key of another request",
    "expired": "held requests that nobody approved in time",
    "hints_unread": "governance hints of requests that no hook read",
    "redacted": "paths at which a credential was taken out before sealing",
    "ungranted": "executions that completed in their block though nobody ever granted",
    "violations": "grants and uses beyond a limit, a parent or a budget, one for each resource",
    "abandoned": "executions that reconciliation ended because their owner no longer knows them",
    "reviewed": "verdicts of reviewers on live executions, those that said nothing new too",
    "reviews_failed": "reviews that failed, were not answered in time or made no sense: nothing is known then",
    "reviews_left_out": "reviews that were not asked for, because the reviewer did not answer before in that round",
    "revoked": "executions whose owner confirmed that it took them away",
    "revocations_unconfirmed": "times that an owner was asked to take an execution away and did not confirm it",
    "attempted": "requests that never became one",
    "attempted_dropped": "of these, those that were not kept: they came too fast, or the ledger was away",
    "unsealed": "answers below 400 of guarded routes whose request was not admitted",
    "unavailable": "requests that were refused because the ledger was away",
    "hooks_failed": "answers of deciders that were an error, or none that can be understood",
    "hooks_timed_out": "deciders that did not answer in time",
    "hooks_quarantined": "times that a decider was not asked because it had blocked the event loop",
    "hooks_blocked": "times that a decider blocked the event loop",
    "observed": "commits that an observer was told of, for each observer",
    "observer_failed": "commits of which an observer was told and raised; they are not among `observed`",
    "observer_dropped": "commits that an observer was not told of: it did not keep up, or not before the end",
    "observer_unreported": "failures of observers that could not be recorded",
    "spooled": "writes that went to the spool because the ledger was away",
    "lost": "relaxed writes that were acknowledged and could not be recorded",
    "unrecorded_exits": "ends that could not be recorded when they came, but when the ledger answered again",
}
