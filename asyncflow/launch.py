"""Start a run, or go on with one, from Python or from the command line: load, plan, run, report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncflow.config import Config, load_config, overlaid, parse_config
from asyncflow.engines.base import LearnerEngine, RolloutEngine, ScorerEngine
from asyncflow.errors import CheckpointError, ConfigError, RunFailed
from asyncflow.placement import without_lost_cores
from asyncflow.plan import Plan, plan
from asyncflow.report.audit import Audit, audit
from asyncflow.report.bottleneck import diagnose
from asyncflow.report.page import write_report
from asyncflow.rundir import CONFIG, METRICS, REPORT
from asyncflow.runtime.checkpoint import checkpoints
from asyncflow.runtime.local import GoingOn, Summary, Watch, held, run_local
from asyncflow.runtime.metrics import Listener, read_metrics

logger = logging.getLogger(__name__)


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
    reference: ScorerEngine | None = None,
    reward: Callable[..., Any] | None = None,
) -> Run:
    """Train, and return when the last step is made.

    `config` is a YAML file, its values, or a `Config`; `overrides` are `a.b=value`. `rollout`, `learner`, `reference`
    and `reward` take the place of what the configuration names. Raises UserError before anything starts, and RunFailed
    when the run fails; KeyboardInterrupt stops it in order and returns what there is.

    Example::

        run = asyncflow.run("configs/tiny.yaml", reward=lambda completions, **_: [float(len(c)) for c in completions])
        print(run.summary.outcome, run.report)
    """
    ready = plan(resolve(config, overrides), rollout=rollout, learner=learner, reference=reference, reward=reward)
    return _raise_if_failed(launch(ready, listeners=(_log_alarm,)))


def _raise_if_failed(result: Run) -> Run:
    if result.summary.outcome == "failed":
        raise RunFailed(f"{result.summary.reason} (the run is in {result.run_dir})") from result.error
    return result


RESUMABLE = (
    "steps",
    "max_staleness",
    "learning_rate",
    "eval_every",
    "max_failed_share",
    "reward_timeout",
    "stall_timeout",
    "save_samples",
    "placement",
    "stream",
    "attestation",
    "rollout.max_concurrency",
    "rollout.timeout",
    "rollout.cores",
    "rollout.options",
    "learner.cores",
    "learner.micro_batch_tokens",
    "learner.grad_clip",
    "learner.options",
    "reference.cores",
    "reference.micro_batch_tokens",
    "reference.options",
    "weights",
    "checkpoint",
)
"""What may change when a run goes on. Everything else decides what its samples are, or what its checkpoint fits."""


def resume(
    run_dir: str | Path,
    *,
    overrides: Sequence[str] = (),
    step: int | None = None,
    rollout: RolloutEngine | None = None,
    learner: LearnerEngine | None = None,
    reference: ScorerEngine | None = None,
    reward: Callable[..., Any] | None = None,
) -> Run:
    """Go on with a run that was stopped or killed, from its last checkpoint (or that of `step`), to its last step.

    Generated samples that are not trained yet are kept; steps after the checkpoint are made again with the samples that
    they had consumed. `overrides` may change the settings in `RESUMABLE` (`steps=80` makes a finished run longer).
    Raises as `run` does, and CheckpointError; a refusal leaves the run as it was.
    """
    made: dict[str, Any] = {"rollout": rollout, "learner": learner, "reference": reference, "reward": reward}
    ready, at = prepare_resume(run_dir, overrides=overrides, step=step, **made)
    return _raise_if_failed(launch(ready, going_on=at, listeners=(_log_alarm,)))


def prepare_resume(
    run_dir: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    step: int | None = None,
    **made: Any,
) -> tuple[Plan, GoingOn]:
    """The plan of a run that goes on, and where it does. `changes` are nested values, `overrides` those of `resume`.

    Changes nothing; raises what `resume` refuses.
    """
    run_dir = Path(run_dir)
    values = _recorded_config(run_dir)
    account = audit(run_dir)
    # It may have been set while the run went on.
    values |= {"max_staleness": account.terms.max_staleness}
    config = _resumed_config(run_dir, values, overlaid(values, changes or {}), overrides)
    with held(run_dir):
        at = _choose_checkpoint(run_dir, account, step)
        if at.step >= config.steps:
            raise ConfigError(
                f"{run_dir} has made all of its {config.steps} steps: to go on, raise them (--set steps=N)"
            )
        ready = plan(config, **made)
        if (checkpoint := at.checkpoint) is not None:
            checkpoint.verify()
            if checkpoint.problems != ready.problems.digest:
                raise ConfigError(
                    f"the training prompts of {config.data.train} are not those that the run began with: "
                    "restore them, or start a new run"
                )
    return ready, at


def _recorded_config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / CONFIG
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no run in {run_dir}: name a run directory") from None
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read ({error}): restore it") from error
    return values


def _resumed_config(
    run_dir: Path, was: Mapping[str, Any], values: Mapping[str, Any], overrides: Sequence[str]
) -> Config:
    """`values` with `overrides`, where only what is allowed differs from what the run `was`. Raises ConfigError."""
    before = parse_config(was)
    after = parse_config(values, overrides).model_copy(update={"run_dir": run_dir})
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    for key in sorted(_different(old, new)):
        if key != "run_dir" and not any(key == name or key.startswith(f"{name}.") for name in RESUMABLE):
            raise ConfigError(
                f"{key} cannot change when a run goes on: start a new run, or change only {', '.join(RESUMABLE)}"
            )
    if not before.checkpoint.every:
        raise ConfigError(
            f"{run_dir} keeps no checkpoints (checkpoint.every is 0), so it cannot go on: start a new run"
        )
    if not after.checkpoint.every:
        raise ConfigError("checkpoint.every must stay above 0 in a run that goes on")
    return without_lost_cores(after)


def _different(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys whose values differ."""
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _different(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}"


def _choose_checkpoint(run_dir: Path, account: Audit, step: int | None) -> GoingOn:
    """The last checkpoint that the ledger knows, or the one of `step`."""
    there = {
        checkpoint.version.n: checkpoint
        for checkpoint in checkpoints(run_dir)
        if checkpoint.version.n <= account.learner.n and checkpoint.lsn <= account.events
    }
    if step is None:
        step = max(there, default=0)
    if step and step not in there:
        steps = ", ".join(map(str, sorted(there))) or "none"
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}: the steps that it has one of are {steps}")
    return GoingOn(step=step, checkpoint=there.get(step))


def _log_alarm(line: Mapping[str, Any]) -> None:
    if line["kind"] == "alarm":
        logger.warning("%s: %s", line["alarm"], line["text"])


def resolve(config: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """A configuration in any of the forms in which it may be given. Raises ConfigError."""
    match config:
        case Config():
            return parse_config(config.model_dump(), overrides) if overrides else config
        case str() | Path():
            return load_config(config, overrides)
        case _:
            return parse_config(config, overrides)


def launch(
    ready: Plan,
    *,
    going_on: GoingOn | None = None,
    listeners: Sequence[Listener] = (),
    watch: Watch | None = None,
) -> Run:
    """Run a plan in this process and write its report, however it ends."""
    run_dir = ready.config.run_dir or new_run_dir(ready.config.name)
    summary, error = run_local(
        ready,
        run_dir,
        going_on=going_on,
        listeners=listeners,
        watch=watch,
        diagnose=lambda folder: _bottleneck(folder, ready.config),
        at_end=write_report,
    )
    return Run(run_dir=run_dir, summary=summary, error=error)


def _bottleneck(run_dir: Path, config: Config) -> str | None:
    steps = read_metrics(run_dir / METRICS, "step")
    found = diagnose(steps, max_staleness=config.max_staleness, update=config.weights.update)
    return None if found is None else found.text


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
