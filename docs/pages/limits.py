"""`limits.md`: every limit, and what becomes of what is beyond it."""

from __future__ import annotations

import inspect
from datetime import timedelta

from execution_envelope import answers, budgets, credentials, envelope, grant, hooks, journal, query, resources
from execution_envelope.adapters.declared import MAX_SECRET_DEPTH, MAX_SECRET_NAMES
from execution_envelope.admission import MAX_CONFLICTS
from execution_envelope.attempted import ATTEMPTED_BURST, ATTEMPTED_PER_SECOND
from execution_envelope.console import asserted, live, markup, oidc, sessions, sheet, signin, tokens
from execution_envelope.console import limits as console_limits
from execution_envelope.console.clients import MAX_OF_SERVICE, MAX_SESSIONS, SILENT
from execution_envelope.console.ledger_routes import MAX_LOOKED
from execution_envelope.console.pages import budgets as budgets_page
from execution_envelope.console.pages import replays
from execution_envelope.controller import AdmissionController
from execution_envelope.family import MAX_LEVELS, MAX_PARENTS, MAX_TREE
from execution_envelope.ledger import remote_http, wire
from execution_envelope.ledger.contract import MAX_ATTEMPTED
from execution_envelope.ledger.postgres_database import TIMEOUT
from execution_envelope.ledger.projection import MAX_CURSOR, MAX_PAGE
from execution_envelope.ledger.projection_sqlite import MAX_IN_MEMORY
from execution_envelope.ledger.recomputation import MAX_FINDINGS
from execution_envelope.ledger.search import LOOK
from execution_envelope.ledger.segments import PATIENCE as SEGMENT_PATIENCE
from execution_envelope.ledger.spool import MAX_SPOOLED
from execution_envelope.ledger.sqlite_database import BUSY_TIMEOUT, MAX_SEGMENTS
from execution_envelope.ledger.writer import MAX_GROUP, MAX_WAITING
from execution_envelope.observed import MAX_SKEW
from execution_envelope.observers import MAX_WAITING as MAX_UNTOLD
from execution_envelope.reconciliation import PATIENCE, PROBE_TIMEOUT
from execution_envelope.reporting import MAX_LINE
from execution_envelope.review.catching_up import PATIENCE as MAX_WAIT
from execution_envelope.review.explain.explanation import MAX_SENTENCES
from execution_envelope.review.explain.sections import MAX_ACCOUNTS
from execution_envelope.review.explain.wording import MAX_NAME, MAX_QUOTE
from execution_envelope.review.review import MAX_COUNTED
from execution_envelope.reviewer import MAX_REVOCATIONS, REVOKE_TIMEOUT
from execution_envelope.reviewing import MAX_REVIEWS, MAX_SILENCE
from execution_envelope.reviewing import MAX_THREADS as MAX_REVIEW_THREADS
from execution_envelope.simulation import MAX_COUNT, MAX_DAYS
from pages.table import table


def page() -> str:
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
    return "# Limits\n\n" + table(("what", "limit", "beyond it"), rows)


def _hours(time: timedelta) -> str:
    return f"{time / timedelta(hours=1):g} h"
