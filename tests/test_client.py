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


@pytest.fixture(scope="module")
def resting(client: Client) -> Iterator[str]:
    """A job that has begun and rests until the tests are over."""
    job = client.submit(ENDLESS, name="resting")
    assert client.wait(job.id, timeout=DEADLINE, states=["running"]).state == "running"
    client.pause(job.id)
    assert client.wait(job.id, timeout=DEADLINE, states=["paused"]).state == "paused"
    yield job.id
    client.cancel(job.id)


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


def test_a_worker_is_drained_and_goes_on(client: Client, resting: str) -> None:
    drained = client.drain(resting, "reward")
    assert (drained.name, drained.drained) == ("reward", True)
    assert {worker.name for worker in client.workers(resting) if worker.drained} == {"reward"}
    with pytest.raises(ServiceError, match="its workers are") as unknown:
        client.drain(resting, "no such one?")

    assert not client.undrain(resting, "reward").drained
    assert not any(worker.drained for worker in client.workers(resting))
    assert unknown.value.code == "no_such_worker"


def test_what_the_workers_of_a_run_did_is_told(client: Client, finished: str) -> None:
    spans = client.timeline(finished, seconds=120)

    assert {"rollout", "actor_update"} <= {span.worker for span in spans}
    assert {span.activity for span in spans} <= {"busy", "idle", "blocked"}
    assert all(span.start <= span.end for span in spans)
    with pytest.raises(ServiceError) as long:
        client.timeline(finished, seconds=121)
    assert long.value.field == "query.seconds"


def test_a_configuration_is_looked_at_and_nothing_started(service: RunningService, client: Client) -> None:
    before = [job.id for job in client.jobs()]

    with client_of(service, timeout=0.1) as hasty:  # a plan has a deadline of its own, as it takes seconds
        good, bad = hasty.validate(tiny()), hasty.validate(tiny(stepps=1))

    assert (good.ok, good.errors, good.config and good.config["steps"]) == (True, [], 2)
    assert good.plan
    assert (bad.ok, bad.config, [one.field for one in bad.errors]) == (False, None, ["stepps"])
    assert [job.id for job in client.jobs()] == before


def test_the_report_is_one_page_once_the_run_has_ended(client: Client, finished: str, resting: str) -> None:
    page = client.report(finished)

    assert page.startswith("<!doctype html>")
    assert "</html>" in page[-20:]
    with pytest.raises(ServiceError) as early:
        client.report(resting)
    assert early.value.code == "no_report"


def test_tokens_are_made_listed_and_taken_back(service: RunningService, client: Client) -> None:
    made = client.make_token("for a while", "read", expires_in=3600)
    listed = {token.id: token for token in client.tokens()}
    with Client(service.address["url"], made.token) as reader:
        assert (reader.me().name, reader.me().scope) == ("for a while", "read")
        with pytest.raises(ServiceError) as small:
            next(reader.tokens())
        client.revoke_token(made.id)
        with pytest.raises(ServiceError) as gone:
            reader.me()

    assert made.expires_at is not None
    assert (made.expires_at - made.created_at).total_seconds() == pytest.approx(3600, abs=0.01)
    assert (listed[made.id].name, listed[made.id].scope) == ("for a while", "read")
    assert (small.value.code, gone.value.status) == ("scope_too_small", 401)
    assert made.id not in {token.id for token in client.tokens()}
    with pytest.raises(ServiceError, match="no such token"):
        client.revoke_token(made.id)
    with pytest.raises(UserError, match="asyncflow token list"):
        client.revoke_token("../jobs")


def test_changes_of_all_jobs_are_told_to_their_deletion(client: Client) -> None:
    job = client.submit(tiny(steps=1), name="to-go")
    client.cancel(job.id)
    ended = client.wait(job.id, timeout=DEADLINE)
    with pytest.raises(ServiceError) as stale:
        client.delete(job.id, revision=ended.revision - 1)
    client.delete(job.id, revision=ended.revision)

    told = []
    for change in client.follow_jobs(after="0"):
        told.append(change)
        if (change.job_id, change.job) == (job.id, None):
            break

    assert stale.value.code == "changed"
    assert [int(change.id) for change in told] == sorted({int(change.id) for change in told})
    others = [change.job for change in told[:-1] if change.job is not None and change.job.name != "to-go"]
    assert others
    assert all(other.config is None for other in others)
    with pytest.raises(ServiceError) as gone:
        client.job(job.id)
    assert gone.value.code == "no_such_job"


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


def test_what_a_run_did_is_shown_for_people_and_for_programs(
    client: Client, shell: Shell, finished: str, tmp_path: Path
) -> None:
    best = max(client.samples(finished, state="trained"), key=lambda brief: brief.reward or 0.0)
    options = ("--state", "trained", "--min-reward", str(best.reward), "--limit", "1")

    (line,) = shell("samples", finished, *options).splitlines()
    assert line.split()[1] == "trained"
    (sample,) = json.loads(shell("samples", finished, *options, "--json"))
    assert (sample["state"], sample["reward"]) == ("trained", best.reward)
    assert "step-000002  version 0.2" in shell("checkpoints", finished)
    assert json.loads(shell("checkpoints", finished, "--json"))[0]["step"] == 2
    spans = json.loads(shell("timeline", finished, "--seconds", "120", "--json"))
    assert len(shell("timeline", finished, "--seconds", "120").splitlines()) == len(spans) > 0
    assert shell("workers", finished) == ""
    assert json.loads(shell("workers", finished, "--json")) == []
    file = tmp_path / "report.html"
    assert shell("report", finished, "--output", str(file)).strip() == str(file)
    assert file.read_text() == client.report(finished)
    assert "--output" in shell("report", finished, "--output", str(tmp_path / "none" / "x"), exits=2)


def test_a_worker_is_drained_by_a_command(client: Client, shell: Shell, resting: str) -> None:
    assert "reward" in shell("workers", resting)
    assert shell("drain", resting, "reward").split()[:2] == ["reward", "drained"]
    assert {worker.name for worker in client.workers(resting) if worker.drained} == {"reward"}
    assert json.loads(shell("undrain", resting, "reward", "--json"))["drained"] is False
    assert "its workers are" in shell("drain", resting, "nobody", exits=2)


def test_a_configuration_is_validated_by_a_command(shell: Shell, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny()))

    assert "model" in shell("validate", str(config))
    assert json.loads(shell("validate", str(config), "--set", "steps=3", "--json"))["config"]["steps"] == 3
    assert "did you mean steps" in shell("validate", str(config), "--set", "stepps=3", exits=2)
    assert "name one that exists" in shell("validate", str(tmp_path / "none.yaml"), exits=2)


def test_tokens_are_looked_after_by_commands(service: RunningService, shell: Shell, tmp_path: Path) -> None:
    token = shell("token", "make", "ci", "--scope", "submit").strip()
    other = Shell(tmp_path)
    assert "ci, who may submit" in other("login", service.address["url"], "--token-file", "-", stdin=token)
    assert "scope admin" in other("token", "list", exits=2)
    (line,) = [line for line in shell("token", "list").splitlines() if line.endswith("ci")]
    token_id = line.split()[0]
    assert token_id in {one["id"] for one in json.loads(shell("token", "list", "--json"))}
    made = json.loads(shell("token", "make", "x", "--expires-in", "60", "--json"))
    assert made["scope"] == "read"

    assert shell("token", "revoke", token_id) == ""
    assert json.loads(shell("token", "revoke", made["id"], "--json")) == {"id": made["id"], "revoked": True}
    assert "token" in other("jobs", exits=2)
    assert "Invalid value" in shell("token", "make", "x", "--scope", "root", exits=2)


def test_changes_of_all_jobs_are_followed_by_a_command(client: Client, shell: Shell, resting: str) -> None:
    for options in ((), ("--json",)):
        following = shell.start("jobs", "-f", *options)
        lines: list[str] = []

        def read(following: subprocess.Popen[str] = following, lines: list[str] = lines) -> None:
            assert following.stdout is not None
            lines.append(following.stdout.readline())

        reader = threading.Thread(target=read)
        reader.start()
        # It tells what comes from now on, and nobody knows when that begins.
        wait_until(lambda lines=lines: client.change(resting, labels={"a": "b"}).ended or bool(lines))  # type: ignore[misc]
        reader.join(DEADLINE)
        following.send_signal(signal.SIGINT)
        following.communicate(timeout=DEADLINE)

        assert following.returncode == 130
        told = json.loads(lines[0])["job_id"] if options else lines[0].split()[0]
        assert told == resting
    assert "--state" in shell("jobs", "-f", "--state", "running", exits=2)


def test_the_commands_for_runs_steer_jobs_too(client: Client, shell: Shell, tmp_path: Path) -> None:
    job = client.submit(ENDLESS)
    client.wait(job.id, timeout=DEADLINE, states=["running"])

    assert json.loads(shell("pause", job.id, "--json"))["state"] == "pausing"
    client.wait(job.id, timeout=DEADLINE, states=["paused"])
    assert json.loads(shell("set", job.id, "max_staleness=4", "--json"))["max_staleness"] == 4
    assert client.job(job.id).max_staleness == 4
    assert "--resume-from" in shell("resume", job.id, "--set", "steps=3", exits=2)
    shell("resume", job.id)
    client.wait(job.id, timeout=DEADLINE, states=["running"])
    waiting = shell.start("wait", job.id, "--timeout", "0.2")
    assert waiting.communicate(timeout=DEADLINE)[1].endswith("wait longer\n")
    assert waiting.returncode == 2
    run_dir = client.job(job.id).run_dir
    assert json.loads(shell("cancel", run_dir, "--json")) == {"run_dir": run_dir, "done": "cancel"}  # goes to the run
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


@pytest.mark.parametrize("command", [["jobs"], ["token", "list"], ["workers", "job_" + "0" * 20]])
def test_a_command_loads_what_it_needs_and_nothing_heavy(shell: Shell, command: list[str]) -> None:
    # Not pydantic, with which Typer reads arguments.
    heavy = {"torch", "transformers", "vllm", "numpy", "pyarrow", "fastapi", "uvicorn", "asyncflow.pipeline"}
    program = (
        "import sys\nfrom asyncflow.cli.main import app\nfrom asyncflow.errors import ServiceError\n"
        f"try:\n    app({command!r}, standalone_mode=False)\nexcept ServiceError as error:\n    print(error)\n"
        f"print('loaded', *sorted({heavy!r} & set(sys.modules)), 'httpx' in sys.modules)"
    )
    environment = {**os.environ, "XDG_CONFIG_HOME": str(shell.home)}

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, timeout=DEADLINE
    )

    assert done.stdout.splitlines()[-1] == "loaded True"


def test_a_token_is_never_an_argument(shell: Shell) -> None:
    assert "No such option" in shell("login", "http://127.0.0.1:9", "--token", "secret", exits=2)


def test_a_login_is_needed_for_a_client_of_the_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    with pytest.raises(UserError, match="asyncflow login URL"):
        Client.from_login()
