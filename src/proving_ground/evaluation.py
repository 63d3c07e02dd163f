"""Evaluations of deployed models: what is asked for, what is given, and the process that does it.

An evaluation asks this backend for each sample's answer, by the token of its own run: each is a completion as any
other, `part_of` the evaluation, and what it used is on its own record.
"""

import asyncio
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from execution_envelope import Admission, Ask, Grant, InvalidField, Target
from execution_envelope.adapters import Context
from proving_ground.admission import unkept
from proving_ground.catalog import Catalog
from proving_ground.deployment import Deployment
from proving_ground.evaluation_child import Orders
from proving_ground.jobs import JobFailed, Work
from proving_ground.logfile import count_lines, tail
from proving_ground.supervisor import Supervisor

EVALUATION: Final = "evaluation"
"""The kind on the record, and of the job."""

#: What an evaluation gets that does not say: tokens for each sample, seconds for all, how answers are compared.
SAMPLE_TOKENS: Final = 64
SECONDS: Final = 900
SCORER: Final = "includes"
#: How many keys a request may have that are not known here.
MAX_UNKNOWN: Final = 16

_SAMPLES: Final = Path("dataset", "_examples")
_BOUNDED: Final = ("samples", "requests", "output_tokens", "duration")
_CONSTRAINTS: Final = ("dataset", "scorer", "temperature", "seed", "epochs")


class EvaluationRequest(BaseModel):
    """The body of `POST /evaluations`. A key that is not known is accepted, for a client may be newer than this
    backend, and ends as *ignored* on the record."""

    model_config = ConfigDict(extra="allow", frozen=True)

    deployment_id: UUID
    dataset: Literal["biology_qa", "popularity", "security_guide", "theory_of_mind"]
    limit: Annotated[StrictInt, Field(ge=1, le=10_000)] | None = None
    """How many samples, from the first on; all when it is null."""
    output_tokens: Annotated[StrictInt, Field(ge=1, le=10_000_000)] | None = None
    """Tokens that may be written for all samples together: each gets the same share."""
    time_limit: Annotated[StrictInt, Field(ge=1, le=86_400)] | None = None
    """Seconds after which it is ended."""
    scorer: Literal["exact", "f1", "includes", "match"] | None = None
    """How an answer is compared with what is expected."""
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = None
    epochs: Annotated[StrictInt, Field(ge=1, le=100)] | None = None
    """How often each sample is asked; here it is once, whatever is asked for."""

    @model_validator(mode="after")
    def _fits(self) -> "EvaluationRequest":
        if self.output_tokens is not None and self.output_tokens < (self.limit or 1):
            raise ValueError(f"expected a token for each of {self.limit} samples - at output_tokens")
        if len(self.model_extra or {}) > MAX_UNKNOWN:
            raise ValueError(f"expected at most {MAX_UNKNOWN} unknown keys, got {len(self.model_extra or {})}")
        return self


def describe_evaluation(body: Any, context: Context) -> Ask:
    """The ask of an evaluation, from the body as it arrived. A key that is null was not asked for."""
    if not isinstance(body, Mapping):
        raise InvalidField("body", "expected a JSON object")
    deployment = body.get("deployment_id")
    if not isinstance(deployment, str):
        raise InvalidField("body.deployment_id", "expected the id of a deployment")
    seconds = body.get("time_limit")
    unknown = {name: value for name, value in body.items() if name not in EvaluationRequest.model_fields}
    return Ask(
        kind=EVALUATION,
        operation="evaluations.create",
        entrypoint="POST /evaluations",  # the same under any prefix
        target=Target("deployment", deployment),
        requested={
            "samples": body.get("limit"),
            "output_tokens": body.get("output_tokens"),
            "duration": None if seconds is None else f"{seconds}s",
        },
        constraints={**unknown, **{name: body.get(name) for name in _CONSTRAINTS}},
        schema="proving-ground.EvaluationRequest/1",
        body=body,
    )


def dataset_size(name: str) -> int:
    """How many samples a data set has. Finds the file without importing the package, which takes seconds."""
    spec = find_spec("inspect_ai")
    if spec is None or not spec.submodule_search_locations:
        raise JobFailed("NO_EVALUATOR", "the package inspect-ai is not installed")
    return count_lines(Path(spec.submodule_search_locations[0]) / _SAMPLES / f"{name}.jsonl")


def meant(request: EvaluationRequest, size: int) -> dict[str, int]:
    """Resource -> how much is meant by what the caller left out, of a data set of `size` samples."""
    samples = request.limit or size
    defaults = {
        "samples": size,
        "requests": samples,
        "output_tokens": SAMPLE_TOKENS * samples,
        "duration": SECONDS * 1000,
    }
    said = {"samples": request.limit, "output_tokens": request.output_tokens, "duration": request.time_limit}
    return {name: amount for name, amount in defaults.items() if said.get(name) is None}


def planned(admission: Admission, request: EvaluationRequest, size: int, left: Mapping[str, Any]) -> Grant:
    """What is given of a data set of `size` samples, where `left` is what is left of the grants above.

    Raises `JobFailed` when nothing can be: the least is one sample of one token.
    """
    because: dict[str, tuple[str, str]] = {}

    def given(name: str, want: int, said: tuple[str, str] | None, *more: tuple[str, int, str]) -> int:
        if said is not None:
            because[name] = said
        for cause, most, text in (*_bounds(admission, name, left), *more):
            if most < want:
                want, because[name] = most, (cause, text)
        if want < 1:
            raise JobFailed("NOTHING_LEFT", because[name][1])
        return want

    samples = request.limit or size
    said = None if request.limit else ("default", "the whole data set")
    has = ("capacity", size, f"the data set has {size} samples")
    asks = [(cause, most, f"{text}, one for each sample") for cause, most, text in _bounds(admission, "requests", left)]
    samples = given("samples", samples, said, has, *asks)
    tokens, said = request.output_tokens, None
    if tokens is None:
        tokens, said = SAMPLE_TOKENS * samples, ("default", f"{SAMPLE_TOKENS} for each sample")
    tokens = given("output_tokens", tokens, said)
    if tokens < samples:
        why = because.get("output_tokens", ("", f"{tokens} output_tokens were asked for"))[1]
        raise JobFailed("LIMIT_BELOW_FLOOR", f"{samples} samples take a token each; {why}")
    seconds = request.time_limit or SECONDS
    said = None if request.time_limit else ("default", f"{SECONDS} seconds")
    duration = given("duration", seconds * 1000, said)
    for name, amount in (("samples", samples), ("output_tokens", tokens), ("duration", duration)):
        if admission.limits.get(name) == amount and name in admission.envelope.requested.resources:
            because.pop(name, None)  # the limit is a reason of its own on the record
    because["requests"] = ("default", "one for each sample")
    if (request.epochs or 1) > 1:
        because["epochs"] = ("unsupported", "each sample is asked once")
    asked = admission.envelope.requested.constraints
    resources = {"samples": samples, "requests": samples, "output_tokens": tokens, "duration": duration}
    for name, amount in meant(request, size).items():
        if resources[name] == amount:
            because.pop(name, None)  # which was said of the effective value
    return Grant(
        resources,
        route={"deployment": str(request.deployment_id)},
        basis="enforced",
        honoured=[name for name in _CONSTRAINTS if name in asked and name not in because],
        constraints={} if "scorer" in asked else {"scorer": SCORER},
        because=because,
    )


def _bounds(admission: Admission, name: str, left: Mapping[str, Any]) -> Sequence[tuple[str, int, str]]:
    """What bounds a resource of an evaluation: the cause, how much, a sentence."""
    found: list[tuple[str, Any, str]] = [("policy", admission.limits.get(name), "policy allows {} {}")]
    for (account, _, resource), entry in admission.record.budgets.items():
        if resource == name and not entry.shadow and not entry.unknown:
            found.append(("quota", entry.reserved, f"{{}} {{}} are reserved of budget {account}"))
    found.append(("quota", left.get(name), "{} {} are left of what the run it is part of was granted"))
    unit = "ms" if name == "duration" else name
    return [(cause, most, text.format(most, unit)) for cause, most, text in found if isinstance(most, int)]


class Evaluations:
    """Runs evaluations; `run` is for `Jobs.offer`. They write below `directory`, which is emptied at the start."""

    def __init__(self, directory: Path, supervisor: Supervisor, catalog: Catalog) -> None:
        self._directory = directory.absolute()
        self._supervisor = supervisor
        self._catalog = catalog
        # None outlives its backend: what an earlier one left is of no use.
        shutil.rmtree(self._directory, ignore_errors=True)

    async def run(self, work: Work) -> None:
        """One evaluation: resolve, grant, ask for each sample, say what was used. Raises `JobFailed`."""
        request = EvaluationRequest.model_validate(work.job.body)
        deployment = self._deployed(request.deployment_id)
        model = self._catalog.model(deployment.model_id)
        given: dict[str, str] = {"dataset": request.dataset, "scorer": request.scorer or SCORER}
        given |= {} if model is None else {"model": model.repo_id}
        if (why := unkept(work.admission, _BOUNDED, given)) is not None:
            raise JobFailed("NOT_ALLOWED", why)
        size = await asyncio.to_thread(dataset_size, request.dataset)
        await work.admission.effective(
            meant(request, size),
            constraints={} if request.scorer else {"scorer": SCORER},
            cause="default",
            because=f"where the caller said nothing: all of the data set, a request and {SAMPLE_TOKENS} tokens for "
            f"each sample, {SECONDS} seconds, the scorer {SCORER}",
        )
        amounts: dict[str, Any] = {}

        def grant(left: Mapping[str, Any]) -> Grant:
            plan = planned(work.admission, request, size, left)
            amounts.update(plan.resources)
            return plan

        await work.admission.grant(grant)
        work.job.checkpoint["granted"], work.job.total = amounts, amounts["samples"]
        work.save()
        orders: Orders = {
            "parent": os.getpid(),
            "url": f"{work.job.checkpoint['backend']}/runtime/models/{deployment.id}/v1",
            "token": work.token,
            "model": "any" if model is None else model.repo_id,
            "dataset": request.dataset,
            "samples": amounts["samples"],
            "max_tokens": amounts["output_tokens"] // amounts["samples"],
            "scorer": given["scorer"],
            "temperature": request.temperature,
            "seed": request.seed,
        }
        begun = time.monotonic()
        try:
            async with asyncio.timeout(amounts["duration"] / 1000):
                await self._evaluate(work, orders)
        except TimeoutError:
            raise JobFailed("TIME_LIMIT", f"ended after the {amounts['duration']} ms that were granted") from None
        except JobFailed as failure:
            self._deployed(deployment.id, failure.sentence)
            raise
        finally:
            spent = round((time.monotonic() - begun) * 1000)
            await work.admission.used({"samples": work.job.done, "duration": spent})

    def _deployed(self, deployment_id: UUID, why: str | None = None) -> Deployment:
        """The deployment, as long as it serves; `why` is how it was found out that it does not."""
        found = self._supervisor.deployments.get(deployment_id)
        if found is not None and found.status == "DEPLOYED":
            return found
        is_now = "gone" if found is None else found.status
        said = f"deployment {deployment_id} is {is_now} and serves nothing now"
        if found is not None and found.last_error_message:
            said += f": {found.last_error_message}"
        raise JobFailed("NOT_DEPLOYED", said if why is None else f"{said}; {why}")

    async def _evaluate(self, work: Work, orders: Orders) -> None:
        async with self._child(work.job.id, orders) as (process, log):
            assert process.stdout is not None
            async for line in process.stdout:
                said: dict[str, Any] = json.loads(line)
                if "sample" in said:
                    work.job.done += 1
                    work.job.result.setdefault("samples", []).append({"id": said["sample"], **said["scores"]})
                    work.save()
                elif "metrics" in said:
                    work.job.result["scores"] = said["metrics"]
                    return
                else:
                    raise JobFailed("EVALUATION_FAILED", said["error"])
            code = await process.wait()
            last = (await asyncio.to_thread(tail, log)).strip().rpartition("\n")[2]
            ended = f"with signal {-code}" if code < 0 else f"with {code}"
            raise JobFailed("EVALUATOR_DIED", f"its process ended {ended}{f': {last}' if last else ''}"[:500])

    @contextlib.asynccontextmanager
    async def _child(self, job_id: UUID, orders: Orders) -> AsyncIterator[tuple[asyncio.subprocess.Process, Path]]:
        """The process with its log; it has ended, and what it wrote is gone, when this is left."""
        directory = self._directory / str(job_id)
        directory.mkdir(mode=0o700, parents=True)
        (directory / ".env").touch()  # inspect reads the next one that it finds upwards
        log = directory / "evaluation.log"
        # Of this environment nothing is passed on: neither keys nor proxies, nor settings of inspect's.
        env = {
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        }
        env |= dict.fromkeys(("HOME", "TMPDIR", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), str(directory))
        try:
            with log.open("wb") as written:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "proving_ground.evaluation_child"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=written,
                    cwd=directory,
                    env=env,
                    start_new_session=True,  # a Ctrl-C at the terminal is for the backend
                )
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(orders).encode() + b"\n")
                process.stdin.close()
                yield process, log
            finally:
                # It takes seconds to end by itself when it has said all.
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
