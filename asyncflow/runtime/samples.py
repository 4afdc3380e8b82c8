"""What was trained, kept: one Parquet file for each step in `samples/` of the run directory.

    samples/step-000012.parquet      the samples that step 12 trained and skipped, zstd, written aside and renamed

The store lets go of a sample's data when its step is committed. `SampleLog.committed` takes them over at that moment
and a thread of its own writes them, so that compression and the disk are nobody's wait. The folder is one data set:

    pyarrow.dataset.dataset("runs/…/samples")    duckdb: select … from 'runs/…/samples/*.parquet'

Columns, one row a sample: `sample_id`, `group_id`, `step`, `policy_version` (that the step published), `ended`
(trained, or skipped: consumed without being computed), `staleness` (policy versions, of the oldest token), and every
column of `asyncflow.store.schema` that the run writes: the prompt (JSON), its other columns (JSON), tokens, response,
log-probs, `token_versions` (packed: incarnation · 2³² + n), finish reason, reward, and its parts (JSON).

A step that cannot be written is lost here, and nowhere else: the commit stands, an alarm says so, and it is counted.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from asyncflow.errors import CheckpointError
from asyncflow.store.events import Committed
from asyncflow.store.segments import sync_file
from asyncflow.types import PolicyVersion, Recorder
from asyncflow.workers.alarms import Alarms

logger = logging.getLogger(__name__)

WAITING_STEPS = 4
"""Steps that may wait to be written; memory is bounded by them."""
ROOM_TIMEOUT = 10.0
"""Seconds for which a commit waits for a slow disk, before its samples are given up."""
CLOSE_TIMEOUT = 120.0
"""Seconds for writing what is left at the end of a run."""

Write = Callable[[pa.Table, Path], None]


class SampleLog:
    """Writes the samples of a run, step by step. `committed` is called by one thread at a time."""

    def __init__(
        self,
        folder: Path,
        recorder: Recorder,
        *,
        after: int = 0,
        patience: float = ROOM_TIMEOUT,
        write: Write | None = None,
    ) -> None:
        """`after` is the step from which the run goes on: files of later steps, which are made again, are removed.

        `patience`: seconds for which a commit waits for a slow disk. `write` puts a table into a file; None writes
        Parquet. Makes the folder with the first step.
        """
        self._patience = patience
        self._folder = folder
        self._recorder = recorder
        self._write = write or write_parquet
        self._steps: queue.Queue[tuple[int, int, Callable[[], pa.Table]] | None] = queue.Queue(WAITING_STEPS)
        self._closed = False
        self._taken = 0
        self.saved = 0
        """Samples in files."""
        self.lost = 0
        """Samples that could not be written."""
        for file in folder.glob("step-*.parquet"):
            if int(file.stem.removeprefix("step-")) > after:
                file.unlink()
        self._thread = threading.Thread(target=self._run, name="samples", daemon=True)
        self._thread.start()

    def committed(self, event: Committed, gather: Callable[[], pa.RecordBatch]) -> None:
        """Take over the samples of a step, before the store lets go of them. Never raises."""
        step = PolicyVersion.unpack(event.version).n
        samples = len(event.trained) + len(event.skipped)
        self._taken += samples
        try:
            batch = gather()
            self._steps.put((step, samples, lambda: describe(event, batch)), timeout=self._patience)
        except queue.Full:
            self._lose(step, samples, f"the disk did not keep up for {self._patience:.0f} s")
        except Exception as error:  # the step is in the ledger: whatever happens here must not undo it
            self._lose(step, samples, f"{type(error).__name__}: {error}")

    def flush(self) -> None:
        """Wait until everything that was committed so far is on disk, or counted as lost.

        Raises CheckpointError when that takes longer than `CLOSE_TIMEOUT`.
        """
        if not self._flushed():
            raise CheckpointError(f"the disk of {self._folder} did not take the samples within {CLOSE_TIMEOUT:.0f} s")

    def close(self) -> None:
        """Write what is left, and say how many samples were saved and lost. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._flushed():
            self._steps.put(None)
            self._thread.join(CLOSE_TIMEOUT)
        else:
            logger.warning("the disk of %s does not answer: the samples of the last steps are not there", self._folder)
        self._recorder.log("samples", {"saved": self.saved, "lost": self._taken - self.saved})

    def _flushed(self) -> bool:
        with self._steps.all_tasks_done:
            return self._steps.all_tasks_done.wait_for(lambda: not self._steps.unfinished_tasks, CLOSE_TIMEOUT)

    def _run(self) -> None:
        while (item := self._steps.get()) is not None:
            step, samples, table = item
            try:
                self._folder.mkdir(exist_ok=True)
                self._write(table(), self._folder / f"step-{step:06d}.parquet")
                self.saved += samples
            except Exception as error:
                self._lose(step, samples, f"{type(error).__name__}: {error}")
            finally:
                self._steps.task_done()

    def _lose(self, step: int, samples: int, reason: str) -> None:
        self.lost += samples
        text = (
            f"the {samples} samples of step {step} are not in {self._folder} ({reason}); training goes on: "
            "see that its disk has room, or set save_samples to false"
        )
        logger.warning("%s", text)
        with suppress(OSError):  # the same disk may be full for the metrics too; the log has it
            Alarms(self._recorder).sound("samples_not_saved", text, samples_lost=self.lost)


def describe(event: Committed, samples: pa.RecordBatch) -> pa.Table:
    """The samples of a step with what the step did to them. `samples` are the trained ones first."""
    version = PolicyVersion.unpack(event.version)
    versions = samples.column("token_versions")
    offsets = versions.offsets.to_numpy()
    packed = versions.values.to_numpy()[offsets[0] : offsets[-1]]  # a sample has at least one token
    oldest = np.minimum.reduceat(packed, offsets[:-1] - offsets[0]) & 0xFFFFFFFF
    rows = len(samples)
    step = {
        "step": pa.array(np.full(rows, version.n, np.int64)),
        "policy_version": pa.array([str(version)] * rows),
        "ended": pa.array(["trained"] * len(event.trained) + ["skipped"] * len(event.skipped)),
        "staleness": pa.array((version.n - 1 - oldest).astype(np.int32)),
    }
    ids = ("sample_id", "group_id")
    columns = {name: samples.column(name) for name in samples.schema.names}
    return pa.table({name: columns[name] for name in ids} | step | {k: v for k, v in columns.items() if k not in ids})


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write aside, sync and rename: a file of this name is always complete. Raises OSError."""
    aside = path.with_name(f".{path.name}.part")  # readers of data sets pass over names that begin with a dot
    try:
        pq.write_table(table, aside, compression="zstd")
        sync_file(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
