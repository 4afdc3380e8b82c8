"""The commands about the jobs of an HTTP service (docs/client.md)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncflow.errors import UserError

if TYPE_CHECKING:
    from asyncflow.client import Client
    from asyncflow.client.models import Job, Queue

JOB = "job_"
"""How the id of a job begins."""
AWAY = 120.0
"""Seconds for which a command that follows something goes on without the service."""
SHOWN_JOBS = 20

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
JsonLines = Annotated[bool, typer.Option("--json", help="As JSON, an object a line.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")]

queue_app = typer.Typer(help="The queue of a job's run.", no_args_is_help=True)
sample_app = typer.Typer(help="The samples of a job's run.", no_args_is_help=True)


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
        _print_json(me)
    else:
        typer.echo(f"logged in to {client.url} as {_plain(me.name)}, who may {me.scope}: kept in {path}")


def submit(
    config: Annotated[
        Path | None,
        typer.Argument(help="Configuration file (YAML); not needed with --resume-from.", show_default=False),
    ] = None,
    *,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
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
    with _client(patience=AWAY if wait else None) as client:
        job = client.submit(
            values, name=name, priority=priority, labels=_labels(label or ()), resume_from=resume_from, key=key
        )
        if not wait:
            _print_json(job) if as_json else typer.echo(job.id)
            return
        typer.echo(job.id, err=as_json)
        _wait(client, job.id, as_json=as_json, tell=not as_json, timeout=None)


def wait(
    job_id: JobId,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds; then the exit code is 2.")] = None,
    as_json: AsJson = False,
) -> None:
    """Wait until a job has ended: exit code 0 where it succeeded, 1 where not."""
    with _client(patience=AWAY) as client:
        _wait(client, job_id, as_json=as_json, tell=False, timeout=timeout)


def jobs(
    *,
    state: Annotated[list[str] | None, typer.Option(help="Only in this state; may be repeated.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="Only with this label; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = SHOWN_JOBS,
    as_json: AsJson = False,
) -> None:
    """List the jobs of the service."""
    from itertools import islice

    with _client() as client:
        found = list(islice(client.jobs(states=state or (), labels=label or ()), limit))
    if as_json:
        _print_json(found)
        return
    for job in found:
        step = "" if job.progress is None else f"{job.progress.step}/{job.progress.steps}"
        typer.echo(
            f"{job.id}  {job.state:<10}  {job.priority:>3}  {step:>11}  {job.created_at:%m-%d %H:%M}  {job.name}"
        )


def job(job_id: JobId, as_json: AsJson = False) -> None:
    """Say what a job is and how far it is."""
    with _client() as client:
        found = client.job(job_id)
    if as_json:
        _print_json(found)
        return
    for line in _job_lines(found):
        typer.echo(_plain(line))


def logs(
    job_id: JobId,
    *,
    follow: Follow = False,
    tail: Annotated[int | None, typer.Option(min=0, max=100_000, help="Only the last lines.")] = None,
    as_json: JsonLines = False,
) -> None:
    """Print what a job wrote to its terminal."""
    with _client(patience=AWAY if follow else None) as client:
        for text in client.follow_logs(job_id, tail=tail) if follow else client.logs(job_id, tail=tail):
            if as_json:
                _print_json({"text": text})
            else:
                typer.echo(_plain(text) if sys.stdout.isatty() else text, nl=False)


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
    with _client(patience=AWAY if follow else None) as client:
        for event in client.events(job_id, after=after) if follow else client.past_events(job_id):
            if as_json:
                _print_json(event)
            else:
                level = "" if event.level == "info" else f"{event.level}: "
                typer.echo(_plain(f"{event.created_at:%H:%M:%S}  {event.type:<10}  {level}{event.message}"))


@queue_app.command()
def top(
    job_id: JobId,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show the queue again and again until Ctrl-C or the end of the run; once, where the output is no terminal."""
    with _client() as client:
        found = client.queue(job_id)
        if as_json:
            _print_json(found)
            return
        if not sys.stdout.isatty() or not found.live:
            for line in _queue_lines(found):
                typer.echo(_plain(line))
            return

        from rich.live import Live
        from rich.text import Text

        with Live(Text("\n".join(map(_plain, _queue_lines(found)))), auto_refresh=False) as live:
            while found.live:
                time.sleep(every)
                found = client.queue(job_id)
                live.update(Text("\n".join(map(_plain, _queue_lines(found)))), refresh=True)


@sample_app.command()
def trace(
    job_id: JobId,
    sample: Annotated[int, typer.Argument(min=0, help="Id of the sample.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Tell the whole life of one sample."""
    with _client() as client:
        found = client.sample(job_id, sample)
    if as_json:
        _print_json(found)
        return
    typer.echo(f"sample {found.id} of group {found.group_id}: {_plain(found.state)}, attempts {found.attempts}")
    reward = "not scored" if found.reward is None else f"{found.reward:.4g}"
    typer.echo(f"reward {reward}, staleness {_or(found.staleness)}, policy {_plain(', '.join(found.versions)) or '-'}")
    begin = found.events[0].at if found.events else None
    for moment in found.events:
        seconds = 0.0 if begin is None else (moment.at - begin).total_seconds()
        typer.echo(_plain(f"{moment.lsn:>8}  {seconds:>9.3f}  {moment.type:<11}  {moment.message}"))
    for label, text in (("prompt", found.prompt), ("response", found.response)):
        typer.echo(f"{label}:\n{_plain(text or '')}")


def steer(target: str, action: str) -> None:
    """`pause`, `resume` or `cancel` a job; the state in which it is now is printed."""
    with _client() as client:
        wishes: dict[str, Callable[[str], Job]] = {
            "pause": client.pause,
            "resume": client.resume,
            "cancel": client.cancel,
        }
        found = wishes[action](target)
    typer.echo(found.state)


def change(target: str, setting: str) -> None:
    """Set `max_staleness=N` or `priority=N` of a job."""
    key, _, value = setting.partition("=")
    if key not in ("max_staleness", "priority") or not (value.isascii() and value.isdecimal()):
        raise UserError(f"{setting} cannot be set of a job: write max_staleness=N or priority=N, N a whole number")
    with _client() as client:
        if key == "priority":
            client.change(target, priority=int(value))
        else:
            client.change(target, max_staleness=int(value))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (login, submit, wait, jobs, job, logs, events):
        app.command(rich_help_panel=PANEL)(command)
    app.add_typer(queue_app, name="queue", rich_help_panel=PANEL)
    app.add_typer(sample_app, name="sample", rich_help_panel=PANEL)


PANEL = "Jobs of a service (asyncflow serve)"


@contextmanager
def _client(patience: float | None = None) -> Iterator[Client]:
    from asyncflow.client import Client

    with Client.from_login(patience=5.0 if patience is None else patience) as client:
        yield client


def _wait(client: Client, job_id: str, *, as_json: bool, tell: bool, timeout: float | None) -> None:
    try:
        if tell:
            for event in client.events(job_id):
                typer.echo(_plain(f"{event.created_at:%H:%M:%S}  {event.message}"))
        found = client.wait(job_id, timeout=float("inf") if timeout is None else timeout)
    except KeyboardInterrupt:
        typer.echo(f"{job_id} goes on: asyncflow wait {job_id}, or asyncflow cancel {job_id}", err=True)
        raise
    if as_json:
        _print_json(found)
    else:
        typer.echo(_plain(found.state if found.reason is None else f"{found.state}: {found.reason.message}"))
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


def _job_lines(job: Job) -> Iterator[str]:
    yield f"{job.id}  {job.name}"
    yield f"state       {job.state}" + ("" if job.reason is None else f": {job.reason.message}")
    if job.progress is not None:
        eta = "" if job.progress.eta_seconds is None or job.ended else f", {job.progress.eta_seconds:.0f} s to go"
        yield f"step        {job.progress.step}/{job.progress.steps} after {job.progress.seconds:.0f} s{eta}"
    yield f"priority    {job.priority}"
    yield f"staleness   at most {_or(job.max_staleness)}"
    if job.labels:
        yield f"labels      {', '.join(f'{name}={value}' for name, value in job.labels.items())}"
    for what, at in (("created", job.created_at), ("started", job.started_at), ("finished", job.finished_at)):
        if at is not None:
            yield f"{what:<11} {at:%Y-%m-%d %H:%M:%S} UTC"
    if job.resume_from is not None:
        yield f"goes on     with {job.resume_from}"
    yield f"run         {job.run_dir}"


def _queue_lines(queue: Queue) -> Iterator[str]:
    counts = queue.counts
    yield "live" if queue.live else "ended"
    yield f"versions    learner {queue.learner}, served by {_listed(queue.served)}, oldest {_or(queue.oldest)}"
    yield f"bound       max_staleness {queue.max_staleness}, room for {queue.capacity:,} samples"
    yield (
        f"samples     {counts.admitted:,} admitted, {counts.trained:,} trained, "
        f"{sum(counts.dropped.values()):,} dropped, {counts.quarantined:,} quarantined, {counts.open:,} open"
    )
    yield f"open        {_listed({state: n for state, n in queue.states.items() if n})}"
    yield f"staleness   in flight {_listed(queue.staleness.in_flight)}; in queue {_listed(queue.staleness.in_queue)}"
    yield f"data        {queue.bytes / 1e6:,.1f} MB"
    for stage in queue.stages:
        yield (
            f"stage       {stage.name}: {stage.ready:,} ready, {stage.leased:,} taken, "
            f"{stage.in_per_second:.1f} in/s, {stage.out_per_second:.1f} out/s"
        )
    if queue.bottleneck is not None:
        yield f"held up     {queue.bottleneck.text}"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items()) or "none"


def _or(value: object) -> str:
    return "-" if value is None else str(value)


def _print_json(value: Any) -> None:
    import msgspec

    typer.echo(msgspec.json.encode(value).decode())


def _plain(text: str) -> str:
    """Text that others wrote, without what would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
