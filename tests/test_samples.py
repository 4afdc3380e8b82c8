"""What was trained is kept: every sample of a step, once, as the ledger says, whatever the disk does."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from asyncflow.errors import ConfigError
from asyncflow.launch import Run, launch, resolve, resume
from asyncflow.plan import plan
from asyncflow.report.audit import audit
from asyncflow.report.export import export
from asyncflow.rundir import LEDGER
from asyncflow.runtime import samples as module
from asyncflow.runtime.metrics import read_metrics
from asyncflow.runtime.samples import SampleLog, write_parquet
from asyncflow.store.events import Committed, Resumed
from asyncflow.store.journal import read_ledger
from asyncflow.types import PolicyVersion
from tests.conftest import TINY, RunTiny


class Lines:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[Mapping[str, Any]]] = {}

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        self.kinds.setdefault(kind, []).append(values)


def commits(run: Run) -> list[Committed]:
    return [record.event for record in read_ledger(run.run_dir / LEDGER) if isinstance(record.event, Committed)]


def rows_of(run: Run) -> list[dict[str, Any]]:
    return list(pyarrow.dataset.dataset(run.run_dir / "samples").to_table().to_pylist())


def half_flat(completions: list[str], answer: list[str], **_: object) -> list[float]:
    return [0.0 if int(a) % 2 else float(len(set(c))) for c, a in zip(completions, answer, strict=True)]


@pytest.mark.parametrize("policy", ["skip", "keep", "refill"])
def test_every_sample_of_every_step_is_there_once_as_the_ledger_says(run_tiny: RunTiny, policy: str) -> None:
    run = run_tiny("steps=5", "max_staleness=2", f"zero_variance={policy}", reward=half_flat)

    rows = rows_of(run)
    expected = {
        sample_id: (event.version, ended)
        for event in commits(run)
        for ended, ids in (("trained", event.trained), ("skipped", event.skipped))
        for sample_id in ids
    }
    assert len(rows) == len(expected) == 5 * 16
    assert {r["sample_id"]: (PolicyVersion.parse(r["policy_version"]).packed, r["ended"]) for r in rows} == expected
    account = audit(run.run_dir)
    trained = [row for row in rows if row["ended"] == "trained"]
    assert len(trained) == account.trained
    ages = [row["staleness"] for row in trained]
    assert {age: ages.count(age) for age in sorted(set(ages))} == dict(account.staleness)


def test_a_row_holds_what_the_sample_was(run_tiny: RunTiny) -> None:
    run = run_tiny("steps=2", reward=half_flat)

    for row in rows_of(run):
        assert json.loads(row["prompt"])
        assert row["group_id"] == row["sample_id"] // 4
        answer = json.loads(row["prompt_columns"])["answer"]
        assert row["reward"] == half_flat([row["response"]], [answer])[0]
        assert json.loads(row["reward_parts"]) == {"half_flat": row["reward"]}
        assert len(row["response_ids"]) == len(row["rollout_logprobs"]) == len(row["token_versions"]) > 0
        assert row["step"] - 1 - min(row["token_versions"]) == row["staleness"]
        assert row["finish_reason"] in ("stop", "length")
        assert row["prompt_ids"]


def test_a_run_may_leave_its_samples_away(run_tiny: RunTiny) -> None:
    run = run_tiny("steps=1", "save_samples=false")

    assert not (run.run_dir / "samples").exists()
    with pytest.raises(ConfigError, match="save_samples"):
        export(run.run_dir, run.run_dir / "all.parquet")


def test_a_step_that_cannot_be_written_costs_its_samples_and_not_the_run(run_tiny: RunTiny, tmp_path: Path) -> None:
    def in_the_way(completions: list[str], **_: object) -> list[float]:
        if completions[0] != "The answer is 1.":  # not when it is tried before the run
            (tmp_path / "run" / "samples" / "step-000002.parquet").mkdir(parents=True, exist_ok=True)
        return [float(len(set(c))) for c in completions]

    run = run_tiny("steps=3", reward=in_the_way)

    assert run.summary.outcome == "finished", run.summary.reason
    assert audit(run.run_dir).ok
    assert {row["step"] for row in rows_of(run)} == {1, 3}
    (alarm,) = read_metrics(run.run_dir / "metrics.jsonl", "alarm")
    assert (alarm["alarm"], alarm["samples_lost"]) == ("samples_not_saved", 16)
    assert "the 16 samples of step 2" in alarm["text"]
    (account,) = read_metrics(run.run_dir / "metrics.jsonl", "samples")
    assert (account["saved"], account["lost"]) == (32, 16)
    assert not list((run.run_dir / "samples").glob(".*"))


def step(n: int) -> tuple[Committed, pa.RecordBatch]:
    """A step of two samples, of which the second is skipped."""
    event = Committed(trained=(2 * n,), skipped=(2 * n + 1,), version=PolicyVersion(incarnation=1, n=n).packed)
    versions = pa.array(
        [[PolicyVersion(n=n - 1).packed] * 3, [PolicyVersion(n=max(0, n - 2)).packed] * 2], pa.list_(pa.int64())
    )
    ids = pa.array([2 * n, 2 * n + 1], pa.int64())
    return event, pa.RecordBatch.from_arrays([ids, ids, versions], names=["sample_id", "group_id", "token_versions"])


def test_a_disk_that_does_not_keep_up_holds_a_commit_only_for_a_while_and_the_loss_is_counted(tmp_path: Path) -> None:
    goes_on = threading.Event()
    lines = Lines()

    def slow(table: pa.Table, path: Path) -> None:
        assert goes_on.wait(60)
        write_parquet(table, path)

    log = SampleLog(tmp_path / "samples", lines, patience=0.0, write=slow)
    steps = 3 + module.WAITING_STEPS
    for n in range(1, steps + 1):
        event, batch = step(n)
        log.committed(event, lambda batch=batch: batch)  # type: ignore[misc]
    goes_on.set()
    log.close()
    log.close()

    assert log.lost > 0
    assert log.saved + log.lost == 2 * steps
    assert len(list((tmp_path / "samples").iterdir())) * 2 == log.saved
    assert lines.kinds["samples"] == [{"saved": log.saved, "lost": log.lost}]
    assert sum(1 for _ in lines.kinds["alarm"]) * 2 == log.lost


def test_samples_that_cannot_be_gathered_do_not_undo_the_commit(tmp_path: Path) -> None:
    lines = Lines()
    log = SampleLog(tmp_path / "samples", lines)

    def broken() -> pa.RecordBatch:
        raise pa.ArrowInvalid("too large")

    log.committed(step(1)[0], broken)
    log.close()

    assert (log.saved, log.lost) == (0, 2)
    assert "too large" in lines.kinds["alarm"][0]["text"]


def test_a_run_that_goes_back_to_a_step_writes_the_later_ones_again(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    first = SampleLog(folder, Lines())
    for n in (1, 2, 3):
        event, batch = step(n)
        first.committed(event, lambda batch=batch: batch)  # type: ignore[misc]
    first.close()

    again = SampleLog(folder, Lines(), after=1)
    event, batch = step(2)
    again.committed(event, lambda: batch)
    again.close()

    assert [file.name for file in sorted(folder.iterdir())] == ["step-000001.parquet", "step-000002.parquet"]


def test_a_run_that_was_resumed_has_every_sample_of_its_steps_once(run_tiny: RunTiny) -> None:
    run = run_tiny("steps=6", "max_staleness=1", "checkpoint.every=2", "checkpoint.keep=2", reward=half_flat)
    again = resume(run.run_dir, step=4, overrides=["steps=7"], reward=half_flat)

    records = [record.event for record in read_ledger(run.run_dir / LEDGER)]
    back = next(i for i, event in enumerate(records) if isinstance(event, Resumed))
    before, after = (
        {PolicyVersion.unpack(e.version).n: (e.trained, e.skipped) for e in part if isinstance(e, Committed)}
        for part in (records[:back], records[back:])
    )
    steps = {n: step for n, step in before.items() if n <= 4} | after
    assert sorted(steps) == list(range(1, 8))
    rows = rows_of(again)
    found = {
        n: tuple(
            {row["sample_id"] for row in rows if (row["step"], row["ended"]) == (n, ended)}
            for ended in ("trained", "skipped")
        )
        for n in steps
    }
    assert found == {n: (set(trained), set(skipped)) for n, (trained, skipped) in steps.items()}
    assert len(rows) == 7 * 16


def test_a_checkpoint_is_made_when_the_samples_of_its_steps_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    missing: list[int] = []

    def slow(table: pa.Table, path: Path) -> None:
        threading.Event().wait(0.1)
        write_parquet(table, path)
        written.append(path.name)

    def look(line: Mapping[str, Any]) -> None:
        if line["kind"] == "checkpoint":
            missing.extend(n for n in range(1, line["step"] + 1) if f"step-{n:06d}.parquet" not in written)
            made.append(line["step"])

    made: list[int] = []
    monkeypatch.setattr(module, "write_parquet", slow)
    settings = ["steps=4", "checkpoint.every=1", f"run_dir={tmp_path / 'run'}"]

    launch(plan(resolve(TINY, settings)), listeners=(look,))

    assert made == [1, 2, 3, 4]
    assert missing == []


def test_staleness_counts_from_the_oldest_token_also_in_a_slice_of_a_larger_column() -> None:
    event, batch = step(5)
    column = pa.concat_arrays(
        [pa.array([[7]], pa.list_(pa.int64())), batch.column(2), pa.array([[0]], pa.list_(pa.int64()))]
    )
    sliced = pa.RecordBatch.from_arrays(
        [batch.column(0), batch.column(1), column.slice(1, 2)], names=batch.schema.names
    )

    table = module.describe(event, sliced)

    assert table.column("staleness").to_pylist() == [0, 1]
    assert table.column("policy_version").to_pylist() == ["1.5", "1.5"]
    assert table.column("ended").to_pylist() == ["trained", "skipped"]


@pytest.fixture
def three_steps(run_tiny: RunTiny) -> Run:
    return run_tiny("steps=3")


def test_an_export_holds_the_same_rows_as_the_folder_in_order_of_steps(three_steps: Run, tmp_path: Path) -> None:
    assert export(three_steps.run_dir, tmp_path / "all.parquet") == 48

    assert pq.read_table(tmp_path / "all.parquet").to_pylist() == rows_of(three_steps)
    steps = pq.read_table(tmp_path / "all.parquet").column("step").to_pylist()
    assert steps == sorted(steps)


def test_an_export_as_lines_of_json_has_the_columns_that_were_asked_for(three_steps: Run, tmp_path: Path) -> None:
    columns = ["sample_id", "reward", "prompt_columns", "response", "rollout_logprobs"]
    assert export(three_steps.run_dir, tmp_path / "all.jsonl", columns) == 48

    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [list(line) for line in lines] == [columns] * 48
    assert all("answer" in line["prompt_columns"] for line in lines)
    for line, row in zip(lines, rows_of(three_steps), strict=True):
        assert line["response"] == row["response"]
        np.testing.assert_array_equal(line["rollout_logprobs"], row["rollout_logprobs"])


@pytest.mark.parametrize(
    ("file", "columns", "says"),
    [
        ("all.csv", None, r"\.parquet or \.jsonl"),
        ("all.parquet", ["rewards"], "there is no column 'rewards'; the columns are sample_id"),
        ("no/such/folder/all.parquet", None, "cannot be written"),
    ],
)
def test_an_export_that_cannot_be_made_says_what_to_do(
    three_steps: Run, tmp_path: Path, file: str, columns: list[str] | None, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        export(three_steps.run_dir, tmp_path / file, columns)


def test_an_export_that_fails_leaves_nothing_behind(three_steps: Run, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    torn = three_steps.run_dir / "samples" / "step-000002.parquet"
    torn.write_bytes(torn.read_bytes()[:-200])

    with pytest.raises(ConfigError, match="damaged"):
        export(three_steps.run_dir, target / "all.jsonl")

    assert list(target.iterdir()) == []
