"""What new weights cost: publication and update while the engine generates and the learner trains.

    asyncflow bench weights [--model smollm2-135m] [--updates 20] [--json FILE]

32 sequences are always in flight, and the learner trains on its own core all the time. A publication (export, copy into
shared memory, digest) is what the learner waits for. An update is done by another thread: at a boundary it waits for
the running sequences (drain) and loads; in flight it pauses, loads and goes on. What generation loses to an update is
counted, not guessed: over N updates in T seconds, (T − tokens / undisturbed tokens a second) / N. The undisturbed rate
is measured before and after, and what both differ by is the error: it may come out below zero. Tokens count when their
sequence ends, which makes an error of at most one set of sequences in all.

Both are given as a share of a step: of a short real run of the same configuration, which this program makes, and for
SmolLM2-135M also of the 9.7 s that a step of the quickstart took (docs/results.md).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from asyncflow.config import Config
from asyncflow.engines.base import GenerationRequest, RolloutEngine, Served, WeightSnapshot
from asyncflow.engines.weights.channel import PublishedWeights, WeightChannel
from asyncflow.errors import RunFailed
from asyncflow.launch import launch, resolve
from asyncflow.placement import pinned
from asyncflow.plan import Plan, plan
from asyncflow.rundir import METRICS
from asyncflow.runtime.metrics import read_metrics
from asyncflow.runtime.timeline import NoTimeline
from asyncflow.types import Completion, PolicyVersion, UpdateMode
from asyncflow.workers.host import EngineHost
from benchmarks.load import Generating, Training
from benchmarks.machine import machine, spread, write_json

SEQUENCES = 32
QUICKSTART_STEP_S = 9.7
"""Median step of the quickstart, docs/results.md."""
MODES: tuple[UpdateMode, ...] = ("boundary", "in_flight")

SUMS = {
    "train": "reasoning_gym:chain_sum",
    "size": 2000,
    "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "template": "What is {expression}?",
}
MODELS: dict[str, dict[str, Any]] = {
    # What configs/quickstart.yaml sets, without its evaluation.
    "smollm2-135m": {
        "data": SUMS,
        "reward": "last_number",
        "train_batch_size": 128,
        "max_new_tokens": 24,
        "learning_rate": 1.0e-5,
        "rollout": {"max_model_len": 256},
    },
    "tiny": {
        "data": SUMS,
        "reward": "digit_share",
        "train_batch_size": 64,
        "max_new_tokens": 128,
        "learning_rate": 1.0e-5,
        "rollout": {"max_model_len": 256},
    },
}
STEP_RUN = 6
"""Steps of the short run, of which the last four count."""


class Timed(RolloutEngine):
    """Another engine, with the seconds that each `load_weights` took: a drain is not part of them."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self.load_s: list[float] = []

    async def start(self) -> None:
        await self._engine.start()

    async def generate(self, request: GenerationRequest) -> Completion:
        return await self._engine.generate(request)

    async def load_weights(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served:
        began = time.perf_counter()
        served = await self._engine.load_weights(snapshot, mode)
        self.load_s.append(time.perf_counter() - began)
        return served

    async def stop(self) -> None:
        await self._engine.stop()


class Bench:
    """An engine and a learner of one plan, both busy."""

    def __init__(self, ready: Plan, *, interval: float, undisturbed: float) -> None:
        """`interval`: seconds between two publications; `undisturbed`: seconds over which the rate is measured."""
        self._ready = ready
        self._interval = interval
        self._undisturbed = undisturbed
        self._engine = Timed(ready.make_rollout())
        self._host = EngineHost(self._engine, "bench", NoTimeline())
        self._channel = WeightChannel(keep=ready.config.weights.keep)
        self._version = PolicyVersion(n=0)

    def measure(self, updates: int) -> dict[str, Any]:
        """Everything about one model."""
        self._learner = self._ready.make_learner()
        self._training = Training(self._learner, self._ready)
        with ThreadPoolExecutor(1, thread_name_prefix="follower") as follower:
            self._follower = follower
            try:
                self._host.start()
                self._host.load(self._publish()[0], "boundary")
                with Generating(self._host, self._ready, sequences=SEQUENCES) as generating:
                    generating.wait_for(2 * SEQUENCES)
                    for mode in MODES:  # the first publications and updates pay for files and code that is new
                        self._update(generating, mode, updates=2)
                    before = self._rate(generating)
                    modes = {mode: self._update(generating, mode, updates=updates) for mode in MODES}
                    after = self._rate(generating)
            finally:
                self._host.stop()
                self._channel.close()
        rate = (before + after) / 2
        for measured in modes.values():
            measured["generation_lost_s"] = (measured["seconds"] - measured["tokens"] / rate) / updates
        return {"undisturbed_tok_per_s": [before, after], "sequences": SEQUENCES, "updates": updates, "modes": modes}

    def _rate(self, generating: Generating) -> float:
        tokens, began = generating.tokens, time.perf_counter()
        self._train_until(began + self._undisturbed)
        return (generating.tokens - tokens) / (time.perf_counter() - began)

    def _update(self, generating: Generating, mode: UpdateMode, *, updates: int) -> dict[str, Any]:
        publish_s, update_s = [], []
        self._engine.load_s.clear()
        tokens, began = generating.tokens, time.perf_counter()
        for _ in range(updates):
            start = time.perf_counter()
            self._training.go_on()
            self._training.update()
            snapshot, seconds = self._publish()
            publish_s.append(seconds)
            loading = self._follower.submit(self._load, snapshot, mode)
            self._train_until(start + self._interval)
            update_s.append(loading.result(600))
        generating.wait_for(0)
        seconds = time.perf_counter() - began
        load_s = list(self._engine.load_s)
        return {
            "publish_s": publish_s,
            "update_s": update_s,
            "load_s": load_s,
            "drain_s": [update - load for update, load in zip(update_s, load_s, strict=True)],
            "tokens": generating.tokens - tokens,
            "seconds": seconds,
        }

    def _publish(self) -> tuple[PublishedWeights, float]:
        began = time.perf_counter()
        snapshot = self._channel.publish(self._version, self._learner.export_weights())
        self._version = replace(self._version, n=self._version.n + 1)
        return snapshot, time.perf_counter() - began

    def _load(self, snapshot: PublishedWeights, mode: UpdateMode) -> float:
        began = time.perf_counter()
        self._host.load(snapshot, mode)
        return time.perf_counter() - began

    def _train_until(self, deadline: float) -> None:
        while time.perf_counter() < deadline:
            self._training.go_on()


def step_seconds(ready: Plan) -> list[float]:
    """Steps of a short run, the first ones left out. Raises RunFailed."""
    run = launch(ready)
    if run.summary.outcome == "stopped":
        raise KeyboardInterrupt
    if run.summary.outcome != "finished":
        raise RunFailed(f"the run that measures a step failed: {run.summary.reason}") from run.error
    return [float(line["step_time"]) for line in read_metrics(run.run_dir / METRICS, "step")[2:]]


def summarise(model: str, measured: dict[str, Any], steps: Sequence[float]) -> dict[str, Any]:
    """Seconds, and their share of a step."""
    references = {"measured_step": statistics.median(steps)}
    if model == "smollm2-135m":
        references["quickstart_step"] = QUICKSTART_STEP_S
    modes = {}
    for mode, one in measured["modes"].items():
        figures: dict[str, Any] = {
            name: spread(one[name]) for name in ("publish_s", "update_s", "load_s", "drain_s") if one[name]
        }
        figures["generation_lost_s"] = one["generation_lost_s"]
        for reference, step in references.items():
            figures[f"learner_exposed_share_of_{reference}"] = figures["publish_s"]["median"] / step
            figures[f"generation_exposed_share_of_{reference}"] = one["generation_lost_s"] / step
        modes[mode] = figures
    return {"step_s": references, "modes": modes}


def text(model: str, summary: dict[str, Any]) -> str:
    """One model for people."""
    steps = summary["step_s"]
    lines = [f"{model}: a step takes " + ", ".join(f"{value:.2f} s ({name})" for name, value in steps.items())]
    for mode, figures in summary["modes"].items():
        parts = [f"{name[:-2]} {1000 * figures[name]['median']:.0f} ms" for name in ("publish_s", "drain_s", "load_s")]
        parts.append(f"generation loses {1000 * figures['generation_lost_s']:.0f} ms")
        lines.append(f"  {mode:>10}: {', '.join(parts)}")
        for reference in steps:
            learner = figures[f"learner_exposed_share_of_{reference}"]
            generation = figures[f"generation_exposed_share_of_{reference}"]
            lines.append(f"              of {reference}: learner {learner:.2%}, generation {generation:.2%}")
    return "\n".join(lines)


def config_of(model: str, run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """A run of one of the models, whose configuration the measurements use too."""
    values = {"name": "weights", "model": model, "steps": STEP_RUN, "run_dir": str(run_dir), **MODELS[model]}
    return resolve(values, overrides)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write the JSON file and return what is in it."""
    parser = argparse.ArgumentParser(
        prog="asyncflow bench weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, action="append", help="may be repeated; default: all")
    parser.add_argument("--updates", type=int, default=20, help="of each mode")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two publications")
    parser.add_argument("--undisturbed", type=float, default=10.0, help="seconds over which the rate is measured")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = {"benchmark": "weights", "machine": machine(), "models": {}}
    for model in arguments.model or MODELS:
        with tempfile.TemporaryDirectory(prefix="asyncflow-bench-") as folder:
            steps = step_seconds(plan(config_of(model, Path(folder, "run"), arguments.overrides)))
            ready = plan(
                config_of(model, Path(folder, "none"), [*arguments.overrides, f"rollout.max_concurrency={SEQUENCES}"])
            )
            with pinned(ready.config.learner.cores):
                measured = Bench(ready, interval=arguments.interval, undisturbed=arguments.undisturbed).measure(
                    arguments.updates
                )
        summary = summarise(model, measured, steps)
        result["models"][model] = {**summary, "raw": measured, "raw_step_s": steps}
        print(text(model, summary), flush=True)
        write_json(result, arguments.json)
    return result


if __name__ == "__main__":
    main()
