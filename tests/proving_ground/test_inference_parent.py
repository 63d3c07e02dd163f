"""What is left of a parent's grant bounds what a request for inference is given.

Without an engine: what is decided of it before the engine is asked, on a real seam in memory.
"""

import json
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import anyio
import pytest
from starlette.requests import Request

from execution_envelope import Admission, AdmissionController, Grant, Target
from execution_envelope.testing import ask as an_ask
from proving_ground.auth import Caller
from proving_ground.catalog import Catalog, smollm2
from proving_ground.deployment import Deployment, Instance, new_deployment
from proving_ground.inference import Inference, NotGranted, described
from proving_ground.resolver import InstanceGrant
from proving_ground.schemas import CreateModelDeployment

MODEL = smollm2()


class Child:
    """A request for inference, admitted as part of a parent that was granted something."""

    def __init__(
        self, controller: AdmissionController, asked: Inference, admission: Admission, deployment: Deployment
    ) -> None:
        self.controller, self.asked, self.admission, self.deployment = controller, asked, admission, deployment
        self.instance = _instance(deployment.id)

    def granted(self, **left: Any) -> Grant:
        return self.asked.granted(self.admission, self.deployment, self.instance, left)

    async def again(self) -> "Child":
        return Child(self.controller, self.asked, await self.controller.begin(self.asked.ask), self.deployment)


async def admitted(path: str, **body: Any) -> Child:
    controller = AdmissionController.open("memory://", component="proving-ground")
    run = await controller.begin(an_ask(kind="agent.run", operation="agents.run", target=Target("agent", "a")))
    await run.grant(Grant({"output_tokens": 40, "requests": 5}))
    caller = Caller("dana", "acme", ("operator",), ()).acting_as("agent", "a", run.id)
    wish = CreateModelDeployment(m_id=MODEL.id, m_config_id=MODEL.config_id)
    deployment = new_deployment(wish, caller, uuid4(), datetime.now(UTC))
    deploying = await controller.begin(an_ask())
    await deploying.bind("deployment", str(deployment.id))
    asked = described(json.dumps(body).encode(), _request(deployment.id, path), caller, deployment, Catalog())
    admission = await controller.begin(asked.ask)
    assert admission.envelope.correlation.part_of == run.id
    assert admission.envelope.correlation.runs_on == deploying.id
    return Child(controller, asked, admission, deployment)


def child(path: str = "chat/completions", **body: Any) -> Child:
    return anyio.run(partial(admitted, path, **body))


def _instance(deployment: UUID) -> Instance:
    return Instance(uuid4(), deployment, InstanceGrant("replica-0", 2**28, (0,), (0,), 2048), "logs/x.log")


def _request(deployment: UUID, path: str) -> Request:
    where = f"/api/runtime/models/{deployment}/v1/{path}"
    return Request({"type": "http", "method": "POST", "path": where, "query_string": b"", "headers": []})


def test_an_answer_is_cut_to_what_is_left() -> None:
    found = child(max_tokens=100, messages=[])
    grant = found.granted(output_tokens=17, requests=3)
    assert grant.resources["output_tokens"] == 17
    cause, text = grant.because["output_tokens"]
    assert cause == "quota"
    assert text == f"17 tokens are left of what parent {found.admission.envelope.correlation.part_of} was granted"
    assert json.loads(found.asked.told(grant))["max_tokens"] == 17
    # More than is asked changes nothing, and what the parent was not granted bounds nothing.
    for left in ({"output_tokens": 100}, {"output_tokens": "unlimited", "memory": 0}, {}):
        assert found.granted(**left).resources["output_tokens"] == 100
        assert "output_tokens" not in found.granted(**left).because


def test_who_asked_for_nothing_gets_what_is_left() -> None:
    assert child(messages=[]).granted(output_tokens=17).resources["output_tokens"] == 17


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({"output_tokens": 0}, "0 of output_tokens are left of what parent {} was granted; this takes 1"),
        ({"requests": 0, "output_tokens": 9}, "0 of requests are left of what parent {} was granted; this takes 1"),
        ({"context": 1024}, "1024 of context are left of what parent {} was granted; this takes 2048"),
        ({"input_tokens": 0}, "0 of input_tokens are left of what parent {} was granted; this takes 1"),
    ],
)
def test_where_nothing_is_left_nothing_is_given(left: dict[str, Any], said: str) -> None:
    found = child(max_tokens=5, messages=[])
    with pytest.raises(NotGranted) as caught:
        found.granted(**left)
    assert str(caught.value) == said.format(found.admission.envelope.correlation.part_of)
    assert (caught.value.status, caught.value.code, caught.value.error) == (
        429,
        "PARENT_EXHAUSTED",
        "quota_exhausted",
    )


def test_an_embedding_writes_nothing_and_reads_what_is_left() -> None:
    found = child("embeddings", input=[[1, 2, 3], [4]])
    assert found.admission.envelope.requested.resources["input_tokens"].amount == 4
    grant = found.granted(output_tokens=0, input_tokens=3)
    assert "output_tokens" not in grant.resources and grant.resources["input_tokens"] == 3
    assert grant.because["input_tokens"][0] == "quota"
    assert "max_tokens" not in json.loads(found.asked.told(grant))


def test_what_other_parts_hold_is_not_left() -> None:
    async def granted() -> tuple[Any, Any, Any]:
        found = await admitted("chat/completions", messages=[])
        first = await found.asked.grant(found.admission, found.deployment, found.instance)
        # The parent was granted 40, and the first of its parts holds them all.
        second = await found.again()
        with pytest.raises(NotGranted) as caught:
            await second.asked.grant(second.admission, second.deployment, second.instance)
        return first, found.admission.record, (str(caught.value), second.admission.state)

    first, record, (said, state) = anyio.run(granted)
    assert first.resources["output_tokens"] == 40 and record.violations == ()
    assert (record.envelope.identity.subject.id, record.envelope.identity.delegation[0].id) == ("a", "dana")
    assert said.startswith("0 of output_tokens are left of what parent") and state == "admitted"
