"""A store that is somewhere else.

    store = connect("grpc://127.0.0.1:7654", token=…)        # then as any other store

A client that sees the store's segments (it is on the same host) writes and reads them itself, and only says so, over a
Unix socket beside them (`near`); another one sends and fetches columns. A store that cannot be reached is waited for,
up to `patience` seconds a call; a call whose answer was lost is made again. What is named happens once then: puts,
leases, commits, acks with columns. What sets something to a value (`serve`, `amend`, `prioritise`, `gone`, `drop`) is
the same the second time. A nack, a restore, or an ack without columns that has happened is refused the second time, and
has happened all the same.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
from numpy.typing import NDArray

from asyncflow.clock import Clock, SystemClock
from asyncflow.errors import Closed, LeaseLost, StoreError, Unreachable
from asyncflow.store import wire
from asyncflow.store.client import Counts, Grant, Place, Stat, Waited
from asyncflow.store.data import Data, FileFrames
from asyncflow.store.events import PutId, Samples
from asyncflow.store.near import NearClient, NotThere, Unanswered
from asyncflow.store.schema import Schema
from asyncflow.store.store import HOST_FILE, Store
from asyncflow.types import PolicyVersion

PATIENCE = 30.0
"""Seconds for which a call waits for a store that cannot be reached."""
GRACE = 10.0
"""Seconds that an answer may take beyond what was asked to wait."""
TRANSFER = 120.0
"""Seconds that data may take."""
SLOWEST = 1 << 20
"""Bytes a second; a put has as long as it takes at this pace besides."""
PAUSE = 0.05
"""Seconds between two tries."""
MAX_WAIT = 10.0
"""Seconds for which one call waits."""
REFUSAL = msgspec.json.Decoder(wire.Refusal)
FRAME = wire.decoder(int)

T = TypeVar("T")


def connect(
    location: str, *, token: str, tls_root: bytes | None = None, patience: float = PATIENCE, local: bool | None = None
) -> Store:
    """The store at a Flight location. `tls_root`: PEM of the authority that has signed its certificate.

    `local` says whether its segments are read and written directly; None finds out; a client for which it is False uses
    nothing but Flight. Raises Unreachable, and StoreError for a wrong token or another protocol.
    """
    control = RemoteControl(location, token=token, tls_root=tls_root, patience=patience)
    try:
        return _store_behind(control, local)
    except BaseException:
        control.close()
        raise


def _store_behind(control: RemoteControl, local: bool | None) -> Store:
    welcome = control.hello()
    schema = Schema.from_json(welcome.schema)
    if welcome.near is not None and local is not False:
        control.come_near(Path(welcome.near))
    if local is None:
        folder = welcome.folder
        local = folder is not None and _sees(Path(folder), welcome.host) and os.access(folder, os.W_OK | os.X_OK)
    data: Data = _frames_in(welcome, control) if local else RemoteFrames(control)
    return Store(schema, welcome.group_size, control, data)


def _frames_in(welcome: wire.Welcome, control: RemoteControl) -> FileFrames:
    """Raises StoreError for a folder that is not the store's."""
    if welcome.folder is None:
        raise StoreError("the store keeps its samples in memory: connect without local")
    folder = Path(welcome.folder)
    try:
        if not _sees(folder, welcome.host):
            raise StoreError(f"{folder} is not the folder of this store on this host: connect without local")
        return FileFrames(folder, control.allocate, durable=welcome.durability == "power")
    except OSError as error:
        raise StoreError(f"{folder} cannot be used ({error}): connect without local, or see to the folder") from None


def _sees(folder: Path, host: str) -> bool:
    try:
        return (folder / HOST_FILE).read_text(encoding="ascii") == host
    except (OSError, UnicodeDecodeError):
        return False


@dataclass
class _Producer:
    """Of puts that happen one after the other."""

    name: str
    puts: int = 0


class RemoteControl:
    """`Control` over Flight; thread-safe."""

    def __init__(
        self,
        location: str,
        *,
        token: str,
        tls_root: bytes | None = None,
        patience: float = PATIENCE,
        grace: float = GRACE,
        transfer: float = TRANSFER,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.location = location
        self._clock = clock or SystemClock()
        self._sleep = sleep
        self._token, self._tls_root = token, tls_root
        self._patience, self._grace, self._transfer = patience, grace, transfer
        self._headers = [(b"authorization", f"Bearer {token}".encode())]
        self._lock = threading.Lock()
        self._client = self._connect()
        self._near: NearClient | None = None
        self._identity = ""
        self._name = uuid.uuid4().hex
        self._leases = 0
        """That this client has named."""
        self._producers: list[_Producer] = []
        """That put nothing just now. Puts at the same time have different ones: each tells its puts one by one."""
        self._puts = 0
        """How many producers there are."""
        self._tries = 0
        """Calls that had to be repeated."""
        self._closed = False

    def hello(self) -> wire.Welcome:
        """What is there. Every later call is for this store, and is refused when another one has taken its place."""
        welcome: wire.Welcome = self._call("hello", wire.Hello())
        self._identity = welcome.identity
        self._headers.append((wire.STORE_HEADER.encode(), welcome.identity.encode()))
        return welcome

    def come_near(self, folder: Path) -> None:
        """Make calls over the socket in this folder, if the store answers there."""
        with suppress(OSError, Unanswered):
            self._near = NearClient(folder, token=self._token, store=self._identity)

    def allocate(self) -> int:
        return int(self._call("allocate", wire.Allocate()))

    def room(self, groups: int, *, size: int = 0, put: PutId | None = None, timeout: float) -> bool:
        def ask(left: float) -> bool | None:
            return self._call("room", wire.Room(groups=groups, size=size, put=put, timeout=left), wait=left) or None

        return bool(self._in_turns(ask, timeout, wire.MAX_TIMEOUT))

    def admit(
        self,
        prompt_tokens: Sequence[int],
        *,
        frame: int,
        size: int,
        samples: Samples | None = None,
        put: PutId | None = None,
        priorities: Sequence[int] = (),
        timeout: float,
    ) -> int | None:
        if put is None:  # so that it can be asked for again when the answer is lost
            with self._as_producer() as name:
                about: dict[str, Any] = {"samples": samples, "put": name, "priorities": priorities}
                return self.admit(prompt_tokens, frame=frame, size=size, **about, timeout=timeout)

        def ask(left: float) -> int | None:
            request = wire.Admit(
                prompt_tokens=list(prompt_tokens),
                frame=frame,
                size=size,
                samples=samples,
                put=put,
                priorities=list(priorities),
                timeout=left,
            )
            first: int | None = self._call("admit", request, wait=left)
            return first

        return self._in_turns(ask, timeout, wire.MAX_TIMEOUT)

    @contextmanager
    def _as_producer(self) -> Iterator[PutId]:
        """The name of one put."""
        with self._lock:
            if not self._producers:
                self._puts += 1
                self._producers.append(_Producer(f"{self._name}-{self._puts}"))
            producer = self._producers.pop()
        producer.puts += 1
        try:
            yield PutId(producer=producer.name, sequence=producer.puts)
        finally:
            with self._lock:
                self._producers.append(producer)

    def lease(
        self,
        stage: str,
        *,
        worker: str,
        max_rows: int,
        max_tokens: int | None = None,
        min_rows: int = 1,
        ranks: int | None = None,
        request: str | None = None,
        ttl: float,
        timeout: float,
    ) -> Grant | None:
        # So that a lease whose answer was lost, with the server perhaps, is not one that nobody knows of.
        name = request or self._new_request()

        def ask(left: float) -> Grant | None:
            request_ = wire.LeaseRows(
                stage=stage,
                worker=worker,
                max_rows=max_rows,
                max_tokens=max_tokens,
                min_rows=min_rows,
                ranks=ranks,
                request=name,
                ttl=ttl,
                timeout=left,
            )
            grant: Grant | None = self._call("lease", request_, wait=left)
            return grant

        deadline = self._clock.monotonic() + timeout
        while True:
            try:
                return self._in_turns(ask, max(0.0, deadline - self._clock.monotonic()))
            except LeaseLost:
                if request is not None:
                    raise
                name = self._new_request()  # it has ended before its answer came

    def _new_request(self) -> str:
        with self._lock:
            self._leases += 1
            return f"{self._name}-{self._leases}"

    def renew(self, lease_id: int, *, ttl: float) -> None:
        self._call("renew", wire.Renew(lease_id=lease_id, ttl=ttl))

    def ack(
        self,
        lease_id: int,
        sample_ids: Sequence[int],
        *,
        columns: int,
        frame: int,
        size: int,
        tokens: Sequence[int] = (),
        oldest: Sequence[int | None] = (),
        newest: Sequence[int | None] = (),
    ) -> None:
        request = wire.Ack(
            lease_id=lease_id,
            sample_ids=_ints(sample_ids),
            columns=columns,
            frame=frame,
            size=size,
            tokens=list(tokens),
            oldest=list(oldest),
            newest=list(newest),
        )
        self._call("ack", request)

    def nack(self, lease_id: int, sample_ids: Sequence[int], *, reason: str, final: bool = False) -> None:
        request = wire.Nack(
            lease_id=lease_id, sample_ids=_ints(sample_ids), reason=reason[: wire.MOST_REASON], final=final
        )
        self._call("nack", request)

    def gone(self, worker: str) -> None:
        self._call("gone", wire.Gone(worker=worker))

    def commit(
        self,
        *,
        leases: Sequence[int],
        trained: Sequence[int],
        skipped: Sequence[int],
        version: PolicyVersion,
        masked: Mapping[int, PolicyVersion] | None = None,
    ) -> None:
        request = wire.Commit(
            leases=_ints(leases),
            trained=_ints(trained),
            skipped=_ints(skipped),
            version=version,
            masked=None if masked is None else dict(masked),
        )
        self._call("commit", request)

    def drop(self, sample_ids: Sequence[int], *, reason: str) -> None:
        self._call("drop", wire.Drop(sample_ids=_ints(sample_ids), reason=reason[: wire.MOST_REASON]))

    def restore(self, sample_ids: Sequence[int]) -> None:
        self._call("restore", wire.Restore(sample_ids=_ints(sample_ids)))

    def prioritise(self, priority: int, *, samples: Sequence[int] = (), groups: Sequence[int] = ()) -> None:
        self._call("prioritise", wire.Prioritise(priority=priority, samples=_ints(samples), groups=_ints(groups)))

    def serve(self, engine: str, version: PolicyVersion | None) -> None:
        self._call("serve", wire.Serve(engine=engine, version=version))

    def amend(self, *, max_staleness: int | None = None, last_version: int | None = None) -> None:
        self._call("amend", wire.Amend(max_staleness=max_staleness, last_version=last_version))

    def checkpointed(self, version: PolicyVersion, *, oldest: PolicyVersion) -> None:
        self._call("checkpointed", wire.MarkCheckpoint(version=version, oldest=oldest))

    def held(self, lease_id: int) -> NDArray[np.int64]:
        held: NDArray[np.int64] = self._call("held", wire.Held(lease_id=lease_id))
        return held

    def columns_of(self, sample_ids: Sequence[int]) -> tuple[str, ...]:
        columns: tuple[str, ...] = self._call("columns_of", wire.ColumnsOf(sample_ids=_ints(sample_ids)))
        return columns

    def places(self, sample_ids: Sequence[int], columns: Sequence[str]) -> tuple[Place, ...]:
        request = wire.Places(sample_ids=_ints(sample_ids), columns=list(columns))
        places: tuple[Place, ...] = self._call("places", request)
        return places

    def waited_for(self) -> tuple[Waited, ...]:
        waited: tuple[Waited, ...] = self._call("waited_for", wire.WaitedFor())
        return waited

    def awaited(self, topic: str) -> str:
        return str(self._call("awaited", wire.Awaited(topic=topic)))

    def counts(self) -> Counts:
        counts: Counts = self._call("counts", wire.GetCounts())
        return counts

    def stat(self) -> Stat:
        stat: Stat = self._call("stat", wire.GetStat())
        return stat

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._client.close()
        if self._near is not None:
            self._near.close()

    # -- frames --------------------------------------------------------------------------------------------------------

    def put_frame(self, batch: pa.RecordBatch) -> int:
        """Give a frame to the store's own host."""

        def put(client: fl.FlightClient) -> int:
            descriptor = fl.FlightDescriptor.for_path("frame")
            within = self._transfer + batch.nbytes / SLOWEST
            writer, reader = client.do_put(descriptor, batch.schema, self._options(within))
            writer.write_batch(batch)
            writer.done_writing()
            answer = reader.read()
            writer.close()
            return int(FRAME.decode(memoryview(answer)))

        return self._try(put)

    def get_rows(self, columns: Sequence[str], frames: np.ndarray, offsets: np.ndarray) -> pa.Table:
        """Rows of frames, from the store's own host. Raises DamagedData."""
        ticket = fl.Ticket(wire.encode(wire.Ticket(columns=list(columns), frames=frames, offsets=offsets)))
        return self._try(lambda client: client.do_get(ticket, self._options(self._transfer)).read_all())

    # -- the wire ------------------------------------------------------------------------------------------------------

    def _call(self, name: str, request: wire.Message, *, wait: float = 0.0) -> Any:
        body, within = wire.encode(request), wait + self._grace

        def call(client: fl.FlightClient) -> Any:
            if self._near is not None:
                # Who is not there any more may have gone for good: whoever is at the location now says so.
                with suppress(NotThere):
                    return wire.ANSWERS[name].decode(self._near.call(name, body, within))
            answer, *refusal = client.do_action(fl.Action(name, body), self._options(within))
            if refusal:
                raise REFUSAL.decode(memoryview(refusal[0].body)).as_error()
            return wire.ANSWERS[name].decode(memoryview(answer.body))

        return self._try(call)

    def _try(self, call: Callable[[fl.FlightClient], T]) -> T:
        """Call until there is an answer. Raises what the store refuses; Unreachable when there is none in time, counted
        from the first try that failed: a call that has waited long already is as patient as any other."""
        deadline: float | None = None
        while True:
            if self._closed:
                raise Closed("this client of the store is closed")
            client = self._client
            try:
                return call(client)
            except fl.FlightServerError as error:
                raise _refusal(error) from None
            except fl.FlightUnauthenticatedError:
                raise StoreError(f"{self.location} refuses the token: use that of its server") from None
            except (Unanswered, fl.FlightUnavailableError, fl.FlightTimedOutError, fl.FlightCancelledError) as error:
                now = self._clock.monotonic()
                deadline = now + self._patience if deadline is None else deadline
                if now >= deadline:
                    raise Unreachable(
                        f"the store at {self.location} does not answer ({error}): see that it runs"
                    ) from None
            except pa.ArrowException as error:
                raise StoreError(f"{self.location} has failed: {error}") from None
            self._reconnect(client)
            self._sleep(PAUSE)

    def _in_turns(self, ask: Callable[[float], T | None], timeout: float, turn: float | None = None) -> T | None:
        """Ask until there is an answer; one call waits at most a `turn` (`MAX_WAIT` seconds), so that one whose client
        has died does not stay for long. A put has longer ones, because it begins each at the end of the line."""
        deadline = self._clock.monotonic() + timeout
        while True:
            left = min(max(0.0, deadline - self._clock.monotonic()), turn or MAX_WAIT)
            answer = ask(left)
            if answer is not None or self._clock.monotonic() >= deadline:
                return answer

    def _reconnect(self, broken: fl.FlightClient) -> None:
        """A new connection, unless another thread has made one: an old one would wait longer with every failure."""
        with self._lock:
            if self._client is broken and not self._closed:
                self._tries += 1
                self._client = self._connect()

    def _connect(self) -> fl.FlightClient:
        try:
            return fl.FlightClient(self.location, tls_root_certs=self._tls_root)
        except pa.ArrowException as error:
            raise StoreError(f"{self.location!r} is no Flight location (grpc://host:port): {error}") from None

    def _options(self, timeout: float) -> fl.FlightCallOptions:
        return fl.FlightCallOptions(timeout=timeout, headers=self._headers)


class RemoteFrames:
    """Frames of a store whose segments this host does not see."""

    def __init__(self, control: RemoteControl) -> None:
        self._control = control

    def append(self, batch: pa.RecordBatch) -> int:
        return self._control.put_frame(batch)

    def settle(self, frame: int) -> None:
        """The server has settled it when it was named."""

    def abandon(self, frame: int) -> None:
        """The server that is there now begins a segment of its own."""

    def read(self, columns: Mapping[str, pa.DataType], frames: np.ndarray, offsets: np.ndarray) -> list[pa.Array]:
        rows = self._control.get_rows(list(columns), frames, offsets)
        return [pa.concat_arrays(rows.column(name).chunks) for name in columns]

    def forget(self, segment: int) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """The control is closed by who has made it."""


def _refusal(error: fl.FlightServerError) -> StoreError:
    try:
        return REFUSAL.decode(error.extra_info).as_error()
    except msgspec.MsgspecError:
        return StoreError(str(error))


def _ints(values: Sequence[int]) -> list[int]:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)
