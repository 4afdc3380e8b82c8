"""Control calls over the Unix socket beside a store's segments: who is let in, and what comes of nonsense."""

from __future__ import annotations

import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncflow.errors import Closed, StoreError
from asyncflow.store import wire
from asyncflow.store.calls import Alive, Calls, TooMany
from asyncflow.store.flight import StoreServer
from asyncflow.store.near import MOST_MESSAGE, SOCKET, Messages, NearClient, NearServer, Opening, Unanswered, reachable
from asyncflow.store.remote import RemoteControl, connect
from asyncflow.store.store import EmbeddedStore, Store
from asyncflow.types import PolicyVersion
from tests.test_flight import TOKEN, Served, take
from tests.test_store import SCHEMA, prompts, terms

SOON = 10.0


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.close()


@pytest.fixture
def opening(served: Served) -> Opening:
    return Opening(token=TOKEN, store=Calls(served.store).welcome.identity)


def connection_to(folder: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(SOON)
    with reachable(folder, SOCKET) as address:
        connection.connect(address)
    return connection


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


def near_of(client: Store) -> NearClient | None:
    assert isinstance(client._control, RemoteControl)
    return client._control._near


def test_who_sees_the_segments_calls_over_the_socket_and_nobody_else_does(served: Served) -> None:
    assert near_of(served.connect()) is not None
    assert near_of(served.connect(local=True)) is not None
    assert near_of(served.connect(local=False)) is None


def test_a_store_in_memory_is_called_over_a_socket_and_sends_its_data_over_flight(tmp_path: Path) -> None:
    store = EmbeddedStore.create(SCHEMA, terms(), ledger=tmp_path / "ledger.sqlite", durability="memory")
    server = StoreServer(store, token=TOKEN, near=tmp_path)
    client = connect(server.location, token=TOKEN)
    assert near_of(client) is not None
    store.serve("engine", PolicyVersion(n=0))
    client.admit(prompts(1), timeout=0.0)
    assert take(client, "rollout").data.column("prompt_ids").to_pylist() == [list(range(10))] * 2
    client.close()
    server.close()


def test_the_socket_is_for_its_owner_and_goes_with_the_server(served: Served) -> None:
    path = served.folder / SOCKET
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    served.server.close()
    assert not path.exists()


def test_one_that_a_killed_server_left_is_replaced(served: Served) -> None:
    path = served.folder / SOCKET
    served.server.close()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    served.restart()
    assert near_of(served.connect()) is not None


def test_a_folder_may_be_deeper_than_the_address_of_a_socket(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["folder-with-a-name"] * 10)
    deep.mkdir(parents=True)
    served = Served(deep)
    client = served.connect()
    assert near_of(client) is not None
    assert client.admit(prompts(1), timeout=0.0) == (0,)
    served.close()


@pytest.mark.parametrize(
    ("token", "store", "error", "text"),
    [
        ("another", None, StoreError, "token"),
        ("", None, StoreError, "token"),
        ("ünïcode", None, StoreError, "token"),
        (TOKEN, "0123456789abcdef", Closed, "another one is in its place"),
    ],
)
def test_who_has_another_token_or_means_another_store_is_refused(
    served: Served, opening: Opening, token: str, store: str | None, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        NearClient(served.folder, token=token, store=opening.store if store is None else store)


BEFORE_OPENING = {
    "too long": (MOST_MESSAGE + 1).to_bytes(4, "little"),
    "larger than an opening": ((1 << 16) + 1).to_bytes(4, "little"),
    "no msgpack": framed(b"\xc1\xff\x00"),
    "nothing": framed(b""),
    "a number": framed(wire.encode(7)),
    "another message": framed(wire.encode({"token": TOKEN, "store": "x", "more": 1})),
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "deeply nested": framed(b"\x91" * 60_000),
}
AFTER_OPENING = {
    "too long": (MOST_MESSAGE + 1).to_bytes(4, "little"),
    "no call": framed(b""),
    "no such call": framed(b"__init__\n"),
    "a long name": framed(b"x" * 100_000),
    "no text": framed(b"\xff\xfe\n\x80"),
    "a call without what it asks": framed(b"admit\n"),
    "a wrong type": framed(b"lease\n" + wire.encode({"stage": 7})),
    "two at once": framed(b"counts\n\x80") * 2,
}


@pytest.mark.parametrize("nonsense", BEFORE_OPENING.values(), ids=BEFORE_OPENING)
def test_nonsense_instead_of_an_opening_ends_the_connection_and_nothing_else(served: Served, nonsense: bytes) -> None:
    client = served.connect()
    with connection_to(served.folder) as connection:
        connection.sendall(nonsense)
        said = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert not said.startswith(framed(b"=")[:5])
    assert client.admit(prompts(1), timeout=0.0) == (0,)


@pytest.mark.parametrize("nonsense", AFTER_OPENING.values(), ids=AFTER_OPENING)
def test_nonsense_in_a_call_is_refused_and_changes_nothing(served: Served, opening: Opening, nonsense: bytes) -> None:
    client = served.connect()
    before = client.counts()
    with connection_to(served.folder) as connection:
        connection.sendall(framed(wire.encode(opening)))
        assert connection.recv(5) == framed(b"=")
        connection.sendall(nonsense)
        connection.shutdown(socket.SHUT_WR)
        said = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert said == b"" or said[4:5] == b"!", said
    assert client.counts() == before
    assert client.admit(prompts(1), timeout=0.0) == (0,)


def test_who_does_not_say_who_he_is_is_let_go(served: Served, tmp_path: Path) -> None:
    folder = tmp_path / "another"
    folder.mkdir()
    server = NearServer(Calls(served.store), folder, token=TOKEN, patience=0.05)
    with connection_to(folder) as silent, connection_to(folder) as slow:
        slow.sendall(b"\x10")  # the beginning of a length
        assert silent.recv(1) == b""
    server.close(SOON)


def test_more_connections_than_are_allowed_are_not_served_until_others_end(
    served: Served, opening: Opening, tmp_path: Path
) -> None:
    folder = tmp_path / "another"
    folder.mkdir()
    server = NearServer(Calls(served.store), folder, token=TOKEN, most_connections=1)
    first = NearClient(folder, token=opening.token, store=opening.store)
    with pytest.raises((OSError, Unanswered)):
        NearClient(folder, token=opening.token, store=opening.store)
    first.close()
    wait_for(lambda: connects(folder, opening))
    server.close(SOON)


def connects(folder: Path, opening: Opening) -> bool:
    try:
        NearClient(folder, token=opening.token, store=opening.store).close()
    except (OSError, Unanswered):
        return False
    return True


def wait_for(happens: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if happens():
            return
        pause.wait(0.01)
    pytest.fail("it has not happened")


def test_what_a_client_waited_for_that_has_gone_is_given_to_others(served: Served, opening: Opening) -> None:
    client = served.connect()
    connection = connection_to(served.folder)
    messages = Messages(connection)
    messages.send(wire.encode(opening))
    assert bytes(messages.receive(1, SOON)) == b"="
    lease = wire.LeaseRows(stage="rollout", worker="gone", max_rows=1, ttl=60.0, timeout=60.0)
    messages.send(b"lease\n", wire.encode(lease))
    wait_for(lambda: client.stat().waiting.get("rollout") == 1)
    messages.close()

    client.admit(prompts(1), timeout=0.0)

    assert len(take(client, "rollout").sample_ids) == 2


@pytest.mark.parametrize("closes", ["the store", "the client"])
def test_who_waits_hears_that_the_store_or_his_own_client_has_closed(served: Served, closes: str) -> None:
    client = served.connect()
    heard: list[Exception] = []

    def wait() -> None:
        try:
            client.lease("rollout", worker="w", max_rows=1, ttl=60.0, timeout=60.0)
        except StoreError as error:
            heard.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_for(lambda: served.store.stat().waiting.get("rollout") == 1)
    (served.server if closes == "the store" else client).close()
    waiting.join(SOON)
    assert [type(error) for error in heard] == [Closed]


class Echo(Calls):
    def answer(self, name: str, body: bytes | memoryview, alive: Alive) -> bytes:
        if name == "full":
            raise TooMany("there is no place")
        if name == "broken":
            raise ZeroDivisionError("a bug")
        return bytes(body)


@pytest.fixture
def echo(served: Served, opening: Opening, tmp_path: Path) -> Iterator[NearClient]:
    folder = tmp_path / "echo"
    folder.mkdir()
    server = NearServer(Echo(served.store), folder, token=TOKEN)
    client = NearClient(folder, token=opening.token, store=opening.store)
    yield client
    client.close()
    server.close(SOON)


@pytest.mark.parametrize("size", [0, 1, (1 << 16) - 10, (1 << 16) - 9, 1 << 16, 5_000_000])
def test_messages_of_every_size_come_whole(echo: NearClient, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert bytes(echo.call("echo", body, SOON)) == body


def test_a_call_without_a_place_is_asked_for_again_and_one_that_fails_is_refused(
    echo: NearClient, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Unanswered, match="there is no place"):
        echo.call("full", b"", SOON)
    with pytest.raises(StoreError, match="the store has failed: ZeroDivisionError"):
        echo.call("broken", b"", SOON)
    assert "a call has failed" in caplog.text
    assert bytes(echo.call("echo", b"again", SOON)) == b"again"
