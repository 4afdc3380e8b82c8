"""Accuracy on held-out problems, before, after and while a run goes on, with the engine that does the rollouts."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence

from asyncflow.engines.base import GenerationRequest
from asyncflow.errors import EngineError, RewardTimeout
from asyncflow.rewards import Reward, RewardFailure, RewardInput, RewardOutput
from asyncflow.types import Int32s, PolicyVersion, Prompt, Recorder, Sampling, Timeline
from asyncflow.workers.base import PATIENCE, Worker
from asyncflow.workers.host import Host

logger = logging.getLogger(__name__)

GENERATE_TIMEOUT = 1800.0
"""Seconds that all held-out problems together may take."""


class Evaluator(Worker):
    """Consumes served versions, produces accuracies. Waits for a version that somebody asks for."""

    name = "evaluator"

    def __init__(
        self,
        host: Host,
        problems: Sequence[Prompt],
        tokenise: Callable[[Prompt], Int32s],
        *,
        reward: Reward,
        sampling: Sampling,
        recorder: Recorder,
        timeline: Timeline,
        every: int,
        since: int = 0,
    ) -> None:
        """`every`: steps between two evaluations that `served` asks for; 0 is never. `since`: step of the last one."""
        self._host = host
        self._problems = problems
        self._tokenise = tokenise
        self._reward = reward
        self._sampling = sampling
        self._recorder = recorder
        self._timeline = timeline
        self._every = every
        self._due = (since // every + 1) * every if every else 0
        self._asked: queue.SimpleQueue[PolicyVersion] = queue.SimpleQueue()

    def served(self, version: PolicyVersion) -> None:
        """An engine serves a new version: evaluate it in the background, when it is time.

        An engine may pass over a version, so it is time at the first one that is not before a multiple of `every`.
        """
        if self._every and version.n >= self._due:
            self._due = (version.n // self._every + 1) * self._every
            self._asked.put(version)

    def turn(self) -> None:
        try:
            version = self._asked.get(timeout=PATIENCE)
        except queue.Empty:
            return
        self.evaluate(version.n)

    def evaluate(self, step: int) -> float | None:
        """Share of the held-out problems that are solved: the first reward function gives at least 1.

        None without held-out problems. A problem whose completion cannot be scored counts as not solved. While the run
        goes on, later problems may meet newer weights: the versions that took part are recorded.
        """
        if not self._problems:
            return None
        self._timeline.enter(self.name, "busy")
        try:
            return self._evaluate(step)
        finally:
            self._timeline.leave(self.name)

    def _evaluate(self, step: int) -> float:
        began = time.monotonic()
        futures = [
            self._host.submit(
                GenerationRequest(
                    request_id=f"eval-{step}-{index}", prompt_ids=self._tokenise(problem), sampling=self._sampling
                )
            )
            for index, problem in enumerate(self._problems)
        ]
        deadline = began + GENERATE_TIMEOUT
        try:
            completions = [future.result(max(0.0, deadline - time.monotonic())) for future in futures]
        except TimeoutError:
            raise EngineError(
                f"the {len(futures)} held-out problems were not completed within {GENERATE_TIMEOUT:.0f} s"
            ) from None
        results = self._score(
            [
                RewardInput(prompt=problem, completion=completion.text, completion_ids=completion.token_ids)
                for problem, completion in zip(self._problems, completions, strict=True)
            ]
        )
        failed = [result.reason for result in results if isinstance(result, RewardFailure)]
        if failed:
            logger.warning("%d of %d held-out problems could not be scored: %s", len(failed), len(results), failed[0])
        outputs = [result for result in results if not isinstance(result, RewardFailure)]
        first = self._reward.names[0]
        solved = sum((output.parts[first] or 0.0) >= 1.0 for output in outputs)
        accuracy = solved / len(results)
        self._recorder.log(
            "eval",
            {
                "step": step,
                "eval/accuracy": accuracy,
                "eval/reward": sum(output.reward for output in outputs) / len(results),
                "eval/size": len(results),
                "eval/failed": len(failed),
                "eval/seconds": time.monotonic() - began,
                "versions": sorted(
                    {str(PolicyVersion.unpack(v)) for completion in completions for v in completion.token_versions}
                ),
            },
        )
        return accuracy

    def _score(self, batch: Sequence[RewardInput]) -> list[RewardOutput | RewardFailure]:
        """Score all of them together; when that takes too long, one by one."""
        try:
            return self._reward.score(batch)
        except RewardTimeout as error:
            if len(batch) == 1:
                return [RewardFailure(reason=str(error))]
            return [result for one in batch for result in self._score([one])]
