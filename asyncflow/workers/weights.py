"""New weights: every published version goes into the engine, and the store is told what is served."""

from __future__ import annotations

import time
from collections.abc import Callable

from asyncflow.engines.base import Served, WeightSnapshot
from asyncflow.engines.weights.channel import WeightChannel
from asyncflow.store.client import StoreClient
from asyncflow.store.topics import WEIGHTS
from asyncflow.types import PolicyVersion, Recorder, Timeline, UpdateMode
from asyncflow.workers.attestation import FreshSamples
from asyncflow.workers.base import PATIENCE, Worker
from asyncflow.workers.host import Host

PUBLISHER = "actor_update"
"""Whom it waits for until there is a version."""


class WeightFollower(Worker):
    """Consumes published versions, produces served ones. Waits for the channel; the learner's publications fill it."""

    name = WEIGHTS

    def __init__(
        self,
        host: Host,
        channel: WeightChannel,
        store: StoreClient,
        recorder: Recorder,
        timeline: Timeline,
        *,
        mode: UpdateMode,
        on_served: Callable[[PolicyVersion], None],
        fresh: FreshSamples,
    ) -> None:
        self._host = host
        self._channel = channel
        self._store = store
        self._recorder = recorder
        self._timeline = timeline
        self._mode = mode
        self._on_served = on_served
        self._fresh = fresh
        self.served: Served | None = None
        """What the engine said after the last load."""

    def turn(self) -> None:
        self._timeline.enter(self.name, "idle", PUBLISHER)
        self.follow(PATIENCE)

    def follow(self, timeout: float) -> None:
        """Bring the newest version into the engine and say so, unless it is served already.

        Attestation may ask for it to be loaded again, though the engine says that it serves it.
        """
        # What the learner publishes at the end of its turn is loaded anyway, and the engine must sleep until then.
        again = self._fresh.closed and not self._host.suspended
        snapshot = self._channel.latest() if again else self._channel.wait_newer(self._version, timeout)
        if snapshot is None:
            return
        self._timeline.enter(self.name, "busy")
        try:
            self._load(snapshot)
        finally:
            self._timeline.leave(self.name)

    @property
    def _version(self) -> PolicyVersion | None:
        return None if self.served is None else self.served.version

    def _load(self, snapshot: WeightSnapshot) -> None:
        asked, began = self._fresh.closed, time.monotonic()
        served = self._host.load(snapshot, self._mode)
        self.served = served
        if asked:
            self._fresh.reopen()
        if self._host.canary is not None:
            self._fresh.completed_canary(served.version, *self._host.canary)
        self._store.serve(self._host.name, served.version)
        self._recorder.log(
            "served",
            {
                "engine": self._host.name,
                "version": str(served.version),
                "digest": served.digest,
                "update_s": time.monotonic() - began,
            },
        )
        self._on_served(served.version)
