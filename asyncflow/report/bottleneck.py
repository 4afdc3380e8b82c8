"""What holds a run up, in one sentence with the numbers and the advice. Pure: from shares of time, nothing else.

The shares are those of the step lines (`Timeline.lap`): every part is busy, idle or blocked, and says what it waits for
when it is not busy. The culprit is who is busy while the others wait for it, as in Flink's back pressure monitoring
("Monitoring Back Pressure", Apache Flink documentation). When nobody is busy all the time, parts wait for each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

FULL = 0.9
"""A part that is busy for this share of the time is held up by nobody."""
MUCH = 0.1
"""Share of the time from which a cost is worth a sentence."""
EVALUATION = 0.25
"""Share of the time from which evaluation, which uses the rollout engine, is what to look at first."""

LEARNER, ROLLOUT, WEIGHTS, FEEDER = "actor_update", "rollout", "weights", "feeder"
PREFIX = "stage/"
NOT_STAGES = ("feeder", "weights", "bound", "end", "pause", "drain")

NAMES = {
    "actor_update": "the learner",
    "rollout": "rollouts",
    "feeder": "prompts",
    "weights": "the weight update",
    "bound": "the learner: the staleness bound is reached",
    "pause": "somebody to let the run go on",
    "drain": "somebody to let it go on",
    "end": "nothing: all samples of the run are there",
}
"""What is waited for, as it stands in a sentence; other stages are called by their names."""


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """What holds a run up."""

    stage: str | None
    """The part that the others wait for, by the name of its worker; None: nobody for long."""
    text: str
    """One sentence with the numbers and the advice."""


def diagnose(steps: Sequence[Mapping[str, Any]], *, max_staleness: int, update: str) -> Bottleneck | None:
    """That of a whole run, from its step lines; None when no step after the first one was timed."""
    later = [step for step in steps[1:] if _is_share(step.get(f"{PREFIX}{LEARNER}/busy"))]
    if not later:
        return None
    evaluating = mean_shares(later).get("evaluator/busy", 0.0)
    if evaluating >= EVALUATION:
        text = (
            f"Evaluation took {evaluating:.0%} of the time and shares the engine with the rollouts: raise eval_every "
            "or lower data.eval_size."
        )
        return Bottleneck(stage="evaluator", text=text)
    return bottleneck(mean_shares(steady(later)), max_staleness=max_staleness, update=update)


def steady(steps: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those steps beside which nothing was evaluated; all of them when there is no such step."""
    return [step for step in steps if not step.get(f"{PREFIX}evaluator/busy")] or list(steps)


def mean_shares(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Shares over all these steps together: `<track>/busy` and so on → 0 to 1. A step counts for as long as it took."""
    timed = [(step, step["step_time"]) for step in steps if _is_share(step.get("step_time"))]
    total = sum(seconds for _, seconds in timed)
    shares: dict[str, float] = {}
    for step, seconds in timed:
        for key, share in step.items():
            if key.startswith(PREFIX) and _is_share(share) and total > 0:
                name = key.removeprefix(PREFIX)
                shares[name] = shares.get(name, 0.0) + share * seconds / total
    return shares


def bottleneck(shares: Mapping[str, float], *, max_staleness: int, update: str) -> Bottleneck:
    """What holds the run up.

    `shares` are those of `mean_shares`, `max_staleness` and `update` (`boundary`, `in_flight`) the run's settings.
    """
    busy, publishing = shares.get(f"{LEARNER}/busy", 0.0), shares.get(f"{LEARNER}/publish", 0.0)
    if publishing >= 2 * MUCH and publishing >= 1 - busy:
        text = (
            f"The learner spent {publishing:.0%} of its time publishing weights: raise train_batch_size, which "
            "publishes less often for the same samples."
        )
        return Bottleneck(stage=LEARNER, text=text)
    if busy >= FULL:
        at_bound = shares.get(f"{ROLLOUT}/wait_for/bound", 0.0)
        waited = f", and generation waited {at_bound:.0%} at the staleness bound" if at_bound >= MUCH else ""
        text = (
            f"The learner is the bottleneck: it was busy {busy:.0%} of the time{waited}. Add learner capacity; more "
            "max_staleness gains nothing."
        )
        return Bottleneck(stage=LEARNER, text=text)
    waits = waits_of(shares, LEARNER)
    cause = max(waits, key=lambda name: waits[name], default=ROLLOUT)
    waited = f"The learner waited {waits.get(cause, 0.0):.0%} of the time for {in_words(cause)}"
    if cause in (ROLLOUT, WEIGHTS):
        text = _generation(shares, waited, cause, max_staleness=max_staleness, update=update)
        return Bottleneck(stage=cause, text=text)
    if cause == FEEDER:
        text = f"{waited}: they are drawn and tokenised too slowly; shorten or prepare the data set."
        return Bottleneck(stage=FEEDER, text=text)
    if cause in NOT_STAGES:
        text = f"The learner was busy {busy:.0%} of the time, and nothing held it up for long."
        return Bottleneck(stage=None, text=text)
    stage = shares.get(f"{cause}/busy", 0.0)
    remedy = "make the reward functions faster" if cause == "reward" else f"give the {cause} stage more capacity"
    return Bottleneck(stage=cause, text=f"{waited}, which was busy {stage:.0%}: {remedy}.")


def in_words(cause: str) -> str:
    """What is waited for, to stand after `waits for`."""
    return NAMES.get(cause, f"the {cause} stage")


def waits_of(shares: Mapping[str, float], track: str) -> dict[str, float]:
    """What a track waited for → share of the time."""
    prefix = f"{track}/wait_for/"
    return {key.removeprefix(prefix): share for key, share in shares.items() if key.startswith(prefix)}


def _generation(shares: Mapping[str, float], waited: str, cause: str, *, max_staleness: int, update: str) -> str:
    """The learner waits for completions, or for the engine to serve newer weights."""
    emptied = shares.get(f"{ROLLOUT}/emptied", 0.0)
    if update == "boundary" and emptied >= MUCH:
        return (
            f"{waited}, and {emptied:.0%} of the engine's places stood empty while it took new weights at a boundary: "
            "set weights.update to in_flight."
        )
    if cause == WEIGHTS and max_staleness:
        return f"{waited}: raise max_staleness (it is {max_staleness}), so that it happens beside a step."
    if cause == WEIGHTS or not max_staleness:
        return (
            f"{waited}: with max_staleness 0 generation and training take turns; raise it to 1, and they run at the "
            "same time."
        )
    generating, at_bound = shares.get(f"{ROLLOUT}/busy", 0.0), shares.get(f"{ROLLOUT}/wait_for/bound", 0.0)
    if at_bound >= MUCH:
        return (
            f"The learner and generation wait for each other: {waited[0].lower()}{waited[1:]}, and generation "
            f"{at_bound:.0%} at the staleness bound. Raise max_staleness (it is {max_staleness})."
        )
    return (
        f"Generation is the bottleneck: {waited[0].lower()}{waited[1:]}, and generation was busy {generating:.0%}. Add "
        "rollout capacity (rollout.cores, rollout.max_concurrency)."
    )


def _is_share(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
