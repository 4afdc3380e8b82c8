"""What clients and a broker say to each other: msgpack, one typed message for each call of `Control`.

    request   a map of the fields below                     answer   a value, or a map of its fields

Arrays travel as msgpack extension 8 (int64) or 4 (int32): the numbers, little-endian. A refusal is a Flight error whose
extra info is the JSON of a `Refusal`; one with many rows has no room there, and comes as a second result, behind an
empty one. A request in JSON is answered in JSON, with plain lists for arrays. Nothing is
ever pickled.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import msgspec
import numpy as np
import xxhash
from msgspec import Meta
from numpy.typing import NDArray

from asyncflow import errors
from asyncflow.errors import AsyncFlowError, DamagedData, LeaseLost, StoreError
from asyncflow.store.client import Counts, Grant, Place, Stat, Waited
from asyncflow.store.events import PutId, Samples
from asyncflow.types import PolicyVersion

PROTOCOL = 1
ARRAYS: dict[int, np.dtype[Any]] = {8: np.dtype("<i8"), 4: np.dtype("<i4")}
MAX_TIMEOUT = 60.0
"""Seconds for which one call may wait; whoever waits longer calls again."""

MOST_REASON = 4096
"""Characters of a reason; of a longer one a client sends the beginning."""

assert sys.byteorder == "little", "arrays go over the wire as they are in memory"


Id = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Count = Annotated[int, Meta(ge=0, lt=1 << 31)]
Packed = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Frame = Annotated[int, Meta(ge=-1, le=(1 << 63) - 1)]
Size = Annotated[int, Meta(ge=0, lt=1 << 50)]
Number = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Name = Annotated[str, Meta(max_length=256)]
Reason = Annotated[str, Meta(max_length=MOST_REASON)]
Wait = Annotated[float, Meta(ge=0, le=1e9)]
Ttl = Annotated[float, Meta(gt=0, le=1e9)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all requests."""


class Hello(Message, frozen=True, kw_only=True):
    """What is there?"""

    protocol: int = PROTOCOL


STORE_HEADER = "asyncflow-store"
"""Of every call but the first: `Welcome.identity` of the store that the caller means."""


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `Hello`."""

    protocol: int
    schema: str
    """`Schema.to_json`."""
    group_size: int
    folder: str | None
    """Of the segments; None: they are in the server's memory."""
    near: str | None
    """Folder of the socket for clients on the same host."""
    host: str
    """What the file `host` in the folder of the segments holds, for who sees the same one."""
    durability: str

    @property
    def identity(self) -> str:
        """The same as long as calls of an earlier time mean the same: the samples are the same run's."""
        text = f"{self.protocol} {self.host} {self.group_size} {self.schema}"
        return f"{xxhash.xxh3_64_intdigest(text.encode()):016x}"


class Allocate(Message, frozen=True, kw_only=True):
    pass


class Room(Message, frozen=True, kw_only=True):
    groups: Count
    size: Size = 0
    put: PutId | None = None
    timeout: Wait


class Admit(Message, frozen=True, kw_only=True):
    prompt_tokens: list[Count]
    frame: Frame
    size: Size
    samples: Samples | None = None
    put: PutId | None = None
    priorities: list[Number] = []
    timeout: Wait


class LeaseRows(Message, frozen=True, kw_only=True):
    stage: Name
    worker: Name
    max_rows: Annotated[int, Meta(ge=1)]
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    min_rows: Annotated[int, Meta(ge=1)] = 1
    ranks: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    request: Name | None = None
    ttl: Ttl
    timeout: Wait


class Renew(Message, frozen=True, kw_only=True):
    lease_id: Id
    ttl: Ttl


class Ack(Message, frozen=True, kw_only=True):
    lease_id: Id
    sample_ids: list[Id]
    columns: Id
    frame: Frame
    size: Size
    tokens: list[Count] = []
    oldest: list[Packed | None] = []
    newest: list[Packed | None] = []


class Nack(Message, frozen=True, kw_only=True):
    lease_id: Id
    sample_ids: list[Id]
    reason: Reason
    final: bool = False


class Gone(Message, frozen=True, kw_only=True):
    worker: Name


class Commit(Message, frozen=True, kw_only=True):
    leases: list[Id]
    trained: list[Id]
    skipped: list[Id]
    version: PolicyVersion
    masked: dict[Id, PolicyVersion] | None = None


class Drop(Message, frozen=True, kw_only=True):
    sample_ids: list[Id]
    reason: Reason


class Restore(Message, frozen=True, kw_only=True):
    sample_ids: list[Id]


class Prioritise(Message, frozen=True, kw_only=True):
    priority: Number
    samples: list[Id] = []
    groups: list[Id] = []


class Serve(Message, frozen=True, kw_only=True):
    engine: Name
    version: PolicyVersion | None = None


class Amend(Message, frozen=True, kw_only=True):
    max_staleness: Number | None = None
    last_version: Number | None = None


class MarkCheckpoint(Message, frozen=True, kw_only=True):
    version: PolicyVersion
    oldest: PolicyVersion


class Held(Message, frozen=True, kw_only=True):
    lease_id: Id


class ColumnsOf(Message, frozen=True, kw_only=True):
    sample_ids: list[Id]


class Places(Message, frozen=True, kw_only=True):
    sample_ids: list[Id]
    columns: list[str]


class WaitedFor(Message, frozen=True, kw_only=True):
    pass


class Awaited(Message, frozen=True, kw_only=True):
    topic: Name


class GetCounts(Message, frozen=True, kw_only=True):
    pass


class GetStat(Message, frozen=True, kw_only=True):
    pass


CALLS: dict[str, tuple[type[Message], Any]] = {
    "hello": (Hello, Welcome),
    "allocate": (Allocate, int),
    "room": (Room, bool),
    "admit": (Admit, int | None),
    "lease": (LeaseRows, Grant | None),
    "renew": (Renew, None),
    "ack": (Ack, None),
    "nack": (Nack, None),
    "gone": (Gone, None),
    "commit": (Commit, None),
    "drop": (Drop, None),
    "restore": (Restore, None),
    "prioritise": (Prioritise, None),
    "serve": (Serve, None),
    "amend": (Amend, None),
    "checkpointed": (MarkCheckpoint, None),
    "held": (Held, np.ndarray),
    "columns_of": (ColumnsOf, tuple[str, ...]),
    "places": (Places, tuple[Place, ...]),
    "waited_for": (WaitedFor, tuple[Waited, ...]),
    "awaited": (Awaited, str),
    "counts": (GetCounts, Counts),
    "stat": (GetStat, Stat),
}
"""Name of a Flight action → its request and the type of its answer."""


MOST_ROWS = 64
"""Rows of a refusal that fit into the headers of an answer."""
MOST_MESSAGE = 1000
"""Bytes of its message."""


def shortened(message: str) -> str:
    data = message.encode(errors="replace")
    return message if len(data) <= MOST_MESSAGE else f"{data[:MOST_MESSAGE].decode(errors='ignore')} …"


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """An error of the store, so that a client raises the same one."""

    error: str
    message: str
    rows: tuple[int, ...] = ()
    frame: int = -1

    @classmethod
    def of(cls, error: AsyncFlowError) -> Refusal:
        rows = error.rows if isinstance(error, LeaseLost) else ()
        frame = error.frame if isinstance(error, DamagedData) else -1
        return cls(error=type(error).__name__, message=str(error), rows=rows, frame=frame)

    def shortened(self) -> Refusal:
        """As it fits into the headers of an answer, for which gRPC has 8 KiB."""
        rows = self.rows if len(self.rows) <= MOST_ROWS else ()
        return msgspec.structs.replace(self, message=shortened(self.message), rows=rows)

    def as_error(self) -> StoreError:
        match kind := getattr(errors, self.error, None):
            case errors.LeaseLost:
                return LeaseLost(self.message, rows=self.rows)
            case errors.DamagedData:
                return DamagedData(self.message, frame=self.frame)
            case type() if issubclass(kind, StoreError):
                return kind(self.message)
            case _:
                return StoreError(self.message)


def _encode_array(value: Any) -> msgspec.msgpack.Ext:
    if isinstance(value, np.ndarray) and value.dtype in ARRAYS.values():
        return msgspec.msgpack.Ext(value.dtype.itemsize, value.tobytes())
    raise TypeError(f"a {type(value).__name__} does not go over the wire")


def _decode_array(code: int, data: memoryview) -> NDArray[Any]:
    if code not in ARRAYS or len(data) % code:
        raise ValueError("an array of a type that there is not")
    array: NDArray[Any] = np.frombuffer(data, ARRAYS[code])
    return array


def _check_array(kind: type, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    raise ValueError(f"expected an array, got {type(value).__name__}")


encode = msgspec.msgpack.Encoder(enc_hook=_encode_array).encode


def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Reads messages of one type. What it decodes is checked; it raises msgspec.MsgspecError or ValueError."""
    return msgspec.msgpack.Decoder(kind, ext_hook=_decode_array, dec_hook=_check_array)


class Ticket(Message, frozen=True, kw_only=True):
    """Of a DoGet: columns of rows of frames."""

    columns: list[str]
    frames: np.ndarray
    offsets: np.ndarray


class SamplesTicket(Message, frozen=True, kw_only=True):
    """The same for people, in JSON: columns (all of them, if none are named) of open samples."""

    samples: list[Id]
    columns: list[str] | None = None


class Put(Message, frozen=True, kw_only=True):
    """Command of a DoPut of prompts, or of finished samples, in JSON."""

    put: PutId | None = None
    priorities: list[Number] = []
    timeout: Wait = 0.0


TICKET = decoder(Ticket)
SAMPLES_TICKET = msgspec.json.Decoder(SamplesTicket)
PUT = msgspec.json.Decoder(Put)
encode_json = msgspec.json.Encoder(enc_hook=lambda array: array.tolist()).encode
JSON_REQUESTS = {name: msgspec.json.Decoder(request) for name, (request, _) in CALLS.items()}
REQUESTS = {name: decoder(request) for name, (request, _) in CALLS.items()}
ANSWERS = {name: decoder(answer) for name, (_, answer) in CALLS.items()}
