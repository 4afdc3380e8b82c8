"""What the table refuses, what it bounds, and what a call that is repeated gives. One example each, on plain values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asyncflow.errors import IllegalTransition, LeaseLost, StoreError
from asyncflow.store.balance import balanced
from asyncflow.store.events import (
    Acked,
    Admitted,
    Event,
    Leased,
    Prioritised,
    PutId,
    Requeued,
    Restored,
    Samples,
    from_json,
)
from asyncflow.store.lifecycle import HAS_DIED, RAN_OUT, RESERVED, STRAGGLER
from asyncflow.store.schema import Stage
from asyncflow.store.state import PRODUCERS_REMEMBERED
from asyncflow.store.table import MOST_RANKS, MOST_TOKENS
from asyncflow.types import PolicyVersion
from tests.test_table import JUDGE, STAGES, Bench, ask

LIMITS: dict[str, Any] = {"worker": "w", "max_rows": 100, "max_tokens": None, "deadline": 60.0}
LOOK = Stage(name="look", role="score", needs=("prompt",))


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [-1, 0, MOST_RANKS + 1])
def test_a_number_of_ranks_that_cannot_be_never_reaches_the_ledger(ranks: int) -> None:
    bench = Bench()
    bench.fill()

    with pytest.raises(StoreError, match=f"among 1 to 65536 ranks, not {ranks}"):
        bench.table.lease("rollout", **LIMITS, ranks=ranks)


@pytest.mark.timeout(20)
def test_many_ranks_share_few_rows_at_once() -> None:
    bench = Bench(batch=64, n=2)
    bench.fill()

    bench.do(bench.table.lease("rollout", **LIMITS, ranks=MOST_RANKS))

    (lease,) = bench.table.leases.values()
    assert [len(share) for share in lease.shares] == [1] * 100 + [0] * (MOST_RANKS - 100)


def test_with_as_many_ranks_as_rows_each_has_one_the_heaviest_first() -> None:
    assert [share.tolist() for share in balanced([3, 9, 0, 9], 5)] == [[1], [3], [0], [2], []]


@pytest.mark.timeout(20)
def test_shares_of_many_rows_for_nearly_as_many_ranks_take_no_minutes() -> None:
    weights = np.arange(6000, dtype=np.int32)

    shares = balanced(weights, 5000)

    assert sorted(np.concatenate(shares).tolist()) == list(range(6000))


# -- the last step -----------------------------------------------------------------------------------------------------


def with_a_step_in_hand() -> Bench:
    bench = Bench(eta=1, batch=2, n=1, min_group=1)
    bench.fill()
    bench.generate(range(4))
    bench.take("actor_update", 2)
    return bench


def test_a_run_cannot_end_before_the_step_that_the_learner_has_in_hand() -> None:
    bench = with_a_step_in_hand()

    with pytest.raises(IllegalTransition, match="the learner has samples of step 1 already: the run cannot end at 0"):
        bench.table.amend(last_version=0)
    bench.do(bench.table.amend(last_version=1))
    bench.commit([0, 1])

    assert bench.lease("actor_update") is None
    with pytest.raises(IllegalTransition, match="has made step 1 already: the run cannot end at 0"):
        bench.table.amend(last_version=0)


# -- versions and tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("oldest", "newest"),
    [
        # As one number each is below 1.2 or beside it, and none has been made.
        (PolicyVersion(n=7), PolicyVersion(n=7)),
        (PolicyVersion(n=7), PolicyVersion(incarnation=1, n=2)),
        (PolicyVersion(n=2), PolicyVersion(incarnation=1, n=1)),
        (PolicyVersion(incarnation=1, n=3), PolicyVersion(incarnation=1, n=3)),
        (PolicyVersion(incarnation=2, n=0), PolicyVersion(incarnation=2, n=0)),
    ],
    ids=str,
)
def test_versions_that_no_step_has_made_cannot_hide_behind_a_newer_incarnation(
    oldest: PolicyVersion, newest: PolicyVersion
) -> None:
    bench = Bench(eta=0, batch=2, n=1, min_group=1)
    bench.do(bench.table.resume(0))
    bench.do(bench.table.serve("engine", PolicyVersion(incarnation=1, n=0)))
    bench.fill()
    for version in (1, 2):
        lease = bench.take("rollout")
        packed = bench.table.learner.packed
        bench.do(
            bench.table.ack(
                lease.lease_id,
                lease.rows,
                columns=bench.table.schema.writes["rollout"],
                frame=1,
                tokens=[1, 1],
                oldest=[packed, packed],
                newest=[packed, packed],
            )
        )
        bench.ack(bench.take("reward"))
        train = bench.take("actor_update")
        bench.commit(train.rows, version=PolicyVersion(incarnation=1, n=version))
        bench.do(bench.table.serve("engine", bench.table.learner))
        bench.fill()
    lease, now = bench.take("rollout"), PolicyVersion(incarnation=1, n=2).packed

    with pytest.raises((IllegalTransition, StoreError), match=r"the last step made 1\.2|cannot be: give the oldest"):
        bench.table.ack(
            lease.lease_id,
            lease.rows,
            columns=bench.table.schema.writes["rollout"],
            frame=1,
            tokens=[1, 1],
            oldest=[oldest.packed, now],
            newest=[newest.packed, now],
        )


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"tokens": [1]},
        {"oldest": [0], "newest": [0]},
        {"tokens": [1], "oldest": [0], "newest": [0, 0]},
        {"tokens": [1, 1], "oldest": [0, 0], "newest": [0, 0]},
    ],
)
def test_a_stage_that_writes_responses_says_how_long_and_how_old_they_are(about: dict[str, Any]) -> None:
    bench = Bench()
    bench.admit()
    lease = bench.take("rollout")
    columns = bench.table.schema.writes["rollout"]

    with pytest.raises(StoreError, match="need 1 numbers of tokens and 1 oldest and newest versions"):
        bench.table.ack(lease.lease_id, [0], columns=columns, frame=1, **about)
    with pytest.raises(StoreError, match="need 2 numbers of tokens and 2 oldest and newest versions"):
        bench.table.admit([10], frame=0, samples=Samples(columns=columns, frame=1, tokens=(1, 1)))


def test_no_other_stage_says_anything_of_tokens() -> None:
    """Else it could make a response young again."""
    bench = Bench()
    bench.admit()
    bench.ack(bench.take("rollout"))
    lease = bench.take("reward")
    columns = bench.table.schema.writes["reward"]

    for about in ({"tokens": [1, 1]}, {"oldest": [0, 0], "newest": [0, 0]}):
        with pytest.raises(StoreError, match="with reward need 0 numbers of tokens and 0 oldest"):
            bench.table.ack(lease.lease_id, [0, 1], columns=columns, frame=1, **about)


def test_a_prompt_and_a_response_together_are_never_too_long_to_be_counted() -> None:
    bench = Bench(n=1, batch=1, min_group=1)
    bench.do(bench.table.admit([MOST_TOKENS], frame=0) or [])
    lease = bench.take("rollout")

    with pytest.raises(StoreError, match="at most 1073741823"):
        bench.ack(lease, tokens=MOST_TOKENS + 1)
    with pytest.raises(StoreError, match="at most 1073741823"):
        bench.table.admit([MOST_TOKENS + 1], frame=0)
    bench.ack(lease, tokens=MOST_TOKENS)

    assert bench.table.samples()[0].tokens == 2 * MOST_TOKENS


# -- stages that only look on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("looker", [JUDGE, LOOK], ids=lambda stage: stage.name)
def test_who_only_looks_on_and_fails_takes_nothing_from_training(looker: Stage, final: bool) -> None:
    bench = Bench(batch=2, max_attempts=2, stages=(*STAGES, looker))
    bench.admit()
    bench.generate([0, 1])
    bench.take("actor_update")

    for _ in range(1 if final else 2):
        bench.nack(bench.take(looker.name, 1), reason="the judge is out of order", final=final)

    assert bench.states() == {0: "training", 1: "training"}
    assert bench.take(looker.name).rows == (1,)  # it does not get the other one again
    assert bench.table.ended["quarantined"] == 0
    bench.commit([0, 1])


def test_what_is_generated_again_is_new_for_who_looks_on() -> None:
    bench = Bench(n=1, batch=1, min_group=1, eta=1, late_samples="requeue", stages=(*STAGES, LOOK))
    bench.fill()
    bench.generate([0])
    bench.nack(bench.take("look", 1), final=True)
    assert bench.take("look").rows == (1,)

    bench.do([Requeued(rows=(0,))])

    assert bench.take("look").rows == (0,)


# -- stragglers --------------------------------------------------------------------------------------------------------


def test_who_waits_to_train_is_woken_when_there_is_a_group_to_wait_for() -> None:
    """Else the time of the group would begin when somebody asks again."""
    bench = Bench(n=2, batch=2, min_group=1, group_timeout=10.0)
    (admitted,) = bench.table.admit([1], frame=0) or []
    assert "actor_update" in bench.table.apply(admitted)
    bench.generate([0, 1])
    assert "actor_update" in bench.table.apply(Requeued(rows=(0,)))
    bench.do(bench.table.nack(bench.take("rollout").lease_id, [0], reason="no", final=True))
    assert "actor_update" in bench.table.apply(Restored(rows=(0,)))

    patient = Bench(n=2, batch=2)
    (admitted,) = patient.table.admit([1], frame=0) or []
    assert "actor_update" not in patient.table.apply(admitted)


def test_the_time_of_a_group_begins_though_a_row_of_it_is_generated_again() -> None:
    bench = Bench(n=2, batch=2, eta=1, min_group=1, late_samples="requeue", group_timeout=10.0)
    bench.fill()
    bench.generate([0])
    for version in (1, 2):
        bench.generate([2 * version, 2 * version + 1], version=version - 1)
        bench.step()
        bench.serve(version)
        bench.fill()

    ask(bench, now=100.0)

    assert bench.table.tally["requeued"] == 1
    assert bench.table.awaiting == {0: 110.0}
    bench.do(bench.table.expire(110.0))
    assert bench.table.dropped() == {STRAGGLER: 2}


def test_a_group_that_ends_at_once_is_not_waited_for() -> None:
    bench = Bench(n=2, batch=2, eta=1, min_group=2, late_samples="drop", group_timeout=10.0)
    bench.fill()
    bench.generate([0])
    for version in (1, 2):
        bench.generate([2 * version, 2 * version + 1], version=version - 1)
        bench.step()
        bench.serve(version)
        bench.fill()

    ask(bench, now=100.0)

    assert bench.table.dropped() == {"late": 1, "short_group": 1}
    assert 0 not in bench.table.awaiting


# -- reasons, engines, and nothing at all ------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", RESERVED)
def test_nobody_but_the_store_drops_for_its_own_reasons(reason: str) -> None:
    bench = Bench()
    bench.admit()

    with pytest.raises(StoreError, match=f"'{reason}' is a reason of the store itself: give another one"):
        bench.table.drop([0], reason=reason)


@pytest.mark.parametrize("reason", [RAN_OUT, HAS_DIED])
def test_nobody_but_the_store_says_what_became_of_a_worker(reason: str) -> None:
    bench = Bench()
    bench.admit()
    lease = bench.take("rollout", worker="w 1")

    with pytest.raises(StoreError, match="is what the store itself says: give another reason"):
        bench.table.nack(lease.lease_id, [0], reason=reason.format("w 1"), final=False)
    bench.nack(lease, [0], reason=reason.format("w 2"))


def test_nothing_is_generated_while_nobody_serves() -> None:
    bench = Bench()
    bench.fill()
    bench.serve(None)

    assert bench.lease("rollout") is None
    bench.serve(0)
    assert bench.take("rollout").rows == tuple(range(8))


def test_a_call_without_samples_is_refused() -> None:
    bench = Bench()
    bench.admit()
    lease = bench.take("rollout")

    with pytest.raises(StoreError, match="name at least one"):
        bench.table.ack(lease.lease_id, [], columns=bench.table.schema.writes["rollout"], frame=1)
    with pytest.raises(StoreError, match="name at least one"):
        bench.table.nack(lease.lease_id, [], reason="no", final=False)


# -- what is repeated --------------------------------------------------------------------------------------------------


def test_an_ack_whose_answer_was_lost_is_done() -> None:
    bench = Bench()
    bench.admit()
    lease = bench.take("rollout")
    about: dict[str, Any] = {"tokens": [1, 1], "oldest": [0, 0], "newest": [0, 0]}
    said = {"columns": bench.table.schema.writes["rollout"], "frame": 64, **about}
    (acked,) = bench.do(bench.table.ack(lease.lease_id, [0, 1], **said))
    assert isinstance(acked, Acked)

    assert bench.table.ack(lease.lease_id, [0, 1], **said) == []
    for rows, frame in (([0, 1], 128), ([1, 0], 64), ([1], 64), ([0, 1, 2], 64)):
        about = {name: values[:1] * len(rows) for name, values in about.items()}
        with pytest.raises(LeaseLost):
            bench.table.ack(lease.lease_id, rows, **said | about | {"frame": frame})


def test_what_was_generated_again_since_then_is_not_done() -> None:
    bench = Bench(n=1, batch=1, min_group=1, late_samples="requeue")
    bench.admit()
    lease = bench.take("rollout")
    bench.ack(lease)
    bench.do([Requeued(rows=(0,))])

    with pytest.raises(LeaseLost):
        bench.ack(lease)


def test_who_repeats_a_request_of_which_a_row_is_generated_again_has_lost_it() -> None:
    bench = Bench(late_samples="requeue")
    bench.admit()
    bench.ack(bench.take("rollout"))
    (leased,) = bench.do(bench.table.lease("reward", **LIMITS, request="a"))
    assert isinstance(leased, Leased)
    bench.do([Requeued(rows=(1,))])

    with pytest.raises(LeaseLost, match="ended for sample 1: ask under a new name"):
        bench.table.granted("reward", "a")


def test_as_many_producers_are_known_as_put_last() -> None:
    bench = Bench(n=1, batch=1, min_group=1, eta=0)

    def put(producer: str, sequence: int = 1) -> list[Event]:
        events = bench.do(bench.table.admit([1], frame=0, put=PutId(producer=producer, sequence=sequence)) or [])
        bench.do(bench.table.drop([bench.table.next_sample - 1], reason="not wanted"))
        return events

    put("first")
    for number in range(PRODUCERS_REMEMBERED - 1):
        put(f"{number}")
    put("first", 2)  # it is the last one now
    put("one more")

    assert len(bench.table.puts) == PRODUCERS_REMEMBERED
    assert put("first", 2) == []
    assert put("1") == []
    assert put("0") != []  # forgotten
    image, arrays = bench.table.dump()
    loaded = type(bench.table).load(bench.table.schema, image, arrays)
    assert list(loaded.puts) == list(bench.table.puts)
    with pytest.raises(StoreError, match="at most 256 characters, this one 257"):
        put("x" * 257)


# -- events ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        Admitted(first_group=0, first_sample=0, prompt_tokens=(1,) * 500, frame=0),
        Restored(rows=tuple(range(500))),
        Requeued(rows=tuple(range(500))),
        Prioritised(rows=tuple(range(500)), priority=1),
    ],
    ids=lambda event: event.kind,
)
def test_an_event_knows_how_much_it_names(event: Event) -> None:
    assert event.size == 500
    assert from_json(event.kind, event.to_json()) == event


def test_asking_for_the_next_deadline_changes_nothing() -> None:
    bench = Bench()
    bench.fill()
    first, second = bench.take("rollout", 1, deadline=10.0), bench.take("rollout", 1, deadline=30.0)
    bench.do(bench.table.renew(first.lease_id, deadline=20.0))
    before = list(bench.table._deadlines)

    assert bench.table.next_deadline() == 20.0
    assert bench.table._deadlines == before
    bench.nack(first)
    assert bench.table.next_deadline() == 30.0
    bench.nack(second)
    assert bench.table.next_deadline() is None
