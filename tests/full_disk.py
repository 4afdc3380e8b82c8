"""A learner whose state finds no room."""

from __future__ import annotations

import errno
from pathlib import Path

from asyncflow.engines.fake import FakeLearner


class NoRoom(FakeLearner):
    def save_state(self, folder: Path) -> None:
        super().save_state(folder)
        raise OSError(errno.ENOSPC, "No space left on device")
