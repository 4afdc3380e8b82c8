"""What several test files need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncflow.launch import Run, launch, resolve
from asyncflow.plan import plan

# The helpers whose assertions are to say their values, as those of the tests do.
pytest.register_assert_rewrite(
    "tests.browser",
    "tests.endless",
    "tests.hostile_frames",
    "tests.processes",
    "tests.reference_trainer",
    "tests.running_service",
    "tests.served_store",
    "tests.simulation",
    "tests.store_server",
)

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"

RunTiny = Callable[..., Run]


@pytest.fixture
def run_tiny(tmp_path: Path) -> RunTiny:
    """Runs configs/tiny.yaml with changes, and engines and rewards that are given, in a directory of its own."""

    def run(*overrides: str, name: str = "run", **given: Any) -> Run:
        run_dir = tmp_path / name
        return launch(plan(resolve(TINY, [*overrides, f"run_dir={run_dir}"]), **given))

    return run
