"""The timeline: what every part did and waited for, in the trace, in the shares and in the store's own words."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncflow.clock import ManualClock
from asyncflow.engines.base import Capabilities, GenerationRequest, RolloutEngine, Served, WeightSnapshot
from asyncflow.errors import StoreError
from asyncflow.launch import Run, launch, resolve, resume
from asyncflow.plan import plan
from asyncflow.rundir import TRACE
from asyncflow.runtime.metrics import read_metrics
from asyncflow.runtime.timeline import Doing, Span, TraceTimeline, as_told, read_trace
from asyncflow.store.schema import PROMPT_COLUMNS, Schema, Stage
from asyncflow.store.topics import ADMISSION
from asyncflow.types import Completion, PolicyVersion, Sampling, UpdateMode
from asyncflow.workers.attestation import FreshSamples
from asyncflow.workers.base import Heartbeat, HeldLease, StageWorker
from asyncflow.workers.host import EngineHost
from asyncflow.workers.rollout import RolloutWorker
from tests.conftest import TINY, RunTiny
from tests.processes import wait_until
from tests.test_store import SCHEMA, Bench, ids, responses, rewards


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / TRACE


@pytest.fixture
def timeline(trace: Path, clock: ManualClock) -> Iterator[TraceTimeline]:
    timeline = TraceTimeline(trace, clock=clock)
    yield timeline
    timeline.close()


def test_shares_of_the_last_seconds_leave_out_the_lanes_and_what_is_told_does_not(
    timeline: TraceTimeline, clock: ManualClock
) -> None:
    timeline.enter("rollout", "busy")
    clock.advance(1.0)
    timeline.record("generation/000", "sample 7", 1000.25)
    clock.advance(1.0)

    assert timeline.recent_shares(60.0) == {"rollout/busy": 1.0}
    told = [(one["worker"], one["activity"], one["end"] - one["start"]) for one in as_told(timeline.recent(60.0))]
    assert told == [("rollout", "busy", 2.0), ("generation/000", "busy", 0.75)]


def spans(path: Path) -> list[tuple[str, str, float, float]]:
    return [(span.track, span.name, span.began, span.ended) for span in read_trace(path)]


# -- shares ------------------------------------------------------------------------------------------------------------


def test_the_shares_of_a_lap_say_how_long_a_part_was_busy_and_what_it_waited_for(
    timeline: TraceTimeline, clock: ManualClock
) -> None:
    timeline.enter("reward", "idle", "rollout")
    clock.advance(6.0)
    timeline.enter("reward", "busy")
    clock.advance(3.0)
    timeline.enter("reward", "blocked", "weights")
    clock.advance(1.0)

    assert timeline.lap() == {
        "stage/reward/busy": 0.3,
        "stage/reward/idle": 0.6,
        "stage/reward/blocked": 0.1,
        "stage/reward/wait_for/rollout": 0.6,
        "stage/reward/wait_for/weights": 0.1,
    }


def test_what_goes_on_over_the_end_of_a_lap_counts_in_both_for_what_it_took_of_each(
    timeline: TraceTimeline, clock: ManualClock
) -> None:
    timeline.enter("actor_update", "busy")
    with timeline.span("actor_update", "publish"):
        clock.advance(4.0)
        first = timeline.lap()
        clock.advance(1.0)
    clock.advance(3.0)

    second = timeline.lap()

    assert (first["stage/actor_update/busy"], first["stage/actor_update/publish"]) == (1.0, 1.0)
    assert (second["stage/actor_update/busy"], second["stage/actor_update/publish"]) == (1.0, 0.25)


def test_what_is_heard_late_of_another_process_counts_from_the_last_lap_on_and_its_spans_are_when_they_were(
    tmp_path: Path, timeline: TraceTimeline, clock: ManualClock
) -> None:
    timeline.entered("rollout", "idle", "feeder", clock.monotonic())
    clock.advance(4.0)
    timeline.lap()
    clock.advance(1.0)

    timeline.entered("rollout", "busy", "", clock.monotonic() - 3.0)  # two seconds before the lap
    load = timeline.began("weights", "load", clock.monotonic() - 2.0)
    timeline.ended(load, clock.monotonic() - 1.5, {})
    load = timeline.began("weights", "load", clock.monotonic() - 1.5)
    timeline.ended(load, clock.monotonic() - 0.5, {})
    shares = timeline.lap()
    timeline.left("rollout", clock.monotonic())
    timeline.close()

    assert (shares["stage/rollout/busy"], shares["stage/rollout/idle"], shares["stage/weights/load"]) == (1.0, 0.0, 0.5)
    took = [(track, name, ended - began) for track, name, began, ended in spans(tmp_path / "trace.json")]
    assert took == [
        ("rollout", "idle", 2.0),
        ("weights", "load", 0.5),
        ("weights", "load", 1.0),
        ("rollout", "busy", 3.0),
    ]


def test_the_waits_of_a_part_that_is_not_busy_add_up_to_the_rest_of_its_time(
    timeline: TraceTimeline, clock: ManualClock
) -> None:
    for seconds, activity, cause in ((1, "busy", ""), (2, "idle", "rollout"), (4, "idle", "feeder"), (1, "busy", "")):
        timeline.enter("reward", activity, cause)  # type: ignore[arg-type]
        clock.advance(seconds)

    shares = timeline.lap()

    waits = sum(share for key, share in shares.items() if "/wait_for/" in key)
    assert waits == shares["stage/reward/idle"] == 0.75
    assert shares["stage/reward/busy"] == 0.25


def test_time_that_is_no_span_can_be_added(timeline: TraceTimeline, clock: ManualClock) -> None:
    timeline.add("rollout", "emptied", 0.5)
    timeline.add("rollout", "emptied", 1.5)
    clock.advance(4.0)

    assert timeline.lap() == {"stage/rollout/emptied": 0.5}
    clock.advance(4.0)
    assert timeline.lap() == {}


def test_a_lap_without_length_has_no_shares(timeline: TraceTimeline) -> None:
    timeline.enter("reward", "busy")

    assert timeline.lap() == {}


def test_completions_are_not_parts_that_have_shares(timeline: TraceTimeline, clock: ManualClock) -> None:
    began = timeline.now()
    clock.advance(1.0)
    timeline.record("generation/000", "sample 1", began)

    assert timeline.lap() == {}


def test_what_everybody_is_doing_can_be_asked(timeline: TraceTimeline) -> None:
    timeline.enter("rollout", "busy")
    timeline.enter("actor_update", "idle", "rollout")
    timeline.enter("evaluator", "busy")
    timeline.leave("evaluator")

    assert timeline.doing() == {
        "rollout": Doing(activity="busy"),
        "actor_update": Doing(activity="idle", cause="rollout"),
    }


# -- the trace ---------------------------------------------------------------------------------------------------------


def some_work(timeline: TraceTimeline, clock: ManualClock) -> None:
    timeline.enter("rollout", "busy")
    with timeline.span("weights", "load", version="0.1"):
        clock.advance(1.0)
    began = timeline.now()
    clock.advance(2.0)
    timeline.record("generation/007", "sample 3", began, sample_id=3, versions=["0.1"])
    timeline.enter("rollout", "idle", "bound")
    clock.advance(1.0)
    timeline.leave("rollout")


WORK = [
    ("weights", "load", 1000.0, 1001.0),
    ("generation/007", "sample 3", 1001.0, 1003.0),
    ("rollout", "busy", 1000.0, 1003.0),
    ("rollout", "idle", 1003.0, 1004.0),
]


def test_a_closed_trace_is_valid_json_in_the_format_of_chrome(
    timeline: TraceTimeline, trace: Path, clock: ManualClock
) -> None:
    timeline.order(["heartbeat", "rollout", "weights"])
    some_work(timeline, clock)
    timeline.close()

    events = json.loads(trace.read_text())

    complete = [event for event in events if event["ph"] == "X"]
    assert complete[0] == {
        "ph": "X", "pid": 1, "tid": 3, "ts": 1000_000_000, "dur": 1_000_000,
        "name": "load", "cat": "work", "args": {"version": "0.1"},
    }  # fmt: skip
    assert [event["name"] for event in complete] == ["load", "sample 3", "busy", "idle"]
    names = {
        (event["pid"], event.get("tid")): event["args"]["name"] for event in events if event["name"].endswith("_name")
    }
    assert names == {
        (1, None): "stages",
        (1, 2): "rollout",
        (1, 3): "weights",
        (2, None): "generation",
        (2, 1): "007",
    }


def test_a_trace_is_read_back_as_it_was_recorded(timeline: TraceTimeline, trace: Path, clock: ManualClock) -> None:
    some_work(timeline, clock)
    timeline.close()

    assert spans(trace) == WORK
    assert [span.args for span in read_trace(trace)] == [
        {"version": "0.1"},
        {"sample_id": 3, "versions": ["0.1"]},
        {},
        {"cause": "bound"},
    ]


def test_only_what_touches_a_time_is_read(timeline: TraceTimeline, trace: Path, clock: ManualClock) -> None:
    some_work(timeline, clock)
    timeline.close()

    assert [span.name for span in read_trace(trace, began=1001.5, ended=1003.0)] == ["sample 3", "busy"]


def test_activities_that_follow_each_other_and_are_the_same_are_one_span(
    timeline: TraceTimeline, trace: Path, clock: ManualClock
) -> None:
    for cause in ("rollout", "rollout", "reward", "reward"):
        timeline.enter("actor_update", "idle", cause)
        clock.advance(1.0)
    timeline.close()

    assert [(s.began, s.ended, s.args["cause"]) for s in read_trace(trace)] == [
        (1000.0, 1002.0, "rollout"),
        (1002.0, 1004.0, "reward"),
    ]


def test_work_that_fails_is_in_the_trace_too(timeline: TraceTimeline, trace: Path, clock: ManualClock) -> None:
    def diverge() -> None:
        with timeline.span("actor_update", "optimizer"):
            clock.advance(1.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        diverge()
    timeline.close()

    assert spans(trace) == [("actor_update", "optimizer", 1000.0, 1001.0)]


@pytest.mark.parametrize("torn", ["", '{"ph": "X", "pid": 1, "ti', '{"ph": "M", "pid": 1, "tid": 9', "]"])
def test_the_trace_of_a_killed_run_can_be_read_and_continued(trace: Path, clock: ManualClock, torn: str) -> None:
    killed = TraceTimeline(trace, clock=clock)
    some_work(killed, clock)
    killed.lap()
    left = trace.read_text()
    killed.close()
    trace.write_text(left + torn)
    assert spans(trace) == WORK

    clock.advance(100.0)
    resumed = TraceTimeline(trace, clock=clock)
    some_work(resumed, clock)
    resumed.close()

    json.loads(trace.read_text())
    later = [(track, name, began + 104.0, ended + 104.0) for track, name, began, ended in WORK]
    assert spans(trace) == WORK + later


def test_a_closed_trace_is_continued_under_the_same_names_however_often(trace: Path, clock: ManualClock) -> None:
    for track in ("rollout", "reward", "generation/001", "rollout", "generation/002"):
        timeline = TraceTimeline(trace, clock=clock)
        timeline.record(track, "work", timeline.now())
        timeline.close()

    events = json.loads(trace.read_text())

    named = [(event["pid"], event.get("tid"), event["name"]) for event in events if event["ph"] == "M"]
    assert len(named) == len(set(named))
    threads = [(event["pid"], event["tid"]) for event in events if event["ph"] == "X"]
    assert threads == [(1, 1), (1, 2), (2, 1), (1, 1), (2, 2)]


def test_closing_twice_and_recording_after_it_do_no_harm(
    timeline: TraceTimeline, trace: Path, clock: ManualClock
) -> None:
    some_work(timeline, clock)
    timeline.close()
    before = trace.read_bytes()

    timeline.enter("rollout", "busy")
    timeline.lap()
    timeline.close()

    assert trace.read_bytes() == before


def test_a_missing_trace_has_no_spans(trace: Path) -> None:
    assert list(read_trace(trace)) == []


@pytest.mark.parametrize("line", ["null,", "[],", '{"ph": "X"},', '{"ph": "X", "pid": 7, "tid": 1, "name": "a"},', "x"])
def test_what_is_no_event_is_left_out(timeline: TraceTimeline, trace: Path, clock: ManualClock, line: str) -> None:
    some_work(timeline, clock)
    timeline.close()
    trace.write_text(trace.read_text().replace("[\n", f"[\n{line}\n", 1))

    assert spans(trace) == WORK


def test_threads_that_record_at_the_same_time_lose_nothing(trace: Path) -> None:
    timeline = TraceTimeline(trace)
    together = threading.Barrier(5)

    def work(lane: int) -> None:
        together.wait(20.0)
        for i in range(200):
            timeline.record(f"generation/{lane}", f"sample {i}", timeline.now())
            timeline.enter("rollout", "busy" if i % 2 else "idle")

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    together.wait(20.0)
    for _ in range(20):
        timeline.lap()
    for thread in threads:
        thread.join(20.0)
    timeline.close()

    found = [(span.track, span.name) for span in read_trace(trace) if span.name.startswith("sample")]
    assert sorted(found) == sorted((f"generation/{lane}", f"sample {i}") for lane in range(4) for i in range(200))


# -- what is waited for ------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Two groups of two make a step; at most two steps are open."""
    bench = Bench(tmp_path, train_batch_size=4, num_generations=2, max_staleness=1, last_version=4)
    yield bench
    bench.store.close()


def step(bench: Bench, version: int) -> None:
    """Train the step that is ready."""
    bench.commit(bench.take("train", 4), version=version)


def waits(bench: Bench) -> dict[str, str]:
    return {topic: bench.store.awaited(topic) for topic in (ADMISSION, "rollout", "reward", "train")}


def test_an_empty_store_waits_for_prompts(bench: Bench) -> None:
    assert set(waits(bench).values()) == {"feeder"}


def test_while_samples_are_generated_whoever_comes_later_waits_for_rollout(bench: Bench) -> None:
    bench.admit(2)
    bench.take("rollout", 3)

    assert waits(bench) == {ADMISSION: "feeder", "rollout": "feeder", "reward": "rollout", "train": "rollout"}


def test_the_learner_waits_for_the_stage_that_most_groups_of_its_step_wait_for(bench: Bench) -> None:
    bench.admit(2)
    bench.generate()

    assert waits(bench)["train"] == "reward"


def test_a_group_is_as_far_as_its_slowest_sample(bench: Bench) -> None:
    bench.admit(1)
    lease = bench.take("rollout")
    bench.store.ack(lease.lease_id, ids(lease)[:1], responses(ids(lease)[:1]))

    assert waits(bench)["train"] == "rollout"


def test_what_the_learner_has_taken_is_not_what_it_waits_for(bench: Bench) -> None:
    bench.admit(2)
    lease = bench.take("rollout")
    bench.store.ack(lease.lease_id, ids(lease)[:3], responses(ids(lease)[:3]))
    scored = bench.take("reward")
    bench.store.ack(scored.lease_id, ids(scored), rewards(ids(scored)))
    bench.take("train", 4)

    assert waits(bench)["train"] == "rollout"  # for the one sample that is left of the second group


def test_samples_beyond_the_step_are_not_what_the_learner_waits_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path, train_batch_size=4, num_generations=2, max_staleness=2)
    bench.admit(2)
    bench.generate()
    bench.admit(4)

    assert waits(bench)["train"] == "reward"
    bench.store.close()


def test_at_the_bound_generation_waits_for_a_commit(bench: Bench) -> None:
    bench.admit(4)
    bench.generate()
    bench.score()

    assert waits(bench) == {ADMISSION: "bound", "rollout": "bound", "reward": "bound", "train": "bound"}


def test_an_engine_that_lags_holds_up_admission_and_whoever_waits_for_it(bench: Bench) -> None:
    bench.admit(4)
    bench.generate()
    bench.score()
    step(bench, 1)
    assert waits(bench)[ADMISSION] == "weights"

    bench.store.serve("engine", PolicyVersion(n=1))

    assert waits(bench)[ADMISSION] == "feeder"


def test_while_no_engine_serves_the_weights_are_waited_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path, serves=False)

    assert set(waits(bench).values()) == {"weights"}
    bench.store.close()


@pytest.mark.parametrize("last", [1, 2])
def test_when_the_last_step_has_its_samples_nothing_more_is_waited_for(tmp_path: Path, last: int) -> None:
    bench = Bench(tmp_path, train_batch_size=4, num_generations=2, max_staleness=1, last_version=last)
    bench.admit(2 * last)

    assert waits(bench) == {ADMISSION: "end", "rollout": "end", "reward": "rollout", "train": "rollout"}
    bench.store.close()


def test_a_stage_that_there_is_not_waits_for_nothing(bench: Bench) -> None:
    with pytest.raises(StoreError, match="there is no stage 'judge'"):
        bench.store.awaited("judge")


def test_asking_changes_nothing(bench: Bench) -> None:
    bench.admit(2)
    bench.generate()
    before = bench.store.table.snapshot()

    waits(bench)

    assert bench.store.table.snapshot() == before


def test_of_stages_that_build_on_each_other_the_one_that_can_act_is_waited_for() -> None:
    schema = Schema(
        (
            Stage(name="rollout", role="generate", needs=PROMPT_COLUMNS, writes=("response_ids", "response")),
            Stage(name="detail", role="score", needs=("response",), writes=("reward_parts",)),
            Stage(name="reward", role="score", needs=("reward_parts",), writes=("reward",)),
            Stage(name="train", role="train", needs=("response_ids", "reward")),
        )
    )
    wanted, have = schema.needs["train"], schema.prompt_mask

    waited = [schema.next_writer(have, wanted)]
    for stage in ("rollout", "detail"):
        have |= schema.writes[stage]
        waited.append(schema.next_writer(have, wanted))

    assert waited == ["rollout", "detail", "reward"]


# -- the rollout stage and the weights ---------------------------------------------------------------------------------


class HeldBack(RolloutEngine):
    """Ends its sequences, and loads weights, when the test lets it."""

    capabilities = Capabilities(logprobs=True)

    def __init__(self) -> None:
        self.running = 0
        self.loading = False
        self._may: dict[str, asyncio.Event] = {}

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._may = {"generate": asyncio.Event(), "load": asyncio.Event()}

    def let(self, what: str) -> None:
        """From the test's thread: everything that waits for this may go on, and what comes later has to wait."""

        def once() -> None:
            self._may[what].set()
            self._may[what] = asyncio.Event()

        self._loop.call_soon_threadsafe(once)

    async def generate(self, request: GenerationRequest) -> Completion:
        self.running += 1
        await self._may["generate"].wait()
        self.running -= 1
        return Completion(
            token_ids=np.ones(2, np.int32),
            logprobs=np.zeros(2, np.float32),
            token_versions=np.zeros(2, np.int64),
            text="1",
            finish_reason="stop",
        )

    async def load_weights(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served:
        self.loading = True
        await self._may["load"].wait()
        self.loading = False
        return Served(version=snapshot.version, digest=snapshot.digest)

    async def stop(self) -> None:
        pass


@dataclass
class NoWeights:
    """A version without tensors, for an engine that does not look."""

    version = PolicyVersion(n=0)
    digest = "none"
    path = Path()

    def tensors(self) -> Iterator[Any]:
        return iter(())


def test_generation_is_blocked_while_its_sequences_wait_for_new_weights_and_the_empty_places_are_counted(
    bench: Bench, timeline: TraceTimeline, clock: ManualClock
) -> None:
    engine = HeldBack()
    host = EngineHost(engine, "engine", timeline)
    host.start()
    worker = RolloutWorker(
        SCHEMA.stages["rollout"], bench.store, Heartbeat(bench.store), timeline,
        host=host, sampling=Sampling(max_new_tokens=2), max_concurrency=2, seed=None, fresh=FreshSamples(0),
    )  # fmt: skip

    def rollout() -> Doing:
        return timeline.doing()["rollout"]

    bench.admit(2)
    timeline.lap()
    worker.turn()
    wait_until(lambda: engine.running == 2)
    assert rollout() == Doing(activity="busy")

    update = threading.Thread(target=host.load, args=(NoWeights(), "boundary"), daemon=True)
    update.start()
    wait_until(lambda: timeline.doing().get("weights") == Doing(activity="blocked", cause="rollout"))
    clock.advance(2.0)
    engine.let("generate")
    wait_until(lambda: engine.loading and worker.room() == 2)
    assert timeline.doing()["weights"] == Doing(activity="busy")
    worker.turn()
    assert rollout() == Doing(activity="blocked", cause="weights")
    clock.advance(6.0)
    engine.let("load")
    wait_until(lambda: engine.running == 2)

    assert rollout() == Doing(activity="busy")
    shares = timeline.lap()
    assert (shares["stage/weights/drain"], shares["stage/weights/load"]) == (0.25, 0.75)
    assert shares["stage/rollout/emptied"] == 0.75  # both places, from the end of the drain on
    assert (shares["stage/rollout/busy"], shares["stage/rollout/wait_for/weights"]) == (0.25, 0.75)

    engine.let("generate")
    wait_until(lambda: worker.room() == 2)
    assert rollout() == Doing(activity="idle", cause="feeder")
    update.join(20.0)
    host.stop()


# -- whole runs --------------------------------------------------------------------------------------------------------


def by_track(spans: list[Span]) -> dict[str, list[Span]]:
    tracks: dict[str, list[Span]] = {}
    for span in spans:
        tracks.setdefault(span.track, []).append(span)
    return tracks


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run_dir = tmp_path_factory.mktemp("timeline") / "run"
    return launch(plan(resolve(TINY, [f"run_dir={run_dir}", "steps=4", "rollout.max_concurrency=5"])))


@pytest.mark.parametrize("update", ["boundary", "in_flight"])
def test_every_part_of_a_run_is_in_its_trace(run_tiny: RunTiny, finished: Run, update: str) -> None:
    run = finished if update == "boundary" else run_tiny("steps=4", f"weights.update={update}")

    assert run.summary.outcome == "finished", run.summary.reason
    json.loads((run.run_dir / TRACE).read_text())
    tracks = by_track(list(read_trace(run.run_dir / TRACE)))
    for name in ("feeder", "rollout", "reward", "actor_update", "weights", "evaluator"):
        assert any(span.name == "busy" for span in tracks[name]), name
    learner = [span.name for span in tracks["actor_update"]]
    assert [learner.count(name) for name in ("optimizer", "commit", "publish")] == [4, 4, 5]
    at_boundary = update == "boundary"
    assert ("drain" in [span.name for span in tracks["weights"]]) == at_boundary
    steps = read_metrics(run.run_dir / "metrics.jsonl", "step")
    assert any("stage/rollout/emptied" in step for step in steps) == at_boundary


def test_every_completion_of_a_run_is_in_its_trace_on_a_lane_that_it_has_for_itself(finished: Run) -> None:
    tracks = by_track(list(read_trace(finished.run_dir / TRACE)))
    lanes = {name: spans for name, spans in tracks.items() if name.startswith("generation/")}
    assert len(lanes) <= 5
    assert sorted(span.args["sample_id"] for spans in lanes.values() for span in spans) == list(range(64))
    for spans in lanes.values():
        ordered = sorted(spans, key=lambda span: span.began)
        assert all(a.ended <= b.began for a, b in pairwise(ordered))
    for span in (span for spans in lanes.values() for span in spans):
        assert span.args["tokens"] > 0
        assert span.args["versions"]
        assert span.args["finish_reason"] in ("stop", "length")
        assert span.args["group_id"] == span.args["sample_id"] // 4


def test_the_activities_of_a_part_follow_each_other_without_overlap(finished: Run) -> None:
    found = read_trace(finished.run_dir / TRACE)
    tracks = by_track([span for span in found if span.name in ("busy", "idle", "blocked")])
    for spans in tracks.values():
        ordered = sorted(spans, key=lambda span: span.began)
        assert all(a.ended <= b.began for a, b in pairwise(ordered))


def test_the_shares_of_a_step_are_in_its_metrics(finished: Run) -> None:
    for line in read_metrics(finished.run_dir / "metrics.jsonl", "step"):
        for stage in ("feeder", "rollout", "reward", "actor_update"):
            shares = [line[f"stage/{stage}/{activity}"] for activity in ("busy", "idle", "blocked")]
            assert all(0.0 <= share <= 1.0 for share in shares)
            assert sum(shares) <= 1.001
        assert line["stage/actor_update/busy"] > 0


def test_a_run_says_what_held_it_up(finished: Run) -> None:
    sentence = finished.summary.bottleneck

    assert sentence
    assert json.loads((finished.run_dir / "summary.json").read_text())["bottleneck"] == sentence
    assert escape(sentence) in finished.report.read_text()


def test_a_run_of_one_step_has_no_bottleneck_to_speak_of(run_tiny: RunTiny) -> None:
    assert run_tiny("steps=1").summary.bottleneck is None


def test_a_run_that_is_resumed_goes_on_in_the_same_trace(run_tiny: RunTiny) -> None:
    run = run_tiny("steps=2")

    resumed = resume(run.run_dir, overrides=["steps=4"])

    assert resumed.summary.outcome == "finished", resumed.summary.reason
    json.loads((run.run_dir / TRACE).read_text())
    published = [span for span in read_trace(run.run_dir / TRACE) if span.name == "publish"]
    assert [span.args["version"] for span in published] == ["0.0", "0.1", "0.2", "1.2", "1.3", "1.4"]
    assert all(a.ended <= b.began for a, b in pairwise(published))


class Pausing(StageWorker):
    pauses = True

    def process(self, held: HeldLease) -> None:
        raise AssertionError("there is nothing to process")


def test_while_a_run_is_paused_those_who_pause_say_so(bench: Bench, timeline: TraceTimeline) -> None:
    worker = Pausing(SCHEMA.stages["reward"], bench.store, Heartbeat(bench.store), timeline)
    stopping, going = threading.Event(), threading.Event()
    thread = threading.Thread(target=worker.run, args=(stopping, going), daemon=True)
    thread.start()

    wait_until(lambda: timeline.doing() == {"reward": Doing(activity="blocked", cause="pause")})
    going.set()
    wait_until(lambda: timeline.doing() == {"reward": Doing(activity="idle", cause="feeder")})

    stopping.set()
    thread.join(20.0)


def test_a_failed_run_has_a_trace_that_opens(run_tiny: RunTiny) -> None:
    def fails(completions: list[str], **_: object) -> list[float]:
        return [0.0 if c == "The answer is 1." else float("nan") for c in completions]

    run = run_tiny("steps=50", reward=fails)

    assert run.summary.outcome == "failed"
    json.loads((run.run_dir / TRACE).read_text())
