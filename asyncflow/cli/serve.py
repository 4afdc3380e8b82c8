"""`asyncflow serve`: the HTTP service."""

from __future__ import annotations

import logging
import socket
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from asyncflow.errors import UserError


def serve(
    *,
    home: Annotated[
        Path, typer.Option(metavar="DIR", help="Database, token, and everything of the jobs; made when not there.")
    ] = Path("asyncflow-home"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8765,
    name: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="Another name by which clients call it; may be repeated.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=1024, help="Jobs that run at once.")] = 1,
    allow_import: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="Module or package that configurations may name; may be repeated."),
    ] = None,
    allow_path: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder from which configurations may name files; may be repeated."),
    ] = None,
    allow_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Further setting of vLLM that configurations may choose; may be repeated."),
    ] = None,
    allow_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Models of the Hub that configurations may name, such as Qwen/*; may be repeated."
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key (PEM).")] = None,
    insecure_listen: Annotated[
        bool, typer.Option("--insecure-listen", help="Listen for other hosts without TLS: tokens can be read.")
    ] = False,
) -> None:
    """Start the HTTP service: it runs jobs, which go on when it ends."""
    from asyncflow_api.app import create_app
    from asyncflow_api.jobs.service import Jobs
    from asyncflow_api.server import make_server
    from asyncflow_api.settings import Settings

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if (tls_cert is None) != (tls_key is None):
        raise UserError("--tls-cert and --tls-key go together: give both")
    for file in (tls_cert, tls_key):
        if file is not None and not file.is_file():
            raise UserError(f"there is no file {file}: name a PEM file")
    listener = _listener(host, port)
    settings = Settings(
        home=home.resolve(),
        host=host,
        port=listener.getsockname()[1],
        names=tuple(name or ()),
        tls=tls_cert is not None,
        slots=slots,
        allow_imports=tuple(allow_import or ()),
        allow_paths=tuple(path.resolve() for path in allow_path or ()),
        allow_options=tuple(allow_option or ()),
        allow_models=tuple(allow_model or ()),
    )
    if not (settings.loopback or settings.tls or insecure_listen):
        listener.close()
        raise UserError(
            f"{host} can be reached from other hosts, and tokens would be read on the way: give --tls-cert and "
            "--tls-key, listen on 127.0.0.1, or say --insecure-listen where something else protects it"
        )
    with closing(listener), closing(Jobs(settings)) as jobs:
        server = make_server(create_app(settings, jobs=jobs), settings, certificate=tls_cert, key=tls_key)
        server.run(sockets=[listener])


def _listener(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"nobody can listen on {host}:{port} ({error.strerror}): choose another one") from None
