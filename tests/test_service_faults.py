"""What a service does when the disk, the database or a run lets it down: no job is lost, none started a second time."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from asyncflow_api.files import Files
from asyncflow_api.jobs.database import Database, KeyReused
from asyncflow_api.jobs.folder import Exit, JobFolder, Started, began
from asyncflow_api.jobs.lifecycle import State
from asyncflow_api.jobs.rows import JobRow, NewJob, Once, Reason
from asyncflow_api.jobs.scheduler import _last_line
from asyncflow_api.jobs.service import Jobs
from asyncflow_api.runs import RunView
from asyncflow_api.settings import Settings

from asyncflow.errors import ControlError
from asyncflow.rundir import LEDGER, SOCKET
from asyncflow.runtime.metrics import read_metrics
from tests.processes import DEADLINE, wait_until
from tests.run_service import service
from tests.running_service import tiny

NEW = NewJob(name="run", config=tiny(), labels={})
WAY = (State.queued, State.starting, State.running)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of a service without a slot: nothing starts by itself."""
    return Settings(home=tmp_path / "home", slots=0)


@pytest.fixture
def jobs(settings: Settings) -> Iterator[Jobs]:
    with closing(Jobs(settings)) as jobs:
        yield jobs


def job_that_is(jobs: Jobs, state: State) -> tuple[str, JobFolder]:
    """As a service that was killed left it."""
    job, _ = jobs.database.add(NEW)
    for to in WAY[: WAY.index(state) + 1]:
        jobs.database.move(job.id, to, message="moved")
    folder = jobs.folder(job.id)
    folder.path.mkdir()
    return job.id, folder


def reason_of(jobs: Jobs, job_id: str, state: State) -> Reason | None:
    wait_until(lambda: jobs.get(job_id).state is state)
    reason: Reason | None = jobs.get(job_id).reason
    return reason


# -- disk and database -------------------------------------------------------------------------------------------------


def test_a_database_that_was_lost_does_not_take_the_runs_with_it(jobs: Jobs, settings: Settings) -> None:
    run, _ = job_that_is(jobs, State.running)
    deleted, _ = job_that_is(jobs, State.running)
    jobs.database.move(deleted, State.failed, message="failed")
    jobs.database.delete(deleted)  # and then the service was killed
    jobs.start()
    assert [folder.name for folder in settings.jobs_dir.iterdir()] == [run]

    jobs.close()
    settings.database.unlink()
    with closing(Jobs(settings)) as another:
        another.start()

    assert [folder.name for folder in settings.jobs_dir.iterdir()] == [run]


def test_a_job_is_looked_after_again_when_the_database_can_be_written_again(
    jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    job_id, folder = job_that_is(jobs, State.running)
    folder.add_start()
    folder.end(Exit(outcome="finished", code="finished", message="done"))
    jobs.database.read("PRAGMA query_only=1")
    jobs.start()
    wait_until(lambda: f"{job_id} cannot be looked after" in caplog.text)
    assert jobs.get(job_id).state is State.running

    jobs.database.read("PRAGMA query_only=0")

    assert reason_of(jobs, job_id, State.succeeded) is None


def test_a_job_that_ran_and_lost_its_folder_is_not_started_again(jobs: Jobs) -> None:
    job_id, folder = job_that_is(jobs, State.running)
    folder.path.rmdir()
    jobs.start()

    reason = reason_of(jobs, job_id, State.failed)

    assert reason is not None
    assert "was removed" in reason.message
    assert not folder.log.exists()  # nobody was started


def test_a_first_line_that_the_full_disk_tore_is_none(jobs: Jobs) -> None:
    """Its process ended with it, before it did anything."""
    job_id, folder = job_that_is(jobs, State.starting)
    (folder.path / "started.json").write_text('{"pid": 12, "beg')
    jobs.start()

    assert reason_of(jobs, job_id, State.queued) is None


def test_the_last_line_of_a_log_is_found_however_long_the_log_is(jobs: Jobs) -> None:
    _, folder = job_that_is(jobs, State.starting)
    with folder.log.open("wb") as log:
        log.truncate(1 << 42)  # more than any machine holds; on the disk it is nothing
        log.seek(0, os.SEEK_END)
        log.write(b"\nit said why\n \n")

    assert _last_line(folder) == "it said why"


@pytest.mark.parametrize("text", ["", "{", "null", '{"outcome": "great", "code": "", "message": ""}', '{"a": 1}'])
def test_an_end_that_cannot_be_read_is_a_failure_that_says_so(jobs: Jobs, text: str) -> None:
    job_id, folder = job_that_is(jobs, State.running)
    folder.add_start()
    (folder.path / "exit.json").write_text(text)
    jobs.start()

    reason = reason_of(jobs, job_id, State.failed)

    assert reason is not None
    assert "exit.json is damaged" in reason.message


def test_a_process_is_known_by_when_it_began() -> None:
    own = began(os.getpid())

    assert Started(pid=os.getpid(), began=own, at=0.0).process() is not None
    assert Started(pid=os.getpid(), began=own - 1, at=0.0).process() is None
    assert own < began_of_a_child()


def began_of_a_child() -> int:
    child = os.posix_spawn(
        "/bin/cat",
        ["cat"],
        {},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/zero", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
        ],
    )
    try:
        return began(child)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_files_of_a_lost_database_stay_and_what_was_never_finished_goes(jobs: Jobs, settings: Settings) -> None:
    files = Files(jobs)
    kept = files.add("a.jsonl", b'{"prompt": "1 + 1 ="}')
    files.delete(files.add("b.jsonl", b'{"prompt": "2 + 2 ="}').id)
    (settings.files_dir / "file-0.part").mkdir()
    jobs.close()
    settings.database.unlink()

    with closing(Jobs(settings)) as another:
        Files(another).tidy()

    assert [folder.name for folder in settings.files_dir.iterdir()] == [kept.id]


@pytest.mark.parametrize("content", [b"", b"no ledger at all" * 1000])
def test_a_ledger_that_cannot_be_read_is_said_to_be_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LEDGER).write_bytes(content)
    with service(job=tmp_path) as http:
        for path in ("queue", "samples", "samples/1"):
            answer = http.get(f"/v1/jobs/job/{path}")
            assert (answer.status_code, answer.json()["code"]) == (409, "run_unreadable")


def test_lines_that_are_no_measurements_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'[]\n"kind"\n\xff\n{"kind": "step", "step": 1}\n{"kind": "st')

    assert read_metrics(path, "step") == [{"kind": "step", "step": 1}]


# -- two things in one moment ------------------------------------------------------------------------------------------


class Meanwhile(Database):  # type: ignore[misc]
    """A database in which something else happens just before the next change."""

    meanwhile: Callable[[], object] | None = None

    def _now(self) -> None:
        happens, self.meanwhile = self.meanwhile, None
        if happens is not None:
            happens()

    def move(self, *args: Any, **more: Any) -> JobRow:
        self._now()
        return super().move(*args, **more)

    def change(self, *args: Any, **more: Any) -> JobRow:
        self._now()
        return super().change(*args, **more)


@pytest.fixture
def racing(jobs: Jobs) -> Meanwhile:
    jobs.database.close()
    jobs.database = Meanwhile(jobs.settings.database)
    return jobs.database


def test_a_job_that_gets_its_slot_while_it_is_cancelled_is_being_cancelled(jobs: Jobs, racing: Meanwhile) -> None:
    job_id, _ = job_that_is(jobs, State.queued)
    racing.meanwhile = lambda: racing.move(job_id, State.starting, message="it has a slot")

    assert jobs.wish(job_id, "cancel").state is State.cancelling


def test_a_bound_is_not_said_to_be_changed_when_the_job_got_its_slot_with_the_old_one(
    jobs: Jobs, racing: Meanwhile
) -> None:
    job_id, _ = job_that_is(jobs, State.queued)
    racing.meanwhile = lambda: racing.move(job_id, State.starting, message="it has a slot")

    with pytest.raises(ControlError):  # its run cannot be asked yet
        jobs.change(job_id, {"max_staleness": 3}, revision=None)

    assert jobs.get(job_id).max_staleness is None


def test_many_at_once_with_one_idempotency_key_make_one_job(jobs: Jobs) -> None:
    same, other = (Once(key="k", owner="tok", digest=digest) for digest in ("a", "b"))
    made: list[tuple[str, bool]] = []
    refused: list[str] = []

    def submit(once: Once) -> None:
        try:
            job, again = jobs.database.add(NEW, once=once)
            made.append((job.id, again))
        except KeyReused:
            refused.append(once.digest)

    submit(same)
    threads = [threading.Thread(target=submit, args=(once,)) for once in [same, other] * 20]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)

    (job,) = jobs.database.jobs()
    assert sorted(made) == [(job.id, False)] + [(job.id, True)] * 20
    assert refused == ["b"] * 20


# -- a run that hangs --------------------------------------------------------------------------------------------------


def test_a_run_that_hangs_is_asked_by_one_for_all(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as hangs:
        hangs.bind(str(tmp_path / SOCKET))
        hangs.listen(64)
        view = RunView(tmp_path)
        threads = [threading.Thread(target=view.workers) for _ in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)

        assert not any(thread.is_alive() for thread in threads)
        assert 1 <= asked(hangs) <= 5


def asked(listener: socket.socket) -> int:
    """Connections that wait."""
    listener.setblocking(False)
    found = 0
    while True:
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return found
        found += 1
