"""How a run looks again at one of its events: counts, who held what, what the step waited for, and what came before."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from asyncflow.errors import LedgerError
from asyncflow.rundir import LEDGER
from asyncflow.store import replay
from asyncflow.store.journal import LedgerReader, Record

MOST_WAITED = 8
"""How many samples that a step waits for are named."""


def show(
    run_dir: Path,
    *,
    until: int | None,
    since: int | None,
    events: bool,
    last: int,
    digest: bool,
    check: bool,
    as_json: bool,
    say: Callable[[str], None] = typer.echo,
) -> None:
    """Raises LedgerError for a ledger that cannot be read, and for an event that it does not have."""
    ledger = run_dir / LEDGER
    if until is not None and until < 1:
        raise LedgerError(f"{ledger} has no event {until}: the first one is 1")
    if check:
        decided = sum(1 for _ in replay.reenact(ledger, until=until))
        say(f"{decided:,} operations decided again, every one as it was recorded")
        return
    if events:
        with LedgerReader(ledger) as reader:
            _list(reader.records(after=max(0, (since or 1) - 1), until=until), as_json=as_json, say=say)
        return
    table, lsn = replay.table_at(ledger, until)
    if digest:
        say(replay.digest(table))
        return
    with LedgerReader(ledger) as reader:
        recent = list(reader.records(after=max(0, lsn - max(1, last)), until=lsn))
    state = {"lsn": lsn, "at": recent[-1].at, **replay.state_of(table)}
    recent = recent[-last:] if last else []
    if as_json:
        say(json.dumps({**state, "events": [_plain(record) for record in recent]}, indent=2))
        return
    for line in _lines(state):
        say(line)
    say(f"\nthe last {len(recent)} events")
    _list(recent, as_json=False, say=say)


def _list(records: Iterable[Record], *, as_json: bool, say: Callable[[str], None]) -> None:
    """A line each."""
    for record in records:
        if as_json:
            say(json.dumps(_plain(record)))
        else:
            clock = time.strftime("%H:%M:%S", time.gmtime(record.at)) + f"{record.at % 1:.3f}"[1:]
            say(f"{record.lsn:>8}  {clock}  {replay.in_words(record.event)}")


def _plain(record: Record) -> dict[str, Any]:
    return {
        "lsn": record.lsn,
        "at": record.at,
        "kind": record.event.kind,
        "body": json.loads(record.event.to_json()),
        "words": replay.in_words(record.event),
    }


def _lines(state: Mapping[str, Any]) -> Iterable[str]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(state["at"]))
    yield f"after event {state['lsn']:,}, {when} UTC"
    served = ", ".join(f"{engine} {version}" for engine, version in state["served"].items()) or "nobody"
    oldest = "" if state["oldest"] is None else f", oldest tokens {state['oldest']}"
    yield f"versions    learner {state['learner']}, served by {served}{oldest}"
    yield f"bound       max_staleness {state['max_staleness']}, room for {state['capacity']:,} samples"
    yield (
        f"samples     {state['admitted']:,} admitted, {state['trained']:,} trained, "
        f"{sum(state['dropped'].values()):,} dropped, {state['quarantined']:,} quarantined"
    )
    yield "open        " + (", ".join(f"{n:,} {name}" for name, n in state["open"].items() if n) or "none")
    for reason, count in state["dropped"].items():
        yield f"dropped     {count:,} {reason}"
    for lease in state["leases"]:
        many = len(lease["samples"])
        samples = f"{many} sample{'s' if many > 1 else ''} from {lease['samples'][0]} on" if many else "nothing"
        yield f"lease {lease['lease']:<5} {lease['worker']} holds {samples} for {lease['stage']}"
    waits = state["step"]["waits_for"]
    named = ", ".join(
        f"{wait['sample']} ({'nobody has it' if wait['worker'] is None else wait['worker']})"
        for wait in waits[:MOST_WAITED]
    )
    more = f" and {len(waits) - MOST_WAITED} more" if len(waits) > MOST_WAITED else ""
    groups = len(state["step"]["groups"])
    yield f"step {state['step']['version']:<6} has {groups} groups, waits for {named or 'nothing'}{more}"
    yield f"digest      {state['digest']}"
