"""Server-sent events: a stream that goes on where the client was (`Last-Event-ID`), and shows that it lives."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Hashable
from typing import Any, Final

import pydantic_core
from asyncflow_api.watch import HEARTBEAT, Source, Watches
from starlette.responses import StreamingResponse

from asyncflow.errors import AsyncFlowError

MEDIA_TYPE: Final = "text/event-stream"


def encode(event: str, data: Any, id_: str | None = None) -> bytes:
    """One event. JSON has no line breaks, so `data` is one line."""
    head = b"" if id_ is None else b"id: " + id_.encode() + b"\n"
    return head + b"event: " + event.encode() + b"\ndata: " + pydantic_core.to_json(data) + b"\n\n"


def stream(watches: Watches, key: Hashable, source: Callable[[], Source], at: Any = None) -> StreamingResponse:
    """What a source tells after a position (None: it has pictures only), until it is over or the client goes."""
    events = follow(watches, key, source, at)
    return StreamingResponse(events, media_type=MEDIA_TYPE, headers={"X-Accel-Buffering": "no"})


async def follow(watches: Watches, key: Hashable, source: Callable[[], Source], at: Any = None) -> AsyncIterator[bytes]:
    """First all of the history that there is, then the latest picture; and again, whenever the watch wakes."""
    yield b"retry: 1000\n\n"
    version, sent = 0, time.monotonic()
    with watches.on(key, source) as watch:
        while not watch.failed:
            woken = watch.woken
            try:
                data, after = await watch.after(at)
            except AsyncFlowError:
                return  # it was deleted, or cannot be read: who asks again is told
            behind, at = after != at, after
            if not behind and version != watch.version:
                data, version = watch.sight.picture, watch.version
            if data:
                yield data
                sent = time.monotonic()
            elif not behind:
                if watch.sight.over:
                    yield watch.source.end
                    return
                if time.monotonic() - sent >= HEARTBEAT / 2:
                    yield b": still here\n\n"
                    sent = time.monotonic()
                await woken.wait()
