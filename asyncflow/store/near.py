"""Control calls over a Unix socket, for clients on the store's own host, at a fraction of what a Flight action costs.

    <folder of the segments>/store.sock     for the owner of the store (mode 0600); it goes with its server

Both sides send messages: a length (4 bytes, little-endian), and so many bytes. The first one of a client is an
`Opening`, in msgpack; the answer to it, and to every later one, begins with a byte that says what it is:

    request   name of the call, a line feed, what a Flight action of that name has (`wire`)
    =         what a Flight action answers
    !         a refusal (`wire.Refusal`, JSON)
    ?         there is no place now, in words: ask again later

One call at a time goes through a connection, so who waits in several threads has several. Data go through the segments,
or over Flight where a store has none: a run without checkpoints has its samples in memory, the socket in its folder.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from asyncflow.errors import Closed, StoreError, UserError
from asyncflow.store import wire
from asyncflow.store.calls import MAX_REQUEST, Calls, TooMany, decoded

logger = logging.getLogger(__name__)

SOCKET: Final = "store.sock"
MOST_CONNECTIONS: Final = 2048
"""At the same time; each has a thread."""
MOST_OPENING: Final = 1 << 16
"""Bytes of a message of somebody who has not shown the token."""
MOST_NAME: Final = 64
MOST_MESSAGE: Final = MAX_REQUEST + MOST_NAME
"""Bytes of a request with the name of its call."""
MOST_ANSWER: Final = 1 << 31
PATIENCE: Final = 10.0
"""Seconds for an opening, and for the rest of a message that has begun, or of an answer."""
LENGTH: Final = 4
"""Bytes of a message's length."""
PART: Final = 1 << 16
"""Bytes that are asked for at a time."""
BACKLOG: Final = 512
"""Connections that are not accepted yet."""
REFUSAL = msgspec.json.Decoder(wire.Refusal)


class Opening(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first message."""

    token: str
    store: str
    """`Welcome.identity` of the store that is meant."""


OPENING = wire.decoder(Opening)


class Unanswered(Exception):
    """A call that has got no answer: it may have happened."""


class NotThere(Unanswered):
    """Nobody answers at the socket: the call has not happened."""


class Messages:
    """One end of a connection. For one thread at a time, but for `close`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, *parts: bytes | memoryview) -> None:
        """Raises OSError."""
        size = sum(len(part) for part in parts)
        self._connection.settimeout(PATIENCE)
        self._connection.sendall(b"".join((size.to_bytes(LENGTH, "little"), *parts)))

    def receive(self, most: int, within: float | None) -> memoryview:
        """The next message. Raises OSError, also when it has not begun `within` so many seconds (None: for ever) or
        does not end soon after; EOFError when there comes none, ValueError for one that is too long."""
        self._connection.settimeout(within)
        data = bytearray(self._part())
        deadline = time.monotonic() + PATIENCE
        while len(data) < LENGTH or len(data) < LENGTH + _length(data, most):
            self._connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            data += self._part()
        if len(data) > LENGTH + _length(data, most):
            raise ValueError("a message came before the one before it was answered")
        return memoryview(data)[LENGTH:].toreadonly()

    def _part(self) -> bytes:
        part = self._connection.recv(PART)
        if not part:
            raise EOFError("the connection has ended")
        return part

    def alive(self) -> bool:
        """Whether the other side is still there."""
        ended = select.poll()
        ended.register(self._connection, select.POLLRDHUP)
        return not ended.poll(0)

    def close(self) -> None:
        """In any thread: who waits for a message gets none. May be called twice."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def _length(data: bytearray, most: int) -> int:
    size = int.from_bytes(data[:LENGTH], "little")
    if size > most:
        raise ValueError(f"a message of {size} bytes is too long: {most} are allowed")
    return size


class NearServer:
    """Answers at the socket in a folder until `close`."""

    def __init__(
        self,
        calls: Calls,
        folder: Path,
        *,
        token: str,
        most_connections: int = MOST_CONNECTIONS,
        patience: float = PATIENCE,
    ) -> None:
        """The caller has the folder: a socket that is there was left by a process that has ended. `patience`: seconds
        for an opening. Raises OSError."""
        self._calls = calls
        self._most_connections, self._patience = most_connections, patience
        self._token = token
        self._path = folder / SOCKET
        self._lock = threading.Condition()
        self._connections: set[Messages] = set()
        self._answering = 0
        self._closed = False
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            with reachable(folder, SOCKET) as address:
                self._listener.bind(address)
            self._path.chmod(0o600)
            self._listener.listen(BACKLOG)
        except OSError:
            self._listener.close()
            raise
        self._thread = threading.Thread(target=self._accept, name="store-socket", daemon=True)
        self._thread.start()

    def close(self, within: float) -> None:
        """Let the calls that are being answered end, within so many seconds, and answer no more. May be called
        twice."""
        with self._lock:
            self._closed = True
            self._lock.wait_for(lambda: self._answering == 0, within)
            connections = list(self._connections)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for connection in connections:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                logger.warning("no connection can be accepted (%s): trying again", error)
                time.sleep(0.1)
                continue
            messages = Messages(connection)
            with self._lock:
                full = self._closed or len(self._connections) >= self._most_connections
                if not full:
                    self._connections.add(messages)
            if full:
                messages.close()
                continue
            threading.Thread(target=self._serve, args=(messages,), name="store-call", daemon=True).start()

    def _serve(self, messages: Messages) -> None:
        try:
            # Whoever goes, is too slow or makes no sense is not heard any more.
            with contextlib.suppress(OSError, EOFError, ValueError):
                if not self._open(messages):
                    return
                while True:
                    request = messages.receive(MOST_MESSAGE, None)
                    with self._one_answered():
                        messages.send(*self._answer(request, messages.alive))
        finally:
            messages.close()
            with self._lock:
                self._connections.discard(messages)

    def _open(self, messages: Messages) -> bool:
        try:
            opening = decoded(OPENING, messages.receive(MOST_OPENING, self._patience), "a connection")
            if not hmac.compare_digest(opening.token.encode(errors="replace"), self._token.encode()):
                raise StoreError("the token is missing or wrong")
            if opening.store != self._calls.welcome.identity:
                raise Closed("the store of this client has ended, and another one is in its place: connect again")
        except StoreError as error:
            messages.send(b"!", wire.encode_json(wire.Refusal.of(error)))
            return False
        messages.send(b"=")
        return True

    @contextlib.contextmanager
    def _one_answered(self) -> Iterator[None]:
        with self._lock:
            self._answering += 1
        try:
            yield
        finally:
            with self._lock:
                self._answering -= 1
                self._lock.notify_all()

    def _answer(self, request: memoryview, alive: Callable[[], bool]) -> tuple[bytes, bytes]:
        name, end, _ = bytes(request[:MOST_NAME]).partition(b"\n")
        try:
            body = request[len(name) + len(end) :]
            return b"=", self._calls.answer(name.decode(errors="replace"), body, alive)
        except TooMany as error:
            return b"?", str(error).encode()
        except (StoreError, UserError) as error:
            return b"!", wire.encode_json(wire.Refusal.of(error))
        except MemoryError as error:
            text = f"this does not fit into memory ({error}): ask for less at a time"
            return b"!", wire.encode_json(wire.Refusal.of(StoreError(text)))
        except Exception as error:
            logger.exception("a call has failed")
            text = f"the store has failed: {type(error).__name__}: {error}"
            return b"!", wire.encode_json(wire.Refusal.of(StoreError(text)))


class _Connection(socket.socket):
    """Is closed without a warning when its client is forgotten, as a Flight client's is."""

    def __del__(self) -> None:
        self.close()


class NearClient:
    """Calls at the socket in a folder. Thread-safe."""

    def __init__(self, folder: Path, *, token: str, store: str) -> None:
        """Raises OSError, Unanswered, when nobody answers there, and what the store refuses."""
        self._folder = folder
        self._opening = wire.encode(Opening(token=token, store=store))
        self._lock = threading.Lock()
        self._idle: list[Messages] = []
        self._all: set[Messages] = set()
        self._closed = False
        self._idle.append(self._open())

    def call(self, name: str, body: bytes, within: float) -> memoryview:
        """The answer. `within`: seconds. Raises NotThere, Unanswered, and what the store refuses."""
        try:
            with self._lock:
                messages = self._idle.pop() if self._idle else None
            messages = messages or self._open()
        except OSError as error:
            raise NotThere(str(error)) from None
        try:
            messages.send(name.encode(), b"\n", body)
            answer = messages.receive(MOST_ANSWER, within)
        except (OSError, EOFError, ValueError) as error:
            self._forget(messages)
            raise Unanswered(str(error) or "no answer in time") from None
        with self._lock:
            self._idle.append(messages)
        return _read(answer)

    def close(self) -> None:
        """Calls that wait end without an answer. May be called twice."""
        with self._lock:
            self._closed = True
            connections, self._idle = list(self._all), []
            self._all.clear()
        for messages in connections:
            messages.close()

    def _open(self) -> Messages:
        connection = _Connection(socket.AF_UNIX)
        messages = Messages(connection)
        try:
            connection.settimeout(PATIENCE)
            with reachable(self._folder, SOCKET) as address:
                connection.connect(address)
            messages.send(self._opening)
            _read(messages.receive(MOST_OPENING, PATIENCE))
        except (EOFError, ValueError) as error:
            messages.close()
            raise Unanswered(str(error)) from None
        except BaseException:
            messages.close()
            raise
        with self._lock:
            if self._closed:
                messages.close()
                raise Closed("this client of the store is closed")
            self._all.add(messages)
        return messages

    def _forget(self, messages: Messages) -> None:
        """The server may be another one by now: the connections that nobody uses have lost theirs as well."""
        with self._lock:
            ended, self._idle = [messages, *self._idle], []
            self._all.difference_update(ended)
        for one in ended:
            one.close()


def _read(answer: memoryview) -> memoryview:
    """What was answered. Raises Unanswered, and what the store refuses."""
    kind, body = bytes(answer[:1]), answer[1:]
    if kind == b"=":
        return body
    if kind == b"!":
        raise REFUSAL.decode(body).as_error()
    raise Unanswered(bytes(body).decode(errors="replace"))


@contextlib.contextmanager
def reachable(folder: Path, name: str) -> Iterator[str]:
    """The address of a socket in a folder, in a short form: the kernel takes 107 bytes, and folders are deep."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)
