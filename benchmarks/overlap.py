"""What asynchrony gains: the same model, data, seeds and steps, trained in several modes that take turns.

    asyncflow bench overlap [--workload balanced] [--rounds 3] [--steps 8] [--json FILE] [--set KEY=VALUE]

Every run is a whole one, with real engines, through `asyncflow.launch`: vLLM on one core, the torch learner on another.
The modes differ in these settings and in nothing else:

    sync             max_staleness 0, stream false: generate a step, train it, publish, and so on
    colocated_sync   the same on one set of cores: each stage has all of them while it is its turn
    streaming_sync   max_staleness 0, but a group is trained as soon as it is scored: no sample is stale
    one_step         max_staleness 1, stream false: the next step is generated while this one is trained
    async            max_staleness 2, groups trained as they come, new weights at a boundary
    in_flight        the same with new weights in the middle of sequences

The model is a Llama with random weights that this file makes, with the tokenizer of `tiny`; the task is to write digits
(`digit_share`). Every group is trained (`zero_variance: keep`). Lengths are what such a model samples: it ends a
sequence with about 1 token in 128, so they are geometric and cut at `max_new_tokens`. The learning rate is so small
that lengths stay what they are, and all modes do the same work. How long the stages take is set by what a user can set
(size of the model, batch, lengths, sequences at once), never by sleeping.

A run counts `--steps` steps between two commits, after `WARM_UP` steps and before the last `TAIL`, in which nothing is
generated any more. Stage times are those of `sync`, per counted step: T_train is forward, backward, optimizer, commit
and publication; T_gen is the rest of the step: bringing the weights into the engine, generation until its longest
sequence has ended, and scoring. `ideal` is 1/max(T_gen, T_train): both stages at once, none waiting. Continuous
generation may come out above it, because an engine that is never drained has no tail of few long sequences.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncflow.engines.models import resolve_model
from asyncflow.errors import RunFailed
from asyncflow.launch import launch, resolve
from asyncflow.plan import plan
from asyncflow.report.audit import audit
from asyncflow.rundir import METRICS
from asyncflow.runtime.metrics import read_metrics
from benchmarks.machine import machine, spread, write_json

WARM_UP = 4
"""Steps before those that are counted: first use of everything, and the pipeline fills."""
TAIL = 3
"""Steps after them: the last `max_staleness` + 1, while which the engine has nothing left to do."""

MODES: Mapping[str, tuple[str, ...]] = {
    "sync": ("max_staleness=0", "stream=false"),
    "colocated_sync": ("max_staleness=0", "placement=colocated"),
    "streaming_sync": ("max_staleness=0",),
    "one_step": ("max_staleness=1", "stream=false"),
    "async": ("max_staleness=2",),
    "in_flight": ("max_staleness=2", "weights.update=in_flight"),
}
ASYNCHRONOUS = ("one_step", "async", "in_flight")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A task whose two stages take a certain time."""

    title: str
    prefix: str
    """Of its keys in the JSON file."""
    hidden: int
    layers: int
    """Of the Llama."""
    settings: Mapping[str, Any]


COMMON: Mapping[str, Any] = {
    "name": "overlap",
    "data": {"train": "reasoning_gym:chain_sum", "size": 2000},
    "reward": "digit_share",
    "num_generations": 8,
    "learning_rate": 1.0e-6,
    "zero_variance": "keep",
    "seed": 1,
}

WORKLOADS: Mapping[str, Workload] = {
    "balanced": Workload(
        title="both stages take about the same time",
        prefix="",
        hidden=128,
        layers=4,
        settings={"train_batch_size": 64, "max_new_tokens": 192, "rollout": {"max_concurrency": 64}},
    ),
    "gen-bound": Workload(
        title="generation takes about three times as long: a smaller model, few sequences at once",
        prefix="gen_bound_",
        hidden=64,
        layers=2,
        settings={"train_batch_size": 32, "max_new_tokens": 192, "rollout": {"max_concurrency": 8}},
    ),
    "train-bound": Workload(
        title="training takes about three times as long: three epochs a step",
        prefix="train_bound_",
        hidden=128,
        layers=4,
        settings={
            "train_batch_size": 64,
            "max_new_tokens": 96,
            "epochs_per_step": 3,
            "rollout": {"max_concurrency": 48},
        },
    ),
}


def make_model(folder: Path, *, hidden: int, layers: int) -> None:
    """A Llama with seeded random weights and the tokenizer of `tiny`, in Hugging Face format."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = resolve_model("tiny")
    config = LlamaConfig.from_pretrained(tiny)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = hidden, 2 * hidden, layers
    config.num_attention_heads = config.num_key_value_heads = hidden // 32
    config.head_dim = 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in tiny.iterdir():
        if "token" in file.name or file.name == "chat_template.jinja":
            shutil.copy(file, folder)


def settings_of(workload: Workload, *, model: str, counted: int, run_dir: Path) -> dict[str, Any]:
    """The configuration of a run, without what its mode sets."""
    steps = WARM_UP + counted + TAIL
    return {**COMMON, **workload.settings, "model": model, "steps": steps, "run_dir": str(run_dir)}


def measure(values: Mapping[str, Any], overrides: Sequence[str], *, counted: int) -> dict[str, Any]:
    """One run. Raises RunFailed when it does not end well or its ledger is not sound."""
    commits: dict[int, float] = {}

    def listen(line: Mapping[str, Any]) -> None:
        if line["kind"] == "step":
            commits[line["step"]] = time.perf_counter()

    load = os.getloadavg()
    run = launch(plan(resolve(values, overrides)), listeners=[listen])
    if run.summary.outcome == "stopped":
        raise KeyboardInterrupt
    if run.summary.outcome != "finished":
        raise RunFailed(f"a run with {', '.join(overrides)} failed: {run.summary.reason}") from run.error
    account = audit(run.run_dir)
    if not account.ok:
        raise RunFailed(f"a run with {', '.join(overrides)} broke a promise: {account.violations[0]}")
    lines = read_metrics(run.run_dir / METRICS, "step")[WARM_UP : WARM_UP + counted]
    seconds = commits[WARM_UP + counted] - commits[WARM_UP]
    trains = [line["perf/fwd_bwd_s"] + line["perf/optim_s"] + line["perf/weight_sync_s"] for line in lines]
    return {
        "steps_per_s": counted / seconds,
        "train_s": statistics.fmean(trains),
        "rest_s": seconds / counted - statistics.fmean(trains),
        "step_s": [line["step_time"] for line in lines],
        "mean_length": statistics.fmean(line["completions/mean_length"] for line in lines),
        "truncated": statistics.fmean(line["completions/truncated_frac"] for line in lines),
        "staleness_mean": statistics.fmean(line["sample/staleness_mean"] for line in lines),
        "staleness_max": max(account.staleness),
        "samples": sum(line["samples"] + line["skipped"] for line in lines),
        "run_s": run.summary.seconds,
        "load_before": load,
        "load_after": os.getloadavg(),
    }


def summarise(workload: Workload, rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds of one workload, under its keys. A ratio is taken within a round, then the median."""
    result: dict[str, Any] = {}
    per_round: dict[str, list[float]] = {}

    def take(key: str, value: float) -> None:
        per_round.setdefault(key, []).append(value)

    for one in rounds:
        rates = {mode: float(run["steps_per_s"]) for mode, run in one.items()}
        if "sync" in one:
            generation, training = float(one["sync"]["rest_s"]), float(one["sync"]["train_s"])
            take("gen_s", generation)
            take("train_s", training)
            rates["ideal"] = 1 / max(generation, training)
        for name, rate in rates.items():
            take(f"{name}_steps_per_s", rate)
        for mode, base in itertools.product(ASYNCHRONOUS, ("sync", "colocated_sync", "streaming_sync", "ideal")):
            if mode in rates and base in rates:
                take(f"{mode}_over_{base}", rates[mode] / rates[base])
    for key, values in per_round.items():
        result[workload.prefix + key] = statistics.median(values)
    result["spread"] = {workload.prefix + key: spread(values) for key, values in per_round.items()}
    return result


def table(name: str, workload: Workload, rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """One workload for people."""
    result = summarise(workload, rounds)
    values = {key.removeprefix(workload.prefix): value for key, value in result["spread"].items()}
    lines = [f"{name}: {workload.title} ({len(rounds)} round{'s' if len(rounds) > 1 else ''})"]
    if "gen_s" in values:
        generation, training = values["gen_s"]["median"], values["train_s"]["median"]
        lines.append(f"  T_gen {generation:.3f} s, T_train {training:.3f} s, {generation / training:.2f} : 1")
    lines.append(f"  {'steps/s':>24}  {'median':>7} {'least':>7} {'most':>7}   × sync  × colocated  of ideal")
    for mode in (*MODES, "ideal"):
        if (rate := values.get(f"{mode}_steps_per_s")) is None:
            continue
        ratios = [
            f"{values[key]['median']:.2f}" if (key := f"{mode}_over_{base}") in values else ""
            for base in ("sync", "colocated_sync", "ideal")
        ]
        lines.append(
            f"  {mode:>24}  {rate['median']:7.3f} {rate['min']:7.3f} {rate['max']:7.3f}"
            f"   {ratios[0]:>6}  {ratios[1]:>11}  {ratios[2]:>8}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write the JSON file after every run, and return what is in it."""
    parser = argparse.ArgumentParser(
        prog="asyncflow bench overlap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="may be repeated; default: all")
    parser.add_argument("--mode", choices=MODES, action="append", help="may be repeated; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="of `balanced`; the others get a third, at least one")
    parser.add_argument("--steps", type=int, default=8, help="counted steps of a run")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    modes = {mode: MODES[mode] for mode in MODES if not arguments.mode or mode in arguments.mode}
    names = [name for name in WORKLOADS if not arguments.workload or name in arguments.workload]
    result: dict[str, Any] = {
        "benchmark": "overlap",
        "machine": machine(),
        "counted_steps": arguments.steps,
        "modes": {mode: list(overrides) for mode, overrides in modes.items()},
        "overrides": arguments.overrides,
        "workloads": {},
    }
    with tempfile.TemporaryDirectory(prefix="asyncflow-bench-") as folder:
        for name in names:
            workload = WORKLOADS[name]
            model = Path(folder, f"llama-{workload.hidden}x{workload.layers}")
            make_model(model, hidden=workload.hidden, layers=workload.layers)
            rounds: list[dict[str, dict[str, Any]]] = []
            for number in range(arguments.rounds if name == "balanced" else max(1, arguments.rounds // 3)):
                rounds.append({})
                for mode, settings in modes.items():
                    run_dir = Path(folder, f"{name}-{number}-{mode}")
                    values = settings_of(workload, model=str(model), counted=arguments.steps, run_dir=run_dir)
                    run = measure(values, [*settings, *arguments.overrides], counted=arguments.steps)
                    rounds[-1][mode] = run
                    print(f"  {name} round {number + 1} {mode}: {run['steps_per_s']:.3f} steps/s", flush=True)
                    shutil.rmtree(run_dir)
                    result["workloads"][name] = {
                        "hidden": workload.hidden,
                        "layers": workload.layers,
                        "settings": {**COMMON, **workload.settings},
                        "rounds": rounds,
                    }
                    summary = summarise(workload, rounds)
                    result["spread"] = result.get("spread", {}) | summary.pop("spread")
                    result |= summary
                    write_json(result, arguments.json)
            print(table(name, workload, rounds), flush=True)
    return result


if __name__ == "__main__":
    main()
