"""What a queue must be able to do to be measured, and the columns that samples have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.queues.samples import Samples


class MissingFeature(Exception):
    """A queue cannot do this; the text says what it lacks."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Samples of one form."""

    columns: Mapping[str, str]
    """NumPy type of each; one that begins with `list:` has several values in a sample. `object` is one
    that no queue should take."""
    prompt: tuple[str, ...]
    """The columns that are there before generation."""
    readers: Mapping[str, tuple[str, ...]]
    """Columns that each consumer needs. Each of them gets every sample once."""


LEARNER = "actor_update"
"""The reader that trains: where a queue knows groups, it gets whole ones."""
FINISHED_TYPES = {
    "prompt_ids": "list:int64",
    "response_ids": "list:int64",
    "logprobs": "list:float32",
    "reward": "float32",
}
WIDE = tuple(f"c{number:02}" for number in range(32))
KINDS: Mapping[str, Kind] = {
    "finished": Kind(
        columns=FINISHED_TYPES,
        prompt=("prompt_ids",),
        readers={"reader": tuple(FINISHED_TYPES), "again": tuple(FINISHED_TYPES), LEARNER: tuple(FINISHED_TYPES)},
    ),
    "noted": Kind(
        columns={**FINISHED_TYPES, "note": "object"},
        prompt=("prompt_ids",),
        readers={"reader": (*FINISHED_TYPES, "note")},
    ),
    "wide": Kind(
        columns={"prompt_ids": "list:int64", **dict.fromkeys(WIDE, "list:float32")},
        prompt=("prompt_ids",),
        readers={"one": WIDE[:1], "all": WIDE},
    ),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Got:
    """Samples in a consumer's hands."""

    columns: Mapping[str, Tensor]
    """Jagged (nested) tensors, and plain ones where a sample has one value."""
    handle: Any
    """What the queue needs to be told that they are done."""

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values())))


class Queue(ABC):
    """One client of a queue."""

    @abstractmethod
    def prepare(self, samples: Samples) -> Any:
        """The samples in the form in which this queue takes them. Not part of any figure."""

    @abstractmethod
    def put(self, batch: Any) -> None:
        """Returns when the queue has acknowledged all of them."""

    def put_members(self, order: Sequence[tuple[int, int]], group_size: int) -> None:
        """Put samples one by one as generation ends, each of which is (group, number in its group): the group's number
        is its prompt. Raises MissingFeature."""
        raise MissingFeature("it knows no groups")

    @abstractmethod
    def take(
        self, rows: int, *, reader: str = "reader", timeout: float = 0.0, interval: float = 0.0, hold: float = 600.0
    ) -> Any | None:
        """So many samples for one of the kind's readers, not yet read; None when they are not there within `timeout`
        seconds. A queue that cannot wait asks again after `interval` seconds, and without a pause when that is 0. One
        that watches over its consumers takes them back after `hold` seconds."""

    @abstractmethod
    def read(self, taken: Any) -> Mapping[str, Tensor]:
        """The columns of what was taken."""

    def get(self, rows: int, *, reader: str = "reader", timeout: float = 0.0, interval: float = 0.0) -> Got | None:
        """Take and read at once."""
        taken = self.take(rows, reader=reader, timeout=timeout, interval=interval)
        return None if taken is None else Got(columns=self.read(taken), handle=taken)

    @abstractmethod
    def done(self, got: Got) -> None:
        """Tell the queue that a reader has finished with them."""

    def end(self, got: Got) -> None:
        """Finish with samples that nobody else will want: a queue that can removes them."""
        self.done(got)

    def can_park(self) -> None:
        """Raises MissingFeature when `park` would ask again and again."""
        raise MissingFeature("a consumer that waits asks again and again: none is parked")

    def park(self) -> None:
        """Wait for samples that never come, until the process is killed."""
        self.can_park()

    def call(self) -> None:
        """A call that does next to nothing. Raises MissingFeature."""
        raise MissingFeature("it has no call that does nothing")

    def die(self) -> None:
        """Tell the queue that this consumer has died. Raises MissingFeature."""
        raise MissingFeature("what a dead consumer has taken is lost")

    @abstractmethod
    def clear(self) -> None:
        """Remove all that this client has put."""

    @abstractmethod
    def close(self) -> None:
        """Leave. May be called twice."""


class Place(ABC):
    """An empty queue for samples of one kind, with its servers running."""

    connect: Callable[[Any], Queue]
    """A function of a module, which makes a client in another process from `address`."""
    address: Any

    def client(self, *, remote: bool = False) -> Queue:
        """A new client in this process. `remote` treats it as if it were on another host. Raises MissingFeature."""
        if remote:
            raise MissingFeature("there is no other way for clients on another host")
        return type(self).connect(self.address)

    @abstractmethod
    def servers(self) -> list[int]:
        """Process ids of all that serves it."""

    def checkpoint(self) -> None:
        """What has to be called to keep what is there now. A queue that keeps everything has nothing to do."""
        raise MissingFeature("it has no checkpoints")

    def restart(self, *, from_checkpoint: bool) -> None:
        """Start the servers again after they were killed."""
        raise MissingFeature("its servers cannot be started again")


class Side(ABC):
    """One of the compared queues, up and running."""

    name: str

    @abstractmethod
    def open(self, kind: str, **terms: Any) -> AbstractContextManager[Place]:
        """An empty queue. Raises MissingFeature for terms that it does not know."""

    def recover(self, rows: int) -> dict[str, Any]:
        """Fill a queue with samples that are put one by one, kill everything that has to do with it, and start again.

        Returns `fill_s`, `recovery_s` (a list of one) and the samples that were `found`. Raises MissingFeature."""
        raise MissingFeature("what is in its memory is gone when its processes are")

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Versions, medium, durability: what a reader of the figures must know."""

    @abstractmethod
    def close(self) -> None:
        """Stop everything."""
