"""The core of the store: who is ready, who may have it, how old is it. No clock, no I/O, no threads.

The verbs, with their checks and what follows from them. They are pure: they return events and change nothing. `apply`
is the one place that changes state. So the journal can be written in between, replaying it rebuilds the table, and
tests need no time and no locks. One object, in a straight line of classes of which each knows only those above it:

    TableState  state.py    what is known of the samples, and `apply`
    Views       views.py    what follows from it
    Needs       needs.py    which data are needed
    Choice      choice.py   who gets what next
    Table       table.py    the verbs

Staleness is bounded by construction (`docs/staleness.md` has the proof): a group is admitted only while
`(η+1)·B − open − (v_learner − v_served)·B` leaves room, and the learner consumes in admission order, B places a step.
What the construction cannot see (an engine that serves less than it says) is caught again at lease and at commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from asyncflow.errors import IllegalTransition, LeaseLost, StalenessViolation, StoreError
from asyncflow.store import image as images
from asyncflow.store.choice import Choice
from asyncflow.store.columns import RESPONSE_IDS, TOKEN_VERSIONS
from asyncflow.store.events import (
    LONGEST_PRODUCER,
    Acked,
    Admitted,
    Amended,
    Checkpointed,
    Committed,
    Dropped,
    Event,
    Leased,
    Prioritised,
    PutId,
    Quarantined,
    Renewed,
    Restarted,
    Restored,
    Resumed,
    Returned,
    Samples,
    Served,
)
from asyncflow.store.image import Image
from asyncflow.store.lifecycle import HAS_DIED, RAN_OUT, RESERVED, SHORT_GROUP, STRAGGLER
from asyncflow.store.samplers import NUMBER
from asyncflow.store.schema import Schema
from asyncflow.store.state import LeaseRecord
from asyncflow.store.views import named
from asyncflow.types import PolicyVersion

MOST_PRIORITY = (1 << 31) - 1
MOST_RANKS = 1 << 16
MOST_TOKENS = (1 << 30) - 1
"""Of a prompt, and of a response: together they fit into 31 bits."""


class Table(Choice):
    """What may be done with the samples of one run. Decisions are events; `apply` makes them happen."""

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
        that are not all of one or more stages, for tokens of which too little or too much is said, and for a put that a
        later one has passed; IllegalTransition for tokens of a version that no commit has made.
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
        if len(put.producer) > LONGEST_PRODUCER:
            raise StoreError(
                f"the name of a producer has at most {LONGEST_PRODUCER} characters, this one {len(put.producer)}"
            )
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
        self._check_tokens(places, samples.columns, samples.tokens, samples.oldest, samples.newest)

    def _check_tokens(
        self,
        rows: int,
        columns: int,
        tokens: Sequence[int],
        oldest: Sequence[int | None],
        newest: Sequence[int | None],
    ) -> None:
        """Raises StoreError for what cannot be said of the tokens of so many rows that get these columns,
        IllegalTransition for versions that no commit has made."""
        brought = self.schema.names(columns)
        counts, spans = rows * (RESPONSE_IDS in brought), rows * (TOKEN_VERSIONS in brought)
        if (len(tokens), len(oldest), len(newest)) != (counts, spans, spans):
            raise StoreError(
                f"{rows} samples with {', '.join(brought) or 'no columns'} need {counts} numbers of tokens and "
                f"{spans} oldest and newest versions, and {len(tokens)}, {len(oldest)} and {len(newest)} are given: "
                f"numbers belong to {RESPONSE_IDS}, versions to {TOKEN_VERSIONS}, one for each sample"
            )
        _check_counts(tokens)
        for first, last in set(zip(oldest, newest, strict=True)):
            if first is None and last is None:
                continue
            if first is None or last is None or not (0 <= first <= last and first & NUMBER <= last & NUMBER):
                raise StoreError(f"tokens of versions from {first} to {last} cannot be: give the oldest and the newest")
            # Incarnations and numbers both grow, so what holds for the newest holds for the oldest.
            if last & NUMBER > self.learner.n or last >> 32 > self.learner.incarnation:
                raise IllegalTransition(
                    f"a sample has tokens of {PolicyVersion.unpack(last)}: the last step made {self.learner}"
                )

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
        waits for from then on (`group_timeout`). Raises StoreError for a number of ranks that cannot be.
        """
        if ranks is not None and not 1 <= ranks <= MOST_RANKS:
            raise StoreError(f"rows are shared out among 1 to {MOST_RANKS} ranks, not {ranks}")
        if stage == self.schema.train.name:
            if self.terms.last_version is not None and self.learner.n >= self.terms.last_version:
                return []
            events, rows, full = self._choose_groups(max_rows, max_tokens)
            if self.terms.group_timeout is not None and now is not None:
                events += self._wait_for_groups(rows, events, now + self.terms.group_timeout)
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
        `columns` and NONE for a frame, and has seen the rows. `tokens` come with `response_ids`, `oldest` and `newest`
        with `token_versions`, one for each row.

        Nothing happens (no events) when this frame has brought the rows these columns before: the answer may have been
        lost. Raises LeaseLost naming the rows that are not in the lease any more, StoreError for other columns than the
        stage writes, or no rows, IllegalTransition for the training stage, which ends its rows by a commit.
        """
        if not len(rows):
            raise StoreError("an ack without samples: name at least one")
        if self._has_brought(rows, columns, frame):
            return []
        stage = self.schema.stages[self._holds(lease_id, rows).stage]
        if stage.role == "train":
            raise IllegalTransition(f"stage {stage.name} ends its samples with a commit, not with an ack")
        if columns != self.schema.mask(stage.writes):
            raise StoreError(
                f"stage {stage.name} writes {', '.join(stage.writes) or 'no columns'}; "
                f"its ack brings {', '.join(self.schema.names(columns)) or 'nothing'}"
            )
        self._check_tokens(len(rows), columns, tokens, oldest, newest)
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
        is dropped when it became too short to train. A stage that training does not need only loses them itself.

        Raises LeaseLost naming the rows that are not in the lease any more, StoreError for no rows, and for a reason
        that is the store's own.
        """
        lease = self._holds(lease_id, rows)
        if not len(rows):
            raise StoreError("a nack without samples: name at least one")
        if reason in (own.format(lease.worker) for own in (RAN_OUT, HAS_DIED)):
            raise StoreError(f"{reason!r} is what the store itself says: give another reason")
        returned = Returned(lease_id=lease_id, rows=tuple(rows), reason=reason, final=final)
        return self._give_back([returned])

    def expire(self, now: float) -> list[Event]:
        """Take back the rows of every lease whose deadline has passed; when there is none, give up those rows for which
        the training stage has waited too long. Called until nothing is left to do at this time."""
        returns = self._take_back(lambda lease: lease.deadline <= now, RAN_OUT)
        return returns or self._close_groups(now)

    def gone(self, worker: str) -> list[Event]:
        """Take back the rows of every lease of a worker that has died."""
        return self._take_back(lambda lease: lease.worker == worker, HAS_DIED)

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
        return self._give_back(returns)

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
                f"{named(busy.tolist())} cannot be put back while the learner has its group: admit the prompt again"
            )
        if len(gone := ids[~self.rows.is_quarantined(ids)]):
            raise IllegalTransition(
                f"{named(gone.tolist())} cannot be put back: only a sample in quarantine can, while its group has not "
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
            raise LeaseLost(f"a commit is for what its leases hold: they do not hold {named(lost)}", rows=lost)
        staleness = self._trained_staleness(trained, skipped, masked or {})
        for lease_id in np.unique(holder).tolist():
            bound, of_it = self.leases[lease_id].max_staleness, staleness[holder == lease_id]
            if of_it.max() > bound:
                worst = rows[holder == lease_id][of_it.argmax()]
                raise StalenessViolation(f"sample {worst} has staleness {of_it.max()}, above {bound}")
        groups = np.unique(rows // self.group_size)
        if self.rows.is_open(self._members(groups)).sum() != len(rows):
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
            raise IllegalTransition(f"{named(foreign)} has masked tokens and is not among those that were trained")
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
        """End open rows; those that have ended already are left alone. Raises StoreError for a reason that is the
        store's own."""
        if reason in RESERVED:
            raise StoreError(f"{reason!r} is a reason of the store itself: give another one")
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
        if max(bound, last or 0) > NUMBER:
            raise IllegalTransition(f"versions are numbered up to {NUMBER}: {max(bound, last or 0)} is none of them")
        made = self.learner.n + bool(self.taken.count)
        if last is not None and last < made:
            what = "has samples of" if made > self.learner.n else "has made"
            raise IllegalTransition(f"the learner {what} step {made} already: the run cannot end at {last}")
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
            raise LeaseLost(f"lease {lease_id} has ended for {named(lost)}", rows=lost)
        return lease

    def _give_back(self, returns: Sequence[Returned]) -> list[Event]:
        """The returns, and the ends that follow from them: of rows that failed in a stage that training needs.

        All returns of one operation are looked at together: a sample that two stages give back at once ends once, and
        what is left of a group is judged after all of its losses.
        """
        failed: dict[int, None] = {}
        reasons: dict[int, list[str]] = {}
        for event in returns:
            stage = self.leases[event.lease_id].stage
            line, holds_up = self._line[stage], stage in self.schema.needed
            attempts = self.rows.attempts[line, np.array(event.rows, np.int64) - self.rows.base]
            for sample_id, attempt in zip(event.rows, attempts.tolist(), strict=True):
                before = self.rows.reasons.get(sample_id, [])
                reasons.setdefault(sample_id, list(before)).append(event.reason)
                if holds_up and (event.final or attempt >= self.terms.max_attempts):
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
        groups, rest = self._left_without(np.array(list(gone), np.int64))
        rows, left = self._members(groups), rest.sum(axis=1)
        return [
            Dropped(rows=tuple(rows[group, rest[group]].tolist()), reason=SHORT_GROUP)
            for group in np.flatnonzero((left > 0) & (left < self.terms.min_group))
        ]

    # -- all of it -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> Mapping[str, Any]:
        """The whole state as plain values: equal for two tables to which the same events were applied."""
        return images.plain(self)

    def copy(self) -> Self:
        """The table as it is now, to be read in another thread."""
        return images.duplicate(self)

    def dump(self) -> tuple[Image, dict[str, NDArray[Any]]]:
        """Everything, for `load`: plain values, and arrays. Samples that have ended for good are left out."""
        return images.dump(self)

    @classmethod
    def load(cls, schema: Schema, image: Image, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The table that `dump` has told. Raises LookupError, TypeError or ValueError for what it cannot have told."""
        table = cls(schema, image.terms)
        images.fill(table, image, arrays)
        return table


def _check_counts(tokens: Sequence[int]) -> None:
    if len(tokens) and not 0 <= min(tokens) <= max(tokens) <= MOST_TOKENS:
        raise StoreError(f"a number of tokens is at least 0 and at most {MOST_TOKENS}")


def _checked(priority: int) -> int:
    if not -MOST_PRIORITY <= priority <= MOST_PRIORITY:
        raise StoreError(f"a priority is a whole number between ±{MOST_PRIORITY}, not {priority}")
    return priority
