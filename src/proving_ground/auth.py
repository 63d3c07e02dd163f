"""Who calls: bearer tokens from a file, and the FastAPI dependency that turns a request into a `Caller`."""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

OPERATOR = "operator"
APPROVER = "approver"
AUDITOR = "auditor"


@dataclass(frozen=True)
class Caller:
    """An authenticated caller; `workroom` is the one this request names, if any.

    A run of this backend calls it as itself: then `type` and `subject` name the run, `delegation` those it acts for,
    outermost first, and `envelope` is that of the run, to which what it asks for belongs.
    """

    subject: str
    tenant: str
    roles: tuple[str, ...]
    workrooms: tuple[str, ...]
    workroom: str | None = None
    type: str = "user"
    delegation: tuple[tuple[str, str], ...] = ()
    envelope: str | None = None

    def acting_as(self, type: str, subject: str, envelope: str) -> "Caller":
        """A run that this caller has started: of the same tenant, roles and workroom, and no more."""
        workrooms = () if self.workroom is None else (self.workroom,)
        delegation = (*self.delegation, (self.type, self.subject))
        return Caller(subject, self.tenant, self.roles, workrooms, self.workroom, type, delegation, envelope)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Caller":
        """As `dataclasses.asdict` and JSON made it."""
        lists = {name: tuple(stored[name]) for name in ("roles", "workrooms")}
        return cls(**{**stored, **lists, "delegation": tuple((type, id) for type, id in stored["delegation"])})


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    subject: str = Field(min_length=1, max_length=128)
    tenant: str = Field(min_length=1, max_length=128)
    roles: list[str] = Field(default_factory=list, max_length=32)
    workrooms: list[str] = Field(default_factory=list, max_length=64)


class _File(RootModel[dict[str, _Entry]]):
    """Token -> who holds it."""


class TokenFile:
    """Known tokens, kept as SHA-256 digests.

    The file is JSON: `{"<token>": {"subject": "dana", "tenant": "acme", "roles": ["operator"], "workrooms": []}}`.
    """

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        self._callers = [(_digest(token), caller) for token, caller in callers.items()]

    @classmethod
    def load(cls, path: Path) -> "TokenFile":
        """Read the file; what is wrong with it is said without showing a token."""
        try:
            entries = _File.model_validate_json(path.read_bytes()).root
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"][1:]) or "the top"
            raise ValueError(f"expected who holds each token, got `{first['msg']}` - at {where}") from None
        return cls(
            {
                token: Caller(entry.subject, entry.tenant, tuple(entry.roles), tuple(entry.workrooms))
                for token, entry in entries.items()
            }
        )

    def identify(self, bearer: str) -> Caller | None:
        """The holder of a token. Looks at every entry whatever it finds, so that timing tells nothing."""
        asked, found = _digest(bearer), None
        for digest, caller in self._callers:
            if hmac.compare_digest(asked, digest):
                found = caller
        return found


class RunTokens:
    """Credentials of runs, in memory: made when a run starts, good until it ends, and lost with the backend."""

    def __init__(self) -> None:
        self._runs: dict[bytes, Caller] = {}

    def issue(self, acting: Caller) -> str:
        """A new token for a run."""
        token = f"run-{secrets.token_urlsafe(32)}"
        self._runs[_digest(token)] = acting
        return token

    def revoke(self, token: str) -> None:
        """From now on it is good for nothing."""
        self._runs.pop(_digest(token), None)

    def identify(self, bearer: str) -> Caller | None:
        """The run that holds a token. Tokens are random and compared as digests, so that timing tells nothing."""
        return self._runs.get(_digest(bearer))


def write_demo(path: Path) -> None:
    """Make a token file of five people with random tokens, mode 0600."""
    people: dict[str, dict[str, Any]] = {
        "dana": {"tenant": "acme", "roles": [OPERATOR], "workrooms": ["support-bot", "production"]},
        "sam": {"tenant": "acme", "roles": ["viewer"], "workrooms": []},
        "lee": {"tenant": "globex", "roles": [OPERATOR], "workrooms": []},
        "kim": {"tenant": "acme", "roles": [APPROVER], "workrooms": []},
        "ada": {"tenant": "acme", "roles": [AUDITOR], "workrooms": []},
    }
    tokens = {subject: f"pg-{subject}-{secrets.token_urlsafe(24)}" for subject in people}
    entries = {tokens[subject]: {"subject": subject, **rest} for subject, rest in people.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(entries, file, indent=2)


def demo_tokens(path: Path) -> dict[str, str]:
    """Subject -> token, of those that `write_demo` made: they may be printed, tokens of one's own may not."""
    entries: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return {who["subject"]: token for token, who in entries.items() if token.startswith(f"pg-{who['subject']}-")}


def current_caller(request: Request) -> Caller:
    """Identify the caller by the Authorization header alone; 401 without, 403 for a workroom that is not theirs."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    tokens: TokenFile = request.app.state.tokens
    runs: RunTokens = request.app.state.runs
    bearer = bearer.strip()
    caller = (runs.identify(bearer) or tokens.identify(bearer)) if scheme.lower() == "bearer" else None
    if caller is None:
        raise HTTPException(401, "Invalid token", headers={"WWW-Authenticate": "Bearer"})
    workroom = request.headers.get("x-workroom-id")
    if workroom is not None and workroom not in caller.workrooms:
        raise HTTPException(403, "not a member of the workroom - at X-Workroom-Id")
    return caller if workroom is None else replace(caller, workroom=workroom)


def require_role(caller: Caller, role: str) -> None:
    """403 unless the caller has the role."""
    if role not in caller.roles:
        raise HTTPException(403, f"`{caller.subject}` needs the role `{role}` for this")


CurrentCaller = Annotated[Caller, Depends(current_caller)]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
