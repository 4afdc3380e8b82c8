"""Reads frames that were flipped, cut off and forged, and says what came of it: run in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from asyncflow.errors import DamagedData
from asyncflow.store.frames import BATCH, HEADER_BYTES, Header, headers_of
from asyncflow.store.segments import SegmentReader, SegmentWriter, segment_path


class Counts(NamedTuple):
    """Cases by what came of them. The first two are damage; in the others all checksums were made right again."""

    refused: int
    unharmed: int
    """The damage hit nothing that was read."""
    forged_refused: int
    forged_taken: int
    """They are valid data, though others."""


COLUMNS = {
    "ids": pa.list_(pa.int32()),
    "text": pa.string(),
    "versions": pa.large_list(pa.int64()),
    "reward": pa.float32(),
}


def samples() -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {
            "ids": pa.array([list(range(i)) for i in range(8)], COLUMNS["ids"]),
            "text": pa.array(["äb" * i for i in range(8)]),
            "versions": pa.array([[i] * i for i in range(8)], COLUMNS["versions"]),
            "reward": pa.array([float(i) for i in range(8)], COLUMNS["reward"]),
        }
    )


class Case:
    """A segment that is read with some bytes that are others."""

    def __init__(self, folder: Path) -> None:
        writer = SegmentWriter(folder, iter([1]).__next__, segment_bytes=1 << 14)
        self.batch = samples()
        frames = [writer.append(self.batch.slice(row, 1)) for row in range(8)]
        frames.append(writer.append(self.batch))
        writer.close()
        self.folder, self.path = folder, segment_path(folder, 1)
        self.good = self.path.read_bytes()
        self.headers = [header for header in headers_of(self.good, 1) if header.kind == BATCH]
        self.end = self.headers[-1].end
        self.frames = np.array(frames, np.int64)

    def read(self, data: bytes | bytearray, hit: range | None) -> bool:
        """Read everything in each way. Returns whether something was refused.

        `hit`: the bytes that differ, of which all are under a checksum; None when these were made right again.
        """
        self.path.write_bytes(data)
        many = self._outcome(SegmentReader(self.folder), list(range(8)), hit)
        reader = SegmentReader(self.folder)  # which has not been told anything yet
        alone = [self._outcome(reader, [row], hit) for row in range(8)]
        together = None if None in alone else [value for values in alone for value in values or ()]
        # Read at once is read one by one; only that a header's own checksum is not needed for it.
        assert many == together or hit is not None, (many, together)
        return None in (many, together, self._outcome(reader, [8] * 8, hit))

    def _outcome(self, reader: SegmentReader, numbers: list[int], hit: range | None) -> list[str] | None:
        """The rows of these frames, or all rows of the last frame, as text; None when they were refused."""
        frames = self.frames[numbers]
        rows = np.arange(8) if numbers == [8] * 8 else np.zeros(len(numbers))
        try:
            found = reader.read(COLUMNS, frames, rows.astype(np.int32))
        except DamagedData as damage:
            self._blames(damage.frame, frames.tolist(), hit)
            return None
        batch = pa.RecordBatch.from_arrays(found, names=list(COLUMNS))
        batch.validate(full=True)
        assert [column.type for column in found] == list(COLUMNS.values())
        assert len(batch) == len(numbers)
        expected = self.batch if numbers == [8] * 8 else self.batch.take(pa.array(numbers))
        assert hit is None or batch.equals(expected), hit
        return [repr(row) for row in batch.to_pylist()]

    def _blames(self, frame: int, frames: list[int], hit: range | None) -> None:
        """The frame is one that was asked for, and was hit; or all are, when it was the schema."""
        assert frame in frames
        if hit is None or hit.start < self.headers[0].offset:
            return
        header = next(header for header in self.headers if header.frame == frame)
        assert hit.start < header.end, (hit, header)
        assert hit.stop > header.offset, (hit, header)


def pick(random: np.random.Generator, values: list[int]) -> int:
    return values[int(random.integers(len(values)))]


def damaged(case: Case, random: np.random.Generator) -> tuple[bytearray, range]:
    """Some bits flipped, some bytes replaced, or the end cut off."""
    data = bytearray(case.good)
    begin = int(random.integers(case.end))
    match random.integers(4):
        case 0 | 1:
            data[begin] ^= 1 << int(random.integers(8))
            return data, range(begin, begin + 1)
        case 2:
            size = int(random.integers(1, 200))
            end = min(begin + size, case.end)
            data[begin:end] = random.bytes(end - begin)
            return data, range(begin, end)
        case _:
            return data[:begin], range(begin, len(data))


def forged(case: Case, random: np.random.Generator) -> bytearray:
    """Numbers in a message, or in its header, that are others, with checksums that are right again."""
    data = bytearray(case.good)
    for _ in range(int(random.integers(1, 4))):
        header = case.headers[int(random.integers(len(case.headers)))]
        begin, length, rows = header.offset + HEADER_BYTES, header.length, header.rows
        choice = random.integers(5)
        if choice == 0:
            length = pick(random, [0, 1, 8, length // 2, length + 64, 2**31, 2**63 - 1, 2**64 - 1])
        elif choice == 1:
            rows = pick(random, [0, 1, 2, 2**31, 2**32 - 1])
        elif choice == 2:
            data[begin + int(random.integers(length))] ^= 1 << int(random.integers(8))
        else:  # numbers of the kind that metadata have
            size = int(random.choice([4, 8]))
            place = begin + int(random.integers(max(1, min(length, 600) // size))) * size
            values = [-1, 0, 1, 2, 7, 8, 64, 255, 2**16, 2**31 - 1, -(2**31)]
            if size == 8:
                values += [2**63 - 1, -(2**63), 2**40]
            data[place : place + size] = pick(random, values).to_bytes(size, "little", signed=True)
        message = bytes(data[begin : begin + min(length, len(data))])
        checksum = xxhash.xxh3_64_intdigest(message)
        new = Header(BATCH, length, 1, header.offset, header.schema, rows, checksum)
        data[header.offset : begin] = new.pack()
    return data


def main(folder: Path, seed: int, cases: int) -> Counts:
    case = Case(folder)
    assert not case.read(case.good, range(0))
    counts = [0, 0, 0, 0]
    for number in range(cases):
        random = np.random.default_rng([seed, number])
        print("case", number, file=sys.stderr)
        if number % 3:
            refused = case.read(*damaged(case, random))
            counts[0 if refused else 1] += 1
        else:
            refused = case.read(forged(case, random), None)
            counts[2 if refused else 3] += 1
    return Counts(*counts)


if __name__ == "__main__":
    print(*main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
