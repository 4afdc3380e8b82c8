"""What a run that goes on shows: its store to others on this host, its workers, its engines, and completions."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from asyncflow.cli.main import app
from asyncflow.errors import ControlError, Unreachable
from asyncflow.launch import resume
from asyncflow.report.audit import audit
from asyncflow.runtime.control import ControlClient
from asyncflow.store.home import ADDRESS, LOCK, TOKEN, address_of, read_token
from asyncflow.store.remote import connect
from tests.conftest import RunTiny
from tests.endless import UNHURRIED, endless_run, step_of, stop
from tests.own_process import OWN
from tests.processes import wait_until

Going = tuple[Path, subprocess.Popen[str]]


@pytest.fixture(scope="module", params=[(), (OWN,)], ids=["here", "own process"])
def going(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Going]:
    """A run that goes on; whoever drains a worker lets it go on again."""
    run_dir = tmp_path_factory.mktemp("going") / "run"
    with endless_run(run_dir, UNHURRIED, *request.param) as process:
        yield run_dir, process


def store(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["store", *arguments])


def worker(run_dir: Path, name: str) -> dict[str, Any]:
    return next(dict(one) for one in ControlClient(run_dir).workers() if one["name"] == name)


# -- the store ---------------------------------------------------------------------------------------------------------


def test_the_commands_for_stores_look_into_a_run_that_goes_on(going: Going) -> None:
    run_dir, _ = going

    stat = json.loads(store("stat", str(run_dir), "--json").stdout)
    top = json.loads(store("top", str(run_dir), "--every", "0.2", "--json").stdout)
    trace = json.loads(store("trace", str(run_dir), "0", "--json").stdout)

    assert stat["served"] is True
    assert stat["admitted"] == stat["trained"] + sum(stat["dropped"].values()) + stat["quarantined"] + stat["open"]
    assert top["admitted"] >= stat["admitted"]
    assert set(top["rates"]) == {"admitted", "trained", "dropped", "quarantined", "steps"}
    assert trace["state"] in ("trained", "dropped")


def test_any_client_can_take_part_with_the_token_which_is_for_the_owner(going: Going) -> None:
    run_dir, _ = going
    address = address_of(run_dir)

    assert (run_dir / TOKEN).stat().st_mode & 0o777 == 0o600
    assert address.location.startswith("grpc://127.0.0.1:")
    client = connect(address.location, token=read_token(Path(address.token_file)))
    try:
        assert client.counts().admitted > 0
        assert list(client.schema.stages) == ["rollout", "reward", "actor_update"]
    finally:
        client.close()


def test_nothing_of_it_is_left_when_the_run_has_ended(run_tiny: RunTiny) -> None:
    result = run_tiny("steps=2", "data.eval_size=0")

    assert not [name for name in (TOKEN, ADDRESS, LOCK) if (result.run_dir / name).exists()]
    with pytest.raises(Unreachable, match="its run has ended"):
        address_of(result.run_dir)
    assert json.loads(store("stat", str(result.run_dir), "--json").stdout)["served"] is False


def test_a_run_that_was_killed_is_served_again_when_it_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with endless_run(run_dir, UNHURRIED, "checkpoint.every=1"):
        token = read_token(run_dir / TOKEN)
    assert (run_dir / ADDRESS).exists()  # as the kill has left it
    with pytest.raises(Unreachable, match="its run has ended, or was killed"):
        address_of(run_dir)

    made = audit(run_dir).learner.n
    result = resume(run_dir, overrides=[f"steps={made + 1}"])

    assert result.summary.outcome == "finished"
    assert token
    assert not (run_dir / TOKEN).exists()


# -- workers and engines -----------------------------------------------------------------------------------------------


def test_every_worker_says_what_it_does_and_how_it_spent_the_last_minute(going: Going) -> None:
    run_dir, process = going
    client = ControlClient(run_dir)
    wait_until(lambda: worker(run_dir, "rollout")["shares"]["busy"] > 0, process)

    workers = {one["name"]: one for one in client.workers()}

    assert list(workers) == ["feeder", "rollout", "reward", "actor_update", "weights", "evaluator"]
    assert [one["name"] for one in workers.values() if one["stage"]] == ["rollout", "reward", "actor_update"]
    for one in workers.values():
        assert one["activity"] in ("busy", "idle", "blocked")
        assert one["cause"] is None or one["activity"] != "busy"
        assert one["since_seconds"] >= 0
        assert 0 <= sum(one["shares"].values()) <= 1.001
        assert one["drained"] is False
    for name in ("rollout", "reward", "actor_update"):
        assert workers[name]["heartbeat_seconds"] < 60
        assert sum(workers[name]["seconds"].values()) > 0


def test_the_engine_says_what_it_serves_and_that_the_learner_agrees(going: Going) -> None:
    run_dir, process = going
    client = ControlClient(run_dir)
    wait_until(lambda: client.engines()[0]["attested"] is not None, process)

    (engine,) = client.engines()

    assert engine["name"] == "rollout-0"
    assert engine["kind"] in ("fake", "tests.own_process:InOwnProcess")
    assert int(engine["served"].partition(".")[2]) >= 2
    assert len(engine["digest"]) >= 16
    assert engine["attested"] is True
    assert 0 <= engine["in_flight"] <= 16


def test_the_timeline_has_no_gaps_and_ends_now(going: Going) -> None:
    run_dir, _ = going

    spans = ControlClient(run_dir).timeline(5.0)

    learner = [span for span in spans if span["worker"] == "actor_update"]
    assert {span["activity"] for span in learner} >= {"busy", "idle"}
    gaps = [b["start"] - a["end"] for a, b in pairwise(learner)]
    assert all(abs(gap) < 0.001 for gap in gaps)
    assert max(span["end"] for span in spans) - min(span["start"] for span in spans) <= 5.01
    assert ControlClient(run_dir).timeline(0.5)[0]["start"] > spans[0]["start"]


@pytest.mark.parametrize("name", ["rollout", "reward", "feeder", "actor_update"])
def test_a_worker_that_is_drained_starts_nothing_until_it_is_let_go_on(going: Going, name: str) -> None:
    run_dir, process = going
    client = ControlClient(run_dir)

    client.drain(name)
    client.drain(name)
    try:
        # With one part at rest all others run out of work.
        wait_until(lambda: worker(run_dir, name)["cause"] == "drain", process)
        wait_until(lambda: nothing_moves(client), process)
        at_rest = worker(run_dir, name)
        assert (at_rest["drained"], at_rest["activity"]) == (True, "blocked")
        at = step_of(run_dir)
    finally:
        client.undrain(name)

    wait_until(lambda: step_of(run_dir) >= at + 3, process)
    assert worker(run_dir, name)["drained"] is False


def nothing_moves(client: ControlClient) -> bool:
    before = client.status()
    pause()
    after = client.status()
    return all(before[name] == after[name] for name in ("step", "admitted", "trained", "open"))


def pause() -> None:
    """Long enough for every worker to have had a turn."""
    threading.Event().wait(0.7)


def test_what_cannot_be_drained_is_named_with_what_can(going: Going) -> None:
    run_dir, _ = going

    with pytest.raises(ControlError, match="no worker 'weights' that can be drained: name one of feeder, rollout"):
        ControlClient(run_dir).drain("weights")


# -- completions -------------------------------------------------------------------------------------------------------


def test_the_policy_that_is_served_completes_text_beside_the_rollouts_and_nothing_is_in_the_store(
    going: Going,
) -> None:
    run_dir, _ = going
    client = ControlClient(run_dir)
    step = step_of(run_dir)

    made = client.complete("What is 1 + 1?", n=3, max_new_tokens=5, temperature=0.0)
    tokens = client.tokenise(["What is 1 + 1?"])[0]

    assert made["prompt_ids"] == tokens
    assert len({tuple(one["token_ids"]) for one in made["completions"]}) == 1  # greedy
    for one in made["completions"]:
        assert 1 <= len(one["token_ids"]) <= 5
        assert len(one["logprobs"]) == len(one["token_ids"])
        assert all(logprob <= 0 for logprob in one["logprobs"])
        assert all(int(version.partition(".")[2]) >= step - 1 for version in one["versions"])
    assert client.complete(tokens, max_new_tokens=2)["prompt_ids"] == tokens


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"prompt": ""}, "has no tokens"),
        ({"prompt": []}, "text, chat messages, or token ids"),
        ({"prompt": [1, "a"]}, "text, chat messages, or token ids"),
        ({"prompt": "x", "max_new_tokens": 0}, "do not fit into"),
        ({"prompt": "x", "max_new_tokens": 1 << 20}, "do not fit into"),
        ({"prompt": "x", "n": 0}, "cannot be asked for at once"),
        ({"prompt": "x", "n": 10_000}, "cannot be asked for at once"),
        ({"prompt": "x", "top_p": 0.5}, "the engine refuses this: the fake engine samples from all tokens"),
    ],
)
def test_what_cannot_be_completed_is_refused_and_the_run_goes_on(
    going: Going, asked: dict[str, Any], says: str
) -> None:
    run_dir, process = going

    with pytest.raises(ControlError, match=says):
        ControlClient(run_dir).complete(**asked)

    at = step_of(run_dir)
    wait_until(lambda: step_of(run_dir) > at, process)


def test_a_completion_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with endless_run(run_dir, "rollout.options={token_latency: 0.05}", steps=1) as process:
        with pytest.raises(ControlError, match=r"no completion within 0\.1 s"):
            ControlClient(run_dir).complete("x", max_new_tokens=200, timeout=0.1)
        stop(run_dir, process)
    assert audit(run_dir).ok
