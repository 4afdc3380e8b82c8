"""The core of the store: who is ready, who may have it, how old is it. No clock, no I/O, no threads.

Methods that decide are pure: they return events and change nothing. `apply` is the one place that changes state. So the
journal can be written in between, replaying it rebuilds the table, and tests need no time and no locks.

Samples are numbered without gaps, and those of a group are consecutive: group g has the samples from g·n on. What is
known of them is kept in arrays (`rows.py`), so that a call for a thousand costs little more than one for a single one.

Staleness is bounded by construction (`docs/staleness.md` has the proof): a group is admitted only while
`(η+1)·B − open − (v_learner − v_served)·B` leaves room, and the learner consumes in admission order, B places a step.
What the construction cannot see (an engine that serves less than it says) is caught again at lease and at commit.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncflow.errors import IllegalTransition, LeaseLost, StalenessViolation, StoreError
from asyncflow.store.balance import balanced
from asyncflow.store.client import Place
from asyncflow.store.events import (
    Acked,
    Admitted,
    Amended,
    Awaited,
    Checkpointed,
    Committed,
    Dropped,
    Event,
    Leased,
    Opened,
    Prioritised,
    PutId,
    Quarantined,
    Renewed,
    Requeued,
    Restarted,
    Restored,
    Resumed,
    Returned,
    Samples,
    Served,
)
from asyncflow.store.lifecycle import OPEN_STATES, STATES, Move, State, next_states
from asyncflow.store.rows import NONE, Flags, Ids, Marks, Row, Rows
from asyncflow.store.samplers import NUMBER, group_order, line_for
from asyncflow.store.schema import Schema, Stage
from asyncflow.types import PolicyVersion

LATE = "late"
SHORT_GROUP = "short_group"
RAN_OUT = "the lease of {} ran out"
"""Why the rows of a lease came back, with its worker."""
STRAGGLER = "straggler"
SKIPPED = "zero_variance_skipped"

MOST_PRIORITY = (1 << 31) - 1
REQUESTS_REMEMBERED = 4096
"""Leases that were asked for by name: so many are known, those that have ended included."""

ADMISSION = "admission"
"""Topic of those who wait for room; stages wait under their own names."""

FEEDER = "feeder"
BOUND = "bound"
WEIGHTS = "weights"
END = "end"
ROWS = "max_rows"
BYTES = "max_bytes"
"""What is waited for, besides stages: the next prompt; a commit, because the staleness bound is reached; an engine that
serves newer weights; nothing, because the last step has all of its samples; samples that end, because there are as many
as may be open, or their data are as large as they may be."""


PROMPTED = STATES.index(State.PROMPTED)
REWARDED = STATES.index(State.REWARDED)
GENERATED = STATES.index(State.GENERATED)
TRAINING = STATES.index(State.TRAINING)


@dataclass(slots=True)
class LeaseRecord:
    stage: str
    worker: str
    rows: Ids
    """As they were leased; which of them it still holds is with the rows."""
    left: int
    """How many of them it still holds."""
    deadline: float
    max_staleness: int
    """The bound under which the rows were leased: a lower one that comes later is for what is leased from then on."""
    ranks: int | None = None
    shares: tuple[Ids, ...] = ()
    """Rank → places in `rows`."""


@dataclass(frozen=True, slots=True)
class Consumed:
    """Samples of a step that a checkpoint has not passed yet: the run may go back and train them again."""

    trained: Ids
    skipped: Ids
    masked: int = 0
    """Trained samples with tokens that were masked out for their age."""

    @property
    def rows(self) -> Ids:
        return np.concatenate([self.trained, self.skipped])


@dataclass(frozen=True, slots=True)
class Window:
    """The groups that the step under way may have, in admission order: G of them, with n samples each."""

    groups: Ids
    """(G,)"""
    rest: Flags
    """(G, n) Open, and young enough to be trained."""
    late: Flags
    """(G, n) Open, and too old: they are dropped, or generated again."""
    short: Flags
    """(G,) So many are late that what is left is too little to train: its place goes to a later group."""


class Image(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a table knows besides its arrays, as plain values. Versions are packed."""

    terms: Opened
    next_sample: int
    next_group: int
    next_lease: int
    last_frame: int
    learner: int
    served: dict[str, int]
    ended: dict[str, int]
    reasons: dict[int, list[str]]
    leases: list[tuple[int, str, str, int, int, float, int, int | None, list[list[int]]]]
    """Id, stage, worker, how many rows were leased, how many it holds, deadline, bound, ranks, shares."""
    requests: list[tuple[str, str, int]]
    """Stage, name, lease."""
    tally: dict[str, int]
    last_step: tuple[tuple[int, ...], tuple[int, ...]] | None
    puts: dict[str, tuple[PutId, int, int]]
    consumed: list[tuple[int, int, int, int]]
    """Step, how many it trained, how many it skipped, how many were masked."""


class Table:
    """State of all samples of one run. Made by replaying events, of which the first is `Opened`."""

    def __init__(self, schema: Schema, opened: Opened) -> None:
        self.schema = schema
        self.terms = opened
        self.rows = Rows(len(schema.stages))
        self.groups = Marks()
        """Those with an open sample; the order of their ids is the order in which they were admitted."""
        self.taken = Marks()
        """Groups of which the training stage holds some row for the step under way."""
        self.leases: dict[int, LeaseRecord] = {}
        self.served: dict[str, PolicyVersion] = {}
        self.learner = PolicyVersion(n=0)
        self.next_sample = self.next_group = 0
        self.next_lease = 1
        self.last_frame = 0
        """Highest id of a frame that any sample ever had."""
        self.ended: Counter[str] = Counter()
        """trained, quarantined, and dropped:<reason> → samples."""
        self.last_step: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        """What the last commit trained and skipped."""
        self.puts: dict[str, tuple[PutId, int, int]] = {}
        """Producer → its last put, the first of its groups, and how many they were."""
        self.tally: Counter[str] = Counter()
        """requeued, restored, masked (trained with some tokens masked out for their age) → samples."""
        self.awaiting: dict[int, float] = {}
        """Group that the training stage waits for → when it does so no longer."""
        self.requests: dict[tuple[str, str], int] = {}
        """Stage and name of a request → its lease, which may have ended."""
        self.consumed: dict[int, Consumed] = {}
        """Version number of a step → its rows, as long as they can be taken back."""
        self._counts = np.zeros(len(STATES), np.int64)
        self._line = {stage: line for line, stage in enumerate(schema.stages)}
        """Stage → its place in the arrays of `rows`."""
        self._ready = {
            stage.name: line_for(stage, self._line[stage.name], self.rows)
            for stage in schema.stages.values()
            if stage.role != "train"
        }
        self._deadlines: list[tuple[float, int]] = []

    # -- what is the case ----------------------------------------------------------------------------------------------

    @property
    def group_size(self) -> int:
        return self.terms.num_generations

    @property
    def most_open(self) -> int:
        """Places that can be open at the same time: those of the step under way and of `max_staleness` later ones."""
        return (self.terms.max_staleness + 1) * self.terms.train_batch_size

    @property
    def most_generated(self) -> int:
        """Places, in admission order, that may have a response from what is served now.

        More than these can be open after the bound was lowered, after an engine that lags has joined, or after the run
        went back to a checkpoint; the others have to wait for younger weights.
        """
        slowest = min((version.n for version in self.served.values()), default=self.learner.n)
        return max(0, self.most_open - max(0, self.learner.n - slowest) * self.terms.train_batch_size)

    def capacity(self) -> int:
        """Samples that may be admitted now without any of them ever being trained too late.

        A group holds its places until its last row has ended: a lost row still counts towards the step that trains
        the rest of its group, so freeing its place early would let one sample too many in.
        """
        return max(0, self._room()[0])

    def check_room(self, groups: int) -> None:
        """Raises StoreError for more groups than there could ever be room for."""
        places, most, what = groups * self.group_size, self.most_open, f"max_staleness {self.terms.max_staleness}"
        if self.terms.max_rows is not None and self.terms.max_rows < most:
            most, what = self.terms.max_rows, f"max_rows {self.terms.max_rows}"
        if places > most:
            raise StoreError(
                f"{groups} groups at once need {places} places, and {what} never leaves more than {most}: "
                f"admit at most {most // self.group_size} groups at a time"
            )

    def _room(self, groups: int = 1) -> tuple[int, str]:
        """Samples that may be admitted now, below zero when there are too many, and what sets this limit for so many
        groups."""
        if not self.served:
            return 0, WEIGHTS
        batch, places = self.terms.train_batch_size, self.groups.count * self.group_size
        room, limit = self.most_generated - places, BOUND
        if room < groups * self.group_size <= self.most_open - places:
            limit = WEIGHTS
        if self.terms.max_rows is not None and self.terms.max_rows - places < room:
            room, limit = self.terms.max_rows - places, ROWS
        if self.terms.last_version is not None:
            left = (self.terms.last_version - self.learner.n) * batch - places
            if left <= room:
                return left, END
        return room, limit

    @property
    def states(self) -> Counter[State]:
        """Open samples by state."""
        return Counter({state: int(self._counts[STATES.index(state)]) for state in OPEN_STATES})

    def awaited(self, topic: str, groups: int = 1) -> str:
        """What a stage that has nothing to do, or ADMISSION that has no room for so many groups, waits for.

        A stage (`rollout`, `reward`, …) that has yet to bring its columns; or, where no sample is on its way: FEEDER,
        BOUND, WEIGHTS or END. Of several, what most groups of the training stage's step wait for.
        """
        generate = self.schema.generate.name
        if topic not in (ADMISSION, generate):
            if waits := self._missing(topic):
                return waits.most_common(1)[0][0]
            if self.states[State.PROMPTED] + self.states[State.GENERATING]:
                return generate
        room, limit = self._room(groups)
        return FEEDER if room >= groups * self.group_size else limit

    @property
    def makes_a_step(self) -> bool:
        """Whether the open groups are as many as a step takes."""
        return self.groups.count >= self.groups_per_step

    def _missing(self, stage: str) -> Counter[str]:
        """Groups of the training stage's step that lack columns for `stage`, by the stage that has yet to act."""
        needs = self.schema.needs[stage]
        if not needs & ~self.schema.prompt_mask & ~self.schema.writes[self.schema.generate.name]:
            return Counter()  # it needs nothing but completions: no look at the groups is necessary
        names, rows = list(self.schema.stages), self._members(self.groups.first(self.groups_per_step))
        lacking = self.rows.is_open(rows.ravel()).reshape(rows.shape)
        lacking[lacking] = (self.rows.columns[rows[lacking] - self.rows.base] & needs) != needs
        writer = np.full(rows.shape, len(names))
        for have in np.unique(self.rows.columns[rows[lacking] - self.rows.base]):
            place = names.index(self.schema.next_writer(int(have), needs))
            same = lacking.copy()
            same[lacking] = self.rows.columns[rows[lacking] - self.rows.base] == have
            writer[same] = place
        slowest = writer.min(axis=1)  # a group is as far as its slowest row
        found = np.bincount(slowest, minlength=len(names) + 1)[:-1]
        return Counter({names[place]: int(count) for place, count in enumerate(found) if count})

    @property
    def groups_per_step(self) -> int:
        return self.terms.train_batch_size // self.group_size

    def staleness(self, ids: Ids) -> NDArray[np.int64]:
        """Learner version before the step minus the version of each row's oldest token; 0 without tokens."""
        return self._age(self.rows.oldest[ids - self.rows.base])

    def _age(self, versions: NDArray[np.int64]) -> NDArray[np.int64]:
        age: NDArray[np.int64] = np.where(versions == NONE, 0, self.learner.n - (versions & NUMBER))
        return age

    def too_old(self, ids: Ids) -> Flags:
        """Which rows the learner may not train at its version: where tokens are masked, those that have none left."""
        masks = self.terms.late_samples == "mask"
        age = self._age(self.rows.newest[ids - self.rows.base]) if masks else self.staleness(ids)
        late: Flags = age > self.terms.max_staleness
        return late

    def oldest_trainable(self, lease_id: int) -> int:
        """Number of the oldest version whose tokens may be in the loss, among the rows of a training lease."""
        return max(0, self.learner.n - self.leases[lease_id].max_staleness)

    def row(self, sample_id: int) -> Row | None:
        """One sample, as it is now; None when it has ended, or was never admitted."""
        if not self.rows.is_open(np.array([sample_id]))[0]:
            return None
        rows, i = self.rows, sample_id - self.rows.base
        oldest, newest = int(rows.oldest[i]), int(rows.newest[i])
        return Row(
            sample_id=sample_id,
            group_id=sample_id // self.group_size,
            state=STATES[rows.state[i]],
            columns=int(rows.columns[i]),
            prompt_tokens=int(rows.prompt_tokens[i]),
            tokens=int(rows.tokens[i]),
            oldest=None if oldest == NONE else oldest,
            newest=None if newest == NONE else newest,
            leases={name: int(rows.lease[s, i]) for name, s in self._line.items() if rows.lease[s, i]},
            attempts={name: int(rows.attempts[s, i]) for name, s in self._line.items() if rows.attempts[s, i]},
            reasons=list(rows.reasons.get(sample_id, ())),
        )

    def samples(self) -> dict[int, Row]:
        """All open samples, one by one: for those who look on."""
        return {i: row for i in self.rows.open().tolist() if (row := self.row(i)) is not None}

    def places(self, ids: Ids, columns: Iterable[str]) -> tuple[Place, ...]:
        """Where the values of these columns are. Raises StoreError naming samples that have ended or lack one."""
        names = tuple(columns)
        mask, index = self.schema.mask(names), ids - self.rows.base
        there = (ids >= self.rows.base) & (ids < self.rows.end)
        there[there] = self.rows.has_data(ids[there])
        there[there] = self.rows.columns[index[there]] & mask == mask
        if not there.all():
            raise StoreError(
                f"{_named(ids[~there].tolist())} has ended or does not have {', '.join(names)} yet: ask for others"
            )
        lines: dict[int, list[str]] = {}
        for name in names:
            lines.setdefault(self._writer_line(name), []).append(name)
        found: list[Place] = []
        for line, written in lines.items():
            place = Place(tuple(written), self.rows.frame[line, index], self.rows.offset[line, index])
            same = next((other for other in found if place.is_as(other)), None)  # the same put has brought both
            if same is not None:
                found.remove(same)
                place = Place(same.columns + place.columns, place.frames, place.offsets)
            found.append(place)
        return tuple(found)

    def columns_of(self, ids: Ids) -> tuple[str, ...]:
        """The columns that all of these samples have. Raises StoreError for samples that have ended."""
        there = self.rows.is_open(ids)
        if not there.all():
            raise StoreError(f"{_named(ids[~there].tolist())} has ended: ask for others")
        have = int(np.bitwise_and.reduce(self.rows.columns[ids - self.rows.base])) if len(ids) else 0
        return tuple(name for name in self.schema.names(have) if name in self.schema.written)

    def attempts(self, stage: str, ids: Ids) -> NDArray[np.int32]:
        """How often each of these samples was leased to a stage."""
        attempts: NDArray[np.int32] = self.rows.attempts[self._line[stage], ids - self.rows.base]
        return attempts

    def oldest(self) -> PolicyVersion | None:
        """Oldest policy version among the tokens of the open samples."""
        oldest = self.rows.oldest[self.rows.open() - self.rows.base]
        oldest = oldest[oldest != NONE]
        return PolicyVersion.unpack(int(oldest.min())) if len(oldest) else None

    def waited_for(self) -> list[tuple[Row, str | None]]:
        """Rows of the step under way that are not ready to be trained, each with the worker that holds it."""
        groups = self.groups.first(self.groups_per_step)
        rows = self._members(groups[~self.taken.has(groups)]).ravel()
        rows = rows[self.rows.is_open(rows)]
        rows = rows[self.rows.state[rows - self.rows.base] != REWARDED]
        found = [row for sample_id in rows.tolist() if (row := self.row(sample_id)) is not None]
        return [(row, next((self.leases[i].worker for i in row.leases.values()), None)) for row in found]

    def next_deadline(self) -> float | None:
        """Earliest time at which `expire` has something to do, or None: the deadline of a lease, or of a group."""
        earliest = self._closing()
        while self._deadlines:
            deadline, lease_id = self._deadlines[0]
            lease = self.leases.get(lease_id)
            if lease is not None and lease.deadline == deadline:
                return deadline if earliest is None else min(deadline, earliest)
            heapq.heappop(self._deadlines)
        return earliest

    def _closing(self) -> float | None:
        """Earliest deadline of a group that still lacks rows."""
        if not self.awaiting:
            return None
        groups = np.fromiter(self.awaiting, np.int64, len(self.awaiting))
        lacking = groups[self._lacking(groups).any(axis=1)]
        return min((self.awaiting[group] for group in lacking.tolist()), default=None)

    def _lacking(self, groups: Ids) -> Flags:
        """(G, n) Open samples of groups that training cannot have yet."""
        rows = self._members(groups)
        lacking = self.rows.is_open(rows.ravel()).reshape(rows.shape)
        lacking[lacking] = self.rows.state[rows[lacking] - self.rows.base] < REWARDED
        return lacking

    # -- decisions: pure -----------------------------------------------------------------------------------------------

    def admit(
        self,
        prompt_tokens: Sequence[int],
        *,
        frame: int,
        samples: Samples | None = None,
        put: PutId | None = None,
        priorities: Sequence[int] = (),
    ) -> list[Event] | None:
        """Admit one group for each prompt, or None while there is no room for all of them. `priorities`: one for each
        group, or none at all.

        `samples`: what somebody else has generated and perhaps scored already. Nothing happens (no events) for a put
        that has happened already. Raises StoreError for more groups than there could ever be room for, for columns
        that are not all of one or more stages, and for a put that a later one has passed; IllegalTransition for
        tokens of a version that no commit has made.
        """
        if not prompt_tokens:
            raise StoreError("an admission without prompts: name at least one")
        if put is not None and self._has_happened(put, len(prompt_tokens)):
            return []
        self.check_room(len(prompt_tokens))
        _check_counts(prompt_tokens)
        places = len(prompt_tokens) * self.group_size
        if samples is not None:
            self._check_samples(samples, places)
        if self.capacity() < places:
            return None
        return [
            Admitted(
                first_group=self.next_group,
                first_sample=self.next_sample,
                prompt_tokens=tuple(prompt_tokens),
                frame=frame,
                samples=samples,
                put=put,
            ),
            *self._priorities_of_new(priorities, len(prompt_tokens)),
        ]

    def _priorities_of_new(self, priorities: Sequence[int], groups: int) -> list[Event]:
        if not len(priorities):
            return []
        if len(priorities) != groups:
            raise StoreError(f"{groups} groups are admitted with {len(priorities)} priorities: give each group one")
        given = np.array(priorities, np.int64)
        members = self._members(np.arange(self.next_group, self.next_group + len(given)))
        return [
            Prioritised(rows=tuple(members[given == priority].ravel().tolist()), priority=_checked(priority))
            for priority in np.unique(given[given != 0]).tolist()
        ]

    def _has_happened(self, put: PutId, groups: int) -> bool:
        if put.producer not in self.puts:
            return False
        last, _, admitted = self.puts[put.producer]
        if (put.epoch, put.sequence) > (last.epoch, last.sequence):
            return False
        if put != last:
            raise StoreError(
                f"put {put.epoch}.{put.sequence} of {put.producer} comes after {last.epoch}.{last.sequence}: "
                "a producer that starts again takes a higher epoch, and its sequence grows with each put"
            )
        if groups != admitted:
            raise StoreError(
                f"put {put.epoch}.{put.sequence} of {put.producer} had {admitted} groups and now has {groups}: "
                "a put that is repeated stays the same"
            )
        return True

    def _check_samples(self, samples: Samples, places: int) -> None:
        complete = 0
        for stage in self._writers(samples.columns):
            complete |= self.schema.writes[stage]
        if samples.columns != complete or not self.schema.writes[self.schema.generate.name] & complete:
            brought = ", ".join(self.schema.names(samples.columns)) or "nothing"
            raise StoreError(
                f"samples are put with all columns of {self.schema.generate.name} "
                f"({', '.join(self.schema.generate.writes)}), and all or none of each further stage: "
                f"they have {brought}"
            )
        self._check_tokens(places, samples.tokens, samples.oldest, samples.newest)

    def _check_tokens(
        self, rows: int, tokens: Sequence[int], oldest: Sequence[int | None], newest: Sequence[int | None]
    ) -> None:
        """Raises StoreError for what cannot be said of the tokens of so many rows, IllegalTransition for versions that
        no commit has made."""
        if {len(tokens), len(oldest), len(newest)} - {0, rows} or len(oldest) != len(newest):
            raise StoreError(
                f"of {rows} samples, {len(tokens)} numbers of tokens, {len(oldest)} oldest and {len(newest)} newest "
                "versions are given: give one for each sample, or none"
            )
        _check_counts(tokens)
        for first, last in set(zip(oldest, newest, strict=True)):
            if (first is None) != (last is None) or (first is not None and last is not None and not 0 <= first <= last):
                raise StoreError(f"tokens of versions from {first} to {last} cannot be: give the oldest and the newest")
        latest = max((version for version in newest if version is not None), default=0)
        if latest & NUMBER > self.learner.n or latest >> 32 > self.learner.incarnation:
            raise IllegalTransition(
                f"a sample has tokens of {PolicyVersion.unpack(latest)}: the last step made {self.learner}"
            )

    def admitted_by(self, put: PutId) -> int | None:
        """First group of a producer's last put; None when it is another one."""
        last = self.puts.get(put.producer)
        return last[1] if last is not None and last[0] == put else None

    def lease(
        self,
        stage: str,
        *,
        worker: str,
        max_rows: int,
        max_tokens: int | None,
        deadline: float,
        min_rows: int = 1,
        ranks: int | None = None,
        request: str | None = None,
        now: float | None = None,
    ) -> list[Event]:
        """Lease rows in the order of the stage's sampler; no `Leased` event among the result when nothing is ready.

        Fewer than `min_rows` are nothing, unless the other limits, or the end of the step, allow no more. `ranks`
        shares the rows out (`LeaseRecord.shares`); for a `request` that was made before see `granted`.

        For the training stage: whole groups of the step under way, which is the first B places that are open. Within
        these the order does not matter for staleness, so a group that is complete need not wait for an earlier one.
        Where late samples need not be waited for (`late_samples`), it is any B places. After the last step there is
        none, even where a run that was made shorter has samples left. `now` is when it asks: what it does not get it
        waits for from then on (`group_timeout`).
        """
        if stage == self.schema.train.name:
            if self.learner.n == self.terms.last_version:
                return []
            events, rows, full = self._choose_groups(max_rows, max_tokens)
            if self.terms.group_timeout is not None and now is not None:
                events = [*self._wait_for_groups(rows, now + self.terms.group_timeout), *events]
        else:
            events = []
            rows, full = self._choose_rows(stage, max_rows, max_tokens)
        if rows and (full or len(rows) >= min(min_rows, max_rows)):
            leased = Leased(
                lease_id=self.next_lease,
                stage=stage,
                worker=worker,
                rows=tuple(rows),
                deadline=deadline,
                ranks=ranks,
                request=request,
            )
            events.append(leased)
        return events

    def granted(self, stage: str, request: str, *, ranks: int | None = None) -> int | None:
        """The lease that a stage was given when it asked under this name before; None when it did not.

        It has the very same rows, whoever asks: the replicas of a rank work on the same. Raises LeaseLost when some of
        the rows have ended or the lease has, StoreError for another number of ranks.
        """
        lease_id = self.requests.get((stage, request))
        if lease_id is None:
            return None
        lease = self.leases.get(lease_id)
        lost = () if lease is None else tuple(lease.rows[~self.rows.is_open(lease.rows)].tolist())
        if lease is None or lost:
            raise LeaseLost(
                f"the lease that {stage} asked for as {request!r} has ended{f' for {_named(lost)}' if lost else ''}: "
                "ask under a new name",
                rows=lost,
            )
        if lease.ranks != ranks:
            raise StoreError(f"{request!r} was asked for with ranks {lease.ranks}, not {ranks}: all must ask alike")
        return lease_id

    def _wait_for_groups(self, leased: Sequence[int], deadline: float) -> list[Event]:
        """From now on the training stage waits for those groups of its step that lack rows."""
        groups = self.groups.first(self.groups_per_step)
        groups = groups[~self.taken.has(groups) & ~np.isin(groups, np.array(leased, np.int64) // self.group_size)]
        new = [group for group in groups[self._lacking(groups).any(axis=1)].tolist() if group not in self.awaiting]
        return [Awaited(groups=tuple(new), deadline=deadline)] if new else []

    def _choose_rows(self, stage: str, max_rows: int, max_tokens: int | None) -> tuple[list[int], bool]:
        """Rows, and whether the limits allow no more."""
        before = None
        if stage == self.schema.generate.name and (last := self._last_group_to_generate()) is not None:
            before = (last + 1) * self.group_size
        chosen = self._ready[stage].first(max_rows, before=before)
        full = False
        if max_tokens is not None and len(chosen):
            total = self.rows.tokens[chosen - self.rows.base].cumsum()
            full = bool(total[-1] >= max_tokens)
            chosen = chosen[: max(1, int(np.searchsorted(total, max_tokens, side="right")))]
        ids: list[int] = chosen.tolist()
        return ids, full

    def _last_group_to_generate(self) -> int | None:
        """Id of the last group that may be generated now; None when all may."""
        groups = self.most_generated // self.group_size
        if self.groups.count <= groups:
            return None
        return int(self.groups.first(groups)[-1]) if groups else -1

    def _window(self) -> Window:
        """The first B places that are open, after those whose groups end because they are too late.

        All open ones, where the step need not wait for who is slow: what that makes too old is dropped, generated again
        or masked.
        """
        if self.terms.late_samples != "wait":
            return self._judge(self.groups.first(self.groups.count))
        short = 0
        while True:
            window = self._judge(self.groups.first(self.groups_per_step + short))
            ends = int(window.short.sum())
            if ends == short or len(window.groups) < self.groups_per_step + short:
                return window
            short = ends

    def _judge(self, groups: Ids) -> Window:
        """Who is too old among these groups, and what that means for their others."""
        rows = self._members(groups)
        there = self.rows.is_open(rows.ravel()).reshape(rows.shape)
        late = there & ~self.taken.has(groups)[:, None]
        late[late] = self.too_old(rows[late])
        rest = there & ~late
        short = late.any(axis=1) & (rest.sum(axis=1) < self.terms.min_group)
        if self.terms.late_samples == "requeue":
            short[:] = False  # they stay in their group
        return Window(groups, rest, late, short)

    def _ends_of_late(self, window: Window) -> list[Event]:
        """What becomes of the rows that are too old."""
        rows = self._members(window.groups)
        if self.terms.late_samples == "requeue":
            late = tuple(rows[window.late].tolist())
            return [Requeued(rows=late)] if late else []
        events: list[Event] = []
        for place in np.flatnonzero(window.late.any(axis=1)):
            events.append(Dropped(rows=tuple(rows[place, window.late[place]].tolist()), reason=LATE))
            if window.short[place] and window.rest[place].any():
                events.append(Dropped(rows=tuple(rows[place, window.rest[place]].tolist()), reason=SHORT_GROUP))
        return events

    def _choose_groups(self, max_rows: int, max_tokens: int | None) -> tuple[list[Event], list[int], bool]:
        """Ends of late rows; rows of the chosen groups; whether the limits or the step allow no more."""
        window = self._window()
        rows = self._members(window.groups)
        waits = window.rest.copy()
        waits[waits] = self.rows.state[rows[waits] - self.rows.base] != REWARDED
        if self.terms.late_samples == "requeue":
            waits |= window.late
        ready = ~(window.short | self.taken.has(window.groups) | waits.any(axis=1))
        rows, rest = rows[ready], window.rest[ready]
        if self.schema.train.sampler != "fifo":
            order = group_order(self.schema.train, self.rows, rows, rest)
            rows, rest = rows[order], rest[order]
        room = self.groups_per_step - self.taken.count
        rows, rest = rows[:room], rest[:room]
        tokens = np.where(rest, self.rows.tokens[np.where(rest, rows - self.rows.base, 0)], 0)
        fits = rest.sum(axis=1).cumsum() <= max_rows
        if max_tokens is not None:
            fits &= tokens.sum(axis=1).cumsum() <= max_tokens
        fits[:1] = True  # one group is always given
        count = len(fits) if fits.all() else int(fits.argmin())
        chosen: list[int] = rows[:count][rest[:count]].tolist()
        full = count < len(fits) or count == room or (max_tokens is not None and tokens[:count].sum() >= max_tokens)
        return self._ends_of_late(window), chosen, bool(full)

    def _members(self, groups: Ids) -> Ids:
        """(G, n) Samples of groups, those included that have ended."""
        members: Ids = groups[:, None] * self.group_size + np.arange(self.group_size)
        return members

    def renew(self, lease_id: int, *, deadline: float) -> list[Event]:
        self._holds(lease_id, ())
        return [Renewed(lease_id=lease_id, deadline=deadline)]

    def ack(
        self,
        lease_id: int,
        rows: Sequence[int],
        *,
        columns: int,
        frame: int,
        tokens: Sequence[int] = (),
        oldest: Sequence[int | None] = (),
        newest: Sequence[int | None] = (),
    ) -> list[Event]:
        """Append a stage's columns to rows of a lease, all of its columns at once; a stage that writes none has no
        `columns` and NONE for a frame, and has seen the rows.

        Raises LeaseLost naming the rows that are not in the lease any more, StoreError for other columns than the stage
        writes, IllegalTransition for the training stage, which ends its rows by a commit.
        """
        stage = self.schema.stages[self._holds(lease_id, rows).stage]
        if stage.role == "train":
            raise IllegalTransition(f"stage {stage.name} ends its samples with a commit, not with an ack")
        if columns != self.schema.mask(stage.writes):
            raise StoreError(
                f"stage {stage.name} writes {', '.join(stage.writes) or 'no columns'}; "
                f"its ack brings {', '.join(self.schema.names(columns)) or 'nothing'}"
            )
        self._check_tokens(len(rows), tokens, oldest, newest)
        return [
            Acked(
                lease_id=lease_id,
                rows=tuple(rows),
                columns=columns,
                frame=frame,
                tokens=tuple(tokens),
                oldest=tuple(oldest),
                newest=tuple(newest),
            )
        ]

    def nack(self, lease_id: int, rows: Sequence[int], *, reason: str, final: bool) -> list[Event]:
        """Give rows back; those that failed for good or too often are quarantined, and what is left of their group
        is dropped when it became too short to train."""
        self._holds(lease_id, rows)
        return self._give_back([Returned(lease_id=lease_id, rows=tuple(rows), reason=reason)], final=final)

    def expire(self, now: float) -> list[Event]:
        """Take back the rows of every lease whose deadline has passed; when there is none, give up those rows for which
        the training stage has waited too long. Called until nothing is left to do at this time."""
        returns = self._take_back(lambda lease: lease.deadline <= now, RAN_OUT)
        return returns or self._close_groups(now)

    def gone(self, worker: str) -> list[Event]:
        """Take back the rows of every lease of a worker that has died."""
        return self._take_back(lambda lease: lease.worker == worker, "{} has died")

    def _take_back(self, which: Callable[[LeaseRecord], bool], reason: str) -> list[Event]:
        returns = [
            Returned(
                lease_id=lease_id,
                rows=tuple(np.sort(self.held(lease_id)).tolist()),
                reason=reason.format(lease.worker),
            )
            for lease_id, lease in self.leases.items()
            if which(lease)
        ]
        return self._give_back(returns, final=False)

    def _close_groups(self, now: float) -> list[Event]:
        """Whoever is late holds its group up no longer: what is there is trained, or dropped when it is too little."""
        groups = np.array([group for group, deadline in self.awaiting.items() if deadline <= now], np.int64)
        late = tuple(self._members(groups)[self._lacking(groups)].tolist())
        return [Dropped(rows=late, reason=STRAGGLER), *self._short_groups(late)] if late else []

    def restore(self, sample_ids: Sequence[int]) -> list[Event]:
        """Put samples that are in quarantine back into their groups, with what they had, all attempts forgiven.

        Raises IllegalTransition naming those that cannot be: a group that has ended has no place any more.
        """
        ids = np.unique(np.array(sample_ids, np.int64))
        if len(busy := ids[self.taken.has(ids // self.group_size)]):
            raise IllegalTransition(
                f"{_named(busy.tolist())} cannot be put back while the learner has its group: admit the prompt again"
            )
        if len(gone := ids[~self.rows.is_quarantined(ids)]):
            raise IllegalTransition(
                f"{_named(gone.tolist())} cannot be put back: only a sample in quarantine can, while its group has not "
                "been consumed and has not ended; admit the prompt again"
            )
        return [Restored(rows=tuple(ids.tolist()))] if len(ids) else []

    def commit(
        self,
        *,
        leases: Sequence[int],
        trained: Sequence[int],
        skipped: Sequence[int],
        version: PolicyVersion,
        masked: Mapping[int, PolicyVersion] | None = None,
    ) -> list[Event]:
        """Check that the rows are one whole step within the bound, held under these leases of the training stage.

        `masked`: trained sample → version of the oldest token of it that was in the loss, where older ones were not.
        Nothing happens (no events) when the last commit was this one: its answer may have been lost. Raises LeaseLost
        naming the rows that are not, IllegalTransition or StalenessViolation.
        """
        if version == self.learner and self.last_step == (
            tuple(sorted(trained)),
            tuple(sorted(skipped)),
        ):
            return []
        rows = np.array([*trained, *skipped], np.int64)
        if len(set(rows.tolist())) != len(rows):
            raise IllegalTransition("a commit names a sample twice")
        line = self._line[self.schema.train.name]
        held = self.rows.is_open(rows)
        holder = self.rows.lease[line, rows[held] - self.rows.base]
        held[held] = np.isin(holder, np.array([*leases], np.int64)) & (holder != 0)
        if not held.all():
            lost = np.sort(rows[~held]).tolist()
            raise LeaseLost(f"a commit is for what its leases hold: they do not hold {_named(lost)}", rows=lost)
        staleness = self._trained_staleness(trained, skipped, masked or {})
        for lease_id in np.unique(holder).tolist():
            bound, of_it = self.leases[lease_id].max_staleness, staleness[holder == lease_id]
            if of_it.max() > bound:
                worst = rows[holder == lease_id][of_it.argmax()]
                raise StalenessViolation(f"sample {worst} has staleness {of_it.max()}, above {bound}")
        groups = np.unique(rows // self.group_size)
        if self.rows.is_open(self._members(groups).ravel()).sum() != len(rows):
            raise IllegalTransition("a commit holds whole groups: some sample of a group is missing")
        if len(groups) * self.group_size != self.terms.train_batch_size:
            raise IllegalTransition(
                f"a step consumes {self.terms.train_batch_size} places, this one {len(groups) * self.group_size}"
            )
        if (version.incarnation, version.n) != (self.learner.incarnation, self.learner.n + 1):
            raise IllegalTransition(f"the version after {self.learner} is not {version}")
        return [
            Committed(
                trained=tuple(sorted(trained)),
                skipped=tuple(sorted(skipped)),
                version=version.packed,
                masked=tuple(sorted((sample, oldest.packed) for sample, oldest in (masked or {}).items())),
            )
        ]

    def _trained_staleness(
        self, trained: Sequence[int], skipped: Sequence[int], masked: Mapping[int, PolicyVersion]
    ) -> NDArray[np.int64]:
        """Of each row by the oldest token that was in its loss; 0 for those that were not computed."""
        if masked and self.terms.late_samples != "mask":
            raise IllegalTransition(f"late_samples is {self.terms.late_samples}: no token is masked out for its age")
        if foreign := sorted(masked.keys() - set(trained)):
            raise IllegalTransition(f"{_named(foreign)} has masked tokens and is not among those that were trained")
        ids = np.array(trained, np.int64)
        index = ids - self.rows.base
        oldest = self.rows.oldest[index].copy()
        for place, sample in enumerate(trained):
            if (version := masked.get(sample)) is not None:
                if not oldest[place] & NUMBER <= version.n <= self._newest(ids[place : place + 1])[0]:
                    raise IllegalTransition(f"sample {sample} has no token of {version} that could be its oldest one")
                oldest[place] = version.packed
        return np.concatenate([self._age(oldest), np.zeros(len(skipped), np.int64)])

    def drop(self, rows: Sequence[int], *, reason: str) -> list[Event]:
        """End open rows; those that have ended already are left alone."""
        named = np.array(list(dict.fromkeys(rows)), np.int64)
        there = tuple(named[self.rows.is_open(named)].tolist())
        return [Dropped(rows=there, reason=reason), *self._short_groups(there)] if there else []

    def prioritise(self, priority: int, *, samples: Sequence[int] = (), groups: Sequence[int] = ()) -> list[Event]:
        """Give samples, and all samples of groups, a priority; those that have ended are left alone.

        Raises StoreError for a number that is not one of 32 bits.
        """
        named = np.union1d(np.array(samples, np.int64), self._members(np.array(groups, np.int64)).ravel())
        there = tuple(named[self.rows.is_open(named)].tolist())
        return [Prioritised(rows=there, priority=_checked(priority))] if there else []

    def serve(self, engine: str, version: PolicyVersion | None) -> list[Event]:
        """Take an engine's word for what it serves, unless it cannot be true. Raises IllegalTransition.

        Numbers are compared, as in the bound: incarnations do not make weights fresher.
        """
        if version is None:
            return [Served(engine=engine, version=None)]
        if version.n > self.learner.n:
            raise IllegalTransition(f"{engine} cannot serve {version}: the last step made {self.learner}")
        before = self.served.get(engine)
        if before is not None and version.n < before.n:
            raise IllegalTransition(
                f"{engine} served {before} and cannot go back to {version}: it must say that it is gone (None) first"
            )
        return [Served(engine=engine, version=version.packed)]

    def amend(self, *, max_staleness: int | None = None, last_version: int | None = None) -> list[Event]:
        """Change terms while the run goes on; None leaves one as it is. Raises IllegalTransition for what cannot be.

        A higher bound admits more at once. A lower one holds for what is leased from now on: rows that are too old for
        it are dropped when the training stage comes to them, the step under way keeps what it has.
        """
        bound = self.terms.max_staleness if max_staleness is None else max_staleness
        last = self.terms.last_version if last_version is None else last_version
        if bound < 0:
            raise IllegalTransition(f"max_staleness cannot be {bound}: 0 is synchronous, higher is further ahead")
        if last is not None and last < self.learner.n:
            raise IllegalTransition(f"the run has made step {self.learner.n} already and cannot end at {last}")
        if (bound, last) == (self.terms.max_staleness, self.terms.last_version):
            return []
        return [Amended(max_staleness=bound, last_version=last)]

    def checkpointed(self, version: PolicyVersion, *, oldest: PolicyVersion) -> list[Event]:
        """Record that a checkpoint of `version` is complete, and that none before `oldest` is kept.

        Raises IllegalTransition for a version that no commit has made.
        """
        if version.n > self.learner.n or oldest.n > version.n:
            raise IllegalTransition(f"the learner is at {self.learner}: no checkpoint of {version} since {oldest}")
        return [Checkpointed(version=version.packed, oldest=oldest.packed)]

    def resume(self, number: int) -> list[Event]:
        """Go back to the version of this number, in a new incarnation (see `Resumed`).

        Raises IllegalTransition when what was consumed since then is not all there any more.
        """
        since = range(number + 1, self.learner.n + 1)
        if number > self.learner.n or (missing := [n for n in since if n not in self.consumed]):
            gone = f"what step {missing[0]} consumed is gone" if number <= self.learner.n else "it was never made"
            raise IllegalTransition(f"the run, which is at {self.learner}, cannot go on from step {number}: {gone}")
        return [Resumed(version=PolicyVersion(incarnation=self.learner.incarnation + 1, n=number).packed)]

    def restart(self, *, deadline: float) -> list[Event]:
        """Go on in another process, for workers that still live (see `Restarted`)."""
        return [Restarted(deadline=deadline)]

    def needed_by(self, event: Event) -> Counter[int]:
        """Frames that so many rows begin to need with this event; a row that needs several columns counts for each
        stage that has written one."""
        match event:
            case Admitted():
                rows = len(event.prompt_tokens) * self.group_size
                frames = Counter({event.frame: rows})
                if event.samples is not None:
                    writers = sum(1 for _ in self._writers(event.samples.columns))
                    frames[event.samples.frame] += rows * writers
                return frames
            case Acked() if event.frame != NONE:
                return Counter({event.frame: len(event.rows)})
            case _:
                return Counter()

    def _writers(self, columns: int) -> Iterator[str]:
        """Stages all of whose columns are among these."""
        return (stage for stage, writes in self.schema.writes.items() if writes and columns & writes == writes)

    def released_by(self, event: Event) -> Counter[int]:
        """Frames whose data so many rows do not need any more when this event has been applied."""
        match event:
            case Committed() | Dropped() | Quarantined():
                return self._frames(self._gone_with(event))
            case Requeued():
                return self._frames(np.array(event.rows, np.int64), but_prompt=True)
            case Checkpointed():
                steps = [self.consumed[n].rows for n in self._passed(event)]
                return self._frames(np.concatenate(steps)) if steps else Counter()
            case Resumed():
                number, rows = PolicyVersion.unpack(event.version).n, self.rows.alive()
                return self._frames(rows[self._newest(rows) > number], but_prompt=True)
            case _:
                return Counter()

    def frames(self) -> Counter[int]:
        """Every frame that is needed → by how many rows."""
        return self._frames(self.rows.alive())

    def _frames(self, rows: Ids, *, but_prompt: bool = False) -> Counter[int]:
        frames = self.rows.frame[int(but_prompt) :, rows - self.rows.base]
        found, counts = np.unique(frames[frames != NONE], return_counts=True)
        return Counter(dict(zip(found.tolist(), counts.tolist(), strict=True)))

    def _gone_with(self, event: Committed | Dropped | Quarantined) -> Ids:
        """Rows that nobody can have back when this event has happened: a group that ends takes those in quarantine
        with it."""
        ids = np.array(event.trained + event.skipped if isinstance(event, Committed) else event.rows, np.int64)
        over = self._over_without(ids)
        if isinstance(event, Quarantined):
            ids = ids[np.isin(ids // self.group_size, over)]
        elif isinstance(event, Committed) and self.terms.resumable:
            ids = ids[:0]
        return np.concatenate([ids, self._quarantined_of(over)])

    def _over_without(self, ids: Ids) -> Ids:
        """Groups of these rows of which no other row is open."""
        if self.group_size == 1:
            return ids
        groups = self._groups_of(ids)
        rows = self._members(groups)
        left = self.rows.is_open(rows.ravel()).reshape(rows.shape) & ~np.isin(rows, ids)
        over: Ids = groups[~left.any(axis=1)]
        return over

    def _quarantined_of(self, groups: Ids) -> Ids:
        """Those samples of groups that may be put back."""
        rows = self._members(groups).ravel()
        quarantined: Ids = rows[self.rows.is_quarantined(rows)]
        return quarantined

    def _passed(self, event: Checkpointed) -> list[int]:
        oldest = PolicyVersion.unpack(event.oldest).n
        return [n for n in self.consumed if n <= oldest]

    def held(self, lease_id: int) -> Ids:
        """Rows that a lease still holds."""
        lease = self.leases[lease_id]
        rows = lease.rows[lease.rows >= self.rows.base]
        held: Ids = rows[self.rows.lease[self._line[lease.stage], rows - self.rows.base] == lease_id]
        return held

    def _holds(self, lease_id: int, rows: Sequence[int]) -> LeaseRecord:
        if len(set(rows)) != len(rows):
            raise IllegalTransition(f"a call for lease {lease_id} names a sample twice")
        lease = self.leases.get(lease_id)
        if lease is None:
            raise LeaseLost(f"lease {lease_id} has ended; its samples may belong to another worker now", rows=rows)
        ids = np.asarray(rows, np.int64)
        held = (ids >= self.rows.base) & (ids < self.rows.end)
        held[held] = self.rows.lease[self._line[lease.stage], ids[held] - self.rows.base] == lease_id
        if not held.all():
            lost = ids[~held].tolist()
            raise LeaseLost(f"lease {lease_id} has ended for {_named(lost)}", rows=lost)
        return lease

    def _give_back(self, returns: Sequence[Returned], *, final: bool) -> list[Event]:
        """The returns, and the ends that follow from them.

        All returns of one operation are looked at together: a sample that two stages give back at once ends once, and
        what is left of a group is judged after all of its losses.
        """
        failed: dict[int, None] = {}
        reasons: dict[int, list[str]] = {}
        for event in returns:
            line = self._line[self.leases[event.lease_id].stage]
            attempts = self.rows.attempts[line, np.array(event.rows, np.int64) - self.rows.base]
            for sample_id, attempt in zip(event.rows, attempts.tolist(), strict=True):
                before = self.rows.reasons.get(sample_id, [])
                reasons.setdefault(sample_id, list(before)).append(event.reason)
                if final or attempt >= self.terms.max_attempts:
                    failed[sample_id] = None
        poison: dict[str, list[int]] = {}
        for sample_id in failed:
            poison.setdefault("; ".join(dict.fromkeys(reasons[sample_id])), []).append(sample_id)
        ends = [Quarantined(rows=tuple(rows), reason=history) for history, rows in poison.items()]
        return [*returns, *ends, *self._short_groups(failed)]

    def _short_groups(self, gone: Iterable[int]) -> list[Event]:
        """The end of what is left of these rows' groups, where that is too little to train."""
        if self.terms.min_group <= 1:
            return []
        lost = np.unique(np.array(list(gone), np.int64))
        rows = self._members(np.unique(lost // self.group_size))
        rest = self.rows.is_open(rows.ravel()).reshape(rows.shape) & ~np.isin(rows, lost)
        left = rest.sum(axis=1)
        return [
            Dropped(rows=tuple(rows[group, rest[group]].tolist()), reason=SHORT_GROUP)
            for group in np.flatnonzero((left > 0) & (left < self.terms.min_group))
        ]

    # -- the one mutator -----------------------------------------------------------------------------------------------

    def apply(self, event: Event) -> set[str]:
        """Change the state. Returns the topics (stages, ADMISSION) for which something may have become possible."""
        handler: Callable[[Table, Any], set[str]] | None = _HANDLERS.get(type(event))
        if handler is None:
            raise TypeError(f"{type(event).__name__} cannot be applied")
        return handler(self, event)

    def _apply_admitted(self, event: Admitted) -> set[str]:
        size, many, brought = self.group_size, len(event.prompt_tokens), event.samples
        ids, rows = self.rows.add(many * size), self.rows
        new = slice(rows.end - len(ids) - rows.base, rows.end - rows.base)
        # All of them are alike: what holds for one row holds for all.
        columns = self.schema.prompt_mask | (0 if brought is None else brought.columns)
        rows.columns[new] = columns
        rows.prompt_tokens[new] = np.repeat(event.prompt_tokens, size) if size > 1 else event.prompt_tokens
        rows.tokens[new] = rows.prompt_tokens[new]
        rows.frame[0, new] = event.frame
        self.last_frame = max(self.last_frame, event.frame)
        rows.offset[0, new] = np.repeat(np.arange(many), size) if len(ids) > 1 else 0
        if brought is not None:
            self._bring(new, brought)
        state = self._first_state(columns)
        rows.state[new] = state
        self._counts[state] += len(ids)
        self.groups.put(np.arange(event.first_group, event.first_group + many), there=True)
        self.next_group += many
        self.next_sample += len(ids)
        if event.put is not None:
            self.puts[event.put.producer] = event.put, event.first_group, many
        topics = {self.schema.train.name} if state == REWARDED else set()
        for stage, marks in self._ready.items():
            needs, writes = self.schema.needs[stage], self.schema.writes[stage]
            if columns & needs == needs and columns & writes != writes:
                marks.put(ids, there=True)
                topics.add(stage)
        return topics

    def _first_state(self, columns: int) -> int:
        """Of a sample that is admitted with these columns, as the place in `STATES`."""
        generated, needs = self.schema.writes[self.schema.generate.name], self.schema.needs[self.schema.train.name]
        if columns & generated != generated:
            return PROMPTED
        return REWARDED if columns & needs == needs else GENERATED

    def _bring(self, new: slice, samples: Samples) -> None:
        """What somebody else has generated, of new rows."""
        rows = self.rows
        for stage in self._writers(samples.columns):
            line = self._line[stage]
            rows.times[line, new] = 1
            rows.frame[line + 1, new] = samples.frame
            rows.offset[line + 1, new] = np.arange(new.stop - new.start)
        self.last_frame = max(self.last_frame, samples.frame)
        if samples.tokens:
            rows.tokens[new] += np.array(samples.tokens, np.int32)
        if samples.oldest:
            rows.oldest[new], rows.newest[new] = _versions(samples.oldest), _versions(samples.newest)

    def _append(
        self,
        ids: Ids,
        columns: int,
        tokens: Sequence[int],
        oldest: Sequence[int | None],
        newest: Sequence[int | None],
    ) -> None:
        """Rows have more columns now."""
        index, rows = ids - self.rows.base, self.rows
        rows.columns[index] |= columns
        if tokens:
            rows.tokens[index] += np.array(tokens, np.int32)
        if oldest:
            rows.oldest[index], rows.newest[index] = _versions(oldest), _versions(newest)

    def _apply_leased(self, event: Leased) -> set[str]:
        ids = np.array(event.rows, np.int64)
        self.leases[event.lease_id] = LeaseRecord(
            event.stage,
            event.worker,
            ids,
            len(ids),
            event.deadline,
            self.terms.max_staleness,
            event.ranks,
            tuple(balanced(self.rows.tokens[ids - self.rows.base], event.ranks)) if event.ranks else (),
        )
        if event.request is not None:
            self._remember(event.stage, event.request, event.lease_id)
        self.next_lease = event.lease_id + 1
        self._set_deadline(event.lease_id, event.deadline)
        line = self._line[event.stage]
        self.rows.lease[line, ids - self.rows.base] = event.lease_id
        self.rows.attempts[line, ids - self.rows.base] += 1
        role = self.schema.stages[event.stage].role
        if role == "generate":
            self._move(ids, Move.START_GENERATING)
        elif role == "train":
            self._move(ids, Move.START_TRAINING)
            groups = self._groups_of(ids)
            self.taken.put(groups, there=True)
            self._stop_waiting(groups)
        if role != "train":
            self._ready[event.stage].put(ids, there=False)
        return set()

    def _remember(self, stage: str, request: str, lease_id: int) -> None:
        if len(self.requests) >= REQUESTS_REMEMBERED:
            ended = [key for key, lease in self.requests.items() if lease not in self.leases]
            for key in ended[: len(ended) // 2 + 1]:
                del self.requests[key]
        self.requests[stage, request] = lease_id

    def _apply_awaited(self, event: Awaited) -> set[str]:
        self.awaiting |= dict.fromkeys(event.groups, event.deadline)
        return set()

    def _stop_waiting(self, groups: Ids) -> None:
        if self.awaiting:
            for group in groups.tolist():
                self.awaiting.pop(group, None)

    def _apply_renewed(self, event: Renewed) -> set[str]:
        self._set_deadline(event.lease_id, event.deadline)
        return set()

    def _set_deadline(self, lease_id: int, deadline: float) -> None:
        self.leases[lease_id].deadline = deadline
        heapq.heappush(self._deadlines, (deadline, lease_id))

    def _apply_acked(self, event: Acked) -> set[str]:
        stage = self.schema.stages[self.leases[event.lease_id].stage]
        ids = np.array(event.rows, np.int64)
        index, line, rows = ids - self.rows.base, self._line[stage.name], self.rows
        self._release(event.lease_id, ids)
        rows.times[line, index] += 1
        over = rows.times[line, index] >= stage.max_times_leased
        rows.columns[index[over]] |= self.schema.writes[stage.name]
        rows.attempts[line, index[~over]] = 0  # what failed before it was consumed this time is forgiven
        if event.frame != NONE:
            rows.frame[line + 1, index], rows.offset[line + 1, index] = event.frame, np.arange(len(ids))
        self.last_frame = max(self.last_frame, event.frame)
        if stage.role == "generate":
            self._move(ids, Move.GENERATE)
        self._append(ids, event.columns, event.tokens, event.oldest, event.newest)
        return self._complete(ids) | self._enqueue(ids)

    def _complete(self, ids: Ids) -> set[str]:
        """Rows that have all that training needs can be trained."""
        needs, index = self.schema.needs[self.schema.train.name], ids - self.rows.base
        complete = ids[(self.rows.state[index] == GENERATED) & (self.rows.columns[index] & needs == needs)]
        self._move(complete, Move.COMPLETE_SCORES)
        return {self.schema.train.name} if len(complete) else set()

    def _apply_returned(self, event: Returned) -> set[str]:
        stage = self.schema.stages[self.leases[event.lease_id].stage]
        ids = np.array(event.rows, np.int64)
        self._release(event.lease_id, ids)
        for sample_id in event.rows:
            self.rows.reasons.setdefault(sample_id, []).append(event.reason)
        self._give_up(ids, stage)
        self._enqueue(ids)
        return {stage.name}

    def _give_up(self, ids: Ids, stage: Stage) -> None:
        """A stage does not work on some rows any more, and has not finished them."""
        # A scoring stage may hold a row while another one generates or trains it: the role says what came back.
        if stage.role == "generate":
            self._move(ids, Move.RETURN_PROMPT)
        elif stage.role == "train":
            self._move(ids, Move.RETURN_SCORED)
            self._let_go(self._groups_of(ids))

    def _let_go(self, groups: Ids) -> None:
        """The training stage has those groups no longer of which it holds no row."""
        rows = self._members(groups)
        held = self.rows.is_open(rows.ravel()).reshape(rows.shape)
        held[held] = self.rows.state[rows[held] - self.rows.base] == TRAINING
        self.taken.put(groups[~held.any(axis=1)], there=False)

    def _apply_committed(self, event: Committed) -> set[str]:
        step = Consumed(np.array(event.trained, np.int64), np.array(event.skipped, np.int64), len(event.masked))
        self.tally["masked"] += step.masked
        self.last_step = event.trained, event.skipped
        if self.terms.resumable:
            self.rows.kept[step.rows - self.rows.base] = True
        self._end(step.trained, Move.TRAIN, "")
        self._end(step.skipped, Move.DROP, SKIPPED)
        self.learner = PolicyVersion.unpack(event.version)
        if self.terms.resumable:
            self.consumed[self.learner.n] = step
        return self._after_end()

    def _apply_dropped(self, event: Dropped) -> set[str]:
        self._end(np.array(event.rows, np.int64), Move.DROP, event.reason)
        return self._after_end()

    def _apply_quarantined(self, event: Quarantined) -> set[str]:
        ids = np.array(event.rows, np.int64)
        self.rows.kept[ids - self.rows.base] = True  # until its group ends
        self._end(ids, Move.QUARANTINE, event.reason)
        return self._after_end()

    def _apply_restored(self, event: Restored) -> set[str]:
        ids = np.array(event.rows, np.int64)
        index = ids - self.rows.base
        generated = self.schema.writes[self.schema.generate.name]
        has_response = self.rows.columns[index] & generated == generated
        self._move(ids[has_response], Move.RESTORE_RESPONSE)
        self._move(ids[~has_response], Move.RESTORE_PROMPT)
        self.rows.kept[index] = False
        self.rows.attempts[:, index] = 0
        self.ended[str(State.QUARANTINED)] -= len(ids)
        self.tally["restored"] += len(ids)
        self._stop_waiting(self._groups_of(ids))
        return self._complete(ids) | self._enqueue(ids)

    def _apply_requeued(self, event: Requeued) -> set[str]:
        ids = np.array(event.rows, np.int64)
        self._release_all(ids)
        self._move(ids, Move.GENERATE_AGAIN)
        self._forget_response(ids)
        self.tally["requeued"] += len(ids)
        self._stop_waiting(self._groups_of(ids))
        return self._enqueue(ids)

    def _after_end(self) -> set[str]:
        """A row that ended makes room, may complete its group, and may let a later group into the step."""
        return {ADMISSION, self.schema.generate.name, self.schema.train.name}

    def _apply_prioritised(self, event: Prioritised) -> set[str]:
        ids = np.array(event.rows, np.int64)
        self.rows.priority[ids - self.rows.base] = event.priority
        self._enqueue(ids)
        return set()

    def _apply_served(self, event: Served) -> set[str]:
        if event.version is None:
            self.served.pop(event.engine, None)
        else:
            self.served[event.engine] = PolicyVersion.unpack(event.version)
        return {ADMISSION, self.schema.generate.name}

    def _apply_amended(self, event: Amended) -> set[str]:
        terms = msgspec.structs.replace(self.terms, max_staleness=event.max_staleness, last_version=event.last_version)
        self.terms = terms
        return {ADMISSION, *self.schema.stages}

    def _apply_checkpointed(self, event: Checkpointed) -> set[str]:
        for n in self._passed(event):
            self._forget(self.consumed.pop(n).rows)
        return set()

    def _forget(self, ids: Ids) -> None:
        """These have ended for good."""
        self.rows.kept[ids - self.rows.base] = False
        for sample_id in self.rows.reasons.keys() & set(ids.tolist()):
            del self.rows.reasons[sample_id]

    def _apply_resumed(self, event: Resumed) -> set[str]:
        self.last_step = None
        self.learner = PolicyVersion.unpack(event.version)
        number, rows = self.learner.n, self.rows
        ids = rows.open()
        for stage in self.schema.stages.values():
            # A lease whose worker is gone through no fault of the row was no attempt.
            line = self._line[stage.name]
            held = ids[rows.lease[line, ids - rows.base] != 0]
            rows.lease[line, held - rows.base] = 0
            rows.attempts[line, held - rows.base] -= 1
            self._give_up(held, stage)
        self.leases.clear()
        for n in sorted(n for n in self.consumed if n > number):
            step = self.consumed.pop(n)
            self.ended["trained"] -= len(step.trained)
            self.ended[f"{State.DROPPED}:{SKIPPED}"] -= len(step.skipped)
            self.tally["masked"] -= step.masked
            self._move(step.rows, Move.TAKE_BACK)
            rows.kept[step.rows - rows.base] = False
            rows.attempts[self._line[self.schema.train.name], step.rows - rows.base] = 0  # the last one was no failure
            self.groups.put(self._groups_of(step.rows), there=True)
        ids = rows.open()
        self._move(ids[self._newest(ids) > number], Move.GENERATE_AGAIN)
        there = rows.alive()  # what is in quarantine included
        self._forget_response(there[self._newest(there) > number])
        self.taken.clear()
        self.awaiting.clear()
        self.requests.clear()
        self.served.clear()
        self._deadlines.clear()
        self._enqueue(ids)
        return {ADMISSION, *self.schema.stages}

    def _apply_restarted(self, event: Restarted) -> set[str]:
        self._deadlines.clear()
        for lease_id in self.leases:
            self._set_deadline(lease_id, event.deadline)
        return {ADMISSION, *self.schema.stages}

    def _forget_response(self, ids: Ids) -> None:
        """Nothing is left of these but the prompt."""
        index, rows = ids - self.rows.base, self.rows
        rows.columns[index], rows.tokens[index] = self.schema.prompt_mask, rows.prompt_tokens[index]
        rows.oldest[index] = rows.newest[index] = NONE
        rows.attempts[:, index] = rows.times[:, index] = 0
        rows.frame[1:, index] = NONE

    def _move(self, ids: Ids, move: Move) -> None:
        if not len(ids):
            return
        index = ids - self.rows.base
        before = self.rows.state[index]
        after = next_states(before, move)
        self.rows.state[index] = after
        if len(ids) == 1:
            self._counts[before] -= 1
            self._counts[after] += 1
        else:
            self._counts += np.bincount(after, minlength=len(STATES)) - np.bincount(before, minlength=len(STATES))

    def _end(self, ids: Ids, move: Move, reason: str) -> None:
        if not len(ids):
            return
        self._move(ids, move)
        state = STATES[self.rows.state[ids[0] - self.rows.base]]
        self.ended[f"{state}:{reason}" if state is State.DROPPED else str(state)] += len(ids)
        self._release_all(ids)
        for line in self._ready.values():
            line.put(ids, there=False)
        kept = self.rows.kept[ids - self.rows.base]
        self._forget(ids[~kept])
        over = self._over_without(ids)
        self.groups.put(over, there=False)
        self._let_go(self._groups_of(ids))
        self._forget(self._quarantined_of(over))
        self._stop_waiting(over)

    def _release_all(self, ids: Ids) -> None:
        """Take these rows out of every lease."""
        for line in self._line.values():
            leases = self.rows.lease[line, ids - self.rows.base]
            for lease_id in set(leases[leases != 0].tolist()):
                self._release(lease_id, ids[leases == lease_id])

    def _release(self, lease_id: int, ids: Ids) -> None:
        lease = self.leases[lease_id]
        self.rows.lease[self._line[lease.stage], ids - self.rows.base] = 0
        lease.left -= len(ids)
        if not lease.left:
            del self.leases[lease_id]

    def _enqueue(self, ids: Ids) -> set[str]:
        """Remember which of the rows are ready for which stages; returns the stages that have new ones."""
        topics = set()
        for stage, marks in self._ready.items():
            ready = self.is_ready(ids, stage)
            marks.put(ids, ready)
            if ready.any():
                topics.add(stage)
        return topics

    def is_ready(self, ids: Ids, stage: str) -> Flags:
        """Which of these rows, which have entries, a stage could take."""
        index = ids - self.rows.base
        needs, writes, columns = self.schema.needs[stage], self.schema.writes[stage], self.rows.columns[index]
        ready: Flags = (columns & needs == needs) & (self.rows.lease[self._line[stage], index] == 0)
        ready &= columns & writes != writes
        return ready & (self.rows.state[index] < len(OPEN_STATES))

    def _groups_of(self, ids: Ids) -> Ids:
        return np.unique(ids // self.group_size) if self.group_size > 1 else ids

    def _newest(self, ids: Ids) -> NDArray[np.int64]:
        """Number of the version of each row's newest token; −1 without tokens."""
        newest = self.rows.newest[ids - self.rows.base]
        numbers: NDArray[np.int64] = np.where(newest == NONE, -1, newest & NUMBER)
        return numbers

    def _writer_line(self, column: str) -> int:
        """In which line of `Rows.frame` a column is."""
        bit = self.schema.bit(column)
        return next((self._line[name] + 1 for name, writes in self.schema.writes.items() if writes & bit), 0)

    # -- the account ---------------------------------------------------------------------------------------------------

    def dropped(self) -> dict[str, int]:
        """Samples that were dropped, by reason."""
        prefix = f"{State.DROPPED}:"
        return {key.removeprefix(prefix): n for key, n in self.ended.items() if n and key.startswith(prefix)}

    def ready(self) -> dict[str, int]:
        """Samples that each stage but the training stage could take now."""
        return {stage: marks.count for stage, marks in self._ready.items()}

    def leased(self) -> dict[str, int]:
        """Samples out on lease, by stage."""
        counts: Counter[str] = Counter()
        for lease in self.leases.values():
            counts[lease.stage] += lease.left
        return dict(counts)

    def snapshot(self) -> Mapping[str, Any]:
        """The whole state as plain values: equal for two tables to which the same events were applied."""
        return {
            "terms": self.terms,
            "rows": self.rows.plain(),
            "consumed": {n: (tuple(s.trained.tolist()), tuple(s.skipped.tolist())) for n, s in self.consumed.items()},
            "groups": tuple(self.groups.first(self.groups.count).tolist()),
            "taken": tuple(self.taken.first(self.taken.count).tolist()),
            "ready": {stage: tuple(marks.first(marks.count).tolist()) for stage, marks in self._ready.items()},
            "leases": {i: (r.stage, r.worker, r.left) for i, r in self.leases.items()},
            "served": dict(self.served),
            "learner": self.learner,
            "puts": dict(self.puts),
            "last_step": self.last_step,
            "next": (self.next_sample, self.next_group, self.next_lease, self.last_frame),
            "ended": dict(self.ended),
            "tally": dict(self.tally),
            "requests": dict(self.requests),
            "shares": {i: [share.tolist() for share in r.shares] for i, r in self.leases.items() if r.shares},
            "states": self.states,
        }

    def copy(self) -> Table:
        """The table as it is now, to be read in another thread."""
        other = copy(self)
        other.rows, other.groups, other.taken = self.rows.copy(), self.groups.copy(), self.taken.copy()
        other.leases = {lease_id: copy(lease) for lease_id, lease in self.leases.items()}
        other.served, other.ended, other.consumed = dict(self.served), self.ended.copy(), dict(self.consumed)
        other.puts, other.requests, other.tally = dict(self.puts), dict(self.requests), self.tally.copy()
        other.awaiting = dict(self.awaiting)
        other._counts = self._counts.copy()
        other._ready = {stage: marks.copy() for stage, marks in self._ready.items()}
        other._deadlines = list(self._deadlines)
        return other

    def dump(self) -> tuple[Image, dict[str, NDArray[Any]]]:
        """Everything, for `load`: plain values, and arrays. Samples that have ended for good are left out."""
        ids, steps = self.rows.alive(), self.consumed.items()
        every = len(ids) == self.rows.end - self.rows.base
        index = slice(0, len(ids)) if every else ids - self.rows.base
        nothing = np.zeros(0, np.int64)
        arrays: dict[str, NDArray[Any]] = {
            **{f"rows.{name}": getattr(self.rows, name)[..., index] for name in self.rows.fields},
            **{f"ready.{stage}": marks.members() for stage, marks in self._ready.items()},
            "ids": ids,
            "groups": self.groups.all(),
            "taken": self.taken.all(),
            "counts": self._counts,
            "leased": np.concatenate([nothing, *(lease.rows for lease in self.leases.values())]),
            "consumed": np.concatenate([nothing, *(step.rows for _, step in steps)]),
        }
        image = Image(
            terms=self.terms,
            next_sample=self.next_sample,
            next_group=self.next_group,
            next_lease=self.next_lease,
            last_frame=self.last_frame,
            learner=self.learner.packed,
            served={engine: version.packed for engine, version in self.served.items()},
            ended=dict(self.ended),
            reasons=self.rows.reasons,
            leases=[
                (
                    lease_id,
                    lease.stage,
                    lease.worker,
                    len(lease.rows),
                    lease.left,
                    lease.deadline,
                    lease.max_staleness,
                    lease.ranks,
                    [share.tolist() for share in lease.shares],
                )
                for lease_id, lease in self.leases.items()
            ],
            requests=[(stage, name, lease_id) for (stage, name), lease_id in self.requests.items()],
            tally=dict(self.tally),
            last_step=self.last_step,
            puts=self.puts,
            consumed=[(n, len(step.trained), len(step.skipped), step.masked) for n, step in steps],
        )
        return image, arrays

    @classmethod
    def load(cls, schema: Schema, image: Image, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The table that `dump` has told. Raises LookupError, TypeError or ValueError for what it cannot have told."""
        table = cls(schema, image.terms)
        fields = {name: arrays[f"rows.{name}"] for name in table.rows.fields}
        table.rows.fill(image.next_sample, arrays["ids"], fields)
        table.rows.reasons = image.reasons
        table.groups.put(arrays["groups"], there=True)
        table.taken.put(arrays["taken"], there=True)
        for stage, marks in table._ready.items():
            marks.put(arrays[f"ready.{stage}"], there=True)
        table._counts[:] = arrays["counts"]
        table.next_sample, table.next_group, table.next_lease, table.last_frame = (
            image.next_sample, image.next_group, image.next_lease, image.last_frame,
        )  # fmt: skip
        table.learner = PolicyVersion.unpack(image.learner)
        table.served = {engine: PolicyVersion.unpack(version) for engine, version in image.served.items()}
        table.ended = Counter(image.ended)
        table.puts, table.tally = image.puts, Counter(image.tally)
        table.last_step = image.last_step
        table.requests = {(stage, name): lease_id for stage, name, lease_id in image.requests}
        begin = 0
        for lease_id, stage, worker, count, left, deadline, bound, ranks, places in image.leases:
            rows, shares = arrays["leased"][begin : begin + count], tuple(np.array(some, np.int64) for some in places)
            table.leases[lease_id] = LeaseRecord(stage, worker, rows, left, deadline, bound, ranks, shares)
            table._set_deadline(lease_id, deadline)
            begin += count
        begin = 0
        for n, trained, skipped, masked in image.consumed:
            rows = arrays["consumed"][begin : begin + trained + skipped]
            table.consumed[n] = Consumed(rows[:trained], rows[trained:], masked)
            begin += trained + skipped
        return table


def _check_counts(tokens: Sequence[int]) -> None:
    if len(tokens) and not 0 <= min(tokens) <= max(tokens) < 1 << 31:
        raise StoreError("a number of tokens cannot be below 0, or beyond 31 bits")


def _versions(packed: Sequence[int | None]) -> Sequence[int] | NDArray[np.int64]:
    """With NONE in place of None."""
    if len(packed) > 1 and packed.count(packed[0]) == len(packed):
        return np.full(len(packed), NONE if packed[0] is None else packed[0], np.int64)
    return [NONE if version is None else version for version in packed]


def _checked(priority: int) -> int:
    if not -MOST_PRIORITY <= priority <= MOST_PRIORITY:
        raise StoreError(f"a priority is a whole number between ±{MOST_PRIORITY}, not {priority}")
    return priority


def _named(sample_ids: Sequence[int]) -> str:
    """Samples for a message; of many only the first."""
    return f"sample {', '.join(map(str, sample_ids[:4]))}{' and others' if len(sample_ids) > 4 else ''}"


_HANDLERS: dict[type[Event], Callable[[Table, Any], set[str]]] = {
    Admitted: Table._apply_admitted,
    Leased: Table._apply_leased,
    Renewed: Table._apply_renewed,
    Acked: Table._apply_acked,
    Returned: Table._apply_returned,
    Committed: Table._apply_committed,
    Dropped: Table._apply_dropped,
    Quarantined: Table._apply_quarantined,
    Prioritised: Table._apply_prioritised,
    Restored: Table._apply_restored,
    Requeued: Table._apply_requeued,
    Awaited: Table._apply_awaited,
    Served: Table._apply_served,
    Amended: Table._apply_amended,
    Checkpointed: Table._apply_checkpointed,
    Resumed: Table._apply_resumed,
    Restarted: Table._apply_restarted,
}
