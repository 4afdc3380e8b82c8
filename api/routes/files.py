"""Files in the shape of OpenAI's files API, of which a fine-tuning job takes its problems."""

from __future__ import annotations

from typing import Annotated, Literal

from asyncflow_api.dependencies import Reads, Submits, TheJobs
from asyncflow_api.files import Files
from asyncflow_api.jobs.database import NoSuchFile
from asyncflow_api.jobs.rows import FileRow
from asyncflow_api.problems import Problem
from asyncflow_api.schemas_openai import DeletedFile, FileObject, OpenAIList
from asyncflow_api.specification import answers
from fastapi import APIRouter, Depends, File, Form, Query, UploadFile
from fastapi.responses import FileResponse

router = APIRouter(prefix="/v1", tags=["files"])


def the_files(jobs: TheJobs) -> Files:
    return Files(jobs)


TheFiles = Annotated[Files, Depends(the_files)]
After = Annotated[str | None, Query(max_length=100, description="The id of the last item that came.")]


@router.post("/files")
def upload(
    files: TheFiles,
    _: Submits,
    file: Annotated[UploadFile, File(description="JSON Lines with `messages` or a `prompt`.")],
    purpose: Annotated[str, Form(max_length=64)],
) -> FileObject:
    """Keep a file of problems, one JSON object a line. It is read before it is kept, so it can be used at once."""
    if purpose != "fine-tune":
        raise Problem(400, "invalid_purpose", "purpose: files are for fine-tune here", field="body.purpose")
    name = "".join(one for one in (file.filename or "") if one.isprintable())[:255]
    return _object(files.add(name or "file.jsonl", file.file.read()))


@router.get("/files")
def list_files(
    jobs: TheJobs,
    _: Reads,
    *,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    order: Literal["asc", "desc"] = "desc",
) -> OpenAIList[FileObject]:
    """Files, the newest first."""
    if purpose not in (None, "fine-tune"):
        return OpenAIList[FileObject](data=[], has_more=False)
    try:
        position = None if after is None else jobs.database.file(after).seq
    except NoSuchFile as error:
        raise Problem(400, "no_such_file", f"after: {error}", field="query.after") from None
    rows = jobs.database.files(after=position, newest_first=order == "desc", limit=limit + 1)
    found = [_object(row) for row in rows[:limit]]
    ids = [one.id for one in found] or [None]
    return OpenAIList[FileObject](data=found, has_more=len(rows) > limit, first_id=ids[0], last_id=ids[-1])


@router.get("/files/{file_id}")
def get_file(file_id: str, jobs: TheJobs, _: Reads) -> FileObject:
    """One file."""
    try:
        return _object(jobs.database.file(file_id))
    except NoSuchFile as error:
        raise no_file(error) from None


@router.get(
    "/files/{file_id}/content",
    response_class=FileResponse,
    responses=answers("application/octet-stream", description="Its bytes"),
)
def content(file_id: str, files: TheFiles, _: Reads) -> FileResponse:
    """What was sent, to the byte."""
    try:
        return FileResponse(files.content(file_id), media_type="application/octet-stream")
    except NoSuchFile as error:
        raise no_file(error) from None


@router.delete("/files/{file_id}")
def delete_file(file_id: str, files: TheFiles, _: Submits) -> DeletedFile:
    """Forget a file that no job reads any more."""
    try:
        files.delete(file_id)
    except NoSuchFile as error:
        raise no_file(error) from None
    return DeletedFile(id=file_id)


def no_file(error: NoSuchFile) -> Problem:
    return Problem(404, "no_such_file", f"{error}: GET /v1/files lists those that there are", field="path.file_id")


def _object(row: FileRow) -> FileObject:
    return FileObject(
        id=row.id, bytes=row.bytes, created_at=int(row.created_at), filename=row.name, purpose=row.purpose
    )
