"""Who computes when and where: separated sides work at the same time, colocated ones take turns."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from asyncflow.engines.base import Capabilities, GenerationRequest, RolloutEngine, WeightSnapshot
from asyncflow.engines.fake import BIGRAM, FakeLearner, FakeRollout, FakeScorer
from asyncflow.engines.models import resolve_model
from asyncflow.errors import Closed, ConfigError, EngineError
from asyncflow.launch import resolve
from asyncflow.placement import resolve_cores
from asyncflow.plan import describe, plan
from asyncflow.report.audit import audit
from asyncflow.runtime.metrics import read_metrics
from asyncflow.runtime.timeline import NoTimeline
from asyncflow.types import Completion, PolicyVersion, Sampling, UpdateMode
from asyncflow.workers.host import EngineHost
from tests.conftest import TINY, RunTiny
from tests.test_fake_engines import always

SOON = 60.0
"""Seconds after which a test gives up; nothing here takes that long."""


NO_CANARY = "attestation.samples=0"
"""Every completion is a sample."""


class Machine:
    """Counts who computes, and notes who met whom."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: dict[str, int] = {}
        self.met: set[frozenset[str]] = set()
        self.turns: dict[str, int] = {}
        self.generated = 0

    @contextmanager
    def used_by(self, who: str) -> Iterator[None]:
        with self._lock:
            self._active[who] = self._active.get(who, 0) + 1
            self.turns[who] = self.turns.get(who, 0) + 1
            self.met |= {frozenset((who, other)) for other, count in self._active.items() if count and other != who}
        try:
            yield
        finally:
            with self._lock:
                self._active[who] -= 1


def engines(machine: Machine) -> dict[str, Any]:
    """Fake engines that say when they compute; between two tokens the engine lets everybody else run."""
    tiny = resolve_model("tiny")

    class Rollout(FakeRollout):
        async def generate(self, request: GenerationRequest) -> Completion:
            with machine.used_by("rollout"):
                completion = await super().generate(request)
            machine.generated += 1
            return completion

    class Learner(FakeLearner):
        def forward_backward(self, samples: Sequence[Any]) -> Any:
            with machine.used_by("learner"):
                return super().forward_backward(samples)

        def optim_step(self, denominator: float) -> Any:
            with machine.used_by("learner"):
                return super().optim_step(denominator)

    class Scorer(FakeScorer):
        def logprobs(self, samples: Sequence[Any]) -> Any:
            with machine.used_by("reference"):
                return super().logprobs(samples)

    return {
        "rollout": Rollout(tiny),
        "learner": Learner(FakeLearner.load_policy(tiny), learning_rate=0.05),
        "reference": Scorer(FakeScorer.load_policy(tiny)),
    }


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0, 2])
def test_colocated_sides_never_compute_at_the_same_time(run_tiny: RunTiny, bound: int) -> None:
    machine = Machine()

    run = run_tiny(
        "steps=6",
        "placement=colocated",
        f"max_staleness={bound}",
        "kl_coef=0.1",
        "zero_variance=keep",
        "eval_every=2",
        **engines(machine),
    )

    assert run.summary.outcome == "finished", run.summary.reason
    assert machine.turns["learner"] >= 12
    assert machine.turns["reference"] >= 1
    assert machine.met == set()
    result = audit(run.run_dir)
    assert result.ok, result.violations
    assert max(result.staleness) <= bound


def test_separated_sides_compute_at_the_same_time(run_tiny: RunTiny) -> None:
    machine = Machine()
    given = engines(machine)
    training, resumed = threading.Event(), threading.Event()

    class Rollout(FakeRollout):
        """The samples of the second step are not finished before the first one is being trained."""

        async def generate(self, request: GenerationRequest) -> Completion:
            with machine.used_by("rollout"):
                if not request.request_id.startswith("eval") and int(request.request_id.split(".")[0]) >= 16:
                    assert await asyncio.to_thread(training.wait, SOON)
                    resumed.set()
                return await super().generate(request)

    class Learner(FakeLearner):
        def forward_backward(self, samples: Sequence[Any]) -> Any:
            with machine.used_by("learner"):
                training.set()
                assert resumed.wait(SOON), "generation does not go on while the learner trains"
                return super().forward_backward(samples)

    tiny = resolve_model("tiny")
    given |= {"rollout": Rollout(tiny), "learner": Learner(FakeLearner.load_policy(tiny), learning_rate=0.05)}
    settings = ("steps=3", "max_staleness=1", "kl_coef=0.1", "zero_variance=keep", NO_CANARY)
    run = run_tiny(*settings, **given)

    assert run.summary.outcome == "finished", run.summary.reason
    assert frozenset(("rollout", "learner")) in machine.met


def test_without_streaming_a_step_is_trained_once_all_of_its_samples_are_there(run_tiny: RunTiny) -> None:
    machine = Machine()
    given = engines(machine)
    counts: list[int] = []

    class Learner(FakeLearner):
        def forward_backward(self, samples: Sequence[Any]) -> Any:
            counts.append(machine.generated)
            return super().forward_backward(samples)

    given["learner"] = Learner(FakeLearner.load_policy(resolve_model("tiny")), learning_rate=0.05)
    given.pop("reference")
    run = run_tiny(
        "steps=3",
        NO_CANARY,
        "stream=false",
        "max_staleness=0",
        "zero_variance=keep",
        "data.eval_size=0",
        "learner.micro_batch_tokens=1",
        **given,
    )

    assert run.summary.outcome == "finished", run.summary.reason
    assert counts == [16] * 4 + [32] * 4 + [48] * 4


def test_a_streaming_learner_trains_a_group_before_the_last_one_of_its_step_is_generated(run_tiny: RunTiny) -> None:
    trained = threading.Event()

    class Rollout(FakeRollout):
        async def generate(self, request: GenerationRequest) -> Completion:
            if request.request_id.startswith("15."):
                assert await asyncio.to_thread(trained.wait, SOON), "the learner waits for the whole step"
            return await super().generate(request)

    class Learner(FakeLearner):
        def forward_backward(self, samples: Sequence[Any]) -> Any:
            trained.set()
            return super().forward_backward(samples)

    tiny = resolve_model("tiny")
    run = run_tiny(
        "steps=1",
        "max_staleness=0",
        "zero_variance=keep",
        "data.eval_size=0",
        rollout=Rollout(tiny),
        learner=Learner(FakeLearner.load_policy(tiny), learning_rate=0.05),
    )

    assert run.summary.outcome == "finished", run.summary.reason


@pytest.mark.parametrize("setting", ["placement=colocated", "stream=false"])
def test_without_staleness_every_placement_makes_the_same_weights_to_the_bit(run_tiny: RunTiny, setting: str) -> None:
    settings = ("steps=5", "learning_rate=0.05", "max_staleness=0", "deterministic=true", "kl_coef=0.1")

    found = [run_tiny(*settings, *extra, name=f"run{i}") for i, extra in enumerate([(), (setting,)])]

    first, second = (
        [line["digest"] for line in read_metrics(run.run_dir / "metrics.jsonl", "weights")] for run in found
    )
    assert first == second
    assert len(set(first)) == 6


def test_an_engine_that_can_sleeps_while_the_learner_trains(run_tiny: RunTiny) -> None:
    diary: list[str] = []

    class Sleeper(FakeRollout):
        capabilities = Capabilities(logprobs=True, weights=BIGRAM, deterministic=True, sleep=True)

        async def generate(self, request: GenerationRequest) -> Completion:
            diary.append("generate")
            return await super().generate(request)

        async def load_weights(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Any:
            diary.append("load")
            return await super().load_weights(snapshot, mode)

        async def sleep(self) -> None:
            diary.append("sleep")

        async def wake(self) -> None:
            diary.append("wake")

    class Learner(FakeLearner):
        def optim_step(self, denominator: float) -> Any:
            diary.append("train")
            return super().optim_step(denominator)

        def rest(self) -> None:
            diary.append("rest")

    tiny = resolve_model("tiny")
    learner = Learner(FakeLearner.load_policy(tiny), learning_rate=0.05)
    run = run_tiny(
        "steps=3", "placement=colocated", "zero_variance=keep", "kl_coef=0.1", rollout=Sleeper(tiny), learner=learner
    )

    assert run.summary.outcome == "finished", run.summary.reason
    events = [event for i, event in enumerate(diary) if event != "generate" or diary[i - 1] != "generate"]
    assert events == ["load", "generate", *["sleep", "train", "rest", "wake", "load", "generate"] * 3]


def test_a_run_whose_learner_fails_in_its_turn_ends_in_order(run_tiny: RunTiny) -> None:
    class Learner(FakeLearner):
        def optim_step(self, denominator: float) -> Any:
            raise EngineError("the device is gone")

    learner = Learner(FakeLearner.load_policy(resolve_model("tiny")), learning_rate=0.05)
    run = run_tiny("steps=3", "placement=colocated", "kl_coef=0.1", "max_staleness=2", learner=learner)

    assert run.summary.outcome == "failed"
    assert "the device is gone" in str(run.summary.reason)
    assert audit(run.run_dir).ok


# -- the gate ----------------------------------------------------------------------------------------------------------


class Held(FakeRollout):
    """Completes a request when it is told to."""

    def __init__(self) -> None:
        super().__init__(resolve_model("tiny"))
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()

    async def generate(self, request: GenerationRequest) -> Completion:
        self.begun.release()
        assert await asyncio.to_thread(self.go.wait, SOON)
        return await super().generate(request)


@pytest.fixture
def host() -> Iterator[EngineHost]:
    host = EngineHost(Held(), "rollout-0", NoTimeline())
    host.start()
    yield host
    engine(host).go.set()
    host.stop()


def engine(host: EngineHost) -> Held:
    assert isinstance(host.engine, Held)
    return host.engine


def submit(host: EngineHost, name: str) -> Future[Completion]:
    prompt = np.array([1, 20, 4], np.int32)
    return host.submit(GenerationRequest(request_id=name, prompt_ids=prompt, sampling=Sampling(max_new_tokens=2)))


def in_thread(action: Any) -> Future[None]:
    done: Future[None] = Future()

    def run() -> None:
        try:
            done.set_result(action())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def one_turn(host: EngineHost) -> None:
    with host.turn_when_idle():
        pass


def test_a_turn_begins_when_what_runs_has_finished_and_ends_with_the_next_weights(host: EngineHost) -> None:
    running = submit(host, "a")
    assert engine(host).begun.acquire(timeout=SOON)
    suspended = in_thread(host.suspend)
    assert not suspended.done()

    engine(host).go.set()
    suspended.result(SOON)
    assert running.done()
    waiting = submit(host, "b")
    # The loop has had every occasion to let it through: it answers in order.
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), host._loop).result(SOON)
    assert not engine(host).begun.acquire(blocking=False)

    served = asyncio.run_coroutine_threadsafe(host._load(always(5, n=1), "boundary"), host._loop)
    served.result(SOON)
    assert set(waiting.result(SOON).token_versions) == {PolicyVersion(n=1).packed}


def test_who_can_wait_gets_his_turn_when_the_engine_is_idle_and_gives_it_back(host: EngineHost) -> None:
    entered, leave = threading.Event(), threading.Event()

    def take() -> None:
        with host.turn_when_idle():
            entered.set()
            assert leave.wait(SOON)

    running = submit(host, "a")
    assert engine(host).begun.acquire(timeout=SOON)
    turn = in_thread(take)
    follows = submit(host, "b")  # it may run: nobody has the turn as long as the engine works
    assert engine(host).begun.acquire(timeout=SOON)
    assert not entered.is_set()

    engine(host).go.set()
    assert entered.wait(SOON)
    assert running.done()
    assert follows.done()
    later = submit(host, "c")
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), host._loop).result(SOON)
    assert not engine(host).begun.acquire(blocking=False)

    leave.set()
    turn.result(SOON)
    later.result(SOON)


def test_two_turns_come_one_after_the_other(host: EngineHost) -> None:
    host.suspend()
    second = in_thread(lambda: one_turn(host))
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), host._loop).result(SOON)
    assert not second.done()

    asyncio.run_coroutine_threadsafe(host._load(always(5, n=1), "boundary"), host._loop).result(SOON)

    second.result(SOON)


@pytest.mark.parametrize("pauses", range(6))
def test_a_turn_may_begin_in_the_moment_in_which_an_update_ends(pauses: int) -> None:
    class Sleeper(FakeRollout):
        capabilities = Capabilities(logprobs=True, weights=BIGRAM, sleep=True)

        async def sleep(self) -> None:
            for _ in range(pauses):
                await asyncio.sleep(0)

    host = EngineHost(Sleeper(resolve_model("tiny")), "rollout-0", NoTimeline())
    host.start()
    host.suspend()
    second = in_thread(host.suspend)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), host._loop).result(SOON)

    update = host._controlled(host._load(always(5, n=1), "boundary"))
    asyncio.run_coroutine_threadsafe(update, host._loop).result(SOON)

    second.result(SOON)
    host.stop()


def test_nobody_waits_for_a_turn_when_the_run_ends(host: EngineHost) -> None:
    host.suspend()
    waiting = [in_thread(host.suspend), in_thread(lambda: one_turn(host))]

    host.cancel()

    for one in waiting:
        with pytest.raises(Closed, match="the run is ending"):
            one.result(SOON)


# -- cores and plans ---------------------------------------------------------------------------------------------------


AVAILABLE = tuple(sorted(os.sched_getaffinity(0)))
needs_two_cores = pytest.mark.skipif(len(AVAILABLE) < 2, reason="needs two cores to divide")


def test_colocated_sides_have_the_same_cores() -> None:
    config = resolve_cores(resolve(TINY, ["placement=colocated", "kl_coef=0.1", f"learner.cores=[{AVAILABLE[0]}]"]))

    assert config.rollout.cores == config.learner.cores == config.reference.cores == AVAILABLE[:1]


@needs_two_cores
def test_a_reference_of_its_own_leaves_the_others_the_rest() -> None:
    config = resolve_cores(
        resolve(TINY, ["kl_coef=0.1", f"reference.cores=[{AVAILABLE[-1]}]", f"rollout.cores=[{AVAILABLE[-1]}]"])
    )

    assert AVAILABLE[-1] not in (config.learner.cores or ())
    assert config.reference.cores == AVAILABLE[-1:]


@needs_two_cores
def test_colocated_sides_on_different_cores_are_refused() -> None:
    first, second = AVAILABLE[:2]

    with pytest.raises(ConfigError, match="on the same cores"):
        plan(resolve(TINY, ["placement=colocated", f"learner.cores=[{first}]", f"rollout.cores=[{second}]"]))


def test_colocated_weights_in_flight_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"set weights\.update to boundary"):
        plan(resolve(TINY, ["placement=colocated", "weights.update=in_flight"]))


def test_the_plan_says_what_the_placement_means() -> None:
    separated, colocated = (
        dict(describe(plan(resolve(TINY, [f"placement={placement}"])))) for placement in ("separated", "colocated")
    )

    assert "separated, at the same time" in separated["placement"]
    assert "taking turns" in colocated["placement"]
    assert "trained as its groups come" in separated["step"]
    assert "trained once all of its samples are there" in colocated["step"]


def test_an_engine_that_declares_nothing_does_not_have_to_sleep() -> None:
    assert not RolloutEngine.capabilities.sleep
    asyncio.run(FakeRollout(resolve_model("tiny")).sleep())
    asyncio.run(FakeRollout(resolve_model("tiny")).wake())
