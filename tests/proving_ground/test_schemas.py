"""The request body: the SDK's own models write it, ours read it."""

from typing import Any
from uuid import uuid4

import pytest
from kamiwaza_sdk.schemas.serving.serving import CreateModelDeployment as SdkRequest
from pydantic import ValidationError

from proving_ground.quantities import MIB, mebibytes, memory_bytes
from proving_ground.schemas import CreateModelDeployment
from proving_ground.wanted import wanted_from

CPU = {
    "schemaVersion": 1,
    "cpu": {"architecture": "x86_64", "requests": {"cpu": "500m", "memory": "256Mi"}},
    "runtime": {"selection": "automatic"},
}
GPU: dict[str, Any] = {
    "schemaVersion": 1,
    "accelerator": {"capability": "gpu", "count": 2, "memory": {"minimum": "8Gi"}, "isolation": "any-qualified"},
    "runtime": {"selection": "automatic"},
}
PROFILE = {**GPU, "accelerator": {**GPU["accelerator"], "profile": "1g.5gb"}}


def _sent(**changes: Any) -> dict[str, Any]:
    """A body as the SDK writes it."""
    return SdkRequest(m_id=uuid4(), m_config_id=uuid4(), **changes).model_dump(mode="json", by_alias=True)


def test_every_key_of_the_sdk_is_ours() -> None:
    ours = set(CreateModelDeployment.model_validate(_sent()).public_body()) - {"context", "env", "gpu_floor"}
    assert ours == set(_sent()) and len(ours) == 17


def test_the_body_is_echoed_as_it_came() -> None:
    body = _sent(inferenceResources={**GPU, "alternatives": [CPU]}, starting_copies=2, vram_allocation=1e9)
    echoed = CreateModelDeployment.model_validate(body).public_body()
    assert {key: echoed[key] for key in body} == body


def test_a_cpu_request_is_read() -> None:
    wanted = wanted_from(CreateModelDeployment.model_validate(_sent(inferenceResources=CPU)))
    assert (wanted.cpu, wanted.memory, wanted.architecture, wanted.gpu) == (500, 256 * MIB, "amd64", 0)
    assert not wanted.notes


def test_the_first_alternative_is_read() -> None:
    request = CreateModelDeployment.model_validate(_sent(inferenceResources={**GPU, "alternatives": [CPU, CPU]}))
    wanted = wanted_from(request)
    assert (wanted.gpu, wanted.cpu, wanted.alternative) == (2, 500, True)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"engine_name": "llama.cpp"}, ("engine", "alias")),
        ({"engine_name": "vllm"}, ("engine", "unsupported")),
        ({"location": "mars"}, ("location", "unsupported")),
        ({"gpu_allocation": 0.5}, ("gpu_allocation", "unsupported")),
        ({"vram_allocation": 1e9}, ("gpu_memory", "unsupported")),
        ({"vram_allocation": 1e9, "inferenceResources": GPU}, ("vram_allocation", "unsupported")),
        ({"node_resource_type": "a100"}, ("node_type", "unsupported")),
        ({"inferenceResources": PROFILE}, ("gpu_profile", "unsupported")),
        ({"tensor_parallel_size": 4}, ("tensor_parallel_size", "unsupported")),
    ],
)
def test_what_cannot_be_had_is_noted(changes: dict[str, Any], note: tuple[str, str]) -> None:
    wanted = wanted_from(CreateModelDeployment.model_validate({**_sent(), **changes}))
    assert [(found.key, found.cause) for found in wanted.notes] == [note]


@pytest.mark.parametrize(
    ("copies", "notes"),
    [
        ({}, [("replicas", "default")]),
        ({"starting_copies": 1}, []),
        ({"min_copies": 2}, []),  # the least is what was asked then
        ({"starting_copies": 1, "min_copies": 2}, []),
    ],
)
def test_copies_that_were_not_in_the_body_are_a_default(copies: dict[str, int], notes: list[tuple[str, str]]) -> None:
    request = CreateModelDeployment.model_validate({"m_id": uuid4(), "m_config_id": uuid4(), **copies})
    assert [(found.key, found.cause) for found in wanted_from(request).notes] == notes


@pytest.mark.parametrize(
    "changes",
    [
        {"starting_copies": 0},
        {"starting_copies": 17},
        {"starting_copies": 3, "max_copies": 2},
        {"context": 0},
        {"context": "many"},
        {"gpu_floor": 9},
        {"env": {"LD_PRELOAD": "x"}},
        {"env": {"lower": "x"}},
        {"env": {f"N{index}": "x" for index in range(33)}},
        {"inferenceResources": {**CPU, "more": 1}},
        {"inferenceResources": {**CPU, "schemaVersion": 2}},
        {"vram_allocation": -1},
        {f"unknown_{index}": 1 for index in range(17)},
    ],
)
def test_bounds(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CreateModelDeployment.model_validate({**_sent(), **changes})


def test_env_values_are_shown_nowhere() -> None:
    request = CreateModelDeployment.model_validate({**_sent(), "env": {"HF_TOKEN": "hf-secret"}})
    assert request.public_body()["env"] == ["HF_TOKEN"]
    assert "hf-secret" not in f"{request!r} {request} {request.model_dump()}"
    assert request.secret_env() == {"HF_TOKEN": "hf-secret"}


@pytest.mark.parametrize("amount", [1, MIB, 226492416, 3 * MIB // 2, 2**40 + 1])
def test_mebibytes_are_exact(amount: int) -> None:
    assert memory_bytes(mebibytes(amount)) == amount
