"""Producers and consumers outside of a run, over HTTP: prompts and finished samples in, leases out, results back.

Bodies are JSON, or an Arrow IPC stream (`Content-Type: application/vnd.apache.arrow.stream`) with the columns of the
store; what else a request has to say stands in the query then. Compressed ones are refused before they are unpacked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final, TypeVar

import pyarrow as pa
from asyncflow_api import exchange
from asyncflow_api.dependencies import Submits
from asyncflow_api.problems import Problem
from asyncflow_api.refusals import RunRoute
from asyncflow_api.runs import RunView, TheView
from asyncflow_api.schemas_run import (
    AckRequest,
    AdmittedGroup,
    LeaseReply,
    LeaseRequest,
    LeaseUpdate,
    NackRequest,
    PromptsRequest,
    PutName,
    PutReply,
    RenewRequest,
    SamplesRequest,
    Wait,
    moment,
)
from asyncflow_api.specification import answers
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ValidationError

from asyncflow.store.client import Lease
from asyncflow.store.events import PutId
from asyncflow.store.ipc import MEDIA_TYPE, read_stream, write_stream

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["exchange"], route_class=RunRoute)

MAX_BODY: Final = 64 << 20
"""Bytes of one body."""
MOST_WAITING: Final = 16
"""Requests that may wait at the same time: each has a thread, of which the others need some too."""

LeaseId = Annotated[int, Path(ge=0, lt=1 << 63)]
StageName = Annotated[str, Path(max_length=100)]
Asked = TypeVar("Asked", bound=BaseModel)
Columns = tuple[pa.RecordBatch, pa.RecordBatch | None]

_waiting = threading.BoundedSemaphore(MOST_WAITING)


class Received:
    """The body of a request: JSON, or columns."""

    def __init__(self, data: bytes, media_type: str) -> None:
        self.data = data
        self.is_arrow = media_type == MEDIA_TYPE
        if not self.is_arrow and media_type not in ("", "application/json"):
            text = f"send application/json or {MEDIA_TYPE}"
            raise Problem(415, "media_type", text, field="header.content-type")

    def json(self, kind: type[Asked]) -> Asked:
        """Raises Problem."""
        try:
            return kind.model_validate_json(self.data)
        except ValidationError as error:
            found = [
                (".".join(("body", *map(str, one["loc"]))), one["msg"])
                for one in error.errors(include_input=False, include_url=False)[:50]
            ]
            text = "; ".join(f"{field}: {message}" for field, message in found)
            raise Problem(422, "invalid_request", text, errors=found) from None

    def columns(self) -> pa.RecordBatch:
        """Raises StoreError."""
        return read_stream(self.data)


async def the_body(request: Request) -> Received:
    """Raises Problem for a body that is compressed, too large, or of another type."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        text = "bodies are not taken compressed: send it as it is"
        raise Problem(415, "compressed", text, field="header.content-encoding")
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_BODY:
            raise Problem(413, "too_large", f"this body may have {MAX_BODY} bytes: send less at a time", field="body")
        pieces.append(piece)
    return Received(b"".join(pieces), request.headers.get("content-type", "").partition(";")[0].strip().lower())


def the_put(
    producer: Annotated[str | None, Query(max_length=100)] = None,
    epoch: Annotated[int, Query(ge=0, lt=1 << 31)] = 0,
    sequence: Annotated[int | None, Query(ge=0, lt=1 << 63)] = None,
) -> PutId | None:
    """What names a put whose body is Arrow, so that it can be repeated."""
    if producer is None and sequence is None:
        return None
    if producer is None or sequence is None:
        raise Problem(422, "invalid_request", "producer and sequence name a put together: give both", field="query")
    return PutId(producer=producer, epoch=epoch, sequence=sequence)


TheBody = Annotated[Received, Depends(the_body)]
ThePut = Annotated[PutId | None, Depends(the_put)]
Timeout = Annotated[Wait, Query(description="For bodies in Arrow.")]


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    """The body of a route, for the specification."""
    schema = kind.model_json_schema()
    named = schema.pop("$defs", {})
    schema["properties"] = {
        name: _inlined(part, named) if isinstance(part, dict) else part for name, part in schema["properties"].items()
    }
    arrow = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}, MEDIA_TYPE: arrow}}}


def _inlined(schema: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """A schema with what it refers to in its place: there is nowhere in the specification where that could stand."""
    if (name := schema.get("$ref")) is not None:
        return dict(named[name.removeprefix("#/$defs/")])
    choices = [_inlined(choice, named) for choice in schema.get("anyOf", ())]
    return schema | ({"anyOf": choices} if choices else {})


# -- producers ---------------------------------------------------------------------------------------------------------


@router.post("/prompts", status_code=201, summary="Put prompts from outside", openapi_extra=_takes(PromptsRequest))
async def put_prompts(
    _: Submits, view: TheView, body: TheBody, put: ThePut, timeout_seconds: Timeout = 5.0
) -> PutReply:
    """Each becomes a group of samples, as soon as the staleness bound leaves room; 429 `no_room` when it does not."""

    def prompts() -> tuple[Columns, PutId | None, float]:
        if body.is_arrow:
            prompts, samples = exchange.split(body.columns(), view.schema, view.group_size)
            if samples is not None:
                text = f"{samples.schema.names[0]} is no column of a prompt: put finished samples at …/samples"
                raise Problem(422, "invalid_request", text, field="body")
            return (prompts, None), put, timeout_seconds
        asked = body.json(PromptsRequest)
        return (
            (exchange.prompts_of(asked.prompts, view.schema, view.tokenise), None),
            _put_id(asked.put),
            asked.timeout_seconds,
        )

    return await run_in_threadpool(_put, view, prompts)


@router.post("/samples", status_code=201, summary="Put finished samples", openapi_extra=_takes(SamplesRequest))
async def put_samples(
    _: Submits, view: TheView, body: TheBody, put: ThePut, timeout_seconds: Timeout = 5.0
) -> PutReply:
    """Whole groups, generated by somebody else: each row has its prompt and the columns of the stages that it has been
    through. `token_versions` says which policy made each token; the bound holds for them as for all."""

    def samples() -> tuple[Columns, PutId | None, float]:
        if body.is_arrow:
            prompts, samples = exchange.split(body.columns(), view.schema, view.group_size)
            if samples is None:
                text = "these are prompts only: put them at …/prompts, or send response_ids and the like"
                raise Problem(422, "invalid_request", text, field="body")
            return (prompts, samples), put, timeout_seconds
        asked = body.json(SamplesRequest)
        finished = exchange.finished_of(asked.samples, view.schema, view.group_size, view.tokenise)
        return finished, _put_id(asked.put), asked.timeout_seconds

    return await run_in_threadpool(_put, view, samples)


def _put(view: RunView, columns: Callable[[], tuple[Columns, PutId | None, float]]) -> PutReply:
    view.check_live()
    (prompts, samples), put, timeout = columns()
    schema, room = view.schema, view.room
    prompts = exchange.checked(prompts, schema, room)
    samples = None if samples is None else exchange.checked(samples, schema, room)
    with _place(timeout):
        groups = view.put(prompts, samples, put=put, timeout=timeout)
    size = view.group_size
    return PutReply(
        groups=[
            AdmittedGroup(group_id=group, sample_ids=list(range(group * size, (group + 1) * size))) for group in groups
        ]
    )


def _put_id(name: PutName | None) -> PutId | None:
    return None if name is None else PutId(producer=name.producer, epoch=name.epoch, sequence=name.sequence)


# -- consumers ---------------------------------------------------------------------------------------------------------


@router.post(
    "/stages/{stage}/leases",
    response_model=LeaseReply,
    summary="Take samples that are ready for a stage",
    responses=answers(MEDIA_TYPE, description="The lease") | {204: {"description": "As columns: nothing was ready"}},
)
def lease(stage: StageName, asked: LeaseRequest, request: Request, _: Submits, view: TheView) -> LeaseReply | Response:
    """They belong to the worker until it acks or nacks them, or the lease ends. With `Accept:
    application/vnd.apache.arrow.stream` the answer is columns, with `X-Lease-Id` and `X-Lease-Deadline` in its headers
    (204: nothing was ready)."""
    view.check_live()
    with _place(asked.timeout_seconds):
        found = view.lease(
            stage,
            worker=asked.worker,
            max_rows=asked.max_samples,
            min_rows=min(asked.min_samples, asked.max_samples),
            ttl=asked.ttl_seconds,
            timeout=asked.timeout_seconds,
        )
    deadline = moment(time.time() + asked.ttl_seconds)
    if MEDIA_TYPE in request.headers.get("accept", ""):
        return _columns(found, deadline)
    if found is None:
        return LeaseReply(lease_id=None, deadline=None, samples=[])
    return LeaseReply(lease_id=found.lease_id, deadline=deadline, samples=exchange.rows_of(found))


def _columns(found: Lease | None, deadline: str) -> Response:
    if found is None:
        return Response(status_code=204)
    headers = {"X-Lease-Id": str(found.lease_id), "X-Lease-Deadline": deadline}
    return Response(write_stream(exchange.batch_of(found)), media_type=MEDIA_TYPE, headers=headers)


@router.post("/leases/{lease_id}/renew", summary="Keep samples for longer")
def renew(lease_id: LeaseId, asked: RenewRequest, _: Submits, view: TheView) -> LeaseUpdate:
    view.check_live()
    view.renew(lease_id, ttl=asked.ttl_seconds)
    return LeaseUpdate(lease_id=lease_id, samples=0, deadline=moment(time.time() + asked.ttl_seconds))


@router.post("/leases/{lease_id}/ack", summary="Bring results", openapi_extra=_takes(AckRequest))
async def ack(lease_id: LeaseId, _: Submits, view: TheView, body: TheBody) -> LeaseUpdate:
    """All columns that the stage writes, of some samples of the lease, which go back with that: all or nothing."""

    def bring() -> LeaseUpdate:
        view.check_live()
        stage = view.stage_of(lease_id)
        schema = view.schema
        if body.is_arrow:
            ids, columns = exchange.acked_in(body.columns(), schema, stage)
        else:
            ids, columns = exchange.acked_of(body.json(AckRequest).samples, schema, stage)
        columns = None if columns is None else exchange.checked(columns, schema, view.room)
        view.ack(lease_id, ids, columns)
        return LeaseUpdate(lease_id=lease_id, samples=len(ids))

    return await run_in_threadpool(bring)


@router.post("/leases/{lease_id}/nack", summary="Give samples back undone")
def nack(lease_id: LeaseId, asked: NackRequest, _: Submits, view: TheView) -> LeaseUpdate:
    """`final` puts them into quarantine; so does the third time."""
    view.check_live()
    view.nack(lease_id, asked.sample_ids, reason=asked.reason, final=asked.final)
    return LeaseUpdate(lease_id=lease_id, samples=len(asked.sample_ids))


@contextmanager
def _place(timeout: float) -> Iterator[None]:
    """A place among those who wait. Raises Problem when there is none."""
    if not timeout:
        yield
        return
    if not _waiting.acquire(blocking=False):
        text = f"{MOST_WAITING} requests wait already: try again, or ask with timeout_seconds 0"
        raise Problem(429, "too_many_waiting", text, headers={"Retry-After": "1"})
    try:
        yield
    finally:
        _waiting.release()
