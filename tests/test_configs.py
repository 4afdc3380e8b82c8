"""Configurations: every file that ships, and the sentences that wrong ones get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncflow.config import Config, RewardConfig, load_config, parse_config
from asyncflow.data import load_problems
from asyncflow.errors import ConfigError
from asyncflow.rewards import load_reward

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.glob("**/*.yaml"))

MINIMAL: dict[str, Any] = {
    "model": "tiny",
    "data": {"train": "a.jsonl"},
    "reward": "last_number",
    "train_batch_size": 16,
    "steps": 1,
    "max_new_tokens": 8,
    "learning_rate": 0.1,
}


def refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, **settings})
    message = str(caught.value)
    assert "\n" not in message
    return message


# Files


def test_the_files_that_the_documentation_names_are_there() -> None:
    assert {"quickstart.yaml", "chain-sum-long.yaml", "tiny.yaml"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_loads_and_its_reward_works_on_its_data(path: Path) -> None:
    config = load_config(path, ["data.size=500"])

    problems = load_problems(config.data, config.seed)

    assert config.name == path.stem
    assert len(problems.eval) == config.data.eval_size
    reward = load_reward(config.reward)
    reward.probe(problems.train[0])


def test_the_quickstart_asks_for_sums_of_two_numbers_and_is_asynchronous() -> None:
    config = load_config(CONFIGS / "quickstart.yaml", ["data.size=500"])

    for prompt in load_problems(config.data, config.seed).eval:
        content = prompt.messages[0]["content"]  # type: ignore[index]
        what, are, left, sign, right = content.removesuffix("?").split()
        assert (what, are) == ("What", "is")
        assert int(left) + int(f"{sign}{right}") == int(prompt.columns["answer"])
    assert config.max_staleness >= 1
    assert config.model == "smollm2-135m"
    assert config.rollout.engine == "vllm"


def test_the_long_run_is_the_quickstart_for_longer() -> None:
    quick, long = load_config(CONFIGS / "quickstart.yaml"), load_config(CONFIGS / "chain-sum-long.yaml")

    changed = {"name", "steps", "eval_every"}
    assert quick.model_dump(exclude=changed) == long.model_dump(exclude=changed)
    assert long.steps > quick.steps


def test_the_tiny_run_can_use_real_engines() -> None:
    config = load_config(CONFIGS / "tiny.yaml", ["rollout.engine=vllm", "learner.engine=torch"])

    assert (config.rollout.engine, config.learner.engine) == ("vllm", "torch")


# Sentences


def test_the_minimal_configuration_is_valid() -> None:
    config = parse_config(MINIMAL)

    assert config.reward == (RewardConfig(use="last_number"),)
    assert config.groups_per_step == 2
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_stalenes": 1}, "max_stalenes is not a setting; did you mean max_staleness?"),
        ({"lr": 1}, "lr is not a setting; here it is called learning_rate"),
        ({"n_samples_per_prompt": 8}, "n_samples_per_prompt is not a setting; here it is called num_generations"),
        ({"max_head_offpolicyness": 4}, "max_head_offpolicyness is not a setting; here it is called max_staleness"),
        ({"rollout": {"engin": "vllm"}}, "rollout.engin is not a setting; did you mean engine?"),
        ({"data": {"train": "a", "zzz": 1}}, "data.zzz is not a setting; the settings here are train, eval,"),
        ({"reward": {"use": "f", "wieght": 2}}, "reward.wieght is not a setting; did you mean weight?"),
        ({"model": None}, "model: input should be a valid string (it is None)"),
        ({"steps": 0}, "steps: input should be greater than or equal to 1 (it is 0)"),
        ({"learning_rate": "fast"}, "learning_rate: input should be a valid number"),
        ({"learning_rate": float("nan")}, "learning_rate: input should be a finite number"),
        ({"late_samples": "hope"}, "late_samples: input should be 'wait', 'drop', 'requeue' or 'mask'"),
        ({"group_timeout": 0}, "group_timeout: input should be greater than 0"),
        ({"algorithm": "ppo"}, "algorithm: input should be 'grpo'"),
        ({"name": "../up"}, "name: "),
        ({"reward": []}, "reward: name at least one reward function"),
        ({"train_batch_size": 20}, "train_batch_size (20) must be a multiple of num_generations (8)"),
        ({"updates_per_step": 3}, "updates_per_step (3) must divide the 2 groups of a step"),
        ({"store": {"max_rows": 8}}, "store.max_rows (8) must be at least train_batch_size (16)"),
        ({"store": {"max_bytes": 0}}, "store.max_bytes: input should be greater than or equal to 1"),
        (
            {"store": {"durability": "memory"}, "checkpoint": {"every": 5}},
            "a checkpoint needs samples that survive: set store.durability to process or power",
        ),
        ({"eval_every": 5}, "evaluation needs data.eval_size"),
        ({"data": {"train": "a", "eval": "b"}}, "evaluation needs data.eval_size"),
    ],
)
def test_a_wrong_setting_gets_a_sentence_that_says_what_is_right(settings: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(**settings)


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(ConfigError, match="train_batch_size is missing: set it; steps is missing: set it"):
        parse_config({key: value for key, value in MINIMAL.items() if key not in ("steps", "train_batch_size")})


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("a", [("a", 1.0)]),
        (["a", {"use": "b:c", "weight": 0.5}], [("a", 1.0), ("b:c", 0.5)]),
        ({"use": "a", "weight": 2}, [("a", 2.0)]),
    ],
)
def test_the_forms_of_a_reward_mean_the_same(reward: object, expected: list[tuple[str, float]]) -> None:
    assert [(one.use, one.weight) for one in parse_config({**MINIMAL, "reward": reward}).reward] == expected


# Overrides


def test_overrides_change_single_settings() -> None:
    config = load_config(
        CONFIGS / "tiny.yaml",
        [
            "steps=2",
            "rollout.options.seed=3",
            "data.options={min_terms: 2}",
            "weights.update=in_flight",
            "run_dir=null",
        ],
    )

    assert config.steps == 2
    assert config.rollout.options == {"seed": 3}
    assert config.rollout.engine == "fake"
    assert config.data.options == {"min_terms": 2}
    assert config.weights.update == "in_flight"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("steps", "--set steps: write key=value"),
        ("=3", "--set =3: write key=value"),
        ("steps.x=3", "--set steps.x=3: steps is not a section"),
        ("steps=[1", "--set steps=[1: '[1' is not a YAML value"),
        ("stepps=3", "stepps is not a setting; did you mean steps?"),
    ],
)
def test_a_wrong_override_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "tiny.yaml", [override])
    assert sentence in str(caught.value)


def test_files_that_are_no_configuration_are_refused(tmp_path: Path) -> None:
    broken, listed = tmp_path / "broken.yaml", tmp_path / "list.yaml"
    broken.write_text("a: [1\nb: 2")
    listed.write_text("- a\n- b\n")

    with pytest.raises(ConfigError, match=r"there is no configuration file .*: name one that exists"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(broken)
    with pytest.raises(ConfigError, match="must hold `key: value` lines, not list"):
        load_config(listed)
