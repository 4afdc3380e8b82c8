"""Clients that are not as they should be: a clock that is wrong, a folder that they cannot use, an address at which
there is another store by now."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncflow.clock import ManualClock
from asyncflow.errors import Closed, LeaseLost, StoreError
from asyncflow.store.data import FileFrames
from asyncflow.store.flight import StoreServer
from asyncflow.store.remote import RemoteFrames, connect
from asyncflow.store.schema import Schema
from asyncflow.store.store import EmbeddedStore
from asyncflow.types import PolicyVersion
from tests.test_flight import TOKEN, Served, take
from tests.test_store import SCHEMA, ids, prompts, responses, terms

ROOT = Path(__file__).parent.parent


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.close()


SKEWED = """
import sys, time
shift, location, token = float(sys.argv[1]), sys.argv[2], sys.argv[3]
for name in ("time", "monotonic"):
    setattr(time, name, lambda real=getattr(time, name): real() + shift)
from asyncflow.store.remote import connect
store = connect(location, token=token, patience=30.0)
lease = store.lease("rollout", worker="skewed", max_rows=2, ttl=60.0, timeout=0.0)
store.renew(lease.lease_id, ttl=60.0)
print(lease.lease_id, flush=True)
for line in sys.stdin:
    try:
        store.renew(lease.lease_id, ttl=60.0)
        print("renewed", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


@pytest.mark.parametrize("shift", [-1e6, 1e9])
def test_leases_go_by_the_clock_of_the_store_alone(served: Served, shift: float) -> None:
    served.store.admit(prompts(1), timeout=0.0)
    client = subprocess.Popen(
        [sys.executable, "-c", SKEWED, str(shift), served.server.location, TOKEN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert client.stdin is not None
    assert client.stdout is not None

    def asks() -> str:
        client.stdin.write("\n")  # type: ignore[union-attr]
        client.stdin.flush()  # type: ignore[union-attr]
        return client.stdout.readline().strip()  # type: ignore[union-attr]

    try:
        assert client.stdout.readline().strip() == "1"
        served.clock.advance(59.0)
        assert asks() == "renewed"
        served.clock.advance(59.0)  # 118 in all
        assert asks() == "renewed"
        served.clock.advance(61.0)
        assert asks() == "LeaseLost"
    finally:
        client.communicate()
    assert ids(take(served.store, "rollout")) == [0, 1]


def test_a_folder_that_is_not_the_stores_is_named(served: Served, tmp_path: Path) -> None:
    shutil.move(served.folder, tmp_path / "moved")

    with pytest.raises(StoreError, match=rf"{served.folder} is not the folder of this store on this host"):
        connect(served.server.location, token=TOKEN, local=True)

    assert not served.folder.exists()  # and is not made
    other = served.connect()  # who is not told finds out
    assert isinstance(other._data, RemoteFrames)
    shutil.move(tmp_path / "moved", served.folder)
    assert other.admit(prompts(1), timeout=0.0) == (0,)


def test_a_folder_of_another_store_is_not_taken_for_this_ones(served: Served) -> None:
    (served.folder / "host").write_text("another store's")

    with pytest.raises(StoreError, match="is not the folder of this store"):
        connect(served.server.location, token=TOKEN, local=True)
    assert isinstance(served.connect()._data, RemoteFrames)


def test_a_store_in_memory_has_no_folder(tmp_path: Path) -> None:
    store = EmbeddedStore.create(SCHEMA, terms(), ledger=tmp_path / "ledger.sqlite")
    server = StoreServer(store, token=TOKEN)

    with pytest.raises(StoreError, match="keeps its samples in memory: connect without local"):
        connect(server.location, token=TOKEN, local=True)

    server.close()


READS_ONLY = """
import os, sys
from asyncflow.store.remote import connect
from tests.test_store import prompts
first = connect(sys.argv[1], token=sys.argv[2], patience=30.0)
assert first.admit(prompts(1), timeout=0.0) == (0,)  # so that everything is imported
first.close()
if os.geteuid() == 0:
    os.setuid(65534)
store = connect(sys.argv[1], token=sys.argv[2], patience=30.0)
print(type(store._data).__name__, store.admit(prompts(1), timeout=0.0))
"""


def test_a_client_that_may_only_read_the_folder_sends_its_data(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=tempfile.gettempdir()))  # that of the test is its owner's alone
    try:
        folder.chmod(0o755)
        served = Served(folder)
        served.folder.chmod(0o555)
        assert isinstance(served.connect()._data, FileFrames) or os.geteuid() != 0

        done = subprocess.run(
            [sys.executable, "-c", READS_ONLY, served.server.location, TOKEN],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )

        assert done.stdout == "RemoteFrames (1,)\n", done.stderr
        served.folder.chmod(0o755)
        served.close()
    finally:
        shutil.rmtree(folder)


def another(folder: Path, name: str, port: int, schema: Schema = SCHEMA) -> StoreServer:
    store = EmbeddedStore.create(schema, terms(), ledger=folder / f"{name}.sqlite", data=folder / name)
    store.serve("engine", PolicyVersion(n=0))
    return StoreServer(store, token=TOKEN, port=port)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("schema", ["the same", "another"])
def test_a_client_is_not_taken_for_one_of_the_store_that_came_after_its_own(
    tmp_path: Path, local: bool, schema: str
) -> None:
    """Numbers of leases and bits of columns mean something else there."""
    first = another(tmp_path, "first", 0)
    port = first.port
    client = connect(first.location, token=TOKEN, patience=10.0, local=local)
    client.admit(prompts(1), timeout=0.0)
    lease = take(client, "rollout")
    first.close()
    stages = tuple(SCHEMA.stages.values())
    changed = Schema(stages, columns=dict(reversed(SCHEMA.columns.items()))) if schema == "another" else SCHEMA
    second = another(tmp_path, "second", port, changed)
    new = connect(second.location, token=TOKEN, patience=10.0)
    new.admit(prompts(1), timeout=0.0)
    mine = take(new, "rollout")
    assert mine.lease_id == lease.lease_id

    for call in (
        lambda: client.ack(lease.lease_id, ids(lease), responses(ids(lease))),
        lambda: client.renew(lease.lease_id, ttl=9.0),
        lambda: client.admit(prompts(1), timeout=0.0),
        lambda: client.read([0]),
        client.counts,
    ):
        with pytest.raises(Closed, match="another one is in its place: connect again"):
            call()

    assert new.counts().states["generating"] == 2
    new.ack(mine.lease_id, ids(mine), responses(ids(mine)))
    for one in (client, new):
        one.close()
    second.close()


@pytest.mark.parametrize("local", [True, False])
def test_a_client_of_a_store_that_was_restarted_goes_on(tmp_path: Path, local: bool) -> None:
    first = another(tmp_path, "store", 0)
    port = first.port
    client = connect(first.location, token=TOKEN, patience=10.0, local=local)
    client.admit(prompts(1), timeout=0.0)
    lease = take(client, "rollout")
    first.close()
    clock = ManualClock()
    store = EmbeddedStore.restart(ledger=tmp_path / "store.sqlite", data=tmp_path / "store", clock=clock)
    second = StoreServer(store, token=TOKEN, port=port)

    client.ack(lease.lease_id, ids(lease), responses(ids(lease)))

    assert client.counts().states["generated"] == 2
    with pytest.raises(LeaseLost):
        client.renew(lease.lease_id, ttl=9.0)
    client.close()
    second.close()
