"""The client and the commands against the real service: real processes, real HTTP, real runs with fake engines."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from asyncflow.client import Client
from asyncflow.client.models import Event
from asyncflow.errors import ServiceError, ServiceUnreachable, UserError
from tests.processes import DEADLINE, wait_until
from tests.running_service import ENDLESS, RunningService, tiny

pytestmark = pytest.mark.timeout(900)  # each wait has its own deadline, and there are several


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    service = RunningService(tmp_path_factory.mktemp("service") / "home", "--slots", "2")
    yield service
    service.close()


def client_of(service: RunningService, **more: Any) -> Client:
    return Client(service.address["url"], (service.home / "token").read_text().strip(), **more)


@pytest.fixture(scope="module")
def client(service: RunningService) -> Iterator[Client]:
    with client_of(service) as client:
        yield client


@pytest.fixture(scope="module")
def finished(client: Client) -> str:
    """A job that went through."""
    job = client.submit(tiny(), name="first", labels={"team": "a"}, priority=60)
    assert client.wait(job.id, timeout=DEADLINE).state == "succeeded"
    return job.id


# -- the client --------------------------------------------------------------------------------------------------------


def test_a_job_is_found_with_everything_that_its_run_left(client: Client, finished: str) -> None:
    job = client.job(finished)
    (listed,) = client.jobs(states=["succeeded", "failed"], labels=["team=a"])

    assert (job.state, job.ended, job.priority, job.labels, job.starts) == ("succeeded", True, 60, {"team": "a"}, 1)
    assert job.progress is not None
    assert (job.progress.step, job.progress.steps) == (2, 2)
    assert job.summary is not None
    assert job.summary["outcome"] == "finished"
    assert (listed.id, listed.config, listed.revision) == (job.id, None, job.revision)
    assert [checkpoint.step for checkpoint in client.checkpoints(finished)] == [2]
    queue = client.queue(finished)
    assert queue.counts.admitted == queue.counts.trained + sum(queue.counts.dropped.values()) + queue.counts.open
    assert (queue.live, queue.learner, queue.max_staleness) == (False, "0.2", 1)
    assert client.workers(finished) == []
    metrics = client.metrics(finished, ["reward"])
    assert metrics.series["reward"].step == [1, 2]
    assert set(metrics.series) == {"reward"} < set(metrics.names)


def test_samples_are_found_page_by_page_and_each_has_its_life(client: Client, finished: str) -> None:
    found = list(client.samples(finished))
    trained = [brief for brief in found if brief.state == "trained"]
    whole = client.sample(finished, trained[0].id)

    assert len({brief.id for brief in found}) == len(found) == client.queue(finished).counts.admitted
    assert [brief.id for brief in client.samples(finished, step=1, state="trained")] == [
        brief.id for brief in trained if brief.step == 1
    ]
    assert (whole.id, whole.reward, whole.state) == (trained[0].id, trained[0].reward, "trained")
    assert len(whole.tokens) > 0
    assert [moment.lsn for moment in whole.events] == sorted(moment.lsn for moment in whole.events)


def test_events_and_the_log_are_told_to_their_end_and_from_anywhere(client: Client, finished: str) -> None:
    events = list(client.events(finished))

    assert events == list(client.past_events(finished))
    assert {"state", "step"} <= {event.type for event in events}
    assert list(client.events(finished, after=events[3].id)) == events[4:]
    log = "".join(client.logs(finished))
    assert log == "".join(client.follow_logs(finished))
    assert "".join(client.logs(finished, tail=1)) == "".join(log.splitlines(keepends=True)[-1:])


def test_a_job_rests_goes_on_takes_another_bound_and_is_cancelled(client: Client) -> None:
    job = client.submit(ENDLESS)
    client.wait(job.id, timeout=DEADLINE, states=["running"])

    client.pause(job.id)
    paused = client.wait(job.id, timeout=DEADLINE, states=["paused"])
    with pytest.raises(ServiceError) as stale:
        client.change(job.id, max_staleness=3, revision=paused.revision - 1)
    changed = client.change(job.id, max_staleness=3, revision=paused.revision)
    client.resume(job.id)
    client.wait(job.id, timeout=DEADLINE, states=["running"])
    (engine,) = client.engines(job.id)
    workers = {worker.name for worker in client.workers(job.id)}
    client.cancel(job.id)
    ended = client.wait(job.id, timeout=DEADLINE)

    assert (stale.value.code, stale.value.status) == ("changed", 412)
    assert changed.max_staleness == 3
    assert engine.in_flight >= 0
    assert "reward" in workers
    assert (ended.state, ended.reason and ended.reason.code) == ("cancelled", "cancelled")
    with pytest.raises(ServiceError, match="cancelled") as over:
        client.pause(job.id)
    assert over.value.code == "illegal_state"


def test_the_same_key_is_the_same_job(client: Client) -> None:
    config = tiny(steps=1)

    first, second = client.submit(config, key="once"), client.submit(config, key="once")
    with pytest.raises(ServiceError) as other:
        client.submit(tiny(steps=3), key="once")

    assert first.id == second.id
    assert other.value.code == "idempotency_key_reused"
    client.cancel(first.id)


def test_a_stream_misses_nothing_while_the_service_is_killed_and_started_again(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:  # the service comes back to the port where clients look for it
        port = free.getsockname()[1]
    service = RunningService(tmp_path / "home", "--port", str(port))
    try:
        with client_of(service, patience=DEADLINE) as client:
            job = client.submit(ENDLESS)
            told: list[Event] = []

            def read() -> None:
                for event in client.events(job.id):
                    told.append(event)

            reader = threading.Thread(target=read)
            reader.start()
            for _ in range(2):
                enough = len(told) + 3
                wait_until(lambda enough=enough: len(told) >= enough)  # type: ignore[misc]
                service.kill()
                service.restart()
            client.cancel(job.id)
            reader.join(DEADLINE)

            assert not reader.is_alive()
            assert told == list(client.past_events(job.id))
            steps = [event.data["step"] for event in told if event.type == "step"]
            assert steps == list(range(1, len(steps) + 1))
            assert told[-1].data["to"] == "cancelled"
    finally:
        service.close()


# -- the commands ------------------------------------------------------------------------------------------------------


class Shell:
    """Commands of somebody with a configuration folder of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "asyncflow.cli", *arguments]
        pipe = subprocess.PIPE
        environment = {**os.environ, "XDG_CONFIG_HOME": str(self.home)}
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)

    def __call__(self, *arguments: str, exits: int = 0, stdin: str = "") -> str:
        """What it prints; what it complains about where it is to fail."""
        process = self.start(*arguments)
        out, err = process.communicate(stdin, timeout=DEADLINE)
        assert process.returncode == exits, (arguments, out, err)
        assert "Traceback" not in err
        return err if exits else out


@pytest.fixture(scope="module")
def shell(service: RunningService, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    shell = Shell(tmp_path_factory.mktemp("config"))
    told = shell("login", service.address["url"], "--token-file", str(service.home / "token"))
    assert "who may admin" in told
    return shell


def test_a_login_is_kept_for_its_owner_alone(service: RunningService, shell: Shell) -> None:
    file = shell.home / "asyncflow" / "service.json"
    assert file.stat().st_mode & 0o777 == 0o600

    file.chmod(0o644)
    assert "others can read it" in shell("jobs", exits=2)
    file.chmod(0o600)
    assert json.loads(shell("jobs", "--json")) is not None


def test_a_login_that_does_not_work_changes_nothing(service: RunningService, shell: Shell, tmp_path: Path) -> None:
    kept = (shell.home / "asyncflow" / "service.json").read_bytes()

    assert "token" in shell("login", service.address["url"], "--token-file", "-", stdin="wrong", exits=2)
    assert "--token-file" in shell("login", service.address["url"], exits=2)  # nobody to ask
    assert "--insecure" in shell("login", "http://service.example", "--token-file", "-", stdin="t", exits=2)
    assert "does not answer" in shell("login", "http://127.0.0.1:9", "--token-file", "-", stdin="t", exits=3)
    assert (shell.home / "asyncflow" / "service.json").read_bytes() == kept
    assert "asyncflow login URL" in Shell(tmp_path)("jobs", exits=2)


def test_a_job_is_submitted_and_waited_for(client: Client, shell: Shell, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny()))

    out = shell("submit", str(config), "--set", "steps=1", "--name", "mine", "--priority", "70", "--wait")
    job_id, *told, end = out.splitlines()
    job = client.job(job_id)

    assert (job.name, job.priority, job.state, end) == ("mine", 70, "succeeded", "succeeded")
    assert any("step 1: reward" in line for line in told)
    assert json.loads(shell("wait", job_id, "--json"))["id"] == job_id
    further = json.loads(shell("submit", "--resume-from", job_id, "--set", "steps=2", "--wait", "--json"))
    assert (further["resume_from"], further["state"], further["progress"]["step"]) == (job_id, "succeeded", 2)


def test_a_job_that_fails_exits_with_one_and_a_wrong_one_with_two(shell: Shell, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny()))

    assert "run_dir" in shell("submit", str(config), "--set", "run_dir=/tmp/x", exits=2)
    bad = shell.start("submit", str(config), "--set", "train_batch_size=7", "--wait")
    out, err = bad.communicate(timeout=DEADLINE)

    assert bad.returncode in (1, 2), (out, err)
    assert "train_batch_size" in out + err
    assert "there is no job" in shell("job", "job_" + "0" * 20, exits=2)
    assert "configuration file" in shell("submit", exits=2)


def test_everything_about_a_job_is_shown_for_people_and_for_programs(
    client: Client, shell: Shell, finished: str
) -> None:
    brief = next(client.samples(finished, state="trained"))
    trace = shell("sample", "trace", finished, str(brief.id))
    job = shell("job", finished)

    assert finished in shell("jobs", "--label", "team=a", "--state", "succeeded")
    assert "step        2/2" in job
    assert json.loads(shell("job", finished, "--json"))["state"] == "succeeded"
    assert shell("logs", finished) == shell("logs", finished, "-f") == "".join(client.logs(finished))
    assert len(shell("events", finished).splitlines()) == len(list(client.past_events(finished)))
    ids = [json.loads(line)["id"] for line in shell("events", finished, "-f", "--json").splitlines()]
    after = shell("events", finished, "-f", "--after", ids[2], "--json").splitlines()
    assert [json.loads(line)["id"] for line in after] == ids[3:]
    assert "learner 0.2" in shell("queue", "top", finished)
    assert json.loads(shell("queue", "top", finished, "--json"))["learner"] == "0.2"
    assert f"sample {brief.id} of group {brief.group_id}: trained" in trace
    assert json.loads(shell("sample", "trace", finished, str(brief.id), "--json"))["id"] == brief.id


def test_the_commands_for_runs_steer_jobs_too(client: Client, shell: Shell, tmp_path: Path) -> None:
    job = client.submit(ENDLESS)
    client.wait(job.id, timeout=DEADLINE, states=["running"])

    shell("pause", job.id)
    client.wait(job.id, timeout=DEADLINE, states=["paused"])
    shell("set", job.id, "max_staleness=4")
    assert client.job(job.id).max_staleness == 4
    assert "--resume-from" in shell("resume", job.id, "--set", "steps=3", exits=2)
    shell("resume", job.id)
    client.wait(job.id, timeout=DEADLINE, states=["running"])
    waiting = shell.start("wait", job.id, "--timeout", "0.2")
    assert waiting.communicate(timeout=DEADLINE)[1].endswith("wait longer\n")
    assert waiting.returncode == 2
    run_dir = client.job(job.id).run_dir
    shell("cancel", run_dir)  # a path goes to the run
    assert client.wait(job.id, timeout=DEADLINE).state == "cancelled"
    assert "cancelled" in shell("pause", job.id, exits=2)
    assert str(tmp_path) in shell("pause", str(tmp_path / "none"), exits=2)


def test_a_wait_that_is_interrupted_leaves_the_job_alone(client: Client, shell: Shell, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(ENDLESS))
    waiting = shell.start("submit", str(config), "--wait")
    assert waiting.stdout is not None
    job_id = waiting.stdout.readline().strip()
    waiting.stdout.readline()  # it is told an event, so it follows

    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=DEADLINE)

    assert waiting.returncode == 130
    assert f"{job_id} goes on" in err
    assert not client.job(job_id).ended
    client.cancel(job_id)
    assert client.wait(job_id, timeout=DEADLINE).state == "cancelled"


def test_a_service_that_is_gone_exits_with_three(tmp_path: Path) -> None:
    service = RunningService(tmp_path / "home")
    try:
        shell = Shell(tmp_path / "config")
        shell("login", service.address["url"], "--token-file", str(service.home / "token"))
        with client_of(service, patience=0) as client:
            service.stop()
            with pytest.raises(ServiceUnreachable):
                client.me()
    finally:
        service.close()

    assert "does not answer" in shell("jobs", exits=3)


def test_help_loads_neither_the_client_nor_what_it_needs() -> None:
    later = {"httpx", "msgspec", "pydantic", "asyncflow.client"}
    program = f"import sys, asyncflow.cli.main; print(*{later!r} & set(sys.modules))"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []


def test_a_token_is_never_an_argument(shell: Shell) -> None:
    assert "No such option" in shell("login", "http://127.0.0.1:9", "--token", "secret", exits=2)


def test_a_login_is_needed_for_a_client_of_the_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    with pytest.raises(UserError, match="asyncflow login URL"):
        Client.from_login()
