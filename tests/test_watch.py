"""Streams of the service: one look for many watchers, the latest picture for the slow, and a history without gaps."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from asyncflow_api import runs, sse, watch
from asyncflow_api.jobs.database import NoSuchJob
from asyncflow_api.jobs.events import Cursor
from asyncflow_api.jobs.rows import NewJob
from asyncflow_api.jobs.service import Jobs
from asyncflow_api.routes.history import Fleet
from asyncflow_api.routes.queue import Live
from asyncflow_api.runs import RunView
from asyncflow_api.settings import Settings
from asyncflow_api.watch import Batch, Sight, Watches

from asyncflow.errors import StoreError
from tests.processes import DEADLINE

STREAMS = 200


class Numbers:
    """A source with a history, the numbers from 1 on, and a picture, the last of them."""

    end = b"end"

    def __init__(self) -> None:
        self.last = 0
        self.over = False
        self.looks = self.reads = 0
        self.fails: Exception | None = None
        self.goes_on = threading.Event()
        self.goes_on.set()

    def changed(self) -> object:
        return self.last, self.over, self.fails

    def look(self) -> Sight:
        self.looks += 1
        assert self.goes_on.wait(DEADLINE)
        if self.fails is not None:
            raise self.fails
        return Sight(until=self.last, picture=b"picture %d" % self.last, told=self.last, over=self.over)

    def read(self, at: int, until: int) -> Batch:
        self.reads += 1
        numbers = range(at + 1, min(until, at + 100) + 1)
        return b"".join(b"%d;" % number for number in numbers), at + len(numbers)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a test takes no longer than it must: a look follows another at once."""
    monkeypatch.setattr(watch, "EVERY", 0.001)


def run(test: Callable[[Watches], Awaitable[None]]) -> None:
    async def within() -> None:
        watches = Watches()
        try:
            async with asyncio.timeout(DEADLINE):
                await test(watches)
            assert not watches._watches, "who is not watched any more is not looked at"
        finally:
            watches.close()

    asyncio.run(within())


def following(watches: Watches, numbers: Numbers, at: int | None = 0) -> AsyncIterator[bytes]:
    return sse.follow(watches, "numbers", lambda: numbers, at)


async def until(stream: AsyncIterator[bytes], last: bytes) -> list[bytes]:
    """What it says up to this; nothing follows the end."""
    found = []
    async for piece in stream:
        found.append(piece)
        if piece.endswith(last) and last != b"end":
            return found
    assert found[-1] == last
    return found


def told(pieces: list[bytes]) -> list[int]:
    """The numbers of the history."""
    return [int(one) for piece in pieces if piece.endswith(b";") for one in piece.split(b";")[:-1]]


def test_a_stream_ends_when_who_listens_may_no_more_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "ASK_EVERY", 0.0)

    async def test(watches: Watches) -> None:
        numbers, may = Numbers(), [True]
        numbers.last = 5
        other = following(watches, numbers)
        mine = sse.follow(watches, "numbers", lambda: numbers, 0, holds=lambda: may[0])
        await asyncio.gather(until(mine, b"picture 5"), until(other, b"picture 5"))

        may[0] = False
        numbers.last = 6

        assert [piece async for piece in mine if b"6" in piece] == []
        numbers.over = True
        assert told(await until(other, b"end")) == [6]

    run(test)


def test_two_hundred_streams_cost_the_reads_of_one() -> None:
    async def test(watches: Watches) -> None:
        numbers = Numbers()
        numbers.last = 250
        everybody = [following(watches, numbers) for _ in range(STREAMS)]
        found = await asyncio.gather(*(until(one, b"picture 250") for one in everybody))
        assert all(told(pieces) == list(range(1, 251)) for pieces in found)
        assert (numbers.looks, numbers.reads) == (1, 3)  # a hundred at a time

        numbers.last, numbers.over = 260, True
        found = await asyncio.gather(*(until(one, b"end") for one in everybody))
        assert all(told(pieces) == list(range(251, 261)) for pieces in found)
        assert all(pieces[-2:] == [b"picture 260", b"end"] for pieces in found)
        assert (numbers.looks, numbers.reads) == (2, 4)

    run(test)


def test_who_is_slow_gets_the_latest_picture_and_all_of_the_history() -> None:
    async def test(watches: Watches) -> None:
        numbers = Numbers()
        slow, quick = following(watches, numbers), following(watches, numbers)
        await until(slow, b"picture 0")
        for last in range(1, 31):
            numbers.last = last
            await until(quick, b"picture %d" % last)
        numbers.over = True
        found = await until(slow, b"end")
        assert told(found) == list(range(1, 31))
        assert [piece for piece in found if piece.startswith(b"picture")] == [b"picture 30"]
        await until(quick, b"end")

    run(test)


def test_a_stream_goes_on_from_anywhere() -> None:
    async def test(watches: Watches) -> None:
        numbers = Numbers()
        numbers.last, numbers.over = 205, True
        for at in (0, 1, 99, 100, 204, 205, 1000):
            assert told(await until(following(watches, numbers, at), b"end")) == list(range(at + 1, 206))

    run(test)


def test_a_history_that_many_have_read_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(watches: Watches) -> None:
        monkeypatch.setattr(watch, "KEPT", 1000)
        numbers = Numbers()
        numbers.last = 5000
        stream = following(watches, numbers)
        assert told(await until(stream, b"picture 5000")) == list(range(1, 5001))
        (one,) = watches._watches.values()
        assert sum(len(batch.result()[0]) for batch in one._batches.values()) == one._kept <= 1000
        assert one._batches
        numbers.over = True
        await until(stream, b"end")

    run(test)


def test_a_stream_lives_while_what_it_looks_at_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(watches: Watches) -> None:
        monkeypatch.setattr(watch, "HEARTBEAT", 0.01)
        monkeypatch.setattr(sse, "HEARTBEAT", 0.01)
        numbers = Numbers()
        numbers.goes_on.clear()
        stream = following(watches, numbers)
        assert await until(stream, b": still here\n\n")
        numbers.goes_on.set()
        numbers.over = True
        await until(stream, b"end")

    run(test)


def test_a_look_that_fails_ends_the_streams_and_the_next_one_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    async def test(watches: Watches) -> None:
        numbers = Numbers()
        streams = [following(watches, numbers) for _ in range(3)]
        for one in streams:
            await until(one, b"picture 0")
        numbers.fails = StoreError("the disk is gone")
        for one in streams:
            assert [piece async for piece in one] == []
        numbers.fails, numbers.over = None, True
        assert (await until(following(watches, numbers), b"end"))[-2] == b"picture 0"

    run(test)
    assert caplog.text.count("the disk is gone") == 1


def test_however_many_look_at_a_run_it_is_asked_once(tmp_path: Path) -> None:
    class Run:
        asked = 0

        def status(self) -> dict[str, Any]:
            return {}

        def workers(self) -> list[dict[str, Any]]:
            self.asked += 1
            return [{"name": f"worker {self.asked}"}]

    view = RunView(tmp_path)
    view.control = run = Run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "FRESH", DEADLINE)
        assert [view.workers() for _ in range(STREAMS)] == [[{"name": "worker 1"}]] * STREAMS
        view.look_again()
        assert view.workers() == [{"name": "worker 2"}]
    assert run.asked == 2


def test_who_goes_is_forgotten_and_the_last_one_ends_the_looks() -> None:
    async def test(watches: Watches) -> None:
        numbers = Numbers()
        async with aclosing(following(watches, numbers)) as first:  # type: ignore[type-var]
            async with aclosing(following(watches, numbers)) as second:  # type: ignore[type-var]
                await until(first, b"picture 0")
                await until(second, b"picture 0")
                (one,) = watches._watches.values()
                assert one.watchers == 2
            assert one.watchers == 1
            assert not one._task.done()
        assert not watches._watches
        await asyncio.wait({one._task})
        assert one._task.cancelled()

    run(test)


def test_what_is_read_for_many_fails_for_each_and_is_read_again() -> None:
    class Deleted(Numbers):
        def read(self, at: Any, until: Any) -> Batch:
            super().read(at, until)
            raise StoreError("it was deleted")

    async def test(watches: Watches) -> None:
        numbers = Deleted()
        numbers.last = 1
        for _ in range(2):
            assert [piece async for piece in following(watches, numbers)] == [b"retry: 1000\n\n"]
        assert numbers.reads == 2

    run(test)


# -- what is watched ---------------------------------------------------------------------------------------------------


def test_a_stream_of_a_run_ends_with_its_job_and_not_while_the_run_does_not_answer(tmp_path: Path) -> None:
    job = SimpleNamespace(ended=False)
    live = Live(cast(Jobs, SimpleNamespace(get=lambda _: job)), "j", RunView(tmp_path))
    assert not live.look().over

    job.ended = True  # it had not even begun
    assert live.look().over

    def deleted(job_id: str) -> None:
        raise NoSuchJob(job_id)

    assert Live(cast(Jobs, SimpleNamespace(get=deleted)), "j", RunView(tmp_path)).look().over


def test_whoever_goes_on_from_any_event_of_the_fleet_misses_no_job(tmp_path: Path) -> None:
    with closing(Jobs(Settings(home=tmp_path / "home"))) as jobs:
        new = NewJob(name="a", config={}, labels={})
        first, second = (jobs.database.add(new)[0] for _ in range(2))
        # The run has told of it: no event of the job, but all who look at the fleet hear of it.
        jobs.database.change(second.id, {"max_staleness": 5}, revision=None, told=None)
        jobs.database.change(first.id, {"priority": 1}, revision=None, told={"priority": 1})
        fleet = Fleet(jobs)
        sight = fleet.look()
        said, after = fleet.read(0, sight.until)

        assert after == sight.until == 4
        ids = [int(line[4:]) for line in said.split(b"\n") if line.startswith(b"id: ")]
        jobs_told = [json.loads(line[6:]) for line in said.split(b"\n") if line.startswith(b"data: ")]
        assert ids == [3, 4]
        assert [(job["id"], job["priority"], job["max_staleness"]) for job in jobs_told] == [
            (second.id, 50, 5),
            (first.id, 1, None),
        ]
        assert jobs.events_end(second.id) == Cursor(1, 0)
        assert [event.type for event in jobs.events_after(second.id, Cursor(), 9)[0]] == ["state"]
