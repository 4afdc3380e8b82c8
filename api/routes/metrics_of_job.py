"""The measurements of a run as series over its steps."""

from __future__ import annotations

from typing import Annotated

from asyncflow_api.dependencies import Reads
from asyncflow_api.refusals import RunRoute
from asyncflow_api.runs import TheView
from asyncflow_api.schemas_run import MetricsReply, SeriesReply, moment
from fastapi import APIRouter, Query

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["metrics"], route_class=RunRoute)


@router.get("/metrics", summary="Measurements over the steps")
def metrics(
    _: Reads,
    view: TheView,
    *,
    names: Annotated[str | None, Query(max_length=4000, description="Separated by commas; all when left out.")] = None,
    since_step: Annotated[int, Query(ge=-1, lt=1 << 31, description="Only points of later steps.")] = -1,
    points: Annotated[
        int | None, Query(ge=2, le=1_000_000, description="About so many of each, evenly taken; all when left out.")
    ] = None,
) -> MetricsReply:
    """Names that a run does not have are left out of the answer."""
    wanted = None if names is None else [name.strip() for name in names.split(",") if name.strip()]
    found = view.measured.series(wanted, since_step=since_step, points=points)
    return MetricsReply(
        names=view.measured.names(),
        series={
            name: SeriesReply(step=series.step, time=[moment(at) for at in series.time], value=series.value)
            for name, series in found.items()
        },
    )
