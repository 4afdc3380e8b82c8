"""What somebody can wait for. Those who wait for a stage wait under its name."""

from __future__ import annotations

ADMISSION = "admission"
"""Topic of those who wait for room."""

FEEDER = "feeder"
BOUND = "bound"
WEIGHTS = "weights"
END = "end"
ROWS = "max_rows"
BYTES = "max_bytes"
"""What is waited for, besides stages: the next prompt; a commit, because the staleness bound is reached; an engine that
serves newer weights; nothing, because the last step has all of its samples; samples that end, because there are as many
as may be open, or their data are as large as they may be."""
