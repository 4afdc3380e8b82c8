"""The application behind a socket: uvicorn, with what it says when it is ready."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Final

import uvicorn
from asyncflow_api.connections import bounded
from asyncflow_api.jobs.folder import write_text
from asyncflow_api.settings import Settings
from fastapi import FastAPI

ADDRESS: Final = "service.json"
"""In the home: where the service is, for other commands on this host."""
MOST_CONNECTIONS: Final = 1000
GOODBYE: Final = 2
"""Seconds that open streams get when the service ends."""


class Server(uvicorn.Server):
    """Says where it is once it can be called."""

    def __init__(self, config: uvicorn.Config, settings: Settings, certificate: Path | None) -> None:
        super().__init__(config)
        self._settings = settings
        self._certificate = certificate

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        url, home = url_of(self._settings), self._settings.home
        address = {
            "url": url,
            "pid": os.getpid(),
            "token_file": str(self._settings.token_file),
            "tls_root": None if self._certificate is None else str(self._certificate.resolve()),
        }
        write_text(home / ADDRESS, json.dumps(address, indent=2) + "\n")
        print(f"AsyncFlow is served at {url}\nthe first token is in {self._settings.token_file}", flush=True)


def make_server(
    app: FastAPI, settings: Settings, *, certificate: Path | None = None, key: Path | None = None
) -> Server:
    """A server that is not started yet."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=bounded(settings.head_timeout),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GOODBYE,
        h11_max_incomplete_event_size=1 << 16,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    return Server(config, settings, certificate)


def url_of(settings: Settings) -> str:
    """Where people on this host call it."""
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(settings.host, settings.host)
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls else 'http'}://{shown}:{settings.port}"
