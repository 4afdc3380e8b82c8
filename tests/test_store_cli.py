"""`asyncflow store` for those who look after a store: what it says is what there is, also where nobody serves it; what
it changes is changed; and what cannot be is one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from asyncflow.cli.main import app
from asyncflow.errors import ConfigError, IllegalTransition, LedgerError, StoreError, Unreachable, UserError
from asyncflow.launch import run
from asyncflow.store.client import Lease
from asyncflow.store.events import PutId
from asyncflow.store.frames import HEADER_BYTES
from asyncflow.store.store import Store
from asyncflow.types import PolicyVersion
from tests.store_server import StoreProcess, command
from tests.test_store import ids, prompts, responses, rewards

SPEC = """
train_batch_size: 4
num_generations: 2
max_staleness: 2
max_attempts: 1
"""


class Served:
    """A server in a process of its own with samples in every state."""

    def __init__(self, folder: Path, spec: str = SPEC) -> None:
        (folder / "spec.yaml").write_text(spec)
        self.server = StoreProcess(folder / "store", "--spec", str(folder / "spec.yaml"))
        self.home = self.server.home
        self.client = self.server.connect()
        self.client.serve("engine", PolicyVersion(n=0))

    def fill(self) -> None:
        """0–3 are trained, 4–5 scored, 6–7 generated, 8 in quarantine and 9 lost with it, 10–11 with a worker."""
        store = self.client
        store.admit(prompts(6), put=PutId(producer="feeder", sequence=1), timeout=0.0)
        made = take(store, "rollout", 8)
        store.ack(made.lease_id, ids(made), responses(ids(made)))
        scored = take(store, "reward", 6)
        store.ack(scored.lease_id, ids(scored), rewards(ids(scored)))
        step = take(store, "actor_update", 4)
        store.commit(leases=[step.lease_id], trained=ids(step), skipped=[], version=PolicyVersion(n=1))
        failed = take(store, "rollout", 1)
        store.nack(failed.lease_id, ids(failed), reason="its engine is out of memory", final=True)
        take(store, "rollout", 9)

    def close(self) -> None:
        self.client.close()
        self.server.close()


def take(store: Store, stage: str, rows: int) -> Lease:
    lease = store.lease(stage, worker="worker-1", max_rows=rows, ttl=600.0, timeout=0.0)
    assert lease is not None, f"nothing is ready for {stage}"
    return lease


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """To look at."""
    served = Served(tmp_path_factory.mktemp("store"))
    served.fill()
    yield served
    served.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.close()


def store(*words: object) -> Result:
    return CliRunner().invoke(app, ["store", *map(str, words)])


def say(*words: object) -> str:
    result = store(*words)
    assert result.exit_code == 0, result.exception
    return result.output


def plain(*words: object) -> Any:
    return json.loads(say(*words, "--json"))


def refusal(*words: object) -> BaseException:
    result = store(*words)
    assert result.exit_code != 0
    assert result.exception is not None
    return result.exception


# -- looking -----------------------------------------------------------------------------------------------------------


def test_stat_says_what_the_store_says(filled: Served) -> None:
    seen = plain("stat", filled.home)

    counts = filled.client.counts()
    assert (seen["admitted"], seen["trained"], seen["quarantined"]) == (12, 4, 1)
    assert seen["states"] == dict(counts.states)
    assert seen["states"] == {"prompted": 0, "generating": 2, "generated": 2, "rewarded": 2, "training": 0}
    assert seen["dropped"] == {"short_group": 1}
    assert seen["ready"] == {"rollout": 0, "reward": 2}
    assert seen["staleness"] == {"1": 4}
    assert seen["serving"] == {"engine": "0.0"}
    assert [(lease["worker"], lease["stage"], lease["samples"]) for lease in seen["leases"]] == [
        ("worker-1", "rollout", 2)
    ]
    assert 0 < seen["leases"][0]["seconds"] <= 600
    assert [wait["sample"] for wait in seen["step"]] == [6, 7]
    assert seen["bytes"] == counts.bytes
    text = say("stat", filled.home)
    for part in ("12 admitted, 4 trained, 1 dropped, 1 quarantined", "worker-1 holds 2 samples for rollout", "1: 4"):
        assert part in text


def test_stat_finds_a_store_by_its_location_and_token(filled: Served) -> None:
    location, token = filled.server.location, filled.home / "token"

    assert plain("stat", location, "--token-file", token)["admitted"] == 12

    with pytest.raises(UserError, match=r"the token of grpc://.* is needed"):
        raise refusal("stat", location)


def test_stat_of_a_store_that_nobody_serves_is_what_its_ledger_says(served: Served) -> None:
    served.fill()
    live = plain("stat", served.home)
    served.server.kill()

    dead = plain("stat", served.home)

    assert (live["served"], dead["served"]) == (True, False)
    assert (live["durability"], dead["durability"]) == ("process", None)
    for lease in live["leases"]:
        lease["seconds"] = None
    differs = {"bytes": 0, "served": 0, "durability": 0}
    assert {**dead, **differs} == {**live, **differs}
    assert "nobody serves it" in say("stat", served.home)


@pytest.mark.parametrize("durability", ["memory", "process", "power"])
def test_stat_and_top_say_what_an_acknowledged_put_survives(tmp_path: Path, durability: str) -> None:
    server = StoreProcess(tmp_path / "store", "--durability", durability)
    try:
        assert plain("stat", server.home)["durability"] == durability
        assert plain("top", server.home, "--every", "0.1")["durability"] == durability
        for words in (["stat", server.home], ["top", server.home, "--every", "0.1"]):
            assert f"segments, durability {durability}\n" in say(*words)
    finally:
        server.close()


def test_top_tells_rates_and_ends_where_there_is_no_terminal(filled: Served) -> None:
    seen = plain("top", filled.home, "--every", "0.1")

    assert seen["rates"] == {"admitted": 0.0, "trained": 0.0, "dropped": 0.0, "quarantined": 0.0, "steps": 0.0}
    assert "a second    0.0 admitted, 0.0 trained" in say("top", filled.home, "--every", "0.1")


def test_trace_tells_a_whole_life(filled: Served) -> None:
    life = plain("trace", filled.home, 2)

    assert (life["group_id"], life["state"], life["holder"], life["values"]) == (1, "trained", None, [])
    assert [(moment["kind"], moment["state"]) for moment in life["moments"]] == [
        ("admitted", "prompted"),
        ("leased", "generating"),
        ("acked", "generated"),
        ("leased", "generated"),
        ("acked", "rewarded"),
        ("leased", "training"),
        ("committed", "trained"),
    ]
    words = " | ".join(moment["words"] for moment in life["moments"])
    assert "admitted in group 1 by feeder, put 0.1" in words
    assert "leased to worker-1 for rollout (lease 1, 8 samples)" in words
    assert "worker-1 brought response_ids, rollout_logprobs, token_versions" in words
    assert "2 tokens of version 0.0" in words
    assert "trained in the step of version 0.1" in words
    times = [moment["at"] for moment in life["moments"]]
    assert times == sorted(times)


def test_trace_says_who_has_a_sample_and_where_its_data_are(filled: Served) -> None:
    held, made = plain("trace", filled.home, 10), plain("trace", filled.home, 6)

    assert held["holder"] == "worker-1"
    assert [values["columns"] for values in held["values"]] == [["prompt", "prompt_columns", "prompt_ids"]]
    assert [values["row"] for values in made["values"]] == [3, 6]
    assert all(Path(values["file"]).is_file() and values["there"] for values in made["values"])
    assert "sample 10 of group 5: generating, worker-1 has it" in say("trace", filled.home, 10)


def test_trace_says_why_a_sample_was_lost(filled: Served) -> None:
    assert "quarantined: its engine is out of memory" in say("trace", filled.home, 8)
    assert "dropped: short_group" in say("trace", filled.home, 9)
    with pytest.raises(StoreError, match="sample 12 was never admitted: the ledger has 0 to 11"):
        raise refusal("trace", filled.home, 12)


def test_trace_tells_of_a_restart_and_works_when_nothing_runs(served: Served) -> None:
    served.fill()
    served.server.kill()
    served.server.start()
    served.server.kill()

    kinds = [moment["kind"] for moment in plain("trace", served.home, 6)["moments"]]

    assert kinds[-1] == "restarted"


def test_what_reads_a_ledger_works_on_the_directory_of_a_run(tmp_path: Path) -> None:
    tiny = Path(__file__).parent.parent / "configs" / "tiny.yaml"
    run(tiny, overrides=[f"run_dir={tmp_path / 'run'}", "steps=2", "save_samples=false"])

    assert plain("trace", tmp_path / "run", 0)["state"] in ("trained", "dropped")
    assert plain("verify", tmp_path / "run")["ok"]
    assert plain("stat", tmp_path / "run")["learner"] == "0.2"


# -- checking ----------------------------------------------------------------------------------------------------------


def test_verify_reads_everything(filled: Served) -> None:
    found = plain("verify", filled.home)

    assert (found["ok"], found["faults"], found["hit"]) == (True, [], [])
    assert (found["needed"], found["samples"], found["torn"]) == (3, 6, 0)
    assert "everything is right" in say("verify", filled.home)


def flip(file: str, offset: int) -> None:
    with Path(file).open("r+b") as segment:
        segment.seek(offset + HEADER_BYTES + 300)
        byte = segment.read(1)
        segment.seek(-1, 1)
        segment.write(bytes([byte[0] ^ 1]))


def test_verify_names_the_samples_that_damage_has_hit(served: Served) -> None:
    served.fill()
    _, made = plain("trace", served.home, 6)["values"]
    flip(made["file"], made["offset"])

    result = store("verify", served.home, "--json")

    assert result.exit_code == 1
    found = json.loads(result.output)
    assert found["hit"] == [4, 5, 6, 7]  # their responses are in one frame
    assert "is damaged at byte" in found["faults"][0]
    assert "hit         4 samples: 4, 5, 6, 7" in store("verify", served.home).output


def test_verify_names_the_samples_whose_segment_is_missing(served: Served) -> None:
    served.fill()
    served.server.kill()
    frame = plain("trace", served.home, 10)["values"][0]
    Path(frame["file"]).unlink()

    result = store("verify", served.home, "--json")

    assert result.exit_code == 1
    assert set(json.loads(result.output)["hit"]) >= {10, 11}


def test_verify_counts_what_nobody_needs_as_no_fault(served: Served) -> None:
    served.fill()
    _, made = plain("trace", served.home, 6)["values"]
    served.client.drop([4, 5, 6, 7], reason="enough")
    flip(made["file"], made["offset"])

    found = plain("verify", served.home)

    assert (found["ok"], found["torn"], found["hit"]) == (True, 1, [])


def test_a_ledger_that_cannot_be_read_is_said_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"no ledger" * 1000)

    for words in (["verify", tmp_path], ["trace", tmp_path, 0], ["stat", tmp_path]):
        with pytest.raises(LedgerError, match="cannot be read as a ledger"):
            raise refusal(*words)


# -- exporting ---------------------------------------------------------------------------------------------------------


def test_export_writes_the_open_samples_with_what_they_have(filled: Served, tmp_path: Path) -> None:
    file = tmp_path / "open.parquet"

    assert "6 samples in" in say("export", filled.home, file)

    rows = pq.read_table(file).to_pylist()
    assert [row["sample_id"] for row in rows] == [4, 5, 6, 7, 10, 11]
    assert [row["state"] for row in rows] == ["rewarded"] * 2 + ["generated"] * 2 + ["generating"] * 2
    assert [row["response"] for row in rows] == ["Ünï 4", "Ünï 5", "Ünï 6", "Ünï 7", None, None]
    assert [row["reward"] is None for row in rows] == [False, False, True, True, True, True]
    assert rows[4]["prompt"] == '"What is 5 + 1?"'


@pytest.mark.parametrize(
    ("condition", "samples"),
    [
        (["state=generated"], [6, 7]),
        (["group=2"], [4, 5]),
        (["stage=reward"], [6, 7]),
        (["worker=worker-1"], [10, 11]),
        (["worker=nobody"], []),
        (["state=rewarded", "group=5"], []),
    ],
)
def test_export_takes_those_that_meet_all_conditions(
    filled: Served, tmp_path: Path, condition: list[str], samples: list[int]
) -> None:
    file = tmp_path / "open.jsonl"

    say("export", filled.home, file, *(word for c in condition for word in ("--where", c)), "--columns", "sample_id")

    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"sample_id": i} for i in samples]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--where", "state=trained"], "the states of open samples are prompted, generating"),
        (["--where", "stage=nothing"], "the stages are rollout, reward, actor_update"),
        (["--where", "nothing"], "write state=…, group=…"),
        (["--columns", "nothing"], "there is no column 'nothing'"),
    ],
)
def test_export_refuses_what_there_is_not(filled: Served, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        raise refusal("export", filled.home, tmp_path / "x.parquet", *words)
    with pytest.raises(ConfigError, match=r"must end in \.parquet or \.jsonl"):
        raise refusal("export", filled.home, tmp_path / "x.csv")
    assert list(tmp_path.iterdir()) == []


# -- putting right -----------------------------------------------------------------------------------------------------


def test_samples_come_back_from_quarantine(tmp_path: Path) -> None:
    served = Served(tmp_path, SPEC.replace("num_generations: 2", "num_generations: 4"))
    served.client.admit(prompts(1), timeout=0.0)
    lease = take(served.client, "rollout", 2)
    served.client.nack(lease.lease_id, ids(lease), reason="its engine is out of memory", final=True)
    assert served.client.counts().quarantined == 2

    assert say("restore", served.home, "0-1") == "2 put back\n"

    assert (served.client.counts().quarantined, served.client.counts().restored) == (0, 2)
    assert ids(take(served.client, "rollout", 9)) == [0, 1, 2, 3]
    with pytest.raises(IllegalTransition):
        raise refusal("restore", served.home, 0)
    served.close()


def test_a_dead_worker_gives_its_samples_back_and_serves_nothing(served: Served) -> None:
    served.fill()

    assert say("gone", served.home, "worker-1") == "2 samples came back\n"
    assert say("gone", served.home, "engine") == "0 samples came back\n"

    counts = served.client.counts()
    assert (dict(counts.leased), dict(counts.served)) == ({}, {})
    with pytest.raises(UserError, match="worker-1 holds no samples and serves nothing"):
        raise refusal("gone", served.home, "worker-1")


def test_samples_are_dropped_and_get_priorities_and_terms_change(served: Served) -> None:
    served.fill()

    assert say("drop", served.home, 4, "6-7", "--reason", "a bad prompt") == "none of 3 is open any more\n"
    assert "2 samples have priority 7" in say("prioritise", served.home, "10-11", "--priority", 7)
    assert "1 groups have priority -1" in say("prioritise", served.home, 5, "--groups", "--priority", -1)
    say("amend", served.home, "--max-staleness", 4, "--last-version", 9)

    counts = served.client.counts()
    assert counts.dropped["a bad prompt"] == 3
    assert counts.max_staleness == 4
    kinds = [(m["kind"], m["words"]) for m in plain("trace", served.home, 10)["moments"]]
    assert ("prioritised", "has priority 7") in kinds
    assert ("prioritised", "has priority -1") in kinds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["drop", "five"], "five is no sample: write numbers"),
        (["drop", "1-99999999"], "name at most 1,000,000 at a time"),
        (["amend"], "nothing would change"),
        (["amend", "--last-version", 0], "."),
    ],
)
def test_what_makes_no_sense_is_refused(filled: Served, words: list[Any], message: str) -> None:
    before = filled.client.counts()

    with pytest.raises((UserError, StoreError), match=message):
        raise refusal(words[0], filled.home, *words[1:])

    assert filled.client.counts() == before


def test_a_store_that_is_not_there_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    nowhere = command("stat", tmp_path / "nowhere")
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (2, 1)
    assert "there is no directory" in nowhere.stderr
    with pytest.raises(Unreachable, match="nobody serves"):
        raise refusal("drop", tmp_path, 0)
    with pytest.raises(LedgerError, match="there is no ledger"):
        raise refusal("stat", tmp_path)
