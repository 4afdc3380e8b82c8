"""What a store looks like at one moment, for people: from a broker, or from a ledger alone."""

from __future__ import annotations

import numpy as np

from asyncflow.store.client import Counts, HeldLease
from asyncflow.store.rows import NONE
from asyncflow.store.table import Table


def counts_of(table: Table, size: int) -> Counts:
    """`size`: bytes of the data that are needed."""
    return Counts(
        admitted=table.next_sample,
        trained=table.ended["trained"],
        dropped=table.dropped(),
        quarantined=table.ended["quarantined"],
        states={state.value: count for state, count in table.states.items()},
        leased=table.leased(),
        ready=table.ready(),
        capacity=table.capacity(),
        max_staleness=table.terms.max_staleness,
        learner=table.learner,
        served=dict(table.served),
        oldest=table.oldest(),
        bytes=size,
        requeued=table.tally["requeued"],
        masked=table.tally["masked"],
        restored=table.tally["restored"],
    )


def staleness_of(table: Table) -> dict[int, int]:
    """Staleness in policy versions, were they trained now → open samples with tokens, ascending."""
    ids = table.rows.open()
    ages = table.staleness(ids[table.rows.oldest[ids - table.rows.base] != NONE])
    found, counts = np.unique(ages, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def leases_of(table: Table, now: float | None) -> tuple[HeldLease, ...]:
    """`now`: on the clock of the deadlines; None: it is gone, and nobody knows how long they have."""
    return tuple(
        HeldLease(
            lease_id=lease_id,
            stage=lease.stage,
            worker=lease.worker,
            samples=lease.left,
            seconds=None if now is None else max(0.0, lease.deadline - now),
        )
        for lease_id, lease in table.leases.items()
    )
