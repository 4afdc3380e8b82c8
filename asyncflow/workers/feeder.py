"""Admits prompts as fast as the staleness bound allows, and no faster."""

from __future__ import annotations

import json
from collections.abc import Callable

import pyarrow as pa

from asyncflow.data import PromptStream
from asyncflow.store.client import StoreClient
from asyncflow.store.schema import COLUMNS, PROMPT_COLUMNS
from asyncflow.store.topics import ADMISSION
from asyncflow.types import Int32s, Prompt, Timeline
from asyncflow.workers.base import PATIENCE, Worker


class Feeder(Worker):
    """Consumes the prompt stream, produces groups. Waits for room in the store; the learner's commits make it."""

    name = "feeder"
    pauses = True

    def __init__(
        self, prompts: PromptStream, tokenise: Callable[[Prompt], Int32s], store: StoreClient, timeline: Timeline
    ) -> None:
        self._prompts = prompts
        self._tokenise = tokenise
        self._store = store
        self._timeline = timeline
        self._next: pa.RecordBatch | None = None

    def paused(self, cause: str) -> None:
        self._timeline.enter(self.name, "blocked", cause)

    def turn(self) -> None:
        if self._next is None:
            self._timeline.enter(self.name, "busy")
            self._next = self._columns(self._prompts.next())
        if self._store.admit(self._next, timeout=0.0) is None:
            self._timeline.enter(self.name, "blocked", self._store.awaited(ADMISSION))
            if self._store.admit(self._next, timeout=PATIENCE) is None:
                return
        self._next = None

    def _columns(self, prompt: Prompt) -> pa.RecordBatch:
        values = {
            "prompt": json.dumps(prompt.messages if isinstance(prompt.messages, str) else list(prompt.messages)),
            "prompt_columns": json.dumps(dict(prompt.columns)),
            "prompt_ids": self._tokenise(prompt),
        }
        arrays = [pa.array([values[name]], COLUMNS[name]) for name in PROMPT_COLUMNS]
        return pa.RecordBatch.from_arrays(arrays, names=list(PROMPT_COLUMNS))
