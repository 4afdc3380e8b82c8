"""Snapshots of the table: as good as all events, and never believed when they are not."""

from __future__ import annotations

import logging
import random
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncflow.errors import LedgerError
from asyncflow.store.events import Event, Opened
from asyncflow.store.image import FIELDS, Image
from asyncflow.store.journal import Journal, LedgerReader
from asyncflow.store.recovery import rebuild
from asyncflow.store.schema import PROMPT_COLUMNS, Schema, Stage
from asyncflow.store.snapshot import (
    HEADER,
    HEADER_BYTES,
    Snapshots,
    Unusable,
    read_snapshot,
    snapshot_path,
    write_snapshot,
)
from asyncflow.store.table import Table
from asyncflow.types import PolicyVersion
from tests.test_table_model import World

TERMS = Opened(
    train_batch_size=8,
    num_generations=2,
    max_staleness=2,
    last_version=None,
    min_group=1,
    max_attempts=2,
    resumable=True,
)


class Recorded(World):
    """A world whose table has a ledger, and snapshots of it when they are wanted."""

    def __init__(self, folder: Path, terms: Opened = TERMS) -> None:
        self.path = folder / "ledger.sqlite"
        self.journal: Journal
        self.log: list[Event] = []
        super().__init__(terms, judge=True, compare=False)

    def do(self, events: Sequence[Event]) -> list[Event]:
        if not self.log:
            self.journal = Journal.create(self.path, self.table.terms, 0.0, self.schema)
        self.journal.append(events, self.now)
        self.log += events
        return super().do(events)

    def play(self, chance: random.Random, operations: int) -> None:
        for _ in range(operations):
            getattr(self, chance.choice(self.OPERATIONS))(*(chance.randrange(64) for _ in range(3)))

    def take(self) -> None:
        """A snapshot of the table as it is, from a copy that nothing which happens later changes."""
        write_snapshot(self.path, self.journal.lsn, self.table.copy())

    def snapshot_lsn(self) -> int:
        with LedgerReader(self.path) as ledger:
            return read_snapshot(self.schema, ledger).lsn

    def close(self) -> None:
        self.journal.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    parts=st.lists(st.integers(0, 120), min_size=1, max_size=5),
    resumable=st.booleans(),
    size=st.sampled_from([1, 2, 4]),
)
def test_a_snapshot_and_the_events_after_it_give_the_table_that_all_events_give(
    tmp_path_factory: pytest.TempPathFactory, seed: int, parts: list[int], resumable: bool, size: int
) -> None:
    terms = msgspec.structs.replace(TERMS, resumable=resumable, num_generations=size)
    chance, world = random.Random(seed), Recorded(tmp_path_factory.mktemp("world"), terms)
    try:
        for operations in parts:
            world.take()
            lsn = world.journal.lsn
            world.play(chance, operations)
            assert world.snapshot_lsn() == lsn

            recovered = rebuild(world.schema, world.path)

            snapshot_path(world.path).unlink()
            assert recovered.snapshot() == rebuild(world.schema, world.path).snapshot() == world.table.snapshot()
    finally:
        world.close()


def test_a_table_from_a_snapshot_goes_on_like_the_one_that_was_never_stopped(tmp_path: Path) -> None:
    chance, world, deadlines, leased = random.Random(3), Recorded(tmp_path), 0, 0
    for _ in range(20):
        world.play(chance, 30)
        world.take()

        mine, other = world.table.copy(), rebuild(world.schema, world.path)

        assert other.next_deadline() == mine.next_deadline()
        deadlines += other.next_deadline() is not None
        for stage in world.schema.stages:
            events, expected = (
                table.lease(stage, worker="w", max_rows=99, max_tokens=None, deadline=5.0) for table in (other, mine)
            )
            assert events == expected
            leased += bool(events)
        assert other.expire(1e9) == mine.expire(1e9)
        assert other.admit([1], frame=7) == mine.admit([1], frame=7)
        assert other.frames() == mine.frames()
    assert deadlines
    assert leased
    world.close()


def test_everything_that_a_table_remembers_is_in_its_snapshot(tmp_path: Path) -> None:
    """Whoever gives the table another attribute must name it among the fields of its image."""
    world = Recorded(tmp_path)
    world.play(random.Random(5), 300)
    before = world.table.snapshot()
    copied = world.table.copy()
    image, arrays = copied.dump()
    text = msgspec.json.encode(image)
    loaded = Table.load(world.schema, msgspec.json.decode(text, type=Image), arrays)

    world.play(random.Random(6), 300)

    assert copied.snapshot() == loaded.snapshot() == before != world.table.snapshot()
    assert vars(loaded).keys() == vars(world.table).keys()
    assert vars(world.table).keys() == {field.name for field in FIELDS} | {"schema", "_line"}  # these never change
    world.close()


# -- what is not believed ----------------------------------------------------------------------------------------------


@dataclass
class Scene:
    world: Recorded
    folder: Path

    @property
    def file(self) -> Path:
        return snapshot_path(self.world.path)


def torn(scene: Scene) -> None:
    scene.file.write_bytes(scene.file.read_bytes()[:-100])


def torn_in_its_header(scene: Scene) -> None:
    scene.file.write_bytes(scene.file.read_bytes()[:40])


def empty(scene: Scene) -> None:
    scene.file.write_bytes(b"")


def flipped(scene: Scene) -> None:
    data = bytearray(scene.file.read_bytes())
    data[-1000] ^= 4
    scene.file.write_bytes(data)


def another_lsn(scene: Scene) -> None:
    data = bytearray(scene.file.read_bytes())
    data[8] += 1
    scene.file.write_bytes(data)


def of_a_newer_program(scene: Scene) -> None:
    data = scene.file.read_bytes()
    magic, version, *rest = HEADER.unpack(data[: HEADER.size])
    header = HEADER.pack(magic, version + 1, *rest)
    header += xxhash.xxh3_64_intdigest(header).to_bytes(8, "little")
    scene.file.write_bytes(header.ljust(HEADER_BYTES, b"\0") + data[HEADER_BYTES:])


def of_another_run(scene: Scene) -> None:
    (scene.folder / "other").mkdir()
    other = Recorded(scene.folder / "other", msgspec.structs.replace(TERMS, max_staleness=3))
    other.play(random.Random(9), 300)
    other.take()
    other.close()
    scene.file.write_bytes(snapshot_path(other.path).read_bytes())


def beyond_the_end(scene: Scene) -> None:
    """A power cut took the ledger's end."""
    _cut(scene, 3)


def of_a_history_that_was_lost(scene: Scene) -> None:
    """A power cut took the ledger's end, and other things happened since."""
    _cut(scene, 3)
    journal = Journal(scene.world.path)
    table = rebuild(scene.world.schema, scene.world.path)
    for number in range(30):
        journal.append(table.serve(f"engine {number}", PolicyVersion(n=0)), 99.0)
    journal.close()


def _cut(scene: Scene, events: int) -> None:
    db = sqlite3.connect(scene.world.path, isolation_level=None)
    db.execute("DELETE FROM events WHERE lsn > (SELECT max(lsn) FROM events) - ?", (events,))
    db.close()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (torn, "bytes"),
        (torn_in_its_header, "torn"),
        (empty, "torn"),
        (flipped, "checksum"),
        (another_lsn, "header is damaged"),
        (of_a_newer_program, "has format 2, this program reads 1"),
        (of_another_run, "of another run"),
        (beyond_the_end, "the ledger ends at"),
        (of_a_history_that_was_lost, "not the one after which it was made"),
    ],
)
def test_a_snapshot_that_is_not_this_ledgers_is_named_and_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Scene], None], says: str
) -> None:
    world = Recorded(tmp_path)
    world.play(random.Random(2), 300)
    world.take()
    world.close()
    spoil(Scene(world, tmp_path))

    with caplog.at_level(logging.WARNING):
        table = rebuild(world.schema, world.path)

    assert says in caplog.text
    assert "every event is applied instead" in caplog.text
    snapshot_path(world.path).unlink()
    assert table.snapshot() == rebuild(world.schema, world.path).snapshot()


def test_a_ledger_of_other_stages_is_not_read_with_these(tmp_path: Path) -> None:
    world = Recorded(tmp_path)
    world.take()
    world.close()
    stages = list(world.schema.stages.values())
    other = Stage(name="other", role="score", needs=PROMPT_COLUMNS, writes=("ref_logprobs",))
    more = Schema([*stages[:2], other, *stages[2:]])

    with LedgerReader(world.path) as reader, pytest.raises(Unusable, match="other stages or columns"):
        read_snapshot(more, reader)
    with pytest.raises(LedgerError, match="is of other columns or stages"):
        rebuild(more, world.path)


def test_every_bit_of_a_snapshot_is_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = Recorded(tmp_path)
    world.play(random.Random(2), 200)
    world.take()
    world.close()
    whole, chance = snapshot_path(world.path).read_bytes(), random.Random(4)
    for _ in range(200):
        data = bytearray(whole)
        place = chance.choice([chance.randrange(HEADER.size + 8), chance.randrange(HEADER_BYTES, len(data))])
        data[place] ^= 1 << chance.randrange(8)
        snapshot_path(world.path).write_bytes(data)
        caplog.clear()
        assert rebuild(world.schema, world.path).snapshot() == world.table.snapshot()
        assert "is ignored" in caplog.text


# -- when they are made ------------------------------------------------------------------------------------------------


def test_snapshots_are_made_while_events_go_on_and_recovery_applies_only_the_rest(tmp_path: Path) -> None:
    world = Recorded(tmp_path)
    snapshots = Snapshots(world.path, world.journal, least=50, most=50)
    chance = random.Random(8)
    for _ in range(600):
        before = len(world.log)
        world.play(chance, 1)
        snapshots.count(world.table, world.log[before:])
    snapshots.close()

    assert snapshots.made > 1
    assert world.snapshot_lsn() > 50
    assert rebuild(world.schema, world.path).snapshot() == world.table.snapshot()
    assert not list(tmp_path.glob("*.part"))
    world.close()


def test_a_snapshot_is_not_there_before_its_ledger_is_on_disk(tmp_path: Path) -> None:
    """Else it could know of more than the ledger does after a power cut."""
    world = Recorded(tmp_path)
    world.play(random.Random(8), 100)
    world.journal.close()
    reached, go = threading.Event(), threading.Event()

    def slow(_: int) -> None:
        reached.set()
        assert go.wait(10)

    journal = Journal(world.path, fdatasync=slow)
    snapshots = Snapshots(world.path, journal, least=1, most=1)
    events = world.table.serve("new", PolicyVersion(n=0))
    journal.append(events, 0.0)
    world.table.apply(events[0])
    snapshots.count(world.table, events)

    assert reached.wait(10)
    assert not snapshot_path(world.path).exists()
    go.set()
    snapshots.close()
    assert world.snapshot_lsn() == journal.lsn
    journal.close()


def test_a_snapshot_that_cannot_be_written_hurts_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = Recorded(tmp_path)
    world.play(random.Random(8), 100)
    snapshot_path(world.path).mkdir()
    snapshots = Snapshots(world.path, world.journal, least=1, most=1)
    events = world.table.serve("new", PolicyVersion(n=0))
    world.do(events)

    snapshots.count(world.table, events)
    snapshots.close()

    assert "no snapshot of" in caplog.text
    assert rebuild(world.schema, world.path).snapshot() == world.table.snapshot()
    world.close()


def test_a_ledger_that_makes_no_sense_is_an_error_with_and_without_a_snapshot(tmp_path: Path) -> None:
    world = Recorded(tmp_path)
    world.play(random.Random(2), 200)
    world.take()
    world.journal.append(world.table.serve("e", PolicyVersion(n=0)), 0.0)
    world.close()
    db = sqlite3.connect(world.path, isolation_level=None)
    body = '{"lease_id":99999,"deadline":1}'
    db.execute("UPDATE events SET kind = 'renewed', body = ? WHERE lsn = (SELECT max(lsn) FROM events)", (body,))
    db.close()

    with pytest.raises(LedgerError, match="makes no sense"):
        rebuild(world.schema, world.path)
