"""The queue of a run: what is in it, how it moves, how stale it is; once, or as a stream while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from asyncflow_api import sse
from asyncflow_api.dependencies import Reads
from asyncflow_api.refusals import RunRoute
from asyncflow_api.routes.workers import worker_of
from asyncflow_api.runs import NotBegun, RunView, TheView
from asyncflow_api.schemas_run import LiveReply, ProgressReply, QueueReply
from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from asyncflow.report.follow import BeingRead

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["queue"], route_class=RunRoute)

EVERY: Final = 0.25
"""Seconds between two events of one stream, at least."""


@router.get("/queue", summary="What is in the queue")
def queue(_: Reads, view: TheView) -> QueueReply:
    """How many samples are where, for how long, how stale they are, and what holds the run up. Also of a run that has
    ended."""
    found = view.queue()
    return QueueReply.of(found, live=view.live, bottleneck=view.bottleneck(found))


@router.get("/live", response_class=StreamingResponse, summary="The queue as it changes")
def live(_: Reads, view: TheView) -> StreamingResponse:
    """Server-sent events `live`, each a whole picture: at most four a second, and only when something has changed.

    The stream ends with the run, after one `end`.
    """

    def read(at: tuple[float, object, bool]) -> sse.Batch:
        last, told, over = at
        now = time.monotonic()
        if over or now - last < EVERY:
            return b"", at, over
        goes_on = view.live
        try:
            reply = look(view)
        except (NotBegun, BeingRead):
            return b"", (now, None, False), False
        fingerprint = _without_time(reply.model_dump())
        data = b"" if fingerprint == told else sse.encode("live", reply.model_dump(mode="json"))
        if not goes_on:
            return data + sse.encode("end", {"object": "end"}), (now, fingerprint, True), True
        return data, (now, fingerprint, False), False

    # Nothing that is cheap says whether a worker has turned to something else, so every look is one.
    stream: StreamingResponse = sse.stream((-EVERY, None, False), read, time.monotonic)
    return stream


def look(view: RunView) -> LiveReply:
    """The whole picture. Raises NotBegun, BeingRead."""
    found, status = view.queue(), view.status()
    return LiveReply(
        queue=QueueReply.of(found, live=view.live, bottleneck=view.bottleneck(found), history=False),
        workers=[worker_of(worker) for worker in view.workers()],
        progress=None if status is None else progress_of(status),
    )


def progress_of(status: Mapping[str, Any]) -> ProgressReply:
    step, steps, seconds = int(status.get("step", 0)), int(status["steps"]), float(status["seconds"])
    eta = seconds / step * (steps - step) if step else None
    return ProgressReply(step=step, steps=steps, seconds=seconds, eta_seconds=eta, phase=str(status["phase"]))


PASSING: Final = frozenset(
    {
        "at",
        "seconds",
        "eta_seconds",
        "since_seconds",
        "heartbeat_seconds",
        "oldest_age_seconds",
        "time_to_empty_seconds",
    }
    | {"shares", "in_per_second", "out_per_second", "text"}
)
"""What changes with the time alone."""


def _without_time(value: Any) -> Any:
    match value:
        case dict():
            return {name: _without_time(part) for name, part in value.items() if name not in PASSING}
        case list():
            return [_without_time(part) for part in value]
    return value
