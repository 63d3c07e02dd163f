"""The contract that every decider keeps, as tests to inherit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import anyio
import msgspec

from execution_envelope.answers import Answer
from execution_envelope.decision import Decider, Phase
from execution_envelope.envelope import Ask, Envelope, canonical, seal
from execution_envelope.hooks import BLOCKED, HookChain
from execution_envelope.testing.kit import START, ask

#: The deadline where the hook declares no timeout, in seconds: that of a controller unless it is set.
DEADLINE: Final = 2.0
_PHASES: Final[tuple[Phase, ...]] = ("admit", "readmit")


class HookContract:
    """What a seam expects of every decider, as tests: inherit from it, make the hook, and say what it is asked.

    ::

        class TestNightly(HookContract):
            def make_hook(self):
                return Nightly()

            def make_ask(self):
                return ask(kind="inference", operation="chat")
    """

    def make_hook(self) -> Decider:
        """A new hook, set up in the same way each time."""
        raise NotImplementedError

    def make_ask(self) -> Ask:
        """A request that the hook covers, without anything of the outside world that changes from call to call."""
        return ask()

    def test_it_declares_itself(self) -> None:
        hook = self.make_hook()
        declared = hook.declaration
        declared.check()
        assert hook.declaration == declared == self.make_hook().declaration, "expected the same declaration every time"
        assert declared.side_effects is not None, "expected `side_effects` True or False, or a plan leaves it out"
        kind = _envelope(self.make_ask()).execution.kind
        assert any(declared.covers(kind, phase) for phase in _PHASES), (
            f"expected a hook that covers `{kind}`, this one is never asked"
        )

    def test_it_says_the_same_when_it_is_asked_again(self) -> None:
        hook, envelope = self.make_hook(), _envelope(self.make_ask())
        first, second = [_said(answer) for answer in _asked(hook, [envelope, envelope])]
        assert first == second, "expected the same answer to the same request"
        [other] = [_said(answer) for answer in _asked(self.make_hook(), [envelope])]
        assert first == other, "expected the same answer of a hook that was never asked before"

    def test_it_changes_nothing_of_what_it_sees(self) -> None:
        envelope = _envelope(self.make_ask())
        before = canonical(envelope)
        _asked(self.make_hook(), [envelope])
        assert canonical(envelope) == before, "expected the envelope as it was"

    def test_it_answers_within_its_timeout(self) -> None:
        hook, envelope = self.make_hook(), _envelope(self.make_ask())
        counters = Counter[str]()
        # The first time it may have to load what it needs.
        answers = _asked(hook, [envelope, envelope], counters)
        most = min(hook.declaration.timeout or DEADLINE, DEADLINE)
        took = answers[-1].verdict.duration_us / 1e6
        assert took <= most, f"expected an answer within {most:g} s, it took {took:.3f} s"
        assert "hooks_blocked" not in counters, f"expected it to hold the event loop for less than {BLOCKED:g} s"


def _envelope(asked: Ask) -> Envelope:
    return seal(asked, id="contract", now=START).envelope


def _asked(hook: Decider, envelopes: Sequence[Envelope], counters: Counter[str] | None = None) -> list[Answer]:
    """What it answers to one after the other; each has to be an answer and no failure."""
    chain = HookChain([hook], deadline=DEADLINE, counters=counters)

    async def ask_all() -> list[Answer]:
        answers = []
        for envelope in envelopes:
            phase = next(phase for phase in _PHASES if hook.declaration.covers(envelope.execution.kind, phase))
            decided = await chain.decide(envelope, phase=phase)
            [verdict] = decided.verdicts
            answers.append(Answer(verdict, tuple(decided.duties.get(verdict.hook, ()))))
        return answers

    answers = anyio.run(ask_all)
    for verdict in (answer.verdict for answer in answers):
        assert verdict.failure is None, f"expected an answer, it failed ({verdict.failure}): {verdict.message}"
    return answers


def _said(answer: Answer) -> Answer:
    """Without how long it took."""
    return msgspec.structs.replace(answer, verdict=msgspec.structs.replace(answer.verdict, duration_us=0))
