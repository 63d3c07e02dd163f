"""Adapters: a service-specific request, as it arrived, to an `Ask`. Pure functions, one file for each family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from execution_envelope.envelope import Subject


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
