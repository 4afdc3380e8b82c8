"""Completions for somebody outside: of the policy that is served now, without a sample in the store."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from itertools import count
from typing import Any

import numpy as np

from asyncflow.data import tokenise
from asyncflow.data.tokens import Tokenizer
from asyncflow.engines.base import GenerationRequest
from asyncflow.errors import ControlError
from asyncflow.types import Completion, Int32s, PolicyVersion, Prompt, Sampling
from asyncflow.workers.host import Host

MOST = 64
"""Completions that outsiders may have under way: beyond that they would hold the rollouts up."""
LONGEST = 600.0
"""Seconds for which somebody may wait."""


class Completions:
    """Asks the engine of a run. Thread-safe."""

    def __init__(self, host: Host, tokenizer: Tokenizer, *, context: int) -> None:
        """`context`: tokens of the longest sequence, prompt and response."""
        self._host = host
        self._tokenizer = tokenizer
        self._context = context
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._under_way = 0

    def complete(
        self,
        prompt: str | Sequence[int] | Sequence[dict[str, str]],
        *,
        n: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        timeout: float,
    ) -> dict[str, Any]:
        """`n` completions of text, tokens or chat messages; waits at most `timeout` seconds, also for new weights.

        Raises ControlError for what cannot be completed, and when that takes longer.
        """
        if not 1 <= n <= MOST:
            raise ControlError(f"{n} completions cannot be asked for at once: ask for 1 to {MOST}")
        prompt_ids = self._tokens(prompt)
        if not 1 <= max_new_tokens <= self._context - len(prompt_ids):
            raise ControlError(
                f"{len(prompt_ids)} tokens of prompt and {max_new_tokens} of response do not fit into "
                f"{self._context}: shorten the prompt, or ask for fewer (at least 1)"
            )
        deadline = time.monotonic() + min(timeout, LONGEST)
        self._begin(n)
        asked: list[Future[Completion]] = []
        try:
            for place in range(n):
                sampling = Sampling(
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    seed=None if seed is None else seed + place,
                )
                request = GenerationRequest(
                    request_id=f"outside-{next(self._numbers)}", prompt_ids=prompt_ids, sampling=sampling
                )
                asked.append(self._host.submit(request))
            made = [future.result(max(0.0, deadline - time.monotonic())) for future in asked]
        except FutureTimeout:
            raise ControlError(
                f"there was no completion within {timeout:g} s: the engine may be taking new weights, or it is the "
                "learner's turn; try again, or wait longer"
            ) from None
        except CancelledError:
            raise ControlError("the run is ending: its policy completes nothing more") from None
        except Exception as error:  # of somebody's engine, which may raise anything; the run does not need this one
            raise ControlError(f"the engine refuses this: {error or type(error).__name__}") from error
        finally:
            for future in asked:
                future.cancel()
            self._end(n)
        return {"prompt_ids": prompt_ids.tolist(), "completions": [_plain(completion) for completion in made]}

    def tokenise(self, prompts: Sequence[str | Sequence[dict[str, str]]]) -> list[list[int]]:
        """Raises ControlError for what is neither text nor messages, and DataError as `asyncflow.data.tokenise`."""
        return [self._tokens(prompt).tolist() for prompt in prompts]

    def _tokens(self, prompt: str | Sequence[int] | Sequence[dict[str, str]]) -> Int32s:
        if isinstance(prompt, str):
            return tokenise(Prompt(messages=prompt), self._tokenizer)
        messages = [part for part in prompt if isinstance(part, dict)]
        tokens = [part for part in prompt if type(part) is int and 0 <= part < 1 << 31]
        if messages and len(messages) == len(prompt):
            return tokenise(Prompt(messages=tuple(messages)), self._tokenizer)
        if tokens and len(tokens) == len(prompt):
            return np.array(tokens, np.int32)
        raise ControlError("a prompt is text, chat messages, or token ids, and not empty")

    def _begin(self, n: int) -> None:
        with self._lock:
            if self._under_way + n > MOST:
                raise ControlError(f"{MOST} completions are under way already: try again when some have ended")
            self._under_way += n

    def _end(self, n: int) -> None:
        with self._lock:
            self._under_way -= n


def _plain(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "token_ids": completion.token_ids.tolist(),
        "logprobs": [float(logprob) for logprob in completion.logprobs],
        "versions": [str(PolicyVersion.unpack(version)) for version in np.unique(completion.token_versions)],
        "finish_reason": completion.finish_reason,
    }
