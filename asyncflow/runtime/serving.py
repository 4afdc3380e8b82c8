"""The store of a run, for others on this host while the run goes on: `asyncflow store stat RUN_DIR`, and any client.

    token         what lets them in; made anew for each run, for its owner only (mode 0600)
    store.json    where the server is; a port of the loopback interface

Both are gone when the run has ended in order. One that was killed leaves them, and nobody behind them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa

from asyncflow.store.flight import StoreServer
from asyncflow.store.home import TOKEN, Address, HomeError, ServedFolder
from asyncflow.store.store import EmbeddedStore


class ServedStore:
    """A store with a server, until `close`."""

    def __init__(self, store: EmbeddedStore, run_dir: Path) -> None:
        """The caller has the run directory for itself. Raises HomeError when nobody can listen, or the directory cannot
        be written; the store is as before then."""
        self._folder = ServedFolder(run_dir)
        try:
            self.token = self._folder.token()
            self._server = StoreServer(store, token=self.token, near=store.folder or run_dir)
        except (OSError, pa.ArrowException) as error:
            self._folder.retire()
            raise HomeError(
                f"the store of {run_dir} cannot be served ({error}): see to the loopback interface"
            ) from error
        self.location = self._server.location
        self._folder.announce(
            Address(
                location=self.location,
                pid=os.getpid(),
                durability=store.durability,
                token_file=str((run_dir / TOKEN).resolve()),
            )
        )

    def close(self) -> None:
        """Close the store, which ends the calls that wait, and let nobody in any more. May be called twice."""
        self._server.close()
        self._folder.retire()
