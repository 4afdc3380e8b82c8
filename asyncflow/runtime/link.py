"""Typed messages between two processes of a run, over a socket pair: msgpack, nothing pickled.

    frame = length u32 (little-endian) | msgpack array of messages

Sending never waits: a thread writes what has gathered, as one frame. Who is killed leaves the other end an end of file.
Arrays travel as msgpack extensions, the numbers as they are in memory: both ends are the same program on one host.
"""

from __future__ import annotations

import queue
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np

from asyncflow import errors
from asyncflow.errors import AsyncFlowError

LENGTH = struct.Struct("<I")
TOGETHER = 256
"""Messages of one frame, at most."""
CLOSE_SECONDS = 10.0
"""Deadline for what was sent to be written when a link is closed."""
ARRAYS: dict[int, np.dtype[Any]] = {1: np.dtype(np.int32), 2: np.dtype(np.int64), 3: np.dtype(np.float32)}
"""Code of the extension → type of the numbers."""
CODES = {kind: code for code, kind in ARRAYS.items()}


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages."""


class Failure(Message, frozen=True, kw_only=True):
    """An exception, for another process."""

    error: str
    """Name of a class in `asyncflow.errors`, or of another one."""
    text: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        return cls(error=type(error).__name__, text=str(error).encode(errors="replace").decode())

    def as_error(self) -> Exception:
        """The same again; RuntimeError for one that is none of ours."""
        kind = getattr(errors, self.error, None)
        if isinstance(kind, type) and issubclass(kind, AsyncFlowError) and kind is not errors.DamagedData:
            return kind(self.text)
        return RuntimeError(f"{self.error}: {self.text}")


class Link:
    """One end. Anybody sends; one thread receives."""

    def __init__(self, connection: socket.socket, incoming: Any, name: str) -> None:
        """`incoming`: the type of the messages that the other end sends."""
        self._connection = connection
        self._decoder = msgspec.msgpack.Decoder(list[incoming], ext_hook=_decode_array, dec_hook=_check_array)
        self._outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name=f"{name}-writer", daemon=True)
        self._writer.start()

    def send(self, message: Message) -> None:
        """From any thread. After the end of the link it goes nowhere."""
        self._outgoing.put(message)

    def receive(self) -> Iterator[Any]:
        """What the other end sends, until there is nobody any more or the link is closed.

        Raises msgspec.MsgspecError or ValueError for what is no message.
        """
        with suppress(OSError), self._connection.makefile("rb") as stream:
            while len(head := stream.read(LENGTH.size)) == LENGTH.size:
                (length,) = LENGTH.unpack(head)
                if len(body := stream.read(length)) < length:
                    return
                yield from self._decoder.decode(body)

    def close(self) -> None:
        """Write what was sent, then end the link for both. May be called twice."""
        self._outgoing.put(None)
        self._writer.join(CLOSE_SECONDS)
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _write(self) -> None:
        encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
        more = True
        while more:
            messages = [self._outgoing.get()]
            with suppress(queue.Empty):
                while len(messages) < TOGETHER:
                    messages.append(self._outgoing.get_nowait())
            more = None not in messages
            body = encoder.encode([message for message in messages if message is not None])
            try:
                self._connection.sendall(LENGTH.pack(len(body)) + body)
            except OSError:  # there is nobody any more
                return


def _encode_array(value: Any) -> msgspec.msgpack.Ext:
    if isinstance(value, np.ndarray) and value.dtype in CODES:
        return msgspec.msgpack.Ext(CODES[value.dtype], np.ascontiguousarray(value).tobytes())
    raise NotImplementedError(f"a {type(value).__name__} does not go to another process")


def _decode_array(code: int, data: memoryview) -> np.ndarray:
    if code not in ARRAYS:
        raise ValueError(f"there is no array of type {code}")
    array: np.ndarray = np.frombuffer(bytes(data), ARRAYS[code])
    return array


def _check_array(kind: Any, value: Any) -> Any:  # noqa: ARG001
    if isinstance(value, np.ndarray):
        return value
    raise ValueError(f"expected an array, got {type(value).__name__}")
