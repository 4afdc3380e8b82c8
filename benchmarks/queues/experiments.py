from __future__ import annotations

EXPERIMENTS: dict[str, object] = {}
