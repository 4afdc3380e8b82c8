"""A run that was stopped or killed goes on: nothing lost, nothing trained twice, the same weights where it can be."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from asyncflow.engines.fake import FakeRollout
from asyncflow.engines.models import resolve_model
from asyncflow.errors import CheckpointError, ConfigError, LedgerError, ModelError, RunFailed, UserError
from asyncflow.launch import Run, prepare_resume, resume
from asyncflow.report.audit import audit
from asyncflow.runtime.checkpoint import checkpoints
from asyncflow.runtime.local import held
from asyncflow.runtime.metrics import read_metrics
from asyncflow.store.events import Leased, Resumed
from asyncflow.store.journal import read_ledger
from tests.conftest import TINY, RunTiny
from tests.failing_engine import DoesNotStart
from tests.processes import DEADLINE, wait_until

REPEATABLE = ("deterministic=true", "max_staleness=0", "data.eval_size=0")


def digest(run: Run) -> str:
    assert run.summary.digest is not None
    return run.summary.digest


def steps_made(run_dir: Path) -> int:
    """Step lines so far, those of steps that were made twice included."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.is_file() else 0


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def made(run_dir: Path, steps: int) -> bool:
    return steps_made(run_dir) >= steps


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `asyncflow …` in a process of its own; whatever is left of it is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def go(*arguments: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "asyncflow.cli", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield go
    for process in started:
        process.kill()
        process.communicate(timeout=DEADLINE)


# -- killed ------------------------------------------------------------------------------------------------------------


def test_a_repeatable_run_that_is_killed_again_and_again_ends_with_the_weights_of_an_unbroken_one(
    tmp_path: Path, start: Start, run_tiny: RunTiny
) -> None:
    settings = (*REPEATABLE, "steps=20", "checkpoint.every=3")
    unbroken = run_tiny(*settings)
    run_dir = tmp_path / "killed"
    slow = (*settings, "rollout.options={token_latency: 0.03}", f"run_dir={run_dir}")
    chance = random.Random(0)
    process = start("run", str(TINY), *(part for s in slow for part in ("--set", s)))

    for _ in range(3):
        more = steps_made(run_dir) + chance.randint(1, 4)
        wait_until(partial(made, run_dir, more), process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=DEADLINE)
        process = start("resume", str(run_dir))
    output, _ = process.communicate(timeout=DEADLINE)

    assert process.returncode == 0, output
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["digest"] == digest(unbroken)
    assert (summary["steps"], summary["incarnation"]) == (20, 3)
    account, undisturbed = audit(run_dir), audit(unbroken.run_dir)
    assert account.ok, account.violations
    assert len(account.resumed) == 3
    assert (account.admitted, account.trained, account.dropped) == (
        undisturbed.admitted,
        undisturbed.trained,
        undisturbed.dropped,
    )
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl", "step")] == list(range(1, 21))


@pytest.mark.parametrize("bound", [1, 3])
def test_an_asynchronous_run_that_is_killed_keeps_its_account_and_its_bound(
    tmp_path: Path, start: Start, bound: int
) -> None:
    run_dir = tmp_path / "run"
    settings = (f"max_staleness={bound}", "steps=12", "checkpoint.every=4", f"run_dir={run_dir}", "data.eval_size=0")
    slow = (*settings, "rollout.options={token_latency: 0.03}", "weights.update=in_flight")
    process = start("run", str(TINY), *(part for s in slow for part in ("--set", s)))
    wait_until(lambda: steps_made(run_dir) >= 6, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE)

    run = resume(run_dir)

    account = audit(run_dir)
    assert account.ok, account.violations
    assert run.summary.steps == 12
    assert account.taken_back >= 16  # it was killed after step 6, and the last checkpoint was of step 4
    assert max(account.staleness) <= bound
    assert account.open == 0


def test_a_run_that_is_killed_before_its_first_checkpoint_goes_on_from_the_model(tmp_path: Path, start: Start) -> None:
    run_dir = tmp_path / "run"
    settings = ("steps=6", f"run_dir={run_dir}", "rollout.options={token_latency: 0.03}")
    process = start("run", str(TINY), *(part for s in settings for part in ("--set", s)))
    wait_until(lambda: steps_made(run_dir) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE)

    run = resume(run_dir)

    assert run.summary.steps == 6
    assert audit(run_dir).ok
    assert run.summary.accuracy_before is not None  # of the first life


# -- stopped, finished -------------------------------------------------------------------------------------------------


def test_a_finished_run_can_be_made_longer_and_equals_a_run_that_was_long_from_the_start(
    tmp_path: Path, run_tiny: RunTiny
) -> None:
    long = run_tiny(*REPEATABLE, "steps=9")
    long.run_dir.rename(tmp_path / "long")
    short = run_tiny(*REPEATABLE, "steps=5")

    longer = resume(short.run_dir, overrides=["steps=9"])

    assert digest(longer) == digest(long)
    assert audit(short.run_dir).admitted == audit(tmp_path / "long").admitted
    assert json.loads((short.run_dir / "config.json").read_text())["steps"] == 9


def test_a_run_goes_back_to_an_earlier_checkpoint_that_is_kept(run_tiny: RunTiny) -> None:
    settings = (*REPEATABLE, "steps=8", "checkpoint.every=2", "checkpoint.keep=3")
    first = run_tiny(*settings)
    before = digest(first)
    assert [c.version.n for c in checkpoints(first.run_dir)] == [4, 6, 8]

    again = resume(first.run_dir, step=4, overrides=["steps=8"])

    assert digest(again) == before
    account = audit(first.run_dir)
    assert account.ok, account.violations
    assert account.taken_back == 4 * 16
    assert [str(c.version) for c in checkpoints(first.run_dir)] == ["0.4", "1.6", "1.8"]


def test_two_updates_a_step_and_a_warm_up_go_on_where_they_were(tmp_path: Path, run_tiny: RunTiny) -> None:
    settings = (*REPEATABLE, "updates_per_step=2", "learner.warmup_steps=6", "learner.dtype=fp32")
    long = run_tiny(*settings, "steps=6")
    long.run_dir.rename(tmp_path / "long")
    short = run_tiny(*settings, "steps=3")

    assert digest(resume(short.run_dir, overrides=["steps=6"])) == digest(long)


def test_generated_samples_that_are_not_trained_yet_are_kept(run_tiny: RunTiny) -> None:
    run = run_tiny("steps=8", "checkpoint.every=4", "checkpoint.keep=2", "max_staleness=1")
    resume(run.run_dir, step=4)

    records = list(read_ledger(run.run_dir / "ledger.sqlite"))
    at = next(i for i, record in enumerate(records) if isinstance(record.event, Resumed))
    leased = [record.event for record in records[at:] if isinstance(record.event, Leased)]
    generated_again = {row for event in leased if event.stage == "rollout" for row in event.rows}
    trained_again = {row for event in leased if event.stage == "actor_update" for row in event.rows}
    assert trained_again - generated_again  # of version 4 and before: trained as they were
    assert audit(run.run_dir).ok


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(run_tiny: RunTiny) -> Path:
    """A run of four steps with checkpoints of the steps 2 and 4."""
    return run_tiny("steps=4", "checkpoint.every=2", "checkpoint.keep=2").run_dir


def half_written(run_dir: Path) -> None:
    file = run_dir / "checkpoints" / "step-000004" / "learner" / "masters.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def without_state(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step-000004" / "state.json").unlink()


def without_a_file(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step-000004" / "learner" / "exp_avg.safetensors").unlink()


def without_data(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "data")


def nothing(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("harm", "arguments", "kind", "says"),
    [
        pytest.param(nothing, {}, ConfigError, r"has made all of its 4 steps: to go on, raise them", id="finished"),
        pytest.param(
            nothing,
            {"overrides": ["steps=6", "temperature=0.5"]},
            ConfigError,
            r"temperature cannot change when a run goes on: .* change only steps, max_staleness",
            id="changed",
        ),
        pytest.param(
            nothing,
            {"overrides": ["steps=6", "rollout.dtype=fp32"]},
            ConfigError,
            r"rollout\.dtype cannot change",
            id="changed section",
        ),
        pytest.param(
            nothing,
            {"overrides": ["steps=6", "model=/no/such/model"]},
            ConfigError,
            r"model cannot change",
            id="another model",
        ),
        pytest.param(
            nothing,
            {"overrides": ["steps=6", "checkpoint.every=0"]},
            ConfigError,
            r"checkpoint\.every must stay above 0",
            id="no more checkpoints",
        ),
        pytest.param(
            nothing,
            {"overrides": ["steps=6"], "step": 3},
            CheckpointError,
            r"no checkpoint of step 3: .* are 2, 4",
            id="no such checkpoint",
        ),
        pytest.param(
            half_written,
            {"overrides": ["steps=6"]},
            CheckpointError,
            r"masters\.safetensors is missing or damaged: resume from another checkpoint with --from",
            id="half-written",
        ),
        pytest.param(
            without_a_file, {"overrides": ["steps=6"]}, CheckpointError, r"exp_avg\.safetensors is missing", id="a file"
        ),
        pytest.param(
            without_state, {"overrides": ["steps=6"]}, CheckpointError, r"state\.json cannot be read", id="no state"
        ),
    ],
)
def test_what_cannot_go_on_is_refused_in_a_sentence_and_nothing_is_touched(
    stopped: Path, harm: Callable[[Path], None], arguments: dict[str, Any], kind: type[UserError], says: str
) -> None:
    harm(stopped)
    before = tree(stopped)

    with pytest.raises(kind, match=says):
        resume(stopped, **arguments)

    assert tree(stopped) == before


def test_a_resume_that_makes_no_step_leaves_the_checkpoint_as_it_is(run_tiny: RunTiny) -> None:
    run_dir = run_tiny("steps=4", "checkpoint.every=2").run_dir
    before = tree(run_dir / "checkpoints")

    with pytest.raises(RunFailed, match="on fire"):
        resume(run_dir, overrides=["steps=6"], rollout=DoesNotStart(resolve_model("tiny")))

    assert tree(run_dir / "checkpoints") == before
    assert resume(run_dir, overrides=["steps=6"], rollout=FakeRollout(resolve_model("tiny"))).summary.steps == 6
    assert audit(run_dir).ok


def test_an_older_checkpoint_helps_when_the_last_one_is_damaged(stopped: Path) -> None:
    half_written(stopped)

    assert resume(stopped, step=2, overrides=["steps=6"]).summary.steps == 6
    assert audit(stopped).ok


def test_samples_whose_data_are_gone_are_not_trained(run_tiny: RunTiny) -> None:
    run_dir = run_tiny("steps=4", "checkpoint.every=3", "checkpoint.keep=2").run_dir
    shutil.rmtree(run_dir / "data")

    with pytest.raises(LedgerError, match=r"segment is missing, .*restore the file, or start a new run"):
        _raise(resume, run_dir, step=3)

    assert not audit(run_dir).resumed


def _raise(call: Callable[..., Run], *arguments: Any, **options: Any) -> None:
    """A run that fails raises RunFailed from what made it fail."""
    try:
        call(*arguments, **options)
    except Exception as error:
        raise (error.__cause__ or error) from None


def test_a_run_without_checkpoints_says_so(run_tiny: RunTiny) -> None:
    run_dir = run_tiny("checkpoint.every=0").run_dir

    assert not (run_dir / "checkpoints").exists()
    assert not (run_dir / "data").exists()
    with pytest.raises(ConfigError, match=r"keeps no checkpoints \(checkpoint\.every is 0\)"):
        resume(run_dir, overrides=["steps=9"])


def test_a_directory_that_holds_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no run in .*: name a run directory"):
        resume(tmp_path)


def test_a_directory_in_which_a_process_runs_is_left_alone(stopped: Path) -> None:
    with held(stopped), pytest.raises(ConfigError, match=r"another process runs in .*asyncflow stop"):
        resume(stopped, overrides=["steps=6"])


def test_a_machine_without_the_model_is_told_so_before_anything_is_touched(stopped: Path) -> None:
    path = stopped / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"model": "/models/gone"}))
    before = tree(stopped)

    with pytest.raises(ModelError, match="/models/gone"):
        resume(stopped, overrides=["steps=6"])

    assert tree(stopped) == before


def test_other_training_prompts_under_the_same_name_are_noticed(tmp_path: Path, run_tiny: RunTiny) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"{i} + 1 ="}) + "\n" for i in range(50)))
    run_dir = run_tiny(f"data={{train: {problems}}}", "steps=2").run_dir
    problems.write_text("".join(json.dumps({"prompt": f"{i} + 2 ="}) + "\n" for i in range(50)))

    with pytest.raises(ConfigError, match="are not those that the run began with"):
        resume(run_dir, overrides=["steps=4"])


def test_cores_of_another_machine_are_derived_again(stopped: Path) -> None:
    path = stopped / "config.json"
    values = json.loads(path.read_text())
    values["rollout"]["cores"], values["learner"]["cores"] = [998], [999]
    path.write_text(json.dumps(values))

    ready, _ = prepare_resume(stopped, overrides=["steps=6"])

    available = os.sched_getaffinity(0)
    assert set(ready.config.rollout.cores or ()) | set(ready.config.learner.cores or ()) <= available


def test_the_name_of_an_option_stays_a_name_when_a_run_goes_on(stopped: Path) -> None:
    """What is changed was checked as it is: it must not become something else on the way."""
    options = {"seed": 1, "token_latency=5 #": 1, "token_latency.more": {}, "a: b": "\U0001f600"}

    ready, _ = prepare_resume(stopped, changes={"steps": 6, "rollout": {"options": options}})

    assert ready.config.steps == 6
    assert options.items() <= ready.config.rollout.options.items()
    assert "token_latency" not in ready.config.rollout.options


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_the_last_checkpoints_are_kept_and_the_ledger_knows_them(run_tiny: RunTiny) -> None:
    run = run_tiny("steps=7", "checkpoint.every=2", "checkpoint.keep=2")

    kept = checkpoints(run.run_dir)
    assert [c.version.n for c in kept] == [6, 7]
    for checkpoint in kept:
        checkpoint.verify()
    assert kept[-1].digest == digest(run)
    events = [r.event for r in read_ledger(run.run_dir / "ledger.sqlite") if r.event.kind == "checkpointed"]
    assert len(events) == 4
    assert len(read_metrics(run.run_dir / "metrics.jsonl", "checkpoint")) == 4


def test_a_checkpoint_that_cannot_be_written_is_an_alarm_and_the_run_goes_on(
    run_tiny: RunTiny,
) -> None:
    run = run_tiny("steps=4", "checkpoint.every=2", "learner.engine=tests.full_disk:NoRoom")

    assert run.summary.outcome == "finished"
    assert checkpoints(run.run_dir) == []
    alarms = read_metrics(run.run_dir / "metrics.jsonl", "alarm")
    assert {(alarm["alarm"], alarm["step"]) for alarm in alarms} == {("checkpoint_failed", 2), ("checkpoint_failed", 4)}
    assert "No space left" in alarms[0]["text"]
    assert list((run.run_dir / "checkpoints").iterdir()) == []


def test_what_a_killed_process_had_not_completed_is_removed(stopped: Path) -> None:
    aside = stopped / "checkpoints" / ".writing-step-000006"
    aside.mkdir()

    resume(stopped, overrides=["steps=5"])

    assert not aside.exists()
