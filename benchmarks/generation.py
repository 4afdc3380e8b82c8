"""What cores are worth: vLLM alone and beside a busy learner, with cores of its own and without.

    asyncflow bench generation [--model smollm2-135m] [--rounds 3] [--seconds 8] [--json FILE]

`pinned` is what a run does: engine and learner have a core each (`asyncflow.placement`). `unpinned` lets both use all
cores, with as many threads each, which is what happens when nobody divides them. In turns: the engine alone, then the
same beside a learner that trains without a pause. Generated tokens a second, and passes of the learner a second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from asyncflow.engines.registry import learner_class, rollout_class
from asyncflow.launch import resolve
from asyncflow.placement import pinned
from asyncflow.plan import Plan, plan
from asyncflow.runtime.timeline import NoTimeline
from asyncflow.workers.host import EngineHost
from benchmarks.load import Generating, Training
from benchmarks.machine import machine, spread, write_json
from benchmarks.weights import MODELS

SEQUENCES = 64


def measure(ready: Plan, *, rounds: int, seconds: float) -> list[dict[str, float]]:
    """Rates of one placement, alone and beside a learner in turns."""
    cores = ready.config.learner.cores
    threads = len(cores or os.sched_getaffinity(0))
    with pinned(cores):
        torch.set_num_threads(threads)
        training = Training(ready.make_learner(), ready)
        host = EngineHost(ready.make_rollout(), "bench", NoTimeline())
        try:
            host.start()
            with Generating(host, ready, sequences=SEQUENCES) as generating:
                generating.wait_for(2 * SEQUENCES)
                measured = []
                for _ in range(rounds):
                    alone = generating.rate(seconds)
                    with training.beside(cores, threads):
                        passes, began = training.passes, time.perf_counter()
                        beside = generating.rate(seconds)
                        learner = (training.passes - passes) / (time.perf_counter() - began)
                    measured.append({"alone_tok_per_s": alone, "beside_tok_per_s": beside, "passes_per_s": learner})
        finally:
            host.stop()
    return measured


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write the JSON file and return what is in it."""
    parser = argparse.ArgumentParser(
        prog="asyncflow bench generation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = {"benchmark": "generation", "machine": machine(), "model": arguments.model, "rounds": {}}
    for placement in ("pinned", "unpinned"):
        values = {"name": "generation", "model": arguments.model, "steps": 1, **MODELS[arguments.model]}
        ready = plan(resolve(values, [*arguments.overrides, f"rollout.max_concurrency={SEQUENCES}"]))
        if placement == "unpinned":
            ready = unpinned(ready)
        rounds = result["rounds"][placement] = measure(ready, rounds=arguments.rounds, seconds=arguments.seconds)
        kept = [one["beside_tok_per_s"] / one["alone_tok_per_s"] for one in rounds]
        for key in rounds[0]:
            result[f"{placement}_{key}"] = statistics.median(one[key] for one in rounds)
        result[f"{placement}_kept_beside_a_learner"] = spread(kept)
        print(
            f"{placement:>9}: alone {result[f'{placement}_alone_tok_per_s']:.0f} tokens/s, "
            f"beside a learner {result[f'{placement}_beside_tok_per_s']:.0f} ({statistics.median(kept):.0%}), "
            f"learner {result[f'{placement}_passes_per_s']:.2f} passes/s",
            flush=True,
        )
        write_json(result, arguments.json)
    return result


def unpinned(ready: Plan) -> Plan:
    """The same plan with nobody's cores named, on both sides."""
    config = ready.config.model_copy(
        update={side: getattr(ready.config, side).model_copy(update={"cores": None}) for side in ("rollout", "learner")}
    )
    return replace(
        ready,
        config=config,
        make_rollout=lambda: rollout_class(config.rollout.engine).from_config(config, ready.model),
        make_learner=lambda: learner_class(config.learner.engine).from_config(config, ready.model),
    )


if __name__ == "__main__":
    main()
