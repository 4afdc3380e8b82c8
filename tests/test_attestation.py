"""Does the engine serve what it says? Statistics on plain values, and whole runs with faults planted in the engine."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from asyncflow.clock import ManualClock
from asyncflow.engines.fake import FakeRollout
from asyncflow.engines.models import resolve_model
from asyncflow.engines.weights.attestation import LIMIT, MOST, SLACK, Attestor, Dtype, Evidence, Verdict
from asyncflow.launch import Run, resolve
from asyncflow.report.audit import audit
from asyncflow.runtime.metrics import read_metrics
from asyncflow.types import Completion, Floats, PolicyVersion
from asyncflow.workers.alarms import Alarms
from asyncflow.workers.attestation import PATIENT_SECONDS, PATIENT_VERSIONS, Attestation, FreshSamples
from tests.conftest import TINY, RunTiny

SAMPLES, TOKENS = 8, 24
BF16: tuple[Dtype, Dtype] = ("bf16", "bf16")


class Simulated:
    """Log-probs of a policy that drifts, as an engine and a learner with rounding noise compute them."""

    def __init__(self, *, noise: float, drift: float, seed: int = 0) -> None:
        self.noise = noise
        self.drift = drift
        self.random = np.random.default_rng(seed)

    def version(self, *, lag: int = 0, part: float = 1.0) -> Evidence:
        """Samples of an engine that computes the weights of `lag` versions ago, or took a `part` of the last update."""
        now = [np.log(self.random.uniform(0.05, 0.95, TOKENS)) for _ in range(SAMPLES)]
        step = [self.drift * self.random.standard_normal(TOKENS) for _ in range(SAMPLES)]
        return Evidence(
            behaviour=[self.rounded(n - (lag + 1 - part) * s) for n, s in zip(now, step, strict=True)],
            current=[self.rounded(n) for n in now],
            alternatives={"stale_weights": [self.rounded(n - s) for n, s in zip(now, step, strict=True)]},
        )

    def rounded(self, exact: np.ndarray[Any, Any]) -> Floats:
        # Heavier tails than a normal distribution, as measured.
        found: Floats = (exact + self.noise * self.random.laplace(size=exact.shape) / np.sqrt(2)).astype(np.float32)
        return found


def until_fault(attestor: Attestor, simulated: Simulated, limit: int, **fault: Any) -> tuple[int, Verdict]:
    """Versions until the fault is seen, and the verdict."""
    for count in range(1, limit + 1):
        verdict = attestor.judge(simulated.version(**fault))
        if verdict.fault is not None:
            return count, verdict
    raise AssertionError(f"nothing was noticed in {limit} versions")


@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "fp32")])
@pytest.mark.parametrize("drift", [0.0, 0.1, 1.0, 10.0])
def test_a_true_engine_is_never_accused_whatever_the_policy_drifts(dtypes: tuple[Dtype, Dtype], drift: float) -> None:
    noise = 0.06 if "bf16" in dtypes else 1e-5
    attestor, simulated = Attestor(dtypes=dtypes), Simulated(noise=noise, drift=drift * noise)

    verdicts = [attestor.judge(simulated.version()) for _ in range(2000)]

    assert [verdict.fault for verdict in verdicts if verdict.fault] == []
    assert max(verdict.mean / verdict.threshold for verdict in verdicts[1:]) < 0.5


@pytest.mark.parametrize(("drift", "versions"), [(30.0, 1), (4.0, 2), (2.0, 3), (1.0, 8)])
def test_an_engine_that_keeps_old_weights_is_noticed_the_sooner_the_more_the_policy_drifts(
    drift: float, versions: int
) -> None:
    attestor, simulated = Attestor(dtypes=BF16), Simulated(noise=0.01, drift=0.01 * drift)
    for _ in range(20):
        attestor.judge(simulated.version())

    count, verdict = until_fault(attestor, simulated, versions, lag=1)

    assert verdict.fault == "stale_weights"
    assert count <= versions


def test_a_fault_below_the_noise_that_goes_on_is_confirmed_by_the_next_version_or_two() -> None:
    attestor, simulated = Attestor(dtypes=BF16), Simulated(noise=0.06, drift=0.12)
    attestor.judge(simulated.version())
    until_fault(attestor, simulated, 3, lag=1)

    count, verdict = until_fault(attestor, simulated, 2, lag=1)

    assert verdict.fault == "stale_weights"
    assert count <= 2


def test_an_update_that_arrives_in_part_is_a_mismatch_and_not_called_stale() -> None:
    attestor, simulated = Attestor(dtypes=("fp32", "fp32")), Simulated(noise=1e-6, drift=1e-2)
    attestor.judge(simulated.version())

    verdict = attestor.judge(simulated.version(part=0.7))

    assert verdict.fault == "logprob_mismatch"
    assert "part of an update" in verdict.text


def test_the_threshold_is_a_multiple_of_the_first_version_and_never_above_the_ceiling() -> None:
    attestor = Attestor(dtypes=BF16)
    assert attestor.threshold == 0.25

    quiet = attestor.judge(Simulated(noise=1e-3, drift=0.0).version())

    assert attestor.threshold == pytest.approx(4 * quiet.mean)
    loud = Attestor(dtypes=BF16)
    loud.judge(Simulated(noise=0.1, drift=0.0).version())
    assert loud.threshold == 0.25


def test_the_threshold_follows_noise_that_grows_slowly_and_not_a_jump() -> None:
    attestor = Attestor(dtypes=BF16)
    for n in range(100):
        assert attestor.judge(Simulated(noise=1e-3 * 1.03**n, drift=0.0, seed=n).version()).fault is None
    followed = attestor.threshold
    assert 10 < followed / 4e-3 < 30  # the noise is 19 times what it was at first

    assert attestor.judge(Simulated(noise=0.1, drift=0.0).version()).fault == "logprob_mismatch"
    assert attestor.threshold == followed


def test_a_first_version_that_is_already_wrong_does_not_become_the_measure() -> None:
    attestor = Attestor(dtypes=BF16)

    first = attestor.judge(Simulated(noise=1.0, drift=0.0).version())

    assert first.fault == "logprob_mismatch"
    quiet = attestor.judge(Simulated(noise=1e-3, drift=0.0).version())
    assert attestor.threshold == pytest.approx(4 * quiet.mean)


def test_log_probs_that_are_not_numbers_are_a_mismatch() -> None:
    broken = Evidence(behaviour=[np.full(4, -1.0, np.float32)], current=[np.full(4, np.nan, np.float32)])

    assert Attestor(dtypes=BF16).judge(broken).fault == "logprob_mismatch"


def test_a_single_version_never_convicts_by_contrast_alone() -> None:
    assert MOST - SLACK < LIMIT
    near = Simulated(noise=0.05, drift=0.5).version(lag=1)  # its distance is below the ceiling, and it is clearly stale
    near = replace(near, behaviour=[b * 0.2 + c * 0.8 for b, c in zip(near.behaviour, near.current, strict=True)])
    far = replace(near, alternatives={"stale_weights": near.behaviour})

    verdict = Attestor(dtypes=BF16).judge(far)

    assert verdict.fault is None
    assert -MOST <= verdict.contrast["stale_weights"] < -5


def test_one_sample_counts_for_one_standard_error_however_long_it_is() -> None:
    zeros, ones = np.zeros(5000, np.float32), np.full(5000, 1e-3, np.float32)
    one = Evidence(behaviour=[zeros], current=[zeros], alternatives={"stale_weights": [ones]})

    assert Attestor(dtypes=BF16).judge(one).contrast["stale_weights"] == pytest.approx(1.0)


def test_weights_that_did_not_change_say_nothing() -> None:
    same = Simulated(noise=0.0, drift=0.0).version()

    assert Attestor(dtypes=BF16).judge(same).contrast["stale_weights"] == 0.0


def completion(*versions: int) -> Completion:
    return Completion(
        token_ids=np.arange(len(versions), dtype=np.int32),
        logprobs=np.full(len(versions), -1.0, np.float32),
        token_versions=np.array([PolicyVersion(n=n).packed for n in versions], np.int64),
        text="",
        finish_reason="stop",
    )


def offer(fresh: FreshSamples, sample_id: int, *versions: int, epoch: int = 0) -> None:
    fresh.offer(sample_id, 0, np.ones(3, np.int32), completion(*versions), epoch=epoch)


def ids(fresh: FreshSamples, version: int) -> list[int]:
    return [sample.sample_id for sample in fresh.of(PolicyVersion(n=version))]


def test_only_completions_of_one_version_are_kept_and_only_the_last_of_the_newest_versions() -> None:
    fresh = FreshSamples(2)

    for sample_id, versions in enumerate([(0, 0), (1, 1), (1, 2), (2, 2), (2,), (2, 2)]):
        offer(fresh, sample_id, *versions)

    assert ids(fresh, 0) == []
    assert ids(fresh, 1) == [1]
    assert ids(fresh, 2) == [4, 5]


def test_what_was_begun_before_the_weights_were_loaded_again_is_not_looked_at() -> None:
    fresh = FreshSamples(2)
    before = fresh.epoch
    offer(fresh, 0, 1)

    fresh.close()
    offer(fresh, 1, 1)
    fresh.reopen()
    offer(fresh, 2, 1, epoch=before)
    offer(fresh, 3, 1, epoch=fresh.epoch)

    assert ids(fresh, 1) == [3]


# -- the canary --------------------------------------------------------------------------------------------------------


class TwoVersions:
    """A learner of which only the log-probs under each of its versions matter, with a snapshot of each."""

    def __init__(self, *, changes: bool) -> None:
        self.snapshots = [SimpleNamespace(version=PolicyVersion(n=n), digest=str(n)) for n in range(2)]
        self.values = [np.full(4, -1.0, np.float32), np.full(4, -1.1 if changes else -1.0, np.float32)]

    def logprobs(self, samples: Any) -> list[Floats]:
        return [self.values[1] for _ in samples]

    def logprobs_under(self, samples: Any, *, weights: Any = None, temperature: float | None = None) -> list[Floats]:
        return [self.values[weights.version.n] for _ in samples]


def compared(canaries: tuple[float, float], *, changes: bool = True) -> tuple[list[str], FreshSamples]:
    """Alarms after two versions whose canaries had these log-probs."""
    learner, fresh, lines = TwoVersions(changes=changes), FreshSamples(8), []
    recorder = SimpleNamespace(log=lambda kind, values: lines.append(values["alarm"]))
    attestation = Attestation(
        learner,  # type: ignore[arg-type]
        fresh,
        config=resolve(TINY),
        recorder=recorder,
        alarms=Alarms(recorder),
    )
    for snapshot, logprob in zip(learner.snapshots, canaries, strict=True):
        attestation.published(snapshot)
        canary = replace(completion(*[snapshot.version.n] * 4), logprobs=np.full(4, logprob, np.float32))
        fresh.completed_canary(snapshot.version, np.ones(3, np.int32), canary)
    attestation.before_update()
    attestation.before_update()
    return lines, fresh


def test_versions_without_any_attestation_are_told_when_they_have_also_taken_their_time() -> None:
    clock, lines = ManualClock(), []
    recorder = SimpleNamespace(log=lambda kind, values: lines.append(values["alarm"]))
    attestation = Attestation(
        TwoVersions(changes=True),  # type: ignore[arg-type]
        FreshSamples(8),
        config=resolve(TINY),
        recorder=recorder,
        alarms=Alarms(recorder),
        clock=clock,
    )

    def publish(versions: int, seconds: float) -> None:
        for n in range(versions):
            clock.advance(seconds)
            attestation.published(SimpleNamespace(version=PolicyVersion(n=n), digest=str(n), path=None))

    publish(PATIENT_VERSIONS, PATIENT_SECONDS)
    assert lines == []
    publish(1, 0.0)
    assert lines == ["unattested"]
    publish(100, PATIENT_SECONDS / 200)
    assert lines == ["unattested"]
    publish(100, PATIENT_SECONDS / 100)
    assert lines == ["unattested"] * 2


def test_a_canary_that_is_the_same_to_the_last_bit_shows_that_the_weights_were_kept() -> None:
    lines, fresh = compared((-2.0, -2.0))

    assert lines == ["stale_weights"]  # and not again for the same load
    assert fresh.closed  # until they are loaded again


def test_a_canary_that_has_changed_in_its_last_bit_is_no_fault() -> None:
    lines, fresh = compared((-2.0, float(np.nextafter(np.float32(-2.0), np.float32(0.0)))))

    assert lines == []
    assert not fresh.closed


def test_a_canary_that_the_learner_does_not_change_either_says_nothing() -> None:
    assert compared((-2.0, -2.0), changes=False)[0] == []


# -- planted faults ----------------------------------------------------------------------------------------------------

CHECKED = ("steps=20", "max_new_tokens=16", "zero_variance=keep", "eval_every=0", "data.eval_size=0")


def alarms(run: Run) -> list[dict[str, Any]]:
    """Those about the engine. That nothing fresh came in time for some versions depends on the machine."""
    lines = read_metrics(run.run_dir / "metrics.jsonl", "alarm")
    return [line for line in lines if line["alarm"] != "unattested"]


def faults(run: Run) -> list[str]:
    return [line["alarm"] for line in alarms(run)]


@pytest.mark.parametrize("bound", [0, 1, 2])
@pytest.mark.parametrize("update", ["boundary", "in_flight"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_healthy_run_is_attested_and_raises_no_alarm(run_tiny: RunTiny, bound: int, update: str, dtype: str) -> None:
    run = run_tiny(
        *CHECKED,
        f"max_staleness={bound}",
        f"weights.update={update}",
        f"rollout.dtype={dtype}",
        "temperature=0.7",
        "learning_rate=0.02",
    )

    assert run.summary.outcome == "finished", run.summary.reason
    assert faults(run) == []
    attested = read_metrics(run.run_dir / "metrics.jsonl", "attest")
    assert attested  # how many versions have samples in time depends on the machine
    assert all(line["attest/fault"] is None for line in attested)


@pytest.mark.parametrize("bound", [0, 1])
def test_an_engine_that_keeps_old_weights_is_loaded_again_and_then_stops_the_run(run_tiny: RunTiny, bound: int) -> None:
    run = run_tiny(*CHECKED, f"max_staleness={bound}", "rollout.options.stale_from=5")

    assert run.summary.outcome == "failed"
    assert "older weights than it says" in str(run.summary.reason)
    assert faults(run) == ["stale_weights", "stale_weights"]
    first, second = alarms(run)
    assert second["severity"] == "error"
    if bound == 0:  # nothing runs beside anything, so what is noticed when does not depend on the machine
        assert first["version"] in ("0.5", "0.6")  # the first version that was not taken, or the next
        assert run.summary.steps <= 5 + 2 * 2  # noticed within two steps, and again within two
    assert escape(first["text"]) in run.report.read_text(encoding="utf-8")
    assert audit(run.run_dir).ok


class MissesOneUpdate(FakeRollout):
    """Does not take the first weights that it is given after version 4."""

    _missed = False

    def _takes(self, version: PolicyVersion) -> bool:
        missed, self._missed = self._missed, self._missed or version.n > 4
        return missed or version.n <= 4


def test_an_engine_that_takes_the_weights_at_the_second_attempt_goes_on(run_tiny: RunTiny) -> None:
    run = run_tiny(*CHECKED, "max_staleness=0", rollout=MissesOneUpdate(resolve_model("tiny")))

    assert run.summary.outcome == "finished", run.summary.reason
    assert faults(run) == ["stale_weights"]


def test_log_probs_without_the_temperature_are_named_at_the_first_versions(run_tiny: RunTiny) -> None:
    run = run_tiny(
        *CHECKED, "temperature=0.5", "rollout.options.ignores_temperature=true", "attestation.on_mismatch=stop"
    )

    assert run.summary.outcome == "failed"
    assert "without the temperature" in str(run.summary.reason)
    assert faults(run) == ["missing_temperature"]
    assert run.summary.steps <= 3


def test_a_mismatch_can_be_a_warning_that_is_given_once(run_tiny: RunTiny) -> None:
    run = run_tiny(*CHECKED, "rollout.options.stale=true", "attestation.on_mismatch=warn", "steps=10")

    assert run.summary.outcome == "finished", run.summary.reason
    assert faults(run) == ["stale_weights"]


def test_attestation_can_be_switched_off(run_tiny: RunTiny) -> None:
    run = run_tiny(*CHECKED, "rollout.options.stale=true", "attestation.samples=0", "steps=10")

    assert run.summary.outcome == "finished", run.summary.reason
    assert faults(run) == []
    assert read_metrics(run.run_dir / "metrics.jsonl", "attest") == []


def test_attestation_changes_nothing_of_what_is_learned(tmp_path: Path, run_tiny: RunTiny) -> None:
    settings = ("steps=6", "max_staleness=0", "deterministic=true", "learner.dtype=fp32", "temperature=0.7")

    attested = run_tiny(*settings)
    attested.run_dir.rename(tmp_path / "attested")
    plain = run_tiny(*settings, "attestation.samples=0")

    assert attested.summary.digest == plain.summary.digest
