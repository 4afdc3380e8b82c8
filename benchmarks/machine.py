"""Where a benchmark ran: what a reader needs to judge its figures, or to repeat it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asyncflow.doctor import installed


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, system, versions, load now."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "processor": model,
        "cores": sorted(os.sched_getaffinity(0)),
        "cpu_count": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "versions": {name: version for name, version in installed().items() if version is not None},
        "load_average": list(os.getloadavg()),
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_json(result: Mapping[str, Any], file: Path | None) -> None:
    """Write a result, when somebody asked for it, so that the file is always complete."""
    if file is not None:
        aside = file.with_name(f".{file.name}.part")
        aside.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")
        aside.replace(file)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
