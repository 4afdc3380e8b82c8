"""The policy loss of one step, as sums over tokens, and the metrics that say whether it is healthy.

μ is the behaviour policy (the engine that sampled), π_prox the learner's policy before the step's first update, π_θ the
one that is trained. All are given as log-probabilities of the tokens that were sampled.

Left out, and why: an entropy bonus (clipping higher above than below does the same with a knob that exists), dual
clipping (the behaviour ratio is capped already), sequence-level ratios, and division by each sequence's length (it
favours short correct and long wrong answers: Dr. GRPO, arXiv:2503.20783, §3.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from asyncflow.algorithms.kl import ESTIMATORS, k1, k3
from asyncflow.types import KLEstimator

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this (a factor of 5e8), so that no ratio is infinite. Beyond it no gradient flows."""


def policy_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    proximal_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    importance_cap: float | None = None,
    reference_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
) -> tuple[Tensor, dict[str, float]]:
    """Decoupled PPO with a truncated behaviour ratio, summed over the tokens of the mask.

    With r = π_θ/π_prox and ρ = sg(π_prox/μ), both per token, and ρ̄ = min(ρ, importance_cap)::

        J    = ρ̄ · min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A)
        loss = −Σ J + kl_coef · Σ sg(min(π_θ/μ, importance_cap)) · KL(π_θ, π_ref)

    PPO's clipped objective is that of arXiv:1707.06347, eq. 7; its separation from the behaviour policy is Hilton et
    al., arXiv:2110.00641, in the asynchronous setting AReaL, arXiv:2505.24298, §5.2; clip_high ≠ clip_low is DAPO's
    clip-higher, arXiv:2503.14476, §3.1; the truncation is that of IMPALA's ρ̄, arXiv:1802.01561, §4.1, per token.

    `logprobs` (T,) are log π_θ and carry the gradient; `behaviour_logprobs` (T,) are log μ; `proximal_logprobs` (T,)
    are log π_prox, and None stands for π_prox = sg(π_θ), the case of one update per step, where r is 1 and only its
    gradient counts. `advantages` (T,); `mask` (T,) bool. `importance_cap` None does not truncate. What is outside the
    mask takes no part, whatever it holds. `reference_logprobs` (T,) are log π_ref, and None is a loss without a KL
    term; the estimators are those of `asyncflow.algorithms.kl`.

    The sum is not divided: the caller divides the gradient of a whole step by the number of tokens that the step
    trains (DAPO's token-level mean, arXiv:2503.14476, §3.3, eq. 12). The result then does not depend on how a step is
    split into micro-batches.

    Returns the loss (a scalar) and sums for `merge` and `summarise`:

    - `tokens`; `loss`; `entropy`: Σ −log π_θ, whose mean estimates the entropy from the sampled tokens
    - `behaviour_ratio`, `behaviour_ratio_sq`, `behaviour_ratio_max`: ρ before truncation; `truncated`: tokens above
      the cap
    - `proximal_ratio`, `proximal_ratio_sq`, `proximal_ratio_max`: r
    - `clipped_low`: tokens with A < 0 and r < 1 − clip_low; `clipped_high`: A > 0 and r > 1 + clip_high (the
      clip leaves them no gradient)
    - `logprob_diff`: Σ |log π_prox − log μ|
    - `mismatch_kl`: Σ ρ − 1 − log ρ, Schulman's estimator k3 of KL(μ‖π_prox) (joschu.net/blog/kl-approx.html)
    - with a reference, `kl`, `kl_max`: k3 of KL(π_θ‖π_ref), not weighted; `kl_k1`: k1 of it
    """
    import torch

    # Selected, not multiplied by zero: a NaN outside the mask must not reach the sum.
    logprobs, behaviour, advantages = logprobs[mask], behaviour_logprobs[mask], advantages[mask]
    current = logprobs.detach()
    proximal = current if proximal_logprobs is None else proximal_logprobs[mask]

    ratio = (logprobs - proximal).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    log_behaviour_ratio = (proximal - behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    behaviour_ratio = log_behaviour_ratio.exp()
    weight = behaviour_ratio if importance_cap is None else behaviour_ratio.clamp(max=importance_cap)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -(weight * torch.minimum(ratio * advantages, clipped * advantages)).sum()
    reference = None if reference_logprobs is None else reference_logprobs[mask]
    if reference is not None and kl_coef:
        importance = (current - behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        if importance_cap is not None:
            importance = importance.clamp(max=importance_cap)
        loss = loss + kl_coef * (importance * ESTIMATORS[kl_estimator](logprobs, reference)).sum()

    with torch.no_grad():
        r, rho = ratio.double(), behaviour_ratio.double()
        nothing = rho.new_zeros(1)
        sums = {
            "tokens": rho.new_tensor(len(rho)),
            "loss": loss.double(),
            "entropy": -current.double().sum(),
            "behaviour_ratio": rho.sum(),
            "behaviour_ratio_sq": rho.square().sum(),
            "behaviour_ratio_max": torch.cat([rho, nothing]).max(),
            "truncated": (behaviour_ratio > weight).sum().double(),
            "proximal_ratio": r.sum(),
            "proximal_ratio_sq": r.square().sum(),
            "proximal_ratio_max": torch.cat([r, nothing]).max(),
            "clipped_low": ((ratio < 1 - clip_low) & (advantages < 0)).sum().double(),
            "clipped_high": ((ratio > 1 + clip_high) & (advantages > 0)).sum().double(),
            "logprob_diff": (proximal - behaviour).double().abs().sum(),
            "mismatch_kl": (log_behaviour_ratio.double().expm1() - log_behaviour_ratio.double()).sum(),
        }
        if reference is not None:
            divergence = k3(current.double(), reference.double())
            sums |= {
                "kl": divergence.sum(),
                "kl_max": torch.cat([divergence, nothing]).max(),
                "kl_k1": k1(current.double(), reference.double()).sum(),
            }
        # One transfer for all of them.
        values: list[float] = torch.stack(list(sums.values())).tolist()
    return loss, dict(zip(sums, values, strict=True))


def merge(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Add up two results of `policy_loss`; of names that end in `_max` the larger value stays. Either may be empty."""
    merged = dict(first)
    for name, value in second.items():
        if name not in merged:
            merged[name] = value
        elif name.endswith("_max"):
            merged[name] = max(merged[name], value)
        else:
            merged[name] += value
    return merged


def summarise(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics of the tokens that `sums` was added up over; empty when there were none.

    - `loss`, `entropy` (nats): means over tokens
    - `ratio/behaviour_mean`, `ratio/behaviour_max`: π_prox/μ, from engine mismatch and lag, before truncation;
      `ratio/truncated`: share of tokens above the cap
    - `ratio/proximal_mean`, `ratio/proximal_max`: π_θ/π_prox, from updates within the step
    - `clip_ratio/low`, `clip_ratio/high`, `clip_ratio/region_mean`: share of tokens without gradient because of the
      clip (A < 0, A > 0, both), as in TRL
    - `ess`: effective sample size of the behaviour ratio as a share of the tokens, (Σρ)² / (N·Σρ²) = 1/mean(w̃²) with
      w̃ = ρ/mean(ρ); 1 is on-policy (Kong 1992)
    - `mismatch_kl` (nats): KL(μ‖π_prox); `mismatch_logprob`: mean |log π_prox − log μ|
    - with a reference, `kl` (nats): k3 of KL(π_θ‖π_ref), TRL's metric; `kl/max`: the largest of a token; `kl/k1`: the
      same divergence by k1, noisier and of either sign. Means over the tokens as they were sampled, not weighted
    """
    tokens = sums.get("tokens", 0.0)
    if not tokens:
        return {}
    metrics = {
        "loss": sums["loss"] / tokens,
        "entropy": sums["entropy"] / tokens,
        "ratio/behaviour_mean": sums["behaviour_ratio"] / tokens,
        "ratio/behaviour_max": sums["behaviour_ratio_max"],
        "ratio/truncated": sums["truncated"] / tokens,
        "ratio/proximal_mean": sums["proximal_ratio"] / tokens,
        "ratio/proximal_max": sums["proximal_ratio_max"],
        "clip_ratio/low": sums["clipped_low"] / tokens,
        "clip_ratio/high": sums["clipped_high"] / tokens,
        "clip_ratio/region_mean": (sums["clipped_low"] + sums["clipped_high"]) / tokens,
        "ess": sums["behaviour_ratio"] ** 2 / (tokens * sums["behaviour_ratio_sq"]),
        "mismatch_kl": sums["mismatch_kl"] / tokens,
        "mismatch_logprob": sums["logprob_diff"] / tokens,
    }
    if "kl" in sums:
        metrics |= {"kl": sums["kl"] / tokens, "kl/max": sums["kl_max"], "kl/k1": sums["kl_k1"] / tokens}
    return metrics
