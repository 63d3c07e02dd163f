"""`replay`: how many envelopes a core replays in a second with fifty CEL rules, each of which matches every envelope.

Beside it (`one_by_one`): the same envelopes read, decoded and decided by the same policy one after the other, as at an
admission, and nothing compared or counted.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Final

import uuid_utils

from bench.rounds import Run, interleave
from bench.table import Row, row
from bench.verify import _cpu
from execution_envelope import Ask, Subject, Target
from execution_envelope.envelope import KINDS, decode, seal, timestamp
from execution_envelope.ledger import SqliteLedger
from execution_envelope.ledger.commit import Commit
from execution_envelope.lifecycle import Admitted, Completed, EventData, Sealed, Verdict
from execution_envelope.policy.file import parse
from execution_envelope.review.candidate import Source
from execution_envelope.review.replay import replay

_NOW: Final = datetime(2026, 5, 1, 12, tzinfo=UTC)
#: What fifty rules say, each of them in ten thresholds or names.
_RULES: Final = (
    "!has(requested.resources.gpu) || requested.resources.gpu.amount <= {n}000 + 8000",
    "!has(requested.resources.output_tokens) || requested.resources.output_tokens.amount <= 100{n}00",
    '!has(scope.environment) || scope.environment != "env-{n}" || "operator" in identity.roles',
    'execution.target.id != "model-x{n}" && (!has(scope.classification) || scope.classification != "secret-{n}")',
    'identity.tenant != "tenant-x{n}" && identity.subject.type in ["user", "service"]',
)


def policy() -> bytes:
    """Fifty rules, which read what is different in most envelopes (tokens) and what comes again."""
    rules = [
        {"name": f"rule-{place}-{number}", "expression": text.replace("{n}", str(number)), "message": "no"}
        for number in range(10)
        for place, text in enumerate(_RULES)
    ]
    return json.dumps({"revision": "bench", "rules": rules}).encode()


def asked(count: int) -> Iterator[Commit]:
    """Envelopes of five kinds, of fifty tenants of different size, admitted by a policy and ended."""
    seeded = random.Random(1)
    at = timestamp(_NOW)
    tenants = [f"tenant-{number}" for number in range(50)]
    weights = [1 / (number + 1) for number in range(50)]
    for _ in range(count):
        kind = seeded.choice(KINDS[:5])
        (tenant,) = seeded.choices(tenants, weights)
        resources = {"output_tokens": seeded.randrange(8000)} if kind == "inference" else {"gpu": seeded.randrange(9)}
        ask = Ask(
            kind=kind,
            operation=f"{kind}.start",
            target=Target("model", f"model-{seeded.randrange(40)}"),
            subject=Subject(
                "user",
                f"user-{seeded.randrange(20)}@{tenant}",
                tenant=tenant,
                roles=("operator", "developer"),
                method="oidc",
            ),
            scope={"project": f"project-{seeded.randrange(8)}", "environment": f"env-{seeded.randrange(3)}"},
            requested=resources,
            constraints={"engine": "llama.cpp", "region": "eu-central"},
            entrypoint=f"POST /{kind}",
        )
        sealed = seal(ask, id=str(uuid_utils.uuid7()), now=_NOW)
        facts: list[EventData] = [
            Sealed(sealed.digest, sealed.request_digest),
            Verdict("policy", "1", "allow", duration_us=40, revision="before"),
            Admitted(),
            Completed(),
        ]
        yield Commit(sealed.envelope.id, 0, at, "bench", facts, sealed)


def measure(run: Run) -> Iterator[Row]:
    count, text = run.scale(30_000, 200), policy()
    with run.folder() as folder:
        path = folder / "ledger.db"
        with closing(SqliteLedger(path)) as ledger:
            items = list(asked(count))
            for start in range(0, count, 500):
                ledger.commit(*items[start : start + 500])
        ids = [item.envelope for item in items]

        def ours() -> float:
            with closing(SqliteLedger(path, read_only=True)) as ledger:
                return count / _cpu(lambda: _whole(ledger, text, count))

        def one_by_one() -> float:
            decide = parse(text).decide
            with closing(SqliteLedger(path, read_only=True)) as ledger:

                def all_of_them() -> None:
                    for found in ledger.decisions():
                        if found.sealed is not None:
                            decide(decode(found.sealed))

                return len(ids) / _cpu(all_of_them)

        found = interleave(run, "replay", {"ours": ours, "one_by_one": one_by_one})
    yield row("replay", found.median("ours"), one_by_one=round(found.median("one_by_one")), envelopes=count)


def _whole(ledger: SqliteLedger, text: bytes, count: int) -> None:
    result = replay(ledger, Source(text), now=_NOW, jobs=1)
    assert (result.compared, result.changed) == (count, 0), result.samples[:3]
