"""Files that clients leave here to train on: JSON Lines, looked at line by line before anything is kept.

<home>/files/<id>/content.jsonl    as it was sent
<home>/files/<id>/prompts.jsonl    the same as a run reads it: with a column `prompt` in place of `messages`

A name comes from the service; what the sender calls the file is only told back.
"""

from __future__ import annotations

import io
import json
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from asyncflow_api.jobs.database import NoSuchFile
from asyncflow_api.jobs.rows import FileRow
from asyncflow_api.jobs.service import Jobs
from asyncflow_api.limits import check_json
from asyncflow_api.problems import Problem

from asyncflow.config import DataConfig
from asyncflow.data import load_problems
from asyncflow.errors import DataError

CONTENT: Final = "content.jsonl"
PROMPTS: Final = "prompts.jsonl"
UNFINISHED: Final = ".part"
"""Behind the name of a folder that is being made or removed."""
MAX_LINES: Final = 100_000
MAX_COLUMNS: Final = 64
ROLES: Final[Mapping[str, str]] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Role → what it is in a chat template; `developer` is what newer models of OpenAI call the system."""
TAKEN: Final = frozenset({"prompts", "completions", "completion_ids"})
"""What reward functions get under these names is no column."""

_reading = threading.BoundedSemaphore(2)
"""Files that are looked at at once: each is in memory as long as it takes."""


class Files:
    """The files of one service."""

    def __init__(self, jobs: Jobs) -> None:
        self._database = jobs.database
        self._settings = jobs.settings
        self._clock = jobs.clock

    def add(self, name: str, content: bytes) -> FileRow:
        """Keep a file for training. Raises Problem with a sentence that names the line."""
        kept = self._database.files()
        most, room = self._settings.max_files, self._settings.max_files_bytes
        if len(kept) >= most or sum(file.bytes for file in kept) + len(content) > room:
            text = f"there is room for {most} files of together {room} bytes: delete some that nobody needs"
            raise Problem(409, "no_room_for_files", text, field="body.file")
        if not _reading.acquire(timeout=5.0):
            raise Problem(429, "busy", "other files are being read: try again", headers={"Retry-After": "5"})
        try:
            return self._add(name, content)
        finally:
            _reading.release()

    def _add(self, name: str, content: bytes) -> FileRow:
        file_id = f"file-{secrets.token_hex(12)}"
        folder = self._folder(file_id + UNFINISHED)
        folder.mkdir(mode=0o700, parents=True)
        try:
            (folder / CONTENT).write_bytes(content)
            lines, columns = 0, set[str]()
            with (folder / PROMPTS).open("w", encoding="utf-8") as file:
                for row in read_lines(content):
                    file.write(f"{json.dumps(row, ensure_ascii=False)}\n")
                    columns = columns & row.keys() if lines else {*row}
                    lines += 1
            try:
                distinct = load_problems(DataConfig(train=str(folder / PROMPTS)), seed=0).distinct
            except DataError as error:
                sentence = str(error).replace(f" of {folder / PROMPTS}", "")
                raise bad_file(sentence) from None
            new = FileRow(
                seq=0,
                id=file_id,
                name=name,
                purpose="fine-tune",
                bytes=len(content),
                lines=lines,
                distinct=distinct,
                columns=sorted(columns - {"prompt"}),
                created_at=self._clock.wall(),
            )
            folder = folder.rename(self._folder(file_id))
            return self._database.add_file(new)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def delete(self, file_id: str) -> None:
        """Raises NoSuchFile, and UserError for one that a job still reads."""
        self._database.delete_file(file_id)
        with suppress(OSError):
            gone = self._folder(file_id).rename(self._folder(file_id + UNFINISHED))
            shutil.rmtree(gone, ignore_errors=True)

    def content(self, file_id: str) -> Path:
        """As it was sent. Raises NoSuchFile."""
        return self._folder(self._database.file(file_id).id) / CONTENT

    def prompts(self, file_id: str) -> Path:
        """As a run reads it. Raises NoSuchFile."""
        return self._folder(self._database.file(file_id).id) / PROMPTS

    def get(self, file_id: str, field: str) -> FileRow:
        """For another request. Raises Problem."""
        try:
            return self._database.file(file_id)
        except NoSuchFile as error:
            text = f"{error}: send it to POST /v1/files first, with the purpose fine-tune"
            raise Problem(400, "no_such_file", text, field=field) from None

    def tidy(self) -> None:
        """Remove what is left of files that were deleted, or never came to be; not what another database knew."""
        if self._settings.files_dir.is_dir():
            for folder in self._settings.files_dir.glob(f"*{UNFINISHED}"):
                shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, file_id: str) -> Path:
        folder: Path = self._settings.files_dir.resolve() / file_id
        return folder


def read_lines(content: bytes) -> Iterator[dict[str, Any]]:
    """The lines of a file as rows with a `prompt`. Raises Problem with a sentence that names the line."""
    read = 0
    for number, line in enumerate(io.BytesIO(content), start=1):
        if not line.strip():
            continue
        if read == MAX_LINES:
            raise bad_file(f"it has more than {MAX_LINES} lines: send less")
        read += 1
        yield _row(line, f"line {number}")
    if not read:
        raise bad_file("it has no lines: write one JSON object on each, with `messages` or a `prompt`")


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        check_json(line)
    except Problem as problem:
        reason = problem.detail.removeprefix("the body is not taken: ").replace(" at line 1, column", " at column")
        raise bad_file(f"{where} is not taken: {reason}") from None
    row = json.loads(line)
    if not isinstance(row, dict):
        raise bad_file(f"{where} is no object: write one JSON object on each line, with `messages` or a `prompt`")
    if len(row) > MAX_COLUMNS:
        raise bad_file(f"{where} has more than {MAX_COLUMNS} entries: keep those that the grader needs")
    if found := TAKEN & row.keys():
        raise bad_file(f"{where} has {', '.join(sorted(found))}, which is the name of something else: rename it")
    if ("messages" in row) == ("prompt" in row):
        raise bad_file(f"{where} must have either `messages` or a `prompt`: keep one of them")
    if "messages" in row:
        row["prompt"] = _messages(row.pop("messages"), where)
    return row


def _messages(messages: object, where: str) -> Sequence[Mapping[str, str]]:
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise bad_file(f"{where}: messages must be a list of objects with role and content")
    found = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise bad_file(f"{where}: the role of a message must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise bad_file(f"{where}: the content of a message must be text: AsyncFlow trains on text alone")
        if more := message.keys() - {"role", "content"}:
            raise bad_file(f"{where}: messages have role and content here, not {', '.join(sorted(more))[:80]}")
        found.append({"role": ROLES[role], "content": content})
    if found[-1]["role"] != "user":
        raise bad_file(f"{where}: the last message must be the user's: the model answers it")
    return found


def bad_file(detail: str) -> Problem:
    return Problem(400, "invalid_file", f"the file is not taken: {detail}", field="body.file")
