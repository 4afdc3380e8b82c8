"""One queue, which answers requests on its standard input: `python -m benchmarks.queues NAME FOLDER [SETTINGS]`.

SETTINGS is a JSON object of what that queue can be started with.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.queues import child, experiments, figures

if __name__ == "__main__":
    name, folder, *settings = sys.argv[1:]
    side = importlib.import_module(f"benchmarks.queues.{name}").side(Path(folder), **json.loads(*settings or ["{}"]))
    try:
        child.serve({**figures.FIGURES, **experiments.EXPERIMENTS}, side)
    finally:
        side.close()
