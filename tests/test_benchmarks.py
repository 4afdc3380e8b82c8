"""The benchmarks measure what they say: whole runs, the steps that count, ratios of values that are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from asyncflow.errors import RunFailed
from benchmarks import generation, overlap, weights
from benchmarks.machine import machine
from benchmarks.overlap import ASYNCHRONOUS, MODES, WORKLOADS, measure, settings_of, summarise, table

FAKE = ("--set", "model=tiny", "--set", "rollout.engine=fake", "--set", "learner.engine=fake")
SMALL = ("--set", "max_new_tokens=4", "--set", "train_batch_size=16", "--set", "data.size=100")


def run(steps_per_s: float, *, rest_s: float = 0.0, train_s: float = 0.0) -> Mapping[str, Any]:
    return {"steps_per_s": steps_per_s, "rest_s": rest_s, "train_s": train_s}


def test_every_mode_of_the_comparison_runs_and_has_its_key(tmp_path: Path) -> None:
    file = tmp_path / "overlap.json"

    result = overlap.main(
        ["--workload", "balanced", "--rounds", "1", "--steps", "2", "--json", str(file), *FAKE, *SMALL]
    )

    for mode in (*MODES, "ideal"):
        assert result[f"{mode}_steps_per_s"] > 0
    written = json.loads(file.read_text())
    assert written["async_over_sync"] == result["async_over_sync"]
    assert written["machine"]["versions"]["torch"]
    (one,) = written["workloads"]["balanced"]["rounds"]
    assert list(one) == list(MODES)
    for mode, measured in one.items():
        assert len(measured["step_s"]) == 2
        assert measured["samples"] == 2 * 16
        assert measured["staleness_max"] <= (0 if mode.endswith("sync") and mode != "async" else 2)


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds() -> None:
    rounds = [
        {"sync": run(1.0, rest_s=0.6, train_s=0.4), "async": run(1.8), "colocated_sync": run(1.2)},
        {"sync": run(0.5, rest_s=1.0, train_s=1.0), "async": run(0.8), "colocated_sync": run(1.0)},
        {"sync": run(2.0, rest_s=0.2, train_s=0.3), "async": run(3.0), "colocated_sync": run(2.5)},
    ]

    result = summarise(WORKLOADS["balanced"], rounds)

    assert result["sync_steps_per_s"] == 1.0
    assert result["async_over_sync"] == pytest.approx(1.6)
    assert result["ideal_steps_per_s"] == pytest.approx(1 / 0.6)
    assert result["async_over_ideal"] == pytest.approx(sorted([1.8 * 0.6, 0.8 * 1.0, 3.0 * 0.3])[1])
    assert result["spread"]["async_over_colocated_sync"] == pytest.approx({"median": 1.2, "min": 0.8, "max": 1.5})
    assert (result["gen_s"], result["train_s"]) == (0.6, 0.4)


def test_the_keys_of_the_other_workloads_have_their_name_in_front() -> None:
    rounds = [{"sync": run(1.0, rest_s=0.75, train_s=0.25), "in_flight": run(1.25)}]

    result = summarise(WORKLOADS["gen-bound"], rounds)

    assert result["gen_bound_ideal_steps_per_s"] == pytest.approx(4 / 3)
    assert result["gen_bound_in_flight_over_ideal"] == pytest.approx(1.25 * 0.75)
    assert "3.00 : 1" in table("gen-bound", WORKLOADS["gen-bound"], rounds)
    assert not [key for key in result if not key.startswith("gen_bound_") and key != "spread"]


def test_the_modes_differ_in_nothing_but_what_they_are() -> None:
    changed = {setting.partition("=")[0] for overrides in MODES.values() for setting in overrides}

    assert changed == {"max_staleness", "stream", "placement", "weights.update"}
    assert set(ASYNCHRONOUS) < set(MODES)


def test_a_run_that_fails_ends_the_benchmark_with_its_reason(tmp_path: Path) -> None:
    values = settings_of(WORKLOADS["balanced"], model="tiny", counted=1, run_dir=tmp_path / "run")
    engines = ("rollout.engine=tests.failing_engine:DoesNotStart", "learner.engine=fake")

    with pytest.raises(RunFailed, match="on fire"):
        measure(values, engines, counted=1)


def test_only_the_steps_in_the_middle_of_a_run_are_counted(tmp_path: Path) -> None:
    values = settings_of(WORKLOADS["balanced"], model="tiny", counted=3, run_dir=tmp_path / "run")
    small = ("max_new_tokens=4", "train_batch_size=16", "rollout.engine=fake", "learner.engine=fake")

    result = measure(values, small, counted=3)

    assert values["steps"] == overlap.WARM_UP + 3 + overlap.TAIL
    assert len(result["step_s"]) == 3
    assert result["rest_s"] + result["train_s"] == pytest.approx(1 / result["steps_per_s"])


def test_updates_are_measured_in_both_modes_and_given_as_shares_of_a_step(tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    short = ["--updates", "3", "--interval", "0.05", "--undisturbed", "0.1", "--json", str(file)]

    weights.main(["--model", "tiny", *short, *FAKE[2:], *SMALL])

    result = json.loads(file.read_text())["models"]["tiny"]
    assert set(result["modes"]) == set(result["raw"]["modes"]) == {"boundary", "in_flight"}
    for mode, raw in result["raw"]["modes"].items():
        assert len(raw["publish_s"]) == len(raw["update_s"]) == len(raw["load_s"]) == 3
        assert raw["tokens"] > 0
        share = result["modes"][mode]["learner_exposed_share_of_measured_step"]
        assert share == pytest.approx(sorted(raw["publish_s"])[1] / result["step_s"]["measured_step"])
    assert len(result["raw_step_s"]) == weights.STEP_RUN - 2


def test_what_generation_loses_is_the_time_that_its_tokens_do_not_account_for() -> None:
    one = {"publish_s": [0.1], "update_s": [0.5], "load_s": [0.2], "drain_s": [0.3], "generation_lost_s": 0.4}
    measured = {"modes": {"boundary": one}}

    summary = weights.summarise("smollm2-135m", measured, [4.0, 5.0, 6.0])

    figures = summary["modes"]["boundary"]
    assert figures["generation_exposed_share_of_measured_step"] == pytest.approx(0.4 / 5.0)
    assert figures["generation_exposed_share_of_quickstart_step"] == pytest.approx(0.4 / 9.7)
    assert figures["learner_exposed_share_of_measured_step"] == pytest.approx(0.1 / 5.0)
    assert "generation 8.00%" in weights.text("smollm2-135m", summary)


def test_generation_is_measured_with_and_without_a_busy_learner_in_both_placements(tmp_path: Path) -> None:
    file = tmp_path / "generation.json"

    generation.main(["--model", "tiny", "--rounds", "2", "--seconds", "0.05", "--json", str(file), *FAKE[2:], *SMALL])

    result = json.loads(file.read_text())
    for placement in ("pinned", "unpinned"):
        assert len(result["rounds"][placement]) == 2
        assert result[f"{placement}_alone_tok_per_s"] > 0
        assert result[f"{placement}_kept_beside_a_learner"]["median"] > 0


def test_figures_come_with_the_machine_that_made_them() -> None:
    found = machine()

    assert found["cores"]
    assert found["memory_gib"] > 0
    assert {"python", "torch", "vllm"} <= set(found["versions"])
