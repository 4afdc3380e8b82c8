"""What happened, and what was promised to whom. Fed with the ledger's events, and asked by nobody but the checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import xxhash

from asyncflow.store.events import (
    Acked,
    Admitted,
    Checkpointed,
    Committed,
    Dropped,
    Event,
    Leased,
    Opened,
    Renewed,
    Restarted,
    Resumed,
    Returned,
)
from asyncflow.store.lifecycle import STRAGGLER
from asyncflow.store.rows import NONE
from asyncflow.store.schema import Stage
from asyncflow.store.wire import Message
from asyncflow.types import PolicyVersion
from tests.test_table_model import REWARD, ROLLOUT, Witness, expected_capacity, insist

Key = tuple[Any, ...]
SHORTEST = 3.0
"""Seconds for which nobody asks for less."""


def number_of(text: str) -> int:
    return int(xxhash.xxh3_64_intdigest(text.encode())) % 100_000


class Book(Witness):
    """The witness of one ledger, which also knows whose data are whose."""

    def __init__(self, terms: Opened, stages: Sequence[Stage], real_of: dict[int, list[int | None]]) -> None:
        super().__init__(terms, stages, honest=False)
        self.real_of = real_of
        """Frame → version of the oldest token of each row, as it really was."""
        self.lsn = 1
        self.keys: dict[Key, int] = {}
        """What was done → where in the ledger."""
        self.frames: dict[int, int] = {}
        """Frame → where it was named first."""
        self.prompts: dict[int, str] = {}
        """Group → what its prompt says."""
        self.responses: dict[int, list[str]] = {}
        """Sample → what its responses say, of which the last one counts."""
        self.rewards: dict[int, list[str]] = {}
        self.version = PolicyVersion(n=0)
        self.checkpoints = 0
        self.acks = 0
        self.began: dict[int, tuple[float, float]] = {}
        """Lease → when it was given or renewed last, and for how long."""

    def enter(self, event: Event) -> None:
        self.see(event)
        self.lsn += event.journaled
        if event.journaled and (key := key_of_event(event)) is not None:
            insist(key not in self.keys or key[0] not in ("put", "ack", "commit"), "nothing happens twice", key)
            self.keys.setdefault(key, self.lsn)

    def _admitted(self, event: Admitted) -> None:
        first, places = self.admitted, len(event.prompt_tokens) * self.terms.num_generations
        insist(expected_capacity(self) >= places, "no more is admitted than the bound leaves room for", event)
        super()._admitted(event)
        self.frames.setdefault(event.frame, self.lsn + 1)
        if event.put is not None:
            put = event.put
            same = [key for key in self.keys if key[:4] == ("put", put.producer, put.epoch, put.sequence)]
            insist(not same, "a put happens once", put, same)
            for place in range(len(event.prompt_tokens)):
                name = f"{put.producer}/{put.epoch}/{put.sequence}/{place}"
                self.prompts[event.first_group + place] = name
        if event.samples is None:
            return
        self.frames.setdefault(event.samples.frame, self.lsn + 1)
        for place, sample_id in enumerate(range(first, self.admitted)):
            sample = self.open[sample_id]
            sample.state = "generated"
            sample.done.add(ROLLOUT.name)
            sample.times[ROLLOUT.name] = 1
            sample.tokens += event.samples.tokens[place]
            sample.oldest = self.real_of[event.samples.frame][place]
            newest = event.samples.newest[place]
            sample.newest = None if newest is None else PolicyVersion.unpack(newest).n
            group = sample_id // self.terms.num_generations
            name = f"{self.prompts[group]}/{sample_id % self.terms.num_generations}"
            self.responses.setdefault(sample_id, []).append(name)
            if len(self.brings(event.samples.columns)) > 1:
                sample.done.add(REWARD.name)
                self.rewards.setdefault(sample_id, []).append(name)
            if self.scored <= sample.done:
                sample.state = "rewarded"

    def brings(self, columns: int) -> list[str]:
        return ["rollout", "reward"] if columns & self.reward_bit else ["rollout"]

    reward_bit = 0
    replays = False
    """It is told what happened before."""

    def _dropped(self, event: Dropped) -> None:
        if self.replays and event.reason == STRAGGLER:  # that it was waited for is not in the ledger
            self._finish(event.rows, "dropped")
        else:
            super()._dropped(event)

    def _acked(self, event: Acked) -> None:
        stage = self.leases[event.lease_id][0]
        self.acks += 1
        if event.frame != NONE:
            self.frames.setdefault(event.frame, self.lsn + 1)
        if stage == ROLLOUT.name:
            self.real.update(zip(event.rows, self.real_of[event.frame], strict=True))
        super()._acked(event)
        for sample_id in event.rows:
            if stage == ROLLOUT.name:
                self.responses.setdefault(sample_id, []).append(f"{sample_id}.{event.lease_id}")
            elif stage == REWARD.name:
                self.rewards.setdefault(sample_id, []).append(f"{sample_id}.{event.lease_id}")

    def _leased(self, event: Leased) -> None:
        super()._leased(event)
        self.began[event.lease_id] = self.now, event.deadline

    def _renewed(self, event: Renewed) -> None:
        super()._renewed(event)
        self.began[event.lease_id] = self.now, event.deadline

    def _returned(self, event: Returned) -> None:
        if "ran out" in event.reason and not self.replays and event.lease_id in self.began:
            lasted = self.now - self.began[event.lease_id][0]
            insist(lasted >= SHORTEST - 1e-6, "a lease lasts as long as was said", event, lasted)
        super()._returned(event)

    def _committed(self, event: Committed) -> None:
        super()._committed(event)
        self.version = PolicyVersion.unpack(event.version)

    def _checkpointed(self, event: Checkpointed) -> None:
        super()._checkpointed(event)
        self.checkpoints += 1

    def _resumed(self, event: Resumed) -> None:
        super()._resumed(event)
        self.version = PolicyVersion.unpack(event.version)

    def _restarted(self, event: Restarted) -> None:
        """Leases live on."""

    @property
    def readable(self) -> set[int]:
        """Samples whose data somebody may still ask for."""
        kept = {s.sample_id for step in self.consumed.values() for part in step for s in part}
        return {*self.open, *self.quarantine, *kept}

    def check_account(self, table: Any) -> None:
        ended = self.ends["trained"] + self.ends["dropped"] + self.ends["quarantined"]
        insist(table.next_sample == self.admitted == ended + len(self.open), "the account balances")
        insist(table.states == Counter(s.state for s in self.open.values()), "states are counted", table.states)
        insist(table.ended["trained"] == self.ends["trained"], "trained samples are counted")
        insist(table.ended["quarantined"] == self.ends["quarantined"], "quarantined samples are counted")
        insist(sum(table.dropped().values()) == self.ends["dropped"], "dropped samples are counted")


def key_of_event(event: Event) -> Key | None:
    match event:
        case Admitted() if event.put is not None:
            return ("put", event.put.producer, event.put.epoch, event.put.sequence, event.first_group)
        case Acked():
            return ("ack", event.lease_id, event.rows, event.frame)
        case Committed():
            return ("commit", event.version, event.trained, event.skipped)
        case Returned():
            return ("nack", event.lease_id, event.rows, event.reason)
    return None


def key_of_request(name: str, request: Message) -> Key | None:
    """What an operation is known by; a put's first group is not known before."""
    values: Any = request
    match name:
        case "ack":
            return ("ack", values.lease_id, tuple(values.sample_ids), values.frame)
        case "commit":
            return ("commit", values.version.packed, tuple(sorted(values.trained)), tuple(sorted(values.skipped)))
        case "nack":
            return ("nack", values.lease_id, tuple(values.sample_ids), values.reason)
    return None
