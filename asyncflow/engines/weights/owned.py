"""Folders that do not outlive their owner, even when it is killed.

The owner holds a lock (flock) on the folder, which the kernel releases when it dies, however it dies. Whoever makes the
next folder of the same kind removes those whose lock is free. Process ids, which are reused, play no part.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


class OwnedFolder:
    """A new folder for this process alone (mode 0700), removed by `remove`, at exit, or after a crash by the next."""

    path: Path

    def __init__(self, prefix: str, root: Path | None = None) -> None:
        """Make a folder `<root>/<prefix>…` and remove those that are left over from dead owners. Raises OSError.

        `root`: None is shared memory, /dev/shm, or the temporary folder where there is none.
        """
        root = root or _default_root()
        for leftover in root.glob(f"{prefix}*"):
            with contextlib.suppress(FileNotFoundError):
                if leftover.stat().st_uid == os.getuid() and (lock := try_lock(leftover, os.O_RDONLY)) is not None:
                    _remove(leftover, lock, os.getpid())
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
            lock = try_lock(self.path, os.O_RDONLY)
            # Between the two lines above somebody else may have taken it for a leftover.
            if lock is not None and self.path.exists():
                break
            if lock is not None:
                os.close(lock)
        self._remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    @property
    def removed(self) -> bool:
        """True after `remove`."""
        return not self._remove.alive

    def remove(self) -> None:
        """Remove it with all that is in it. May be called twice."""
        self._remove()


def leftovers(prefix: str, root: Path | None = None) -> list[Path]:
    """Folders of this kind whose owner is dead: the next `OwnedFolder` removes them. `root` as there."""
    found = []
    for folder in sorted((root or _default_root()).glob(f"{prefix}*")):
        with contextlib.suppress(OSError):  # somebody else's, or gone since it was listed
            if (lock := try_lock(folder, os.O_RDONLY)) is not None:
                os.close(lock)
                found.append(folder)
    return found


def _default_root() -> Path:
    return SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def try_lock(path: Path, flags: int) -> int | None:
    """A descriptor of `path`, opened with `flags`, that holds the only lock on it until it is closed; None when
    somebody else has a lock on it or it is gone."""
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(path: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked child inherits the finalizer, but not the folder
        shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
