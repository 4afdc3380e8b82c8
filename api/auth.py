"""Who may call: tokens with a scope, sessions of browsers, and which names this service answers to.

Everything is refused that shows no valid token, except the paths in `PUBLIC`; a route says what else it needs with
`Need("submit")`. A new route is therefore closed before anybody thinks of it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import psutil
from asyncflow_api.jobs.database import Database
from asyncflow_api.jobs.folder import write_text
from asyncflow_api.jobs.rows import SCOPES, TokenRow
from asyncflow_api.jobs.rows import Scope as TokenScope
from asyncflow_api.limits import Buckets, address, too_many
from asyncflow_api.problems import Problem, request_id
from asyncflow_api.settings import Settings
from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Receive, Scope, Send

from asyncflow.clock import Clock
from asyncflow.errors import UserError

COOKIE: Final = "asyncflow_session"
PUBLIC: Final = frozenset({"/healthz", "/v1/login", "/", "/favicon.ico"})
"""Paths that need no token: none of them tells anything about jobs."""
PUBLIC_FOLDER: Final = "/static/"
"""The dashboard's own files."""
SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
FAILURES_AT_ONCE: Final = 20.0


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who calls."""

    token_id: str
    name: str
    scope: TokenScope
    expires_at: float | None
    session: bool
    """By the cookie of a browser, and not with the token itself."""

    def may(self, scope: TokenScope) -> bool:
        return bool(SCOPES.index(self.scope) >= SCOPES.index(scope))


def identity_of(request: Request) -> Identity:
    """Who calls a route. Raises Problem, though `Authentication` has seen to it where it stands in front."""
    found = request.scope["state"].get("identity")
    if not isinstance(found, Identity):
        raise no_token()
    return found


@dataclass(frozen=True)
class Need:
    """A dependency: the caller has at least this scope."""

    scope: TokenScope

    def __call__(self, request: Request) -> Identity:
        """Raises Problem."""
        identity = identity_of(request)
        if not identity.may(self.scope):
            text = f"this needs a token of scope {self.scope}, and this one has {identity.scope}: take another token"
            raise Problem(403, "scope_too_small", text)
        return identity


class Tokens:
    """Makes tokens and knows them again. Only hashes are kept: a token is 256 random bits, so a fast hash will do."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def make(self, name: str, scope: TokenScope, seconds: float | None = None) -> tuple[TokenRow, str]:
        """A new token, which nobody can ask for again."""
        token = f"af_{secrets.token_urlsafe(32)}"
        return self.add(token, name, scope, seconds), token

    def add(self, token: str, name: str, scope: TokenScope, seconds: float | None = None) -> TokenRow:
        now = self._clock.wall()
        row = TokenRow(
            id=f"tok_{secrets.token_hex(8)}",
            name=name,
            scope=scope,
            created_at=now,
            expires_at=None if seconds is None else now + seconds,
        )
        with self._database.transaction() as db:
            values = (row.id, name, scope, _hash(token), now, row.expires_at)
            db.execute("INSERT INTO tokens VALUES (?,?,?,?,?,?)", values)
        return row

    def first(self, file: Path) -> None:
        """See that there is a token with which to begin, in `file`. Raises UserError."""
        if any(row.scope == "admin" and not self._over(row.expires_at) for row in self.all()):
            return
        try:
            # In the file before it is in the database: a token that nobody can read would be of no use.
            write_text(file, token := f"af_{secrets.token_urlsafe(32)}")
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror}): see that its disk has room") from None
        self.add(token, "first", "admin")

    def all(self) -> list[TokenRow]:
        sql = "SELECT id, name, scope, created_at, expires_at FROM tokens ORDER BY created_at, id"
        return [TokenRow(**dict(row)) for row in self._database.read(sql)]

    def remove(self, token_id: str) -> bool:
        """With its sessions. False when there is none of this id."""
        with self._database.transaction() as db:
            removed: int = db.execute("DELETE FROM tokens WHERE id=?", (token_id,)).rowcount
        return removed > 0

    def known(self, token: str) -> Identity | None:
        """Whose token this is, if it is one that holds."""
        return self._identity("SELECT * FROM tokens WHERE hash=?", token, session=False)

    def log_in(self, token: str, seconds: float) -> tuple[Identity, str] | None:
        """A session for a browser, which lasts no longer than the token; None for no valid token."""
        identity = self.known(token)
        if identity is None:
            return None
        session = secrets.token_urlsafe(32)
        now = self._clock.wall()
        until = now + seconds if identity.expires_at is None else min(now + seconds, identity.expires_at)
        with self._database.transaction() as db:
            db.execute("DELETE FROM sessions WHERE expires_at<?", (now,))
            db.execute("INSERT INTO sessions VALUES (?,?,?)", (_hash(session), identity.token_id, until))
        return identity, session

    def session(self, session: str) -> Identity | None:
        """Who logged in, as long as it holds."""
        sql = (
            "SELECT t.id, t.name, t.scope, s.hash, s.expires_at FROM sessions s JOIN tokens t ON t.id=s.token_id"
            " WHERE s.hash=?"
        )
        return self._identity(sql, session, session=True)

    def log_out(self, session: str) -> None:
        with self._database.transaction() as db:
            db.execute("DELETE FROM sessions WHERE hash=?", (_hash(session),))

    def _identity(self, sql: str, secret: str, *, session: bool) -> Identity | None:
        digest = _hash(secret)
        for row in self._database.read(sql, digest):
            if hmac.compare_digest(row["hash"], digest) and not self._over(row["expires_at"]):
                return Identity(
                    token_id=row["id"],
                    name=row["name"],
                    scope=row["scope"],
                    expires_at=row["expires_at"],
                    session=session,
                )
        return None

    def _over(self, expires_at: float | None) -> bool:
        return expires_at is not None and expires_at <= self._clock.wall()


class Authentication:
    """Finds out who calls, by which name and from which page, and refuses the rest. Stands before everything else."""

    def __init__(self, app: ASGIApp, settings: Settings, tokens: Callable[[], Tokens], clock: Clock) -> None:
        """`tokens` gives what is there once the application has started."""
        self._app = app
        self._settings = settings
        self._tokens = tokens
        self._names = frozenset(_own_names(settings))
        self._failures = Buckets(settings.failure_rate, FAILURES_AT_ONCE, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            self._check_origin(headers)
            identity = self._identify(scope, headers)
            if identity is None and not _is_public(scope):
                raise no_token()
            if identity is not None and identity.session and scope["method"] not in SAFE:
                _check_change(headers)
        except Problem as problem:
            await problem.response(request_id(scope))(scope, receive, send)
            return
        scope["state"]["identity"] = identity
        scope["state"]["holds"] = lambda: self._shown(headers) is not None
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        """A page elsewhere can make a browser call us by a name of its own: it is not answered."""
        if len(headers.getlist("host")) != 1 or _host_of(f"//{headers['host']}") not in self._names:
            text = "this service has another name: call it as its first line says, or start it with --name"
            raise Problem(421, "wrong_host", text, field="header.host")

    def _check_origin(self, headers: Headers) -> None:
        for origin in headers.getlist("origin"):
            scheme = "https" if self._settings.tls else "http"
            if origin.lower() != f"{scheme}://{headers['host'].lower()}":
                text = "pages of other sites may not call this service: use its own dashboard, or no browser"
                raise Problem(403, "wrong_origin", text, field="header.origin")

    def _identify(self, scope: Scope, headers: Headers) -> Identity | None:
        """Raises Problem for credentials that are wrong; none at all is None."""
        shown = headers.getlist("authorization")
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE)
        if not shown and not cookie:
            return None
        identity = self._shown(headers)
        if identity is None and not shown and _is_public(scope):
            return None  # an old cookie does not keep anybody from logging in
        if identity is None:
            # Only those with wrong ones wait: others may well come from the same address.
            if seconds := self._failures.wait(address(scope)):
                raise too_many(seconds)
            text = "this token is not known or has expired: take a valid one (the first is in the service's home)"
            raise Problem(401, "wrong_token", text, headers={"WWW-Authenticate": "Bearer"})
        return identity

    def _shown(self, headers: Headers) -> Identity | None:
        """Whose credentials these are, if they hold now."""
        shown = headers.getlist("authorization")
        if not shown:
            return self._tokens().session(cookie_parser(headers.get("cookie", "")).get(COOKIE, ""))
        kind, _, token = shown[0].partition(" ")
        return self._tokens().known(token.strip()) if len(shown) == 1 and kind.lower() == "bearer" else None


def no_token() -> Problem:
    text = "a token is needed: send `Authorization: Bearer TOKEN`, or log in at /v1/login"
    return Problem(401, "no_token", text, headers={"WWW-Authenticate": "Bearer"})


def _check_change(headers: Headers) -> None:
    """A cookie comes by itself with whatever a browser is made to send; these two headers do not."""
    if headers.get("x-csrf") != "1" or not headers.get("origin"):
        text = "changes with a cookie need the headers X-CSRF: 1 and Origin: send them, or a token"
        raise Problem(403, "no_csrf_header", text, field="header.x-csrf")


def _is_public(scope: Scope) -> bool:
    path: str = scope["path"]
    return path in PUBLIC or (path.startswith(PUBLIC_FOLDER) and ".." not in path and scope["method"] in SAFE)


def _own_names(settings: Settings) -> list[str]:
    """Host names and addresses by which clients may call."""
    names = list(settings.names)
    host = settings.host.strip("[]")
    if settings.loopback:
        names += ["localhost", "127.0.0.1", "::1", host]
    elif host in ("0.0.0.0", "::"):
        names += ["localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn()]
        for addresses in psutil.net_if_addrs().values():
            names += [one.address.partition("%")[0] for one in addresses if one.family != psutil.AF_LINK]
    else:
        names.append(host)
    return [name.lower() for name in names]


def _host_of(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that is no number
        plain = parts.username is None and parts.path == "" and not parts.query and not parts.fragment
        return parts.hostname if plain else None
    except ValueError:
        return None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
