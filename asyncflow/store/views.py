"""Questions about the state of a run, which change nothing: who is ready, how old is it, how much room is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from asyncflow.errors import LeaseLost, StoreError
from asyncflow.store.client import Place
from asyncflow.store.events import PutId
from asyncflow.store.lifecycle import OPEN_STATES, STATES, State
from asyncflow.store.rows import NONE, Flags, Ids, Row
from asyncflow.store.samplers import NUMBER
from asyncflow.store.state import REWARDED, TableState
from asyncflow.store.topics import ADMISSION, BOUND, END, FEEDER, ROWS, WEIGHTS
from asyncflow.types import PolicyVersion


class Views(TableState):
    """What follows from the state."""

    @property
    def groups_per_step(self) -> int:
        return self.terms.train_batch_size // self.group_size

    @property
    def most_open(self) -> int:
        """Places that can be open at the same time: those of the step under way and of `max_staleness` later ones."""
        return (self.terms.max_staleness + 1) * self.terms.train_batch_size

    @property
    def most_generated(self) -> int:
        """Places, in admission order, that may have a response from what is served now.

        More than these can be open after the bound was lowered, after an engine that lags has joined, or after the run
        went back to a checkpoint; the others have to wait for younger weights. None while nobody serves: what would
        generate them is not known.
        """
        if not self.served:
            return 0
        slowest = min(version.n for version in self.served.values())
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

    @property
    def makes_a_step(self) -> bool:
        """Whether the open groups are as many as a step takes."""
        return self.groups.count >= self.groups_per_step

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

    def _missing(self, stage: str) -> Counter[str]:
        """Groups of the training stage's step that lack columns for `stage`, by the stage that has yet to act."""
        needs = self.schema.needs[stage]
        if not needs & ~self.schema.prompt_mask & ~self.schema.writes[self.schema.generate.name]:
            return Counter()  # it needs nothing but completions: no look at the groups is necessary
        names, rows = list(self.schema.stages), self._members(self.groups.first(self.groups_per_step))
        columns, index = self.rows.columns, rows - self.rows.base
        lacking = self.rows.narrow(self.rows.is_open(rows), rows, lambda index: columns[index] & needs != needs)
        writer = np.full(rows.shape, len(names))
        for have in np.unique(columns[index[lacking]]).tolist():
            place = names.index(self.schema.next_writer(have, needs))
            writer[lacking & (columns[np.where(lacking, index, 0)] == have)] = place
        slowest = writer.min(axis=1)  # a group is as far as its slowest row
        found = np.bincount(slowest, minlength=len(names) + 1)[:-1]
        return Counter({names[place]: int(count) for place, count in enumerate(found) if count})

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
        there = self.rows.narrow(
            self.rows.has_entry(ids),
            ids,
            lambda index: self.rows.has_data(index + self.rows.base) & (self.rows.columns[index] & mask == mask),
        )
        if not there.all():
            raise StoreError(
                f"{named(ids[~there].tolist())} has ended or does not have {', '.join(names)} yet: ask for others"
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
            raise StoreError(f"{named(ids[~there].tolist())} has ended: ask for others")
        have = int(np.bitwise_and.reduce(self.rows.columns[ids - self.rows.base])) if len(ids) else 0
        return tuple(name for name in self.schema.names(have) if name in self.schema.written)

    def attempts(self, stage: str, ids: Ids) -> NDArray[np.int32]:
        """How often each of these samples was leased to a stage."""
        attempts: NDArray[np.int32] = self.rows.attempts[self._line[stage], ids - self.rows.base]
        return attempts

    def _writer_line(self, column: str) -> int:
        """In which line of `Rows.frame` a column is."""
        bit = self.schema.bit(column)
        return next((self._line[name] + 1 for name, writes in self.schema.writes.items() if writes & bit), 0)

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
        return min((time for time in (self._closing(), self._runs_out()) if time is not None), default=None)

    def _runs_out(self) -> float | None:
        """Earliest deadline of a lease."""
        return self._deadlines[0][0] if self._deadlines else None

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
        return self.rows.narrow(self.rows.has_entry(rows), rows, lambda index: self.rows.state[index] < REWARDED)

    def _have(self, ids: Ids, columns: int) -> Flags:
        """Which of these are open and have all of these columns; any number may be asked for."""
        return self.rows.narrow(
            self.rows.is_open(ids), ids, lambda index: self.rows.columns[index] & columns == columns
        )

    def held(self, lease_id: int) -> Ids:
        """Rows that a lease still holds."""
        lease = self.leases[lease_id]
        rows = lease.rows[lease.rows >= self.rows.base]
        held: Ids = rows[self.rows.lease[self._line[lease.stage], rows - self.rows.base] == lease_id]
        return held

    def admitted_by(self, put: PutId) -> int | None:
        """First group of a producer's last put; None when it is another one."""
        last = self.puts.get(put.producer)
        return last[1] if last is not None and last[0] == put else None

    def granted(self, stage: str, request: str, *, ranks: int | None = None) -> int | None:
        """The lease that a stage was given when it asked under this name before; None when it did not.

        It has the very same rows, whoever asks: the replicas of a rank work on the same. Raises LeaseLost when some of
        the rows have ended, or are generated again, or the lease has ended; StoreError for another number of ranks.
        """
        lease_id = self.requests.get((stage, request))
        if lease_id is None:
            return None
        lease = self.leases.get(lease_id)
        lost = () if lease is None else tuple(lease.rows[~self._have(lease.rows, self.schema.needs[stage])].tolist())
        if lease is None or lost:
            raise LeaseLost(
                f"the lease that {stage} asked for as {request!r} has ended{f' for {named(lost)}' if lost else ''}: "
                "ask under a new name",
                rows=lost,
            )
        if lease.ranks != ranks:
            raise StoreError(f"{request!r} was asked for with ranks {lease.ranks}, not {ranks}: all must ask alike")
        return lease_id

    def _has_brought(self, rows: Sequence[int], columns: int, frame: int) -> bool:
        """Whether the rows have these columns of one stage from this frame, each from its place in it."""
        stage = next((name for name, writes in self.schema.writes.items() if writes == columns), None)
        ids = np.asarray(rows, np.int64)
        if frame == NONE or stage is None or not self.rows.has_entry(ids).all():
            return False
        line, index = self._line[stage] + 1, ids - self.rows.base
        same = (self.rows.frame[line, index] == frame) & (self.rows.offset[line, index] == np.arange(len(ids)))
        return bool((same & self.rows.has_data(ids)).all())

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


def named(sample_ids: Sequence[int]) -> str:
    """Samples for a message; of many only the first."""
    return f"sample {', '.join(map(str, sample_ids[:4]))}{' and others' if len(sample_ids) > 4 else ''}"
