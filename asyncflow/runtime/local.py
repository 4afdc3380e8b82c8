"""Runs a pipeline in this process: workers in threads, the rollout engine in a process that it brings itself.

Order of a run that goes well: load both engines → publish version 0 and serve it → evaluate → start the workers → wait
for the last step → stop the workers → serve the last version → evaluate → stop the engine → save the weights → close
the channel, the store and the metrics. A run that is stopped or fails leaves out what it can no longer do, and does
the rest in the same order: processes end, shared memory is freed, the ledger and the summary are written.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from asyncflow.errors import AsyncFlowError, ConfigError, RunFailed
from asyncflow.pipeline import Pipeline, open_store
from asyncflow.placement import pinned
from asyncflow.plan import Plan
from asyncflow.rundir import CONFIG, METRICS, SUMMARY, WEIGHTS
from asyncflow.runtime.metrics import Listener, Metrics
from asyncflow.runtime.supervisor import FailureLimit, Supervisor
from asyncflow.store.broker import Store
from asyncflow.store.client import Counts
from asyncflow.workers.base import Worker

logger = logging.getLogger(__name__)

Outcome = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run at one moment."""

    counts: Counts
    busy: Mapping[str, bool]
    """Worker → whether it does something, rather than waiting for it."""


Watch = Callable[[Callable[[], Status]], Worker]
"""Makes a worker that looks at the run while it goes on."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a run ended; `summary.json`."""

    outcome: Outcome
    reason: str | None = None
    """Why it did not finish."""
    steps: int = 0
    """Steps that were made."""
    seconds: float = 0.0
    accuracy_before: float | None = None
    """On the held-out problems, greedy."""
    accuracy_after: float | None = None
    weights: str | None = None
    """Folder of the final weights in Hugging Face format, within the run directory."""
    digest: str | None = None
    """Of the last published weights."""


def run_local(
    plan: Plan,
    run_dir: Path,
    *,
    listeners: Sequence[Listener] = (),
    watch: Watch | None = None,
    at_end: Callable[[Path], object],
) -> tuple[Summary, BaseException | None]:
    """Run to the end and say how it ended, and because of which error if it failed.

    KeyboardInterrupt (Ctrl-C) and SIGTERM stop the run in order. `at_end` gets the run directory when all is written.
    Raises ConfigError when `run_dir` holds something already.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if any(run_dir.iterdir()):
        raise ConfigError(f"{run_dir} is not empty: name another run_dir")
    (run_dir / CONFIG).write_text(plan.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    run = _Run(plan, run_dir, listeners, watch)
    began = time.monotonic()
    outcome: Outcome = "finished"
    failure: BaseException | None = None
    with pinned(plan.config.learner.cores), _interruptions_wait() as let_through:
        try:
            with let_through():
                run.work()
        except KeyboardInterrupt:
            outcome = "stopped"
        except Exception as error:
            outcome, failure = "failed", error
        summary = run.close(outcome, failure, time.monotonic() - began)
        (run_dir / SUMMARY).write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
        _attempt("write the report", lambda: at_end(run_dir))
    return summary, failure


class _Run:
    def __init__(self, plan: Plan, run_dir: Path, listeners: Sequence[Listener], watch: Watch | None) -> None:
        self._plan = plan
        self._run_dir = run_dir
        self._watch = watch
        self._metrics = Metrics(run_dir / METRICS)
        for listener in listeners:
            self._metrics.listen(listener)
        self._supervisor = Supervisor()
        self._store: Store | None = None
        self._pipeline: Pipeline | None = None
        self._accuracy: dict[str, float | None] = {"before": None, "after": None}

    def work(self) -> None:
        """Everything up to the last evaluation. Leaves the taking down to `close`."""
        # The ledger first: whatever happens from here on, the run can be audited.
        self._store = open_store(self._plan, self._run_dir)
        pipeline = self._pipeline = Pipeline(
            self._plan,
            self._store,
            rollout=self._plan.make_rollout(),
            learner=self._plan.make_learner(),
            recorder=self._metrics,
            on_done=self._supervisor.finish,
        )
        pipeline.host.start()
        pipeline.learner.publish()
        pipeline.weights.follow(0)
        self._accuracy["before"] = pipeline.evaluator.evaluate(0)
        for worker in (*pipeline.workers, *self._guards(pipeline)):
            self._supervisor.start(worker)
        self._supervisor.wait()
        if stuck := self._supervisor.stop(pipeline.interrupt):
            raise RunFailed(f"{', '.join(stuck)} did not stop after the last step")
        self._supervisor.check()
        pipeline.weights.follow(0)
        self._accuracy["after"] = pipeline.evaluator.evaluate(pipeline.learner.version.n)

    def _guards(self, pipeline: Pipeline) -> list[Worker]:
        guards: list[Worker] = [FailureLimit(pipeline.store, self._plan.config.max_failed_share)]
        if self._watch is not None:
            guards.append(self._watch(lambda: status(pipeline)))
        return guards

    def close(self, outcome: Outcome, failure: BaseException | None, seconds: float) -> Summary:
        """Take everything down, whatever state it is in; a part that fails does not keep the others from it."""
        reason = {"finished": None, "stopped": "interrupted", "failed": str(failure) or type(failure).__name__}[outcome]
        if failure is not None:
            _attempt("record the failure", lambda: self._record(failure))
        weights = digest = None
        steps = 0
        if (pipeline := self._pipeline) is not None:
            steps = pipeline.learner.version.n
            latest = pipeline.channel.latest()
            digest = latest.digest if latest is not None else None
            stuck = self._supervisor.stop(pipeline.interrupt)
            _attempt("stop the rollout engine", pipeline.host.stop)
            if pipeline.learner.name in stuck:
                # It still changes the weights: what would be saved now is nobody's policy.
                reason = f"{reason}; the learner did not stop, so its weights are not saved"
            elif steps:
                if _attempt("save the weights", lambda: pipeline.engine.save_pretrained(self._run_dir / WEIGHTS)):
                    weights = WEIGHTS
                _attempt("close the learner", pipeline.engine.close)
            _attempt("close the weight channel", pipeline.channel.close)
        _attempt("close the reward functions", self._plan.reward.close)
        if self._store is not None:
            _attempt("close the store", self._store.close)
        _attempt("close the metrics", self._metrics.close)
        return Summary(
            outcome=outcome,
            reason=reason,
            steps=steps,
            seconds=seconds,
            accuracy_before=self._accuracy["before"],
            accuracy_after=self._accuracy["after"],
            weights=weights,
            digest=digest,
        )

    def _record(self, failure: BaseException) -> None:
        """One line in the metrics, with a traceback where the cause is not one that was foreseen."""
        root = failure
        while root.__cause__ is not None:
            root = root.__cause__
        foreseen = isinstance(root, AsyncFlowError)
        trace = "" if foreseen else "".join(traceback.format_exception(failure))
        self._metrics.log("failure", {"reason": str(failure), "type": type(root).__name__, "traceback": trace})
        logger.error("the run failed: %s", failure, exc_info=None if foreseen else failure)


def status(pipeline: Pipeline) -> Status:
    """How a pipeline is doing right now."""
    return Status(counts=pipeline.store.counts(), busy={worker.name: worker.busy for worker in pipeline.workers})


def _attempt(what: str, action: Callable[[], object]) -> bool:
    """Do one part of a shutdown; a failure is logged and the rest goes on."""
    try:
        action()
    except Exception:
        logger.exception("could not %s", what)
        return False
    return True


@contextmanager
def _interruptions_wait() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Ignore Ctrl-C and SIGTERM, except inside of what this yields: there both raise KeyboardInterrupt.

    So nothing that arrives late can stop a shutdown half-way. Only the main thread gets signals; elsewhere they are
    left as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield nullcontext
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]

    @contextmanager
    def let_through() -> Iterator[None]:
        for number in signals:
            signal.signal(number, signal.default_int_handler)
        try:
            yield
        finally:
            for number in signals:
                signal.signal(number, signal.SIG_IGN)

    try:
        yield let_through
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
