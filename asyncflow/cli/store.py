"""`asyncflow store`: serve a store of its own to other processes, look at one, and put right what goes wrong in it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncflow.errors import Unreachable, UserError

if TYPE_CHECKING:
    from asyncflow.store.flight import StoreServer
    from asyncflow.store.home import Address
    from asyncflow.store.store import EmbeddedStore, Store

store_app = typer.Typer(
    help="Serve a store (transfer queue) to other processes; look at one, check it, and put things right in it.",
    no_args_is_help=True,
)


PATIENCE = 5.0
"""Seconds for which a command waits for a server that does not answer."""
MOST_IDS = 1_000_000


class Durable(StrEnum):
    """What an acknowledged put survives."""

    memory = "memory"
    process = "process"
    power = "power"


Where = Annotated[
    str, typer.Argument(metavar="STORE", help="Directory of a store, or its location.", show_default=False)
]
Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Directory of a store, or of a run.", show_default=False)
]
Ids = Annotated[
    list[str], typer.Argument(metavar="SAMPLE…", help="Ids of samples; 7-12 are six of them.", show_default=False)
]
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

    from asyncflow.store.memory import limit_arrow_memory

    if durability is not Durable.memory:  # whose samples are in this very memory
        limit_arrow_memory()

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


@store_app.command()
def stat(where: Where, *, token_file: TokenFile = None, tls_root: TlsRoot = None, as_json: AsJson = False) -> None:
    """Say what is in a store: states, how far each stage is behind, leases, staleness, bytes, who waits for what."""
    from asyncflow.cli.store_view import Look, stat_lines

    look = Look(where, _reach(where, token_file, tls_root, needed=False))
    if as_json:
        typer.echo(json.dumps(look.plain(), indent=2))
        return
    for line in stat_lines(look):
        typer.echo(line)


@store_app.command()
def top(
    where: Where,
    *,
    token_file: TokenFile = None,
    tls_root: TlsRoot = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """The same with rates, again and again until Ctrl-C; once, where the output is no terminal."""
    from asyncflow.cli.store_view import Look, rate_lines, rates, stat_lines, watch

    store = _at(where, token_file, tls_root)
    if sys.stdout.isatty() and not as_json:
        watch(where, store, every)
        return
    first = Look(where, store)
    time.sleep(every)
    look = Look(where, store)
    if as_json:
        typer.echo(json.dumps({**look.plain(), "rates": rates(first, look)}, indent=2))
        return
    for line in (*stat_lines(look), *rate_lines(first, look)):
        typer.echo(line)


@store_app.command()
def trace(
    where: Directory,
    sample: Annotated[int, typer.Argument(min=0, help="Id of the sample.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Tell the whole life of one sample from the ledger; nothing needs to run."""
    from asyncflow.cli.store_view import life_lines
    from asyncflow.report.life import life_of

    life = life_of(where, sample)
    if as_json:
        typer.echo(json.dumps(asdict(life), indent=2))
        return
    for line in life_lines(life):
        typer.echo(line)


@store_app.command()
def verify(where: Directory, as_json: AsJson = False) -> None:
    """Read everything on disk and compare all checksums: ledger, snapshot, frames. Exit code 1 if anything is wrong."""
    from asyncflow.cli.store_view import verify_lines
    from asyncflow.store.verify import verify as verify_store

    found = verify_store(where)
    if as_json:
        typer.echo(json.dumps({"ok": found.ok, **asdict(found)}, indent=2))
    else:
        for line in verify_lines(found):
            typer.echo(line)
    raise typer.Exit(0 if found.ok else 1)


@store_app.command()
def export(
    where: Directory,
    file: Annotated[Path, typer.Argument(help="File to write: .parquet or .jsonl.", show_default=False)],
    *,
    conditions: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="KEY=VALUE", help="state=…, group=…, stage=… or worker=…; may be repeated."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Columns to write; all of them when left out.")
    ] = None,
) -> None:
    """Write the open samples, with all columns that they have, to one file."""
    from asyncflow.report.export import export_open

    names = None if columns is None else [name.strip() for name in columns.split(",")]
    rows = export_open(where, file, names, where=conditions or ())
    typer.echo(f"{rows:,} samples in {file}")


@store_app.command()
def restore(where: Where, samples: Ids, *, token_file: TokenFile = None, tls_root: TlsRoot = None) -> None:
    """Put samples back from quarantine, with the columns that they had. All of them or none."""
    ids = _ids(samples)
    _at(where, token_file, tls_root).restore(ids)
    typer.echo(f"{len(ids):,} put back")


@store_app.command()
def prioritise(
    where: Where,
    samples: Ids,
    *,
    priority: Annotated[int, typer.Option(help="The highest comes first; all others have 0.")],
    groups: Annotated[bool, typer.Option("--groups", help="The ids are of groups.")] = False,
    token_file: TokenFile = None,
    tls_root: TlsRoot = None,
) -> None:
    """Give samples a priority, for stages whose sampler is `priority`."""
    ids = _ids(samples)
    _at(where, token_file, tls_root).prioritise(priority, **{"groups" if groups else "samples": ids})
    typer.echo(f"{len(ids):,} {'groups' if groups else 'samples'} have priority {priority}")


@store_app.command()
def drop(
    where: Where,
    samples: Ids,
    *,
    reason: Annotated[str, typer.Option(help="Is kept in the ledger.")] = "operator",
    token_file: TokenFile = None,
    tls_root: TlsRoot = None,
) -> None:
    """End samples without training them; those that have ended are left alone."""
    ids = _ids(samples)
    _at(where, token_file, tls_root).drop(ids, reason=reason)
    typer.echo(f"none of {len(ids):,} is open any more")


@store_app.command()
def gone(
    where: Where,
    worker: Annotated[str, typer.Argument(help="Its name, as `stat` shows it.", show_default=False)],
    *,
    token_file: TokenFile = None,
    tls_root: TlsRoot = None,
) -> None:
    """Say that a worker has died: its samples come back at once, and an engine of this name serves nothing."""
    store = _at(where, token_file, tls_root)
    look = store.stat()
    held = sum(lease.samples for lease in look.leases if lease.worker == worker)
    if not held and worker not in look.counts.served:
        raise UserError(f"{worker} holds no samples and serves nothing: `asyncflow store stat` names those that do")
    store.gone(worker)
    if worker in look.counts.served:
        store.serve(worker, None)
    typer.echo(f"{held:,} samples came back")


@store_app.command()
def amend(
    where: Where,
    *,
    max_staleness: Annotated[int | None, typer.Option(min=0, help="The bound from now on.")] = None,
    last_version: Annotated[int | None, typer.Option(min=0, help="Number of the last step's version.")] = None,
    token_file: TokenFile = None,
    tls_root: TlsRoot = None,
) -> None:
    """Change terms while the store goes on."""
    if max_staleness is None and last_version is None:
        raise UserError("nothing would change: give --max-staleness or --last-version")
    _at(where, token_file, tls_root).amend(max_staleness=max_staleness, last_version=last_version)


def _at(where: str, token_file: Path | None, tls_root: Path | None) -> Store:
    store = _reach(where, token_file, tls_root)
    assert store is not None
    return store


def _reach(where: str, token_file: Path | None, tls_root: Path | None, *, needed: bool = True) -> Store | None:
    """A client of a store by its directory or location. `needed`: else None where nobody serves the directory.

    Raises UserError and StoreError.
    """
    from asyncflow.store.home import address_of, ledger_of, read_token
    from asyncflow.store.remote import connect

    location = where
    if "://" not in where:
        try:
            address = address_of(Path(where))
        except Unreachable:
            if needed:
                raise
            ledger_of(Path(where))
            return None
        location = address.location
        token_file = token_file or Path(address.token_file)
        tls_root = tls_root or (None if address.tls_root is None else Path(address.tls_root))
    if token_file is None:
        raise UserError(f"the token of {where} is needed: give --token-file, or the directory of the store")
    root = None if tls_root is None else _read(tls_root)
    return connect(location, token=read_token(token_file), tls_root=root, patience=PATIENCE)


def _ids(words: Sequence[str]) -> list[int]:
    ids: list[int] = []
    for word in words:
        first, dash, last = word.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"{word} is no sample: write numbers, such as 5 or 7-12")
        if len(found := range(int(first), int(last or first) + 1)) > MOST_IDS:
            raise UserError(f"{word} are {len(found):,} samples: name at most {MOST_IDS:,} at a time")
        ids += found
    return ids


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
