"""What a queue does when something goes wrong: each function does it, and says what came of it.

The answers have `kept`, whether what a training run needs was kept, and `observed`, in words with the counts.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.queues.base import LEARNER, Place, Side
from benchmarks.queues.figures import Connect, clients, processes, timed, wanted, workers
from benchmarks.queues.samples import Samples, finished

HOLD_S = 2.0
"""For how long a queue that can take samples back leaves them with a consumer that says nothing."""


def dead_consumer(side: Side) -> dict[str, Any]:
    """A consumer is killed with 16 samples that it has taken. Another one asks for them."""
    with side.open("finished") as place, clients(place) as (producer, survivor):
        producer.put(producer.prepare(marked(16, 1)))
        answers: Any = processes.SimpleQueue()
        with workers(place, [partial(takes_and_hangs, rows=16)], answers) as (victim,):
            answers.get()
            victim.kill()
            victim.join()
        began = time.monotonic()
        taken = survivor.take(16, timeout=10 * HOLD_S, interval=0.05)
        back, seconds = 0 if taken is None else len(survivor.read(taken)["reward"]), time.monotonic() - began
    text = f"{back} of 16 came back after {seconds:.1f} s" if back else f"lost: 0 of 16 came back in {seconds:.0f} s"
    return {"kept": back == 16, "observed": text}


def stale_handle(side: Side) -> dict[str, Any]:
    """A consumer takes samples; they are removed and others are put; only then does it read what it took."""
    with side.open("finished") as place, clients(place) as (producer, consumer):
        producer.put(producer.prepare(marked(16, 1)))
        taken = wanted(consumer.take(16, timeout=10.0, interval=0.05))
        producer.clear()
        producer.put(producer.prepare(marked(16, 2)))
        try:
            found = rewards(consumer.read(taken))
        except Exception as error:
            return {"kept": True, "observed": f"refused: {short(error)}"}
    text = f"it reads {found[1]} samples that it took and {found[2]} of the others"
    return {"kept": found[1] == 16 and not found[2], "observed": text}


def blocked_fetch(side: Side) -> dict[str, Any]:
    """A consumer waits for samples that are not there. Meanwhile another client puts into another queue."""
    with side.open("finished") as place, clients(place) as (first, _), side.open("finished") as other:
        client = other.client()
        batch = client.prepare(marked(16, 1))
        first.put(first.prepare(marked(1, 1)))
        wanted(first.take(1, timeout=10.0))
        alone = [timed(lambda: client.put(batch))[0] for _ in range(8)][3:]
        answers: Any = processes.SimpleQueue()
        with workers(place, [partial(waits, rows=16, timeout=20.0)], answers):
            answers.get()
            time.sleep(0.5)
            beside = [timed(lambda: client.put(batch))[0] for _ in range(3)]
            outcome = answers.get() if beside[0] > 1.0 else "still waiting"
        client.close()
    text = (
        f"a put takes {1000 * np.median(alone):.1f} ms alone and {1000 * max(beside):.0f} ms (the longest of 3) beside "
        f"a consumer that waits; the consumer: {outcome}"
    )
    return {"kept": max(beside) < 1.0, "observed": text}


def mixed_groups(side: Side) -> dict[str, Any]:
    """Samples of two groups of 4 end in turns, one by one. The learner asks for 4 when 3 of each are there."""
    order = [(group, member) for member in range(4) for group in (7, 8)]
    with side.open("finished", **({"group": 4} if side.name == "asyncflow" else {})) as place:
        producer, learner = place.client(), place.client()
        producer.put_members(order[:6], 4)
        early = learner.take(4, reader=LEARNER, timeout=1.0, interval=0.05)
        groups = [] if early is None else prompts(learner.read(early))
        producer.put_members(order[6:], 4)
        late = learner.take(4, reader=LEARNER, timeout=2.0, interval=0.05)
        later = [] if late is None else prompts(learner.read(late))
    kept = len(set(groups)) <= 1 and len(set(later)) == 1
    first = f"from 3 + 3 of 4 + 4 the learner got the groups {groups}" if groups else "with 3 + 3 of 4 + 4 it waits"
    return {"kept": kept, "observed": f"{first}; when all 8 are there it gets {later or 'nothing'}"}


def no_consumer(side: Side, *, batches: int = 48) -> dict[str, Any]:
    """A producer puts and puts, 8.5 MB at a time, while nobody takes anything."""
    with side.open("finished") as place, clients(place) as (producer, consumer):
        batch = producer.prepare(finished(1024))
        before, accepted, refusal = resident_mb(place), 0, ""
        for _ in range(batches):
            try:
                producer.put(batch)
            except Exception as error:
                refusal = short(error)
                break
            accepted += 1024
        grown = resident_mb(place) - before
        there = consumer.take(16, timeout=2.0)
        usable = "samples still come out" if there is not None else "nothing comes out any more"
    end = f"then refused: {refusal}; {usable}" if refusal else "no end to it"
    text = f"{accepted} samples accepted, servers grew by {grown:.0f} MB; {end}"
    return {"kept": bool(refusal) and there is not None, "observed": text}


def killed_servers(side: Side, *, checkpoint: bool = False, only: int | None = None) -> dict[str, Any]:
    """After 64 acknowledged samples (and, with `checkpoint`, 16 after one) kill -9 of all servers, or of the one whose
    number is `only`. They are started again."""
    with side.open("finished") as place:
        producer = place.client()
        producer.put(producer.prepare(marked(64, 1)))
        if checkpoint:
            place.checkpoint()
            producer.put(producer.prepare(marked(16, 2)))
        put = 80 if checkpoint else 64
        victims = place.servers()
        for pid in victims if only is None else [victims[only]]:
            os.kill(pid, signal.SIGKILL)
        time.sleep(2.0)
        during = attempt(lambda: producer.put(producer.prepare(marked(1, 3))), patience=20.0)
        restart = attempt(lambda: place.restart(from_checkpoint=checkpoint), patience=60.0)
        found: Counter[int] = Counter()
        if restart == "done":
            consumer = place.client()
            while (taken := consumer.take(1, timeout=1.0, interval=0.05)) is not None:
                found += rewards(consumer.read(taken))
    acknowledged = found[1] + found[2]
    text = (
        f"a client's next put: {during}; start again: {restart}; {acknowledged} of {put} acknowledged samples are there"
    )
    return {"kept": acknowledged == put, "observed": text}


def foreign_code(side: Side, *, folder: str) -> dict[str, Any]:
    """A client puts an object instead of numbers, whose unpickling writes down the process that does it."""
    file = Path(folder, "unpickled")
    with_note: Any = {**marked(4, 1), "note": [Canary(str(file))] * 4}
    with side.open("noted") as place, clients(place) as (producer, consumer):
        refusal = attempt(lambda: producer.put(producer.prepare(with_note)))
        taken = consumer.take(4, timeout=2.0, interval=0.05)
        if taken is not None and hasattr(taken, "field_names"):
            attempt(lambda: consumer.read(taken))
        wanted_pids = {os.getpid(): "the consumer", **dict.fromkeys(place.servers(), "a server")}
        pids = [int(line) for line in file.read_text().split()] if file.exists() else []
    who = Counter(wanted_pids.get(pid, "another process") for pid in pids)
    ran = ", ".join(f"{name} ({count} ×)" for name, count in who.items())
    return {"kept": not pids, "observed": f"put: {refusal}; its code ran in {ran or 'no process'}"}


class Canary:
    """Says who unpickles it."""

    def __init__(self, file: str) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import os; open({self._file!r}, 'a').write(str(os.getpid()) + '\\n')",)


EXPERIMENTS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        dead_consumer,
        stale_handle,
        blocked_fetch,
        mixed_groups,
        no_consumer,
        killed_servers,
        foreign_code,
    )
}


# -- processes of their own --------------------------------------------------------------------------------------------


def takes_and_hangs(connect: Connect, address: Any, answers: Any, *, rows: int) -> None:
    client = connect(address)
    taken = wanted(client.take(rows, timeout=20.0, hold=HOLD_S, interval=0.05))
    answers.put(len(client.read(taken)))
    time.sleep(600)


def waits(connect: Connect, address: Any, answers: Any, *, rows: int, timeout: float) -> None:
    client = connect(address)
    answers.put("ready")
    began = time.monotonic()
    outcome = attempt(lambda: client.take(rows, timeout=timeout, interval=0.05), patience=timeout + 5)
    answers.put(f"{outcome} after {time.monotonic() - began:.1f} s")


# -- helpers -----------------------------------------------------------------------------------------------------------


def marked(rows: int, mark: int) -> Samples:
    """Samples whose reward says which ones they are."""
    return {**finished(rows, prompt=4, response=8), "reward": np.full(rows, mark, np.float32)}


def rewards(columns: Mapping[str, Any]) -> Counter[int]:
    return Counter(int(value) for value in columns["reward"].flatten().tolist())


def prompts(columns: Mapping[str, Any]) -> list[int]:
    return [int(prompt[0]) for prompt in columns["prompt_ids"].unbind()]


def attempt(work: Callable[[], Any], *, patience: float = 20.0) -> str:
    """What comes of it: `done`, the error, or that it hangs."""
    outcome: list[str] = []

    def run() -> None:
        try:
            work()
            outcome.append("done")
        except Exception as error:
            outcome.append(short(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(patience)
    return outcome[0] if outcome else f"no answer within {patience:.0f} s"


def short(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "…"


def resident_mb(place: Place) -> float:
    return sum(float(psutil.Process(pid).memory_info().rss) for pid in place.servers()) / 1e6
