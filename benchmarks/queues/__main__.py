"""One queue, which answers requests on its standard input: `python -m benchmarks.queues NAME FOLDER`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from benchmarks.queues import child, experiments, figures

if __name__ == "__main__":
    name, folder = sys.argv[1:]
    side = importlib.import_module(f"benchmarks.queues.{name}").side(Path(folder))
    try:
        child.serve({**figures.FIGURES, **experiments.EXPERIMENTS}, side)
    finally:
        side.close()
