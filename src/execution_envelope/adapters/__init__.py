"""Adapters: a service-specific request, as it arrived, to an `Ask`. Pure functions, one file for each family.

An adapter is any callable of a body and a `Context`: a table (`declared.Mapped`) or a function. A package makes its own
known by an entry point of the group `GROUP`::

    [project.entry-points."execution_envelope.adapters"]
    "example.job" = "example.admission:describe_job"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Final, TypeAlias, cast

from execution_envelope.credentials import brief, invalid, shown
from execution_envelope.envelope import Ask, Subject

#: The group of entry points that name adapters.
GROUP: Final = "execution_envelope.adapters"


@dataclass(frozen=True, slots=True)
class Context:
    """What an adapter may look at beside the body.

    `surface` is method and path; `headers` has lower-case names, without `authorization`, `cookie` and their like.
    """

    surface: str
    path_params: Mapping[str, Any]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    subject: Subject | None


#: An adapter: the body as it arrived, and the context, to an ask. It raises nothing but `InvalidField`.
Describe: TypeAlias = Callable[[Any, Context], Ask]


def available() -> list[str]:
    """The names of all adapters that installed packages make known, sorted."""
    return sorted(entry_points(group=GROUP).names)


def load(name: str) -> Describe:
    """The adapter of this name, from the package that makes it known.

    Raises `InvalidField` for a name that none or several packages give, and for what cannot be imported or called.
    """
    if not isinstance(name, str):
        raise invalid("adapter", f"expected the name of an adapter, got `{type(name).__name__}`")
    found = tuple(entry_points(group=GROUP, name=name))
    if not found:
        raise invalid("adapter", f"expected one of {', '.join(available()) or 'none'}, got {shown(name)}")
    places = sorted({point.value for point in found})
    if len(places) > 1:
        raise invalid("adapter", f"expected one place for {shown(name)}, got {', '.join(map(_brief, places))}")
    try:
        adapter = found[0].load()
    except Exception as error:  # whatever a module of somebody else raises when it is imported
        told = f"expected {shown(name)} to be found in {_brief(places[0])}, got {type(error).__name__}: "
        raise invalid("adapter", told + brief(str(error), 200)) from error
    if not callable(adapter):
        raise invalid("adapter", f"expected a callable in {_brief(places[0])}, got `{type(adapter).__name__}`")
    return cast(Describe, adapter)


def _brief(place: str) -> str:
    return shown(place, 128)
