"""A rollout engine in a process of its own: what it does for every token does not take turns with the learner.

Python lets one thread of a process run at a time. An engine whose front end handles every token (vLLM's does, about
40 µs each) would stop the learner, which is in the same process, for as long; here only whole completions pass.

    this process                                      child
    ProcessEngine ── requests, weights' paths ──────► Child ── the engine that `rollout.engine` names
                  ◄── completions, answers, errors ──

Both ends of a socket pair send messages of msgpack with their length in front. Who is killed leaves the other one with
an end of file: a child whose parent is gone stops its engine and ends.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from asyncflow import errors
from asyncflow.config import Config
from asyncflow.engines.base import Capabilities, GenerationRequest, RolloutEngine, Served, WeightSnapshot
from asyncflow.engines.registry import rollout_class
from asyncflow.engines.weights.channel import PublishedWeights
from asyncflow.errors import AsyncFlowError, EngineError
from asyncflow.types import Completion, FinishReason, PolicyVersion, Sampling, UpdateMode

STOP_SECONDS = 720.0
"""Deadline for the engine to stop, in the middle of its start if need be …"""
LEAVE_SECONDS = 60.0
"""… and for the child to leave then; after that it is killed."""
LENGTH = struct.Struct("<I")


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages; an answer has the number of the call that it answers."""

    call: int


class Start(Message, frozen=True, kw_only=True):
    config: str
    """JSON."""
    model: str


class Control(Message, frozen=True, kw_only=True):
    what: Literal["sleep", "wake", "stop"]


class Cancel(Message, frozen=True, kw_only=True):
    """Whoever made this call does not wait for it any more."""


class Generate(Message, frozen=True, kw_only=True):
    request_id: str
    prompt_ids: bytes
    """int32"""
    sampling: Sampling


class Load(Message, frozen=True, kw_only=True):
    version: int
    digest: str
    path: str
    mode: UpdateMode


class Done(Message, frozen=True, kw_only=True):
    pass


class Failed(Message, frozen=True, kw_only=True):
    error: str
    """Name of a class in `asyncflow.errors`, or of another one."""
    text: str


class Completed(Message, frozen=True, kw_only=True):
    token_ids: bytes
    """int32"""
    logprobs: bytes
    """float32"""
    token_versions: bytes
    """int64"""
    text: str
    finish_reason: FinishReason


class Loaded(Message, frozen=True, kw_only=True):
    version: int
    digest: str


_TO_CHILD = msgspec.msgpack.Decoder(Start | Control | Cancel | Generate | Load)
_TO_PARENT = msgspec.msgpack.Decoder(Done | Failed | Completed | Loaded)
_ENCODER = msgspec.msgpack.Encoder()


def _send(writer: asyncio.StreamWriter, message: Message) -> None:
    body = _ENCODER.encode(message)
    writer.write(LENGTH.pack(len(body)) + body)


async def _receive(reader: asyncio.StreamReader) -> bytes | None:
    """The next message; None when there is nobody any more who could send one."""
    try:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


class ProcessEngine(RolloutEngine):
    """The engine that a configuration names, in a child."""

    def __init__(self, config: Config, model: Path, capabilities: Capabilities) -> None:
        """Start nothing. `capabilities` are those of the engine."""
        self.capabilities = capabilities  # type: ignore[misc]  # other classes declare their own, this one has them
        self._config = config
        self._model = model
        self._calls = count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._listener: asyncio.Task[None] | None = None
        self._end = "the engine is not running: start it first"

    async def start(self) -> None:
        """Start the child, and the engine in it. Raises what the engine raises."""
        ours, theirs = socket.socketpair()
        with theirs:
            # A session of its own: Ctrl-C is for this process, which then stops the child in order.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "asyncflow.engines.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._listener = asyncio.create_task(self._listen(reader))
        config, model = self._config.model_dump_json(), str(self._model)
        await self._ask(lambda call: Start(call=call, config=config, model=model))

    async def generate(self, request: GenerationRequest) -> Completion:
        """Complete one prompt. When the caller is cancelled, the request leaves the engine."""
        prompt_ids = np.ascontiguousarray(request.prompt_ids, np.int32).tobytes()
        made: Completed = await self._ask(
            lambda call: Generate(
                call=call, request_id=request.request_id, prompt_ids=prompt_ids, sampling=request.sampling
            )
        )
        return Completion(
            token_ids=np.frombuffer(made.token_ids, np.int32),
            logprobs=np.frombuffer(made.logprobs, np.float32),
            token_versions=np.frombuffer(made.token_versions, np.int64),
            text=made.text,
            finish_reason=made.finish_reason,
        )

    async def load_weights(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served:
        version, path = snapshot.version.packed, str(snapshot.path)
        loaded: Loaded = await self._ask(
            lambda call: Load(call=call, version=version, digest=snapshot.digest, path=path, mode=mode)
        )
        return Served(version=PolicyVersion.unpack(loaded.version), digest=loaded.digest)

    async def sleep(self) -> None:
        await self._ask(lambda call: Control(call=call, what="sleep"))

    async def wake(self) -> None:
        await self._ask(lambda call: Control(call=call, what="wake"))

    async def stop(self) -> None:
        """Stop the engine and see to it that the child is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            with suppress(Exception):  # it has ended already, or cannot any more: then it is made to
                async with asyncio.timeout(STOP_SECONDS):
                    await self._ask(lambda call: Control(call=call, what="stop"))
        finally:
            if self._writer is not None:
                self._writer.close()  # the end of file for which the child waits
            await asyncio.to_thread(_leave, process)
            if self._listener is not None:
                await self._listener

    async def _ask(self, message: Callable[[int], Message]) -> Any:
        """The child's answer. Raises what it answers, and EngineError when it ends before."""
        if self._writer is None or self._listener is None or self._listener.done():
            raise EngineError(self._end)
        call = next(self._calls)
        answer = self._waiting[call] = asyncio.get_running_loop().create_future()
        try:
            _send(self._writer, message(call))
            return await answer
        except asyncio.CancelledError:
            _send(self._writer, Cancel(call=call))
            raise
        finally:
            del self._waiting[call]

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        self._end = "the process of the engine has ended: its log above says why"
        try:
            await self._hand_out(reader)
        except msgspec.MsgspecError as error:
            self._end = f"the engine gave an answer that cannot be read: {error}"
        finally:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(EngineError(self._end))

    async def _hand_out(self, reader: asyncio.StreamReader) -> None:
        while (body := await _receive(reader)) is not None:
            message = _TO_PARENT.decode(body)
            waiting = self._waiting.get(message.call)
            if waiting is None or waiting.done():
                continue  # cancelled meanwhile
            if isinstance(message, Failed):
                waiting.set_exception(_error(message))
            else:
                waiting.set_result(message)


def _error(failed: Failed) -> Exception:
    """What the engine raised; an error that is none of ours is a failure of one sample, as in this process."""
    kind = getattr(errors, failed.error, None)
    if isinstance(kind, type) and issubclass(kind, AsyncFlowError):
        return kind(failed.text)
    return RuntimeError(f"{failed.error}: {failed.text}")


def _leave(process: subprocess.Popen[bytes]) -> None:
    """Wait for the child to leave by itself, or see to it."""
    try:
        process.wait(LEAVE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# -- the child ---------------------------------------------------------------------------------------------------------


class Child:
    """The engine, for the process at the other end of a connection."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._engine: RolloutEngine | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Do what is asked until there is nobody any more, then stop the engine."""
        while (body := await _receive(reader)) is not None:
            message = _TO_CHILD.decode(body)
            if not isinstance(message, Cancel):
                self._tasks[message.call] = asyncio.create_task(self._answer(message))
            elif (task := self._tasks.get(message.call)) is not None:
                task.cancel()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._engine is not None:
            await self._engine.stop()

    async def _answer(self, message: Start | Control | Generate | Load) -> None:
        try:
            match message:
                case Start():
                    answer = await self._start(message)
                case Generate():
                    answer = await self._generate(message)
                case Load():
                    answer = await self._load(message)
                case Control():
                    await getattr(self._started, message.what)()
                    answer = Done(call=message.call)
            _send(self._writer, answer)
        except Exception as error:
            text = str(error).encode(errors="replace").decode()
            _send(self._writer, Failed(call=message.call, error=type(error).__name__, text=text))
        finally:
            del self._tasks[message.call]

    @property
    def _started(self) -> RolloutEngine:
        assert self._engine is not None, "the first message is Start"
        return self._engine

    async def _start(self, message: Start) -> Message:
        config = Config.model_validate_json(message.config)
        if config.rollout.cores is not None:
            os.sched_setaffinity(0, config.rollout.cores)
        self._engine = rollout_class(config.rollout.engine).from_config(config, Path(message.model))
        await self._engine.start()
        return Done(call=message.call)

    async def _generate(self, message: Generate) -> Message:
        made = await self._started.generate(
            GenerationRequest(
                request_id=message.request_id,
                prompt_ids=np.frombuffer(message.prompt_ids, np.int32),
                sampling=message.sampling,
            )
        )
        return Completed(
            call=message.call,
            token_ids=np.asarray(made.token_ids, np.int32).tobytes(),
            logprobs=np.asarray(made.logprobs, np.float32).tobytes(),
            token_versions=np.asarray(made.token_versions, np.int64).tobytes(),
            text=made.text,
            finish_reason=made.finish_reason,
        )

    async def _load(self, message: Load) -> Message:
        path = Path(message.path)
        version = PolicyVersion.unpack(message.version)
        snapshot = PublishedWeights(version=version, digest=message.digest, path=path, nbytes=path.stat().st_size)
        served = await self._started.load_weights(snapshot, message.mode)
        return Loaded(call=message.call, version=served.version.packed, digest=served.digest)


async def main(connection: socket.socket) -> None:
    """The child's whole life."""
    reader, writer = await asyncio.open_connection(sock=connection)
    await Child(writer).serve(reader)
    writer.close()


if __name__ == "__main__":
    asyncio.run(main(socket.socket(fileno=int(sys.argv[1]))))
