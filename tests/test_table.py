"""The promises of the table, one example each, with plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from asyncflow.errors import ConfigError, IllegalTransition, LeaseLost, LedgerError, StalenessViolation, StoreError
from asyncflow.store.events import (
    Acked,
    Committed,
    Dropped,
    Event,
    LatePolicy,
    Leased,
    Opened,
    Quarantined,
    Returned,
    from_json,
)
from asyncflow.store.lifecycle import LATE, SHORT_GROUP, SKIPPED, STRAGGLER, State
from asyncflow.store.rows import NONE
from asyncflow.store.schema import PROMPT_COLUMNS, Schema, Stage
from asyncflow.store.table import Table
from asyncflow.store.topics import ADMISSION
from asyncflow.types import PolicyVersion

RESPONSE = ("response_ids", "rollout_logprobs", "token_versions", "response", "finish_reason")
STAGES = (
    Stage(name="rollout", role="generate", needs=PROMPT_COLUMNS, writes=RESPONSE),
    Stage(name="reward", role="score", needs=("response",), writes=("reward",)),
    Stage(name="actor_update", role="train", needs=(*RESPONSE, "reward")),
)
JUDGE = Stage(name="judge", role="score", needs=("prompt",), writes=("reward_parts",))
"""A stage that needs only the prompt and that training does not wait for: it may hold a row at any time."""


class Bench:
    """A table, and the short words that the examples below are written in. Every decision is applied at once."""

    def __init__(
        self,
        *,
        batch: int = 4,
        n: int = 2,
        eta: int = 1,
        last: int | None = None,
        min_group: int = 2,
        max_attempts: int = 3,
        stages: Sequence[Stage] = STAGES,
        served: int | None = 0,
        late_samples: LatePolicy = "wait",
        group_timeout: float | None = None,
    ) -> None:
        terms = Opened(
            train_batch_size=batch,
            num_generations=n,
            max_staleness=eta,
            last_version=last,
            min_group=min_group,
            max_attempts=max_attempts,
            late_samples=late_samples,
            group_timeout=group_timeout,
        )
        self.table = Table(Schema(stages), terms)
        if served is not None:
            self.serve(served)

    def do(self, events: Sequence[Event]) -> list[Event]:
        for event in events:
            self.table.apply(event)
        return list(events)

    def serve(self, n: int | None, engine: str = "engine") -> None:
        self.do(self.table.serve(engine, None if n is None else PolicyVersion(n=n)))

    def admit(self, groups: int = 1, tokens: int = 10) -> bool:
        events = self.table.admit([tokens] * groups, frame=0)
        self.do(events or [])
        return events is not None

    def fill(self) -> int:
        """Admit one group after the other until there is no room; returns how many."""
        groups = 0
        while self.admit():
            groups += 1
        return groups

    def lease(
        self, stage: str, rows: int = 100, *, tokens: int | None = None, worker: str = "worker", deadline: float = 60.0
    ) -> Leased | None:
        events = self.do(self.table.lease(stage, worker=worker, max_rows=rows, max_tokens=tokens, deadline=deadline))
        return events[-1] if events and isinstance(events[-1], Leased) else None

    def take(self, stage: str, rows: int = 100, **limits: Any) -> Leased:
        leased = self.lease(stage, rows, **limits)
        assert leased is not None, f"nothing is ready for {stage}"
        return leased

    def ack(
        self, lease: Leased, rows: Sequence[int] | None = None, *, version: int = 0, tokens: int = 5, frame: int = 1
    ) -> None:
        rows = lease.rows if rows is None else rows
        columns, packed = self.table.schema.writes[lease.stage], PolicyVersion(n=version).packed
        if lease.stage != "rollout":
            self.do(self.table.ack(lease.lease_id, rows, columns=columns, frame=2))
            return
        many = len(rows)
        self.do(
            self.table.ack(
                lease.lease_id,
                rows,
                columns=columns,
                frame=frame,
                tokens=[tokens] * many,
                oldest=[packed] * many,
                newest=[packed] * many,
            )
        )

    def generate(self, rows: Sequence[int], *, version: int = 0, tokens: int = 5) -> None:
        """Generate and score exactly these rows; whatever else the rollout stage could have is given back."""
        lease = self.take("rollout")
        self.ack(lease, rows, version=version, tokens=tokens)
        if rest := [row for row in lease.rows if row not in rows]:
            self.do([Returned(lease_id=lease.lease_id, rows=tuple(rest), reason="not wanted")])
        self.ack(self.take("reward"))

    def step(self, *, skipped: Sequence[int] = ()) -> Committed:
        """Train everything that is ready as one step."""
        lease = self.take("actor_update")
        return self.commit([row for row in lease.rows if row not in skipped], skipped)

    def commit(
        self,
        trained: Sequence[int],
        skipped: Sequence[int] = (),
        version: PolicyVersion | None = None,
        leases: Sequence[int] | None = None,
    ) -> Committed:
        """Under all leases of the training stage, unless it is said under which."""
        version = version or PolicyVersion(n=self.table.learner.n + 1)
        if leases is None:
            leases = [i for i, lease in self.table.leases.items() if lease.stage == "actor_update"]
        (event,) = self.do(self.table.commit(leases=leases, trained=trained, skipped=skipped, version=version))
        assert isinstance(event, Committed)
        return event

    def nack(
        self, lease: Leased, rows: Sequence[int] | None = None, reason: str = "no", final: bool = False
    ) -> list[Event]:
        rows = lease.rows if rows is None else rows
        return self.do(self.table.nack(lease.lease_id, rows, reason=reason, final=final))

    def states(self) -> dict[int, str]:
        return {sample_id: str(row.state) for sample_id, row in self.table.samples().items()}


# -- admission ---------------------------------------------------------------------------------------------------------


def test_nothing_is_admitted_before_an_engine_serves() -> None:
    bench = Bench(served=None)

    assert bench.table.capacity() == 0
    assert not bench.admit()


@pytest.mark.parametrize(("eta", "samples"), [(0, 4), (1, 8), (2, 12), (4, 20)])
def test_as_many_steps_are_open_as_the_bound_allows(eta: int, samples: int) -> None:
    bench = Bench(eta=eta)

    bench.fill()

    assert bench.table.states[State.PROMPTED] == samples
    assert bench.table.capacity() == 0


def test_an_engine_that_lags_leaves_less_room() -> None:
    bench = Bench(eta=2)
    bench.fill()
    bench.generate(range(4))
    bench.step()  # the learner is at 1, the engine serves 0: one of three steps is lost to the lag
    assert bench.table.capacity() == 0

    bench.serve(1)

    assert bench.table.capacity() == 4


def test_the_slowest_engine_counts_and_one_that_is_gone_does_not() -> None:
    bench = Bench(eta=1)
    bench.serve(0, "slow")
    bench.fill()
    bench.generate(range(4))
    bench.step()
    bench.serve(1, "engine")
    assert bench.table.capacity() == 0

    bench.serve(None, "slow")

    assert bench.table.capacity() == 4


def test_several_groups_are_admitted_together_or_not_at_all() -> None:
    bench = Bench(batch=6, n=2, eta=0)
    bench.admit()

    assert not bench.admit(groups=3)
    assert bench.table.next_sample == 2
    assert bench.admit(groups=2)


@pytest.mark.parametrize("served", [None, 0])
def test_more_groups_than_there_could_ever_be_room_for_are_refused(served: int | None) -> None:
    bench = Bench(batch=4, n=2, eta=1, served=served)

    with pytest.raises(StoreError, match=r"5 groups at once need 10 places, .* more than 8: admit at most 4 groups"):
        bench.admit(groups=5)

    bench.serve(0)
    assert bench.admit(groups=4)


def test_nothing_is_admitted_that_no_step_would_train() -> None:
    bench = Bench(eta=4, last=2)

    assert bench.fill() == 4  # two steps of two groups, where the bound alone would allow ten
    bench.generate(range(4))
    bench.step()
    bench.serve(1)
    assert bench.table.capacity() == 0


def test_a_lag_above_the_bound_is_no_room_rather_than_negative_room() -> None:
    bench = Bench(batch=2, eta=0)
    bench.admit()
    bench.generate([0, 1])
    bench.step()

    assert bench.table.capacity() == 0


def test_a_group_holds_all_its_places_until_its_last_row_has_ended() -> None:
    bench = Bench(batch=4, n=4, eta=0, min_group=2)
    bench.admit()
    assert bench.table.capacity() == 0

    bench.do(bench.table.drop([0, 1], reason="lost"))
    assert bench.table.capacity() == 0  # two rows are left, and they still make a step

    bench.do(bench.table.drop([2], reason="lost"))
    assert bench.table.capacity() == 4  # the last one was too little to train


def test_ids_are_never_used_twice() -> None:
    bench = Bench(batch=2, eta=0)
    bench.admit()
    bench.do(bench.table.drop([0, 1], reason="lost"))
    bench.admit()

    assert list(bench.table.samples()) == [2, 3]
    assert bench.table.groups.first(9).tolist() == [1]


# -- stages that generate and score ------------------------------------------------------------------------------------


def test_rows_are_leased_in_admission_order_and_only_once() -> None:
    bench = Bench()
    bench.fill()

    first, second = bench.take("rollout", 3), bench.take("rollout", 100)

    assert first.rows == (0, 1, 2)
    assert second.rows == (3, 4, 5, 6, 7)
    assert bench.lease("rollout") is None


def test_a_row_that_came_back_goes_before_younger_ones() -> None:
    bench = Bench()
    bench.fill()
    lease = bench.take("rollout", 2)
    bench.nack(lease, [0])

    assert bench.take("rollout", 2).rows == (0, 2)


def test_a_stage_sees_a_row_when_its_columns_are_there() -> None:
    bench = Bench()
    bench.admit()
    assert bench.lease("reward") is None

    bench.ack(bench.take("rollout"), [1])

    assert bench.take("reward").rows == (1,)


def test_an_ack_says_for_whom_something_became_possible() -> None:
    bench = Bench(stages=(*STAGES, JUDGE))
    assert bench.do(bench.table.admit([10], frame=0) or [])
    (leased,) = bench.table.lease("rollout", worker="w", max_rows=1, max_tokens=None, deadline=1.0)
    bench.table.apply(leased)

    columns = bench.table.schema.writes["rollout"]
    (acked,) = bench.table.ack(1, [0], columns=columns, frame=1, tokens=[5], oldest=[0], newest=[0])

    assert bench.table.apply(acked) == {"reward", "judge"}


def test_ends_and_engines_wake_admission() -> None:
    bench = Bench()
    bench.admit()

    assert ADMISSION in bench.table.apply(Dropped(rows=(0,), reason="lost"))
    assert ADMISSION in bench.table.apply(bench.table.serve("other", PolicyVersion(n=0))[0])


def test_a_token_budget_is_kept_but_one_row_is_always_given() -> None:
    bench = Bench()
    bench.fill()  # ten tokens a prompt

    assert bench.take("rollout", tokens=35).rows == (0, 1, 2)
    assert bench.take("rollout", tokens=3).rows == (3,)


def test_scoring_stages_hold_one_row_at_the_same_time_and_do_not_move_it() -> None:
    """A stage that only needs the prompt works beside the one that generates; its ack or nack is not theirs."""
    bench = Bench(stages=(*STAGES, JUDGE))
    bench.admit()
    rollout = bench.take("rollout", 2)
    judge = bench.take("judge", 2)

    bench.ack(judge, [0])
    bench.nack(judge, [1])
    assert bench.states() == {0: "generating", 1: "generating"}

    bench.ack(rollout)
    bench.ack(bench.take("reward"))
    train = bench.take("actor_update")
    bench.nack(bench.take("judge"), [1])
    assert bench.states() == {0: "training", 1: "training"}
    assert train.rows == (0, 1)


def test_training_does_not_wait_for_columns_that_it_does_not_need() -> None:
    bench = Bench(batch=2, stages=(*STAGES, JUDGE))
    bench.admit()
    bench.generate([0, 1])
    judge = bench.take("judge")

    bench.step()

    with pytest.raises(LeaseLost):
        bench.ack(judge)
    assert bench.table.leases == {}


# -- whole groups, in the window of the step ---------------------------------------------------------------------------


def test_a_group_is_trained_whole_or_not_at_all() -> None:
    bench = Bench()
    bench.admit()
    bench.generate([0])
    assert bench.lease("actor_update") is None

    bench.generate([1])

    assert bench.take("actor_update").rows == (0, 1)


def test_within_the_step_a_complete_group_need_not_wait_for_an_earlier_one() -> None:
    bench = Bench(batch=4, n=2, eta=1)
    bench.fill()
    bench.generate([2, 3])

    assert bench.take("actor_update").rows == (2, 3)


def test_a_group_of_a_later_step_waits_even_when_nothing_else_is_ready() -> None:
    bench = Bench(batch=4, n=2, eta=1)
    bench.fill()
    bench.generate([4, 5, 6, 7])

    assert bench.lease("actor_update") is None


def test_what_the_learner_holds_still_fills_the_window_until_it_is_committed() -> None:
    bench = Bench(batch=4, n=2, eta=1)
    bench.fill()
    bench.generate(range(8))
    lease = bench.take("actor_update")
    assert lease.rows == (0, 1, 2, 3)
    assert bench.lease("actor_update") is None

    bench.commit(lease.rows)

    assert bench.take("actor_update").rows == (4, 5, 6, 7)


def test_a_step_can_be_leased_group_by_group() -> None:
    bench = Bench(batch=4, n=2)
    bench.admit(2)
    bench.generate(range(4))

    assert bench.take("actor_update", 2).rows == (0, 1)
    assert bench.take("actor_update", 1).rows == (2, 3)  # a group is never cut
    assert bench.lease("actor_update") is None


def test_groups_are_leased_within_a_token_budget() -> None:
    bench = Bench(batch=6, n=2)
    bench.admit(3)
    bench.generate(range(6), tokens=5)  # 30 tokens a group

    assert bench.take("actor_update", tokens=65).rows == (0, 1, 2, 3)
    assert bench.take("actor_update", tokens=1).rows == (4, 5)


def test_a_group_that_came_back_is_leased_again() -> None:
    bench = Bench(batch=2)
    bench.admit()
    bench.generate([0, 1])
    bench.nack(bench.take("actor_update"))

    again = bench.take("actor_update")

    assert again.rows == (0, 1)
    assert bench.table.samples()[0].attempts["actor_update"] == 2


def test_a_dropped_group_gives_its_place_in_the_step_to_a_later_one() -> None:
    """`zero_variance: refill` is this: the learner drops a group that it holds and leases another for the same step."""
    bench = Bench(batch=4, n=2, eta=1)
    bench.fill()
    bench.generate(range(6))
    held = bench.take("actor_update")

    bench.do(bench.table.drop([0, 1], reason="zero_variance"))
    refill = bench.take("actor_update")

    assert refill.rows == (4, 5)
    bench.commit([*held.rows[2:], *refill.rows])
    assert bench.table.dropped() == {"zero_variance": 2}


# -- failure -----------------------------------------------------------------------------------------------------------


def test_a_row_is_quarantined_with_all_its_reasons_after_so_many_attempts() -> None:
    bench = Bench(n=4, batch=4, max_attempts=2)
    bench.admit()
    bench.nack(bench.take("rollout"), [0], reason="timed out")
    bench.ack(bench.take("rollout", 1), [0])
    reward = bench.take("reward")
    bench.nack(reward, reason="no number")
    bench.nack(bench.take("reward"), reason="not a number")

    assert bench.table.ended["quarantined"] == 1
    assert 0 not in bench.table.samples()


def test_the_history_of_a_quarantined_row_names_each_reason_once() -> None:
    bench = Bench(n=4, batch=4, max_attempts=3)
    bench.admit()
    for reason in ("timed out", "timed out"):
        bench.nack(bench.take("rollout", 1), reason=reason)

    events = bench.nack(bench.take("rollout", 1), reason="crashed")

    assert [e.reason for e in events if isinstance(e, Quarantined)] == ["timed out; crashed"]


def test_a_final_failure_is_quarantined_at_once_and_its_neighbours_survive() -> None:
    bench = Bench(n=4, batch=4)
    bench.admit()
    lease = bench.take("rollout")

    events = bench.nack(lease, [1], reason="prompt too long", final=True)

    assert events == [
        Returned(lease_id=lease.lease_id, rows=(1,), reason="prompt too long", final=True),
        Quarantined(rows=(1,), reason="prompt too long"),
    ]
    assert bench.states() == dict.fromkeys((0, 2, 3), "generating")


def test_a_group_is_trained_without_a_lost_row_while_it_is_long_enough() -> None:
    bench = Bench(n=4, batch=4, min_group=3)
    bench.admit()
    lease = bench.take("rollout")
    bench.nack(lease, [1], final=True)
    bench.ack(lease, [0, 2, 3])
    bench.ack(bench.take("reward"))

    committed = bench.step()

    assert committed.trained == (0, 2, 3)  # three rows, four places: exactly one step


def test_what_is_left_of_a_group_that_became_too_short_is_dropped() -> None:
    bench = Bench(n=4, batch=4, min_group=3)
    bench.admit()
    lease = bench.take("rollout")
    bench.nack(lease, [0], final=True)

    events = bench.nack(lease, [1], final=True)

    assert events[-1] == Dropped(rows=(2, 3), reason=SHORT_GROUP)
    assert (bench.table.samples(), bench.table.groups.count, bench.table.leases) == ({}, 0, {})


def test_losses_of_one_operation_are_judged_together() -> None:
    """Two leases of one group run out at once and both rows are poison: neither the rest (too short) nor a row that
    ended already may end a second time."""
    bench = Bench(n=3, batch=3, min_group=2, max_attempts=1)
    bench.admit()
    bench.take("rollout", 1)
    bench.take("rollout", 1)

    events = bench.do(bench.table.expire(now=60.0))

    assert [type(e) for e in events] == [Returned, Returned, Quarantined, Dropped]
    assert bench.table.ended == {"quarantined": 2, f"dropped:{SHORT_GROUP}": 1}


def test_rows_with_different_histories_fail_in_one_nack() -> None:
    bench = Bench(n=2, batch=2, max_attempts=2)
    bench.admit()
    lease = bench.take("rollout")
    bench.nack(lease, [0], reason="slow")
    bench.nack(lease, [1], reason="crashed")

    bench.nack(bench.take("rollout"), reason="gone")

    assert bench.table.ended == {"quarantined": 2}


def test_a_row_that_two_stages_lose_at_once_ends_once() -> None:
    bench = Bench(n=2, batch=2, max_attempts=1, stages=(*STAGES, JUDGE))
    bench.admit()
    bench.take("rollout")
    bench.take("judge")

    bench.do(bench.table.expire(now=60.0))

    assert bench.table.ended == {"quarantined": 2}


def test_a_dropped_row_leaves_every_lease() -> None:
    bench = Bench(n=4, batch=4, min_group=2)
    bench.admit()
    lease = bench.take("rollout")

    bench.do(bench.table.drop([0], reason="cancelled"))

    bench.ack(lease, [1, 2, 3])
    assert bench.table.leases == {}


def test_dropping_what_has_ended_already_does_nothing() -> None:
    bench = Bench()
    bench.admit()
    bench.do(bench.table.drop([0, 0, 1], reason="cancelled"))

    assert bench.table.drop([0, 1, 77], reason="again") == []
    assert bench.table.dropped() == {"cancelled": 2}


# -- leases ------------------------------------------------------------------------------------------------------------


def test_expired_rows_go_back_and_the_old_lease_is_refused() -> None:
    bench = Bench(batch=2)
    bench.admit()
    old = bench.take("rollout", deadline=60.0)

    assert bench.do(bench.table.expire(now=59.9)) == []
    bench.do(bench.table.expire(now=60.0))
    new = bench.take("rollout")

    assert new.rows == old.rows
    assert new.lease_id > old.lease_id
    with pytest.raises(LeaseLost):
        bench.ack(old)
    with pytest.raises(LeaseLost):
        bench.nack(old)
    with pytest.raises(LeaseLost):
        bench.table.renew(old.lease_id, deadline=99.0)
    bench.ack(new)


def test_a_renewed_lease_lives_longer_and_the_deadline_is_known() -> None:
    bench = Bench()
    bench.admit()
    assert bench.table.next_deadline() is None
    lease = bench.take("rollout", deadline=60.0)
    assert bench.table.next_deadline() == 60.0

    bench.do(bench.table.renew(lease.lease_id, deadline=120.0))

    assert bench.table.next_deadline() == 120.0
    assert bench.table.expire(now=100.0) == []
    bench.ack(lease)
    assert bench.table.next_deadline() is None


def test_a_call_for_one_lease_cannot_touch_rows_of_another() -> None:
    bench = Bench()
    bench.admit(2)
    mine, theirs = bench.take("rollout", 2), bench.take("rollout", 2)

    with pytest.raises(LeaseLost):
        bench.ack(mine, theirs.rows)
    with pytest.raises(LeaseLost):
        bench.nack(mine, [*mine.rows, *theirs.rows])


def test_who_lost_rows_hears_which_ones() -> None:
    bench = Bench(n=4, batch=8)
    bench.admit(2)
    lease = bench.take("rollout")
    bench.ack(lease, [0])
    bench.do(bench.table.drop([2], reason="cancelled"))

    with pytest.raises(LeaseLost, match=f"lease {lease.lease_id} has ended for sample 2, 0$") as some:
        bench.ack(lease, [3, 2, 1, 0])
    assert some.value.rows == (2, 0)
    with pytest.raises(LeaseLost, match=r"has ended for sample 0, 2, 77, 78 and others$") as more:
        bench.nack(lease, [0, 1, 2, 77, 78, 79])
    assert more.value.rows == (0, 2, 77, 78, 79)

    bench.nack(lease, [1, 3, 4, 5, 6, 7])
    with pytest.raises(LeaseLost, match=f"lease {lease.lease_id} has ended;") as all_of_them:
        bench.nack(lease, [1, 3])
    assert all_of_them.value.rows == (1, 3)
    with pytest.raises(LeaseLost) as none:
        bench.table.renew(lease.lease_id, deadline=99.0)
    assert none.value.rows == ()


def test_rows_are_acked_once() -> None:
    bench = Bench()
    bench.admit()
    lease = bench.take("rollout")
    bench.ack(lease, [0])

    with pytest.raises(LeaseLost):
        bench.ack(lease, [0], frame=3)
    with pytest.raises(IllegalTransition, match="names a sample twice"):
        bench.ack(lease, [1, 1])


def test_an_ack_brings_exactly_the_columns_of_its_stage() -> None:
    bench = Bench()
    bench.admit()
    lease = bench.take("rollout")

    for columns in (["reward"], RESPONSE[:-1], [*RESPONSE, "reward"], []):
        with pytest.raises(StoreError, match=r"stage rollout writes response_ids, .*; its ack brings"):
            bench.table.ack(lease.lease_id, [0], columns=bench.table.schema.mask(columns), frame=1)


def test_the_training_stage_cannot_ack() -> None:
    bench = Bench(batch=2)
    bench.admit()
    bench.generate([0, 1])
    lease = bench.take("actor_update")

    with pytest.raises(IllegalTransition, match="with a commit, not with an ack"):
        bench.table.ack(lease.lease_id, lease.rows, columns=0, frame=1)


# -- staleness and commit ----------------------------------------------------------------------------------------------


def dishonest(eta: int) -> Bench:
    """A bench whose learner is at version 3 and whose engine says that it serves 3."""
    bench = Bench(batch=4, n=4, eta=eta, min_group=2)
    for version in range(3):
        bench.serve(version)
        bench.admit()
        bench.generate(list(bench.table.samples()), version=version)
        bench.step()
    bench.serve(3)
    bench.admit()
    return bench


def test_staleness_counts_from_the_oldest_token() -> None:
    bench = dishonest(eta=2)
    lease = bench.take("rollout")
    packed = [PolicyVersion(n=n).packed for n in (1, 3)]
    bench.do(
        bench.table.ack(
            lease.lease_id,
            lease.rows,
            columns=bench.table.schema.writes["rollout"],
            frame=1,
            tokens=[9] * 4,
            oldest=[packed[0]] * 4,
            newest=[packed[1]] * 4,
        )
    )

    assert bench.table.staleness(np.array(lease.rows[:1])).tolist() == [2]


def test_late_rows_are_dropped_at_lease() -> None:
    bench = dishonest(eta=1)
    first, *rest = list(bench.table.samples())
    bench.generate([first], version=0)  # the engine served less than it said
    bench.generate(rest, version=3)

    lease = bench.take("actor_update")

    assert lease.rows == tuple(rest)
    assert bench.table.dropped() == {LATE: 1}


def test_a_group_that_is_too_short_without_its_late_rows_is_dropped() -> None:
    bench = dishonest(eta=1)
    rows = list(bench.table.samples())
    bench.generate(rows[:3], version=1)
    bench.generate(rows[3:], version=2)

    assert bench.lease("actor_update") is None
    assert bench.table.dropped() == {LATE: 3, SHORT_GROUP: 1}


def test_a_row_at_the_bound_is_trained() -> None:
    bench = dishonest(eta=1)
    bench.generate(list(bench.table.samples()), version=2)

    assert len(bench.step().trained) == 4


def test_a_late_row_cannot_be_committed_even_if_it_was_leased() -> None:
    bench = dishonest(eta=1)
    rows = list(bench.table.samples())
    bench.generate(rows, version=2)
    lease = bench.take("actor_update")
    for row in rows:
        bench.table.rows.oldest[row] = PolicyVersion(n=1).packed

    with pytest.raises(StalenessViolation, match="has staleness 2, above 1"):
        bench.commit(lease.rows)


def test_a_response_without_tokens_is_never_late() -> None:
    bench = dishonest(eta=0)
    lease = bench.take("rollout")
    columns = bench.table.schema.writes["rollout"]
    nothing: list[int | None] = [None] * 4
    bench.do(
        bench.table.ack(
            lease.lease_id, lease.rows, columns=columns, frame=1, tokens=[0] * 4, oldest=nothing, newest=nothing
        )
    )
    bench.ack(bench.take("reward"))

    assert len(bench.step().trained) == 4


@pytest.fixture
def step() -> Bench:
    """Three groups are scored; two of them are the step under way and held by the learner."""
    bench = Bench(batch=4, n=2, eta=1)
    bench.admit(3)
    bench.generate(range(6))
    bench.take("actor_update")
    return bench


def test_a_commit_ends_its_rows_and_moves_the_learner(step: Bench) -> None:
    step.commit([0, 1], skipped=[2, 3])

    assert step.table.learner == PolicyVersion(n=1)
    assert step.table.ended == {"trained": 2, f"dropped:{SKIPPED}": 2}
    assert step.states() == {4: "rewarded", 5: "rewarded"}
    assert (step.table.leases, step.table.taken.count) == ({}, 0)


@pytest.mark.parametrize(
    ("trained", "skipped", "n", "error", "sentence"),
    [
        ([0, 1, 2], [], 1, IllegalTransition, "some sample of a group is missing"),
        ([0, 1], [], 1, IllegalTransition, "consumes 4 places, this one 2"),
        ([0, 1, 2, 3, 3], [], 1, IllegalTransition, "names a sample twice"),
        ([0, 1, 2, 3], [3], 1, IllegalTransition, "names a sample twice"),
        ([0, 1, 4, 5], [], 1, LeaseLost, "they do not hold sample 4, 5"),
        ([0, 1, 2, 99], [], 1, LeaseLost, "they do not hold sample 99"),
        ([], [], 1, IllegalTransition, "consumes 4 places, this one 0"),
        ([0, 1, 2, 3], [], 0, IllegalTransition, "the version after 0.0 is not 0.0"),
        ([0, 1, 2, 3], [], 2, IllegalTransition, "the version after 0.0 is not 0.2"),
    ],
)
def test_a_commit_is_one_whole_step_or_refused(
    step: Bench, trained: list[int], skipped: list[int], n: int, error: type[Exception], sentence: str
) -> None:
    before = step.table.snapshot()

    with pytest.raises(error, match=sentence):
        step.commit(trained, skipped, PolicyVersion(n=n))

    assert step.table.snapshot() == before


def test_a_committed_row_cannot_be_committed_again(step: Bench) -> None:
    step.commit([0, 1, 2, 3])

    with pytest.raises(LeaseLost):
        step.commit([0, 1, 2, 3])


def test_a_commit_is_only_for_rows_that_its_own_leases_hold() -> None:
    """A learner slept through its lease: another one has the first group by now, and it has the second itself."""
    bench = Bench(batch=4, n=2)
    bench.admit(2)
    bench.generate(range(4))
    late = bench.take("actor_update", 2, deadline=60.0)
    bench.do(bench.table.expire(now=60.0))
    theirs, mine = bench.take("actor_update", 2, deadline=99.0), bench.take("actor_update", 2, deadline=99.0)
    before = bench.table.snapshot()

    with pytest.raises(LeaseLost, match="they do not hold sample 0, 1") as lost:
        bench.commit([2, 3], skipped=[0, 1], leases=[late.lease_id, mine.lease_id])

    assert lost.value.rows == (0, 1) == late.rows == theirs.rows
    assert bench.table.snapshot() == before
    bench.commit(range(4), leases=[mine.lease_id, theirs.lease_id])


def test_a_lease_of_another_stage_is_none_to_commit_under() -> None:
    bench = Bench(batch=2, stages=(*STAGES, JUDGE))
    bench.admit()
    bench.generate([0, 1])
    train, judge = bench.take("actor_update"), bench.take("judge")

    with pytest.raises(LeaseLost):
        bench.commit([0, 1], leases=[judge.lease_id])

    bench.commit([0, 1], leases=[judge.lease_id, train.lease_id, 77])  # and one that has ended does no harm


def test_an_incarnation_changes_only_when_the_run_resumes(step: Bench) -> None:
    with pytest.raises(IllegalTransition, match=r"the version after 0\.0 is not 1\.1"):
        step.commit([0, 1, 2, 3], version=PolicyVersion(incarnation=1, n=1))

    assert step.table.learner == PolicyVersion(n=0)


# -- what engines say --------------------------------------------------------------------------------------------------


def test_an_engine_cannot_serve_what_no_step_has_made(step: Bench) -> None:
    with pytest.raises(IllegalTransition, match=r"engine cannot serve 0\.1: the last step made 0\.0"):
        step.serve(1)

    step.commit([0, 1, 2, 3])
    step.serve(1)


def test_an_engine_goes_back_only_after_it_was_gone(step: Bench) -> None:
    step.commit([0, 1, 2, 3])
    step.serve(1)
    step.serve(1)  # saying it again is no news, and no harm

    with pytest.raises(IllegalTransition, match=r"served 0\.1 and cannot go back to 0\.0: it must say that it is gone"):
        step.serve(0)

    step.serve(0, "another")
    step.serve(None)
    step.serve(0)
    assert step.table.served == {"engine": PolicyVersion(n=0), "another": PolicyVersion(n=0)}


def test_a_new_incarnation_does_not_make_older_weights_newer(step: Bench) -> None:
    step.commit([0, 1, 2, 3])
    step.serve(1)

    with pytest.raises(IllegalTransition, match=r"cannot go back to 1\.0"):
        step.do(step.table.serve("engine", PolicyVersion(incarnation=1, n=0)))


# -- decisions and events ----------------------------------------------------------------------------------------------


def test_a_decision_that_is_not_applied_changes_nothing(step: Bench) -> None:
    table = step.table
    rollout_ready = Bench(batch=4, n=2)
    rollout_ready.fill()
    rollout_ready.take("rollout", 1)
    before, other = table.snapshot(), rollout_ready.table.snapshot()
    lease = next(iter(table.leases))

    for _ in range(2):  # and the second time decides the same
        assert table.admit([10], frame=0)
        assert table.nack(lease, [0, 1], reason="no", final=True)
        assert table.expire(now=1e9)
        assert table.commit(leases=[lease], trained=[0, 1, 2, 3], skipped=[], version=PolicyVersion(n=1))
        assert table.drop([0, 5], reason="cancelled")
        assert table.renew(lease, deadline=1e9)
        assert table.serve("engine", None)
        (leased,) = rollout_ready.table.lease("rollout", worker="w", max_rows=2, max_tokens=None, deadline=1.0)
        assert isinstance(leased, Leased)
        assert leased.rows == (1, 2)

    assert table.snapshot() == before
    assert rollout_ready.table.snapshot() == other


def test_a_lease_that_drops_late_rows_changes_nothing_before_it_is_applied() -> None:
    bench = dishonest(eta=1)
    bench.generate(list(bench.table.samples()), version=0)
    before = bench.table.snapshot()

    events = bench.table.lease("actor_update", worker="w", max_rows=9, max_tokens=None, deadline=1.0)

    assert [type(e) for e in events] == [Dropped]
    assert bench.table.snapshot() == before


def test_events_survive_the_ledger_bit_for_bit(step: Bench) -> None:
    acked = Acked(lease_id=7, rows=(1, 2), columns=8, frame=3, tokens=(4, 0), oldest=(1 << 32, None), newest=(5, None))
    for event in (acked, step.table.terms, Leased(lease_id=1, stage="s", worker="w", rows=(1,), deadline=0.1 + 0.2)):
        assert from_json(event.kind, event.to_json()) == event


@pytest.mark.parametrize(
    ("kind", "body"),
    [("invented", "{}"), ("dropped", "{}"), ("dropped", '{"rows":[1],"reason":"r","more":1}'), ("dropped", "no JSON")],
)
def test_an_event_that_this_program_does_not_know_is_refused(kind: str, body: str) -> None:
    with pytest.raises(LedgerError, match="cannot be read"):
        from_json(kind, body)


def test_no_step_is_made_after_the_last_one_though_there_are_samples_for_it() -> None:
    bench = Bench(last=5)
    bench.fill()
    bench.generate(list(bench.table.samples()))
    bench.do(bench.table.amend(last_version=1))
    bench.step()

    assert bench.table.states[State.REWARDED] == 4
    assert bench.lease("actor_update") is None
    bench.do(bench.table.amend(last_version=2))
    assert bench.take("actor_update").rows == (4, 5, 6, 7)


def test_only_events_can_be_applied() -> None:
    with pytest.raises(TypeError):
        Bench().table.apply(Event())


# -- stages that write nothing, and that see a sample several times ----------------------------------------------------

LOOK = Stage(name="look", role="score", needs=("response",))
TWICE = Stage(name="twice", role="score", needs=("response",), max_times_leased=2)


def see(bench: Bench, lease: Leased, rows: Sequence[int] | None = None) -> None:
    bench.do(bench.table.ack(lease.lease_id, lease.rows if rows is None else rows, columns=0, frame=NONE))


def test_a_stage_that_writes_nothing_has_each_sample_once_and_holds_nobody_up() -> None:
    other = Stage(name="other", role="score", needs=("response",))
    bench = Bench(stages=(*STAGES[:2], LOOK, other, STAGES[2]))
    bench.admit(2)
    bench.ack(bench.take("rollout"))

    see(bench, bench.take("look"), rows=(0, 1, 2))
    assert bench.lease("look") is None  # one is out on lease, three were seen
    assert bench.take("other").rows == (0, 1, 2, 3)  # each such stage remembers for itself
    bench.ack(bench.take("reward"))
    bench.step()

    assert bench.table.ended["trained"] == 4
    assert not bench.table.leases


def test_the_ack_of_a_stage_that_writes_nothing_brings_nothing() -> None:
    bench = Bench(stages=(*STAGES[:2], LOOK, STAGES[2]))
    bench.admit()
    bench.ack(bench.take("rollout"))
    lease = bench.take("look")

    with pytest.raises(StoreError, match="look writes no columns; its ack brings reward"):
        bench.table.ack(lease.lease_id, lease.rows, columns=bench.table.schema.mask(["reward"]), frame=4)
    frames = bench.table.frames()
    see(bench, lease)

    assert bench.table.frames() == frames


def test_a_stage_may_consume_a_sample_several_times_and_begins_again_when_it_has_seen_all() -> None:
    bench = Bench(stages=(*STAGES[:2], TWICE, STAGES[2]))
    bench.admit(2)
    bench.ack(bench.take("rollout"))

    seen = []
    while (lease := bench.lease("twice", 3)) is not None:
        seen.append(lease.rows)
        see(bench, lease)

    assert seen == [(0, 1, 2), (3, 0, 1), (2, 3)]


def test_an_attempt_that_fails_is_no_time_and_those_before_an_ack_do_not_count() -> None:
    bench = Bench(stages=(*STAGES[:2], TWICE, STAGES[2]), max_attempts=2)
    bench.admit()
    bench.ack(bench.take("rollout"))

    for _ in range(2):
        bench.nack(bench.take("twice"))
        see(bench, bench.take("twice"))

    assert bench.lease("twice") is None
    assert bench.table.ended["quarantined"] == 0


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ({"max_times_leased": 0}, "at least 1"),
        ({"max_times_leased": 2, "writes": ("reward_parts",)}, "writes no columns"),
    ],
)
def test_how_often_a_stage_may_have_a_sample_is_checked(stage: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Schema([*STAGES, Stage(name="odd", role="score", needs=("response",), **stage)])


# -- columns of one's own ----------------------------------------------------------------------------------------------


def test_a_schema_has_columns_of_its_own() -> None:
    columns = {"question": pa.string(), "tokens": pa.list_(pa.int32()), "odds": pa.list_(pa.float32())}
    stages = (
        Stage(name="make", role="generate", needs=("question",), writes=("tokens", "odds")),
        Stage(name="look", role="score", needs=("tokens",)),
        Stage(name="train", role="train", needs=("tokens",)),
    )

    schema = Schema(stages, columns=columns, prompt_columns=("question",), token_columns=("tokens", "odds"))

    assert schema.prompt_columns == ("question",)
    assert schema.token_columns == ("tokens", "odds")
    assert schema.columns["odds"] == pa.list_(pa.float32())
    assert schema.written == ("question", "tokens", "odds")
    assert schema.names(schema.writes["look"]) == []
    for wrong in ({"token_columns": ("question",)}, {"token_columns": ("reward",)}, {"prompt_columns": ("prompt",)}):
        with pytest.raises(ConfigError):
            Schema(stages, **{"columns": columns, "prompt_columns": ("question",)} | wrong)  # type: ignore[arg-type]


def test_a_schema_has_as_many_columns_as_a_bit_set_holds() -> None:
    def schema(columns: int) -> Schema:
        names = [f"c{i}" for i in range(columns)]
        stages = (
            Stage(name="make", role="generate", needs=("c0",), writes=tuple(names[1:])),
            Stage(name="look", role="score", needs=("c1",)),
            Stage(name="train", role="train", needs=("c1",)),
        )
        return Schema(stages, columns=dict.fromkeys(names, pa.int64()), prompt_columns=("c0",))

    bench = Bench(n=1)
    bench.table = Table(schema(61), bench.table.terms)
    bench.serve(0)
    bench.admit()
    lease = bench.take("make")
    bench.do(bench.table.ack(lease.lease_id, lease.rows, columns=bench.table.schema.writes["make"], frame=1))
    see(bench, bench.take("look"))
    assert bench.lease("look") is None
    with pytest.raises(ConfigError, match="at most 62"):
        schema(62)


# -- samples that come too late ----------------------------------------------------------------------------------------


def late_bench(policy: LatePolicy, *, n: int = 2, eta: int = 1) -> Bench:
    """Group 0 has only its first row; groups 1 to 3 are complete. W = 2, all of version 0."""
    bench = Bench(eta=eta, n=n, batch=2 * n, late_samples=policy)
    bench.fill()
    lease = bench.take("rollout")
    bench.ack(lease, [row for row in lease.rows if row != 1])
    bench.ack(bench.take("reward"))
    return bench


def finish_the_straggler(bench: Bench, *, oldest: int = 0, newest: int = 0) -> None:
    (lease,) = (i for i, lease in bench.table.leases.items() if lease.stage == "rollout")
    packed = [PolicyVersion(n=n).packed for n in (oldest, newest)]
    columns = bench.table.schema.writes["rollout"]
    values = {"columns": columns, "frame": 1, "tokens": [5], "oldest": packed[:1], "newest": packed[1:]}
    bench.do(bench.table.ack(lease, [1], **values))  # type: ignore[arg-type]
    bench.ack(bench.take("reward"))


def test_wait_waits_for_who_is_slow() -> None:
    bench = late_bench("wait")

    assert bench.take("actor_update").rows == (2, 3)
    assert bench.lease("actor_update") is None


@pytest.mark.parametrize("policy", ["drop", "requeue", "mask"])
def test_the_others_take_what_is_complete_and_never_more_than_a_step(policy: LatePolicy) -> None:
    bench = late_bench(policy)

    assert bench.take("actor_update").rows == (2, 3, 4, 5)
    assert bench.lease("actor_update") is None


def test_drop_drops_what_became_too_old_and_counts_it() -> None:
    bench = overtaken("drop")

    assert bench.take("actor_update").rows == (10, 11)
    assert bench.table.dropped() == {LATE: 2}  # the straggler, and its sibling that had waited for it


def overtaken(policy: LatePolicy) -> Bench:
    """The straggler of group 0 comes with tokens of version 0 and 2 when the learner is at 2, and η is 1."""
    bench = late_bench(policy)
    bench.step()
    bench.serve(1)
    bench.fill()
    bench.generate([8, 9, 10, 11], version=1)
    bench.step()
    bench.serve(2)
    finish_the_straggler(bench, newest=2)
    return bench


def test_requeue_generates_again_in_the_old_place() -> None:
    bench = overtaken("requeue")

    bench.take("actor_update", 1)

    assert bench.table.tally["requeued"] == 2  # its sibling had waited as long
    assert bench.table.row(1) is not None
    assert bench.table.frames()[1] == 2  # responses of rows 10 and 11 are all that is left
    assert bench.take("rollout").rows[:2] == (0, 1)  # before all that were admitted later
    assert bench.table.dropped() == {}


def test_a_scoring_stage_that_holds_what_is_generated_again_has_lost_it() -> None:
    look = Stage(name="look", role="score", needs=("response",))
    bench = Bench(eta=0, n=1, batch=1, late_samples="requeue", stages=(*STAGES[:2], look, STAGES[2]))
    bench.admit()
    bench.ack(bench.take("rollout"))
    held = bench.take("look")
    bench.table.learner = PolicyVersion(n=1)

    assert bench.lease("actor_update") is None

    assert bench.states() == {0: "prompted"}
    with pytest.raises(LeaseLost):
        see(bench, held)


def test_mask_leases_what_has_a_token_young_enough_and_drops_the_rest() -> None:
    bench = overtaken("mask")

    lease = bench.take("actor_update", 2)

    assert bench.table.dropped() == {LATE: 1, SHORT_GROUP: 1}  # row 0 has tokens of version 0 alone
    assert bench.table.oldest_trainable(lease.lease_id) == 1


def masked_step() -> tuple[Bench, Leased]:
    bench = Bench(eta=1, n=1, batch=1, min_group=1, late_samples="mask")
    bench.fill()
    lease = bench.take("rollout")
    packed = [PolicyVersion(n=n).packed for n in (0, 3)]
    columns = bench.table.schema.writes["rollout"]
    bench.table.learner = PolicyVersion(n=3)
    values = {"columns": columns, "frame": 1, "tokens": [5], "oldest": packed[:1], "newest": packed[1:]}
    bench.do(bench.table.ack(lease.lease_id, [0], **values))  # type: ignore[arg-type]
    bench.ack(bench.take("reward"))
    return bench, bench.take("actor_update")


def test_a_commit_says_which_token_was_the_oldest_in_the_loss() -> None:
    bench, lease = masked_step()

    def commit(**masked: Any) -> list[Event]:
        values = {"leases": [lease.lease_id], "trained": [0], "skipped": [], "version": PolicyVersion(n=4)}
        return bench.table.commit(**values | masked)  # type: ignore[arg-type]

    with pytest.raises(StalenessViolation, match="staleness 3, above 1"):
        commit()
    with pytest.raises(StalenessViolation, match="staleness 2, above 1"):
        commit(masked={0: PolicyVersion(n=1)})
    with pytest.raises(IllegalTransition, match=r"no token of 0\.4"):
        commit(masked={0: PolicyVersion(n=4)})
    with pytest.raises(IllegalTransition, match="not among those that were trained"):
        commit(trained=[], skipped=[0], masked={0: PolicyVersion(n=2)})
    bench.do(commit(masked={0: PolicyVersion(n=2)}))

    assert bench.table.tally["masked"] == 1
    assert bench.table.ended["trained"] == 1


def test_nothing_is_masked_for_its_age_where_that_is_not_the_policy() -> None:
    bench = Bench(n=1, batch=1, min_group=1)
    bench.fill()
    bench.generate([0])
    lease = bench.take("actor_update")

    with pytest.raises(IllegalTransition, match="late_samples is wait"):
        bench.table.commit(
            leases=[lease.lease_id],
            trained=[0],
            skipped=[],
            version=PolicyVersion(n=1),
            masked={0: PolicyVersion(n=0)},
        )


@pytest.mark.parametrize(("policy", "dropped"), [("wait", 2), ("drop", 2), ("requeue", 0), ("mask", 2)])
def test_a_lower_bound_holds_for_what_is_leased_from_then_on_under_every_policy(
    policy: LatePolicy, dropped: int
) -> None:
    bench = Bench(eta=2, late_samples=policy)
    bench.fill()
    bench.generate(range(6))
    bench.step()
    bench.serve(1)

    bench.do(bench.table.amend(max_staleness=0))  # rows 4 and 5 have tokens of version 0, the learner is at 1

    assert bench.lease("actor_update") is None
    assert bench.table.dropped() == ({LATE: dropped} if dropped else {})
    assert bench.table.tally["requeued"] == 2 - dropped


# -- stragglers --------------------------------------------------------------------------------------------------------


def ask(bench: Bench, now: float) -> None:
    bench.do(bench.table.lease("actor_update", worker="w", max_rows=100, max_tokens=None, deadline=now + 1000, now=now))


def straggling(ready: int, **terms: Any) -> Bench:
    """Groups of four, one of which makes a step; `ready` rows of the first are there."""
    bench = Bench(n=4, batch=4, min_group=2, group_timeout=10.0, **terms)
    bench.fill()
    lease = bench.take("rollout", deadline=1e6)
    bench.ack(lease, lease.rows[:ready])
    bench.ack(bench.take("reward"))
    return bench


def test_a_group_is_closed_when_it_has_been_waited_for_long_enough() -> None:
    bench = straggling(3)
    assert bench.table.next_deadline() == 1e6  # nobody has asked yet
    ask(bench, now=100.0)
    ask(bench, now=105.0)  # the wait began with the first time

    assert bench.table.next_deadline() == 110.0
    assert bench.table.expire(109.9) == []
    bench.do(bench.table.expire(110.0))

    assert bench.table.dropped() == {STRAGGLER: 1}
    assert bench.table.expire(110.0) == []
    assert bench.take("actor_update").rows == (0, 1, 2)


def test_a_group_of_which_too_little_is_there_is_dropped_with_it() -> None:
    bench = straggling(1)
    ask(bench, now=0.0)

    bench.do(bench.table.expire(10.0))

    assert bench.table.dropped() == {STRAGGLER: 3, SHORT_GROUP: 1}
    assert bench.table.next_deadline() == 1e6


def test_a_group_that_is_complete_in_time_is_not_closed() -> None:
    bench = straggling(3)
    ask(bench, now=0.0)
    (lease,) = bench.table.leases
    bench.do(bench.table.expire(9.0))
    record = bench.table.leases[lease]
    leased = Leased(lease_id=lease, stage="rollout", worker="w", rows=tuple(record.rows.tolist()), deadline=0.0)
    bench.ack(leased, [3])
    bench.ack(bench.take("reward"))

    assert bench.table.next_deadline() == 1e6
    assert bench.table.expire(10.0) == []


def test_whoever_never_asks_and_whoever_has_no_timeout_waits_for_nobody() -> None:
    for bench in (straggling(3), Bench(n=4, batch=4)):
        bench.fill()
        bench.lease("actor_update")
        assert not bench.table.awaiting
    bench = Bench(n=4, batch=4)
    bench.fill()
    ask(bench, now=0.0)
    assert not bench.table.awaiting


# -- partial batches, shares, and who asks twice -----------------------------------------------------------------------


def test_fewer_than_min_rows_are_nothing() -> None:
    bench = Bench(eta=2)
    bench.fill()
    table = bench.table
    values: dict[str, Any] = {"worker": "w", "max_rows": 100, "max_tokens": None, "deadline": 60.0}
    few = bench.take("rollout", 3)

    assert table.lease("rollout", **values, min_rows=10) == []
    assert len(bench.do(table.lease("rollout", **values, min_rows=9))[0].rows) == 9  # type: ignore[attr-defined]
    bench.ack(few)
    # no more than the limits allow is waited for
    assert table.lease("reward", **values | {"max_rows": 3}, min_rows=50)
    assert table.lease("reward", **values | {"max_tokens": 20}, min_rows=3)
    assert not table.lease("reward", **values, min_rows=4)


def test_the_training_stage_waits_for_no_more_rows_than_its_step_has() -> None:
    bench = Bench(n=2, batch=4)
    bench.fill()
    bench.generate([0, 1])
    values: dict[str, Any] = {"worker": "w", "max_rows": 100, "max_tokens": None, "deadline": 60.0}
    assert bench.table.lease("actor_update", **values, min_rows=3) == []
    bench.take("actor_update")
    bench.generate([2, 3])

    assert bench.table.lease("actor_update", **values, min_rows=3)


def test_a_lease_that_is_asked_for_again_by_name_is_the_same_to_the_row() -> None:
    bench = Bench(eta=2, n=1, batch=8, min_group=1)
    bench.fill()
    bench.generate(range(8))
    values: dict[str, Any] = {"worker": "w", "max_rows": 100, "max_tokens": None, "deadline": 60.0}
    assert bench.table.granted("actor_update", "step 1") is None
    (leased,) = bench.do(bench.table.lease("actor_update", **values, ranks=4, request="step 1"))
    assert isinstance(leased, Leased)

    assert bench.table.granted("actor_update", "step 1", ranks=4) == leased.lease_id
    assert bench.table.granted("reward", "step 1") is None  # a name is one of a stage
    assert [len(share) for share in bench.table.leases[leased.lease_id].shares] == [2, 2, 2, 2]
    with pytest.raises(StoreError, match="all must ask alike"):
        bench.table.granted("actor_update", "step 1", ranks=2)
    bench.do(bench.table.drop([3], reason="cancelled"))
    with pytest.raises(LeaseLost, match="ended for sample 3: ask under a new name"):
        bench.table.granted("actor_update", "step 1", ranks=4)


def test_a_request_whose_lease_has_ended_never_gets_other_rows() -> None:
    bench = Bench()
    bench.fill()
    values: dict[str, Any] = {"worker": "w", "max_rows": 2, "max_tokens": None, "deadline": 60.0}
    (leased,) = bench.do(bench.table.lease("rollout", **values, request="a"))
    assert isinstance(leased, Leased)
    bench.ack(leased)

    with pytest.raises(LeaseLost, match="has ended"):
        bench.table.granted("rollout", "a")


# -- back from quarantine ----------------------------------------------------------------------------------------------


def test_a_sample_is_put_back_where_it_failed_with_what_it_had() -> None:
    bench = Bench(n=4, batch=4, max_attempts=1)
    bench.admit()
    rollout = bench.take("rollout")
    bench.nack(rollout, [0], reason="no answer")
    bench.ack(rollout, [1, 2, 3])
    bench.nack(bench.take("reward"), [1], reason="the reward function has a bug")
    frames = bench.table.frames()
    assert bench.table.ended["quarantined"] == 2

    bench.do(bench.table.restore([1, 0]))

    assert bench.states() == {0: "prompted", 1: "generated", 2: "generated", 3: "generated"}
    assert bench.table.frames() == frames
    assert bench.table.ended["quarantined"] == 0
    assert bench.table.tally["restored"] == 2
    row = bench.table.row(1)
    assert row is not None
    assert (row.attempts, row.reasons) == ({}, ["the reward function has a bug"])
    bench.nack(bench.take("rollout"), final=False, reason="again")
    assert bench.table.ended["quarantined"] == 1  # one attempt each, as for everybody


def test_its_data_go_with_its_group_and_then_it_cannot_be_put_back() -> None:
    bench = Bench(n=4, batch=4)
    bench.admit()
    rollout = bench.take("rollout")
    bench.ack(rollout)
    bench.nack(bench.take("reward", 1), final=True)
    bench.ack(bench.take("reward"))
    assert bench.table.frames()[1] == 4
    lease = bench.take("actor_update")
    with pytest.raises(IllegalTransition, match="while the learner has its group"):
        bench.table.restore([0])

    released = bench.table.released_by(
        bench.table.commit(leases=[lease.lease_id], trained=lease.rows, skipped=[], version=PolicyVersion(n=1))[0]
    )
    bench.commit(lease.rows)

    assert released == {0: 4, 1: 4, 2: 3}
    assert bench.table.frames() == {}
    with pytest.raises(IllegalTransition, match=r"sample 0 cannot be put back: .* admit the prompt again"):
        bench.table.restore([0])


@pytest.mark.parametrize("sample", [0, 99])
def test_only_what_is_in_quarantine_is_put_back(sample: int) -> None:
    bench = Bench()
    bench.admit()

    with pytest.raises(IllegalTransition, match="only a sample in quarantine"):
        bench.table.restore([sample])
