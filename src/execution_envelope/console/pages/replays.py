"""Results of replaying a policy over what was recorded: what it would have changed, for whom. Files in one folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, get_args

from fastapi import APIRouter, Request
from fastapi import Path as InPath
from fastapi.responses import HTMLResponse

from execution_envelope.console.access import Principal
from execution_envelope.console.charts import columns
from execution_envelope.console.who import Reader, Shared
from execution_envelope.errors import InvalidField, NotFound
from execution_envelope.presentation.text import counted
from execution_envelope.review.replay_result import MAX_BYTES, Affected, Meaning, ReplayResult, decode

router = APIRouter(include_in_schema=False)

#: Files that are looked at, the newest first; lines of the tables of one.
MAX_FILES: Final = 100
MAX_LINES: Final = 30
#: Days of the chart, the newest.
MAX_DAYS: Final = 90
_MEANINGS: Final = get_args(Meaning)
_NONE: Final = "expected a result of a replay, there is none of this name"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.json")


@router.get("/replays")
def replays(request: Request, shared: Shared, who: Reader) -> HTMLResponse:
    """The list."""
    found, unreadable = [], 0
    for file in _files(shared.replays):
        try:
            result = _read(file)
        except (InvalidField, OSError):
            unreadable += 1
            continue
        if not _concerns(result, who):
            continue
        own = _own(result, who)
        found.append(
            {
                "name": file.name,
                "at": result.at,
                "hook": result.hook,
                "revision": result.revision,
                "since": result.since,
                "until": result.until,
                "changed": str(result.changed) if own is None else _changed(own),
                "compared": str(result.compared) if own is None else _compared(own),
            }
        )
    return shared.page(
        request,
        "replays.html",
        title="Replays",
        here="/replays",
        there=shared.replays is not None,
        found=found,
        unreadable=unreadable if who.tenants is None else 0,
    )


@router.get("/replays/{name}")
def replay(name: Annotated[str, InPath(max_length=120)], request: Request, shared: Shared, who: Reader) -> HTMLResponse:
    """One of them."""
    file = next((file for file in _files(shared.replays) if file.name == name), None)
    if file is None:
        raise NotFound(_NONE)
    try:
        result = _read(file)
    except OSError:
        raise NotFound("expected a result of a replay, its file cannot be read") from None
    if not _concerns(result, who):
        raise NotFound(_NONE)
    own, since = _own(result, who), ("--since", result.since[:10]) if result.since else ()

    def seen(lines: Iterable[Any]) -> list[Any]:
        return [line for line in lines if who.tenants is None or line.tenant in who.tenants]

    whole = own is None
    tenants, subjects = seen(result.tenants_affected), seen(result.subjects_affected)
    # Which samples are kept, and which live ones are listed where there are many, depends on those of others.
    samples = list(result.samples) if whole else []
    live = seen(result.live_listed) if whole or result.live == len(result.live_listed) else []
    return shared.page(
        request,
        "replay.html",
        title=f"Replay {name}",
        here="/replays",
        name=name,
        result=result,
        whole=whole,
        changed=str(result.changed) if whole else _changed(tenants),
        compared=str(result.compared) if whole else _compared(tenants),
        meanings=_MEANINGS,
        words=("envelope", "replay", "--policy", "FILE", "--hook", result.hook, *since, "--out", name),
        matrix=_matrix(result) if whole else _matrix_of(tenants),
        **(_days(result) if whole else {"chart": None, "days": []}),
        rules=result.rules[:MAX_LINES] if whole else (),
        limits=result.limits[:MAX_LINES] if whole else (),
        obligations=result.obligations[:MAX_LINES] if whole else (),
        cannot=result.cannot if whole else (),
        tenants=tenants[:MAX_LINES],
        subjects=subjects[:MAX_LINES],
        samples=samples[:MAX_LINES],
        live=live[:MAX_LINES],
        live_said=counted(result.live if whole else len(live), "live envelope"),
        more=[
            (said, len(lines) - MAX_LINES)
            for said, lines in (("tenants", tenants), ("subjects", subjects), ("samples", samples), ("live", live))
            if len(lines) > MAX_LINES
        ],
    )


def _files(folder: Path | None) -> list[Path]:
    """Results in the folder, the newest first. Links are not followed."""
    if folder is None:
        return []
    found = []
    try:
        for file in folder.iterdir():
            if _NAME.fullmatch(file.name) and not file.is_symlink() and file.is_file():
                found.append((file.stat().st_mtime_ns, file.name, file))
    except OSError:
        return []
    return [file for *_, file in sorted(found, reverse=True)[:MAX_FILES]]


def _read(file: Path) -> ReplayResult:
    with file.open("rb") as opened:
        return decode(opened.read(MAX_BYTES + 1))


def _concerns(result: ReplayResult, who: Principal) -> bool:
    """Whether it is about any tenant that a principal sees."""
    return who.tenants is None or result.tenants is None or not who.tenants.isdisjoint(result.tenants)


def _own(result: ReplayResult, who: Principal) -> list[Affected] | None:
    """The tenants of a result that a principal sees; None for one who may see all of it."""
    if who.tenants is None or (result.tenants is not None and frozenset(result.tenants) <= who.tenants):
        return None
    return [one for one in result.tenants_affected if one.tenant in who.tenants]


def _changed(own: Iterable[Affected]) -> str:
    return str(sum(one.count for one in own if one.before != one.after))


def _compared(own: Iterable[Affected]) -> str:
    """Of tenants of which anything changes; of others a result says nothing."""
    return str(sum({one.tenant: one.compared or 0 for one in own}.values()))


def _matrix(result: ReplayResult) -> list[list[int]]:
    counts = Counter[tuple[str, str]]()
    for one in result.decisions:
        counts[one.before, one.after] += one.count
    return [[counts[before, after] for after in _MEANINGS] for before in _MEANINGS]


def _matrix_of(own: Iterable[Affected]) -> list[list[int]] | None:
    """Of some tenants only what changes is known."""
    counts = Counter[tuple[str, str]]()
    for one in own:
        counts[one.before, one.after] += one.count
    return [[counts[before, after] for after in _MEANINGS] for before in _MEANINGS]


def _days(result: ReplayResult) -> dict[str, Any]:
    same, changed = Counter[str](), Counter[str]()
    for one in result.days:
        (same if one.before == one.after else changed)[one.day] += one.count
    days = sorted(same.keys() | changed.keys())[-MAX_DAYS:]
    if not days:
        return {"chart": None, "days": []}
    series = {"same": [same[day] for day in days], "changed": [changed[day] for day in days]}
    words = {name: [str(value) for value in values] for name, values in series.items()}
    return {"chart": columns(days, series, words), "days": [(day, same[day], changed[day]) for day in days]}
