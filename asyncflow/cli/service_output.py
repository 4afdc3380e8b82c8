"""What the commands about a service have in common: the client of the login, and how values are printed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from asyncflow.client import Client

PANEL = "Jobs of a service (asyncflow serve)"
AWAY = 120.0
"""Seconds for which a command that follows something goes on without the service."""

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
JsonLines = Annotated[bool, typer.Option("--json", help="As JSON, an object a line.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")]


@contextmanager
def connected(patience: float | None = None) -> Iterator[Client]:
    """The service of the login. `patience`: seconds for which it may be away, 5 where nothing is said."""
    from asyncflow.client import Client

    with Client.from_login(patience=5.0 if patience is None else patience) as client:
        yield client


def print_json(value: Any) -> None:
    """A value of the client as one line of JSON."""
    import msgspec

    typer.echo(msgspec.json.encode(value).decode())


def plain(text: str) -> str:
    """Text that others wrote, without what would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def or_dash(value: object) -> str:
    """A value, or `-` where there is none."""
    return "-" if value is None else str(value)
