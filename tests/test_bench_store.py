"""`asyncflow bench store` measures and compares what it says, and its experiments see what queues do wrong."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import store
from benchmarks.queues import experiments, figures
from benchmarks.queues.base import KINDS, MissingFeature
from benchmarks.queues.child import ROOT, Child, ChildFailed
from benchmarks.queues.memory import Lists, MemoryPlace, MemorySide
from benchmarks.queues.samples import Ragged, finished, part, rows_of, size
from benchmarks.store import (
    FLOORS,
    MEASUREMENTS,
    TARGETS,
    Key,
    Measurement,
    compare,
    join,
    measure,
    rate,
    ratio,
    summarise,
)
from tests.processes import wait_until

PROMISED = [
    "put_1024_samples_per_s",
    "get_1024_samples_per_s",
    "get_1024_cold_samples_per_s",
    "get_singly_put_samples_per_s",
    "flight_get_1024_samples_per_s",
    "put_1_p50_ms",
    "lease_get_16_p50_ms",
    "wake_p50_ms",
    "wake_p99_ms",
    "wake_500_parked_p50_ms",
    "lease_1m_over_1k",
    "get_32_over_1_columns",
    "mixed_put_samples_per_s",
    "mixed_get_samples_per_s",
    "long_put_gb_per_s",
    "long_get_gb_per_s",
    "power_gb_per_s",
    "recovery_1m_s",
    "memcpy_gb_per_s",
]


def memory(folder: Path) -> Child:
    return Child(store.command("memory", folder), log=folder / "log")


def test_every_figure_of_the_comparison_has_its_key() -> None:
    assert set(PROMISED) <= {*TARGETS, *FLOORS}


def test_samples_have_the_sizes_that_are_told() -> None:
    samples = finished(1024)
    long = finished(64, response=8192)

    assert size(samples) / rows_of(samples) == pytest.approx(8200, rel=0.05)
    assert size(long) / rows_of(long) == pytest.approx(100_000, rel=0.15)
    lengths = np.diff(samples["response_ids"].offsets)  # type: ignore[union-attr]
    assert lengths.min() >= 256
    assert lengths.max() <= 768


def test_a_part_of_samples_has_their_values() -> None:
    samples = finished(8)
    whole, some = samples["response_ids"], part(samples, 3, 5)["response_ids"]
    assert isinstance(whole, Ragged)
    assert isinstance(some, Ragged)

    assert some.values.tolist() == whole.values[whole.offsets[3] : whole.offsets[5]].tolist()
    assert some.offsets.tolist() == (whole.offsets[3:6] - whole.offsets[3]).tolist()


def test_what_was_put_is_what_comes_out() -> None:
    turn = figures.throughput(MemorySide(), rows=16, repeats=2)

    assert turn["bytes"] == size(finished(16))
    assert {name: len(turn[name]) for name in ("put_s", "cold_s", "again_s")} == {"put_s": 2, "cold_s": 2, "again_s": 2}


class Forgetful(Lists):
    """Gives out other values than were put."""

    def put(self, batch: list[dict[str, Any]]) -> None:
        super().put([{**row, "logprobs": row["logprobs"] * 2} for row in batch])


class Recycling(Lists):
    """Takes places, and reads what is there by then."""

    def take(self, rows: int, **_: Any) -> Any:
        return range(rows) if len(self._place.rows) >= rows else None

    def read(self, taken: Any) -> Mapping[str, Any]:
        return super().read([self._place.rows[place] for place in taken])


def side_of(client: type[Lists]) -> MemorySide:
    class OfOneKind(MemorySide):
        @contextmanager
        def open(self, kind: str, **terms: Any) -> Iterator[MemoryPlace]:
            class Place(MemoryPlace):
                def client(self, *, remote: bool = False) -> Lists:
                    return client(self)

            yield Place(KINDS[kind])

    return OfOneKind()


def test_a_queue_that_changes_values_is_not_measured() -> None:
    with pytest.raises(RuntimeError, match="logprobs came out with other values"):
        figures.throughput(side_of(Forgetful), rows=16)


def test_an_experiment_tells_a_stale_read_from_a_right_one() -> None:
    right, wrong = (experiments.stale_handle(side_of(client)) for client in (Lists, Recycling))

    assert right == {"kept": True, "observed": "it reads 16 samples that it took and 0 of the others"}
    assert wrong == {"kept": False, "observed": "it reads 0 samples that it took and 16 of the others"}


def test_a_producer_that_nobody_stops_is_no_back_pressure() -> None:
    found = experiments.no_consumer(MemorySide(), batches=2)

    assert found["kept"] is False
    assert "2048 samples accepted" in found["observed"]


def test_a_queue_that_loses_what_the_dead_had_is_not_waited_for() -> None:
    with pytest.raises(MissingFeature, match="is lost"):
        figures.reclaim(MemorySide(), times=1)


def test_a_child_answers_and_says_what_it_cannot_do_and_what_failed(tmp_path: Path) -> None:
    with memory(tmp_path) as child:
        assert child.ask("throughput", rows=8, repeats=1)["rows"] == 8
        with pytest.raises(MissingFeature, match="memory only"):
            child.ask("throughput", durability="power")
        with pytest.raises(ChildFailed, match="unexpected keyword"):
            child.ask("about", nonsense=1)
        assert child.ask("about")["medium"] == "memory"


def test_a_child_that_is_stopped_does_nothing_until_it_goes_on(tmp_path: Path) -> None:
    with memory(tmp_path) as child:
        child.suspend()
        wait_until(lambda: {process.status() for process in child.processes()} == {"stopped"})

        child.resume()

        assert child.ask("about")["medium"] == "memory"


def test_a_child_that_ends_says_why(tmp_path: Path) -> None:
    with (
        Child(store.command("no_such_queue", tmp_path), log=tmp_path / "log") as child,
        pytest.raises(ChildFailed, match=r"no_such_queue"),
    ):
        child.ask("about")


def test_no_process_is_left_of_a_child_that_was_closed(tmp_path: Path) -> None:
    child = memory(tmp_path)
    child.ask("about")
    processes = child.processes()
    child.suspend()

    child.close(patience=5)

    assert processes
    assert not any(process.is_running() for process in processes)


def test_values_of_all_turns_are_joined_and_ratios_are_of_one_round() -> None:
    measurement = Measurement(
        figure="f",
        keys={
            "fast": Key(value=rate("s")),
            "slow_ms": Key(value=lambda turn: 1000 * float(turn["s"][0]), less_is_better=True),
            "growth": Key(value=ratio("t", "s"), less_is_better=True, is_ratio=True),
        },
    )
    turns = {
        "": [
            {"rows": 10, "s": [1.0], "t": [2.0]},
            {"rows": 10, "s": [2.0], "t": [20.0]},
            {"rows": 10, "s": [4.0], "t": [12.0]},
        ],
        "peer_": [{"rows": 10, "s": [10.0], "t": [20.0]}] * 3,
    }

    result = summarise(measurement, turns)

    assert join(turns[""]) == {"rows": 10, "s": [1.0, 2.0, 4.0], "t": [2.0, 20.0, 12.0]}
    assert (result["fast"], result["peer_fast"]) == (5.0, 1.0)
    assert result["growth"] == 3.0, "the median of 2, 10 and 3; the ratio of the medians is 6"
    assert result["spread"]["growth"] == {"median": 3.0, "min": 2.0, "max": 10.0}
    assert result["over_peer"]["fast"] == {"median": 5.0, "min": 2.5, "max": 10.0}
    assert result["over_peer"]["slow_ms"]["median"] == 5.0


class Recorder:
    """Stands for the sides; keeps who was asked, in which order."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Mapping[str, Any]]] = []

    def ask(self, name: str, figure: str, terms: Mapping[str, Any]) -> Mapping[str, Any]:
        self.asked.append((name, terms))
        if name == "transferqueue" and "remote" in terms:
            raise MissingFeature("no")
        return {"rows": 1, "s": [1.0]}


def test_sides_take_turns_round_by_round_and_get_the_same_work() -> None:
    sides = Recorder()
    measurement = Measurement(figure="f", keys={}, terms={"rows": 5}, ours={"remote": True})

    measure(measurement, sides, [store.OURS, "transferqueue"], rounds=2, quick=False)  # type: ignore[arg-type]

    assert sides.asked == 2 * [(store.OURS, {"rows": 5, "remote": True}), ("transferqueue", {"rows": 5})]


def test_what_a_side_cannot_do_is_null_with_its_reason(tmp_path: Path) -> None:
    file = tmp_path / "store.json"
    chosen = [one for one in MEASUREMENTS if one.figure in ("throughput", "put_only", "recovery")]

    result = compare(chosen, ["memory"], tmp_path, rounds=1, quick=True, json=file)

    written = json.loads(file.read_text())
    assert written["peer_put_1024_samples_per_s"] == result["peer_put_1024_samples_per_s"] > 0
    assert written["peer_power_gb_per_s"] is None
    assert "memory" in written["missing"]["peer_power_gb_per_s"]
    assert written["floors"]["memcpy_gb_per_s"] == written["memcpy_gb_per_s"] > 0
    assert written["medium"]
    assert not written["failed"]


def test_a_key_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        store.main(["--only", "put_1024_samples_per_s,put_2048"])

    assert "there is no key put_2048" in capsys.readouterr().err


def test_the_peers_lock_holds_what_the_project_names() -> None:
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["peers"]
    pins = (ROOT / "requirements" / "peers.lock").read_text().splitlines()

    assert {item.lower() for item in group} <= set(pins)
    assert all(re.fullmatch(r"[a-z0-9-]+==[^ ]+", line) for line in pins if not line.startswith("#"))
    assert not [line for line in pins if line.startswith("asyncflow")]
