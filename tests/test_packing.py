"""Packing: every response token is predicted from exactly what precedes it, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncflow.algorithms.packing import MAX_SHARED_TOKENS, Packed, pack
from asyncflow.engines.models import load_tokenizer, resolve_model
from asyncflow.engines.torch_learner import HuggingFacePolicy
from asyncflow.types import TrainSample


def make_sample(sample_id: int, group_id: int, prompt: list[int], response: list[int]) -> TrainSample:
    tokens = len(response)
    return TrainSample(
        sample_id=sample_id,
        group_id=group_id,
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=np.array(response, dtype=np.int32),
        mask=np.ones(tokens, dtype=np.bool_),
        behaviour_logprobs=np.full(tokens, -1.0, dtype=np.float32),
        advantages=np.ones(tokens, dtype=np.float32),
    )


def make_groups(seed: int, groups: int, samples: int, vocabulary: int, longest: int = 12) -> list[TrainSample]:
    random = np.random.default_rng(seed)
    made: list[TrainSample] = []
    for group in range(groups):
        prompt = random.integers(0, vocabulary, random.integers(1, longest)).tolist()
        for _ in range(samples):
            response = random.integers(0, vocabulary, random.integers(0, longest)).tolist()
            made.append(make_sample(len(made), group, prompt, response))
    return made


def seen_from(packed: Packed, position: int) -> list[tuple[int, int]]:
    """(position id, token) of everything that the hidden state at a flat position depends on, in order."""
    width = packed.input_ids.shape[1]
    row, column = divmod(position, width)
    visible = torch.arange(width) <= column if packed.mask is None else packed.mask[row, 0, column]
    pairs = zip(packed.position_ids[row][visible].tolist(), packed.input_ids[row][visible].tolist(), strict=True)
    return sorted(pairs)


@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(0, 6),
    samples=st.integers(1, 5),
    pass_tokens=st.integers(1, 200),
    share=st.booleans(),
    parity=st.sampled_from([float("inf"), 200.0, 10.0]),
)
@settings(max_examples=60, deadline=None)
def test_every_response_token_is_predicted_from_its_prompt_and_the_response_before_it(
    seed: int, groups: int, samples: int, pass_tokens: int, share: bool, parity: float
) -> None:
    packing = make_groups(seed, groups, samples, vocabulary=1000)
    np.random.default_rng(seed).shuffle(packing)

    passes = pack(packing, pass_tokens=pass_tokens, share_prompts=share, attention_parity=parity)

    found: list[int] = []
    for packed in passes:
        rows, width = packed.input_ids.shape
        assert rows == 1 or rows * width <= pass_tokens
        assert share or packed.mask is None
        at = 0
        for i in packed.samples:
            tokens = packing[i].prompt_ids.tolist() + packing[i].response_ids.tolist()
            for j, target in enumerate(packing[i].response_ids.tolist()):
                before = tokens[: len(packing[i].prompt_ids) + j]
                assert packed.targets[at].item() == target
                assert seen_from(packed, int(packed.sources[at])) == list(enumerate(before))
                at += 1
        assert at == len(packed.targets) == len(packed.sources)
        found += packed.samples
    assert sorted(found) == list(range(len(packing)))


def test_a_shared_prompt_is_computed_once() -> None:
    samples = [make_sample(i, 0, list(range(35)), list(range(24))) for i in range(8)]

    shared = pack(samples, pass_tokens=4096, share_prompts=True)
    plain = pack(samples, pass_tokens=4096, share_prompts=False)

    assert [packed.input_ids.numel() for packed in shared] == [35 + 8 * 23]
    assert [packed.input_ids.numel() for packed in plain] == [8 * (35 + 23)]


def test_several_groups_fill_a_row_that_has_room_for_them() -> None:
    long = [make_sample(i, 0, [1] * 20, [2] * 21) for i in range(4)]
    short = [make_sample(i, i // 2, [3] * 5, [4] * 11) for i in range(4, 12)]

    packed = pack(long + short, pass_tokens=4096, share_prompts=True)

    assert [tuple(p.input_ids.shape) for p in packed] == [(2, 100)]


def test_prompts_are_not_shared_where_dense_attention_would_cost_more_than_it_saves() -> None:
    short_responses = [make_sample(i, 0, [1] * 1000, [2] * 100) for i in range(4)]
    long_responses = [make_sample(i, 0, [1] * 20, [2] * 1000) for i in range(4)]

    assert len(pack(short_responses, pass_tokens=10**6, share_prompts=True, attention_parity=1000.0)[0].input_ids) == 1
    assert pack(long_responses, pass_tokens=10**6, share_prompts=True, attention_parity=1000.0)[0].mask is None


def test_a_group_too_long_for_one_row_is_split_into_several() -> None:
    samples = [make_sample(i, 0, [1] * 1000, [2] * 1001) for i in range(8)]

    passes = pack(samples, pass_tokens=10**6, share_prompts=True)

    assert max(packed.input_ids.shape[1] for packed in passes) <= MAX_SHARED_TOKENS
    assert sum(len(packed.samples) for packed in passes) == 8
    assert sum(packed.input_ids.numel() for packed in passes) < 8 * 2000


def test_prompts_that_differ_within_a_group_are_not_mixed() -> None:
    samples = [make_sample(0, 7, [1, 2], [3, 4]), make_sample(1, 7, [1, 5], [3, 4])]

    (packed,) = pack(samples, pass_tokens=100, share_prompts=True)

    assert packed.mask is None
    assert packed.input_ids.tolist() == [[1, 2, 3], [1, 5, 3]]


def test_a_sample_without_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 3 has an empty prompt"):
        pack([make_sample(3, 0, [], [1])], pass_tokens=10, share_prompts=True)


# -- exactness on real architectures -----------------------------------------------------------------------------------

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Writes small random models whose attention matters: their weights are ten times larger than usual."""

    def make(kind: str, **changes: Any) -> Path:
        import transformers

        folder = tmp_path_factory.mktemp(kind)
        sizes = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
        }
        config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
        torch.manual_seed(0)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
        load_tokenizer(resolve_model("tiny")).save_pretrained(folder)
        return folder

    return make


def response_logprobs(policy: HuggingFacePolicy, samples: list[TrainSample], **options: Any) -> dict[int, torch.Tensor]:
    """Sample index → (R,) log-probs, through packing."""
    found: dict[int, torch.Tensor] = {}
    for packed in pack(samples, **options):
        hidden = policy.hidden(packed.input_ids, packed.position_ids, packed.mask).flatten(0, 1)[packed.sources]
        logprobs = policy.logits(hidden).log_softmax(-1).gather(-1, packed.targets[:, None])[:, 0]
        parts = logprobs.split([len(samples[i].response_ids) for i in packed.samples])
        found |= dict(zip(packed.samples, parts, strict=True))
    return found


def separate_logprobs(policy: HuggingFacePolicy, sample: TrainSample) -> torch.Tensor:
    """(R,) log-probs of one sequence by itself, through the model's own forward pass."""
    model: Any = policy.module
    ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids])).long()[None]
    logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    start = len(sample.prompt_ids) - 1
    gathered: torch.Tensor = logprobs[start:].gather(-1, ids[0, start + 1 :, None])[:, 0]
    return gathered


def gradients(policy: HuggingFacePolicy) -> dict[str, torch.Tensor]:
    taken = {name: p.grad.clone() for name, p in policy.module.named_parameters() if p.grad is not None}
    policy.module.zero_grad()
    return taken


@pytest.mark.parametrize(
    ("kind", "changes", "shares"),
    [
        ("Llama", {"tie_word_embeddings": True}, True),
        ("Qwen2", {}, True),
        ("Qwen3", {"head_dim": 16}, True),
        ("Mistral", {"sliding_window": None}, True),
        # What cannot share falls back to one row a sequence, in the same code.
        ("Mistral", {"sliding_window": 6}, False),
        ("Qwen2", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}, False),
    ],
)
@pytest.mark.parametrize("longest", [12, 700])
def test_log_probs_and_gradients_are_those_of_separate_sequences(
    make_model: MakeModel, kind: str, changes: dict[str, Any], shares: bool, longest: int
) -> None:
    policy = HuggingFacePolicy(make_model(kind, **changes))
    samples = make_groups(3, groups=3, samples=4 if longest < 100 else 3, vocabulary=64, longest=longest)
    weights = torch.randn(len(samples), generator=torch.Generator().manual_seed(0)).tolist()

    packed = response_logprobs(policy, samples, pass_tokens=2000, share_prompts=policy.shares_prompts)
    torch.stack([weight * packed[i].sum() for i, weight in enumerate(weights)]).sum().backward()
    packed_gradients = gradients(policy)
    separate = [separate_logprobs(policy, sample) for sample in samples]
    torch.stack([w * logprobs.sum() for w, logprobs in zip(weights, separate, strict=True)]).sum().backward()
    separate_gradients = gradients(policy)

    assert policy.shares_prompts == shares
    for i, logprobs in enumerate(separate):
        assert torch.allclose(packed[i], logprobs, atol=2e-5), i
    assert packed_gradients.keys() == separate_gradients.keys()
    for name, gradient in separate_gradients.items():
        assert (packed_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_the_gradient_of_the_padding_token_is_kept_because_it_often_ends_a_sequence(make_model: MakeModel) -> None:
    policy = HuggingFacePolicy(make_model("Llama", tie_word_embeddings=False, pad_token_id=2))
    sample = make_sample(0, 0, [5, 2], [7, 8])

    response_logprobs(policy, [sample], pass_tokens=100, share_prompts=True)[0].sum().backward()

    assert gradients(policy)["model.embed_tokens.weight"][2].norm() > 0
