"""What `verify` counts in a store's directory, beside what it is asked on the command line."""

from __future__ import annotations

from pathlib import Path

from asyncflow.store.frames import HEADER_BYTES, OFFSET_BITS
from asyncflow.store.segments import segment_of, segment_path
from asyncflow.store.store import EmbeddedStore
from asyncflow.store.verify import verify
from tests.test_store_choices import Bench


def test_a_torn_frame_that_nobody_needs_is_counted_beside_one_that_is_missing(tmp_path: Path) -> None:
    bench, data = Bench(tmp_path), tmp_path / "data"
    bench.admit(1)
    bench.store.close()
    bench.store = EmbeddedStore.restart(ledger=tmp_path / "ledger.sqlite", data=data)
    bench.admit(1)
    bench.admit(1)
    missing, torn = bench.store.table.rows.frame[0, [0, 2]].tolist()
    bench.store.drop([2, 3], reason="enough")
    bench.store.close()
    segment_path(data, segment_of(missing)).unlink()
    with segment_path(data, segment_of(torn)).open("r+b") as file:
        file.seek((torn & (1 << OFFSET_BITS) - 1) + HEADER_BYTES + 8)
        file.write(b"\xff" * 8)

    found = verify(tmp_path)

    assert (found.torn, found.hit) == (1, (0, 1))
