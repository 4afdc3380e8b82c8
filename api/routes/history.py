"""What a job has said and left: events, logs, checkpoints, the report."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

from asyncflow_api import sse
from asyncflow_api.dependencies import Reads, TheJobs, served
from asyncflow_api.jobs.database import NoSuchJob
from asyncflow_api.jobs.events import Cursor
from asyncflow_api.jobs.log import LogReader
from asyncflow_api.jobs.rows import EventRow
from asyncflow_api.jobs.service import Jobs
from asyncflow_api.pages import CursorText, Limit, Page, page_of, position
from asyncflow_api.problems import Problem
from asyncflow_api.schemas import CheckpointBody, EventBody, ListedJob, event_body, rfc3339
from asyncflow_api.specification import answers
from asyncflow_api.watch import Batch, Sight
from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response

from asyncflow.errors import CheckpointError
from asyncflow.rundir import CHECKPOINTS
from asyncflow.runtime.checkpoint import read

router = APIRouter(prefix="/v1", tags=["history"])

LastEventId = Annotated[
    str | None, Header(max_length=64, description="Where a stream goes on: the id of the last event that came.")
]
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox; frame-ancestors 'self'"
MOST_EVENTS = 200
"""Events that are read at once for a stream."""
LOG_PIECE = 1 << 16
"""Bytes of a log that are read at once."""


@router.get(
    "/jobs/{job_id}/events",
    response_model=Page[EventBody],
    responses=answers(sse.MEDIA_TYPE, description="A page, or a stream"),
)
def events(
    job_id: str,
    request: Request,
    jobs: TheJobs,
    _: Reads,
    *,
    cursor: CursorText = None,
    limit: Limit = 20,
    tail: Annotated[
        int | None, Query(ge=0, le=10_000, description="A stream begins with so many of the newest lines of the run.")
    ] = None,
    last_event_id: LastEventId = None,
) -> Page[EventBody] | Response:
    """Events, oldest first: a page, or with `Accept: text/event-stream` all of them and then those that come.

    Where a stream is over because the job has ended, its last event is `end`.
    """
    jobs.get(job_id)
    if wants_stream(request):
        begin = last_event_id or cursor
        start = jobs.newest(job_id, tail) if begin is None and tail is not None else _cursor(begin)
        answer: Response = sse.stream(request, ("events", job_id), lambda: JobEvents(jobs, job_id), start)
        return answer
    after = _cursor(position("events", cursor))
    found, _at = jobs.events_after(job_id, after, limit + 1)
    return page_of("events", [event_body(one) for one in found], limit, [one.id for one in found])


class JobEvents:
    """What is watched: the events of one job."""

    def __init__(self, jobs: Jobs, job_id: str) -> None:
        self._jobs = jobs
        self._job_id = job_id
        self.end = sse.encode("end", {"job_id": job_id})

    def changed(self) -> object:
        return self._jobs.news(self._job_id)

    def look(self) -> Sight:
        try:
            ended = self._jobs.get(self._job_id).ended  # before the events are counted: none comes after
        except NoSuchJob:
            return Sight(over=True)
        return Sight(until=self._jobs.events_end(self._job_id), over=ended)

    def read(self, at: Cursor, until: Cursor) -> Batch:
        """Raises NoSuchJob."""
        found, after = self._jobs.events_after(self._job_id, at, MOST_EVENTS, until=until)
        return b"".join(sse.encode(one.type, event_body(one), one.id) for one in found), after


@router.get("/events", response_class=Response, responses=answers(sse.MEDIA_TYPE, description="A stream"))
def fleet(request: Request, jobs: TheJobs, _: Reads, last_event_id: LastEventId = None) -> Response:
    """A stream of all jobs: event `job` with a job as lists have it, `deleted` with its id; from now on, or a point on.

    What changed in between is told once, as it is by then. How far live jobs are is told by `progress`, without an id:
    each replaces the one before.
    """
    if not wants_stream(request):
        raise Problem(406, "only_a_stream", "send Accept: text/event-stream", field="header.accept")
    start = jobs.database.last_event()
    if last_event_id is not None:
        if not last_event_id.isdecimal() or len(last_event_id) > 18:
            raise _bad_id()
        start = int(last_event_id)

    answer: Response = sse.stream(request, "fleet", lambda: Fleet(jobs), start)
    return answer


class Fleet:
    """What is watched: all jobs. What changed is told with an id, how far they are without."""

    end = b""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def changed(self) -> object:
        return self._jobs.database.changes, self._steps()

    def look(self) -> Sight:
        steps = self._steps()
        told = (sse.encode("progress", {"id": id_, "progress": one}) for id_, one in self._jobs.progresses().items())
        return Sight(until=self._jobs.database.last_event(), picture=b"".join(told), told=steps)

    def read(self, at: int, until: int) -> Batch:
        found = [one for one in self._jobs.database.all_events(after=at, limit=MOST_EVENTS) if one.seq <= until]
        # By the last event of each: whoever goes on from any of these ids has missed nothing.
        latest = sorted({one.job_id: one for one in found}.values(), key=lambda one: one.seq)
        return b"".join(map(self._told, latest)), (found[-1].seq if found else at)

    def _told(self, event: EventRow) -> bytes:
        if event.type == "deleted":
            return bytes(sse.encode("deleted", {"id": event.job_id}, str(event.seq)))
        try:
            job = ListedJob(**served(self._jobs, self._jobs.get(event.job_id)).model_dump())
        except NoSuchJob:
            return b""  # its deletion is told next
        return bytes(sse.encode("job", job, str(event.seq)))

    def _steps(self) -> tuple[tuple[str, int], ...]:
        return tuple((id_, one["step"]) for id_, one in self._jobs.progresses().items())


@router.get(
    "/jobs/{job_id}/logs",
    response_class=PlainTextResponse,
    responses=answers("text/plain", sse.MEDIA_TYPE, description="A piece of the log, or a stream"),
)
def logs(
    job_id: str,
    request: Request,
    jobs: TheJobs,
    _: Reads,
    *,
    tail: Annotated[int | None, Query(ge=0, le=100_000, description="Only the last lines.")] = None,
    offset: Annotated[int | None, Query(ge=0, le=1 << 50, description="From this byte of the log on.")] = None,
    last_event_id: LastEventId = None,
) -> Response:
    """What the process wrote to its terminal, at most 1 MiB at once; `X-Next-Offset` is where it goes on.

    With `Accept: text/event-stream` a stream: events `log` with `text`, whose ids are offsets.
    """
    job = jobs.get(job_id)
    log = LogReader(jobs.folder(job_id).log, jobs.redactor(job))
    start = offset if offset is not None else log.last_lines(tail) if tail is not None else 0
    if not wants_stream(request):
        text, after = log.read(start, 1 << 20, ended=job.ended)
        return PlainTextResponse(text, headers={"X-Next-Offset": str(after)})
    if last_event_id is not None:
        if not last_event_id.isdecimal() or len(last_event_id) > 15:
            raise _bad_id()
        start = int(last_event_id)

    answer: Response = sse.stream(request, ("log", job_id), lambda: JobLog(jobs, job_id, log), start)
    return answer


class JobLog:
    """What is watched: the log of one job."""

    def __init__(self, jobs: Jobs, job_id: str, log: LogReader) -> None:
        self._jobs = jobs
        self._job_id = job_id
        self._log = log
        self._ended = False
        self.end = sse.encode("end", {"job_id": job_id})

    def changed(self) -> object:
        return self._jobs.database.changes, self._log.size()

    def look(self) -> Sight:
        try:
            self._ended = self._jobs.get(self._job_id).ended
        except NoSuchJob:
            return Sight(over=True)
        return Sight(until=self._log.size(), over=self._ended)

    def read(self, at: int, until: int) -> Batch:  # noqa: ARG002 - lines end where they end
        text, after = self._log.read(at, LOG_PIECE, ended=self._ended)
        return (sse.encode("log", {"text": text, "offset": after}, str(after)) if after != at else b""), after


@router.get("/jobs/{job_id}/checkpoints")
def checkpoints(
    job_id: str, jobs: TheJobs, _: Reads, cursor: CursorText = None, limit: Limit = 20
) -> Page[CheckpointBody]:
    """Complete checkpoints of a run, oldest first."""
    found = list(islice(complete_checkpoints(jobs.run_dir(job_id), position("checkpoints", cursor) or ""), limit + 1))
    return page_of("checkpoints", [body for body, _written in found], limit, [body.id for body, _written in found])


def complete_checkpoints(run_dir: Path, after: str = "") -> Iterator[tuple[CheckpointBody, float]]:
    """Those of a run behind one of this id, oldest first, and when they were written, in seconds since the epoch."""
    for folder in sorted((run_dir / CHECKPOINTS).glob("step-*")):
        if folder.name <= after:
            continue
        try:
            one, written = read(folder), folder.stat().st_mtime
        except (CheckpointError, OSError):
            continue  # it was removed in this moment, as newer ones are there
        body = CheckpointBody(
            id=folder.name,
            step=one.version.n,
            version=str(one.version),
            digest=one.digest,
            bytes=sum(size for size, _digest in one.files.values()),
            created_at=rfc3339(written),
        )
        yield body, written


@router.get("/jobs/{job_id}/report", response_class=FileResponse, responses=answers("text/html", description="A page"))
def report(job_id: str, jobs: TheJobs, _: Reads) -> Response:
    """The report of a run that has ended, as a page that can do nothing but be looked at."""
    path = jobs.report(job_id)
    if path is None:
        raise Problem(404, "no_report", "there is no report: it is written when the run ends, if it had begun")
    headers = {"Content-Security-Policy": REPORT_POLICY}
    hide = jobs.redactor(jobs.get(job_id))
    if hide.longest:  # it shows the configuration
        return Response(hide.text(path.read_text(encoding="utf-8")), media_type="text/html", headers=headers)
    return FileResponse(path, media_type="text/html", headers=headers)


def wants_stream(request: Request) -> bool:
    """Whether the client asked for server-sent events."""
    return sse.MEDIA_TYPE in request.headers.get("accept", "")


def _cursor(text: str | None) -> Cursor:
    if text is None:
        return Cursor()
    try:
        return Cursor.parse(text)
    except ValueError:
        raise _bad_id() from None


def _bad_id() -> Problem:
    text = "Last-Event-ID: take it from the last event that came, or leave it out"
    return Problem(400, "bad_cursor", text, field="header.last-event-id")
