"""The reference stage: what every scorer promises, what its worker does with a failure, and whole runs with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from asyncflow.algorithms.advantages import group_advantages
from asyncflow.config import Config, parse_config
from asyncflow.engines.base import LearnerEngine, ScorerEngine
from asyncflow.engines.fake import BIGRAM, FakeLearner, FakeScorer, load_table
from asyncflow.engines.models import load_tokenizer, resolve_model
from asyncflow.engines.torch_learner import TorchLearner
from asyncflow.engines.torch_scorer import TorchScorer
from asyncflow.errors import ConfigError, EngineError
from asyncflow.launch import resolve
from asyncflow.pipeline import stages
from asyncflow.plan import describe, plan
from asyncflow.report.audit import audit
from asyncflow.runtime.metrics import read_metrics
from asyncflow.runtime.timeline import NoTimeline
from asyncflow.store.events import Quarantined
from asyncflow.store.journal import read_ledger
from asyncflow.store.lifecycle import State
from asyncflow.store.schema import Schema
from asyncflow.store.store import EmbeddedStore
from asyncflow.types import Floats, PolicyVersion, TokenSample, TrainSample
from asyncflow.workers.base import Heartbeat
from asyncflow.workers.reference import ReferenceWorker
from tests.conftest import TINY, RunTiny
from tests.test_store import batch, prompts, rewards, terms

VOCABULARY = 128
CONFIG = {
    "model": "tiny",
    "data": {"train": "reasoning_gym:chain_sum"},
    "reward": "digit_share",
    "train_batch_size": 8,
    "num_generations": 4,
    "steps": 2,
    "max_new_tokens": 8,
    "learning_rate": 0.01,
    "kl_coef": 0.1,
    "learner": {"options": {"device": "cpu"}},
    "reference": {"options": {"device": "cpu"}},
}


@pytest.fixture(scope="module")
def tiny() -> Path:
    return resolve_model("tiny")


@pytest.fixture(scope="module")
def samples() -> list[TrainSample]:
    """Three groups of four, of different lengths."""
    random = np.random.default_rng(0)
    made: list[TrainSample] = []
    for group in range(3):
        prompt = random.integers(0, VOCABULARY, random.integers(3, 20)).astype(np.int32)
        for _ in range(4):
            tokens = int(random.integers(1, 20))
            made.append(
                TrainSample(
                    sample_id=len(made),
                    group_id=group,
                    prompt_ids=prompt,
                    response_ids=random.integers(0, VOCABULARY, tokens).astype(np.int32),
                    mask=np.ones(tokens, dtype=np.bool_),
                    behaviour_logprobs=np.full(tokens, -4.8, dtype=np.float32),
                    advantages=np.full(tokens, random.standard_normal(), dtype=np.float32),
                )
            )
    return made


def config(**changes: Any) -> Config:
    return parse_config({**CONFIG, **changes})


# -- every scorer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A scorer, and the learner of the same kind."""

    scorer: type[ScorerEngine]
    learner: type[LearnerEngine]


@pytest.fixture(params=[Pair(scorer=TorchScorer, learner=TorchLearner), Pair(scorer=FakeScorer, learner=FakeLearner)])
def pair(request: pytest.FixtureRequest) -> Pair:
    found: Pair = request.param
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_learners_initial_weights_have_the_learners_own_log_probs_to_the_bit(
    tiny: Path, samples: list[TrainSample], pair: Pair, dtype: str, temperature: float
) -> None:
    same = config(temperature=temperature, learner={"dtype": dtype, "options": {"device": "cpu"}})

    found = pair.scorer.from_config(same, tiny).logprobs(samples)

    expected = pair.learner.from_config(same, tiny).logprobs(samples)
    for one, other, sample in zip(found, expected, samples, strict=True):
        assert one.dtype == np.float32
        assert one.shape == sample.response_ids.shape
        assert one.tolist() == other.tolist()


def test_a_reference_stays_what_it_is_while_the_learner_trains(
    tiny: Path, samples: list[TrainSample], pair: Pair
) -> None:
    scorer, learner = pair.scorer.from_config(config(), tiny), pair.learner.from_config(config(), tiny)
    before = scorer.logprobs(samples)

    learner.forward_backward(samples)
    learner.optim_step(100)

    for one, other, trained in zip(before, scorer.logprobs(samples), learner.logprobs(samples), strict=True):
        assert one.tolist() == other.tolist()
        assert one.tolist() != trained.tolist()


def test_a_sample_has_the_log_probs_that_it_has_alone(tiny: Path, samples: list[TrainSample], pair: Pair) -> None:
    scorer = pair.scorer.from_config(config(learner={"dtype": "fp32", "options": {"device": "cpu"}}), tiny)

    together = scorer.logprobs(samples)

    for sample, logprobs in zip(samples, together, strict=True):
        assert logprobs == pytest.approx(scorer.logprobs([sample])[0], abs=1e-5)


def test_a_scorer_can_be_closed_twice(tiny: Path, pair: Pair) -> None:
    scorer = pair.scorer.from_config(config(), tiny)

    scorer.close()
    scorer.close()


def test_a_scorer_keeps_no_fp32_copy_and_no_gradient(tiny: Path) -> None:
    scorer = TorchScorer.from_config(config(), tiny)

    parameters = list(scorer._policy.module.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in parameters)


def test_an_option_that_a_scorer_does_not_have_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"reference\.options: divice is not an option"):
        TorchScorer.from_config(config(reference={"options": {"divice": "cpu"}}), tiny)


# -- the worker --------------------------------------------------------------------------------------------------------


class Scripted(ScorerEngine):
    """Scores every token with minus its sample's id, and does to some samples what it is told."""

    weights: ClassVar[str] = BIGRAM

    def __init__(self, faults: dict[int, Exception | Floats] | None = None) -> None:
        self.faults = faults or {}
        self.calls: list[list[int]] = []

    def logprobs(self, samples: Sequence[TokenSample]) -> list[Floats]:
        self.calls.append([sample.sample_id for sample in samples])
        found: list[Floats] = []
        for sample in samples:
            fault = self.faults.get(sample.sample_id)
            if isinstance(fault, Exception):
                raise fault
            found.append(np.full(len(sample.response_ids), -sample.sample_id, np.float32) if fault is None else fault)
        return found

    def close(self) -> None:
        pass


class Stage:
    """A store with one step of completions in it, and a reference worker on it."""

    def __init__(self, folder: Path, engine: ScorerEngine, **options: Any) -> None:
        schema = Schema(stages(config()))
        self.ledger = folder / "ledger.sqlite"
        self.store = EmbeddedStore.create(schema, terms(num_generations=4, train_batch_size=8), ledger=self.ledger)
        self.store.serve("engine", PolicyVersion(n=0))
        self.store.admit(prompts(2), timeout=0)
        lease = self.store.lease("rollout", worker="w", max_rows=8, ttl=60, timeout=0)
        assert lease is not None
        every = list(range(8))
        columns: dict[str, list[Any]] = {
            "response_ids": [[5] * (i + 1) for i in every],
            "rollout_logprobs": [[-0.5] * (i + 1) for i in every],
            "token_versions": [[PolicyVersion(n=0).packed] * (i + 1) for i in every],
            "response": ["5"] * 8,
            "finish_reason": ["stop"] * 8,
        }
        self.store.ack(lease.lease_id, every, batch(columns))
        self.worker = ReferenceWorker(
            schema.stages["reference"],
            self.store,
            Heartbeat(self.store),
            NoTimeline(),
            engine=engine,
            **{"max_rows": 8, "max_tokens": None, **options},
        )

    def states(self) -> dict[int, State]:
        return {sample_id: row.state for sample_id, row in self.store.table.samples().items()}

    def reward(self) -> None:
        lease = self.store.lease("reward", worker="w", max_rows=8, ttl=60, timeout=0)
        assert lease is not None
        rows = [row.sample_id for row in lease.rows]
        self.store.ack(lease.lease_id, rows, rewards(rows))

    def trained(self) -> dict[int, list[float]]:
        """Sample → reference log-probs, as the training stage gets them."""
        found: dict[int, list[float]] = {}
        while (lease := self.store.lease("actor_update", worker="w", max_rows=8, ttl=60, timeout=0)) is not None:
            values = lease.data.column("ref_logprobs").to_pylist()
            found |= {row.sample_id: v for row, v in zip(lease.rows, values, strict=True)}
        return found


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(engine: ScorerEngine, **options: Any) -> Stage:
        made.append(Stage(tmp_path, engine, **options))
        return made[-1]

    yield make
    for one in made:
        one.store.close()


def test_a_sample_is_trained_when_it_has_both_its_reward_and_its_reference_log_probs(
    stage: Callable[..., Stage],
) -> None:
    one = stage(Scripted())
    one.worker.turn()
    assert set(one.states().values()) == {State.GENERATED}

    one.reward()

    assert set(one.states().values()) == {State.REWARDED}
    assert one.trained() == {i: [-float(i)] * (i + 1) for i in range(8)}


def test_a_lease_has_no_more_tokens_than_a_forward_pass_may_have(stage: Callable[..., Stage]) -> None:
    engine = Scripted()
    one = stage(engine, max_tokens=30)  # a prompt has 10 tokens, the second one 11

    for _ in range(8):
        one.worker.turn()

    sizes = [sum((10 if i < 4 else 11) + i + 1 for i in call) for call in engine.calls]
    assert [i for call in engine.calls for i in call] == list(range(8))
    assert all(size <= 30 for size, call in zip(sizes, engine.calls, strict=True) if len(call) > 1)
    assert len(engine.calls[0]) > 1, "samples of a group are scored together as far as the budget goes"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (np.array([np.nan] * 3, np.float32), "a log-prob is not finite"),
        (np.array([-1.0], np.float32), "it has 3 tokens and got 1 log-probs"),
        (IndexError("token 5 is out of range"), "IndexError: token 5 is out of range"),
    ],
)
def test_a_sample_that_cannot_be_scored_is_quarantined_and_its_neighbours_are_not(
    stage: Callable[..., Stage], fault: Any, says: str
) -> None:
    one = stage(Scripted({2: fault}))

    one.worker.turn()
    one.reward()

    assert one.store.counts().quarantined == 1
    assert sorted(one.trained()) == [0, 1, 3, 4, 5, 6, 7]
    reasons = [record.event.reason for record in read_ledger(one.ledger) if isinstance(record.event, Quarantined)]
    assert reasons == [f"the reference policy cannot score it: {says}"]


def test_an_engine_that_cannot_go_on_ends_the_run_and_gives_the_samples_back(stage: Callable[..., Stage]) -> None:
    one = stage(Scripted({2: EngineError("the device is gone")}))

    with pytest.raises(EngineError, match="the device is gone"):
        one.worker.turn()

    assert one.store.counts().leased == {}
    assert one.store.counts().quarantined == 0


# -- whole runs --------------------------------------------------------------------------------------------------------

SETTINGS = ("steps=4", "learning_rate=0.05", "max_staleness=0", "deterministic=true", "data.eval_size=0")


def metrics(run: Any, kind: str = "step") -> list[Any]:
    return list(read_metrics(run.run_dir / "metrics.jsonl", kind))


def digests(run: Any) -> list[str]:
    return [line["digest"] for line in metrics(run, "weights")]


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_a_run_with_a_kl_term_is_sound_and_reports_the_divergence(run_tiny: RunTiny, kl_in: str) -> None:
    run = run_tiny("steps=5", "learning_rate=0.05", "kl_coef=0.1", f"kl_in={kl_in}", "max_staleness=1")

    assert run.summary.outcome == "finished", run.summary.reason
    result = audit(run.run_dir)
    assert result.ok, result.violations
    steps = metrics(run)
    assert steps[0]["kl"] == 0.0, "the first step trains the reference itself"
    assert steps[-1]["kl"] > 0.0
    assert all(step["kl/max"] >= step["kl"] >= 0.0 for step in steps)
    assert all(("kl/penalty" in step) == (kl_in == "reward") for step in steps)


def test_without_a_kl_term_there_is_no_reference_and_no_divergence(run_tiny: RunTiny) -> None:
    run = run_tiny("steps=2")

    assert not [name for step in metrics(run) for name in step if name.startswith("kl")]
    ready = plan(resolve(TINY))
    assert ready.make_reference is None
    assert [stage.name for stage in stages(ready.config)] == ["rollout", "reward", "actor_update"]
    assert [stage.name for stage in stages(config())] == ["rollout", "reward", "reference", "actor_update"]


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_a_kl_term_changes_the_weights_from_the_second_step_on(run_tiny: RunTiny, kl_in: str) -> None:
    without = digests(run_tiny(*SETTINGS, name="without"))

    with_kl = digests(run_tiny(*SETTINGS, "kl_coef=0.5", f"kl_in={kl_in}", name="with"))

    if kl_in == "loss":
        # The first gradient of a divergence of 0 is 0. (In the reward, the engine's rounding is part of it.)
        assert with_kl[:2] == without[:2]
    assert not set(with_kl[2:]) & set(without[2:])


def test_a_large_coefficient_keeps_the_policy_close_to_where_it_began(run_tiny: RunTiny, tiny: Path) -> None:
    def wanted(completions: Sequence[str], **_: object) -> list[float]:
        return [float(sum(c.count(digit) for digit in "567")) for c in completions]

    settings = (
        "steps=12",
        "learning_rate=0.3",
        "train_batch_size=64",
        "num_generations=8",
        "max_new_tokens=16",
        *SETTINGS[2:],
    )
    free = run_tiny(*settings, name="free", reward=wanted)

    held = [
        run_tiny(*settings, *extra, name="".join(extra), reward=wanted)
        for extra in (["kl_coef=5"], ["kl_coef=5", "kl_estimator=k2"], ["kl_coef=2", "kl_in=reward"])
    ]

    for run in held:
        assert run.summary.outcome == "finished", run.summary.reason
        assert divergence(run, tiny) < 0.75 * divergence(free, tiny)


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3+"])
def test_where_nothing_can_be_learned_the_term_pulls_the_policy_towards_the_reference(
    run_tiny: RunTiny, estimator: str
) -> None:
    away = run_tiny("steps=6", "learning_rate=0.3", "data.eval_size=0", name="away")
    flat = {"reward": lambda completions, **_: [1.0] * len(completions)}

    run = run_tiny(
        "steps=10",
        "learning_rate=0.1",
        "train_batch_size=64",
        "zero_variance=keep",
        "data.eval_size=0",
        f"model={away.weights}",
        "reference.model=tiny",
        "kl_coef=1",
        f"kl_estimator={estimator}",
        **flat,
    )

    found = [step["kl"] for step in metrics(run)]
    assert found[0] > 0.01, "the policy begins away from the reference"
    assert found[-1] < 0.5 * found[0]


def divergence(run: Any, tiny: Path) -> float:
    """Mean over the rows that were trained of the exact KL of the final policy from the initial one."""
    assert run.weights is not None
    after, before = load_table(run.weights).log_softmax(-1), load_table(tiny).log_softmax(-1)
    changed = (after - before).abs().max(-1).values > 1e-4
    return float((after.exp() * (after - before)).sum(-1)[changed].mean())


def test_the_advantage_is_made_from_the_reward_less_the_penalty(run_tiny: RunTiny) -> None:
    learner = Recording(FakeLearner.load_policy(resolve_model("tiny")), learning_rate=0.05)
    groups, decode = learner.groups, load_tokenizer(resolve_model("tiny")).decode

    run = run_tiny(
        *SETTINGS[:-2],
        "data.eval_size=0",
        "kl_coef=3",
        "kl_in=reward",
        "learner.dtype=fp32",
        "zero_variance=keep",
        learner=learner,
        reward=lambda completions, **_: [float(len(c) > 4) for c in completions],
    )

    assert run.summary.outcome == "finished", run.summary.reason
    assert len(groups) == 16
    for group in groups:
        texts = [decode(sample.response_ids.tolist(), skip_special_tokens=True) for sample in group]
        shaped = [
            float(len(text) > 4)
            - 3 * float((s.behaviour_logprobs.astype(np.float64) - s.reference_logprobs.astype(np.float64)).sum())
            for s, text in zip(group, texts, strict=True)
        ]
        found = [sample.advantages[0] for sample in group]
        assert found == pytest.approx(group_advantages(shaped), abs=1e-5)


class Recording(FakeLearner):
    """Keeps the groups that it trains."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.groups: list[list[Any]] = []

    def forward_backward(self, samples: Sequence[TrainSample]) -> Any:
        by_group: dict[int, list[TrainSample]] = {}
        for sample in samples:
            by_group.setdefault(sample.group_id, []).append(sample)
        self.groups += by_group.values()
        return super().forward_backward(samples)


def test_equal_rewards_have_variance_when_the_penalty_differs(run_tiny: RunTiny) -> None:
    flat = {"reward": lambda completions, **_: [1.0] * len(completions)}
    settings = ("steps=3", *SETTINGS[1:])

    without = run_tiny(*settings, name="without", **flat)
    with_kl = run_tiny(*settings, "kl_coef=1", "kl_in=reward", name="with", **flat)

    assert [step["skipped"] for step in metrics(without)] == [16, 16, 16]
    assert [step["skipped"] for step in metrics(with_kl)][1:] == [0, 0]  # the first step has no divergence
    assert metrics(with_kl)[-1]["frac_reward_zero_std"] == 0.0
    assert metrics(with_kl)[-1]["reward"] == 1.0, "the reward is reported as the reward functions gave it"


def test_the_reference_scores_while_others_generate(run_tiny: RunTiny) -> None:
    overlap = threading.Event()

    class Waiting(FakeScorer):
        """Its first call goes on only when a sequence has ended meanwhile."""

        def logprobs(self, samples: Sequence[TokenSample]) -> list[Floats]:
            assert overlap.wait(60), "nothing was generated while the reference computed"
            return super().logprobs(samples)

    seen: list[int] = []

    def reward(completions: Sequence[str], **_: object) -> list[float]:
        seen.extend(range(len(completions)))
        if len(seen) > 18:  # more than a step and the two of the probe: generated without any of them being scored
            overlap.set()
        return [float(len(set(c))) for c in completions]

    scorer = Waiting(FakeScorer.load_policy(resolve_model("tiny")))
    run = run_tiny("steps=3", "kl_coef=0.1", "max_staleness=1", reference=scorer, reward=reward)

    assert run.summary.outcome == "finished", run.summary.reason


def test_the_plan_says_what_the_reference_is_and_what_it_costs() -> None:
    ready = plan(resolve(TINY, ["kl_coef=0.05", "learner.dtype=fp32"]))
    lines = dict(describe(ready))

    assert "0.05 · k3 in the loss, from the initial weights" in lines["kl"]
    assert "reference fake (fp32)" in lines["placement"]
    assert "reference weights" in lines["memory"]
    assert ready.config.reference.engine == "fake"
    assert ready.config.reference.micro_batch_tokens == ready.config.learner.micro_batch_tokens


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["kl_coef=0.1", "kl_estimator=k1"], "k1 has no gradient on average"),
        (["kl_coef=0.1", "kl_in=reward", "kl_estimator=k3+"], "a reward has none"),
        (["reference.model=tiny"], "kl_coef is 0"),
        (["kl_coef=0.1", "reference.engine=torch"], "choose reference.engine and learner.engine of one kind"),
        (["kl_coef=0.1", "reference.engine=tourch"], "use one of fake, torch"),
        (["kl_coef=-1"], "kl_coef"),
        (["beta=0.1"], "here it is called kl_coef"),
        (["kl_loss_type=k3"], "here it is called kl_estimator"),
        (["kl_coef=0.1", "reference.cores=[999]"], "reference.cores: there is no core 999"),
    ],
)
def test_a_kl_term_that_cannot_work_is_refused_before_anything_starts(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(resolve(TINY, overrides))
    assert says in str(caught.value)
