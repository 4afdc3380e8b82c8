"""The client of `benchmarks.service`, a process of its own: many event streams, and requests at a steady rate.

`python -m benchmarks.service_client` reads one JSON object from stdin (`Work`) and writes one to stdout
(`Load.result`). It parses as little as it can: it shares the processors with what it measures.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

LATE = 10.0
"""Seconds that events which happened while it was measured have to arrive."""
ANSWER = 60.0
"""Seconds after which a request counts as unanswered, and a stream as one that does not begin."""
CONNECTIONS = 16
"""Requests that may be under way at once."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What to do."""

    host: str
    port: int
    token: str
    paths: Mapping[str, str]
    """Name → path of a request; they take turns."""
    streams: Mapping[str, str]
    """Kind → path of a stream: `live`, `events`, `fleet`; they take turns."""
    count: int
    """Streams in all."""
    rate: float
    """Requests a second."""
    seconds: float
    metrics: str
    """The run's `metrics.jsonl`: its lines are the events that have to arrive."""


@dataclass
class Stream:
    """One stream, and what it was told."""

    kind: str
    events: int = 0
    told: int = 0
    """Events with an id, or that say that some are missing."""
    received: int = 0
    """Bytes."""
    first: int | None = None
    last: int = 0
    """Places of the first and last event in the job's history: n + m of the id `n.m`."""
    lines: int = 0
    """Lines of the run's metrics that it knows of: m."""
    problem: str | None = None

    @property
    def lost(self) -> int:
        """Events of the job between its first and its last one that did not come."""
        return 0 if self.first is None else self.last - self.first + 1 - self.told

    def take(self, event: bytes) -> None:
        """One event without its empty line."""
        if event.startswith((b":", b"retry")):
            return
        self.events += 1
        if self.kind != "events" or not event.startswith(b"id: "):
            return
        own, _, lines = event[4 : event.index(b"\n")].partition(b".")
        place = int(own) + int(lines)
        if self.first is not None and place <= self.last:
            self.problem = f"event {place} came after {self.last}"
        self.first = place if self.first is None else self.first
        self.last, self.lines = place, int(lines)
        self.told += 1


@dataclass
class Load:
    """Everything of one process."""

    work: Work
    streams: list[Stream] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Request → seconds from when it was due until its answer was there."""
    statuses: Counter[str] = field(default_factory=Counter)
    open: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def run(self) -> dict[str, Any]:
        kinds = islice(cycle(self.work.streams.items()), self.work.count)
        listening = []
        for kind, path in kinds:
            self.streams.append(Stream(kind))
            listening.append(asyncio.create_task(self.listen(self.streams[-1], path)))
        try:
            async with asyncio.timeout(ANSWER):
                for _ in self.streams:
                    await self.open.acquire()
            before = sum(stream.received for stream in self.streams)
            print("open", file=sys.stderr, flush=True)
            await self.ask()
            print("asked", file=sys.stderr, flush=True)
            passed = sum(stream.received for stream in self.streams) - before
            missing = await self.all_came()
        finally:
            for task in listening:
                task.cancel()
            await asyncio.gather(*listening, return_exceptions=True)
        return self.result(passed, missing)

    def result(self, passed: int, missing: int) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "statuses": dict(self.statuses),
            "streams": len(self.streams),
            "events": {kind: sum(s.events for s in self.streams if s.kind == kind) for kind in self.work.streams},
            "silent": sum(not stream.events for stream in self.streams if stream.kind != "fleet"),
            "lost": missing + sum(stream.lost for stream in self.streams),
            "problems": sorted({stream.problem for stream in self.streams if stream.problem is not None}),
            "bytes": passed,
        }

    # -- streams -------------------------------------------------------------------------------------------------------

    async def listen(self, stream: Stream, path: str) -> None:
        try:
            reader, writer = await asyncio.open_connection(self.work.host, self.work.port)
            try:
                writer.write(self.head(path, "text/event-stream"))
                status, _headers = await self.read_head(reader)
                if status != "200":
                    stream.problem = f"{path} was answered with {status}"
                self.open.release()
                rest = b""
                while size := int(await reader.readline() or b"0", 16):
                    data = (await reader.readexactly(size + 2))[:-2]
                    stream.received += len(data)
                    *events, rest = (rest + data).split(b"\n\n")
                    for event in events:
                        stream.take(event)
                stream.problem = stream.problem or f"{path} ended"
            finally:
                writer.close()
        except (OSError, asyncio.IncompleteReadError) as error:
            stream.problem = f"{path} broke: {type(error).__name__}"

    async def all_came(self) -> int:
        """Wait until every stream of events knows of what has happened by now. Returns how many events did not come."""
        wanted = Path(self.work.metrics).read_bytes().count(b"\n")
        deadline = time.monotonic() + LATE
        told = [stream for stream in self.streams if stream.kind == "events"]
        while time.monotonic() < deadline and any(stream.lines < wanted for stream in told):
            await asyncio.sleep(0.05)
        return sum(max(0, wanted - stream.lines) for stream in told)

    # -- requests ------------------------------------------------------------------------------------------------------

    async def ask(self) -> None:
        """At their times, whether the earlier ones were answered or not: who is slow is not spared the next ones."""
        due: asyncio.Queue[tuple[float, str, str] | None] = asyncio.Queue()
        askers = [asyncio.create_task(self.answer_to(due)) for _ in range(CONNECTIONS)]
        began = time.monotonic()
        for number, (name, path) in enumerate(
            islice(cycle(self.work.paths.items()), round(self.work.rate * self.work.seconds))
        ):
            at = began + number / self.work.rate
            await asyncio.sleep(at - time.monotonic())
            due.put_nowait((at, name, path))
        for _ in askers:
            due.put_nowait(None)
        await asyncio.gather(*askers)

    async def answer_to(self, due: asyncio.Queue[tuple[float, str, str] | None]) -> None:
        reader, writer = await asyncio.open_connection(self.work.host, self.work.port)
        try:
            while (asked := await due.get()) is not None:
                at, name, path = asked
                async with asyncio.timeout(ANSWER):
                    writer.write(self.head(path, "application/json"))
                    status, headers = await self.read_head(reader)
                    await reader.readexactly(int(headers[b"content-length"]))
                self.seconds.setdefault(name, []).append(time.monotonic() - at)
                self.statuses[f"{name} {status}"] += 1
        finally:
            writer.close()

    def head(self, path: str, accept: str) -> bytes:
        work = self.work
        lines = (f"GET {path} HTTP/1.1", f"Host: {work.host}:{work.port}", f"Authorization: Bearer {work.token}")
        return ("\r\n".join((*lines, f"Accept: {accept}")) + "\r\n\r\n").encode()

    async def read_head(self, reader: asyncio.StreamReader) -> tuple[str, dict[bytes, bytes]]:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        pairs = (line.partition(b":") for line in lines if line)
        return first.split()[1].decode(), {name.lower(): value.strip() for name, _, value in pairs}


def main() -> None:
    found = asyncio.run(Load(Work(**json.load(sys.stdin))).run())
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
