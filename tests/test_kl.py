"""KL estimators against exact sums over a small vocabulary, and what they do inside the policy loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asyncflow.algorithms.kl import ESTIMATORS, k1, k2, k3, k3_plus, sequence_kl
from asyncflow.algorithms.losses import merge, policy_loss, summarise
from asyncflow.types import KLEstimator

Estimator = Callable[[Tensor, Tensor], Tensor]

POLICY = torch.tensor([0.5, -1.0, 0.2, 1.5, -0.3], dtype=torch.float64)
"""Logits over five tokens."""
REFERENCE = torch.tensor([0.1, 0.4, -0.8, 1.0, 0.9], dtype=torch.float64).log_softmax(-1)
BEHAVIOUR = torch.tensor([0.9, -0.5, 0.0, 0.7, 0.2], dtype=torch.float64).log_softmax(-1)


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL of two distributions over the vocabulary, from all of their log-probs."""
    return (first.exp() * (first - second)).sum()


def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Of a function of the policy's log-probs, with respect to its logits."""
    logits = POLICY.clone().requires_grad_()
    loss(logits.log_softmax(-1)).backward()
    assert logits.grad is not None
    return logits.grad


def mean_gradient(estimator: Estimator) -> Tensor:
    """The mean over tokens that the policy samples of a token's gradient, as an exact sum."""
    return gradient(lambda logprobs: (logprobs.detach().exp() * estimator(logprobs, REFERENCE)).sum())


# -- values ------------------------------------------------------------------------------------------------------------


def test_the_estimators_are_their_formulas() -> None:
    current, reference = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-1.5, -0.5]).double()

    assert k1(current, reference).tolist() == [0.5, -1.5]
    assert k2(current, reference).tolist() == [0.125, 1.125]
    expected = [math.exp(-0.5) - 1 + 0.5, math.exp(1.5) - 1 - 1.5]
    assert k3(current, reference).tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(k3_plus(current, reference), k3(current, reference))


@pytest.mark.parametrize("estimator", [k1, k3, k3_plus])
def test_k1_and_k3_have_the_divergence_as_their_mean(estimator: Estimator) -> None:
    logprobs = POLICY.log_softmax(-1)

    mean = (logprobs.exp() * estimator(logprobs, REFERENCE)).sum()

    assert mean.item() == pytest.approx(kl(logprobs, REFERENCE).item(), rel=1e-12)


def test_k2_has_another_mean() -> None:
    logprobs = POLICY.log_softmax(-1)

    assert (logprobs.exp() * k2(logprobs, REFERENCE)).sum().item() != pytest.approx(
        kl(logprobs, REFERENCE).item(), rel=0.01
    )


@given(st.floats(-1e4, 0), st.floats(-1e4, 0))
def test_all_but_k1_are_finite_and_never_negative(current: float, reference: float) -> None:
    names: tuple[KLEstimator, ...] = ("k2", "k3", "k3+")
    for name in names:
        value = ESTIMATORS[name](torch.tensor([current]), torch.tensor([reference])).item()
        assert math.isfinite(value)
        assert value >= 0.0


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_equal_policies_have_a_divergence_of_exactly_zero(name: KLEstimator) -> None:
    logprobs = torch.tensor([-0.1, -3.7, -20.0])

    assert ESTIMATORS[name](logprobs, logprobs.clone()).tolist() == [0.0, 0.0, 0.0]


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_the_gradient_of_k1_is_nothing_on_average() -> None:
    assert mean_gradient(k1).abs().max() < 1e-15


@pytest.mark.parametrize("estimator", [k2, k3_plus])
def test_k2_has_the_gradient_of_the_divergence_from_the_reference(estimator: Estimator) -> None:
    assert torch.allclose(mean_gradient(estimator), gradient(lambda logprobs: kl(logprobs, REFERENCE)), atol=1e-14)


def test_k3_has_the_gradient_of_the_divergence_the_other_way_round() -> None:
    assert torch.allclose(mean_gradient(k3), gradient(lambda logprobs: kl(REFERENCE, logprobs)), atol=1e-14)
    assert not torch.allclose(mean_gradient(k3), gradient(lambda logprobs: kl(logprobs, REFERENCE)), atol=0.01)


def kl_loss(logprobs: Tensor, behaviour: Tensor, **options: object) -> Tensor:
    """The KL term alone (all advantages are 0) of every token once, as the behaviour policy sampled it on average."""
    loss = torch.zeros((), dtype=torch.float64)
    for token in range(len(logprobs)):
        at = slice(token, token + 1)
        term, _ = policy_loss(
            logprobs[at],
            behaviour[at],
            None,
            torch.zeros(1, dtype=torch.float64),
            torch.ones(1, dtype=torch.bool),
            reference_logprobs=REFERENCE[at],
            kl_coef=1.0,
            **options,  # type: ignore[arg-type]
        )
        loss = loss + behaviour[token].exp() * term
    return loss


def test_in_the_loss_the_gradient_is_that_of_the_current_policy_though_another_one_sampled() -> None:
    found = gradient(lambda logprobs: kl_loss(logprobs, BEHAVIOUR, kl_estimator="k2", importance_cap=None))

    assert torch.allclose(found, gradient(lambda logprobs: kl(logprobs, REFERENCE)), atol=1e-14)


# -- in the loss -------------------------------------------------------------------------------------------------------


def test_the_term_is_weighted_capped_scaled_and_summed_over_the_mask() -> None:
    current = torch.tensor([-3.0, -1.0, -2.0, -0.5]).double()
    behaviour = current - torch.tensor([1.0, 2.0, 0.5, 9.0]).double().log()
    reference = torch.tensor([math.nan, -1.5, -2.5, -0.1]).double()
    mask = torch.tensor([False, True, True, True])
    without, _ = policy_loss(current, behaviour, None, torch.ones(4).double(), mask, importance_cap=5.0)

    with_kl, sums = policy_loss(
        current,
        behaviour,
        None,
        torch.ones(4).double(),
        mask,
        importance_cap=5.0,
        reference_logprobs=reference,
        kl_coef=0.1,
        kl_estimator="k3",
    )

    terms = k3(current[1:], reference[1:])
    expected = 0.1 * (2 * terms[0] + 0.5 * terms[1] + 5 * terms[2])
    assert (with_kl - without).item() == pytest.approx(expected.item(), rel=1e-12)
    assert sums["kl"] == pytest.approx(terms.sum().item(), rel=1e-12)
    assert sums["kl_max"] == pytest.approx(terms.max().item(), rel=1e-12)
    assert sums["kl_k1"] == pytest.approx((current[1:] - reference[1:]).sum().item(), rel=1e-12)


def test_a_reference_without_a_coefficient_is_measured_and_changes_nothing() -> None:
    current = torch.tensor([-1.0, -2.0]).requires_grad_()
    mask = torch.ones(2, dtype=torch.bool)
    plain, sums = policy_loss(current, torch.tensor([-1.1, -2.0]), None, torch.ones(2), mask)

    measured, more = policy_loss(
        current, torch.tensor([-1.1, -2.0]), None, torch.ones(2), mask, reference_logprobs=torch.tensor([-1.2, -2.2])
    )

    assert torch.equal(plain, measured)
    assert {name: more[name] for name in sums} == sums
    assert more.keys() - sums.keys() == {"kl", "kl_max", "kl_k1"}


def test_the_metrics_are_means_over_the_tokens_of_all_micro_batches() -> None:
    current, reference = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -2.5, -0.1])
    parts: dict[str, float] = {}
    for part in (slice(0, 1), slice(1, 3)):
        size = len(current[part])
        _, sums = policy_loss(
            current[part],
            current[part],
            None,
            torch.ones(size),
            torch.ones(size, dtype=torch.bool),
            reference_logprobs=reference[part],
        )
        parts = merge(parts, sums)

    metrics = summarise(parts)

    assert metrics["kl"] == pytest.approx(k3(current, reference).mean().item(), rel=1e-6)
    assert metrics["kl/max"] == pytest.approx(k3(current, reference).max().item(), rel=1e-6)
    assert metrics["kl/k1"] == pytest.approx(k1(current, reference).mean().item(), rel=1e-6)


def test_without_a_reference_no_divergence_is_reported() -> None:
    _, sums = policy_loss(
        torch.tensor([-1.0]), torch.tensor([-1.0]), None, torch.ones(1), torch.ones(1, dtype=torch.bool)
    )

    assert not [name for name in summarise(sums) if name.startswith("kl")]


# -- in the reward -----------------------------------------------------------------------------------------------------


def test_the_divergence_of_a_response_is_the_sum_over_its_tokens() -> None:
    behaviour = np.array([-1.0, -2.0, -0.25], dtype=np.float32)
    reference = np.array([-1.5, -1.0, -0.25], dtype=np.float32)

    assert sequence_kl(behaviour, reference, "k1") == -0.5
    assert sequence_kl(behaviour, reference, "k2") == 0.625
    assert sequence_kl(behaviour, reference, "k3") == pytest.approx(
        math.exp(-0.5) - 1 + 0.5 + math.exp(1) - 2, rel=1e-12
    )


def test_columns_of_the_store_which_cannot_be_written_to_are_taken_as_they_are() -> None:
    logprobs = np.array([-1.0], dtype=np.float32)
    logprobs.setflags(write=False)

    assert sequence_kl(logprobs, logprobs, "k1") == 0.0
