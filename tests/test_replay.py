"""A run again from its ledger: the same state at every event, and the same decisions."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from asyncflow.cli.main import app
from asyncflow.errors import LedgerError
from asyncflow.report.audit import audit
from asyncflow.rundir import LEDGER
from asyncflow.store.events import Event, Leased
from asyncflow.store.journal import Journal, LedgerReader, read_ledger
from asyncflow.store.recovery import rebuild
from asyncflow.store.replay import Diverged, digest, in_words, reenact, replay, table_at
from tests.conftest import RunTiny
from tests.test_snapshot import TERMS, Recorded


class Ticking(Recorded):
    """Every operation has a time of its own, as with a real clock."""

    def do(self, events: Sequence[Event]) -> list[Event]:
        self.seen.now += 1e-6
        return super().do(events)


@pytest.mark.parametrize("update", ["boundary", "in_flight"])
def test_every_decision_of_a_run_comes_out_the_same_again(run_tiny: RunTiny, update: str) -> None:
    """Threads, engines and rewards made this interleaving; given it, nothing is left to chance."""
    run = run_tiny("steps=6", "max_staleness=2", f"weights.update={update}", "checkpoint.every=2")
    ledger = run.run_dir / LEDGER

    events = [record.event for operation, _ in reenact(ledger) for record in operation.records]

    assert events == [record.event for record in read_ledger(ledger)][1:]
    assert {"admitted", "leased", "acked", "committed", "served", "checkpointed"} <= {event.kind for event in events}
    last, lsn = table_at(ledger)
    assert lsn == len(events) + 1
    account = audit(run.run_dir)
    assert (last.next_sample, last.ended["trained"]) == (account.admitted, account.trained)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 6, 7, 8])
def test_every_decision_of_a_random_history_comes_out_the_same_again(tmp_path: Path, seed: int) -> None:
    """Also leases that run out, samples that fail, drops, amended terms, crashes and engines that lie."""
    world = Ticking(tmp_path)
    world.seen.honest = seed % 2 == 0
    world.play(random.Random(seed), 600)
    world.close()

    operations = [operation for operation, _ in reenact(world.path)]

    recorded = [event for event in world.log if event.journaled]
    assert [record.event for operation in operations for record in operation.records] == recorded
    kinds = Counter(event.kind for event in recorded)
    assert kinds["returned"]
    assert kinds["resumed"]


def test_the_table_is_the_same_at_every_event_bit_for_bit(tmp_path: Path) -> None:
    world = Ticking(tmp_path)
    digests: dict[int, str] = {world.journal.lsn: digest(world.table)}
    chance = random.Random(1)
    for _ in range(600):
        world.play(chance, 1)
        digests[world.journal.lsn] = digest(world.table)
    world.close()

    again = {record.lsn: digest(table) for record, table in replay(world.path)}

    assert len(digests) > 50
    assert {lsn: again[lsn] for lsn in digests} == digests
    assert digest(rebuild(world.schema, world.path)) == again[world.journal.lsn]
    assert len(set(again.values())) > len(again) * 0.5


def test_another_process_finds_the_same_digest(tmp_path: Path) -> None:
    """In which dicts and sets may be hashed otherwise."""
    world = Ticking(tmp_path)
    world.play(random.Random(7), 300)
    world.close()
    code = f"from asyncflow.store.replay import *; print(digest(table_at(Path({str(world.path)!r}))[0]))"

    for seed in ("1", "2"):
        other = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        assert other.stdout.decode().strip() == digest(world.table)


def test_a_decision_that_was_another_one_is_named(tmp_path: Path) -> None:
    world = Ticking(tmp_path)
    world.play(random.Random(0), 300)
    world.close()
    other = tmp_path / "other.sqlite"
    with LedgerReader(world.path) as ledger:
        records = list(ledger.records())
    place = next(i for i, r in enumerate(records) if isinstance(r.event, Leased) and len(r.event.rows) > 1)
    leased = records[place].event
    assert isinstance(leased, Leased)
    journal = Journal.create(other, records[0].event, 0.0, world.schema)
    for record in records[1:place]:
        journal.append([record.event], record.at)
    journal.append([msgspec.structs.replace(leased, rows=leased.rows[1:])], records[place].at)
    journal.close()

    with pytest.raises(Diverged, match=f"event {place + 1} is"):
        list(reenact(other))


def test_leases_that_run_out_when_somebody_gives_rows_back_are_decided_again(tmp_path: Path) -> None:
    """At one time, as with a clock that is set by hand."""
    world = Recorded(tmp_path)
    world.do(world.table.admit([1, 1], frame=0) or [])
    for name, rows in (("a", 2), ("b", 2)):
        world.do(world.table.lease("rollout", worker=name, max_rows=rows, max_tokens=None, deadline=1e9))
    world.do(world.table.renew(1, deadline=0.0))
    world.do(world.table.expire(0.0))
    world.do(world.table.nack(2, [2, 3], reason="the engine went away", final=False))
    world.close()

    events = [record.event for operation, _ in reenact(world.path) for record in operation.records]

    assert [event.kind for event in events[-2:]] == ["returned", "returned"]


@pytest.mark.parametrize("final", [True, False])
def test_a_row_that_is_given_back_for_good_says_so_in_the_ledger(tmp_path: Path, final: bool) -> None:
    world = Recorded(tmp_path)
    world.do(world.table.admit([1, 1], frame=0) or [])
    world.do(world.table.lease("judge", worker="a", max_rows=2, max_tokens=None, deadline=1e9))
    world.do(world.table.nack(1, [0], reason="no", final=final))
    world.close()

    operations = list(reenact(world.path))

    assert operations[-1][1].ready()["judge"] == world.table.ready()["judge"] == 2 + (not final)


def test_an_event_that_a_ledger_does_not_have_is_named(tmp_path: Path) -> None:
    world = Ticking(tmp_path)
    world.close()

    with pytest.raises(LedgerError, match="has no event 999: it ends at 3"):
        table_at(world.path, 999)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    world = Ticking(tmp_path / "run", TERMS)
    world.play(random.Random(11), 900)
    world.close()
    return tmp_path / "run"


def command(*words: object) -> str:
    result = CliRunner().invoke(app, ["replay", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_shows_a_run_as_it_was(run_dir: Path) -> None:
    text = command(run_dir, "--until", 60, "--last", 4)

    table, _ = table_at(run_dir / LEDGER, 60)
    assert "after event 60" in text
    assert f"{table.next_sample:,} admitted" in text
    assert digest(table) in text
    assert [line.split()[0] for line in text.splitlines()[-4:]] == ["57", "58", "59", "60"]
    for lease_id, lease in table.leases.items():
        assert f"lease {lease_id:<5} {lease.worker} holds {len(table.held(lease_id))} sample" in text


def test_the_command_gives_json_and_a_digest(run_dir: Path) -> None:
    table, _ = table_at(run_dir / LEDGER, 60)

    state: dict[str, Any] = json.loads(command(run_dir, "--until", 60, "--json", "--last", 3))

    assert state["lsn"] == 60
    assert state["open"] == {str(name): count for name, count in table.states.items()}
    assert [event["lsn"] for event in state["events"]] == [58, 59, 60]
    assert state["digest"] == digest(table) == command(run_dir, "--until", 60, "--digest").strip()


def test_the_command_lists_the_interleaving_and_checks_it(run_dir: Path) -> None:
    lines = command(run_dir, "--from", 5, "--until", 25, "--events").splitlines()

    with LedgerReader(run_dir / LEDGER) as ledger:
        records = list(ledger.records(after=4, until=25))
    assert [int(line.split()[0]) for line in lines] == [record.lsn for record in records] == list(range(5, 26))
    assert all(line.endswith(in_words(record.event)) for line, record in zip(lines, records, strict=True))
    assert "decided again, every one as it was recorded" in command(run_dir, "--check")
