"""All that is known of the samples of one run, and the one mutator that changes it. No clock, no I/O, no threads.

Samples are numbered without gaps, and those of a group are consecutive: group g has the samples from g·n on. What is
known of them is kept in arrays (`rows.py`), so that a call for a thousand costs little more than one for a single one.

Nothing but this file assigns to the state (a test reads the others). What follows from it is in `views.py`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncflow.store.balance import balanced
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
from asyncflow.store.lifecycle import OPEN_STATES, SKIPPED, STATES, Move, State, next_states
from asyncflow.store.rows import NONE, Flags, Ids, Marks, Rows
from asyncflow.store.samplers import NUMBER, line_for
from asyncflow.store.schema import Schema, Stage
from asyncflow.store.topics import ADMISSION
from asyncflow.types import PolicyVersion

REQUESTS_REMEMBERED = 4096
"""Leases that were asked for by name: so many are known, those that have ended included."""
PRODUCERS_REMEMBERED = 65_536
"""Producers whose last put is known; those that have put last."""

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


class TableState:
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

    # -- what the mutator has to know ----------------------------------------------------------------------------------

    @property
    def group_size(self) -> int:
        return self.terms.num_generations

    def _members(self, groups: Ids) -> Ids:
        """(G, n) Samples of groups, those included that have ended."""
        members: Ids = groups[:, None] * self.group_size + np.arange(self.group_size)
        return members

    def _groups_of(self, ids: Ids) -> Ids:
        return np.unique(ids // self.group_size) if self.group_size > 1 else ids

    def _newest(self, ids: Ids) -> NDArray[np.int64]:
        """Number of the version of each row's newest token; −1 without tokens."""
        newest = self.rows.newest[ids - self.rows.base]
        numbers: NDArray[np.int64] = np.where(newest == NONE, -1, newest & NUMBER)
        return numbers

    def _over_without(self, ids: Ids) -> Ids:
        """Groups of these rows of which no other row is open."""
        if self.group_size == 1:
            return ids
        groups, left = self._left_without(ids)
        over: Ids = groups[~left.any(axis=1)]
        return over

    def _left_without(self, ids: Ids) -> tuple[Ids, Flags]:
        """(G,) The groups of these rows; (G, n) which of their rows are open and are others than these."""
        groups = np.unique(ids // self.group_size)
        rows = self._members(groups)
        return groups, self.rows.is_open(rows) & ~np.isin(rows, ids)

    def _quarantined_of(self, groups: Ids) -> Ids:
        """Those samples of groups that may be put back."""
        rows = self._members(groups).ravel()
        quarantined: Ids = rows[self.rows.is_quarantined(rows)]
        return quarantined

    def _passed(self, event: Checkpointed) -> list[int]:
        oldest = PolicyVersion.unpack(event.oldest).n
        return [n for n in self.consumed if n <= oldest]

    def _writers(self, columns: int) -> Iterator[str]:
        """Stages all of whose columns are among these."""
        return (stage for stage, writes in self.schema.writes.items() if writes and columns & writes == writes)

    def is_ready(self, ids: Ids, stage: str) -> Flags:
        """Which of these rows, which have entries, a stage could take."""
        index = ids - self.rows.base
        needs, writes, columns = self.schema.needs[stage], self.schema.writes[stage], self.rows.columns[index]
        ready: Flags = (columns & needs == needs) & (self.rows.lease[self._line[stage], index] == 0)
        ready &= columns & writes != writes
        if stage not in self.schema.needed:  # it has failed on these too often, and nobody waits for it
            ready &= self.rows.attempts[self._line[stage], index] < self.terms.max_attempts
        return ready & (self.rows.state[index] < len(OPEN_STATES))

    # -- the one mutator -----------------------------------------------------------------------------------------------

    def apply(self, event: Event) -> set[str]:
        """Change the state. Returns the topics (stages, ADMISSION) for which something may have become possible."""
        handler: Callable[[TableState, Any], set[str]] | None = _HANDLERS.get(type(event))
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
            self._remember_put(event.put, event.first_group, many)
        topics = self._may_wait()
        if brought is not None and brought.oldest:
            topics |= self._not_waited_for(ids)
        if state == REWARDED:
            topics.add(self.schema.train.name)
        for stage, marks in self._ready.items():
            needs, writes = self.schema.needs[stage], self.schema.writes[stage]
            if columns & needs == needs and columns & writes != writes:
                marks.put(ids, there=True)
                topics.add(stage)
        return topics

    def _remember_put(self, put: PutId, first_group: int, groups: int) -> None:
        self.puts.pop(put.producer, None)  # whoever put last is the last
        self.puts[put.producer] = put, first_group, groups
        if len(self.puts) > PRODUCERS_REMEMBERED:
            del self.puts[next(iter(self.puts))]

    def _may_wait(self) -> set[str]:
        """The training stage, where it has to look again to see which groups it waits for."""
        return set() if self.terms.group_timeout is None else {self.schema.train.name}

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
        self._forget_deadlines()

    def _forget_deadlines(self) -> None:
        """What comes first is the deadline of a lease that there is."""
        while self._deadlines:
            deadline, lease_id = self._deadlines[0]
            lease = self.leases.get(lease_id)
            if lease is not None and lease.deadline == deadline:
                return
            heapq.heappop(self._deadlines)

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
        topics = self._complete(ids) | self._enqueue(ids)
        return topics | self._not_waited_for(ids) if event.oldest else topics

    def _not_waited_for(self, ids: Ids) -> set[str]:
        """The training stage, where tokens have come that are too old: the place of their group is another one's."""
        oldest = self.rows.oldest[ids - self.rows.base]
        late = (oldest != NONE) & (self.learner.n - (oldest & NUMBER) > self.terms.max_staleness)
        return {self.schema.train.name} if late.any() else set()

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
        if event.final and stage.name not in self.schema.needed:
            attempts, index = self.rows.attempts[self._line[stage.name]], ids - self.rows.base
            attempts[index] = np.maximum(attempts[index], self.terms.max_attempts)
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
        held = self.rows.narrow(self.rows.has_entry(rows), rows, lambda index: self.rows.state[index] == TRAINING)
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
        return self._complete(ids) | self._enqueue(ids) | self._may_wait()

    def _apply_requeued(self, event: Requeued) -> set[str]:
        ids = np.array(event.rows, np.int64)
        self._release_all(ids)
        self._move(ids, Move.GENERATE_AGAIN)
        self._forget_response(ids)
        self.tally["requeued"] += len(ids)
        self._stop_waiting(self._groups_of(ids))
        return self._enqueue(ids) | self._may_wait()

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
            self._forget_deadlines()

    def _enqueue(self, ids: Ids) -> set[str]:
        """Remember which of the rows are ready for which stages; returns the stages that have new ones."""
        topics = set()
        for stage, marks in self._ready.items():
            ready = self.is_ready(ids, stage)
            marks.put(ids, ready)
            if ready.any():
                topics.add(stage)
        return topics


def _versions(packed: Sequence[int | None]) -> Sequence[int] | NDArray[np.int64]:
    """With NONE in place of None."""
    if len(packed) > 1 and packed.count(packed[0]) == len(packed):
        return np.full(len(packed), NONE if packed[0] is None else packed[0], np.int64)
    return [NONE if version is None else version for version in packed]


_HANDLERS: dict[type[Event], Callable[[TableState, Any], set[str]]] = {
    Admitted: TableState._apply_admitted,
    Leased: TableState._apply_leased,
    Renewed: TableState._apply_renewed,
    Acked: TableState._apply_acked,
    Returned: TableState._apply_returned,
    Committed: TableState._apply_committed,
    Dropped: TableState._apply_dropped,
    Quarantined: TableState._apply_quarantined,
    Prioritised: TableState._apply_prioritised,
    Restored: TableState._apply_restored,
    Requeued: TableState._apply_requeued,
    Awaited: TableState._apply_awaited,
    Served: TableState._apply_served,
    Amended: TableState._apply_amended,
    Checkpointed: TableState._apply_checkpointed,
    Resumed: TableState._apply_resumed,
    Restarted: TableState._apply_restarted,
}
