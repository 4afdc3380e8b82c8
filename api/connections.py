"""Connections that are bounded where uvicorn's wait for ever: the head of a request has to come within a time.

A client that sends a byte now and then would otherwise hold its connection, of which there is a limited number.
"""

from __future__ import annotations

import asyncio

import h11
from asyncflow_api.problems import Problem, new_request_id
from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedHead(H11Protocol):
    """Closes a connection whose next request does not begin, or whose head is not complete, in time.

    The body has a time of its own (`Limits`); between two requests uvicorn's keep-alive holds.
    """

    head_timeout: float
    """Seconds from the connection, or from the first byte of a later request, to the end of the head."""
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._deadline is None:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's signature
        """What is no HTTP at all, in the shape of every other error."""
        self._refuse(Problem(400, "bad_request", "this is no request of HTTP/1.1: send one"))

    def _wait_for_head(self) -> None:
        self._deadline = self.loop.call_later(self.head_timeout, self._too_late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if not self.conn.trailing_data[0]:
            self.transport.close()  # it has said nothing: browsers open connections before they need them
            return
        text = f"the head of the request was not complete within {self.head_timeout:g} s: send it faster"
        self._refuse(Problem(408, "too_slow", text))

    def _refuse(self, problem: Problem) -> None:
        """Answer and close, whatever the state of the conversation."""
        if self.transport.is_closing():
            return
        own = new_request_id()
        answer = problem.response(own)
        head = [*answer.raw_headers, (b"x-request-id", own.encode()), (b"connection", b"close")]
        event = h11.Response(status_code=problem.status, headers=head)
        for part in (event, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()


def bounded(seconds: float) -> type[H11Protocol]:
    """The protocol with a time for the head, for uvicorn."""

    class Bounded(BoundedHead):
        head_timeout = seconds

    return Bounded
