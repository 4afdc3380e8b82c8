"""The directory of a store that others reach: one with a server of its own (`asyncflow store serve`), or a run's.

<home>/ledger.sqlite, data/     what every store has
<home>/token                    what clients need to be let in; for its owner only
<home>/store.json               where the server is, for other commands on this host (`Address`)
<home>/lock                     locked by the process that serves it
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import IO, Final, Self

import msgspec

from asyncflow.errors import LedgerError, Unreachable, UserError
from asyncflow.rundir import CONFIG, DATA, LEDGER
from asyncflow.store.journal import Durability, LedgerReader
from asyncflow.store.segments import has_writer, lock_for_writing
from asyncflow.store.spec import StoreSpec, difference
from asyncflow.store.store import EmbeddedStore

TOKEN: Final = "token"
ADDRESS: Final = "store.json"
LOCK: Final = "lock"


class Address(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a server is, and how to be let in."""

    location: str
    pid: int
    durability: Durability
    token_file: str
    tls_root: str | None = None
    """File of the certificate that it shows; None: it speaks without TLS."""


class HomeError(UserError):
    """A directory that cannot be that of a store. The message says what to do."""


class ServedFolder:
    """A directory whose store this process alone serves, until `close`."""

    def __init__(self, path: Path) -> None:
        """Raises HomeError when the directory cannot be written, or has a server."""
        self.path = path
        try:
            self._lock = _open_private(path / LOCK, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise HomeError(f"{path} cannot hold a store ({error.strerror}): name a directory to write to") from None
        try:
            lock_for_writing(self._lock.fileno())
        except BlockingIOError:
            pid = self._lock.read().decode(errors="replace") or "that is just starting"
            self._lock.close()
            raise HomeError(f"{path} is served already, by process {pid}: stop that one, or use it") from None
        try:
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()).encode())
            self._lock.flush()
        except OSError as error:
            self._lock.close()
            raise HomeError(f"{path} cannot be written ({error.strerror}): see that its disk has room") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others serve it. May be called twice."""
        self._lock.close()

    @property
    def earlier(self) -> Address | None:
        """Where the last server was: those who wait for it look there."""
        try:
            return msgspec.json.decode((self.path / ADDRESS).read_bytes(), type=Address)
        except (OSError, msgspec.MsgspecError):
            return None

    def token(self, file: Path | None = None) -> str:
        """What is in `file`, or in the one here, which is made when it is not there. Raises HomeError."""
        if file is not None:
            return read_token(file)
        path = self.path / TOKEN
        if not path.exists():
            aside = path.with_name(f"{TOKEN}.part")
            try:
                aside.unlink(missing_ok=True)
                with _open_private(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as new:
                    new.write(secrets.token_urlsafe(32).encode())
                aside.rename(path)
            except OSError as error:
                raise HomeError(f"{path} cannot be made ({error.strerror}): see that its disk has room") from None
        return read_token(path)

    def announce(self, address: Address) -> None:
        """Say where the server is. Raises HomeError."""
        path = self.path / ADDRESS
        aside = path.with_name(f"{ADDRESS}.part")
        try:
            aside.write_bytes(msgspec.json.format(msgspec.json.encode(address)) + b"\n")
            aside.rename(path)
        except OSError as error:
            raise HomeError(f"{path} cannot be written ({error.strerror}): see that its disk has room") from None

    def retire(self) -> None:
        """Let nobody in any more, and leave nothing behind of what let them in."""
        for name in (ADDRESS, TOKEN, LOCK):
            (self.path / name).unlink(missing_ok=True)
        self.close()


class Home(ServedFolder):
    """The directory of a store that belongs to nobody but its server."""

    def __init__(self, path: Path) -> None:
        """Makes the directory, not its parents. Raises HomeError as `ServedFolder` does, when it cannot be made, and
        when it is a run's."""
        if (path / CONFIG).exists():
            raise HomeError(f"{path} is the directory of a run, which has its own store: name another one")
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise HomeError(f"{path} cannot hold a store ({error.strerror}): name a directory to write to") from None
        super().__init__(path)

    def open_store(self, spec: StoreSpec | None, durability: Durability) -> EmbeddedStore:
        """The store that is there, with its leases, or a new one.

        Raises LedgerError for one that cannot be read, and HomeError for one that is not what `spec` says, or whose
        samples were only in memory.
        """
        ledger, data = self.path / LEDGER, self.path / DATA
        if not ledger.exists():
            new = spec or StoreSpec()
            folder = None if durability == "memory" else data
            return EmbeddedStore.create(new.make_schema(), new.terms, ledger=ledger, data=folder, durability=durability)
        with LedgerReader(ledger) as reader:
            found = None if spec is None else difference(reader.schema, reader.terms(), spec)
        if found is not None:
            raise HomeError(
                f"{self.path} holds a store that is not what the file says: {found}. Name another directory"
            )
        if durability == "memory" or not data.is_dir():
            why = "had its samples in memory, and they are gone:"
            if data.is_dir():
                why = "has its samples on disk: choose durability process, or"
            raise HomeError(f"the store in {self.path} {why} name another directory")
        return EmbeddedStore.restart(ledger=ledger, data=data, durability=durability)


def address_of(home: Path) -> Address:
    """Where the server of a store's directory, or of a run's, is. Raises HomeError for no such directory, Unreachable
    when it has no server."""
    if not home.is_dir():
        raise HomeError(f"there is no directory {home}: name that of a store, or its location (grpc://host:port)")
    if not has_writer(home / LOCK):
        if (home / CONFIG).exists():
            raise Unreachable(f"nobody serves {home}: its run has ended, or was killed (`asyncflow resume {home}`)")
        raise Unreachable(f"nobody serves {home}: start `asyncflow store serve --path {home}`")
    try:
        address = msgspec.json.decode((home / ADDRESS).read_bytes(), type=Address)
        if (home / LOCK).read_text("ascii") == str(address.pid):
            return address
    except FileNotFoundError:
        pass
    except (OSError, msgspec.MsgspecError) as error:
        raise HomeError(f"{home / ADDRESS} cannot be read ({error}): start the server again") from None
    raise Unreachable(f"the server of {home} is just starting: try again")


def ledger_of(home: Path) -> Path:
    """The ledger of a store's directory, or of a run's. Raises LedgerError when there is none."""
    ledger = home / LEDGER
    if not ledger.is_file():
        raise LedgerError(f"there is no ledger {ledger}: name the directory of a store, or of a run")
    return ledger


def read_token(file: Path) -> str:
    """Raises HomeError for a file that is missing or empty, or that others can read."""
    try:
        token, mode = file.read_text(encoding="ascii").strip(), file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise HomeError(f"the token in {file} cannot be read ({error}): name a file that holds one") from None
    if not token:
        raise HomeError(f"{file} is empty: write a token into it, or remove it so that one is made")
    if mode & 0o077:
        raise HomeError(f"{file} can be read by others: chmod 600 {file}")
    return token


def _open_private(path: Path, flags: int) -> IO[bytes]:
    return os.fdopen(os.open(path, flags, 0o600), "rb+" if flags & os.O_RDWR else "wb", buffering=0)
