"""`python -m proving_ground`: serve on 127.0.0.1 until Ctrl-C."""

import contextlib
import os
import socket
import stat
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import uvicorn

from execution_envelope.console.app import end_streams
from proving_ground.admission import ledger_url
from proving_ground.app import create_app
from proving_ground.auth import demo_tokens, write_demo
from proving_ground.catalog import SMOLLM2, Catalog
from proving_ground.settings import Settings

_NEXT = """\
Try it, in another terminal (.venv/bin/python has kamiwaza-sdk):

    from kamiwaza_sdk import KamiwazaClient
    client = KamiwazaClient("{url}/api", api_key="{token}")
    deployment = client.serving.deploy_model(repo_id="{model}", poll_interval_seconds=0.2)
    chat = client.openai.get_client(deployment_id=deployment).chat.completions
    print(chat.create(model="", messages=[{{"role": "user", "content": "Say hello."}}]).choices[0].message.content)

Then read who asked for what, and what was given:

    export EXECUTION_ENVELOPE_LEDGER={ledger}
    .venv/bin/envelope list
    .venv/bin/envelope show deployment:DEPLOYMENT_ID

Who may do what, limits, budgets and approval are in {policy}; change it while this runs:

    export DATA={data} POLICY={policy} EXECUTION_ENVELOPE_CONTROLLER=proving_ground.admission:controller
    .venv/bin/envelope hooks
    .venv/bin/envelope budgets

"Policy, budgets, approval, live" in README.md goes on from here.

The console is at {url}/console/: sign in with dana's token; with kim's, who may approve what dana may not, her own; or
with ada's, who sees all tenants. What another policy would have said of all this is shown there, too:

    .venv/bin/envelope replay --policy FILE --out {data}/replays/FILE.json
"""


def main(catalog: Catalog | None = None) -> None:
    """Read the settings, say where everything is, and serve. `catalog` replaces the built-in one."""
    try:
        settings = Settings.from_env()
        _own(settings.data)
        if not settings.tokens.exists():
            write_demo(settings.tokens)
        tokens = demo_tokens(settings.tokens)
        listener = _listen(settings.port)
        settings = replace(settings, port=listener.getsockname()[1])  # runs call this backend by it
        app = create_app(settings, catalog=catalog)
    except (ValueError, OSError) as error:
        sys.exit(f"cannot start: {error}")
    server = _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))

    async def before_end() -> None:
        end_streams(app.state.console)
        await app.state.backend.jobs.end()

    server.before_end = before_end
    server.greeting = _greeting(settings, f"http://127.0.0.1:{settings.port}", tokens)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended everything in order and then passes it on
        server.run(sockets=[listener])
    if not server.started:
        sys.exit("cannot start, see above")


class _Server(uvicorn.Server):
    """Says where it serves once it does, and ends what calls it before it ends itself."""

    greeting = ""
    before_end: Callable[[], Awaitable[None]]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            sys.stdout.write(self.greeting)
            sys.stdout.flush()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.before_end()
        await super().shutdown(sockets)


def _greeting(settings: Settings, url: str, tokens: dict[str, str]) -> str:
    lines = [f"token of {subject}: {token}" for subject, token in tokens.items()]
    lines += [] if tokens else [f"tokens: as in {settings.tokens}"]
    lines += [f"data: {settings.data}", f"ledger: {ledger_url(settings)}"]
    if settings.keep_engines:
        lines += ["engines are kept when this backend ends; stop their deployments to end them"]
    lines += [
        _NEXT.format(
            ledger=ledger_url(settings),
            url=url,
            token=tokens.get("dana", "<a token>"),
            model=SMOLLM2,
            policy=settings.policy,
            data=settings.data,
        )
    ]
    return "\n".join([*lines, f"serving on {url}"]) + "\n"


def _own(data: Path) -> None:
    """The data directory with what is in it is readable by its owner only, whatever it was before this start."""
    os.umask(0o077)  # for what this process and its children write from now on
    data.mkdir(parents=True, exist_ok=True)
    data.chmod(0o700)
    for path in data.iterdir():
        found = path.lstat()
        if (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)) and found.st_uid == os.getuid():
            path.chmod(stat.S_IMODE(found.st_mode) & 0o700)


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


if __name__ == "__main__":
    main()
