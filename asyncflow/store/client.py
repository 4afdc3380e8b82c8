"""The two interfaces of the store: `StoreClient`, columns in and out, for everybody; `Control`, which says where data
are and whose they are, for those who carry the data themselves. Each is the same embedded and over a wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from asyncflow.store.events import PutId, Samples
from asyncflow.types import PolicyVersion


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where the values of some columns are, which the same put has written."""

    columns: tuple[str, ...]
    frames: np.ndarray
    """(N,) int64: the frame that has the row of each sample."""
    offsets: np.ndarray
    """(N,) int32: the row in this frame."""

    def is_as(self, other: Place) -> bool:
        """Whether the other columns are in the very same rows."""
        return np.array_equal(self.frames, other.frames) and np.array_equal(self.offsets, other.offsets)


@dataclass(frozen=True, kw_only=True, eq=False)
class Grant:
    """A lease without its data."""

    lease_id: int
    stage: str
    sample_ids: np.ndarray
    """(N,) int64, in admission order; whole groups for the training stage."""
    attempts: np.ndarray
    """(N,) int32"""
    deadline: float
    places: tuple[Place, ...]
    """Of the columns that the stage needs."""
    oldest_trainable: int = 0
    shares: tuple[np.ndarray, ...] = ()
    """As in `Lease`."""


@dataclass(frozen=True, kw_only=True)
class LeasedRow:
    """One row of a lease."""

    sample_id: int
    group_id: int
    attempt: int
    """1 for the first time that this stage gets the row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lease:
    """Rows that belong to one worker until it acks or nacks them or the deadline passes."""

    lease_id: int
    """Fencing token: grows with every lease, and a call with an old one is refused."""
    stage: str
    sample_ids: NDArray[np.int64]
    """In admission order; whole groups for the training stage."""
    group_ids: NDArray[np.int64]
    attempts: NDArray[np.int32]
    """1 for the first time that this stage gets a sample."""
    data: pa.RecordBatch
    """The columns that the stage needs, one row for each sample, in the same order."""
    deadline: float
    """On the store's monotonic clock."""
    slots: int
    """Training stage only: how many of the step's `train_batch_size` these groups count for. More than there are
    samples when some of a group were lost."""
    oldest_trainable: int = 0
    """Training stage only: number of the oldest policy version whose tokens are young enough for the loss. There are
    older ones only where `late_samples` is `mask`."""
    shares: tuple[NDArray[np.int64], ...] = ()
    """Rank → places of its samples, where the lease was asked for with `ranks`. Balanced by tokens."""

    @cached_property
    def rows(self) -> tuple[LeasedRow, ...]:
        """The same one by one."""
        columns = self.sample_ids.tolist(), self.group_ids.tolist(), self.attempts.tolist()
        return tuple(LeasedRow(sample_id=s, group_id=g, attempt=a) for s, g, a in zip(*columns, strict=True))


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The account of all samples: `admitted == trained + dropped + quarantined + open` always."""

    admitted: int
    trained: int
    dropped: Mapping[str, int]
    """By reason."""
    quarantined: int
    states: Mapping[str, int]
    """Open samples by state of their life."""
    leased: Mapping[str, int]
    """Samples out on lease, by stage."""
    ready: Mapping[str, int]
    """Samples that a stage could take now, for each but the training stage: how far it is behind."""
    capacity: int
    """Samples that could be admitted now."""
    max_staleness: int
    """The bound that holds now."""
    learner: PolicyVersion
    served: Mapping[str, PolicyVersion]
    """Version that each rollout engine serves."""
    oldest: PolicyVersion | None
    """Oldest policy version among the tokens of the open samples."""
    bytes: int
    """Of the data that are needed."""
    requeued: int = 0
    """Samples that were generated again because they were too old, each time counted."""
    masked: int = 0
    """Trained samples of which tokens that were too old were left out of the loss."""
    restored: int = 0
    """Samples that were put back from quarantine, each time counted."""

    @property
    def open(self) -> int:
        return sum(self.states.values())


@dataclass(frozen=True, kw_only=True)
class Waited:
    """A sample without which the step under way cannot go on."""

    sample_id: int
    group_id: int
    state: str
    worker: str | None
    """Who has it; None: it waits to be taken."""


@dataclass(frozen=True, kw_only=True)
class HeldLease:
    """A lease, for those who look on."""

    lease_id: int
    stage: str
    worker: str
    samples: int
    """That it still holds."""
    seconds: float | None
    """Until it ends; None: not known, since nobody serves the store."""


@dataclass(frozen=True, kw_only=True)
class Stat:
    """What a store looks like at one moment, for those who look on."""

    counts: Counts
    staleness: Mapping[int, int]
    """Staleness in policy versions, were they trained now → open samples with tokens."""
    leases: tuple[HeldLease, ...]
    segments: int
    waiting: Mapping[str, int]
    """Stage, or `admission` → calls that wait, where there are some."""
    awaited: Mapping[str, str]
    """… → what they wait for (`Management.awaited`)."""
    durability: str | None = None
    """What an acknowledged put survives (`Durability`); None: not known, since nobody serves the store."""


class Management(Protocol):
    """What the two interfaces have in common.

    All calls are blocking, thread-safe and have a deadline. One that raises has changed nothing. Besides what is said
    below, a call raises Closed when the store is closed (`counts` still answers), and LedgerError when what it does
    cannot be recorded, because the disk is full for example.
    """

    def renew(self, lease_id: int, *, ttl: float) -> None:
        """Move the deadline to `ttl` seconds from now. Raises LeaseLost."""

    def nack(self, lease_id: int, sample_ids: Sequence[int], *, reason: str, final: bool = False) -> None:
        """Give rows back undone. `final`, or too many attempts, quarantines them with all their reasons.

        Raises LeaseLost naming the rows that are not in the lease any more.
        """

    def gone(self, worker: str) -> None:
        """Say that a worker has died: its rows come back at once."""

    def restore(self, sample_ids: Sequence[int]) -> None:
        """Put samples back from quarantine, with the columns that they had. All of them or none.

        Raises IllegalTransition for those whose group has ended or is with the learner.
        """

    def prioritise(self, priority: int, *, samples: Sequence[int] = (), groups: Sequence[int] = ()) -> None:
        """Give samples, and all samples of groups, a priority. Those that have ended are left alone.

        Raises StoreError for a number beyond 32 bits.
        """

    def commit(
        self,
        *,
        leases: Sequence[int],
        trained: Sequence[int],
        skipped: Sequence[int],
        version: PolicyVersion,
        masked: Mapping[int, PolicyVersion] | None = None,
    ) -> None:
        """Record that a step's rows are in the weights that will be published as `version`.

        Each of `trained` and `skipped` is held under one of these `leases` of the training stage, of which some may
        have ended; `skipped` counts towards the step and ends as dropped. `masked`: trained sample → version of the
        oldest of its tokens that was in the loss, where older ones were masked out (`late_samples: mask`). The last
        commit may be repeated: it happens once. Raises LeaseLost naming the rows that are not held, StalenessViolation,
        or IllegalTransition when the rows are not exactly one step.
        """

    def drop(self, sample_ids: Sequence[int], *, reason: str) -> None:
        """End rows without training them; their places in the step go to later ones."""

    def serve(self, engine: str, version: PolicyVersion | None) -> None:
        """Say that a rollout engine serves this version from now on (None: it is gone).

        Raises IllegalTransition for a version that no commit has made yet, and for an older one than the engine served
        before: one that has to go back says None first, and joins again.
        """

    def amend(self, *, max_staleness: int | None = None, last_version: int | None = None) -> None:
        """Change the bound, or the number of the last step's version, while the run goes on.

        A lower bound holds for what is leased from now on. Raises IllegalTransition for what cannot be.
        """

    def checkpointed(self, version: PolicyVersion, *, oldest: PolicyVersion) -> None:
        """Say that a checkpoint of `version` is complete, and that none before `oldest` is kept.

        Raises IllegalTransition for a version that no commit has made.
        """

    def waited_for(self) -> tuple[Waited, ...]:
        """The samples of the step under way that are not ready for the learner yet."""

    def awaited(self, topic: str) -> str:
        """What a stage that finds nothing ready waits for, or the feeder (`admission`) that finds no room: a stage,
        `feeder`, `bound`, `weights`, `max_rows`, `max_bytes` or `end` (`Table.awaited`). Raises StoreError for a stage
        that there is not."""

    def counts(self) -> Counts:
        """The account, at one moment."""

    def stat(self) -> Stat:
        """The account with all that people want to know besides. It costs more than `counts`."""

    def close(self) -> None:
        """Embedded: wake all waiters with Closed; what is in the store stays in the ledger. Over a wire: leave. May be
        called twice."""


class Control(Management, Protocol):
    """Who may touch which sample, by those who write and read frames themselves."""

    def allocate(self) -> int:
        """The number of a new segment for the caller to write."""

    def room(self, groups: int, *, size: int = 0, put: PutId | None = None, timeout: float) -> bool:
        """Wait until so many groups, of so many bytes, could be admitted, or until they are: `put` may have happened.
        Raises StoreError for more than there could ever be room for."""

    def admit(
        self,
        prompt_tokens: Sequence[int],
        *,
        frame: int,
        size: int,
        samples: Samples | None = None,
        put: PutId | None = None,
        priorities: Sequence[int] = (),
        timeout: float,
    ) -> int | None:
        """Add one group for each prompt, as `StoreClient.admit`. Returns the first one's id.

        `size`: bytes of the frames. Raises UnknownFrame.
        """

    def lease(
        self,
        stage: str,
        *,
        worker: str,
        max_rows: int,
        max_tokens: int | None = None,
        min_rows: int = 1,
        ranks: int | None = None,
        request: str | None = None,
        ttl: float,
        timeout: float,
    ) -> Grant | None:
        """As `StoreClient.lease`."""

    def ack(
        self,
        lease_id: int,
        sample_ids: Sequence[int],
        *,
        columns: int,
        frame: int,
        size: int,
        tokens: Sequence[int] = (),
        oldest: Sequence[int | None] = (),
        newest: Sequence[int | None] = (),
    ) -> None:
        """As `StoreClient.ack`, with the columns (a bit set) in a frame of `size` bytes. Raises UnknownFrame."""

    def held(self, lease_id: int) -> np.ndarray:
        """Samples that a lease still holds; none when it has ended."""

    def columns_of(self, sample_ids: Sequence[int]) -> tuple[str, ...]:
        """Columns that all of some open samples have. Raises StoreError for samples that have ended."""

    def places(self, sample_ids: Sequence[int], columns: Sequence[str]) -> tuple[Place, ...]:
        """Where columns of open samples are. Raises StoreError naming those that have ended or lack one."""


class StoreClient(Management, Protocol):
    """Columns in and out."""

    def admit(
        self,
        prompts: pa.RecordBatch,
        samples: pa.RecordBatch | None = None,
        *,
        put: PutId | None = None,
        priorities: Sequence[int] = (),
        timeout: float,
    ) -> tuple[int, ...] | None:
        """Add one group for each row of `prompts` (the prompt columns), once the staleness bound leaves room.

        All of them or none. `samples` brings what somebody else has generated, n rows for each prompt in the same
        order: all columns of the stage that generates, and all or none of each further one. A `put` that is repeated
        with the same id gives the same answer and changes nothing. `priorities`: one for each group, or none. Returns
        the group ids, or None when there was no room within `timeout` seconds (`awaited` says for what). Raises
        StoreError for columns that do not fit, and for more groups at once than the bound could ever hold.
        """

    def lease(
        self,
        stage: str,
        *,
        worker: str,
        max_rows: int,
        max_tokens: int | None = None,
        min_rows: int = 1,
        ranks: int | None = None,
        request: str | None = None,
        ttl: float,
        timeout: float,
    ) -> Lease | None:
        """Take up to `max_rows` rows (for the training stage whole groups, at least one) that are ready for `stage`.

        `max_tokens` bounds prompt and response tokens together; one row (or group) is always given. It waits for
        `min_rows`, but not for more than the limits or the step allow; after `timeout` seconds it gives what there is,
        and None when that is nothing. Raises StoreError for a stage that there is not.

        `ranks` shares the rows out, balanced by tokens (`Lease.shares`). Who asks again with the same `request` gets
        the same lease, to the row: every process of a data-parallel learner asks for itself. Raises LeaseLost when that
        lease has ended.
        """

    def ack(self, lease_id: int, sample_ids: Sequence[int], columns: pa.RecordBatch | None = None) -> None:
        """Append all of the stage's columns to some rows of a lease, and give these back. All of it happens or nothing.

        A stage that writes no columns says in this way that it has seen the rows.

        Raises StoreError for columns that do not fit, LeaseLost naming the rows that are not in the lease any more.
        """

    def read(self, sample_ids: Sequence[int], columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Columns of open samples (None: all that each of them has), without taking them.

        Raises StoreError for samples that have ended or lack one of the columns, DamagedData.
        """
