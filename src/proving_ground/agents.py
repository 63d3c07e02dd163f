"""Agent runs: a model of this backend decides, tools and other agents do, and each call is a part of the run.

The model is called with OpenAI's client by this backend's own route, and an agent by `POST /agents/runs`, both with the
run's credential, which makes each a part of the run. A tool call is sealed here, before the tool server is asked.
"""

import asyncio
import contextlib
import importlib
import json
import time
from collections.abc import Awaitable, Mapping
from typing import Any, Final
from uuid import UUID

import httpx

from execution_envelope import Admission, Ask, Candidate, Denied, Grant, Held, Target, Violation
from proving_ground.admission import envelope_caller, unkept
from proving_ground.agent_protocol import Call, answer_format, begun_answer, introduction, read_answer
from proving_ground.agent_schemas import DEFAULTS, Agent, CreateAgentRun
from proving_ground.agent_tools import Tool, Tools, ToolServer, ToolSession, ToolsUnavailable, ToolTimeout
from proving_ground.jobs import Job, JobFailed, Jobs, Work
from proving_ground.settings import Settings
from proving_ground.supervisor import Supervisor

#: The kind of job, and what a run is called where it acts.
AGENT: Final = "agent"
#: The most tokens of one answer of the model.
ANSWER_TOKENS: Final = 256
#: Characters that are kept of what was said, for whoever looks at the run.
KEPT_TEXT: Final = 1000
#: What is given as asked.
_HONOURED: Final = ("deployment", "tools", "agents")


class _Exhausted(Exception):
    """No tool calls are left of what the run was granted."""


class _Spent(Exception):
    """Ends a run with what it has: `resource` is what it had too little of."""

    def __init__(self, resource: str, sentence: str) -> None:
        super().__init__(sentence)
        self.resource = resource


class AgentRuns:
    """Runs agents, as jobs of this backend."""

    def __init__(
        self,
        settings: Settings,
        jobs: Jobs,
        supervisor: Supervisor,
        http: httpx.AsyncClient,
        servers: Mapping[str, ToolServer],
    ) -> None:
        self.servers = servers
        self.url = f"http://127.0.0.1:{settings.port}"
        self.http = http
        self.logs = settings.data / "logs"
        self._supervisor = supervisor
        self._jobs = jobs
        self._leaving = set[asyncio.Task[None]]()
        self.news = asyncio.Event()
        """Is set when any run has gone on, and replaced by a new one."""
        jobs.offer(AGENT, self._run)

    def serves(self, deployment_id: str) -> str | None:
        """Why a model cannot be asked; None when it can."""
        deployment = self._supervisor.deployments.get(UUID(deployment_id))
        if deployment is None:
            return f"no deployment `{deployment_id}`"
        return None if deployment.status == "DEPLOYED" else f"deployment `{deployment_id}` is {deployment.status}"

    def went_on(self) -> None:
        """Tell whoever waits for news."""
        self.news.set()
        self.news = asyncio.Event()

    def leave(self, job: Job, by: str) -> None:
        """End a run for somebody who does not wait for its end."""
        task = asyncio.create_task(self._jobs.cancel(job, by))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _run(self, work: Work) -> None:
        await _Run(self, work).run()


class _Run:
    """One run, from what it may have to its answer."""

    def __init__(self, runs: AgentRuns, work: Work) -> None:
        self._runs = runs
        self._work = work
        self._body = CreateAgentRun.model_validate(work.job.body)
        self._agents = {f"agent/{agent.name}": agent for agent in self._body.agents}
        sessions = [ToolSession(name, runs.servers[name], runs.logs / f"tools.{name}.log") for name in self._body.tools]
        self._tools = Tools(sessions)
        self._offered: Mapping[str, tuple[ToolSession, Tool]] = {}
        self._steps: list[dict[str, Any]] = work.job.result.setdefault("steps", [])

    async def run(self) -> None:
        """Raises `JobFailed`."""
        admission, begun = self._work.admission, time.monotonic()
        try:
            await self._resolve()
            await admission.grant(self._grant)
            begun = time.monotonic()
            seconds = _amount(admission.record.granted["duration"]) / 1000
            try:
                async with asyncio.timeout(seconds):
                    answer = await self._loop()
            except TimeoutError:
                raise JobFailed("DURATION_OVER", f"it was granted {seconds:g} s, and has no answer by then") from None
            self._work.job.result["answer"] = answer
        except Violation as error:
            raise JobFailed("NOT_ALLOWED", str(error)) from error
        finally:
            try:
                if admission.state == "granted":
                    await admission.used({"duration": round((time.monotonic() - begun) * 1000)})
            finally:
                await self._tools.close()

    async def _resolve(self) -> None:
        """Find the model and the tools. Raises `JobFailed`."""
        admission, wanted = self._work.admission, self._body
        given = {"deployment": str(wanted.deployment_id), "tools": wanted.tools}
        if (said := unkept(admission, DEFAULTS, given)) is not None:
            raise JobFailed("NOT_ALLOWED", said)
        if (said := self._runs.serves(str(wanted.deployment_id))) is not None:
            await admission.attempt([Candidate(str(wanted.deployment_id), "refused", said)], reason=said)
            raise JobFailed("MODEL_UNAVAILABLE", said)
        try:
            await self._tools.open()
        except ToolsUnavailable as error:
            tried = [Candidate(name, "tried") for name in wanted.tools]
            await admission.attempt(tried, reason=str(error))
            raise JobFailed("TOOLS_UNAVAILABLE", str(error)) from error
        self._offered = self._tools.offered()

    def _grant(self, left: Mapping[str, Any]) -> Grant:
        """What this run and all below it may use: the least of what is asked, allowed, and left of its parent."""
        admission = self._work.admission
        asked = admission.envelope.requested.resources
        given: dict[str, int] = {}
        because: dict[str, tuple[str, str]] = {}
        for name, usual in DEFAULTS.items():
            stated = asked[name].amount if name in asked else None
            amount = stated if isinstance(stated, int) else usual
            if stated is None:
                because[name] = ("default", f"no {name} were stated; a run has {usual}")
            bounds = [("policy", admission.limits.get(name), "policy allows")]
            bounds += [("quota", left.get(name), "its parent has left")]
            bounds += [("quota", reserved, "of a budget are reserved") for reserved in _reserved(admission, name)]
            for cause, most, who in bounds:
                if isinstance(most, int) and most < amount:
                    amount, because[name] = most, (cause, f"{who} {most}")
            if stated is not None and because.get(name, ("", ""))[0] == "policy":
                because.pop(name)  # the limit is a reason of its own on the record
            if amount < 1 and name != "tool_calls":
                spent = left.get(name) == 0
                said = f"{name}: its parent has none left" if spent else f"policy allows {name} {amount}"
                raise JobFailed("PARENT_EXHAUSTED" if spent else "NOT_ALLOWED", said)
            given[name] = amount
        return Grant(
            given,
            basis="enforced",
            route={"deployment": str(self._body.deployment_id)},
            honoured=[name for name in _HONOURED if name in admission.envelope.requested.constraints],
            because=because,
        )

    async def _loop(self) -> str:
        tools = self._described
        messages = [
            {"role": "system", "content": f"{self._body.instructions}\n{introduction(tools, self._agents)}".strip()},
            {"role": "user", "content": self._body.task},
        ]
        text = ""
        try:
            while True:
                text, cut = await self._ask_model(messages)
                if cut:
                    text = begun_answer(text)
                    raise _Spent("output_tokens", "an answer of the model was cut off")
                answer, calls = read_answer(text)
                if not calls:
                    return answer
                results = await self._call_all(calls)
                messages += [
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": json.dumps({"results": results})},
                ]
                if any(result.get("spent") for result in results):
                    raise _Spent("tool_calls", "no tool calls are left")
        except _Spent as spent:
            result = self._work.job.result
            result["truncated"], result["note"] = spent.resource, f"ended with what it has: {spent}"
            return read_answer(text)[0][:KEPT_TEXT]

    @property
    def _described(self) -> Mapping[str, Tool]:
        return {name: tool for name, (_, tool) in self._offered.items()}

    async def _ask_model(self, messages: list[dict[str, str]]) -> tuple[str, bool]:
        """One step: what the model said, and whether it was cut off. Raises `_Spent` and `JobFailed`."""
        admission = self._work.admission
        tree = await self._work.controller.tree(admission.id)
        granted = _amount(admission.record.granted["steps"])
        taken = _amount(tree.used["steps"].amount) if "steps" in tree.used else 0
        if taken >= granted:
            raise _Spent("steps", f"all {granted} steps are taken")
        await admission.used({"steps": 1})
        openai = await asyncio.to_thread(importlib.import_module, "openai")
        client = openai.AsyncOpenAI(
            base_url=f"{self._runs.url}/runtime/models/{self._body.deployment_id}/v1",
            api_key=self._work.token,
            max_retries=0,  # each try is an execution of its own, and this run is to know of it
            timeout=httpx.Timeout(None, connect=5.0),
            http_client=self._runs.http,
        )
        form = answer_format(self._described, self._agents)
        step: dict[str, Any] = {"step": len(self._steps) + 1}
        self._steps.append(step)
        try:
            answered = await client.chat.completions.create(
                model="", messages=messages, max_tokens=ANSWER_TOKENS, response_format=form
            )
        except openai.RateLimitError as error:
            raise _Spent("output_tokens", f"the model was refused: {error.message[:300]}") from error
        except openai.APIStatusError as error:
            code = "MODEL_REFUSED" if error.status_code < 500 else "MODEL_FAILED"
            raise JobFailed(code, f"the model answered {error.status_code}: {error.message[:300]}") from error
        except openai.APIError as error:
            raise JobFailed("MODEL_FAILED", f"the model did not answer: {type(error).__name__}") from error
        choice = answered.choices[0]
        text: str = choice.message.content or ""
        step["said"] = text[:KEPT_TEXT]
        self._tell()
        return text, choice.finish_reason == "length"

    async def _call_all(self, calls: list[Call]) -> list[dict[str, Any]]:
        """All calls of a step, side by side."""
        made: list[dict[str, Any]] = [{"tool": call.tool[:KEPT_TEXT]} for call in calls]
        self._steps[-1]["calls"] = made
        try:
            async with asyncio.TaskGroup() as group:
                for call, told in zip(calls, made, strict=True):
                    group.create_task(self._call(call, told))
        except ExceptionGroup as group_of:
            raise group_of.exceptions[0] from group_of
        self._tell()
        return [{name: value for name, value in told.items() if name not in ("envelope", "run")} for told in made]

    async def _call(self, call: Call, told: dict[str, Any]) -> None:
        if call.tool in self._agents:
            await self._call_agent(self._agents[call.tool], call.arguments, told)
        elif call.tool in self._offered:
            await self._call_tool(*self._offered[call.tool], call, told)
        else:
            told["error"] = "there is no such tool"

    async def _call_tool(self, session: ToolSession, tool: Tool, call: Call, told: dict[str, Any]) -> None:
        """Seal the call, ask the tool within what is left, and say what came of it."""
        work, found = self._work, envelope_caller(self._work.acting)
        ask = Ask(
            kind="agent.run",
            operation="tools/call",
            target=Target("tool", call.tool),
            subject=found.subject,
            scope=found.scope,
            part_of=found.part_of,
            requested={"tool_calls": 1},
            schema="mcp.tools.call/1",
            body={"name": tool.name, "arguments": dict(call.arguments)},
        )
        try:
            async with work.controller.admit(ask) as admission:
                told["envelope"] = admission.id
                await self._ask_tool(admission, session, tool, call.arguments, told)
        except Denied as denied:
            told |= {"error": f"refused: {denied}", "envelope": denied.envelope_id}
        except Held as held:
            told |= {"error": f"refused, it would have to be approved: {held}", "envelope": held.envelope_id}

    async def _ask_tool(
        self, admission: Admission, session: ToolSession, tool: Tool, arguments: Mapping[str, Any], told: dict[str, Any]
    ) -> None:
        if (said := unkept(admission, ("tool_calls", "duration"), {"deployment": str(self._body.deployment_id)})) or (
            said := _none_allowed(admission)
        ):
            await admission.reject("NOT_ALLOWED", said)
            told["error"] = f"refused: {said}"
            return

        def within(left: Mapping[str, Any]) -> Grant:
            if isinstance(rest := left.get("tool_calls"), int) and rest < 1:
                raise _Exhausted("no tool calls are left of what the run was granted")
            duration, cause = round(session.seconds * 1000), ("default", "what a tool of this server has to answer")
            for why, most in (("policy", admission.limits.get("duration")), ("quota", left.get("duration"))):
                if isinstance(most, int) and most < duration:
                    duration, cause = most, (why, f"{most} ms are allowed" if why == "policy" else "what the run has")
            return Grant({"tool_calls": 1, "duration": duration}, basis="enforced", because={"duration": cause})

        try:
            await admission.grant(within)
        except _Exhausted as error:
            await admission.effective({"tool_calls": 0}, cause="quota", because=str(error))
            await admission.reject("PARENT_EXHAUSTED", str(error))
            told |= {"error": f"refused: {error}", "spent": True}
            return
        begun, cancelled = time.monotonic(), False
        end: Awaitable[None] | None = None
        try:
            seconds = _amount(admission.record.granted["duration"]) / 1000
            text, is_error = await session.call(tool.name, arguments, seconds)
            told["error" if is_error else "text"] = text
            if is_error:  # in its own words it may hold what it was asked, which is on no record
                end = admission.fail("TOOL_ERROR", "the tool answered with an error")
        except asyncio.CancelledError:
            cancelled = True
            raise
        except ToolTimeout as error:
            told["error"] = str(error)
            end = admission.fail("TOOL_TIMEOUT", str(error))
        except ToolsUnavailable as error:
            told["error"] = "the tool server did not answer"
            end = admission.fail("TOOL_SERVER_FAILED", str(error))
        finally:
            await admission.used({"tool_calls": 1, "duration": round((time.monotonic() - begun) * 1000)})
            if cancelled:
                await admission.cancel("the run ended while the tool was asked")
        if end is not None:
            await end

    async def _call_agent(self, agent: Agent, arguments: Mapping[str, Any], told: dict[str, Any]) -> None:
        """Start a run of its own with this run's credential, and wait for it; it ends when nobody waits any more."""
        asked = {
            "deployment_id": str(self._body.deployment_id),
            "task": str(arguments.get("task") or self._body.task)[:4000],
            **agent.model_dump(mode="json", exclude_none=True),
        }
        headers = {"Authorization": f"Bearer {self._work.token}", "Prefer": "wait"}
        try:
            answer = await self._runs.http.post(f"{self._runs.url}/agents/runs", json=asked, headers=headers)
        except httpx.HTTPError as error:
            told["error"] = f"the agent did not answer: {type(error).__name__}"
            return
        told["envelope"] = answer.headers.get("execution-envelope")
        if answer.status_code != 200:
            with contextlib.suppress(ValueError):
                told["error"] = f"refused: {answer.json().get('detail')}"[:KEPT_TEXT]
            told.setdefault("error", f"refused: {answer.status_code}")
            return
        run = answer.json()
        told["run"] = run["id"]
        if run["status"] == "COMPLETED":
            told["text"] = run["answer"]
            told |= {"truncated": run["truncated"]} if run["truncated"] else {}
        else:
            told["error"] = f"{run['status']} {run['error_code']}: {run['error_message']}"

    def _tell(self) -> None:
        self._work.job.done = len(self._steps)
        self._work.save()
        self._runs.went_on()


def _none_allowed(admission: Admission) -> str | None:
    """Policy may leave a call nothing to be made of."""
    for name in ("tool_calls", "duration"):
        most = admission.limits.get(name)
        if isinstance(most, int) and most < 1:
            return f"policy allows {name} {most}"
    return None


def _reserved(admission: Admission, name: str) -> list[int]:
    """How much of each budget is reserved for it."""
    entries = admission.record.budgets.items()
    return [e.reserved for (_, _, resource), e in entries if resource == name and not e.shadow and not e.unknown]


def _amount(amount: Any) -> int:
    """An amount of a run, which is always known."""
    assert isinstance(amount, int)
    return amount
