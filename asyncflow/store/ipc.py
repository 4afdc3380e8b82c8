"""Columns as an Arrow IPC stream, for those who speak HTTP: bytes from elsewhere, and what they are answered with.

Format: https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format. A compressed body is refused before it
is unpacked; so what a stream has in memory is no more than what was sent.
"""

from __future__ import annotations

import struct
from typing import Final

import pyarrow as pa

from asyncflow.errors import StoreError
from asyncflow.store.frames import MAX_SCHEMA_BYTES, check_schema, field_of, header_of, is_compressed

MEDIA_TYPE: Final = "application/vnd.apache.arrow.stream"
MAX_BATCHES: Final = 1 << 10
"""Messages of one stream."""
MAX_ROWS: Final = 1 << 16
"""Of one stream. A row can be smaller than what Python needs to look at it: a body of bits has millions."""


def read_stream(data: bytes) -> pa.RecordBatch:
    """All of a stream as one batch that is safe to use. Raises StoreError for what is no stream, is compressed, or has
    types that frames do not have."""
    try:
        return _read(data)
    except (ValueError, OSError, UnicodeError, pa.ArrowException) as error:
        raise StoreError(f"this is no Arrow IPC stream that can be used: {error}") from None


def _read(data: bytes) -> pa.RecordBatch:
    source = pa.BufferReader(data)
    messages = pa.ipc.MessageReader.open_stream(source)
    schema: pa.Schema | None = None
    batches: list[pa.RecordBatch] = []
    rows = 0
    while (message := _next(messages)) is not None:
        if schema is None:
            schema = _schema(message)
            continue
        if message.type != "record batch":
            raise ValueError(f"it has a {message.type}, where only record batches may be")
        if len(batches) == MAX_BATCHES:
            raise ValueError(f"it has more than {MAX_BATCHES} batches: send larger ones")
        if is_compressed(message):
            raise ValueError("its body is compressed: send it as it is")
        batch = pa.ipc.read_record_batch(message, schema)
        if (rows := rows + len(batch)) > MAX_ROWS:
            raise ValueError(f"it has more than {MAX_ROWS} rows: send fewer at a time")
        batch.validate(full=True)
        batches.append(batch)
    if source.tell() < len(data):
        # Whoever puts two streams one behind the other would lose the second, and be told that all is well.
        raise ValueError(f"{len(data) - source.tell()} bytes are behind its end: send one stream, and nothing else")
    if schema is None or not rows:
        raise ValueError("it has no rows")
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)


def _schema(message: pa.ipc.Message) -> pa.Schema:
    if message.type != "schema":
        raise ValueError("it does not begin with a schema")
    if message.metadata.size > MAX_SCHEMA_BYTES:
        raise ValueError(f"its schema has {message.metadata.size} bytes: at most {MAX_SCHEMA_BYTES}")
    schema = pa.ipc.read_schema(message)
    if _is_big_endian(message):
        raise ValueError("its numbers are big-endian: send them little-endian, as nearly every machine writes them")
    check_schema(schema)
    return schema


def _is_big_endian(message: pa.ipc.Message) -> bool:
    """Arrow swaps the bytes of a stream that it reads as one, but not those of single messages. The order is the first
    field of a schema (https://github.com/apache/arrow/blob/main/format/Schema.fbs), which Python is not told."""
    data = memoryview(message.metadata)
    try:
        place = field_of(data, header_of(data), 0)
        return place is not None and struct.unpack_from("<h", data, place)[0] != 0
    except struct.error:
        raise ValueError("its metadata are no flatbuffer") from None


def _next(messages: pa.ipc.MessageReader) -> pa.ipc.Message | None:
    try:
        return messages.read_next_message()
    except (StopIteration, EOFError):
        return None


def write_stream(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())
