"""The queue of a run: what is in it, how it moves, how stale it is; once, or as a stream while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from asyncflow_api import sse
from asyncflow_api.dependencies import Reads, TheJobs
from asyncflow_api.jobs.database import NoSuchJob
from asyncflow_api.jobs.service import Jobs
from asyncflow_api.refusals import RunRoute
from asyncflow_api.routes.workers import worker_of
from asyncflow_api.runs import NotBegun, RunView, TheView
from asyncflow_api.schemas_run import LiveReply, ProgressReply, QueueReply
from asyncflow_api.specification import answers
from asyncflow_api.watch import Batch, Sight
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from asyncflow.report.follow import BeingRead

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["queue"], route_class=RunRoute)


@router.get("/queue", summary="What is in the queue")
def queue(_: Reads, view: TheView) -> QueueReply:
    """How many samples are where, for how long, how stale they are, and what holds the run up. Also of a run that has
    ended."""
    found = view.queue()
    return QueueReply.of(found, live=view.live, bottleneck=view.bottleneck(found))


@router.get(
    "/live",
    response_class=StreamingResponse,
    summary="The queue as it changes",
    responses=answers(sse.MEDIA_TYPE, description="A stream"),
)
def live(job_id: str, request: Request, _: Reads, view: TheView, jobs: TheJobs) -> StreamingResponse:
    """Server-sent events `live`, each a whole picture: at most four a second, and only when something has changed.

    Who is slow gets the latest one. The stream ends with the job, after one `end`.
    """
    stream: StreamingResponse = sse.stream(request, ("live", job_id), lambda: Live(jobs, job_id, view))
    return stream


class Live:
    """What is watched: one run."""

    end = sse.encode("end", {"object": "end"})

    def __init__(self, jobs: Jobs, job_id: str, view: RunView) -> None:
        self._jobs = jobs
        self._job_id = job_id
        self._view = view

    def changed(self) -> float:
        """Nothing that is cheap says whether a worker has turned to something else: every look is one."""
        return time.monotonic()

    def look(self) -> Sight:
        """Raises LedgerError."""
        try:
            # A run that does not answer may begin, hang, or be gone: what has ended is the job.
            over = self._jobs.get(self._job_id).ended
            picture = look(self._view).model_dump(mode="json")
        except NoSuchJob:
            return Sight(over=True)
        except NotBegun:
            return Sight(over=over)
        except BeingRead:
            return Sight()
        return Sight(picture=sse.encode("live", picture), told=_without_time(picture), over=over)

    def read(self, at: Any, _until: Any, /) -> Batch:
        """Nothing: a picture has no history. The ledger and the events have it."""
        return b"", at


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
