"""A learner whose state finds no room."""

from __future__ import annotations

from pathlib import Path

from asyncflow.engines.fake import FakeLearner


class FullDisk(Exception):
    """What a library raises that has an error of its own for it, as safetensors does."""


class NoRoom(FakeLearner):
    def save_state(self, folder: Path) -> None:
        super().save_state(folder)
        raise FullDisk("No space left on device")
