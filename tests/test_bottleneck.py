"""The sentence that says what holds a run up: every case from plain shares."""

from __future__ import annotations

from typing import Any

import pytest

from asyncflow.config import Config
from asyncflow.report.bottleneck import bottleneck, diagnose, in_words, mean_shares

WAITS_FOR_ROLLOUT = {
    "actor_update/busy": 0.6,
    "actor_update/wait_for/rollout": 0.38,
    "actor_update/wait_for/reward": 0.02,
    "rollout/busy": 0.98,
}

CASES: dict[str, tuple[dict[str, float], dict[str, Any], str]] = {
    "learner": (
        {"actor_update/busy": 0.96, "actor_update/wait_for/rollout": 0.04, "rollout/wait_for/bound": 0.41},
        {},
        "The learner is the bottleneck: it was busy 96% of the time, and generation waited 41% at the staleness bound. "
        "Add learner capacity; more max_staleness gains nothing.",
    ),
    "learner beside a busy engine": (
        {"actor_update/busy": 0.93, "rollout/busy": 0.99},
        {},
        "The learner is the bottleneck: it was busy 93% of the time. Add learner capacity; more max_staleness gains "
        "nothing.",
    ),
    "generation": (
        WAITS_FOR_ROLLOUT,
        {},
        "Generation is the bottleneck: the learner waited 38% of the time for rollouts, and generation was busy 98%. "
        "Add rollout capacity (rollout.cores, rollout.max_concurrency).",
    ),
    "each other": (
        WAITS_FOR_ROLLOUT | {"rollout/busy": 0.7, "rollout/wait_for/bound": 0.3},
        {"max_staleness": 2},
        "The learner and generation wait for each other: the learner waited 38% of the time for rollouts, and "
        "generation 30% at the staleness bound. Raise max_staleness (it is 2).",
    ),
    "taking turns": (
        WAITS_FOR_ROLLOUT | {"rollout/busy": 0.4, "rollout/wait_for/weights": 0.6},
        {"max_staleness": 0},
        "The learner waited 38% of the time for rollouts: with max_staleness 0 generation and training take turns; "
        "raise it to 1, and they run at the same time.",
    ),
    "boundary": (
        WAITS_FOR_ROLLOUT | {"rollout/emptied": 0.22, "rollout/wait_for/bound": 0.2},
        {},
        "The learner waited 38% of the time for rollouts, and 22% of the engine's places stood empty while it took new "
        "weights at a boundary: set weights.update to in_flight.",
    ),
    "boundary is not to blame when updates are in flight": (
        WAITS_FOR_ROLLOUT | {"rollout/emptied": 0.22},
        {"update": "in_flight"},
        "Generation is the bottleneck: the learner waited 38% of the time for rollouts, and generation was busy 98%. "
        "Add rollout capacity (rollout.cores, rollout.max_concurrency).",
    ),
    "weights": (
        {"actor_update/busy": 0.5, "actor_update/wait_for/weights": 0.4, "actor_update/wait_for/rollout": 0.1},
        {"update": "in_flight"},
        "The learner waited 40% of the time for the weight update: raise max_staleness (it is 1), so that it happens "
        "beside a step.",
    ),
    "reward": (
        {"actor_update/busy": 0.3, "actor_update/wait_for/reward": 0.65, "reward/busy": 0.97},
        {},
        "The learner waited 65% of the time for the reward stage, which was busy 97%: make the reward functions "
        "faster.",
    ),
    "reference": (
        {"actor_update/busy": 0.3, "actor_update/wait_for/reference": 0.65, "reference/busy": 0.97},
        {},
        "The learner waited 65% of the time for the reference stage, which was busy 97%: give the reference stage more "
        "capacity.",
    ),
    "publishing": (
        {"actor_update/busy": 0.95, "actor_update/publish": 0.33},
        {},
        "The learner spent 33% of its time publishing weights: raise train_batch_size, which publishes less often for "
        "the same samples.",
    ),
    "prompts": (
        {"actor_update/busy": 0.2, "actor_update/wait_for/feeder": 0.8},
        {},
        "The learner waited 80% of the time for prompts: they are drawn and tokenised too slowly; shorten or prepare "
        "the data set.",
    ),
    "the end": (
        {"actor_update/busy": 0.8, "actor_update/wait_for/end": 0.2},
        {},
        "The learner was busy 80% of the time, and nothing held it up for long.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_bottleneck_has_its_sentence_with_numbers_and_advice(case: str) -> None:
    shares, settings, sentence = CASES[case]

    given: dict[str, Any] = {"max_staleness": 1, "update": "boundary"} | settings
    assert bottleneck(shares, **given).text == sentence


@pytest.mark.parametrize(
    ("case", "stage"),
    [
        ("learner", "actor_update"),
        ("publishing", "actor_update"),
        ("generation", "rollout"),
        ("weights", "weights"),
        ("reward", "reward"),
        ("reference", "reference"),
        ("prompts", "feeder"),
        ("the end", None),
    ],
)
def test_the_part_that_the_others_wait_for_is_named(case: str, stage: str | None) -> None:
    shares, settings, _ = CASES[case]

    given: dict[str, Any] = {"max_staleness": 1, "update": "boundary"} | settings
    assert bottleneck(shares, **given).stage == stage


def test_the_advice_names_settings_that_there_are() -> None:
    fields = set(Config.model_fields)
    assert {"max_staleness", "train_batch_size", "eval_every"} <= fields
    for section, name in (("rollout", "cores"), ("rollout", "max_concurrency"), ("weights", "update")):
        annotation = Config.model_fields[section].annotation
        assert annotation is not None
        assert name in annotation.model_fields


# -- of a whole run ----------------------------------------------------------------------------------------------------


def line(seconds: float = 1.0, **shares: float) -> dict[str, Any]:
    named = {f"stage/{key.replace('__', '/')}": share for key, share in shares.items()}
    return {"kind": "step", "step_time": seconds, "reward": 0.5, **named}


def sentence(*steps: dict[str, Any]) -> str | None:
    found = diagnose(steps, max_staleness=1, update="boundary")
    return None if found is None else found.text


FILLING = line(100.0, actor_update__busy=0.0, actor_update__wait_for__feeder=1.0)
TRAINING = line(actor_update__busy=0.95)


def test_a_step_counts_for_as_long_as_it_took() -> None:
    steps = [line(3.0, actor_update__busy=1.0, reward__busy=0.4), line(1.0, actor_update__busy=0.2)]

    assert mean_shares(steps) == pytest.approx({"actor_update/busy": 0.8, "reward/busy": 0.3})


def test_the_first_step_in_which_everything_fills_up_is_left_out() -> None:
    assert "busy 95%" in str(sentence(FILLING, TRAINING, TRAINING))


def test_steps_beside_an_evaluation_are_left_out() -> None:
    evaluating = line(0.2, actor_update__busy=0.1, actor_update__wait_for__rollout=0.9, evaluator__busy=0.9)

    assert "busy 95%" in str(sentence(FILLING, TRAINING, evaluating, TRAINING))


def test_evaluation_that_takes_much_of_the_time_is_said_first() -> None:
    evaluating = line(actor_update__busy=0.1, actor_update__wait_for__rollout=0.9, evaluator__busy=0.8)

    assert sentence(FILLING, TRAINING, evaluating) == (
        "Evaluation took 40% of the time and shares the engine with the rollouts: raise eval_every or lower "
        "data.eval_size."
    )


@pytest.mark.parametrize("steps", [(), (FILLING,), (line(), line()), ({"kind": "step"}, {"kind": "step"})])
def test_nothing_is_said_of_a_run_that_measured_too_little(steps: tuple[dict[str, Any], ...]) -> None:
    assert sentence(*steps) is None


def test_causes_are_said_in_words() -> None:
    assert in_words("bound") == "the learner: the staleness bound is reached"
    assert in_words("judge") == "the judge stage"
