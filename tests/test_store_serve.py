"""`asyncflow store serve`: what it serves, what survives it, and what it refuses to begin with."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncflow.config import parse_config
from asyncflow.errors import Closed, ConfigError, StoreError, Unreachable
from asyncflow.pipeline import stages
from asyncflow.store.home import ADDRESS, TOKEN, Home, HomeError, address_of
from asyncflow.store.remote import connect
from asyncflow.store.schema import Schema
from asyncflow.store.spec import StoreSpec, arrow_type, load_spec
from asyncflow.types import PolicyVersion
from tests.processes import wait_until
from tests.store_server import COMMAND, StoreProcess, command
from tests.test_flight import self_signed
from tests.test_store import ids, prompts, responses

SPEC = """
train_batch_size: 4
num_generations: 2
max_staleness: 1
columns:
  question: string
  answers: list<int32>
  weights: fixed_size_list<float32>[3]
  score: float32
stages:
- {name: write, role: generate, needs: [question], writes: [answers]}
- {name: judge, role: score, needs: [question, answers], writes: [score, weights]}
- {name: learn, role: train, needs: [question, answers, score], sampler: freshest}
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., StoreProcess]]:
    """Starts servers, which end with the test."""
    started: list[StoreProcess] = []

    def start(*options: str, home: Path = tmp_path / "store") -> StoreProcess:
        started.append(StoreProcess(home, *options))
        return started[-1]

    yield start
    for server in started:
        server.close()


def test_a_store_is_made_served_and_stopped_in_order(start: Callable[..., StoreProcess]) -> None:
    server = start()
    client = server.connect()
    client.serve("engine", PolicyVersion(n=0))
    client.admit(prompts(2), timeout=0.0)
    address = address_of(server.home)
    assert (address.location, address.durability) == (server.location, "process")

    code, out, err = server.stop()

    assert (code, out, err) == (0, "", "")
    with pytest.raises(Unreachable, match="nobody serves"):
        address_of(server.home)
    with pytest.raises((Closed, Unreachable)):
        connect(server.location, token="any", patience=0.1)
    client.close()


def test_a_server_that_was_killed_is_started_again_with_its_leases(start: Callable[..., StoreProcess]) -> None:
    server = start()
    client = server.connect()
    client.serve("engine", PolicyVersion(n=0))
    client.admit(prompts(1), timeout=0.0)
    lease = client.lease("rollout", worker="w", max_rows=8, ttl=60.0, timeout=0.0)
    assert lease is not None
    token = server.token

    server.kill()
    assert (server.home / ADDRESS).exists()
    with pytest.raises(Unreachable, match="nobody serves"):
        address_of(server.home)
    server.start()

    client.ack(lease.lease_id, ids(lease), responses(ids(lease)))
    assert client.counts().states["generated"] == 8
    assert server.token == token
    client.close()


def test_a_server_takes_its_earlier_port_so_that_clients_who_wait_find_it(start: Callable[..., StoreProcess]) -> None:
    first = start()
    client = first.connect()
    first.kill()

    second = start()

    assert second.location == first.location
    assert client.counts().admitted == 0
    client.close()
    second.kill()
    with socket.create_server(("127.0.0.1", int(first.location.rpartition(":")[2]))):
        assert start().location != first.location


@pytest.mark.parametrize("local", [True, False], ids=["near", "far"])
def test_a_put_during_an_outage_is_answered_when_the_server_is_back(
    start: Callable[..., StoreProcess], local: bool
) -> None:
    server = start()
    client = server.connect(local=local)
    client.serve("engine", PolicyVersion(n=0))
    client.admit(prompts(1), timeout=0.0)
    server.kill()
    found: list[tuple[int, ...] | None] = []
    putting = threading.Thread(target=lambda: found.append(client.admit(prompts(1), timeout=0.0)))
    putting.start()
    wait_until(lambda: client._control._tries > 2)  # type: ignore[attr-defined]

    server.start()

    putting.join(30.0)
    assert found == [(1,)]
    client.close()


def test_the_token_is_for_its_owner_only_and_is_never_shown(start: Callable[..., StoreProcess]) -> None:
    server = start()

    assert (server.home / TOKEN).stat().st_mode & 0o777 == 0o600
    assert len(server.token) >= 32
    with pytest.raises(StoreError, match="refuses the token"):
        connect(server.location, token=server.token[:-1], patience=1.0)
    _, out, err = server.stop()
    assert server.token not in server.said + out + err
    assert server.token not in " ".join(path.read_text("latin-1") for path in server.home.glob("*.json"))


def test_columns_terms_and_stages_come_from_a_file(tmp_path: Path, start: Callable[..., StoreProcess]) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(SPEC)

    client = start("--spec", str(file)).connect()

    assert client.schema.to_json() == load_spec(file).make_schema().to_json()
    assert client.schema.prompt_columns == ("question",)
    assert str(client.schema.columns["weights"]) == "fixed_size_list<item: float>[3]"
    assert client.schema.stages["learn"].sampler == "freshest"
    assert client.group_size == 2
    client.close()


def test_without_a_file_the_stages_are_those_of_a_run() -> None:
    values = {
        "model": "tiny",
        "data": {"train": "x.jsonl"},
        "reward": "last_number",
        "train_batch_size": 128,
        "steps": 1,
    }
    config = parse_config({**values, "max_new_tokens": 1, "learning_rate": 1.0})

    assert StoreSpec().make_schema().to_json() == Schema(stages(config)).to_json()
    terms = StoreSpec().terms
    assert (terms.num_generations, terms.max_staleness) == (config.num_generations, config.max_staleness)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_staleness: 1", "max_staleness: 2"), "max_staleness is 1 there, not 2"),
        (("score: float32", "score: float64"), "column score is float there, not double"),
        (("  score: float32\n", "  score: float32\n  more: string\n"), "column more is not set there, not string"),
        (("needs: [question]", "needs: []"), "stage write: needs is question there, not nothing"),
        (("name: judge", "name: jury"), "stage judge is there, and not in the file"),
        (("sampler: freshest", "sampler: fifo"), "stage learn: sampler is freshest there, not fifo"),
    ],
)
def test_a_file_that_is_not_what_is_on_disk_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(SPEC)
    with Home(tmp_path / "store") as home:
        home.open_store(load_spec(file), "process").close()
    file.write_text(SPEC.replace(*change))

    with Home(tmp_path / "store") as home:
        with pytest.raises(HomeError, match=message):
            home.open_store(load_spec(file), "process")
        home.open_store(None, "process").close()


def test_terms_that_were_amended_are_no_difference(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(SPEC)
    with Home(tmp_path / "store") as home:
        store = home.open_store(load_spec(file), "process")
        store.amend(max_staleness=3)
        store.close()

        store = home.open_store(load_spec(file), "process")

        assert store.counts().max_staleness == 3
        store.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_staleness", "max_stalenes"), "max_stalenes is not a setting; did you mean max_staleness"),
        (("num_generations: 2", "num_generations: 3"), "must be a multiple of num_generations"),
        (("train_batch_size: 4", "train_batch_size: 0"), "train_batch_size: .*greater than or equal to 1"),
        (("list<int32>", "list<int33>"), "column answers has the type 'int33', which is none"),
        (("score: float32", "score: 'struct<a: int8>'"), "column score has the type"),
        (("string", "decimal128"), "column question has the type"),
        (("role: score", "role: judge"), "stages.1.role"),
        (("needs: [question, answers]", "needs: [nothing]"), "there is no column 'nothing'"),
        (("writes: [score, weights]", "writes: [answers]"), "writes answers, which is written already"),
        (("role: train", "role: score"), "exactly one stage that can train"),
        (("max_staleness: 1", "max_rows: 2"), "max_rows .2. must be at least train_batch_size"),
        (("max_staleness: 1", "min_group: 3"), "min_group .3. can be at most num_generations"),
        (("train_batch_size: 4", "{"), "cannot be read as YAML"),
        ((SPEC, "- 1"), "must hold `key: value` lines"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_in_one_sentence(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(SPEC.replace(*change))

    with pytest.raises(ConfigError, match=message) as refused:
        load_spec(file)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_arrow_types_have_the_names_that_arrow_prints() -> None:
    for text in ("string", "int64", "float", "bool", "binary", "timestamp[us]", "list<item: list<item: int32>>"):
        assert str(arrow_type(text, column="x")) == text
    assert str(arrow_type("large_list<float32>", column="x")) == "large_list<item: float>"


def test_a_directory_has_one_server(start: Callable[..., StoreProcess]) -> None:
    server = start()
    assert server.process is not None

    second = command("serve", "--path", server.home)

    assert second.returncode == 2
    assert f"is served already, by process {server.process.pid}" in second.stderr
    assert address_of(server.home).location == server.location


def test_an_address_has_one_server(tmp_path: Path, start: Callable[..., StoreProcess]) -> None:
    address = start().location.removeprefix("grpc://")

    refused = command("serve", "--path", tmp_path / "other", "--listen", address)

    assert refused.returncode == 2
    assert f"nobody can listen on {address}" in refused.stderr


def test_what_others_reach_has_tls(tmp_path: Path, start: Callable[..., StoreProcess]) -> None:
    refused = command("serve", "--path", tmp_path / "store", "--listen", "0.0.0.0:0")
    assert refused.returncode == 2
    assert "give --tls-cert and --tls-key" in refused.stderr
    assert not (tmp_path / "store").exists()
    certificate, key = self_signed()
    (tmp_path / "cert.pem").write_bytes(certificate)
    (tmp_path / "key.pem").write_bytes(key)

    tls = ("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))
    server = start(*tls, "--listen", "0.0.0.0:0")

    address = address_of(server.home)
    assert address.location.startswith("grpc+tls://localhost:")
    assert address.tls_root is not None
    client = connect(address.location, token=server.token, tls_root=Path(address.tls_root).read_bytes())
    assert client.counts().admitted == 0
    client.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--listen", "nothing"], "write host:port"),
        (["--listen", "127.0.0.1:99999"], "write host:port"),
        (["--tls-cert", "x.pem"], "go together"),
        (["--tls-cert", "x.pem", "--tls-key", "y.pem"], "x.pem cannot be read"),
        (["--spec", "nothing.yaml"], "there is no file nothing.yaml"),
        (["--token-file", "nothing"], "the token in nothing cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tmp_path: Path, words: list[str], message: str) -> None:
    refused = command("serve", "--path", tmp_path / "store", *words)

    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1, refused.stderr


def test_directories_that_cannot_hold_a_store_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")

    for path, message in {
        tmp_path / "missing" / "store": "No such file or directory",
        tmp_path / "file": "File exists",
        Path("/proc/self"): "cannot hold a store",
        tmp_path / "run": "is the directory of a run",
    }.items():
        with pytest.raises(HomeError, match=message):
            Home(path)


def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path) -> None:
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    refused = subprocess.run(
        [*COMMAND, "serve", "--path", str(tmp_path / "store")],
        capture_output=True,
        text=True,
        preexec_fn=no_room,
        check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )

    assert refused.returncode == 2, refused
    assert "see that its disk has room" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_ledger_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    with Home(tmp_path / "store") as home:
        home.open_store(None, "process").close()
    with sqlite3.connect(tmp_path / "store" / "ledger.sqlite") as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'format'")
    db.close()

    refused = command("serve", "--path", tmp_path / "store")

    assert refused.returncode == 2
    assert "has ledger format 99" in refused.stderr
    assert "use the matching release" in refused.stderr


def test_samples_that_were_in_memory_do_not_come_back(tmp_path: Path) -> None:
    with Home(tmp_path / "store") as home:
        home.open_store(None, "memory").close()
        with pytest.raises(HomeError, match="had its samples in memory, and they are gone"):
            home.open_store(None, "process")
    with Home(tmp_path / "other") as home:
        home.open_store(None, "power").close()
        with pytest.raises(HomeError, match="has its samples on disk"):
            home.open_store(None, "memory")
        home.open_store(None, "process").close()


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with Home(tmp_path / "store") as home:
        file.write_text("secret\n")
        file.chmod(0o644)
        with pytest.raises(HomeError, match=r"can be read by others: chmod 600"):
            home.token(file)
        file.chmod(0o600)
        assert home.token(file) == "secret"
        file.write_text(" \n")
        with pytest.raises(HomeError, match="is empty"):
            home.token(file)


def test_the_address_is_for_programs(start: Callable[..., StoreProcess]) -> None:
    server = start()
    assert server.process is not None

    address = json.loads((server.home / ADDRESS).read_text())

    assert address["location"] == server.location
    assert address["pid"] == server.process.pid
    assert Path(address["token_file"]).read_text() == server.token


# -- the document ------------------------------------------------------------------------------------------------------

DOCUMENT = Path(__file__).parent.parent / "docs" / "store.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def test_the_example_for_any_arrow_client_works_as_it_is(tmp_path: Path, start: Callable[..., StoreProcess]) -> None:
    server = start(home=tmp_path / "my-store")
    (code,) = [block for block in blocks("python") if "import pyarrow.flight" in block]
    assert "asyncflow" not in code

    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["groups [0, 1]", "groups [2]"]
    assert "rollout needs ['prompt_ids'] and could take 16" in done.stdout
    assert "'response': '6', 'reward': 1.0" in done.stdout
    client = server.connect()
    assert client.counts().states["rewarded"] == 8
    client.close()


def test_the_example_of_a_spec_is_one(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    file = tmp_path / "spec.yaml"
    file.write_text(text)

    spec = load_spec(file)

    assert set(spec.model_fields_set) == set(StoreSpec.model_fields) - {"token_columns"}
    assert {name for name in StoreSpec.model_fields if name not in ("columns", "stages")} >= {"max_rows", "max_bytes"}
    defaults = StoreSpec()
    for name in ("train_batch_size", "num_generations", "max_staleness", "late_samples", "max_attempts", "resumable"):
        assert getattr(spec, name) == getattr(defaults, name)


def test_every_command_is_in_the_document() -> None:
    listed = re.findall(r"^ *│ (\w+) ", command("--help").stdout, re.MULTILINE)

    assert {"serve", "stat", "trace"} <= set(listed)
    for name in listed:
        assert f"`{name} " in DOCUMENT.read_text() or f"store {name}" in DOCUMENT.read_text(), name
