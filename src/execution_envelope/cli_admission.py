"""The commands of `envelope` for what is decided at the seam: hooks, plans, approval, budgets.

The first three need the backend's own controller, because its hooks decide: `--controller MODULE:NAME`.
"""

from __future__ import annotations

import getpass
import importlib
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
import click
import msgspec
from rich.table import Table

from execution_envelope import presentation
from execution_envelope.budgets import Balance, Key, window_ends
from execution_envelope.cli_shared import (
    Problem,
    json_option,
    ledger_option,
    new_console,
    opened,
    print_json,
    print_text,
    resolve,
)
from execution_envelope.controller import AdmissionController
from execution_envelope.decision import Decider, Hook
from execution_envelope.document import AskDocument
from execution_envelope.envelope import Ask, Subject
from execution_envelope.errors import Denied, Held
from execution_envelope.judge import Plan
from execution_envelope.resources import human

T = TypeVar("T")

CONTROLLER: Final = "EXECUTION_ENVELOPE_CONTROLLER"
#: How many executions are named that hold a budget.
MAX_HOLDERS: Final = 20

controller_option: Final = click.option(
    "--controller",
    "name",
    metavar="MODULE:NAME",
    envvar=CONTROLLER,
    help=f"The backend's controller, or a function that returns it; else {CONTROLLER} names it.",
)
_SUBJECT: Final = (
    click.option("--as", "who", metavar="TYPE:ID", help="Who says so; else the user of this machine who runs this."),
    click.option("--tenant", help="Their tenant."),
    click.option("--role", "roles", multiple=True, metavar="ROLE", help="A role of theirs; may be repeated."),
    click.option("--reason", required=True, help="Why; it is recorded."),
)


def add_to(group: click.Group) -> None:
    """Make them commands of the group; its context's object is the URL of the ledger, or None."""
    for command in (hooks, plan, approve, deny, budgets):
        group.add_command(command)


@click.command()
@controller_option
@json_option
def hooks(name: str | None, as_json: bool) -> None:
    """Print the hooks of a backend, in order, each with its declaration."""
    with named_controller(click.get_current_context(), name) as controller:
        found = list(controller.hooks)
        policies = [problem for hook in found if (problem := getattr(hook, "problem", None))]
    if as_json:
        for hook in found:
            print_json(_declared(hook))
        return
    for place, hook in enumerate(found, start=1):
        said = _declared(hook)
        print_text(f"{place}. {said['name']} {said['version']}, {said['sort']}, {said['mode']}")
        print_text(f"   kinds: {', '.join(said['kinds'] or ['all'])}; asked at: {', '.join(said['phases'])}")
        timeout = "that of all" if said["timeout"] is None else f"{said['timeout']:g} s"
        effects = {None: "not said", True: "some", False: "none"}[said["side_effects"]]
        failing = f"when it fails: {said['failure_mode']}; " if said["failure_mode"] else ""
        print_text(f"   runs in: {said['runs']}; deadline: {timeout}; {failing}side effects: {effects}")
    if not found:
        print_text("no hooks: every request is admitted, undecided")
    for problem in policies:
        print_text(problem)


@click.command()
@controller_option
@json_option
@click.argument("file", type=click.File("rb"), metavar="ASK")
def plan(name: str | None, as_json: bool, file: Any) -> None:
    """Say what would happen to a request now; nothing is recorded, reserved or admitted.

    ASK is a JSON file with the fields of an ask (kind, operation, target, subject, scope, requested, constraints),
    or - for standard input. Hooks that have side effects, or do not say, are left out. Exit status: 0 it would be
    admitted, 1 it would not.
    """
    ask = _ask(file.read())
    with named_controller(click.get_current_context(), name) as controller:
        found = run(lambda: controller.plan(ask))
    if as_json:
        print_json(_plan_data(found), indent=2)
    else:
        print_text("\n".join(_plan_lines(found)))
    if found.outcome != "admitted":
        raise SystemExit(1)


def subject_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say who says something, and why."""
    for option in reversed(_SUBJECT):
        command = option(command)
    return command


@click.command()
@controller_option
@json_option
@subject_options
@click.argument("id", metavar="ID")
def approve(name: str | None, as_json: bool, id: str, **said: Any) -> None:
    """Let a held request go on: its caller sends it again and is admitted.

    The backend's own deciders say who may. Nobody approves what they asked for themselves.
    """
    _say(name, as_json, id, "approve", **said)


@click.command()
@controller_option
@json_option
@subject_options
@click.argument("id", metavar="ID")
def deny(name: str | None, as_json: bool, id: str, **said: Any) -> None:
    """Refuse a held request: it stays denied."""
    _say(name, as_json, id, "deny", **said)


@click.command()
@ledger_option
@json_option
@click.option("--window", help="Only of this window: now, a day (2026-05-01) or a month (2026-05).")
@click.argument("account", required=False)
@click.pass_context
def budgets(context: click.Context, url: str | None, as_json: bool, window: str | None, account: str | None) -> None:
    """Show what stands in the accounts of budgets; with ACCOUNT also who holds it, and when it frees."""
    with opened(context, url) as ledger:
        found = ledger.balances(account=account, window=window)
        holders = {
            key: ledger.holders(key, MAX_HOLDERS)
            for balance in (found if account is not None or as_json else ())
            if (key := Key(balance.account, balance.window, balance.resource))
        }
    if account is not None and not found:
        raise Problem(f"expected an account of a budget, nothing was ever entered for `{account}`")
    if as_json:
        for balance in found:
            print_json(_balance_data(balance, *holders[Key(balance.account, balance.window, balance.resource)]))
        return
    if not found:
        print_text("no budgets: nothing was ever reserved" + (f" in window {window}" if window else ""))
        return
    table = Table("account", "window", "resource", "reserved", "spent", "limit", "free", "unknown")
    for balance in found:
        amounts = (balance.reserved, balance.spent, balance.limit, abs(balance.free))
        *said, free = (human(balance.resource, amount) for amount in amounts)
        sign, unknown = "-" if balance.free < 0 else "", str(balance.unknown or "-")
        table.add_row(balance.account, balance.window, balance.resource, *said, f"{sign}{free}", unknown)
    new_console().print(table)
    for key, (held, more) in holders.items():
        end = window_ends(key.window)
        print_text(f"{key.account} ({key.window}) frees {f'at {end:%Y-%m-%dT%H:%MZ}' if end else 'as its holders end'}")
        for holding in held:
            print_text(f"  {holding.envelope} holds {human(key.resource, holding.reserved)}")
        if more:
            print_text(f"  and {more} more")


# Who decides


@contextmanager
def named_controller(context: click.Context, name: str | None) -> Iterator[AdmissionController]:
    """The controller that ``MODULE:NAME`` stands for, or what the function of that name returns."""
    if context.obj is not None:
        raise Problem("expected --controller alone, it names its ledger itself - at --ledger")
    if not name:
        raise Problem(f"expected a controller, none is named: use --controller MODULE:NAME or {CONTROLLER}")
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise Problem(f"expected MODULE:NAME, got `{name}` - at --controller")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        if not isinstance(found, AdmissionController):
            found = found()
    except Exception as error:
        raise Problem(f"expected a controller, `{name}` cannot be had: {error} - at --controller") from error
    finally:
        sys.path.pop(0)
    if not isinstance(found, AdmissionController):
        raise Problem(f"expected a controller, `{name}` is a `{type(found).__name__}` - at --controller")
    try:
        yield found
    finally:
        anyio.run(found.aclose)


def run(call: Callable[[], Awaitable[T]]) -> T:
    """Call it in an event loop."""

    async def run() -> T:
        return await call()

    return anyio.run(run)


def subject_of(who: str | None, tenant: str | None, roles: tuple[str, ...]) -> Subject:
    """Who says so, by the `subject_options`."""
    sort, colon, subject = (who or f"user:{_login()}").partition(":")
    if not colon or not sort or not subject:
        raise Problem(f"expected TYPE:ID such as user:dana, got `{who}` - at --as")
    return Subject(sort, subject, tenant=tenant, roles=roles, method="command line")


def _say(
    name: str | None,
    as_json: bool,
    id: str,
    decision: str,
    *,
    who: str | None,
    tenant: str | None,
    roles: tuple[str, ...],
    reason: str,
) -> None:
    by = subject_of(who, tenant, roles)
    with named_controller(click.get_current_context(), name) as controller:
        say = controller.approve if decision == "approve" else controller.deny
        id = resolve(controller.ledger, id)
        try:
            record = run(lambda: say(id, by=by, reason=reason))
        except (Denied, Held) as refused:
            raise Problem(f"{by.id} may not {decision}: {refused}") from refused
    said = record.approval
    until = getattr(said and said.data, "expires_at", None)
    if as_json:
        print_json({"id": record.id, "decision": decision, "by": f"{by.type}:{by.id}", "expires_at": until})
    elif decision == "approve":
        print_text(f"approved {record.id}: its caller may send it again until {presentation.when(until or '')}")
    else:
        print_text(f"denied {record.id}")


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        return str(os.getuid())


# What is printed


def _declared(hook: Hook) -> dict[str, Any]:
    declared = hook.declaration
    decides = isinstance(hook, Decider)
    if not decides:
        runs = "thread of its own"
    elif declared.isolated:
        runs = "process of its own"
    else:
        is_async = inspect.iscoroutinefunction(getattr(hook, "decide", None))
        runs = "event loop" if is_async or declared.inline else "thread"
    canary = declared.mode == "shadow" and declared.enforce_share
    share = f", enforced for {declared.enforce_share:.0%}" if canary else ""
    return {
        "name": declared.name,
        "version": declared.version,
        "sort": "decider" if decides else "observer",
        "kinds": None if declared.kinds is None else sorted(declared.kinds),
        "phases": sorted(declared.phases) if decides else ["after the commit"],
        "side_effects": declared.side_effects,
        "timeout": declared.timeout,
        "failure_mode": declared.failure_mode if decides else None,
        "mode": f"{declared.mode}{share}" if decides else "observes",
        "runs": runs,
    }


def _ask(data: bytes) -> Ask:
    try:
        return msgspec.json.decode(data, type=AskDocument).ask(by="file")
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise Problem(f"expected an ask in JSON: {error}") from error


def _plan_lines(found: Plan) -> Iterator[str]:
    yield f"would be {found.outcome}" + (", undecided: no decider covers this kind" if found.undecided else "")
    for verdict in found.verdicts:
        shadow = " (in shadow)" if verdict.shadow else ""
        yield f"  {verdict.hook} {verdict.version}: {verdict.decision}{shadow}" + "".join(
            f"; {said}" for said in (verdict.code, verdict.message, *verdict.errors) if said
        )
    for name, reason in found.skipped.items():
        yield f"  {name}: not asked, {reason}"
    for name, amount in found.limits.items():
        yield f"at most {human(name, amount)} {name}"
    for name, values in found.allowed.items():
        yield f"{name} only {' or '.join(map(str, values))}"
    for duty in found.obligations:
        yield f"obligation {duty.name}" + (f": {duty.text}" if duty.text else "")
    if found.cost is not None:
        yield f"would cost at most {human('cost', found.cost)}"
    for room in found.budgets:
        resource = room.entry.resource
        free = human(resource, max(0, room.balance.free))
        yield f"budget {room.entry.account}: takes {human(resource, room.entry.reserved)} of {free} free {resource}"


def _plan_data(found: Plan) -> dict[str, Any]:
    return {
        "outcome": found.outcome,
        "undecided": found.undecided,
        "reasons": [asdict(reason) for reason in found.reasons],
        "verdicts": msgspec.to_builtins(found.verdicts),
        "limits": found.limits,
        "allowed": msgspec.to_builtins(found.allowed),
        "obligations": msgspec.to_builtins(found.obligations),
        "budgets": [
            {**msgspec.to_builtins(room.balance), "takes": room.entry.reserved, "fits": room.fits}
            for room in found.budgets
        ],
        "cost": found.cost,
        "skipped": dict(found.skipped),
    }


def _balance_data(balance: Balance, held: Any, more: int) -> dict[str, Any]:
    end = window_ends(balance.window)
    return {
        **msgspec.to_builtins(balance),
        "free": balance.free,
        "frees_at": None if end is None else end.isoformat(),
        "holders": [{"envelope": holding.envelope, "reserved": holding.reserved} for holding in held],
        "more_holders": more,
    }
