"""How fast the store is, and beside it another one on the same work, taken in turns.

    asyncflow bench store [--peer transferqueue] [--only KEY,…] [--rounds 3] [--folder DIR] [--json FILE]

Finished samples: `prompt_ids` int64, U[128, 384] of them, `response_ids` int64, U[256, 768], `logprobs` float32 of the
same length, and a `reward`: 8.3 kB each; long ones have U[4096, 12288] response tokens, 103 kB. A put ends when it is
acknowledged, a get with jagged torch tensors in the consumer's hands (`benchmarks.queues.figures`). Producer, consumer
and server are connected as processes of one host are. Ours keeps segments and ledger on disk, with checksums, and what
it has acknowledged survives kill -9; `embedded_…` is the same store without a server, in the process of its only user.
The peer (`make peers` installs it) keeps everything in memory.

Each side is a child process with servers of its own. In a round every side takes its turn at a measurement while the
others are stopped (SIGSTOP), so that an idle one takes no time from it. A figure is the median over all turns; a ratio
is taken within a round, then the median. `null` is a figure that a side cannot have: `missing` says why.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import machine, spread, write_json
from benchmarks.queues.base import MissingFeature
from benchmarks.queues.child import ROOT, Child, ChildFailed, cpu_share, end_in_order
from benchmarks.queues.floors import floors

OURS = "asyncflow_store"
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
PEERS = {"transferqueue": PEER_PYTHON}
"""Which Python each of them runs in."""

Turn = Mapping[str, Any]
"""What one figure function returned: lists of seconds, and what they are about."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One figure of the table."""

    value: Callable[[Turn], float | None]
    """From one turn, or from all of them joined."""
    target: str = ""
    """What ours must reach."""
    less_is_better: bool = False
    is_ratio: bool = False
    """Of two parts of a turn, whose speed differs from turn to turn: the median of the turns' own ratios."""


def rate(name: str, count: str = "rows", scale: float = 1.0) -> Callable[[Turn], float]:
    return lambda turn: float(turn[count]) * scale / statistics.median(turn[name])


def milliseconds(name: str, percentile: float = 50) -> Callable[[Turn], float]:
    return lambda turn: 1000 * float(np.percentile(turn[name], percentile))


def ratio(over: str, under: str) -> Callable[[Turn], float]:
    return lambda turn: statistics.median(turn[over]) / statistics.median(turn[under])


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One function of `benchmarks.queues.figures`, and the keys that come of it."""

    figure: str
    keys: Mapping[str, Key]
    terms: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    """Terms that only ours gets."""
    embedded: bool = False
    """Measure the store without a server as well."""
    once: bool = False
    """It takes minutes: one round is enough."""
    quick: Mapping[str, Any] = field(default_factory=dict)
    """Sizes for `--quick`, which tries the benchmark out and says nothing about speed."""


MEASUREMENTS = (
    Measurement(
        figure="throughput",
        keys={
            "put_1024_samples_per_s": Key(value=rate("put_s"), target="≥ 200k, 20 × peer"),
            "get_1024_samples_per_s": Key(value=rate("again_s"), target="≥ 1M, 50 × peer"),
            "get_1024_cold_samples_per_s": Key(value=rate("cold_s"), target="≥ 400k, 50 × peer"),
            "done_1024_ms": Key(value=milliseconds("done_s"), less_is_better=True),
        },
        embedded=True,
        quick={"rows": 32, "repeats": 1, "warm": 1},
    ),
    Measurement(
        figure="singly",
        keys={
            "get_singly_put_samples_per_s": Key(value=rate("cold_s"), target="≥ 80k"),
            "get_singly_put_again_samples_per_s": Key(value=rate("again_s")),
            "put_1_p50_ms": Key(value=milliseconds("put_1_s"), target="≤ 0.6", less_is_better=True),
            "put_1_p99_ms": Key(value=milliseconds("put_1_s", 99), less_is_better=True),
        },
        embedded=True,
        quick={"rows": 32, "repeats": 1},
    ),
    Measurement(
        figure="throughput",
        keys={"flight_get_1024_samples_per_s": Key(value=rate("cold_s"), target="≥ 60k")},
        ours={"remote": True},
        quick={"rows": 32, "repeats": 1, "warm": 1},
    ),
    Measurement(
        figure="small",
        keys={
            "lease_get_16_p50_ms": Key(value=milliseconds("get_s"), target="≤ 0.8", less_is_better=True),
            "lease_get_16_p99_ms": Key(value=milliseconds("get_s", 99), less_is_better=True),
        },
        embedded=True,
        quick={"gets": 8},
    ),
    Measurement(
        figure="calls",
        keys={
            "call_p50_ms": Key(value=milliseconds("near_s"), less_is_better=True),
            "call_flight_p50_ms": Key(value=milliseconds("far_s"), less_is_better=True),
        },
        quick={"times": 10},
    ),
    Measurement(
        figure="wake",
        keys={
            "wake_p50_ms": Key(value=milliseconds("wake_s"), target="≤ 1", less_is_better=True),
            "wake_p99_ms": Key(value=milliseconds("wake_s", 99), target="≤ 5", less_is_better=True),
        },
        terms={"puts": 50},
        quick={"puts": 4},
    ),
    Measurement(
        figure="wake",
        keys={"wake_polling_1s_p50_ms": Key(value=milliseconds("wake_s"), less_is_better=True)},
        terms={"puts": 8, "interval": 1.0},
        quick={"puts": 1, "interval": 0.1},
    ),
    Measurement(
        figure="wake",
        keys={
            "wake_500_parked_p50_ms": Key(value=milliseconds("wake_s"), target="as wake_p50_ms", less_is_better=True)
        },
        terms={"puts": 50, "parked": 500},
        quick={"puts": 4, "parked": 8},
    ),
    Measurement(
        figure="reclaim",
        keys={
            "reclaim_after_ttl_p50_ms": Key(value=milliseconds("late_s"), less_is_better=True),
            "reclaim_on_notice_p50_ms": Key(value=milliseconds("notice_s"), less_is_better=True),
        },
        quick={"times": 2, "hold": 0.05},
    ),
    Measurement(
        figure="idle",
        keys={
            "idle_consumer_cores": Key(
                value=lambda turn: float(turn["consumer_cores"]), target="0", less_is_better=True
            ),
            "idle_servers_cores": Key(value=lambda turn: float(turn["servers_cores"]), less_is_better=True),
        },
        quick={"seconds": 0.2},
    ),
    Measurement(
        figure="resident",
        keys={
            "lease_1m_over_1k": Key(value=ratio("many_s", "few_s"), target="≤ 1.5", less_is_better=True, is_ratio=True),
            "lease_1m_p50_ms": Key(value=milliseconds("many_s"), less_is_better=True),
            "lease_1m_rows": Key(value=lambda turn: float(turn["many"])),
        },
        once=True,
        quick={"few": 64, "many": 512, "gets": 8, "rows": 4},
    ),
    Measurement(
        figure="columns",
        keys={
            "get_32_over_1_columns": Key(
                value=ratio("all_s", "one_s"), target="≤ 2", less_is_better=True, is_ratio=True
            ),
            "get_1_column_ms": Key(value=milliseconds("one_s"), less_is_better=True),
            "get_32_columns_ms": Key(value=milliseconds("all_s"), less_is_better=True),
        },
        quick={"rows": 32, "repeats": 1},
    ),
    Measurement(
        figure="mixed",
        keys={
            "mixed_put_samples_per_s": Key(value=rate("put_s", "samples"), target="≥ 100k"),
            "mixed_get_samples_per_s": Key(value=rate("get_s", "samples"), target="≥ 100k"),
        },
        # The faster side gets more to do, or it would be over before all its processes run.
        ours={"batches": 400},
        terms={"batches": 16},
        quick={"batches": 2, "rows": 16, "producers": 1, "consumers": 1},
    ),
    Measurement(
        figure="throughput",
        keys={
            "long_put_gb_per_s": Key(value=rate("put_s", "bytes", 1e-9), target="≥ 2"),
            "long_get_gb_per_s": Key(value=rate("cold_s", "bytes", 1e-9), target="≥ 2"),
            "long_get_again_gb_per_s": Key(value=rate("again_s", "bytes", 1e-9)),
        },
        terms={"response": 8192},
        quick={"rows": 32, "repeats": 1, "warm": 1},
    ),
    Measurement(
        figure="put_only",
        keys={"power_gb_per_s": Key(value=rate("put_s", "bytes", 1e-9), target="≥ 0.5")},
        terms={"durability": "power"},
        quick={"rows": 32, "repeats": 1},
    ),
    Measurement(
        figure="recovery",
        keys={
            "recovery_1m_s": Key(
                value=lambda turn: statistics.median(turn["recovery_s"]), target="≤ 5", less_is_better=True
            )
        },
        once=True,
        quick={"rows": 64},
    ),
)
TARGETS = {key: one for measurement in MEASUREMENTS for key, one in measurement.keys.items()}
FLOORS = ("memcpy_gb_per_s",)
"""Keys of `benchmarks.queues.floors` that can be asked for alone."""


class Sides:
    """The children, of which only the one that is asked runs."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._children = {name: Child(command(name, folder / name), log=folder / f"{name}.log") for name in names}
        self.about = {name: child.ask("about") for name, child in self._children.items()}
        self._running: str | None = None
        for child in self._children.values():
            child.suspend()

    def ask(self, name: str, figure: str, terms: Mapping[str, Any]) -> Turn:
        if self._running != name:
            if self._running is not None:
                self._children[self._running].suspend()
            self._children[name].resume()
            self._running = name
            time.sleep(0.5)  # what piled up while it was stopped
        load = os.getloadavg()
        turn: dict[str, Any] = self._children[name].ask(figure, **terms)
        return {**turn, "load_before": load[0], "load_after": os.getloadavg()[0]}

    def idle_cores(self, seconds: float = 3.0) -> dict[str, float]:
        """Cores that each side keeps busy, with all that it started, when nobody asks it for anything."""
        found = {}
        for name, child in self._children.items():
            child.resume()
            time.sleep(1.0)
            found[name] = cpu_share([process.pid for process in child.processes()], seconds)
            child.suspend()
        self._running = None
        return found

    def close(self) -> None:
        for child in self._children.values():
            child.close()


def command(name: str, folder: Path, settings: Mapping[str, Any] | None = None) -> list[str]:
    """Starts one side in its own environment."""
    python = str(PEERS.get(name, sys.executable))
    return [python, "-m", "benchmarks.queues", name, str(folder), dumps(dict(settings or {}))]


def measure(
    measurement: Measurement, sides: Sides, names: Sequence[str], *, rounds: int, quick: bool
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """The turns of each column of the table (`""` ours, `embedded_`, `peer_`), and why a column has none."""
    turns: dict[str, list[Turn]] = {}
    missing: dict[str, str] = {}
    sizes = {**measurement.terms, **(measurement.quick if quick else {})}
    mine = {**measurement.terms, **measurement.ours, **(measurement.quick if quick else {})}
    columns: dict[str, tuple[str, Mapping[str, Any]]] = {}
    if OURS in names:
        columns[""] = OURS, mine
        if measurement.embedded:
            columns["embedded_"] = OURS, {**mine, "embedded": True}
    for name in names:
        if name != OURS:
            columns["peer_"] = name, sizes
    for _ in range(1 if measurement.once or quick else rounds):
        for prefix, (name, terms) in columns.items():
            if prefix in missing:
                continue
            try:
                turns.setdefault(prefix, []).append(sides.ask(name, measurement.figure, terms))
            except MissingFeature as reason:
                missing[prefix] = str(reason)
    return {prefix: found for prefix, found in turns.items() if prefix not in missing}, missing


def join(turns: Sequence[Turn]) -> Turn:
    """One turn with the values of all: lists one behind the other, of single values the median."""
    joined: dict[str, Any] = dict(turns[0])
    for name, value in turns[0].items():
        if isinstance(value, list):
            joined[name] = [item for turn in turns for item in turn[name]]
        elif isinstance(value, int | float):
            joined[name] = statistics.median(turn[name] for turn in turns)
    return joined


def summarise(measurement: Measurement, turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """The measurement's keys with their prefixes, `spread` and `over_peer`: times that ours is better, per round."""
    result: dict[str, Any] = {"spread": {}, "over_peer": {}}
    for key, one in measurement.keys.items():
        for prefix, found in turns.items():
            result["spread"][prefix + key] = spread([one.value(turn) or 0.0 for turn in found])
            median = result["spread"][prefix + key]["median"]
            result[prefix + key] = median if one.is_ratio else one.value(join(found))
        if "" in turns and "peer_" in turns:
            pairs = [(one.value(ours), one.value(peer)) for ours, peer in zip(turns[""], turns["peer_"], strict=False)]
            better = [(peer / ours if one.less_is_better else ours / peer) for ours, peer in pairs if ours and peer]
            if better:
                result["over_peer"][key] = spread(better)
    return result


def table(result: Mapping[str, Any], keys: Sequence[str]) -> str:
    """All figures for people."""
    lines = [f"{'':38} {'ours':>12} {'embedded':>12} {'peer':>12} {'× peer':>8}  must reach"]
    for key in keys:
        cells = [number(result.get(prefix + key)) for prefix in ("", "embedded_", "peer_")]
        times = result["over_peer"].get(key)
        better = f"{times['median']:.1f}" if times else ""
        lines.append(
            f"{key:38} {cells[0]:>12} {cells[1]:>12} {cells[2]:>12} {better:>8}  {TARGETS[key].target}".rstrip()
        )
    lines += [f"  {key}: {reason}" for key, reason in result["missing"].items()]
    return "\n".join(lines)


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def filesystem(folder: Path) -> str:
    """What a folder is on, as `ext4 on /dev/sda1`."""
    path = str(folder.resolve())
    mounts = [part for part in psutil.disk_partitions(all=True) if path.startswith(part.mountpoint)]
    best = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    return f"{best.fstype} on {best.device}" if best is not None else "unknown"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write the JSON file after every measurement, and return what is in it."""
    parser = argparse.ArgumentParser(
        prog="asyncflow bench store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=PEERS, help="measure another queue as well: `make peers` installs it")
    parser.add_argument("--peer-only", action="store_true", help="leave ours out")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="KEY,…", help="a part of the table")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where the store's files are; default: the system's for temporary files"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, not how fast it is")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    end_in_order()
    only = _keys(arguments.only, parser)
    if arguments.peer and not PEER_PYTHON.exists():
        parser.error(f"{arguments.peer} is not installed: run make peers")
    if arguments.peer_only and not arguments.peer:
        parser.error("--peer-only needs --peer")
    names = [*([] if arguments.peer_only else [OURS]), *([arguments.peer] if arguments.peer else [])]
    with tempfile.TemporaryDirectory(prefix="af-", dir=arguments.folder) as folder:
        result = compare(
            [one for one in MEASUREMENTS if any(key in only for key in one.keys)],
            names,
            Path(folder),
            rounds=arguments.rounds,
            quick=arguments.quick,
            json=arguments.json,
        )
    if result["failed"]:
        sys.exit(1)
    return result


def _keys(only: Sequence[str] | None, parser: argparse.ArgumentParser) -> list[str]:
    known = (*TARGETS, *FLOORS)
    found = [key.removeprefix("peer_").removeprefix("embedded_") for key in only or known]
    if unknown := [key for key in found if key not in known]:
        parser.error(f"there is no key {', '.join(unknown)}; the keys are {', '.join(known)}")
    return found


def compare(
    measurements: Sequence[Measurement],
    names: Sequence[str],
    folder: Path,
    *,
    rounds: int,
    quick: bool,
    json: Path | None,
) -> dict[str, Any]:
    """All of these, of these sides, with their files in this folder. Prints what it finds."""
    result: dict[str, Any] = {
        "benchmark": "store",
        "machine": machine(),
        "medium": filesystem(folder),
        "rounds": rounds,
        "quick": quick,
        **{name: {} for name in ("missing", "failed", "spread", "over_peer")},
        "raw": [],
    }
    print(f"files on {result['medium']}, load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores", flush=True)
    result["floors"] = floors(folder)
    result |= {key: result["floors"][key] for key in FLOORS}
    for key, value in result["floors"].items():
        print(f"  floor {key:32} {number(value):>12}")
    if not measurements:
        write_json(result, json)
        return result
    with closing(Sides(names, folder)) as sides:
        result["sides"] = sides.about
        result["idle_cores"] = sides.idle_cores(0.2 if quick else 3.0)
        for name, about in sides.about.items():
            print(f"{name}: {about['medium']}; {about['durability']}; {about['transport']}; {about['processes']}")
            print(f"  idle it takes {result['idle_cores'][name]:.3f} cores; it is stopped while another is measured")
        for measurement in measurements:
            _add(result, measurement, sides, names)
            write_json(result, json)
    result["load_at_end"] = list(os.getloadavg())
    print(table(result, [key for one in measurements for key in one.keys]), flush=True)
    write_json(result, json)
    return result


def _add(result: dict[str, Any], measurement: Measurement, sides: Sides, names: Sequence[str]) -> None:
    title = f"{measurement.figure} {dict(measurement.terms) or ''}"
    try:
        turns, missing = measure(measurement, sides, names, rounds=result["rounds"], quick=result["quick"])
    except ChildFailed as error:
        result["failed"][", ".join(measurement.keys)] = str(error)
        print(f"  {title}: {error}", file=sys.stderr, flush=True)
        return
    result["raw"].append({"figure": measurement.figure, "keys": list(measurement.keys), "turns": turns})
    for prefix, reason in missing.items():
        for key in measurement.keys:
            result[prefix + key] = None
            result["missing"][prefix + key] = reason
    summary = summarise(measurement, turns)
    for name in ("spread", "over_peer"):
        result[name] |= summary.pop(name)
    result |= summary
    loads = [turn["load_before"] for found in turns.values() for turn in found]
    if loads:
        print(f"  {title} done, load {min(loads):.1f} to {max(loads):.1f}", flush=True)


if __name__ == "__main__":
    main()
