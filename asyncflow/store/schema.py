"""Columns of a sample, and the stages that read and write them. The graph of the pipeline follows from these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Self

import msgspec
import pyarrow as pa

from asyncflow.errors import ConfigError

Role = Literal["generate", "score", "train"]

COLUMNS: dict[str, pa.DataType] = {
    # Written once for a group, when it is admitted.
    "prompt": pa.string(),  # JSON: text, or a list of chat messages
    "prompt_columns": pa.string(),  # JSON object: the other columns of the data set's item
    "prompt_ids": pa.list_(pa.int32()),
    # Written by the rollout stage, R tokens.
    "response_ids": pa.list_(pa.int32()),
    "rollout_logprobs": pa.list_(pa.float32()),  # log μ
    "token_versions": pa.list_(pa.int64()),  # packed PolicyVersion
    "response": pa.string(),
    "finish_reason": pa.string(),
    # Written by the reward stage.
    "reward": pa.float32(),
    "reward_parts": pa.string(),  # JSON object: value of each reward function
    # Written by the reference stage, where there is a KL term.
    "ref_logprobs": pa.list_(pa.float32()),  # log π_ref
}
"""Every column there is, with its type."""

PROMPT_COLUMNS: tuple[str, ...] = ("prompt", "prompt_columns", "prompt_ids")
TOKEN_COLUMNS: tuple[str, ...] = ("response_ids", "rollout_logprobs", "token_versions", "ref_logprobs")
"""Columns with one value for each response token."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A named consumer: a sample is ready for it when it has all of `needs` and not yet all of `writes`."""

    name: str
    role: Role
    """`generate` turns prompts into completions, `score` adds columns, `train` ends the sample."""
    needs: tuple[str, ...]
    writes: tuple[str, ...] = ()


class Schema:
    """The columns of one run as bits, and its stages, checked to fit together.

    Raises ConfigError when a stage needs a column that nobody writes, two stages write the same one, or there is not
    exactly one stage that generates and one that trains.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages: dict[str, Stage] = {stage.name: stage for stage in stages}
        if len(self.stages) != len(stages):
            raise ConfigError("two stages have the same name: give each its own")
        self._bits = {name: 1 << index for index, name in enumerate(COLUMNS)}
        self.prompt_mask = self.mask(PROMPT_COLUMNS)
        self.needs = {stage.name: self.mask(stage.needs) for stage in stages}
        self.writes = {stage.name: self.mask(stage.writes) for stage in stages}
        self.generate = self._only("generate")
        self.train = self._only("train")
        self.written = (*PROMPT_COLUMNS, *(name for stage in stages for name in stage.writes))
        """Every column that a sample has in the end, in data order."""
        self._check()

    def to_json(self) -> str:
        """The stages and the columns with their types, as the ledger keeps them."""
        columns = {name: str(kind) for name, kind in COLUMNS.items()}
        stages = [asdict(stage) for stage in self.stages.values()]
        return msgspec.json.encode({"columns": columns, "stages": stages}).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`. Raises ConfigError for what is no schema, or has other columns than this program."""
        try:
            written = msgspec.json.decode(text, type=_Written)
        except ValueError as error:
            raise ConfigError(f"this is no schema: {error}") from None
        if written.columns != {name: str(kind) for name, kind in COLUMNS.items()}:
            raise ConfigError("the columns are not those of this program: use the release that wrote them")
        return cls(written.stages)

    def mask(self, columns: Iterable[str]) -> int:
        """Columns as a bit set. Raises ConfigError for an unknown one."""
        mask = 0
        for name in columns:
            if name not in self._bits:
                raise ConfigError(f"there is no column {name!r}; the columns are {', '.join(COLUMNS)}")
            mask |= self._bits[name]
        return mask

    def names(self, mask: int) -> list[str]:
        """Inverse of `mask`."""
        return [name for name, bit in self._bits.items() if mask & bit]

    def bit(self, column: str) -> int:
        return self._bits[column]

    def next_writer(self, have: int, wanted: int) -> str:
        """The stage that has to act next before a sample that has these columns can have `wanted`, which it lacks."""
        missing = wanted & ~have
        writer = next(stage.name for stage in self.stages.values() if self.writes[stage.name] & missing)
        unmet = self.needs[writer] & ~have
        return self.next_writer(have, unmet) if unmet else writer

    def _only(self, role: Role) -> Stage:
        found = [stage for stage in self.stages.values() if stage.role == role]
        if len(found) != 1:
            raise ConfigError(f"a pipeline has exactly one stage that can {role}, not {len(found)}")
        return found[0]

    def _check(self) -> None:
        written = self.prompt_mask
        for stage in self.stages.values():
            if twice := self.names(written & self.writes[stage.name]):
                raise ConfigError(f"stage {stage.name} writes {', '.join(twice)}, which is written already")
            written |= self.writes[stage.name]
        for stage in self.stages.values():
            if missing := self.names(self.needs[stage.name] & ~written):
                raise ConfigError(f"stage {stage.name} needs {', '.join(missing)}, which no stage writes")


class _Written(msgspec.Struct, forbid_unknown_fields=True):
    columns: dict[str, str]
    stages: list[Stage]
