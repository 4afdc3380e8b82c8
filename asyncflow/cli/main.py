"""`asyncflow`: run, audit, report, serve.

Exit codes: 0 done; 1 the run failed, or the audit found a violation; 2 the user can fix it; 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from asyncflow.errors import AsyncFlowError, StoreError, UserError

app = typer.Typer(
    help="Asynchronous reinforcement learning of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

EXIT = {"finished": 0, "failed": 1, "stopped": 130}

RunDir = Annotated[Path, typer.Argument(help="Directory of a run.", show_default=False)]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="Configuration file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved plan and start nothing.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more about what goes wrong.")] = False,
) -> None:
    """Train a model."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    from asyncflow.cli.progress import Progress, print_plan
    from asyncflow.launch import launch, resolve
    from asyncflow.plan import plan

    ready = plan(resolve(config, overrides or ()))
    print_plan(ready)
    if dry_run:
        return
    with Progress(ready.config) as progress:
        result = launch(ready, listeners=[progress.listen], watch=progress.watch)
    progress.print_end(result)
    raise typer.Exit(EXIT[result.summary.outcome])


@app.command()
def audit(run_dir: RunDir) -> None:
    """Check a run's ledger: every sample accounted for, and none staler than the bound."""
    from asyncflow.report.audit import audit as audit_run
    from asyncflow.report.audit import render

    result = audit_run(run_dir)
    typer.echo(render(result))
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def report(run_dir: RunDir) -> None:
    """Write a run's report.html again."""
    from asyncflow.report.page import write_report

    typer.echo(write_report(run_dir))


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8765,
) -> None:
    """Start the HTTP service."""
    import uvicorn
    from asyncflow_api.app import create_app

    uvicorn.run(create_app(), host=host, port=port, log_level="warning")


def main() -> None:
    """Entry point: an error that was foreseen is one sentence on stderr, not a traceback."""
    try:
        app()
    except (UserError, StoreError) as error:
        _say(error)
        sys.exit(2)
    except AsyncFlowError as error:
        _say(error)
        sys.exit(1)


def _say(error: AsyncFlowError) -> None:
    print(f"asyncflow: {error}", file=sys.stderr)
