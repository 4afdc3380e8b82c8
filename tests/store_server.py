"""`asyncflow store serve` in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from asyncflow.store.home import TOKEN
from asyncflow.store.remote import connect
from asyncflow.store.store import Store

COMMAND = (sys.executable, "-m", "asyncflow.cli", "store")


class StoreProcess:
    """One server, which can be killed and started again at the same address."""

    def __init__(self, home: Path, *options: str) -> None:
        self.home = home
        self.options = options
        self.process: subprocess.Popen[str] | None = None
        self.location = ""
        self.start()

    def start(self) -> None:
        at = "127.0.0.1:0" if not self.location else self.location.partition("://")[2]
        self.process = subprocess.Popen(
            [*COMMAND, "serve", "--path", str(self.home), "--listen", at, *self.options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        assert " is served at " in self.said, self.process.communicate()
        self.location = self.said.split()[-1]

    @property
    def token(self) -> str:
        return (self.home / TOKEN).read_text("ascii")

    def connect(self, *, local: bool | None = None, patience: float = 60.0) -> Store:
        return connect(self.location, token=self.token, local=local, patience=patience)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> tuple[int, str, str]:
        """In order. Returns its exit code, and what it said at the end on stdout and stderr."""
        return self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> tuple[int, str, str]:
        assert self.process is not None
        self.process.send_signal(how)
        out, err = self.process.communicate()
        return self.process.returncode, out, err

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()


def command(*words: str | os.PathLike[str] | int) -> subprocess.CompletedProcess[str]:
    """`asyncflow store` with these words."""
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, check=False)
