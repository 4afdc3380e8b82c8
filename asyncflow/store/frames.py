"""A frame: one Arrow record batch, or the schema of some, behind a header with checksums. Written once, never changed.

    frame  = header of 64 bytes | Arrow IPC message | zeros up to a multiple of 64
    header = magic "AFRM" | format u16 | kind u16 | length u64 | segment u64 | offset u64 | schema u64 | rows u32
             | zeros u32 | xxh3-64 of the message | xxh3-64 of the header before this

Numbers are little-endian. A message of kind 1 is an Arrow schema, with its xxh3-64 as id; it comes before the first
record batch (kind 2) that has it. A frame's id is the number of its segment · 2⁴⁰ + its offset, and never used again.

Whoever was killed while writing leaves at most a header whose message does not have its checksum. A reader compares
both checksums, and then has Arrow check every value: flipped, torn or forged bytes are an error, and never data.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import xxhash

FORMAT: Final = 2
MAGIC: Final = b"AFRM"
SCHEMA, BATCH = 1, 2
HEADER = struct.Struct("<4sHHQQQQIIQ")
"""All of the header but its own checksum."""
HEADER_BYTES: Final = 64
HEADERS = np.dtype(
    [
        ("magic", "S4"),
        ("format", "<u2"),
        ("kind", "<u2"),
        ("length", "<u8"),
        ("segment", "<u8"),
        ("offset", "<u8"),
        ("schema", "<u8"),
        ("rows", "<u4"),
        ("zeros", "<u4"),
        ("checksum", "<u8"),
        ("header_checksum", "<u8"),
    ]
)
"""The same, for many headers at once."""
OFFSET_BITS: Final = 40
MAX_SCHEMA_BYTES: Final = 1 << 18
MAX_COLUMNS: Final = 1024
MAX_DEPTH: Final = 4
"""Lists in lists."""
Bytes = mmap.mmap | bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says about itself."""

    kind: int
    length: int
    """Bytes of the message."""
    segment: int
    offset: int
    """Of the frame in its segment."""
    schema: int
    """Id of the Arrow schema."""
    rows: int
    checksum: int
    """xxh3-64 of the message."""

    @property
    def frame(self) -> int:
        return self.segment << OFFSET_BITS | self.offset

    @property
    def end(self) -> int:
        """Where the next frame begins."""
        return self.offset + aligned(HEADER_BYTES + self.length)

    def pack(self) -> bytes:
        values = HEADER.pack(
            MAGIC, FORMAT, self.kind, self.length, self.segment, self.offset, self.schema, self.rows, 0, self.checksum
        )
        return values + xxhash.xxh3_64_intdigest(values).to_bytes(8, "little")

    @classmethod
    def unpack(cls, data: bytes) -> Header | None:
        """None: this is no header, or not all of it. Raises ValueError when it is one of another format."""
        values = data[: HEADER.size]
        if len(data) < HEADER_BYTES or values[:4] != MAGIC:
            return None
        if xxhash.xxh3_64_intdigest(values) != int.from_bytes(data[HEADER.size : HEADER_BYTES], "little"):
            return None
        _, version, kind, length, segment, offset, schema, rows, _, checksum = HEADER.unpack(values)
        if version != FORMAT:
            raise ValueError(f"it has format {version}, this program reads {FORMAT}: use the matching release")
        return cls(kind, length, segment, offset, schema, rows, checksum)


def aligned(size: int) -> int:
    return -(-size // HEADER_BYTES) * HEADER_BYTES


class Encoder:
    """Record batches of one schema as Arrow IPC messages. Not thread-safe."""

    def __init__(self, schema: pa.Schema) -> None:
        """Raises ValueError for a schema that no reader would take."""
        check_schema(schema)
        self.schema_message: bytes = schema.serialize().to_pybytes()
        if len(self.schema_message) > MAX_SCHEMA_BYTES:
            raise ValueError(f"a schema of {len(self.schema_message)} bytes is too large: at most {MAX_SCHEMA_BYTES}")
        self.schema_id: int = xxhash.xxh3_64_intdigest(self.schema_message)
        self._sink = _Sink()
        self._writer = pa.ipc.new_stream(self._sink, schema)
        # A stream begins with its schema, which comes out with the first batch.
        self._writer.write_batch(pa.RecordBatch.from_pylist([], schema))

    def encode(self, batch: pa.RecordBatch) -> tuple[list[bytes | pa.Buffer], int]:
        """The parts of the batch's message, of which the large ones are the batch's own buffers, and their size."""
        sink = self._sink
        sink.parts, sink.size = [], 0
        self._writer.write_batch(batch)
        parts, sink.parts = sink.parts, []
        return parts, sink.size


class _Sink:
    """Where Arrow writes to: keeps the parts as they come, without a copy."""

    closed = False

    def __init__(self) -> None:
        self.parts: list[bytes | pa.Buffer] = []
        self.size = 0

    def write(self, data: bytes | pa.Buffer) -> int:
        self.parts.append(data)
        size = len(data) if isinstance(data, bytes) else data.size
        self.size += size
        return size

    def flush(self) -> None:
        """There is nothing between it and the parts."""


def check_schema(schema: pa.Schema) -> None:
    """Raises ValueError when a schema has what frames do not: dictionaries, unions, extension types, deep nesting."""
    if len(schema) > MAX_COLUMNS:
        raise ValueError(f"a schema of {len(schema)} columns is too large: at most {MAX_COLUMNS}")
    for field in schema:
        _check_type(field.name, field.type, MAX_DEPTH)


def _check_type(name: str, kind: pa.DataType, depth: int) -> None:
    types = pa.types
    if (types.is_fixed_size_binary(kind) and not kind.byte_width) or (
        types.is_fixed_size_list(kind) and not kind.list_size
    ):
        # As many rows as somebody says there are, without a byte of data.
        raise ValueError(f"column {name} has the type {kind}, whose values have no length")
    if is_list(kind):
        if depth == 0:
            raise ValueError(f"column {name} is nested more than {MAX_DEPTH} deep")
        _check_type(name, kind.value_type, depth - 1)
    elif not (
        types.is_boolean(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_temporal(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
    ):
        raise ValueError(f"column {name} has the type {kind}, which frames do not have")


def is_list(kind: pa.DataType) -> bool:
    """Lists of any kind."""
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def header_at(data: Bytes, segment: int, offset: int) -> Header:
    """The header at a place. Raises ValueError when there is none."""
    header = Header.unpack(bytes(data[offset : offset + HEADER_BYTES]))
    if header is None or (header.segment, header.offset) != (segment, offset):
        raise ValueError("there is no frame")
    if offset + HEADER_BYTES + header.length > len(data):
        raise ValueError("the end of the frame is missing")
    return header


def message_of(data: Bytes, header: Header) -> pa.Buffer:
    """The message behind a header. Raises ValueError when its bytes are not those that were written."""
    message = pa.py_buffer(data).slice(header.offset + HEADER_BYTES, header.length)
    if xxhash.xxh3_64_intdigest(memoryview(message)) != header.checksum:
        raise ValueError("its bytes are not what was written")
    return message


def headers_of(data: Bytes, segment: int) -> Iterator[Header]:
    """All headers from the beginning of a segment, up to the first place where there is none. What is behind one of
    them may still be damaged."""
    offset = 0
    while offset + HEADER_BYTES <= len(data):
        try:
            header = header_at(data, segment, offset)
        except ValueError:
            return
        yield header
        offset = header.end


def headers_beyond_damage(data: Bytes, segment: int) -> Iterator[Header]:
    """All headers of a segment, those included that are behind a damaged one. Bytes of a message that look like a
    header of this very place are among them: believe only what a checksum or an id confirms."""
    offset = 0
    while offset + HEADER_BYTES <= len(data):
        try:
            header = header_at(data, segment, offset)
        except ValueError:
            found = data.find(MAGIC, offset + 1) if not isinstance(data, memoryview) else -1
            if found < 0:
                return
            offset = aligned(found)
            continue
        yield header
        offset = header.end


def read_schema(message: pa.Buffer) -> pa.Schema:
    """An Arrow IPC message as a schema. Raises ValueError or ArrowException."""
    if message.size > MAX_SCHEMA_BYTES:
        raise ValueError(f"its schema has {message.size} bytes: at most {MAX_SCHEMA_BYTES}")
    try:
        schema = pa.ipc.read_schema(message)
    except EOFError:
        raise ValueError("its schema is empty") from None
    check_schema(schema)
    return schema


def read_batch(message: pa.Buffer, schema: pa.Schema) -> pa.RecordBatch:
    """An Arrow IPC message as a batch that is safe to use. Raises ValueError or ArrowException.

    Bytes from elsewhere can crash whoever reads them: Arrow's own check of all values is the only one that has stopped
    this. A compressed body is refused before, since it may be any number of times as large.
    """
    try:
        parsed = pa.ipc.read_message(message)
    except EOFError:
        raise ValueError("its message is empty") from None
    if parsed.body is not None and is_compressed(parsed):
        raise ValueError("its body is compressed")
    batch = pa.ipc.read_record_batch(parsed, schema)
    batch.validate(full=True)
    return batch


def is_compressed(message: pa.ipc.Message) -> bool:
    """Whether a record batch message names a codec, which is the fourth field of its flatbuffer's header table
    (https://github.com/apache/arrow/blob/main/format/Message.fbs). Raises ValueError."""
    data = memoryview(message.metadata)
    try:
        return field_of(data, header_of(data), 3) is not None
    except struct.error:
        raise ValueError("its metadata are no flatbuffer") from None


def header_of(data: memoryview) -> int:
    """Where the table of what a message is (`Schema`, `RecordBatch`) is in its metadata. Raises ValueError or
    struct.error."""
    header = field_of(data, struct.unpack_from("<I", data)[0], 2)
    if header is None:
        raise ValueError("it has no header")
    return header + int(struct.unpack_from("<I", data, header)[0])


def field_of(data: memoryview, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table is; None when the table does not have it. Raises struct.error."""
    entries = table - struct.unpack_from("<i", data, table)[0]
    if entries < 0 or 4 + 2 * number >= struct.unpack_from("<H", data, entries)[0]:
        return None
    place: int = struct.unpack_from("<H", data, entries + 4 + 2 * number)[0]
    return table + place if place else None
