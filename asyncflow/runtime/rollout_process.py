"""The rollout side of a run in a process of its own: what the engine and its worker do for every token and every
completion does not take turns with the learner for the interpreter.

    this process                                             child (`asyncflow.runtime.rollout_child`)
    StoreServer        ◄── Arrow Flight: leases, acks ────── RolloutWorker, Heartbeat
    RemoteHost         ─── load, evaluate, take a turn ────► EngineHost ── the engine that `rollout.engine` names
    RemoteRollouts     ─── pause, give up, look ───────────► RolloutWorker
    FreshSamples       ◄── completions of one version ──────
    TraceTimeline      ◄── what it does, and when ──────────

Samples go through the store, weights through shared memory; all the rest are the messages below, over a `Link`.

Who is killed leaves the other one with an end of file. A child whose parent is gone stops its engine and ends. When the
child is gone, its leases come back at once and the run stops, as for an engine that fails in this process.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from asyncflow.config import Config
from asyncflow.engines.base import GenerationRequest, Served, WeightSnapshot
from asyncflow.errors import EngineError
from asyncflow.runtime.link import Failure, Link, Message
from asyncflow.runtime.timeline import TraceTimeline
from asyncflow.store.client import StoreClient
from asyncflow.store.remote import PATIENCE as STORE_PATIENCE
from asyncflow.types import Activity, Completion, Int32s, PolicyVersion, UpdateMode
from asyncflow.workers.attestation import FreshSamples
from asyncflow.workers.base import PATIENCE, Worker
from asyncflow.workers.host import START_TIMEOUT, STOP_TIMEOUT, TURN_TIMEOUT, load_timeout
from asyncflow.workers.rollout import UnderWay
from asyncflow.workers.side import ENGINE, RolloutSide

logger = logging.getLogger(__name__)

LATER = 30.0
"""Seconds that an answer may take beyond the deadline that the child itself has."""
LOOK_TIMEOUT = 5.0
"""Seconds for which a look at the child waits; then it sees what it saw before."""
LEAVE_SECONDS = 60.0
"""Deadline for the child to leave when its engine has stopped; after that it is killed."""


# -- requests ----------------------------------------------------------------------------------------------------------


class Start(Message, frozen=True, kw_only=True):
    """Make the engine and start it."""

    config: str
    """JSON."""
    model: str
    store: str
    """Its Flight location …"""
    token: str
    """… and what it asks for."""
    patience: float
    """Seconds for which a call waits for it when it cannot be reached."""
    canary: Int32s | None


class Load(Message, frozen=True, kw_only=True):
    version: PolicyVersion
    digest: str
    path: str
    mode: UpdateMode


class Generate(Message, frozen=True, kw_only=True):
    """Not for the store: an evaluation."""

    request: GenerationRequest


class Suspend(Message, frozen=True, kw_only=True):
    """The learner's turn."""


class BeginTurn(Message, frozen=True, kw_only=True):
    """The reference's turn."""


class EndTurn(Message, frozen=True, kw_only=True):
    pass


class Look(Message, frozen=True, kw_only=True):
    """What is under way?"""


class Rest(Message, frozen=True, kw_only=True):
    """End the workers; the engine goes on, for the last evaluation."""


class Stop(Message, frozen=True, kw_only=True):
    """Stop the engine."""


class Ask(Message, frozen=True, kw_only=True):
    call: int
    request: Start | Load | Generate | Suspend | BeginTurn | EndTurn | Look | Rest | Stop


# -- answers -----------------------------------------------------------------------------------------------------------


class Done(Message, frozen=True, kw_only=True):
    pass


class Loaded(Message, frozen=True, kw_only=True):
    version: PolicyVersion
    digest: str
    canary: Completion | None


class Generated(Message, frozen=True, kw_only=True):
    completion: Completion


class Seen(Message, frozen=True, kw_only=True):
    under_way: tuple[UnderWay, ...] = ()
    durations: tuple[float, ...] = ()
    finished: int = 0
    generated_tokens: int = 0


class Answer(Message, frozen=True, kw_only=True):
    call: int
    value: Done | Loaded | Generated | Seen | Failure
    suspended: bool
    """Whether it is the learner's turn at this moment."""


# -- what is said without being asked, to the child --------------------------------------------------------------------


class Work(Message, frozen=True, kw_only=True):
    """Start the workers."""


class Go(Message, frozen=True, kw_only=True):
    """Go on, or pause."""

    on: bool


class Drain(Message, frozen=True, kw_only=True):
    """Start nothing new, or go on with it."""

    on: bool


class GiveUp(Message, frozen=True, kw_only=True):
    request_id: str
    reason: str


class Reopened(Message, frozen=True, kw_only=True):
    """The engine has loaded its weights again."""

    epoch: int


class Cancel(Message, frozen=True, kw_only=True):
    """The run is ending."""


# -- … and by it -------------------------------------------------------------------------------------------------------


class Broken(Message, frozen=True, kw_only=True):
    """A worker has failed."""

    failure: Failure


class Offered(Message, frozen=True, kw_only=True):
    sample_id: int
    group_id: int
    prompt_ids: Int32s
    completion: Completion
    epoch: int


class Entered(Message, frozen=True, kw_only=True):
    """The calls of `TraceTimeline`; times on the machine's monotonic clock."""

    track: str
    activity: Activity
    cause: str
    at: float


class Left(Message, frozen=True, kw_only=True):
    track: str
    at: float


class Began(Message, frozen=True, kw_only=True):
    span: int
    track: str
    name: str
    at: float


class Ended(Message, frozen=True, kw_only=True):
    span: int
    at: float
    args: dict[str, Any]


class Recorded(Message, frozen=True, kw_only=True):
    track: str
    name: str
    began: float
    ended: float
    args: dict[str, Any]


class Added(Message, frozen=True, kw_only=True):
    track: str
    name: str
    seconds: float


ToChild = Ask | Work | Go | Drain | GiveUp | Reopened | Cancel
TimelineEvent = Entered | Left | Began | Ended | Recorded | Added
ToParent = Answer | Broken | Offered | TimelineEvent


# -- this process ------------------------------------------------------------------------------------------------------


class RolloutProcess:
    """The child and the talk with it. Thread-safe."""

    def __init__(
        self,
        config: Config,
        model: Path,
        *,
        store: StoreClient,
        location: str,
        token: str,
        timeline: TraceTimeline,
        canary: Int32s | None,
        patience: float = STORE_PATIENCE,
    ) -> None:
        """Start nothing. `location` and `token`: where the child reaches the same store; `patience`: seconds for which
        each of its calls waits for it."""
        self.process: subprocess.Popen[bytes] | None = None
        self.suspended = False
        """As the child said last."""
        self.wake = threading.Event()
        """Something has happened to the child, or to the run."""
        self.failure: Exception | None = None
        """Why the child's workers cannot go on."""
        self.heard: float | None = None
        """When the child said something last, on the machine's monotonic clock."""
        self._start = Start(
            config=config.model_dump_json(),
            model=str(model),
            store=location,
            token=token,
            patience=patience,
            canary=canary,
        )
        self._timeline = timeline
        self._link: Link | None = None
        self._lock = threading.Lock()
        self._calls = count(1)
        self._waiting: dict[int, Future[Any]] = {}
        self._spans: dict[int, Any] = {}
        self._end: str | None = "the rollout engine is not running: start it first"
        self._seen = Seen()
        self._fresh = _Fresh(config.attestation.samples, self.tell)
        worker = RemoteRollouts(self, store)
        assert config.rollout.timeout is not None, "a plan derives it"
        host = RemoteHost(self, canary, config.rollout.timeout)
        self.side = RolloutSide(host=host, worker=worker, rollouts=worker, fresh=self._fresh)

    def start(self) -> None:
        """Start the child, and the engine in it. Raises what the engine raises, EngineError when it takes too long."""
        ours, theirs = socket.socketpair()
        with theirs:
            # A session of its own: Ctrl-C is for this process, which then stops the child in order.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "asyncflow.runtime.rollout_child", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._link, self._end = Link(ours, ToParent, "rollout"), None
        threading.Thread(target=self._listen, args=(self._link,), name="rollout-listener", daemon=True).start()
        self.result(self.ask(self._start), START_TIMEOUT, "start")

    def ask(self, request: Any) -> Future[Any]:
        """The answer, or what the child raised; EngineError when it ends before."""
        answer: Future[Any] = Future()
        with self._lock:
            if self._end is not None or self._link is None:
                answer.set_exception(EngineError(str(self._end)))
                return answer
            call = next(self._calls)
            self._waiting[call] = answer
            self._link.send(Ask(call=call, request=request))
        return answer

    def result(self, answer: Future[Any], timeout: float, what: str) -> Any:
        """Of an `ask`, with some time more than the child has. Raises EngineError when it takes longer."""
        try:
            return answer.result(timeout + LATER)
        except FutureTimeout:
            if answer.done():
                raise
            raise EngineError(f"the process of {ENGINE} did not {what} within {timeout:.0f} s") from None

    def tell(self, message: Message) -> None:
        """Without an answer. Nothing happens when there is no child."""
        if (link := self._link) is not None:
            link.send(message)

    @property
    def gone(self) -> bool:
        """Whether there is no child, or none any more."""
        return self._end is not None

    def look(self) -> Seen:
        """What is under way in the child; what was seen last when it does not answer."""
        with suppress(EngineError, FutureTimeout):
            self._seen = self.ask(Look()).result(LOOK_TIMEOUT)
        return self._seen

    @property
    def seen(self) -> Seen:
        """What the last `look` has seen."""
        return self._seen

    def stop(self) -> None:
        """Stop the engine and see to it that the child is gone. May be called twice."""
        process, self.process = self.process, None
        if process is None:
            return
        try:
            with suppress(Exception):  # it has ended already, or cannot any more: then it is made to
                self.ask(Stop()).result(STOP_TIMEOUT + LATER)
        finally:
            if self._link is not None:
                self._link.close()  # the end of file for which the child waits
            try:
                process.wait(LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _listen(self, link: Link) -> None:
        end = "the process of the rollout engine has ended: its log above says why"
        try:
            for message in link.receive():
                self.heard = time.monotonic()
                self._hear(message)
        except Exception as error:
            logger.debug("what the rollout process says", exc_info=error)
            end = f"the process of the rollout engine said what cannot be understood: {error}"
        with self._lock:
            self._end = end
            waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer.set_exception(EngineError(end))
        self._fail(EngineError(end))

    def _hear(self, message: Any) -> None:
        match message:
            case Answer():
                self.suspended = message.suspended
                with self._lock:
                    answer = self._waiting.pop(message.call)
                if isinstance(message.value, Failure):
                    answer.set_exception(message.value.as_error())
                else:
                    answer.set_result(message.value)
            case Broken():
                self._fail(message.failure.as_error())
            case Offered():
                self._fresh.offer(
                    message.sample_id, message.group_id, message.prompt_ids, message.completion, epoch=message.epoch
                )
            case _:
                self._tell(message)

    def _tell(self, event: TimelineEvent) -> None:
        timeline = self._timeline
        match event:
            case Entered():
                timeline.entered(event.track, event.activity, event.cause, event.at)
            case Left():
                timeline.left(event.track, event.at)
            case Began():
                self._spans[event.span] = timeline.began(event.track, event.name, event.at)
            case Ended():
                timeline.ended(self._spans.pop(event.span), event.at, event.args)
            case Recorded():
                timeline.recorded(event.track, event.name, event.began, event.ended, event.args)
            case Added():
                timeline.add(event.track, event.name, event.seconds)

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error
        self.wake.set()


class _Fresh(FreshSamples):
    """Those of another process, which has to know what they say nothing about."""

    def __init__(self, capacity: int, tell: Callable[[Message], None]) -> None:
        super().__init__(capacity)
        self._tell = tell

    def reopen(self) -> None:
        super().reopen()
        self._tell(Reopened(epoch=self.epoch))


class RemoteHost:
    """Implements `Host`: the `EngineHost` of the child."""

    name = ENGINE

    def __init__(self, process: RolloutProcess, canary: Int32s | None, rollout_timeout: float) -> None:
        self._process = process
        self._prompt = canary
        self._rollout_timeout = rollout_timeout
        self.canary: tuple[Int32s, Completion] | None = None

    @property
    def finished(self) -> int:
        """When the child was looked at last."""
        return self._process.seen.finished

    @property
    def suspended(self) -> bool:
        return self._process.suspended

    def start(self) -> None:
        self._process.start()

    def submit(self, request: GenerationRequest) -> Future[Completion]:
        made: Future[Completion] = Future()

        def done(answer: Future[Generated]) -> None:
            if not made.set_running_or_notify_cancel():
                return  # nobody wants it any more
            if (error := answer.exception()) is not None:
                made.set_exception(error)
            else:
                made.set_result(answer.result().completion)

        self._process.ask(Generate(request=request)).add_done_callback(done)
        return made

    def durations(self) -> list[float]:
        """When the child was looked at last."""
        return list(self._process.seen.durations)

    def load(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served:
        request = Load(version=snapshot.version, digest=snapshot.digest, path=str(snapshot.path), mode=mode)
        what = f"load version {snapshot.version}"
        loaded: Loaded = self._process.result(
            self._process.ask(request), load_timeout(mode, self._rollout_timeout), what
        )
        if loaded.canary is not None and self._prompt is not None:
            self.canary = self._prompt, loaded.canary
        return Served(version=loaded.version, digest=loaded.digest)

    def suspend(self) -> None:
        self._process.result(self._process.ask(Suspend()), TURN_TIMEOUT, "finish what it was generating")

    @contextmanager
    def turn_when_idle(self) -> Iterator[None]:
        self._process.result(self._process.ask(BeginTurn()), TURN_TIMEOUT, "become idle")
        try:
            yield
        finally:
            self._process.result(self._process.ask(EndTurn()), TURN_TIMEOUT, "resume")

    def cancel(self) -> None:
        self._process.tell(Cancel())
        self._process.wake.set()

    def stop(self) -> None:
        self._process.stop()


class RemoteRollouts(Worker):
    """The `RolloutWorker` of the child: it is told to begin, to pause, and to end. Waits for its failure."""

    name = "rollout"

    def __init__(self, process: RolloutProcess, store: StoreClient) -> None:
        self._process = process
        self._store = store

    @property
    def generated_tokens(self) -> int:
        return self._process.look().generated_tokens

    def under_way(self) -> list[UnderWay]:
        return list(self._process.look().under_way)

    def give_up(self, request_id: str, reason: str) -> None:
        self._process.tell(GiveUp(request_id=request_id, reason=reason))

    def run(self, stopping: threading.Event, going: threading.Event | None = None) -> None:
        """See `Worker`."""
        self._process.tell(Work())
        on, drained = True, False
        while not stopping.is_set():
            self.beat = self._process.heard
            if self.drained is not drained:
                drained = self.drained
                self._process.tell(Drain(on=drained))
            if going is not None and going.is_set() is not on:
                on = going.is_set()
                self._process.tell(Go(on=on))
            self.turn()
        self._process.result(self._process.ask(Rest()), TURN_TIMEOUT, "end its workers")

    def turn(self) -> None:
        self._process.wake.wait(PATIENCE)
        if (failure := self._process.failure) is not None:
            if self._process.gone:
                self._store.gone(self.name)  # its rows would wait for the end of its leases
            raise failure
