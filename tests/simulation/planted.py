"""Stores that are broken on purpose, one promise each. `docs/testing_the_store.md` has the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from asyncflow.errors import DamagedData, LedgerError, StoreError
from asyncflow.store.account import Account
from asyncflow.store.client import Grant, Lease, Place
from asyncflow.store.events import Acked, Committed, Event, PutId, Renewed, Restarted
from asyncflow.store.frames import HEADER, HEADER_BYTES, OFFSET_BITS, read_batch
from asyncflow.store.rows import NONE, Flags, Ids
from asyncflow.store.segments import _schema, segment_of
from asyncflow.store.store import Store
from asyncflow.store.table import Table
from asyncflow.types import PolicyVersion
from tests.test_table_model import (
    KeepsExpiredLeases,
    LearnersVersionInAdmission,
    NoFencing,
    NumbersTwice,
    PartsOfGroups,
    ReusesIds,
)

from .disk import SegmentDisk, SimFrames, SimJournal, _Mapped
from .network import Parts, SimBroker


class AnswersBeforeItWrites(SimJournal):
    """Keeps what it is told in its own memory for a while."""

    _later: list[tuple[float, str, str]]

    def _write(self, lines: Sequence[tuple[float, str, str]]) -> None:
        self._later = [*getattr(self, "_later", []), *lines]
        self.lsn += len(lines)
        if len(self._later) > 3:
            later, self._later = self._later, []
            self.lsn -= len(later)
            super()._write(later)


class AnswersBeforeTheSync(SimJournal):
    def sync_to(self, lsn: int) -> None:
        self.alive()
        self._synced = self.lsn


class TriesAFailedSyncAgain(SimJournal):
    """Believes the second fdatasync, of which the system says that all is well."""

    def sync_to(self, lsn: int) -> None:
        try:
            super().sync_to(lsn)
        except LedgerError:
            self.failed = None
            self._synced = self.lsn


class WallClock(SimBroker):
    """Measures leases with the clock that people set."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        world = self._world
        self.clock = SimpleNamespace(monotonic=lambda: world.wall() - 1.7e9, wall=world.wall)


class MarksOnRead(SimBroker):
    """Takes a sample for seen when it is leased."""

    def lease(self, stage: str, **values: Any) -> Any:
        grant = super().lease(stage, **values)
        if grant is not None and stage == "look":
            self.ack(grant.lease_id, grant.sample_ids.tolist(), columns=0, frame=NONE, size=0)
        return grant


class LosesWakeUps(SimBroker):
    """Does not tell those who wait for what an ack has made possible."""

    def _apply(self, events: Sequence[Event], size: int) -> None:
        before = dict(self._possible)
        super()._apply(events, size)
        if isinstance(events[0], Acked):
            self._possible = before


class DropsSilently(SimBroker):
    """Says that it has a put, and has not, when there is little room."""

    def admit(self, prompt_tokens: Sequence[int], **values: Any) -> int | None:
        if self.table.next_group % 5 == 4 and values.get("put") is not None:
            return self.table.next_group
        return super().admit(prompt_tokens, **values)


class RemovesBeforeTheSync(SimBroker):
    """Removes segments when the ledger that says so could still be lost."""

    def reclaim(self) -> None:
        with self._lock:
            unneeded = self._account.unneeded()
        self._account.remove(unneeded)


class ForgetsAFailedSync(SimBroker):
    """After a sync of segments that failed, takes them for synced."""

    def sync(self) -> int:
        try:
            return super().sync()
        except LedgerError:
            if self._sync_failed is not None:
                self._sync_failed = None
                self._account.synced(self._account.unsynced())
            raise


class ConfirmsBeforeTheSync(SimBroker):
    """Answers a commit that is repeated with what its table knows, which a power cut can still take."""

    def commit(self, **step: Any) -> None:
        try:
            if self.table.commit(**step) == []:
                return
        except StoreError:
            pass  # some leases may have to run out before
        super().commit(**step)


class TrustsEarlierProcesses(Account):
    """Takes what an earlier process has written for synced."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._unsynced.clear()


class ReleasesTwice(Account):
    """Removes segments that are needed."""

    def release(self, frame: int, rows: int) -> None:
        use = self._uses[segment_of(frame)]
        super().release(frame, min(use.needed, 2 * rows))


class SkipsChecksums(SimFrames):
    def batch(self, frame: int) -> pa.RecordBatch:
        segment, offset = segment_of(frame), frame & ((1 << OFFSET_BITS) - 1)
        try:
            data = bytes(self._disk.files[segment].data)
            length, schema = np.array(HEADER.unpack_from(data, offset), object)[[3, 6]]
            message = pa.py_buffer(data).slice(offset + HEADER_BYTES, length)
            return read_batch(message, _schema(_Mapped(data), segment, schema))  # type: ignore[arg-type]
        except (KeyError, ValueError, IndexError, OSError, pa.ArrowException) as error:
            raise DamagedData(str(error), frame=frame) from None


class RefusesGoodFrames(SimFrames):
    """Takes a frame of one row for damaged."""

    def batch(self, frame: int) -> pa.RecordBatch:
        found = super().batch(frame)
        if len(found) == 1:
            raise DamagedData(f"segment {segment_of(frame)} is damaged at 0: it is short", frame=frame)
        return found


class GivesUpTheWholeLease(Store):
    """Takes all samples of a lease for damaged when one of them is."""

    def _deliver(self, grant: Grant) -> Lease | None:
        try:
            self._gather(self.schema.stages[grant.stage].needs, grant.places)
        except DamagedData as damage:
            self._control.nack(grant.lease_id, grant.sample_ids.tolist(), reason=str(damage), final=True)
            return None
        return super()._deliver(grant)


class NamesFramesBeforeTheSync(SimFrames):
    def sync(self) -> None:
        self._unsynced.clear()


class RemovesWhatIsNotSettled(SegmentDisk):
    def in_use(self, number: int) -> bool:
        return number not in self.files


class ForgetsPuts(Table):
    """Knows no put that was made before."""

    def _has_happened(self, put: PutId, groups: int) -> bool:
        return False


class NoStalenessCheck(Table):
    """Trains whatever there is."""

    def too_old(self, ids: Ids) -> Flags:
        return np.zeros(len(ids), np.bool_)

    def _trained_staleness(
        self, trained: Sequence[int], skipped: Sequence[int], masked: Mapping[int, PolicyVersion]
    ) -> Any:
        return np.zeros(len(trained) + len(skipped), np.int64)


class ForgetsRenewals(Table):
    def apply(self, event: Event) -> set[str]:
        return set() if isinstance(event, Renewed) else super().apply(event)


class ServesWhatHasEnded(Table):
    def places(self, ids: Ids, columns: Any) -> tuple[Place, ...]:
        try:
            return super().places(ids, columns)
        except StoreError:
            if (ids < self.rows.base).any() or (ids >= self.rows.end).any():
                raise
            names = tuple(columns)
            index = ids - self.rows.base
            line = self._writer_line(names[0])
            return (Place(names, self.rows.frame[line, index], self.rows.offset[line, index]),)


class CommitsAnything(Table):
    """Believes the learner, whatever it says that it has trained."""

    def commit(
        self, *, leases: Sequence[int], trained: Sequence[int], skipped: Sequence[int], version: PolicyVersion, **_: Any
    ) -> list[Event]:
        return [
            Committed(trained=tuple(sorted(trained)), skipped=tuple(sorted(skipped)), version=version.packed, masked=())
        ]


class NumbersLeasesAnew(Table):
    """Begins to count at 1 in each process: the fence has a hole."""

    def apply(self, event: Event) -> set[str]:
        topics = super().apply(event)
        if isinstance(event, Restarted):
            self.next_lease = 1
        return topics


@dataclass(frozen=True)
class Planted:
    parts: Parts
    promise: str
    """What must be seen to break."""
    most: int = 60
    """Seeds within which it must be."""


PLANTED: dict[str, Planted] = {
    "ack before write": Planted(Parts(journal=AnswersBeforeItWrites), "is not lost|has happened|the whole ledger"),
    "answer before sync": Planted(Parts(journal=AnswersBeforeTheSync), "what is acknowledged is synced"),
    "retry after a failed fsync": Planted(Parts(journal=TriesAFailedSyncAgain), "is synced|not lost"),
    "no fencing": Planted(Parts(table=NoFencing), "what is acknowledged has happened|what is read|is refused"),
    "lease numbers begin anew": Planted(Parts(table=NumbersLeasesAnew), "lease ids are never reused"),
    "wall clock in leases": Planted(Parts(broker=WallClock), "a lease lasts as long as was said|run out in time"),
    "renewals forgotten": Planted(Parts(table=ForgetsRenewals), "a lease lasts as long as was said"),
    "expired leases kept": Planted(Parts(table=KeepsExpiredLeases), "leases run out in time"),
    "wake-up lost": Planted(Parts(broker=LosesWakeUps), "who waits is not forgotten"),
    "mark on read": Planted(Parts(broker=MarksOnRead), "who holds a row says that it is done"),
    "ids reused": Planted(Parts(table=ReusesIds), "ids are never reused|the account balances"),
    "put forgotten": Planted(Parts(table=ForgetsPuts), "a put happens once"),
    "dropped silently": Planted(Parts(broker=DropsSilently), "what is acknowledged has happened"),
    "checksum skipped": Planted(Parts(frames=SkipsChecksums), "what is read is what was put", 300),
    "good data refused": Planted(Parts(frames=RefusesGoodFrames), "only what is damaged is refused"),
    "too much given up": Planted(Parts(store=GivesUpTheWholeLease), "only what is damaged is given up"),
    "needed segment removed": Planted(Parts(account=ReleasesTwice), "data that are needed stay|account knows"),
    "unsettled segment removed": Planted(Parts(disk=RemovesWhatIsNotSettled), "stays while its writer has it"),
    "segment removed before the ledger is on disk": Planted(
        Parts(broker=RemovesBeforeTheSync), "can be gone on with|are not lost", 600
    ),
    "frame named before its sync": Planted(Parts(frames=NamesFramesBeforeTheSync), "are not lost|gone on with"),
    "earlier process trusted to have synced": Planted(Parts(account=TrustsEarlierProcesses), "are not lost", 600),
    "failed sync of segments forgotten": Planted(Parts(broker=ForgetsAFailedSync), "are not lost|gone on with", 600),
    "commit confirmed before its sync": Planted(Parts(broker=ConfirmsBeforeTheSync), "acknowledged is synced", 1000),
    "part of a group leased": Planted(Parts(table=PartsOfGroups), "groups are leased whole|what is trained was"),
    "staleness not checked": Planted(Parts(table=NoStalenessCheck), "no late row is leased|never exceeds the bound"),
    "admission by the learner's version": Planted(Parts(table=LearnersVersionInAdmission), "no more is admitted"),
    "commit of anything": Planted(
        Parts(table=CommitsAnything), "a sample is trained once|a step |consecutive|two sets"
    ),
    "numbers used twice after going back": Planted(Parts(table=NumbersTwice), "never names two sets of weights"),
    "snapshot without its tail": Planted(
        Parts(records_after=1), "a snapshot and its tail are the whole ledger|can be gone on with"
    ),
    "data of an ended sample served": Planted(Parts(table=ServesWhatHasEnded), "that has ended are not served"),
}
