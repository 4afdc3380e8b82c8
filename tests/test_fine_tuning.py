"""OpenAI's own client, as it is, against the service in a process of its own: files, and jobs made of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from asyncflow_api.files import Files
from asyncflow_api.jobs.database import Database
from asyncflow_api.jobs.service import Jobs
from asyncflow_api.problems import Problem
from asyncflow_api.settings import Settings
from openai.types.fine_tuning import FineTuningJob

from asyncflow.config import RewardConfig
from asyncflow.errors import ConfigError
from asyncflow.rewards import RewardInput, RewardOutput, load_reward
from asyncflow.types import Prompt
from tests.processes import DEADLINE, wait_until
from tests.running_service import RunningService, tiny

pytestmark = pytest.mark.timeout(900)  # each wait has its own deadline, and there are several

GRADER = {
    "type": "string_check",
    "name": "same",
    "input": "{{ sample.output_text }}",
    "reference": "{{item.answer}}",
    "operation": "ilike",
}
TINY: dict[str, Any] = {
    "rollout": {"engine": "fake", "max_concurrency": 16},
    "learner": {"engine": "fake"},
    "max_new_tokens": 8,
}
"""What OpenAI's API has no words for: the fake engines, which compute nothing."""
SLOW = TINY | {"rollout": {"engine": "fake", "max_concurrency": 16, "options": {"token_latency": 0.02}}}


def lines(first: int, count: int) -> bytes:
    """Problems with different prompts, and an answer that even random characters now and then contain."""
    rows = [
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": f"What is {n} + 1?"}],
         "answer": str((n + 1) % 10), "place": {"number": n}}
        for n in range(first, first + count)
    ]  # fmt: skip
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    service = RunningService(tmp_path_factory.mktemp("fine_tuning") / "home", "--slots", "2")
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service: RunningService) -> Iterator[openai.OpenAI]:
    token = (service.home / "token").read_text()
    url = f"{service.address['url']}/v1"
    with openai.OpenAI(api_key=token, base_url=url, max_retries=0, timeout=DEADLINE) as client:
        yield client


@pytest.fixture(scope="module")
def training_file(client: openai.OpenAI) -> str:
    return client.files.create(file=("train.jsonl", lines(0, 8)), purpose="fine-tune").id


@pytest.fixture(scope="module")
def validation_file(client: openai.OpenAI) -> str:
    return client.files.create(file=("valid.jsonl", lines(100, 2)), purpose="fine-tune").id


def reinforcement(grader: Any = None, **hyperparameters: Any) -> Any:
    return {
        "type": "reinforcement",
        "reinforcement": {"grader": grader or GRADER, "hyperparameters": hyperparameters},
    }


def wait_for(client: openai.OpenAI, service: RunningService, job_id: str, *statuses: str) -> FineTuningJob:
    """The job, once it is there; an end that is not among them fails the test."""
    found: list[FineTuningJob] = []

    def there() -> bool:
        job = client.fine_tuning.jobs.retrieve(job_id)
        assert job.status in statuses or job.status not in ("succeeded", "failed", "cancelled"), job.error
        found[:] = [job]
        return job.status in statuses

    wait_until(there, service.process)
    return found[0]


@pytest.fixture(scope="module")
def finished(client: openai.OpenAI, service: RunningService, training_file: str, validation_file: str) -> FineTuningJob:
    """A job that went through: two epochs of eight problems, four a step."""
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training_file,
        validation_file=validation_file,
        method=reinforcement(n_epochs=2, batch_size=4, compute_multiplier=0.5, eval_interval=2),
        suffix="adder",
        seed=7,
        metadata={"team": "a", "a longer note": "with spaces"},
        extra_body={"asyncflow": TINY},
    )
    return wait_for(client, service, job.id, "succeeded")


# Files


def test_a_file_is_kept_listed_and_given_back_to_the_byte(client: openai.OpenAI, service: RunningService) -> None:
    content = lines(200, 3)
    made = client.files.create(file=("../../etc/pa\u202esswd", content), purpose="fine-tune")

    assert (made.object, made.purpose, made.bytes, made.status) == ("file", "fine-tune", len(content), "processed")
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).content == content
    assert (service.home / "files" / made.id / "content.jsonl").read_bytes() == content
    assert client.files.list().data[0] == made
    assert abs(made.created_at - time.time()) < 60
    deleted = client.files.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "file")
    assert not (service.home / "files" / made.id).exists()
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            gone(made.id)


def test_files_come_in_pages_in_either_order(client: openai.OpenAI) -> None:
    ids = [client.files.create(file=lines(n, 1), purpose="fine-tune").id for n in range(5)]

    assert [file.id for file in client.files.list(limit=2)][:5] == ids[::-1]  # the client turns the pages
    assert [file.id for file in client.files.list(limit=3, order="asc")][-5:] == ids
    page = client.files.list(limit=2, after=ids[-1])
    assert ([file.id for file in page.data], page.has_more) == ([ids[3], ids[2]], True)
    assert client.files.list(purpose="batch").data == []
    for file_id in ids:
        client.files.delete(file_id)


GOOD = lines(0, 1)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it has no lines"),
        (b"\n \n", "it has no lines"),
        (GOOD + b"{'prompt': 1}\n", "line 2 is not taken: .* column 2: send valid JSON"),
        (GOOD + b'\n"text"\n', "line 3 is no object"),
        (GOOD + b'{"prompt": "\xff"}', "line 2 is not taken: it is not UTF-8"),
        (b'{"prompt": "a", "x": NaN}', "line 1 is not taken: NaN is no JSON"),
        (b'{"prompt": "a"' + b', "x": [' + b"[" * 40 + b"]" * 41 + b"}", "nested deeper than 32"),
        (b'{"answer": 1}', "line 1 must have either `messages` or a `prompt`"),
        (b'{"prompt": "a", "messages": []}', "line 1 must have either"),
        (b'{"messages": []}', "line 1: messages must be a list of objects"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', "line 1: the role of a message must be one of"),
        (b'{"messages": [{"role": "user", "content": [1]}]}', "line 1: the content of a message must be text"),
        (b'{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "line 1: messages have role and content"),
        (GOOD + b'{"messages": [{"role": "assistant", "content": "a"}]}', "line 2: the last message must be the user"),
        (GOOD + b'{"prompt": " "}', "the prompt in line 2 is empty"),
        (b'{"prompt": "a", "completions": 1}', "line 1 has completions, which is the name of something else"),
    ],
)
def test_a_file_is_refused_with_a_sentence_that_names_the_line(
    client: openai.OpenAI, service: RunningService, content: bytes, sentence: str
) -> None:
    before = sorted((service.home / "files").glob("*"))

    with pytest.raises(openai.BadRequestError, match=sentence) as refused:
        client.files.create(file=("x.jsonl", content), purpose="fine-tune")

    assert (refused.value.code, refused.value.param, refused.value.type) == (
        "invalid_file", "file", "invalid_request_error"
    )  # fmt: skip
    assert str(service.home) not in str(refused.value)
    assert sorted((service.home / "files").glob("*")) == before


def test_files_of_another_purpose_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="fine-tune") as refused:
        client.files.create(file=GOOD, purpose="batch")

    assert refused.value.param == "purpose"


# Jobs


def test_a_job_goes_from_its_file_to_its_end(finished: FineTuningJob, training_file: str, validation_file: str) -> None:
    assert finished.object == "fine_tuning.job"
    assert (finished.model, finished.seed, finished.error) == ("tiny", 7, None)
    assert (finished.training_file, finished.validation_file) == (training_file, validation_file)
    assert finished.metadata == {"team": "a", "a longer note": "with spaces"}
    assert finished.finished_at is not None
    assert finished.finished_at >= finished.created_at
    assert finished.estimated_finish is None
    assert finished.fine_tuned_model == f"ft:tiny:asyncflow:adder:{finished.id.removeprefix('ftjob-')}"
    assert finished.method is not None
    assert finished.method.reinforcement is not None
    assert finished.method.reinforcement.hyperparameters is not None
    chosen = finished.method.reinforcement.hyperparameters.model_dump()
    assert chosen == {
        "n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0, "compute_multiplier": 0.5,
        "eval_interval": 2, "eval_samples": 1, "reasoning_effort": "default",
    }  # fmt: skip
    assert finished.method.reinforcement.grader.model_dump() == GRADER


def test_it_is_the_same_job_as_the_services_own(
    client: openai.OpenAI, service: RunningService, finished: FineTuningJob
) -> None:
    job = service.job(finished.id.replace("ftjob-", "job_"))

    config = job["config"]
    assert (job["state"], job["name"]) == ("succeeded", "adder")
    assert job["labels"] == {"team": "a"}  # the other pair cannot be one
    assert (config["steps"], config["train_batch_size"], config["num_generations"]) == (4, 16, 4)
    assert (config["eval_every"], config["data"]["eval_size"], config["learning_rate"]) == (2, 2, 1e-5)
    assert config["reward"][0]["use"] == "string_check"
    assert job["summary"]["outcome"] == "finished"
    assert client.fine_tuning.jobs.retrieve(job["id"]).id == finished.id
    other = service.submit(tiny(max_new_tokens=100_000))
    with pytest.raises(openai.NotFoundError, match="under /v1/jobs"):
        client.fine_tuning.jobs.retrieve(other)


def test_events_are_told_the_newest_first_and_page_by_page(client: openai.OpenAI, finished: FineTuningJob) -> None:
    whole = client.fine_tuning.jobs.list_events(finished.id, limit=100)
    paged = list(client.fine_tuning.jobs.list_events(finished.id, limit=3))

    assert not whole.has_more
    assert paged == whole.data
    assert len({event.id for event in paged}) == len(paged) > 9
    assert {event.object for event in paged} == {"fine_tuning.job.event"}
    assert all(event.id.startswith("ftevent-") and event.level in ("info", "warn", "error") for event in paged)
    assert [event.created_at for event in paged] == sorted((e.created_at for e in paged), reverse=True)
    assert (paged[-1].message, paged[-1].type) == ("the job was submitted", "message")
    steps: list[Any] = [event.data for event in paged if event.type == "metrics"]
    assert [data["step"] for data in steps if data["type"] == "step"] == [4, 3, 2, 1]
    with pytest.raises(openai.BadRequestError, match="after"):
        client.fine_tuning.jobs.list_events(finished.id, after="nonsense")


def test_checkpoints_are_listed(client: openai.OpenAI, finished: FineTuningJob) -> None:
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(finished.id)

    assert (checkpoint.object, checkpoint.step_number) == ("fine_tuning.job.checkpoint", 4)
    assert checkpoint.fine_tuning_job_id == finished.id
    assert checkpoint.metrics.step == 4
    assert checkpoint.fine_tuned_model_checkpoint == f"{finished.fine_tuned_model}:ckpt-step-4"
    assert list(client.fine_tuning.jobs.checkpoints.list(finished.id, after=checkpoint.id)) == []


def test_a_job_is_paused_goes_on_and_is_cancelled(
    client: openai.OpenAI, service: RunningService, training_file: str
) -> None:
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training_file,
        method=reinforcement(n_epochs=1000, batch_size=1),
        extra_body={"asyncflow": SLOW},
    )
    assert job.status == "validating_files"
    assert 0 <= job.seed < 1 << 31

    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).estimated_finish is not None, service.process)
    running = client.fine_tuning.jobs.retrieve(job.id)
    assert running.status == "running"
    assert (running.estimated_finish or 0) >= int(time.time())
    with pytest.raises(openai.BadRequestError, match="wait until it has ended"):
        client.files.delete(training_file)
    client.fine_tuning.jobs.pause(job.id)
    wait_for(client, service, job.id, "paused")
    client.fine_tuning.jobs.resume(job.id)
    wait_for(client, service, job.id, "running")
    client.fine_tuning.jobs.cancel(job.id)
    ended = wait_for(client, service, job.id, "cancelled")
    assert ended.fine_tuned_model is None
    assert service.job(job.id.replace("ftjob-", "job_"))["starts"] == 1
    with pytest.raises(openai.BadRequestError, match="cancelled and cannot become") as refused:
        client.fine_tuning.jobs.pause(job.id)
    assert refused.value.code == "illegal_state"


def test_jobs_come_in_pages_and_by_metadata(
    client: openai.OpenAI, service: RunningService, finished: FineTuningJob, training_file: str
) -> None:
    made = [
        client.fine_tuning.jobs.create(
            model="tiny", training_file=training_file, method=reinforcement(), metadata={"n": str(n)},
            extra_body={"asyncflow": TINY | {"max_new_tokens": 100_000}},
        ).id
        for n in range(3)
    ]  # fmt: skip

    listed = [job.id for job in client.fine_tuning.jobs.list(limit=2)]
    assert listed[:3] == made[::-1]
    assert finished.id in listed
    assert len(set(listed)) == len(listed)
    page = client.fine_tuning.jobs.list(limit=1, after=made[2])
    assert ([job.id for job in page.data], page.has_more) == ([made[1]], True)
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "1"})] == [made[1]]
    with pytest.raises(openai.BadRequestError, match="there is no fine-tuning job"):
        client.fine_tuning.jobs.list(after="ftjob-x")
    failed = wait_for(client, service, made[0], "failed")  # its plan cannot be made
    assert failed.error is not None
    assert failed.error.code == "invalid_config"
    assert failed.error.param == "asyncflow.max_new_tokens"


# What is refused


def grader(**changes: Any) -> Any:
    return reinforcement(GRADER | changes)


@pytest.mark.parametrize(
    ("changes", "param", "sentence"),
    [
        ({"training_file": "file-none"}, "training_file", "POST /v1/files first"),
        ({"validation_file": "file-none"}, "validation_file", "POST /v1/files first"),
        ({"model": "/etc/passwd"}, "model", "not in a folder"),
        ({"suffix": "a b"}, "suffix", "match pattern"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "at most 16"),
        ({"method": openai.omit}, "method", "trains by reinforcement, and not supervised"),
        ({"method": {"type": "dpo"}}, "method", "trains by reinforcement, and not dpo"),
        ({"method": {"type": "reinforcement"}}, "method.reinforcement", "give it a grader"),
        ({"hyperparameters": {"n_epochs": 1}}, "hyperparameters", "supervised"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "there are none"),
        ({"method": reinforcement({"type": "python", "name": "x", "source": "1"})}, "grader.type", "it is code"),
        ({"method": reinforcement({"type": "text_similarity"})}, "grader.type", "none of its measures"),
        ({"method": reinforcement({"type": "score_model"})}, "grader.type", "judge"),
        ({"method": reinforcement({"type": "multi"})}, "grader.type", "formula"),
        ({"method": reinforcement({"type": "other"})}, "grader", "string_check"),
        ({"method": reinforcement({"type": "asyncflow", "name": "os:system"})}, "grader", "does not import"),
        ({"method": grader(operation="regex")}, "grader.operation", "string_check"),
        ({"method": grader(reference="{{item.nothing}}")}, "grader.reference", "not every line of file-"),
        ({"method": grader(reference="{{item.__class__.x}}")}, "grader.reference", "not every line"),
        ({"method": grader(input="{{ 7*7 }}")}, "grader.input", "nothing else"),
        ({"method": grader(input="{{ a{b }}")}, "grader.input", "nothing closes"),
        ({"method": grader(input="{{" + " " * 9000)}, "grader.input", "nothing closes"),
        ({"method": reinforcement(reasoning_effort="high")}, "reasoning_effort", "no such setting"),
        ({"method": reinforcement(eval_samples=4)}, "eval_samples", "one completion"),
        ({"method": reinforcement(eval_interval=4)}, "eval_interval", "name a validation_file"),
        ({"method": reinforcement(compute_multiplier=0.1)}, "compute_multiplier", "0.25 or more"),
        ({"method": reinforcement(n_epochs=0)}, "n_epochs", "greater than or equal to 1"),
        ({"extra_body": {"asyncflow": {"steps": 3}}}, "asyncflow.steps", "say it with .*n_epochs"),
        ({"extra_body": {"asyncflow": {"data": {"train": "/x"}}}}, "asyncflow.data.train", "say it with training"),
        ({"extra_body": {"asyncflow": {"run_dir": "/x"}}}, "asyncflow.run_dir", "the service's to choose"),
        ({"extra_body": {"asyncflow": {"max_stalenes": 1}}}, "asyncflow.max_stalenes", "did you mean max_staleness"),
        ({"extra_body": {"asyncflow": {"data": "x"}}}, "asyncflow.data", "section"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    client: openai.OpenAI, training_file: str, changes: dict[str, Any], param: str, sentence: str
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "training_file": training_file, "method": reinforcement()}

    with pytest.raises(openai.BadRequestError, match=sentence) as refused:
        client.fine_tuning.jobs.create(**(asked | changes))

    assert refused.value.param is not None
    assert param in refused.value.param
    assert refused.value.type == "invalid_request_error"


def test_a_creation_can_be_repeated_with_its_key(client: openai.OpenAI, training_file: str) -> None:
    asked: Any = {"model": "tiny", "training_file": training_file, "method": reinforcement(), "suffix": "once"}
    key = {"Idempotency-Key": "fine-tuning-1"}
    first = client.fine_tuning.jobs.create(**asked, extra_headers=key)

    again = client.fine_tuning.jobs.with_raw_response.create(**asked, extra_headers=key)

    assert (again.parse().id, again.parse().seed) == (first.id, first.seed)
    assert again.headers["idempotent-replayed"] == "true"
    assert [job.id for job in client.fine_tuning.jobs.list(limit=100)].count(first.id) == 1
    with pytest.raises(openai.BadRequestError, match="another body") as reused:
        client.fine_tuning.jobs.create(**(asked | {"suffix": "twice"}), extra_headers=key)
    assert reused.value.code == "idempotency_key_reused"
    client.fine_tuning.jobs.cancel(first.id)


def test_every_error_of_these_routes_has_the_shape_that_their_clients_know(
    client: openai.OpenAI, service: RunningService
) -> None:
    with pytest.raises(openai.AuthenticationError) as unknown:
        client.with_options(api_key="af_wrong").fine_tuning.jobs.list()
    assert (unknown.value.code, unknown.value.type) == ("wrong_token", "authentication_error")
    with pytest.raises(openai.NotFoundError, match="there is no fine-tuning job ftjob-x"):
        client.fine_tuning.jobs.retrieve("ftjob-x")
    reader = service.http.post("/v1/tokens", json={"name": "r", "scope": "read"}).json()["token"]
    with pytest.raises(openai.PermissionDeniedError) as denied:
        client.with_options(api_key=reader).files.create(file=GOOD, purpose="fine-tune")
    assert (denied.value.code, denied.value.type) == ("scope_too_small", "permission_error")

    def error(method: str, path: str, **more: Any) -> tuple[int, dict[str, Any]]:
        answer = service.http.request(method, path, **more)
        assert answer.headers["content-type"] == "application/json"
        assert answer.json().keys() == {"error"}
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        return answer.status_code, answer.json()["error"]

    assert error("GET", "/v1/fine_tuning/nothing")[0] == 404
    assert error("PUT", "/v1/files")[0] == 405
    assert error("POST", "/v1/files")[0] == 400
    assert error("POST", "/v1/fine_tuning/jobs", content=b"{")[1]["code"] == "bad_json"
    status, missing = error("POST", "/v1/fine_tuning/jobs", json={"model": "tiny"})
    assert (status, missing["param"], missing["code"]) == (400, "training_file", "invalid_request")
    assert error("GET", "/v1/fine_tuning/jobs?limit=0")[1]["param"] == "limit"
    own = service.http.get("/v1/jobs/none")
    assert own.headers["content-type"] == "application/problem+json"


def test_too_many_requests_are_told_in_the_same_shape(tmp_path: Path) -> None:
    service = RunningService(tmp_path / "home")
    try:
        url = service.address["url"]
        answers: list[httpx.Response] = []
        with httpx.Client(headers={"Authorization": "Bearer wrong"}) as stranger:
            wait_until(
                lambda: answers.append(stranger.get(f"{url}/v1/files")) or answers[-1].status_code == 429,  # type: ignore[func-returns-value]
                service.process,
            )
        assert answers[-1].json()["error"]["type"] == "rate_limit_error"
        assert int(answers[-1].headers["retry-after"]) >= 1
    finally:
        service.close()


# What it is made of


def test_there_is_room_for_so_many_files_and_so_many_bytes(tmp_path: Path) -> None:
    many = Settings(home=tmp_path / "many", max_files=1)
    large = Settings(home=tmp_path / "large", max_files_bytes=len(GOOD))
    for settings in (many, large):
        jobs = Jobs(settings)
        try:
            files = Files(jobs)
            kept = files.add("a", GOOD)
            with pytest.raises(Problem, match="delete some"):
                files.add("b", GOOD)
            files.delete(kept.id)
            assert files.add("c", GOOD).seq == 2
            (settings.files_dir / "file-left-behind.part").mkdir()
            files.tidy()
            assert len(list(settings.files_dir.iterdir())) == 1
        finally:
            jobs.close()


def test_a_home_that_knew_no_files_gets_them(tmp_path: Path) -> None:
    database = Database(tmp_path / "service.sqlite")
    with database.transaction() as db:
        db.execute("DROP TABLE files")
        db.execute("DROP TABLE fine_tuning")
    database.close()

    again = Database(tmp_path / "service.sqlite")

    assert again.files() == []
    assert again.requests(metadata={}, before=None, limit=1) == []
    again.close()


@pytest.mark.parametrize(
    ("operation", "completion", "value"),
    [
        ("eq", "A 7", 1.0), ("eq", "a 7", 0.0), ("ne", "A 7", 0.0), ("ne", "", 1.0),
        ("like", "so A 7.", 1.0), ("like", "so a 7.", 0.0), ("ilike", "so a 7.", 1.0), ("ilike", "7", 0.0),
    ],
)  # fmt: skip
def test_a_string_check_compares_what_its_templates_say(operation: str, completion: str, value: float) -> None:
    options = {"input": "{{sample.output_text}}", "reference": "A {{ item.place.number }}", "operation": operation}
    reward = load_reward([RewardConfig(use="string_check", options=options)])
    prompt = Prompt(messages="?", columns={"place": {"number": 7}, "operation": "a column", "input": "another"})

    (output,) = reward.score([RewardInput(prompt=prompt, completion=completion, completion_ids=[1])])

    assert isinstance(output, RewardOutput)
    assert output.parts == {"string_check": value}


def test_options_are_refused_where_there_are_none() -> None:
    for spec, sentence in (
        (RewardConfig(use="last_number", options={"a": 1}), "only string_check takes options"),
        (RewardConfig(use="string_check", options={"a": 1}), "a are not its options"),
        (RewardConfig(use="string_check"), "operation must be one of"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            load_reward([spec])
