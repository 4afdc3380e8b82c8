"""The rollout side in a process of its own does what it does in the run's, and neither end outlives the other."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from asyncflow.engines.fake import TABLE, FakeRollout
from asyncflow.engines.models import resolve_model
from asyncflow.engines.weights.channel import WeightChannel
from asyncflow.errors import EngineError, PromptTooLong, WeightsError
from asyncflow.launch import resolve, resume
from asyncflow.pipeline import stages
from asyncflow.plan import plan
from asyncflow.report.audit import audit
from asyncflow.runtime.link import Failure, Link, Message
from asyncflow.runtime.metrics import read_metrics
from asyncflow.runtime.rollout_process import Added, Offered, RolloutProcess, TimelineEvent, ToParent
from asyncflow.runtime.timeline import TraceTimeline, read_trace
from asyncflow.store.flight import StoreServer
from asyncflow.store.schema import Schema
from asyncflow.store.store import EmbeddedStore
from asyncflow.types import Completion, PolicyVersion
from tests.conftest import ROOT, TINY, RunTiny
from tests.own_process import OWN, InOwnProcess
from tests.processes import DEADLINE, wait_until
from tests.test_fake_engines import request
from tests.test_store import prompts, terms

TOKEN = "a token"


# -- the link ----------------------------------------------------------------------------------------------------------


def linked(incoming: Any = ToParent) -> tuple[Link, Link]:
    ours, theirs = socket.socketpair()
    return Link(ours, incoming, "here"), Link(theirs, incoming, "there")


def completion() -> Completion:
    return Completion(
        token_ids=np.array([3, 1], np.int32),
        logprobs=np.array([-0.5, -2.0], np.float32),
        token_versions=np.array([1 << 32, 1 << 40]),
        text="Ünï",
        finish_reason="stop",
    )


def test_messages_arrive_in_their_order_with_their_arrays_until_the_link_is_closed() -> None:
    here, there = linked()
    sent: list[Message] = [Added(track="a", name="b", seconds=float(i)) for i in range(1000)]
    offered = Offered(
        sample_id=1, group_id=0, prompt_ids=np.arange(4, dtype=np.int32), completion=completion(), epoch=2
    )

    for message in sent:
        here.send(message)
    here.send(offered)
    here.close()
    *received, last = list(there.receive())

    assert received == sent
    assert isinstance(last, Offered)
    np.testing.assert_array_equal(last.prompt_ids, offered.prompt_ids)
    for name in ("token_ids", "logprobs", "token_versions"):
        value, expected = getattr(last.completion, name), getattr(offered.completion, name)
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected)
    assert last.completion.text == "Ünï"
    there.close()


def test_what_is_no_message_of_this_link_is_refused() -> None:
    here, there = linked(TimelineEvent)

    here.send(Failure(error="ValueError", text="not a timeline event"))

    with pytest.raises(Exception, match="Failure"):
        list(there.receive())
    here.close()
    there.close()


def test_an_error_is_the_same_in_another_process_and_one_that_is_not_ours_keeps_its_name() -> None:
    ours, other = Failure.of(PromptTooLong("too long")).as_error(), Failure.of(KeyError("x")).as_error()

    assert (type(ours), str(ours)) == (PromptTooLong, "too long")
    assert (type(other), str(other)) == (RuntimeError, "KeyError: 'x'")


# -- the two ends ------------------------------------------------------------------------------------------------------


class Bench:
    """A rollout side in a process of its own, and the store that it works for."""

    def __init__(self, folder: Path, engine: str = "InOwnProcess", *, patience: float = 30.0, **options: Any) -> None:
        settings = [
            f"rollout.engine=tests.own_process:{engine}",
            f"rollout.options={options}",
            "rollout.max_model_len=64",
            "rollout.timeout=600",
            "max_new_tokens=12",
        ]
        config = resolve(TINY, settings)
        folder.mkdir(parents=True, exist_ok=True)
        self.store = EmbeddedStore.create(
            Schema(stages(config)),
            terms(train_batch_size=4, num_generations=4),
            ledger=folder / "ledger.sqlite",
            data=folder / "data",
        )
        self.server = StoreServer(self.store, token=TOKEN)
        self.timeline = TraceTimeline(folder / "trace.json")
        self.process = RolloutProcess(
            config,
            resolve_model("tiny"),
            store=self.store,
            location=self.server.location,
            token=TOKEN,
            timeline=self.timeline,
            canary=np.array([1, 2, 3], np.int32),
            patience=patience,
        )
        self.side = self.process.side

    def child(self) -> psutil.Process:
        assert self.process.process is not None
        return psutil.Process(self.process.process.pid)

    def close(self) -> None:
        self.process.stop()
        self.process.stop()
        self.server.close()
        self.timeline.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*engine: str, **options: Any) -> Bench:
        made.append(Bench(tmp_path / str(len(made)), *engine, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def results(futures: Sequence[Future[Completion]]) -> list[Completion]:
    return [future.result(DEADLINE) for future in futures]


async def here(requests: Sequence[Any]) -> list[Completion]:
    engine = FakeRollout(resolve_model("tiny"), max_model_len=64)
    await engine.start()
    return [await engine.generate(one) for one in requests]


def test_it_completes_as_the_engine_does_in_this_process(bench: Callable[..., Bench]) -> None:

    made = bench()
    made.side.host.start()
    child = made.child()
    requests = [request(str(i), seed=i) for i in range(20)]

    there = results([made.side.host.submit(one) for one in requests])

    for a, b in zip(there, asyncio.run(here(requests)), strict=True):
        for name in ("token_ids", "logprobs", "token_versions"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
    made.close()
    assert not child.is_running()


def test_weights_are_loaded_from_the_channel_and_a_wrong_digest_is_refused(bench: Callable[..., Bench]) -> None:
    host = (made := bench()).side.host
    host.start()
    table = torch.full((128, 128), -50.0)
    table[:, 7] = 50.0
    channel = WeightChannel(keep=2)
    try:
        snapshot = channel.publish(PolicyVersion(n=3), iter([(TABLE, table)]))

        served = host.load(snapshot, "boundary")

        assert (served.version, served.digest) == (snapshot.version, snapshot.digest)
        assert host.canary is not None
        assert host.canary[0].tolist() == [1, 2, 3]
        assert set(host.canary[1].token_ids.tolist()) == {7}
        (made_by_it,) = results([host.submit(request())])
        assert set(made_by_it.token_ids.tolist()) == {7}
        assert set(made_by_it.token_versions.tolist()) == {PolicyVersion(n=3).packed}
        with pytest.raises(WeightsError, match="digest"):
            host.load(replace(snapshot, digest="another"), "boundary")
    finally:
        made.close()
        channel.close()


def test_what_the_engine_raises_is_raised_here(bench: Callable[..., Bench]) -> None:
    host = bench("FailsForOne").side.host
    host.start()

    with pytest.raises(PromptTooLong):
        results([host.submit(replace(request(), prompt_ids=np.ones(70, np.int32)))])
    with pytest.raises(RuntimeError, match="ValueError: not this one"):
        results([host.submit(request("bad"))])
    assert len(results([host.submit(request("good"))])[0].token_ids)


def test_an_engine_that_cannot_start_says_why(bench: Callable[..., Bench]) -> None:
    with pytest.raises(EngineError, match="on fire"):
        bench("DoesNotStart").side.host.start()


def test_the_learner_takes_its_turn_until_it_has_new_weights(bench: Callable[..., Bench]) -> None:
    host = (made := bench()).side.host
    host.start()
    channel = WeightChannel(keep=2)
    try:
        host.suspend()
        assert host.suspended
        waiting = host.submit(request())
        snapshot = channel.publish(PolicyVersion(n=1), iter([(TABLE, torch.zeros(128, 128))]))
        assert not waiting.done()

        host.load(snapshot, "boundary")

        assert not host.suspended
        assert len(results([waiting])[0].token_ids)
        with host.turn_when_idle():
            waiting = host.submit(request("b"))
            assert made.side.rollouts.under_way() == []
            assert not waiting.done()
        assert len(results([waiting])[0].token_ids)
    finally:
        made.close()
        channel.close()


def test_a_child_that_dies_fails_whoever_waits_and_its_samples_come_back_at_once(bench: Callable[..., Bench]) -> None:

    made = bench(token_latency=1000.0)
    made.side.host.start()
    made.store.serve("rollout-0", PolicyVersion(n=0))
    made.store.admit(prompts(1), timeout=0.0)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            made.side.worker.run(threading.Event())
        except EngineError as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until(lambda: len(made.side.rollouts.under_way()) == 4)
    waiting = made.side.host.submit(request())
    assert made.store.counts().leased == {"rollout": 4}

    made.child().kill()
    thread.join(DEADLINE)

    assert "the process of the rollout engine has ended" in str(raised[0])
    assert made.store.counts().leased.get("rollout", 0) == 0
    assert "rollout has died" in made.store.table.samples()[0].reasons[0]
    with pytest.raises(EngineError, match="has ended"):
        results([waiting])
    with pytest.raises(EngineError, match="has ended"):
        results([made.side.host.submit(request())])


def test_completions_come_for_attestation_and_after_a_reload_those_that_were_begun_since(
    bench: Callable[..., Bench],
) -> None:
    made, stopping = bench(), threading.Event()
    fresh, version = made.side.fresh, PolicyVersion(n=0)
    made.side.host.start()
    made.store.serve("rollout-0", version)
    thread = threading.Thread(target=made.side.worker.run, args=(stopping,), daemon=True)
    thread.start()
    made.store.admit(prompts(1), timeout=0.0)
    wait_until(lambda: len(fresh.of(version)) == 4)
    assert sorted(sample.sample_id for sample in fresh.of(version)) == [0, 1, 2, 3]

    fresh.close()
    fresh.reopen()
    assert fresh.of(version) == []
    lease = made.store.lease("reward", worker="test", max_rows=4, ttl=60.0, timeout=DEADLINE)
    assert lease is not None
    made.store.drop(lease.sample_ids.tolist(), reason="to make room")
    made.store.admit(prompts(1), timeout=0.0)
    wait_until(lambda: len(fresh.of(version)) == 4)

    assert sorted(sample.sample_id for sample in fresh.of(version)) == [4, 5, 6, 7]
    assert made.side.rollouts.generated_tokens > 0
    stopping.set()
    made.side.host.cancel()
    thread.join(DEADLINE)
    assert not thread.is_alive()


def test_a_child_does_not_outlive_the_process_that_started_it(tmp_path: Path) -> None:
    program = f"""
import sys, threading
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from asyncflow.types import PolicyVersion
from tests.processes import wait_until
from tests.test_rollout_process import Bench
from tests.test_store import prompts

made = Bench(Path({str(tmp_path)!r}), patience=6000.0, token_latency=1000.0)
made.side.host.start()
made.store.serve("rollout-0", PolicyVersion(n=0))
made.store.admit(prompts(1), timeout=0.0)
threading.Thread(target=made.side.worker.run, args=(threading.Event(),), daemon=True).start()
wait_until(lambda: len(made.side.rollouts.under_way()) == 4)
print(made.child().pid, flush=True)
threading.Event().wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))  # it ends by itself when there is no child in time
    finally:
        parent.kill()
        parent.communicate(timeout=DEADLINE)

    child.wait(timeout=DEADLINE)  # far less than a client of this store waits for one that is away


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_an_engine_that_is_named_gets_a_process_and_one_that_is_given_stays_here() -> None:
    assert plan(resolve(TINY, [OWN])).own_process
    assert not plan(resolve(TINY)).own_process
    assert not plan(resolve(TINY), rollout=InOwnProcess(resolve_model("tiny"))).own_process


@pytest.mark.parametrize("update", ["boundary", "in_flight"])
@pytest.mark.parametrize("every", [0, 3], ids=["in memory", "on disk"])
def test_a_run_reaches_its_last_step_and_its_ledger_is_sound(run_tiny: RunTiny, update: str, every: int) -> None:
    run = run_tiny(OWN, f"weights.update={update}", f"checkpoint.every={every}", "max_staleness=2", "steps=8")

    assert run.summary.outcome == "finished", run.summary.reason
    result = audit(run.run_dir)
    assert result.ok, result.violations
    assert (result.open, result.admitted) == (0, 128)
    assert max(result.staleness) <= 2
    published = {line["version"]: line["digest"] for line in read_metrics(run.run_dir / "metrics.jsonl", "weights")}
    for line in read_metrics(run.run_dir / "metrics.jsonl", "served"):
        assert published[line["version"]] == line["digest"]
    steps = read_metrics(run.run_dir / "metrics.jsonl", "step")
    assert sum(line["stage/rollout/busy"] for line in steps) > 0
    assert all(0.0 <= line[f"stage/rollout/{a}"] <= 1.0 for line in steps for a in ("busy", "idle", "blocked"))
    tracks = [span.track for span in read_trace(run.run_dir / "trace.json")]
    assert sum(track.startswith("generation/") for track in tracks) >= 128
    assert "weights" in tracks


def test_both_placements_make_the_same_weights_to_the_bit(run_tiny: RunTiny) -> None:
    settings = ("deterministic=true", "max_staleness=0", "steps=8", "learning_rate=0.05", "kl_coef=0.1")

    runs = [
        run_tiny(*settings, name="here"),
        run_tiny(*settings, OWN, name="there"),
        run_tiny(*settings, OWN, "placement=colocated", name="in turns"),
    ]

    weights = [[line["digest"] for line in read_metrics(run.run_dir / "metrics.jsonl", "weights")] for run in runs]
    assert weights[0] == weights[1] == weights[2]
    assert len(set(weights[0])) == 9
    assert runs[0].summary.accuracy_after == runs[1].summary.accuracy_after


def test_an_engine_that_fails_stops_the_run_in_order_and_says_why(run_tiny: RunTiny) -> None:
    run = run_tiny("rollout.engine=tests.own_process:Fails", "steps=20")

    assert run.summary.outcome == "failed"
    assert "rollout: rollout-0 cannot go on: out of memory" in str(run.summary.reason)
    assert audit(run.run_dir).ok


def test_a_completion_that_hangs_is_given_back_and_the_run_goes_on(run_tiny: RunTiny) -> None:
    run = run_tiny("rollout.engine=tests.own_process:HangsOnce", "rollout.timeout=2", "steps=3")

    assert run.summary.outcome == "finished", run.summary.reason
    alarms = read_metrics(run.run_dir / "metrics.jsonl", "alarm")  # on a busy machine others may be late as well
    assert ("rollout_timeout", 5, 1) in [(alarm["alarm"], alarm["sample"], alarm["attempt"]) for alarm in alarms]
    result = audit(run.run_dir)
    assert (result.ok, result.quarantined, result.open) == (True, 0, 0)


def test_an_engine_that_keeps_old_weights_is_loaded_again_and_then_stops_the_run(run_tiny: RunTiny) -> None:
    run = run_tiny(
        OWN,
        "rollout.options={stale_from: 3}",
        "steps=20",
        "max_new_tokens=16",
        "zero_variance=keep",
        "eval_every=0",
        "data.eval_size=0",
        "learning_rate=0.02",
        "rollout.dtype=fp32",
        "max_staleness=0",
    )

    assert run.summary.outcome == "failed"
    assert "does not serve version" in str(run.summary.reason)
    alarms = [line["alarm"] for line in read_metrics(run.run_dir / "metrics.jsonl", "alarm")]
    assert alarms == ["stale_weights", "stale_weights"]  # after the first one it loaded the weights again


def started(run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    settings = [f"run_dir={run_dir}", OWN, "rollout.options={token_latency: 0.02}", "data.eval_size=0", *overrides]
    flags = [argument for setting in settings for argument in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-m", "asyncflow.cli", "run", str(TINY), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps(run_dir: Path) -> int:
    return len(read_metrics(run_dir / "metrics.jsonl", "step"))


def test_when_the_child_is_killed_the_run_fails_in_order_and_can_go_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = started(run_dir, "steps=100000", "checkpoint.every=3")
    wait_until(lambda: steps(run_dir) >= 2, process)
    (child,) = psutil.Process(process.pid).children()
    assert child.cmdline()[1:-1] == ["-m", "asyncflow.runtime.rollout_child"]  # no secret among them

    child.kill()
    output, _ = process.communicate(timeout=DEADLINE)

    assert process.returncode == 1, output
    assert "the process of the rollout engine has ended" in output
    assert "Traceback" not in output, output
    account = audit(run_dir)
    assert account.ok, account.violations
    made = account.learner.n
    again = resume(run_dir, overrides=[f"steps={made + 2}"])
    assert (again.summary.outcome, again.summary.steps) == ("finished", made + 2)


def test_when_the_run_is_killed_the_child_ends_and_the_run_can_go_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = started(run_dir, "steps=12", "checkpoint.every=2", "max_staleness=2", "weights.update=in_flight")
    wait_until(lambda: steps(run_dir) >= 5, process)
    (child,) = psutil.Process(process.pid).children()

    process.kill()
    process.communicate(timeout=DEADLINE)
    child.wait(timeout=DEADLINE)
    run = resume(run_dir)

    account = audit(run_dir)
    assert account.ok, account.violations
    assert (run.summary.outcome, run.summary.steps, account.open) == ("finished", 12, 0)
    assert max(account.staleness) <= 2


def test_a_run_that_cannot_start_its_engine_says_why_and_leaves_nothing(run_tiny: RunTiny) -> None:
    run = run_tiny("rollout.engine=tests.own_process:DoesNotStart")

    assert (run.summary.outcome, run.summary.reason) == ("failed", "the accelerator is on fire")
    assert isinstance(run.error, EngineError)
    assert not [p for p in psutil.Process().children() if "asyncflow.runtime.rollout_child" in p.cmdline()]
