"""What the client does with a service that breaks off, is silent, refuses, or is something else altogether."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncflow.client import Client
from asyncflow.client.streams import Message, Parser
from asyncflow.errors import ServiceError, ServiceUnreachable, UserError
from tests.broken_service import STREAM, BrokenService, Says, broken_service, problem, told

JOB: dict[str, Any] = {
    "id": "job_1",
    "name": "a",
    "state": "queued",
    "reason": None,
    "priority": 50,
    "labels": {},
    "resume_from": None,
    "created_at": "2026-01-01T00:00:00.000Z",
    "updated_at": "2026-01-01T00:00:00.000Z",
    "started_at": None,
    "finished_at": None,
    "revision": 1,
    "run_dir": "/r",
    "starts": 0,
    "progress": None,
    "max_staleness": None,
    "a field of a newer service": 1,
}


def a_job(**changes: Any) -> Says:
    return Says(json.dumps({**JOB, **changes}).encode())


@contextmanager
def client_of(*answers: Says, timeout: float = 10.0, patience: float = 5.0) -> Iterator[tuple[Client, BrokenService]]:
    with broken_service(*answers) as service, Client(service.url, "t", timeout=timeout, patience=patience) as client:
        yield client, service


def texts(client: Client) -> list[str]:
    return list(client.follow_logs("job_1"))


def line(text: str) -> Mapping[str, str]:
    return {"text": text}


# -- the format --------------------------------------------------------------------------------------------------------


def test_events_have_ids_names_and_lines_of_data() -> None:
    stream = b": hi\n\nid: 1\nevent: a\ndata: x\ndata: y\n\nretry: 1500\n\ndata:z\nunknown: 1\n\nid: 3\n\ndata: t"
    parser = Parser()

    found = list(parser.feed(stream))

    assert found == [Message("1", "a", b"x\ny"), Message("1", "message", b"z")]
    assert (parser.retry, parser.last_id) == (1.5, "3")


@example(cuts=[47, 47], end=b"\r\n")  # between the two, and nothing comes
@given(cuts=st.lists(st.integers(0, 70), max_size=8), end=st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_the_pieces_in_which_bytes_come_change_nothing(cuts: list[int], end: bytes) -> None:
    text = "a\u2028b\x85c\x0bd"  # where Python ends lines, and the format does not
    lines = [b"id: 7", b"event: log", f"data: {text}".encode(), b"", b"data: 1", b"data: 2", b"", b""]
    stream = end.join(lines)
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    parser = Parser()

    found = [m for a, b in pairwise(places) for m in parser.feed(stream[a:b])]

    assert found == [Message("7", "log", text.encode()), Message("7", "message", b"1\n2")]


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_goes_on_after_the_last_whole_event_however_it_broke() -> None:
    half = Says(b"retry: 1\n\nid: 3\nevent: log\ndata: {}\n\nid: 9\nevent: log\nda", headers={"Content-Type": STREAM})
    answers = [
        told(("1", line("one")), ("2", line("two"))),  # closed politely, without an end
        told(("3", line("three")), torn=True),
        Says(),  # nothing at all
        half,
        problem(503, "http_503", "the proxy has nobody"),
        told(("4", line("four")), ("end", {})),
    ]
    with client_of(*answers) as (client, service):
        found = texts(client)

    assert found == ["one", "two", "three", "", "four"]
    assert [asked.headers.get("last-event-id") for asked in service.asked] == [None, "2", "3", "3", "3", "3"]
    assert {asked.headers["accept"] for asked in service.asked} == {STREAM}


def test_a_silent_stream_is_connected_again() -> None:
    with client_of(told(("1", line("a")), silent=True), told(("2", line("b")), ("end", {})), timeout=0.2) as (
        client,
        service,
    ):
        assert texts(client) == ["a", "b"]
    assert len(service.asked) == 2


def test_a_stream_gives_up_when_nobody_answers_for_as_long_as_its_patience() -> None:
    with client_of(told(("1", line("a"))), Says(), patience=0.5) as (client, service):
        stream = client.follow_logs("job_1")
        assert next(stream) == "a"
        began = time.monotonic()
        with pytest.raises(ServiceUnreachable, match="does not answer"):
            next(stream)

    assert time.monotonic() - began < 5
    assert len(service.asked) > 2


def test_a_refusal_ends_a_stream_at_once() -> None:
    with client_of(told(("1", line("a"))), problem(404, "no_such_job", "it is gone")) as (client, service):
        stream = client.follow_logs("job_1")
        assert next(stream) == "a"
        with pytest.raises(ServiceError, match="it is gone") as caught:
            next(stream)

    assert (caught.value.code, caught.value.status) == ("no_such_job", 404)
    assert len(service.asked) == 2


def test_something_else_than_a_stream_is_named() -> None:
    with (
        client_of(Says(b"<html>", headers={"Content-Type": "text/html"})) as (client, _),
        pytest.raises(ServiceError, match="no AsyncFlow service"),
    ):
        texts(client)


# -- calls -------------------------------------------------------------------------------------------------------------


def test_a_job_is_submitted_again_with_the_same_key_until_there_is_an_answer() -> None:
    busy = problem(429, "busy", "later", {"Retry-After": "0"})
    with client_of(Says(), Says(b"{", torn=True), busy, problem(502, "x", "y"), a_job()) as (
        client,
        service,
    ):
        job = client.submit({"model": "tiny"})

    assert job.id == "job_1"
    assert len(service.asked) == 5
    assert len({(asked.headers["idempotency-key"], asked.body) for asked in service.asked}) == 1


def test_two_submissions_have_two_keys() -> None:
    with client_of(a_job()) as (client, service):
        client.submit({})
        client.submit({})
        client.submit({}, key="mine")

    keys = [asked.headers["idempotency-key"] for asked in service.asked]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


def test_a_change_of_a_known_revision_is_not_repeated_once_it_may_have_arrived() -> None:
    with client_of(Says(), a_job()) as (client, service):
        with pytest.raises(ServiceUnreachable):
            client.change("job_1", priority=3, revision=7)
        assert client.change("job_1", priority=3).id == "job_1"

    assert [asked.headers.get("if-match") for asked in service.asked] == ['"7"', None]


def test_a_problem_is_an_error_with_its_code_and_fields() -> None:
    errors = [{"field": "body.config.steps", "message": "steps: set it"}]
    refused = problem(422, "invalid_config", "steps: set it", field="body.config.steps", errors=errors)
    with client_of(refused) as (client, service), pytest.raises(UserError, match="steps: set it") as caught:
        client.submit({})

    error = caught.value
    assert isinstance(error, ServiceError)
    assert (error.code, error.status, error.field) == ("invalid_config", 422, "body.config.steps")
    assert (error.errors, error.request_id) == ((("body.config.steps", "steps: set it"),), "req_1")
    assert len(service.asked) == 1


@pytest.mark.parametrize("says", [Says(b"<html>"), Says(b'{"id": 1}'), Says(b"nothing here", 404), Says(b"", 301)])
def test_what_is_not_the_service_is_said_to_be_something_else(says: Says) -> None:
    with client_of(says) as (client, _), pytest.raises(ServiceError, match="address"):
        client.job("job_1")


def test_nobody_at_the_address_is_unreachable_within_the_patience() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}", "t", patience=0.3) as client:
        began = time.monotonic()
        with pytest.raises(ServiceUnreachable, match="see whether it runs"):
            client.job("job_1")

    assert time.monotonic() - began < 5


def test_a_call_has_a_deadline_although_the_service_holds_it_open() -> None:
    held = Says(b'{"id":', headers={"Content-Type": "application/json"}, silent=True)
    with client_of(held, timeout=0.3, patience=30) as (client, _):
        began = time.monotonic()
        with pytest.raises(ServiceUnreachable):
            client.job("job_1")

    assert time.monotonic() - began < 5


def test_a_long_retry_after_is_not_waited_for_past_the_deadline() -> None:
    later = problem(429, "too_many_requests", "wait", {"Retry-After": "3600"})
    with client_of(later) as (client, service), pytest.raises(ServiceError, match="wait") as caught:
        client.job("job_1")

    assert caught.value.status == 429
    assert len(service.asked) == 1


def test_waiting_for_a_job_has_a_deadline_and_says_how_far_it_is() -> None:
    with client_of(a_job(state="running")) as (client, _), pytest.raises(ServiceError, match="running after") as caught:
        client.wait("job_1", timeout=0.2)

    assert caught.value.code == "still_going"


@pytest.mark.parametrize("url", ["ftp://h", "localhost:1", "http://", "http://u:p@h", "http://h?x=1", "http://[", ""])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="address"):
        Client(url, "t")


@pytest.mark.parametrize("token", ["", "a\nb", " a", "ä"])
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(UserError, match="no token"):
        Client("http://127.0.0.1:1", token)


@pytest.mark.parametrize("job_id", ["", "job_", "run", "job_1/../x", "job_..", "../job_1", "job_1?x"])
def test_what_is_no_id_of_a_job_is_never_sent(job_id: str) -> None:
    with client_of(a_job()) as (client, service), pytest.raises(UserError, match="not the id of a job"):
        client.job(job_id)

    assert service.asked == []


def test_a_configuration_that_json_cannot_say_is_refused_before_it_is_sent() -> None:
    with client_of(a_job()) as (client, service), pytest.raises(UserError, match="infinities"):
        client.submit({"learning_rate": float("nan")})

    assert service.asked == []
