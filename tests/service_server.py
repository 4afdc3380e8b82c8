"""The HTTP service with settings that the command line does not offer: a JSON object of them is the one argument."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

from asyncflow_api.app import create_app
from asyncflow_api.server import make_server
from asyncflow_api.settings import Settings


def main() -> None:
    values = json.loads(sys.argv[1])
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    settings = Settings(**{**values, "home": Path(values["home"]), "port": listener.getsockname()[1]})
    make_server(create_app(settings), settings).run(sockets=[listener])


if __name__ == "__main__":
    main()
