"""How sentences name amounts, values, times, and who asked. What others wrote stands in quotes, cut and on one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from execution_envelope.credentials import redact_text
from execution_envelope.envelope import Envelope, Execution, Party
from execution_envelope.lifecycle import Candidate
from execution_envelope.resources import VOCABULARY, Amount, Quantity, human
from execution_envelope.words import clean

#: What others wrote is cut at so many characters: a name, and a text.
MAX_NAME: Final = 80
MAX_QUOTE: Final = 600
#: The most items of one list in a sentence; the rest is counted.
MAX_LISTED: Final = 12

#: A word that does not end as a sentence does.
_PLAIN: Final = re.compile(r"[\w.:/@+#-]*[\w:/@+#-]", re.ASCII)

#: Resource -> what one, and what several, or a mass, of it are called.
NOUNS: Final[Mapping[str, tuple[str, str]]] = {
    "gpu": ("GPU", "GPUs"),
    "gpu_memory": ("of GPU memory", "of GPU memory"),
    "cpu": ("CPU core", "CPU cores"),
    "memory": ("of memory", "of memory"),
    "storage": ("of storage", "of storage"),
    "replicas": ("replica", "replicas"),
    "concurrency": ("request at a time", "requests at a time"),
    "context": ("token of context", "tokens of context"),
    "input_tokens": ("input token", "input tokens"),
    "output_tokens": ("output token", "output tokens"),
    "requests": ("request", "requests"),
    "samples": ("sample", "samples"),
    "bytes": ("of data", "of data"),
    "bandwidth": ("of bandwidth", "of bandwidth"),
    "rows": ("row", "rows"),
    "steps": ("step", "steps"),
    "tool_calls": ("tool call", "tool calls"),
    "duration": ("of time", "of time"),
    "cpu_time": ("of processor time", "of processor time"),
    "cost": ("of cost", "of cost"),
}
#: Kind of execution -> how it is asked for; the target follows.
ASKED_TO: Final[Mapping[str, str]] = {
    "model.deploy": "to deploy",
    "inference": "to use",
    "evaluation": "to evaluate",
    "data.move": "to move data of",
    "agent.run": "to run",
    "maintenance": "for maintenance of",
}


def quoted(text: str, limit: int = MAX_QUOTE) -> str:
    """A text that somebody wrote: in quotes, so that it is not taken for what the record says by itself."""
    return f'"{_cut(text, limit)}"'


def name(text: str) -> str:
    """A name that somebody wrote; in quotes unless it is a plain word."""
    cut = _cut(text, MAX_NAME)
    return cut if _PLAIN.fullmatch(cut) else f'"{cut}"'


def _cut(text: str, limit: int) -> str:
    line = " ".join(clean(redact_text(text)).split()).replace('"', "'")
    return line if len(line) <= limit else f"{line[:limit]}... ({len(line)} characters)"


def listed(items: Iterable[str], last: str = "and") -> str:
    """``a, b and c``; of very many some, and how many more."""
    found = list(items)
    if len(found) > MAX_LISTED:
        found[MAX_LISTED:] = [f"{len(found) - MAX_LISTED} more"]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} {last} {found[-1]}" if found else "nothing"


def names(items: Iterable[str]) -> str:
    """Several names, each once."""
    return listed(map(name, dict.fromkeys(items)))


def amount(resource: str, value: Amount | None) -> str:
    """``8 GPUs``, ``16 GiB of memory``, ``no replicas``, ``an unknown amount of GPUs``."""
    one, many = NOUNS.get(resource, (f"of {name(resource)}", f"of {name(resource)}"))
    bare = many.removeprefix("of ")
    if value is None:
        return f"nothing said of {bare}"
    if value == "unknown":
        return f"an unknown amount of {bare}"
    if value == "unlimited":
        return f"unlimited {bare}"
    if value == 0:
        return f"no {bare}"
    shown = human(resource, value) if resource in VOCABULARY else str(value)
    return f"{shown} {one if shown == '1' else many}"


def bare_amount(resource: str, value: Amount) -> str:
    """The amount without what it is of; zero in digits."""
    return human(resource, value) if resource in VOCABULARY else str(value)


def quantity(resource: str, value: Quantity) -> str:
    """With what it is counted for, and its bounds."""
    said = amount(resource, value.amount) + each(value.per)
    bounds = [f"at least {bare_amount(resource, value.floor)}"] if value.floor is not None else []
    bounds += [f"at most {bare_amount(resource, value.ceiling)}"] if value.ceiling is not None else []
    return f"{said} ({', '.join(bounds)})" if bounds else said


def each(per: str) -> str:
    """What an amount is counted for."""
    return "" if per == "total" else f" per {per}"


def value(key: str, content: Any) -> str:
    """A constraint: ``engine vllm``, ``regions "['eu','us']"``."""
    return f"{name(key)} {bare_value(content)}"


def bare_value(content: Any) -> str:
    """The value of a constraint without its key."""
    return name(content if isinstance(content, str) else msgspec.json.encode(content).decode())


def some_times(count: int) -> str:
    """``once``, ``3 times``."""
    return "once" if count == 1 else f"{count} times"


def moment(at: str) -> str:
    """``on 27 November 2026 at 11:02 UTC``; a time that cannot be read as it stands."""
    with suppress(ValueError):
        found = datetime.fromisoformat(at)
        return "on " + _date(found if found.tzinfo is None else found.astimezone(UTC)) + " UTC"
    return f"at {name(at)}"


def deadline(at: str) -> str:
    """The same without ``on``: until 27 November 2026 at 11:02 UTC."""
    return moment(at).removeprefix("on ").removeprefix("at ")


def _date(at: datetime) -> str:
    return f"{at.day} {at:%B} {at.year} at {at:%H:%M}"


def passed(start: str, now: datetime) -> int | None:
    """Milliseconds from a recorded time to now; None when it cannot be read."""
    with suppress(ValueError, TypeError):
        return round((now - datetime.fromisoformat(start)).total_seconds() * 1000)
    return None


def party(of: Party) -> str:
    """``alice`` of a user, ``agent planner`` of others."""
    return name(of.id) if of.type == "user" else f"{name(of.type)} {name(of.id)}"


def asker(envelope: Envelope) -> str:
    """``alice (tenant acme), through agent planner``: who wants it first, the one that acted last."""
    identity = envelope.identity
    outermost, *through = (*identity.delegation, identity.subject)
    tenant = "no tenant" if identity.tenant is None else f"tenant {name(identity.tenant)}"
    said = f"{party(outermost)} ({tenant})"
    return said + (f", through {', through '.join(map(party, through))}," if through else "")


def target(execution: Execution) -> str:
    """``model smollm2 version q4``."""
    found = execution.target
    return f"{name(found.type)} {name(found.id)}" + (f" version {name(found.version)}" if found.version else "")


def candidates(seen: Sequence[Candidate]) -> str:
    """``n1 was chosen; n2 was refused ("only 100 MiB are free")``."""
    said = [
        f"{name(one.name)} was {one.outcome}" + (f" ({quoted(one.reason)})" if one.reason else "")
        for one in seen[:MAX_LISTED]
    ]
    return "; ".join(said + ([f"and {len(seen) - MAX_LISTED} more"] if len(seen) > MAX_LISTED else []))
