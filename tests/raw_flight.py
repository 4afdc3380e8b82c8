"""Flight by hand (https://arrow.apache.org/docs/format/Flight.html): messages that no Arrow client would write."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import pyarrow as pa

SERVICE = "/arrow.flight.protocol.FlightService"
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, value: bytes) -> bytes:
    """One field of a protobuf message that is bytes, a string or a message."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def path_descriptor(*path: bytes) -> bytes:
    return varint(1 << 3) + varint(1) + b"".join(field(3, part) for part in path)


def flight_data(header: bytes = b"", body: bytes = b"", *, descriptor: bytes = b"", metadata: bytes = b"") -> bytes:
    """`FlightData`."""
    return (
        (field(1, descriptor) if descriptor else b"")
        + (field(2, header) if header else b"")
        + (field(3, metadata) if metadata else b"")
        + (field(1000, body) if body else b"")
    )


def messages(batch: pa.RecordBatch, compression: str | None = None) -> list[tuple[bytes, bytes]]:
    """The Arrow messages of a batch, of which the first is its schema: metadata and body."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(batch)
    reader = pa.ipc.MessageReader.open_stream(sink.getvalue())
    return [
        (message.metadata.to_pybytes(), b"" if message.body is None else message.body.to_pybytes())
        for message in iter_messages(reader)
    ]


def iter_messages(reader: pa.ipc.MessageReader) -> Iterator[Any]:
    while True:
        try:
            yield reader.read_next_message()
        except StopIteration:
            return


class RawFlight:
    """A gRPC client that sends any bytes."""

    def __init__(self, location: str, token: str | None) -> None:
        self.channel = grpc.insecure_channel(location.removeprefix("grpc://"), options=UNLIMITED)
        self.metadata = () if token is None else (("authorization", f"Bearer {token}"),)

    def put(self, stream: Iterable[bytes], *, timeout: float = 60.0) -> list[bytes]:
        """The answers to a DoPut. Raises grpc.RpcError."""
        call = self.channel.stream_stream(f"{SERVICE}/DoPut")
        return list(call(iter(stream), metadata=self.metadata, timeout=timeout))

    def action(self, message: bytes, *, timeout: float = 60.0) -> list[bytes]:
        return list(self.channel.unary_stream(f"{SERVICE}/DoAction")(message, metadata=self.metadata, timeout=timeout))

    def get(self, message: bytes, *, timeout: float = 60.0) -> list[bytes]:
        return list(self.channel.unary_stream(f"{SERVICE}/DoGet")(message, metadata=self.metadata, timeout=timeout))

    def close(self) -> None:
        self.channel.close()
