"""The routes about one run, over HTTP: looking on, taking part from outside, and completions."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from prometheus_client.parser import text_string_to_metric_families

from asyncflow.launch import launch, resolve
from asyncflow.plan import plan
from asyncflow.report.audit import audit
from asyncflow.report.measured import Series
from asyncflow.runtime.control import ControlClient
from asyncflow.store.ipc import MEDIA_TYPE, read_stream, write_stream
from tests.conftest import TINY
from tests.endless import UNHURRIED, endless_run, step_of, stop
from tests.processes import DEADLINE, wait_until
from tests.run_service import service

ARROW = {"content-type": MEDIA_TYPE}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("ended") / "run"
    launch(plan(resolve(TINY, ("steps=6", "data.eval_size=0", f"run_dir={run_dir}"))))
    return run_dir


@pytest.fixture(scope="module")
def going(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    run_dir = tmp_path_factory.mktemp("going") / "run"
    with endless_run(run_dir, UNHURRIED, "max_staleness=2") as process:
        yield run_dir, process


@pytest.fixture(scope="module")
def api(ended: Path, going: tuple[Path, subprocess.Popen[str]], tmp_path_factory: Any) -> Iterator[httpx.Client]:
    """`old` has ended, `new` goes on, `none` has not begun."""
    with service(old=ended, new=going[0], none=tmp_path_factory.mktemp("none")) as client:
        yield client


@pytest.fixture
def process(going: tuple[Path, subprocess.Popen[str]]) -> subprocess.Popen[str]:
    return going[1]


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body.get("code")) == (status, code), body
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["detail"]
    return body


# -- looking on --------------------------------------------------------------------------------------------------------


def test_the_queue_of_an_ended_run_is_what_the_audit_says(api: httpx.Client, ended: Path) -> None:
    account = audit(ended)

    queue = api.get("/v1/jobs/old/queue").json()

    assert queue["live"] is False
    assert queue["counts"]["admitted"] == account.admitted
    assert queue["counts"]["trained"] == account.trained
    assert queue["counts"]["dropped"] == dict(account.dropped)
    assert queue["counts"]["open"] == account.open
    assert queue["staleness"]["at_training"] == {str(age): many for age, many in account.staleness.items()}
    assert queue["history"]["step"] == list(range(1, 7))
    assert queue["learner"] == "0.6"
    assert queue["leases"] == []
    assert queue["bottleneck"]["text"].endswith(".")


def test_the_queue_of_a_run_that_goes_on_has_its_leases_and_rates(api: httpx.Client, process: Any) -> None:
    seen: list[dict[str, Any]] = []

    def leased() -> bool:
        seen.append(api.get("/v1/jobs/new/queue").json())
        return bool(seen[-1]["leases"]) and seen[-1]["bottleneck"] is not None

    wait_until(leased, process)
    queue = seen[-1]
    assert queue["live"] is True
    assert queue["leases"][0]["seconds"] > 0
    assert {stage["role"] for stage in queue["stages"]} == {"generate", "score", "train"}
    assert any(stage["out_per_second"] > 0 for stage in queue["stages"])
    assert queue["max_staleness"] == 2


@pytest.mark.parametrize("what", ["queue", "samples", "samples/1", "live"])
def test_a_run_that_has_not_begun_is_said_to_have_not(api: httpx.Client, what: str) -> None:
    if what == "live":
        with api.stream("GET", "/v1/jobs/none/live") as answer:
            assert answer.status_code == 200  # and it begins with the run
            return
    refused(api.get(f"/v1/jobs/none/{what}"), 409, "run_not_begun")


@pytest.mark.parametrize("what", ["queue", "workers", "samples", "timeline", "metrics", "engines"])
def test_a_job_that_there_is_not_is_a_404(api: httpx.Client, what: str) -> None:
    refused(api.get(f"/v1/jobs/other/{what}"), 404, "no_such_job")


def test_workers_engines_and_the_timeline_of_a_run_that_goes_on(api: httpx.Client) -> None:
    workers = api.get("/v1/jobs/new/workers").json()["data"]
    (engine,) = api.get("/v1/jobs/new/engines").json()["data"]
    spans = api.get("/v1/jobs/new/timeline", params={"seconds": 5}).json()["spans"]

    assert [one["stage"] for one in workers if one["stage"]] == ["rollout", "reward", "actor_update"]
    assert all((one["waits_for"] is None) == (one["cause"] is None) for one in workers)
    assert engine["served"].startswith("0.")
    assert {span["worker"] for span in spans} >= {"rollout", "actor_update"}
    assert any(span["worker"].startswith("generation/") for span in spans)
    assert all(span["start"].endswith("Z") and span["start"] <= span["end"] for span in spans)


def test_an_ended_run_has_its_timeline_and_no_workers(api: httpx.Client) -> None:
    assert api.get("/v1/jobs/old/workers").json() == {"object": "list", "data": []}
    assert api.get("/v1/jobs/old/engines").json()["data"] == []
    spans = api.get("/v1/jobs/old/timeline").json()["spans"]
    assert {span["worker"] for span in spans} >= {"feeder", "rollout", "reward", "actor_update"}
    # Each completion by itself: the long tail.
    assert sum(span["worker"].startswith("generation/") for span in spans) == 6 * 16
    assert [span["start"] for span in spans] == sorted(span["start"] for span in spans)


def test_a_worker_is_drained_and_goes_on(api: httpx.Client, process: Any, going: Any) -> None:
    def reward() -> dict[str, Any]:
        return next(one for one in api.get("/v1/jobs/new/workers").json()["data"] if one["name"] == "reward")

    answer = api.post("/v1/jobs/new/workers/reward/drain")

    assert (answer.status_code, answer.json()["drained"]) == (202, True)
    wait_until(lambda: reward()["waits_for"] == "somebody to let it go on", process)
    assert api.post("/v1/jobs/new/workers/reward/undrain").json()["drained"] is False
    at = step_of(going[0])
    wait_until(lambda: step_of(going[0]) > at, process)
    assert "feeder, rollout" in refused(api.post("/v1/jobs/new/workers/x/drain"), 404, "no_such_worker")["detail"]
    refused(api.post("/v1/jobs/new/workers/weights/drain"), 409, "not_possible_now")
    refused(api.post("/v1/jobs/old/workers/reward/drain"), 409, "run_not_live")
    refused(api.post("/v1/jobs/new/workers/reward/drain", headers={"x-scope": "read"}), 403, "scope_too_small")


def test_measurements_come_as_series_and_only_what_is_new(api: httpx.Client, ended: Path) -> None:
    everything = api.get("/v1/jobs/old/metrics").json()
    some = api.get("/v1/jobs/old/metrics", params={"names": "reward/mean,nothing", "since_step": 4}).json()

    assert "step_time" in everything["names"]
    assert everything["series"]["step_time"]["step"] == list(range(1, 7))
    assert some["names"] == everything["names"]
    assert set(some["series"]) <= {"reward/mean"}
    timed = api.get("/v1/jobs/old/metrics", params={"names": "step_time", "since_step": 4}).json()["series"]
    assert timed["step_time"]["step"] == [5, 6]
    assert timed["step_time"]["value"] == everything["series"]["step_time"]["value"][4:]


def test_a_long_series_is_thinned_evenly_and_keeps_what_stands_out(api: httpx.Client, ended: Path) -> None:
    series = Series(list(range(1, 10_001)), [float(at) for at in range(10_000)], [at % 7 / 7 for at in range(10_000)])
    series.value[1234], series.value[5678], series.value[4321] = -3.0, 9.0, float("nan")

    thin = series.thinned(100)

    assert len(thin.value) <= 103
    assert thin.step[-1] == 10_000
    assert {(1235, -3.0), (5679, 9.0)} <= set(zip(thin.step, thin.value, strict=True))
    assert sum(thin.value) / len(thin.value) == pytest.approx(sum(at % 7 / 7 for at in range(7)) / 7, abs=0.1)
    asked: dict[str, str] = {"names": "step_time", "points": "2"}
    served = api.get("/v1/jobs/old/metrics", params=asked).json()["series"]["step_time"]
    assert {1, 4, 6} <= set(served["step"]) < {1, 2, 3, 4, 5, 6}


def test_samples_come_in_pages_with_filters(api: httpx.Client, ended: Path) -> None:
    ids: list[int] = []
    cursor = None
    while True:
        page = api.get("/v1/jobs/old/samples", params={"limit": 17} | ({"cursor": cursor} if cursor else {})).json()
        ids += [sample["id"] for sample in page["data"]]
        cursor = page["next_cursor"]
        assert page["has_more"] is (cursor is not None)
        if not cursor:
            break
    assert ids == list(reversed(range(audit(ended).admitted)))
    third = api.get("/v1/jobs/old/samples", params={"step": 3, "limit": 100}).json()["data"]
    assert {sample["step"] for sample in third} == {3}
    assert len(third) == 16
    refused(api.get("/v1/jobs/old/samples", params={"cursor": "abc"}), 400, "bad_cursor")
    refused(api.get("/v1/jobs/old/samples", params={"state": "happy"}), 422, "invalid_request")
    refused(api.get("/v1/jobs/old/samples", params={"limit": 101}), 422, "invalid_request")


def test_a_sample_has_its_whole_life(api: httpx.Client) -> None:
    brief = api.get("/v1/jobs/old/samples", params={"state": "trained", "limit": 1}).json()["data"][0]

    sample = api.get(f"/v1/jobs/old/samples/{brief['id']}").json()

    assert sample["response"].startswith(brief["response"])
    assert sample["events"][0]["type"] == "admitted"
    assert sample["events"][-1]["message"].startswith("trained in the step of version")
    assert len(sample["tokens"]) == sum(len([token["text"]]) for token in sample["tokens"]) > 0
    assert {token["version"] for token in sample["tokens"]} == set(sample["versions"])
    refused(api.get("/v1/jobs/old/samples/999999"), 404, "no_such_sample")


def test_the_stream_of_a_run_tells_what_changes_and_ends_with_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with endless_run(run_dir, UNHURRIED) as process, service(job=run_dir) as api:
        events: list[tuple[str, dict[str, Any]]] = []
        with api.stream("GET", "/v1/jobs/job/live") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            kind = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    events.append((kind, json.loads(line.removeprefix("data: "))))
                    if len(events) == 8:
                        ControlClient(run_dir).stop()
        process.communicate(timeout=DEADLINE)

    live = [data for kind, data in events if kind == "live"]
    assert events[-1][0] == "end"
    assert live[-1]["queue"]["live"] is False
    assert live[-1]["queue"]["counts"]["trained"] == audit(run_dir).trained
    assert live[0]["progress"]["steps"] == 100000
    assert live[0]["queue"]["history"] is None
    assert all(a != b for a, b in pairwise(live))
    steps = [int(one["queue"]["learner"].partition(".")[2]) for one in live]
    assert steps == sorted(steps)


# -- from outside ------------------------------------------------------------------------------------------------------

NUMBERS = {"answer": "2", "question": "1 + 1"}


@pytest.mark.parametrize("form", ["json", "arrow"])
def test_a_producer_outside_puts_prompts_that_are_trained(
    api: httpx.Client, going: tuple[Path, subprocess.Popen[str]], form: str
) -> None:
    _, process = going
    api.post("/v1/jobs/new/workers/feeder/drain")  # so that there is room for others
    name: dict[str, str | float] = {"producer": f"outside-{form}", "sequence": 1}

    def put() -> httpx.Response:
        if form == "json":
            prompts = [
                {"prompt": "What is 1 + 1?", "prompt_columns": NUMBERS},
                {"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "prompt_ids": [5, 6, 7]},
            ]
            return api.post("/v1/jobs/new/prompts", json={"prompts": prompts, "put": name, "timeout_seconds": 20})
        batch = pa.RecordBatch.from_pydict(
            {
                "prompt": ['"What is 1 + 1?"', '"What is 2 + 2?"'],
                "prompt_columns": ["{}", "{}"],
                "prompt_ids": pa.array([[1, 2], [3]], pa.list_(pa.int32())),
            }
        )
        query = name | {"timeout_seconds": "20"}
        return api.post("/v1/jobs/new/prompts", content=write_stream(batch), headers=ARROW, params=query)

    try:
        answer = put()
        assert answer.status_code == 201, answer.text
        groups = answer.json()["groups"]
        assert len(groups) == 2
        assert put().json()["groups"] == groups  # a put that is repeated happens once
    finally:
        api.post("/v1/jobs/new/workers/feeder/undrain")

    ids = [sample_id for group in groups for sample_id in group["sample_ids"]]
    assert len(ids) == 8

    def all_ended() -> bool:
        samples = [api.get(f"/v1/jobs/new/samples/{i}").json() for i in ids]
        return {sample["state"] for sample in samples} <= {"trained", "dropped"}

    wait_until(all_ended, process)
    first = api.get(f"/v1/jobs/new/samples/{ids[0]}").json()
    assert first["prompt"] == "What is 1 + 1?"
    assert first["events"][0]["message"].startswith("admitted in group")
    assert "outside" in first["events"][0]["message"]


def test_finished_samples_put_from_outside_are_trained_as_they_are(
    api: httpx.Client, going: tuple[Path, subprocess.Popen[str]]
) -> None:
    run_dir, process = going
    api.post("/v1/jobs/new/workers/feeder/drain")
    try:
        # With nothing new the learner comes to rest, so that what is of its version now is so when it is put.
        wait_until(lambda: at_rest(api), process)

        def put() -> httpx.Response:
            version = str(ControlClient(run_dir).status()["served"]["rollout-0"])
            rows = [
                {
                    "prompt": "What is 3 + 3?",
                    "prompt_columns": NUMBERS,
                    "prompt_ids": [7, 8, 9],
                    "response_ids": [6, 7],
                    "rollout_logprobs": [-0.5, -1.5],
                    "token_versions": [version, version],
                    "response": f"{place}",
                    "finish_reason": "stop",
                    "reward": float(place),
                    "reward_parts": {"digit_share": float(place)},
                }
                for place in range(4)
            ]
            return api.post("/v1/jobs/new/samples", json={"samples": rows, "timeout_seconds": 20})

        answer = put()
        assert answer.status_code == 201, answer.text
    finally:
        api.post("/v1/jobs/new/workers/feeder/undrain")
    (group,) = answer.json()["groups"]

    def trained() -> bool:
        return {api.get(f"/v1/jobs/new/samples/{i}").json()["state"] for i in group["sample_ids"]} == {"trained"}

    wait_until(trained, process)
    last = api.get(f"/v1/jobs/new/samples/{group['sample_ids'][3]}").json()
    assert (last["response"], last["reward"], last["reward_parts"]) == ("3", 3.0, {"digit_share": 3.0})


def at_rest(api: httpx.Client) -> bool:
    """Whether every worker has nothing to do but to wait for prompts."""
    queue = api.get("/v1/jobs/new/queue").json()
    served, states = queue["served"]["rollout-0"], queue["states"]
    return bool(served == queue["learner"] and sum(states.values()) == states["training"] + states["rewarded"] < 16)


@pytest.mark.parametrize("form", ["json", "arrow"])
def test_a_consumer_outside_does_a_stage_while_its_worker_is_drained(tmp_path: Path, form: str) -> None:
    run_dir = tmp_path / "run"
    with endless_run(run_dir, UNHURRIED) as process, service(job=run_dir) as api:
        api.post("/v1/jobs/job/workers/reward/drain")
        scored: dict[int, float] = {}
        at = step_of(run_dir)
        while step_of(run_dir) < at + 3:
            assert process.poll() is None
            scored |= score(api, form)
        api.post("/v1/jobs/job/workers/reward/undrain")
        stop(run_dir, process)

        assert audit(run_dir).ok
        samples = [api.get(f"/v1/jobs/job/samples/{i}").json() for i in list(scored)[:8]]
    assert scored
    for sample in samples:
        assert sample["reward"] == pytest.approx(scored[sample["id"]])
        assert any("external/judge brought reward" in event["message"] for event in sample["events"])


def score(api: httpx.Client, form: str) -> dict[int, float]:
    """Take what is ready for the reward stage, and bring rewards: the length of the text."""
    asked = {"worker": "judge", "max_samples": 8, "timeout_seconds": 0.5}
    accept = {"accept": MEDIA_TYPE} if form == "arrow" else {}
    answer = api.post("/v1/jobs/job/stages/reward/leases", json=asked, headers=accept)
    if form == "json":
        lease = answer.json()
        if lease["lease_id"] is None:
            return {}
        rewards = {one["sample_id"]: float(len(one["response"])) for one in lease["samples"]}
        rows = [{"sample_id": i, "reward": reward, "reward_parts": {}} for i, reward in rewards.items()]
        renewed = api.post(f"/v1/jobs/job/leases/{lease['lease_id']}/renew", json={"ttl_seconds": 30})
        assert renewed.json()["deadline"] > "2020"
        brought = api.post(f"/v1/jobs/job/leases/{lease['lease_id']}/ack", json={"samples": rows})
    else:
        if answer.status_code == 204:
            return {}
        batch = read_stream(answer.content)
        ids = batch.column("sample_id").to_pylist()
        rewards = {i: float(len(text)) for i, text in zip(ids, batch.column("response").to_pylist(), strict=True)}
        result = pa.RecordBatch.from_pydict(
            {
                "sample_id": pa.array(ids, pa.int64()),
                "reward": pa.array(list(rewards.values()), pa.float32()),
                "reward_parts": ["{}"] * len(ids),
            }
        )
        lease_id = answer.headers["x-lease-id"]
        brought = api.post(f"/v1/jobs/job/leases/{lease_id}/ack", content=write_stream(result), headers=ARROW)
    assert brought.status_code == 200, brought.text
    assert brought.json()["samples"] == len(rewards)
    return rewards


def test_samples_that_are_given_back_come_again_and_a_lease_has_one_end(
    api: httpx.Client, process: subprocess.Popen[str]
) -> None:
    api.post("/v1/jobs/new/workers/reward/drain")
    try:
        ready = {"worker": "judge", "max_samples": 1, "timeout_seconds": 20}
        lease = api.post("/v1/jobs/new/stages/reward/leases", json=ready).json()
        (sample,) = lease["samples"]
        back = {"sample_ids": [sample["sample_id"]], "reason": "I have changed my mind"}

        assert api.post(f"/v1/jobs/new/leases/{lease['lease_id']}/nack", json=back).json()["samples"] == 1

        refused(api.post(f"/v1/jobs/new/leases/{lease['lease_id']}/nack", json=back), 409, "lease_lost")
        refused(api.post(f"/v1/jobs/new/leases/{lease['lease_id']}/renew", json={}), 409, "lease_lost")
        # Earlier ones may have become ready meanwhile, and go first.
        again = api.post("/v1/jobs/new/stages/reward/leases", json=ready | {"max_samples": 64}).json()
        attempts = {one["sample_id"]: one["attempt"] for one in again["samples"]}
        assert attempts[sample["sample_id"]] == 2
        api.post(f"/v1/jobs/new/leases/{again['lease_id']}/nack", json=back | {"sample_ids": list(attempts)})
    finally:
        api.post("/v1/jobs/new/workers/reward/undrain")
    events = api.get(f"/v1/jobs/new/samples/{sample['sample_id']}").json()["events"]
    assert any("I have changed my mind" in event["message"] for event in events)


def test_a_lease_of_the_runs_own_workers_is_nobody_elses(api: httpx.Client, process: Any) -> None:
    leases: list[dict[str, Any]] = []

    def found() -> bool:
        leases[:] = api.get("/v1/jobs/new/queue").json()["leases"]
        return bool(leases)

    wait_until(found, process)
    back = {"sample_ids": [0], "reason": "mine"}
    for lease in leases:
        refused(api.post(f"/v1/jobs/new/leases/{lease['id']}/nack", json=back), 409, "lease_lost")


GOOD = {"prompt": "What is 1 + 1?"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompts": []}, "at least 1"),
        ({"prompts": [GOOD], "more": 1}, "Extra inputs"),
        ({"prompts": [{"prompt": 5}]}, "neither text nor chat messages"),
        ({"prompts": [{"prompt": []}]}, "neither text nor chat messages"),
        ({"prompts": [{"prompt": [{"role": "user"}]}]}, "neither text nor chat messages"),
        ({"prompts": [{"prompt_ids": [1]}]}, "neither text nor chat messages"),
        ({"prompts": [GOOD | {"prompt_ids": ["a"]}]}, "prompt_ids of prompt 0"),
        ({"prompts": [GOOD | {"prompt_ids": [None]}]}, "prompt_ids of prompt 0"),
        ({"prompts": [GOOD | {"prompt_ids": [1 << 40]}]}, "prompt_ids of prompt 0"),
        ({"prompts": [GOOD | {"prompt_ids": [1 << 30]}]}, "a token that there is not"),
        ({"prompts": [GOOD | {"prompt_ids": [-1]}]}, "below 0"),
        ({"prompts": [GOOD | {"prompt_ids": [1] * 100_000}]}, "this run takes at most"),
        ({"prompts": [GOOD | {"prompt_columns": "x"}]}, "prompt_columns of prompt 0"),
        ({"prompts": [GOOD | {"reward": 1.0}]}, "'reward', which is not expected"),
        ({"prompts": [GOOD], "timeout_seconds": 1000}, "less than or equal to 30"),
        ({"prompts": [GOOD], "put": {"producer": "a/b", "sequence": 1}}, "pattern"),
        ({"prompts": [GOOD] * 5000}, "at most 4096"),
    ],
)
def test_prompts_that_make_no_sense_are_refused_in_a_sentence(
    api: httpx.Client, body: dict[str, Any], says: str
) -> None:
    answer = refused(api.post("/v1/jobs/new/prompts", json=body), 422, "invalid_request")

    assert says in answer["detail"]


FINISHED = {
    "prompt": "x",
    "prompt_ids": [1],
    "response_ids": [2, 3],
    "rollout_logprobs": [-1.0, -1.0],
    "token_versions": ["0.0", "0.0"],
    "response": "y",
    "finish_reason": "stop",
}


@pytest.mark.parametrize(
    ("change", "rows", "says"),
    [
        ({"token_versions": ["0.0"]}, 4, "the same number of tokens"),
        ({"token_versions": [0, 0]}, 4, "token_versions of sample 0"),
        ({"token_versions": ["a.b", "0.0"]}, 4, "token_versions of sample 0"),
        ({"rollout_logprobs": "x"}, 4, "rollout_logprobs of sample 0"),
        ({"rollout_logprobs": [-1.0, -1e39]}, 4, "not finite"),
        ({"response_ids": [], "rollout_logprobs": [], "token_versions": []}, 4, "is empty"),
        ({"reward": 1.0}, 4, "samples are put with all columns"),
        ({}, 3, "not whole groups of 4"),
    ],
)
def test_samples_that_make_no_sense_are_refused_in_a_sentence(
    api: httpx.Client, change: dict[str, Any], rows: int, says: str
) -> None:
    body = {"samples": [FINISHED | change] * rows, "timeout_seconds": 20}  # some of it only shows when there is room

    assert says in refused(api.post("/v1/jobs/new/samples", json=body), 422, "invalid_request")["detail"]


def test_tokens_of_a_policy_that_there_was_never_are_refused(api: httpx.Client) -> None:
    body = {"samples": [FINISHED | {"token_versions": ["0.999999", "0.999999"]}] * 4, "timeout_seconds": 20}

    refused(api.post("/v1/jobs/new/samples", json=body), 409, "illegal_transition")


def compressed(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


PROMPT = pa.RecordBatch.from_pydict({"prompt": ['"x"'], "prompt_columns": ["{}"], "prompt_ids": [[1]]})


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (compressed(PROMPT), ARROW, 422, "invalid_request"),
        (write_stream(PROMPT)[:-40], ARROW, 422, "invalid_request"),
        (b"", ARROW, 422, "invalid_request"),
        (b"\xff" * 100, ARROW, 422, "invalid_request"),
        (write_stream(PROMPT.rename_columns(["prompt", "prompt_columns", "evil"])), ARROW, 422, "invalid_request"),
        (
            write_stream(pa.RecordBatch.from_pydict({"prompt": pa.array(["x"]).dictionary_encode()})),
            ARROW,
            422,
            "invalid_request",
        ),
        (gzip.compress(write_stream(PROMPT)), ARROW | {"content-encoding": "gzip"}, 415, "compressed"),
        (b"{}", {"content-type": "text/plain"}, 415, "media_type"),
        (b"{", {"content-type": "application/json"}, 422, "invalid_request"),
        (write_stream(PROMPT.set_column(0, "prompt", pa.array(["x"]))), ARROW, 422, "invalid_request"),
    ],
    ids=[
        "zstd",
        "torn",
        "empty",
        "noise",
        "unknown column",
        "dictionary",
        "gzip",
        "text",
        "no json",
        "text in a column",
    ],
)
def test_bodies_that_cannot_be_trusted_are_refused_before_they_are_used(
    api: httpx.Client, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    before = api.get("/v1/jobs/new/queue").json()["counts"]["quarantined"]

    refused(api.post("/v1/jobs/new/prompts", content=content, headers=headers), status, code)

    assert api.get("/v1/jobs/new/queue").json()["counts"]["quarantined"] == before


def test_a_body_that_unpacks_to_very_much_is_refused_unpacked(api: httpx.Client) -> None:
    zeros = pa.RecordBatch.from_pydict({"prompt_ids": pa.array([[0] * (1 << 22)], pa.list_(pa.int32()))})
    bomb = compressed(zeros)
    assert len(bomb) < 1 << 16

    detail = refused(api.post("/v1/jobs/new/prompts", content=bomb, headers=ARROW), 422, "invalid_request")["detail"]

    assert "compressed" in detail


def test_the_learners_stage_and_ended_runs_give_nothing_out(api: httpx.Client) -> None:
    asked = {"worker": "w"}
    assert (
        "learner's"
        in refused(api.post("/v1/jobs/new/stages/actor_update/leases", json=asked), 422, "invalid_request")["detail"]
    )
    refused(api.post("/v1/jobs/new/stages/judge/leases", json=asked), 422, "invalid_request")
    refused(api.post("/v1/jobs/old/stages/reward/leases", json=asked), 409, "run_not_live")
    refused(api.post("/v1/jobs/old/prompts", json={"prompts": [GOOD]}), 409, "run_not_live")
    refused(api.post("/v1/jobs/new/prompts", json={"prompts": [GOOD]}, headers={"x-scope": "read"}), 403,
            "scope_too_small")  # fmt: skip


def test_a_put_for_which_there_is_no_room_says_what_it_waits_for(api: httpx.Client, process: Any) -> None:
    api.post("/v1/jobs/new/workers/actor_update/drain")
    try:
        # What the learner had taken before may still make room, which puts and the feeder fill.
        def says_why() -> bool:
            answer = api.post("/v1/jobs/new/prompts", json={"prompts": [GOOD], "timeout_seconds": 0})
            if answer.is_success:
                return False
            assert answer.headers["retry-after"] == "1"
            return "bound" in refused(answer, 429, "no_room")["detail"]

        wait_until(says_why, process)
    finally:
        api.post("/v1/jobs/new/workers/actor_update/undrain")


# -- completions -------------------------------------------------------------------------------------------------------


def test_completions_have_the_shape_that_openais_clients_expect(api: httpx.Client) -> None:
    asked = {"model": "new", "prompt": ["1 + 1 =", "2 + 2 ="], "max_tokens": 4, "n": 2, "logprobs": 1, "seed": 7}

    body = api.post("/v1/completions", json=asked).json()
    again = api.post("/v1/completions", json=asked | {"model": "x"}, headers={"x-asyncflow-job": "new"}).json()

    assert body["object"] == "text_completion"
    assert body["model"] == "new"
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    for choice in body["choices"]:
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) > 0
        assert choice["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert body["system_fingerprint"].startswith("0.")
    assert again["model"] == "x"
    assert len(again["choices"]) == 4


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        ({"model": "new", "prompt": "x", "stream": True}, 422, "invalid_request"),
        ({"model": "new", "prompt": "x", "best_of": 2}, 422, "invalid_request"),
        ({"model": "new", "prompt": ""}, 422, "invalid_request"),
        ({"model": "new", "prompt": "x", "logprobs": 5}, 422, "invalid_request"),
        ({"model": "new", "prompt": "x", "max_tokens": 100_000}, 409, "not_possible_now"),
        ({"model": "new", "prompt": ["x"] * 16, "n": 16}, 422, "invalid_request"),
        ({"model": "other", "prompt": "x"}, 404, "no_such_job"),
        ({"model": "old", "prompt": "x"}, 409, "run_not_live"),
    ],
)
def test_completions_that_cannot_be_are_refused(
    api: httpx.Client, asked: dict[str, Any], status: int, code: str
) -> None:
    refused(api.post("/v1/completions", json=asked), status, code)


# -- Prometheus --------------------------------------------------------------------------------------------------------

NAMES = {
    "asyncflow_queue_samples",
    "asyncflow_queue_bytes",
    "asyncflow_queue_oldest_age_seconds",
    "asyncflow_samples",
    "asyncflow_leases_active",
    "asyncflow_lease_expired",
    "asyncflow_sample_staleness_versions",
    "asyncflow_stage_time_seconds",
    "asyncflow_policy_version",
    "asyncflow_tokens",
    "asyncflow_http_request_duration_seconds",
}


def test_what_is_scraped_says_the_same_as_the_queue(api: httpx.Client, process: Any) -> None:
    api.get("/v1/jobs/new/samples/3")
    answer = api.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}

    assert answer.headers["content-type"].startswith("text/plain")
    assert families.keys() >= NAMES
    jobs = {sample.labels["job"] for sample in families["asyncflow_samples"].samples}
    assert jobs == {"old", "new"}  # what has not begun has nothing to tell
    old = {s.labels["event"]: s.value for s in families["asyncflow_samples"].samples if s.labels["job"] == "old"}
    counts = api.get("/v1/jobs/old/queue").json()["counts"]
    assert (old["admitted"], old["trained"]) == (counts["admitted"], counts["trained"])
    staleness = families["asyncflow_sample_staleness_versions"].samples
    trained = [s for s in staleness if s.name.endswith("_count") and s.labels == {"job": "old", "phase": "at_training"}]
    assert trained[0].value == counts["trained"]
    busy = [s.value for s in families["asyncflow_stage_time_seconds"].samples if s.labels["state"] == "busy"]
    assert max(busy) > 0
    routes = {s.labels["route"] for s in families["asyncflow_http_request_duration_seconds"].samples}
    assert "/v1/jobs/{job_id}/samples/{sample_id}" in routes
    assert not any("/new" in route for route in routes)


def test_labels_of_requests_are_bounded_whatever_clients_write(api: httpx.Client) -> None:
    for place in range(20):
        api.get(f"/nothing/{place}")
    api.request("BREW", "/metrics")

    families = text_string_to_metric_families(api.get("/metrics").text)
    found = next(family for family in families if family.name == "asyncflow_http_request_duration_seconds")
    labels = {(s.labels["route"], s.labels["method"]) for s in found.samples}

    assert not any(route.startswith("/nothing") for route, _ in labels)
    assert ("none", "GET") in labels
    assert not any(method == "BREW" for _, method in labels)
