"""The other end of `asyncflow.runtime.rollout_process`: a process with the rollout engine, its host and its worker."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from asyncflow.clock import SystemClock
from asyncflow.config import Config
from asyncflow.engines.registry import rollout_class
from asyncflow.engines.weights.channel import PublishedWeights
from asyncflow.errors import RunFailed
from asyncflow.runtime.link import Failure, Link, Message
from asyncflow.runtime.rollout_process import (
    Added,
    Answer,
    Ask,
    Began,
    BeginTurn,
    Broken,
    Cancel,
    Done,
    Drain,
    Ended,
    EndTurn,
    Entered,
    Generate,
    Generated,
    GiveUp,
    Go,
    Left,
    Load,
    Loaded,
    Look,
    Offered,
    Recorded,
    Reopened,
    Rest,
    Seen,
    Start,
    Stop,
    Suspend,
    ToChild,
    Work,
)
from asyncflow.runtime.supervisor import Supervisor
from asyncflow.store.remote import connect
from asyncflow.store.store import Store
from asyncflow.types import Activity, Completion, Int32s
from asyncflow.workers.base import Heartbeat
from asyncflow.workers.host import EngineHost
from asyncflow.workers.rollout import RolloutWorker
from asyncflow.workers.side import Surroundings, rollout_parts

Send = Callable[[Message], None]


class ToldTimeline:
    """Implements `Timeline` for the parts of this process: the run's own is told."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._clock = SystemClock()
        self._lock = threading.Lock()
        self._doing: dict[str, tuple[Activity, str]] = {}
        self._spans = count(1)

    def now(self) -> float:
        return self._clock.monotonic()

    def enter(self, track: str, activity: Activity, cause: str = "") -> None:
        with self._lock:
            if self._doing.get(track) != (activity, cause):
                self._doing[track] = activity, cause
                self._send(Entered(track=track, activity=activity, cause=cause, at=self.now()))

    def leave(self, track: str) -> None:
        with self._lock:
            self._doing.pop(track, None)
            self._send(Left(track=track, at=self.now()))

    @contextmanager
    def span(self, track: str, name: str, **args: Any) -> Iterator[None]:
        span = next(self._spans)
        self._send(Began(span=span, track=track, name=name, at=self.now()))
        try:
            yield
        finally:
            self._send(Ended(span=span, at=self.now(), args=args))

    def record(self, track: str, name: str, began: float, **args: Any) -> None:
        self._send(Recorded(track=track, name=name, began=began, ended=self.now(), args=args))

    def add(self, track: str, name: str, seconds: float) -> None:
        self._send(Added(track=track, name=name, seconds=seconds))

    def lap(self) -> Mapping[str, float]:
        """The run's own has the shares."""
        return {}


class ToldOffers:
    """Implements `Offers`: what may be of use goes to the run."""

    def __init__(self, wanted: bool, send: Send) -> None:
        self.epoch = 0
        self._wanted = wanted
        self._send = send

    def offer(self, sample_id: int, group_id: int, prompt_ids: Int32s, completion: Completion, *, epoch: int) -> None:
        if self._wanted and completion.token_versions[0] == completion.token_versions[-1]:
            self._send(
                Offered(
                    sample_id=sample_id,
                    group_id=group_id,
                    prompt_ids=prompt_ids,
                    completion=_plain(completion),
                    epoch=epoch,
                )
            )


class Child:
    """The rollout side of a run whose other parts are at the other end of a link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._answering = threading.Lock()
        self._supervisor = Supervisor()
        self._offers: ToldOffers | None = None
        self._store: Store | None = None
        self._heartbeat: Heartbeat | None = None
        self._host: EngineHost | None = None
        self._worker: RolloutWorker | None = None

    def serve(self) -> None:
        """Do what is asked until there is nobody any more, then stop the engine."""
        try:
            for message in self._link.receive():
                self._do(message)
        finally:
            self._supervisor.stopping.set()
            if self._store is not None:
                self._store.close()  # which ends calls that wait for a run that is gone
            self._supervisor.stop(self._interrupt)
            if self._host is not None:
                self._host.stop()
            self._link.close()

    def _do(self, message: Any) -> None:
        match message:
            case Ask(request=Look()):
                self._answer(message.call, self._look)
            case Ask(request=Generate() as request):
                self._generate(message.call, request)
            case Ask(request=Start() as request):
                # Whoever asks to stop, finds what there is to stop.
                try:
                    host = self._make(request)
                except Exception as error:
                    self._send_answer(message.call, Failure.of(error))
                else:
                    self._in_thread(self._answer, message.call, host.start)
            case Ask():
                self._in_thread(self._answer, message.call, partial(self._carry_out, message.request))
            case Work():
                self._work()
            case Go():
                going = self._supervisor.going
                (going.set if message.on else going.clear)()
            case Drain():
                self._rollouts.drained = message.on
            case GiveUp():
                self._in_thread(self._rollouts.give_up, message.request_id, message.reason)
            case Reopened():
                assert self._offers is not None
                self._offers.epoch = message.epoch
            case Cancel():
                self._interrupt()

    @property
    def _rollouts(self) -> RolloutWorker:
        assert self._worker is not None, "the first message is Start"
        return self._worker

    @property
    def _engine(self) -> EngineHost:
        assert self._host is not None, "the first message is Start"
        return self._host

    def _in_thread(self, call: Callable[..., object], *args: Any) -> None:
        """What waits must not keep the next message from being heard."""
        threading.Thread(target=call, args=args, name="asked", daemon=True).start()

    def _carry_out(self, request: Any) -> Message | None:
        match request:
            case Load():
                return self._load(request)
            case Suspend():
                self._engine.suspend()
            case BeginTurn():
                self._engine.begin_turn()
            case EndTurn():
                self._engine.end_turn()
            case Rest():
                self._supervisor.stop(self._interrupt)
            case Stop():
                if self._host is not None:
                    self._host.stop()
        return None

    def _answer(self, call: int, action: Callable[[], Message | None]) -> None:
        try:
            value = action() or Done()
        except Exception as error:
            value = Failure.of(error)
        self._send_answer(call, value)

    def _send_answer(self, call: int, value: Any) -> None:
        with self._answering:  # so that the last answer has the last state
            suspended = self._host is not None and self._host.suspended
            self._link.send(Answer(call=call, value=value, suspended=suspended))

    # -- what is asked -------------------------------------------------------------------------------------------------

    def _make(self, request: Start) -> EngineHost:
        config, model = Config.model_validate_json(request.config), Path(request.model)
        if config.rollout.cores is not None:
            os.sched_setaffinity(0, config.rollout.cores)
        engine = rollout_class(config.rollout.engine).from_config(config, model)
        self._offers = ToldOffers(config.attestation.samples > 0, self._link.send)
        store = self._store = connect(request.store, token=request.token, patience=request.patience)
        self._heartbeat = Heartbeat(store)
        around = Surroundings(
            config=config,
            stage=store.schema.stages["rollout"],
            store=store,
            heartbeat=self._heartbeat,
            timeline=ToldTimeline(self._link.send),
        )
        self._host, self._worker = rollout_parts(engine, around, canary=request.canary, fresh=self._offers)
        return self._host

    def _generate(self, call: int, request: Generate) -> None:
        def done(future: Future[Completion]) -> None:
            self._answer(call, lambda: Generated(completion=_plain(future.result())))

        self._engine.submit(request.request).add_done_callback(done)

    def _load(self, request: Load) -> Loaded:
        path = Path(request.path)
        weights = PublishedWeights(
            version=request.version, digest=request.digest, path=path, nbytes=path.stat().st_size
        )
        served = self._engine.load(weights, request.mode)
        canary = self._engine.canary
        return Loaded(
            version=served.version, digest=served.digest, canary=None if canary is None else _plain(canary[1])
        )

    def _look(self) -> Seen:
        return Seen(
            under_way=tuple(self._rollouts.under_way()),
            durations=tuple(self._engine.durations()),
            finished=self._engine.finished,
            generated_tokens=self._rollouts.generated_tokens,
        )

    def _work(self) -> None:
        assert self._heartbeat is not None
        for worker in (self._heartbeat, self._rollouts):
            self._supervisor.start(worker)
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        """Say when a worker fails."""
        try:
            self._supervisor.wait()
        except RunFailed as failed:
            self._link.send(Broken(failure=Failure.of(failed.__cause__ or failed)))

    def _interrupt(self) -> None:
        if self._heartbeat is not None and self._supervisor.stopping.is_set():
            self._heartbeat.stop()
        if self._host is not None:
            self._host.cancel()


def _plain(completion: Completion) -> Completion:
    """With arrays of the types that it should have, whatever the engine gave."""
    return replace(
        completion,
        token_ids=np.asarray(completion.token_ids, np.int32),
        logprobs=np.asarray(completion.logprobs, np.float32),
        token_versions=np.asarray(completion.token_versions, np.int64),
    )


def main(connection: socket.socket) -> None:
    """The child's whole life."""
    Child(Link(connection, ToChild, "run")).serve()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
