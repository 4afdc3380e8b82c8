"""Requests and responses of the routes that speak OpenAI's fine-tuning and files API, as they are on the wire.

Source: https://platform.openai.com/docs/api-reference/fine-tuning and …/files. Times are seconds since the epoch.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Item = TypeVar("Item")
Auto = Literal["auto"]
FileId = Annotated[str, StringConstraints(max_length=64)]


class Request(BaseModel):
    """Base of what clients send: unknown keys are refused, and so is text where a number belongs."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True)


class Reply(BaseModel):
    """Base of what they are answered. What stands below a field is in the specification as well."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class StringCheck(Request):
    """Compares text: `asyncflow.rewards.graders`."""

    type: Literal["string_check"]
    name: Annotated[str, StringConstraints(max_length=100)]
    input: Annotated[str, StringConstraints(max_length=10_000)]
    reference: Annotated[str, StringConstraints(max_length=10_000)]
    operation: Literal["eq", "ne", "like", "ilike"]


class NamedReward(Request):
    """One of AsyncFlow's reward functions, which OpenAI does not have."""

    type: Literal["asyncflow"]
    name: Annotated[str, StringConstraints(max_length=200)]
    """As in `reward` of a configuration: `last_number`, `math_verify`, or an import path that is allowed."""


Grader = Annotated[StringCheck | NamedReward, Field(discriminator="type")]


class Hyperparameters(Request):
    """`auto` and what is left out are chosen here, and told in the answer."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    """Problems of one step."""
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"
    compute_multiplier: Auto | Annotated[float, Field(gt=0, le=64)] = "auto"
    """1 is 8 completions of each problem."""
    eval_interval: Auto | Annotated[int, Field(ge=1, le=1_000_000)] = "auto"
    """Steps."""
    eval_samples: Auto | int = "auto"
    reasoning_effort: str = "default"


class Reinforcement(Request):
    grader: dict[str, Any]
    """`Grader`; looked at apart, to say more of those that are not taken."""
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)


class Method(Request):
    type: Literal["supervised", "dpo", "reinforcement"]
    reinforcement: Reinforcement | None = None
    supervised: dict[str, Any] | None = None
    dpo: dict[str, Any] | None = None


MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]


class CreateFineTuningJob(Request):
    """A model to train."""

    model: Annotated[str, StringConstraints(max_length=500)]
    """As in a configuration: a short name, or a Hub id."""
    training_file: FileId
    validation_file: FileId | None = None
    """Evaluated and never trained."""
    method: Method | None = None
    suffix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    """The job's name."""
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    metadata: Metadata | None = None
    integrations: list[dict[str, Any]] | None = None
    hyperparameters: dict[str, Any] | None = None
    asyncflow: dict[str, Any] = Field(default_factory=dict)
    """Settings of a configuration for which OpenAI has no word, such as `max_new_tokens` or `max_staleness`."""


class JobError(Reply):
    code: str
    message: str
    param: str | None = None


class FineTuningJob(Reply):
    """A job, as OpenAI has it."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobError | None
    fine_tuned_model: str | None
    """A name; the weights are in the last checkpoint."""
    finished_at: int | None
    hyperparameters: dict[str, Any]
    model: str
    organization_id: str = "asyncflow"
    result_files: list[str] = Field(default_factory=list)
    seed: int
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    trained_tokens: int | None = None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[dict[str, Any]] = Field(default_factory=list)
    metadata: dict[str, str] | None
    method: dict[str, Any]
    user_provided_suffix: str | None


class FineTuningEvent(Reply):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointMetrics(Reply):
    step: int


class FineTuningCheckpoint(Reply):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int


class FileObject(Reply):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class DeletedFile(Reply):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class OpenAIList(Reply, Generic[Item]):
    """A piece of a list; the next one begins `after` the id of its last item."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Reply):
    error: ErrorDetail
