"""A service that says exactly what a test wrote down, and breaks connections where it is told to."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STREAM = "text/event-stream"


@dataclass(frozen=True)
class Says:
    """One answer. Without `body` the connection is closed with nothing said."""

    body: bytes | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    torn: bool = False
    """More is announced than comes."""
    silent: bool = False
    """It is held open and nothing more comes."""


def told(*events: tuple[str, Mapping[str, Any]], retry: bytes = b"retry: 1\n\n", **more: Any) -> Says:
    """A stream of (id, data), each event `log`; the id `end` is the end."""
    body = retry
    for id_, data in events:
        head = "event: end\n" if id_ == "end" else f"id: {id_}\nevent: log\n"
        body += f"{head}data: {json.dumps(data)}\n\n".encode()
    return Says(body, headers={"Content-Type": STREAM}, **more)


def problem(status: int, code: str, detail: str, headers: Mapping[str, str] | None = None, **more: Any) -> Says:
    body = {"type": "about:blank", "title": "", "status": status, "code": code, "detail": detail, "request_id": "req_1"}
    return Says(json.dumps({**body, **more}).encode(), status, dict(headers or {}))


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class BrokenService:
    """Says one thing after the other; the last one again and again."""

    def __init__(self, answers: Sequence[Says]) -> None:
        self.asked: list[Asked] = []
        left, lock, over = list(answers), threading.Lock(), threading.Event()
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                with lock:
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    asked.append(Asked(self.command, self.path, headers, body))
                    says = left.pop(0) if len(left) > 1 else left[0]
                self.close_connection = True
                if says.body is None:
                    return
                self.send_response(says.status)
                for name, value in says.headers.items():
                    self.send_header(name, value)
                if says.torn:
                    self.send_header("Content-Length", str(len(says.body) + 100))
                self.send_header("Connection", "close")
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(says.body)
                    if says.silent:
                        over.wait(60)

            do_GET = do_POST = do_PATCH = answer

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET

        self._over = over
        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextlib.contextmanager
def broken_service(*answers: Says) -> Iterator[BrokenService]:
    service = BrokenService(answers)
    try:
        yield service
    finally:
        service.close()
