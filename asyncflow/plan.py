"""From a configuration to everything that can be known before an engine starts. Every front end calls `plan` first.

Whatever is impossible is refused here, in a sentence: a model or data file that is missing, a prompt that does not fit,
a reward function that cannot work on these data, an engine that cannot do what the configuration asks of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from asyncflow.config import Config, RewardConfig
from asyncflow.data import Problems, Tokenizer, check_lengths, load_problems, tokenise
from asyncflow.engines.base import LearnerEngine, ResumableLearner, RolloutEngine, ScorerEngine
from asyncflow.engines.models import ModelInfo, describe_model, load_tokenizer, resolve_model
from asyncflow.engines.registry import SCORER_OF_WEIGHTS, learner_class, rollout_class, scorer_class
from asyncflow.errors import ConfigError
from asyncflow.placement import resolve_cores
from asyncflow.rewards import Reward, load_reward

DEFAULT_MAX_MODEL_LEN = 4096
"""Tokens of the longest sequence unless the configuration says otherwise: longer ones cost KV cache."""

DEFAULT_CHECKPOINT_EVERY = 20
"""Steps between two checkpoints."""

CHECKED_PROMPTS = 5000
"""Training prompts whose length is looked at before the run. A longer one further on fails alone, when it is drawn."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that can start."""

    config: Config
    """With everything derived filled in."""
    model: Path
    info: ModelInfo
    tokenizer: Tokenizer
    problems: Problems
    reward: Reward
    repeatable: bool
    """The rollout engine is deterministic."""
    own_process: bool
    """The rollout engine is named in the configuration and wants a process of its own."""
    make_rollout: Callable[[], RolloutEngine]
    """Makes it in this process."""
    make_learner: Callable[[], LearnerEngine]
    make_reference: Callable[[], ScorerEngine] | None = None
    """None without a KL term."""
    reference_info: ModelInfo | None = None


def plan(
    config: Config,
    *,
    rollout: RolloutEngine | None = None,
    learner: LearnerEngine | None = None,
    reference: ScorerEngine | None = None,
    reward: Callable[..., Any] | None = None,
) -> Plan:
    """Resolve and check a configuration. Engines and a reward function made in Python take the named ones' place.

    Raises UserError (ConfigError, ModelError, DataError, RewardError).
    """
    config = resolve_cores(config)
    rollout_type = type(rollout) if rollout is not None else rollout_class(config.rollout.engine)
    learner_type = type(learner) if learner is not None else learner_class(config.learner.engine)
    _check_engines(config, rollout_type, learner_type)
    config = _with_checkpoints(config, learner_type)
    config = _with_reference(config, reference, learner_type)
    # What is recorded is what runs, wherever it came from.
    if rollout is not None:
        config = _with(config, "rollout", engine=_import_path(rollout_type))
    if learner is not None:
        config = _with(config, "learner", engine=_import_path(learner_type))
    problems = load_problems(config.data, config.seed)
    scorer = load_reward(config.reward if reward is None else reward, timeout=config.reward_timeout)
    if reward is not None:
        config = config.model_copy(update={"reward": tuple(RewardConfig(use=name) for name in scorer.names)})
    scorer.probe(problems.train[0])
    model = resolve_model(config.model)
    info = describe_model(model)
    config = _with_max_model_len(config, info)
    config = _with_rollout_timeout(config)
    assert config.rollout.max_model_len is not None
    tokenizer = load_tokenizer(model)
    for prompts in (problems.train, problems.eval):
        if prompts:
            tokenise(prompts[0], tokenizer)  # a chat prompt needs a chat template
    reference_model = _reference_model(config, model)
    limit = config.rollout.max_model_len - config.max_new_tokens
    check_lengths(islice(problems.train, CHECKED_PROMPTS), tokenizer, limit=limit)
    check_lengths(problems.eval, tokenizer, limit=limit)
    return Plan(
        config=config,
        model=model,
        info=info,
        tokenizer=tokenizer,
        problems=problems,
        reward=scorer,
        repeatable=rollout_type.capabilities.deterministic,
        own_process=rollout is None and rollout_type.capabilities.own_process,
        make_rollout=lambda: rollout if rollout is not None else rollout_type.from_config(config, model),
        make_learner=lambda: learner if learner is not None else learner_type.from_config(config, model),
        make_reference=_reference_maker(config, reference, reference_model),
        reference_info=describe_model(reference_model) if config.kl_coef else None,
    )


def _check_engines(config: Config, rollout: type[RolloutEngine], learner: type[LearnerEngine]) -> None:
    can = rollout.capabilities
    if not can.logprobs:
        raise ConfigError(
            f"{rollout.__name__} does not return log-probs, which the correction for stale samples needs: "
            f"use an engine that declares Capabilities(logprobs=True)"
        )
    if config.weights.update not in can.updates:
        raise ConfigError(
            f"{rollout.__name__} cannot take weights {config.weights.update}: "
            f"set weights.update to {' or '.join(sorted(can.updates))}"
        )
    if can.weights != learner.weights:
        raise ConfigError(
            f"{rollout.__name__} serves {can.weights} weights and {learner.__name__} makes {learner.weights} weights: "
            f"choose rollout.engine and learner.engine of one kind"
        )
    if config.deterministic and config.max_staleness == 0 and not can.deterministic:
        raise ConfigError(
            f"deterministic with max_staleness 0 promises a repeatable run, and {rollout.__name__} is not "
            f"deterministic: set rollout.engine to one that is, or deterministic to false"
        )

    if config.placement == "colocated" and config.weights.update == "in_flight":
        raise ConfigError(
            "placement colocated finishes what runs before the learner trains, so no weights ever come in flight: "
            "set weights.update to boundary, or placement to separated"
        )


def _with_reference(config: Config, reference: ScorerEngine | None, learner: type[LearnerEngine]) -> Config:
    """What the reference does not say, it has from the learner."""
    asked = config.reference
    if not config.kl_coef:
        if reference is not None or asked.model is not None:
            raise ConfigError("a reference policy is given and kl_coef is 0: set kl_coef, or leave the reference out")
        return config
    engine = asked.engine or SCORER_OF_WEIGHTS.get(learner.weights)
    if reference is not None:
        engine = _import_path(type(reference))
    if engine is None:
        raise ConfigError(f"no scorer of ours reads {learner.weights} weights: name one in reference.engine")
    found = type(reference) if reference is not None else scorer_class(engine)
    if found.weights != learner.weights:
        raise ConfigError(
            f"{found.__name__} reads {found.weights} weights and {learner.__name__} trains {learner.weights} weights: "
            f"choose reference.engine and learner.engine of one kind"
        )
    return _with(
        config,
        "reference",
        engine=engine,
        dtype=asked.dtype or config.learner.dtype,
        micro_batch_tokens=asked.micro_batch_tokens or config.learner.micro_batch_tokens,
    )


def _reference_maker(config: Config, reference: ScorerEngine | None, model: Path) -> Callable[[], ScorerEngine] | None:
    if not config.kl_coef:
        return None
    if reference is not None:
        return lambda: reference
    assert config.reference.engine is not None
    found = scorer_class(config.reference.engine)
    return lambda: found.from_config(config, model)


def _reference_model(config: Config, model: Path) -> Path:
    """Where the reference's weights are. Raises ModelError, or ConfigError where it cannot score the model's tokens."""
    name = config.reference.model
    if name is None or not config.kl_coef:
        return model
    assert config.rollout.max_model_len is not None
    found = resolve_model(name)
    if load_tokenizer(found).get_vocab() != load_tokenizer(model).get_vocab():
        raise ConfigError(
            f"reference.model {name} has another vocabulary than {config.model}, so it cannot score its tokens: "
            "name a model with the same tokenizer"
        )
    if (context := describe_model(found).context) < config.rollout.max_model_len:
        raise ConfigError(
            f"reference.model {name} reads {context} tokens, and a sequence may have {config.rollout.max_model_len}: "
            "lower rollout.max_model_len"
        )
    return found


def _with_checkpoints(config: Config, learner: type[LearnerEngine]) -> Config:
    every = config.checkpoint.every
    resumable = issubclass(learner, ResumableLearner)
    if every and not resumable:
        raise ConfigError(
            f"{learner.__name__} cannot save its state, so there are no checkpoints: set checkpoint.every to 0"
        )
    if every is None:
        every = DEFAULT_CHECKPOINT_EVERY if resumable and config.store.durability != "memory" else 0
    return _with(config, "checkpoint", every=every)


def _with_rollout_timeout(config: Config) -> Config:
    """Generous, because it is for what never ends, not for what is slow; below the deadlines that engines have."""
    if config.rollout.timeout is not None:
        return config
    return _with(config, "rollout", timeout=min(3000.0, max(600.0, 0.5 * config.max_new_tokens)))


def _with_max_model_len(config: Config, info: ModelInfo) -> Config:
    asked = config.rollout.max_model_len
    if asked is not None and asked > info.context:
        raise ConfigError(f"rollout.max_model_len is {asked}, and {config.model} reads {info.context} tokens")
    length = asked or min(info.context, DEFAULT_MAX_MODEL_LEN)
    if config.max_new_tokens >= length:
        raise ConfigError(
            f"max_new_tokens ({config.max_new_tokens}) leaves no room for a prompt in {length} tokens: lower it"
        )
    return _with(config, "rollout", max_model_len=length)


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _import_path(engine: type) -> str:
    return f"{engine.__module__}:{engine.__qualname__}"


def describe(plan: Plan) -> list[tuple[str, str]]:
    """The plan for people: what runs where, how much memory, what a step is, what the bound means."""
    config, info = plan.config, plan.info
    batch, bound = config.train_batch_size, config.max_staleness
    ahead = (bound + 1) * batch
    held_out = f", {len(plan.problems.eval)} held out by content" if plan.problems.eval else ""
    sides = [("rollout", config.rollout.engine, config.rollout.cores, config.rollout.dtype),
             ("learner", config.learner.engine, config.learner.cores, config.learner.dtype)]  # fmt: skip
    if plan.reference_info is not None:
        assert config.reference.engine is not None
        assert config.reference.dtype is not None
        sides.append(("reference", config.reference.engine, config.reference.cores, config.reference.dtype))
    placement = f"{config.placement}, {PLACEMENT_MEANING[config.placement]}: " + "; ".join(
        f"{name} {engine} ({dtype}) on {'all cores' if cores is None else 'core ' + ', '.join(map(str, cores))}"
        for name, engine, cores, dtype in sides
    )
    bytes_served = info.parameters * (2 if config.rollout.dtype == "bf16" else 4)
    learner_bytes = info.parameters * 16 + (info.parameters * 2 if config.learner.dtype == "bf16" else 0)
    updates = config.updates_per_step * config.epochs_per_step
    begins = "as its groups come" if _streams(config) else "once all of its samples are there"
    return [
        ("model", f"{config.model}: {info.parameters / 1e6:.1f} M parameters, vocabulary {info.vocab:,}"),
        ("data", f"{config.data.train}: {len(plan.problems.train):,} problems{held_out}"),
        ("reward", " + ".join(f"{r.weight:g}·{r.use}" for r in config.reward)),
        ("placement", placement),
        (
            "memory",
            f"learner about {_gib(learner_bytes)} (fp32 master weights, gradient, two moments), engine weights "
            f"{_gib(bytes_served)}, published versions {_gib((config.weights.keep + 1) * bytes_served)} shared"
            + _reference_memory(plan),
        ),
        *_kl_meaning(plan),
        (
            "step",
            f"{batch} samples = {config.groups_per_step} prompts × {config.num_generations} completions of at most "
            f"{config.max_new_tokens} tokens; {updates} optimizer update{'s' if updates > 1 else ''}, "
            f"1 published version; it is trained {begins}",
        ),
        ("run", f"{config.steps} steps = {config.steps * batch:,} samples"),
        (
            "staleness",
            f"at most {bound} version{'' if bound == 1 else 's'}: up to {ahead} samples "
            f"({ahead * config.max_new_tokens:,} response tokens) between admission and training, a token is trained "
            f"at most {bound + 1} step time{'s' if bound else ''} after the weights that made it were published",
        ),
        ("updates", f"{config.weights.update}: " + UPDATE_MEANING[config.weights.update]),
        ("checkpoints", _checkpoints(config, info.parameters)),
    ]


def _streams(config: Config) -> bool:
    one_update = config.updates_per_step == config.epochs_per_step == 1
    return one_update and config.stream and not config.deterministic and config.placement == "separated"


def _reference_memory(plan: Plan) -> str:
    if plan.reference_info is None:
        return ""
    size = plan.reference_info.parameters * (2 if plan.config.reference.dtype == "bf16" else 4)
    return f", reference weights {_gib(size)}"


def _kl_meaning(plan: Plan) -> list[tuple[str, str]]:
    config = plan.config
    if plan.reference_info is None:
        return []
    compared = config.reference.model or "the initial weights"
    return [("kl", f"{config.kl_coef:g} · {config.kl} in the {config.kl_in}, from {compared}")]


PLACEMENT_MEANING = {
    "separated": "at the same time",
    "colocated": "taking turns (the engine generates nothing while the learner trains)",
}

UPDATE_MEANING = {
    "boundary": "the engine finishes what runs, then takes new weights",
    "in_flight": "the engine takes new weights between two tokens, and sequences go on with their old KV cache",
}


def _checkpoints(config: Config, parameters: int) -> str:
    every, keep = config.checkpoint.every, config.checkpoint.keep
    if not every:
        return "none: a run that is stopped or killed cannot be resumed"
    return f"every {every} steps and at the end, about {_gib(12 * parameters)} each, the last {keep} kept"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
