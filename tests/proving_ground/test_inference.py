"""What becomes of a request for inference, asked with the official `openai` client and read from the record."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import httpx
import openai
import pytest
from backend import Backend, until

from execution_envelope import AdmissionController, Ask, Grant, Subject, Target
from execution_envelope.budgets import Budgets, Prices
from execution_envelope.integrations.asgi import ENVELOPE_HEADER
from execution_envelope.ledger.memory import MemoryLedger
from execution_envelope.lifecycle import Abandoned, Cancelled, Failed, Rejected, Sealed
from execution_envelope.record import Record
from proving_ground.body_limit import MAX_BODY
from proving_ground.counted import Counted
from proving_ground.inference import EMBEDDINGS, Inference

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
POLICY = Path(__file__).parent / "inference.yaml"
HI: Any = [{"role": "user", "content": "Name a color."}]
#: So that the engine writes as much as it may.
ON = {"ignore_eos": True}


class Served:
    """A backend with one deployment, its OpenAI client, and its records."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._clients: list[openai.OpenAI] = []
        self.deployment = self.deploy()
        self.client = self.openai(self.deployment)

    def deploy(self) -> UUID:
        found: UUID = self.backend.client().serving.deploy_model(repo_id=MODEL, poll_interval_seconds=0.1)
        return found

    def openai(self, deployment: UUID, subject: str = "dana") -> openai.OpenAI:
        """The official client, as anybody makes it; it does not try again where a test looks at the first answer."""
        base = f"{self.backend.url}/runtime/models/{deployment}/v1"
        client = openai.OpenAI(base_url=base, api_key=self.backend.token(subject), max_retries=0)
        self._clients.append(client)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def record(self, answer: Any) -> Record:
        """By what the answer names; after its end."""
        id = str(answer.headers[ENVELOPE_HEADER])
        return until(lambda: (found := read(self.backend, id)) is not None and not found.is_open and found)


def read(backend: Backend, reference: str) -> Record | None:
    """None as long as it is not stored: what is relaxed comes within 50 ms."""

    async def found() -> Record:
        controller = AdmissionController.open(f"sqlite:///{backend.data}/envelopes.db")
        try:
            return await controller.read(reference)
        finally:
            await controller.aclose()

    try:
        return asyncio.run(found())
    except LookupError:
        return None


def of(record: Record, kind: Any) -> list[Any]:
    return [event.data for event in record.events if isinstance(event.data, kind)]


def types(record: Record) -> list[str]:
    return [type(event.data).__name__.lower() for event in record.events]


def outcome(record: Record, key: str) -> tuple[str, list[str]]:
    (found,) = [difference for difference in record.differences if difference.key == key]
    return found.outcome, [reason.cause for reason in found.reasons]


def used(record: Record) -> dict[str, tuple[Any, str]]:
    return {name: (usage.amount, usage.how) for name, usage in record.used.items()}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("inference") / "data"
    backend = Backend.start(directory, NODE_CORES="4", NODE_MEMORY="2GiB", POLICY=str(POLICY))
    try:
        with contextlib.closing(Served(backend)) as found:
            yield found
    finally:
        backend.stop()


# What is asked, given and used


def test_a_chat_is_sealed_granted_and_counted(served: Served) -> None:
    answer = served.client.chat.completions.with_raw_response.create(
        model="any", messages=HI, max_tokens=5, extra_body=ON
    )
    said, record = answer.parse().usage, served.record(answer)
    execution, requested = record.envelope.execution, record.envelope.requested
    assert (execution.kind, execution.operation) == ("inference", "chat.completions")
    assert {name: quantity.amount for name, quantity in requested.resources.items()} == {
        "output_tokens": 5,
        "requests": 1,
    }
    deployed = read(served.backend, f"deployment:{served.deployment}")
    assert deployed is not None and record.envelope.correlation.runs_on == deployed.id
    assert record.granted == {"output_tokens": 5, "requests": 1, "context": 2048}
    assert [grant.basis for grant in record.grants.values()] == ["enforced"]
    assert said is not None
    found = used(record)
    assert found.pop("duration")[0] > 0
    assert found == {
        "output_tokens": (said.completion_tokens, "measured"),
        "input_tokens": (said.prompt_tokens, "measured"),
        "requests": (1, "measured"),
    }
    assert types(record) == ["sealed", "verdict", "admitted", "granted", "used", "completed"]
    assert of(record, Sealed)[0].window_ms == 50


def test_of_a_stream_the_first_token_has_its_time_on_the_record(served: Served) -> None:
    begun = datetime.now(UTC)
    long: Any = [{"role": "user", "content": "word " * 300}]
    answer = served.client.chat.completions.with_raw_response.create(
        model="any", messages=long, max_tokens=20, stream=True, extra_body=ON
    )
    stream = iter(answer.parse())
    next(stream)
    first = datetime.now(UTC)
    *_, last = stream
    record = served.record(answer)
    assert types(record)[3:] == ["granted", "ready", "used", "completed"]
    at = {type(event.data).__name__: datetime.fromisoformat(event.at) for event in record.events}
    # The prompt took most of the time, so it was neither when the answer began nor when it ended.
    assert abs((at["Ready"] - first).total_seconds()) < 0.5 * (first - begun).total_seconds()
    assert begun < at["Granted"] < at["Ready"] < at["Used"]
    timings = cast(Any, last).timings
    assert used(record)["output_tokens"] == (timings["predicted_n"], "measured") == (20, "measured")


def test_tokens_that_the_caller_wrote_are_asked_for_by_their_number(served: Served) -> None:
    answer = served.client.completions.with_raw_response.create(model="any", prompt=[504, 506, 508], max_tokens=2)
    record = served.record(answer)
    assert record.envelope.execution.operation == "completions"
    assert record.envelope.requested.resources["input_tokens"].amount == 3
    assert outcome(record, "input_tokens") == ("equal", [])
    assert used(record)["input_tokens"] == (3, "measured")


def test_embeddings_of_several_texts_are_one_request(served: Served) -> None:
    answer = served.client.embeddings.with_raw_response.create(model="any", input=["a color", "another, longer text"])
    said, record = answer.parse(), served.record(answer)
    assert [len(one.embedding) for one in said.data] == [576, 576] and said.data[0].embedding != said.data[1].embedding
    assert record.envelope.execution.operation == "embeddings"
    assert record.granted == {"requests": 1, "context": 2048}
    found = used(record)
    assert found["input_tokens"] == (said.usage.prompt_tokens, "measured") and said.usage.prompt_tokens > 4
    assert found["output_tokens"] == (0, "measured")
    # The same engine goes on writing.
    assert served.client.chat.completions.create(model="any", messages=HI, max_tokens=2).choices


def test_what_is_not_counted_is_not_done(served: Served) -> None:
    base = f"/runtime/models/{served.deployment}/v1"
    with served.backend.http() as http:
        assert http.get(f"{base}/models").json()["data"][0]["meta"]["n_ctx"] == 2048
        for path in ("rerank", "reranking", "tokenize", "detokenize", "apply-template", "messages", "responses"):
            assert http.post(f"{base}/{path}", json={"content": "x", "input": "x"}).status_code == 404, path
        for path in ("slots", "props", "health", "models/x"):
            assert http.get(f"{base}/{path}").status_code == 404, path
        assert http.post(f"{base}/models", json={}).status_code == 405
    for prompt in (["One,", "two,"], [[504], [506]]):
        with pytest.raises(openai.BadRequestError, match="one prompt and one answer"):
            served.client.completions.create(model="any", prompt=prompt, max_tokens=2)


def test_a_body_that_is_too_large_is_refused_before_it_is_known_who_sends_it(served: Served) -> None:
    large = b'{"dataset": "' + b"x" * MAX_BODY
    said = f"expected a body of up to {MAX_BODY} bytes - at `body`"
    with httpx.Client(base_url=served.backend.url, timeout=60, trust_env=False) as http:
        for path in ("/evaluations", "/api/agents/runs", "/ingestion/ingest/run", "/serving/deploy_model", "/nothing"):
            for content in (large, iter([large[:-1000], large[-1000:]])):  # of a declared size, and in chunks
                answer = http.post(path, content=content)
                assert (answer.status_code, answer.json()) == (413, {"detail": said}), path
                assert ENVELOPE_HEADER not in answer.headers
        for content in (large[:MAX_BODY], iter([large[:1000], large[1000:MAX_BODY]])):
            assert http.post("/evaluations", content=content).status_code == 401
    with pytest.raises(openai.APIStatusError) as caught:
        served.client.completions.create(model="any", prompt="x" * MAX_BODY, max_tokens=2)
    assert caught.value.status_code == 413
    body: Any = caught.value.body
    assert (body["message"], body["type"]) == (said, "invalid_request_error")


def test_of_embeddings_the_tokens_are_counted_whatever_the_model_is_called(served: Served) -> None:
    # The engine says it again before it says what it counted; the longest name, in its longest form.
    answer = served.client.embeddings.with_raw_response.create(model="\x01" * 1024, input="a color")
    assert used(served.record(answer))["input_tokens"] == (answer.parse().usage.prompt_tokens, "measured")
    for client in (served.client.embeddings, served.client.completions):
        asked: Any = {"input": "a color"} if client is served.client.embeddings else {"prompt": "a", "max_tokens": 1}
        with pytest.raises(openai.BadRequestError, match=r"up to 1024 characters, got 1025 - at `body\.model`"):
            client.create(model="x" * 1025, **asked)


def test_of_embeddings_without_a_count_nobody_says_that_they_cost_nothing() -> None:
    async def reported(*parts: bytes) -> Record:
        prices = Prices("2026-11", "EUR", {"m": {"input_tokens": 1, "output_tokens": 1}})
        controller = AdmissionController(MemoryLedger(), budgets=Budgets(prices=prices))
        ask = Ask(
            kind="inference", operation="embeddings", target=Target("model", "m"), subject=Subject("user", "dana")
        )

        async def answer() -> AsyncIterator[bytes]:
            for part in parts:
                yield part

        async with controller.admit(ask) as admission:
            grant = Grant({"requests": 1})
            await admission.grant(grant)
            counted = Counted(admission, Inference(EMBEDDINGS, {"input": "x"}, ask), grant)
            counted.asking()
            async for _ in counted.answering(200, answer()):
                pass
            await counted.settle()
        return await controller.read(admission.id)

    silent = asyncio.run(reported(b'{"data": []}'))
    assert silent.state == "completed"
    assert used(silent)["input_tokens"] == ("unknown", "estimated")
    assert used(silent)["cost"] == ("unknown", "estimated")
    # Where the network cuts an answer into parts means nothing.
    counted = asyncio.run(reported(b'{"usa', b'ge":{"prompt_tokens":3,"total_tokens":3}, "data": []}'))
    assert used(counted)["input_tokens"] == (3, "measured")


# Less than was asked


def test_narrowed_by_policy_and_by_the_context(served: Served) -> None:
    answer = served.openai(served.deployment).chat.completions.with_raw_response.create(
        model="any",
        messages=HI,
        max_tokens=500,
        extra_body={**ON, "n_ctx": 8192},
        extra_headers={"X-Workroom-Id": "support-bot"},
    )
    said, record = answer.parse().usage, served.record(answer)
    assert outcome(record, "output_tokens") == ("reduced", ["policy"])
    assert outcome(record, "context") == ("reduced", ["capacity"])
    assert said is not None and said.completion_tokens == record.granted["output_tokens"] == 6

    answer = served.client.completions.with_raw_response.create(model="any", prompt="Hi", max_tokens=9000)
    assert outcome(served.record(answer), "output_tokens") == ("reduced", ["capacity"])


def test_withheld_with_a_reason_and_ignored_without_one(served: Served) -> None:
    answer = served.client.chat.completions.with_raw_response.create(
        model="any", messages=HI, max_tokens=2, service_tier="priority", store=True
    )
    record = served.record(answer)
    assert outcome(record, "service_tier") == ("withheld", ["unsupported"])
    assert outcome(record, "store") == ("ignored", ["unstated"])
    answer = served.client.chat.completions.with_raw_response.create(
        model="any", messages=HI, max_tokens=2, service_tier="auto", store=False
    )
    record = served.record(answer)
    assert outcome(record, "service_tier")[0] == "equal" and "store" not in record.envelope.requested.constraints

    vectors = served.client.embeddings.with_raw_response.create(model="any", input="a color", dimensions=64)
    assert outcome(served.record(vectors), "dimensions") == ("ignored", ["unstated"])
    assert len(vectors.parse().data[0].embedding) == 576


# No answer


def test_who_may_not_ask_is_denied(served: Served) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="only operators deploy and ask") as caught:
        served.openai(served.deployment, "sam").embeddings.create(model="any", input="a color")
    record = served.record(caught.value.response)
    assert (record.state, record.grants, record.envelope.execution.operation) == ("denied", {}, "embeddings")


def test_a_deployment_that_serves_nothing_any_more_rejects(served: Served) -> None:
    deployment = served.deploy()
    client = served.openai(deployment)
    served.backend.client().serving.stop_deployment(deployment)
    with pytest.raises(openai.InternalServerError, match="serves nothing now") as caught:
        client.chat.completions.create(model="any", messages=HI)
    record = served.record(caught.value.response)
    assert (record.state, of(record, Rejected)[0].code) == ("rejected", "http_503")
    assert record.used == {}


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_failed_with_its_words_and_used_nothing(served: Served, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "word " * 4000}]
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size") as caught:
        served.client.chat.completions.create(model="any", messages=messages, stream=stream)
    record = served.record(caught.value.response)
    assert record.state == "failed"  # the slot had been granted
    (end,) = of(record, Failed)
    assert end.code == "exceed_context_size_error" and "exceeds the available context size (2048" in end.message
    assert used(record)["output_tokens"] == (0, "measured")


def test_a_key_leads_to_no_second_answer(served: Served) -> None:
    ask: dict[str, Any] = {"model": "any", "input": "a color", "extra_headers": {"Idempotency-Key": "color-1"}}
    first = served.record(served.client.embeddings.with_raw_response.create(**ask))
    with pytest.raises(openai.ConflictError, match="answers are not kept") as caught:
        served.client.embeddings.create(**ask)
    replayed = served.record(caught.value.response)
    assert (replayed.id, replayed.next_sequence) == (first.id, first.next_sequence)
    with pytest.raises(openai.ConflictError, match="got another one"):
        served.client.embeddings.create(**ask | {"input": "another color"})


# Answers that are cut off


@dataclass
class Cut:
    """A stream that was looked at for a while: what came, and the answer."""

    answer: Any
    stream: Any
    seen: int


def begun(client: openai.OpenAI, seen: int = 15) -> Cut:
    answer = client.chat.completions.with_raw_response.create(
        model="any", messages=HI, max_tokens=1500, stream=True, extra_body=ON
    )
    stream = answer.parse()
    return Cut(answer, stream, sum(1 for _ in zip(range(seen), stream, strict=False)))


def estimated(record: Record, cut: Cut) -> bool:
    """By what the engine said last, not by all that was granted; what is sure is measured all the same."""
    amount, how = used(record)["output_tokens"]
    assert used(record)["requests"] == (1, "measured") and used(record)["duration"][1] == "measured"
    # The first event of a stream names the role only.
    return how == "estimated" and cut.seen - 1 <= amount < record.granted["output_tokens"]


def test_cut_by_the_client(served: Served) -> None:
    cut = begun(served.client)
    cut.stream.close()
    record = served.record(cut.answer)
    assert (record.state, of(record, Cancelled)[0].message) == (
        "cancelled",
        "the client went away before the last byte",
    )
    assert estimated(record, cut)
    assert used(record)["output_tokens"][0] < cut.seen + 100


def test_cut_by_the_engine(served: Served) -> None:
    before = set(served.backend.engines())
    deployment = served.deploy()
    ((pid, _),) = set(served.backend.engines()) - before
    cut = begun(served.openai(deployment))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the engine ended in the middle of its answer") as caught:
        for _ in cut.stream:
            cut.seen += 1
    record = served.record(cut.answer)
    body: Any = caught.value.body
    assert (body["code"], body["envelope"]) == ("engine_gone", record.id)
    assert (record.state, of(record, Failed)[0].code) == ("failed", "ENGINE_GONE")
    assert estimated(record, cut)


def test_cut_by_the_engine_without_a_stream_may_have_used_all(served: Served) -> None:
    before = set(served.backend.engines())
    client = served.openai(served.deploy())
    ((pid, _),) = set(served.backend.engines()) - before

    async def killed_once_it_is_asked() -> Any:
        asking = asyncio.create_task(
            asyncio.to_thread(client.chat.completions.create, model="any", messages=HI, max_tokens=1500, extra_body=ON)
        )
        await asyncio.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        return await asking

    with pytest.raises(openai.InternalServerError, match="the engine did not answer") as caught:
        asyncio.run(killed_once_it_is_asked())
    record = served.record(caught.value.response)
    assert (record.state, of(record, Failed)[0].code) == ("failed", "ENGINE_GONE")
    assert used(record)["output_tokens"] == (1500, "estimated")


def test_cut_by_a_backend_that_is_killed_and_by_one_that_stops(tmp_path: Path) -> None:
    backend = Backend.start(tmp_path / "data", POLICY=str(POLICY))
    first = Served(backend)
    try:
        cut = begun(first.client)
        time.sleep(0.3)  # longer than what was acknowledged may take to be stored
        backend.kill9()
        with contextlib.suppress(Exception):
            list(cut.stream)
        backend.stop()
        backend = Backend.start(tmp_path / "data", POLICY=str(POLICY))
        id = cut.answer.headers[ENVELOPE_HEADER]
        record = until(lambda: (found := read(backend, id)) is not None and not found.is_open and found)
        assert record.state == "abandoned"
        assert of(record, Abandoned)[0].evidence and record.used == {}
        assert types(record)[-2:] == ["ready", "abandoned"]

        second = Served(backend)
        cut = begun(second.client)
        backend.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(Exception):
            for _ in cut.stream:
                cut.seen += 1
        backend.process.wait(20)
        record = read(backend, cut.answer.headers[ENVELOPE_HEADER])
        assert record is not None and record.state == "cancelled"
        assert estimated(record, cut)
        second.close()
    finally:
        first.close()
        backend.stop()
