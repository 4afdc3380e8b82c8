"""How much a request may be: its length, its depth, its time, and how many of them.

The whole body is here, within its limits, before any route sees the request; JSON has been read once, strictly.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Never

from asyncflow_api.problems import Problem, request_id
from asyncflow_api.settings import Settings
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncflow.clock import Clock

MAX_TARGET: Final = 8192
"""Bytes of path and query."""
MAX_HEADERS: Final = 100
MAX_HEAD: Final = 1 << 16
"""Bytes of their names and values."""
MAX_DEPTH: Final = 32
"""Objects and lists within each other."""
MAX_INTEGER: Final = 1 << 63
REMEMBERED: Final = 10_000
"""Callers whose rate is known."""
BULK: Final = re.compile(r"/v1/(jobs/[^/]+/(prompts|samples|stages/[^/]+/leases|leases/[^/]+/(ack|nack))|files)")
"""Routes that take samples."""
JSON_TYPE: Final = re.compile(r"\s*application/([^/;]*\+)?json", re.IGNORECASE)
"""Whatever a route would read as JSON, also where the name is none that there is; so does one that says nothing."""


class Buckets:
    """A token bucket for each caller, of whom the least recent are forgotten."""

    def __init__(self, rate: float, burst: float, clock: Clock) -> None:
        """`rate`: calls a second; `burst`: calls at once."""
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, caller: str) -> float:
        """Seconds until this caller may call again: 0 when it may now, and then it has."""
        now = self._clock.monotonic()
        level, at = self._levels.pop(caller, (self._burst, now))
        level = min(self._burst, level + (now - at) * self._rate)
        allowed = level >= 1
        self._levels[caller] = (level - 1 if allowed else level, now)
        if len(self._levels) > REMEMBERED:
            self._levels.popitem(last=False)
        return 0.0 if allowed else (1 - level) / self._rate


class Limits:
    """Refuses what is too much. It stands behind `Authentication`, which says who calls."""

    def __init__(self, app: ASGIApp, settings: Settings, clock: Clock) -> None:
        self._app = app
        self._settings = settings
        self._known = Buckets(settings.rate, 4 * settings.rate, clock)
        self._anonymous = Buckets(settings.anonymous_rate, 8 * settings.anonymous_rate, clock)
        self._held = 0
        """Bytes of all bodies that are being received."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held = Held()
        try:
            self._check_head(scope)
            self._check_rate(scope)
            body = await self._body(scope, receive, held)
        except Problem as problem:
            # What is left of the body is not read: the connection ends with this answer.
            problem.headers["Connection"] = "close"
            await problem.response(request_id(scope))(scope, receive, send)
            return
        finally:
            self._held -= held.bytes
        await self._app(scope, replay(body, receive), send)

    def _check_head(self, scope: Scope) -> None:
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_TARGET:
            raise Problem(414, "target_too_long", f"path and query have at most {MAX_TARGET} bytes: send less")
        length = sum(len(name) + len(value) for name, value in scope["headers"])
        if len(scope["headers"]) > MAX_HEADERS or length > MAX_HEAD:
            text = f"a request has at most {MAX_HEADERS} headers of together {MAX_HEAD} bytes: send fewer"
            raise Problem(431, "too_many_headers", text)
        if b"%00" in (scope.get("raw_path") or b"") or "\0" in scope["path"]:
            raise Problem(400, "bad_path", "a path has no NUL characters: leave them out")

    def _check_rate(self, scope: Scope) -> None:
        caller = scope["state"].get("identity")
        seconds = self._known.wait(caller.token_id) if caller is not None else self._anonymous.wait(address(scope))
        if seconds:
            raise too_many(seconds)

    async def _body(self, scope: Scope, receive: Receive, held: Held) -> bytes:
        headers, settings = Headers(scope=scope), self._settings
        is_json = JSON_TYPE.match(headers.get("content-type") or "application/json") is not None
        most = settings.max_body
        if BULK.match(scope["path"]):
            most = settings.max_bulk_json if is_json else settings.max_bulk_body
        if scope["state"].get("identity") is None:
            most = min(most, 16 << 10)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Problem(415, "compressed", "bodies are not taken compressed: send it as it is",
                          field="header.content-encoding")  # fmt: skip
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()) or int(length[:20]) > most:
            raise too_large(most)
        try:
            async with asyncio.timeout(settings.body_timeout):
                body = await self._received(receive, most, held)
        except TimeoutError:
            text = f"the body was not complete within {settings.body_timeout:g} s: send it faster"
            raise Problem(408, "too_slow", text) from None
        if body and is_json:
            await asyncio.to_thread(check_json, body)
        return body

    async def _received(self, receive: Receive, most: int, held: Held) -> bytes:
        pieces: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Problem(400, "incomplete", "the body ended too early: send all of it")
            piece: bytes = message.get("body", b"")
            if held.bytes + len(piece) > most:
                raise too_large(most)
            if self._held + len(piece) > self._settings.max_bodies:
                raise Problem(429, "busy", "too many bodies come at once: try again", headers={"Retry-After": "5"})
            held.bytes += len(piece)
            self._held += len(piece)
            pieces.append(piece)
            if not message.get("more_body", False):
                return b"".join(pieces)


class Held:
    """Bytes that one request holds while it is being received."""

    bytes = 0


def address(scope: Scope) -> str:
    """Where a request comes from."""
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


def too_many(seconds: float) -> Problem:
    wait = max(1, math.ceil(seconds))
    text = f"these are too many requests: try again in {wait} s"
    return Problem(429, "too_many_requests", text, headers={"Retry-After": str(wait)})


def too_large(most: int) -> Problem:
    return Problem(413, "too_large", f"this body may have {most} bytes: send less at a time", field="body")


def replay(body: bytes, receive: Receive) -> Callable[[], Any]:
    """What was received, once; after that, whether the client is still there."""
    told = False

    async def replayed() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def check_json(body: bytes) -> None:
    """Raises Problem for what is no JSON (RFC 8259), or has numbers, text or depths that nobody needs."""
    try:
        text = body.decode("utf-8")
        check_depth(text)
        value = json.loads(text, parse_constant=_no_number, parse_float=_float, parse_int=_int, object_pairs_hook=_once)
        # Text that no UTF-8 can express: halves of surrogate pairs.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise bad_json("text has half a surrogate pair: send whole characters") from None
    except UnicodeDecodeError:
        raise bad_json("it is not UTF-8: encode it so") from None
    except json.JSONDecodeError as error:
        raise bad_json(f"{error.msg} at line {error.lineno}, column {error.colno}: send valid JSON") from None
    except (ValueError, RecursionError) as error:
        raise bad_json(str(error)) from None


def check_depth(text: str) -> None:
    """Raises ValueError for JSON that is nested too deep, before anything recurses into it."""
    depth, quoted, at = 0, False, 0
    for found in re.finditer(r'["\\{}\[\]]', text):
        character = found.group()
        if found.start() < at:
            continue  # escaped
        if character == "\\":
            at = found.start() + 2
        elif character == '"':
            quoted = not quoted
        elif not quoted:
            depth += 1 if character in "{[" else -1
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels: make it flatter")


def bad_json(detail: str) -> Problem:
    return Problem(400, "bad_json", f"the body is not taken: {detail}", field="body")


def _no_number(name: str) -> Never:
    raise ValueError(f"{name} is no JSON: send a number, or null")


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:32]} is too large a number: send one that a double can hold")
    return value


def _int(text: str) -> int:
    if len(text) > 20 or abs(value := int(text)) >= MAX_INTEGER:
        raise ValueError(f"{text[:32]} is too large a number: send one of at most 64 bits")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has {twice[:64]!r} twice: send each name once")
    return found
