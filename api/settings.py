"""What whoever starts the service decides, for as long as it runs."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One service."""

    home: Path
    """Its directory: database, token, and everything of its jobs."""
    host: str = "127.0.0.1"
    port: int = 8765
    names: tuple[str, ...] = ()
    """Further host names under which clients may call it."""
    tls: bool = False
    slots: int = 1
    """Jobs that run at once."""
    allow_imports: tuple[str, ...] = ()
    """Modules, with everything below them, that a configuration may name."""
    allow_paths: tuple[Path, ...] = ()
    """Folders, with everything below them, that a configuration may name."""
    allow_models: tuple[str, ...] = ()
    """Patterns (`fnmatch`) of Hub ids that a configuration may name."""

    allow_options: tuple[str, ...] = ()
    """Settings of vLLM that a configuration may choose, beside those that everybody may (`jobs.policy`)."""

    validation_timeout: float = 120.0
    """Seconds that making a plan may take."""
    stop_grace: float = 120.0
    """Seconds that a cancelled job has to stop in order, with a checkpoint; then it gets SIGTERM."""
    term_grace: float = 20.0
    """Seconds from SIGTERM to SIGKILL."""

    max_body: int = 1 << 20
    """Bytes of a JSON request body."""
    max_bulk_json: int = 8 << 20
    """Bytes of one with samples or prompts."""
    max_bulk_body: int = 64 << 20
    """The same as Arrow, which is not copied to be read."""
    max_files: int = 1000
    """Files that clients may leave here."""
    max_files_bytes: int = 4 << 30
    """Bytes of all of them."""
    max_bodies: int = 256 << 20
    """Bytes of all bodies that are being received."""
    head_timeout: float = 15.0
    """Seconds in which the head of a request has to be there, and a new connection has to begin one."""
    body_timeout: float = 30.0
    """Seconds in which a body has to be there."""
    rate: float = 200.0
    """Requests a second of one token; up to four seconds' worth come at once."""
    anonymous_rate: float = 20.0
    """The same of one address that shows no token."""
    failure_rate: float = 0.5
    """Wrong tokens a second from one address; twenty come at once."""
    session_seconds: float = 12 * 3600.0
    """How long a login lasts."""

    @property
    def loopback(self) -> bool:
        """Only this machine can reach it."""
        return is_loopback(self.host)

    @property
    def database(self) -> Path:
        return self.home / "service.sqlite"

    @property
    def token_file(self) -> Path:
        """Holds the first admin token; for its owner only."""
        return self.home / "token"

    @property
    def files_dir(self) -> Path:
        """What clients sent to be trained on."""
        return self.home / "files"

    @property
    def jobs_dir(self) -> Path:
        return self.home / "jobs"


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
