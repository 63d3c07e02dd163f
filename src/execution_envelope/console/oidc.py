"""OpenID Connect: who holds a bearer token that an issuer signed. Signature, issuer, audience and times are checked.

The issuer says whose envelopes somebody sees, by the claims `tenants` and `roles` (other names may be given): lists of
texts. ``"*"`` among the tenants is all of them. Roles that are not ours are passed over; without one of ours the token
is of nobody.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

import jwt

from execution_envelope.console.access import ROLES, Principal
from execution_envelope.credentials import shown
from execution_envelope.errors import InvalidField

#: What a signature may be made with: nothing with a shared secret, and not none.
ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
#: How long the issuer may take to answer, in seconds; how far clocks may be apart.
TIMEOUT: Final = 5.0
LEEWAY: Final = 30.0
#: Keys are asked for again after so long; where the issuer does not answer they are taken for so long, in seconds.
FRESH: Final = 300.0
LASTS: Final = 3600.0
#: The issuer is asked at most once in so many seconds, whatever tokens come: also when it does not answer.
RETRY: Final = 10.0
MAX_TOKEN: Final = 16_384
MAX_ANSWER: Final = 1_000_000
MAX_VALUES: Final = 256
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
#: What a token, or an issuer, that is not as it should be may come to.
_WRONG: Final = (
    *(jwt.PyJWTError, OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError),
    http.client.HTTPException,
)


class OidcIssuer:
    """See `Authenticator`. The issuer is asked for its keys at the first token, and again for one that is new."""

    def __init__(
        self,
        issuer: str,
        *,
        audience: str,
        tenants: str = "tenants",
        roles: str = "roles",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `InvalidField` for an issuer without https, but for one on this machine."""
        if not _safe(issuer):
            raise InvalidField("oidc.issuer", f"expected an https URL, got {shown(issuer)}")
        if not audience:
            raise InvalidField("oidc.audience", "expected the audience that tokens are for, got none")
        self._issuer = issuer
        self._audience = audience
        self._claims = (tenants, roles)
        self._keys = _Keys(issuer, clock)

    def principal(self, token: str) -> Principal | None:
        """See `Authenticator`: None for whatever does not hold, or cannot be found out."""
        if len(token) > MAX_TOKEN or token.count(".") != 2:
            return None
        try:
            key = self._keys.find(jwt.get_unverified_header(token).get("kid"))
            claims = jwt.decode(
                token,
                key,
                algorithms=list(ALGORITHMS),
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY,
                options={"require": ["exp", "iat", "sub"]},
            )
        except _WRONG:
            return None
        return self._of(claims)

    def _of(self, claims: dict[str, Any]) -> Principal | None:
        tenants, roles = (_texts(claims.get(name)) for name in self._claims)
        ours = tuple(role for role in roles if role in ROLES)
        subject = claims["sub"]
        if not ours or not isinstance(subject, str) or not subject:
            return None
        type = "service" if {"service", "requester"} & set(ours) else "user"
        seen = None if "*" in tenants else frozenset(tenants)
        return Principal(type, subject, seen, ours, "oidc", self._issuer)


class _Keys:
    """The keys of an issuer. However many tokens come, one thread asks, and not often; the others wait for none."""

    def __init__(self, issuer: str, clock: Callable[[], float]) -> None:
        self._issuer = issuer
        self._clock = clock
        self._asking = threading.Lock()
        self._held: list[jwt.PyJWK] = []
        self._got = self._tried = float("-inf")

    def find(self, name: str | None) -> jwt.PyJWK:
        """The key of this name; without one the only one. Raises one of `_WRONG`."""
        if self._clock() - self._got >= FRESH or self._named(name) is None:
            self._refresh(wait=self._got == float("-inf"))
        found = self._named(name) if self._clock() - self._got < LASTS else None
        if found is None:
            raise ValueError("expected a token that names a key of its issuer")
        return found

    def _named(self, name: str | None) -> jwt.PyJWK | None:
        keys = self._held
        if name is None:
            return keys[0] if len(keys) == 1 else None
        return next((key for key in keys if key.key_id == name), None)

    def _refresh(self, wait: bool) -> None:
        """Ask again, unless somebody does or did so just now. With `wait` somebody's answer is waited for."""
        if not self._asking.acquire(blocking=wait):
            return
        try:
            if self._clock() - self._tried < RETRY:
                return
            self._tried = self._clock()
            self._held, self._got = self._asked(), self._clock()
        except _WRONG:
            return  # what is held still counts for a while
        finally:
            self._asking.release()

    def _asked(self) -> list[jwt.PyJWK]:
        found = _read(f"{self._issuer.rstrip('/')}/.well-known/openid-configuration")
        if found.get("issuer") != self._issuer:
            raise ValueError("expected the issuer to name itself")
        where = found.get("jwks_uri")
        if not isinstance(where, str) or not _safe(where) or urlsplit(where).scheme != urlsplit(self._issuer).scheme:
            raise ValueError("expected where the keys are")
        return [key for key in jwt.PyJWKSet.from_dict(_read(where)).keys if key.public_key_use in ("sig", None)]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """An issuer is asked where it says that it is, and nowhere else."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None follows none."""


_OPENER: Final = urllib.request.build_opener(_NoRedirects)


def _read(where: str) -> dict[str, Any]:
    with _OPENER.open(where, timeout=TIMEOUT) as answer:  # the scheme was checked
        body = answer.read(MAX_ANSWER + 1)
    found = json.loads(body) if len(body) <= MAX_ANSWER else None
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object, not too large")
    return found


def _safe(url: str) -> bool:
    """Whether nobody on the way can change what comes from there."""
    try:
        parts = urlsplit(url)
        return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)
    except ValueError:
        return False


def _texts(claim: Any) -> list[str]:
    values = claim if isinstance(claim, list) else [claim]
    return [value for value in values[:MAX_VALUES] if isinstance(value, str) and value]
