"""What takes too long is named, given back, and in the end stops the run: decisions on plain values, then the parts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncflow.clock import ManualClock
from asyncflow.engines.base import GenerationRequest
from asyncflow.engines.fake import FakeRollout
from asyncflow.engines.models import resolve_model
from asyncflow.errors import RewardError, RewardTimeout, RunFailed
from asyncflow.launch import resolve
from asyncflow.pipeline import stages
from asyncflow.report.audit import audit
from asyncflow.rewards import Reward, RewardInput
from asyncflow.rewards.calls import MAX_LEFT_BEHIND, Calls
from asyncflow.runtime.metrics import read_metrics
from asyncflow.runtime.timeline import NoTimeline
from asyncflow.store.client import Counts, Waited
from asyncflow.store.events import Committed
from asyncflow.store.schema import Schema
from asyncflow.store.store import EmbeddedStore
from asyncflow.types import PolicyVersion, Prompt, Sampling
from asyncflow.workers.alarms import Alarms
from asyncflow.workers.attestation import FreshSamples
from asyncflow.workers.base import Heartbeat
from asyncflow.workers.host import EngineHost
from asyncflow.workers.reward import RewardWorker
from asyncflow.workers.rollout import RolloutWorker, UnderWay
from asyncflow.workers.watchdog import Progress, Watchdog, overdue, slow, who_waits
from tests.conftest import TINY, RunTiny
from tests.test_fake_engines import always
from tests.test_store import prompts, responses, terms

GROUP = 12
NEVER = 1e9
"""Seconds; for what has no part in a test."""


# -- decisions ---------------------------------------------------------------------------------------------------------


def under_way(sample_id: int, began: float) -> UnderWay:
    return UnderWay(
        request_id=f"{sample_id}.1", sample_id=sample_id, group_id=0, attempt=1, engine="rollout-0", began=began
    )


@pytest.mark.parametrize(
    ("durations", "age", "is_slow"),
    [
        ([1.0] * 20, 61.0, True),
        ([1.0] * 20, 59.0, False),  # ten times the median, and yet nothing to speak of
        ([10.0] * 20, 99.0, False),
        ([10.0] * 20, 101.0, True),
        ([1.0] * 7, 1e6, False),  # too few to know what is usual
        ([1.0] * 12 + [500.0] * 8, 61.0, True),  # a few slow ones before do not make slow the usual
    ],
)
def test_a_completion_is_slow_compared_with_the_others(durations: list[float], age: float, is_slow: bool) -> None:
    assert [
        one.sample_id for one in slow([under_way(3, 100.0), under_way(4, 100.0 + age)], durations, 100.0 + age)
    ] == ([3] if is_slow else [])


def test_what_is_longer_under_way_than_the_timeout_is_overdue() -> None:
    assert [one.sample_id for one in overdue([under_way(1, 0.0), under_way(2, 6.0)], 10.0, 11.0)] == [1]


def test_time_without_progress_counts_from_the_last_change() -> None:
    progress = Progress(0.0)

    assert progress.stalled("a", 5.0) == 0.0
    assert progress.stalled("a", 9.0) == 4.0
    assert progress.stalled("b", 10.0) == 0.0


def counts(**changes: Any) -> Counts:
    values: dict[str, Any] = {
        "admitted": 8,
        "trained": 0,
        "dropped": {},
        "quarantined": 0,
        "states": {"generating": 1},
        "leased": {},
        "ready": {},
        "bytes": 0,
        "capacity": 0,
        "max_staleness": 1,
        "learner": PolicyVersion(n=4),
        "served": {"rollout-0": PolicyVersion(n=3)},
        "oldest": None,
    }
    return Counts(**values | changes)


HELD_UP = Waited(sample_id=7, group_id=1, state="generating", worker="rollout")


@pytest.mark.parametrize(
    ("counts", "waited", "learner_busy", "says"),
    [
        (counts(), [HELD_UP], True, "everybody waits for the learner, which is computing step 5"),
        (counts(), [HELD_UP], False, "the learner waits for sample 7 of group 1 (generating, held by rollout)"),
        (counts(states={}), [], False, "the learner is at 0.4, and rollout-0 serves 0.3"),
        (counts(states={}, capacity=4), [], False, "waits for prompts from the feeder"),
        (counts(states={"rewarded": 4}), [], False, "the learner has not taken them"),
    ],
)
def test_a_stall_is_told_as_who_waits_for_whom(
    counts: Counts, waited: Sequence[Waited], learner_busy: bool, says: str
) -> None:
    assert says in who_waits(counts, waited, learner_busy=learner_busy)


# -- rollouts that never end -------------------------------------------------------------------------------------------


class Recorded:
    """A recorder that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        self.lines.append({"kind": kind, **values})

    def alarms(self) -> list[str]:
        return [line["alarm"] for line in self.lines if line["kind"] == "alarm"]


class Hanging:
    """A store with one group in a fake engine that never ends the completion of one sample."""

    def __init__(self, folder: Path, hangs: int) -> None:
        self.clock = ManualClock()
        self.recorded = Recorded()
        self.hung = threading.Event()
        schema = Schema(stages(resolve(TINY)))
        self.store = EmbeddedStore.create(
            schema,
            terms(train_batch_size=GROUP, num_generations=GROUP),
            ledger=folder / "ledger.sqlite",
            clock=self.clock,
        )
        self.store.serve("rollout-0", PolicyVersion(n=0))
        self.store.admit(prompts(1), timeout=0.0)

        def latency(request: GenerationRequest) -> float:
            return 1.0 if request.request_id.startswith(f"{hangs}.") else 0.0

        async def sleep(seconds: float) -> None:
            if seconds:
                self.hung.set()
                await asyncio.Event().wait()
            await asyncio.sleep(0)

        engine = FakeRollout(resolve_model("tiny"), token_latency=latency, sleep=sleep)
        self.host = EngineHost(engine, "rollout-0", NoTimeline(), clock=self.clock)
        self.rollout = RolloutWorker(
            schema.stages["rollout"],
            self.store,
            Heartbeat(self.store, ttl=NEVER),
            NoTimeline(),
            host=self.host,
            sampling=Sampling(max_new_tokens=2),
            max_concurrency=GROUP,
            seed=None,
            fresh=FreshSamples(0),
        )
        self.watchdog = Watchdog(
            self.store,
            self.host,
            self.rollout,
            SimpleNamespace(passes=0, computing=False),  # type: ignore[arg-type]
            Alarms(self.recorded),
            rollout_timeout=300.0,
            stall_timeout=1000.0,
            clock=self.clock,
        )
        self.host.start()

    def generate(self) -> None:
        """One turn, after which one completion hangs."""
        self.hung.clear()
        self.rollout.turn()
        assert self.hung.wait(20.0)

    def finish_the_others(self) -> None:
        done = 0
        while done < GROUP - 1:  # as many as there are at a time
            lease = self.store.lease("reward", worker="reward", max_rows=GROUP, ttl=NEVER, timeout=20.0)
            assert lease is not None
            done += len(lease.rows)

    def after(self, seconds: float) -> list[str]:
        """Look once, and return the alarms of this look."""
        self.clock.advance(seconds)
        before = len(self.recorded.alarms())
        self.watchdog.look()
        return self.recorded.alarms()[before:]


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Hanging]:
    bench = Hanging(tmp_path, hangs=5)
    yield bench
    bench.host.stop()
    bench.store.close()


def test_a_rollout_that_never_ends_is_named_once_then_given_back_and_in_the_end_quarantined(hanging: Hanging) -> None:
    hanging.generate()
    hanging.finish_the_others()

    assert hanging.after(59.0) == []
    assert hanging.after(2.0) == ["rollout_slow"]
    named = hanging.recorded.lines[-1]
    assert (named["sample"], named["group"], named["worker"], named["seconds"]) == (5, 0, "rollout-0", 61.0)
    assert "sample 5 of group 0 (attempt 1) has been in rollout-0 for 61 s" in named["text"]
    assert hanging.after(60.0) == []
    assert hanging.after(180.0) == ["rollout_timeout"]
    assert "rollout.timeout" in hanging.store.table.samples()[5].reasons[0]
    for _ in range(2):
        hanging.generate()
        assert hanging.after(301.0) == ["rollout_timeout"]

    account = hanging.store.counts()
    assert account.quarantined == 1
    assert account.open == GROUP - 1
    assert hanging.rollout.under_way() == []


def test_what_is_cancelled_because_the_run_ends_was_no_attempt(hanging: Hanging) -> None:
    hanging.generate()
    hanging.finish_the_others()

    hanging.host.cancel()
    hanging.rollout.room()  # a place is free again, so it has been dealt with

    row = hanging.store.table.samples()[5]
    assert (row.state, row.reasons) == ("generating", [])  # as if the process had been killed: see Resumed


def test_a_completion_that_waits_to_be_let_in_is_neither_slow_nor_overdue(hanging: Hanging) -> None:
    hanging.generate()
    hanging.finish_the_others()
    loop = hanging.host._loop
    swap = asyncio.run_coroutine_threadsafe(hanging.host._load(always(10, 1), "boundary"), loop)
    hanging.store.admit(prompts(1), timeout=0.0)
    hanging.rollout.turn()
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(20.0)  # all of them have reached the gate
    hanging.store.broker.perform([Committed(trained=(), skipped=(), version=PolicyVersion(n=1).packed)])

    assert hanging.after(299.0) == ["rollout_slow"]
    assert hanging.after(2.0) == ["rollout_timeout"]

    assert swap.result(20.0).version == PolicyVersion(n=1)
    hanging.finish_the_others()


def test_a_stall_names_the_samples_that_hold_up_the_step_and_stops_the_run_after_four_times_as_long(
    hanging: Hanging,
) -> None:
    hanging.generate()
    hanging.finish_the_others()
    hanging.after(0.0)
    assert hanging.after(301.0) == ["rollout_timeout"]  # it is given back, and nobody takes it
    hanging.after(0.0)

    assert hanging.after(999.0) == []
    assert hanging.after(1.0) == ["stalled"]
    line = hanging.recorded.lines[-1]
    assert line["samples"] == list(range(GROUP))
    assert "sample 5 of group 0 (prompted, taken by nobody)" in line["text"]
    assert hanging.after(1000.0) == []
    with pytest.raises(RunFailed, match="stall_timeout"):
        hanging.after(2000.0)


def test_a_run_that_was_paused_has_not_stalled(hanging: Hanging) -> None:
    hanging.watchdog.stop()  # it does not wait between two turns
    hanging.watchdog.turn()

    hanging.clock.advance(1e6)
    hanging.watchdog.turn()

    assert hanging.recorded.alarms() == []


def test_in_a_run_a_completion_that_hangs_is_tried_again_and_the_run_goes_on(run_tiny: RunTiny) -> None:
    async def sleep(seconds: float) -> None:
        await (asyncio.Event().wait() if seconds else asyncio.sleep(0))

    engine = FakeRollout(
        resolve_model("tiny"), token_latency=lambda request: float(request.request_id == "21.1"), sleep=sleep
    )

    run = run_tiny("rollout.timeout=2", "steps=4", rollout=engine)

    assert run.summary.outcome == "finished", run.summary.reason
    alarms = read_metrics(run.run_dir / "metrics.jsonl", "alarm")
    assert ("rollout_timeout", 21) in [(line["alarm"], line.get("sample")) for line in alarms]
    assert audit(run.run_dir).ok


# -- reward functions that hang ----------------------------------------------------------------------------------------


class Poison:
    """A reward function that never returns when a completion is poisonous, and a wait that notices at once."""

    def __init__(self, *poisonous: str) -> None:
        self._poisonous = poisonous
        self._changed = threading.Condition()
        self._hanging = self._seen = 0
        self.release = threading.Event()
        self.calls: list[list[str]] = []

    def __call__(self, completions: Sequence[str], **_: object) -> list[float]:
        self.calls.append(list(completions))
        if set(self._poisonous) & set(completions):
            with self._changed:
                self._hanging += 1
            self.release.wait(60.0)
        return [1.0] * len(completions)

    def wait(self, done: threading.Event, seconds: float) -> bool:
        """True when the call is done, False when it hangs; whichever it will be."""
        while not done.wait(0.001):
            with self._changed:
                if self._hanging > self._seen:
                    self._seen = self._hanging
                    return False
        return True


@pytest.fixture
def poison() -> Iterator[Callable[..., Poison]]:
    made: list[Poison] = []

    def make(*poisonous: str) -> Poison:
        made.append(Poison(*poisonous))
        return made[-1]

    yield make
    for one in made:
        one.release.set()


def scored(text: str) -> RewardInput:
    return RewardInput(prompt=Prompt(messages="?"), completion=text, completion_ids=(1,))


def test_a_poison_row_is_found_by_scoring_alone_and_its_neighbours_survive(
    tmp_path: Path, poison: Callable[..., Poison]
) -> None:
    schema, recorded, function = Schema(stages(resolve(TINY))), Recorded(), poison("Ünï 2")
    store = EmbeddedStore.create(
        schema, terms(train_batch_size=4, num_generations=4), ledger=tmp_path / "ledger.sqlite"
    )
    store.serve("rollout-0", PolicyVersion(n=0))
    store.admit(prompts(1), timeout=0.0)
    lease = store.lease("rollout", worker="rollout", max_rows=4, ttl=NEVER, timeout=0.0)
    assert lease is not None
    store.ack(lease.lease_id, [0, 1, 2, 3], responses([0, 1, 2, 3]))
    reward = Reward({"poison": (function, 1.0)}, timeout=60.0, wait=function.wait)
    worker = RewardWorker(
        schema.stages["reward"], store, Heartbeat(store), NoTimeline(), reward=reward, alarms=Alarms(recorded)
    )

    worker.turn()
    assert store.counts().states["generated"] == 4  # all of them came back
    worker.turn()
    worker.turn()

    account = store.counts()
    assert (account.quarantined, account.states["rewarded"]) == (1, 3)
    assert recorded.alarms() == ["reward_hung"] * 3
    assert recorded.lines[0]["samples"] == (0, 1, 2, 3)
    assert [line["samples"] for line in recorded.lines[1:]] == [(2,), (2,)]
    assert function.calls == [[f"Ünï {i}" for i in range(4)], *([f"Ünï {i}"] for i in range(4)), ["Ünï 2"]]
    reward.close()
    store.close()


def test_a_call_that_hangs_does_not_keep_the_next_one(poison: Callable[..., Poison]) -> None:
    function = poison("bad")
    reward = Reward({"poison": (function, 1.0)}, timeout=60.0, wait=function.wait)

    with pytest.raises(RewardTimeout, match="the reward function poison did not return within 60 s"):
        reward.score([scored("bad")])

    [result] = reward.score([scored("good")])
    assert result.reward == 1.0  # type: ignore[union-attr]
    reward.close()


def test_too_many_calls_that_hang_are_an_error_that_says_what_to_do(poison: Callable[..., Poison]) -> None:
    function = poison("bad")
    reward = Reward({"poison": (function, 1.0)}, timeout=60.0, wait=function.wait)
    for _ in range(MAX_LEFT_BEHIND):
        with pytest.raises(RewardTimeout):
            reward.score([scored("bad")])

    with pytest.raises(RewardError, match=r"8 calls of reward functions have not returned.*reward_timeout"):
        reward.score([scored("good")])
    reward.close()


def test_an_asynchronous_call_that_hangs_is_cancelled(poison: Callable[..., Poison]) -> None:
    entered, cancelled = threading.Event(), threading.Event()

    async def forever() -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    def until_entered(done: threading.Event, seconds: float) -> bool:
        entered.wait(60.0)
        return False

    calls = Calls(timeout=1.0, wait=until_entered)
    with pytest.raises(RewardTimeout):
        calls.call("forever", forever, {})

    assert cancelled.wait(60.0)
    calls.close()


def test_a_reward_service_that_hangs_for_a_while_costs_no_sample(run_tiny: RunTiny) -> None:
    calls, release = [0], threading.Event()

    def service(completions: Sequence[str], **_: object) -> list[float]:
        calls[0] += 1
        if calls[0] == 4:
            release.wait(60.0)
        return [float(len(set(completion))) for completion in completions]

    run = run_tiny("steps=4", "reward_timeout=2", "data.eval_size=0", reward=service)
    release.set()

    assert run.summary.outcome == "finished", run.summary.reason
    alarms = read_metrics(run.run_dir / "metrics.jsonl", "alarm")
    assert "reward_hung" in [line["alarm"] for line in alarms]
    result = audit(run.run_dir)
    assert result.ok, result.violations
    assert result.quarantined == 0


def test_a_healthy_run_raises_no_alarm(run_tiny: RunTiny) -> None:
    run = run_tiny("steps=10")

    assert read_metrics(run.run_dir / "metrics.jsonl", "alarm") == []
