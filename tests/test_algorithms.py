"""Advantages and losses against values computed by hand, and their gradients against finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.algorithms.advantages import group_advantages, is_zero_variance
from asyncflow.algorithms.attention import matmul_attention
from asyncflow.algorithms.losses import merge, policy_loss, summarise


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_of(current: Any, behaviour: Any, proximal: Any, advantages: Any, **options: Any) -> Any:
    mask = torch.ones(len(current), dtype=torch.bool)
    return policy_loss(current, behaviour, proximal, advantages, mask, **options)


# -- advantages --------------------------------------------------------------------------------------------------------


def test_an_advantage_is_the_distance_from_the_group_mean_in_sample_standard_deviations() -> None:
    advantages = group_advantages([1.0, 0.0, 0.0, 1.0])

    deviation = math.sqrt(4 * 0.25 / 3)
    assert advantages == pytest.approx(np.array([0.5, -0.5, -0.5, 0.5]) / (deviation + 1e-4), rel=1e-12)
    assert advantages.dtype == np.float64


@given(st.floats(-1e6, 1e6), st.integers(1, 16))
def test_equal_rewards_have_no_variance_and_advantages_of_exactly_zero(reward: float, samples: int) -> None:
    rewards = [reward] * samples

    assert is_zero_variance(rewards)
    assert group_advantages(rewards).tolist() == [0.0] * samples


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0, -3.0]), min_size=2, max_size=16))
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_the_rewards(rewards: list[float]) -> None:
    advantages = group_advantages(rewards)

    assert abs(advantages.sum()) < 1e-9
    assert (np.argsort(advantages, kind="stable") == np.argsort(rewards, kind="stable")).all()
    assert is_zero_variance(rewards) == (len(set(rewards)) == 1)


def test_a_group_that_has_shrunk_to_one_sample_has_advantage_zero() -> None:
    assert group_advantages([0.7]).tolist() == [0.0]


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(reward: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        group_advantages([0.0, reward])


# -- the policy loss ---------------------------------------------------------------------------------------------------


def test_the_loss_is_the_clipped_objective_weighted_by_the_capped_behaviour_ratio() -> None:
    # r = π_θ/π_prox:              1.1        1.5 clipped    0.5 clipped    1.5, A < 0: not clipped
    ratio = tensor(1.1, 1.5, 0.5, 1.5)
    # ρ = π_prox/μ:                2          0.5            1              9, capped at 5
    behaviour_ratio = tensor(2.0, 0.5, 1.0, 9.0)
    advantages = tensor(1.0, 2.0, -1.0, -1.0)
    proximal = tensor(-1.0, -2.0, -3.0, -0.5)

    loss, sums = loss_of(
        proximal + ratio.log(),
        proximal - behaviour_ratio.log(),
        proximal,
        advantages,
        clip_low=0.2,
        clip_high=0.3,
        importance_cap=5.0,
    )

    expected = -(2 * 1.1 * 1 + 0.5 * 1.3 * 2 + 1 * 0.8 * -1 + 5 * 1.5 * -1)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert sums == pytest.approx(
        {
            "tokens": 4,
            "loss": expected,
            "entropy": -(proximal + ratio.log()).sum().item(),
            "behaviour_ratio": 12.5,
            "behaviour_ratio_sq": 4 + 0.25 + 1 + 81,
            "behaviour_ratio_max": 9,
            "truncated": 1,
            "proximal_ratio": 4.6,
            "proximal_ratio_sq": 1.21 + 2.25 + 0.25 + 2.25,
            "proximal_ratio_max": 1.5,
            "clipped_low": 1,
            "clipped_high": 1,
            "logprob_diff": math.log(2) + math.log(2) + math.log(9),
            "mismatch_kl": sum(x - 1 - math.log(x) for x in (2, 0.5, 1, 9)),
        },
        rel=1e-9,
    )


def test_without_proximal_log_probs_the_ratio_is_one_and_the_gradient_is_that_of_the_policy_gradient() -> None:
    current = tensor(-1.0, -2.0, -0.3).requires_grad_()
    behaviour, advantages = tensor(-1.2, -2.0, -0.1), tensor(1.0, -2.0, 0.5)

    loss, sums = loss_of(current, behaviour, None, advantages, importance_cap=1.1)
    loss.backward()

    weights = (current.detach() - behaviour).exp().clamp(max=1.1)
    assert weights[0] == 1.1
    assert current.grad is not None
    assert torch.allclose(current.grad, -weights * advantages)
    assert loss.item() == pytest.approx(-(weights * advantages).sum().item())
    assert sums["proximal_ratio"] == 3
    assert sums["clipped_low"] == sums["clipped_high"] == 0


def test_the_gradient_agrees_with_finite_differences_away_from_the_corners_of_the_clip() -> None:
    proximal = tensor(-1.0, -2.0, -0.5, -1.5, -0.7)
    current = (proximal + tensor(0.05, 0.6, -0.6, -0.6, 0.6)).requires_grad_()
    behaviour, advantages = proximal + tensor(0.3, -0.3, 0.1, -2.5, 0.0), tensor(1.0, 1.0, 1.0, -1.0, -1.0)

    def objective(logprobs: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = loss_of(logprobs, behaviour, proximal, advantages, importance_cap=5.0)[0]
        return loss

    assert torch.autograd.gradcheck(objective, (current,))


@pytest.mark.parametrize(
    ("advantage", "shift", "flows"), [(1, 0.6, False), (1, -0.6, True), (-1, 0.6, True), (-1, -0.6, False)]
)
def test_a_token_that_has_moved_far_enough_in_the_wanted_direction_has_no_gradient(
    advantage: float, shift: float, flows: bool
) -> None:
    current = tensor(-1.0 + shift).requires_grad_()

    loss_of(current, tensor(-1.0), tensor(-1.0), tensor(advantage))[0].backward()

    assert current.grad is not None
    assert bool(current.grad.item()) == flows


def test_what_is_outside_the_mask_takes_no_part_whatever_it_holds() -> None:
    current = tensor(-1.0, -5.0, -2.0).requires_grad_()
    junk = tensor(-1.5, math.nan, -2.5)
    advantages = tensor(1.0, math.inf, -1.0)
    mask = torch.tensor([True, False, True])

    loss, sums = policy_loss(current, junk, junk, advantages, mask)
    loss.backward()
    kept, kept_sums = loss_of(current[mask], junk[mask], junk[mask], advantages[mask])

    assert loss.item() == kept.item()
    assert sums == kept_sums
    assert current.grad is not None
    assert current.grad[1] == 0
    assert torch.isfinite(current.grad).all()


def test_nothing_under_the_mask_is_a_loss_of_zero() -> None:
    current = tensor(-1.0).requires_grad_()

    loss, sums = policy_loss(current, tensor(-1.0), None, tensor(1.0), torch.tensor([False]))
    loss.backward()

    assert loss.item() == 0
    assert set(sums.values()) == {0.0}
    assert summarise(sums) == {}


def test_ratios_stay_finite_for_policies_that_are_worlds_apart() -> None:
    current = torch.tensor([-300.0, -0.1], requires_grad=True)
    behaviour = torch.tensor([-0.1, -300.0])

    loss, sums = loss_of(current, behaviour, None, torch.tensor([1.0, 1.0]), importance_cap=None)
    loss.backward()

    assert current.grad is not None
    assert torch.isfinite(current.grad).all()
    assert all(math.isfinite(value) for value in sums.values())


def test_sums_do_not_depend_on_how_the_tokens_are_split() -> None:
    generator = torch.Generator().manual_seed(1)
    current, behaviour, proximal, advantages = torch.randn(4, 101, generator=generator)
    behaviour, proximal = current + 0.3 * behaviour, current + 0.3 * proximal
    whole_loss, whole = loss_of(current, behaviour, proximal, advantages, importance_cap=1.5)

    merged: dict[str, float] = {}
    loss = 0.0
    for part in torch.arange(101).split([1, 40, 0, 60]):
        part_loss, sums = loss_of(current[part], behaviour[part], proximal[part], advantages[part], importance_cap=1.5)
        loss += part_loss.item()
        merged = merge(merged, sums)

    assert loss == pytest.approx(whole_loss.item(), rel=1e-6)
    assert merged == pytest.approx(whole, rel=1e-6)
    assert merged["behaviour_ratio_max"] == whole["behaviour_ratio_max"]


def test_metrics_are_means_over_tokens_and_the_effective_sample_size_is_that_of_the_behaviour_ratio() -> None:
    behaviour_ratio = tensor(1.0, 3.0, 2.0)
    _, sums = loss_of(tensor(0, 0, 0), -behaviour_ratio.log(), None, tensor(1, 1, -1), importance_cap=2.5)

    metrics = summarise(sums)

    normalised = behaviour_ratio / behaviour_ratio.mean()
    assert metrics["ess"] == pytest.approx(1 / normalised.square().mean().item())
    assert metrics["ratio/behaviour_mean"] == pytest.approx(2.0)
    assert metrics["ratio/behaviour_max"] == pytest.approx(3.0)
    assert metrics["ratio/truncated"] == pytest.approx(1 / 3)
    assert metrics["ratio/proximal_mean"] == metrics["ratio/proximal_max"] == 1.0
    assert metrics["mismatch_logprob"] == pytest.approx(math.log(6) / 3)
    assert metrics["loss"] == pytest.approx(-(1 + 2.5 - 2) / 3)


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
def test_attention_by_matrix_products_is_that_of_pytorch_with_grouped_heads(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 9, 8, generator=generator, dtype=torch.float64).requires_grad_()
    key, value = (torch.randn(2, 2, 9, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    mask = None
    if masked:
        mask = (torch.rand(2, 1, 9, 9, generator=generator) > 0.5) | torch.eye(9, dtype=torch.bool)

    ours = matmul_attention(query, key, value, mask, 0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=0.3, enable_gqa=True
    )

    assert torch.allclose(ours, theirs, atol=1e-6)
    for leaf in (query, key, value):
        mine, other = (torch.autograd.grad(out.square().sum(), leaf, retain_graph=True)[0] for out in (ours, theirs))
        assert torch.allclose(mine, other, atol=1e-5)
