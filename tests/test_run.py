"""Whole runs on fake engines: the promises that only hold when all parts work together."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import asyncflow
from asyncflow.engines.models import resolve_model
from asyncflow.errors import ConfigError, DataError, ModelError, RewardError, RunFailed
from asyncflow.launch import resolve
from asyncflow.plan import describe, plan
from asyncflow.report.audit import audit
from asyncflow.runtime.metrics import read_metrics
from tests.conftest import TINY, RunTiny


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("update", ["boundary", "in_flight"])
def test_a_run_reaches_its_last_step_and_its_ledger_is_sound(run_tiny: RunTiny, bound: int, update: str) -> None:
    run = run_tiny(f"max_staleness={bound}", f"weights.update={update}", "steps=6")

    assert run.summary.outcome == "finished", run.summary.reason
    assert run.summary.steps == 6
    result = audit(run.run_dir)
    assert result.ok, result.violations
    assert max(result.staleness) <= bound
    assert result.open == 0


@pytest.mark.parametrize("late_samples", ["drop", "requeue", "mask"])
def test_a_run_that_does_not_wait_for_who_is_slow_keeps_its_bound(run_tiny: RunTiny, late_samples: str) -> None:
    settings = ("max_staleness=1", "weights.update=in_flight", "steps=8", "sampler=freshest", "group_timeout=60")
    run = run_tiny(f"late_samples={late_samples}", *settings)

    assert run.summary.outcome == "finished", run.summary.reason
    result = audit(run.run_dir)
    assert result.ok, result.violations
    assert max(result.staleness) <= 1
    assert (result.open, result.terms.late_samples, result.terms.group_timeout) == (0, late_samples, 60.0)


def test_the_run_directory_holds_everything_about_the_run(run_tiny: RunTiny) -> None:
    run = run_tiny("steps=3")

    names = {path.name for path in run.run_dir.iterdir()}
    assert {"config.json", "metrics.jsonl", "ledger.sqlite", "weights", "report.html", "summary.json"} <= names
    assert json.loads((run.run_dir / "config.json").read_text())["steps"] == 3
    assert [line["step"] for line in read_metrics(run.run_dir / "metrics.jsonl", "step")] == [1, 2, 3]


def test_every_published_version_is_served_with_the_digest_that_the_learner_computed(run_tiny: RunTiny) -> None:
    run = run_tiny("steps=4", "max_staleness=0")

    published = {line["version"]: line["digest"] for line in read_metrics(run.run_dir / "metrics.jsonl", "weights")}
    served = {line["version"]: line["digest"] for line in read_metrics(run.run_dir / "metrics.jsonl", "served")}
    assert served == published
    assert len(set(published.values())) == 5


@pytest.mark.parametrize("policy", ["skip", "keep", "refill"])
def test_groups_without_variance_end_as_the_policy_says(run_tiny: RunTiny, policy: str) -> None:
    calls = [0]

    def flat_for_half(completions: Sequence[str], answer: Sequence[str], **_: object) -> list[float]:
        calls[0] += 1
        return [0.0 if int(a) % 2 else float(len(set(c))) for c, a in zip(completions, answer, strict=True)]

    run = run_tiny("steps=5", f"zero_variance={policy}", reward=flat_for_half)

    assert run.summary.outcome == "finished", run.summary.reason
    result = audit(run.run_dir)
    assert result.ok, result.violations
    reasons = {"skip": {"zero_variance_skipped"}, "keep": set(), "refill": {"zero_variance_refilled"}}[policy]
    assert set(result.dropped) - {"zero_variance_skipped"} == reasons - {"zero_variance_skipped"}
    assert reasons <= set(result.dropped)


def test_refilling_is_capped_so_that_a_task_without_any_variance_still_ends(run_tiny: RunTiny) -> None:
    run = run_tiny(
        "steps=3", "zero_variance=refill", "max_refill=2", reward=lambda completions, **_: [1.0] * len(completions)
    )

    assert run.summary.outcome == "finished", run.summary.reason
    result = audit(run.run_dir)
    assert result.ok, result.violations
    assert result.trained == 0
    assert result.dropped["zero_variance_refilled"] == 3 * 2 * 4
    assert result.dropped["zero_variance_skipped"] == 3 * 16


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("raises", None, "ZeroDivisionError: cannot score"),
        ("nan", math.nan, "not a finite number"),
        ("none", None, "no reward function applies"),
        ("text", "good", "not a finite number"),
        ("length", None, "values for 1 completions"),
    ],
)
def test_a_sample_that_cannot_be_scored_is_quarantined_with_its_reason(
    run_tiny: RunTiny, name: str, value: Any, says: str
) -> None:
    seen: list[str] = []

    def sometimes_bad(completions: Sequence[str], answer: Sequence[str], **_: object) -> list[Any]:
        rewards: list[Any] = []
        for completion, a in zip(completions, answer, strict=True):
            seen.append(completion)
            bad = len(seen) > 2 and len(seen) % 17 == 0 and len(completions) == 1
            if bad and name == "raises":
                raise ZeroDivisionError(f"cannot score {a}")
            if bad and name == "length":
                return [1.0, 2.0, 3.0]
            rewards.append(value if bad else float(len(set(completion))))
        if len(completions) > 1:  # only a call for one completion shows which one is bad
            raise RuntimeError("one at a time") if len(seen) > 2 else AssertionError
        return rewards

    run = run_tiny("steps=4", reward=_probe_safe(sometimes_bad))

    assert run.summary.outcome == "finished", run.summary.reason
    result = audit(run.run_dir)
    assert result.ok, result.violations
    assert result.quarantined > 0
    assert all(says in reason for reason in result.quarantine_reasons), result.quarantine_reasons


def _probe_safe(function: Any) -> Any:
    """The function as it is, except for the two made-up completions with which it is tried before the run."""

    def reward(completions: Sequence[str], answer: Sequence[str], **columns: object) -> list[Any]:
        if completions[0] == "The answer is 1.":
            return [0.0] * len(completions)
        return list(function(completions, answer, **columns))

    return reward


def test_a_run_stops_when_too_large_a_share_of_the_samples_fails(run_tiny: RunTiny) -> None:
    def always_bad(completions: Sequence[str], **_: object) -> list[float]:
        return [0.0 if c == "The answer is 1." else math.nan for c in completions]

    run = run_tiny("steps=50", reward=always_bad)

    assert run.summary.outcome == "failed"
    assert "max_failed_share" in str(run.summary.reason)
    result = audit(run.run_dir)
    assert result.ok, result.violations
    assert (run.run_dir / "report.html").is_file()


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        (["steps=0"], ConfigError, "steps"),
        (["lr=1"], ConfigError, "learning_rate"),
        (["model=no-such-model"], ModelError, "no-such-model"),
        (["data.train=missing.jsonl"], DataError, "missing.jsonl"),
        (["data.train=reasoning_gym:chain_sums"], DataError, "chain_sum"),
        (["reward=last_numbr"], ConfigError, "last_number"),
        (["rollout.engine=vlm"], ConfigError, "vllm"),
        (["max_new_tokens=100000"], ConfigError, "max_new_tokens"),
        (["rollout.cores=[999]"], ConfigError, "999"),
        (["learner.engine=torch", "rollout.engine=fake"], ConfigError, "weights"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, overrides: list[str], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        plan(resolve(TINY, [*overrides, f"run_dir={tmp_path / 'run'}"]))

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda completions, **_: 1 / 0, "ZeroDivisionError"),
        (lambda completions, **_: [math.nan] * len(completions), "finite"),
        (lambda completions, **_: [1.0], "1 values for 2 completions"),
        (lambda completions, solution: [1.0], "solution"),
    ],
)
def test_a_reward_function_that_cannot_work_is_refused_before_anything_starts(function: Any, says: str) -> None:
    with pytest.raises(RewardError, match=says):
        plan(resolve(TINY), reward=function)


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")

    with pytest.raises(DataError, match=r"empty\.jsonl"):
        plan(resolve(TINY, [f"data.train={empty}", "data.options={}", "data.template=null"]))


def test_a_prompt_longer_than_the_context_is_refused_with_its_length(tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text("\n".join(json.dumps({"prompt": "7" * n, "answer": "7"}) for n in [*range(1, 20), 5000]))

    with pytest.raises(DataError, match=r"5\d{3} tokens"):
        plan(resolve(TINY, [f"data.train={long}", "data.options={}", "data.template=null", "data.eval_size=0"]))


def test_a_run_directory_that_is_in_use_is_left_alone(run_tiny: RunTiny) -> None:
    run = run_tiny("steps=1")
    before = (run.run_dir / "metrics.jsonl").read_bytes()

    with pytest.raises(ConfigError, match="not empty"):
        run_tiny("steps=1")

    assert (run.run_dir / "metrics.jsonl").read_bytes() == before


def test_the_plan_says_what_the_bound_means() -> None:
    lines = dict(describe(plan(resolve(TINY, ["max_staleness=2"]))))

    assert "at most 2 versions" in lines["staleness"]
    assert "48 samples" in lines["staleness"]


def test_several_updates_a_step_report_the_drift_within_the_step_apart_from_the_lag(run_tiny: RunTiny) -> None:
    run = run_tiny("steps=3", "updates_per_step=2", "epochs_per_step=2", "learning_rate=0.05", "zero_variance=keep")

    assert run.summary.outcome == "finished", run.summary.reason
    steps = read_metrics(run.run_dir / "metrics.jsonl", "step")
    assert [step["updates"] for step in steps] == [4, 4, 4]
    assert all(step["ratio/proximal_max"] > 1.01 for step in steps)
    assert steps[0]["ratio/behaviour_mean"] == pytest.approx(1.0, abs=0.01)  # nothing is stale yet
    assert audit(run.run_dir).ok


def test_with_one_update_a_step_the_proximal_policy_is_the_current_one(run_tiny: RunTiny) -> None:
    run = run_tiny("steps=3", "learning_rate=0.05")

    for step in read_metrics(run.run_dir / "metrics.jsonl", "step"):
        assert (step["ratio/proximal_mean"], step["ratio/proximal_max"]) == (1.0, 1.0)


def test_completions_that_were_cut_off_can_be_kept_out_of_the_loss(run_tiny: RunTiny) -> None:
    run = run_tiny("steps=3", "max_new_tokens=1", "truncated=mask", "zero_variance=keep", "deterministic=true")

    steps = read_metrics(run.run_dir / "metrics.jsonl", "step")
    digests = [line["digest"] for line in read_metrics(run.run_dir / "metrics.jsonl", "weights")]
    masked = [i for i, step in enumerate(steps) if step["completions/truncated_frac"] == 1.0]
    assert masked, "with one token a completion, some step has nothing but completions that were cut off"
    for i in masked:  # no update, and versions and account go on
        assert steps[i]["updates"] == 0
        assert digests[i] == digests[i + 1]
    assert audit(run.run_dir).ok


def test_a_failed_run_raises_in_python_and_brings_its_cause(tmp_path: Path) -> None:
    def fails_later(completions: Sequence[str], **_: object) -> list[float]:
        return [0.0 if c == "The answer is 1." else math.nan for c in completions]

    with pytest.raises(RunFailed, match="max_failed_share") as caught:
        asyncflow.run(TINY, overrides=[f"run_dir={tmp_path / 'run'}", "steps=50"], reward=fails_later)

    assert isinstance(caught.value.__cause__, RunFailed)
    assert audit(tmp_path / "run").ok


def test_what_is_recorded_is_what_ran_wherever_it_came_from(tmp_path: Path) -> None:
    def by_length(completions: Sequence[str], **_: object) -> list[float]:
        return [float(len(set(completion))) for completion in completions]

    run = asyncflow.run(TINY, overrides=[f"run_dir={tmp_path / 'run'}", "steps=2"], reward=by_length)

    recorded = json.loads((run.run_dir / "config.json").read_text())
    assert [reward["use"] for reward in recorded["reward"]] == ["by_length"]


def test_overrides_apply_to_values_given_in_python_too() -> None:
    values = yaml.safe_load(TINY.read_text())

    assert resolve(values, ["steps=3"]).steps == 3
    assert resolve(resolve(values), ["steps=4"]).steps == 4
    assert values["steps"] == 6


def test_a_chat_prompt_for_a_model_without_chat_template_is_refused_before_anything_starts(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(resolve_model("tiny"), model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))

    with pytest.raises(DataError, match="no chat template"):
        plan(resolve(TINY, [f"model={model}"]))
