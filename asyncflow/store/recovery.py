"""The table as a ledger tells it: from the last snapshot and the events after it, or from all events."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from asyncflow.errors import IllegalTransition, LedgerError
from asyncflow.store.journal import LedgerReader, Record
from asyncflow.store.schema import Schema
from asyncflow.store.snapshot import Unusable, read_snapshot, snapshot_path
from asyncflow.store.table import Table

_log = logging.getLogger(__name__)


def rebuild(schema: Schema, ledger: Path) -> Table:
    """The table at the end of a ledger. Raises LedgerError, also when the ledger is of other columns or stages.

    A snapshot that cannot be used is named in a warning: the ledger has everything, it only takes longer.
    """
    with LedgerReader(ledger) as reader:
        if not reader.schema.is_as(schema):
            raise LedgerError(
                f"{ledger} is of other columns or stages: its bits would mean something else. Go on with what it was "
                "made with, or begin anew"
            )
        try:
            snapshot = read_snapshot(schema, reader)
            table = Table.load(schema, snapshot.image, snapshot.arrays)
            return apply_all(table, reader, reader.records(after=snapshot.lsn))
        except FileNotFoundError:
            pass
        except (Unusable, OSError, LedgerError, LookupError, TypeError, ValueError) as error:
            _log.warning("%s is ignored, every event is applied instead: %s", snapshot_path(ledger), error)
        return apply_all(Table(schema, reader.terms()), reader, reader.records(after=1))


def apply_all(table: Table, ledger: LedgerReader, records: Iterable[Record]) -> Table:
    """Apply all of these to the table, and return it. Raises LedgerError for one that makes no sense."""
    for record in records:
        apply_record(table, ledger, record)
    return table


def apply_record(table: Table, ledger: LedgerReader, record: Record) -> None:
    """Raises LedgerError when the event makes no sense where it stands."""
    try:
        table.apply(record.event)
    except (LookupError, TypeError, ValueError, IllegalTransition) as error:
        raise LedgerError(f"{ledger.path}: event {record.lsn} ({record.event.kind}) makes no sense: {error}") from error
