"""Work that keeps an engine and a learner busy while something else is measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count, cycle, islice
from typing import Self

import numpy as np
import torch

from asyncflow.data import tokenise
from asyncflow.engines.base import GenerationRequest, LearnerEngine, OptimStats
from asyncflow.errors import EngineError
from asyncflow.placement import pinned
from asyncflow.plan import Plan
from asyncflow.types import Completion, Sampling, TrainSample
from asyncflow.workers.host import EngineHost

PROMPTS = 256
SAMPLES = 16
"""Of a batch that the learner trains: two groups."""


class Generating:
    """Keeps a number of sequences in an engine: when one ends, the next is asked for. Counts tokens of ended ones."""

    def __init__(self, host: EngineHost, ready: Plan, *, sequences: int) -> None:
        self.tokens = 0
        self._host = host
        self._sequences = sequences
        prompts = islice(cycle(ready.problems.train), PROMPTS)
        self._prompts = cycle([tokenise(prompt, ready.tokenizer) for prompt in prompts])
        self._sampling = Sampling(max_new_tokens=ready.config.max_new_tokens, temperature=ready.config.temperature)
        self._ids = count()
        self._changed = threading.Condition()
        self._running = 0
        self._stopping = False
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        for _ in range(self._sequences):
            self._ask()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until what runs has ended."""
        with self._changed:
            self._stopping = True
            self._changed.wait_for(lambda: not self._running, 600)

    def wait_for(self, tokens: int) -> None:
        """Wait until so many more tokens have been generated. Raises EngineError when generation fails or hangs."""
        with self._changed:
            goal = self.tokens + tokens
            came = self._changed.wait_for(lambda: self.tokens >= goal or self._failure is not None, 600)
        if self._failure is not None or not came:
            raise EngineError(f"generation does not go on: {self._failure or 'nothing came for 600 s'}")

    def rate(self, seconds: float) -> float:
        """Tokens a second over the next `seconds`."""
        tokens, began = self.tokens, time.perf_counter()
        threading.Event().wait(seconds)
        self.wait_for(0)
        return (self.tokens - tokens) / (time.perf_counter() - began)

    def _ask(self) -> None:
        with self._changed:
            request = GenerationRequest(
                request_id=f"load-{next(self._ids)}", prompt_ids=next(self._prompts), sampling=self._sampling
            )
            self._running += 1
        self._host.submit(request).add_done_callback(self._ended)

    def _ended(self, done: Future[Completion]) -> None:
        with self._changed:
            self._running -= 1
            error = None if done.cancelled() else done.exception()
            if error is None and not done.cancelled():
                self.tokens += len(done.result().token_ids)
            self._failure = self._failure or error
            again = not self._stopping and self._failure is None
            self._changed.notify_all()
        if again:
            self._ask()


class Training:
    """A learner with batches that never end: random tokens, whose values do not matter for speed."""

    def __init__(self, learner: LearnerEngine, ready: Plan) -> None:
        self.passes = 0
        self._learner = learner
        group, response = ready.config.num_generations, ready.config.max_new_tokens
        prompt = len(tokenise(ready.problems.train[0], ready.tokenizer))
        random = np.random.default_rng(0)
        prompts = [random.integers(5, ready.info.vocab, prompt, dtype=np.int32) for _ in range(SAMPLES // group + 1)]
        self._batch = [
            TrainSample(
                sample_id=number,
                group_id=number // group,
                prompt_ids=prompts[number // group],
                response_ids=random.integers(5, ready.info.vocab, response, dtype=np.int32),
                mask=np.ones(response, dtype=np.bool_),
                behaviour_logprobs=np.full(response, -5.0, dtype=np.float32),
                advantages=np.full(response, 0.1 * (-1) ** number, dtype=np.float32),
            )
            for number in range(SAMPLES)
        ]

    def go_on(self) -> None:
        """One forward and backward pass."""
        self._learner.forward_backward(self._batch)
        self.passes += 1

    def update(self) -> OptimStats:
        """An optimizer update with what has been accumulated."""
        return self._learner.optim_step(sum(len(sample.response_ids) for sample in self._batch))

    @contextmanager
    def beside(self, cores: tuple[int, ...] | None, threads: int) -> Iterator[None]:
        """Train without a pause in a thread of its own, on these cores, until the block ends."""
        stopping = threading.Event()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                with pinned(cores):
                    torch.set_num_threads(threads)
                    while not stopping.is_set():
                        self.go_on()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work, name="busy learner", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join(600)
        if failures:
            raise failures[0]
