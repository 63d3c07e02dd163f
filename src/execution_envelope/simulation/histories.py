"""What happens to simulated requests, and the facts on the way there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from execution_envelope.approvals import OPERATION
from execution_envelope.bounds import used_beyond_limits
from execution_envelope.decision import CODES
from execution_envelope.envelope import Ask, Subject, Target, timestamp
from execution_envelope.ledger.commit import Commit
from execution_envelope.lifecycle import (
    Abandoned,
    Approval,
    Attempt,
    Bound,
    Cancelled,
    Candidate,
    Cause,
    Completed,
    Denied,
    Effective,
    EventData,
    Expired,
    Failed,
    Granted,
    Held,
    Late,
    Limit,
    Observed,
    Ready,
    Rejected,
    Released,
    Revoked,
    Used,
    Verdict,
    Why,
)
from execution_envelope.resources import Amount
from execution_envelope.simulation import asks
from execution_envelope.simulation.life import Life, quantity, verdict
from execution_envelope.simulation.world import (
    DAY,
    FORBIDDEN_MODEL,
    HOOK,
    HOUR,
    MINUTE,
    MS,
    NODES,
    REGIONS,
    RUNNER,
    SEAM,
    SECOND,
    Deployment,
    Tenant,
    World,
    moment,
)
from execution_envelope.values import canonical, sha256

_NO: Final[Mapping[str, tuple[str, str]]] = {
    "role_required": ("roles", "expected the role operator for this operation"),
    "tenant_forbidden": ("tenants", "this tenant may not use agents of others"),
    "scope_forbidden": ("regions", "confidential work stays in eu-central"),
    "target_forbidden": ("licences", f"{FORBIDDEN_MODEL} has no licence for production"),
    "resource_forbidden": ("ceilings", "more than the ceiling of this kind"),
    "policy": ("office-hours", "no deployments to prod at the weekend"),
    "capacity": ("room", "the cluster is full for this priority"),
    "maintenance": ("closed", "the backend is closed until its upgrade is done"),
}
_CODES: Final = tuple(_NO)
_REDUCED: Final[tuple[tuple[Cause, str], ...]] = (
    ("capacity", "no node has more free just now"),
    ("quota", "what is left of the tenant's share"),
    ("policy", "ceiling of the environment"),
    ("balancing", "spread over what others asked for"),
    ("estimate", "what requests like it came to"),
)
_IGNORED: Final = Why("unsupported", "this engine cannot do that")
_CHECK: Final = 5 * MINUTE
_REASONS: Final = ("agreed in the change meeting", "needed for the release", "checked with the owner of the data")
_FAILURES: Final = (
    ("ENGINE_LOST", "the engine ended with signal 9"),
    ("OUT_OF_MEMORY", "the engine needed more memory than granted"),
    ("UPSTREAM", "the source closed the connection"),
    ("TIMEOUT", "no answer within the time granted"),
)
_FULL: Final = "no node has so much free"
_DONE: Final = Completed()


class Histories:
    """Makes the histories. `make` answers the envelopes of one request, the request's own first."""

    def __init__(self, world: World) -> None:
        self.world = world
        #: Ends that were to come, (envelope, time), and those that come in their place.
        self.moved: set[tuple[str, str]] = set()
        self.later: list[tuple[int, Commit]] = []

    def make(self, kind: str, outcome: str, at: int, children: int) -> list[Life]:
        """The request of a kind that comes at `at`, with what is part of it, and who said something of it."""
        world = self.world
        if kind == "maintenance":
            return [self._maintenance(outcome, at)]
        tenant = world.tenant()
        if kind == "inference":
            of = {"subject": world.busy(tenant.people), "scope": world.busy(tenant.scopes), "part_of": None}
            return [self._inference(tenant, outcome, at, of)]
        if kind == "agent.run":
            return self._agent(tenant, outcome, at, children)
        subject = world.busy(tenant.people)
        code = world.choose(_CODES) if outcome == "denied" else None
        if code == "role_required":
            subject = world.busy(tenant.viewers)
        superseded = world.serving(tenant, at) if outcome == "superseded" else None
        if superseded is not None and superseded.end is None:
            superseded = None  # it goes on behind the end of everything
        key = world.key() if world.chance(0.4) else None
        asked = replace(
            _ASKS[kind](world, tenant, at, code),
            subject=subject,
            scope=world.busy(tenant.scopes),
            idempotency_key=key,
            supersedes=None if superseded is None else superseded.envelope,
        )
        life = Life(world, asked, at)
        said: list[Life] = []
        begun = self._decided(life, tenant, outcome, code, said)
        if begun is not None:
            if kind == "model.deploy":
                self._deployed(life, tenant, outcome, begun, superseded)
            else:
                self._worked(life, outcome, begun)
        return [life, *said]

    # How it is decided

    def _decided(self, life: Life, tenant: Tenant, outcome: str, code: str | None, said: list[Life]) -> int | None:
        """When it was admitted; None where it was not."""
        world, at = self.world, life.start
        if code is not None:
            self._denied(life, code)
            return None
        if outcome not in ("approved", "refused", "expired", "withdrawn", "waiting"):
            limits, rule, why = self._limits(life)
            return at if life.admit(at, limits=limits, rule=rule, why=why) else None
        rule, message = "four-eyes", "somebody else has to approve this in prod"
        held = verdict(world.revision(at), "hold", 21, "approval_required", message, (rule,))
        key = None if life.sealed.key_digest else life.id
        expires = at + 7 * DAY
        fact = Held("approval_required", message, key, timestamp(moment(expires)))
        life.say(at, SEAM, life.opening(None if key is None else sha256(canonical(["sim", key]))), held, fact)
        if outcome == "waiting":
            return None
        if outcome == "expired":
            life.say(expires + world.spread(MINUTE), SEAM, Expired())
            return None
        # Before the end of everything, so that whoever said it is on the record too.
        when = min(at + world.spread(2 * HOUR, 20), at + int((world.until - at) * 0.9))
        if outcome == "withdrawn":
            life.say(when, SEAM, Cancelled("no longer needed"))
            return None
        approver = Subject("user", "sim-approver", tenant=tenant.name, roles=("operator", "approver"), method="oidc")
        decision = "approve" if outcome == "approved" else "deny"
        reason = world.choose(_REASONS) if outcome == "approved" else "not without a test in staging"
        admission = self._said(life, approver, decision, when)
        said.append(admission)
        who = f"{approver.type}:{approver.id}"
        if outcome == "refused":
            denied = Denied("approval_refused", f"refused by {who}: {reason}")
            life.say(when + SECOND, SEAM, Approval(who, "deny", reason, admission.id), denied)
            return None
        valid = timestamp(moment(when + DAY))
        approval = Approval(who, "approve", reason, admission.id, {HOOK: (rule,)}, valid)
        life.say(when + SECOND, SEAM, approval)
        again = when + world.spread(10 * MINUTE)
        return again if life.admit(again, opening=False) else None

    def _said(self, held: Life, approver: Subject, decision: str, at: int) -> Life:
        scope = {"project": held.sealed.envelope.scope.project}
        target = Target("envelope", held.id, decision)
        ask = Ask(kind="maintenance", operation=OPERATION, target=target, subject=approver, scope=scope)
        life = Life(self.world, ask, at)
        life.admit(at, rule="approvers")
        life.say(at + 2 * SECOND, SEAM, _DONE)
        return life

    def _denied(self, life: Life, code: str) -> None:
        world, at = self.world, life.start
        if code == "capacity" and world.chance(0.1):
            # Not the policy said no: it could not be asked.
            failure = world.choose(("hook_timeout", "hook_error"))
            text = "expected an answer within 0.25 s" if failure == "hook_timeout" else "ConnectionError: refused"
            kind = "timeout" if failure == "hook_timeout" else "error"
            said = Verdict(HOOK, "1", "deny", failure, text, True, 250_000, failure=kind, failure_mode="deny")  # type: ignore[arg-type]
            life.say(at, SEAM, life.opening(), said, Denied(failure, text, True))
            return
        rule, text = _NO[code]
        said = verdict(world.revision(at), "deny", 8 + int(world.random.random() * 24), code, text, (rule,))
        life.say(at, SEAM, life.opening(), said, Denied(code, text, CODES[code][0]))

    def _limits(self, life: Life) -> tuple[dict[str, int] | None, str | None, str | None]:
        """The policy caps some of what is asked for."""
        asked = life.sealed.envelope.requested.resources
        name = next((one for one in ("replicas", "output_tokens", "bytes", "samples") if one in asked), None)
        if name is None or not self.world.chance(0.12):
            return None, None, None
        amount = asked[name].amount
        if not isinstance(amount, int) or amount < 2:
            return None, None, None
        return (
            {name: max(1, amount * 3 // 4)},
            f"{name.replace('_', '-')}-ceiling",
            f"ceiling of {name} in this environment",
        )

    # Deployments

    def _deployed(self, life: Life, tenant: Tenant, outcome: str, at: int, old: Deployment | None) -> None:
        world = self.world
        reference = world.reference() if old is None else old.reference
        placed = at + world.spread(3 * SECOND)
        check = timestamp(moment(placed + _CHECK))
        life.say(at + 20 * MS, SEAM, Bound("deployment", reference, "simulation-supervisor", check))
        node = world.choose(NODES)
        if outcome == "queued":
            for again in range(1 + int(world.random.random() * 3)):
                refused = Candidate(node, "refused", _FULL)
                life.say(placed + again * HOUR, RUNNER, Attempt((refused,), _FULL))
            return
        if outcome == "rejected":
            places = (
                Candidate(node, "refused", _FULL),
                Candidate(world.choose(NODES), "tried", "the image is missing"),
            )
            for again in range(1 + int(world.random.random() * 2)):
                life.say(placed + again * 30 * SECOND, RUNNER, Attempt(places, _FULL))
            life.say(placed + 3 * MINUTE, RUNNER, Rejected("NO_ROOM", "no node fits after three tries"))
            return
        self._placed(life, placed, node)
        ready = placed + world.spread(40 * SECOND)
        if outcome == "failed":
            life.say(ready, RUNNER, Failed(*world.choose(_FAILURES)))
            return
        end = ready + (30 * DAY if outcome == "running" else world.spread(9 * HOUR, 60))
        life.say(ready, RUNNER, Ready())
        serves = Deployment(life.id, reference, life.sealed.envelope.execution.target.id, ready, end, None)
        tenant.deployments.append(serves)
        if old is not None:
            self._take_over(tenant, old, ready + SECOND)
        if outcome == "running":
            return
        asked = life.sealed.envelope.requested.resources
        calls = 0 if outcome == "unused" else world.spread(900, 50)
        used: dict[str, Amount] = {
            "requests": calls,
            "output_tokens": calls * 180,
            "duration": (end - ready) // MS,
            "memory": _most(asked, "memory") * 3 // 4,
        }
        facts: list[EventData] = [] if world.chance(0.05) else [Used(used)]
        last: EventData = _DONE
        if outcome == "revoked":
            last = Revoked("the supervisor ended it")
        elif outcome == "abandoned":
            facts, last = [], Abandoned("the supervisor no longer knows it, asked at a restart")
        elif world.chance(0.25):
            last = Cancelled("stopped by its owner")
        life.say(end, RUNNER, *facts, last)
        if end <= world.until:
            serves.end = life.commits[-1][1]

    def _take_over(self, tenant: Tenant, old: Deployment, at: int) -> None:
        """One that is superseded ends earlier than it would have, as it would have."""
        if old in tenant.deployments:
            tenant.deployments.remove(old)
        if old.end is None or at >= old.until:
            return
        facts: list[EventData] = [Released(None, "another one took over")]
        for fact in old.end.facts:
            if isinstance(fact, Used):
                fact = Used({**fact.resources, "duration": (at - old.since) // MS})
            facts.append(fact)
        self.moved.add((old.envelope, old.end.at))
        self.later.append((at, replace(old.end, at=timestamp(moment(at)), facts=facts)))

    def _placed(self, life: Life, at: int, node: str) -> None:
        """It gets what it asked for, or less, and why."""
        world, envelope = self.world, life.sealed.envelope
        asked = envelope.requested.resources
        given = {name: one for name, one in asked.items() if name != "duration"}
        because: dict[str, Why] = {}
        draw = world.random.random()
        if draw < 0.22 and "context" in given:
            given["context"] = quantity(max(1024, _most(asked, "context") // 2))
            because["context"] = Why(*world.choose(_REDUCED))
        if draw < 0.12 and _most(asked, "replicas") > 1:
            given["replicas"] = quantity(max(1, _most(asked, "replicas") // 2))
            because["replicas"] = Why(*world.choose(_REDUCED))
        limit = {} if life.record is None else {name: bound for name, (bound, _) in life.record.limits.items()}
        if "replicas" in limit:
            given["replicas"] = quantity(min(_most(asked, "replicas"), int(limit["replicas"])))
            because["replicas"] = Why("policy", "ceiling of replicas in this environment")
        if 0.12 < draw < 0.15 and "gpu" in given:
            del given["gpu"]
            because["gpu"] = Why("unsupported", "no node with this device, it runs on processors")
        elif draw > 0.97 and "concurrency" in given:
            del given["concurrency"]  # nobody speaks of it: ignored
        region = envelope.requested.constraints["region"].value
        placed = world.choose(REGIONS) if draw > 0.9 else region
        if placed != region:
            because["region"] = Why("fallback", f"no room in {region}")
        if draw < 0.3 and "concurrency" not in asked:
            given["concurrency"] = quantity(4)
            life.say(at - MS, RUNNER, Effective("default", "default of the engine", {"concurrency": quantity(4)}))
        fact = Granted(
            given,
            "enforced",
            constraints={"engine": envelope.requested.constraints["engine"].value, "region": placed},
            honoured=("autoscaling", "lb_port"),
            because=because,
            route={"node": node, "engine": "sim-engine"},
            candidates=(Candidate(node, "chosen"),),
        )
        life.say(at, RUNNER, fact)

    # Evaluations and data

    def _worked(self, life: Life, outcome: str, at: int) -> None:
        """A job that is started, gets something, works and ends."""
        world, kind = self.world, life.kind
        reference = world.reference()
        begun = at + world.spread(2 * SECOND)
        bound = Bound(kind.replace(".", "-"), reference, RUNNER, timestamp(moment(begun + _CHECK)))
        life.say(at + 10 * MS, SEAM, bound)
        if outcome == "queued":
            life.say(begun, RUNNER, Attempt((Candidate("queue", "refused", _FULL),), _FULL))
            return
        if outcome == "rejected":
            life.say(begun, RUNNER, Rejected("NOT_FOUND", "what it is about is not there any more"))
            return
        self._given(life, begun, "reserved")
        end = begun + world.spread(4 * MINUTE, 40)
        if outcome == "running":
            return
        self._ended(life, outcome, end, (end - begun) // MS)

    def _given(self, life: Life, at: int, basis: str) -> None:
        """As asked, or less of the first resource, and why."""
        world, asked = self.world, life.sealed.envelope.requested
        given = dict(asked.resources)
        because = {}
        if world.chance(0.15):
            name = next(iter(given))
            given[name] = quantity(max(1, _most(given, name) // 2))
            because[name] = Why(*world.choose(_REDUCED))
        limits = [fact for _, commit in life.commits for fact in commit.facts if isinstance(fact, Limit)]
        for fact in limits:
            for name, most in fact.resources.items():
                if isinstance(most, int) and _most(given, name) > most:
                    given[name] = quantity(most)
                    because[name] = Why("policy", f"ceiling of {name} in this environment")
        names = tuple(asked.constraints)
        if names and world.chance(0.08):
            because[names[-1]] = _IGNORED
            names = names[:-1]
        life.say(at, RUNNER, Granted(given, basis, honoured=names, because=because))  # type: ignore[arg-type]

    def _ended(self, life: Life, outcome: str, end: int, took: int) -> None:
        """What was used, and how it ended."""
        world = self.world
        asked = life.sealed.envelope.requested.resources
        share = (
            0.2 + world.random.random() * 0.8
            if outcome in ("done", "late", "violated")
            else world.random.random() * 0.5
        )
        used: dict[str, Amount] = {
            name: int(amount * share) if name in _COUNTED else amount
            for name in asked
            if name != "duration" and isinstance(amount := asked[name].amount, int)
        }
        used["duration"] = took
        if outcome == "abandoned":
            life.say(end + HOUR, SEAM, Abandoned("its runner no longer knows it, asked by reconciliation"))
            return
        facts: list[EventData] = []
        if outcome == "violated":
            record = life.remember()
            name = next((one for one in record.limits), None)
            if name is not None:
                bound = record.limits[name][0]
                used[name] = (int(bound) if isinstance(bound, int) else 1) * 5 // 4 + 1
            report = Used(used)
            facts = [report, *used_beyond_limits(record, report)]
        elif outcome not in ("unused", "late") and not world.chance(0.03):
            facts = [Used(used, how="estimated" if world.chance(0.05) else "measured")]
        last: EventData = _DONE
        if outcome == "failed":
            last = Failed(*world.choose(_FAILURES))
        elif outcome == "cancelled":
            last = Cancelled("the client went away")
        elif outcome == "revoked":
            last = Revoked("taken away for a run of a higher priority")
        life.say(end, RUNNER, *facts, last)
        if outcome == "late":
            life.say(end + world.spread(20 * MINUTE), RUNNER, Late(Used(used, key=f"{life.id}/1")))

    # Inference, agents, upkeep

    def _inference(self, tenant: Tenant, outcome: str, at: int, of: Mapping[str, Any]) -> Life:
        """A turn, `of` whom and what."""
        world = self.world
        serving = world.serving(tenant, at) if world.chance(0.6) else None
        code = world.choose(_CODES) if outcome == "denied" else None
        life = Life(world, asks.turn(world, tenant, at, code, serving=serving, **of), at)
        took = world.spread(900 * MS, 30)
        if outcome == "observed":
            self._observed(life, took)
            return life
        if code is not None:
            self._denied(life, code)
            return life
        limits, rule, why = self._limits(life) if outcome != "violated" else _OF_A_TURN
        if not life.admit(at, limits=limits, rule=rule, why=why):
            return life
        if outcome == "rejected":
            life.say(at + 5 * MS, SEAM, Rejected("NO_ENGINE", "no engine serves this model just now"))
            return life
        self._given(life, at + 3 * MS, "enforced")
        self._ended(life, outcome, at + took, took // MS)
        return life

    def _observed(self, life: Life, took: int) -> None:
        """Nobody asked first: the log of a gateway told of it afterwards."""
        at, source, key = life.start, "sim-gateway", life.id[-12:]
        tenant = life.sealed.envelope.identity.tenant
        digest = sha256(canonical(["observed", tenant, source, key]))
        seen = Observed(source, key, timestamp(moment(at - SECOND)), timestamp(moment(at - SECOND - took)))
        used = Used({"output_tokens": self.world.choose(asks.SIZES), "requests": 1})
        life.say(at, "simulation-collector", life.opening(digest), seen, used, _DONE)

    def _agent(self, tenant: Tenant, outcome: str, at: int, calls: int) -> list[Life]:
        world = self.world
        code = world.choose(_CODES) if outcome == "denied" else None
        ask = asks.run(world, tenant, code, calls)
        run = Life(world, ask, at)
        if code is not None:
            self._denied(run, code)
        else:
            limits, rule, why = self._limits(run)
            if run.admit(at, limits=limits, rule=rule, why=why):
                self._worked(run, outcome, at)
        below = []
        granted = [when for when, commit in run.commits if any(fact.type == "granted" for fact in commit.facts)]
        if granted:
            end = min(run.end if run.state not in ("granted", "admitted") else granted[0] + 5 * MINUTE, world.until)
            room = max(1, end - granted[0])
            for number in range(calls):
                when = min(granted[0] + room * (number + 1) // (calls + 2) + 1, world.until)
                below.append(self._child(tenant, ask, run, when, number))
        return [run, *below]

    def _child(self, tenant: Tenant, ask: Ask, run: Life, at: int, number: int) -> Life:
        world = self.world
        if number % 2 == 0:
            outcome = _OF_A_RUN[int(world.random.random() * len(_OF_A_RUN))]
            of = {"subject": ask.subject, "scope": ask.scope, "part_of": run.id}
            return self._inference(tenant, outcome, at, of)
        life = Life(world, asks.call(world, ask, run.id, number), at)
        draw = world.random.random()
        if draw < 0.05:
            self._denied(life, world.choose(_CODES))
        elif life.admit(at):
            took = world.spread(300 * MS, 20)
            if draw < 0.07:
                life.say(at + 5 * MS, SEAM, Rejected("NO_TOOL", "no server offers this tool"))
            else:
                self._given(life, at + 2 * MS, "enforced")
                self._ended(life, "failed" if draw < 0.1 else "done", at + took, took // MS)
        return life

    def _maintenance(self, outcome: str, at: int) -> Life:
        world = self.world
        life = Life(world, asks.upkeep(world), at)
        life.admit(at, decided=False)
        self._given(life, at + MS, "enforced")
        self._ended(life, outcome, at + world.spread(2 * SECOND), 1000)
        return life


_OF_A_TURN: Final = ({"output_tokens": 512}, "output-tokens-ceiling", "ceiling of a turn")
#: How the turns of an agent end.
_OF_A_RUN: Final = ("done",) * 36 + ("denied", "failed", "rejected", "late")
_ASKS: Final = {"model.deploy": asks.deployment, "evaluation": asks.evaluation, "data.move": asks.move}
_COUNTED: Final = frozenset({"output_tokens", "samples", "bytes", "rows", "steps", "tool_calls", "replicas"})


def _most(asked: Mapping[str, Any], name: str) -> int:
    """The amount, where it is a number."""
    found = asked.get(name)
    return found.amount if found is not None and isinstance(found.amount, int) else 0
