"""Writes the reference pages that are drawn from the code: `make docs`. A test holds them equal."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from execution_envelope import (
    answers,
    budgets,
    counters,
    credentials,
    criteria,
    envelope,
    grant,
    hooks,
    journal,
    lifecycle,
    query,
    resources,
)
from execution_envelope.adapters import kamiwaza, mcp, openai, ray
from execution_envelope.adapters.declared import (
    MAX_SECRET_DEPTH,
    MAX_SECRET_NAMES,
    Always,
    Header,
    Mapped,
    Names,
    Raw,
)
from execution_envelope.admission import MAX_CONFLICTS
from execution_envelope.attempted import ATTEMPTED_BURST, ATTEMPTED_PER_SECOND
from execution_envelope.console import access, asserted, live, markup, oidc, sessions, sheet, signin, tokens
from execution_envelope.console import limits as console_limits
from execution_envelope.console.app import create_app
from execution_envelope.console.clients import MAX_OF_SERVICE, MAX_SESSIONS, SILENT
from execution_envelope.console.ledger_routes import MAX_LOOKED
from execution_envelope.console.pages import budgets as budgets_page
from execution_envelope.console.pages import replays
from execution_envelope.console.problems import MEANINGS
from execution_envelope.controller import AdmissionController
from execution_envelope.decision import CODES
from execution_envelope.family import MAX_LEVELS, MAX_PARENTS, MAX_TREE
from execution_envelope.ledger import open_ledger, remote_http, wire
from execution_envelope.ledger.chain import Entry
from execution_envelope.ledger.contract import MAX_ATTEMPTED
from execution_envelope.ledger.postgres_database import TIMEOUT
from execution_envelope.ledger.projection import MAX_CURSOR, MAX_PAGE
from execution_envelope.ledger.projection_sqlite import MAX_IN_MEMORY
from execution_envelope.ledger.recomputation import MAX_FINDINGS
from execution_envelope.ledger.search import LOOK, MAX_SURE
from execution_envelope.ledger.segments import PATIENCE as SEGMENT_PATIENCE
from execution_envelope.ledger.spool import MAX_SPOOLED
from execution_envelope.ledger.sqlite_database import BUSY_TIMEOUT, MAX_SEGMENTS
from execution_envelope.ledger.writer import MAX_GROUP, MAX_WAITING
from execution_envelope.observed import MAX_SKEW
from execution_envelope.observers import MAX_WAITING as MAX_UNTOLD
from execution_envelope.reconciliation import PATIENCE, PROBE_TIMEOUT
from execution_envelope.reporting import MAX_LINE
from execution_envelope.review import Review
from execution_envelope.review.catching_up import PATIENCE as MAX_WAIT
from execution_envelope.review.explain.explanation import MAX_SENTENCES
from execution_envelope.review.explain.sections import MAX_ACCOUNTS
from execution_envelope.review.explain.wording import MAX_NAME, MAX_QUOTE
from execution_envelope.review.review import MAX_COUNTED
from execution_envelope.reviewer import MAX_REVOCATIONS, REVOKE_TIMEOUT
from execution_envelope.reviewing import MAX_REVIEWS, MAX_SILENCE
from execution_envelope.reviewing import MAX_THREADS as MAX_REVIEW_THREADS
from execution_envelope.simulation import MAX_COUNT, MAX_DAYS

HERE = Path(__file__).parent / "reference"


def pages() -> dict[Path, str]:
    """Path -> text of every generated page."""
    return {
        HERE / "lifecycle.md": _lifecycle(),
        HERE / "resources.md": _resources(),
        HERE / "limits.md": _limits(),
        HERE / "query.md": _query(),
        HERE / "reason-codes.md": _codes(),
        HERE / "counters.md": _counters(),
        HERE / "credentials.md": _credentials(),
        HERE / "adapters.md": _adapters(),
        HERE / "access.md": _access(),
        HERE / "http-api.md": _http_api(),
        HERE / "openapi.json": json.dumps(_console().openapi(), indent=2, ensure_ascii=False) + "\n",
        HERE / "envelope.schema.json": _schema(envelope.Envelope),
        HERE / "event.schema.json": _schema(Entry),
    }


def _schema(of: type) -> str:
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(of), order="sorted"), indent=2).decode() + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _lifecycle() -> str:
    rows = [
        (
            f"**{state}**" if state in lifecycle.TERMINAL else state,
            ", ".join(sorted(lifecycle.TRANSITIONS[state])) or "nothing: this is an end",
            ", ".join(sorted(lifecycle.NOTES[state])),
        )
        for state in lifecycle.TRANSITIONS
    ]
    events = [
        (f"`{event.__struct_config__.tag}`", " ".join((event.__doc__ or "").split()))
        for event in msgspec.inspect.type_info(lifecycle.EventData).types  # type: ignore[attr-defined]
        for event in [event.cls]
    ]
    return (
        "# Lifecycle\n\nAn event that changes the state is named after the state it leads to. Ends are bold; what "
        "comes after an end is kept as `late`.\n\n"
        + _table(("state", "may become", "may also record"), rows)
        + "\n## Events\n\nTheir fields: [event.schema.json](event.schema.json).\n\n"
        + _table(("event", "what it says"), events)
    )


def _resources() -> str:
    parts = {"sum": "added up", "min": "the smallest part counts"}
    reports = {"sum": "added up", "max": "the highest counts"}
    rows = [
        (f"`{name}`", r.meaning, r.unit, parts[r.across_parts], reports[r.across_reports])
        for name, r in resources.VOCABULARY.items()
    ]
    return (
        "# Resources\n\nOne closed vocabulary for all kinds of execution. Inside, amounts are integers in the base "
        'unit; at the face they may be written `"512MiB"`, `"500m"`, `0.5`, `"30s"`. Absent, `0`, `"unknown"` and '
        '`"unlimited"` are four different things. A bare amount is a total; `per_replica(...)` and `per_device(...)` '
        "are compared per part.\n\n"
        + _table(("name", "meaning", "base unit", "parts of a grant", "reports of usage"), rows)
        + "\n`gpu` and `cpu` count whole devices and cores when written as a bare number: `2` is 2000 milli. `cost` is "
        "written in whole millionths.\n"
    )


def _limits() -> str:
    deadline = inspect.signature(AdmissionController).parameters["deadline"].default
    rows = [
        ("text in the sealed part", f"{credentials.MAX_TEXT} characters", "cut, with its length and SHA-256"),
        ("messages and reasons of events", f"{credentials.MAX_MESSAGE} characters", "cut, with its length and SHA-256"),
        ("one constraint or facet", f"{envelope.MAX_VALUE_BYTES} bytes", "replaced by its size and SHA-256"),
        ("depth of a constraint", f"{envelope.MAX_DEPTH} levels", "what is deeper is replaced by its SHA-256"),
        ("amounts", f"0 to {resources.MAX_AMOUNT}", "refused, the field is named"),
        *(
            (f"entries in `{name}`", str(count), "refused, the field is named")
            for name, count in envelope.MAX_ENTRIES.items()
        ),
        ("names of constraints, hints and facets", "128 characters", "refused, the field is named"),
        ("idempotency key", "255 characters", "cut, with its length and SHA-256; what counts as the key is the whole"),
        ("paths named as taken out of one request", str(envelope.MAX_REDACTED), "the last one says how many more"),
        ("names in one grant or effective value", str(grant.MAX_NAMES), "refused, the field is named"),
        (
            "names of parts, owners, components and routes",
            f"{grant.MAX_NAME} characters",
            "refused, the field is named",
        ),
        (
            "open objects that an adapter looks through for names of secrets",
            f"{MAX_SECRET_DEPTH} levels, {MAX_SECRET_NAMES} such names",
            "what is deeper is taken out as a whole; with more names all of the object is",
        ),
        ("a reference", "200 characters, with its kind", "refused, the field is named"),
        ("budgets of a controller", str(budgets.MAX_BUDGETS), "refused when they are made"),
        ("the name of an account", f"{budgets.MAX_ACCOUNT} bytes", "cut, and ends in a digest of the whole"),
        (
            "limits, obligations, policies, errors and hints of one decision, each",
            str(answers.MAX_SAID),
            "limits and obligations: the hook failed; the others: the last one says how many more",
        ),
        (
            "the raw answer of an engine elsewhere",
            f"{answers.MAX_ANSWER} characters",
            "cut, with its length and SHA-256",
        ),
        (
            "values that one decision allows for constraints",
            f"{answers.MAX_ALLOWED} bytes together",
            "the hook failed, its failure mode applies",
        ),
        (
            "threads of one hook, and processes of an isolated one",
            f"{hooks.MAX_THREADS} and {hooks.MAX_PROCESSES}",
            "the next ones wait within the deadline",
        ),
        (
            "holding the event loop, by one hook",
            f"{hooks.BLOCKED:g} s",
            f"named on the record and counted; then asked in a thread, or, async, not for {hooks.QUARANTINE:g} s",
        ),
        ("all deciders of one request", f"{deadline:g} s unless set", "each one's failure mode, on the record"),
        ("one call of a ledger that others write", f"{BUSY_TIMEOUT:g} s", "`LedgerUnavailable`: 503, nothing started"),
        ("one call of a ledger in PostgreSQL", f"{TIMEOUT:g} s", "`LedgerUnavailable`: 503, nothing started"),
        ("writes that are committed as one group", str(MAX_GROUP), "the next ones are the next group"),
        ("writes of a process that wait for the ledger", str(MAX_WAITING), "`LedgerUnavailable`: 503, nothing started"),
        ("window of a relaxed write", f"1 to {journal.MAX_WINDOW_MS} ms", "`write_modes` are refused"),
        (
            "relaxed writes that wait for longer than their window",
            "none is added",
            "`LedgerUnavailable` for the next ones until those are stored",
        ),
        ("writes in a spool", str(MAX_SPOOLED), "as if there were no spool: `LedgerUnavailable`"),
        (
            "envelopes of a tree that is read, and its levels",
            f"{MAX_TREE} and {MAX_LEVELS}",
            "refused, `part_of` is named; nothing recorded",
        ),
        (
            "envelopes of which a process remembers that it admitted parts",
            str(MAX_PARENTS),
            "a relaxed end looks at the ledger, which stores first what is relaxed",
        ),
        (
            "envelopes of ended trees that a process remembers",
            str(MAX_TREE),
            "those looked at longest ago are read again",
        ),
        ("one fact that other writers come before", f"{MAX_CONFLICTS} tries", "`LedgerUnavailable`, nothing recorded"),
        ("calls of a ledger at once in a process", str(journal.MAX_CALLS), "the next ones wait their turn"),
        ("waiting for such a turn", f"{journal.MAX_WAIT:g} s", "`LedgerUnavailable`: 503, nothing started"),
        ("attempted requests kept", str(MAX_ATTEMPTED), "the oldest go"),
        (
            "attempted requests recorded",
            f"{ATTEMPTED_PER_SECOND} a second, {ATTEMPTED_BURST} at once",
            "left out and counted: `dropped` of the next one, `attempted_dropped` of the process",
        ),
        ("commits that one observer was not told of yet", str(MAX_UNTOLD), "left out and counted: `observer_dropped`"),
        ("answer of an owner to reconciliation", f"{PROBE_TIMEOUT:g} s", "*unknown*: nothing is ended"),
        ("answer of an owner that is asked to revoke", f"{REVOKE_TIMEOUT:g} s", "*unknown*: it is asked again"),
        (
            "answers of owners to requests to revoke one execution",
            str(MAX_REVOCATIONS),
            "recorded only where the owner, or whether it refuses, is another; counted",
        ),
        (
            "executions that are reviewed, and owners asked to revoke, at a time",
            str(MAX_REVIEWS),
            "the next ones wait their turn",
        ),
        (
            "times that one reviewer does not answer in time, in one round",
            str(MAX_SILENCE),
            "not asked any more in that round: counted, `reviews_left_out`",
        ),
        (
            "threads of one reviewer that is not async",
            str(MAX_REVIEW_THREADS),
            "the next ones wait within its time",
        ),
        (
            "lease of a process that cannot be looked at from here",
            f"{PATIENCE:g} s without being renewed",
            "*gone*: what it admitted and did not bind is abandoned",
        ),
        (
            "lease of a chain in a segment that is exported",
            f"{SEGMENT_PATIENCE:g} s without being renewed",
            "its process is taken to have left it",
        ),
        (
            "end of an execution that is recorded after the fact",
            f"{MAX_SKEW.total_seconds():g} s ahead of the clock",
            "refused, the field is named",
        ),
        (
            "a backend's revision that is a number",
            f"0 to {resources.MAX_AMOUNT}",
            "refused, the field is named; as digits in a text it may be larger",
        ),
        (
            "envelopes of a `supersedes` line that a report is compared with",
            str(MAX_LINE),
            "what was said of a part before those is not looked for",
        ),
        ("segments of an SQLite ledger that are not dropped", str(MAX_SEGMENTS), "the next one is refused"),
        ("one call of a ledger at a server", f"{remote_http.TIMEOUT:g} s", "`LedgerUnavailable`: 503, nothing started"),
        (
            "one request to a server that hosts a ledger",
            f"{wire.MAX_BODY} bytes, {wire.MAX_GROUP} submissions",
            "a group is sent in parts; what is larger alone is refused",
        ),
        (
            "sessions of clients that a server hosts, in all and of one service",
            f"{MAX_SESSIONS} and {MAX_OF_SERVICE}",
            "`LedgerUnavailable` for the next one",
        ),
        (
            "a client of which a server hears nothing",
            f"{SILENT:g} s",
            "its session is let go of, its chain has no closing entry; it opens another when it comes back",
        ),
        (
            "a sealed envelope and the facts of one commit that a service sends",
            f"{asserted.MAX_SEALED} and {asserted.MAX_FACTS} bytes, {asserted.MAX_DEPTH} levels, "
            f"{asserted.MAX_COUNT} facts",
            "refused, the field is named",
        ),
        (
            "chains of a client whose leases it takes over after its server was started again",
            str(wire.MAX_ADOPTED),
            "older ones run out",
        ),
        (
            "envelopes that are looked through for those of a service's tenants in one answer",
            str(MAX_LOOKED),
            "`newest` of a ledger at a server lists none of those behind",
        ),
        ("envelopes of a projection in memory", str(MAX_IN_MEMORY), "`LedgerUnavailable`: make the folder writable"),
        (
            "sentences of one section of an explanation",
            str(MAX_SENTENCES),
            "the last one says how many more there are",
        ),
        (
            "a name, and a text, that an explanation quotes",
            f"{MAX_NAME} and {MAX_QUOTE} characters",
            "cut; how long it was is said",
        ),
        (
            "accounts of budgets of which an explanation says how they stand now",
            str(MAX_ACCOUNTS),
            "left out: `envelope budgets`",
        ),
        ("a query", f"{query.MAX_LENGTH} characters", "refused, `query` is named"),
        ("values and flags in a query", str(query.MAX_TERMS), "refused, `query` is named"),
        ("parentheses and `not` in a query", f"{query.MAX_DEPTH} deep", "refused, `query` is named"),
        ("rows of one page of a search", f"1 to {MAX_PAGE}", "refused, `limit` is named"),
        ("the cursor of a page", f"{MAX_CURSOR} characters", "refused, `after` is named"),
        ("envelopes that one page looks at", str(LOOK), "the page ends early and says how far it looked back"),
        ("requests of one caller to a server process", console_limits.REQUESTS, "429, with `Retry-After`"),
        (
            "wrong credentials of one address",
            console_limits.FAILURES,
            "429, with `Retry-After`; a right one is taken all the same",
        ),
        ("body of a request to the server", f"{console_limits.MAX_BODY} bytes", "413"),
        ("a token", f"{signin.MAX_TOKEN} characters", "nobody's"),
        ("entries of a token file", str(tokens.MAX_TOKENS), "the file is refused"),
        (
            "a browser that is signed in",
            f"{_hours(sessions.IDLE)} without a request, {_hours(sessions.LONGEST)} together",
            "it signs in again",
        ),
        (
            "browsers that are signed in to one server process, and with one token",
            f"{sessions.MAX_SESSIONS} and {sessions.MAX_OF_ONE}",
            "the oldest sign in again",
        ),
        ("findings of a verification", str(MAX_FINDINGS), "counted, not listed"),
        ("`envelope simulate`", f"{MAX_COUNT} envelopes over {MAX_DAYS} days", "refused"),
        (
            "streams of live updates of one console, and of one principal",
            f"{live.MAX_STREAMS} and {live.MAX_STREAMS_OF_ONE}",
            "503 and 429: the page says that it is not live, and tries again later",
        ),
        (
            "a stream of live updates",
            f"{live.LASTS:g} s",
            "ends; the page comes again, and its credential is looked at again",
        ),
        (
            "keys of an OpenID Connect issuer",
            f"asked for at most every {oidc.RETRY:g} s, and taken for {oidc.LASTS:g} s",
            "a token with a key that is not known is of nobody",
        ),
        (
            "how long a page waits for lists and sums that are up to date",
            f"{MAX_WAIT:g} s",
            "pages show what is there and say so; programs get 503 and `Retry-After`",
        ),
        (
            "new entries of one round of live updates",
            str(live.MAX_ENTRIES),
            "not looked at one by one: pages are told that much changed",
        ),
        (
            "a text in one place of a page, and a name in a list",
            f"{markup.MAX_TEXT} and {markup.MAX_NAME} characters",
            "cut; of a text it is said how long it was",
        ),
        (
            "events, and verdicts, on the page of an envelope",
            f"{sheet.MAX_EVENTS} and {sheet.MAX_VERDICTS}",
            "the middle of the events, and older verdicts, are left out: `envelope show`",
        ),
        (
            "envelopes that are counted for who sees some tenants only",
            str(MAX_COUNTED),
            f"{MAX_COUNTED}+",
        ),
        ("balances on a page, the fullest first", str(budgets_page.MAX_BALANCES), "counted: `envelope budgets`"),
        ("results of replays that the console looks at, the newest first", str(replays.MAX_FILES), "not shown"),
    ]
    return "# Limits\n\n" + _table(("what", "limit", "beyond it"), rows)


def _query() -> str:
    compared = {"text": "`=` `!=` `in` `~` `!~`", "word": "`=` `!=` `in`", "time": "`=` `!=` `<` `<=` `>` `>=`"}
    fields = [
        (
            f"`{name}`",
            compared[field.sort],
            field.meaning + (f": {', '.join(f'`{word}`' for word in field.words)}" if field.words else ""),
        )
        for name, field in criteria.FIELDS.items()
    ]
    flags = [(f"`{name}`", meaning) for name, meaning in criteria.FLAGS.items()]
    sides = [(f"`{side}.RESOURCE`", meaning) for side, meaning in criteria.SIDES.items()]
    return (
        _QUERY
        + "\n## Fields\n\n"
        + _table(("field", "compared by", "meaning"), fields)
        + "\nA field that holds many words, such as `cause`, matches when any of them does.\n\n## Flags\n\nThey stand "
        "alone: `state=open and ungranted`.\n\n"
        + _table(("flag", "meaning"), flags)
        + "\n## Amounts\n\n"
        + _table(("field", "meaning"), sides)
        + _AMOUNTS
        + f"\n## Limits\n\nA query has up to {query.MAX_LENGTH} characters, {query.MAX_TERMS} values and flags, and "
        f"parentheses and `not` up to {query.MAX_DEPTH} deep. A page has up to {MAX_PAGE} rows.\n"
        + _PAGES.format(look=LOOK, sure=MAX_SURE)
    )


_QUERY = """# The filter language

The same in Python (`Query.parse`), in `envelope list --where`, over HTTP and on pages. A query says of each
envelope whether it matches:

```
kind=model.deploy and state in (granted, admitted) and outcome=reduced and cause=quota
requested.gpu>=2 and granted.gpu<2 and created>=7d and not tenant=acme
state=open and ungranted and created<30m
(refused_by=policy or code=quota_exhausted) and subject~"dana"
granted.gpu>0 and used.gpu=0 and ended>=7d
```

Conditions are joined by `and`, `or`, `not` and parentheses; `and` binds closer than `or`. A value that is more than
one plain word stands in quotes, `"..."` or `'...'`, with `\\` before a quote or another `\\` inside. `and`, `or`,
`not` and `in` need quotes too where they are values. Names of fields, and these words, may be written in either
case; values may not.

| comparison | means |
|---|---|
| `=`, `!=` | it is that value; `!=` is the same as `not ... = ...`. A field that is not there equals `""` |
| `in (a, b)` | it is one of them |
| `~`, `!~` | it contains that text; A to Z in either case are the same. Nothing in it is a wildcard |
| `<`, `<=`, `>`, `>=` | of times and amounts |

A time is a moment in RFC 3339 (`2026-05-01T12:00:00Z`), a UTC day (`2026-05-01`), or an age: `30m`, `12h`, `7d`,
`2w`, counted back from now. `created>=7d` is what was created in the last seven days, `created<30m` what is older
than half an hour. A day is the whole day: `created=2026-05-01` is on it, `created<=2026-05-01` up to its end,
`created>2026-05-01` after it. What has not ended is at no time: neither `ended>=1d` nor `ended<1d`.
"""
_AMOUNTS = """
Amounts are written as [resources](resources.md) are: `requested.memory>=8GiB`, `granted.cpu<500m`. They are totals.
Instead of an amount there may be another in the same unit: `used.gpu<granted.gpu`. Absent, zero, unknown and
unlimited are four different things:

| amount | `=` | `<` `<=` `>` `>=` |
|---|---|---|
| absent: nobody spoke of it | only `=absent` | never |
| zero | `=0` | as any number |
| unknown | only `=unknown` | never |
| unlimited | `=unlimited`, or another that is unlimited | more than any number |

`!=` and `not` turn that round: `granted.gpu!=2` is also true where nothing is known of it; add `and granted.gpu>=0`
where that is not meant.
"""
_PAGES = """
## Pages

Newest first, by id. A page ends with a cursor, at which the next one begins: what is admitted meanwhile does not
move it, nothing is shown twice, and nothing that was there and still matches is left out. What changes meanwhile is
as it is when its page is read.

Whatever is asked of what many envelopes have in common (kind, operation, state, outcome, cause, hooks, code,
resource, flags) and of tenants and the time of creation is found without looking at anything else, however rare it
is, where up to {sure} different combinations of these are left. For the rest envelopes that may match are looked at
one by one, {look} of them for one page. A page that found
too few among them ends early, says how far it looked back (`looked_back_to`), and has a cursor as any other:
nothing is left out in silence. `Projection.stream` and `envelope list --json --all` go on by themselves.

Of an envelope whose entries cannot be read there is only the id: it matches `id=...` and `state=damaged`, has no
other field, and is in every list of `envelope list`, which names it on stderr.
"""


def _hours(time: timedelta) -> str:
    return f"{time / timedelta(hours=1):g} h"


def _codes() -> str:
    rows = [(f"`{code}`", "yes" if later else "no", meaning) for code, (later, meaning) in CODES.items()]
    return "# Reason codes\n\nWhy a decider denied or held.\n\n" + _table(("code", "can later help", "meaning"), rows)


def _counters() -> str:
    rows = [(f"`{name}`", meaning) for name, meaning in counters.COUNTERS.items()]
    return (
        "# Counters\n\nWhat each process counts, under `AdmissionController.counters`; one that is not there is 0.\n\n"
        + _table(("counter", "counts"), rows)
    )


def _credentials() -> str:
    rows = [(f"`{name}`", f"`{credentials.marker(name)}`") for name in credentials.FORMATS]
    return (
        "# Credentials that are taken out\n\nA value in one of these documented formats is replaced by its marker "
        "before anything is sealed or recorded. The request is not refused. A secret in no such format is taken out "
        "only when the adapter names its field (`Ask.secrets`).\n\n" + _table(("format", "marker"), rows)
    )


def _access() -> str:
    rows = [
        (f"`{role}`", *("yes" if right in rights else "" for right in access.RIGHTS))
        for role, rights in access.ROLES.items()
    ]
    return (
        "# Who may look\n\nA token says who somebody is, which tenants' envelopes they see, and their roles; "
        "[how](../howto/serve-the-console.md#who-may-look). A right is what one may do. Seeing an envelope is never a "
        "right in itself: the tenants of the token say whose are seen, on every page, in every count and every "
        "error.\n\n"
        + _table(("role", *access.RIGHTS), rows)
        + "\n"
        + _table(("right", "for"), [(f"`{right}`", access.MEANINGS[right]) for right in access.RIGHTS])
    )


def _console() -> Any:
    review = Review(open_ledger("memory://"), clock=lambda: datetime(2026, 1, 1, tzinfo=UTC))
    return create_app(review, authenticators=[])


#: Problems that every route answers.
_ALWAYS = ("401", "403", "422", "429", "503")


def _http_api() -> str:
    app = _console()
    described, rights = app.openapi(), dict(_rights(app.routes))
    text = (
        "# The HTTP API\n\nWhat `envelope serve` answers to programs; "
        "[how it is served](../howto/serve-the-console.md). The whole description, with every shape, is "
        "[openapi.json](openapi.json) (OpenAPI 3.1); a server gives it to those who may read at "
        "`/api/openapi.json`.\n\nThe token is sent as `Authorization: Bearer TOKEN`, never in a URL. Everything "
        "answered is about the envelopes of the token's tenants alone: what is another tenant's is not found. Amounts "
        "are in the base units of [resources](resources.md), times in UTC.\n\n"
        f"A caller may send {_rate(console_limits.REQUESTS)}; an address {_rate(console_limits.FAILURES)} with "
        f"a wrong credential; a body may have {console_limits.MAX_BODY // 1024**2} MiB.\n\n"
        "## Problems\n\nEvery error is an RFC 9457 problem, `application/problem+json`, with `type`, `title`, "
        "`status`, `detail`, and where there is one the `field` that is wrong and the `envelope` that it is about. The "
        "first five may come from every route.\n\n"
        + _table(
            ("status", "means"),
            [
                (str(status), MEANINGS[status])
                for status in sorted(MEANINGS, key=lambda status: (str(status) not in _ALWAYS, status))
            ],
        )
    )
    for path, methods in sorted(described["paths"].items()):
        for method, operation in methods.items():
            text += f"\n## {method.upper()} {path}\n\n{operation['description']}\n"
            text += f"\nTakes the right `{rights[method.upper(), path]}`. Answers {_answered(operation)}.\n"
            rows = [_parameter(one) for one in operation.get("parameters", ())]
            if "requestBody" in operation:
                rows.append(("the body", ", ".join(_shapes(operation["requestBody"]["content"])), ""))
            if rows:
                text += "\n" + _table(("parameter", "is", "without it"), rows)
    return text


def _rate(said: str) -> str:
    count, _, per = said.partition("/")
    return f"{count} requests a {per}"


def _rights(routes: Iterable[Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """(method, path) -> the right that it takes."""
    for route in routes:
        if (included := getattr(route, "original_router", None)) is not None:
            yield from (
                ((method, f"{route.include_context.prefix}{path}"), right)
                for (method, path), right in _rights(included.routes)
            )
        elif isinstance(route, APIRoute):
            right = next(filter(None, map(_right, route.dependant.dependencies)), None)
            if right is not None:  # those without are no part of the API: signing in and out
                yield from (((method, route.path), right) for method in route.methods or ())


def _right(dependency: Dependant) -> str | None:
    """The right that a dependency, or one of its own, asks for."""
    if dependency.call is not None and "having" in dependency.call.__qualname__:
        return str(inspect.getclosurevars(dependency.call).nonlocals["right"])
    return next(filter(None, map(_right, dependency.dependencies)), None)


def _answered(operation: Mapping[str, Any]) -> str:
    found = []
    for status, answer in operation["responses"].items():
        if status < "300":
            shapes = _shapes({media: of for media, of in answer.get("content", {}).items() if of.get("schema")})
            found.append(f"{status}" + (f" with {' or '.join(shapes)}" if shapes else ""))
    others = [status for status in operation["responses"] if status >= "300" and status not in _ALWAYS]
    return ", ".join(found) + (f"; problems also {', '.join(others)}" if others else "")


def _shapes(content: Mapping[str, Any]) -> list[str]:
    return [
        f"{_shape(of['schema'])}{'' if media == 'application/json' else f', `{media}`'}"
        for media, of in content.items()
    ]


def _shape(schema: Mapping[str, Any]) -> str:
    """A schema in words; what has a name is looked up in the description."""
    if "$ref" in schema:
        return f"`{schema['$ref'].rpartition('/')[2]}`"
    if "anyOf" in schema:
        return " or ".join(_shape(one) for one in schema["anyOf"] if one.get("type") != "null")
    if schema.get("type") == "array":
        return f"a list of {_shape(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"an object of {_shape(schema['additionalProperties'])}"
    named = {"string": "text", "integer": "a whole number", "object": "an object", "boolean": "true or false"}
    return named.get(schema.get("type", ""), "anything")


def _parameter(one: Mapping[str, Any]) -> tuple[str, str, str]:
    schema, bounds = one["schema"], []
    for part in (schema, *schema.get("anyOf", ())):
        if "minimum" in part and "maximum" in part:
            bounds.append(f"{part['minimum']} to {part['maximum']}")
        if "maxLength" in part:
            bounds.append(f"up to {part['maxLength']} characters")
        if "maxItems" in part:
            bounds.append(f"up to {part['maxItems']}")
    said = one.get("description", "").rstrip(".")
    default = "needed" if one["required"] else _without(schema.get("default"))
    return f"`{one['name']}`", "; ".join([_shape(schema), *bounds, *([said] if said else [])]), default


def _without(default: object) -> str:
    return "" if default in (None, "", []) else f"`{json.dumps(default, ensure_ascii=False)}`"


#: What functions make of fields, beside what they declare: (fields, what they become).
_BY_FUNCTION: Mapping[str, Sequence[tuple[str, str]]] = {
    "openai.completion": (
        ("model", "id of the target; constraint `model`"),
        (
            "n_predict, max_completion_tokens, max_tokens",
            "requested `output_tokens`: the largest of them, for all answers together; `-1` is unlimited",
        ),
        ("n, best_of, prompt", "how many answers: the larger of the two, to each prompt"),
        ("service_tier", "constraint `service_tier`"),
        ("web_search_options", "constraint `web_search_options`"),
        ("", "requested `requests`: 1"),
    ),
    "openai.embedding": (
        ("input", "requested `input_tokens`, where it is written in tokens; else in the digest only"),
    ),
    "openai.response": (("tools.*.type", "constraint `tools`: those that the server itself is to use"),),
    "mcp.tool_call": (
        ("params._meta.traceparent, params._meta.tracestate", "the trace of the envelope"),
        (f"params._meta.{mcp.PART_OF}", "the envelope that this one is part of"),
        (f"params._meta.{mcp.IDEMPOTENCY_KEY}", "the idempotency key"),
    ),
    "kamiwaza.deployment": (
        ("m_id", "id of the target"),
        ("m_config_id", "version of the target"),
        ("m_file_id", "constraint `weights`"),
        ("starting_copies, min_copies, max_copies", "requested `replicas`, its floor and its ceiling"),
        ("duration", "requested `duration`, in minutes"),
        ("max_concurrent_requests", "requested `concurrency`"),
        ("context", "requested `context`"),
        ("vram_allocation", "requested `gpu_memory` per replica; beside a minimum for each device a constraint"),
        ("gpu_allocation", "constraint `gpu_allocation`"),
        ("gpu_floor", "floor of requested `gpu`"),
        ("engine_name", "constraint `engine`"),
        ("location", "constraint `location`"),
        ("node_resource_type", "constraint `node_type`"),
        ("autoscaling, force_cpu, lb_port", "constraints of these names"),
        ("env", "constraint `env`: its names"),
        ("inferenceResources.cpu.requests.cpu", "requested `cpu` per replica"),
        ("inferenceResources.cpu.requests.memory", "requested `memory` per replica"),
        ("inferenceResources.cpu.architecture", "constraint `architecture`"),
        ("inferenceResources.accelerator.count", "requested `gpu` per replica; one where there is no count"),
        ("inferenceResources.accelerator.memory.minimum", "requested `gpu_memory` per device, and its floor"),
        ("inferenceResources.accelerator.capability", "constraint `accelerator`"),
        ("inferenceResources.accelerator.isolation", "constraint `isolation`"),
        ("inferenceResources.accelerator.profile", "constraint `gpu_profile`"),
        ("inferenceResources.runtime.selection", "constraint `runtime`"),
        ("inferenceResources.alternatives", "constraint `alternatives`"),
        ("inference_resources", "the same as `inferenceResources`, which counts where both are there"),
        ("header x-workroom-id", "scope `workroom`"),
    ),
}
#: Name -> request, what declares it (or None), target, secrets, client defaults, not part of admission.
_ADAPTERS: Mapping[str, tuple[str, Mapped | None, str, Sequence[str], Mapping[str, object], Iterable[str]]] = {
    "kamiwaza.deployment": (
        "`POST /serving/deploy_model`",
        None,
        "model.deploy",
        ["env.*"],
        kamiwaza.CLIENT_DEFAULTS,
        kamiwaza.NOT_ADMITTED,
    ),
    **{
        name: (request, mapped, mapped.kind, secrets, mapped.client_defaults, mapped.not_admitted)
        for name, request, mapped, secrets in (
            (
                "kamiwaza.ingestion",
                "`POST /ingestion/ingest/run`",
                kamiwaza.describe_ingestion,
                kamiwaza.describe_ingestion.secrets,
            ),
            (
                "kamiwaza.retrieval",
                "`POST /retrieval/jobs`",
                kamiwaza.describe_retrieval,
                kamiwaza.describe_retrieval.secrets,
            ),
            ("mcp.tool_call", "`tools/call`, the JSON-RPC request", mcp._CALL, mcp._CALL.secrets),
            ("openai.batch", "`POST /v1/batches`", openai.describe_batch, openai.describe_batch.secrets),
            ("openai.embedding", "`POST /v1/embeddings`", openai._EMBEDDING, openai._EMBEDDING.secrets),
            ("openai.response", "`POST /v1/responses`", openai._RESPONSE, openai.RESPONSE_SECRETS),
            ("ray.job", "`POST /api/jobs/`", ray.describe_job, ray.describe_job.secrets),
        )
    },
    "openai.completion": (
        "`POST /v1/chat/completions`, `POST /v1/completions`",
        None,
        "inference",
        [],
        {},
        openai.COMPLETION_NOT_ADMITTED,
    ),
}


def _adapters() -> str:
    text = (
        "# Adapters\n\nWhat each adapter makes of a request, field by field; "
        '[how to write one](../howto/write-an-adapter.md). By name: `adapters.load("openai.completion")`. Null is '
        "absent. A field that is *not part of admission* is in the digest of the request only; `path.*` stands for the "
        "other names of an open object, `*` for those of the body. *Secrets* are in no digest either. A value equal to "
        "a *client default* is recorded as one and never reported as ignored. Where every field is a secret whose name "
        "says so, what is "
        f"nested deeper than {MAX_SECRET_DEPTH} levels is one as a whole, and with more than {MAX_SECRET_NAMES} the "
        "whole object is.\n"
    )
    for name, (request, mapped, kind, secrets, defaults, rest) in sorted(_ADAPTERS.items()):
        rows = [] if mapped is None else _declared(mapped)
        rows += _BY_FUNCTION.get(name, ())
        shown = [
            (", ".join(f"`{f}`" for f in fields.split(", ")) if fields else "always", said) for fields, said in rows
        ]
        text += f"\n## {name}\n\n{request}, kind `{kind}`.\n\n{_table(('field', 'becomes'), shown)}"
        told = {
            "Secrets": [*secrets, *(f"{path}, names that say so" for path in (mapped.secret_names if mapped else ()))],
            "Client defaults": [_default(key, value) for key, value in defaults.items()],
            "Not part of admission": sorted(rest),
        }
        for what, items in told.items():
            if items:
                text += f"\n{what}: {', '.join(f'`{item}`' for item in items)}.\n"
    return text


def _default(name: str, value: object) -> str:
    plain = value["amount"] if isinstance(value, dict) else value
    return f"{name} {msgspec.json.encode(plain).decode()}"


def _declared(mapped: Mapped) -> list[tuple[str, str]]:
    """The rows of what an adapter declares."""

    def at(path: object) -> str:
        if isinstance(path, Header):
            return f"header {path.name}"
        return ", ".join((path,) if isinstance(path, str) else path)  # type: ignore[arg-type]

    rows = [(at(mapped.target_id), f"id of the target, a {mapped.target}")]
    for name, read in mapped.resources.items():
        if isinstance(read, Always):
            rows.append(("", f"requested `{name}`: {read.value}"))
            continue
        raw = read if isinstance(read, Raw) else Raw(read)
        unit = f", in {raw.unit}" if raw.unit else ""
        rows.append((at(raw.path), f"requested `{name}`{unit}" + (", rounded up" if raw.round_up else "")))
    for name, constraint in mapped.constraints.items():
        if isinstance(constraint, Names):
            rows.append((at(constraint.path), f"constraint `{name}`: its names"))
        elif not isinstance(constraint, Always):
            rows.append((at(constraint), f"constraint `{name}`"))
    return rows + [(at(path), f"scope `{name}`") for name, path in mapped.scope.items()]


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
