"""What every template has: untrusted text made safe and short, times, links, commands to copy. No I/O.

Everything that a template prints goes through `printed` before it is escaped: no template can forget it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final
from urllib.parse import quote, urlencode

from fastapi import Request
from jinja2 import Environment, pass_context
from jinja2.runtime import Context
from markupsafe import Markup, escape

from execution_envelope.presentation import clean, when
from execution_envelope.presentation.text import ago, milliseconds

#: The longest text that a page prints in one place; of a longer one it says how long it is.
MAX_TEXT: Final = 600
#: The longest name in a line of a list.
MAX_NAME: Final = 60
#: The longest text inside of a link, an address or a command. Longer ones are refused where they come in.
MAX_ADDRESS: Final = 8000

#: State, decision, outcome, part of coverage -> the sign before the word, and how it is toned.
SIGNS: Final[Mapping[str, tuple[str, str]]] = {
    **dict.fromkeys(("held", "hold", "waiting"), ("◔", "wait")),
    **dict.fromkeys(("admitted", "open", "raised", "added", "substituted"), ("○", "open")),
    **dict.fromkeys(("granted", "running", "chosen"), ("●", "run")),
    **dict.fromkeys(("completed", "allow", "equal", "sound", "fulfilled", "approve", "keep", "answers"), ("✓", "good")),
    **dict.fromkeys(("up to date", "nearly up to date"), ("✓", "good")),
    **dict.fromkeys(("denied", "deny", "rejected", "failed", "refused", "violation", "damaged"), ("✕", "bad")),
    **dict.fromkeys(("withheld", "ignored", "unsound", "unreachable", "revoke"), ("✕", "bad")),
    **dict.fromkeys(("reduced", "warn", "unknown", "expired", "less", "behind", "flag", "late", "over"), ("▽", "warn")),
    **dict.fromkeys(("revoked", "abandoned", "revoking", "flagged"), ("◇", "warn")),
    **dict.fromkeys(("cancelled", "abstain", "observed", "considered", "tried", "none", "pending"), ("-", "quiet")),
}


def furnish(environment: Environment, assets: Mapping[str, str], **more: Any) -> None:
    """Give an environment what the templates use. `assets` are names of files -> their paths below the mount.

    `more` are further globals of the templates.
    """
    environment.finalize = printed
    environment.globals |= {
        **more,
        "link": _link,
        "path_of": _path_of,
        "asset": pass_context(lambda context, name: f"{context['base']}{assets[name]}"),
        "command": command,
        "sign": lambda word: SIGNS.get(word, ("·", "quiet")),
    }
    environment.filters |= {"time": time, "day": lambda at: str(at)[:10], "short": short, "ago": _ago, "whole": whole}


def printed(value: Any) -> Any:
    """A value as it may stand on a page: without control, direction and invisible characters, and not endless."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    text = clean(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text)} characters)"


def whole(value: Any) -> Markup:
    """A text that is sent back as it stands in a form: never cut. How long it may be is said where it comes in."""
    return escape(clean(str(value)))


def short(value: Any) -> str:
    """A name in a list; a long one is cut, its own page has it whole."""
    text = clean(str(value))
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}…"


def command(*words: str) -> Markup:
    """A command line for a shell, as text to copy: words that a shell would obey are quoted."""
    line = shlex.join(word if word.isprintable() else clean(word) for word in words)
    return escape(line[:MAX_ADDRESS])


def time(at: str | None) -> Markup:
    """A recorded time (RFC 3339, UTC), for people and for programs."""
    if not at:
        return Markup('<span class="quiet">-</span>')
    return Markup('<time datetime="{}">{}</time>').format(clean(at)[:40], when(clean(at)))


def address(base: str, path: str, parameters: Mapping[str, Any]) -> str:
    """A path below the mount with a query of what is not empty."""
    query = urlencode({name: value for name, value in parameters.items() if value not in (None, "", (), [])}, True)
    return f"{base}{quote(path, safe='/')}" + (f"?{query}" if query else "")


def _path_of(request: Request) -> str:
    """Where somebody is, to come back to: the path below the mount, with its query. Of a form, the first page."""
    if request.method != "GET":
        return "/"
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    return f"{path}?{request.url.query}" if request.url.query else path


@pass_context
def _link(context: Context, path: str, **parameters: Any) -> Markup:
    return escape(address(context["base"], path, parameters))


def _ago(at: str, now: datetime) -> str:
    return ago(milliseconds(at, now))
