"""Segments: data there and back, many small frames at once, who may remove a file, and bytes that are not what was
written."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from asyncflow.errors import Closed, DamagedData, LedgerError
from asyncflow.store.account import Account
from asyncflow.store.frames import BATCH, FORMAT, HEADER, HEADER_BYTES, MAGIC, OFFSET_BITS, SCHEMA, Header, headers_of
from asyncflow.store.memory_frames import MemoryFrames
from asyncflow.store.segments import SegmentReader, SegmentWriter, segment_path
from asyncflow.store.shelf import SegmentFolder
from tests import hostile_frames

COLUMNS: dict[str, pa.DataType] = {
    "ids": pa.list_(pa.int32()),
    "logprobs": pa.list_(pa.float32()),
    "versions": pa.large_list(pa.int64()),
    "text": pa.string(),
    "long_text": pa.large_string(),
    "bytes": pa.binary(),
    "reward": pa.float32(),
    "at": pa.timestamp("us"),
    "small": pa.int8(),
}
"""Those that are read many at once."""
OTHERS: dict[str, pa.DataType] = {
    "flag": pa.bool_(),
    "pair": pa.list_(pa.int32(), 2),
    "nested": pa.list_(pa.list_(pa.int32())),
    "tags": pa.list_(pa.string()),
}


def rows(count: int, kinds: dict[str, pa.DataType] | None = None, *, seed: int = 0) -> pa.RecordBatch:
    """Values of every type, of any length, down to none."""
    random = np.random.default_rng(seed)

    def value(kind: pa.DataType) -> object:
        if pa.types.is_fixed_size_list(kind):
            return [value(kind.value_type) for _ in range(kind.list_size)]
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return [value(kind.value_type) for _ in range(random.integers(0, 9))]
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return "ünï" * int(random.integers(0, 9))
        if pa.types.is_binary(kind):
            return random.bytes(int(random.integers(0, 40)))
        if pa.types.is_floating(kind):
            return float(np.float32(random.standard_normal()))
        return bool(random.integers(2)) if pa.types.is_boolean(kind) else int(random.integers(100))

    kinds = COLUMNS if kinds is None else kinds
    return pa.RecordBatch.from_pydict(
        {name: pa.array([value(kind) for _ in range(count)], kind) for name, kind in kinds.items()}
    )


def singly(writer: SegmentWriter | MemoryFrames, batch: pa.RecordBatch) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The frames of a batch that is put row by row."""
    frames = np.array([writer.append(batch.slice(row, 1)) for row in range(len(batch))], np.int64)
    for frame in frames.tolist():
        writer.settle(frame)
    return frames


def offsets(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, np.int32)


def overwrite(values: pa.Array) -> None:
    """What a tensor over the values does that is written to."""
    buffer = values.buffers()[1]
    ctypes.memset(buffer.address, 0xFF, buffer.size)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Meanwhile the system refuses this process every byte of a file behind `size`, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Files:
    """A folder with its account, a writer, and a reader."""

    def __init__(self, folder: Path, segment_bytes: int = 1 << 20) -> None:
        self.folder = folder
        self.account = Account(SegmentFolder(folder))
        self.segment_bytes = segment_bytes
        self.writer = SegmentWriter(folder, self.account.allocate, segment_bytes=segment_bytes)
        self.reader = SegmentReader(folder)

    def path(self, frame: int) -> Path:
        return segment_path(self.folder, frame >> OFFSET_BITS)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def close(self) -> None:
        self.writer.close()
        self.reader.close()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    files = Files(tmp_path / "data")
    yield files
    files.close()


@pytest.fixture
def rolling(tmp_path: Path) -> Iterator[Files]:
    """Each frame in a segment of its own."""
    files = Files(tmp_path / "data", segment_bytes=1)
    yield files
    files.close()


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "files"])
def both(
    request: pytest.FixtureRequest, files: Files
) -> tuple[SegmentWriter | MemoryFrames, SegmentReader | MemoryFrames]:
    if request.param == "files":
        return files.writer, files.reader
    frames = MemoryFrames()
    frames.allocate = Account(frames).allocate
    return frames, frames


Both = tuple[SegmentWriter | MemoryFrames, SegmentReader | MemoryFrames]


@pytest.mark.parametrize("kinds", [COLUMNS, COLUMNS | OTHERS], ids=["many-at-once", "all"])
def test_every_column_comes_back_from_any_places(both: Both, kinds: dict[str, pa.DataType]) -> None:
    writer, reader = both
    batch = rows(60, kinds)
    frames = np.concatenate([singly(writer, batch.slice(0, 40)), np.full(20, writer.append(batch.slice(40)))])
    places = np.concatenate([np.zeros(40, np.int32), np.arange(20, dtype=np.int32)])
    random = np.random.default_rng(1)

    for chosen in (
        np.arange(60),
        np.arange(40),
        np.arange(40, 60),
        random.permutation(60),
        random.integers(0, 60, 200),
        np.array([3]),
        np.array([5, 5, 3, 3]),
        np.array([], np.int64),
    ):
        found = reader.read(kinds, frames[chosen], places[chosen])

        for name, array in zip(kinds, found, strict=True):
            assert array.equals(batch.column(name).take(pa.array(chosen))), (name, chosen)
            array.validate(full=True)


def test_many_frames_are_read_without_parsing_each(files: Files) -> None:
    batch = rows(50)
    frames = singly(files.writer, batch)

    found = files.reader.read(COLUMNS, frames, np.zeros(50, np.int32))

    assert [array.to_pylist() for array in found] == [column.to_pylist() for column in batch.columns]
    assert len(files.reader._parsed) == 1


def test_many_frames_of_several_writers_and_schemas_are_read_together(tmp_path: Path) -> None:
    numbers = itertools.count(1)
    writers = [SegmentWriter(tmp_path, lambda: next(numbers), segment_bytes=1 << 13) for _ in range(3)]
    batch = rows(90)
    shapes = [batch, batch.select(["text", *(name for name in COLUMNS if name != "text")])]
    frames = np.array(
        [writers[i % 3].append(shapes[i % 2].slice(i, 1)) for i in range(90)],
        np.int64,
    )
    chosen = np.random.default_rng(2).permutation(90)

    found = SegmentReader(tmp_path).read(COLUMNS, frames[chosen], np.zeros(90, np.int32))

    for array, column in zip(found, batch.columns, strict=True):
        assert array.equals(column.take(pa.array(chosen)))
    assert next(numbers) > 6


def test_a_frame_with_empty_values_is_read_as_it_is(files: Files) -> None:
    batch = pa.RecordBatch.from_pydict({"reward": pa.array([1.0, None, 3.0, 4.0, None], pa.float32())})
    frames = singly(files.writer, batch)

    (found,) = files.reader.read({"reward": pa.float32()}, frames, np.zeros(5, np.int32))

    assert found.to_pylist() == [1.0, None, 3.0, 4.0, None]


def test_what_is_read_can_be_written_to_and_the_file_stays_as_it_is(files: Files) -> None:
    batch = rows(8)
    large, small = files.writer.append(batch), singly(files.writer, batch)
    before = files.path(large).read_bytes()

    for frames, places in ((np.full(8, large), np.arange(8)), (small, np.zeros(8))):
        found = files.reader.read(COLUMNS, frames, places.astype(np.int32))
        overwrite(found[0].values)
        assert set(found[0].values.to_pylist()) == {-1}

    assert files.path(large).read_bytes() == before
    assert SegmentReader(files.folder).batch(large).equals(batch)


def test_a_frame_is_read_though_somebody_has_written_to_its_page_before_it_was_there(files: Files) -> None:
    batch = rows(3)
    first = files.writer.append(batch)
    array = files.reader.read(COLUMNS, np.full(3, first), offsets(0, 1, 2))[0]
    overwrite(array.values)

    second = files.writer.append(batch)
    rest = singly(files.writer, rows(5))

    assert files.reader.batch(second).equals(batch)
    assert files.reader.read(COLUMNS, rest, np.zeros(5, np.int32))[0].equals(rows(5).column(0))


def test_many_frames_are_read_though_somebody_has_written_to_their_page(files: Files) -> None:
    first = files.writer.append(rows(3))
    array = files.reader.read(COLUMNS, np.full(3, first), offsets(0, 1, 2))[0]
    overwrite(array.values)

    frames = singly(files.writer, rows(5))

    assert files.reader.read(COLUMNS, frames, np.zeros(5, np.int32))[0].equals(rows(5).column(0))


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(
    "columns", [{"reward": pa.float64()}, {"rewards": pa.float32()}], ids=["another type", "another name"]
)
def test_columns_that_a_frame_does_not_have_are_refused(
    files: Files, count: int, columns: dict[str, pa.DataType]
) -> None:
    frames = singly(files.writer, rows(count))

    with pytest.raises(DamagedData, match=f"does not have the column {next(iter(columns))} as") as refused:
        files.reader.read(columns, frames, np.zeros(count, np.int32))

    assert refused.value.frame == frames[0]


@pytest.mark.parametrize("wrong", [1, -1, 2**31 - 1])
@pytest.mark.parametrize("count", [1, 8])
def test_a_row_that_a_frame_does_not_have_is_refused(files: Files, count: int, wrong: int) -> None:
    frames = singly(files.writer, rows(count))
    places = np.zeros(count, np.int32)
    places[-1] = wrong

    with pytest.raises(DamagedData, match=f"a frame of 1 rows has no row {wrong}") as refused:
        files.reader.read(COLUMNS, frames, places)

    assert refused.value.frame == frames[-1]


def test_threads_write_and_read_at_the_same_time(files: Files) -> None:
    batches = [rows(20, seed=seed) for seed in range(6)]
    found: list[bool] = []

    def work(batch: pa.RecordBatch) -> None:
        for _ in range(5):
            frames = singly(files.writer, batch)
            arrays = files.reader.read(COLUMNS, frames, np.zeros(20, np.int32))
            found.append(all(a.equals(b) for a, b in zip(arrays, batch.columns, strict=True)))

    threads = [threading.Thread(target=work, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [True] * 30


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (pa.schema([("a", pa.dictionary(pa.int8(), pa.string()))]), "column a has the type dictionary"),
        (pa.schema([("a", pa.null())]), "column a has the type null"),
        (pa.schema([(f"c{i}", pa.int8()) for i in range(1025)]), "a schema of 1025 columns is too large"),
        (pa.schema([("a" * 300_000, pa.int8())]), "a schema of 300... bytes is too large"),
        (
            pa.schema([("a", pa.list_(pa.list_(pa.list_(pa.list_(pa.list_(pa.int8()))))))]),
            "column a is nested more than 4 deep",
        ),
    ],
)
def test_a_schema_that_no_reader_would_take_is_not_written(files: Files, schema: pa.Schema, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        files.writer.append(pa.RecordBatch.from_pylist([], schema))

    assert files.names() == []


def test_as_many_columns_as_the_system_takes_in_no_call_are_written(files: Files) -> None:
    batch = pa.RecordBatch.from_pydict({f"c{i}": pa.array(range(1000), pa.int64()) for i in range(700)})

    frame = files.writer.append(batch)

    assert files.reader.batch(frame).equals(batch)


# -- full disks and syncs ----------------------------------------------------------------------------------------------


def test_a_full_disk_refuses_a_frame_and_leaves_nothing(files: Files) -> None:
    with file_limit(0), pytest.raises(OSError, match="File too large"):
        files.writer.append(rows(1))
    assert files.names() == []

    frame = files.writer.append(rows(1))
    assert files.reader.batch(frame).equals(rows(1))


def test_what_is_left_in_a_segment_is_used_when_there_is_no_room_for_another(files: Files) -> None:
    frame = files.writer.append(rows(1))
    large = pa.RecordBatch.from_pydict({"bytes": pa.array([bytes(2 << 20)])})

    with file_limit(1 << 20), pytest.raises(OSError, match="File too large"):
        files.writer.append(large)
    with file_limit(1 << 20):
        after = files.writer.append(rows(1))

    assert after >> OFFSET_BITS == frame >> OFFSET_BITS
    assert len(files.names()) == 1


def test_a_frame_that_was_written_in_part_is_nobodys(files: Files) -> None:
    first = files.writer.append(rows(1))
    large = pa.RecordBatch.from_pydict({"bytes": pa.array([bytes(500_000)])})

    with file_limit(100_000), pytest.raises(OSError, match="File too large"):
        files.writer.append(large)
    second = files.writer.append(rows(2))

    assert second >> OFFSET_BITS != first >> OFFSET_BITS
    assert files.reader.batch(first).equals(rows(1))
    assert files.reader.batch(second).equals(rows(2))
    data = files.path(first).read_bytes()
    assert [header.rows for header in headers_of(data, first >> OFFSET_BITS) if header.kind == BATCH] == [1]
    assert not any(data[(first & ((1 << OFFSET_BITS) - 1)) + 4096 :])


class WatchedWriter(SegmentWriter):
    """Notes which segments it syncs, and can be made to fail or to wait there."""

    def __init__(self, folder: Path, segment_bytes: int = 1 << 20) -> None:
        numbers = itertools.count(1)
        super().__init__(folder, lambda: next(numbers), segment_bytes=segment_bytes)
        self.synced: list[int] = []
        self.fail = False
        self.entered, self.go = threading.Event(), threading.Event()
        self.go.set()

    def _sync(self, number: int, file: int | None) -> bool:
        if super()._sync(number, file):
            self.synced.append(number)
        self.entered.set()
        self.go.wait()
        if self.fail:
            raise OSError(5, "Input/output error")
        return True


def test_a_sync_covers_every_segment_that_was_written_to_and_no_other(tmp_path: Path) -> None:
    writer = WatchedWriter(tmp_path, segment_bytes=1)
    frames = [writer.append(rows(1)) for _ in range(3)]
    writer.settle(frames[0])
    writer.settle(frames[1])
    segment_path(tmp_path, 1).unlink()  # nobody needed it

    writer.sync()
    writer.sync()
    assert sorted(writer.synced) == [2, 3]

    writer.append(rows(1))
    writer.sync()
    assert sorted(writer.synced) == [2, 3, 4]


def test_threads_that_come_together_share_a_sync(tmp_path: Path) -> None:
    writer = WatchedWriter(tmp_path)
    writer.go.clear()
    writer.append(rows(1))
    threads = [threading.Thread(target=writer.sync)]
    threads[0].start()
    assert writer.entered.wait(20.0)
    for _ in range(10):
        writer.append(rows(1))
        threads.append(threading.Thread(target=writer.sync))
        threads[-1].start()

    writer.go.set()
    for thread in threads:
        thread.join()

    assert len(writer.synced) == 2


def test_a_failed_sync_is_the_end_of_its_writer(tmp_path: Path) -> None:
    writer = WatchedWriter(tmp_path)
    frame = writer.append(rows(1))
    writer.fail = True
    with pytest.raises(OSError, match="Input/output error"):
        writer.sync()
    writer.fail = False

    for call in (writer.sync, lambda: writer.append(rows(1))):
        with pytest.raises(OSError, match=r"an earlier sync has failed: .*Input/output error"):
            call()
    writer.settle(frame)
    writer.close()


def test_a_closed_writer_refuses_and_can_be_closed_again(files: Files) -> None:
    frame = files.writer.append(rows(1))
    files.writer.close()
    files.writer.close()
    files.writer.settle(frame)

    with pytest.raises(Closed):
        files.writer.append(rows(1))
    assert files.reader.batch(frame).equals(rows(1))


def test_a_closed_writer_gives_back_the_room_that_it_did_not_use(files: Files) -> None:
    path = files.path(files.writer.append(rows(1)))
    assert path.stat().st_blocks * 512 == files.segment_bytes

    files.writer.close()

    assert path.stat().st_blocks * 512 <= 8192
    assert path.stat().st_size == files.segment_bytes  # others may have mapped it


# -- who may remove a segment ------------------------------------------------------------------------------------------


def test_a_segment_goes_with_the_last_row_that_needs_it(rolling: Files) -> None:
    frames = [rolling.writer.append(rows(1)) for _ in range(3)]
    for frame in frames:
        rolling.account.hold(frame, 2)
        rolling.writer.settle(frame)

    rolling.account.release(frames[0], 1)
    rolling.account.release(frames[1], 2)
    rolling.account.release(frames[2], 2)

    assert rolling.account.unneeded() == [2]  # the third is being written
    assert rolling.account.unneeded() == []
    assert [rolling.account.knows(frame) for frame in frames] == [True, False, True]
    rolling.account.remove([2])
    assert rolling.names() == ["000001.segment", "000002.free", "000003.segment"]


def test_a_segment_stays_while_the_broker_has_not_answered_for_its_frames(rolling: Files) -> None:
    frames = [rolling.writer.append(rows(1)) for _ in range(3)]
    assert rolling.account.unneeded() == []
    assert all(rolling.account.knows(frame) for frame in frames)

    rolling.writer.settle(frames[1])  # refused: nobody has held it

    assert rolling.account.unneeded() == [2]
    assert [rolling.account.knows(frame) for frame in frames] == [True, False, True]


def test_a_number_without_a_file_is_still_to_be_written(files: Files) -> None:
    number = files.account.allocate()

    assert files.account.unneeded() == []
    assert files.account.knows(number << OFFSET_BITS)
    assert not files.account.knows(number + 1 << OFFSET_BITS)


CHILD = """
import sys
from pathlib import Path
from asyncflow.store.segments import SegmentWriter
from tests.test_segments import rows
number = iter(range(1, 100))
writer = SegmentWriter(Path(sys.argv[1]), lambda: next(number), segment_bytes=1)
for _ in range(2):
    print(writer.append(rows(1)), flush=True)
sys.stdin.read()
"""


def test_a_writer_that_was_killed_holds_nothing_back(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdin is not None
    with child, child.stdout, child.stdin:
        frames = [int(child.stdout.readline()) for _ in range(2)]
        account = Account(SegmentFolder(tmp_path))
        account.hold(frames[0], 1)
        assert account.unneeded() == []

        child.send_signal(signal.SIGKILL)
        child.wait()

    assert account.unneeded() == [2]
    assert SegmentReader(tmp_path).batch(frames[0]).equals(rows(1))


def test_a_segment_is_locked_from_the_moment_that_it_has_its_name(tmp_path: Path) -> None:
    """Whatever moment another process looks at: it is never there without the lock."""
    found: list[int] = []
    folder, stop = SegmentFolder(tmp_path), threading.Event()

    looks: list[int] = []

    def look() -> None:
        while not stop.is_set():
            there = folder.present()
            found.extend(number for number in there if not folder.in_use(number))
            looks.append(len(there))

    thread = threading.Thread(target=look)
    thread.start()
    numbers = itertools.count(1)
    writer = SegmentWriter(tmp_path, lambda: next(numbers), segment_bytes=1)
    made = 0
    while thread.is_alive() and (made < 200 or len(set(looks)) < 20):  # he has looked at so many moments
        made += 1
        writer.append(rows(1, {"reward": pa.float32()}))
    stop.set()
    thread.join()

    assert found == []
    assert len(set(looks)) >= 20
    writer.close()


def test_a_number_that_was_given_out_twice_is_used_once(tmp_path: Path) -> None:
    writers = [SegmentWriter(tmp_path, iter(range(1, 10)).__next__) for _ in range(2)]

    frames = [writer.append(rows(1, seed=seed)) for seed, writer in enumerate(writers)]

    assert [frame >> OFFSET_BITS for frame in frames] == [1, 2]
    for seed, frame in enumerate(frames):
        assert SegmentReader(tmp_path).batch(frame).equals(rows(1, seed=seed))


def test_what_a_writer_left_behind_that_was_killed_while_it_made_a_segment_goes(tmp_path: Path) -> None:
    tmp_path.joinpath("000007.new").write_bytes(bytes(100))

    assert Account(SegmentFolder(tmp_path)).allocate() == 1

    assert list(tmp_path.iterdir()) == []


def test_an_account_goes_on_behind_all_numbers_that_were_ever_there(rolling: Files) -> None:
    frames = [rolling.writer.append(rows(1)) for _ in range(3)]
    rolling.writer.close()

    account = Account(SegmentFolder(rolling.folder), {frames[1]: 4}, after=frames[0])
    assert account.unneeded() == [1, 3]
    assert account.allocate() == 4
    account.release(frames[1], 4)
    assert account.unneeded() == [2]

    assert Account(SegmentFolder(rolling.folder), after=9 << OFFSET_BITS).allocate() == 10


def test_a_writer_of_an_earlier_broker_goes_on_writing(rolling: Files) -> None:
    rolling.writer.append(rows(1))
    frame = rolling.writer.append(rows(1))

    account = Account(SegmentFolder(rolling.folder))

    assert account.unneeded() == []
    assert account.knows(frame)


def test_a_segment_that_is_needed_and_missing_is_named(rolling: Files) -> None:
    frame = rolling.writer.append(rows(1))
    rolling.path(frame).unlink()

    with pytest.raises(LedgerError, match=r"000001\.segment is missing, .* restore the file, or start a new run"):
        Account(SegmentFolder(rolling.folder), {frame: 1})


def test_segments_of_another_format_are_refused_at_once(rolling: Files) -> None:
    path = rolling.path(rolling.writer.append(rows(1)))
    values = HEADER.pack(MAGIC, FORMAT + 1, SCHEMA, 0, 1, 0, 0, 0, 0, 0)
    path.write_bytes(values + xxhash.xxh3_64_intdigest(values).to_bytes(8, "little"))

    with pytest.raises(
        LedgerError, match=rf"it has format {FORMAT + 1}, this program reads {FORMAT}: use the matching"
    ):
        Account(SegmentFolder(rolling.folder))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    tmp_path.joinpath("file").write_text("")

    with pytest.raises(LedgerError, match=r"the data of the samples in .*file/data cannot be opened"):
        SegmentFolder(tmp_path / "file" / "data")


def test_what_was_read_stays_when_its_segment_has_gone(rolling: Files) -> None:
    batch = rows(4)
    frame = rolling.writer.append(batch)
    found = rolling.reader.batch(frame)
    rolling.path(frame).unlink()
    rolling.reader.forget(frame >> OFFSET_BITS)

    assert found.equals(batch)
    with pytest.raises(DamagedData, match="No such file") as gone:
        rolling.reader.batch(frame)
    assert gone.value.frame == frame


def test_a_reader_lets_go_of_segments_that_have_gone(rolling: Files) -> None:
    """Otherwise the disk would not get its room back, since nobody tells a reader elsewhere."""
    frames = [rolling.writer.append(rows(1)) for _ in range(3)]
    for frame in frames[:2]:
        rolling.reader.batch(frame)
    rolling.path(frames[0]).unlink()
    assert deleted_maps(rolling.folder) == 1

    rolling.reader.batch(frames[2])

    assert deleted_maps(rolling.folder) == 0


def deleted_maps(folder: Path) -> int:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(folder) in line and line.endswith("(deleted)") for line in maps)


def test_a_reader_does_not_map_without_bound(tmp_path: Path) -> None:
    numbers = itertools.count(1)
    writer, reader = SegmentWriter(tmp_path, lambda: next(numbers), segment_bytes=1), SegmentReader(tmp_path)
    batch = rows(1, {"reward": pa.float32()})
    frames = [writer.append(batch) for _ in range(150)]
    for frame in frames:
        writer.settle(frame)
        reader.batch(frame)

    assert sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines()) <= 128
    assert reader.batch(frames[0]).equals(batch)


def removed(files: Files, frame: int) -> None:
    """Nobody needs the frame any more."""
    files.writer.settle(frame)
    gone = files.account.unneeded()
    assert gone == [frame >> OFFSET_BITS]
    files.reader.forget(gone[0])
    files.account.remove(gone)


def test_the_file_of_a_segment_that_has_gone_becomes_another(rolling: Files) -> None:
    first, second = (rolling.writer.append(rows(1)) for _ in range(2))
    file = rolling.path(first).stat().st_ino
    assert rolling.reader.batch(first).equals(rows(1))
    removed(rolling, first)

    third = rolling.writer.append(rows(1, seed=3))

    assert rolling.path(third).stat().st_ino == file
    assert rolling.names() == ["000002.segment", "000003.segment"]
    assert rolling.reader.batch(third).equals(rows(1, seed=3))
    assert rolling.reader.batch(second).equals(rows(1))
    with pytest.raises(DamagedData, match="No such file"):
        rolling.reader.batch(first)
    rolling.writer.settle(second)
    assert rolling.account.unneeded() == [2]  # and the other one has its writer


def test_a_file_is_not_used_again_while_somebody_has_something_from_it(rolling: Files) -> None:
    batch = rows(1)
    first = rolling.writer.append(batch)
    (held,) = rolling.reader.read({"ids": COLUMNS["ids"]}, np.array([first]), offsets(0))
    file = rolling.path(first).stat().st_ino
    rolling.writer.append(batch)
    removed(rolling, first)

    third = rolling.writer.append(rows(1, seed=3))
    assert rolling.path(third).stat().st_ino != file
    assert held.equals(batch.column(0))

    del held
    fourth = rolling.writer.append(rows(1, seed=4))
    assert rolling.path(fourth).stat().st_ino == file


def test_a_reader_that_comes_too_late_does_not_take_another_segment_for_its_own(rolling: Files) -> None:
    """It has opened the file, and before it has its lock the file becomes another segment."""
    frame = rolling.writer.append(rows(1))
    found: list[str] = []

    def read() -> None:
        with pytest.raises(DamagedData) as damage:
            rolling.reader.batch(frame)
        found.append(str(damage.value))

    with rolling.path(frame).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        reader = threading.Thread(target=read)
        reader.start()
        while not any("-> FLOCK" in line and f":{os.fstat(file.fileno()).st_ino} " in line for line in locks()):
            assert reader.is_alive()
        rolling.path(frame).rename(rolling.folder / "000009.segment")
    reader.join()

    assert len(found) == 1
    assert found[0].endswith("No such file: it was removed")


def locks() -> list[str]:
    return Path("/proc/locks").read_text().splitlines()


def test_a_file_that_became_a_segment_before_its_writer_was_killed_is_not_given_out_again(rolling: Files) -> None:
    first, second = (rolling.writer.append(rows(1, seed=seed)) for seed in range(2))
    os.link(rolling.path(first), rolling.folder / "000000.free")
    rolling.writer.settle(first)

    third = rolling.writer.append(rows(1, seed=2))

    assert rolling.names() == ["000001.segment", "000002.segment", "000003.segment"]
    for seed, frame in enumerate((first, second, third)):
        assert rolling.reader.batch(frame).equals(rows(1, seed=seed))


def test_only_so_many_bytes_of_files_are_kept_and_none_when_the_store_is_closed(tmp_path: Path) -> None:
    files = Files(tmp_path, segment_bytes=200 << 20)
    frames = []
    for _ in range(4):
        frames.append(files.writer.append(rows(1)))
        files.writer.settle(frames[-1])
        files.writer._seal()
    files.account.remove(files.account.unneeded())
    assert files.names() == ["000003.free", "000004.free"]

    SegmentFolder(tmp_path).close()

    assert files.names() == []
    files.close()


def test_the_smallest_file_that_has_room_is_used_again(tmp_path: Path) -> None:
    for name, size in (("000001", 1 << 22), ("000002", 1 << 20), ("000003", 1 << 12)):
        tmp_path.joinpath(f"{name}.free").write_bytes(bytes(size))
    writer = SegmentWriter(tmp_path, iter([7]).__next__, segment_bytes=1 << 16)

    writer.append(rows(1))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001.free", "000003.free", "000007.segment"]
    writer.close()


def test_no_reader_ever_sees_bytes_of_another_segment(tmp_path: Path) -> None:
    """Files are used again as fast as can be, while readers ask for what is being removed, and keep some of it."""
    files = Files(tmp_path, segment_bytes=1 << 16)
    kinds = {"ids": pa.list_(pa.int64())}
    latest: list[tuple[int, int]] = []
    wrong: list[str] = []
    reads: list[int] = []
    stop = threading.Event()

    def batch(number: int) -> pa.RecordBatch:
        return pa.RecordBatch.from_pydict({"ids": pa.array([[number] * 2000], kinds["ids"])})

    def read(seed: int) -> None:
        random, kept = np.random.default_rng(seed), []
        reader = SegmentReader(tmp_path)
        while not stop.is_set():
            known = latest[-30:]
            if not known:
                continue
            number, frame = known[int(random.integers(len(known)))]
            try:
                kept.append((number, reader.read(kinds, np.array([frame]), offsets(0))[0]))
                reads.append(seed)
            except DamagedData as damage:
                if "No such file" not in str(damage):
                    wrong.append(str(damage))
            kept = kept[-int(random.integers(1, 8)) :]
            if random.integers(4) == 0:
                reader.forget(frame >> OFFSET_BITS)
            wrong.extend(f"{number}" for number, array in kept if set(array.values.to_numpy()) != {number})

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    inodes: list[int] = []
    number = -1
    while number < 599 or min(reads.count(0), reads.count(1)) < 100:  # so often has each of the two read
        assert all(thread.is_alive() for thread in threads)
        number += 1
        frame = files.writer.append(batch(number))
        files.account.hold(frame, 1)
        files.writer.settle(frame)
        inodes.append(files.path(frame).stat().st_ino)
        latest.append((number, frame))
        if number >= 10:
            files.account.release(latest[number - 10][1], 1)
            files.account.remove(files.account.unneeded())
    stop.set()
    for thread in threads:
        thread.join()
    files.close()

    assert wrong == []
    assert len(set(inodes)) < len(inodes) / 6  # of a third as many segments


def test_memory_keeps_a_frame_until_nobody_needs_it() -> None:
    frames = MemoryFrames()
    account = Account(frames)
    frames.allocate = account.allocate
    first, second = frames.append(rows(1)), frames.append(rows(2))
    account.hold(first, 1)
    frames.settle(first)
    assert account.unneeded() == []

    frames.settle(second)  # refused
    assert account.unneeded() == [second >> OFFSET_BITS]
    account.remove([second >> OFFSET_BITS])
    assert list(frames.frames) == [first]
    with pytest.raises(DamagedData, match="is not there any more"):
        frames.batch(second)

    account.release(first, 1)
    account.remove(account.unneeded())
    assert frames.frames == {}
    assert not account.knows(first)


# -- bytes that are not what was written -------------------------------------------------------------------------------


def forge(
    folder: Path, schema: pa.Schema, messages: list[bytes], counts: list[int], *, schema_id: int | None = None
) -> list[int]:
    """A segment with these messages as record batches, all checksums right. Returns the frames."""
    data, frames = b"", []
    schema_message = schema.serialize().to_pybytes()
    schema_id = xxhash.xxh3_64_intdigest(schema_message) if schema_id is None else schema_id
    for message, count in zip([schema_message, *messages], [0, *counts], strict=True):
        kind = BATCH if data else SCHEMA
        header = Header(kind, len(message), 1, len(data), schema_id, count, xxhash.xxh3_64_intdigest(message))
        frames.append(header.frame)
        data += header.pack() + message
        data += bytes(-len(data) % HEADER_BYTES)
    folder.mkdir(exist_ok=True)
    segment_path(folder, 1).write_bytes(data)
    return frames[1:]


def test_a_compressed_body_is_refused(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({"a": pa.array([0] * 1000, pa.int64())})
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    message = stream.getvalue().to_pybytes()[batch.schema.serialize().size : -8]
    frames = forge(tmp_path, batch.schema, [message] * 8, [1000] * 8)

    for count in (1, 8):
        with pytest.raises(DamagedData, match="its body is compressed"):
            SegmentReader(tmp_path).read({"a": pa.int64()}, np.array(frames[:count]), np.zeros(count, np.int32))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (pa.schema([(f"c{i}", pa.int8()) for i in range(1025)]), "a schema of 1025 columns is too large"),
        (pa.schema([("a" * 300_000, pa.int8())]), "its schema has 300... bytes"),
        (pa.schema([("a", pa.dictionary(pa.int8(), pa.string()))]), "column a has the type dictionary"),
    ],
)
def test_a_schema_without_measure_is_refused(tmp_path: Path, schema: pa.Schema, words: str) -> None:
    message = pa.RecordBatch.from_pydict({"a": pa.array([1], pa.int8())}).serialize().to_pybytes()
    frames = forge(tmp_path, schema, [message] * 8, [1] * 8)

    for count in (1, 8):
        with pytest.raises(DamagedData, match=words):
            SegmentReader(tmp_path).read({"a": pa.int8()}, np.array(frames[:count]), np.zeros(count, np.int32))


def test_a_schema_under_the_id_of_another_is_refused(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({"a": pa.array([1.0], pa.float32())})
    other = pa.schema([("a", pa.int32())])
    stolen = xxhash.xxh3_64_intdigest(batch.schema.serialize().to_pybytes())
    frames = forge(tmp_path, other, [batch.serialize().to_pybytes()] * 8, [1] * 8, schema_id=stolen)

    for count in (1, 8):
        with pytest.raises(DamagedData, match="its schema does not have the id that it is named by"):
            SegmentReader(tmp_path).read({"a": pa.int32()}, np.array(frames[:count]), np.zeros(count, np.int32))


def test_a_count_of_rows_that_is_not_the_batchs_is_refused(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({"a": pa.array([1], pa.int64())})
    frames = forge(tmp_path, batch.schema, [batch.serialize().to_pybytes()] * 8, [1] * 7 + [2])

    with pytest.raises(DamagedData, match="it has 1 rows and not 2") as damage:
        SegmentReader(tmp_path).read({"a": pa.int64()}, np.array(frames), np.zeros(8, np.int32))
    assert damage.value.frame == frames[7]


@pytest.mark.parametrize("count", [1, 8])
def test_a_kind_of_frame_that_there_is_not_is_refused(tmp_path: Path, count: int) -> None:
    batch = pa.RecordBatch.from_pydict({"a": pa.array([1], pa.int64())})
    frames = forge(tmp_path, batch.schema, [batch.serialize().to_pybytes()] * 8, [1] * 8)
    data = bytearray(segment_path(tmp_path, 1).read_bytes())
    offset = frames[count - 1] & ((1 << OFFSET_BITS) - 1)
    data[offset + 6] = 3
    data[offset + HEADER.size : offset + HEADER_BYTES] = xxhash.xxh3_64_intdigest(
        bytes(data[offset : offset + HEADER.size])
    ).to_bytes(8, "little")
    segment_path(tmp_path, 1).write_bytes(data)

    with pytest.raises(DamagedData, match="it is no record batch") as damage:
        SegmentReader(tmp_path).read({"a": pa.int64()}, np.array(frames[:count]), np.zeros(count, np.int32))
    assert damage.value.frame == frames[count - 1]


def test_text_that_is_none_is_refused_also_among_many(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({"a": pa.array(["abcdefgh"])})
    good = batch.serialize().to_pybytes()
    frames = forge(tmp_path, batch.schema, [good] * 6 + [good.replace(b"abcdefgh", b"abc\xff\xfefgh")], [1] * 7)

    with pytest.raises(DamagedData, match="Invalid UTF8") as damage:
        SegmentReader(tmp_path).read({"a": pa.string()}, np.array(frames), np.zeros(7, np.int32))
    assert damage.value.frame == frames[6]


def test_a_frame_of_another_segment_is_not_taken_for_one_of_this(files: Files) -> None:
    frames = singly(files.writer, rows(8))
    data = files.path(int(frames[0])).read_bytes()
    segment_path(files.folder, 7).write_bytes(data)
    moved = (frames & ((1 << OFFSET_BITS) - 1)) | 7 << OFFSET_BITS

    for count in (1, 8):
        with pytest.raises(DamagedData, match="there is no frame") as damage:
            files.reader.read(COLUMNS, moved[:count], np.zeros(count, np.int32))
        assert damage.value.frame == moved[0]


def fuzz(folder: Path, seed: int, cases: int) -> hostile_frames.Counts:
    """Read damaged and forged frames in a process of its own, so that a crash is seen as a signal."""
    command = [sys.executable, "-m", "tests.hostile_frames", str(folder), str(seed), str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    return hostile_frames.Counts(*map(int, done.stdout.split()[-4:]))


def test_hostile_bytes_are_refused_or_harmless(tmp_path: Path) -> None:
    counts = fuzz(tmp_path, seed=1, cases=900)

    # Each kind was there.
    assert counts.refused > 400
    assert counts.unharmed > 10
    assert counts.forged_refused > 100
    assert counts.forged_taken > 30


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
def test_hostile_bytes_are_refused_or_harmless_for_long(tmp_path: Path, seed: int) -> None:
    assert fuzz(tmp_path, seed=seed, cases=20_000).refused > 10_000
