"""What Prometheus scrapes."""

from __future__ import annotations

from asyncflow_api.dependencies import Reads
from asyncflow_api.jobs.lifecycle import LIVE
from asyncflow_api.measures import MOST_JOBS, JobCollector
from asyncflow_api.runs import RunView, TheRuns
from asyncflow_api.specification import answers
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

router = APIRouter(tags=["metrics"])


@router.get(
    "/metrics",
    response_class=Response,
    summary="Prometheus metrics of the service and its live jobs",
    responses=answers("text/plain", description="Prometheus' text format"),
)
def metrics(request: Request, runs: TheRuns, _: Reads) -> Response:
    """Needs a token of scope `read`, as everything does: `authorization.credentials_file` of the scrape config."""
    jobs = request.app.state.jobs

    def live() -> list[tuple[str, RunView]]:
        found = jobs.database.jobs(states=tuple(LIVE), limit=MOST_JOBS)
        return [(job.id, runs.view(jobs.run_dir(job.id))) for job in found]

    of_jobs = CollectorRegistry()
    of_jobs.register(JobCollector(live))
    requests: CollectorRegistry = request.app.state.measures
    return Response(generate_latest(requests) + generate_latest(of_jobs), media_type=CONTENT_TYPE_LATEST)
