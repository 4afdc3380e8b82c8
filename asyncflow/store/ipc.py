"""Columns as an Arrow IPC stream, for those who speak HTTP: bytes from elsewhere, and what they are answered with.

Format: https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format. A compressed body is refused before it
is unpacked; so what a stream has in memory is no more than what was sent.
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from asyncflow.errors import StoreError
from asyncflow.store.frames import check_schema, is_compressed

MEDIA_TYPE: Final = "application/vnd.apache.arrow.stream"
MAX_BATCHES: Final = 1 << 10
"""Messages of one stream."""


def read_stream(data: bytes) -> pa.RecordBatch:
    """All of a stream as one batch that is safe to use. Raises StoreError for what is no stream, is compressed, or has
    types that frames do not have."""
    try:
        return _read(data)
    except (ValueError, OSError, UnicodeError, pa.ArrowException) as error:
        raise StoreError(f"this is no Arrow IPC stream that can be used: {error}") from None


def _read(data: bytes) -> pa.RecordBatch:
    messages = pa.ipc.MessageReader.open_stream(pa.py_buffer(data))
    schema: pa.Schema | None = None
    batches: list[pa.RecordBatch] = []
    while (message := _next(messages)) is not None:
        if schema is None:
            if message.type != "schema":
                raise ValueError("it does not begin with a schema")
            schema = pa.ipc.read_schema(message)
            check_schema(schema)
            continue
        if message.type != "record batch":
            raise ValueError(f"it has a {message.type}, where only record batches may be")
        if len(batches) == MAX_BATCHES:
            raise ValueError(f"it has more than {MAX_BATCHES} batches: send larger ones")
        if is_compressed(message):
            raise ValueError("its body is compressed: send it as it is")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        batches.append(batch)
    if schema is None or not sum(map(len, batches)):
        raise ValueError("it has no rows")
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)


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
