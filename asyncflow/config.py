"""The configuration of a run: names, types, units and defaults. Everything that follows from something else is derived.

Shapes and names are checked here. What needs knowledge of engines, data or algorithms is checked by `asyncflow.plan`.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from asyncflow.errors import ConfigError
from asyncflow.types import KLEstimator, UpdateMode

FOREIGN_NAMES: Mapping[str, str] = {
    "n_samples_per_prompt": "num_generations",
    "group_size": "num_generations",
    "n": "num_generations",
    "max_head_offpolicyness": "max_staleness",
    "max_off_policy_steps": "max_staleness",
    "staleness_threshold": "max_staleness",
    "max_completion_length": "max_new_tokens",
    "max_response_length": "max_new_tokens",
    "generate_max_len": "max_new_tokens",
    "rollout_batch_size": "train_batch_size",
    "lr": "learning_rate",
    "actor_learning_rate": "learning_rate",
    "max_steps": "steps",
    "total_training_steps": "steps",
    "reward_funcs": "reward",
    "pretrain": "model",
    "model_name_or_path": "model",
    "num_iterations": "epochs_per_step",
    "max_grad_norm": "grad_clip",
    "beta": "kl_coef",
    "init_kl_coef": "kl_coef",
    "kl_loss_coef": "kl_coef",
    "kl_ctl": "kl_coef",
    "kl_loss_type": "kl_estimator",
    "kl_penalty": "kl_estimator",
    "ref_model": "reference.model",
    "colocate": "placement",
}
"""What other frameworks call our settings: used only to say the right name when one of these is met."""


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RewardConfig(Section):
    """One reward function."""

    use: str
    """Short name (`last_number`), or import path `package.module:function`."""
    weight: float = 1.0
    """Factor of this function's value in the sum."""
    options: dict[str, Any] = {}
    """Settings of a function that is made from some (`string_check`); the others take none."""


class DataConfig(Section):
    """Where prompts come from."""

    train: str
    """`reasoning_gym:<task>`, or the path of a .jsonl or .parquet file with a `prompt` column."""
    eval: str | None = None
    """Held-out problems from elsewhere; None holds out `eval_size` problems of `train`, apart by content."""
    eval_size: int = Field(default=0, ge=0)
    """Problems that are held out and never trained on; 0 is no evaluation. Accuracy is the share of them for which the
    first reward function gives at least 1."""
    size: int = Field(default=20_000, ge=1)
    """Items that a generator makes; files give what they have."""
    options: dict[str, Any] = {}
    """Settings of the generator (`min_terms`, …)."""
    template: str | None = None
    """User message made from the item's columns, such as `What is {expression}?`; None takes the prompt as it is."""
    shuffle: bool = True


class RolloutConfig(Section):
    """The rollout engine."""

    engine: str = "vllm"
    """Short name (`vllm`, `fake`) or import path `package.module:Class`."""
    max_concurrency: int = Field(default=64, ge=1)
    """Samples that are generated at once."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Tokens of the longest sequence, prompt and response; None takes the model's, at most 4096."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """In which weights are served."""
    timeout: float | None = Field(default=None, gt=0, le=3000)
    """Seconds in the engine after which a completion is cancelled and tried again, at most three times; None derives
    half a second a token, at least 600 and at most 3000."""
    cores: tuple[int, ...] | None = None
    """CPU cores of the engine; None derives them (on a machine without GPU: the upper half)."""
    options: dict[str, Any] = {}
    """Passed to the engine as they are."""


class LearnerConfig(Section):
    """The learner engine."""

    engine: str = "torch"
    """Short name (`torch`, `fake`) or import path `package.module:Class`."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """In which forward and backward compute; master weights, accumulated gradients and optimizer state are fp32."""
    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Prompt and response tokens of one forward and backward pass; at least one group is always taken."""
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest norm of a step's gradient."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0; constant after that."""
    cores: tuple[int, ...] | None = None
    """CPU cores of the learner; None derives them (on a machine without GPU: the lower half)."""
    options: dict[str, Any] = {}
    """Passed to the engine as they are."""


class ReferenceConfig(Section):
    """The frozen policy that the KL term compares with; there is one only where `kl_coef` is not 0."""

    engine: str | None = None
    """Short name (`torch`, `fake`) or import path `package.module:Class`; None takes the one that reads the learner's
    kind of weights."""
    model: str | None = None
    """Short name, local folder, or Hub id, with the tokenizer of `model`; None is `model`: the initial weights."""
    dtype: Literal["bf16", "fp32"] | None = None
    """In which it computes; None is the learner's, so that the KL of the initial policy is 0."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Prompt and response tokens of one forward pass; None is the learner's."""
    cores: tuple[int, ...] | None = None
    """CPU cores of the reference; None is the learner's."""
    options: dict[str, Any] = {}
    """Passed to the engine as they are."""


class WeightsConfig(Section):
    """How new weights reach the rollout engine."""

    update: UpdateMode = "boundary"
    """`boundary`: stop starting, finish what runs, swap. `in_flight`: swap in the middle of sequences."""
    keep: int = Field(default=2, ge=1)
    """Published versions that stay in memory."""


class StoreConfig(Section):
    """Where the samples are between admission and training."""

    max_rows: int | None = Field(default=None, ge=1)
    """Samples that may be open at once; None leaves that to `max_staleness`. At least `train_batch_size`."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Bytes of samples above which no prompt is admitted. As many as one step takes are let in all the same."""
    durability: Literal["memory", "process", "power"] | None = None
    """What the samples survive: nothing, the death of every process, a power cut. None is `process` where there are
    checkpoints, which need it, and `memory` elsewhere."""


class CheckpointConfig(Section):
    """What a run that was stopped or killed can go on from."""

    every: int | None = Field(default=None, ge=0)
    """Steps between two checkpoints, beside the one at the end; 0 keeps none, None is 20 if the learner engine can."""
    keep: int = Field(default=1, ge=1)
    """Checkpoints that stay. Each has 12 bytes a parameter on disk."""


class AttestationConfig(Section):
    """Does the engine serve the weights that it says? Its log-probs are compared with the learner's, see
    docs/attestation.md."""

    samples: int = Field(default=8, ge=0)
    """Completions of each policy version that are compared; 0 is no attestation."""
    on_mismatch: Literal["resync", "stop", "warn"] = "resync"
    """Load the weights again and stop when the next version is wrong as well; stop at once; or only say so."""


class Config(Section):
    """One run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    run_dir: Path | None = None
    """Where the run is written; None makes `runs/<name>-<date>-<time>`."""
    seed: int = Field(default=0, ge=0)
    deterministic: bool = False
    """Gradients are accumulated in sample order. With `max_staleness: 0` and a deterministic engine, the run is
    repeatable to the bit."""

    model: str
    """Short name (`smollm2-135m`, `tiny`), local folder, or Hub id."""
    data: DataConfig
    reward: tuple[RewardConfig, ...]
    """Functions whose weighted sum is the reward."""

    algorithm: Literal["grpo"] = "grpo"
    num_generations: int = Field(default=8, ge=2)
    """Samples of one prompt (a group)."""
    train_batch_size: int = Field(ge=1)
    """Samples that one step consumes (B), whole groups."""
    steps: int = Field(ge=1)
    """Steps of the run; each publishes one policy version."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer updates into which a step's samples are split."""
    epochs_per_step: int = Field(default=1, ge=1)
    """How often a step goes over its samples."""
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(default=1.0, gt=0)
    learning_rate: float = Field(gt=0)
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """PPO: the ratio π_θ/π_prox is clipped below at 1 − clip_low."""
    clip_high: float = Field(default=0.2, ge=0)
    """PPO: … and above at 1 + clip_high."""
    importance_cap: float | None = Field(default=5.0, gt=0)
    """The behaviour ratio π_prox/μ of a token weighs its loss up to this value; None does not truncate."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the reference policy; 0 has none, and no reference runs."""
    kl_in: Literal["loss", "reward"] = "loss"
    """`loss`: added to every token's loss. `reward`: its sum over the response is subtracted from the reward, so that
    the advantage has it (then hardly any group has `zero_variance`)."""
    kl_estimator: KLEstimator | None = None
    """How KL is estimated from the tokens that were sampled (`asyncflow.algorithms.kl` has the formulas, and what each
    is good for); None is k3 in the loss, as in GRPO, and k1 in the reward, as in RLHF with PPO."""
    zero_variance: Literal["skip", "keep", "refill"] = "skip"
    """Groups whose rewards are all equal: consumed without being computed, trained, or replaced."""
    max_refill: int | None = Field(default=None, ge=0)
    """Groups that `zero_variance: refill` replaces in one step, before it skips; None is one step's worth."""
    truncated: Literal["keep", "mask"] = "keep"
    """Completions cut at `max_new_tokens`: trained like the others, or masked out of the loss."""

    max_staleness: int = Field(default=1, ge=0)
    """η: the learner may be at most this many policy versions ahead of the oldest token that it trains. 0 is
    synchronous and on-policy."""
    late_samples: Literal["wait", "drop", "requeue", "mask"] = "wait"
    """`wait`: steps are made in admission order, and wait for who is slow, so that nothing comes too late. The others
    let a step take whatever is complete, and what that makes older than `max_staleness` is dropped, generated again
    (`requeue`), or trained without its tokens that are too old (`mask`)."""
    sampler: Literal["fifo", "freshest", "priority"] = "fifo"
    """Which complete groups a step takes first: in admission order, of the newest weights, or of the highest priority.
    With `late_samples: wait` it decides only the order within the step."""
    group_timeout: float | None = Field(default=None, gt=0)
    """Seconds for which the learner waits for the missing samples of a group, once it has asked for them; then they are
    dropped (`straggler`), and the group is trained without them if two are left. None waits as long as it takes."""
    max_failed_share: float = Field(default=0.2, ge=0, le=1)
    """The run stops when more than this share of the finished samples is quarantined."""
    reward_timeout: float = Field(default=120.0, gt=0)
    """Seconds that one call of a reward function may take. After that its completions are tried again one by one."""
    stall_timeout: float = Field(default=900.0, gt=0)
    """Seconds without any progress after which an alarm says who waits for whom; after four times as long (and at
    least twice `rollout.timeout`) the run stops."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations while the run goes on; 0 evaluates before and after only."""
    save_samples: bool = True
    """What every step trained and skipped is written to `samples/` in the run directory, in Parquet."""

    placement: Literal["separated", "colocated"] = "separated"
    """`separated`: engine and learner have their own cores or GPUs and work at the same time. `colocated`: they have
    the same ones and take turns; the engine generates nothing while the learner trains."""
    stream: bool = True
    """The learner computes gradients of a group as soon as it is scored; false (and colocated) waits until all groups
    of its step are there. With `max_staleness: 0` and false, generation and training alternate."""

    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    reference: ReferenceConfig = ReferenceConfig()
    weights: WeightsConfig = WeightsConfig()
    store: StoreConfig = StoreConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    attestation: AttestationConfig = AttestationConfig()

    @field_validator("reward", mode="before")
    @classmethod
    def _reward_forms(cls, value: object) -> object:
        """`reward: name` and `reward: [name, {use: …, weight: …}]` mean the same as the full form."""
        items = value if isinstance(value, list | tuple) else [value]
        if not items:
            raise ValueError("name at least one reward function")
        return tuple({"use": item} if isinstance(item, str) else item for item in items)

    @model_validator(mode="after")
    def _batches_are_whole_groups(self) -> Self:
        if self.train_batch_size % self.num_generations:
            raise ValueError(
                f"train_batch_size ({self.train_batch_size}) must be a multiple of num_generations "
                f"({self.num_generations}), because a step trains whole groups"
            )
        if self.groups_per_step % self.updates_per_step:
            raise ValueError(
                f"updates_per_step ({self.updates_per_step}) must divide the {self.groups_per_step} groups of a step"
            )
        return self

    @model_validator(mode="after")
    def _a_step_fits_into_the_store(self) -> Self:
        if self.store.max_rows is not None and self.store.max_rows < self.train_batch_size:
            raise ValueError(
                f"store.max_rows ({self.store.max_rows}) must be at least train_batch_size ({self.train_batch_size}), "
                "or there would never be a step"
            )
        if self.store.durability == "memory" and self.checkpoint.every:
            raise ValueError(
                "a checkpoint needs samples that survive: set store.durability to process or power, or "
                "checkpoint.every to 0"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_has_problems(self) -> Self:
        if (self.eval_every or self.data.eval) and not self.data.eval_size:
            raise ValueError("evaluation needs data.eval_size: set how many problems it uses")
        return self

    @model_validator(mode="after")
    def _kl_has_a_gradient_where_it_needs_one(self) -> Self:
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator k1 has no gradient on average, so it does nothing in the loss: use k2, k3 or k3+, "
                "or kl_in: reward"
            )
        if self.kl_in == "reward" and self.kl_estimator == "k3+":
            raise ValueError("kl_estimator k3+ is k3 with another gradient, and a reward has none: use k1, k2 or k3")
        return self

    @property
    def kl(self) -> KLEstimator:
        """The estimator of the KL term, filled in."""
        return self.kl_estimator or ("k3" if self.kl_in == "loss" else "k1")

    @property
    def groups_per_step(self) -> int:
        return self.train_batch_size // self.num_generations


def parse_config(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Check plain values, after overrides of the form `a.b=value` (values are YAML).

    Raises ConfigError with one sentence that names the key and says what would be right.
    """
    try:
        return Config.model_validate(_overridden(values, overrides))
    except ValidationError as error:
        fields = [(".".join(map(str, item["loc"])), _sentence(item)) for item in error.errors()]
        raise ConfigError("; ".join(sentence for _, sentence in fields), fields=fields) from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides, as `parse_config` does. Raises ConfigError."""
    return parse_config(read_values(path), overrides)


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, those of `above` where both have one."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = overlaid(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_values(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a YAML file (None: of an empty one) after overrides, unchecked: for who runs them elsewhere. Raises
    ConfigError."""
    if path is None:
        return _overridden({}, overrides)
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}: name one that exists") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, not {type(values).__name__}")
    return _overridden(values, overrides)


def _overridden(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    changed = copy.deepcopy(dict(values))
    for override in overrides:
        _apply_override(changed, override)
    return changed


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {override}: write key=value, such as --set rollout.engine=fake")
    *parents, last = dotted.strip().split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {parent} is not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: {text!r} is not a YAML value") from None


def _sentence(item: Any) -> str:
    """One pydantic error as a sentence for the person who wrote the file."""
    location = [part for part in item["loc"] if isinstance(part, str)]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"{key} is not a setting{_suggestion(location)}"
    if item["type"] == "missing":
        return f"{key} is missing: set it"
    message = item["msg"].removeprefix("Value error, ")
    if not key:
        return str(message)
    return f"{key}: {message[0].lower()}{message[1:]} (it is {item['input']!r})"


def _suggestion(location: Sequence[str]) -> str:
    section: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = section.model_fields[part].annotation
        section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else RewardConfig
    name = location[-1]
    if name in FOREIGN_NAMES:
        return f"; here it is called {FOREIGN_NAMES[name]}"
    near = difflib.get_close_matches(name, section.model_fields, n=1)
    return f"; did you mean {near[0]}?" if near else f"; the settings here are {', '.join(section.model_fields)}"
