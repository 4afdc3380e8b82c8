"""`asyncflow`: start a run and go on with one; watch, steer, audit, replay, report and export it; doctor, bench, serve;
`asyncflow store`: the transfer queue by itself; `login`, `submit`, `jobs` and others: the jobs of an HTTP service.

Exit codes: 0 done; 1 the run or the job failed, or the audit found a violation; 2 the user can fix it; 3 the service
does not answer, or fails; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asyncflow.cli import service
from asyncflow.cli.serve import serve
from asyncflow.cli.store import store_app
from asyncflow.errors import AsyncFlowError, ControlError, ServiceError, ServiceUnreachable, StoreError, UserError

if TYPE_CHECKING:
    from asyncflow.plan import Plan
    from asyncflow.runtime.local import GoingOn

app = typer.Typer(
    help="Asynchronous reinforcement learning of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(store_app, name="store")
app.command()(serve)
service.register(app)

EXIT = {"finished": 0, "failed": 1, "stopped": 130}

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved plan and start nothing.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more about what goes wrong.")]
AsJson = Annotated[bool, typer.Option("--json", help="As one JSON object.")]
RunDir = Annotated[Path, typer.Argument(help="Directory of a run.", show_default=False)]
Target = Annotated[
    str,
    typer.Argument(
        metavar="RUN_DIR|JOB",
        help="Directory of a run, or the id of a job (job_…) of the service; ./job_… is a directory.",
        show_default=False,
    ),
]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="Configuration file (YAML).", show_default=False)],
    overrides: Overrides = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Train a model."""
    _log(verbose)
    from asyncflow.launch import resolve
    from asyncflow.plan import plan

    _carry_out(plan(resolve(config, overrides or ())), None, dry_run)


@app.command()
def resume(
    target: Target,
    *,
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option("--from", help="Step of the checkpoint; without it, the last.")] = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    as_json: Annotated[bool, typer.Option("--json", help="Of a job: as one JSON object.")] = False,
) -> None:
    """Go on with a run that was stopped or killed, from its last checkpoint; or with a job that was paused."""
    if service.is_job(target):
        if overrides or step is not None or dry_run:
            raise UserError(
                "a paused job goes on as it is: leave --set, --from and --dry-run out; a job that has ended goes on "
                f"with asyncflow submit --resume-from {target}"
            )
        service.steer(target, "resume", as_json=as_json)
        return
    if as_json:
        raise UserError("--json says what a job is: leave it out for a run directory")
    _log(verbose)
    from asyncflow.launch import prepare_resume

    ready, at = prepare_resume(Path(target), overrides=overrides or (), step=step)
    _carry_out(ready, at, dry_run)


def _carry_out(ready: Plan, at: GoingOn | None, dry_run: bool) -> None:
    from asyncflow.cli.progress import Progress, print_plan
    from asyncflow.launch import launch

    print_plan(ready)
    if dry_run:
        return
    with Progress(ready.config) as progress:
        result = launch(ready, going_on=at, listeners=[progress.listen], watch=progress.watch)
    progress.print_end(result)
    raise typer.Exit(EXIT[result.summary.outcome])


def _log(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


@app.command()
def status(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Say where a run is that goes on."""
    from asyncflow.cli.progress import print_status
    from asyncflow.runtime.control import ControlClient

    values = ControlClient(run_dir).status()
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    else:
        print_status(values)


@app.command()
def pause(target: Target, as_json: AsJson = False) -> None:
    """Let a run or a job start nothing new; what it has is finished and kept."""
    if service.is_job(target):
        service.steer(target, "pause", as_json=as_json)
        return
    from asyncflow.runtime.control import ControlClient

    ControlClient(Path(target)).pause()
    _done(target, "pause", as_json)


@app.command(name="resume-run")
def resume_run(run_dir: RunDir) -> None:
    """Let a run that was paused go on (a job: resume)."""
    from asyncflow.runtime.control import ControlClient

    ControlClient(run_dir).resume()


@app.command()
def stop(run_dir: RunDir) -> None:
    """Stop a run in order, with a checkpoint; `asyncflow resume` goes on with it."""
    from asyncflow.runtime.control import ControlClient

    ControlClient(run_dir).stop()


@app.command()
def cancel(target: Target, as_json: AsJson = False) -> None:
    """End a job; a run is stopped in order, as by stop."""
    if service.is_job(target):
        service.steer(target, "cancel", as_json=as_json)
        return
    stop(Path(target))
    _done(target, "cancel", as_json)


@app.command(name="set")
def set_(
    target: Target,
    setting: Annotated[
        str,
        typer.Argument(help="max_staleness=N; of a job also priority=N", metavar="KEY=VALUE", show_default=False),
    ],
    as_json: AsJson = False,
) -> None:
    """Change max_staleness of a run or a job while it goes on, or the priority of a job."""
    if service.is_job(target):
        service.change(target, setting, as_json=as_json)
        return
    from asyncflow.runtime.control import ControlClient

    key, _, value = setting.partition("=")
    if key != "max_staleness" or not value.lstrip("-").isdecimal():
        raise ControlError(f"{setting} cannot be set while a run goes on: write max_staleness=N, N a whole number")
    ControlClient(Path(target)).set_max_staleness(int(value))
    _done(target, setting, as_json)


def _done(target: str, wish: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"run_dir": target, "done": wish}))


@app.command()
def audit(run_dir: RunDir) -> None:
    """Check a run's ledger: every sample accounted for, and none staler than the bound."""
    from asyncflow.report.audit import audit as audit_run
    from asyncflow.report.audit import render

    result = audit_run(run_dir)
    typer.echo(render(result))
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def replay(
    run_dir: RunDir,
    *,
    until: Annotated[
        int | None, typer.Option(metavar="LSN", help="Number of the event; without it, the last one.")
    ] = None,
    since: Annotated[int | None, typer.Option("--from", metavar="LSN", help="First event to list.")] = None,
    events: Annotated[bool, typer.Option("--events", help="List the events, in the order of their decisions.")] = False,
    last: Annotated[int, typer.Option(min=0, help="How many events before it are listed otherwise.")] = 10,
    only_digest: Annotated[bool, typer.Option("--digest", help="Print only a digest of the whole state.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Decide everything again and compare.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Show what a run looked like after any of its decisions, from its ledger alone."""
    from asyncflow.cli.replay import show

    show(run_dir, until=until, since=since, events=events, last=last, digest=only_digest, check=check, as_json=as_json)


@app.command()
def report(
    target: Target,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of a job: where to write it, instead of JOB.html.")
    ] = None,
) -> None:
    """Write a run's report.html again, or fetch that of a job that has ended; prints where it is."""
    if service.is_job(target):
        typer.echo(service.report(target, output))
        return
    if output is not None:
        raise UserError("the report of a run lies in its directory: leave --output out")
    from asyncflow.report.page import write_report

    typer.echo(write_report(Path(target)))


@app.command()
def export(
    run_dir: RunDir,
    file: Annotated[Path, typer.Argument(help="File to write: .parquet or .jsonl.", show_default=False)],
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Columns to write; all of them when left out.")
    ] = None,
) -> None:
    """Write the samples that a run trained and skipped to one file."""
    from asyncflow.report.export import export as export_samples

    names = None if columns is None else [name.strip() for name in columns.split(",")]
    rows = export_samples(run_dir, file, names)
    typer.echo(f"{rows:,} samples in {file}")


@app.command()
def doctor(
    vllm: Annotated[bool, typer.Option("--vllm", help="Start a real vLLM as well (half a minute).")] = False,
) -> None:
    """Look at this machine and make a small run, to see whether everything works."""
    from asyncflow.cli.doctor import print_findings
    from asyncflow.doctor import examine

    raise typer.Exit(1 if print_findings(examine(vllm=vllm)) else 0)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure: `bench overlap --json FILE`, `bench weights`, …; without a name all, one after the other."""
    from asyncflow.cli.bench import benchmarks

    benchmarks().main(context.args)


def main() -> None:
    """Entry point: an error that was foreseen is one sentence on stderr, not a traceback."""
    try:
        app()
    except ServiceError as error:
        _say(error)
        # No answer, or one that says that it is not the caller's fault.
        sys.exit(3 if isinstance(error, ServiceUnreachable) or (error.status or 0) >= 500 else 2)
    except (UserError, StoreError) as error:
        _say(error)
        sys.exit(2)
    except AsyncFlowError as error:
        _say(error)
        sys.exit(1)


def _say(error: AsyncFlowError) -> None:
    print(f"asyncflow: {error}", file=sys.stderr)
