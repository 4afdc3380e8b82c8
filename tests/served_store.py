"""A store that is served by a process of its own, so that a test sees when it crashes and what memory it takes.

python -m tests.served_store FOLDER BYTES      Arrow's memory; says its location, and ends with its standard input
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

TOKEN = "a token"
ARROW_MEMORY = 256 << 20
ROOT = Path(__file__).parent.parent


class ServedStore:
    """A context manager."""

    def __init__(self, folder: Path, *, arrow_memory: int = ARROW_MEMORY, **terms: Any) -> None:
        self.folder = folder
        self.ledger = folder / "ledger.sqlite"
        program = [sys.executable, "-m", "tests.served_store", str(folder), str(arrow_memory)]
        self.process = subprocess.Popen(
            program + [f"{name}={value}" for name, value in terms.items()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        self.location = self.process.stdout.readline().strip()
        assert self.location.startswith("grpc://"), self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def peak_memory(self) -> int:
        """Most bytes that it has had in memory since the last `forget_peak`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) << 10

    def forget_peak(self) -> int:
        """Begin anew; returns what it has now."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        return self.peak_memory


def main(folder: Path, arrow_memory: int, terms: dict[str, int]) -> None:
    from asyncflow.store.memory import limit_arrow_memory

    limit_arrow_memory(arrow_memory)
    from asyncflow.store.flight import StoreServer
    from asyncflow.store.store import EmbeddedStore
    from asyncflow.types import PolicyVersion
    from tests import test_store

    store = EmbeddedStore.create(
        test_store.SCHEMA, test_store.terms(**terms), ledger=folder / "ledger.sqlite", data=folder / "data"
    )
    store.serve("engine", PolicyVersion(n=0))
    server = StoreServer(store, token=TOKEN)
    print(server.location, flush=True)
    sys.stdin.read()
    server.close()


if __name__ == "__main__":
    options = {name: int(value) for name, value in (option.split("=") for option in sys.argv[3:])}
    main(Path(sys.argv[1]), int(sys.argv[2]), options)
