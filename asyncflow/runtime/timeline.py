"""What every part of a run did, and when: `trace.json`, and the shares of each step's time.

The file is a JSON array in Chrome's trace format, which ui.perfetto.dev and chrome://tracing open, with one event a
line and times in microseconds of the wall clock. Both read it without the closing bracket too, so the file of a killed
run still opens; `close` makes it valid JSON, and a process that resumes the run goes on writing where it ends.

    [
    {"ph": "M", "pid": 1, "tid": 3, "name": "thread_name", "args": {"name": "rollout"}},
    {"ph": "X", "pid": 1, "tid": 3, "ts": 1795271000000000, "dur": 81200, "name": "idle", "cat": "activity", …},

Format: "Trace Event Format" (Google, 2016), sections "JSON Array Format" and "Complete Events".
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from asyncflow.clock import Clock, SystemClock
from asyncflow.runtime.recent import KEPT, Piece, Recent
from asyncflow.types import Activity

STAGES = "stages"
"""Process under which tracks stand in the trace; lanes (`generation/3`) stand under their own."""

ACTIVITY = "activity"
"""Category of the spans that say busy, idle or blocked."""
WORK = "work"
"""Category of all others."""

MICRO = 1_000_000
MOST_SPANS = 20_000
MOST_OF_LANES = 4_000
"""Spans that those who look on are told of at once: of parts, and of lanes."""

END = {"ph": "i", "s": "g", "pid": 1, "tid": 0, "name": "end of this process's part"}
"""Last event of a file that was closed. Without it a closing bracket would have to follow a comma."""


@dataclass(frozen=True, kw_only=True)
class Doing:
    """What a track is doing at one moment."""

    activity: Activity
    cause: str = ""
    """What it waits for, when it is not busy."""
    seconds: float = field(default=0.0, compare=False)
    """For how long it has been so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One piece of time of one track."""

    track: str
    name: str
    """The activity, or what was done."""
    began: float
    """Seconds since the epoch, as `ended`."""
    ended: float
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(slots=True)
class _Open:
    """Something that has not ended."""

    track: str
    name: str
    cause: str
    began: float
    counted: float
    """Until when its time is in the shares."""


class NoTimeline:
    """Implements `Timeline` for those who want none: nothing is kept."""

    def now(self) -> float:
        return 0.0

    def enter(self, track: str, activity: Activity, cause: str = "") -> None:
        pass

    def leave(self, track: str) -> None:
        pass

    def span(self, track: str, name: str, **args: Any) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()

    def record(self, track: str, name: str, began: float, **args: Any) -> None:
        pass

    def add(self, track: str, name: str, seconds: float) -> None:
        pass

    def lap(self) -> Mapping[str, float]:
        return {}


class TraceTimeline:
    """Implements `Timeline` with a trace file; thread-safe.

    `enter` costs its caller 2 µs (0.3 µs when nothing changes), a span 4 µs, `record` 1.5 µs (one core, Python 3.11).
    What was recorded is kept in memory; `lap` and `close` write it, 11 µs and 150 bytes for each.
    """

    def __init__(self, path: Path, *, clock: Clock | None = None) -> None:
        """A file that is there is continued; what follows its last whole line was torn by a kill and is cut off.
        Raises OSError."""
        self._clock = clock or SystemClock()
        self._origin = self._clock.wall() - self._clock.monotonic()
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._spans: list[Piece] = []
        self._recent = Recent(self._clock.monotonic())
        self._doing: dict[str, _Open] = {}
        self._work: dict[int, _Open] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        """Metric → seconds since the last lap."""
        self._totals: defaultdict[tuple[str, Activity], float] = defaultdict(float)
        """Track and activity → seconds since the beginning."""
        self._lap_began = self._clock.monotonic()
        self._threads: dict[str, tuple[int, int]] = {}
        """Track → process and thread of the trace."""
        self._named: set[str] = set()
        self._processes: set[int] = set()
        """Tracks and processes whose names are in the file."""
        self._file = path.open("a+b")
        self._continue()

    # -- Timeline ------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._clock.monotonic()

    def enter(self, track: str, activity: Activity, cause: str = "") -> None:
        self.entered(track, activity, cause, None)

    def leave(self, track: str) -> None:
        self.left(track, None)

    @contextmanager
    def span(self, track: str, name: str, **args: Any) -> Iterator[None]:
        work = self.began(track, name, None)
        try:
            yield
        finally:
            self.ended(work, None, args)

    def record(self, track: str, name: str, began: float, **args: Any) -> None:
        self.recorded(track, name, began, self._clock.monotonic(), args)

    def add(self, track: str, name: str, seconds: float) -> None:
        with self._lock:
            self._seconds[f"stage/{track}/{name}"] += seconds
            self._recent.add(self._clock.monotonic(), f"{track}/{name}", seconds)

    def lap(self) -> Mapping[str, float]:
        with self._lock:
            now = self._clock.monotonic()
            for doing in self._doing.values():
                self._count(doing, now)
            for work in self._work.values():
                self._seconds[f"stage/{work.track}/{work.name}"] += now - work.counted
                work.counted = now
            elapsed, self._lap_began = now - self._lap_began, now
            shares = {key: round(seconds / elapsed, 4) for key, seconds in self._seconds.items() if elapsed}
            self._seconds.clear()
        self.flush()
        return shares

    # -- for another process of this host, whose clock is the same, and which is heard a little later ------------------

    def entered(self, track: str, activity: Activity, cause: str, at: float | None) -> None:
        """`enter` at a time, as of all below; None is now. Shares of laps that have ended stay as they are."""
        with self._lock:
            doing = self._doing.get(track)
            if doing is not None and doing.name == activity and doing.cause == cause:
                return
            now = self._clock.monotonic() if at is None else at
            self._end(doing, now)
            self._doing[track] = _Open(track, activity, cause, now, max(now, self._lap_began))

    def left(self, track: str, at: float | None) -> None:
        with self._lock:
            self._end(self._doing.pop(track, None), self._clock.monotonic() if at is None else at)

    def began(self, track: str, name: str, at: float | None) -> _Open:
        """What is given back is for `ended`."""
        with self._lock:
            now = self._clock.monotonic() if at is None else at
            work = _Open(track, name, "", now, max(now, self._lap_began))
            self._work[id(work)] = work
        return work

    def ended(self, work: _Open, at: float | None, args: Mapping[str, Any]) -> None:
        with self._lock:
            del self._work[id(work)]
            now = self._clock.monotonic() if at is None else at
            self._seconds[f"stage/{work.track}/{work.name}"] += max(0.0, now - work.counted)
            self._keep(Piece(work.track, work.name, WORK, work.began, now, args))

    def recorded(self, track: str, name: str, began: float, ended: float, args: Mapping[str, Any]) -> None:
        with self._lock:
            self._keep(Piece(track, name, WORK, began, ended, args))

    # -- for the runtime -----------------------------------------------------------------------------------------------

    def order(self, tracks: Iterable[str]) -> None:
        """Show these tracks in this order, others after them."""
        with self._flushing:
            for track in tracks:
                self._thread(track)

    def doing(self) -> dict[str, Doing]:
        """What every track is doing right now."""
        with self._lock:
            now = self._clock.monotonic()
            return {
                track: Doing(activity=_activity(at.name), cause=at.cause, seconds=max(0.0, now - at.began))
                for track, at in self._doing.items()
            }

    def recent(self, seconds: float) -> list[Span]:
        """The activities of the last so many seconds (at most `KEPT`) that every track was in, and what was done on the
        lanes, in the order in which they began; activities that go on end now."""
        with self._lock:
            now = self._clock.monotonic()
            began = now - min(seconds, KEPT)
            pieces = [*self._recent.since(began), *self._under_way(now)]
        return [
            Span(
                track=piece.track,
                name=piece.name,
                began=self._origin + max(piece.began, began),
                ended=self._origin + piece.ended,
                args=piece.args,
            )
            for piece in sorted(pieces, key=lambda piece: piece.began)
            if piece.category == ACTIVITY or "/" in piece.track
        ]

    def recent_shares(self, seconds: float) -> dict[str, float]:
        """Shares of the last so many seconds (at most `KEPT`), as `asyncflow.report.bottleneck` wants them."""
        with self._lock:
            now = self._clock.monotonic()
            return self._recent.shares(now, min(seconds, KEPT), self._under_way(now), activity=ACTIVITY)

    def totals(self) -> dict[tuple[str, Activity], float]:
        """Seconds that each track was in each activity, since this process began."""
        with self._lock:
            now = self._clock.monotonic()
            for doing in self._doing.values():
                self._count(doing, now)
            return dict(self._totals)

    def leave_all(self) -> None:
        """All tracks stop taking part: the workers have ended."""
        for track in list(self._doing):
            self.leave(track)

    def flush(self) -> None:
        """Write what was recorded. Raises OSError."""
        with self._flushing:
            with self._lock:
                spans, self._spans = self._spans, []
            if spans and not self._file.closed:
                self._file.write("".join(line for span in spans for line in self._lines(span)).encode())
                self._file.flush()

    def close(self) -> None:
        """End the file as valid JSON. May be called twice; what is recorded later is not kept. Raises OSError."""
        self.leave_all()
        self.flush()
        with self._flushing:
            if not self._file.closed:
                end = END | {"ts": self._micro(self._clock.monotonic())}
                self._file.write(f"{json.dumps(end)}\n]\n".encode())
                self._file.close()

    # -- shares --------------------------------------------------------------------------------------------------------

    def _keep(self, piece: Piece) -> None:
        self._spans.append(piece)
        self._recent.keep(piece)

    def _under_way(self, now: float) -> list[Piece]:
        """What goes on, up to now."""
        return [
            Piece(at.track, at.name, category, at.began, max(now, at.began), {"cause": at.cause} if at.cause else {})
            for category, all_ in ((ACTIVITY, list(self._doing.values())), (WORK, list(self._work.values())))
            for at in all_
        ]

    def _end(self, doing: _Open | None, now: float) -> None:
        """What a track was doing ends."""
        if doing is not None:
            self._count(doing, now)
            args = {"cause": doing.cause} if doing.cause else {}
            self._keep(Piece(doing.track, doing.name, ACTIVITY, doing.began, max(now, doing.began), args))

    def _count(self, doing: _Open, now: float) -> None:
        stage, seconds = f"stage/{doing.track}", max(0.0, now - doing.counted)
        doing.counted = max(now, doing.counted)
        self._totals[doing.track, _activity(doing.name)] += seconds
        for activity in ("busy", "idle", "blocked"):
            self._seconds[f"{stage}/{activity}"] += seconds if doing.name == activity else 0.0
        if doing.cause:
            self._seconds[f"{stage}/wait_for/{doing.cause}"] += seconds

    # -- the file ------------------------------------------------------------------------------------------------------

    def _micro(self, monotonic: float) -> int:
        return round((self._origin + monotonic) * MICRO)

    def _lines(self, piece: Piece) -> Iterator[str]:
        track = piece.track
        pid, tid = self._thread(track)
        if track not in self._named:
            self._named.add(track)
            process, _, lane = track.rpartition("/")
            if pid not in self._processes:
                self._processes.add(pid)
                yield _line({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process or STAGES}})
            thread = {"ph": "M", "pid": pid, "tid": tid}
            yield _line(thread | {"name": "thread_name", "args": {"name": lane}})
            yield _line(thread | {"name": "thread_sort_index", "args": {"sort_index": tid}})
        ts = self._micro(piece.began)
        event = {"ph": "X", "pid": pid, "tid": tid, "ts": ts, "dur": self._micro(piece.ended) - ts, "name": piece.name}
        yield _line(event | {"cat": piece.category} | ({"args": piece.args} if piece.args else {}))

    def _thread(self, track: str) -> tuple[int, int]:
        """Process and thread of a track: the same ones throughout the file."""
        if track not in self._threads:
            process = track.rpartition("/")[0]
            pids = {other.rpartition("/")[0]: pid for other, (pid, _) in self._threads.items()}
            pid = pids.get(process, 1 if not process else max([1, *pids.values()]) + 1)
            tids = [tid for other_pid, tid in self._threads.values() if other_pid == pid]
            self._threads[track] = pid, max([0, *tids]) + 1
        return self._threads[track]

    def _continue(self) -> None:
        """Stand behind the last whole event of the file, and know the tracks that it names."""
        self._file.seek(0)
        end = 0
        processes: dict[int, str] = {}
        for line in self._file:
            if not line.endswith(b"\n") or line.startswith(b"]"):
                break
            end += len(line)
            if line.startswith(b'{"ph": "M"'):
                event = json.loads(line.rstrip(b",\n"))
                name = event["args"].get("name")
                if event["name"] == "process_name":
                    processes[event["pid"]] = name
                elif event["name"] == "thread_name":
                    process = processes[event["pid"]]
                    track = name if process == STAGES else f"{process}/{name}"
                    self._threads[track] = event["pid"], event["tid"]
                    self._named.add(track)
        self._processes |= processes.keys()
        self._file.truncate(end)
        if not end:
            self._file.write(b"[\n")
        elif end > 2:
            self._file.seek(end - 2)
            if self._file.read(2) != b",\n":  # it was closed: another event follows the last one
                self._file.truncate(end - 1)
                self._file.write(b",\n")
        self._file.flush()


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(event, default=str) + ",\n"


def _activity(name: str) -> Activity:
    return "busy" if name == "busy" else "idle" if name == "idle" else "blocked"


def as_told(spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Spans as those who look on are told of them (`RunControl.timeline`): activities of parts, and what was done on
    lanes, where somebody is busy. Of very many the last ones of each."""
    parts, lanes = deque[Span](maxlen=MOST_SPANS), deque[Span](maxlen=MOST_OF_LANES)
    for span in spans:
        if "/" in span.track:
            lanes.append(span)
        elif span.name in get_args(Activity):
            parts.append(span)
    return [
        {
            "worker": span.track,
            "activity": "busy" if "/" in span.track else span.name,
            "start": span.began,
            "end": span.ended,
            "cause": span.args.get("cause"),
        }
        for span in sorted((*parts, *lanes), key=lambda span: span.began)
    ]


def read_trace(path: Path, *, began: float = 0.0, ended: float = float("inf")) -> Iterator[Span]:
    """The spans of a trace file that touch this time (seconds since the epoch), in the order in which they ended.

    What a killed run left torn, and what is no event, is left out. A file that is missing has none.
    """
    if not path.is_file():
        return
    processes: dict[int, str] = {}
    tracks: dict[tuple[int, int], str] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line.rstrip(",\n"))
                match event["ph"], event["name"]:
                    case "M", "process_name":
                        processes[event["pid"]] = str(event["args"]["name"])
                    case "M", "thread_name":
                        process, name = processes[event["pid"]], str(event["args"]["name"])
                        tracks[event["pid"], event["tid"]] = name if process == STAGES else f"{process}/{name}"
                    case "X", name:
                        from_, until = event["ts"] / MICRO, (event["ts"] + event["dur"]) / MICRO
                        if from_ < ended and until > began:
                            yield Span(
                                track=tracks[event["pid"], event["tid"]],
                                name=str(name),
                                began=from_,
                                ended=until,
                                args=event.get("args", {}),
                            )
            except (ValueError, LookupError, TypeError):
                continue
