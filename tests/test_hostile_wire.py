"""What a client may send to a store's server: anything. It is refused, or it is taken as what it says; the server lives
on, its memory is bounded, nothing is unpickled, and others are served as before."""

from __future__ import annotations

import base64
import json
import pickle
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
import pytest

from asyncflow.errors import LeaseLost, StoreError
from asyncflow.store import wire
from asyncflow.store.calls import MAX_REQUEST, MAX_WAITING
from asyncflow.store.flight import MAX_PLACES, MAX_PUTS, StoreServer
from asyncflow.store.journal import LedgerReader
from asyncflow.store.recovery import rebuild
from asyncflow.store.remote import connect
from asyncflow.store.store import EmbeddedStore, Store
from asyncflow.types import PolicyVersion
from tests.processes import wait_until
from tests.raw_flight import SERVICE, RawFlight, field, flight_data, messages, path_descriptor
from tests.served_store import ARROW_MEMORY, TOKEN, ServedStore
from tests.store_server import StoreProcess
from tests.test_flight import options, pa_join, take
from tests.test_store import SCHEMA, ids, prompts, responses, rewards, terms

MIB = 1 << 20
FRAME, PUT = path_descriptor(b"frame"), path_descriptor(b"put")
SENT, EACH = 400, 60
"""Cases of a fuzz that is run with every change, and of each call."""
NO_ANSWER = (fl.FlightInternalError, fl.FlightTimedOutError, fl.FlightUnavailableError, fl.FlightCancelledError)
"""What no client is told that a server has understood and refuses."""
LATER = ("there is no room", "too many puts are under way", "the puts under way have")
"""Why a put is refused that may be tried again."""


class Target(ServedStore):
    """A served store with a prompt that waits and one that is out on lease, and what shows that it has not changed."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.raw = RawFlight(self.location, TOKEN)
        self.near: list[Store] = []
        self.arrow = fl.FlightClient(self.location)
        self.far = connect(self.location, token=TOKEN, patience=30.0, local=False)
        self.far.admit(prompts(2), timeout=0.0)
        self.lease = take(self.far, "rollout", 2)
        self.frame = int(self.far._control.places([0], ["prompt"])[0].frames[0])

    def __exit__(self, *error: object) -> None:
        self.raw.close()
        for client in (self.far, *self.near):
            client.close()
        super().__exit__(*error)

    def connect_near(self) -> Store:
        """One that sees the segments."""
        self.near.append(connect(self.location, token=TOKEN, patience=30.0, local=True))
        return self.near[-1]

    def ledger_end(self) -> int:
        with LedgerReader(self.ledger) as reader:
            return reader.last

    def action(self, name: str, body: bytes) -> bytes | None:
        """The answer to a call; None when it is refused, which then has changed nothing, and is no failure."""
        before = self.ledger_end()
        try:
            (answer, *_) = self.arrow.do_action(fl.Action(name, body), options())
        except NO_ANSWER as error:
            raise AssertionError(f"the server failed at {name} with {body[:300]!r}: {error}") from None
        except pa.ArrowException:
            assert self.ledger_end() == before
            return None
        return bytes(answer.body.to_pybytes())

    def put(self, stream: Sequence[bytes]) -> str | None:
        """Why a put is refused; None when it is taken. Raises AssertionError when the server says that it failed."""
        try:
            self.raw.put(stream)
            return None
        except grpc.RpcError as error:
            code, details = error.code(), str(error.details())
        assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED), details
        assert code != grpc.StatusCode.UNAVAILABLE or any(words in details for words in LATER), details
        return details

    def get(self, ticket: bytes) -> str | None:
        """Why a DoGet is refused; None when it is answered."""
        try:
            self.arrow.do_get(fl.Ticket(ticket), options()).read_all()
        except NO_ANSWER as error:
            raise AssertionError(f"the server failed at a ticket {ticket[:300]!r}: {error}") from None
        except pa.ArrowException as error:
            return str(error)
        return None

    def serves_others(self) -> None:
        """Another client puts, takes and reads a prompt, and the ledger tells the same story as the store."""
        assert self.process.poll() is None
        other = connect(self.location, token=TOKEN, patience=30.0, local=False)
        other.amend(max_staleness=1000, last_version=1 << 30)
        groups = other.admit(prompts(1), timeout=0.0)
        assert groups is not None
        found = take(other, "rollout", 1 << 20)
        assert 2 * groups[0] in ids(found)
        other.nack(found.lease_id, ids(found), reason="only looking")
        counts, table = other.counts(), rebuild(SCHEMA, self.ledger)
        assert (counts.admitted, counts.open) == (table.next_sample, sum(table.states.values()))
        other.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with Target(tmp_path_factory.mktemp("store"), max_attempts=1000, train_batch_size=1000) as target:
        yield target


@pytest.fixture
def target(shared: Target) -> Iterator[Target]:
    """For tests that change nothing."""
    before = shared.ledger_end()
    yield shared
    assert shared.process.poll() is None
    assert shared.ledger_end() == before
    shared.serves_others()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Target]:
    with Target(tmp_path, max_attempts=1000, train_batch_size=1000) as target:
        yield target
        target.serves_others()


# -- requests ----------------------------------------------------------------------------------------------------------

GOOD: dict[str, dict[str, Any]] = {
    "hello": {"protocol": wire.PROTOCOL},
    "allocate": {},
    "room": {"groups": 1, "timeout": 0},
    "admit": {"prompt_tokens": [3], "frame": 1 << 40, "size": 10, "timeout": 0},
    "lease": {"stage": "reward", "worker": "w", "max_rows": 2, "ttl": 60, "timeout": 0},
    "renew": {"lease_id": 1, "ttl": 60},
    "ack": {"lease_id": 1, "sample_ids": [0], "columns": 504, "frame": 1 << 40, "size": 9, "tokens": [1]},
    "nack": {"lease_id": 1, "sample_ids": [0], "reason": "no"},
    "gone": {"worker": "nobody"},
    "commit": {"leases": [1], "trained": [0], "skipped": [], "version": {"n": 1}, "masked": {}},
    "drop": {"sample_ids": [99], "reason": "no"},
    "restore": {"sample_ids": [99]},
    "prioritise": {"priority": 1, "samples": [0], "groups": [0]},
    "serve": {"engine": "e", "version": {"n": 0}},
    "amend": {"max_staleness": 1, "last_version": None},
    "checkpointed": {"version": {"n": 0}, "oldest": {"n": 0}},
    "held": {"lease_id": 1},
    "columns_of": {"sample_ids": [0]},
    "places": {"sample_ids": [0], "columns": ["prompt"]},
    "waited_for": {},
    "awaited": {"topic": "train"},
    "counts": {},
    "stat": {},
}
assert set(GOOD) == set(wire.CALLS)
SAMPLES = {"columns": 504, "frame": 1 << 40, "tokens": [1, 1], "oldest": [0, 0], "newest": [0, 0]}
PUT_ID = {"producer": "p", "epoch": 0, "sequence": 1}
EXTENSION = msgspec.msgpack.Ext
NASTY: list[Any] = [
    *(0, 1, -1, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)),
    *(0.0, -0.0, 1e308, float("nan"), float("inf"), float("-inf")),
    *(None, True, "", "x" * 10_000, "\0\ud7ff\U0010ffff", b"\xff\xfe", [], {}, [[]], [None], [1.5], ["x"], {"n": -1}),
    *([0, 0], [-1], [1 << 62], [(1 << 64) - 1], list(range(5000)), {"n": 1 << 63}, {"incarnation": 1 << 40, "n": 0}),
    *({"n": 1 << 32}, {(1 << 63) - 1: {"n": 0}}, {0: {"n": -1}}, SAMPLES, PUT_ID),
    *(SAMPLES | {"frame": -1}, SAMPLES | {"frame": -(1 << 62)}, SAMPLES | {"tokens": [1 << 40, -1]}),
    *(SAMPLES | {"oldest": [1 << 62, 5], "newest": [1 << 62, 4]}, SAMPLES | {"columns": -1}),
    *(SAMPLES | {"columns": 1 << 62}, SAMPLES | {"frame": 77 << 40}, PUT_ID | {"sequence": -(1 << 63)}),
    *(PUT_ID | {"epoch": (1 << 64) - 1}, PUT_ID | {"producer": "p" * 10_000}),
    *(
        EXTENSION(8, b"12345678"),
        EXTENSION(8, b"123"),
        EXTENSION(4, b""),
        EXTENSION(-1, b"\0" * 12),
        EXTENSION(99, b"x"),
    ),
]
FIELDS = {name: [f.name for f in msgspec.structs.fields(request)] for name, (request, _) in wire.CALLS.items()}


def as_json(value: Any) -> bytes | None:
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError):
        return None


def test_a_call_with_any_values_is_refused_or_taken_and_never_a_failure(fresh: Target) -> None:
    chance = random.Random(1)
    seen: Counter[bool] = Counter()
    for call in chance.choices(list(GOOD), k=EACH * len(GOOD)):
        request = dict(GOOD[call])
        for name in chance.sample(FIELDS[call], min(len(FIELDS[call]), chance.randint(1, 2))):
            request[name] = chance.choice(NASTY)
        if chance.random() < 0.1:
            request["more"] = chance.choice(NASTY)
        body = msgspec.msgpack.encode(request)
        if chance.random() < 0.3:
            body = as_json(request) or body
        if request.get("timeout", 0) not in (0, None):
            continue  # it would wait, or is refused for this alone
        seen[fresh.action(call, body) is not None] += 1

    assert min(seen[True], seen[False]) > EACH, seen


def bodies() -> list[bytes]:
    depth = 100_000
    nested = msgspec.msgpack.encode({"groups": 1, "timeout": 0})
    return [
        b"",
        b"\xc1",
        b"\x91" * depth,
        b"\x81\xa1a" * depth,
        b"\xdd\xff\xff\xff\xff",  # an array, a map, a string, bytes and an extension of 4 GiB that are not there
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x08",
        b'{"a":' * depth,
        b"{" + b"[" * depth,
        b'{"groups": NaN}',
        b'{"groups": 1e999}',
        b'{"groups": ' + b"9" * 10_000 + b"}",
        b'{"\\ud800": 1}',
        nested + nested,
        nested[:-1] + b"\x91" * depth,
        pickle.dumps({"groups": 1}),
    ]


def test_bodies_that_are_no_request_are_refused(target: Target) -> None:
    for call in ("room", "admit", "places", "commit", "counts"):
        for body in bodies():
            assert target.action(call, body) is None, (call, body[:20])
    assert target.action("room" * 10_000, b"{}") is None


def test_a_request_that_is_too_large_is_refused(target: Target) -> None:
    body = b'{"reason": "' + b"x" * MAX_REQUEST + b'"}'

    assert target.action("nack", body) is None
    assert "is too large" in str(target.get(body))


def test_requests_with_bits_that_were_flipped_are_no_failure(fresh: Target) -> None:
    chance = random.Random(5)
    calls = [call for call in GOOD if "timeout" not in GOOD[call]]
    for _ in range(SENT):
        call = chance.choice(calls)
        body = bytearray(msgspec.msgpack.encode(GOOD[call]))
        for _ in range(chance.randint(1, 3)):
            body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        fresh.action(call, bytes(body[: chance.randint(1, len(body))] if chance.random() < 0.3 else body))


def test_a_refusal_with_many_rows_arrives_with_all_of_them(tmp_path: Path) -> None:
    with Target(tmp_path, train_batch_size=20_000) as target:
        target.far.admit(prompts(2000), timeout=0.0)
        lease = take(target.far, "rollout", 4000)
        target.far.nack(lease.lease_id, ids(lease)[::2], reason="an answer that is longer than headers may be")

        with pytest.raises(LeaseLost, match="has ended for sample") as refused:
            target.far.ack(lease.lease_id, ids(lease), responses(ids(lease)))

        assert list(refused.value.rows) == ids(lease)[::2]
        request = {"lease_id": lease.lease_id, "sample_ids": ids(lease), "reason": "in JSON"}
        with pytest.raises(fl.FlightServerError, match="has ended for sample"):
            list(target.arrow.do_action(fl.Action("nack", json.dumps(request).encode()), options()))


@pytest.mark.parametrize(
    ("call", "change"),
    [
        ("admit", {"frame": -1}),  # it stopped the store: a frame is nowhere, and no segment could be counted
        ("admit", {"samples": SAMPLES | {"columns": 1016, "frame": -1}}),
        ("admit", {"prompt_tokens": []}),
        ("admit", {"priorities": [1 << 63]}),
        ("ack", {"frame": -1}),
        ("serve", {"version": {"n": -1}}),
        ("serve", {"version": {"n": 1 << 32}}),
        ("serve", {"engine": "e" * 1000}),
        ("checkpointed", {"oldest": {"n": -5}}),
        ("amend", {"max_staleness": 1 << 32}),  # with more than that nobody could be told what there is room for
        ("amend", {"last_version": (1 << 63) - 1}),
        ("nack", {"sample_ids": [0, 0]}),
        ("nack", {"reason": "x" * 5000}),
        ("gone", {"worker": "x" * 5000}),
        ("places", {"columns": ["prompt", "prompt"]}),
    ],
)
def test_values_that_make_no_sense_are_refused(target: Target, call: str, change: dict[str, Any]) -> None:
    good = GOOD | {"ack": GOOD["ack"] | {"tokens": []}}
    before = target.far.counts()

    if call == "places":
        assert "twice" in str(target.get(json.dumps({"samples": [0], **change}).encode()))
    else:
        assert target.action(call, msgspec.msgpack.encode(good[call] | change)) is None

    assert target.far.counts() == before


# -- tickets -----------------------------------------------------------------------------------------------------------


def ticket(columns: Sequence[str], frames: Any, offsets: Any) -> bytes:
    return wire.encode(wire.Ticket(columns=list(columns), frames=np.array(frames), offsets=np.array(offsets, np.int32)))


def test_rows_that_there_are_not_are_refused(target: Target) -> None:
    frame, least, most = target.frame, -(1 << 63), (1 << 63) - 1
    assert target.get(ticket(["prompt"], [frame, frame], [0, 1])) is None
    refused: list[tuple[list[str], list[int], list[int]]] = [
        *((["prompt"], [other], [0]) for other in (-1, 0, 1, most, least, frame + 1, frame | (1 << 40) - 1, 99 << 40)),
        *((["prompt"], [frame], [row]) for row in (-1, 2, (1 << 31) - 1, -(1 << 31))),
        *((["prompt"], [other] * 9, [0] * 9) for other in (-1, most, least)),
        (["prompt"], [frame] * 9, [0, 1, -1] * 3),
        (["prompt"], list(range(frame, frame + 64)), [0] * 64),
        (["prompt"], list(range(0, 50 << 40, 1 << 40)), [0] * 50),
        (["prompt"], [frame, frame], [0]),
        (["prompt", "prompt"], [frame], [0]),
        (["prompt"] * 100_000, [frame], [0]),
        (["response"], [frame], [0]),
        (["nothing"], [frame], [0]),
        (["prompt"], [frame] * (MAX_PLACES + 1), [0] * (MAX_PLACES + 1)),
    ]
    for columns, frames, offsets in refused:
        assert target.get(ticket(columns, frames, offsets)) is not None, (columns[:2], frames[:2], offsets[:2])


def test_millions_of_places_take_a_bounded_memory(fresh: Target) -> None:
    fresh.far.admit(prompts(1).set_column(0, "prompt", pa.array(["x" * (8 * MIB)])), timeout=0.0)
    frame = int(fresh.far._control.places([4], ["prompt"])[0].frames[0])
    before = fresh.forget_peak()

    # 8 TiB
    assert "does not fit into memory" in str(fresh.get(ticket(["prompt"], [frame] * MAX_PLACES, [0] * MAX_PLACES)))

    assert fresh.peak_memory - before < ARROW_MEMORY + 200 * MIB


def test_tickets_that_are_none_are_refused(target: Target) -> None:
    chance = random.Random(3)
    good = ticket(["prompt"], [target.frame], [0])
    places = b"\x83\xa7columns\x91\xa6prompt\xa6frames%b\xa7offsets%b"
    forged = [places % (frames, b"\xd6\x04\0\0\0\0") for frames in (b"\xd6\x08\0\0\0\0", b"\xc9\xff\xff\xff\xff\x08")]
    forged += [places % (b"\x01", b"\x01"), places % (b"\xd6\x63abcd", b"\xd6\x63abcd")]
    for body in [*bodies(), *forged, b'{"samples": [-1]}', b'{"samples": [99]}', b'{"samples": [0], "columns": ["x"]}']:
        assert target.get(body) is not None, body[:60]
    for _ in range(SENT):
        flipped = bytearray(good)
        flipped[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        target.get(bytes(flipped))


# -- puts --------------------------------------------------------------------------------------------------------------


def with_column(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    return batch.set_column(batch.schema.get_field_index(name), name, column)


FORGED: dict[str, tuple[str, list[int]]] = {
    "a list that ends behind its values": ("prompt_ids", [0, 3, 1 << 30]),
    "a list that ends just behind its values": ("prompt_ids", [0, 3, 8]),
    "a list that begins before its values": ("prompt_ids", [-9, 3, 7]),
    "a list that ends before it begins": ("prompt_ids", [0, 7, 3]),
    "text that ends behind its bytes": ("prompt", [0, 5, 1 << 30]),
    "text that begins before its bytes": ("prompt", [-(1 << 31), 5, 11]),
    "text that ends before it begins": ("prompt", [0, 11, 5]),
    "text that begins within a character": ("prompt", [0, 1, 11]),
}


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("path", [FRAME, PUT])
def test_offsets_forged_inside_of_valid_messages_are_refused(target: Target, path: bytes, forged: str) -> None:
    """The easiest attack: an Arrow writer does not look at what offsets say."""
    name, offsets = FORGED[forged]
    texts, lists = pa.array(["ä" * 2 + "x", "ü" * 3]), pa.array([[1, 2, 3], [4, 5, 6, 7]], pa.list_(pa.int32()))
    batch = with_column(with_column(prompts(2), "prompt", texts), "prompt_ids", lists)
    (schema, _), (header, body) = messages(batch)
    good = np.frombuffer(batch.column(name).buffers()[1], np.int32, 3).tobytes()
    assert body.count(good) == 1

    body = body.replace(good, np.array(offsets, np.int32).tobytes())

    refused = target.put([flight_data(schema, descriptor=path), flight_data(header, body)])
    assert "is not valid Arrow data" in str(refused)


def stream(batch: pa.RecordBatch, descriptor: bytes = FRAME, compression: str | None = None) -> list[bytes]:
    """What a client sends for a put."""
    (schema, _), *rest = messages(batch, compression)
    return [flight_data(schema, descriptor=descriptor), *(flight_data(header, body) for header, body in rest)]


def finished(groups: int = 2) -> pa.RecordBatch:
    return pa_join(
        prompts(groups).take(pa.array(np.repeat(np.arange(groups), 2))),
        responses(range(2 * groups)),
        rewards(range(2 * groups)),
    )


def damaged(chance: random.Random) -> list[bytes]:
    """A put with bits flipped in the metadata or the body of a message, a part cut off, or a length forged."""
    batch = chance.choice([prompts(2), finished(), prompts(1)])
    parts = [[bytearray(part) for part in message] for message in messages(batch, chance.choice([None, None, "zstd"]))]
    for _ in range(chance.randint(1, 4)):
        part = chance.choice(chance.choice(parts))
        if not part:
            continue
        match chance.randrange(4):
            case 0 | 1:
                part[chance.randrange(len(part))] ^= 1 << chance.randrange(8)
            case 2:
                del part[chance.randrange(len(part)) :]
            case _:
                place = chance.randrange(len(part) // 8 + 1) * 8
                part[place : place + 8] = chance.choice([-1, 1 << 31, 1 << 40, (1 << 63) - 1, 0]).to_bytes(
                    8, "little", signed=True
                )
    sent = [flight_data(bytes(h), bytes(b), descriptor=b"" if i else FRAME) for i, (h, b) in enumerate(parts)]
    match chance.randrange(12):
        case 0:
            sent.reverse()
        case 1:
            sent *= 2
        case 2:
            sent.pop(chance.randrange(len(sent)))
        case 3:
            sent[-1] = sent[-1][: chance.randrange(len(sent[-1]))]
    return sent


def damage(target: Target, cases: int, seed: int) -> Counter[str]:
    chance = random.Random(seed)
    seen: Counter[str] = Counter()
    for _ in range(cases):
        refused = target.put(damaged(chance))
        seen["taken" if refused is None else "refused"] += 1
        if target.process.poll() is not None:
            break
    return seen


def test_damaged_streams_neither_crash_the_server_nor_reach_the_table(target: Target) -> None:
    size = target.forget_peak()

    seen = damage(target, SENT, seed=1)

    assert seen["refused"] > SENT // 3, seen
    assert target.peak_memory - size < ARROW_MEMORY + 100 * MIB


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_damaged_streams_neither_crash_the_server_nor_reach_the_table(target: Target) -> None:
    seen = damage(target, 50_000, seed=2)

    assert target.process.poll() is None
    assert seen.total() == 50_000
    assert seen["refused"] > 50_000 // 3, seen


def of_type(kind: pa.DataType) -> pa.RecordBatch:
    return pa.record_batch([pa.nulls(2, kind)], schema=pa.schema([pa.field("prompt", kind)]))


def nested(depth: int) -> pa.DataType:
    kind = pa.int32()
    for _ in range(depth):
        kind = pa.list_(kind)
    return kind


SCHEMAS: dict[str, Callable[[], pa.RecordBatch]] = {
    "100,000 columns": lambda: pa.record_batch([pa.array([1])] * 100_000, [f"c{i}" for i in range(100_000)]),
    "the same column 100,000 times": lambda: pa.record_batch([pa.array(["x"])] * 100_000, ["prompt"] * 100_000),
    "lists in lists": lambda: of_type(nested(60)),
    "a dictionary": lambda: pa.record_batch([pa.array(["a", "b"]).dictionary_encode()], ["prompt"]),
    "a union": lambda: of_type(pa.dense_union([pa.field("a", pa.int32()), pa.field("b", pa.string())])),
    "an extension type": lambda: pa.record_batch(
        [pa.ExtensionArray.from_storage(pa.uuid(), pa.nulls(2, pa.binary(16)))], ["prompt"]
    ),
    "a struct": lambda: of_type(pa.struct([pa.field("a", pa.int32())])),
    "a map": lambda: of_type(pa.map_(pa.string(), pa.int32())),
    "nothing but nulls": lambda: of_type(pa.null()),
    "run-end encoding": lambda: pa.record_batch([pa.RunEndEncodedArray.from_arrays([2], ["x"])], ["prompt"]),
    "views": lambda: of_type(pa.string_view()),
    "a name of a megabyte": lambda: pa.record_batch([pa.array([1])], ["x" * MIB]),
    "no columns": lambda: pa.RecordBatch.from_struct_array(pa.array([{}] * 5, pa.struct([]))),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_that_no_frame_has_are_refused_before_their_data_are_read(target: Target, name: str) -> None:
    batch = SCHEMAS[name]()
    refused = target.put(stream(batch))

    assert "columns do not fit" in str(refused) or "not valid Arrow data" in str(refused)
    assert target.put([flight_data(messages(batch)[0][0], descriptor=FRAME)]) == refused  # without any data


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_small_body_that_unpacks_to_gigabytes_takes_no_memory(target: Target, codec: str) -> None:
    zeros = pa.array(np.zeros(1 << 28, np.int32))
    bomb = with_column(prompts(1), "prompt_ids", pa.ListArray.from_arrays(pa.array([0, 1 << 28], pa.int32()), zeros))
    sent = stream(bomb, compression=codec)
    assert sum(map(len, sent)) < 5 * MIB
    assert bomb.nbytes > 1 << 30
    before = target.forget_peak()

    for _ in range(3):
        assert "does not fit into memory" in str(target.put(sent))

    assert target.peak_memory - before < ARROW_MEMORY // 2


def test_a_store_that_is_served_by_itself_has_this_limit(tmp_path: Path) -> None:
    """Without it the server would unpack what is sent, and only then see that it is too much."""
    zeros = pa.array(np.zeros(1 << 28, np.int32))
    bomb = with_column(prompts(1), "prompt_ids", pa.ListArray.from_arrays(pa.array([0, 1 << 28], pa.int32()), zeros))
    server = StoreProcess(tmp_path / "store")
    try:
        raw = RawFlight(server.location, server.token)
        with pytest.raises(grpc.RpcError, match="does not fit into memory"):
            raw.put(stream(bomb, compression="zstd"))
        raw.close()
    finally:
        server.kill()


def test_a_put_is_copied_out_of_messages_with_much_that_nobody_needs(target: Target) -> None:
    """What is kept until the put ends is what it says, and not what it was sent with."""
    (schema, _), (header, body) = messages(prompts(1))
    before = target.forget_peak()

    refused = target.put([flight_data(schema, descriptor=FRAME), *[flight_data(header, body + bytes(4 * MIB))] * 200])

    assert refused is None or "not valid" in refused
    assert target.peak_memory - before < 200 * MIB


ODD: dict[str, tuple[list[bytes], str]] = {
    "nothing": ([], "before first message"),
    "a descriptor only": ([flight_data(descriptor=FRAME)], "cannot be read"),
    "a schema only": (stream(prompts(1))[:1], "without any rows"),
    "no rows": (stream(prompts(1).slice(0, 0)), "without any rows"),
    "no schema": (stream(prompts(1))[1:], ""),
    "a batch in place of the schema": ([flight_data(*messages(prompts(1))[1], descriptor=FRAME)], ""),
    "many messages without rows": (
        [*stream(prompts(1))[:1], *stream(prompts(1).slice(0, 0))[1:] * 20_000],
        "messages: put larger batches",
    ),
    "many messages without data": (
        [*stream(prompts(1))[:1], *[flight_data(metadata=b"x")] * 20_000],
        "messages: put larger batches",
    ),
    "bytes that are no message": ([b"\xff" * 1000], ""),
    "a descriptor of junk": (stream(prompts(1), b"\xff" * 1000), ""),
    "an unknown path": (stream(prompts(1), path_descriptor(b"x" * 100_000)), 'path "put"'),
    "many paths": (stream(prompts(1), path_descriptor(*[b"put"] * 10_000)), 'path "put"'),
    "a command of junk": (stream(prompts(1), b"\x08\x02" + field(2, b"\x80\x04junk")), "cannot be read"),
    "a deep command": (stream(prompts(1), b"\x08\x02" + field(2, b'{"put":' * 100_000)), "cannot be read"),
    "priorities for nobody": (stream(prompts(1), b"\x08\x02" + field(2, b'{"priorities": [1, 2]}')), "priorities"),
    "numbers that are too large": (stream(prompts(1), b"\x08\x02" + field(2, b'{"priorities": [1e99]}')), "read"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_puts_are_refused(target: Target, name: str) -> None:
    sent, message = ODD[name]
    refused = target.put(sent)

    assert refused is not None
    assert message in refused


def test_a_put_without_end_is_stopped(target: Target) -> None:
    batch = pa.record_batch({"prompt": ["x" * MIB]})
    first, message = stream(batch)

    def endless() -> Iterator[bytes]:
        yield first
        while True:
            yield message

    before = target.forget_peak()
    assert "put fewer samples at a time" in str(target.put(endless()))  # type: ignore[arg-type]
    assert target.peak_memory - before < 600 * MIB


# -- who stays ---------------------------------------------------------------------------------------------------------


def waiting_lease(timeout: float = 50.0) -> bytes:
    request = {"stage": "rollout", "worker": "w", "max_rows": 1, "ttl": 60, "timeout": timeout}
    return field(1, b"lease") + field(2, json.dumps(request).encode())


def refused_for(raw: RawFlight, message: bytes) -> str:
    """Why a call is refused that otherwise waits."""
    try:
        raw.action(message, timeout=0.5)
    except grpc.RpcError as error:
        return str(error.details())
    return ""


def answers_others(target: Target) -> None:
    """Everything but what waits, from a client that sees the segments and from one that does not."""
    target.far.renew(target.lease.lease_id, ttl=1000.0)
    assert target.far.counts().admitted
    assert target.get(ticket(["prompt"], [target.frame], [0])) is None
    near = connect(target.location, token=TOKEN, patience=30.0, local=True)
    assert near.read([0], ["prompt"]).num_rows == 1
    assert near.admit(prompts(1), timeout=0.0) is not None
    near.close()


def test_calls_that_wait_are_bounded_and_keep_nobody_else_from_an_answer(fresh: Target) -> None:
    take(fresh.far, "rollout", 1 << 20)  # so that there is nothing to lease
    call = fresh.raw.channel.unary_stream("/arrow.flight.protocol.FlightService/DoAction")
    before = fresh.forget_peak()
    waiting = [call(waiting_lease(), metadata=fresh.raw.metadata) for _ in range(MAX_WAITING)]

    wait_until(lambda: "too many calls wait: 1024" in refused_for(fresh.raw, waiting_lease()))

    assert fresh.far.lease("rollout", worker="w", max_rows=1, ttl=9.0, timeout=0.0) is None  # it does not wait
    assert fresh.peak_memory - before < 400 * MIB
    for one in waiting[2:]:
        one.cancel()
    answers_others(fresh)  # and what it admits is for the first two
    assert [len(list(one)) for one in waiting[:2]] == [1, 1]
    # Those who have left are found out when there is something for them.
    wait_until(lambda: "too many" not in refused_for(fresh.raw, waiting_lease(timeout=0.1)))


class Limited:
    """A store in this process whose server takes few puts at a time."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.store = EmbeddedStore.create(SCHEMA, terms(), ledger=folder / "ledger.sqlite", data=folder / "data")
        self.store.serve("engine", PolicyVersion(n=0))
        self.server = StoreServer(self.store, token=TOKEN, **limits)
        self.raw = RawFlight(self.server.location, TOKEN)
        self.ends: list[threading.Event] = []
        self.calls: list[Any] = []
        """A call that nobody has any more is cancelled."""

    def begin(self, *messages: bytes) -> threading.Event:
        """A put of these messages that ends when the event is set."""
        end = threading.Event()
        self.ends.append(end)

        def sent() -> Iterator[bytes]:
            yield from messages
            end.wait()

        self.calls.append(self.raw.channel.stream_stream(f"{SERVICE}/DoPut")(sent(), metadata=self.raw.metadata))
        return end

    def put(self) -> str | None:
        """Why a put is refused; None when it is taken."""
        try:
            self.raw.put(stream(prompts(1)))
        except grpc.RpcError as error:
            return str(error.details())
        return None

    def close(self) -> None:
        for end in self.ends:
            end.set()
        self.raw.close()
        self.server.close()


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Callable[..., Limited]]:
    made: list[Limited] = []

    def make(**limits: Any) -> Limited:
        made.append(Limited(tmp_path, **limits))
        return made[-1]

    yield make
    for one in made:
        one.close()


def fill(most: int, begin: Callable[[], object], put: Callable[[], str | None]) -> None:
    """Begin puts until there are as many as may be. A put that only looks may have the place that one of them wants,
    which is refused then: so another one is begun whenever there was room."""
    for _ in range(most):
        begin()

    def full() -> bool:
        refused = str(put())
        if f"too many puts are under way: {most} are allowed at the same time; end one first" in refused:
            return True
        begin()
        return False

    wait_until(full)


def test_so_many_puts_and_no_more_are_under_way(limited: Callable[..., Limited]) -> None:
    store = limited(most_puts=3)

    fill(3, lambda: store.begin(*stream(prompts(1))), store.put)

    far = connect(store.server.location, token=TOKEN, patience=30.0, local=False)
    assert far.counts().admitted == 0  # what is no put is answered
    for end in store.ends:
        end.set()

    wait_until(lambda: store.put() is None)
    assert far.admit(prompts(1), timeout=0.0) == (0,)
    far.close()


def test_the_puts_under_way_have_so_many_bytes_together(limited: Callable[..., Limited]) -> None:
    large = prompts(1).set_column(0, "prompt", pa.array(["x" * MIB]))
    store = limited(most_together=3 * MIB)
    ends = [store.begin(*stream(large)) for _ in range(2)]
    received = store.server._received
    wait_until(lambda: received._bytes > 2 * MIB)

    with pytest.raises(grpc.RpcError, match=rf"have 2\d* bytes and {3 * MIB} are allowed: try again when some have"):
        store.raw.put(stream(large))
    store.raw.put(stream(prompts(1)))  # for which there is room
    ends[0].set()

    wait_until(lambda: received._bytes < 2 * MIB)
    store.raw.put(stream(large))


@pytest.mark.long
def test_puts_that_never_end_are_bounded_and_keep_nobody_else_from_an_answer(fresh: Target) -> None:
    end = threading.Event()
    first, message = stream(prompts(1))

    def stuck() -> Iterator[bytes]:
        yield first
        yield message
        end.wait()

    channels = [RawFlight(fresh.location, TOKEN) for _ in range(8)]
    puts: list[Any] = []

    def begin() -> None:
        raw = channels[len(puts) % 8]
        puts.append(raw.channel.stream_stream(f"{SERVICE}/DoPut")(stuck(), metadata=raw.metadata))

    fill(MAX_PUTS, begin, lambda: fresh.put(stream(prompts(1))))
    answers_others(fresh)

    for put in puts[: MAX_PUTS // 2]:
        put.cancel()
    for raw in channels:  # as if their process had gone
        raw.close()
    end.set()
    wait_until(lambda: fresh.put(stream(prompts(1))) is None)


def test_connections_that_say_nothing_keep_nobody_from_an_answer(fresh: Target) -> None:
    host, port = fresh.location.removeprefix("grpc://").split(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    said = [b"", preface, preface + bytes(9), preface[:10], b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(500)]
    connections = [socket.create_connection((host, int(port))) for _ in range(200)]
    for number, connection in enumerate(connections):
        connection.sendall(said[number % len(said)])

    answers_others(fresh)

    for connection in connections:
        connection.close()


# -- no code -----------------------------------------------------------------------------------------------------------


class Canary:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_nothing_that_is_sent_is_ever_unpickled(fresh: Target, tmp_path: Path, protocol: int) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "control"), protocol))
    assert (tmp_path / "control").exists()
    path = tmp_path / "canary"
    canary = pickle.dumps(Canary(path), protocol)
    text = canary.decode("latin-1")
    (schema, _), (header, body) = messages(prompts(1))

    for call, good in GOOD.items():
        assert fresh.action(call, canary) is None
        for name in set(FIELDS[call]) - {"timeout"}:
            for value in (canary, text, EXTENSION(8, canary), EXTENSION(-1, canary), EXTENSION(80, canary)):
                taken = fresh.action(call, msgspec.msgpack.encode(good | {name: value}))
                assert taken is None or value is text, (call, name)
    assert fresh.get(canary) is not None
    assert fresh.get(msgspec.msgpack.encode({"columns": [text], "frames": canary, "offsets": canary})) is not None
    with_metadata = prompts(1).replace_schema_metadata({"pandas": canary, "ARROW:extension:name": canary})
    extension = pa.field(
        "prompt",
        pa.string(),
        metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": canary,
        },
    )
    for stream_ in (
        [flight_data(schema, descriptor=canary), flight_data(header, body)],
        [flight_data(schema, descriptor=FRAME, metadata=canary), flight_data(header, body, metadata=canary)],
        [flight_data(canary, descriptor=FRAME), flight_data(canary, canary)],
        [flight_data(schema, descriptor=FRAME), flight_data(header, canary)],
        stream(prompts(1), path_descriptor(canary)),
        stream(prompts(1), b"\x08\x02" + field(2, canary)),
        stream(with_metadata),
        stream(pa.record_batch([pa.array(["x"])], schema=pa.schema([extension]))),
        stream(with_column(prompts(1), "prompt_columns", pa.array([text]))),
    ):
        fresh.put(stream_)
    with pytest.raises(StoreError, match="token"):
        connect(fresh.location, token=base64.b64encode(canary).decode(), patience=1.0)

    assert not path.exists()
