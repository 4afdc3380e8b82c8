"""Connections that never finish the head of a request, over sockets of their own."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest

from tests.processes import DEADLINE, wait_until

BEGUN = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-More: "
WHOLE = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a service that waits a second for a head."""
    home = tmp_path_factory.mktemp("slow") / "home"
    values = json.dumps({"home": str(home), "head_timeout": 1.0})
    with subprocess.Popen([sys.executable, "-m", "tests.service_server", values], stdout=subprocess.DEVNULL) as process:
        try:
            wait_until((home / "service.json").is_file, process)
            yield json.loads((home / "service.json").read_text())["url"]
        finally:
            process.kill()


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=DEADLINE)


def rest(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def told_to_be_faster(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"application/problem+json" in head
    problem = json.loads(body)
    return (problem["status"], problem["code"]) == (408, "too_slow") and bool(problem["request_id"])


def test_a_head_that_never_ends_ends_the_connection(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(BEGUN)

        assert told_to_be_faster(rest(connection))


def test_a_byte_now_and_then_gains_no_time(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(BEGUN)
        sent = 0
        while not select.select([connection], [], [], 0.05)[0]:
            sent += connection.send(b"x")
            assert sent < DEADLINE / 0.05
        answer = connection.recv(1 << 16)

        assert answer.startswith(b"HTTP/1.1 408 ")
        assert sent > 0


def test_a_connection_that_says_nothing_is_closed_without_a_word(url: str) -> None:
    with connect(url) as connection:
        assert rest(connection) == b""


def test_the_second_head_of_a_connection_has_its_time_as_well(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(WHOLE)
        answer = b""
        while not answer.endswith(b"}"):  # it may come in parts
            answer += connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 200 ")

        connection.sendall(BEGUN)

        assert told_to_be_faster(rest(connection))


def test_what_is_no_http_is_answered_as_every_other_error(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        head, _, body = rest(connection).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in head
    assert json.loads(body)["code"] == "bad_request"


def test_two_hundred_slow_connections_keep_nobody_out(url: str) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(url)) for _ in range(200)]
        for connection in slow:
            connection.sendall(BEGUN)

        assert httpx.get(f"{url}/healthz", timeout=DEADLINE).status_code == 200

        assert all(told_to_be_faster(rest(connection)) for connection in slow)
        assert httpx.get(f"{url}/healthz", timeout=DEADLINE).status_code == 200
