"""The torch learner: its sums, its chunks, its two copies of the weights, and its optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from asyncflow.algorithms.losses import merge, policy_loss
from asyncflow.config import parse_config
from asyncflow.engines.models import describe_model, resolve_model
from asyncflow.engines.torch_learner import HuggingFacePolicy, TorchLearner
from asyncflow.errors import ConfigError, EngineError, ModelError, WeightsError
from asyncflow.types import TrainSample

VOCABULARY = 128


@pytest.fixture(scope="module")
def tiny() -> Path:
    return resolve_model("tiny")


@pytest.fixture
def make_learner(tiny: Path) -> Callable[..., TorchLearner]:
    """A learner of `tiny` on the CPU, in fp32 unless said otherwise."""

    def make(**options: Any) -> TorchLearner:
        defaults = {"learning_rate": 1e-2, "dtype": "fp32", "serving_dtype": "fp32", "device": "cpu"}
        return TorchLearner(HuggingFacePolicy(tiny), **{**defaults, **options})

    return make


@pytest.fixture(scope="module")
def samples() -> list[TrainSample]:
    """Four groups of four, with lags, negative advantages and masked tokens."""
    random = np.random.default_rng(0)
    made: list[TrainSample] = []
    for group in range(4):
        prompt = random.integers(0, VOCABULARY, random.integers(3, 20)).astype(np.int32)
        for _ in range(4):
            tokens = int(random.integers(1, 20))
            made.append(
                TrainSample(
                    sample_id=len(made),
                    group_id=group,
                    prompt_ids=prompt,
                    response_ids=random.integers(0, VOCABULARY, tokens).astype(np.int32),
                    mask=random.random(tokens) < 0.8,
                    behaviour_logprobs=(-4.85 + 0.3 * random.standard_normal(tokens)).astype(np.float32),
                    advantages=np.full(tokens, random.standard_normal(), dtype=np.float32),
                )
            )
    return made


def gradients(learner: TorchLearner) -> dict[str, torch.Tensor]:
    """What has been accumulated: in fp32 the masters are the policy's own parameters."""
    module = learner._policy.module
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def exported(learner: TorchLearner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.export_weights()}


def assert_same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= tolerance * second[name].norm(), name


def model_logprobs(learner: TorchLearner, sample: TrainSample, temperature: float = 1.0) -> torch.Tensor:
    """(R,) from the whole model's logits, one sequence at a time."""
    model: Any = learner._policy.module
    ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids])).long()[None]
    logprobs = (model(input_ids=ids, use_cache=False).logits[0, :-1].float() / temperature).log_softmax(-1)
    start = len(sample.prompt_ids) - 1
    gathered: torch.Tensor = logprobs[start:].gather(-1, ids[0, start + 1 :, None])[:, 0]
    return gathered


# -- log-probs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_model_with_the_temperature_applied(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample], temperature: float
) -> None:
    learner = make_learner(temperature=temperature)

    found = learner.logprobs(samples)

    with torch.no_grad():
        for sample, logprobs in zip(samples, found, strict=True):
            assert logprobs.dtype == np.float32
            assert logprobs == pytest.approx(model_logprobs(learner, sample, temperature).numpy(), abs=1e-5)


def test_log_probs_in_bf16_are_close_to_those_in_fp32(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample]
) -> None:
    coarse, exact = make_learner(dtype="bf16").logprobs(samples), make_learner().logprobs(samples)

    for a, b in zip(coarse, exact, strict=True):
        assert a == pytest.approx(b, abs=0.02)


def test_a_head_in_chunks_gives_the_gradient_and_sums_of_the_whole_head(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample]
) -> None:
    whole, chunked = make_learner(), make_learner(logits_at_once=7 * VOCABULARY)

    sums = whole.forward_backward(samples)
    chunked_sums = chunked.forward_backward(samples)

    assert chunked_sums == pytest.approx(sums, rel=1e-5)
    assert_same(gradients(chunked), gradients(whole), 1e-6)
    for a, b in zip(chunked.logprobs(samples), whole.logprobs(samples), strict=True):
        assert a == pytest.approx(b, abs=1e-6)


# -- the gradient of a step --------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_summed_loss_of_separate_sequences(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample]
) -> None:
    options: dict[str, Any] = {"clip_low": 0.1, "clip_high": 0.3, "importance_cap": 1.2}
    learner, reference = make_learner(**options), make_learner()

    sums = learner.forward_backward(samples)
    total = 0.0
    for sample in samples:
        columns = map(torch.from_numpy, (sample.behaviour_logprobs, sample.advantages, sample.mask))
        behaviour, advantages, mask = columns
        loss, _ = policy_loss(model_logprobs(reference, sample), behaviour, None, advantages, mask, **options)
        loss.backward()
        total += loss.item()

    assert sums["loss"] == pytest.approx(total, rel=1e-5)
    assert sums["tokens"] == sum(sample.mask.sum() for sample in samples)
    assert_same(gradients(learner), gradients(reference), 1e-5)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("micro_batch_tokens", [1, 50, 4096])
def test_the_gradient_does_not_depend_on_how_a_step_is_split(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample], share_prompts: bool, micro_batch_tokens: int
) -> None:
    whole = make_learner()
    split = make_learner(share_prompts=share_prompts, micro_batch_tokens=micro_batch_tokens)

    sums = whole.forward_backward(samples)
    merged: dict[str, float] = {}
    for start in range(0, len(samples), 4):
        merged = merge(merged, split.forward_backward(samples[start : start + 4]))

    assert merged == pytest.approx(sums, rel=1e-5)
    assert_same(gradients(split), gradients(whole), 1e-6)


def test_a_sample_outside_the_mask_changes_nothing(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample]
) -> None:
    masked = [replace(sample, mask=np.zeros_like(sample.mask)) for sample in samples[:2]]
    learner, reference = make_learner(), make_learner()

    assert learner.forward_backward(masked) == {}
    assert learner.forward_backward([]) == {}
    sums = learner.forward_backward(masked + samples[2:])

    assert sums == pytest.approx(dict(reference.forward_backward(samples[2:])), rel=1e-5)
    assert_same(gradients(learner), gradients(reference), 1e-6)


def test_proximal_log_probs_of_the_current_policy_give_the_gradient_of_a_single_update(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample]
) -> None:
    learner, reference = make_learner(), make_learner()
    proximal = learner.logprobs(samples)
    given = [replace(s, proximal_logprobs=p) for s, p in zip(samples, proximal, strict=True)]

    learner.forward_backward(given)
    reference.forward_backward(samples)

    assert_same(gradients(learner), gradients(reference), 1e-5)
    with pytest.raises(ValueError, match="of all samples of a step, or of none"):
        learner.forward_backward([given[0], samples[1]])


def test_gradients_in_bf16_point_the_same_way_and_are_added_up_in_fp32(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample]
) -> None:
    coarse, exact = make_learner(dtype="bf16", grad_clip=1e9), make_learner(grad_clip=1e9)

    for _ in range(40):
        coarse.forward_backward(samples)
        exact.forward_backward(samples)
    coarse_norm, exact_norm = coarse.optim_step(1.0).grad_norm, exact.optim_step(1.0).grad_norm

    # 40 equal gradients added up in bf16 would be off by far more than the rounding of each.
    assert coarse_norm == pytest.approx(exact_norm, rel=0.01)


# -- the optimizer -----------------------------------------------------------------------------------------------------


def test_an_update_divides_then_clips_then_takes_a_step_of_adamw_with_decay_on_matrices_only(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample]
) -> None:
    options = {"betas": (0.8, 0.9), "weight_decay": 0.1}
    learner = make_learner(grad_clip=0.01, **options)
    before = exported(learner)
    matrices = {name: torch.nn.Parameter(t.clone()) for name, t in before.items() if t.ndim > 1}
    vectors = {name: torch.nn.Parameter(t.clone()) for name, t in before.items() if t.ndim == 1}
    optimizer = torch.optim.AdamW(
        [
            {"params": list(matrices.values()), "weight_decay": 0.1},
            {"params": list(vectors.values()), "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.8, 0.9),
    )

    for _ in range(2):
        learner.forward_backward(samples)
        divided = {name: gradient / 100 for name, gradient in gradients(learner).items()}
        norm = torch.stack([gradient.norm() for gradient in divided.values()]).norm().item()
        stats = learner.optim_step(100)
        for name, parameter in (matrices | vectors).items():
            parameter.grad = divided[name] * (0.01 / norm)
        optimizer.step()

        assert stats.grad_norm == pytest.approx(norm, rel=1e-5)
        assert norm > 0.01
        assert stats.learning_rate == 1e-2
        assert all(not gradient.any() for gradient in gradients(learner).values())
    after = exported(learner)
    for name, parameter in (matrices | vectors).items():
        assert torch.allclose(after[name], parameter.detach(), atol=1e-4), name
        assert not torch.equal(after[name], before[name]), name


def test_the_learning_rate_rises_linearly_over_the_warm_up_and_stays(
    make_learner: Callable[..., TorchLearner],
) -> None:
    learner = make_learner(learning_rate=1.0, warmup_updates=4)

    rates = [learner.optim_step(1.0).learning_rate for _ in range(6)]

    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_an_update_without_any_gradient_is_an_update(make_learner: Callable[..., TorchLearner]) -> None:
    learner = make_learner()
    before = exported(learner)

    stats = learner.optim_step(1.0)

    assert stats.grad_norm == 0
    assert_same(exported(learner), before, 0.0)
    with pytest.raises(ValueError, match="divided by 0"):
        learner.optim_step(0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_is_refused_cleared_and_changes_nothing(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample], dtype: str
) -> None:
    learner = make_learner(dtype=dtype)
    learner.forward_backward(samples)
    learner.optim_step(100)
    before = exported(learner)
    poisoned = [replace(sample, advantages=np.full_like(sample.advantages, math.nan)) for sample in samples]

    learner.forward_backward(poisoned)
    with pytest.raises(EngineError, match="not finite"):
        learner.optim_step(100)

    assert_same(exported(learner), before, 0.0)
    learner.forward_backward(samples)
    assert math.isfinite(learner.optim_step(100).grad_norm)


# -- the weights -------------------------------------------------------------------------------------------------------


def test_exported_names_are_those_of_the_checkpoint_sorted_and_tied_weights_come_once(
    make_learner: Callable[..., TorchLearner], tiny: Path
) -> None:
    from safetensors.torch import load_file

    stored = load_file(tiny / "model.safetensors")

    weights = exported(make_learner(serving_dtype="bf16"))

    assert list(weights) == sorted(stored)
    assert "lm_head.weight" not in weights
    for name, tensor in weights.items():
        assert torch.equal(tensor, stored[name]), name


def test_an_update_too_small_for_bf16_is_kept_in_the_masters_until_it_shows(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample]
) -> None:
    name = "model.norm.weight"  # ones, next to which bf16 has steps of 1/256 and 1/128
    served = make_learner(dtype="bf16", serving_dtype="bf16", learning_rate=1e-4)
    masters = make_learner(dtype="bf16", serving_dtype="fp32", learning_rate=1e-4)

    def update(times: int) -> None:
        for learner in (served, masters):
            for _ in range(times):
                learner.forward_backward(samples)
                learner.optim_step(100)

    update(1)
    assert (exported(served)[name] == 1).all()
    assert (exported(masters)[name] != 1).all()
    update(60)
    assert (exported(served)[name] != 1).any()
    rounded = {name: tensor.bfloat16() for name, tensor in exported(masters).items()}
    assert_same(exported(served), rounded, 0.0)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_is_saved_is_what_is_exported_and_loads_as_a_model(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample], tiny: Path, tmp_path: Path, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM

    learner = make_learner(serving_dtype=dtype)
    learner.forward_backward(samples)
    learner.optim_step(100)

    learner.save_pretrained(tmp_path / "saved")

    folder = resolve_model(str(tmp_path / "saved"))
    assert describe_model(folder) == describe_model(tiny)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert_same(dict(loaded.named_parameters()), exported(learner), 0.0)
    assert (folder / "tokenizer_config.json").exists()
    assert loaded.generation_config.eos_token_id == 2


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_log_probs_under_other_weights_are_those_of_that_version_and_leave_the_learner_as_it_was(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample], dtype: str
) -> None:
    learner = make_learner(dtype=dtype, serving_dtype=dtype, learning_rate=1e-2)
    first = {name: tensor.clone() for name, tensor in learner.export_weights()}
    snapshot: Any = SimpleNamespace(version="0.0", tensors=lambda: iter(first.items()))
    before = learner.logprobs(samples)
    learner.forward_backward(samples)
    learner.optim_step(1.0)
    after, weights = learner.logprobs(samples), exported(learner)

    under = learner.logprobs_under(samples, weights=snapshot)

    assert all(np.array_equal(one, other) for one, other in zip(under, before, strict=True))
    assert not np.array_equal(before[0], after[0])
    assert all(np.array_equal(one, other) for one, other in zip(learner.logprobs(samples), after, strict=True))
    assert_same(exported(learner), weights, 0.0)


def test_log_probs_under_weights_of_another_model_are_refused_and_leave_the_learner_as_it_was(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample]
) -> None:
    learner = make_learner()
    weights = exported(learner)
    changed = {name: torch.ones_like(tensor) for name, tensor in list(weights.items())[:-1]}
    snapshot: Any = SimpleNamespace(version="0.0", tensors=lambda: iter(changed.items()))

    with pytest.raises(WeightsError, match="is not of this model"):
        learner.logprobs_under(samples, weights=snapshot)

    assert_same(exported(learner), weights, 0.0)


def test_log_probs_at_another_temperature_are_those_of_a_learner_with_that_temperature(
    make_learner: Callable[..., TorchLearner], samples: list[TrainSample]
) -> None:
    learner = make_learner(temperature=0.5)

    plain = learner.logprobs_under(samples, temperature=1.0)

    assert all(np.array_equal(a, b) for a, b in zip(plain, make_learner().logprobs(samples), strict=True))
    assert not np.array_equal(plain[0], learner.logprobs(samples)[0])


def test_closing_twice_is_fine(make_learner: Callable[..., TorchLearner]) -> None:
    learner = make_learner()

    learner.close()
    learner.close()


# -- from a configuration ----------------------------------------------------------------------------------------------


def config_with(**learner: Any) -> Any:
    return parse_config(
        {
            "model": "tiny",
            "data": {"train": "reasoning_gym:chain_sum"},
            "reward": "last_number",
            "train_batch_size": 16,
            "steps": 1,
            "updates_per_step": 2,
            "max_new_tokens": 4,
            "learning_rate": 0.5,
            "learner": learner,
        }
    )


def test_warm_up_is_configured_in_steps_and_done_in_updates(tiny: Path) -> None:
    learner = TorchLearner.from_config(config_with(warmup_steps=2), tiny)

    assert [learner.optim_step(1.0).learning_rate for _ in range(5)] == [0.125, 0.25, 0.375, 0.5, 0.5]


def test_an_unknown_option_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner\.options: speed is not an option; use share_prompts, device"):
        TorchLearner.from_config(config_with(options={"speed": 11}), tiny)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        HuggingFacePolicy(tmp_path)


def test_a_model_that_changes_its_logits_after_the_head_is_refused(tmp_path: Path) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=4.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path)

    with pytest.raises(ModelError, match="changes its logits after the output head"):
        HuggingFacePolicy(tmp_path)
