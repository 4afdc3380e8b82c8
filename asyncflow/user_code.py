"""Code that users bring: rewards and engines in modules of their own."""

from __future__ import annotations

import sys
from pathlib import Path


def look_in_current_folder() -> None:
    """Let modules in the current folder be imported, as `python -m` does; an installed command has its own folder there
    instead."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
