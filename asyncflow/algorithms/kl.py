"""How far the policy is from the reference policy, estimated from the tokens that were sampled.

With q = π_ref/π of a sampled token (Schulman 2020, joschu.net/blog/kl-approx.html)::

    k1 = −log q            k2 = ½·log² q            k3 = q − 1 − log q

All estimate KL(π‖π_ref) for tokens that π sampled. As *values*, k1 is unbiased and of either sign, k2 is biased and
never negative, k3 is unbiased and never negative. What counts in a loss is the *gradient*, and the gradient of an
unbiased estimate is not an unbiased gradient, because π also decides what is sampled. On tokens that π sampled:

    =====  =======================  ==========================================================
    loss   gradient of a token      its mean
    =====  =======================  ==========================================================
    k1     ∇log π                   0: it does nothing, and is refused
    k2     log(π/π_ref)·∇log π      ∇KL(π‖π_ref)
    k3     (1 − q)·∇log π           ∇KL(π_ref‖π); the same as k2's to first order where q ≈ 1
    k3+    that of k2               ∇KL(π‖π_ref), and the value is k3's
    =====  =======================  ==========================================================

These are divergences of a token given those before it; how a token changes the divergence of later ones is left out, as
in GRPO (DeepSeekMath, arXiv:2402.03300, eq. 4, which takes k3). KL in the reward has that too: an advantage with
−Σ k1 in it has the whole sequence's ∇KL(π‖π_ref) as its mean, and for k2 and k3 it has not (Tang and Munos,
arXiv:2506.09477, works these means out).

Asynchrony. Tokens come from μ, not from π. In the loss, the term is therefore weighted like the objective, by the
truncated sg(π/μ): its mean is again one over π, up to the truncation (DeepSeek-V3.2, arXiv:2512.02556, weights k3 by
the same ratio). In the reward, see `sequence_kl`. A group that `zero_variance` skips has no KL term either.

Left out, and why: a coefficient that adapts to a target (a second loop to tune; `kl` is in every step's metrics), and
the divergence over the whole vocabulary (the reference would have to hand over logits, not one number a token).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from asyncflow.types import Floats, KLEstimator

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""k3 clamps log q to ± this, so that it is never infinite. Beyond it no gradient of k3 flows."""


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log π − log π_ref of each token, (T,). May be negative; the mean over tokens of π is KL(π‖π_ref)."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """½·(log π − log π_ref)² of each token, (T,). Never negative."""
    return 0.5 * (logprobs - reference).square()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """q − 1 − log q with q = π_ref/π of each token, (T,). Never negative; exactly 0 where both are equal."""
    log_q = (reference - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_q.expm1() - log_q


def k3_plus(logprobs: Tensor, reference: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2, (T,)."""
    gradient = k2(logprobs, reference)
    return k3(logprobs, reference).detach() + (gradient - gradient.detach())


ESTIMATORS: Mapping[KLEstimator, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "k3+": k3_plus}
"""Name → log π (T,), log π_ref (T,) → divergence of each token (T,)."""


def sequence_kl(behaviour_logprobs: Floats, reference_logprobs: Floats, estimator: KLEstimator) -> float:
    """Σ over a response of the divergence of the policy that sampled it, in float64: log μ (R,), log π_ref (R,).

    Times `kl_coef` it is subtracted from the response's reward, before the advantage: R − β·log(μ/π_ref) with k1
    (Ziegler et al., arXiv:1909.08593, eq. 2; InstructGPT, arXiv:2203.02155, eq. 2; on whole sequences, without a value
    model, RLOO, arXiv:2402.14740). All tokens count, whatever the loss masks: it is the response that is judged.

    It is taken at μ, the policy that sampled, and not at π_prox. Both are the same in a synchronous trainer. Under
    staleness, this says what it cost to sample the response *when it was sampled*, at most `max_staleness` versions
    ago; the advantage is still weighted by π_prox/μ like any other. It needs no forward pass, so that rewards, and with
    them the gradients of a group, need not wait for one. The engine's numerical mismatch is part of it.
    """
    import numpy as np
    import torch

    behaviour = torch.from_numpy(behaviour_logprobs.astype(np.float64))
    reference = torch.from_numpy(reference_logprobs.astype(np.float64))
    return float(ESTIMATORS[estimator](behaviour, reference).sum())
