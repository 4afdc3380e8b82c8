"""What the run of a job says, as commands: its queue, samples, workers and checkpoints (docs/client.md)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncflow.cli.service_output import PANEL, AsJson, JobId, connected, or_dash, plain, print_json

if TYPE_CHECKING:
    from asyncflow.client.models import Queue, Worker

SHOWN_SAMPLES = 20
WIDEST = 60
"""Characters of a text in a line."""

WorkerName = Annotated[
    str, typer.Argument(metavar="WORKER", help="Its name, as `workers` shows it.", show_default=False)
]

queue_app = typer.Typer(help="The queue of a job's run.", no_args_is_help=True)
sample_app = typer.Typer(help="The samples of a job's run.", no_args_is_help=True)


@queue_app.command()
def top(
    job_id: JobId,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show the queue again and again until Ctrl-C or the end of the run; once, where the output is no terminal."""
    with connected() as client:
        found = client.queue(job_id)
        if as_json:
            print_json(found)
            return
        if not sys.stdout.isatty() or not found.live:
            for line in _queue_lines(found):
                typer.echo(plain(line))
            return

        from rich.live import Live
        from rich.text import Text

        with Live(Text("\n".join(map(plain, _queue_lines(found)))), auto_refresh=False) as live:
            while found.live:
                time.sleep(every)
                found = client.queue(job_id)
                live.update(Text("\n".join(map(plain, _queue_lines(found)))), refresh=True)


@sample_app.command()
def trace(
    job_id: JobId,
    sample: Annotated[int, typer.Argument(min=0, help="Id of the sample.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Tell the whole life of one sample."""
    with connected() as client:
        found = client.sample(job_id, sample)
    if as_json:
        print_json(found)
        return
    typer.echo(f"sample {found.id} of group {found.group_id}: {plain(found.state)}, attempts {found.attempts}")
    reward = "not scored" if found.reward is None else f"{found.reward:.4g}"
    typer.echo(
        f"reward {reward}, staleness {or_dash(found.staleness)}, policy {plain(', '.join(found.versions)) or '-'}"
    )
    begin = found.events[0].at if found.events else None
    for moment in found.events:
        seconds = 0.0 if begin is None else (moment.at - begin).total_seconds()
        typer.echo(plain(f"{moment.lsn:>8}  {seconds:>9.3f}  {moment.type:<11}  {moment.message}"))
    for label, text in (("prompt", found.prompt), ("response", found.response)):
        typer.echo(f"{label}:\n{plain(text or '')}")


def samples(
    job_id: JobId,
    *,
    state: Annotated[str | None, typer.Option(help="Where they are in their life, such as trained.")] = None,
    group: Annotated[int | None, typer.Option(min=0, help="Of this group.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="That this step consumed.")] = None,
    min_reward: Annotated[float | None, typer.Option(help="With at least this reward.")] = None,
    max_reward: Annotated[float | None, typer.Option(help="With at most this reward.")] = None,
    text: Annotated[str | None, typer.Option(help="With this in their texts.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the latest first.")] = SHOWN_SAMPLES,
    as_json: AsJson = False,
) -> None:
    """List the samples of a job's run; all conditions hold."""
    from itertools import islice

    with connected() as client:
        found = client.samples(
            job_id, state=state, group_id=group, step=step, min_reward=min_reward, max_reward=max_reward, text=text
        )
        shown = list(islice(found, limit))
    if as_json:
        print_json(shown)
        return
    for one in shown:
        reward = "-" if one.reward is None else f"{one.reward:.4g}"
        words = f"{' '.join((one.response or '').split()):.{WIDEST}}"
        line = f"{one.id:>8}  {one.state:<12}  step {or_dash(one.step):>5}  staleness {or_dash(one.staleness):>2}"
        typer.echo(plain(f"{line}  reward {reward:>7}  {words}".rstrip()))


def workers(job_id: JobId, as_json: AsJson = False) -> None:
    """Say what every worker of a live run does and what it waits for."""
    with connected() as client:
        found = client.workers(job_id)
    if as_json:
        print_json(found)
        return
    for worker in found:
        typer.echo(plain(_worker_line(worker)))


def drain(job_id: JobId, worker: WorkerName, as_json: AsJson = False) -> None:
    """Let a worker start nothing new and finish what it has."""
    with connected() as client:
        found = client.drain(job_id, worker)
    print_json(found) if as_json else typer.echo(plain(_worker_line(found)))


def undrain(job_id: JobId, worker: WorkerName, as_json: AsJson = False) -> None:
    """Let a worker that was drained go on."""
    with connected() as client:
        found = client.undrain(job_id, worker)
    print_json(found) if as_json else typer.echo(plain(_worker_line(found)))


def timeline(
    job_id: JobId,
    seconds: Annotated[float, typer.Option(min=0.001, max=120, help="How far back.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Tell what every worker did lately; of a run that has ended, in its last seconds."""
    with connected() as client:
        found = client.timeline(job_id, seconds=seconds)
    if as_json:
        print_json(found)
        return
    for span in found:
        took = (span.end - span.start).total_seconds()
        line = f"{span.start:%H:%M:%S.%f}  {took:>8.3f} s  {span.worker:<12}  {span.activity:<7}  {span.cause or ''}"
        typer.echo(plain(line.rstrip()))


def checkpoints(job_id: JobId, as_json: AsJson = False) -> None:
    """List the complete checkpoints of a job's run, oldest first."""
    with connected() as client:
        found = list(client.checkpoints(job_id))
    if as_json:
        print_json(found)
        return
    for one in found:
        typer.echo(f"{one.id}  version {one.version}  {one.bytes / 1e6:,.1f} MB  {one.created_at:%m-%d %H:%M:%S}")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (samples, workers, drain, undrain, timeline, checkpoints):
        app.command(rich_help_panel=PANEL)(command)
    app.add_typer(queue_app, name="queue", rich_help_panel=PANEL)
    app.add_typer(sample_app, name="sample", rich_help_panel=PANEL)


def _worker_line(worker: Worker) -> str:
    shares = f"{worker.shares.busy:.0%} busy, {worker.shares.idle:.0%} idle, {worker.shares.blocked:.0%} blocked"
    waits = "" if worker.waits_for is None else f"  waits for {worker.waits_for}"
    return f"{worker.name:<12}  {'drained' if worker.drained else worker.activity:<7}  {shares}{waits}"


def _queue_lines(queue: Queue) -> Iterator[str]:
    counts = queue.counts
    yield "live" if queue.live else "ended"
    yield f"versions    learner {queue.learner}, served by {_listed(queue.served)}, oldest {or_dash(queue.oldest)}"
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
