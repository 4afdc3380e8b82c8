"""The calls of `Control` as they come over a wire, whichever: read, checked, carried out, answered.

What clients send is bounded and checked before it is used.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec

from asyncflow.errors import StoreError
from asyncflow.store import wire
from asyncflow.store.rows import NONE
from asyncflow.store.store import EmbeddedStore

MAX_REQUEST = 64 << 20
"""Bytes of one request or ticket."""
MAX_WAITING = 1024
"""Calls that may wait at the same time; each has a thread."""
UNNAMED_FOR = 600.0
"""Seconds after which a frame that nobody has named is given up."""

Alive = Callable[[], bool]
"""Whether the client still waits for its answer."""
Call = Callable[[Any, Alive], Any]


class TooMany(StoreError):
    """There is no place for this call now: later there may be."""


class Calls:
    """What a store answers to its clients. Thread-safe."""

    def __init__(self, store: EmbeddedStore, *, near: Path | None = None) -> None:
        """`near`: folder of the socket for clients on the same host."""
        self.welcome = _welcome(store, near)
        self.unnamed = Unnamed(store)
        self.waiting = Places(MAX_WAITING, "too many calls wait", "wait in fewer threads, or ask with timeout 0")
        self._calls = _calls(store, self.welcome, self.unnamed)

    def answer(self, name: str, body: bytes | memoryview, alive: Alive) -> bytes:
        """The answer to one request, in msgpack, or in JSON when that was. Raises what the store refuses."""
        if name not in self._calls:
            raise StoreError(f"there is no call {name!r}; the calls are {', '.join(self._calls)}")
        check_size(body)
        as_json = is_json(body)
        request = decoded(wire.JSON_REQUESTS[name] if as_json else wire.REQUESTS[name], body, name)
        with self.waiting.one() if getattr(request, "timeout", 0.0) > 0 else nullcontext():
            answer = self._calls[name](request, alive)
        return wire.encode_json(answer) if as_json else wire.encode(answer)


class Unnamed:
    """Frames that remote hosts have put and not named yet: their segment stays."""

    def __init__(self, store: EmbeddedStore) -> None:
        self._store = store
        self._frames: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def add(self, frame: int) -> None:
        now = time.monotonic()
        with self._lock:
            self._frames.append((now, frame))
            while self._frames[0][0] < now - UNNAMED_FOR:
                self._store.settle(self._frames.popleft()[1])

    def named(self, *frames: int) -> None:
        with self._lock:
            for place in [place for place in self._frames if place[1] in frames]:
                self._frames.remove(place)
        for frame in frames:
            if frame != NONE:
                self._store.settle(frame)


class Places:
    """Calls of one kind, of which there may be so many at the same time: each has a thread."""

    def __init__(self, most: int, what: str, do: str) -> None:
        self._places = threading.Semaphore(most)
        self._refusal = f"{what}: {most} are allowed at the same time; {do}"

    @contextmanager
    def one(self) -> Iterator[None]:
        """Raises TooMany when there is no place."""
        if not self._places.acquire(blocking=False):
            raise TooMany(self._refusal)
        try:
            yield
        finally:
            self._places.release()


def is_json(body: bytes | memoryview) -> bool:
    """A request in JSON is answered in JSON."""
    return bytes(body[:1]) == b"{"


def decoded(decoder: Any, data: bytes | memoryview, what: str) -> Any:
    """Raises StoreError."""
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StoreError(f"the request for {what} cannot be read: {error}") from None


def check_size(body: bytes | memoryview) -> None:
    """Raises StoreError."""
    if len(body) > MAX_REQUEST:
        raise StoreError(f"a request of {len(body)} bytes is too large: {MAX_REQUEST} are allowed")


def _welcome(store: EmbeddedStore, near: Path | None) -> wire.Welcome:
    return wire.Welcome(
        protocol=wire.PROTOCOL,
        schema=store.schema.to_json(),
        group_size=store.group_size,
        folder=None if store.folder is None else str(store.folder.resolve()),
        near=None if near is None else str(near.resolve()),
        host=store.host,
        durability=store.durability,
    )


def _calls(store: EmbeddedStore, welcome: wire.Welcome, unnamed: Unnamed) -> dict[str, Call]:
    """Name of each call → what it does."""
    broker = store.broker

    def hello(request: wire.Hello, _: Alive) -> wire.Welcome:
        if request.protocol != wire.PROTOCOL:
            raise StoreError(
                f"a client speaks protocol {request.protocol}, this store {wire.PROTOCOL}: use the matching release"
            )
        return welcome

    def admit(request: wire.Admit, alive: Alive) -> int | None:
        values = _values(request)
        frames = (request.frame, *(() if request.samples is None else (request.samples.frame,)))
        settled = True
        try:
            first = broker.admit(**values, alive=alive)
            settled = first is not None  # or it is asked for again, with the same frames
        finally:
            if settled:
                unnamed.named(*frames)
        return first

    def lease(request: wire.LeaseRows, alive: Alive) -> Any:
        return broker.lease(**_values(request), alive=alive)

    def ack(request: wire.Ack, _: Alive) -> None:
        try:
            broker.ack(**_values(request))
        finally:
            unnamed.named(request.frame)

    def other(name: str) -> Call:
        method = getattr(broker, name)
        return lambda request, _: method(**_values(request))

    special: dict[str, Call] = {"hello": hello, "admit": admit, "lease": lease, "ack": ack}
    return {name: special.get(name) or other(name) for name in wire.CALLS}


def _values(request: wire.Message) -> dict[str, Any]:
    values = {name: getattr(request, name) for name in request.__struct_fields__}
    if "timeout" in values:
        values["timeout"] = min(values["timeout"], wire.MAX_TIMEOUT)
    return values
