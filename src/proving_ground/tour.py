"""`python -m proving_ground.tour`: all five kinds against the running backend, with the clients that people have.

It asks as dana of the demo tokens, in her workroom, and ends with the trees of envelopes and what they come to by kind.
What policy refuses is said, and left out.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
import httpx
import openai
from kamiwaza_sdk.client import KamiwazaClient
from kamiwaza_sdk.exceptions import KamiwazaError
from kamiwaza_sdk.schemas.retrieval import RetrievalRequest
from openai import OpenAI
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from proving_ground.auth import demo_tokens
from proving_ground.catalog import SMOLLM2

WORKROOM: Final = "support-bot"
SECONDS: Final = 300.0
"""How long an evaluation or an agent may take."""


@click.command()
@click.option("--url", envvar="URL", default="http://127.0.0.1:8787", show_default=True, help="The running backend.")
@click.option(
    "--data",
    envvar="DATA",
    default=".data",
    show_default=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Its data directory: for a token, the ledger, and a file to move.",
)
def main(url: str, data: Path) -> None:
    """Run all five kinds of execution against the backend, and print what they were granted and used."""
    try:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # the SDK turns on what others log
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        token = demo_tokens(data / "tokens.json")["dana"]
        httpx.get(f"{url}/health", trust_env=False).raise_for_status()
    except (OSError, KeyError, ValueError, httpx.HTTPError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise click.ClickException(
            f"expected the backend of `make run` at {url} with data in {data}: {problem}"
        ) from error
    Tour(url, data, token).go()


class Tour:
    """One round. `token` is a demo token of the backend at `url`."""

    def __init__(self, url: str, data: Path, token: str) -> None:
        self._url, self._data, self._token = url, data, token
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._ran: dict[str, str] = {}
        """What ran, and how its envelope is found."""
        self._client = KamiwazaClient(f"{url}/api", api_key=token).workroom_scope(WORKROOM)
        headers = {"Authorization": f"Bearer {token}", "X-Workroom-Id": WORKROOM}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=SECONDS, trust_env=False)

    def go(self) -> None:
        """All five, then what they come to. One that is refused says so, and the others go on."""
        with contextlib.closing(self._client.session), self._http:
            deployment = None
            try:
                deployment = self._tried(self._deploy)
                for stage in (self._infer, self._evaluate):
                    self._tried(stage, deployment)
                self._tried(self._move)
                self._tried(self._run_agent, deployment)
            finally:
                if deployment is not None:
                    self._client.serving.stop_deployment(deployment_id=deployment)
                    self._say("stopped the deployment")
        self._say("maintenance: the backend looks after open envelopes by itself, at its start and now and then")
        for name, reference in self._ran.items():
            self._head(name)
            self._envelope("show", "--tree", reference)
        self._head(f"what workroom {WORKROOM} asked for, was granted and used today, by kind")
        self._envelope("totals", "--since", datetime.now(UTC).date().isoformat(), "--project", WORKROOM)

    def _tried(self, stage: Callable[..., Any], *needs: Any) -> Any:
        """What the stage gives; None when the backend refuses it, or when what it needs is not there."""
        if None in needs:
            self._say(f"left out {stage.__name__.lstrip('_').replace('_', ' ')}: there is no deployment")
            return None
        try:
            return stage(*needs)
        except (KamiwazaError, openai.APIError, httpx.HTTPError, click.ClickException) as error:
            self._say(f"refused: {error}"[:500])
            return None

    def _deploy(self) -> Any:
        self._head("1. a deployment, by kamiwaza-sdk: three replicas are asked for, policy allows two")
        deployment = self._client.serving.deploy_model(
            repo_id=SMOLLM2, starting_copies=3, min_copies=1, poll_interval_seconds=0.2
        )
        self._ran["the deployment"] = f"deployment:{deployment}"
        self._say(f"deployed: {deployment}")
        return deployment

    def _infer(self, deployment: Any) -> None:
        self._head("2. inference, by the openai client: a stream, an answer and an embedding")
        base = f"{self._url}/runtime/models/{deployment}/v1"
        headers = {"X-Workroom-Id": WORKROOM}
        with OpenAI(base_url=base, api_key=self._token, default_headers=headers, timeout=SECONDS) as client:
            question: Any = [{"role": "user", "content": "Name three colours."}]
            with client.chat.completions.create(model=SMOLLM2, messages=question, max_tokens=24, stream=True) as stream:
                self._say("".join(part.choices[0].delta.content or "" for part in stream if part.choices))
            # More than policy allows: what is granted is less.
            answer = client.completions.create(model=SMOLLM2, prompt="The sky is", max_tokens=4096, stop=["."])
            self._say(f"The sky is{answer.choices[0].text}")
            vector = client.embeddings.create(model=SMOLLM2, input="to be or not to be").data[0].embedding
            self._say(f"an embedding of {len(vector)} numbers")

    def _evaluate(self, deployment: Any) -> None:
        self._head("3. an evaluation, by inspect-ai: four samples, each a request that is part of it")
        body = {"deployment_id": str(deployment), "dataset": "popularity", "limit": 4, "output_tokens": 64}
        started = self._posted("/evaluations", body)
        self._ran["the evaluation, with each sample"] = f"evaluation:{started['id']}"
        ended = self._watched(f"/evaluations/{started['id']}", "samples", _progress)
        self._say(f"{ended['status']}: {json.dumps(ended['scores'])}")

    def _move(self) -> None:
        self._head("4. data, by kamiwaza-sdk: a file is ingested, and rows of it are retrieved")
        files = self._data / "files" / "acme"
        files.mkdir(parents=True, exist_ok=True)
        rows = [{"id": number, "word": "colour" if number % 2 else "sound"} for number in range(500)]
        (files / "tour.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        moved = self._client.ingestion.run_active(
            "file", path="tour.jsonl", destination="tour-copy.jsonl", max_bytes=64 * 1024
        )
        self._say(f"ingested: {moved.status} {', '.join(map(str, moved.urns or moved.errors or []))}")
        urn = "urn:li:dataset:(urn:li:dataPlatform:file,tour-copy.jsonl,PROD)"
        found = self._client.retrieval.materialize(RetrievalRequest(dataset_urn=urn, limit_rows=50))
        self._say(f"retrieved {found.inline.row_count} rows by {found.job.transport.value}")

    def _run_agent(self, deployment: Any) -> None:
        self._head("5. an agent with MCP tools and another agent: each call is part of the run")
        body = {
            "deployment_id": str(deployment),
            "name": "tourist",
            "task": "What time is it? Use the clock.",
            "tools": ["desk"],
            "agents": [{"name": "reader", "instructions": "You look things up.", "tools": ["desk"]}],
            "limits": {"steps": 3, "tool_calls": 4, "output_tokens": 256, "duration": "2m"},
        }
        started = self._posted("/agents/runs", body)
        self._ran["the agent's run, with each call"] = f"agent:{started['id']}"
        ended = self._watched(f"/agents/runs/{started['id']}", "steps", lambda now: (len(now["steps"]), 3))
        for step in ended["steps"]:
            for call in step.get("calls", []):
                self._say(f"called {call['tool']}: {call.get('text') or call.get('error') or ''}"[:100])
        self._say(f"{ended['status']}: {ended['answer'] or ended['error_message'] or 'no answer'}"[:200])

    def _posted(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._http.post(path, json=body)
        if answer.is_error:
            raise click.ClickException(f"POST {path} answered {answer.status_code}: {answer.text[:500]}")
        found: dict[str, Any] = answer.json()
        return found

    def _watched(
        self, path: str, unit: str, done: Callable[[dict[str, Any]], tuple[int, int | None]]
    ) -> dict[str, Any]:
        """What is at `path` once it has ended; a bar shows how far it is."""
        deadline = time.monotonic() + SECONDS
        with self._bar(unit) as move:
            while True:
                now: dict[str, Any] = self._http.get(path).raise_for_status().json()
                move(*done(now))
                if now["status"] in ("COMPLETED", "FAILED", "CANCELLED"):
                    return now
                if time.monotonic() > deadline:
                    raise click.ClickException(f"expected an end of {path} within {SECONDS:g} s, it is {now['status']}")
                time.sleep(0.2)

    @contextlib.contextmanager
    def _bar(self, unit: str) -> Iterator[Callable[[int, int | None], None]]:
        columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(unit, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def _envelope(self, *words: str) -> None:
        """The command, as anybody runs it."""
        ledger = f"sqlite:///{self._data.resolve()}/envelopes.db"
        command = [str(Path(sys.executable).with_name("envelope")), "--ledger", ledger, *words]
        self._console.print(f"$ envelope {' '.join(words)}", style="bold")
        self._console.file.flush()
        env = os.environ | ({} if "COLUMNS" in os.environ else {"COLUMNS": str(max(120, self._console.width))})
        ran = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        self._console.file.write(ran.stdout + ran.stderr)

    def _head(self, text: str) -> None:
        self._console.print(f"\n== {text}", style="bold")

    def _say(self, text: str) -> None:
        self._console.print("   " + " ".join(text.split()))


def _progress(evaluation: dict[str, Any]) -> tuple[int, int | None]:
    return evaluation["progress"]["done"], evaluation["progress"]["total"]


if __name__ == "__main__":
    main()
