"""A store over Arrow Flight: the same for a client that sees its segments and for one that does not, and for any other
Arrow client; refusals arrive as they were made; who is not allowed in, or has gone, changes nothing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
import pytest

from asyncflow.clock import ManualClock
from asyncflow.errors import Closed, IllegalTransition, LeaseLost, StoreError, UnknownFrame, Unreachable
from asyncflow.store.client import Lease
from asyncflow.store.data import FileFrames
from asyncflow.store.events import PutId
from asyncflow.store.flight import StoreServer
from asyncflow.store.frames import HEADER_BYTES
from asyncflow.store.near import SOCKET, NearClient, Unanswered
from asyncflow.store.remote import RemoteControl, connect
from asyncflow.store.segments import segment_path
from asyncflow.store.store import RESTART_GRACE, EmbeddedStore, Store
from asyncflow.types import PolicyVersion
from tests.processes import wait_until
from tests.raw_flight import SERVICE, RawFlight, field
from tests.test_store import SCHEMA, ids, prompts, responses, rewards, terms

TOKEN = "a token"


class Served:
    """A store in this process, served; clients of it, and what it holds itself."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.clock = ManualClock()
        self.folder = folder / "data"
        self.ledger = folder / "ledger.sqlite"
        self.store = EmbeddedStore.create(
            SCHEMA, terms(**options), ledger=self.ledger, data=self.folder, clock=self.clock
        )
        self.server = StoreServer(self.store, token=TOKEN)
        self.clients: list[Store] = []
        self.store.serve("engine", PolicyVersion(n=0))

    def connect(self, *, local: bool | None = None, **options: Any) -> Store:
        values: dict[str, Any] = {"token": TOKEN, "patience": 5.0, "local": local} | options
        client = connect(self.server.location, **values)
        self.clients.append(client)
        return client

    def restart(self, port: int = 0) -> None:
        """The same store in what might be another process."""
        self.server.close()
        self.store = EmbeddedStore.restart(ledger=self.ledger, data=self.folder, clock=self.clock)
        self.server = StoreServer(self.store, token=TOKEN, port=port)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.close()


@pytest.fixture(params=["near", "near without socket", "far"])
def client(request: pytest.FixtureRequest, served: Served) -> Store:
    """One that sees the segments, also where the socket beside them leads nowhere, and one that does not."""
    if request.param == "near without socket":
        (served.folder / SOCKET).unlink()
    return served.connect(local=request.param != "far")


def take(store: Store, stage: str, rows: int = 100, *, timeout: float = 0.0) -> Lease:
    lease = store.lease(stage, worker="worker", max_rows=rows, ttl=60.0, timeout=timeout)
    assert lease is not None, f"nothing is ready for {stage}"
    return lease


def test_a_sample_lives_over_the_wire_as_it_does_in_one_process(client: Store, served: Served) -> None:
    assert client.admit(prompts(2), timeout=0.0) == (0, 1)
    lease = take(client, "rollout")
    assert ids(lease) == [0, 1, 2, 3]
    assert lease.group_ids.tolist() == [0, 0, 1, 1]
    assert lease.data.column("prompt_ids").to_pylist() == prompts(2).column("prompt_ids").take([0, 0, 1, 1]).to_pylist()
    client.ack(lease.lease_id, ids(lease), responses(ids(lease)))
    scored = take(client, "reward")
    assert scored.data.column("response").to_pylist() == responses(ids(lease)).column("response").to_pylist()
    client.ack(scored.lease_id, ids(scored), rewards(ids(scored)))
    train = take(client, "train")
    assert train.slots == 4
    client.commit(leases=[train.lease_id], trained=ids(train), skipped=[], version=PolicyVersion(n=1))

    assert client.counts() == served.store.counts()
    assert (client.counts().trained, client.counts().open) == (4, 0)


def test_a_client_on_this_host_finds_out_that_it_sees_the_segments(served: Served) -> None:
    near = served.connect()

    near.admit(prompts(1), timeout=0.0)

    assert len(list(served.folder.glob("*.segment"))) == 1  # its own, and none of the server's


def test_finished_samples_are_put_at_once_and_are_ready_to_be_trained(client: Store) -> None:
    samples = pa.RecordBatch.from_arrays(
        [*responses(range(4)).columns, *rewards(range(4)).columns],
        names=[*responses(range(4)).schema.names, *rewards(range(4)).schema.names],
    )

    assert client.admit(prompts(2), samples, timeout=0.0) == (0, 1)

    train = take(client, "train")
    assert ids(train) == [0, 1, 2, 3]
    assert train.data.column("response_ids").to_pylist() == [list(range(i)) for i in range(4)]
    assert train.data.column("reward").to_pylist() == rewards(range(4)).column("reward").to_pylist()
    assert train.data.column("prompt").to_pylist() == prompts(2).column("prompt").take([0, 0, 1, 1]).to_pylist()


def test_samples_that_still_lack_a_reward_wait_for_one(client: Store) -> None:
    client.admit(prompts(1), responses([0, 1]), timeout=0.0)

    assert ids(take(client, "reward")) == [0, 1]
    assert client.lease("rollout", worker="w", max_rows=9, ttl=9.0, timeout=0.0) is None


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (responses([0]), "2 rows of samples|1 rows of samples are put"),
        (responses([0, 1]).drop_columns(["response"]), "all columns of rollout"),
        (rewards([0, 1]), "all columns of rollout"),
        (responses([0, 1], version=3), "the last step made 0.0"),
    ],
)
def test_samples_that_cannot_be_are_refused(client: Store, samples: pa.RecordBatch, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        client.admit(prompts(1), samples, timeout=0.0)

    assert client.counts().admitted == 0


def test_a_put_that_is_repeated_changes_nothing_and_gives_the_same_answer(client: Store) -> None:
    first, second = PutId(producer="p", sequence=1), PutId(producer="p", sequence=2)

    assert client.admit(prompts(1), put=first, timeout=0.0) == (0,)
    assert client.admit(prompts(1), put=first, timeout=0.0) == (0,)
    assert client.admit(prompts(1), put=second, timeout=0.0) == (1,)

    assert client.counts().admitted == 4
    with pytest.raises(StoreError, match=r"put 0\.1 of p comes after 0\.2"):
        client.admit(prompts(1), put=first, timeout=0.0)
    with pytest.raises(StoreError, match="had 1 groups and now has 2"):
        client.admit(prompts(2), put=second, timeout=0.0)
    newer = PutId(producer="p", epoch=1, sequence=0)
    assert client.admit(prompts(1), put=newer, timeout=0.0) == (2,)
    with pytest.raises(StoreError, match="takes a higher epoch"):
        client.admit(prompts(1), put=PutId(producer="p", sequence=3), timeout=0.0)


def test_who_waits_is_given_what_another_client_puts(client: Store, served: Served) -> None:
    other, found = served.connect(), []
    waiter = threading.Thread(target=lambda: found.append(take(client, "rollout", timeout=30.0)))
    waiter.start()
    wait_until(lambda: served.store.broker.waiting() == 1)

    other.admit(prompts(1), timeout=0.0)

    waiter.join(30.0)
    assert [ids(lease) for lease in found] == [[0, 1]]


def test_those_who_wait_are_served_in_the_order_in_which_they_came(served: Served) -> None:
    found: list[tuple[int, list[int]]] = []

    def wait(number: int) -> None:
        client = served.connect()
        found.append((number, ids(take(client, "rollout", 1, timeout=30.0))))

    waiters = [threading.Thread(target=wait, args=(number,)) for number in range(4)]
    for number, waiter in enumerate(waiters):
        waiter.start()
        wait_until(lambda number=number: served.store.broker.waiting() == number + 1)  # type: ignore[misc]

    served.store.admit(prompts(2), timeout=0.0)

    for waiter in waiters:
        waiter.join(30.0)
    assert sorted(found) == [(0, [0]), (1, [1]), (2, [2]), (3, [3])]


def test_a_client_that_has_died_while_it_waited_is_given_nothing(served: Served) -> None:
    raw, broker = RawFlight(served.server.location, TOKEN), served.store.broker
    request = {"stage": "rollout", "worker": "w", "max_rows": 9, "ttl": 9, "timeout": 60}
    call = raw.channel.unary_stream(f"{SERVICE}/DoAction")(
        field(1, b"lease") + field(2, json.dumps(request).encode()), metadata=raw.metadata
    )
    wait_until(lambda: broker.waiting() == 1)
    call.cancel()
    wait_until(lambda: not broker._parked["rollout"][0].alive())

    served.store.admit(prompts(1), timeout=0.0)

    assert served.store.counts().leased == {}
    assert ids(take(served.store, "rollout")) == [0, 1]
    raw.close()


def test_a_late_ack_is_refused_with_the_rows_that_it_lost(client: Store, served: Served) -> None:
    client.admit(prompts(1), timeout=0.0)
    lease = take(client, "rollout")
    served.clock.advance(61.0)

    with pytest.raises(LeaseLost, match="has ended") as refused:
        client.ack(lease.lease_id, ids(lease), responses(ids(lease)))

    assert refused.value.rows == (0, 1)
    assert client.counts().states["prompted"] == 2


def test_the_rows_of_a_worker_that_is_said_to_be_dead_come_back_at_once(client: Store) -> None:
    client.admit(prompts(1), timeout=0.0)
    take(client, "rollout")

    client.gone("worker")

    assert take(client, "rollout").attempts.tolist() == [2, 2]


def test_errors_arrive_as_they_were_raised(client: Store) -> None:
    with pytest.raises(StoreError, match=r"there is no stage 'nothing'; the stages are rollout, reward, train"):
        client.lease("nothing", worker="w", max_rows=1, ttl=1.0, timeout=0.0)
    with pytest.raises(IllegalTransition, match=r"cannot serve 0\.7"):
        client.serve("engine", PolicyVersion(n=7))
    with pytest.raises(LeaseLost, match="lease 99 has ended"):
        client.renew(99, ttl=1.0)


def test_a_commit_whose_answer_was_lost_is_made_once(served: Served) -> None:
    client = served.connect()
    client.admit(prompts(2), pa_join(responses(range(4)), rewards(range(4))), timeout=0.0)
    train = take(client, "train")
    step: dict[str, Any] = {"leases": [train.lease_id], "skipped": [], "version": PolicyVersion(n=1)}
    served.store.commit(**step, trained=ids(train))  # it arrived, and the answer did not

    client.commit(**step, trained=ids(train))

    assert client.counts().trained == 4
    with pytest.raises(LeaseLost):  # what another learner has made of that version is not this one's
        client.commit(**step, trained=[0, 1, 2, 5])


def test_what_was_written_for_a_server_that_was_killed_is_written_again(client: Store, served: Served) -> None:
    control = client._control
    assert isinstance(control, RemoteControl)
    real = control.allocate, control.put_frame
    old = iter([77])  # the number of a segment that the server before this one gave out
    control.put_frame = lambda batch: next(old, 0) << 40 or real[1](batch)  # type: ignore[method-assign]
    if isinstance(client._data, FileFrames):
        client._data._writer._allocate = lambda: next(old, 0) or real[0]()

    assert client.admit(prompts(1), timeout=0.0) == (0,)
    lease = take(client, "rollout")
    client.ack(lease.lease_id, ids(lease), responses(ids(lease)))

    assert (
        take(client, "reward").data.column("response").to_pylist() == responses([0, 1]).column("response").to_pylist()
    )


def test_a_put_that_is_repeated_when_its_samples_have_ended_gives_the_same_answer(served: Served) -> None:
    put, broker = PutId(producer="p", sequence=1), served.store.broker
    values: dict[str, Any] = {"frame": served.store.append(prompts(1)), "size": 1, "put": put, "timeout": 0.0}
    assert broker.admit([3], **values) == 0
    served.store.drop([0, 1], reason="enough")
    served.store._data.abandon(values["frame"])
    served.store.settle(values["frame"])
    served.store.sync()
    wait_until(lambda: not list(served.folder.glob("*.segment")))

    assert broker.admit([3], **values) == 0

    with pytest.raises(UnknownFrame):
        broker.admit([3], **values | {"put": PutId(producer="p", sequence=2)})


class Forgetful:
    """A connection that is lost with the first answer."""

    def __init__(self, way: Any, meanwhile: Callable[[], None]) -> None:
        self._way = way
        self._meanwhile = meanwhile

    def do_action(self, *arguments: Any) -> Any:
        list(self._way.do_action(*arguments))
        self._meanwhile()
        raise fl.FlightUnavailableError("the server was killed")

    def close(self) -> None:
        self._way.close()


class ForgetfulNear(NearClient):
    """A connection over the socket that loses one answer."""

    meanwhile: Callable[[], None] | None = None

    def call(self, name: str, body: bytes, within: float) -> memoryview:
        answer = super().call(name, body, within)
        if self.meanwhile is not None:
            self.meanwhile()
            self.meanwhile = None
            raise Unanswered("the server was killed")
        return answer


def lose_an_answer(client: Store, served: Served, meanwhile: Callable[[], None]) -> None:
    """The next one."""
    control = client._control
    assert isinstance(control, RemoteControl)
    if control._near is None:
        control._client = Forgetful(control._client, meanwhile)
    else:
        control._near.close()
        control._near = ForgetfulNear(served.folder, token=TOKEN, store=control._identity)
        control._near.meanwhile = meanwhile


def test_a_lease_whose_answer_was_lost_is_given_again(client: Store, served: Served) -> None:
    client.admit(prompts(2), timeout=0.0)
    lose_an_answer(client, served, lambda: None)

    lease = take(client, "rollout", 3)

    assert (ids(lease), lease.attempts.tolist()) == ([0, 1, 2], [1, 1, 1])
    assert list(served.store.table.leases) == [lease.lease_id]
    assert ids(take(client, "rollout", 3)) == [3]


def test_a_lease_that_has_ended_before_its_answer_came_is_followed_by_another(client: Store, served: Served) -> None:
    client.admit(prompts(1), timeout=0.0)
    lose_an_answer(client, served, lambda: served.clock.advance(61.0))

    lease = take(client, "rollout")

    assert (ids(lease), lease.attempts.tolist()) == ([0, 1], [2, 2])
    assert list(served.store.table.leases) == [lease.lease_id]


def test_damaged_data_cost_only_the_samples_that_they_hit(client: Store, served: Served) -> None:
    frames: list[int] = []
    for _ in range(2):
        client.admit(prompts(1), timeout=0.0)
        frames.append(int(served.store.table.places(np.array([2 * len(frames)]), ["prompt_ids"])[0].frames[0]))
    path = segment_path(served.folder, frames[1] >> 40)
    with path.open("r+b") as file:
        file.seek((frames[1] & (1 << 40) - 1) + HEADER_BYTES + 40)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))

    assert ids(take(client, "rollout")) == [0, 1]

    assert client.counts().quarantined == 2


def test_nobody_is_let_in_without_the_token(served: Served) -> None:
    with pytest.raises(StoreError, match="refuses the token"):
        connect(served.server.location, token="another", patience=1.0)
    raw = fl.FlightClient(served.server.location)
    calls: list[Callable[[], Any]] = [
        lambda: list(raw.do_action(fl.Action("counts", b"\x80"))),
        lambda: raw.do_get(fl.Ticket(b"{}")).read_all(),
        lambda: list(raw.list_flights()),
        lambda: list(raw.list_actions()),
        lambda: raw.get_flight_info(fl.FlightDescriptor.for_path("rollout")),
        lambda: put(raw, prompts(1), fl.FlightCallOptions()),
    ]
    for call in calls:
        with pytest.raises(fl.FlightUnauthenticatedError, match="Bearer"):
            call()


def test_a_store_that_is_not_there_is_named(served: Served) -> None:
    client = served.connect(patience=0.2)
    served.server.close()

    with pytest.raises((Unreachable, Closed)):
        client.renew(1, ttl=1.0)
    with pytest.raises(Unreachable, match="does not answer"):
        connect(served.server.location, token=TOKEN, patience=0.2)
    with pytest.raises(StoreError, match="is no Flight location"):
        connect("nonsense", token=TOKEN)


def test_a_call_that_has_waited_longer_than_its_patience_still_waits_for_the_next_server(served: Served) -> None:
    clock, tries = ManualClock(), 0
    control = RemoteControl(served.server.location, token=TOKEN, patience=5.0, clock=clock, sleep=clock.advance)

    def call(_: fl.FlightClient) -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            clock.advance(60.0)  # parked, until the server dies
            raise fl.FlightUnavailableError("killed")
        return "answered"

    assert control._try(call) == "answered"
    control.close()


def test_closing_the_store_tells_those_who_wait(served: Served) -> None:
    client, errors = served.connect(), []

    def wait() -> None:
        try:
            client.lease("reward", worker="w", max_rows=1, ttl=1.0, timeout=60.0)
        except StoreError as error:
            errors.append(type(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    wait_until(lambda: served.store.broker.waiting() == 1)

    served.store.close()

    waiter.join(30.0)
    assert errors == [Closed]


def test_a_store_that_is_started_again_goes_on_with_its_leases(served: Served) -> None:
    """Workers live on while the broker is another process: what they hold is theirs, and a late one is still late."""
    client = served.connect()
    client.admit(prompts(2), put=PutId(producer="p", sequence=1), timeout=0.0)
    first, second = take(client, "rollout", 1), take(client, "rollout", 1)
    served.restart()

    again = served.connect()
    assert again.admit(prompts(2), put=PutId(producer="p", sequence=1), timeout=0.0) == (0, 1)
    again.ack(first.lease_id, ids(first), responses(ids(first)))
    served.clock.advance(RESTART_GRACE + 1.0)
    with pytest.raises(LeaseLost):
        again.ack(second.lease_id, ids(second), responses(ids(second)))

    counts = again.counts()
    assert (counts.admitted, counts.states["generated"], counts.states["prompted"]) == (4, 1, 3)
    assert counts.served == {"engine": PolicyVersion(n=0)}


def test_clients_find_a_store_that_comes_back_at_the_same_place(served: Served) -> None:
    client = served.connect(patience=30.0)
    client.admit(prompts(1), timeout=0.0)
    lease = take(client, "rollout")

    served.restart(port=served.server.port)

    client.ack(lease.lease_id, ids(lease), responses(ids(lease)))
    assert client.counts().states["generated"] == 2


# -- any other Arrow client --------------------------------------------------------------------------------------------


def options(timeout: float = 30.0) -> fl.FlightCallOptions:
    return fl.FlightCallOptions(timeout=timeout, headers=[(b"authorization", f"Bearer {TOKEN}".encode())])


def put(
    raw: fl.FlightClient, batch: pa.RecordBatch, call: fl.FlightCallOptions, command: dict[str, Any] | None = None
) -> Any:
    descriptor = fl.FlightDescriptor.for_path("put")
    if command is not None:
        descriptor = fl.FlightDescriptor.for_command(json.dumps(command))
    writer, reader = raw.do_put(descriptor, batch.schema, call)
    writer.write_batch(batch)
    writer.done_writing()
    answer = reader.read()
    writer.close()
    return json.loads(answer.to_pybytes())


def pa_join(*batches: pa.RecordBatch) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [column for batch in batches for column in batch.columns],
        names=[name for batch in batches for name in batch.schema.names],
    )


def test_a_plain_arrow_client_lists_stages_puts_and_reads_samples(served: Served) -> None:
    raw = fl.FlightClient(served.server.location)

    assert put(raw, prompts(1), options()) == [0]
    finished = pa_join(prompts(1).take([0, 0]), responses([0, 1]), rewards([0, 1]))
    command = {"put": {"producer": "p", "sequence": 1}, "timeout": 0.5}
    assert put(raw, finished, options(), command) == put(raw, finished, options(), command) == [1]

    stages = {b"/".join(info.descriptor.path).decode(): info for info in raw.list_flights(options=options())}
    assert list(stages) == ["rollout", "reward", "train"]
    assert (stages["rollout"].total_records, stages["rollout"].schema.names) == (
        2,
        list(SCHEMA.stages["rollout"].needs),
    )
    ticket = fl.Ticket(json.dumps({"samples": [3, 2], "columns": ["response", "reward"]}))
    assert raw.do_get(ticket, options()).read_all().to_pydict() == {
        "response": responses([1, 0]).column("response").to_pylist(),
        "reward": rewards([1, 0]).column("reward").to_pylist(),
    }
    (counts,) = raw.do_action(fl.Action("counts", b"{}"), options())
    assert json.loads(counts.body.to_pybytes())["admitted"] == 4


def test_a_plain_client_is_told_what_it_did_wrong(served: Served) -> None:
    raw = fl.FlightClient(served.server.location)
    with pytest.raises(fl.FlightServerError, match="2 rows in a row are to be the same"):
        put(raw, pa_join(prompts(2), responses([0, 1])), options())
    with pytest.raises(fl.FlightServerError, match=r"there is no call 'nothing'; the calls are hello"):
        list(raw.do_action(fl.Action("nothing", b"{}"), options()))
    with pytest.raises(fl.FlightServerError, match=r"the request for renew cannot be read: .*lease_id"):
        list(raw.do_action(fl.Action("renew", b"{}"), options()))
    with pytest.raises(fl.FlightServerError, match="sample 5 has ended"):
        raw.do_get(fl.Ticket(b'{"samples": [5]}'), options()).read_all()
    for _ in range(2):
        put(raw, prompts(2), options())
    with pytest.raises(fl.FlightUnavailableError, match=r"there is no room .it waits for: bound"):
        put(raw, prompts(1), options())


@pytest.mark.parametrize(
    ("call", "request_"),
    [
        ("ack", {"lease_id": 1, "sample_ids": [0, 1], "columns": 504, "frame": 7 << 40, "size": 1}),
        ("ack", {"lease_id": 1, "sample_ids": [0, 1], "columns": 504, "frame": 1 << 40, "size": 1, "tokens": [1]}),
        ("ack", {"lease_id": 1, "sample_ids": [0, 1], "columns": 1, "frame": 1 << 40, "size": 1}),
        ("ack", {"lease_id": 1, "sample_ids": [0, 0], "columns": 504, "frame": 1 << 40, "size": 1}),
        ("ack", {"lease_id": 1, "sample_ids": [-1, 1 << 62], "columns": 504, "frame": 1 << 40, "size": 1}),
        ("admit", {"prompt_tokens": [-1], "frame": 1 << 40, "size": 1, "timeout": 0}),
        ("admit", {"prompt_tokens": [1 << 40], "frame": 1 << 40, "size": 1, "timeout": 0}),
        ("admit", {"prompt_tokens": [1], "frame": 9 << 40, "size": 1, "timeout": 0}),
        ("admit", {"prompt_tokens": [1], "frame": -5, "size": 1, "timeout": 0}),
        ("admit", {"prompt_tokens": [1], "frame": 1 << 40, "size": 1, "timeout": 0, "priorities": [1, 2]}),
        ("lease", {"stage": "rollout", "worker": "w", "max_rows": -1, "ttl": 1, "timeout": 0}),
        ("lease", {"stage": "rollout", "worker": "w", "max_rows": 1, "ttl": -1, "timeout": 0}),
        ("places", {"sample_ids": [1 << 40], "columns": ["prompt"]}),
        ("places", {"sample_ids": [0], "columns": ["nothing"]}),
        ("drop", {"sample_ids": [1 << 70], "reason": "no"}),
        ("prioritise", {"samples": [0], "priority": 1 << 40}),
        ("amend", {"max_staleness": -1}),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_and_changes_nothing(
    served: Served, call: str, request_: dict[str, Any]
) -> None:
    raw = fl.FlightClient(served.server.location)
    served.store.admit(prompts(1), timeout=0.0)
    take(served.store, "rollout")
    before = served.store.table.snapshot()

    with pytest.raises(fl.FlightServerError):
        list(raw.do_action(fl.Action(call, json.dumps(request_).encode()), options()))

    assert served.store.table.snapshot() == before


def test_a_store_speaks_tls(tmp_path: Path) -> None:
    certificate, key = self_signed()
    store = EmbeddedStore.create(SCHEMA, terms(), ledger=tmp_path / "ledger.sqlite", data=tmp_path / "data")
    server = StoreServer(store, token=TOKEN, host="localhost", tls=(certificate, key))
    try:
        client = connect(server.location, token=TOKEN, tls_root=certificate, patience=5.0)
        assert server.location.startswith("grpc+tls://")
        assert client.counts().admitted == 0
        client.close()
        with pytest.raises(Unreachable):
            connect(server.location, token=TOKEN, patience=0.1)
    finally:
        server.close()


def self_signed() -> tuple[bytes, bytes]:
    """A certificate for localhost and its key, PEM."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private
