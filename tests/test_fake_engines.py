"""The fakes keep the engines' promises, exactly: determinism, log-probs, versions, and real learning."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncflow.algorithms.advantages import group_advantages
from asyncflow.config import Config, parse_config
from asyncflow.engines.base import GenerationRequest, Served
from asyncflow.engines.fake import TABLE, FakeLearner, FakeRollout, load_table
from asyncflow.engines.models import load_tokenizer, resolve_model
from asyncflow.engines.weights.channel import weights_digest
from asyncflow.errors import ConfigError, EngineError, ModelError, PromptTooLong, WeightsError
from asyncflow.types import Completion, PolicyVersion, Sampling, TrainSample

PROMPT = np.array([1, 20, 4], dtype=np.int32)
EOS = 2


@dataclass
class Snapshot:
    """Weights in memory, as an engine receives them."""

    version: PolicyVersion
    weights: dict[str, torch.Tensor]
    digest: str = "what the publisher says"
    path: Path = field(default_factory=Path)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.weights.items()


def always(token: int, n: int) -> Snapshot:
    """Weights under which only this token is ever sampled."""
    table = torch.full((128, 128), -50.0)
    table[:, token] = 50.0
    return Snapshot(PolicyVersion(n=n), {TABLE: table})


def request(name: str = "a", **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=name, prompt_ids=PROMPT, sampling=Sampling(**{"max_new_tokens": 12, **sampling})
    )


@pytest.fixture(scope="module")
def tiny() -> Path:
    return resolve_model("tiny")


async def started(tiny: Path, **options: Any) -> FakeRollout:
    engine = FakeRollout(tiny, **options)
    await engine.start()
    return engine


async def generate(engine: FakeRollout, requests: Sequence[GenerationRequest]) -> list[Completion]:
    return list(await asyncio.gather(*map(engine.generate, requests)))


def to_train(completions: Sequence[Completion], advantages: Sequence[float]) -> list[TrainSample]:
    return [
        TrainSample(
            sample_id=i,
            group_id=0,
            prompt_ids=PROMPT,
            response_ids=completion.token_ids,
            mask=np.ones(len(completion.token_ids), dtype=np.bool_),
            behaviour_logprobs=completion.logprobs,
            advantages=np.full(len(completion.token_ids), advantage, dtype=np.float32),
        )
        for i, (completion, advantage) in enumerate(zip(completions, advantages, strict=True))
    ]


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 5])
def test_a_request_gives_the_same_tokens_whatever_runs_beside_it(tiny: Path, seed: int | None) -> None:
    async def run() -> None:
        engine = await started(tiny)
        alone = await engine.generate(request("x", seed=seed))
        others = [request(f"other-{i}", max_new_tokens=i) for i in range(1, 9)]

        crowd = await generate(engine, [*others[:4], request("x", seed=seed), *others[4:]])
        another_engine = await (await started(tiny)).generate(request("x", seed=seed))

        for completion in (crowd[4], another_engine):
            assert completion.token_ids.tolist() == alone.token_ids.tolist()
            assert completion.logprobs.tolist() == alone.logprobs.tolist()

    asyncio.run(run())


def test_other_seeds_give_other_tokens(tiny: Path) -> None:
    async def run() -> None:
        engine = await started(tiny)
        by_seed = await generate(engine, [request(str(i), seed=i) for i in range(20)])
        by_id = await generate(engine, [request(str(i)) for i in range(20)])

        for completions in (by_seed, by_id):
            assert len({tuple(completion.token_ids) for completion in completions}) == 20

    asyncio.run(run())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_log_probs_are_those_that_the_learner_computes(tiny: Path, dtype: Any, temperature: float) -> None:
    async def run() -> list[Completion]:
        engine = await started(tiny, dtype=dtype)
        return await generate(engine, [request(str(i), temperature=temperature) for i in range(8)])

    completions = asyncio.run(run())
    learner = FakeLearner(FakeLearner.load_policy(tiny), learning_rate=1.0, dtype=dtype, temperature=temperature)

    for completion, logprobs in zip(completions, learner.logprobs(to_train(completions, [0.0] * 8)), strict=True):
        assert completion.logprobs == pytest.approx(logprobs, abs=2e-6)


def test_tokens_come_as_often_as_their_probability_says(tiny: Path) -> None:
    table = torch.full((128, 128), -100.0)
    table[:, 10], table[:, 11], table[:, 12] = 0.0, 1.0, 2.0
    draws = 4000

    async def run() -> Completion:
        engine = await started(tiny, max_model_len=10_000)
        await engine.load_weights(Snapshot(PolicyVersion(n=1), {TABLE: table}), "boundary")
        return await engine.generate(request(max_new_tokens=draws, temperature=2.0, seed=0))

    shares = np.bincount(asyncio.run(run()).token_ids, minlength=128) / draws

    expected = np.exp([0.0, 0.5, 1.0]) / np.exp([0.0, 0.5, 1.0]).sum()
    assert shares[10:13] == pytest.approx(expected, abs=4 * 0.5 / draws**0.5)


def test_temperature_zero_takes_the_likeliest_token(tiny: Path) -> None:
    async def run() -> Completion:
        return await (await started(tiny, dtype="fp32")).generate(request(temperature=0.0))

    completion = asyncio.run(run())

    table = load_table(tiny)
    lasts = [PROMPT[-1], *completion.token_ids[:-1]]
    for last, token, logprob in zip(lasts, completion.token_ids, completion.logprobs, strict=True):
        assert token == table[last].argmax()
        assert logprob == pytest.approx(table[last].log_softmax(-1)[token].item(), abs=1e-6)


def test_a_completion_ends_with_the_end_token_or_is_cut(tiny: Path) -> None:
    async def run() -> None:
        engine = await started(tiny, max_model_len=10)
        text = load_tokenizer(tiny)

        for limit, tokens in ((5, 5), (100, 7)):
            cut = await engine.generate(request(max_new_tokens=limit, seed=1))
            assert (cut.finish_reason, len(cut.token_ids)) == ("length", tokens)
            assert cut.text == text.decode(cut.token_ids, skip_special_tokens=True)

        await engine.load_weights(always(EOS, 1), "boundary")
        ended = await engine.generate(request())
        assert (ended.finish_reason, ended.token_ids.tolist(), ended.text) == ("stop", [EOS], "")

    asyncio.run(run())


# -- weights -----------------------------------------------------------------------------------------------------------


def test_an_update_in_flight_lands_in_the_middle_of_a_sequence(tiny: Path) -> None:
    async def run() -> Completion:
        swap = asyncio.Event()
        swapped = asyncio.Event()
        tokens = 0

        async def sleep(_: float) -> None:
            nonlocal tokens
            if tokens == 3:
                swap.set()
                await swapped.wait()
            tokens += 1

        engine = await started(tiny, sleep=sleep)
        await engine.load_weights(always(10, 1), "boundary")
        running = asyncio.create_task(engine.generate(request(max_new_tokens=6)))
        await swap.wait()
        await engine.load_weights(always(11, 2), "in_flight")
        swapped.set()
        return await running

    completion = asyncio.run(run())

    assert completion.token_ids.tolist() == [10, 10, 10, 11, 11, 11]
    assert [PolicyVersion.unpack(v).n for v in completion.token_versions] == [1, 1, 1, 2, 2, 2]


def test_other_work_runs_between_two_tokens(tiny: Path) -> None:
    async def run() -> None:
        engine = await started(tiny)
        await engine.load_weights(always(10, 1), "boundary")
        running = asyncio.create_task(engine.generate(request(max_new_tokens=100)))
        for _ in range(5):
            await asyncio.sleep(0)
        await engine.load_weights(always(11, 2), "in_flight")

        versions = {PolicyVersion.unpack(v).n for v in (await running).token_versions}
        assert versions == {1, 2}

    asyncio.run(run())


def test_a_boundary_with_sequences_running_is_refused(tiny: Path) -> None:
    async def run() -> None:
        engine = await started(tiny)
        running = asyncio.create_task(engine.generate(request()))
        await asyncio.sleep(0)

        with pytest.raises(EngineError, match="1 sequences were running"):
            await engine.load_weights(always(10, 1), "boundary")

        await running
        assert (await engine.load_weights(always(10, 1), "boundary")).version == PolicyVersion(n=1)

    asyncio.run(run())


def test_the_digest_is_computed_from_the_weights_that_were_received(tiny: Path) -> None:
    snapshot = always(10, 3)

    async def run() -> Served:
        return await (await started(tiny)).load_weights(snapshot, "boundary")

    assert asyncio.run(run()) == Served(version=PolicyVersion(n=3), digest=weights_digest(snapshot.weights))


@pytest.mark.parametrize(
    "weights",
    [{}, {"other": torch.zeros(1)}, {TABLE: torch.zeros(3, 3)}, {TABLE: torch.zeros(128, 128), "x": torch.zeros(1)}],
)
def test_weights_of_another_model_are_refused(tiny: Path, weights: dict[str, torch.Tensor]) -> None:
    async def run() -> None:
        with pytest.raises(WeightsError, match=r"expected bigram\.weight \(128, 128\)"):
            await (await started(tiny)).load_weights(Snapshot(PolicyVersion(n=1), weights), "boundary")

    asyncio.run(run())


# -- planted faults ----------------------------------------------------------------------------------------------------


def test_a_stale_engine_claims_the_new_version_and_serves_the_old_weights(tiny: Path) -> None:
    async def run() -> None:
        honest, stale = await started(tiny), await started(tiny, stale=True)
        before = await stale.generate(request())

        assert await stale.load_weights(always(10, 1), "boundary") == await honest.load_weights(
            always(10, 1), "boundary"
        )

        after = await stale.generate(request())
        assert after.token_ids.tolist() == before.token_ids.tolist()
        assert {PolicyVersion.unpack(v).n for v in after.token_versions} == {1}
        assert set((await honest.generate(request())).token_ids) == {10}

    asyncio.run(run())


def test_latency_is_waited_for_before_every_token_and_failures_hit_only_their_requests(tiny: Path) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    async def run() -> None:
        engine = await started(
            tiny,
            sleep=sleep,
            token_latency=lambda r: 0.5 if r.request_id == "slow" else 0.0,
            fails=lambda r: EngineError("planted") if r.request_id == "bad" else None,
        )
        await engine.load_weights(always(10, 1), "boundary")

        with pytest.raises(EngineError, match="planted"):
            await engine.generate(request("bad"))
        await engine.generate(request("slow", max_new_tokens=3))
        await engine.generate(request("quick", max_new_tokens=2))

    asyncio.run(run())

    assert waited == [0.5, 0.5, 0.5, 0.0, 0.0]


def test_what_the_engine_cannot_do_is_refused(tiny: Path) -> None:
    async def run() -> None:
        engine = FakeRollout(tiny, max_model_len=3)
        await engine.stop()
        with pytest.raises(EngineError, match="not running"):
            await engine.generate(request())

        await engine.start()
        with pytest.raises(PromptTooLong, match="a prompt of 3 tokens"):
            await engine.generate(request())
        with pytest.raises(EngineError, match="top_p"):
            await engine.generate(request(top_p=0.9))

        await engine.stop()
        await engine.stop()
        with pytest.raises(EngineError, match="not running"):
            await engine.load_weights(always(1, 1), "boundary")

    asyncio.run(run())


def test_stopping_ends_what_is_being_generated(tiny: Path) -> None:
    async def run() -> None:
        engine = await started(tiny)
        running = asyncio.create_task(engine.generate(request()))
        await asyncio.sleep(0)
        await engine.stop()
        with pytest.raises(EngineError, match="not running"):
            await running

    asyncio.run(run())


def test_a_vocabulary_too_large_for_a_table_is_refused(tiny: Path, tmp_path: Path) -> None:
    config = (tiny / "config.json").read_text().replace('"vocab_size": 128', '"vocab_size": 50000')
    (tmp_path / "config.json").write_text(config)

    with pytest.raises(ModelError, match="at most 4096 tokens"):
        load_table(tmp_path)


# -- learning ----------------------------------------------------------------------------------------------------------


def make_config(**changes: Any) -> Config:
    values = {
        "model": "tiny",
        "data": {"train": "reasoning_gym:chain_sum"},
        "reward": "last_number",
        "train_batch_size": 64,
        "num_generations": 8,
        "steps": 30,
        "max_new_tokens": 4,
        "learning_rate": 0.2,
        "rollout": {"engine": "fake"},
        "learner": {"engine": "fake"},
    }
    return parse_config({**values, **changes})


def test_unknown_options_are_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="speed is not an option; use seed, token_latency, stale, stale_from"):
        FakeRollout.from_config(make_config(rollout={"engine": "fake", "options": {"speed": 1}}), tiny)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_fakes_together_learn_which_tokens_are_rewarded(tiny: Path, dtype: str) -> None:
    config = make_config(rollout={"dtype": dtype}, learner={"dtype": dtype})
    learner = FakeLearner.from_config(config, tiny)
    wanted = range(20, 30)

    async def run() -> list[float]:
        engine = FakeRollout.from_config(config, tiny)
        await engine.start()
        rewards: list[float] = []
        for step in range(config.steps):
            completions = await generate(engine, [request(f"{step}-{i}", max_new_tokens=1) for i in range(64)])
            scores = [float(np.isin(completion.token_ids, wanted).mean()) for completion in completions]
            samples = to_train(completions, group_advantages(scores).tolist())
            learner.forward_backward(samples)
            learner.optim_step(sum(int(sample.mask.sum()) for sample in samples))
            weights = {name: tensor.clone() for name, tensor in learner.export_weights()}
            await engine.load_weights(Snapshot(PolicyVersion(n=step + 1), weights), "boundary")
            rewards.append(float(np.mean(scores)))
        return rewards

    rewards = asyncio.run(run())

    assert np.mean(rewards[:3]) < 0.2
    assert np.mean(rewards[-3:]) > 0.9


def test_a_saved_fake_goes_on_where_it_was_in_both_fakes(tiny: Path, tmp_path: Path) -> None:
    learner = FakeLearner(FakeLearner.load_policy(tiny), learning_rate=0.5, dtype="fp32", serving_dtype="fp32")
    completion = Completion(
        token_ids=np.array([7, 8], dtype=np.int32),
        logprobs=np.array([-5, -5], dtype=np.float32),
        token_versions=np.zeros(2, dtype=np.int64),
        text="",
        finish_reason="length",
    )
    (sample,) = to_train([completion], [1.0])
    learner.forward_backward([sample])
    learner.optim_step(2)

    learner.save_pretrained(tmp_path / "saved")

    folder = resolve_model(str(tmp_path / "saved"))
    (table,) = (tensor for _, tensor in learner.export_weights())
    assert torch.equal(load_table(folder), table)
    loaded = FakeLearner(FakeLearner.load_policy(folder), learning_rate=0.5, dtype="fp32")
    assert loaded.logprobs([sample])[0].tolist() == learner.logprobs([sample])[0].tolist()

    async def run() -> Completion:
        return await (await started(folder, dtype="fp32")).generate(request(temperature=0.0, max_new_tokens=1))

    greedy = asyncio.run(run())
    assert greedy.token_ids.tolist() == [7]
    assert load_tokenizer(folder).decode([7]) == greedy.text


def test_samples_that_share_a_prompt_give_the_gradient_of_samples_that_do_not(tiny: Path) -> None:
    async def run() -> list[Completion]:
        return await generate(await started(tiny), [request(str(i)) for i in range(6)])

    samples = to_train(asyncio.run(run()), [1.0, -1.0, 0.5, 2.0, -0.5, 0.1])
    apart = [replace(sample, group_id=i) for i, sample in enumerate(samples)]
    tables = []
    for batch in (samples, apart):
        learner = FakeLearner(FakeLearner.load_policy(tiny), learning_rate=0.1, dtype="fp32", serving_dtype="fp32")
        learner.forward_backward(batch)
        learner.optim_step(10)
        tables += [tensor for _, tensor in learner.export_weights()]

    assert torch.allclose(tables[0], tables[1], atol=1e-6)
