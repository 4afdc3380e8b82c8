"""One look for many watchers: what many streams tell is read once, encoded once, and handed to all of them.

    source (a job, its log, the fleet) ─► Watch: a look every EVERY seconds ─► each stream, as its client takes it
                                            │ picture: the latest one replaces those before
                                            └ history: every stream reads on from its own position

A picture that a slow client has not fetched is replaced by a newer one. Of a history nothing is left out: a stream asks
for what follows its position, and streams that stand at the same place get the same bytes. All of them read up to the
end that the last look has found, so that those who are in time do stand at the same place.

A stream costs a place in a list. Threads are only taken by looks and reads, and by none that serve requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

logger = logging.getLogger(__name__)

EVERY: Final = 0.25
"""Seconds between two looks at one thing, at least."""
HEARTBEAT: Final = 10.0
"""Seconds after which watchers are woken although there is nothing new."""
LOOKERS: Final = 64
"""Threads that look, at most: a run that hangs holds one of them."""
READERS: Final = 4
"""Threads that read what was before, for clients that are behind."""
KEPT: Final = 4 << 20
"""Bytes of a history that are kept for others who are at the same place."""

Batch = tuple[bytes, Any]
"""Events as they are on the wire, and the position after them."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What a look has found."""

    until: Any = None
    """Where the history ends; None where there is none."""
    picture: bytes = b""
    """The event that replaces the one before."""
    told: object = None
    """What makes the picture differ from the one before: watchers hear of it when this has changed."""
    over: bool = False
    """Nothing will come any more."""


class Source(Protocol):
    """What is watched."""

    end: bytes
    """The last event of a stream that is over."""

    def changed(self) -> object:
        """Differs whenever there may be something new. Cheap: it holds up everybody."""

    def look(self) -> Sight:
        """In a thread, never two at a time."""

    def read(self, at: Any, until: Any, /) -> Batch:
        """The next events after a position, up to another one; in a thread."""


class Watch:
    """One source, for as long as somebody watches it."""

    def __init__(self, source: Source, lookers: ThreadPoolExecutor, readers: ThreadPoolExecutor) -> None:
        self.source = source
        self.sight = Sight()
        self.version = 0
        """Grows whenever there is a new picture."""
        self.watchers = 0
        self.failed = False
        self.woken = asyncio.Event()
        """Is set, and another takes its place, whenever watchers should look."""
        self._lookers = lookers
        self._readers = readers
        self._batches: OrderedDict[Any, asyncio.Future[Batch]] = OrderedDict()
        self._kept = 0
        self._woke = time.monotonic()
        self._task = asyncio.create_task(self._run())

    def close(self) -> None:
        self._task.cancel()

    async def after(self, at: Any) -> Batch:
        """What follows a position, which is the same afterwards when that is nothing."""
        if at is None or self.sight.until in (None, at):
            return b"", at
        batch = self._batches.get(at)
        if batch is None:
            loop = asyncio.get_running_loop()
            batch = loop.run_in_executor(self._readers, self.source.read, at, self.sight.until)
            batch.add_done_callback(_heard)
            self._batches[at] = batch
            batch.add_done_callback(lambda done: self._keep(at, done))
        return await asyncio.shield(batch)

    def _keep(self, at: Any, batch: asyncio.Future[Batch]) -> None:
        """What was told stays so; only what is not there yet, or could not be read, is asked for again."""
        if batch.cancelled() or batch.exception() is not None or batch.result()[1] == at:
            self._batches.pop(at, None)
            return
        self._kept += len(batch.result()[0])
        while self._kept > KEPT:
            first = next(iter(self._batches))
            if not self._batches[first].done():
                return
            self._kept -= len(self._batches.pop(first).result()[0])

    async def _run(self) -> None:
        seen: object = object()
        try:
            while not self.sight.over:
                if (news := self.source.changed()) != seen:
                    seen = news
                    self._found(await self._look())
                if time.monotonic() - self._woke >= HEARTBEAT:
                    self._wake()
                await asyncio.sleep(EVERY)
        except Exception:
            logger.exception("nobody looks any more; its streams end, and are opened again by their clients")
            self.failed = True
        self._wake()

    async def _look(self) -> Sight:
        look = asyncio.get_running_loop().run_in_executor(self._lookers, self.source.look)
        look.add_done_callback(_heard)
        while not (await asyncio.wait({look}, timeout=HEARTBEAT))[0]:
            self._wake()  # who is looked at may hang, but the stream lives
        return look.result()

    def _found(self, sight: Sight) -> None:
        before, self.sight = self.sight, sight
        if (sight.told, sight.until, sight.over) != (before.told, before.until, before.over):
            self.version += sight.told != before.told
            self._wake()

    def _wake(self) -> None:
        self._woke = time.monotonic()
        self.woken.set()
        self.woken = asyncio.Event()


class Watches:
    """Everything that is watched now. Of one event loop."""

    def __init__(self) -> None:
        self._lookers = ThreadPoolExecutor(LOOKERS, thread_name_prefix="look")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._watches: dict[Hashable, Watch] = {}

    @contextmanager
    def on(self, key: Hashable, source: Callable[[], Source]) -> Iterator[Watch]:
        """The watch of this name, made when nobody watches yet; it ends with its last watcher."""
        watch = self._watches.get(key)
        if watch is None or watch.failed:
            watch = self._watches[key] = Watch(source(), self._lookers, self._readers)
        watch.watchers += 1
        try:
            yield watch
        finally:
            watch.watchers -= 1
            if not watch.watchers:
                watch.close()
                if self._watches.get(key) is watch:
                    del self._watches[key]

    def close(self) -> None:
        """Look no more. May be called twice."""
        for executor in (self._lookers, self._readers):
            executor.shutdown(wait=False, cancel_futures=True)


def _heard(future: asyncio.Future[Any]) -> None:
    """Whoever waited for it may have gone: nobody has to ask for its error."""
    if not future.cancelled():
        future.exception()
