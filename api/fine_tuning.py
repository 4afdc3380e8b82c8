"""From a fine-tuning job of OpenAI's API to a configuration of AsyncFlow: docs/fine_tuning.md has it in tables."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from asyncflow_api.jobs.rows import FileRow
from asyncflow_api.problems import Problem
from asyncflow_api.schemas_openai import CreateFineTuningJob, Grader, Hyperparameters, NamedReward, StringCheck
from pydantic import TypeAdapter, ValidationError

from asyncflow.config import overlaid
from asyncflow.errors import ConfigError
from asyncflow.rewards.graders import Template

GENERATIONS: Final = 8
"""Completions of a problem at `compute_multiplier` 1."""
LEARNING_RATE: Final = 1e-5
"""At `learning_rate_multiplier` 1."""
BATCH: Final = 16
"""Problems of a step, if there are so many."""
MAX_NEW_TOKENS: Final = 512
EVALUATIONS: Final = 4
"""While a run goes on, where nobody says how often."""

HYPERPARAMETERS: Final = "method.reinforcement.hyperparameters"
GRADER: Final = "method.reinforcement.grader"
NO_GRADERS: Final[Mapping[str, str]] = {
    "python": "it is code, and this service runs no code that comes with a request",
    "text_similarity": "AsyncFlow has none of its measures",
    "score_model": "AsyncFlow runs no second model as a judge",
    "label_model": "AsyncFlow runs no second model as a judge",
    "multi": "its formula would have to be evaluated",
    "endpoint": "this service calls no addresses that come with a request",
}
OTHER_GRADER: Final = 'use string_check, or {"type": "asyncflow", "name": "last_number"} for a reward function by name'
SAID_ELSEWHERE: Final[Mapping[str, str]] = {
    "name": "suffix",
    "seed": "seed",
    "model": "model",
    "reward": GRADER,
    "data.train": "training_file",
    "data.eval": "validation_file",
    "data.eval_size": "validation_file",
    "train_batch_size": f"{HYPERPARAMETERS}.batch_size",
    "num_generations": f"{HYPERPARAMETERS}.compute_multiplier",
    "steps": f"{HYPERPARAMETERS}.n_epochs",
    "eval_every": f"{HYPERPARAMETERS}.eval_interval",
}
"""Setting → the parameter that says it here."""


def configuration(
    asked: CreateFineTuningJob,
    training: tuple[FileRow, Path],
    validation: tuple[FileRow, Path] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a job, and its request as it is told from then on, with nothing left to choose.

    Raises Problem that names the parameter.
    """
    method = _reinforcement(asked)
    grader = _grader(method.grader)
    files = [training[0]] if validation is None else [training[0], validation[0]]
    reward = _reward(grader, files)
    for key in sorted(_keys(asked.asyncflow) & SAID_ELSEWHERE.keys()):
        raise _wrong(f"asyncflow.{key}", f"say it with {SAID_ELSEWHERE[key]}")
    if not isinstance(asked.asyncflow.get("data", {}), Mapping):
        raise _wrong("asyncflow.data", "it is a section: give an object with the settings")
    chosen = _chosen(method.hyperparameters, lines=training[0].lines, evaluates=validation is not None)
    generations = _generations(chosen["compute_multiplier"])
    rate = asked.asyncflow.get("learning_rate", LEARNING_RATE)
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise _wrong("asyncflow.learning_rate", "it is the number that learning_rate_multiplier multiplies")
    seed = secrets.randbelow(1 << 31) if asked.seed is None else asked.seed
    data: dict[str, Any] = {"train": str(training[1])}
    if validation is not None:
        data |= {"eval": str(validation[1]), "eval_size": validation[0].distinct}
    own = {
        "name": asked.suffix or "fine-tuning",
        "seed": seed,
        "model": asked.model,
        "data": data,
        "reward": [reward],
        "num_generations": generations,
        "train_batch_size": chosen["batch_size"] * generations,
        "steps": math.ceil(chosen["n_epochs"] * training[0].lines / chosen["batch_size"]),
        "eval_every": chosen["eval_interval"] if validation is not None else 0,
        "learning_rate": rate * chosen["learning_rate_multiplier"],
    }
    request = {
        "model": asked.model,
        "training_file": asked.training_file,
        "validation_file": asked.validation_file,
        "suffix": asked.suffix,
        "seed": seed,
        "metadata": asked.metadata,
        "method": {
            "type": "reinforcement",
            "reinforcement": {"grader": grader.model_dump(), "hyperparameters": chosen},
        },
    }
    return overlaid({"max_new_tokens": MAX_NEW_TOKENS} | asked.asyncflow, own), request


def _reinforcement(asked: CreateFineTuningJob) -> Any:
    method = asked.method
    if asked.hyperparameters:
        raise _wrong("hyperparameters", f"they belong to supervised training: say them in {HYPERPARAMETERS}")
    if asked.integrations:
        raise _wrong("integrations", "there are none here: leave it out, GET /metrics has what Prometheus collects")
    if method is None or method.type != "reinforcement":
        kind = "supervised, as without a method," if method is None else method.type
        text = f'AsyncFlow trains by reinforcement, and not {kind}: send {{"type": "reinforcement", …}}'
        raise _wrong("method", text)
    for other in ("supervised", "dpo"):
        if getattr(method, other) is not None:
            raise _wrong(f"method.{other}", "leave it out: the type is reinforcement")
    if method.reinforcement is None:
        raise _wrong("method.reinforcement", "it is missing: give it a grader")
    return method.reinforcement


def _grader(values: Mapping[str, Any]) -> StringCheck | NamedReward:
    kind = values.get("type")
    if isinstance(kind, str) and kind in NO_GRADERS:
        raise _wrong(f"{GRADER}.type", f"{kind} is not taken, because {NO_GRADERS[kind]}: {OTHER_GRADER}")
    try:
        grader: StringCheck | NamedReward = TypeAdapter(Grader).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join((GRADER, *map(str, first["loc"][1:])))
        raise _wrong(where, f"{first['msg']}; {OTHER_GRADER}") from None
    return grader


def _reward(grader: StringCheck | NamedReward, files: list[FileRow]) -> dict[str, Any]:
    if isinstance(grader, NamedReward):
        return {"use": grader.name}
    options = {"input": grader.input, "reference": grader.reference, "operation": grader.operation}
    for name in ("input", "reference"):
        try:
            needed = Template(name, options[name]).columns
        except ConfigError as error:
            raise _wrong(f"{GRADER}.{name}", str(error).removeprefix("reward string_check: ")) from None
        for file in files:
            for column in sorted(needed - {*file.columns}):
                has = ", ".join(file.columns) or "none beside the prompt"
                text = f"not every line of {file.id} has {column} (all have: {has}): name another, or add it"
                raise _wrong(f"{GRADER}.{name}", text)
    return {"use": "string_check", "options": options}


def _chosen(asked: Hyperparameters, *, lines: int, evaluates: bool) -> dict[str, Any]:
    if asked.reasoning_effort != "default":
        raise _wrong(f"{HYPERPARAMETERS}.reasoning_effort", "AsyncFlow has no such setting: leave it out")
    if asked.eval_samples not in ("auto", 1):
        raise _wrong(f"{HYPERPARAMETERS}.eval_samples", "AsyncFlow evaluates one completion of a problem: leave it out")
    if asked.eval_interval != "auto" and not evaluates:
        raise _wrong(f"{HYPERPARAMETERS}.eval_interval", "there is nothing to evaluate: name a validation_file")
    epochs = 1 if asked.n_epochs == "auto" else asked.n_epochs
    batch = min(BATCH, lines) if asked.batch_size == "auto" else asked.batch_size
    every = max(1, math.ceil(epochs * lines / batch) // EVALUATIONS) if evaluates else "auto"
    return {
        "n_epochs": epochs,
        "batch_size": batch,
        "learning_rate_multiplier": _number(asked.learning_rate_multiplier),
        "compute_multiplier": _number(asked.compute_multiplier),
        "eval_interval": every if asked.eval_interval == "auto" else asked.eval_interval,
        "eval_samples": 1,
        "reasoning_effort": "default",
    }


def _number(asked: float | str) -> float:
    return 1.0 if isinstance(asked, str) else asked


def _generations(multiplier: float) -> int:
    found = round(GENERATIONS * multiplier)
    if found < 2:
        text = f"1 is {GENERATIONS} completions of each problem, of which there are at least 2: give 0.25 or more"
        raise _wrong(f"{HYPERPARAMETERS}.compute_multiplier", text)
    return found


def _keys(values: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Dotted keys, of sections as well."""
    found = set()
    for key, value in values.items():
        found.add(f"{prefix}{key}")
        if isinstance(value, Mapping):
            found |= _keys(value, f"{prefix}{key}.")
    return found


def parameter_of(key: str) -> str:
    """Which parameter of a request a setting comes from."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if found := SAID_ELSEWHERE.get(".".join(parts[:length])):
            return found
    return f"asyncflow.{key}"


def refused(errors: Iterator[tuple[str, str]]) -> Problem:
    """What is wrong with a configuration, by the parameters of the request."""
    found = [(f"body.{parameter_of(key)}", text) for key, text in errors]
    return Problem(400, "invalid_config", "; ".join(text for _, text in found), errors=found)


def _wrong(param: str, detail: str) -> Problem:
    return Problem(400, "invalid_value", f"{param}: {detail}", field=f"body.{param}")
