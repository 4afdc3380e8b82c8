"""The store keeps its promises in a world in which everything goes wrong, drawn from one seed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable

import pytest

from tests.simulation.planted import PLANTED
from tests.simulation.run import Outcome, live, live_all
from tests.test_table_model import Broken

CALLS = ("ack", "admit", "allocate", "amend", "checkpointed", "columns_of", "commit", "counts", "drop", "gone", "held",
         "lease", "nack", "places", "prioritise", "renew", "restore", "room", "serve")  # fmt: skip
ACTORS = ("Engine", "Learner", "Operator", "Producer", "Worker")
POINTS = ("before append", "after append", "before sync", "after sync", "removal", "sync of segments")
FAULTS: dict[str, tuple[str, ...]] = {
    "cut before the request": CALLS,
    "cut after the request": CALLS,
    "duplicate": CALLS,
    "reordered": CALLS,
    "kill": POINTS,
    "power cut": POINTS,
    "lost in a power cut": ("ledger", "segment", "segment's name"),
    "sync fails": ("ledger", "segments", "frame"),
    "disk full": ("ledger", "new segment"),
    "torn write": ("frame",),
    "bit flipped": ("segment",),
    "client killed": (
        "after a frame is written", "before a frame is synced", *(f"between calls of {actor}" for actor in ACTORS),
    ),
    "client hangs": ("rollout", "reward", "judge", "look", "train"),
    "run ends": ("and goes on from a checkpoint",),
    "restarted from": ("snapshot",),
}  # fmt: skip
"""Kind of fault → every point where it can hit."""

SEEDS = range(130)
LONG_SEEDS = range(int(os.environ.get("ASYNCFLOW_SEEDS", "5000")))


def missed(faults: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(kind, point) for kind, points in FAULTS.items() for point in points if not faults[kind, point]]


def show(outcome: Outcome) -> None:
    print(
        f"\n{outcome.seeds} seeds, {outcome.operations} calls, {outcome.events} events, {outcome.steps} steps, "
        f"{outcome.faults.total()} faults; {outcome.over} runs could not go on after a power cut"
    )
    for (kind, point), count in sorted(outcome.faults.items()):
        print(f"{count:8} {kind}: {point}")


def test_promises_hold_whatever_goes_wrong() -> None:
    outcome = live_all(SEEDS)

    show(outcome)
    assert outcome.steps > len(SEEDS)
    assert outcome.over < len(SEEDS) / 4  # else there would be little to see
    kinds = Counter(kind for kind, _ in outcome.faults.elements())
    assert not set(FAULTS) - set(kinds)
    assert set(outcome.faults) <= {(kind, point) for kind, points in FAULTS.items() for point in points}


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_promises_hold_whatever_goes_wrong_for_long() -> None:
    outcome = live_all(LONG_SEEDS)

    show(outcome)
    assert missed(outcome.faults) == []


DIGESTS = """
from tests.simulation.run import live
for seed in (3, 4):
    world, server = live(seed)
    print(world.digest, server.calls, world.happened)
"""


def test_the_same_seed_is_the_same_life_in_every_process() -> None:
    found = [
        subprocess.run(
            [sys.executable, "-c", DIGESTS],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]

    assert found[0] == found[1]
    assert len(set(found[0].split("\n"))) == 3  # two lives that differ, and the end


def seeds_until_caught(name: str, seeds: Iterable[int]) -> int:
    """How many lives it takes to see the promise break that is named with the fault. Raises Broken for another one."""
    planted = PLANTED[name]
    for count, seed in enumerate(seeds, start=1):
        try:
            live(seed, planted.parts)
        except Broken as broken:
            if not re.search(planted.promise, str(broken).splitlines()[0]):
                raise
            return count
    raise AssertionError(f"{name} was not caught")


RARE = 100
"""Faults that need more seeds than this are for `make test-long`."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if PLANTED[name].most > RARE else []) for name in PLANTED]
)
@pytest.mark.timeout(3600)
def test_a_planted_fault_is_caught(name: str) -> None:
    print(f"\n{name}: caught after {seeds_until_caught(name, range(PLANTED[name].most))} seeds")
