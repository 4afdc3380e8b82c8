"""Runs a pipeline on this machine: workers in threads of this process, the rollout side here or in one of its own.

Order of a run that goes well: load both engines → publish version 0 and serve it → evaluate → start the workers → wait
for the last step → stop the workers → serve the last version → evaluate → stop the engine → save the weights → close
the channel, the store and the metrics. A run that is stopped or fails leaves out what it can no longer do, and does
the rest in the same order: processes end, shared memory is freed, the ledger and the summary are written. Unless it was
the learner that failed, every run ends with a checkpoint. A run that is resumed has the weights of its checkpoint
instead of a first evaluation.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from asyncflow.engines.base import LearnerEngine, ResumableLearner
from asyncflow.errors import AsyncFlowError, CheckpointError, ConfigError, ControlError, IllegalTransition, RunFailed
from asyncflow.pipeline import Pipeline, open_store, reopen_store
from asyncflow.placement import pinned
from asyncflow.plan import Plan
from asyncflow.rundir import CHECKPOINTS, CONFIG, METRICS, SAMPLES, SUMMARY, TRACE, WEIGHTS
from asyncflow.runtime import look
from asyncflow.runtime.checkpoint import Checkpoint, Checkpointer, read, remove_unfinished
from asyncflow.runtime.completions import Completions
from asyncflow.runtime.control import DEADLINE, ControlServer
from asyncflow.runtime.metrics import Listener, Metrics, read_metrics
from asyncflow.runtime.rollout_process import RolloutProcess
from asyncflow.runtime.samples import SampleLog
from asyncflow.runtime.serving import ServedStore
from asyncflow.runtime.supervisor import FailureLimit, Supervisor
from asyncflow.runtime.timeline import Doing, TraceTimeline, as_told
from asyncflow.store.client import Counts
from asyncflow.store.home import HomeError
from asyncflow.store.schema import Stage
from asyncflow.store.store import EmbeddedStore
from asyncflow.types import Int32s, PolicyVersion
from asyncflow.workers.base import Heartbeat, Worker
from asyncflow.workers.side import RolloutSide, Surroundings, side_here

logger = logging.getLogger(__name__)

Outcome = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run at one moment."""

    counts: Counts
    doing: Mapping[str, Doing]
    """Worker → what it does, or waits for."""


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
    incarnation: int = 0
    """How often the run was resumed."""
    weights: str | None = None
    """Folder of the final weights in Hugging Face format, within the run directory."""
    digest: str | None = None
    """Of the last published weights."""
    bottleneck: str | None = None
    """What held the run up, and what to do about it; None when there were too few steps to say."""


@dataclass(frozen=True, kw_only=True)
class GoingOn:
    """Where a run that is resumed goes on."""

    step: int
    checkpoint: Checkpoint | None
    """Of that step; None at step 0, where the model itself is the state."""


class Stopped(Exception):
    """Somebody asked the run to stop."""


def run_local(
    plan: Plan,
    run_dir: Path,
    *,
    going_on: GoingOn | None = None,
    listeners: Sequence[Listener] = (),
    watch: Watch | None = None,
    diagnose: Callable[[Path], str | None],
    at_end: Callable[[Path], object],
) -> tuple[Summary, BaseException | None]:
    """Run to the end and say how it ended, and because of which error if it failed.

    KeyboardInterrupt (Ctrl-C) and SIGTERM stop the run in order. `diagnose` says from the run directory what held the
    run up; `at_end` gets it when all is written. Raises ConfigError when `run_dir` holds something already and the run
    is a new one, or when another process has it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if going_on is None and any(run_dir.iterdir()):
        raise ConfigError(f"{run_dir} is not empty: name another run_dir")
    with held(run_dir):
        run = _Run(plan, run_dir, going_on, listeners, watch)
        return _carry_out(run, plan.config.learner.cores, diagnose, at_end)


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of a run directory; the lock goes with the process that holds it. Raises ConfigError."""
    folder = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process runs in {run_dir}: wait for it, or stop it (`asyncflow stop {run_dir}`)"
            ) from None
        yield
    finally:
        os.close(folder)


def _carry_out(
    run: _Run,
    cores: tuple[int, ...] | None,
    diagnose: Callable[[Path], str | None],
    at_end: Callable[[Path], object],
) -> tuple[Summary, BaseException | None]:
    outcome: Outcome = "finished"
    failure: BaseException | None = None
    with pinned(cores), _interruptions_wait() as let_through:
        try:
            with let_through():
                run.work()
        except (KeyboardInterrupt, Stopped):
            outcome = "stopped"
        except Exception as error:
            outcome, failure = "failed", error
        summary = run.close(outcome, failure)
        found: list[str | None] = []
        if _attempt("find the bottleneck", lambda: found.append(diagnose(run.run_dir))):
            summary = replace(summary, bottleneck=found[0])
        text = json.dumps(asdict(summary), indent=2) + "\n"
        _attempt("write the summary", lambda: (run.run_dir / SUMMARY).write_text(text, encoding="utf-8"))
        _attempt("write the report", lambda: at_end(run.run_dir))
    return summary, failure


class _Run:
    """One run from its beginning, or its checkpoint, to its end. Implements `RunControl`."""

    def __init__(
        self,
        plan: Plan,
        run_dir: Path,
        going_on: GoingOn | None,
        listeners: Sequence[Listener],
        watch: Watch | None,
    ) -> None:
        self._plan = plan
        self.run_dir = run_dir
        self._going_on = going_on
        self._watch = watch
        self._began = time.monotonic()
        self._phase = "starting"
        self._stop_asked = threading.Event()
        self._metrics = Metrics(run_dir / METRICS)
        for listener in listeners:
            self._metrics.listen(listener)
        self._samples: SampleLog | None = None
        self._timeline = TraceTimeline(run_dir / TRACE)
        self._supervisor = Supervisor()
        self._store: EmbeddedStore | None = None
        self._served: ServedStore | None = None
        """The same store, for others."""
        self._pipeline: Pipeline | None = None
        self._checkpointer: Checkpointer | None = None
        self._control: ControlServer | None = None
        self._completions: Completions | None = None
        self._accuracy: dict[str, float | None] = {"before": None, "after": None}

    def work(self) -> None:
        """Everything up to the last evaluation. Leaves the taking down to `close`."""
        learner, self._store = self._begin() if self._going_on is None else self._go_on(self._going_on)
        self._served = self._serve(self._store)
        if self._plan.config.save_samples:
            after = 0 if self._going_on is None else self._going_on.step
            self._samples = SampleLog(self.run_dir / SAMPLES, self._metrics, after=after)
            self._store.on_committed = self._samples.committed
        (self.run_dir / CONFIG).write_text(self._plan.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        self._control = ControlServer(self, self.run_dir)
        pipeline = self._pipeline = Pipeline(
            self._plan,
            self._store,
            place=self._place,
            learner=learner if learner is not None else self._plan.make_learner(),
            reference=self._plan.make_reference() if self._plan.make_reference is not None else None,
            recorder=self._metrics,
            timeline=self._timeline,
            after_step=self._after_step,
            on_done=self._supervisor.finish,
        )
        self._timeline.order(worker.name for worker in pipeline.workers)
        context = self._plan.config.rollout.max_model_len
        assert context is not None, "a plan derives it"
        self._completions = Completions(pipeline.host, self._plan.tokenizer, context=context)
        if isinstance(pipeline.engine, ResumableLearner):
            self._checkpointer = self._make_checkpointer(pipeline, pipeline.engine, self._store)
        pipeline.host.start()
        pipeline.learner.publish()
        self._check_published(pipeline)
        pipeline.weights.follow(0)
        self._check_stop()
        self._evaluate_before(pipeline)
        self._check_stop()
        self._phase = "training"
        for worker in (*pipeline.workers, *self._guards(pipeline)):
            self._supervisor.start(worker)
        self._supervisor.wait()
        self._check_stop()
        self._phase = "evaluating"
        if stuck := self._supervisor.stop(pipeline.interrupt):
            raise RunFailed(f"{', '.join(stuck)} did not stop after the last step")
        self._timeline.leave_all()
        self._supervisor.check()
        pipeline.weights.follow(0)
        self._accuracy["after"] = pipeline.evaluator.evaluate(pipeline.learner.version.n)

    def _place(self, stage: Stage, heartbeat: Heartbeat, canary: Int32s | None) -> RolloutSide:
        """Make the rollout side where the engine wants it."""
        plan, store, timeline = self._plan, self._store, self._timeline
        assert store is not None, "the ledger comes first"
        if not plan.own_process:
            around = Surroundings(config=plan.config, stage=stage, store=store, heartbeat=heartbeat, timeline=timeline)
            return side_here(plan.make_rollout(), around, canary=canary)
        assert self._served is not None, "a run whose store cannot be served has no other process"
        process = RolloutProcess(
            plan.config,
            plan.model,
            store=store,
            location=self._served.location,
            token=self._served.token,
            timeline=timeline,
            canary=canary,
        )
        return process.side

    def _serve(self, store: EmbeddedStore) -> ServedStore | None:
        try:
            return ServedStore(store, self.run_dir)
        except HomeError as error:
            if self._plan.own_process:
                raise
            logger.warning("nobody else can look into the store of this run: %s", error)
            return None

    def _begin(self) -> tuple[None, EmbeddedStore]:
        # The ledger first: whatever happens from here on, the run can be audited.
        return None, open_store(self._plan, self.run_dir)

    def _go_on(self, at: GoingOn) -> tuple[LearnerEngine, EmbeddedStore]:
        """Load the checkpoint, then go back to it: what cannot be loaded leaves the run as it was."""
        learner = self._plan.make_learner()
        if at.checkpoint is not None:
            assert isinstance(learner, ResumableLearner), "a plan refuses checkpoints for others"
            learner.load_state(at.checkpoint.learner)
        try:
            store = reopen_store(self._plan, self.run_dir, at.step)
        except IllegalTransition as error:
            raise CheckpointError(f"{self.run_dir} cannot be resumed from step {at.step}: {error}") from error
        remove_unfinished(self.run_dir)
        for path in sorted((self.run_dir / CHECKPOINTS).glob("step-*")):
            if read(path).version.n > at.step:
                shutil.rmtree(path)  # of what the run has gone back behind
        counts = store.counts()
        values = {"step": at.step, "policy_version": str(counts.learner), "kept": counts.states}
        self._metrics.log("resumed", values)
        return learner, store

    def _make_checkpointer(self, pipeline: Pipeline, engine: ResumableLearner, store: EmbeddedStore) -> Checkpointer:
        def digest() -> str:
            latest = pipeline.channel.latest()
            return "" if latest is None else latest.digest

        config = self._plan.config.checkpoint
        return Checkpointer(
            self.run_dir,
            every=config.every or 0,
            keep=config.keep,
            store=store,
            recorder=self._metrics,
            save=engine.save_state,
            settle=self._settle,
            made=0 if self._going_on is None else self._going_on.step,
            digest=digest,
            problems=self._plan.problems.digest,
        )

    def _settle(self) -> None:
        if self._samples is not None:
            self._samples.flush()

    def _after_step(self, version: PolicyVersion) -> None:
        if self._checkpointer is not None:
            self._checkpointer.after_step(version)

    def _check_published(self, pipeline: Pipeline) -> None:
        """The weights that were published are those of which the checkpoint was made."""
        checkpoint = self._going_on.checkpoint if self._going_on is not None else None
        latest = pipeline.channel.latest()
        if checkpoint is not None and latest is not None and latest.digest != checkpoint.digest:
            raise CheckpointError(
                f"{checkpoint.path} was made of weights with digest {checkpoint.digest} and gives {latest.digest}: "
                "resume with the engine and the precision that made it"
            )

    def _evaluate_before(self, pipeline: Pipeline) -> None:
        if self._going_on is None:
            self._phase = "evaluating"
            self._accuracy["before"] = pipeline.evaluator.evaluate(0)
            return
        evals = read_metrics(self.run_dir / METRICS, "eval")
        self._accuracy["before"] = next((line["eval/accuracy"] for line in evals if line.get("step") == 0), None)

    # -- RunControl ----------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        store, config = self._store, self._plan.config
        context = config.rollout.max_model_len
        assert context is not None, "a plan derives it"
        paused = not self._supervisor.going.is_set()
        values: dict[str, Any] = {
            "run_dir": str(self.run_dir.resolve()),
            "name": config.name,
            "pid": os.getpid(),
            "phase": "stopping" if self._stop_asked.is_set() else "paused" if paused else self._phase,
            "steps": config.steps,
            "seconds": time.monotonic() - self._began,
            "room": {
                "vocabulary": self._plan.info.vocab,
                "prompt": context - config.max_new_tokens,
                "response": config.max_new_tokens,
            },
        }
        if store is not None:
            counts = store.counts()
            values |= {
                "step": counts.learner.n,
                "max_staleness": counts.max_staleness,
                "policy_version": str(counts.learner),
                "served": {engine: str(version) for engine, version in counts.served.items()},
                "admitted": counts.admitted,
                "trained": counts.trained,
                "dropped": dict(counts.dropped),
                "quarantined": counts.quarantined,
                "requeued": counts.requeued,
                "masked": counts.masked,
                "restored": counts.restored,
                "open": dict(counts.states),
            }
        doing = self._timeline.doing()
        values["busy"] = [name for name, at in doing.items() if at.activity == "busy"]
        values["waits_for"] = {name: at.cause for name, at in doing.items() if at.cause}
        return values

    def pause(self) -> None:
        self._supervisor.going.clear()

    def resume(self) -> None:
        self._supervisor.going.set()

    def stop(self) -> None:
        self._stop_asked.set()
        self._supervisor.finish()

    def set_max_staleness(self, bound: int) -> None:
        if type(bound) is not int or bound < 0:
            raise ControlError(f"max_staleness cannot be {bound!r}: give a whole number, 0 is synchronous")
        if bound == 0 and self._plan.config.deterministic and not self._plan.repeatable:
            raise ControlError(
                "max_staleness 0 with deterministic needs a deterministic rollout engine: give 1 or more"
            )
        if self._store is None:
            raise ControlError("the run has not begun yet: try again in a moment")
        self._store.amend(max_staleness=bound)
        self._metrics.log("set", {"max_staleness": bound})

    def workers(self) -> Sequence[Mapping[str, Any]]:
        return look.workers(self._begun, self._timeline)

    def engines(self) -> Sequence[Mapping[str, Any]]:
        return look.engines(self._begun, self._plan.config)

    def drain(self, worker: str) -> None:
        look.drainable(self._begun, worker).drained = True
        self._metrics.log("set", {"drained": worker})

    def undrain(self, worker: str) -> None:
        look.drainable(self._begun, worker).drained = False
        self._metrics.log("set", {"undrained": worker})

    def timeline(self, seconds: float) -> Sequence[Mapping[str, Any]]:
        return as_told(self._timeline.recent(seconds))

    def shares(self, seconds: float) -> Mapping[str, float]:
        return self._timeline.recent_shares(seconds)

    def tokenise(self, prompts: Sequence[str | Sequence[dict[str, str]]]) -> Sequence[Sequence[int]]:
        if self._completions is None:
            raise ControlError("the run has not begun yet: try again in a moment")
        return self._completions.tokenise(prompts)

    def complete(
        self,
        prompt: str | Sequence[int] | Sequence[dict[str, str]],
        *,
        n: int = 1,
        max_new_tokens: int = 16,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        timeout: float = DEADLINE,
    ) -> Mapping[str, Any]:
        if self._completions is None or self._begun.weights.served is None:
            raise ControlError("the run serves nothing yet: try again in a moment")
        return self._completions.complete(
            prompt,
            n=n,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            timeout=timeout,
        )

    @property
    def _begun(self) -> Pipeline:
        if self._pipeline is None:
            raise ControlError("the run has not begun yet: try again in a moment")
        return self._pipeline

    def _check_stop(self) -> None:
        if self._stop_asked.is_set():
            raise Stopped

    # ------------------------------------------------------------------------------------------------------------------

    def _guards(self, pipeline: Pipeline) -> list[Worker]:
        guards: list[Worker] = [FailureLimit(pipeline.store, self._plan.config.max_failed_share)]
        if self._watch is not None:
            guards.append(self._watch(lambda: Status(counts=pipeline.store.counts(), doing=self._timeline.doing())))
        return guards

    def close(self, outcome: Outcome, failure: BaseException | None) -> Summary:
        """Take everything down, whatever state it is in; a part that fails does not keep the others from it."""
        reason = {"finished": None, "stopped": "interrupted", "failed": str(failure) or type(failure).__name__}[outcome]
        if failure is not None:
            _attempt("record the failure", lambda: self._record(failure))
        weights = digest = None
        steps = incarnation = 0
        self._phase = "stopping"
        if (pipeline := self._pipeline) is not None:
            steps, incarnation = pipeline.learner.version.n, pipeline.learner.version.incarnation
            latest = pipeline.channel.latest()
            digest = latest.digest if latest is not None else None
            stuck = self._supervisor.stop(pipeline.interrupt)
            _attempt("stop the rollout engine", pipeline.host.stop)
            if pipeline.learner.name in stuck:
                # It still changes the weights: what would be saved now is nobody's policy.
                reason = f"{reason}; the learner did not stop, so its weights are not saved"
            elif not self._sound(pipeline):
                # Of a step that is not in the ledger.
                reason = f"{reason}; the weights belong to no step, so they are not saved"
            elif steps:
                _attempt("make the last checkpoint", lambda: self._last_checkpoint(pipeline))
                if _attempt("save the weights", lambda: pipeline.engine.save_pretrained(self.run_dir / WEIGHTS)):
                    weights = WEIGHTS
            if pipeline.learner.name not in stuck:
                _attempt("close the learner", pipeline.engine.close)
            if pipeline.scorer is not None:
                _attempt("close the reference", pipeline.scorer.close)
            _attempt("close the weight channel", pipeline.channel.close)
        _attempt("close the reward functions", self._plan.reward.close)
        if self._checkpointer is not None:
            _attempt("complete the last checkpoint", self._checkpointer.close)
        if self._control is not None:
            _attempt("close the control socket", self._control.close)
        if (store := self._served or self._store) is not None:
            _attempt("close the store", store.close)
        if self._samples is not None:
            _attempt("write the last samples", self._samples.close)
        _attempt("close the metrics", self._metrics.close)
        _attempt("close the timeline", self._timeline.close)
        return Summary(
            outcome=outcome,
            reason=reason,
            steps=steps,
            seconds=time.monotonic() - self._began,
            incarnation=incarnation,
            accuracy_before=self._accuracy["before"],
            accuracy_after=self._accuracy["after"],
            weights=weights,
            digest=digest,
        )

    def _sound(self, pipeline: Pipeline) -> bool:
        """Whether the learner's weights are those of its version, whatever else has failed."""
        return self._supervisor.failed != pipeline.learner.name and pipeline.learner.between_steps

    def _last_checkpoint(self, pipeline: Pipeline) -> None:
        if self._checkpointer is not None:
            self._checkpointer.make(pipeline.learner.version)

    def _record(self, failure: BaseException) -> None:
        """One line in the metrics, with a traceback where the cause is not one that was foreseen."""
        root = failure
        while root.__cause__ is not None:
            root = root.__cause__
        foreseen = isinstance(root, AsyncFlowError)
        trace = "" if foreseen else "".join(traceback.format_exception(failure))
        self._metrics.log("failure", {"reason": str(failure), "type": type(root).__name__, "traceback": trace})
        logger.error("the run failed: %s", failure, exc_info=None if foreseen else failure)


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
