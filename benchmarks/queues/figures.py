"""What is measured, written once for every queue. Each function is one turn: seconds, for the parent to join.

Samples are prepared in the queue's own layout before a clock starts. A put ends when it is acknowledged, a get with
torch tensors in the consumer's hands. Producer and consumer are different clients; the servers are other processes.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

import numpy as np

from benchmarks.queues.base import Place, Queue, Side
from benchmarks.queues.child import cpu_share
from benchmarks.queues.samples import Ragged, Samples, finished, part, size, wide

T = TypeVar("T")
Connect = Callable[[Any], Queue]

BATCH = 1024
WARM = 20
"""Turns that are not counted: they pay for code, memory and files that nobody has touched before."""
PATIENCE_S = 300.0
processes = multiprocessing.get_context("spawn")


def about(side: Side) -> dict[str, Any]:
    return side.about()


def throughput(
    side: Side,
    *,
    rows: int = BATCH,
    response: int = 512,
    repeats: int = 9,
    warm: int = WARM,
    remote: bool = False,
    **terms: Any,
) -> dict[str, Any]:
    """Put a batch in one call; get it, by a client that has not seen it before; get it a second time."""
    samples = finished(rows, response=response)
    seconds: dict[str, list[float]] = {"put_s": [], "cold_s": [], "again_s": [], "done_s": []}
    with side.open("finished", **terms) as place, clients(place, remote=remote) as (producer, consumer):
        batch = producer.prepare(samples)
        for turn in range(warm + repeats):
            put_s, _ = timed(lambda: producer.put(batch))
            cold_s, got = timed(lambda: wanted(consumer.get(rows, timeout=PATIENCE_S)))
            check(samples, got.columns)
            done_s, _ = timed(lambda got=got: consumer.done(got))  # type: ignore[misc]
            again_s, got = timed(lambda: wanted(consumer.get(rows, reader="again", timeout=PATIENCE_S)))
            consumer.done(got)
            del got
            producer.clear()
            if turn >= warm:
                for name, value in {"put_s": put_s, "cold_s": cold_s, "again_s": again_s, "done_s": done_s}.items():
                    seconds[name].append(value)
    return {"rows": rows, "bytes": size(samples), **seconds}


def put_only(side: Side, *, rows: int = BATCH, repeats: int = 16, **terms: Any) -> dict[str, Any]:
    """Puts of one batch, on other terms."""
    samples = finished(rows)
    with side.open("finished", **terms) as place, clients(place) as (producer, _):
        batch = producer.prepare(samples)
        seconds = [timed(lambda: producer.put(batch))[0] for _ in range(repeats + 1)][1:]
        producer.clear()
    return {"rows": rows, "bytes": size(samples), "put_s": seconds}


def singly(side: Side, *, rows: int = BATCH, repeats: int = 3, **terms: Any) -> dict[str, Any]:
    """Put samples one by one, as a pipeline does; then get all of them at once, and once more. The first turn pays for
    memory that nobody has touched before."""
    samples = finished(rows)
    seconds: dict[str, list[float]] = {"put_1_s": [], "cold_s": [], "again_s": []}
    with side.open("finished", **terms) as place, clients(place) as (producer, consumer):
        batches = [producer.prepare(part(samples, row, row + 1)) for row in range(rows)]
        for turn in range(1 + repeats):
            put_s = [timed(lambda one=one: producer.put(one))[0] for one in batches]  # type: ignore[misc]
            cold_s, got = timed(lambda: wanted(consumer.get(rows, timeout=PATIENCE_S)))
            check(samples, got.columns)
            consumer.done(got)
            del got
            again_s, got = timed(lambda: wanted(consumer.get(rows, reader="again", timeout=PATIENCE_S)))
            consumer.done(got)
            del got
            producer.clear()
            if turn:
                seconds["put_1_s"] += put_s
                seconds["cold_s"].append(cold_s)
                seconds["again_s"].append(again_s)
    return {"rows": rows, **seconds}


def small(side: Side, *, rows: int = 16, gets: int = 64, **terms: Any) -> dict[str, Any]:
    """Get few samples at a time of those that were put in one call."""
    with side.open("finished", **terms) as place, clients(place) as (producer, consumer):
        producer.put(producer.prepare(finished(rows * gets)))
        seconds = []
        for _ in range(gets):
            get_s, got = timed(lambda: wanted(consumer.get(rows, timeout=PATIENCE_S)))
            seconds.append(get_s)
            consumer.done(got)
        producer.clear()
    return {"rows": rows, "get_s": seconds[4:]}


def calls(side: Side, *, times: int = 300) -> dict[str, Any]:
    """A call that does next to nothing, by a client on the same host and by one that is treated as on another: the two
    in turns, ten calls of each one after the other."""
    with side.open("finished") as place, clients(place, remote=True) as (near, far):
        seconds: dict[str, list[float]] = {"near_s": [], "far_s": []}
        for turn in range(-1, times // 10):
            for name, client in (("near_s", near), ("far_s", far)):
                taken = [timed(client.call)[0] for _ in range(10)]
                if turn >= 0:  # the first turn warms up
                    seconds[name] += taken
    return seconds


def wake(
    side: Side, *, puts: int = 50, rows: int = 16, interval: float = 0.0, parked: int = 0, pause: float = 0.013
) -> dict[str, Any]:
    """From the start of a put until a consumer, in a process of its own, that waits for it has the data.

    `parked` more clients, in another process, wait meanwhile for what never comes."""
    with side.open("finished") as place, clients(place) as (producer, _):
        if parked:
            producer.can_park()
        batch = producer.prepare(finished(rows))
        answers: Any = processes.SimpleQueue()
        with (
            workers(place, [partial(waits_forever, clients=parked)] if parked else [], answers),
            workers(place, [partial(takes_one_by_one, times=puts + 4, rows=rows, interval=interval)], answers),
        ):
            if parked:
                answers.get()
            answers.get()
            delays, put_s = [], []
            for turn in range(puts + 4):
                # Not in step with a consumer that asks in intervals.
                time.sleep(pause + interval * (turn % 8) / 8)
                began = time.monotonic()
                producer.put(batch)
                ended = time.monotonic()
                delays.append(answers.get() - began)
                put_s.append(ended - began)
        producer.clear()
    return {"rows": rows, "interval_s": interval, "parked": parked, "wake_s": delays[4:], "put_s": put_s[4:]}


def reclaim(side: Side, *, times: int = 20, rows: int = 16, hold: float = 0.25) -> dict[str, Any]:
    """From the death of a consumer until another one, which waits, has the samples that it had taken: after the end of
    its lease of `hold` seconds, and after somebody has said that it is dead."""
    with side.open("finished") as place, clients(place) as (producer, dead), closing(place.client()) as waiting:
        dead.die()  # one that gives nothing back says so here, and is not waited for
        batch = producer.prepare(finished(rows))
        late_s, notice_s = [], []
        for _ in range(times):
            producer.put(batch)
            began = time.monotonic()
            wanted(dead.take(rows, timeout=PATIENCE_S, hold=hold))
            waiting.done(wanted(waiting.get(rows, timeout=PATIENCE_S)))
            late_s.append(time.monotonic() - began - hold)

            producer.put(batch)
            wanted(dead.take(rows, timeout=PATIENCE_S))
            with ThreadPoolExecutor(1) as other:
                got = other.submit(lambda: (wanted(waiting.get(rows, timeout=PATIENCE_S)), time.monotonic()))
                time.sleep(0.05)  # until it waits
                began = time.monotonic()
                dead.die()
                samples, at = got.result()
            notice_s.append(at - began)
            waiting.done(samples)
        producer.clear()
    return {"rows": rows, "hold_s": hold, "late_s": late_s, "notice_s": notice_s}


def idle(side: Side, *, seconds: float = 3.0, interval: float = 0.0) -> dict[str, Any]:
    """Cores that a consumer keeps busy that waits for what does not come, and the servers meanwhile and before."""
    with side.open("finished") as place, clients(place) as (producer, consumer):
        # A first sample, so that the queue has heard of the columns.
        producer.put(producer.prepare(finished(1)))
        consumer.done(wanted(consumer.get(1, timeout=PATIENCE_S)))
        time.sleep(1.0)
        alone = cpu_share(place.servers(), seconds)
        answers: Any = processes.SimpleQueue()
        with workers(place, [partial(takes_one_by_one, times=1, rows=16, interval=interval)], answers) as (waiting,):
            answers.get()
            time.sleep(1.0)
            both: dict[str, float] = {}
            meanwhile = threading.Thread(
                target=lambda: both.update(consumer=cpu_share([waiting.pid or 0], seconds)), daemon=True
            )
            meanwhile.start()
            beside = cpu_share(place.servers(), seconds)
            meanwhile.join()
        producer.clear()
    return {
        "interval_s": interval,
        "consumer_cores": both["consumer"],
        "servers_cores": beside,
        "servers_cores_without_consumer": alone,
    }


def resident(
    side: Side,
    *,
    few: int = 1024,
    many: int = 1_000_000,
    rows: int = 16,
    gets: int = 40,
    patience: float = 240.0,
    **terms: Any,
) -> dict[str, Any]:
    """Get 16 samples while few samples are in the queue, and while many are. Samples are short: it is not about data.

    After `patience` seconds of putting, as many as there are are taken for many."""
    batch_rows = min(8192, few)
    with side.open("finished", **terms) as place, clients(place) as (producer, consumer):
        batch = producer.prepare(finished(batch_rows, prompt=4, response=8))

        def gets_of() -> list[float]:
            seconds = []
            for _ in range(gets):
                get_s, got = timed(lambda: wanted(consumer.get(rows, timeout=PATIENCE_S)))
                seconds.append(get_s)
                consumer.done(got)
            return seconds[4:]

        began, there = time.perf_counter(), 0
        while there < few:
            producer.put(batch)
            there += batch_rows
        few_there, few_s = there, gets_of()
        larger_rows = min(8192, many)
        larger = producer.prepare(finished(larger_rows, prompt=4, response=8))
        while there < many and time.perf_counter() - began < patience:
            producer.put(larger)
            there += larger_rows
        fill_s = time.perf_counter() - began
        many_s = gets_of()
        producer.clear()
    return {"few": few_there, "many": there, "fill_s": fill_s, "few_s": few_s, "many_s": many_s}


def columns(side: Side, *, rows: int = BATCH, repeats: int = 8, **terms: Any) -> dict[str, Any]:
    """Get one ragged column of all samples, and 32 of them."""
    seconds: dict[str, list[float]] = {"one": [], "all": []}
    with side.open("wide", **terms) as place, clients(place) as (producer, consumer):
        batch = producer.prepare(wide(rows))
        for turn in range(2 + repeats):
            producer.put(batch)
            for reader, values in seconds.items():
                get_s, got = timed(lambda reader=reader: wanted(consumer.get(rows, reader=reader, timeout=PATIENCE_S)))  # type: ignore[misc]
                consumer.done(got)
                del got
                if turn > 1:
                    values.append(get_s)
            producer.clear()
    return {"rows": rows, "one_s": seconds["one"], "all_s": seconds["all"]}


def mixed(
    side: Side, *, producers: int = 4, consumers: int = 4, batches: int = 32, rows: int = 256, passes: int = 2
) -> dict[str, Any]:
    """Producers and consumers at the same time, each in a process of its own; a consumer has what it got removed.
    `batches`: that each producer puts, in each pass; the last one counts."""
    with side.open("finished") as place:
        for _ in range(passes):
            turn = _mixed(place, producers=producers, consumers=consumers, batches=batches, rows=rows)
    return turn


def _mixed(place: Place, *, producers: int, consumers: int, batches: int, rows: int) -> dict[str, Any]:
    total = producers * batches
    answers: Any = processes.SimpleQueue()
    start, left = processes.Barrier(producers + consumers), processes.Value("l", total)
    work = [
        *[partial(puts_batches, start=start, batches=batches, rows=rows)] * producers,
        *[partial(gets_batches, start=start, left=left, rows=rows)] * consumers,
    ]
    with workers(place, work, answers):
        done = [answers.get() for _ in work]
    spans = {
        what: max(end for kind, _, end, _ in done if kind == what) - min(s for kind, s, _, _ in done if kind == what)
        for what in ("put", "get")
    }
    got = sum(count for kind, _, _, count in done if kind == "get")
    if got != total * rows:
        raise RuntimeError(f"{total * rows} samples were put and {got} came out")
    return {"rows": rows, "samples": got, "put_s": [spans["put"]], "get_s": [spans["get"]]}


def recovery(side: Side, *, rows: int = 1_000_000) -> dict[str, Any]:
    """Put samples one by one, kill everything, and start again from what is on disk."""
    return side.recover(rows)


FIGURES: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        about,
        throughput,
        put_only,
        singly,
        small,
        calls,
        wake,
        reclaim,
        idle,
        resident,
        columns,
        mixed,
        recovery,
    )
}


# -- processes of their own --------------------------------------------------------------------------------------------


@contextmanager
def workers(place: Place, work: Sequence[Callable[..., None]], answers: Any) -> Iterator[list[SpawnProcess]]:
    """Processes that have a client each and do this. What is left of them at the end is killed."""
    started = [
        processes.Process(target=one, args=(type(place).connect, place.address, answers), daemon=True) for one in work
    ]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
            process.join()


def takes_one_by_one(connect: Connect, address: Any, answers: Any, *, times: int, rows: int, interval: float) -> None:
    client = connect(address)
    answers.put("ready")
    for _ in range(times):
        got = wanted(client.get(rows, timeout=PATIENCE_S, interval=interval))
        answers.put(time.monotonic())
        client.done(got)
        del got


def waits_forever(connect: Connect, address: Any, answers: Any, *, clients: int) -> None:
    """So many threads, with one client, that wait for more samples than there ever are."""
    client = connect(address)
    for _ in range(clients):
        threading.Thread(target=client.park, daemon=True).start()
    time.sleep(2.0)
    answers.put("ready")
    time.sleep(PATIENCE_S)


def puts_batches(connect: Connect, address: Any, answers: Any, *, start: Any, batches: int, rows: int) -> None:
    client = connect(address)
    batch = client.prepare(finished(rows, seed=os.getpid()))
    start.wait()
    began = time.monotonic()
    for _ in range(batches):
        client.put(batch)
    answers.put(("put", began, time.monotonic(), batches * rows))


def gets_batches(connect: Connect, address: Any, answers: Any, *, start: Any, left: Any, rows: int) -> None:
    client = connect(address)
    start.wait()
    began = ended = time.monotonic()
    samples = 0
    while left.value > 0:
        got = client.get(rows, timeout=0.05, interval=0.001)
        if got is not None:
            client.end(got)
            samples += got.rows
            ended = time.monotonic()
            with left.get_lock():
                left.value -= 1
    answers.put(("get", began, ended, samples))


# -- helpers -----------------------------------------------------------------------------------------------------------


@contextmanager
def clients(place: Place, *, remote: bool = False) -> Iterator[tuple[Queue, Queue]]:
    """A producer and a consumer."""
    producer, consumer = place.client(), place.client(remote=remote)
    try:
        yield producer, consumer
    finally:
        producer.close()
        consumer.close()


def timed(work: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def wanted(got: T | None) -> T:
    if got is None:
        raise TimeoutError(f"samples that were put did not come out within {PATIENCE_S:.0f} s")
    return got


def check(samples: Samples, got: Mapping[str, Any]) -> None:
    """That what came out is what went in, in whatever order. Raises RuntimeError."""
    for name, column in samples.items():
        values = column.values if isinstance(column, Ragged) else column
        tensor = got[name].values() if got[name].is_nested else got[name]
        found = tensor.numpy()
        if len(found) != len(values) or not np.array_equal(np.sort(found), np.sort(values)):
            raise RuntimeError(f"column {name} came out with other values than it went in with")
