"""Server-sent events that go on where they were, however often the connection breaks.

A stream is over only when the service says so (event `end`). Everything else, a broken connection as well as a silent
or a politely closed one, is connected again with the id of the last whole event (`Last-Event-ID`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx

from asyncflow.client.connection import FIRST_PAUSE, LONGEST_PAUSE, Connection, Passing, untrusted
from asyncflow.errors import ServiceError

LINE_END: Final = re.compile(rb"\r\n|\r|\n")
"""Of the format. Text has other characters that Python ends lines at, such as U+2028."""
LONGEST: Final = 1 << 26
"""Bytes of one event."""
END: Final = "end"


@dataclass(frozen=True)
class Message:
    """One event as it is on the wire."""

    id: str | None
    event: str
    data: bytes


class Parser:
    """Bytes in pieces of any size → messages (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

    def __init__(self, last_id: str | None = None) -> None:
        self.last_id = last_id
        """Of the last whole event."""
        self.retry: float | None = None
        """Seconds that the service asks to wait before a client connects again."""
        self._rest = b""
        self._after_return = False
        self._id = last_id
        self._event = ""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[Message]:
        """The messages that are whole now. ValueError for an event that is longer than LONGEST."""
        if not piece:
            return
        if self._after_return:
            piece = piece.removeprefix(b"\n")
        self._after_return = piece.endswith(b"\r")
        *lines, self._rest = LINE_END.split(self._rest + piece)
        for line in lines:
            if line:
                self._field(line)
            elif (message := self._whole()) is not None:
                yield message
        if len(self._rest) + sum(map(len, self._data)) > LONGEST:
            raise ValueError(f"an event is longer than {LONGEST} bytes")

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        match name:
            case b"data":
                self._data.append(value)
            case b"event":
                self._event = value.decode(errors="replace")
            case b"id" if b"\0" not in value:
                self._id = value.decode(errors="replace")
            case b"retry" if value.isdigit():
                self.retry = int(value) / 1000

    def _whole(self) -> Message | None:
        self.last_id = self._id
        event, data = self._event, self._data
        self._event, self._data = "", []
        return Message(self.last_id, event or "message", b"\n".join(data)) if data else None


def follow(
    connection: Connection, path: str, params: Mapping[str, Any] | None = None, *, after: str | None = None
) -> Iterator[Message]:
    """Every message after an id, to the end of the stream. Raises ServiceError for what the service refuses, and
    ServiceUnreachable where it cannot be reached for `connection.patience` seconds."""
    parser, pause = Parser(after), FIRST_PAUSE
    lost: float | None = None  # since when nothing comes
    while True:
        parser = Parser(parser.last_id)
        wait = 0.0
        try:
            with connection.stream(path, params, parser.last_id) as pieces:
                for piece in pieces:
                    lost, pause = None, FIRST_PAUSE
                    for message in parser.feed(piece):
                        if message.event == END:
                            return
                        yield message
            failure: ServiceError = connection.unreachable(ConnectionError("it closes the stream before its end"))
        except httpx.RequestError as error:
            failure = connection.unreachable(error)
            if untrusted(error):
                raise failure from error
        except Passing as passing:
            failure, wait = passing.error, passing.after
        except ValueError as error:
            if isinstance(error, ServiceError):
                raise
            raise ServiceError(f"{error}: take it up with who runs the service", code="too_long") from None
        now = time.monotonic()
        lost = now if lost is None else lost
        wait = max(wait, parser.retry or 0.0, pause)
        if now + wait - lost > connection.patience:
            raise failure
        time.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE)
