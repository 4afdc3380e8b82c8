"""What a store is made from: its terms, columns and stages, as a YAML file says them. `docs/store.md` has an example.

Columns that no stage writes are those of the prompts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import yaml
from pydantic import Field, ValidationError, model_validator

from asyncflow.config import Section
from asyncflow.errors import ConfigError
from asyncflow.store.events import LatePolicy, Opened
from asyncflow.store.frames import check_schema
from asyncflow.store.samplers import NUMBER
from asyncflow.store.schema import Order, Role, Schema, Stage

_NESTED = re.compile(r"(?P<kind>list|large_list|fixed_size_list)<(?:\w+: ?)?(?P<values>.+)>(?:\[(?P<size>\d+)\])?")


class StageSpec(Section):
    """As `Stage`."""

    name: str = Field(min_length=1)
    role: Role
    needs: tuple[str, ...]
    writes: tuple[str, ...] = ()
    sampler: Order = "fifo"
    max_times_leased: int = 1


RESPONSE = ("response_ids", "rollout_logprobs", "token_versions", "response", "finish_reason")
STAGES = (
    StageSpec(name="rollout", role="generate", needs=("prompt_ids",), writes=RESPONSE),
    StageSpec(
        name="reward",
        role="score",
        needs=("prompt", "prompt_columns", "response", "response_ids"),
        writes=("reward", "reward_parts"),
    ),
    StageSpec(
        name="actor_update",
        role="train",
        needs=("prompt_ids", "response_ids", "rollout_logprobs", "token_versions", "finish_reason", "reward"),
    ),
)
"""Those of a run without a KL term."""


class StoreSpec(Section):
    """A store that is still to be made. Terms are as in `Opened`."""

    train_batch_size: int = Field(default=128, ge=1)
    """Samples that one step consumes, whole groups."""
    num_generations: int = Field(default=8, ge=1)
    """Samples of one prompt (a group)."""
    max_staleness: int = Field(default=1, ge=0, le=NUMBER)
    last_version: int | None = Field(default=None, ge=0, le=NUMBER)
    min_group: int | None = Field(default=None, ge=1)
    """Samples of a group that are enough to train; None is two, or one where groups have one."""
    max_attempts: int = Field(default=3, ge=1)
    resumable: bool = False
    max_rows: int | None = Field(default=None, ge=1)
    max_bytes: int | None = Field(default=None, ge=1)
    late_samples: LatePolicy = "wait"
    group_timeout: float | None = Field(default=None, gt=0)
    columns: Mapping[str, str] | None = None
    """Name → Arrow type, such as `string` or `list<int32>`; None: those of a run."""
    token_columns: tuple[str, ...] | None = None
    """Columns with one value for each response token; None takes those of a run that there are."""
    stages: tuple[StageSpec, ...] = STAGES

    @model_validator(mode="after")
    def _batches_are_whole_groups(self) -> Self:
        if self.train_batch_size % self.num_generations:
            raise ValueError(
                f"train_batch_size ({self.train_batch_size}) must be a multiple of num_generations "
                f"({self.num_generations}), because a step trains whole groups"
            )
        if (self.min_group or 1) > self.num_generations:
            raise ValueError(f"min_group ({self.min_group}) can be at most num_generations ({self.num_generations})")
        if self.max_rows is not None and self.max_rows < self.train_batch_size:
            raise ValueError(
                f"max_rows ({self.max_rows}) must be at least train_batch_size ({self.train_batch_size}), else no step "
                "ever has its samples"
            )
        return self

    @property
    def terms(self) -> Opened:
        names = Opened.__struct_fields__
        values = {name: value for name, value in self if name in names and name != "min_group"}
        return Opened(**values, min_group=self.min_group or min(2, self.num_generations))

    def make_schema(self) -> Schema:
        """Raises ConfigError for stages and columns that do not fit together."""
        stages = [Stage(**dict(stage)) for stage in self.stages]
        if self.columns is None:
            return Schema(stages, token_columns=self.token_columns)
        columns = {name: arrow_type(text, column=name) for name, text in self.columns.items()}
        try:
            check_schema(pa.schema(columns))
        except ValueError as error:
            raise ConfigError(f"{error}: choose another") from None
        written = {name for stage in stages for name in stage.writes}
        prompts = [name for name in columns if name not in written]
        return Schema(stages, columns=columns, prompt_columns=prompts, token_columns=self.token_columns)


def arrow_type(text: str, *, column: str) -> pa.DataType:
    """An Arrow type by its name. Raises ConfigError."""
    nested = _NESTED.fullmatch(text.strip())
    if nested is not None and (nested["kind"] == "fixed_size_list") == (nested["size"] is not None):
        values = arrow_type(nested["values"], column=column)
        if nested["size"] is not None:
            return pa.list_(values, int(nested["size"]))
        return pa.list_(values) if nested["kind"] == "list" else pa.large_list(values)
    try:
        return pa.type_for_alias(text.strip())
    except ValueError:
        raise ConfigError(
            f"column {column} has the type {text!r}, which is none: write string, int64, float32, binary, list<int32> …"
        ) from None


def load_spec(path: Path) -> StoreSpec:
    """Read a YAML file. Raises ConfigError with one sentence that names the key and says what would be right."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path} that would say what the store is: name one that exists") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, not {type(values).__name__}")
    try:
        spec = StoreSpec.model_validate(values)
        spec.make_schema()  # whether it fits together is said here, with the file's name
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_sentence(item) for item in error.errors())) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return spec


def _sentence(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        names = (StageSpec if len(item["loc"]) > 1 else StoreSpec).model_fields
        near = difflib.get_close_matches(str(item["loc"][-1]), names, n=1)
        return f"{key} is not a setting; " + (f"did you mean {near[0]}?" if near else f"they are {', '.join(names)}")
    if item["type"] == "missing":
        return f"{key} is missing: set it"
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]} (it is {item['input']!r})" if key else str(message)


def difference(schema: Schema, terms: Opened, spec: StoreSpec) -> str | None:
    """The first thing in which a store that is there is not what a file says, as a sentence; None: there is none.

    Terms are those with which the store was made: what was changed since (`amend`) stays changed.
    """
    wanted, new = spec.terms, spec.make_schema()
    for name in Opened.__struct_fields__:
        if (there := getattr(terms, name)) != (says := getattr(wanted, name)):
            return f"{name} is {_said(there)} there, not {_said(says)}"
    for column in (*schema.columns, *new.columns):
        if (there := schema.columns.get(column)) != (says := new.columns.get(column)):
            return f"column {column} is {_said(there)} there, not {_said(says)}"
    for name in (*schema.stages, *new.stages):
        if (old := schema.stages.get(name)) is None or (stage := new.stages.get(name)) is None:
            return f"stage {name} is {'not there' if old is None else 'there, and not in the file'}"
        for field in fields(Stage):
            if (there := getattr(old, field.name)) != (says := getattr(stage, field.name)):
                return f"stage {name}: {field.name} is {_said(there)} there, not {_said(says)}"
    if schema.to_json() != new.to_json():
        return "columns, stages or token_columns have another order there"
    return None


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "nothing"
    return "not set" if value is None else str(value)
