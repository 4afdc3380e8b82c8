"""Samples in one file: those of a run (`asyncflow export`), or what is open in a store (`asyncflow store export`)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from asyncflow.errors import ConfigError, DamagedData, StoreError
from asyncflow.rundir import DATA, SAMPLES
from asyncflow.store.home import ledger_of
from asyncflow.store.lifecycle import OPEN_STATES, STATES, State
from asyncflow.store.replay import table_at
from asyncflow.store.rows import NONE, Flags, Ids
from asyncflow.store.segments import SegmentReader
from asyncflow.store.table import Table

JSON_COLUMNS = ("prompt", "prompt_columns", "reward_parts")
"""Columns that hold JSON; a .jsonl file gets the values themselves."""

ROWS_AT_ONCE = 1024
"""Samples in memory at once."""


def export(run_dir: Path, file: Path, columns: Sequence[str] | None = None) -> int:
    """Write the samples of a run, steps in order, to a .parquet or .jsonl file; returns how many there are.

    `columns` None takes all of them. Memory holds a part at a time, whatever the size of the run; the file appears when
    it is complete. Works while the run goes on. Raises ConfigError for a run without samples, a column that there is
    not, or another kind of file.
    """
    _check_kind(file)
    steps = sorted((run_dir / SAMPLES).glob("step-*.parquet"))
    if not steps:
        raise ConfigError(
            f"{run_dir / SAMPLES} holds no samples: name the directory of a run that has made a step and whose "
            "save_samples is not false"
        )
    samples = pyarrow.dataset.dataset(steps, format="parquet")
    names = list(columns) if columns is not None else samples.schema.names
    if unknown := [name for name in names if name not in samples.schema.names]:
        raise ConfigError(f"there is no column {unknown[0]!r}; the columns are {', '.join(samples.schema.names)}")
    batches = samples.to_batches(columns=names, batch_size=ROWS_AT_ONCE, batch_readahead=1, fragment_readahead=1)
    try:
        return _write(batches, pa.schema([samples.schema.field(name) for name in names]), file)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"a file in {run_dir / SAMPLES} is damaged ({error}): remove it and export again") from error


def export_open(home: Path, file: Path, columns: Sequence[str] | None = None, *, where: Sequence[str] = ()) -> int:
    """Write the open samples of a store's directory, or a run's, with all columns that they have, as `export` does.

    Missing columns are null. `where`: `state=…`, `group=…`, `stage=…` (ready for it), `worker=…` (which has it); all
    must hold. Works while the store is served: samples that end meanwhile are left out. Raises ConfigError,
    LedgerError, DamagedData, and StoreError for samples that are in the memory of another process.
    """
    _check_kind(file)
    table, _ = table_at(ledger_of(home))
    ids = table.rows.open()
    for condition in where:
        ids = ids[_matches(table, ids, condition)]
    written = {name: table.schema.columns[name] for name in table.schema.written}
    about = {"sample_id": pa.int64(), "group_id": pa.int64(), "state": pa.string()}
    schema = pa.schema(about | written)
    names = list(columns) if columns is not None else schema.names
    if unknown := [name for name in names if name not in schema.names]:
        raise ConfigError(f"there is no column {unknown[0]!r}; the columns are {', '.join(schema.names)}")
    if len(ids) and not (home / DATA).is_dir():
        raise StoreError(f"the samples of {home} are in the memory of the process that serves them: read them from it")
    reader = SegmentReader(home / DATA)

    def batches() -> Iterator[pa.RecordBatch]:
        for begin in range(0, len(ids), ROWS_AT_ONCE):
            some = ids[begin : begin + ROWS_AT_ONCE]
            try:
                batch = open_samples(table, reader, some, schema)
            except DamagedData:
                now, _ = table_at(ledger_of(home))
                if now.rows.is_open(some).all():
                    raise
                batch = open_samples(table, reader, some[now.rows.is_open(some)], schema)
            yield batch.select(names)

    try:
        return _write(batches(), pa.schema([schema.field(name) for name in names]), file)
    finally:
        reader.close()


def _matches(table: Table, ids: Ids, condition: str) -> Flags:
    name, equals, value = condition.partition("=")
    match name:
        case "state" if value in list(OPEN_STATES):
            return np.asarray(table.rows.state[ids - table.rows.base] == STATES.index(State(value)))
        case "state":
            raise ConfigError(f"--where {condition}: the states of open samples are {', '.join(OPEN_STATES)}")
        case "group" if value.isdecimal():
            return np.asarray(ids // table.group_size == int(value))
        case "stage" if value in table.schema.stages:
            return table.is_ready(ids, value)
        case "stage":
            raise ConfigError(f"--where {condition}: the stages are {', '.join(table.schema.stages)}")
        case "worker" if equals:
            held = [table.held(lease) for lease, record in table.leases.items() if record.worker == value]
            return np.isin(ids, np.concatenate([np.zeros(0, np.int64), *held]))
    raise ConfigError(f"--where {condition}: write state=…, group=…, stage=… or worker=…")


def open_samples(table: Table, reader: SegmentReader, ids: Ids, schema: pa.Schema) -> pa.RecordBatch:
    """Columns of samples whose data are kept, null where they have none yet. Raises DamagedData."""
    place = ids - table.rows.base
    found: dict[str, pa.Array] = {
        "sample_id": pa.array(ids),
        "group_id": pa.array(ids // table.group_size),
        "state": pa.array([STATES[state] for state in table.rows.state[place]], pa.string()),
    }
    lines = (table.schema.prompt_columns, *(stage.writes for stage in table.schema.stages.values()))
    for line, written in enumerate(lines):
        columns = tuple(name for name in written if name in schema.names)
        if not columns:
            continue
        frames, offsets = table.rows.frame[line, place], table.rows.offset[line, place]
        there = frames != NONE
        index = pa.array(np.cumsum(there) - 1, mask=~there)
        arrays = reader.read({name: table.schema.columns[name] for name in columns}, frames[there], offsets[there])
        found |= {name: array.take(index) for name, array in zip(columns, arrays, strict=True)}
    return pa.RecordBatch.from_arrays([found[name] for name in schema.names], schema=schema)


def _check_kind(file: Path) -> None:
    if file.suffix not in _WRITERS:
        raise ConfigError(f"{file} must end in {' or '.join(_WRITERS)}, which says how the samples are written")


def _write(batches: Iterator[pa.RecordBatch], schema: pa.Schema, file: Path) -> int:
    aside = file.with_name(f".{file.name}.part")
    try:
        rows = _WRITERS[file.suffix](batches, schema, aside)
        os.replace(aside, file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error}): name a place that has room") from error
    finally:
        aside.unlink(missing_ok=True)
    return rows


def _parquet(batches: Iterator[pa.RecordBatch], schema: pa.Schema, file: Path) -> int:
    rows = 0
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += len(batch)
    return rows


def _jsonl(batches: Iterator[pa.RecordBatch], schema: pa.Schema, file: Path) -> int:  # noqa: ARG001 - one signature
    rows = 0
    with file.open("w", encoding="utf-8") as lines:
        for batch in batches:
            for row in batch.to_pylist():
                lines.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")
            rows += len(batch)
    return rows


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: json.loads(value) if value and name in JSON_COLUMNS else value for name, value in row.items()}


_WRITERS: dict[str, Callable[[Iterator[pa.RecordBatch], pa.Schema, Path], int]] = {
    ".parquet": _parquet,
    ".jsonl": _jsonl,
}
