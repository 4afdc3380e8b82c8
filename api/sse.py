"""Server-sent events: a stream that goes on where the client was (`Last-Event-ID`), and shows that it lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import pydantic_core
from starlette.responses import StreamingResponse

HEARTBEAT: Final = 10.0
"""Seconds without an event after which a comment is sent."""
LOOK_EVERY: Final = 0.25
"""Seconds between two looks for something new."""
MEDIA_TYPE: Final = "text/event-stream"

Batch = tuple[bytes, Any, bool]
"""Events as they are on the wire, the position after them, and whether the stream is over."""


def encode(event: str, data: Any, id_: str | None = None) -> bytes:
    """One event. JSON has no line breaks, so `data` is one line."""
    head = b"" if id_ is None else b"id: " + id_.encode() + b"\n"
    return head + b"event: " + event.encode() + b"\ndata: " + pydantic_core.to_json(data) + b"\n\n"


def stream(
    start: Any, read: Callable[[Any], Batch], changed: Callable[[], Any], *, first: bytes = b""
) -> StreamingResponse:
    """Events from a position on, until the client goes or the stream is over.

    `read(position)` is called in a thread whenever `changed()`, which is cheap, has another value than before.
    """

    async def events() -> AsyncIterator[bytes]:
        at, seen, sent = start, object(), time.monotonic()
        yield b"retry: 1000\n\n" + first
        while True:
            if (now := changed()) != seen:
                batch, at, over = await asyncio.to_thread(read, at)
                if batch:
                    sent = time.monotonic()
                    yield batch
                else:
                    seen = now  # all was told that there was then
                if over and not batch:
                    return
                if batch:
                    continue
            if time.monotonic() - sent > HEARTBEAT:
                sent = time.monotonic()
                yield b": still here\n\n"
            await asyncio.sleep(LOOK_EVERY)

    return StreamingResponse(events(), media_type=MEDIA_TYPE, headers={"X-Accel-Buffering": "no"})
