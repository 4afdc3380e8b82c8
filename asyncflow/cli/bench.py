"""Finds the benchmarks, which are part of a checkout and not of the installed package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from asyncflow.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def benchmarks(root: Path = ROOT) -> Any:
    """The module whose `main(argv)` runs them. Raises ConfigError outside of a checkout."""
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise ConfigError(
            "the benchmarks are not part of the installed package: clone the repository, run make setup there, "
            "and call .venv/bin/asyncflow bench"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.__main__")
