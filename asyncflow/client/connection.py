"""One request: with a deadline, with repeats where they do no harm, and with every refusal as an error.

What is repeated: no connection, an answer that broke off, 429 (after its Retry-After) and what a proxy says in place
of the service (502, 503, 504). Pauses double between FIRST_PAUSE and LONGEST_PAUSE. A request that may not be made
twice is repeated only when it surely was not carried out.
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

from asyncflow.client.login import trust
from asyncflow.errors import ServiceError, ServiceUnreachable, UserError

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 5.0
"""Seconds between two attempts."""
NOT_THERE: Final = (502, 503, 504)
TOO_MANY: Final = 429
STREAM: Final = "text/event-stream"

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """A whole answer that is no refusal."""

    headers: httpx.Headers
    content: bytes


class Problem(msgspec.Struct, frozen=True):
    """RFC 9457 problem+json, as far as it is used."""

    detail: str
    code: str
    field: str | None = None
    errors: list[dict[str, str]] = []
    request_id: str | None = None


class Connection:
    """The service at an address, for one token."""

    def __init__(self, url: str, token: str, *, timeout: float, patience: float, tls_root: str | None = None) -> None:
        address = checked_url(url)
        if not (token.isascii() and token.isprintable() and token.strip() == token and token):
            raise UserError("this is no token: give the text of one, without blanks around it")
        self.url = str(address).rstrip("/")
        self.timeout = timeout
        self.patience = patience
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}", "User-Agent": "asyncflow"},
            verify=trust(tls_root),
            trust_env=not is_loopback(address.host),  # a proxy does not reach this host
        )

    def close(self) -> None:
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        repeat: bool = True,
        timeout: float | None = None,
    ) -> Answer:
        """The answer. Raises ServiceError, or ServiceUnreachable after `patience` seconds.

        `params`: None values and empty lists are left out. `repeat`: whether doing it twice is the same as once.
        `timeout`: seconds, with all repeats; None takes the connection's.
        """
        request: dict[str, Any] = {"params": _given(params), "headers": dict(headers or {})}
        if body is not None:
            request["content"] = _json(body)
            request["headers"]["Content-Type"] = "application/json"
        began, pause = time.monotonic(), FIRST_PAUSE
        until = began + (self.timeout if timeout is None else timeout)
        while True:
            wait = pause
            try:
                return self._once(method, path, request, until)
            except httpx.RequestError as error:
                failure: ServiceError = self.unreachable(error)
                last = began + self.patience
                arrived = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
                if untrusted(error) or (arrived and not repeat):
                    raise failure from error
            except Passing as passing:
                failure, wait = passing.error, max(pause, passing.after)
                last = until if failure.status == TOO_MANY else began + self.patience
                if not repeat and failure.status != TOO_MANY:
                    raise failure from None
            if time.monotonic() + wait >= min(last, until):
                raise failure
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    def get(self, type_: type[T], path: str, params: Mapping[str, Any] | None = None) -> T:
        """What there is at a path."""
        return self.decode(type_, self.call("GET", path, params=params))

    def decode(self, type_: type[T], answer: Answer | bytes) -> T:
        """An answer, or a piece of one, as a value."""
        try:
            return msgspec.json.decode(answer if isinstance(answer, bytes) else answer.content, type=type_)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._other(str(error)) from None

    @contextmanager
    def stream(self, path: str, params: Mapping[str, Any] | None, after: str | None) -> Iterator[Iterator[bytes]]:
        """The bytes of a stream of events, from an event on; `timeout` is the longest silence. One attempt: raises
        httpx.RequestError, Passing and ServiceError."""
        headers = {"Accept": STREAM} | ({} if after is None else {"Last-Event-ID": after})
        with self._http.stream("GET", path, params=_given(params), headers=headers, timeout=self.timeout) as answer:
            if not answer.is_success:
                answer.read()
                raise self._refusal(answer, answer.content)
            if not answer.headers.get("content-type", "").startswith(STREAM):
                raise self._other("it sends no stream of events")
            yield answer.iter_bytes()

    def _once(self, method: str, path: str, request: dict[str, Any], until: float) -> Answer:
        left = max(until - time.monotonic(), 0.001)
        content = bytearray()
        with self._http.stream(method, path, timeout=left, **request) as answer:
            for piece in answer.iter_bytes():
                content += piece
                if time.monotonic() > until:  # httpx counts anew for each piece
                    raise httpx.ReadTimeout("the answer is too slow", request=answer.request)
        if answer.is_success:
            return Answer(answer.headers, bytes(content))
        raise self._refusal(answer, bytes(content))

    def _refusal(self, answer: httpx.Response, content: bytes) -> Exception:
        status = answer.status_code
        kind = ServiceUnreachable if status in NOT_THERE else ServiceError
        try:
            found = msgspec.json.decode(content, type=Problem)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            text = f"{self.url} answers {status} {answer.reason_phrase}".rstrip()
            error = kind(f"{text}: is it the address of AsyncFlow's service?", code=f"http_{status}", status=status)
        else:
            errors = [(one.get("field", ""), one.get("message", "")) for one in found.errors]
            error = kind(
                found.detail,
                code=found.code,
                status=status,
                field=found.field,
                errors=errors,
                request_id=found.request_id,
            )
        if status != TOO_MANY and status not in NOT_THERE:
            return error
        after = answer.headers.get("retry-after", "")
        return Passing(error, float(after) if after.isascii() and after.isdecimal() else 0.0)

    def unreachable(self, error: Exception) -> ServiceUnreachable:
        """That nobody answers, and what to do."""
        if untrusted(error):
            text = f"the certificate of {self.url} is not one to believe ({error}): log in with --tls-root FILE"
            return ServiceUnreachable(text, code="untrusted")
        why = str(error) or type(error).__name__
        text = f"the service at {self.url} does not answer ({why}): see whether it runs there, or log in elsewhere"
        return ServiceUnreachable(text, code="unreachable")

    def _other(self, why: str) -> ServiceError:
        text = f"what answers at {self.url} is no AsyncFlow service of this version ({why}): check the address"
        return ServiceError(text, code="not_the_service")


class Passing(Exception):
    """A refusal that passes."""

    def __init__(self, error: ServiceError, after: float) -> None:
        super().__init__(str(error))
        self.error = error
        self.after = after
        """Seconds that the service asks to wait."""


def checked_url(url: str) -> httpx.URL:
    """Raises UserError for what is no address of a service."""
    try:
        urlsplit(url)
        address = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        address = httpx.URL("")
    if address.scheme not in ("http", "https") or not address.host or address.query or address.fragment:
        raise UserError(f"{url} is no address of a service: write it as http://127.0.0.1:8765")
    if address.userinfo:
        raise UserError("the address has a password in it: leave it out, the token is what lets in")
    return address


def is_loopback(host: str) -> bool:
    """Whether a host is this one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def untrusted(error: Exception) -> bool:
    """Whether it failed at the certificate, which does not pass."""
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def _json(body: Any) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"JSON cannot say this ({error}): put dates in quotes, and leave out infinities") from None


def _given(params: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (params or {}).items() if value is not None and value != []}
