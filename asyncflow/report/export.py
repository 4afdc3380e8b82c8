"""The samples of a run in one file: `asyncflow export`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from asyncflow.errors import ConfigError
from asyncflow.rundir import SAMPLES

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
    write = _WRITERS.get(file.suffix)
    if write is None:
        raise ConfigError(f"{file} must end in {' or '.join(_WRITERS)}, which says how the samples are written")
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
    aside = file.with_name(f".{file.name}.part")
    try:
        rows = write(batches, pa.schema([samples.schema.field(name) for name in names]), aside)
        os.replace(aside, file)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"a file in {run_dir / SAMPLES} is damaged ({error}): remove it and export again") from error
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
    return {name: json.loads(value) if name in JSON_COLUMNS else value for name, value in row.items()}


_WRITERS: dict[str, Callable[[Iterator[pa.RecordBatch], pa.Schema, Path], int]] = {
    ".parquet": _parquet,
    ".jsonl": _jsonl,
}
