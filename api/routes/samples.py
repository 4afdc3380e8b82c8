"""The samples of a run, live or ended: lists with filters, and the whole life of one."""

from __future__ import annotations

from typing import Annotated

from asyncflow_api import pages
from asyncflow_api.dependencies import Reads
from asyncflow_api.problems import Problem
from asyncflow_api.refusals import RunRoute
from asyncflow_api.runs import TheView
from asyncflow_api.schemas_run import SampleBrief, SampleReply, SamplesReply
from fastapi import APIRouter, Path, Query

from asyncflow.report.samples import Wanted

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["samples"], route_class=RunRoute)

SampleId = Annotated[int, Path(ge=0, lt=1 << 53)]
Number = Annotated[int | None, Query(ge=0, lt=1 << 31)]


@router.get("/samples", summary="Samples, the latest first")
def samples(
    _: Reads,
    view: TheView,
    *,
    state: Annotated[str | None, Query(max_length=20, description="Where they are in their life.")] = None,
    group_id: Number = None,
    step: Annotated[int | None, Query(ge=1, lt=1 << 31, description="That consumed them.")] = None,
    min_reward: float | None = None,
    max_reward: float | None = None,
    q: Annotated[str | None, Query(min_length=1, max_length=200, description="Part of the text.")] = None,
    limit: pages.Limit = 20,
    cursor: pages.CursorText = None,
) -> SamplesReply:
    """All conditions hold. A page may be short although there are more, when many were looked at to fill it."""
    view.check_begun()
    wanted = Wanted(state=state, group_id=group_id, step=step, min_reward=min_reward, max_reward=max_reward, q=q)
    found, following = view.samples.find(wanted, before=pages.number("samples", cursor), limit=limit)
    return SamplesReply(
        data=[SampleBrief.of(brief) for brief in found],
        has_more=following is not None,
        next_cursor=None if following is None else pages.encode("samples", str(following)),
    )


@router.get("/samples/{sample_id}", summary="The whole life of a sample")
def sample(sample_id: SampleId, _: Reads, view: TheView) -> SampleReply:
    """Its text, tokens with their log-probs and policy versions, rewards, and every event of the ledger about it."""
    view.check_begun()
    if not view.samples.has(sample_id):
        raise Problem(404, "no_such_sample", "no sample of this id was ever admitted: GET …/samples lists them")
    return SampleReply.whole(view.samples.whole(sample_id))
