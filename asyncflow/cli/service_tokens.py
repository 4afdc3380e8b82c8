"""The tokens of a service, as commands: who may call it, and no more (docs/client.md)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from asyncflow.cli.service_output import PANEL, AsJson, connected, plain, print_json

token_app = typer.Typer(help="The tokens of the service (scope admin).", no_args_is_help=True)


class Scope(StrEnum):
    """What a token lets do."""

    read = "read"
    submit = "submit"
    admin = "admin"


@token_app.command(name="list")
def list_(as_json: AsJson = False) -> None:
    """List the tokens, without their texts."""
    with connected() as client:
        found = list(client.tokens())
    if as_json:
        print_json(found)
        return
    for one in found:
        until = "for ever" if one.expires_at is None else f"until {one.expires_at:%Y-%m-%d %H:%M} UTC"
        typer.echo(plain(f"{one.id}  {one.scope:<6}  {until:<26}  {one.name}"))


@token_app.command()
def make(
    name: Annotated[str, typer.Argument(help="Whose it is, or what for.", show_default=False)],
    scope: Annotated[Scope, typer.Option(help="Each may what the one before may.")] = Scope.read,
    expires_in: Annotated[
        int | None, typer.Option(min=1, metavar="SECONDS", help="How long it holds; for ever when left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token and print it, this once."""
    with connected() as client:
        found = client.make_token(name, scope.value, expires_in=expires_in)
    print_json(found) if as_json else typer.echo(found.token)


@token_app.command()
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="TOKEN", help="Id of a token (tok_…).", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Take a token back: who has it is let in no more."""
    with connected() as client:
        client.revoke_token(token_id)
    if as_json:
        print_json({"id": token_id, "revoked": True})


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(token_app, name="token", rich_help_panel=PANEL)
