"""`envelope serve` and `envelope token`: the console and the HTTP API, and who may look."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import anyio
import click

from execution_envelope.cli_admission import CONTROLLER, named_controller
from execution_envelope.cli_shared import (
    ENV,
    FILE,
    FOLDER,
    Problem,
    json_option,
    ledger_option,
    print_json,
    say,
    utc_now,
)
from execution_envelope.console.access import ROLES, Authenticator
from execution_envelope.console.tokens import TokenFile, add_token
from execution_envelope.controller import AdmissionController
from execution_envelope.ledger import open_ledger
from execution_envelope.review import Review

#: Where tokens are kept when no file is named.
TOKENS: Final = "envelope-tokens.toml"
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
#: How long requests may take to their end when the server is ended, in seconds.
GRACE: Final = 5


def add_to(group: click.Group) -> None:
    """Make them commands of the group; its context's object is the URL of the ledger, or None."""
    group.add_command(serve)
    group.add_command(token)


@click.command(short_help="Serve the console and the HTTP API.")
@ledger_option
@click.option(
    "--controller",
    "name",
    metavar="MODULE:NAME",
    help=f"The controller whose ledger it is, to approve, deny and revoke too; else {CONTROLLER}.",
)
@click.option("--policy", type=FILE, metavar="FILE", help="A policy file that decides; with --ledger.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=8484, show_default=True, help="0 takes a free one.")
@click.option("--tokens", type=FILE, metavar="FILE", help=f"Who may look; else {TOKENS}, made at the first start.")
@click.option("--oidc-issuer", metavar="URL", help="Take tokens that this OpenID Connect issuer signed, too.")
@click.option("--oidc-audience", metavar="TEXT", help="The audience that such tokens have to be for.")
@click.option("--replays", type=FOLDER, metavar="FOLDER", help="Show the results of `envelope replay --out` in it.")
@click.option("--tls-cert", type=FILE, metavar="FILE", help="Serve https with this certificate.")
@click.option("--tls-key", type=FILE, metavar="FILE", help="And this key.")
@click.option(
    "--behind-tls-proxy",
    is_flag=True,
    help="Listen without TLS: a proxy has it, at the address FORWARDED_ALLOW_IPS, else at 127.0.0.1.",
)
@click.option("--root-path", default="", metavar="PATH", help="Where a proxy puts it, such as /envelopes.")
@click.pass_context
def serve(
    context: click.Context,
    url: str | None,
    name: str | None,
    policy: Path | None,
    host: str,
    port: int,
    tokens: Path | None,
    oidc_issuer: str | None,
    oidc_audience: str | None,
    replays: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    behind_tls_proxy: bool,
    root_path: str,
) -> None:
    """Serve the console and the HTTP API over a ledger. Ctrl-C ends it.

    It looks after open envelopes every 30 s: holds expire, and what a client that is gone never bound is abandoned.

    Who may look is said by a token file; without one it is made, with one token that may see everything, which is
    printed this once. Tokens never go over the network in the clear: elsewhere than on this machine it takes TLS.
    """
    if (tls_cert is None) != (tls_key is None):
        raise Problem("expected --tls-cert and --tls-key together")
    if (oidc_issuer is None) != (oidc_audience is None):
        raise Problem("expected --oidc-issuer and --oidc-audience together")
    if host not in _LOOPBACK and tls_cert is None and not behind_tls_proxy:
        raise Problem(f"expected --tls-cert, or --behind-tls-proxy, to listen at `{host}`: tokens would be readable")
    if policy is not None and name:
        raise Problem("expected --policy or --controller, got both")
    try:  # an extra, and slow to import
        import uvicorn

        from execution_envelope.console.announced import Announced
        from execution_envelope.console.app import create_app
        from execution_envelope.console.headers import OverHttps
    except ModuleNotFoundError as missing:
        raise Problem(
            f"expected the extra `console` of execution-envelope, `{missing.name}` is not installed"
        ) from None

    with ExitStack() as stack:
        controller, decides = stack.enter_context(_served(context, url, name, policy))
        app = create_app(
            Review(controller.ledger, clock=utc_now),
            authenticators=_authenticators(tokens, oidc_issuer, oidc_audience),
            controller=controller if decides else None,
            replays=replays,
            keeper=controller,
        )
        if behind_tls_proxy:
            app.add_middleware(OverHttps)
        tls = {} if tls_cert is None else {"ssl_certfile": str(tls_cert), "ssl_keyfile": str(tls_key)}
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            root_path=root_path.rstrip("/"),
            log_level="warning",
            server_header=False,
            proxy_headers=behind_tls_proxy,
            timeout_graceful_shutdown=GRACE,
            **tls,  # type: ignore[arg-type]
        )
        if hasattr(signal, "SIGPIPE"):
            # A client that went away ends nothing.
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        with suppress(KeyboardInterrupt):  # what was under way is answered, or was cut
            Announced(app, config).run()


@contextmanager
def _served(
    context: click.Context, url: str | None, name: str | None, policy: Path | None
) -> Iterator[tuple[AdmissionController, bool]]:
    """The controller over what is served, and whether it decides anything."""
    name = name or (None if policy or url or context.obj else os.environ.get(CONTROLLER))
    if name:
        with named_controller(context, name) as found:
            yield found, True
        return
    url = url or context.obj or os.environ.get(ENV)
    if not url:
        raise Problem(f"expected a ledger, none is named: use --ledger sqlite:///envelopes.db or {ENV}")
    looked = open_ledger(url, read_only=True)  # it has to be there: none is made
    try:
        looked.count()
    finally:
        looked.close()
    options: dict[str, Any] = {"component": "console"}
    if policy is not None:
        from execution_envelope.policy.file import PolicyFile  # an extra

        file = PolicyFile(policy, watch=True)
        options |= {"hooks": [file.decider], "budgets": lambda: file.budgets, "approvals": lambda: file.approvals}
    controller = AdmissionController.open(url, **options)
    try:
        yield controller, policy is not None
    finally:
        anyio.run(controller.aclose)


def _authenticators(file: Path | None, issuer: str | None, audience: str | None) -> list[Authenticator]:
    found: list[Authenticator] = []
    if file is None and issuer is None and not Path(TOKENS).exists():
        made = add_token(Path(TOKENS), subject="user:local", tenants="*", roles=["operator", "auditor"], expires=None)
        say(f"made {TOKENS} with one token, which sees everything and is shown this once: {made}")
    if file is not None or Path(TOKENS).exists():
        found.append(TokenFile(file or Path(TOKENS), clock=utc_now))
    if issuer is not None and audience is not None:
        from execution_envelope.console.oidc import OidcIssuer  # an extra

        found.append(OidcIssuer(issuer, audience=audience))
    return found


@click.command(short_help="Make a token for somebody to look with.")
@json_option
@click.option("--tokens", type=FILE, metavar="FILE", default=TOKENS, show_default=True, help="The token file.")
@click.option("--subject", required=True, metavar="TYPE:ID", help="Who holds it, such as user:dana.")
@click.option("--tenant", "tenants", multiple=True, help="Whose envelopes it sees; may be repeated.")
@click.option("--all-tenants", is_flag=True, help="It sees everybody's.")
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice(list(ROLES)),
    default=["reader"],
    show_default=True,
    help="What it may do; may be repeated.",
)
@click.option("--days", type=click.IntRange(min=1, max=3650), help="For so many days; else until it is taken out.")
def token(
    as_json: bool,
    tokens: Path,
    subject: str,
    tenants: tuple[str, ...],
    all_tenants: bool,
    roles: tuple[str, ...],
    days: int | None,
) -> None:
    """Make a token, and add its digest to the token file. The token itself is printed this once and kept nowhere.

    A server that runs takes it up at once; to take it away again, delete its entry.
    """
    if all_tenants == bool(tenants):
        raise Problem("expected --tenant or --all-tenants")
    expires = None if days is None else utc_now() + timedelta(days=days)
    made = add_token(
        tokens, subject=subject, tenants="*" if all_tenants else list(tenants), roles=list(roles), expires=expires
    )
    if as_json:
        print_json({"token": made, "subject": subject, "expires": expires and expires.isoformat()})
    else:
        click.echo(made)
