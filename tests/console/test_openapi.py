"""The description of the API is held against the server: no answer that it does not name, no error of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from execution_envelope.console.limits import RateLimits
from tests.console.test_access import Clock, Server, token
from tests.strategies import examples

#: Everything that an answer may get wrong against the description.
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("api")
    found = Server(folder, Clock(), limits=RateLimits(requests="1000000/minute", failures="1000000/minute"))
    yield found
    anyio.run(found.controller.aclose)


def test_every_answer_is_described(server: Server) -> None:
    everything = token(server.tokens, "user:all", "*", ["operator", "auditor", "service"])
    allowed = {"authorization": f"Bearer {everything}"}
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", server.app, headers=allowed)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 5
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        def check(case: Any) -> None:
            case.call_and_validate(headers=allowed, checks=CHECKS)

        check()


def test_nobody_gets_any_answer_without_a_token(server: Server) -> None:
    paths = server.app.openapi()["paths"]
    asked = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    for method, path in asked:
        answer = server.client().request(method, path.replace("{reference}", server.held["acme"]), json={"reason": "r"})
        assert answer.status_code == 401, (method, path)
