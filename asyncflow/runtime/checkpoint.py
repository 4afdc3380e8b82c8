"""Checkpoints: everything from which a run can go on, as one unit that is there as a whole or not at all.

    RUN_DIR/checkpoints/step-000020/
        state.json       what it is of (below), and every other file with its length and xxh3-128
        learner/…        the learner engine's own state: weights, optimizer, schedule, RNG

A checkpoint is written aside, synced, and renamed; then the ledger is told, which may let go of what steps before it
had consumed. What is *not* in it is in the ledger and in the samples' data: they are ahead of the checkpoint, and going
back to it takes back what later steps consumed (`asyncflow.store.events.Resumed`). The place in the training prompts is
the ledger's count of admitted groups: what was admitted stays admitted.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from asyncflow.errors import CheckpointError
from asyncflow.rundir import CHECKPOINTS
from asyncflow.store.segments import sync_file
from asyncflow.store.store import EmbeddedStore
from asyncflow.types import PolicyVersion, Recorder
from asyncflow.workers.alarms import Alarms

logger = logging.getLogger(__name__)

FORMAT = 1
STATE = "state.json"
LEARNER = "learner"
ASIDE = ".writing-"
CHUNK = 8 << 20
"""Bytes that are read at once for a checksum."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    version: PolicyVersion
    digest: str
    """Of the weights as engines serve them."""
    lsn: int
    """Last event of the ledger that is known to be on disk with it."""
    problems: str
    """Digest of the training prompts, in their order."""
    files: Mapping[str, tuple[int, str]]
    """Path within the checkpoint → bytes, xxh3-128."""

    @property
    def learner(self) -> Path:
        return self.path / LEARNER

    def verify(self) -> None:
        """Read every file and compare it with what was written. Raises CheckpointError."""
        for name, (size, digest) in self.files.items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != size or digest_of(file) != digest:
                raise CheckpointError(
                    f"{file} is missing or damaged: resume from another checkpoint with --from, or restore the file"
                )


def checkpoints(run_dir: Path) -> list[Checkpoint]:
    """All complete checkpoints of a run, oldest first. Raises CheckpointError for one that cannot be read."""
    return [read(path) for path in sorted((run_dir / CHECKPOINTS).glob("step-*"))]


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder, its files not looked at yet. Raises CheckpointError."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {state['format']}, this program reads {FORMAT}: use the matching release"
            )
        return Checkpoint(
            path=path,
            version=PolicyVersion.parse(state["version"]),
            digest=str(state["digest"]),
            lsn=int(state["lsn"]),
            problems=str(state["problems"]),
            files={name: (int(size), str(digest)) for name, (size, digest) in state["files"].items()},
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path / STATE} cannot be read ({error}): remove this folder and resume from another checkpoint"
        ) from error


class Checkpointer:
    """Makes the checkpoints of a run: the learner's thread copies its state out, another thread syncs and renames it.

    A checkpoint that fails is an alarm and not the end of the run: the last one stays, and so does everything since.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        every: int,
        keep: int,
        store: EmbeddedStore,
        recorder: Recorder,
        save: Callable[[Path], None],
        settle: Callable[[], None],
        made: int,
        digest: Callable[[], str],
        problems: str,
    ) -> None:
        """`every`: steps, 0 makes none. `save` writes the learner's state into a new folder; `digest` is that of the
        weights it has. `settle` waits until what else
        is kept of the steps so far is on disk, because a run that goes on from here does not make them again. `made`:
        the step of which there is a checkpoint already, from which the run goes on."""
        self._folder = run_dir / CHECKPOINTS
        self._every = every
        self._keep = keep
        self._store = store
        self._recorder = recorder
        self._save = save
        self._settle = settle
        self._digest = digest
        self._problems = problems
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._made = made

    def after_step(self, version: PolicyVersion) -> None:
        """Make a checkpoint if it is time. In the learner's thread, between two steps."""
        if self._every and version.n % self._every == 0:
            self.make(version)

    def make(self, version: PolicyVersion) -> None:
        """Make a checkpoint of the weights that the learner has, unless there is one; returns before it is complete."""
        self.wait()
        if not self._every or version.n == self._made:
            return
        began = time.monotonic()
        aside = self._folder / f"{ASIDE}step-{version.n:06}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            self._save(aside / LEARNER)
        except Exception as error:  # an engine's library may have errors of its own for a full disk
            self._fail(version, aside, error)
            return
        seconds = time.monotonic() - began
        state = {
            "format": FORMAT,
            "version": str(version),
            "digest": self._digest(),
            "problems": self._problems,
        }
        self._pending = self._background.submit(self._complete, version, aside, state, seconds)

    def wait(self) -> None:
        """Wait until the checkpoint that is being completed is complete, or has failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and make no more. May be called twice."""
        self.wait()
        self._background.shutdown()

    def _complete(self, version: PolicyVersion, aside: Path, state: dict[str, Any], copy_s: float) -> None:
        began = time.monotonic()
        try:
            self._settle()
            state["lsn"] = self._store.sync()
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            state["files"] = {str(p.relative_to(aside)): (p.stat().st_size, digest_of(p)) for p in files}
            (aside / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            for path in (*files, aside / STATE, aside / LEARNER, aside):
                sync_file(path)
            aside.rename(self._folder / f"step-{version.n:06}")
            sync_file(self._folder)
            # The ledger hears of it when it is there, and before an older one goes that it might have to go back to.
            kept = sorted(self._folder.glob("step-*"))[-self._keep :]
            self._store.checkpointed(version, oldest=read(kept[0]).version)
            self._store.sync()
            for old in sorted(self._folder.glob("step-*"))[: -self._keep]:
                shutil.rmtree(old)
        except Exception as error:
            self._fail(version, aside, error)
            return
        self._made = version.n
        size = sum(size for size, _ in state["files"].values())
        values = {"step": version.n, "copy_s": copy_s, "complete_s": time.monotonic() - began, "bytes": size}
        self._recorder.log("checkpoint", values)

    def _fail(self, version: PolicyVersion, aside: Path, error: Exception) -> None:
        logger.error("the checkpoint of step %d failed: %s", version.n, error)
        shutil.rmtree(aside, ignore_errors=True)
        text = f"the checkpoint of step {version.n} could not be made ({error}): the run goes on without it"
        Alarms(self._recorder).sound("checkpoint_failed", text, step=version.n)


def remove_unfinished(run_dir: Path) -> None:
    """Remove what a process that was killed had not completed."""
    for path in (run_dir / CHECKPOINTS).glob(f"{ASIDE}*"):
        shutil.rmtree(path, ignore_errors=True)


def digest_of(file: Path) -> str:
    """xxh3-128 (hex) of a file's bytes."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return str(digest.hexdigest())
