"""Watch and steer a run while it goes on, from the same process or another one.

`RunControl` is what can be asked of a run; the run itself and the client of its socket both implement it, so that the
command line and the HTTP service do not care where the run is.

The wire is a Unix socket in the run directory, one request a connection: a JSON object on one line with `call` and
`arguments`, answered by one with `result` or `error` (a sentence). Whoever may enter the run directory may steer.
"""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from asyncflow.errors import AsyncFlowError, ControlError
from asyncflow.rundir import SOCKET
from asyncflow.store.near import reachable

MAX_LINE = 1 << 20
"""Bytes of a request …"""
MAX_ANSWER = 1 << 24
"""… and of an answer."""
DEADLINE = 30.0
"""Seconds that either side waits for the other."""


class RunControl(Protocol):
    """What can be asked of a run. Raises ControlError for what cannot be, and has changed nothing then."""

    def status(self) -> Mapping[str, Any]:
        """Where the run is: plain JSON values."""

    def pause(self) -> None:
        """Start nothing new: what is being generated or scored is finished and kept. May be called twice."""

    def resume(self) -> None:
        """Go on after a pause. May be called twice."""

    def stop(self) -> None:
        """Stop in order, with a checkpoint to resume from; returns at once. May be called twice."""

    def set_max_staleness(self, bound: int) -> None:
        """Change the bound, at once for what is admitted and leased from now on."""

    def workers(self) -> Sequence[Mapping[str, Any]]:
        """What every worker does, and what it waits for (`asyncflow.runtime.look.workers`)."""

    def engines(self) -> Sequence[Mapping[str, Any]]:
        """What every rollout engine serves (`asyncflow.runtime.look.engines`)."""

    def drain(self, worker: str) -> None:
        """Let one stage's worker, or the feeder, start nothing new: what it has, it finishes. May be called twice."""

    def undrain(self, worker: str) -> None:
        """Let it go on. May be called twice."""

    def timeline(self, seconds: float) -> Sequence[Mapping[str, Any]]:
        """What every worker did in the last so many seconds: `worker`, `activity`, `start`, `end` (seconds since the
        epoch) and `cause`; and every completion by itself, as a `worker` with a slash in its name. Of very many pieces
        of time only the last ones."""

    def shares(self, seconds: float) -> Mapping[str, float]:
        """Shares of the last so many seconds, in the names of `asyncflow.report.bottleneck`."""

    def tokenise(self, prompts: Sequence[str | Sequence[dict[str, str]]]) -> Sequence[Sequence[int]]:
        """Texts or chat messages as the run's own prompts become tokens."""

    def complete(
        self,
        prompt: str | Sequence[int] | Sequence[dict[str, str]],
        *,
        n: int = 1,
        max_new_tokens: int = 16,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        timeout: float = DEADLINE,
    ) -> Mapping[str, Any]:
        """Completions of the policy that is served now (`asyncflow.runtime.completions`), beside the rollouts."""


CALLS = (
    "status",
    "pause",
    "resume",
    "stop",
    "set_max_staleness",
    "workers",
    "engines",
    "drain",
    "undrain",
    "timeline",
    "shares",
    "tokenise",
    "complete",
)
"""What can be asked for over the socket: the methods of `RunControl`."""


class Server(socketserver.ThreadingUnixStreamServer):
    """Who asks while others are waiting waits as well, and is not refused."""

    request_queue_size = 128
    daemon_threads = True


class ControlServer:
    """Answers for a run at the socket in its directory."""

    def __init__(self, control: RunControl, run_dir: Path) -> None:
        """The caller holds the run directory: a socket that is there was left by a process that has ended."""
        calls: dict[str, Callable[..., Any]] = {name: getattr(control, name) for name in CALLS}

        class Handler(socketserver.StreamRequestHandler):
            timeout = DEADLINE

            def handle(self) -> None:
                with contextlib.suppress(OSError):  # who asked is gone
                    answer = _answer(calls, self.rfile.readline(MAX_LINE))
                    self.wfile.write(json.dumps(answer, default=str).encode() + b"\n")

        self._path = run_dir / SOCKET
        self._path.unlink(missing_ok=True)
        with reachable(run_dir, SOCKET) as address:
            self._server = Server(address, Handler)
        self._path.chmod(0o600)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more. May be called twice."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._path.unlink(missing_ok=True)


class ControlClient:
    """A `RunControl` for the run in a directory, which another process makes."""

    def __init__(self, run_dir: Path, *, deadline: float = DEADLINE) -> None:
        """`deadline`: seconds that it waits for the run; for completions as much longer as they may take."""
        self._run_dir = run_dir
        self._deadline = deadline

    def status(self) -> Mapping[str, Any]:
        status: Mapping[str, Any] = self._call("status")
        return status

    def pause(self) -> None:
        self._call("pause")

    def resume(self) -> None:
        self._call("resume")

    def stop(self) -> None:
        self._call("stop")

    def set_max_staleness(self, bound: int) -> None:
        self._call("set_max_staleness", bound=bound)

    def workers(self) -> Sequence[Mapping[str, Any]]:
        workers: list[dict[str, Any]] = self._call("workers")
        return workers

    def engines(self) -> Sequence[Mapping[str, Any]]:
        engines: list[dict[str, Any]] = self._call("engines")
        return engines

    def drain(self, worker: str) -> None:
        self._call("drain", worker=worker)

    def undrain(self, worker: str) -> None:
        self._call("undrain", worker=worker)

    def timeline(self, seconds: float) -> Sequence[Mapping[str, Any]]:
        spans: list[dict[str, Any]] = self._call("timeline", seconds=seconds)
        return spans

    def shares(self, seconds: float) -> Mapping[str, float]:
        shares: dict[str, float] = self._call("shares", seconds=seconds)
        return shares

    def tokenise(self, prompts: Sequence[str | Sequence[dict[str, str]]]) -> Sequence[Sequence[int]]:
        tokens: list[list[int]] = self._call("tokenise", wait=DEADLINE, prompts=prompts)
        return tokens

    def complete(
        self,
        prompt: str | Sequence[int] | Sequence[dict[str, str]],
        *,
        n: int = 1,
        max_new_tokens: int = 16,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        timeout: float = DEADLINE,
    ) -> Mapping[str, Any]:
        sampling = {"n": n, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        made: dict[str, Any] = self._call("complete", wait=timeout, prompt=prompt, timeout=timeout, **sampling)
        return made

    def _call(self, name: str, *, wait: float = 0.0, **arguments: Any) -> Any:
        """`wait`: seconds that the answer itself may take."""
        if not self._run_dir.is_dir():
            raise ControlError(f"there is no directory {self._run_dir}: name a run directory")
        try:
            with socket.socket(socket.AF_UNIX) as connection, reachable(self._run_dir, SOCKET) as address:
                connection.settimeout(self._deadline + wait)
                connection.connect(address)
                connection.sendall(json.dumps({"call": name, "arguments": arguments}).encode() + b"\n")
                with connection.makefile("rb") as stream:
                    answer = json.loads(stream.readline(MAX_ANSWER))
        except (FileNotFoundError, ConnectionRefusedError):
            raise ControlError(
                f"no run is going on in {self._run_dir}: it has ended, or was killed "
                f"(`asyncflow resume {self._run_dir}` goes on with it)"
            ) from None
        except (OSError, ValueError) as error:
            raise ControlError(f"the run in {self._run_dir} does not answer ({error}): look at its terminal") from error
        if "error" in answer:
            raise ControlError(str(answer["error"]))
        return answer["result"]


def _answer(calls: Mapping[str, Callable[..., Any]], line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
        call = calls[request["call"]]
        arguments = dict(request.get("arguments") or {})
    except (ValueError, LookupError, TypeError):
        return {"error": f"ask for one of {', '.join(calls)} with a JSON object that has `call` and `arguments`"}
    try:
        return {"result": call(**arguments)}
    except (AsyncFlowError, TypeError) as error:
        return {"error": str(error)}
