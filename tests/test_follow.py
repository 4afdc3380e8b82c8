"""A run as its ledger tells it: the queue agrees with the audit, live as at the end; samples have their whole lives."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest
from asyncflow_api.refusals import problem_of
from asyncflow_api.runs import NotBegun, Runs, RunView

from asyncflow.errors import StoreError
from asyncflow.launch import launch, resolve, resume
from asyncflow.plan import plan
from asyncflow.report.audit import audit
from asyncflow.report.follow import BeingRead, Follower
from asyncflow.report.life import life_of
from asyncflow.report.queue import Queue, queue_of
from asyncflow.report.samples import Samples, Wanted
from asyncflow.store.lifecycle import STATES
from tests.conftest import TINY, RunTiny
from tests.endless import UNHURRIED, endless_run, stop
from tests.processes import wait_until

KEPT: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "stale": ("max_staleness=3", "late_samples=drop"),
    "requeued": ("max_staleness=1", "late_samples=requeue", "sampler=freshest"),
    "masked": ("max_staleness=1", "late_samples=mask", "weights.update=in_flight"),
    "refilled": ("zero_variance=refill", "reward=tests.test_follow:constant"),
    "with a reference": ("kl_coef=0.1",),
    "in memory": ("checkpoint.every=0",),
}


def constant(completions: list[str], **_: object) -> list[float]:
    """Every third completion is good."""
    return [float(len(completion) % 3 == 0) for completion in completions]


def ended_queue(run_dir: Path) -> tuple[Follower, Queue]:
    follower = Follower(run_dir)
    follower.catch_up()
    return follower, queue_of(follower, now=None, stat=None, size=0)


def agrees(run_dir: Path, queue: Queue) -> None:
    account, counts = audit(run_dir), queue.counts
    assert account.ok, account.violations
    assert (counts.admitted, counts.trained, counts.quarantined) == (
        account.admitted,
        account.trained,
        account.quarantined,
    )
    assert dict(counts.dropped) == dict(account.dropped)
    assert counts.open == account.open == sum(queue.states.values())
    assert (counts.requeued, counts.masked, counts.restored) == (account.requeued, account.masked, account.restored)
    assert queue.staleness.at_training == account.staleness
    assert queue.learner == account.learner
    assert queue.max_staleness == account.terms.max_staleness


@pytest.mark.parametrize("case", KEPT)
def test_the_queue_of_a_run_agrees_with_the_audit(run_tiny: RunTiny, case: str) -> None:
    result = run_tiny("data.eval_size=0", "steps=8", *KEPT[case])

    follower, queue = ended_queue(result.run_dir)

    agrees(result.run_dir, queue)
    samples = pyarrow.dataset.dataset(sorted((result.run_dir / "samples").glob("*.parquet"))).to_table().to_pylist()
    for sample in samples:
        place = sample["sample_id"]
        assert STATES[follower.index.state[place]] == ("trained" if sample["ended"] == "trained" else "dropped")
        assert follower.index.step[place] == sample["step"]
        assert follower.index.tokens[place] == len(sample["response_ids"])
        assert follower.index.oldest[place] == min(sample["token_versions"])
    assert queue.history.step == tuple(range(1, 9))
    assert all(stage.in_per_second == stage.out_per_second == 0.0 for stage in queue.stages)
    assert sum(stage.leased for stage in queue.stages) == 0


def test_what_a_resumed_run_has_taken_back_is_not_counted_twice(run_tiny: RunTiny) -> None:
    result = run_tiny("data.eval_size=0", "steps=6", "checkpoint.every=2", "checkpoint.keep=3")
    before, _ = ended_queue(result.run_dir)
    live = Follower(result.run_dir)
    live.catch_up()

    resume(result.run_dir, step=4, overrides=["steps=9"])

    follower, queue = ended_queue(result.run_dir)
    agrees(result.run_dir, queue)
    assert audit(result.run_dir).taken_back > 0
    assert len(before.steps) == 6
    assert [step.version.n for step in follower.steps] == list(range(1, 10))
    samples = Samples(result.run_dir, follower)
    for sample_id in range(audit(result.run_dir).admitted):
        # What is told from the index is what the whole ledger tells.
        assert samples.whole(sample_id).events == life_of(result.run_dir, sample_id).moments
    # One who has followed all the time knows the same as one who begins at the end.
    live.catch_up()
    assert queue_of(live, now=None, stat=None, size=0) == queue
    assert [s.version for s in live.steps] == [s.version for s in follower.steps]
    assert (live.index.step[: live.index.count] == follower.index.step[: live.index.count]).all()
    assert (live.index.state[: live.index.count] == follower.index.state[: live.index.count]).all()


def test_a_long_ledger_is_read_by_several_who_look(run_tiny: RunTiny) -> None:
    result = run_tiny("data.eval_size=0", "steps=2")
    impatient = Follower(result.run_dir, patience=-1.0)
    shares: list[int] = []
    while True:
        try:
            impatient.catch_up()
            break
        except BeingRead as error:
            shares += [int(share) for share in re.findall(r"(\d+)% so far: ask again", str(error))]

    _, queue = ended_queue(result.run_dir)
    assert queue_of(impatient, now=None, stat=None, size=0) == queue
    assert shares == sorted(shares)
    assert len(shares) == impatient.lsn - 1
    problem = problem_of(BeingRead("x"))
    assert problem is not None
    assert (problem.status, problem.code, problem.headers["Retry-After"]) == (409, "run_being_read", "1")


def test_a_run_that_has_not_begun_says_so(tmp_path: Path) -> None:
    view = RunView(tmp_path)

    with pytest.raises(NotBegun, match="has not begun yet"):
        view.queue()
    assert view.live is False
    assert not view.workers()
    assert not view.engines()
    assert not view.timeline(60.0)


# -- live --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(), ("checkpoint.every=0",)], ids=["on disk", "in memory"])
def going(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    run_dir = tmp_path_factory.mktemp("going") / "run"
    with endless_run(run_dir, UNHURRIED, "max_staleness=2", *request.param, steps=4) as process:
        yield run_dir, process


def test_the_queue_of_a_run_that_goes_on_adds_up_at_every_moment(going: tuple[Path, subprocess.Popen[str]]) -> None:
    run_dir, process = going
    view = RunView(run_dir)
    seen: set[int] = set()

    def look() -> bool:
        queue = view.queue()
        counts, staleness = queue.counts, queue.staleness
        assert counts.admitted == counts.trained + sum(counts.dropped.values()) + counts.quarantined + counts.open
        assert sum(staleness.in_flight.values()) == queue.states["generating"]
        with_tokens = sum(queue.states[state] for state in ("generated", "rewarded", "training"))
        assert sum(staleness.in_queue.values()) == with_tokens
        assert sum(staleness.at_training.values()) == counts.trained
        assert max(staleness.at_training) <= 2
        assert max(staleness.in_queue, default=0) <= 2
        seen.add(queue.learner.n)
        return len(seen) >= 4

    wait_until(look, process)
    queue = view.queue()
    stages = {stage.name: stage for stage in queue.stages}
    assert list(stages) == ["rollout", "reward", "actor_update"]
    assert all(stage.in_per_second > 0 and stage.out_per_second > 0 for stage in stages.values())
    assert all(stage.oldest_age_seconds is None or stage.oldest_age_seconds < 60 for stage in stages.values())
    assert queue.bytes > 0
    view.close()


def test_a_run_that_goes_on_is_read_though_nobody_looks_and_another_cannot_be_read(
    going: tuple[Path, subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise sqlite3.OperationalError("disk I/O error")

    run_dir, process = going
    runs = Runs()
    monkeypatch.setattr(runs.view(tmp_path).follower, "catch_up", fails)
    runs.keep_up(lambda: [tmp_path / "not there", tmp_path, run_dir])
    follower = runs.view(run_dir).follower

    wait_until(lambda: follower.lsn > 0, process)
    found = follower.lsn
    wait_until(lambda: follower.lsn > found, process)
    runs.close()

    assert not any(thread.name == "keep-up" for thread in threading.enumerate())


def test_ages_grow_and_the_time_to_empty_is_told_while_a_stage_is_at_rest(
    going: tuple[Path, subprocess.Popen[str]],
) -> None:
    run_dir, process = going
    view = RunView(run_dir)

    def reward() -> Any:
        return next(stage for stage in view.queue().stages if stage.name == "reward")

    view.control.drain("reward")
    try:
        wait_until(lambda: reward().ready > 0 and (reward().oldest_age_seconds or 0) > 1.0, process)
        waiting = reward()
        assert waiting.leased == 0
        assert waiting.time_to_empty_seconds is None or waiting.time_to_empty_seconds > 0
    finally:
        view.control.undrain("reward")
    wait_until(lambda: (reward().oldest_age_seconds or 0) < 1.0, process)
    view.close()


def test_samples_of_a_run_that_goes_on_have_their_text_wherever_they_are(
    going: tuple[Path, subprocess.Popen[str]],
) -> None:
    run_dir, process = going
    view = RunView(run_dir)
    view.control.drain("actor_update")
    try:
        wait_until(lambda: view.queue().states["rewarded"] > 0, process)
        found, _ = view.samples.find(Wanted(state="rewarded"), limit=5)
        assert found
        for brief in found:
            assert brief.prompt
            assert brief.response is not None
            assert brief.reward is not None
            assert brief.staleness is not None
            assert brief.step is None
            assert brief.versions
        whole = view.samples.whole(found[0].id)
        assert [event.kind for event in whole.events][:3] == ["admitted", "leased", "acked"]
        assert [token.text for token in whole.tokens]
        assert whole.reward_parts.keys() == {"digit_share"}
    finally:
        view.control.undrain("actor_update")
    view.close()


def test_the_account_holds_when_the_run_that_was_followed_has_ended(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with endless_run(run_dir, UNHURRIED) as process:
        view = RunView(run_dir)
        assert view.live
        assert view.queue().counts.admitted > 0
        stop(run_dir, process)

    wait_until(lambda: not view.live)
    agrees(run_dir, view.queue())
    assert view.bottleneck(view.queue()) is not None
    spans = view.timeline(60.0)
    assert {span["worker"] for span in spans} >= {"feeder", "rollout", "reward", "actor_update"}
    view.close()


# -- what holds a run up, while it goes on -----------------------------------------------------------------------------

SLOWED = {
    "rollout": ("rollout.engine=tests.slow_parts:SlowRollout", "weights.update=in_flight"),
    "reward": ("reward=tests.slow_parts:slow_reward",),
    "reference": ("kl_coef=0.1", "reference.engine=tests.slow_parts:SlowScorer"),
    "actor_update": ("learner.engine=tests.slow_parts:SlowLearner",),
    "weights": ("rollout.engine=tests.slow_parts:SlowToLoad", "max_staleness=0"),
}


@pytest.mark.parametrize("stage", SLOWED)
def test_the_stage_that_holds_a_run_up_is_named_while_it_goes_on(tmp_path: Path, stage: str) -> None:
    run_dir = tmp_path / "run"
    with endless_run(run_dir, *SLOWED[stage], steps=3) as process:
        view = RunView(run_dir)

        def named() -> bool:
            found = view.bottleneck(view.queue())
            return found is not None and found.stage == stage

        wait_until(named, process)
        view.close()


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("ended") / "run"
    overrides = ("steps=12", "data.eval_size=0", "kl_coef=0.1", "max_new_tokens=8", f"run_dir={run_dir}")
    launch(plan(resolve(TINY, overrides)))
    return run_dir


@pytest.fixture
def samples(ended: Path) -> Samples:
    return Samples(ended, Follower(ended))


def recorded(run_dir: Path) -> dict[int, dict[str, Any]]:
    rows = pyarrow.dataset.dataset(sorted((run_dir / "samples").glob("*.parquet"))).to_table().to_pylist()
    return {row["sample_id"]: row for row in rows}


def test_pages_have_every_sample_once_the_last_one_first(samples: Samples, ended: Path) -> None:
    ids: list[int] = []
    before: int | None = None
    while True:
        page, before = samples.find(Wanted(), before=before, limit=7)
        ids += [brief.id for brief in page]
        if before is None:
            break
        assert len(page) == 7

    assert ids == list(reversed(range(audit(ended).admitted)))


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        (Wanted(state="trained"), lambda row: row["ended"] == "trained"),
        (Wanted(step=3), lambda row: row["step"] == 3),
        (Wanted(group_id=5), lambda row: row["group_id"] == 5),
        (Wanted(min_reward=0.2), lambda row: row["reward"] >= 0.2),
        (Wanted(max_reward=0.1), lambda row: row["reward"] <= 0.1),
        (Wanted(q="calculate"), lambda row: "calculate" in f"{row['prompt']}{row['response']}".casefold()),
        (Wanted(state="trained", step=2, min_reward=0.1), lambda row: row["step"] == 2 and row["reward"] >= 0.1),
    ],
)
def test_filters_find_what_is_recorded_and_nothing_else(
    samples: Samples, ended: Path, wanted: Wanted, fits: Any
) -> None:
    expected = {i for i, row in recorded(ended).items() if fits(row)}
    if wanted.state == "trained":
        expected &= {i for i, row in recorded(ended).items() if row["ended"] == "trained"}

    found, more = samples.find(wanted, limit=10_000)

    assert more is None
    assert {brief.id for brief in found if brief.step is not None} == expected
    assert [brief.id for brief in found] == sorted((brief.id for brief in found), reverse=True)


def test_a_page_that_finds_nothing_ends_after_a_bounded_look(ended: Path) -> None:
    samples = Samples(ended, Follower(ended), most_scanned=32)

    page, before = samples.find(Wanted(q="no sample has this"), limit=5)

    assert page == []
    assert before == audit(ended).admitted - 32
    looks = 1
    while before is not None:
        page, before = samples.find(Wanted(q="no sample has this"), before=before, limit=5)
        assert page == []
        looks += 1
    assert looks == -(-audit(ended).admitted // 32)


def test_the_whole_life_of_a_sample_has_its_text_tokens_rewards_and_events(samples: Samples, ended: Path) -> None:
    sample_id, row = next((i, row) for i, row in recorded(ended).items() if row["ended"] == "trained")

    whole = samples.whole(sample_id)

    assert whole.brief.state == "trained"
    assert whole.brief.step == row["step"]
    assert whole.brief.staleness == row["staleness"]
    assert whole.brief.reward == pytest.approx(row["reward"])
    assert whole.brief.response == row["response"]
    prompt = json.loads(row["prompt"])
    assert str(prompt if isinstance(prompt, str) else prompt[-1]["content"]) in str(whole.brief.prompt)
    assert [token.id for token in whole.prompt_tokens] == row["prompt_ids"]
    assert [token.id for token in whole.tokens] == row["response_ids"]
    assert [token.logprob for token in whole.tokens] == pytest.approx(row["rollout_logprobs"])
    assert [token.ref_logprob for token in whole.tokens] == pytest.approx(row["ref_logprobs"])
    assert all(token.text is not None and token.version is not None for token in whole.tokens)
    assert not any(token.masked for token in whole.tokens)
    assert whole.reward_parts == json.loads(row["reward_parts"])
    assert whole.finish_reason == row["finish_reason"]
    kinds = [event.kind for event in whole.events]
    assert kinds[0] == "admitted"
    assert kinds[-1] == "committed"


def test_tokens_that_were_left_out_of_the_loss_are_marked(run_tiny: RunTiny) -> None:
    result = run_tiny("steps=4", "data.eval_size=0", "truncated=mask", "max_new_tokens=4")
    samples = Samples(result.run_dir, Follower(result.run_dir))
    rows = recorded(result.run_dir)
    cut = next(i for i, row in rows.items() if row["finish_reason"] == "length" and row["ended"] == "trained")

    assert all(token.masked for token in samples.whole(cut).tokens)


def test_a_sample_that_was_never_admitted_is_refused(samples: Samples) -> None:
    assert not samples.has(10_000_000)
    with pytest.raises(StoreError, match="was never admitted"):
        samples.whole(10_000_000)
    with pytest.raises(StoreError, match="there is no state 'happy'"):
        samples.find(Wanted(state="happy"), limit=1)
