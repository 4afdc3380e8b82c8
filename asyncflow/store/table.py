"""The core of the store: who is ready, who may have it, how old is it. No clock, no I/O, no threads.

Methods that decide are pure: they return events and change nothing. `apply` is the one place that changes state. So the
journal can be written in between, replaying it rebuilds the table, and tests need no time and no locks.

Staleness is bounded by construction (`docs/staleness.md` has the proof): a group is admitted only while
`(η+1)·B − open − (v_learner − v_served)·B` leaves room, and the learner consumes in admission order, B places a step.
What the construction cannot see (an engine that serves less than it says) is caught again at lease and at commit.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from asyncflow.errors import IllegalTransition, LeaseLost, StalenessViolation, StoreError
from asyncflow.store.events import (
    Acked,
    Admitted,
    Amended,
    Checkpointed,
    Committed,
    Dropped,
    Event,
    Leased,
    Opened,
    Quarantined,
    Renewed,
    Resumed,
    Returned,
    Served,
)
from asyncflow.store.lifecycle import END_STATES, OPEN_STATES, Move, State, next_state
from asyncflow.store.schema import Schema
from asyncflow.types import PolicyVersion

LATE = "late"
SHORT_GROUP = "short_group"
SKIPPED = "zero_variance_skipped"

ADMISSION = "admission"
"""Topic of those who wait for room; stages wait under their own names."""

FEEDER = "feeder"
BOUND = "bound"
WEIGHTS = "weights"
END = "end"
"""What is waited for, besides stages: the next prompt; a commit, because the staleness bound is reached; an engine that
serves newer weights; nothing, because the last step has all of its samples."""


@dataclass(slots=True)
class Row:
    """One sample."""

    sample_id: int
    group_id: int
    state: State
    columns: int
    """Bit set of the columns that are there."""
    prompt_tokens: int
    tokens: int
    """Prompt and response."""
    oldest: int | None = None
    """Oldest and newest packed policy version among the response tokens."""
    newest: int | None = None
    leases: dict[str, int] = field(default_factory=dict)
    """Stage → lease that holds the row."""
    attempts: dict[str, int] = field(default_factory=dict)
    """Stage → leases so far."""
    reasons: list[str] = field(default_factory=list)
    """Why it came back, or ended."""
    frames: list[tuple[int, int, int]] = field(default_factory=list)
    """Where the data are: (columns, frame, offset)."""

    @property
    def ended(self) -> bool:
        return self.state in END_STATES


@dataclass(slots=True)
class LeaseRecord:
    stage: str
    worker: str
    rows: set[int]
    deadline: float
    max_staleness: int
    """The bound under which the rows were leased: a lower one that comes later is for what is leased from then on."""


@dataclass(slots=True)
class Consumed:
    """Rows of a step that a checkpoint has not passed yet: the run may go back and train them again."""

    trained: list[Row]
    skipped: list[Row]

    @property
    def rows(self) -> list[Row]:
        return self.trained + self.skipped


class Table:
    """State of all samples of one run. Made by replaying events, of which the first is `Opened`."""

    def __init__(self, schema: Schema, opened: Opened) -> None:
        self.schema = schema
        self.terms = opened
        self.rows: dict[int, Row] = {}
        """Open rows only: what has ended is in the counters and in the ledger."""
        self.groups: OrderedDict[int, set[int]] = OrderedDict()
        """Open groups in admission order → their open rows."""
        self.taken: set[int] = set()
        """Groups that the training stage holds for the step under way."""
        self.leases: dict[int, LeaseRecord] = {}
        self.served: dict[str, PolicyVersion] = {}
        self.learner = PolicyVersion(n=0)
        self.next_sample = self.next_group = 0
        self.next_lease = 1
        self.ended: Counter[str] = Counter()
        """trained, quarantined, and dropped:<reason> → samples."""
        self.states: Counter[State] = Counter()
        self.consumed: dict[int, Consumed] = {}
        """Version number of a step → its rows, as long as they can be taken back."""
        self._ready: dict[str, list[int]] = {s: [] for s in schema.stages if s != schema.train.name}
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

    def _room(self) -> tuple[int, str]:
        """Samples that may be admitted now, below zero when there are too many, and what sets this limit."""
        if not self.served:
            return 0, WEIGHTS
        batch, places = self.terms.train_batch_size, len(self.groups) * self.group_size
        room = self.most_generated - places
        if self.terms.last_version is not None:
            left = (self.terms.last_version - self.learner.n) * batch - places
            if left <= room:
                return left, END
        lags = room < self.group_size <= self.most_open - places
        return room, WEIGHTS if lags else BOUND

    def awaited(self, topic: str) -> str:
        """What a stage that has nothing to do, or ADMISSION that has no room, waits for.

        A stage (`rollout`, `reward`, …) that has yet to bring its columns; or, where no sample is on its way: FEEDER,
        BOUND, WEIGHTS or END. Of several, what most groups of the training stage's step wait for.
        """
        generate = self.schema.generate.name
        if topic not in (ADMISSION, generate):
            if waits := self._missing(topic):
                return waits.most_common(1)[0][0]
            if self.states[State.PROMPTED] + self.states[State.GENERATING]:
                return generate
        room, limit = self._room()
        return FEEDER if room >= self.group_size else limit

    def _missing(self, stage: str) -> Counter[str]:
        """Groups of the training stage's step that lack columns for `stage`, by the stage that has yet to act."""
        waits: Counter[str] = Counter()
        needs = self.schema.needs[stage]
        if not needs & ~self.schema.prompt_mask & ~self.schema.writes[self.schema.generate.name]:
            return waits  # it needs nothing but completions: no look at the groups is necessary
        for members in islice(self.groups.values(), self.terms.train_batch_size // self.group_size):
            columns = {self.rows[sample_id].columns for sample_id in members}
            missing = {self.schema.next_writer(have, needs) for have in columns if needs & ~have}
            # A group is as far as its slowest row.
            waits.update([next(name for name in self.schema.stages if name in missing)] if missing else [])
        return waits

    def staleness(self, row: Row) -> int:
        """Learner version before the step minus the version of the row's oldest token; 0 without tokens."""
        return 0 if row.oldest is None else self.learner.n - PolicyVersion.unpack(row.oldest).n

    def is_ready(self, row: Row, stage: str) -> bool:
        needs, writes = self.schema.needs[stage], self.schema.writes[stage]
        return (
            not row.ended
            and stage not in row.leases
            and row.columns & needs == needs
            and (not writes or row.columns & writes != writes)
        )

    def waited_for(self) -> list[tuple[Row, str | None]]:
        """Rows of the step under way that are not ready to be trained, each with the worker that holds it."""
        window = self.terms.train_batch_size // self.group_size
        rows = [
            self.rows[sample_id]
            for group_id in list(islice(self.groups, window))
            if group_id not in self.taken
            for sample_id in sorted(self.groups[group_id])
        ]
        return [
            (row, next((self.leases[lease_id].worker for lease_id in row.leases.values()), None))
            for row in rows
            if row.state is not State.REWARDED
        ]

    def next_deadline(self) -> float | None:
        """Earliest deadline of a lease, or None."""
        while self._deadlines:
            deadline, lease_id = self._deadlines[0]
            lease = self.leases.get(lease_id)
            if lease is not None and lease.deadline == deadline:
                return deadline
            heapq.heappop(self._deadlines)
        return None

    # -- decisions: pure -----------------------------------------------------------------------------------------------

    def admit(self, prompt_tokens: Sequence[int], *, frame: int) -> list[Event] | None:
        """Admit one group for each prompt, or None while there is no room for all of them.

        Raises StoreError for more groups than there could ever be room for.
        """
        places, most = len(prompt_tokens) * self.group_size, self.most_open
        if places > most:
            raise StoreError(
                f"{len(prompt_tokens)} groups at once need {places} places, and max_staleness "
                f"{self.terms.max_staleness} never leaves more than {most}: admit at most "
                f"{most // self.group_size} groups at a time"
            )
        if self.capacity() < places:
            return None
        return [
            Admitted(
                first_group=self.next_group,
                first_sample=self.next_sample,
                prompt_tokens=tuple(prompt_tokens),
                frame=frame,
            )
        ]

    def lease(self, stage: str, *, worker: str, max_rows: int, max_tokens: int | None, deadline: float) -> list[Event]:
        """Lease rows in admission order; no `Leased` event among the result when nothing is ready.

        For the training stage: whole groups of the step under way, which is the first B places that are open. Within
        these the order does not matter for staleness, so a group that is complete need not wait for an earlier one.
        """
        if stage == self.schema.train.name:
            events, rows = self._choose_groups(max_rows, max_tokens)
        else:
            events, rows = [], self._choose_rows(stage, max_rows, max_tokens)
        if rows:
            leased = Leased(lease_id=self.next_lease, stage=stage, worker=worker, rows=tuple(rows), deadline=deadline)
            events.append(leased)
        return events

    def _choose_rows(self, stage: str, max_rows: int, max_tokens: int | None) -> list[int]:
        queue, tokens = self._ready[stage], 0
        last_group = self._last_group_to_generate() if stage == self.schema.generate.name else None
        seen: dict[int, None] = {}
        chosen: list[int] = []
        while queue and len(chosen) < max_rows:
            sample_id = heapq.heappop(queue)
            row = self.rows.get(sample_id)
            if row is None or sample_id in seen or not self.is_ready(row, stage):
                continue  # it ended, stands in the queue twice, or was leased: nobody misses the entry
            seen[sample_id] = None
            if last_group is not None and row.group_id > last_group:
                break
            tokens += row.tokens
            if chosen and max_tokens is not None and tokens > max_tokens:
                break
            chosen.append(sample_id)
        # A decision that is never applied must leave the rows where they are. One that is applied makes these entries
        # stale, and the next call throws them away.
        for sample_id in seen:
            heapq.heappush(queue, sample_id)
        return chosen

    def _last_group_to_generate(self) -> int | None:
        """Id of the last group that may be generated now; None when all may."""
        groups = self.most_generated // self.group_size
        if len(self.groups) <= groups:
            return None
        return next(islice(self.groups, groups - 1, None)) if groups else -1

    def _choose_groups(self, max_rows: int, max_tokens: int | None) -> tuple[list[Event], list[int]]:
        events: list[Event] = []
        chosen: list[int] = []
        window = self.terms.train_batch_size // self.group_size
        tokens = 0
        for group_id, members in self.groups.items():
            if window == 0:
                break
            rows = [self.rows[sample_id] for sample_id in sorted(members)]
            late = [row.sample_id for row in rows if self.staleness(row) > self.terms.max_staleness]
            if late and group_id not in self.taken:
                short = self._short_groups(late)
                events += [Dropped(rows=tuple(late), reason=LATE), *short]
                rows = [] if short else [row for row in rows if row.sample_id not in late]
            if not rows:
                continue  # its place in the step goes to a later group
            window -= 1
            if group_id in self.taken or any(row.state is not State.REWARDED for row in rows):
                continue
            tokens += sum(row.tokens for row in rows)
            if chosen and (len(chosen) + len(rows) > max_rows or (max_tokens is not None and tokens > max_tokens)):
                break
            chosen += [row.sample_id for row in rows]
        return events, chosen

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
        """Append a stage's columns to rows of a lease, all of its columns at once.

        Raises LeaseLost naming the rows that are not in the lease any more, StoreError for other columns than the stage
        writes, IllegalTransition for the training stage, which ends its rows by a commit.
        """
        stage = self.schema.stages[self._holds(lease_id, rows).stage]
        if stage.role == "train":
            raise IllegalTransition(f"stage {stage.name} ends its samples with a commit, not with an ack")
        if columns != self.schema.writes[stage.name]:
            raise StoreError(
                f"stage {stage.name} writes {', '.join(stage.writes)}; "
                f"its ack brings {', '.join(self.schema.names(columns)) or 'nothing'}"
            )
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
        """Take back the rows of every lease whose deadline has passed."""
        returns = [
            Returned(lease_id=i, rows=tuple(sorted(lease.rows)), reason=f"the lease of {lease.worker} ran out")
            for i, lease in self.leases.items()
            if lease.deadline <= now
        ]
        return self._give_back(returns, final=False)

    def commit(
        self, *, leases: Sequence[int], trained: Sequence[int], skipped: Sequence[int], version: PolicyVersion
    ) -> list[Event]:
        """Check that the rows are one whole step within the bound, held under these leases of the training stage.

        Raises LeaseLost naming the rows that are not, IllegalTransition or StalenessViolation.
        """
        rows = {*trained, *skipped}
        if len(rows) != len(trained) + len(skipped):
            raise IllegalTransition("a commit names a sample twice")
        stage, holders = self.schema.train.name, set(leases)
        if lost := sorted(i for i in rows if i not in self.rows or self.rows[i].leases.get(stage) not in holders):
            raise LeaseLost(f"a commit is for what its leases hold: they do not hold {_named(lost)}", rows=lost)
        for sample_id in rows:
            row = self.rows[sample_id]
            bound = self.leases[row.leases[stage]].max_staleness
            if self.staleness(row) > bound:
                raise StalenessViolation(f"sample {sample_id} has staleness {self.staleness(row)}, above {bound}")
        groups = {self.rows[sample_id].group_id for sample_id in rows}
        if rows != set().union(*(self.groups[group_id] for group_id in groups)):
            raise IllegalTransition("a commit holds whole groups: some sample of a group is missing")
        if len(groups) * self.group_size != self.terms.train_batch_size:
            raise IllegalTransition(
                f"a step consumes {self.terms.train_batch_size} places, this one {len(groups) * self.group_size}"
            )
        if (version.incarnation, version.n) != (self.learner.incarnation, self.learner.n + 1):
            raise IllegalTransition(f"the version after {self.learner} is not {version}")
        return [Committed(trained=tuple(sorted(trained)), skipped=tuple(sorted(skipped)), version=version.packed)]

    def drop(self, rows: Sequence[int], *, reason: str) -> list[Event]:
        """End open rows; those that have ended already are left alone."""
        there = tuple(r for r in dict.fromkeys(rows) if r in self.rows)
        return [Dropped(rows=there, reason=reason), *self._short_groups(there)] if there else []

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

    def released_by(self, event: Event) -> list[int]:
        """Frames, once for each row, whose data nobody needs when this event has been applied."""
        match event:
            case Committed() if not self.terms.resumable:
                rows = [self.rows[sample_id] for sample_id in event.trained + event.skipped]
            case Dropped() | Quarantined():
                rows = [self.rows[sample_id] for sample_id in event.rows]
            case Checkpointed():
                rows = [row for n in self._passed(event) for row in self.consumed[n].rows]
            case Resumed():
                number, prompt = PolicyVersion.unpack(event.version).n, self.schema.prompt_mask
                rows = [row for row in self._after(number) if _newest(row) > number]
                return [frame for row in rows for columns, frame, _ in row.frames if columns != prompt]
            case _:
                return []
        return [frame for row in rows for _, frame, _ in row.frames]

    def frames(self) -> Counter[int]:
        """Every frame that is needed → by how many rows."""
        rows = [*self.rows.values(), *(row for step in self.consumed.values() for row in step.rows)]
        return Counter(frame for row in rows for _, frame, _ in row.frames)

    def _passed(self, event: Checkpointed) -> list[int]:
        oldest = PolicyVersion.unpack(event.oldest).n
        return [n for n in self.consumed if n <= oldest]

    def _after(self, number: int) -> list[Row]:
        """Rows that are open when the run has gone back to this version number."""
        back = (row for n, step in self.consumed.items() if n > number for row in step.rows)
        return [*self.rows.values(), *back]

    def _holds(self, lease_id: int, rows: Sequence[int]) -> LeaseRecord:
        if len(set(rows)) != len(rows):
            raise IllegalTransition(f"a call for lease {lease_id} names a sample twice")
        lease = self.leases.get(lease_id)
        if lease is None:
            raise LeaseLost(f"lease {lease_id} has ended; its samples may belong to another worker now", rows=rows)
        if lost := [sample_id for sample_id in rows if sample_id not in lease.rows]:
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
            stage = self.leases[event.lease_id].stage
            for sample_id in event.rows:
                reasons.setdefault(sample_id, list(self.rows[sample_id].reasons)).append(event.reason)
                if final or self.rows[sample_id].attempts[stage] >= self.terms.max_attempts:
                    failed[sample_id] = None
        poison: dict[str, list[int]] = {}
        for sample_id in failed:
            poison.setdefault("; ".join(dict.fromkeys(reasons[sample_id])), []).append(sample_id)
        ends = [Quarantined(rows=tuple(rows), reason=history) for history, rows in poison.items()]
        return [*returns, *ends, *self._short_groups(failed)]

    def _short_groups(self, gone: Iterable[int]) -> list[Event]:
        """The end of what is left of these rows' groups, where that is too little to train."""
        gone = set(gone)
        events: list[Event] = []
        for group_id in dict.fromkeys(self.rows[sample_id].group_id for sample_id in sorted(gone)):
            rest = self.groups[group_id] - gone
            if 0 < len(rest) < self.terms.min_group:
                events.append(Dropped(rows=tuple(sorted(rest)), reason=SHORT_GROUP))
        return events

    # -- the one mutator -----------------------------------------------------------------------------------------------

    def apply(self, event: Event) -> set[str]:
        """Change the state. Returns the topics (stages, ADMISSION) for which something may have become possible."""
        handler: Callable[[Table, Any], set[str]] | None = _HANDLERS.get(type(event))
        if handler is None:
            raise TypeError(f"{type(event).__name__} cannot be applied")
        return handler(self, event)

    def _apply_admitted(self, event: Admitted) -> set[str]:
        topics: set[str] = set()
        for offset, tokens in enumerate(event.prompt_tokens):
            group_id = event.first_group + offset
            first = event.first_sample + offset * self.group_size
            self.groups[group_id] = set(range(first, first + self.group_size))
            for sample_id in range(first, first + self.group_size):
                row = Row(
                    sample_id=sample_id,
                    group_id=group_id,
                    state=State.PROMPTED,
                    columns=self.schema.prompt_mask,
                    prompt_tokens=tokens,
                    tokens=tokens,
                    frames=[(self.schema.prompt_mask, event.frame, offset)],
                )
                self.rows[sample_id] = row
                self.states[State.PROMPTED] += 1
                topics |= self._enqueue(row)
        self.next_group = event.first_group + len(event.prompt_tokens)
        self.next_sample = event.first_sample + len(event.prompt_tokens) * self.group_size
        return topics

    def _apply_leased(self, event: Leased) -> set[str]:
        self.leases[event.lease_id] = LeaseRecord(
            event.stage, event.worker, set(event.rows), event.deadline, self.terms.max_staleness
        )
        self.next_lease = event.lease_id + 1
        self._set_deadline(event.lease_id, event.deadline)
        role = self.schema.stages[event.stage].role
        for sample_id in event.rows:
            row = self.rows[sample_id]
            row.leases[event.stage] = event.lease_id
            row.attempts[event.stage] = row.attempts.get(event.stage, 0) + 1
            if role == "generate":
                self._move(row, Move.START_GENERATING)
            elif role == "train":
                self._move(row, Move.START_TRAINING)
                self.taken.add(row.group_id)
        return set()

    def _apply_renewed(self, event: Renewed) -> set[str]:
        self._set_deadline(event.lease_id, event.deadline)
        return set()

    def _set_deadline(self, lease_id: int, deadline: float) -> None:
        self.leases[lease_id].deadline = deadline
        heapq.heappush(self._deadlines, (deadline, lease_id))

    def _apply_acked(self, event: Acked) -> set[str]:
        stage = self.schema.stages[self.leases[event.lease_id].stage]
        train_needs = self.schema.needs[self.schema.train.name]
        topics: set[str] = set()
        for index, sample_id in enumerate(event.rows):
            row = self.rows[sample_id]
            self._release(row, stage.name)
            row.columns |= event.columns
            row.frames.append((event.columns, event.frame, index))
            if event.tokens:
                row.tokens += event.tokens[index]
                row.oldest, row.newest = event.oldest[index], event.newest[index]
            if stage.role == "generate":
                self._move(row, Move.GENERATE)
            if row.state is State.GENERATED and row.columns & train_needs == train_needs:
                self._move(row, Move.COMPLETE_SCORES)
                topics.add(self.schema.train.name)
            topics |= self._enqueue(row)
        return topics

    def _apply_returned(self, event: Returned) -> set[str]:
        stage = self.schema.stages[self.leases[event.lease_id].stage]
        for sample_id in event.rows:
            row = self.rows[sample_id]
            self._release(row, stage.name)
            row.reasons.append(event.reason)
            self._give_up(row, stage.name)
            self._enqueue(row)
        return {stage.name}

    def _give_up(self, row: Row, stage: str) -> None:
        """A stage does not work on a row any more, and has not finished it."""
        # A scoring stage may hold a row while another one generates or trains it: the role says what came back.
        role = self.schema.stages[stage].role
        if role == "generate":
            self._move(row, Move.RETURN_PROMPT)
        elif role == "train":
            self._move(row, Move.RETURN_SCORED)
            self.taken.discard(row.group_id)

    def _apply_committed(self, event: Committed) -> set[str]:
        step = Consumed([self.rows[i] for i in event.trained], [self.rows[i] for i in event.skipped])
        for row in step.trained:
            self._end(row, Move.TRAIN, "")
        for row in step.skipped:
            self._end(row, Move.DROP, SKIPPED)
        self.learner = PolicyVersion.unpack(event.version)
        if self.terms.resumable:
            self.consumed[self.learner.n] = step
        return self._after_end()

    def _apply_dropped(self, event: Dropped) -> set[str]:
        for sample_id in event.rows:
            self._end(self.rows[sample_id], Move.DROP, event.reason)
        return self._after_end()

    def _apply_quarantined(self, event: Quarantined) -> set[str]:
        for sample_id in event.rows:
            self._end(self.rows[sample_id], Move.QUARANTINE, event.reason)
        return self._after_end()

    def _after_end(self) -> set[str]:
        """A row that ended makes room, may complete its group, and may let a later group into the step."""
        return {ADMISSION, self.schema.generate.name, self.schema.train.name}

    def _apply_served(self, event: Served) -> set[str]:
        if event.version is None:
            self.served.pop(event.engine, None)
        else:
            self.served[event.engine] = PolicyVersion.unpack(event.version)
        return {ADMISSION, self.schema.generate.name}

    def _apply_amended(self, event: Amended) -> set[str]:
        self.terms = replace(self.terms, max_staleness=event.max_staleness, last_version=event.last_version)
        return {ADMISSION, *self.schema.stages}

    def _apply_checkpointed(self, event: Checkpointed) -> set[str]:
        for n in self._passed(event):
            del self.consumed[n]
        return set()

    def _apply_resumed(self, event: Resumed) -> set[str]:
        self.learner = PolicyVersion.unpack(event.version)
        number = self.learner.n
        for row in self.rows.values():
            for stage in list(row.leases):
                self._interrupt(row, stage)
        for n in sorted(n for n in self.consumed if n > number):
            step = self.consumed.pop(n)
            self.ended["trained"] -= len(step.trained)
            self.ended[f"{State.DROPPED}:{SKIPPED}"] -= len(step.skipped)
            for row in step.rows:
                self._take_back(row)
        self.groups = OrderedDict(sorted(self.groups.items()))
        for row in self.rows.values():
            if _newest(row) > number:
                self._generate_again(row)
        self.taken.clear()
        self.served.clear()
        self._deadlines.clear()
        for queue in self._ready.values():
            queue.clear()
        for row in self.rows.values():
            self._enqueue(row)
        return {ADMISSION, *self.schema.stages}

    def _interrupt(self, row: Row, stage: str) -> None:
        """End a lease whose worker is gone through no fault of the row: it was no attempt."""
        self._release(row, stage)
        row.attempts[stage] -= 1
        self._give_up(row, stage)

    def _take_back(self, row: Row) -> None:
        self.states[row.state] += 1  # counted among the open ones again, from where it was
        self._move(row, Move.TAKE_BACK)
        self.rows[row.sample_id] = row
        self.groups.setdefault(row.group_id, set()).add(row.sample_id)

    def _generate_again(self, row: Row) -> None:
        prompt = self.schema.prompt_mask
        self._move(row, Move.GENERATE_AGAIN)
        row.columns, row.tokens = prompt, row.prompt_tokens
        row.oldest = row.newest = None
        row.attempts.clear()
        row.frames = [place for place in row.frames if place[0] == prompt]

    def _move(self, row: Row, move: Move) -> None:
        self.states[row.state] -= 1
        row.state = next_state(row.state, move)
        self.states[row.state] += 1

    def _end(self, row: Row, move: Move, reason: str) -> None:
        self._move(row, move)
        self.states[row.state] -= 1  # the counters of ends say it by reason
        self.ended[f"{row.state}:{reason}" if row.state is State.DROPPED else str(row.state)] += 1
        for stage in list(row.leases):
            self._release(row, stage)
        del self.rows[row.sample_id]
        members = self.groups[row.group_id]
        members.discard(row.sample_id)
        if not members:
            del self.groups[row.group_id]
            self.taken.discard(row.group_id)

    def _release(self, row: Row, stage: str) -> None:
        lease_id = row.leases.pop(stage)
        lease = self.leases[lease_id]
        lease.rows.discard(row.sample_id)
        if not lease.rows:
            del self.leases[lease_id]

    def _enqueue(self, row: Row) -> set[str]:
        """Put a row into the queues of the stages it is ready for; returns these stages."""
        ready = {stage for stage in self._ready if self.is_ready(row, stage)}
        for stage in ready:
            heapq.heappush(self._ready[stage], row.sample_id)
        return ready

    # -- the account ---------------------------------------------------------------------------------------------------

    def dropped(self) -> dict[str, int]:
        """Samples that were dropped, by reason."""
        prefix = f"{State.DROPPED}:"
        return {key.removeprefix(prefix): n for key, n in self.ended.items() if n and key.startswith(prefix)}

    def leased(self) -> dict[str, int]:
        """Samples out on lease, by stage."""
        counts: Counter[str] = Counter()
        for lease in self.leases.values():
            counts[lease.stage] += len(lease.rows)
        return dict(counts)

    def snapshot(self) -> Mapping[str, Any]:
        """The whole state as plain values: equal for two tables to which the same events were applied."""
        return {
            "terms": self.terms,
            "rows": {i: _plain(row) for i, row in self.rows.items()},
            "consumed": {n: ([_plain(row) for row in step.trained], [_plain(row) for row in step.skipped])
                         for n, step in self.consumed.items()},
            "groups": {group_id: tuple(sorted(members)) for group_id, members in self.groups.items()},
            "taken": tuple(sorted(self.taken)),
            "leases": {i: (r.stage, r.worker, tuple(sorted(r.rows))) for i, r in self.leases.items()},
            "served": dict(self.served),
            "learner": self.learner,
            "next": (self.next_sample, self.next_group, self.next_lease),
            "ended": dict(self.ended),
            "states": {state: self.states[state] for state in OPEN_STATES},
        }  # fmt: skip


def _newest(row: Row) -> int:
    """Number of the version of its newest token; −1 without tokens."""
    return -1 if row.newest is None else PolicyVersion.unpack(row.newest).n


def _plain(row: Row) -> tuple[Any, ...]:
    return (
        row.sample_id, row.group_id, row.state, row.columns, row.prompt_tokens, row.tokens, row.oldest, row.newest,
        dict(row.leases), dict(row.attempts), tuple(row.reasons), tuple(row.frames),
    )  # fmt: skip


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
    Served: Table._apply_served,
    Amended: Table._apply_amended,
    Checkpointed: Table._apply_checkpointed,
    Resumed: Table._apply_resumed,
}
