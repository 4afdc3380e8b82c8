"""`make bench`, `asyncflow bench [NAME] [OPTIONS]`: one benchmark, or all, one after the other."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import write_json

BENCHMARKS = ("learner", "generation", "weights", "overlap", "store", "service")
"""Each is a module of this package, whose docstring says what it measures and whose `main(argv)` returns the result."""


def main(argv: Sequence[str]) -> None:
    """Run one benchmark with its own options; or all, of which `--json FILE` keeps the results in one file."""
    if argv and argv[0] in BENCHMARKS:
        _benchmark(argv[0]).main(argv[1:])
        return
    file = Path(argv[1]) if len(argv) == 2 and argv[0] == "--json" else None
    if argv and file is None:
        sys.exit(f"name a benchmark ({', '.join(BENCHMARKS)}), or give only --json FILE to run all of them")
    results = {}
    for name in BENCHMARKS:
        print(f"== {name}", flush=True)
        results[name] = _benchmark(name).main([])
        write_json(results, file)


def _benchmark(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


if __name__ == "__main__":
    main(sys.argv[1:])
