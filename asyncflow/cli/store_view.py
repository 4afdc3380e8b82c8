"""How a store looks on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from asyncflow.cli.replay import MOST_WAITED
from asyncflow.report.life import Life
from asyncflow.rundir import DATA
from asyncflow.store.client import Stat, Waited
from asyncflow.store.home import ledger_of
from asyncflow.store.replay import table_at
from asyncflow.store.stat import counts_of, leases_of, staleness_of
from asyncflow.store.store import Store
from asyncflow.store.verify import Verified

MOST_LEASES = 12


class Look:
    """A store at one moment; `store` None: as its ledger tells it, when nobody serves it."""

    def __init__(self, where: str, store: Store | None) -> None:
        self.where = where
        self.at = time.monotonic()
        self.served = store is not None
        self.stat: Stat
        self.waited: tuple[Waited, ...]
        if store is not None:
            self.stat, self.waited = store.stat(), store.waited_for()
            return
        table, _ = table_at(ledger_of(Path(where)))
        sizes = [path.stat().st_blocks * 512 for path in (Path(where) / DATA).glob("*.segment")]
        self.stat = Stat(
            counts=counts_of(table, sum(sizes)),
            staleness=staleness_of(table),
            leases=leases_of(table, None),
            segments=len(sizes),
            waiting={},
            awaited={},
        )
        self.waited = tuple(
            Waited(sample_id=row.sample_id, group_id=row.group_id, state=row.state.value, worker=worker)
            for row, worker in table.waited_for()
        )

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        stat, counts = self.stat, self.stat.counts
        return {
            "store": self.where,
            "served": self.served,
            "durability": stat.durability,
            "admitted": counts.admitted,
            "trained": counts.trained,
            "dropped": dict(counts.dropped),
            "quarantined": counts.quarantined,
            "open": counts.open,
            "states": dict(counts.states),
            "ready": dict(counts.ready),
            "leased": dict(counts.leased),
            "capacity": counts.capacity,
            "max_staleness": counts.max_staleness,
            "staleness": {str(age): samples for age, samples in stat.staleness.items()},
            "learner": str(counts.learner),
            "serving": {engine: str(version) for engine, version in counts.served.items()},
            "oldest": None if counts.oldest is None else str(counts.oldest),
            "bytes": counts.bytes,
            "segments": stat.segments,
            "requeued": counts.requeued,
            "masked": counts.masked,
            "restored": counts.restored,
            "leases": [
                {
                    "lease": lease.lease_id,
                    "stage": lease.stage,
                    "worker": lease.worker,
                    "samples": lease.samples,
                    "seconds": lease.seconds,
                }
                for lease in stat.leases
            ],
            "waiting": dict(stat.waiting),
            "waits_for": dict(stat.awaited),
            "step": [
                {"sample": w.sample_id, "group": w.group_id, "state": w.state, "worker": w.worker} for w in self.waited
            ],
        }


def stat_lines(look: Look) -> Iterator[str]:
    stat, counts = look.stat, look.stat.counts
    yield f"{look.where}" + ("" if look.served else "  (nobody serves it; this is what its ledger says)")
    yield f"versions    learner {counts.learner}, served by {_listed(counts.served, 'nobody')}"
    yield f"bound       max_staleness {counts.max_staleness}, room for {counts.capacity:,} samples"
    ages = ", ".join(f"{age}: {samples:,}" for age, samples in stat.staleness.items())
    yield f"staleness   {ages or 'no tokens yet'}" + ("" if not ages else "  (versions behind: open samples)")
    yield (
        f"samples     {counts.admitted:,} admitted, {counts.trained:,} trained, "
        f"{sum(counts.dropped.values()):,} dropped, {counts.quarantined:,} quarantined, {counts.open:,} open"
    )
    yield f"open        {_listed({state: n for state, n in counts.states.items() if n}, 'none')}"
    yield f"dropped     {_listed(counts.dropped, 'none')}"
    survives = "" if stat.durability is None else f", durability {stat.durability}"
    yield f"data        {counts.bytes / 1e6:,.1f} MB in {stat.segments} segments{survives}"
    for stage, ready in counts.ready.items():
        yield f"stage       {stage}: {ready:,} ready, {counts.leased.get(stage, 0):,} taken"
    for lease in stat.leases[:MOST_LEASES]:
        left = "" if lease.seconds is None else f", {lease.seconds:.1f} s left"
        yield f"lease {lease.lease_id:<5} {lease.worker} holds {lease.samples:,} samples for {lease.stage}{left}"
    if len(stat.leases) > MOST_LEASES:
        yield f"            and {len(stat.leases) - MOST_LEASES} more leases"
    for topic, calls in stat.waiting.items():
        yield f"waiting     {calls} at {topic}, for {stat.awaited[topic]}"
    named = [f"{w.sample_id} ({w.worker or w.state})" for w in look.waited[:MOST_WAITED]]
    more = f" and {len(look.waited) - MOST_WAITED} more" if len(look.waited) > MOST_WAITED else ""
    yield f"step        waits for {', '.join(named) + more if named else 'nothing that is there'}"


def _listed(values: Mapping[str, Any], nothing: str) -> str:
    return ", ".join(f"{n:,} {name}" if isinstance(n, int) else f"{name} {n}" for name, n in values.items()) or nothing


def rates(first: Look, last: Look) -> dict[str, float]:
    """Samples a second between two looks."""
    seconds, a, b = last.at - first.at, first.stat.counts, last.stat.counts
    changes = {
        "admitted": b.admitted - a.admitted,
        "trained": b.trained - a.trained,
        "dropped": sum(b.dropped.values()) - sum(a.dropped.values()),
        "quarantined": b.quarantined - a.quarantined,
        "steps": b.learner.n - a.learner.n,
    }
    return {name: round(change / seconds, 2) for name, change in changes.items()}


def rate_lines(first: Look, last: Look) -> Iterator[str]:
    yield "a second    " + ", ".join(f"{rate:,} {name}" for name, rate in rates(first, last).items())


def watch(where: str, store: Store, every: float) -> None:
    """Show it until Ctrl-C."""
    from rich.live import Live
    from rich.text import Text

    last = Look(where, store)
    try:
        with Live(Text("\n".join(stat_lines(last))), auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(every)
                look = Look(where, store)
                live.update(Text("\n".join((*stat_lines(look), *rate_lines(last, look)))), refresh=True)
                last = look
    except KeyboardInterrupt:
        return


def life_lines(life: Life) -> Iterator[str]:
    begin = life.moments[0].at
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(begin))
    holder = "" if life.holder is None else f", {life.holder} has it"
    yield f"sample {life.sample_id} of group {life.group_id}: {life.state}{holder}"
    yield f"since {when} UTC; event, seconds, state, what happened"
    for moment in life.moments:
        yield f"{moment.lsn:>8}  {moment.at - begin:>9.3f}  {moment.state:<11}  {moment.words}"
    for values in life.values:
        there = "" if values.there else "  (the file is not there)"
        yield f"{', '.join(values.columns)}: row {values.row} at byte {values.offset} of {values.file}{there}"
    if not life.values:
        yield "its data are not needed any more"


def verify_lines(found: Verified) -> Iterator[str]:
    yield f"ledger      {found.events:,} events, all of them make sense"
    yield f"snapshot    {found.snapshot}"
    yield f"data        {found.frames:,} whole frames in {found.segments} segments"
    yield f"needed      {found.needed:,} frames by {found.samples:,} samples"
    if found.torn:
        yield f"torn        {found.torn} frames that nobody needs: their writer was killed"
    for fault in found.faults:
        yield f"WRONG       {fault}"
    if found.hit:
        yield f"hit         {len(found.hit)} samples: {', '.join(map(str, found.hit))}"
    yield "everything is right" if found.ok else "not everything is right"
