"""The commands about the jobs of an HTTP service (docs/client.md)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asyncflow.cli import service_tokens, service_view
from asyncflow.cli.service_output import (
    AWAY,
    PANEL,
    AsJson,
    Follow,
    JobId,
    JsonLines,
    connected,
    or_dash,
    plain,
    print_json,
)
from asyncflow.errors import UserError

if TYPE_CHECKING:
    from asyncflow.client import Client
    from asyncflow.client.models import Job

JOB = "job_"
"""How the id of a job begins."""
SHOWN_JOBS = 20

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
]


def is_job(target: str) -> bool:
    """Whether an argument means a job of the service, and not a run directory."""
    return target.startswith(JOB)


def login(
    url: Annotated[str, typer.Argument(help="Address of the service.", show_default=False)],
    *,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with the token (- is stdin); without it you are asked.")
    ] = None,
    tls_root: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate (PEM) of who signed the service's.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Send the token to another host without TLS: it can be read on the way.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Name the service that the other commands use, and give it a token. It is kept for you alone (mode 0600)."""
    from asyncflow.client import Client
    from asyncflow.client.connection import checked_url, is_loopback
    from asyncflow.client.login import Login, save

    address = checked_url(url)
    if address.scheme == "http" and not is_loopback(address.host) and not insecure:
        raise UserError(
            f"the token would be read on the way to {address.host}: write https://, or say --insecure where something "
            "else protects it"
        )
    root = None if tls_root is None else str(tls_root.resolve())
    token = _token(token_file)
    with Client(url, token, tls_root=root, patience=0) as client:
        me = client.me()
        path = save(Login(url=client.url, token=token, tls_root=root))
    if as_json:
        print_json(me)
    else:
        typer.echo(f"logged in to {client.url} as {plain(me.name)}, who may {me.scope}: kept in {path}")


def validate(
    config: Annotated[Path, typer.Argument(help="Configuration file (YAML).", show_default=False)],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print the plan that the service makes of a configuration, or what is wrong with it; nothing is started."""
    from asyncflow.config import read_values

    with connected() as client:
        found = client.validate(read_values(config, overrides or ()))
    if as_json:
        print_json(found)
    for key, text in found.plan.items() if not as_json else ():
        typer.echo(plain(f"{key:<12} {text}"))
    if not found.ok:
        raise UserError(plain("; ".join(one.message for one in found.errors)))


def submit(
    config: Annotated[
        Path | None,
        typer.Argument(help="Configuration file (YAML); not needed with --resume-from.", show_default=False),
    ] = None,
    *,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Without it, the configuration's.")] = None,
    priority: Annotated[int, typer.Option(min=0, max=100, help="The highest starts first.")] = 50,
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="To find it by; may be repeated.")
    ] = None,
    resume_from: Annotated[
        str | None, typer.Option(metavar="JOB", help="Go on where a job ended; --set says what changes.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="The same key and job are one job: makes it safe to call this again.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Tell what happens until it has ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give the service a job, and print its id."""
    from asyncflow.config import read_values

    if config is None and resume_from is None:
        raise UserError("there is nothing to run: name a configuration file, or a job with --resume-from")
    values = read_values(config, overrides or ())
    with connected(patience=AWAY if wait else None) as client:
        job = client.submit(
            values, name=name, priority=priority, labels=_labels(label or ()), resume_from=resume_from, key=key
        )
        if not wait:
            print_json(job) if as_json else typer.echo(job.id)
            return
        typer.echo(job.id, err=as_json)
        _wait(client, job.id, as_json=as_json, tell=not as_json, timeout=None)


def wait(
    job_id: JobId,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds; then the exit code is 2.")] = None,
    as_json: AsJson = False,
) -> None:
    """Wait until a job has ended: exit code 0 where it succeeded, 1 where not."""
    with connected(patience=AWAY) as client:
        _wait(client, job_id, as_json=as_json, tell=False, timeout=timeout)


def jobs(
    *,
    state: Annotated[list[str] | None, typer.Option(help="Only in this state; may be repeated.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="Only with this label; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = SHOWN_JOBS,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Tell what changes from now on in any job, until Ctrl-C.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON; with -f an object a line.")] = False,
) -> None:
    """List the jobs of the service."""
    from itertools import islice

    if follow:
        if state or label:
            raise UserError("-f tells of all jobs: leave --state and --label out")
        _follow_jobs(as_json=as_json)
        return
    with connected() as client:
        found = list(islice(client.jobs(states=state or (), labels=label or ()), limit))
    if as_json:
        print_json(found)
        return
    for job in found:
        typer.echo(_job_line(job))


def job(job_id: JobId, as_json: AsJson = False) -> None:
    """Say what a job is and how far it is."""
    with connected() as client:
        found = client.job(job_id)
    if as_json:
        print_json(found)
        return
    for line in _job_lines(found):
        typer.echo(plain(line))


def logs(
    job_id: JobId,
    *,
    follow: Follow = False,
    tail: Annotated[int | None, typer.Option(min=0, max=100_000, help="Only the last lines.")] = None,
    as_json: JsonLines = False,
) -> None:
    """Print what a job wrote to its terminal."""
    with connected(patience=AWAY if follow else None) as client:
        for text in client.follow_logs(job_id, tail=tail) if follow else client.logs(job_id, tail=tail):
            if as_json:
                print_json({"text": text})
            else:
                typer.echo(plain(text) if sys.stdout.isatty() else text, nl=False)


def events(
    job_id: JobId,
    *,
    follow: Follow = False,
    after: Annotated[str | None, typer.Option(metavar="ID", help="With -f: only what came after this event.")] = None,
    as_json: JsonLines = False,
) -> None:
    """Tell what happened to a job."""
    if after is not None and not follow:
        raise UserError("--after is where a stream goes on: give -f as well")
    with connected(patience=AWAY if follow else None) as client:
        for event in client.events(job_id, after=after) if follow else client.past_events(job_id):
            if as_json:
                print_json(event)
            else:
                level = "" if event.level == "info" else f"{event.level}: "
                typer.echo(plain(f"{event.created_at:%H:%M:%S}  {event.type:<10}  {level}{event.message}"))


def delete(job_id: JobId, as_json: AsJson = False) -> None:
    """Forget a job that has ended, and remove everything that it wrote."""
    with connected() as client:
        client.delete(job_id)
    if as_json:
        print_json({"id": job_id, "deleted": True})


def report(target: str, output: Path | None) -> Path:
    """Write the report of a job that has ended to a file: `<job>.html` where none is named. Raises UserError."""
    with connected() as client:
        page = client.report(target)
    path = output or Path(f"{target}.html")
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another --output") from None
    return path


def steer(target: str, action: str, *, as_json: bool) -> None:
    """`pause`, `resume` or `cancel` a job; the state in which it is now is printed."""
    with connected() as client:
        wishes: dict[str, Callable[[str], Job]] = {
            "pause": client.pause,
            "resume": client.resume,
            "cancel": client.cancel,
        }
        found = wishes[action](target)
    print_json(found) if as_json else typer.echo(found.state)


def change(target: str, setting: str, *, as_json: bool) -> None:
    """Set `max_staleness=N` or `priority=N` of a job."""
    key, _, value = setting.partition("=")
    if key not in ("max_staleness", "priority") or not (value.isascii() and value.isdecimal()):
        raise UserError(f"{setting} cannot be set of a job: write max_staleness=N or priority=N, N a whole number")
    with connected() as client:
        if key == "priority":
            found = client.change(target, priority=int(value))
        else:
            found = client.change(target, max_staleness=int(value))
    if as_json:
        print_json(found)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (login, validate, submit, wait, jobs, job, logs, events, delete):
        app.command(rich_help_panel=PANEL)(command)
    service_view.register(app)
    service_tokens.register(app)


def _wait(client: Client, job_id: str, *, as_json: bool, tell: bool, timeout: float | None) -> None:
    try:
        if tell:
            for event in client.events(job_id):
                typer.echo(plain(f"{event.created_at:%H:%M:%S}  {event.message}"))
        found = client.wait(job_id, timeout=float("inf") if timeout is None else timeout)
    except KeyboardInterrupt:
        typer.echo(f"{job_id} goes on: asyncflow wait {job_id}, or asyncflow cancel {job_id}", err=True)
        raise
    if as_json:
        print_json(found)
    else:
        typer.echo(plain(found.state if found.reason is None else f"{found.state}: {found.reason.message}"))
    raise typer.Exit(0 if found.state == "succeeded" else 1)


def _token(file: Path | None) -> str:
    """From a file, or typed. Never an argument: everybody on the host can read those."""
    if file is None:
        if not sys.stdin.isatty():
            raise UserError("nobody can be asked for the token here: give --token-file FILE (- is stdin)")
        return str(typer.prompt("token", hide_input=True)).strip()
    try:
        return (sys.stdin.read(4096) if str(file) == "-" else file.read_text(encoding="utf-8")).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as a token ({error}): name the file that holds it") from None


def _labels(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for label in given:
        name, equals, value = label.partition("=")
        if not equals:
            raise UserError(f"--label {label}: write NAME=VALUE")
        found[name] = value
    return found


def _follow_jobs(*, as_json: bool) -> None:
    with connected(patience=AWAY) as client:
        for change in client.follow_jobs():
            if as_json:
                print_json(change)
            else:
                typer.echo(f"{change.job_id}  deleted" if change.job is None else _job_line(change.job))


def _job_line(job: Job) -> str:
    step = "" if job.progress is None else f"{job.progress.step}/{job.progress.steps}"
    return f"{job.id}  {job.state:<10}  {job.priority:>3}  {step:>11}  {job.created_at:%m-%d %H:%M}  {job.name}"


def _job_lines(job: Job) -> Iterator[str]:
    yield f"{job.id}  {job.name}"
    yield f"state       {job.state}" + ("" if job.reason is None else f": {job.reason.message}")
    if job.progress is not None:
        eta = "" if job.progress.eta_seconds is None or job.ended else f", {job.progress.eta_seconds:.0f} s to go"
        yield f"step        {job.progress.step}/{job.progress.steps} after {job.progress.seconds:.0f} s{eta}"
    yield f"priority    {job.priority}"
    yield f"staleness   at most {or_dash(job.max_staleness)}"
    if job.labels:
        yield f"labels      {', '.join(f'{name}={value}' for name, value in job.labels.items())}"
    for what, at in (("created", job.created_at), ("started", job.started_at), ("finished", job.finished_at)):
        if at is not None:
            yield f"{what:<11} {at:%Y-%m-%d %H:%M:%S} UTC"
    if job.resume_from is not None:
        yield f"goes on     with {job.resume_from}"
    yield f"run         {job.run_dir}"
