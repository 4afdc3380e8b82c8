"""The samples of a run, live or ended: which there are, and the whole life of one, with its text and its tokens.

Where a sample is comes from the ledger; its columns come from `samples/` when a step has consumed it, and else from the
store's data, as long as somebody needs them. What nobody needs any more is told without its text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from asyncflow.errors import DamagedData, LedgerError, ModelError, StoreError
from asyncflow.report.export import open_samples
from asyncflow.report.follow import Follower
from asyncflow.report.life import WENT_ON, Moment, words_of
from asyncflow.rundir import CONFIG, DATA, LEDGER, SAMPLES, WEIGHTS
from asyncflow.store.events import Leased, from_json
from asyncflow.store.journal import LedgerReader
from asyncflow.store.lifecycle import OPEN_STATES, STATES
from asyncflow.store.rows import NONE, Ids
from asyncflow.store.segments import SegmentReader
from asyncflow.store.store import Store
from asyncflow.types import PolicyVersion

EXCERPT: Final = 200
"""Characters of a text in a list."""
AT_ONCE: Final = 256
"""Samples whose columns are in memory at once …"""
MOST_SCANNED: Final = 4096
"""… and that one page looks at, when their columns decide which are on it."""
ABOUT: Final = ("prompt", "response", "reward", "token_versions")
"""Columns that a list needs."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which samples are asked for: all conditions must hold; None: any."""

    state: str | None = None
    group_id: int | None = None
    step: int | None = None
    min_reward: float | None = None
    max_reward: float | None = None
    q: str | None = None
    """Part of the prompt or the response, whatever the case."""

    @property
    def needs_columns(self) -> bool:
        return not (self.min_reward is None and self.max_reward is None and self.q is None)


@dataclass(frozen=True, kw_only=True)
class Brief:
    """One sample in a list."""

    id: int
    group_id: int
    state: str
    step: int | None
    """That consumed it."""
    attempts: int
    """How often it was given out to be generated."""
    staleness: int | None
    """In policy versions: when it was trained, or were it trained now; None without tokens."""
    reward: float | None
    prompt: str | None
    """None where nobody has kept it; in a list the first `EXCERPT` characters."""
    response: str | None
    versions: tuple[str, ...]
    """Policy versions of its tokens."""
    reason: str | None
    """Why it was dropped, or quarantined."""


@dataclass(frozen=True, kw_only=True)
class Token:
    id: int
    text: str | None
    """None where the tokenizer is not there."""


@dataclass(frozen=True, kw_only=True)
class ResponseToken(Token):
    logprob: float | None
    """log μ, of the engine that sampled it."""
    ref_logprob: float | None
    version: str | None
    masked: bool
    """It was left out of the loss."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """One sample, and all that is known of it."""

    brief: Brief
    """With whole texts."""
    columns: Mapping[str, Any]
    """Other columns of its prompt."""
    prompt_tokens: tuple[Token, ...]
    tokens: tuple[ResponseToken, ...]
    reward_parts: Mapping[str, float | None]
    finish_reason: str | None
    events: tuple[Moment, ...]


class Samples:
    """The samples of one run."""

    def __init__(
        self,
        run_dir: Path,
        follower: Follower,
        *,
        store: Callable[[], Store | None] = lambda: None,
        most_scanned: int = MOST_SCANNED,
    ) -> None:
        """`store`: that of the run, while it goes on, which is asked for what is in its memory only."""
        self._most_scanned = most_scanned
        self._run_dir = run_dir
        self._follower = follower
        self._store = store

    def find(self, wanted: Wanted, *, before: int | None = None, limit: int) -> tuple[list[Brief], int | None]:
        """Samples in the order of their ids, the last one first, and where the next page begins (None: there is none).

        `before`: only those with lower ids. A page may have fewer than `limit` although there is a next one, when many
        had to be looked at. Raises StoreError.
        """
        with self._follower.lock:
            self._follower.catch_up()
            ids = self._candidates(wanted, before)
            most = self._most_scanned if wanted.needs_columns else limit
            found: list[Brief] = []
            for begin in range(0, min(len(ids), most), AT_ONCE):
                some = ids[begin : min(begin + AT_ONCE, most)]
                for brief in self._briefs(some):
                    if _fits(brief, wanted):
                        found.append(_excerpt(brief))
                    if len(found) == limit:
                        return found, brief.id if brief.id != ids[-1] else None
            return found, int(ids[most - 1]) if len(ids) > most else None

    def has(self, sample_id: int) -> bool:
        """Whether a sample was ever admitted. Raises LedgerError."""
        with self._follower.lock:
            self._follower.catch_up()
            return 0 <= sample_id < self._follower.index.count

    def whole(self, sample_id: int) -> Whole:
        """Raises StoreError for a sample that was never admitted."""
        if not self.has(sample_id):
            raise StoreError(f"sample {sample_id} was never admitted: the ledger has none of this id")
        with self._follower.lock:
            events = tuple(self._events(sample_id))
            ids = np.array([sample_id])
            row = self._columns(ids, None).get(sample_id, {})
            brief = self._brief(sample_id, row)
            masked = self._masked(sample_id, row)
        return Whole(
            brief=brief,
            columns=_json(row.get("prompt_columns")) or {},
            prompt_tokens=tuple(Token(id=i, text=self._text(i)) for i in row.get("prompt_ids") or ()),
            tokens=tuple(self._tokens(row, masked)),
            reward_parts=_json(row.get("reward_parts")) or {},
            finish_reason=row.get("finish_reason"),
            events=events,
        )

    def columns(self, ids: Sequence[int], names: Sequence[str] | None = None) -> dict[int, dict[str, Any]]:
        """What is known of some samples, by id. Raises StoreError."""
        with self._follower.lock:
            self._follower.catch_up()
            return self._columns(np.array(ids, np.int64), names)

    def _events(self, sample_id: int) -> Iterator[Moment]:
        leases: dict[int, Leased] = {}
        with LedgerReader(self._run_dir / LEDGER) as ledger:
            for lsn, state in self._follower.lives.of(sample_id):
                if (line := ledger.line(lsn)) is None:
                    raise LedgerError(f"event {lsn} is gone from the ledger of {self._run_dir}: restore it")
                at, kind, body = line
                event = from_json(kind, body)
                if isinstance(event, Leased):
                    leases[event.lease_id] = event
                words = words_of(event, sample_id, self._follower.table, leases)
                yield Moment(lsn=lsn, at=at, kind=kind, words=words or WENT_ON, state=state)

    # -- which ---------------------------------------------------------------------------------------------------------

    def _candidates(self, wanted: Wanted, before: int | None) -> Ids:
        index, size = self._follower.index, self._follower.table.group_size
        end = index.count if before is None else min(before, index.count)
        ids = np.arange(end)[::-1]
        if wanted.group_id is not None:
            ids = ids[ids // size == wanted.group_id]
        if wanted.state is not None:
            states = [str(state) for state in STATES]
            if wanted.state not in states:
                raise StoreError(f"there is no state {wanted.state!r}; the states are {', '.join(states)}")
            ids = ids[index.state[ids] == states.index(wanted.state)]
        if wanted.step is not None:
            ids = ids[index.step[ids] == wanted.step]
        return ids

    def _briefs(self, ids: Ids) -> Iterator[Brief]:
        columns = self._columns(ids, ABOUT)
        for sample_id in ids.tolist():
            yield self._brief(sample_id, columns.get(sample_id, {}))

    def _brief(self, sample_id: int, row: Mapping[str, Any]) -> Brief:
        index, table = self._follower.index, self._follower.table
        step, staleness = int(index.step[sample_id]), int(index.staleness[sample_id])
        is_open = index.state[sample_id] < len(OPEN_STATES)
        if is_open and index.oldest[sample_id] != NONE:
            staleness = int(table.staleness(np.array([sample_id]))[0])
        reward = row.get("reward")
        return Brief(
            id=sample_id,
            group_id=sample_id // table.group_size,
            state=str(STATES[index.state[sample_id]]),
            step=None if step == NONE else step,
            attempts=int(index.attempts[sample_id]),
            staleness=None if staleness == NONE else staleness,
            reward=None if reward is None else float(reward),
            prompt=_prompt(row.get("prompt")),
            response=row.get("response"),
            versions=self._versions(sample_id, row),
            reason=None if is_open else index.reasons.get(sample_id),
        )

    def _versions(self, sample_id: int, row: Mapping[str, Any]) -> tuple[str, ...]:
        packed = row.get("token_versions")
        if packed is None:  # of one whose tokens are gone, at least the first and the last
            index = self._follower.index
            packed = [int(v) for v in (index.oldest[sample_id], index.newest[sample_id]) if v != NONE]
        return tuple(str(PolicyVersion.unpack(version)) for version in sorted(set(packed)))

    # -- columns -------------------------------------------------------------------------------------------------------

    def _columns(self, ids: Ids, names: Sequence[str] | None) -> dict[int, dict[str, Any]]:
        """Under the follower's lock."""
        found = self._of_steps(ids, names)
        rest = np.array([i for i in ids.tolist() if i not in found], np.int64)
        rows = self._follower.table.rows
        rest = rest[(rest >= rows.base) & (rest < rows.end)]
        rest = rest[rows.has_data(rest)]
        if len(rest):
            found |= self._of_disk(rest, names) if (self._run_dir / DATA).is_dir() else self._of_memory(rest, names)
        return found

    def _of_steps(self, ids: Ids, names: Sequence[str] | None) -> dict[int, dict[str, Any]]:
        steps = self._follower.index.step[ids]
        found: dict[int, dict[str, Any]] = {}
        for step in np.unique(steps[steps != NONE]).tolist():
            file = self._run_dir / SAMPLES / f"step-{step:06d}.parquet"
            if file.is_file():
                some = ids[steps == step].tolist()
                columns = None if names is None else ["sample_id", *names]
                with suppress(OSError, pa.ArrowException):  # a file that is damaged, or just being replaced
                    table = pq.read_table(file, columns=columns, filters=[("sample_id", "in", some)])
                    found |= {row["sample_id"]: row for row in table.to_pylist()}
        return found

    def _of_disk(self, ids: Ids, names: Sequence[str] | None) -> dict[int, dict[str, Any]]:
        table = self._follower.table
        types = {name: table.schema.columns[name] for name in (names or table.schema.written) if self._written(name)}
        schema = pa.schema({"sample_id": pa.int64()} | types)
        reader = SegmentReader(self._run_dir / DATA)
        try:
            return _rows(open_samples(table, reader, ids, schema))
        except DamagedData:  # of a sample that has ended since the ledger was read, most likely: one by one, then
            found: dict[int, dict[str, Any]] = {}
            for place in range(len(ids)):
                with suppress(DamagedData):
                    found |= _rows(open_samples(table, reader, ids[place : place + 1], schema))
            return found
        finally:
            reader.close()

    def _of_memory(self, ids: Ids, names: Sequence[str] | None) -> dict[int, dict[str, Any]]:
        store, table = self._store(), self._follower.table
        if store is None:
            return {}
        have = table.rows.columns[ids - table.rows.base]
        found: dict[int, dict[str, Any]] = {}
        for bits in np.unique(have).tolist():
            some = ids[have == bits].tolist()
            there = [name for name in table.schema.names(bits) if names is None or name in names]
            with suppress(StoreError):  # one of them has ended since the ledger was read
                batch = store.read(some, there)
                found |= dict(zip(some, batch.to_pylist(), strict=True))
        return found

    def _written(self, name: str) -> bool:
        return name in self._follower.table.schema.written

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _tokens(self, row: Mapping[str, Any], masked: Sequence[bool]) -> Iterator[ResponseToken]:
        ids = row.get("response_ids") or ()
        none = [None] * len(ids)
        logprobs, references = row.get("rollout_logprobs") or none, row.get("ref_logprobs") or none
        versions = row.get("token_versions") or none
        for place, token_id in enumerate(ids):
            version = versions[place]
            yield ResponseToken(
                id=token_id,
                text=self._text(token_id),
                logprob=logprobs[place],
                ref_logprob=references[place],
                version=None if version is None else str(PolicyVersion.unpack(version)),
                masked=masked[place],
            )

    def _masked(self, sample_id: int, row: Mapping[str, Any]) -> list[bool]:
        """Which tokens were left out of the loss: those that were too old, or all of a response that was cut off."""
        ids, versions = row.get("response_ids") or (), row.get("token_versions") or ()
        trained = self._follower.index.staleness[sample_id] != NONE
        if trained and row.get("finish_reason") == "length" and self._config.get("truncated") == "mask":
            return [True] * len(ids)
        oldest = self._follower.index.masked.get(sample_id)
        return [False] * len(ids) if oldest is None else [version < oldest for version in versions]

    def _text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def texts(self, token_ids: Sequence[int]) -> list[str | None]:
        """Of each token by itself."""
        return [self._text(token_id) for token_id in token_ids]

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        try:
            config = json.loads((self._run_dir / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return config if isinstance(config, dict) else {}

    @cached_property
    def _tokenizer(self) -> Any:
        """The run's, without the library around it, which takes seconds to load; None where it is not there."""
        try:
            from tokenizers import Tokenizer

            file = self._run_dir / WEIGHTS / "tokenizer.json"
            found = file if file.is_file() else tokenizer_file(str(self._config.get("model", "")))
        except ImportError:  # AsyncFlow is installed without the extra `models`
            return None
        return None if found is None else Tokenizer.from_file(str(found))


def tokenizer_file(model: str) -> Path | None:
    """Of a model that this machine has already; nothing is downloaded."""
    from asyncflow.engines.models import MODELS, resolve_model

    if model in MODELS or Path(model).expanduser().is_dir():
        try:
            file = resolve_model(model) / "tokenizer.json"
        except ModelError:
            return None
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _rows(batch: pa.RecordBatch) -> dict[int, dict[str, Any]]:
    return {row["sample_id"]: row for row in batch.to_pylist()}


def _fits(brief: Brief, wanted: Wanted) -> bool:
    if wanted.min_reward is not None and (brief.reward is None or brief.reward < wanted.min_reward):
        return False
    if wanted.max_reward is not None and (brief.reward is None or brief.reward > wanted.max_reward):
        return False
    text = f"{brief.prompt or ''}\n{brief.response or ''}".casefold()
    return wanted.q is None or wanted.q.casefold() in text


def _excerpt(brief: Brief) -> Brief:
    return replace(
        brief,
        prompt=None if brief.prompt is None else brief.prompt[:EXCERPT],
        response=None if brief.response is None else brief.response[:EXCERPT],
    )


def _prompt(text: str | None) -> str | None:
    """As one text; of chat messages each behind its role."""
    messages = _json(text)
    if isinstance(messages, list):
        return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)
    return messages if isinstance(messages, str) else text


def _json(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return None
