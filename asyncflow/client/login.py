"""Where the service is and what lets in, in a file that only its owner can read."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Final

import msgspec

from asyncflow.errors import UserError

FILE: Final = "service.json"


class Login(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `asyncflow login` keeps."""

    url: str
    token: str
    tls_root: str | None = None
    """File (PEM) of who signed the service's certificate; None: the system's."""


def login_file() -> Path:
    """`asyncflow/service.json` below `$XDG_CONFIG_HOME`, or `~/.config`."""
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    # The specification: relative paths are passed over.
    return (base if base.is_absolute() else Path.home() / ".config") / "asyncflow" / FILE


def save(login: Login) -> Path:
    """Write the file, mode 0600, whole or not at all. Raises UserError."""
    path = login_file()
    new = path.with_name(f".{FILE}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(login) + b"\n")
        new.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): set XDG_CONFIG_HOME to a folder of yours"
        ) from None
    return path


def load() -> Login:
    """What was saved. Raises UserError where nobody has logged in, or others can read the token."""
    path = login_file()
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read()
    except FileNotFoundError:
        raise UserError("nobody has logged in to a service here: asyncflow login URL") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): asyncflow login URL writes it again") from None
    if mode & 0o077:
        raise UserError(f"{path} holds a token and others can read it: chmod 600 {path}, and take a new token")
    try:
        return msgspec.json.decode(data, type=Login)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged: asyncflow login URL writes it again") from None


def trust(tls_root: str | None) -> ssl.SSLContext | bool:
    """Whose certificates are believed. Raises UserError for a file that has none."""
    if tls_root is None:
        return True
    try:
        return ssl.create_default_context(cafile=tls_root)
    except (OSError, ssl.SSLError):
        raise UserError(f"{tls_root} has no certificate: name a PEM file of who signed the service's") from None
