"""From samples to the rows of a forward pass, computing a prompt once for all responses of its group.

A group becomes one *unit* `[prompt][response 1][response 2]…`: the prompt is causal, a response sees the prompt and
itself, and its positions go on from the prompt's end. With 8 short responses that halves the work, and it is exact:
every hidden state is the one that the sequence alone would have. The last token of a response predicts nothing that
is trained, so it is no input at all.

Left out, and why: kernels for ragged rows (a dense mask needs nothing but scaled-dot-product attention and is cheap for
the row lengths at which sharing pays), and positions of multimodal models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from asyncflow.types import Int32s, TokenSample

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_SHARED_TOKENS = 4096
"""Longest unit with a shared prompt: its mask is quadratic (16 MB a row at this length)."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One forward pass: B rows of T tokens that hold N response tokens."""

    input_ids: Tensor
    """(B, T) int64; rows are padded on the right with token 0."""
    position_ids: Tensor
    """(B, T) int64, restarting with every unit, and after the prompt with every response."""
    mask: Tensor | None
    """(B, 1, T, T) bool, True where a query (third axis) sees a key (fourth). None: plainly causal."""
    sources: Tensor
    """(N,) int64 into the B·T positions: the one whose hidden state predicts the response token."""
    targets: Tensor
    """(N,) int64: the response tokens."""
    samples: tuple[int, ...]
    """Whose response tokens these are, one after the other: indexes into the sequence that was packed."""


@dataclass(frozen=True, kw_only=True)
class _Unit:
    prompt: Int32s
    samples: tuple[int, ...]
    length: int


def pack(
    samples: Sequence[TokenSample],
    *,
    pass_tokens: int,
    share_prompts: bool,
    attention_parity: float = float("inf"),
    device: torch.device | str = "cpu",
) -> list[Packed]:
    """Lay samples out in passes of at most `pass_tokens` tokens, padding included (a longer unit has its own pass).

    `share_prompts` False gives every sample a row of its own and needs no mask: right for any causal model. With
    `share_prompts` samples of the same group and prompt share it as far as that is cheaper: `attention_parity` is the
    length of a row at which dense attention costs as much as everything else that is computed for it.

    Every sample is in exactly one pass. The result depends on nothing but the arguments. Raises ValueError for an empty
    prompt, because nothing would predict the first response token.
    """
    shared: list[_Unit] = []
    single: list[_Unit] = []
    for unit in _units(samples, share_prompts, attention_parity):
        (shared if len(unit.samples) > 1 else single).append(unit)
    # Longest first, so that the rows of a pass have much the same length.
    shared.sort(key=lambda unit: -unit.length)
    single.sort(key=lambda unit: -unit.length)
    rows = [*_fill_rows(shared), *([unit] for unit in single)]
    return [_lay_out(samples, part, device) for part in _split(rows, pass_tokens)]


def _units(samples: Sequence[TokenSample], share: bool, parity: float) -> Iterable[_Unit]:
    groups: dict[object, list[int]] = {}
    for i, sample in enumerate(samples):
        if not len(sample.prompt_ids):
            raise ValueError(f"sample {sample.sample_id} has an empty prompt: give it at least one token")
        # The prompt is part of the key: a group whose prompts differ is merely not shared.
        groups.setdefault((sample.group_id, sample.prompt_ids.tobytes()) if share else i, []).append(i)
    for members in groups.values():
        prompt = samples[members[0]].prompt_ids
        chosen: list[int] = []
        length = len(prompt)
        for i in members:
            inputs = max(len(samples[i].response_ids) - 1, 0)
            alone = len(prompt) + inputs
            together = length + inputs
            # Linear work is 1 a token; dense attention adds length/parity, causal attention half of it.
            added = together * (1 + together / parity) - length * (1 + length / parity)
            if chosen and (together > MAX_SHARED_TOKENS or added >= alone * (1 + alone / parity / 2)):
                yield _Unit(prompt=prompt, samples=tuple(chosen), length=length)
                chosen, together = [], alone
            chosen.append(i)
            length = together
        yield _Unit(prompt=prompt, samples=tuple(chosen), length=length)


def _fill_rows(units: Sequence[_Unit]) -> list[list[_Unit]]:
    """First fit into rows of the longest unit's length, which has to be computed anyway."""
    rows: list[list[_Unit]] = []
    room: list[int] = []
    for unit in units:
        at = next((i for i, free in enumerate(room) if free >= unit.length), None)
        if at is None:
            rows.append([])
            room.append(units[0].length)
            at = len(rows) - 1
        rows[at].append(unit)
        room[at] -= unit.length
    return rows


def _split(rows: Sequence[list[_Unit]], pass_tokens: int) -> Iterable[list[list[_Unit]]]:
    """Consecutive rows, as many as fit; rows that need a mask never with rows that do not."""
    part: list[list[_Unit]] = []
    longest = 0
    for row in rows:
        length = sum(unit.length for unit in row)
        if part and (_is_plain(row) != _is_plain(part[0]) or max(longest, length) * (len(part) + 1) > pass_tokens):
            yield part
            part, longest = [], 0
        part.append(row)
        longest = max(longest, length)
    if part:
        yield part


def _is_plain(row: list[_Unit]) -> bool:
    return len(row) == 1 and len(row[0].samples) == 1


def _lay_out(samples: Sequence[TokenSample], rows: Sequence[list[_Unit]], device: torch.device | str) -> Packed:
    import torch

    count, width = len(rows), max(sum(unit.length for unit in row) for row in rows)
    ids = np.zeros((count, width), dtype=np.int64)
    # Positions go on through the padding: a restart would read as one more sequence in the row.
    positions = np.tile(np.arange(width, dtype=np.int64), (count, 1))
    units = np.full((count, width), -1, dtype=np.int32)
    branches = np.zeros((count, width), dtype=np.int32)
    sources: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    order: list[int] = []
    for b, row in enumerate(rows):
        at = 0
        for u, unit in enumerate(row):
            start, prompt_end = at, at + len(unit.prompt)
            ids[b, start:prompt_end] = unit.prompt
            positions[b, start:prompt_end] = np.arange(len(unit.prompt))
            at = prompt_end
            for branch, i in enumerate(unit.samples, start=1):
                response = samples[i].response_ids
                end = at + max(len(response) - 1, 0)
                ids[b, at:end] = response[:-1]
                positions[b, at:end] = len(unit.prompt) + np.arange(end - at)
                branches[b, at:end] = branch
                predictors = np.concatenate([[prompt_end - 1], np.arange(at, end)])[: len(response)]
                sources.append(predictors.astype(np.int64) + b * width)
                order.append(i)
                at = end
            units[b, start:at] = u
    mask = None
    if not _is_plain(rows[0]):
        unit_of, branch_of = torch.from_numpy(units).to(device), torch.from_numpy(branches).to(device)
        index = torch.arange(width, device=device)
        mask = unit_of[:, :, None] == unit_of[:, None, :]
        mask &= index[:, None] >= index
        mask &= (branch_of[:, None, :] == 0) | (branch_of[:, :, None] == branch_of[:, None, :])
        mask = mask[:, None]
    targets = np.concatenate([samples[i].response_ids for i in order]).astype(np.int64)
    return Packed(
        input_ids=torch.from_numpy(ids).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        mask=mask,
        sources=torch.from_numpy(np.concatenate(sources)).to(device),
        targets=torch.from_numpy(targets).to(device),
        samples=tuple(order),
    )
