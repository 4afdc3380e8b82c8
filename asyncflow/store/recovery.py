"""The table as a ledger tells it."""

from __future__ import annotations

from pathlib import Path

from asyncflow.errors import IllegalTransition, LedgerError
from asyncflow.store.events import Opened
from asyncflow.store.journal import read_ledger
from asyncflow.store.schema import Schema
from asyncflow.store.table import Table


def rebuild(schema: Schema, ledger: Path) -> Table:
    """The table as a ledger tells it. Raises LedgerError."""
    table: Table | None = None
    for record in read_ledger(ledger):
        try:
            if table is not None:
                table.apply(record.event)
            elif isinstance(record.event, Opened):
                table = Table(schema, record.event)
            else:
                raise LedgerError(f"{ledger} does not begin with the terms of a run: its beginning is lost")
        except (LookupError, TypeError, ValueError, IllegalTransition) as error:
            raise LedgerError(f"{ledger}: event {record.lsn} ({record.event.kind}) makes no sense: {error}") from error
    if table is None:
        raise LedgerError(f"{ledger} is empty: it holds no run")
    return table
