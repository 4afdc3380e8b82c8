"""Columns of a sample, and the stages that read and write them. The graph of the pipeline follows from these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import msgspec
import pyarrow as pa

from asyncflow.errors import ConfigError
from asyncflow.store.columns import PROMPT_IDS, RESPONSE_IDS, TOKEN_VERSIONS

Role = Literal["generate", "score", "train"]
Order = Literal["fifo", "freshest", "priority"]

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
"""The columns of a pipeline that names no others, with their types."""

PROMPT_COLUMNS: tuple[str, ...] = ("prompt", "prompt_columns", "prompt_ids")
TOKEN_COLUMNS: tuple[str, ...] = ("response_ids", "rollout_logprobs", "token_versions", "ref_logprobs")
"""Columns with one value for each response token."""

MOST_BITS = 62
"""Columns, and stages that write none, in one schema: their bits share an int64."""
MOST_TIMES = 10_000


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A named consumer: a sample is ready for it when it has all of `needs` and not yet all of `writes`."""

    name: str
    role: Role
    """`generate` turns prompts into completions, `score` adds columns, `train` ends the sample."""
    needs: tuple[str, ...]
    writes: tuple[str, ...] = ()
    """A stage that writes nothing acks without columns; the store remembers that it has seen the sample."""
    sampler: Order = "fifo"
    """What it gets first. `fifo`: in admission order. `freshest`: whose oldest token is of the newest version.
    `priority`: the highest number given at admission or by `prioritise`. Ties go by admission. The training stage
    chooses among the groups of its step."""
    max_times_leased: int = 1
    """How often it consumes (acks) a sample, for a stage that writes nothing; what it has consumed less often comes
    first. Attempts that failed are another matter (`max_attempts`), and are counted for each time anew."""


class Schema:
    """The columns of one run as bits, and its stages, checked to fit together.

    Raises ConfigError when a stage needs a column that nobody writes, or that is only written after the stage itself,
    two stages write the same one, there is not exactly one stage that generates and one that trains, a column with a
    meaning has a type that cannot have it, or there are more columns than a bit set holds.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        columns: Mapping[str, pa.DataType] = COLUMNS,
        prompt_columns: Sequence[str] = PROMPT_COLUMNS,
        token_columns: Sequence[str] | None = None,
    ) -> None:
        """`prompt_columns` are written once for a group, when it is admitted. `token_columns` have one value for each
        response token; None takes those of `TOKEN_COLUMNS` that there are."""
        self.stages: dict[str, Stage] = {stage.name: stage for stage in stages}
        if len(self.stages) != len(stages):
            raise ConfigError("two stages have the same name: give each its own")
        self.columns: dict[str, pa.DataType] = dict(columns)
        """Name → Arrow type."""
        silent = [stage.name for stage in stages if not stage.writes and stage.role != "train"]
        if (bits := len(self.columns) + len(silent)) > MOST_BITS:
            raise ConfigError(f"{bits} columns and stages that write none are too many: at most {MOST_BITS} fit")
        self._bits = {name: 1 << index for index, name in enumerate(self.columns)}
        self.prompt_columns = tuple(prompt_columns)
        self.prompt_mask = self.mask(self.prompt_columns)
        there = tuple(name for name in TOKEN_COLUMNS if name in self.columns)
        self.token_columns = there if token_columns is None else tuple(token_columns)
        self.mask(self.token_columns)
        self.needs = {stage.name: self.mask(stage.needs) for stage in stages}
        """Stage → bits that make a sample ready for it."""
        self.writes = {stage.name: self.mask(stage.writes) for stage in stages}
        """Stage → bits that its ack sets; one that writes no columns has a bit of its own, behind those of columns."""
        self.writes |= {name: 1 << len(self.columns) + place for place, name in enumerate(silent)}
        self.generate = self._only("generate")
        self.train = self._only("train")
        self.written = (*self.prompt_columns, *(name for stage in stages for name in stage.writes))
        """Every column that a sample has in the end, in data order."""
        self.written_mask = self.mask(self.written)
        self._check()
        self.needed = self._needed()
        """Stages without which nothing could be trained. The others look on: they hold no sample up."""

    def is_as(self, other: Schema) -> bool:
        """Whether both say the same, to the order of the bits. (As text they may differ by Arrow's release.)"""
        return all(
            mine == theirs
            for mine, theirs in (
                (list(self.columns.items()), list(other.columns.items())),
                (msgspec.json.encode(list(self.stages.values())), msgspec.json.encode(list(other.stages.values()))),
                (self.prompt_columns, other.prompt_columns),
                (self.token_columns, other.token_columns),
            )
        )

    def to_json(self) -> str:
        """All of it, as the ledger keeps it and as clients are told."""
        fields = [pa.field(name, kind) for name, kind in self.columns.items()]
        written = _Written(
            columns={name: str(kind) for name, kind in self.columns.items()},
            arrow=pa.schema(fields).serialize().to_pybytes(),
            prompt_columns=self.prompt_columns,
            token_columns=self.token_columns,
            stages=tuple(self.stages.values()),
        )
        return msgspec.json.encode(written).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`. Raises ConfigError for what is no schema."""
        try:
            written = msgspec.json.decode(text, type=_Written)
            arrow = pa.ipc.read_schema(pa.py_buffer(written.arrow))
        except (ValueError, pa.ArrowException, OSError) as error:
            raise ConfigError(f"this is no schema: {error}") from None
        return cls(
            written.stages,
            columns=dict(zip(arrow.names, arrow.types, strict=True)),
            prompt_columns=written.prompt_columns,
            token_columns=written.token_columns,
        )

    def mask(self, columns: Iterable[str]) -> int:
        """Columns as a bit set. Raises ConfigError for an unknown one."""
        mask = 0
        for name in columns:
            if name not in self._bits:
                raise ConfigError(f"there is no column {name!r}; the columns are {', '.join(self.columns)}")
            mask |= self._bits[name]
        return mask

    def names(self, mask: int) -> list[str]:
        """Inverse of `mask`; the bits of stages that write no columns have no name."""
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
        for stage in self.stages.values():
            if not 1 <= stage.max_times_leased <= MOST_TIMES:
                raise ConfigError(
                    f"stage {stage.name}: max_times_leased must be at least 1 and at most {MOST_TIMES}, "
                    f"not {stage.max_times_leased}"
                )
            if stage.max_times_leased > 1 and (stage.writes or stage.role == "train"):
                raise ConfigError(
                    f"stage {stage.name} cannot have a sample {stage.max_times_leased} times: only a stage that writes "
                    "no columns and does not train can, so leave max_times_leased at 1"
                )
        if not all(pa.types.is_list(self.columns[name]) for name in self.token_columns):
            raise ConfigError("a column with one value for each response token must be a list: see token_columns")
        written = self.prompt_mask
        for stage in self.stages.values():
            if twice := self.names(written & self.writes[stage.name]):
                raise ConfigError(f"stage {stage.name} writes {', '.join(twice)}, which is written already")
            written |= self.writes[stage.name]
        for stage in self.stages.values():
            if missing := self.names(self.needs[stage.name] & ~written):
                raise ConfigError(f"stage {stage.name} needs {', '.join(missing)}, which no stage writes")
            if own := self.names(self.needs[stage.name] & self.writes[stage.name]):
                raise ConfigError(f"stage {stage.name} needs {', '.join(own)}, which it writes itself: it never begins")
        self._check_order()
        for name in (PROMPT_IDS, RESPONSE_IDS, TOKEN_VERSIONS):
            kind = self.columns.get(name)
            if kind is not None and not (pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)):
                raise ConfigError(
                    f"column {name} is {kind}, and its values are counted as tokens or read as versions: make it a "
                    "list of integers, or give it another name"
                )

    def _check_order(self) -> None:
        """Whether every stage can begin at some time."""
        have, waiting = self.prompt_mask, dict(self.stages)
        while ready := [name for name in waiting if not self.needs[name] & ~have]:
            for name in ready:
                have |= self.writes[name]
                del waiting[name]
        if waiting:
            lacks = "; ".join(f"{name} for {', '.join(self.names(self.needs[name] & ~have))}" for name in waiting)
            raise ConfigError(f"stages wait for each other in a circle: {lacks}. Let one of them need less")

    def _needed(self) -> frozenset[str]:
        found = {self.generate.name, self.train.name}
        wanted = self.needs[self.generate.name] | self.needs[self.train.name]
        while more := {name for name, writes in self.writes.items() if writes & wanted} - found:
            found |= more
            for name in more:
                wanted |= self.needs[name]
        return frozenset(found)


class _Written(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A schema as JSON."""

    columns: dict[str, str]
    """Name → type, for people."""
    arrow: bytes
    """The same as an Arrow IPC schema message, in base64."""
    prompt_columns: tuple[str, ...]
    token_columns: tuple[str, ...]
    stages: tuple[Stage, ...]
