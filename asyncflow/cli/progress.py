"""What a run shows in the terminal: a live table where there is one, a few lines where there is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from asyncflow.config import Config
from asyncflow.launch import Run
from asyncflow.plan import Plan, describe
from asyncflow.report.bottleneck import LEARNER, ROLLOUT, in_words
from asyncflow.runtime.local import Status
from asyncflow.workers.base import Worker

console = Console(highlight=False)

REFRESH = 0.25
"""Seconds between two looks at the store."""


def print_plan(plan: Plan) -> None:
    """The resolved plan, a line each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for label, text in describe(plan):
        table.add_row(label, Text(text))
    console.print(table)


def print_status(status: Mapping[str, Any]) -> None:
    """The status of a run, a line each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for label, value in status.items():
        if isinstance(value, Mapping):
            text = "  ".join(f"{name} {n}" for name, n in value.items())
        elif isinstance(value, list):
            text = ", ".join(map(str, value))
        else:
            text = f"{value:.1f}" if isinstance(value, float) else str(value)
        table.add_row(label.replace("_", " "), Text(text))
    console.print(table)


class Progress:
    """Listens to the metrics and looks at the store while a run goes on."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._began = time.monotonic()
        self._step: Mapping[str, Any] = {}
        self._phase = "loading the engines"
        self._status: Status | None = None
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def listen(self, line: Mapping[str, Any]) -> None:
        """Take one line of metrics."""
        if line["kind"] == "step":
            self._step = line
            self._phase = "training"
        elif line["kind"] == "served":
            self._phase = "training" if self._step else "evaluating"
        elif line["kind"] == "alarm":
            console.print(Text(f"{line['severity']}: {line['text']}", style="red"))
        elif line["kind"] == "eval":
            when = "before training" if line["step"] == 0 else f"after step {line['step']}"
            console.print(
                f"accuracy {when}: [bold]{line['eval/accuracy']:.3f}[/bold] on {line['eval/size']} held-out problems"
            )

    def watch(self, status: Callable[[], Status]) -> Worker:
        """The worker that keeps the account on the screen up to date."""
        return _Watch(status, self._look)

    def print_end(self, run: Run) -> None:
        """How it ended, and where everything is."""
        summary = run.summary
        minutes, seconds = divmod(int(summary.seconds), 60)
        what = f"{summary.outcome} after {summary.steps} steps, {minutes} min {seconds:02d} s"
        console.print(what if summary.reason is None else Text(f"{what}: {summary.reason}"))
        if summary.accuracy_before is not None and summary.accuracy_after is not None:
            gain = summary.accuracy_after - summary.accuracy_before
            console.print(
                f"held-out accuracy {summary.accuracy_before:.3f} → [bold]{summary.accuracy_after:.3f}[/bold] "
                f"({gain:+.3f})"
            )
        if summary.bottleneck is not None:
            console.print(Text(summary.bottleneck))
        if run.weights is not None:
            console.print(Text(f"weights  {run.weights}"))
        console.print(Text(f"report   {run.report}"))

    def _look(self, status: Status) -> None:
        self._status = status

    def _render(self) -> Group:
        step, config, status = self._step, self._config, self._status
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        elapsed = int(time.monotonic() - self._began)
        table.add_row("step", f"{step.get('step', 0)}/{config.steps}   {elapsed // 60}:{elapsed % 60:02d}")
        if not step and (status is None or not status.counts.admitted):
            table.add_row("", self._phase)
        if step:
            table.add_row("reward", f"{step['reward']:.3f} ± {step['reward_std']:.3f}")
            mean, worst = step["sample/staleness_mean"], step["sample/staleness_max"]
            table.add_row("staleness", f"mean {mean:.2f}, max {worst}, bound {config.max_staleness}")
            table.add_row("rollout", f"{step['rollout/generated_tok_s']:.0f} tokens/s")
        if status is not None:
            table.add_row("samples", "  ".join(f"{name} {n}" for name, n in status.counts.states.items()))
            table.add_row("waiting", who_waits(status))
        return Group(table)


def who_waits(status: Status) -> str:
    """In words: which side waits for which, at this moment."""
    sides = (("the learner", status.doing.get(LEARNER)), ("generation", status.doing.get(ROLLOUT)))
    waits = [f"{side} waits for {in_words(doing.cause)}" for side, doing in sides if doing and doing.cause]
    return "; ".join(waits) or "nobody"


class _Watch(Worker):
    name = "progress"

    def __init__(self, status: Callable[[], Status], look: Callable[[Status], None]) -> None:
        self._status = status
        self._look = look
        self._pause = threading.Event()

    def turn(self) -> None:
        self._look(self._status())
        self._pause.wait(REFRESH)
