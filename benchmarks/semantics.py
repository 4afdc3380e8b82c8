"""What happens when something goes wrong, in AsyncFlow's store and in a peer: every row is done, not claimed.

    python -m benchmarks.semantics [--side asyncflow_store] [--side transferqueue] [--only NAME,…] [--json FILE]

Each experiment (`benchmarks.queues.experiments`) runs against fresh servers of each side, in that side's environment
(`make peers` makes the peer's). docs/comparison.md has what came of it.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, write_json
from benchmarks.queues.base import MissingFeature
from benchmarks.queues.child import Child, ChildFailed, end_in_order
from benchmarks.store import OURS, PEERS, command


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    title: str
    experiment: str
    terms: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """How each side is started, when not as usual."""


CASES: Mapping[str, Case] = {
    "dead_consumer": Case(title="a consumer dies with 16 samples", experiment="dead_consumer"),
    "stale_handle": Case(title="reading what was removed meanwhile, after new puts", experiment="stale_handle"),
    "blocked_fetch": Case(
        title="one consumer waits (each side's default way): the others",
        experiment="blocked_fetch",
        settings={"transferqueue": {"polling": False}},
    ),
    "mixed_groups": Case(title="groups whose samples end in turns", experiment="mixed_groups"),
    "mixed_groups_sampler": Case(
        title="the same, with the peer's sampler for groups",
        experiment="mixed_groups",
        settings={"transferqueue": {"group": 4}},
    ),
    "no_consumer": Case(
        title="a producer without a consumer",
        experiment="no_consumer",
        settings={OURS: {"max_staleness": 1}},
    ),
    "no_consumer_limit": Case(
        title="the same, with a limit of 4096 samples",
        experiment="no_consumer",
        settings={OURS: {"max_staleness": 3}, "transferqueue": {"limit": 4096}},
    ),
    "killed_servers": Case(title="kill -9 of all servers", experiment="killed_servers"),
    "killed_controller": Case(
        title="kill -9 of the first server (the peer's controller)", experiment="killed_servers", terms={"only": 0}
    ),
    "killed_after_checkpoint": Case(
        title="kill -9 of all servers, 16 samples after a checkpoint",
        experiment="killed_servers",
        terms={"checkpoint": True},
    ),
    "foreign_code": Case(title="a client sends an object instead of numbers", experiment="foreign_code"),
}


def run(case: Case, side: str, folder: Path) -> dict[str, Any]:
    """One row for one side. What fails is a result as well."""
    folder.mkdir()
    settings = case.settings.get(side, {})
    terms = {**case.terms, **({"folder": str(folder)} if case.experiment == "foreign_code" else {})}
    with Child(command(side, folder / "s", settings), log=folder / "log") as child:
        try:
            found: dict[str, Any] = child.ask(case.experiment, timeout=300.0, **terms)
            return found
        except MissingFeature as reason:
            return {"kept": None, "observed": f"not possible: {reason}"}
        except ChildFailed as error:
            return {"kept": None, "observed": f"the experiment failed: {str(error).strip().splitlines()[-1]}"}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write the JSON file after every row, and return what is in it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.semantics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--side", choices=(OURS, *PEERS), action="append", help="may be repeated; default: all")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,…", help=", ".join(CASES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    end_in_order()
    if unknown := [name for name in arguments.only or () if name not in CASES]:
        parser.error(f"there is no case {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    result: dict[str, Any] = {"benchmark": "semantics", "machine": machine(), "cases": {}}
    with tempfile.TemporaryDirectory(prefix="af-") as folder:
        # Short names: Ray's sockets are below these folders, and their paths have at most 107 bytes.
        numbers = itertools.count()
        for name in arguments.only or CASES:
            case = CASES[name]
            row: dict[str, Any] = {"title": case.title}
            result["cases"][name] = row
            print(f"{name}: {case.title}", flush=True)
            for side in arguments.side or (OURS, *PEERS):
                row[side] = run(case, side, Path(folder, str(next(numbers))))
                kept = {True: "kept", False: "NOT KEPT", None: "?"}[row[side]["kept"]]
                print(f"  {side:16} {kept:9} {row[side]['observed']}", flush=True)
                write_json(result, arguments.json)
    return result


if __name__ == "__main__":
    main()
