"""OpenID Connect: who holds a bearer token that an issuer signed. Signature, issuer, audience and times are checked.

The issuer says whose envelopes somebody sees, by the claims `tenants` and `roles` (other names may be given): lists of
texts. ``"*"`` among the tenants is all of them. Roles that are not ours are passed over; without one of ours the token
is of nobody.
"""

from __future__ import annotations

import json
import threading
import urllib.request
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
MAX_TOKEN: Final = 16_384
MAX_VALUES: Final = 256
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")


class OidcIssuer:
    """See `Authenticator`. The issuer is asked for its keys at the first token, and again for one that is new."""

    def __init__(self, issuer: str, *, audience: str, tenants: str = "tenants", roles: str = "roles") -> None:
        """Raises `InvalidField` for an issuer without https, but for one on this machine."""
        parts = urlsplit(issuer)
        if not (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)):
            raise InvalidField("oidc.issuer", f"expected an https URL, got {shown(issuer)}")
        if not audience:
            raise InvalidField("oidc.audience", "expected the audience that tokens are for, got none")
        self._issuer = issuer
        self._audience = audience
        self._claims = (tenants, roles)
        self._lock = threading.Lock()
        self._keys: jwt.PyJWKClient | None = None

    def principal(self, token: str) -> Principal | None:
        """See `Authenticator`: None for whatever does not hold, or cannot be found out."""
        if len(token) > MAX_TOKEN or token.count(".") != 2:
            return None
        try:
            key = self._key(token)
            claims = jwt.decode(
                token,
                key,
                algorithms=list(ALGORITHMS),
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY,
                options={"require": ["exp", "iat", "sub"]},
            )
        except (jwt.PyJWTError, OSError, ValueError):
            return None
        return self._of(claims)

    def _key(self, token: str) -> jwt.PyJWK:
        """The key that the token names. Where it names none, the issuer's only one."""
        client, named = self._client(), jwt.get_unverified_header(token).get("kid")
        if named is not None:
            return client.get_signing_key(named)
        keys = client.get_signing_keys()
        if len(keys) != 1:
            raise ValueError("expected a token that names its key")
        return keys[0]

    def _of(self, claims: dict[str, Any]) -> Principal | None:
        tenants, roles = (_texts(claims.get(name)) for name in self._claims)
        ours = tuple(role for role in roles if role in ROLES)
        subject = claims["sub"]
        if not ours or not isinstance(subject, str) or not subject:
            return None
        type = "service" if {"service", "requester"} & set(ours) else "user"
        seen = None if "*" in tenants else frozenset(tenants)
        return Principal(type, subject, seen, ours, "oidc", self._issuer)

    def _client(self) -> jwt.PyJWKClient:
        with self._lock:
            if self._keys is None:
                where = f"{self._issuer.rstrip('/')}/.well-known/openid-configuration"
                with urllib.request.urlopen(where, timeout=TIMEOUT) as answer:  # the scheme was checked
                    found = json.loads(answer.read(1_000_000))
                if not isinstance(found, dict) or found.get("issuer") != self._issuer:
                    raise ValueError("expected the issuer to name itself")
                keys = found.get("jwks_uri")
                if not isinstance(keys, str) or urlsplit(keys).scheme != urlsplit(self._issuer).scheme:
                    raise ValueError("expected where the keys are")
                self._keys = jwt.PyJWKClient(keys, timeout=TIMEOUT, lifespan=300)
            return self._keys


def _texts(claim: Any) -> list[str]:
    values = claim if isinstance(claim, list) else [claim]
    return [value for value in values[:MAX_VALUES] if isinstance(value, str) and value]
