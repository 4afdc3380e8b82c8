"""A store that others reach over Arrow Flight (https://arrow.apache.org/docs/format/Flight.html); clients on its own
host make their calls over a Unix socket (`near`).

    DoAction <call>          every call of `Control` (`wire`), in msgpack or JSON; one that waits costs nobody else
    DoGet <ticket>           rows of frames, for a host that does not see the segments; samples by id, for people
    DoPut path "frame"       one frame, from a host that does not see the segments; answers with its id
    DoPut path "put", or a command (`wire.Put`)    prompts, or finished samples, from any Arrow client
    ListFlights, GetFlightInfo <stage>             the stages, with the columns that each needs

Every call needs the token, as `authorization: Bearer …`. What clients send is bounded and checked before it is used.
"""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as fl

from asyncflow.errors import AsyncFlowError, Closed, LeaseLost, StoreError, UserError
from asyncflow.store import wire
from asyncflow.store.calls import Calls, Places, TooMany, check_size, decoded, is_json
from asyncflow.store.columns import one_of_each
from asyncflow.store.frames import check_schema
from asyncflow.store.near import NearServer
from asyncflow.store.schema import Schema
from asyncflow.store.store import EmbeddedStore

logger = logging.getLogger(__name__)

MAX_PLACES = 1 << 20
"""Rows that one DoGet asks for."""
MAX_PUT = 256 << 20
"""Bytes of the columns of one put."""
MAX_BATCHES = 1 << 14
"""Messages of one put."""
MAX_PUTS = 64
"""Puts under way at the same time; each has a thread."""
MAX_PUT_TOGETHER = 1 << 30
"""Bytes of all puts under way."""
SHUTDOWN = 5.0
"""Seconds that calls have to end when the server stops."""


class _Door(fl.ServerMiddlewareFactory):  # type: ignore[misc]
    """Refuses every call without the right token, and those that were meant for another store at this address."""

    def __init__(self, token: str, identity: str) -> None:
        self._expected = f"Bearer {token}".encode()
        self._identity = identity

    def start_call(self, info: fl.CallInfo, headers: Mapping[str, Sequence[str]]) -> None:
        given = next(iter(headers.get("authorization", ())), "")
        if not hmac.compare_digest(str(given).encode(), self._expected):
            raise fl.FlightUnauthenticatedError("the token is missing or wrong: send `authorization: Bearer <token>`")
        meant = next(iter(headers.get(wire.STORE_HEADER, ())), self._identity)
        if meant != self._identity:
            raise _refused(Closed("the store of this client has ended, and another one is in its place: connect again"))


class StoreServer(fl.FlightServerBase):  # type: ignore[misc]
    """Serves one embedded store until `close`."""

    def __init__(
        self,
        store: EmbeddedStore,
        *,
        token: str,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: tuple[bytes, bytes] | None = None,
        near: Path | None = None,
        most_puts: int = MAX_PUTS,
        most_together: int = MAX_PUT_TOGETHER,
    ) -> None:
        """`port` 0 takes a free one. `tls`: certificate chain and private key, PEM. `near`: folder for the Unix socket;
        that of the segments, if there is one, when it is not given. `most_puts` may be under way at the same time, and
        have `most_together` bytes. Raises OSError for an address that cannot be had."""
        near = near or store.folder
        calls = Calls(store, near=near)
        scheme = "grpc" if tls is None else "grpc+tls"
        super().__init__(
            f"{scheme}://{host}:{port}",
            tls_certificates=None if tls is None else [tls],
            middleware={"door": _Door(token, calls.welcome.identity)},
        )
        self.location = f"{scheme}://{host}:{self.port}"
        self._store = store
        self._calls = calls
        self._puts = Places(most_puts, "too many puts are under way", "end one first")
        self._received = _Received(most_together)
        self._near = None if near is None else NearServer(calls, near, token=token)
        self._ending = threading.Thread(target=self.shutdown, name="store-shutdown", daemon=True)

    def close(self) -> None:
        """Close the store, which ends the calls that wait, and stop. Who sends something for ever is not waited for."""
        self._store.close()
        if self._near is not None:
            self._near.close(SHUTDOWN)
        # Flight has no deadline for this. The thread keeps the server, whose end would wait as well.
        if self._ending.ident is None:
            self._ending.start()
        self._ending.join(SHUTDOWN)
        if self._ending.is_alive():
            logger.warning("a client has not ended its call: the store has closed without it")

    # -- control -------------------------------------------------------------------------------------------------------

    def list_actions(self, context: fl.ServerCallContext) -> list[tuple[str, str]]:
        return [(name, f"{request.__name__}: msgpack or JSON") for name, (request, _) in wire.CALLS.items()]

    def do_action(self, context: fl.ServerCallContext, action: fl.Action) -> list[bytes]:
        body = memoryview(action.body)
        with _refusals(context):
            try:
                return [self._calls.answer(action.type, body, lambda: not context.is_cancelled())]
            except LeaseLost as error:
                if is_json(body) or len(error.rows) <= wire.MOST_ROWS:
                    raise
                return [b"", wire.encode_json(wire.Refusal.of(error))]

    # -- data ----------------------------------------------------------------------------------------------------------

    def do_get(self, context: fl.ServerCallContext, ticket: fl.Ticket) -> fl.RecordBatchStream:
        with _refusals(context):
            check_size(ticket.ticket)
            if ticket.ticket[:1] == b"{":
                about = decoded(wire.SAMPLES_TICKET, ticket.ticket, "samples")
                _check_places(len(about.samples))
                batch = self._store.read(about.samples, about.columns)
            else:
                rows = decoded(wire.TICKET, ticket.ticket, "rows of frames")
                _check_places(len(rows.frames))
                batch = self._store.read_frames(rows.columns, rows.frames, rows.offsets)
            return fl.RecordBatchStream(pa.Table.from_batches([batch]))

    def do_put(
        self,
        context: fl.ServerCallContext,
        descriptor: fl.FlightDescriptor,
        reader: fl.MetadataRecordBatchReader,
        writer: fl.FlightMetadataWriter,
    ) -> None:
        with _refusals(context), self._received.put() as received:
            with self._puts.one():  # not while it waits for room: those who make some put as well
                batch = received.batch(reader, self._store.schema)
            if descriptor.path == [b"frame"]:
                frame = self._store.append(batch)
                self._calls.unnamed.add(frame)
                writer.write(wire.encode(frame))
                return
            if descriptor.path not in (None, [], [b"put"]):
                raise StoreError('data are put with the path "put", or with a command in JSON')
            check_size(descriptor.command or b"")
            put = decoded(wire.PUT, descriptor.command, "put") if descriptor.command else wire.Put()
            with self._calls.waiting.one() if put.timeout > 0 else nullcontext():
                groups = self._put(batch, put)
            writer.write(wire.encode_json(groups))

    def _put(self, batch: pa.RecordBatch, put: wire.Put) -> tuple[int, ...]:
        """Columns of any Arrow client: prompts alone, one row each; or with what was made of them, a row a sample."""
        schema, names = self._store.schema, batch.schema.names
        prompts = batch.select([name for name in schema.prompt_columns if name in names])
        samples = batch.select([name for name in names if name not in schema.prompt_columns])
        size = self._store.group_size
        if samples.num_columns and size > 1:
            prompts = one_of_each(prompts, size)
        groups = self._store.admit(
            prompts,
            samples if samples.num_columns else None,
            put=put.put,
            priorities=put.priorities,
            timeout=min(put.timeout, wire.MAX_TIMEOUT),
        )
        if groups is None:
            raise fl.FlightUnavailableError(
                f"there is no room (it waits for: {self._store.awaited('admission')}): try again later"
            )
        return groups

    # -- for people ----------------------------------------------------------------------------------------------------

    def list_flights(self, context: fl.ServerCallContext, criteria: bytes) -> Iterator[fl.FlightInfo]:
        for stage in self._store.schema.stages:
            yield self._info(stage)

    def get_flight_info(self, context: fl.ServerCallContext, descriptor: fl.FlightDescriptor) -> fl.FlightInfo:
        with _refusals(context):
            stages = self._store.schema.stages
            name = b"/".join(descriptor.path or []).decode(errors="replace")
            if name not in stages:
                raise StoreError(f"there is no stage {name!r}; the stages are {', '.join(stages)}")
            return self._info(name)

    def _info(self, stage: str) -> fl.FlightInfo:
        schema = self._store.schema
        fields = [pa.field(name, schema.columns[name]) for name in schema.stages[stage].needs]
        rows = self._store.counts().ready.get(stage, -1)
        return fl.FlightInfo(pa.schema(fields), fl.FlightDescriptor.for_path(stage), [], rows, -1)


def _check_places(rows: int) -> None:
    if rows > MAX_PLACES:
        raise StoreError(f"{rows} rows at once are too many: ask for at most {MAX_PLACES} at a time")


class _Received:
    """The bytes of all puts under way: who never ends his put keeps what he has sent in memory."""

    def __init__(self, most: int) -> None:
        self._lock = threading.Lock()
        self._most = most
        self._bytes = 0

    @contextmanager
    def put(self) -> Iterator[_Receiver]:
        receiver = _Receiver(self)
        try:
            yield receiver
        finally:
            self.add(-receiver.size)

    def add(self, size: int) -> None:
        """Raises FlightUnavailableError for more than there is room for now."""
        with self._lock:
            if size > 0 and self._bytes + size > self._most:
                raise fl.FlightUnavailableError(
                    f"the puts under way have {self._bytes} bytes and {self._most} are allowed: try again when "
                    "some have ended"
                )
            self._bytes += size


class _Receiver:
    """What one client puts."""

    def __init__(self, together: _Received) -> None:
        self._together = together
        self.size = 0

    def batch(self, reader: fl.MetadataRecordBatchReader, schema: Schema) -> pa.RecordBatch:
        """All of it, as one batch that is safe to use. Raises StoreError."""
        batches: list[pa.RecordBatch] = []
        try:
            # Before the first batch is read, so that what frames do not have is never decoded.
            _check_columns(reader.schema, schema)
            for count, chunk in enumerate(reader):
                if count >= MAX_BATCHES:
                    raise StoreError(f"a put may have {MAX_BATCHES} messages: put larger batches")
                if chunk.data is None or not len(chunk.data):
                    continue
                chunk.data.validate(full=True)
                self._add(chunk.data.nbytes)
                if batches:  # a batch is views of its message, which may be much larger
                    batches[0] = _copied(batches[0]) if len(batches) == 1 else batches[0]
                    batches.append(_copied(chunk.data))
                else:
                    batches.append(chunk.data)
            if not batches:
                raise StoreError("a put without any rows: write a record batch")
            return batches[0] if len(batches) == 1 else pa.concat_batches(batches)
        except (OSError, UnicodeError) as error:  # of a stream that Flight cannot follow, and of names that are no text
            raise StoreError(f"a put that cannot be read: {error}") from None
        except pa.ArrowMemoryError as error:
            raise StoreError(f"what was put does not fit into memory ({error}): put fewer samples at a time") from None
        except pa.ArrowException as error:
            raise StoreError(f"what was put is not valid Arrow data: {error}") from None

    def _add(self, size: int) -> None:
        if self.size + size > MAX_PUT:
            raise StoreError(f"a put may have {MAX_PUT} bytes: put fewer samples at a time")
        self._together.add(size)
        self.size += size


def _copied(batch: pa.RecordBatch) -> pa.RecordBatch:
    return pa.concat_batches([batch.slice(0, 0), batch])


def _check_columns(put: pa.Schema, schema: Schema) -> None:
    """Raises StoreError for columns that the store does not have, or that no frame has."""
    unknown = [name for name in put.names if name not in schema.columns]
    if unknown or not put.names:
        named = ", ".join(name[:64] for name in unknown[:8]) or "no columns"
        raise StoreError(f"columns do not fit: {named} not expected")
    try:
        check_schema(put)
    except ValueError as error:
        raise StoreError(f"columns do not fit: {error}") from None


@contextmanager
def _refusals(context: fl.ServerCallContext) -> Iterator[None]:
    """Errors of the store as Flight errors from which a client makes the same again."""
    try:
        yield
    except TooMany as error:
        raise fl.FlightUnavailableError(str(error)) from None
    except (StoreError, UserError) as error:
        raise _refused(error) from None
    except fl.FlightError:
        raise
    except MemoryError as error:
        raise _refused(StoreError(f"this does not fit into memory ({error}): ask for less at a time")) from None
    except Exception as error:
        if context.is_cancelled():  # there is nobody any more to be told anything
            raise fl.FlightCancelledError(f"the client has gone: {error}") from None
        logger.exception("a call has failed")
        message = f"the store has failed: {type(error).__name__}: {error}"
        raise fl.FlightInternalError(wire.shortened(message)) from None


def _refused(error: AsyncFlowError) -> fl.FlightServerError:
    refusal = wire.Refusal.of(error).shortened()
    return fl.FlightServerError(refusal.message, wire.encode_json(refusal))
