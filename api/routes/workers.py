"""The workers and engines of a run: what each does, what it waits for, and what it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from asyncflow_api.dependencies import Reads, Submits
from asyncflow_api.problems import Problem
from asyncflow_api.refusals import RunRoute
from asyncflow_api.runs import RunView, TheView
from asyncflow_api.schemas_run import (
    EngineReply,
    EnginesReply,
    Shares,
    SpanReply,
    TimelineReply,
    WorkerReply,
    WorkersReply,
    moment,
)
from fastapi import APIRouter, Path, Query

from asyncflow.report.bottleneck import in_words

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["workers"], route_class=RunRoute)

WorkerName = Annotated[str, Path(max_length=100)]


@router.get("/workers", summary="What every worker does")
def workers(_: Reads, view: TheView) -> WorkersReply:
    return WorkersReply(data=[worker_of(worker) for worker in view.workers()])


@router.post("/workers/{name}/drain", status_code=202, summary="Let a worker start nothing new")
def drain(name: WorkerName, _: Submits, view: TheView) -> WorkerReply:
    """What it has, it finishes. Others (external consumers) may do its stage meanwhile."""
    found = _known(view, name)
    view.control.drain(name)
    view.look_again()
    return found.model_copy(update={"drained": True})


@router.post("/workers/{name}/undrain", status_code=202, summary="Let it go on")
def undrain(name: WorkerName, _: Submits, view: TheView) -> WorkerReply:
    found = _known(view, name)
    view.control.undrain(name)
    view.look_again()
    return found.model_copy(update={"drained": False})


@router.get("/timeline", summary="What every worker did lately")
def timeline(_: Reads, view: TheView, seconds: Annotated[float, Query(gt=0, le=120)] = 60.0) -> TimelineReply:
    """Of a run that has ended, its last seconds. A worker with a slash in its name (`generation/3`) is a lane of
    completions, each by itself."""
    return TimelineReply(
        spans=[
            SpanReply(
                worker=span["worker"],
                activity=span["activity"],
                start=moment(span["start"]),
                end=moment(span["end"]),
                cause=span["cause"],
            )
            for span in view.timeline(seconds)
        ]
    )


@router.get("/engines", summary="What every rollout engine serves")
def engines(_: Reads, view: TheView) -> EnginesReply:
    return EnginesReply(data=[EngineReply.model_validate(engine) for engine in view.engines()])


def worker_of(worker: Mapping[str, Any]) -> WorkerReply:
    cause = worker["cause"]
    return WorkerReply(
        name=worker["name"],
        stage=worker["stage"],
        activity=worker["activity"],
        cause=cause,
        waits_for=None if cause is None else in_words(cause),
        since_seconds=worker["since_seconds"],
        heartbeat_seconds=worker["heartbeat_seconds"],
        drained=worker["drained"],
        shares=Shares.model_validate(worker["shares"]),
    )


def _known(view: RunView, name: str) -> WorkerReply:
    view.check_live()
    for worker in view.workers():
        if worker["name"] == name:
            return worker_of(worker)
    names = ", ".join(worker["name"] for worker in view.workers())
    raise Problem(404, "no_such_worker", f"this run has no worker of this name: its workers are {names}")
