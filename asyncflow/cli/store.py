"""`asyncflow store`: serve a store of its own to other processes, look at one, and put right what goes wrong in it."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncflow.errors import UserError

if TYPE_CHECKING:
    from asyncflow.store.flight import StoreServer
    from asyncflow.store.home import Address
    from asyncflow.store.store import EmbeddedStore

store_app = typer.Typer(
    help="Serve a store (transfer queue) to other processes; look at one, check it, and put things right in it.",
    no_args_is_help=True,
)


class Durable(StrEnum):
    """What an acknowledged put survives."""

    memory = "memory"
    process = "process"
    power = "power"


Where = Annotated[
    str, typer.Argument(metavar="STORE", help="Directory of a store, or its location.", show_default=False)
]
Samples = Annotated[list[int], typer.Argument(metavar="SAMPLE…", help="Ids of samples.", show_default=False)]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="File with the token, where a location is given.", metavar="FILE")
]
TlsRoot = Annotated[
    Path | None,
    typer.Option("--tls-root", help="Certificate (PEM) of who signed the store's, with a location.", metavar="FILE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@store_app.command()
def serve(
    path: Annotated[Path, typer.Option(help="Directory of the store; made when it is not there.", show_default=False)],
    *,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Port 0 takes a free one.")] = "127.0.0.1:0",
    spec: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Terms, columns and stages (YAML); without it, those of a run.")
    ] = None,
    durability: Annotated[Durable, typer.Option(help="What an acknowledged put survives.")] = Durable.process,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What clients need; without it, one is made in the directory.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key (PEM).")] = None,
) -> None:
    """Serve the store in a directory, until SIGTERM or Ctrl-C. What is there already goes on, leases included."""
    import logging

    import pyarrow as pa

    from asyncflow.store.home import Address, Home
    from asyncflow.store.spec import load_spec

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    host, port = _listen(listen)
    tls = _tls(tls_cert, tls_key)
    if tls is None and not _is_loopback(host):
        raise UserError(
            f"{host} can be reached from other hosts, and the token would be read on the way: give --tls-cert and "
            "--tls-key, or listen on 127.0.0.1"
        )
    wanted = None if spec is None else load_spec(spec)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with Home(path) as home:
        token = home.token(token_file)
        store = home.open_store(wanted, durability.value)
        try:
            server = _serve(store, home.earlier, token=token, host=host, port=port, tls=tls)
        except (OSError, ValueError, pa.ArrowException) as error:
            store.close()
            raise UserError(f"nobody can listen on {listen} ({error}): choose another address or port") from None
        try:
            home.announce(
                Address(
                    location=server.location.replace("//0.0.0.0:", "//localhost:").replace("//[::]:", "//localhost:"),
                    pid=os.getpid(),
                    durability=durability.value,
                    token_file=str((token_file or home.path / "token").resolve()),
                    tls_root=None if tls_cert is None else str(tls_cert.resolve()),
                )
            )
            typer.echo(f"{path} is served at {server.location}")
            ended.wait()
        finally:
            server.close()


def _serve(store: EmbeddedStore, earlier: Address | None, *, host: str, port: int, **options: Any) -> StoreServer:
    """At the port of the earlier server if any will do, so that its clients find this one."""
    import pyarrow as pa

    from asyncflow.store.flight import StoreServer

    if port == 0 and earlier is not None:
        with suppress(OSError, ValueError, pa.ArrowException):
            return StoreServer(store, host=host, port=int(earlier.location.rpartition(":")[2]), **options)
    return StoreServer(store, host=host, port=port, **options)


def _listen(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"--listen {text}: write host:port, such as 127.0.0.1:7654; port 0 takes a free one")
    return host, int(port)


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _tls(certificate: Path | None, key: Path | None) -> tuple[bytes, bytes] | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UserError("--tls-cert and --tls-key go together: give both")
    return _read(certificate), _read(key)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): name a PEM file") from None
