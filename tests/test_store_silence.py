"""What happens when nothing happens: a server that takes calls and never answers, and a store that nobody asks."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncflow.clock import ManualClock
from asyncflow.errors import Unreachable
from asyncflow.store import wire
from asyncflow.store.calls import Alive
from asyncflow.store.events import PutId
from asyncflow.store.flight import StoreServer
from asyncflow.store.remote import RemoteControl, RemoteFrames, connect
from asyncflow.store.store import EmbeddedStore, Store
from asyncflow.types import PolicyVersion
from tests.processes import DEADLINE, wait_until
from tests.store_server import StoreProcess
from tests.test_flight import TOKEN
from tests.test_store import SCHEMA, ids, prompts, terms

VERSION = PolicyVersion(n=0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StoreProcess]:
    server = StoreProcess(tmp_path / "store")
    yield server
    server.close()


def calls(control: RemoteControl) -> dict[str, Callable[[], Any]]:
    """Everything that a client can ask, once each."""
    return {
        "hello": control.hello,
        "allocate": control.allocate,
        "room": lambda: control.room(1, timeout=0.0),
        "admit": lambda: control.admit([3], frame=77 << 40, size=1, timeout=0.0),
        "lease": lambda: control.lease("reward", worker="w", max_rows=1, ttl=9.0, timeout=0.0),
        "renew": lambda: control.renew(99, ttl=9.0),
        "ack": lambda: control.ack(99, [0], columns=0, frame=-1, size=0),
        "nack": lambda: control.nack(99, [0], reason="no"),
        "gone": lambda: control.gone("nobody"),
        "commit": lambda: control.commit(leases=[99], trained=[0], skipped=[], version=PolicyVersion(n=1)),
        "drop": lambda: control.drop([99], reason="no"),
        "restore": lambda: control.restore([99]),
        "prioritise": lambda: control.prioritise(1, samples=[99]),
        "serve": lambda: control.serve("engine", VERSION),
        "amend": lambda: control.amend(max_staleness=1),
        "checkpointed": lambda: control.checkpointed(PolicyVersion(n=9), oldest=VERSION),
        "held": lambda: control.held(99),
        "columns_of": lambda: control.columns_of([0]),
        "places": lambda: control.places([0], ["prompt"]),
        "waited_for": control.waited_for,
        "awaited": lambda: control.awaited("admission"),
        "counts": control.counts,
        "stat": control.stat,
        "a frame that is put": lambda: control.put_frame(prompts(1)),
        "rows that are got": lambda: control.get_rows(["prompt"], np.array([1 << 40]), np.zeros(1, np.int32)),
    }


def test_no_call_waits_for_ever_for_a_server_that_takes_it_and_never_answers(server: StoreProcess) -> None:
    first = server.connect()
    first.serve("engine", VERSION)
    control = RemoteControl(server.location, token=server.token, patience=0.0, grace=2.0, transfer=2.0)
    client, put = Store(first.schema, first.group_size, control, RemoteFrames(control)), PutId(producer="p", sequence=1)
    asked = {**calls(control), "a put": lambda: client.admit(prompts(1), put=put, timeout=0.0)}
    assert set(wire.CALLS) <= set(asked)
    ends: dict[str, BaseException | None] = {}

    def ask(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
            ends[name] = None
        except BaseException as error:
            ends[name] = error

    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        threads = [threading.Thread(target=ask, args=call, daemon=True) for call in asked.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)

    assert {name: type(ends.get(name)) for name in asked} == dict.fromkeys(asked, Unreachable)
    patient = server.connect(local=False)  # the same clients, and new ones, go on; what was asked twice happens once
    for one in (patient, first):
        assert one.admit(prompts(1), put=put, timeout=0.0) == (0,)
    assert client.counts().admitted == patient.counts().admitted == patient.counts().open
    assert client.read([0], ["prompt"]).equals(prompts(1).select(["prompt"]))
    for one in (client, patient, first):
        one.close()


class CountedServer(StoreServer):
    """Knows how often it was asked."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.asked: list[str] = []
        answer = self._calls.answer

        def counted(name: str, body: bytes | memoryview, alive: Alive) -> bytes:
            self.asked.append(name)
            return answer(name, body, alive)

        self._calls.answer = counted  # type: ignore[method-assign]


class CountedClock(ManualClock):
    """Knows who has looked at it."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: list[str] = []

    def monotonic(self) -> float:
        self.looks.append(threading.current_thread().name)
        return super().monotonic()


A_WHILE = 1.0
"""Seconds for which nothing may happen. Who is slow sees less of it, and no test fails for it."""


@pytest.mark.parametrize("leased", [False, True])
def test_a_store_with_clients_that_wait_does_nothing_until_something_happens(tmp_path: Path, leased: bool) -> None:
    clock = CountedClock()
    store = EmbeddedStore.create(
        SCHEMA, terms(), ledger=tmp_path / "ledger.sqlite", data=tmp_path / "data", clock=clock
    )
    server = CountedServer(store, token=TOKEN)
    store.serve("engine", VERSION)
    if leased:
        store.admit(prompts(1), timeout=0.0)
        assert ids(store.lease("rollout", worker="w", max_rows=9, ttl=500.0, timeout=0.0)) == [0, 1]  # type: ignore[arg-type]
    clients: list[Store] = [connect(server.location, token=TOKEN) for _ in range(3)]
    found: list[list[int]] = []

    def wait(client: Store) -> None:
        lease = client.lease("rollout", worker="w", max_rows=1, ttl=9.0, timeout=8.0)
        found.append([] if lease is None else ids(lease))

    threads = [threading.Thread(target=wait, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    wait_until(lambda: store.broker.waiting() == len(clients))
    # Whoever has parked has woken the housekeeper, who goes back to sleep until the lease ends, or for ever.
    wait_until(lambda: store.broker._asleep_until == (500.0 if leased else math.inf))
    clock.looks.clear()

    threading.Event().wait(A_WHILE)

    assert clock.looks == []
    assert server.asked == ["hello"] * len(clients) + ["lease"] * len(clients)
    store.admit(prompts(2), timeout=0.0)
    for thread in threads:
        thread.join(DEADLINE)
    first = 2 if leased else 0
    assert sorted(found) == [[first], [first + 1], [first + 2]]
    for client in clients:
        client.close()
    server.close()
