"""`query.md`: the filter language, its fields, flags and amounts, and how pages of a search go on."""

from __future__ import annotations

from execution_envelope import criteria, query
from execution_envelope.ledger.projection import MAX_PAGE
from execution_envelope.ledger.search import LOOK, MAX_SURE
from pages.table import table


def page() -> str:
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
        + table(("field", "compared by", "meaning"), fields)
        + "\nA field that holds many words, such as `cause`, matches when any of them does.\n\n## Flags\n\nThey stand "
        "alone: `state=open and ungranted`.\n\n"
        + table(("flag", "meaning"), flags)
        + "\n## Amounts\n\n"
        + table(("field", "meaning"), sides)
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
