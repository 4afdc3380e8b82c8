"""Start a run from Python or from the command line: load, plan, run, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncflow.config import Config, load_config, parse_config
from asyncflow.engines.base import LearnerEngine, RolloutEngine
from asyncflow.errors import RunFailed
from asyncflow.plan import Plan, plan
from asyncflow.report.page import write_report
from asyncflow.rundir import REPORT
from asyncflow.runtime.local import Summary, Watch, run_local
from asyncflow.runtime.metrics import Listener


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that has ended, and where everything about it is."""

    run_dir: Path
    summary: Summary
    error: BaseException | None = None
    """Why it failed."""

    @property
    def weights(self) -> Path | None:
        """Folder of the final weights in Hugging Face format."""
        return None if self.summary.weights is None else self.run_dir / self.summary.weights

    @property
    def report(self) -> Path:
        return self.run_dir / REPORT


def run(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    overrides: Sequence[str] = (),
    rollout: RolloutEngine | None = None,
    learner: LearnerEngine | None = None,
    reward: Callable[..., Any] | None = None,
) -> Run:
    """Train, and return when the last step is made.

    `config` is a YAML file, its values, or a `Config`; `overrides` are `a.b=value`. `rollout`, `learner` and `reward`
    take the place of what the configuration names. Raises UserError before anything starts, and RunFailed when the run
    fails; KeyboardInterrupt stops it in order and returns what there is. vLLM starts processes that import the main
    module again, so a script calls this under `if __name__ == "__main__":`.

    Example::

        run = asyncflow.run("configs/tiny.yaml", reward=lambda completions, **_: [float(len(c)) for c in completions])
        print(run.summary.outcome, run.report)
    """
    result = launch(plan(resolve(config, overrides), rollout=rollout, learner=learner, reward=reward))
    if result.summary.outcome == "failed":
        raise RunFailed(f"{result.summary.reason} (the run is in {result.run_dir})") from result.error
    return result


def resolve(config: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """A configuration in any of the forms in which it may be given. Raises ConfigError."""
    match config:
        case Config():
            return parse_config(config.model_dump(), overrides) if overrides else config
        case str() | Path():
            return load_config(config, overrides)
        case _:
            return parse_config(config, overrides)


def launch(ready: Plan, *, listeners: Sequence[Listener] = (), watch: Watch | None = None) -> Run:
    """Run a plan in this process and write its report, however it ends."""
    run_dir = ready.config.run_dir or new_run_dir(ready.config.name)
    summary, error = run_local(ready, run_dir, listeners=listeners, watch=watch, at_end=write_report)
    return Run(run_dir=run_dir, summary=summary, error=error)


def new_run_dir(name: str) -> Path:
    """`runs/<name>-<date>-<time>`, with a number behind it when there is one of that name already."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1, 1000):
        folder = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise RunFailed(f"there are too many runs named {stem}: set run_dir")
