"""The audit: what it counts in a good ledger, and that it sees every kind of wrong in a bad one."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncflow.errors import LedgerError
from asyncflow.report.audit import Audit, audit, render
from asyncflow.store.events import Event, Leased, Opened, Samples
from asyncflow.store.journal import Journal
from asyncflow.store.schema import PROMPT_COLUMNS, Schema, Stage
from asyncflow.store.table import Table
from asyncflow.types import PolicyVersion

SCHEMA = Schema(
    (
        Stage(name="rollout", role="generate", needs=PROMPT_COLUMNS, writes=("response_ids", "token_versions")),
        Stage(name="reward", role="score", needs=("response_ids",), writes=("reward",)),
        Stage(name="train", role="train", needs=("response_ids", "token_versions", "reward")),
    )
)
TERMS = Opened(train_batch_size=4, num_generations=2, max_staleness=2, last_version=None, min_group=2, max_attempts=2)


class Writer:
    """Makes a ledger as a run does: decisions of a table, written down."""

    def __init__(self, folder: Path, schema: Schema = SCHEMA, terms: Opened = TERMS) -> None:
        self.table = Table(schema, terms)
        self.at = 0.0
        self.journal = Journal.create(folder / "ledger.sqlite", terms, self.at, schema)

    def do(self, events: list[Event] | None) -> None:
        assert events is not None
        self.at += 1.0
        self.journal.append(events, self.at)
        for event in events:
            self.table.apply(event)

    def lease(self, stage: str) -> Leased:
        events = self.table.lease(stage, worker="w", max_rows=100, max_tokens=None, deadline=1e9)
        self.do(events)
        assert isinstance(events[-1], Leased)
        return events[-1]

    def generate(self, oldest: int, newest: int) -> None:
        lease = self.lease("rollout")
        many = len(lease.rows)
        self.do(
            self.table.ack(
                lease.lease_id,
                lease.rows,
                columns=SCHEMA.writes["rollout"],
                frame=0,
                tokens=[3] * many,
                oldest=[PolicyVersion(n=oldest).packed] * many,
                newest=[PolicyVersion(n=newest).packed] * many,
            )
        )
        lease = self.lease("reward")
        self.do(self.table.ack(lease.lease_id, lease.rows, columns=SCHEMA.writes["reward"], frame=0))

    def step(self, *, skip: int = 0) -> None:
        lease, version = self.lease("train"), PolicyVersion(n=self.table.learner.n + 1)
        skipped, trained = lease.rows[:skip], lease.rows[skip:]
        self.do(self.table.commit(leases=[lease.lease_id], trained=trained, skipped=skipped, version=version))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples 0–15: 14 trained or skipped in four steps with staleness 0, 1 and 2, one quarantined, some dropped.

    The engine serves version 0 for three steps, then takes version 3 in the middle of sequences.
    """
    folder = tmp_path_factory.mktemp("good")
    writer = Writer(folder)
    writer.do(writer.table.serve("engine", PolicyVersion(n=0)))
    writer.do(writer.table.admit([5] * 6, frame=0))  # samples 0–11: three steps
    writer.generate(0, 0)
    writer.step()
    writer.step()
    writer.do(writer.table.serve("engine", PolicyVersion(n=1)))
    writer.do(writer.table.admit([5], frame=0))  # 12, 13
    writer.generate(1, 2)
    writer.step(skip=2)
    writer.do(writer.table.serve("engine", PolicyVersion(n=3)))
    writer.do(writer.table.admit([5] * 3, frame=0))  # 14–19
    lease = writer.lease("rollout")
    writer.do(writer.table.nack(lease.lease_id, lease.rows[:1], reason="\x1b[31mbad\nreward", final=True))
    writer.do(writer.table.nack(lease.lease_id, lease.rows[2:], reason="later", final=False))
    writer.generate(3, 3)
    writer.do(writer.table.drop([18], reason="cancelled"))
    writer.step()
    writer.do(writer.table.admit([5], frame=0))  # 20, 21 stay open
    writer.journal.close()
    return folder


def test_a_good_ledger_is_counted(good: Path) -> None:
    result = audit(good)

    assert result.ok, result.violations
    assert result.admitted == 22
    assert result.trained == 14
    assert result.dropped == {"short_group": 2, "zero_variance_skipped": 2, "cancelled": 1}
    assert (result.quarantined, result.open) == (1, 2)
    assert list(result.quarantine_reasons) == ["\x1b[31mbad\nreward"]
    assert result.balanced
    assert result.equation == "admitted 22 = trained 14 + dropped 5 + quarantined 1 + open 2"


def test_staleness_is_recomputed_from_the_tokens(good: Path) -> None:
    result = audit(good)

    assert result.staleness == {0: 6, 1: 4, 2: 4}
    assert [(s.version.n, s.trained, s.skipped, s.staleness_mean, s.staleness_max) for s in result.steps] == [
        (1, 4, 0, 0.0, 0),
        (2, 4, 0, 1.0, 1),
        (3, 2, 2, 2.0, 2),
        (4, 4, 0, 1.0, 2),
    ]
    assert (result.spanning, result.max_span) == (2, 1)


def test_a_ledger_can_be_audited_while_the_run_goes_on(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.do(writer.table.serve("engine", PolicyVersion(n=0)))
    writer.do(writer.table.admit([5] * 2, frame=0))

    result = audit(tmp_path)

    assert (result.ok, result.admitted, result.open, result.steps) == (True, 4, 4, ())
    writer.journal.close()


def test_a_run_that_did_nothing_balances(tmp_path: Path) -> None:
    Writer(tmp_path).journal.close()

    result = audit(tmp_path)

    assert result.ok
    assert "admitted 0 = trained 0" in render(result)


# -- stores of other kinds ---------------------------------------------------------------------------------------------


def test_samples_that_were_put_finished_have_their_responses(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.do(writer.table.serve("engine", PolicyVersion(n=0)))
    columns = SCHEMA.mask(("response_ids", "token_versions", "reward"))
    samples = Samples(columns=columns, frame=1, tokens=(3,) * 4, oldest=(0,) * 4, newest=(0,) * 4)
    for version in range(3):
        writer.do(writer.table.admit([5] * 2, frame=0, samples=samples))
        writer.step()
        writer.do(writer.table.serve("engine", PolicyVersion(n=version + 1)))
    writer.journal.close()

    result = audit(tmp_path)

    assert result.violations == ()
    assert result.staleness == {0: 4, 1: 4, 2: 4}


@pytest.mark.parametrize("writes", [("response",), ("response", "response_ids"), ("response", "token_versions")])
def test_a_store_may_do_without_tokens_or_their_versions(tmp_path: Path, writes: tuple[str, ...]) -> None:
    schema = Schema(
        (
            Stage(name="rollout", role="generate", needs=PROMPT_COLUMNS, writes=writes),
            Stage(name="reward", role="score", needs=("response",), writes=("reward",)),
            Stage(name="train", role="train", needs=(*writes, "reward")),
        )
    )
    writer = Writer(tmp_path, schema)
    writer.do(writer.table.serve("engine", PolicyVersion(n=0)))
    writer.do(writer.table.admit([5] * 2, frame=0))
    lease, about = writer.lease("rollout"), dict[str, Any]()
    if "response_ids" in writes:
        about |= {"tokens": [3] * 4}
    if "token_versions" in writes:
        about |= {"oldest": [0] * 4, "newest": [0] * 4}
    writer.do(writer.table.ack(lease.lease_id, lease.rows, columns=schema.writes["rollout"], frame=0, **about))
    lease = writer.lease("reward")
    writer.do(writer.table.ack(lease.lease_id, lease.rows, columns=schema.writes["reward"], frame=1))
    writer.step()
    writer.journal.close()

    result = audit(tmp_path)

    assert result.violations == ()
    assert result.trained == 4


def test_the_bound_is_that_under_which_the_learner_leased(tmp_path: Path) -> None:
    """Not that of a stage that took the sample later, to look at it."""
    look = Stage(name="look", role="score", needs=("response_ids",))
    schema = Schema((*SCHEMA.stages.values(), look))
    writer = Writer(tmp_path, schema)
    writer.do(writer.table.serve("engine", PolicyVersion(n=0)))
    writer.do(writer.table.admit([5] * 6, frame=0))
    writer.generate(0, 0)
    for _ in range(2):
        writer.step()
    lease = writer.lease("train")
    writer.do(writer.table.amend(max_staleness=1))
    writer.lease("look")
    version = PolicyVersion(n=3)
    writer.do(writer.table.commit(leases=[lease.lease_id], trained=lease.rows, skipped=[], version=version))
    writer.journal.close()

    result = audit(tmp_path)

    assert result.violations == ()
    assert result.staleness == {0: 4, 1: 4, 2: 4}


# -- ledgers that were tampered with -----------------------------------------------------------------------------------


class Tampered:
    """A copy of a good ledger, and the tools to spoil it."""

    def __init__(self, good: Path, folder: Path) -> None:
        self.folder = folder
        (folder / "ledger.sqlite").write_bytes((good / "ledger.sqlite").read_bytes())
        self.db = sqlite3.connect(folder / "ledger.sqlite", isolation_level=None)

    def find(self, kind: str, number: int = 0, **having: Any) -> int:
        """Position of the number-th event of a kind that has these values."""
        lines = self.db.execute("SELECT lsn, body FROM events WHERE kind = ? ORDER BY lsn", (kind,)).fetchall()
        found = [lsn for lsn, body in lines if having.items() <= json.loads(body).items()]
        return int(found[number])

    def body(self, lsn: int) -> dict[str, Any]:
        (text,) = self.db.execute("SELECT body FROM events WHERE lsn = ?", (lsn,)).fetchone()
        body: dict[str, Any] = json.loads(text)
        return body

    def change(self, lsn: int, **values: Any) -> None:
        self.db.execute("UPDATE events SET body = ? WHERE lsn = ?", (json.dumps(self.body(lsn) | values), lsn))

    def insert(self, lsn: int, kind: str, **body: Any) -> None:
        """Put an event in before the one at this position."""
        self.db.execute("UPDATE events SET lsn = -lsn - 1 WHERE lsn >= ?", (lsn,))
        self.db.execute("UPDATE events SET lsn = -lsn WHERE lsn < 0")
        self.db.execute("INSERT INTO events VALUES (?, 0.0, ?, ?)", (lsn, kind, json.dumps(body)))

    def repeat(self, lsn: int) -> None:
        """Write an event a second time, at the end."""
        (kind,) = self.db.execute("SELECT kind FROM events WHERE lsn = ?", (lsn,)).fetchone()
        self.append(kind, **self.body(lsn))

    def append(self, kind: str, **body: Any) -> None:
        (last,) = self.db.execute("SELECT max(lsn) FROM events").fetchone()
        self.db.execute("INSERT INTO events VALUES (?, 0.0, ?, ?)", (last + 1, kind, json.dumps(body)))

    def remove(self, lsn: int) -> None:
        """Take an event out without leaving a gap."""
        self.db.execute("DELETE FROM events WHERE lsn = ?", (lsn,))
        self.db.execute("UPDATE events SET lsn = -lsn + 1 WHERE lsn > ?", (lsn,))
        self.db.execute("UPDATE events SET lsn = -lsn WHERE lsn < 0")

    def result(self) -> Audit:
        self.db.close()
        return audit(self.folder)


@pytest.fixture
def tampered(good: Path, tmp_path: Path) -> Tampered:
    return Tampered(good, tmp_path)


def late(t: Tampered) -> None:
    t.change(t.find("opened"), max_staleness=1)


def older_tokens(t: Tampered) -> None:
    """Tokens that the last step's samples were said to have from version 3 are from version 0."""
    lsn = t.find("acked", 4)
    t.change(lsn, oldest=[0] * len(t.body(lsn)["rows"]))


def trained_twice(t: Tampered) -> None:
    t.repeat(t.find("committed"))


def trained_again_in_a_later_step(t: Tampered) -> None:
    lsn = t.find("committed", 1)
    t.change(lsn, trained=[0, *t.body(lsn)["trained"][1:]])


def half_a_step(t: Tampered) -> None:
    lsn = t.find("committed")
    t.change(lsn, trained=t.body(lsn)["trained"][:2])


def a_cut_group(t: Tampered) -> None:
    lsn = t.find("committed")
    t.change(lsn, trained=t.body(lsn)["trained"][:3])


def a_version_left_out(t: Tampered) -> None:
    t.change(t.find("committed", 3), version=PolicyVersion(n=9).packed)


def an_older_incarnation(t: Tampered) -> None:
    t.change(t.find("committed", 1), version=PolicyVersion(incarnation=1, n=2).packed)


def an_unknown_sample(t: Tampered) -> None:
    t.append("dropped", rows=[777], reason="invented")


def dropped_after_training(t: Tampered) -> None:
    t.append("dropped", rows=[0], reason="cancelled")


def quarantined_after_dropping(t: Tampered) -> None:
    t.append("quarantined", rows=[18], reason="again")


def a_lost_admission(t: Tampered) -> None:
    t.remove(t.find("admitted", 1))


def ids_used_again(t: Tampered) -> None:
    t.change(t.find("admitted", 1), first_sample=0)


def admitted_too_much(t: Tampered) -> None:
    lsn = t.find("admitted")
    t.change(lsn, prompt_tokens=[5] * 7)


def admitted_while_nobody_serves(t: Tampered) -> None:
    t.remove(t.find("served"))


def leased_twice(t: Tampered) -> None:
    lsn = t.find("leased", stage="reward")
    t.insert(lsn + 1, "leased", **t.body(lsn) | {"lease_id": 99})


def acked_under_a_lost_lease(t: Tampered) -> None:
    t.change(t.find("acked"), lease_id=98)


def never_generated(t: Tampered) -> None:
    lsn = t.find("acked")
    t.change(lsn, columns=0, tokens=[], oldest=[], newest=[])


def never_leased_for_training(t: Tampered) -> None:
    t.remove(t.find("leased", stage="train"))


def spanning_backwards(t: Tampered) -> None:
    lsn = t.find("acked", 2)
    body = t.body(lsn)
    t.change(lsn, oldest=body["newest"], newest=body["oldest"])


def tokens_of_the_future(t: Tampered) -> None:
    lsn = t.find("acked")
    t.change(lsn, newest=[PolicyVersion(n=5).packed] * len(t.body(lsn)["rows"]))


def serves_the_future(t: Tampered) -> None:
    t.change(t.find("served", 1), version=PolicyVersion(n=8).packed)


def opened_twice(t: Tampered) -> None:
    t.repeat(1)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (late, r"step 3 \(version 0.3\) trains above the bound of 1: sample 10 \(staleness 2\), 11 \(staleness 2\)"),
        (older_tokens, r"step 4 \(version 0.4\) trains above the bound of 2: sample .*\(staleness 3\)"),
        (trained_twice, r"step 5 \(version 0.1\) trains sample 0, 1, 2, 3, which had been trained already"),
        (trained_again_in_a_later_step, r"step 2 \(version 0.2\) trains sample 0, which had been trained already"),
        (trained_again_in_a_later_step, "the account does not balance: admitted 22 ≠ trained 14"),
        (half_a_step, r"step 1 \(version 0.1\) is not one whole step: it consumes 2 places, not 4"),
        (a_cut_group, r"step 1 \(version 0.1\) cuts a group: it leaves out sample 3"),
        (a_version_left_out, r"step 4 \(version 0.9\) does not follow on version 0.3: version numbers"),
        (an_older_incarnation, r"step 3 \(version 0.3\) does not follow on version 1.2"),
        (an_unknown_sample, r"\(dropped\) names sample 777, which was never admitted"),
        (an_unknown_sample, "the account does not balance"),
        (dropped_after_training, r"\(dropped\) names sample 0, which had ended already \(trained\)"),
        (quarantined_after_dropping, r"\(quarantined\) names sample 18, which had ended already \(dropped\)"),
        (quarantined_after_dropping, "the account does not balance"),
        (a_lost_admission, r"\(leased\) names sample 12, 13, which was never admitted"),
        (ids_used_again, r"admits sample 0, 1 again: ids must never be reused"),
        (admitted_too_much, "admits beyond the bound: 14 places are open, 12 are allowed"),
        (admitted_while_nobody_serves, "admits samples while no engine serves"),
        (leased_twice, r"leases sample 0 to reward, whose lease \d+ has it"),
        (acked_under_a_lost_lease, r"\(acked\) names sample 0, 1, .*, which lease 98 did not have"),
        (never_generated, r"step 1 \(version 0.1\) trains sample 0, 1, 2, 3 without a response"),
        (never_leased_for_training, r"step 1 \(version 0.1\) trains sample 0, 1, 2, 3 without a lease"),
        (spanning_backwards, "the token versions of sample 12 span from 0.2 back to 0.1"),
        (tokens_of_the_future, r"the token versions of sample 0 reach 0.5, before anything after 0.0"),
        (serves_the_future, r"engine engine serves 0.8, which nothing was trained for yet"),
        (opened_twice, "opens the run a second time"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    tampered: Tampered, spoil: Callable[[Tampered], None], sentence: str
) -> None:
    spoil(tampered)

    result = tampered.result()

    assert not result.ok
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError("\n".join(result.violations))
    assert result.violations[0] in render(result)


@pytest.mark.parametrize("seed", range(20))
def test_an_event_that_is_there_twice_never_goes_unnoticed(tampered: Tampered, seed: int) -> None:
    """Whatever moves a sample can happen once."""
    chance = random.Random(seed)
    ends = "('committed', 'dropped', 'quarantined', 'acked', 'leased')"
    lines = tampered.db.execute(f"SELECT lsn FROM events WHERE kind IN {ends} ORDER BY lsn").fetchall()
    (lsn,) = chance.choice(lines)
    tampered.repeat(lsn)

    assert not tampered.result().ok


# -- ledgers that cannot be read ---------------------------------------------------------------------------------------


def newer(t: Tampered) -> None:
    t.db.execute("UPDATE meta SET value = '3'")


def no_number(t: Tampered) -> None:
    t.db.execute("UPDATE meta SET value = 'two'")


def no_format(t: Tampered) -> None:
    t.db.execute("DELETE FROM meta")


def gap(t: Tampered) -> None:
    t.db.execute("DELETE FROM events WHERE lsn = 5")


def invented(t: Tampered) -> None:
    t.append("teleported", rows=[1])


def torn_body(t: Tampered) -> None:
    t.db.execute("UPDATE events SET body = substr(body, 1, 9) WHERE lsn = 4")


def wrong_type(t: Tampered) -> None:
    t.change(t.find("committed"), trained="all")


def too_short(t: Tampered) -> None:
    t.change(t.find("acked"), oldest=[])


def no_terms(t: Tampered) -> None:
    t.remove(1)


def no_events(t: Tampered) -> None:
    t.db.execute("DELETE FROM events")


def no_table(t: Tampered) -> None:
    t.db.execute("DROP TABLE events")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (newer, "has ledger format 3, this program reads 2"),
        (no_number, "cannot be read as a ledger"),
        (no_format, "cannot be read as a ledger"),
        (gap, "has a gap: event 5 is missing"),
        (invented, "'teleported' that cannot be read"),
        (torn_body, "that cannot be read"),
        (wrong_type, r"event .committed. that cannot be read"),
        (too_short, r"event \d+ \(acked\) makes no sense"),
        (no_terms, "does not begin with the terms of a run"),
        (no_events, "does not begin with the terms of a run"),
        (no_table, "cannot be read as a ledger"),
    ],
)
def test_a_ledger_that_cannot_be_read_is_an_error_and_no_verdict(
    tampered: Tampered, spoil: Callable[[Tampered], None], sentence: str
) -> None:
    spoil(tampered)

    with pytest.raises(LedgerError, match=sentence):
        tampered.result()


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"there is no ledger .*nowhere"):
        audit(tmp_path / "nowhere")


# -- as text -----------------------------------------------------------------------------------------------------------


def test_the_text_shows_the_balance_the_histogram_and_its_bound(good: Path) -> None:
    lines = render(audit(good)).splitlines()

    assert lines[0] == "admitted 22 = trained 14 + dropped 5 + quarantined 1 + open 2"
    assert lines[-1] == "✓ The account balances and no trained sample is staler than max_staleness = 2."
    rows = [line for line in lines if "│" in line]
    assert [row.split("│")[0].strip() for row in rows] == ["0", "1", "2"]
    assert [row.split()[-2:] for row in rows] == [["6", "42.9%"], ["4", "28.6%"], ["4", "28.6%"]]
    assert rows[0].count("█") > rows[1].count("█") == rows[2].count("█") > 0
    (bound,) = [number for number, line in enumerate(lines) if line.endswith("bound")]
    assert lines[bound - 1] == rows[2]


def test_rows_above_the_bound_are_drawn_below_its_line(tampered: Tampered) -> None:
    late(tampered)
    lines = render(tampered.result()).splitlines()

    (bound,) = [number for number, line in enumerate(lines) if line.endswith("bound")]
    assert lines[bound + 1].split("│")[0].strip() == "2"
    assert lines[-1].startswith("✗ ")


def test_reasons_from_elsewhere_cannot_steer_the_terminal(good: Path) -> None:
    text = render(audit(good))

    assert "\x1b" not in text
    assert " [31mbad reward" in text
