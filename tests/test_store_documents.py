"""What the store's documents say is so: the kinds of the ledger, the files, the tests and the faults that they name."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from asyncflow.store import frames, schema
from asyncflow.store.events import EVENTS, PLAIN, PutId, Samples
from asyncflow.store.segments import segment_path
from asyncflow.types import PolicyVersion
from tests.conftest import ROOT
from tests.simulation.planted import PLANTED
from tests.test_flight import Served, pa_join, take
from tests.test_simulation import CALLS, RARE
from tests.test_store import ids, prompts, responses, rewards
from tests.test_table_model import MUTANTS

DOCS = ROOT / "docs"


def read(name: str) -> str:
    return (DOCS / name).read_text()


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", read(name), re.DOTALL)


def rows(text: str) -> list[list[str]]:
    """The cells of all tables."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def fields_of(kind: type[msgspec.Struct]) -> list[str]:
    return [field.name for field in msgspec.structs.fields(kind)]


# -- the ledger --------------------------------------------------------------------------------------------------------


def test_every_kind_of_event_is_in_the_document_with_every_field() -> None:
    listed = {row[0].strip("`"): re.findall(r"`(\w+)`", row[1]) for row in rows(read("ledger.md")) if len(row) == 3}
    listed.pop("kind")

    assert listed == {kind: fields_of(event) for kind, event in EVENTS.items() if event.journaled}


def test_what_is_in_an_admission_and_which_lists_are_written_shorter_is_in_the_document() -> None:
    text = " ".join(read("ledger.md").split())

    (samples,) = re.findall(r"`samples` of `admitted` has the fields ([^;]*), which ", text)
    (put,) = re.findall(r"; `put` has ([^.]*)\.", text)
    assert re.findall(r"`(\w+)`", samples) == fields_of(Samples)
    assert re.findall(r"`(\w+)`", put) == fields_of(PutId)
    (runs,) = re.findall(r"In `trained` and `skipped`, and in the `rows` of (.*?), `\[7", text)
    assert re.findall(r"`(\w+)`", runs) == [kind for kind, event in EVENTS.items() if event.ids == ("rows",)]
    assert EVENTS["committed"].ids == ("trained", "skipped")
    assert [kind for kind, event in EVENTS.items() if event.repeated == ("oldest", "newest")] == ["acked"]
    assert f"Some lists of more than {PLAIN} values" in text


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path, train_batch_size=200)
    yield served
    served.close()


def test_the_example_for_the_ledger_runs(served: Served, tmp_path: Path) -> None:
    groups = 100
    finished = pa_join(responses(range(2 * groups)), rewards(range(2 * groups)))
    served.store.admit(prompts(groups), finished, timeout=0.0)
    step = take(served.store, "train", 1000)
    served.store.commit(leases=[step.lease_id], trained=ids(step), skipped=[], version=PolicyVersion(n=1))
    (code,) = blocks("ledger.md", "python")

    done = subprocess.run(
        [sys.executable, "-c", code.replace("RUN_DIR", str(tmp_path))], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split(" ", 1)[1].strip() == str(list(range(2 * groups)))


# -- the files ---------------------------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_a_reader_that_knows_only_the_document_finds_every_sample(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writers, prompts, columns of two stages, finished samples, runs of ids, and one frame that is damaged."""
    store, near = served.store, served.connect(local=True)
    store.admit(prompts(45), timeout=0.0)
    made = take(store, "rollout", 90)
    near.ack(made.lease_id, ids(made)[:80], responses(ids(made)[:80]))
    store.ack(made.lease_id, ids(made)[80:], responses(ids(made)[80:]))
    scored = take(near, "reward", 75)
    near.ack(scored.lease_id, ids(scored), rewards(ids(scored)))
    near.admit(prompts(2), pa_join(responses(range(4)), rewards(range(4))), timeout=0.0)
    near.admit(prompts(1), timeout=0.0)
    (lost,) = {int(frame) for frame in store.broker.places([94, 95], ["prompt"])[0].frames}
    flip(segment_path(served.folder, lost >> 40), (lost & (1 << 40) - 1) + 100)
    (code,) = blocks("store_format.md", "python")
    assert "asyncflow" not in code
    assert len(code[: code.index("for sample, columns")].strip().splitlines()) < 60

    (tmp_path / "my-store").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "store_format.md", "exec"), names)
    found = names["samples"](Path("my-store"))

    assert sorted(found) == list(range(94))
    for sample, values in found.items():
        columns = store.broker.columns_of([sample])
        assert sorted(values) == sorted(columns)
        assert [values] == store.read([sample], columns).select(list(values)).to_pylist()


def test_the_limits_of_a_frame_are_in_the_document() -> None:
    text = " ".join(read("store_format.md").split())

    assert frames.MAX_DEPTH == 4
    assert "lists of these, at most four deep" in text
    deep = pa.int32()
    for _ in range(frames.MAX_DEPTH):
        deep = pa.list_(deep)
    frames.check_schema(pa.schema([("a", deep)]))
    with pytest.raises(ValueError, match="nested more than 4 deep"):
        frames.check_schema(pa.schema([("a", pa.list_(deep))]))
    assert f"{frames.MAX_COLUMNS} columns and {frames.MAX_SCHEMA_BYTES >> 10} KiB" in text
    assert f"are {schema.MOST_BITS} at most" in text


# -- the promises ------------------------------------------------------------------------------------------------------


def names_in(file: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)\(", (ROOT / "tests" / file).read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", [path.name for path in sorted(DOCS.glob("*.md"))])
def test_every_test_that_a_document_names_is_there(name: str) -> None:
    text = read(name)

    for file, test in re.findall(r"(test_\w+\.py)::(test_\w+)", text):
        assert test in names_in(file), f"{file}::{test}"
    for file in re.findall(r"tests/(test_\w+\.py)", text):
        assert (ROOT / "tests" / file).is_file(), file
    assert "…::" not in text
    assert not re.findall(r"::test_\w+_…", text)


def test_every_promise_has_a_test_and_every_fault_of_the_table_is_planted() -> None:
    (table,) = re.findall(r"\| promise \| test \| planted fault \|\n\| --- .*?\n(.*?)\n\n", read("store.md"), re.DOTALL)
    promises = rows(table)

    assert len(promises) > 20
    mutants = {table.__name__ for table in MUTANTS}
    for promise, tests, faults in promises:
        assert "::test_" in tests, promise
        assert set(re.findall('"(.*?)"', faults)) <= set(PLANTED), promise
        assert set(re.findall("`(.*?)`", faults)) <= mutants, promise


def test_the_planted_faults_in_the_document_are_those_that_there_are() -> None:
    text = read("testing_the_store.md")
    listed = [row[0] for row in rows(text[text.index("| fault | promise") :])]

    assert sorted(listed[1:]) == sorted(PLANTED)
    words = " ".join(text.split())
    rare = sum(planted.most > RARE for planted in PLANTED.values())
    numbers = {"four": 4, "five": 5, "six": 6}
    (few, all_) = re.findall(r"(\w+) of these (\d+) need so many seeds", words)[0]
    assert (numbers[few.lower()], int(all_)) == (rare, len(PLANTED))
    assert f"Another {len(MUTANTS)} faults of the table alone" in words


def test_the_calls_that_are_simulated_are_counted_in_the_document() -> None:
    from asyncflow.store import wire

    words = " ".join(read("testing_the_store.md").split())

    assert len(CALLS) == 19
    assert "for each of nineteen calls" in words
    (named,) = re.findall(r"Four calls are not simulated: (.*?);", words)
    assert set(re.findall(r"`(\w+)`", named)) == set(wire.CALLS) - set(CALLS)
