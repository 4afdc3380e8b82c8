"""Server-sent events: a stream that goes on where the client was (`Last-Event-ID`), and shows that it lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import suppress
from typing import Any, Final

import pydantic_core
from asyncflow_api.watch import HEARTBEAT, Source, Watches
from starlette.requests import Request
from starlette.responses import StreamingResponse

from asyncflow.errors import AsyncFlowError

MEDIA_TYPE: Final = "text/event-stream"
ASK_EVERY: Final = 2.0
"""Seconds after which it is asked again whether who listens still may."""


def encode(event: str, data: Any, id_: str | None = None) -> bytes:
    """One event. JSON has no line breaks, so `data` is one line."""
    head = b"" if id_ is None else b"id: " + id_.encode() + b"\n"
    return head + b"event: " + event.encode() + b"\ndata: " + pydantic_core.to_json(data) + b"\n\n"


def stream(request: Request, key: Hashable, source: Callable[[], Source], at: Any = None) -> StreamingResponse:
    """What a source tells after a position (None: it has pictures only), until it is over, the client goes, or the
    token or session with which it came holds no more."""
    events = follow(request.app.state.watches, key, source, at, holds=request.scope["state"].get("holds"))
    return StreamingResponse(events, media_type=MEDIA_TYPE, headers={"X-Accel-Buffering": "no"})


async def follow(
    watches: Watches,
    key: Hashable,
    source: Callable[[], Source],
    at: Any = None,
    *,
    holds: Callable[[], bool] | None = None,
) -> AsyncIterator[bytes]:
    """First all of the history that there is, then the latest picture; and again, whenever the watch wakes."""
    yield b"retry: 1000\n\n"
    version, sent = 0, time.monotonic()
    asked = sent
    with watches.on(key, source) as watch:
        while not watch.failed:
            if holds is not None and time.monotonic() - asked >= ASK_EVERY:
                if not holds():
                    return
                asked = time.monotonic()
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
                with suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), ASK_EVERY)
