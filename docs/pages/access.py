"""`access.md`: the rights of each role, and what each right is for."""

from __future__ import annotations

from execution_envelope.console import access
from pages.table import table


def page() -> str:
    rows = [
        (f"`{role}`", *("yes" if right in rights else "" for right in access.RIGHTS))
        for role, rights in access.ROLES.items()
    ]
    return (
        "# Who may look\n\nA token says who somebody is, which tenants' envelopes they see, and their roles; "
        "[how](../howto/serve-the-console.md#who-may-look). A right is what one may do. Seeing an envelope is never a "
        "right in itself: the tenants of the token say whose are seen, on every page, in every count and every "
        "error.\n\n"
        + table(("role", *access.RIGHTS), rows)
        + "\n"
        + table(("right", "for"), [(f"`{right}`", access.MEANINGS[right]) for right in access.RIGHTS])
    )
