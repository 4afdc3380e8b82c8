"""The parts of the control plane that need no process: states, database, events, allow-lists, secrets, logs."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from asyncflow_api.jobs.database import Changed, Database, KeyReused, NoSuchJob
from asyncflow_api.jobs.events import Cursor, merge
from asyncflow_api.jobs.folder import Exit, JobFolder
from asyncflow_api.jobs.lifecycle import ENDED, LIVE, TRANSITIONS, IllegalMove, State, check
from asyncflow_api.jobs.log import LogReader
from asyncflow_api.jobs.policy import RULES, VLLM_OPTIONS, refusals
from asyncflow_api.jobs.redaction import Redactor
from asyncflow_api.jobs.rows import NewJob, Once
from asyncflow_api.jobs.service import Jobs
from asyncflow_api.jobs.tail import Tail
from asyncflow_api.jobs.validator import field_of
from asyncflow_api.settings import Settings
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from asyncflow.clock import ManualClock
from asyncflow.config import Config, parse_config
from asyncflow.errors import UserError
from tests.conftest import ROOT
from tests.processes import wait_until
from tests.running_service import tiny

NEW = NewJob(name="run", config=tiny(), labels={})


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "service.sqlite", clock=ManualClock(1000.0))
    yield database
    database.close()


# -- states ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "to"), [*product(State, State)])
def test_a_move_is_possible_exactly_where_the_table_has_it(at: State, to: State) -> None:
    if (at, to) in TRANSITIONS:
        check(at, to)
    else:
        with pytest.raises(IllegalMove, match=f"the job is {at} and cannot become {to}"):
            check(at, to)


def test_nothing_leaves_an_end_and_everything_else_can_reach_one() -> None:
    ways = {at: {there for here, there in TRANSITIONS if here is at} for at in State}

    assert {at for at in State if not ways[at]} == ENDED
    assert all(ways[at] & ENDED for at in State if at not in ENDED)
    assert {State.validating, State.queued} | LIVE | ENDED == set(State)


def test_the_page_about_jobs_has_every_move_of_the_table() -> None:
    table = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\w+) \|", (ROOT / "docs" / "jobs.md").read_text(), re.MULTILINE)

    assert {(State(at), State(to)): who for at, to, who in table} == TRANSITIONS


# -- database ----------------------------------------------------------------------------------------------------------


def test_a_job_is_there_after_the_service_was_killed(tmp_path: Path) -> None:
    first = Database(tmp_path / "service.sqlite")
    job, _ = first.add(NEW)
    second = Database(tmp_path / "service.sqlite")  # the first one never closed

    assert second.get(job.id) == job
    assert second.next_queued() is None
    assert [event.type for event in second.events(job.id, after=0, limit=9)] == ["state"]
    first.close()
    second.close()


def test_an_idempotency_key_gives_the_same_job_and_refuses_another_body(database: Database) -> None:
    once = Once(key="k", owner="tok_1", digest="a")

    job, again = database.add(NEW, once=once)

    assert not again
    assert database.add(NEW, once=once) == (job, True)
    with pytest.raises(KeyReused):
        database.add(NEW, once=Once(key="k", owner="tok_1", digest="b"))
    other, again = database.add(NEW, once=Once(key="k", owner="tok_2", digest="a"))  # keys are their owner's
    assert (other.id != job.id, again) == (True, False)
    assert len(database.jobs()) == 2


def test_the_next_job_is_of_the_highest_priority_and_of_those_the_oldest(database: Database) -> None:
    ids = []
    for priority in (50, 80, 80, 10):
        job, _ = database.add(NewJob(name="run", config={}, labels={}, priority=priority))
        database.move(job.id, State.queued, message="planned")
        ids.append(job.id)

    order = []
    while (job := database.next_queued()) is not None:
        order.append(job.id)
        database.move(job.id, State.starting, message="go")

    assert order == [ids[1], ids[2], ids[0], ids[3]]


def test_a_change_of_what_has_changed_is_refused(database: Database) -> None:
    job, _ = database.add(NEW)
    changed = database.change(job.id, {"priority": 7}, revision=job.revision, told={"priority": 7})

    assert (changed.priority, changed.revision) == (7, job.revision + 1)
    with pytest.raises(Changed, match=f"revision {changed.revision} by now, not {job.revision}"):
        database.change(job.id, {"priority": 8}, revision=job.revision, told={"priority": 7})
    assert database.get(job.id) == changed


def test_an_illegal_move_leaves_the_job_and_its_events_alone(database: Database) -> None:
    job, _ = database.add(NEW)

    with pytest.raises(IllegalMove):
        database.move(job.id, State.running, message="no")

    assert database.get(job.id) == job
    assert len(database.events(job.id, after=0, limit=9)) == 1


def test_only_a_job_that_has_ended_can_be_deleted(database: Database) -> None:
    job, _ = database.add(NEW)
    with pytest.raises(UserError, match="cancel it first"):
        database.delete(job.id)
    database.move(job.id, State.cancelled, message="cancelled")

    database.delete(job.id)

    with pytest.raises(NoSuchJob):
        database.get(job.id)
    assert [event.type for event in database.all_events(after=0, limit=9)] == ["deleted"]


def test_jobs_are_found_by_state_and_label(database: Database) -> None:
    for labels in ({"team": "a"}, {"team": "b", "x.y": "1"}, {}):
        database.add(NewJob(name="run", config={}, labels=labels))

    assert len(database.jobs(labels=[("team", None)])) == 2
    assert [job.labels["team"] for job in database.jobs(labels=[("team", "b"), ("x.y", "1")])] == ["b"]
    assert database.jobs(states=[State.failed]) == []
    assert database.jobs(labels=[("team' OR 1=1 --", None)]) == []


# -- events ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=30), st.integers(1, 7), st.integers(0, 30))
def test_whoever_comes_back_with_a_cursor_gets_everything_once(
    happened: list[tuple[bool, int]], limit: int, already: int
) -> None:
    """Some of it was there at the first look and the rest came later, whatever the times are."""
    from asyncflow_api.jobs.rows import EventRow

    own: list[EventRow] = []
    lines: list[dict[str, Any] | None] = []
    told: list[str] = []
    places: list[int] = []
    at = Cursor()
    for number, (mine, time) in enumerate(happened):
        if mine:
            own.append(
                EventRow(seq=number, job_id="j", n=len(own) + 1, created_at=time, type="state", level="info",
                         message=f"own {len(own) + 1}", data={})
            )  # fmt: skip
        else:
            lines.append({"kind": "step", "at": float(time), "step": len(lines) + 1} if time else None)
        if number >= already:
            found, at = merge("j", at, own[at.own : at.own + limit], lines[at.lines : at.lines + limit], limit)
            told += [event.message for event in found]
            places += [sum(map(int, event.id.split("."))) for event in found]
    while True:
        found, after = merge("j", at, own[at.own : at.own + limit], lines[at.lines : at.lines + limit], limit)
        if after == at:
            break
        assert len(found) <= limit
        assert not found or found[-1].id == str(after)
        told += [event.message for event in found]
        places += [sum(map(int, event.id.split("."))) for event in found]
        at = after

    assert places == list(range(1, len(happened) + 1)), "a gap would be seen"
    steps = [f"step {line['step']}: reward unknown" for line in lines if line is not None]
    assert [text for text in told if text.startswith("own")] == [f"own {n + 1}" for n in range(len(own))]
    assert [text for text in told if text.startswith("step")] == steps


@pytest.mark.parametrize("text", ["", "1", "1.", ".1", "a.b", "1.2.3", "-1.2", "1.²", "9" * 19 + ".1", "1." + "9" * 19])
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not the id of an event"):
        Cursor.parse(text)


def test_a_tail_gives_complete_lines_by_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert (tail.lines(0, 5), tail.size()) == ([], 0)

    path.write_text('{"a": 1}\n{"a": 2}\nnot json\n{"a"')
    assert tail.lines(0, 5) == [{"a": 1}, {"a": 2}, None]
    with path.open("a") as file:
        file.write(": 4}\n")

    assert tail.lines(1, 2) == [{"a": 2}, None]
    assert tail.lines(3, 5) == [{"a": 4}]
    assert tail.lines(4, 5) == tail.lines(99, 5) == []
    assert tail.count() == Tail(path).count() == 4


# -- a folder, whatever became of its process -----------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", slots=1)


def left(settings: Settings, state: State) -> JobFolder:
    """What a service that was killed left: one job in a state, and its folder."""
    settings.home.mkdir()
    database = Database(settings.database)
    job, _ = database.add(NEW)
    for to in (State.queued, State.starting, State.running, state):
        if database.get(job.id).state is not state:
            database.move(job.id, to, message="moved")
    database.close()
    folder = JobFolder(settings.jobs_dir / job.id)
    folder.path.mkdir(parents=True)
    return folder


def becomes(settings: Settings, folder: JobFolder, state: State) -> Any:
    jobs = Jobs(settings)
    try:
        jobs.start()
        wait_until(lambda: jobs.get(folder.path.name).state is state)
        return jobs.get(folder.path.name)
    finally:
        jobs.close()


@pytest.mark.parametrize(
    ("outcome", "state"),
    [("finished", State.succeeded), ("failed", State.failed), ("stopped", State.cancelled)],
)
def test_a_job_that_ended_while_nobody_looked_has_ended_so(settings: Settings, outcome: Any, state: State) -> None:
    folder = left(settings, State.running)
    folder.add_start()
    folder.end(Exit(outcome=outcome, code="c", message="as it said"))

    job = becomes(settings, folder, state)

    assert job.starts == 1
    assert (job.reason is None) == (state is State.succeeded)


def test_a_job_that_was_killed_says_so_and_can_be_resumed(settings: Settings) -> None:
    folder = left(settings, State.running)
    folder.add_start()

    job = becomes(settings, folder, State.failed)

    assert job.reason is not None
    assert job.reason.code == "killed"
    assert "resume_from" in job.reason.message


def test_a_job_whose_process_never_began_waits_for_a_slot_again(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", slots=0)  # and none is free
    folder = left(settings, State.starting)

    job = becomes(settings, folder, State.queued)

    assert (job.starts, job.started_at) == (0, None)


def test_a_job_that_is_about_to_begin_is_not_started_again(settings: Settings) -> None:
    """The service died between the start of the process and its first line."""
    folder = left(settings, State.starting)
    lock = folder.lock()
    assert lock is not None
    jobs = Jobs(settings)
    try:
        jobs.start()
        folder.add_start()
        folder.end(Exit(outcome="finished", code="finished", message="done"))
        os.close(lock)
        wait_until(lambda: jobs.get(folder.path.name).state is State.succeeded)
        assert jobs.get(folder.path.name).starts == 1
        assert not (folder.path / "config.json").exists()  # which is written before a process is started
    finally:
        jobs.close()


def test_a_cancelled_job_that_never_began_never_begins(settings: Settings) -> None:
    folder = left(settings, State.cancelling)

    assert becomes(settings, folder, State.cancelled).starts == 0


def test_a_job_whose_process_lives_is_left_to_it(settings: Settings) -> None:
    folder = left(settings, State.running)
    lock = folder.lock()  # by this process, which is somebody else's
    assert lock is not None
    jobs = Jobs(settings)
    try:
        jobs.start()
        assert folder.lock() is None
        assert jobs.get(folder.path.name).state is State.running
        folder.add_start()
        folder.end(Exit(outcome="finished", code="finished", message="done"))
        os.close(lock)
        wait_until(lambda: jobs.get(folder.path.name).state is State.succeeded)
    finally:
        jobs.close()


def test_a_home_has_one_service(settings: Settings) -> None:
    jobs = Jobs(settings)
    with pytest.raises(UserError, match="another service uses"):
        Jobs(settings)
    jobs.close()
    jobs.close()

    Jobs(settings).close()


# -- what a configuration may name -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"reward": "os:system"}, "reward.0.use"),
        ({"reward": ["digit_share", {"use": "my.rewards:f"}]}, "reward.1.use"),
        ({"reward": "allowedly.more:f"}, "reward.0.use"),
        ({"rollout": {"engine": "subprocess:Popen"}}, "rollout.engine"),
        ({"learner": {"engine": "a.b:C"}}, "learner.engine"),
        ({"model": "/etc"}, "model"),
        ({"model": "../model"}, "model"),
        ({"model": "http://169.254.169.254/latest"}, "model"),
        ({"data": {"train": "/etc/passwd"}}, "data.train"),
        ({"data": {"train": "ALLOWED/../../etc/passwd"}}, "data.train"),
        ({"data": {"train": "ALLOWED/link.jsonl"}}, "data.train"),
        ({"data": {"train": "~/secrets.jsonl"}}, "data.train"),
        ({"data": {"train": "reasoning_gym:chain_sum", "eval": "file:///etc/passwd", "eval_size": 2}}, "data.eval"),
        ({"data": {"train": "reasoning_gym:chain_sum", "template": "{a.__class__}"}}, "data.template"),
        ({"data": {"train": "reasoning_gym:chain_sum", "template": "{a:>999999999}"}}, "data.template"),
        ({"rollout": {"engine": "fake", "options": {"worker_cls": "Evil"}}}, "rollout.options.worker_cls"),
        (
            {"rollout": {"engine": "fake", "options": {"logits_processors": ["my.module:Class"]}}},
            "rollout.options.logits_processors.0",
        ),
        ({"rollout": {"engine": "vllm", "options": {"worker_cls": "Evil"}}}, "rollout.options.worker_cls"),
        (
            {"rollout": {"engine": "vllm", "options": {"kv_events_config": {"port": 1}}}},
            "rollout.options.kv_events_config",
        ),
        ({"rollout": {"engine": "vllm", "options": {"master_addr": "elsewhere"}}}, "rollout.options.master_addr"),
        ({"rollout": {"engine": "vllm", "options": {"model": "tiny"}}}, "rollout.options.model"),
        ({"rollout": {"engine": "fake", "options": {"trust_remote_code": True}}}, "rollout.options.trust_remote_code"),
        ({"rollout": {"engine": "fake", "options": {"a": [{"b": "http://10.0.0.1/"}]}}}, "rollout.options.a.0.b"),
        ({"rollout": {"engine": "fake", "options": {"download_dir": "/root"}}}, "rollout.options.download_dir"),
        ({"learner": {"options": {"hook": "os.system"}}}, "learner.options.hook"),
        ({"run_dir": "/tmp/x"}, "run_dir"),
    ],
)
def test_what_the_allow_lists_do_not_cover_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    allowed = tmp_path / "data"
    allowed.mkdir()
    (allowed / "link.jsonl").symlink_to("/etc/passwd")
    settings = Settings(home=tmp_path, allow_imports=("allowed", "pkg.mod"), allow_paths=(allowed,))
    text = json.dumps(tiny(**changes)).replace("ALLOWED", str(allowed))

    found = refusals(parse_config(json.loads(text)), settings)

    assert [one.field for one in found] == [field]
    assert len(found[0].message) < 400


def test_what_they_cover_is_let_through(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("")
    settings = Settings(
        home=tmp_path, allow_imports=("allowed", "pkg.mod"), allow_paths=(tmp_path,), allow_options=("lora_dtype",)
    )
    config = tiny(
        model=str(tmp_path),
        reward=["allowed:f", "pkg.mod.sub:g", "digit_share"],
        data={"train": str(tmp_path / "x.jsonl"), "template": "What is {question}?"},
        rollout={"engine": "vllm", "options": {"dtype": "auto", "enforce_eager": True, "lora_dtype": "float16"}},
    )

    assert refusals(parse_config(config), settings) == []


@pytest.mark.parametrize(
    ("patterns", "model", "allowed"),
    [
        ((), "Qwen/Qwen2.5-0.5B", False),
        ((), "smollm2-135m", True),
        (("Qwen/*",), "Qwen/Qwen2.5-0.5B", True),
        (("Qwen/*",), "qwen/Qwen2.5-0.5B", False),
        (("Qwen/*",), "Qwenx/Qwen2.5-0.5B", False),
        (("org/one", "Qwen/*-0.5B"), "Qwen/Qwen2.5-0.5B", True),
        (("org/one", "Qwen/*-0.5B"), "Qwen/Qwen2.5-7B", False),
        (("*",), "any/model", True),
        (("*",), "../up", False),
        (("*",), "http://any/model", False),
        (("*",), "/etc", False),
    ],
)
def test_a_model_of_the_hub_is_one_that_the_service_allows(
    tmp_path: Path, patterns: tuple[str, ...], model: str, allowed: bool
) -> None:
    settings = Settings(home=tmp_path, allow_models=patterns)
    reference = {"engine": "torch", "model": model}

    assert (refusals(parse_config(tiny(model=model)), settings) == []) is allowed
    found = refusals(parse_config(tiny(model="tiny", reference=reference)), settings)
    assert [one.field for one in found] == ([] if allowed else ["reference.model"])
    assert all("--allow-" in one.message or "no path" in one.message for one in found)


def test_what_looks_like_a_file_in_an_allowed_folder_is_no_way_to_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(home=tmp_path, allow_paths=(tmp_path,))

    found = refusals(
        parse_config(tiny(rollout={"engine": "fake", "options": {"hook": "evil.module:Class", "file": "a.txt"}})),
        settings,
    )

    assert [one.field for one in found] == ["rollout.options.hook"]


def free_texts(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Settings that can be text which no list of words or numbers bounds."""
    for name, setting in section.model_fields.items():
        parts = list(parts_of(setting.annotation))
        inner = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        for one in inner:
            yield from free_texts(one, f"{prefix}{name}.")
        if not inner and any(part not in BOUNDED for part in parts):
            yield f"{prefix}{name}"


BOUNDED = (int, float, bool, type(None), ...)


def parts_of(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        return
    if get_args(annotation):
        for part in get_args(annotation):
            yield from parts_of(part)
    else:
        yield annotation


def test_every_setting_that_can_hold_any_text_has_a_rule() -> None:
    assert set(free_texts()) == RULES.keys(), "say in api/jobs/policy.py what it may name"


def test_settings_of_vllm_that_anybody_may_choose_are_words_and_numbers() -> None:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(spec.origin).parent / "engine" / "arg_utils.py").read_text()
    arguments = next(
        one for one in ast.parse(source).body if isinstance(one, ast.ClassDef) and one.name == "EngineArgs"
    )
    there = {ast.unparse(one.target) for one in arguments.body if isinstance(one, ast.AnnAssign)}

    assert there >= VLLM_OPTIONS
    assert not [
        name
        for name in VLLM_OPTIONS
        if re.search(
            r"path|dir|file|addr|(^|_)ip|port|url|hf_token|plugin|cls|class|(^|_)code|config|model$|weights", name
        )
    ]


@pytest.mark.parametrize(
    ("sentence", "field"),
    [
        ("rollout.engine: there is no engine 'x'", "rollout.engine"),
        ("data.options.min is not an option of reasoning_gym:chain_sum", "data.options.min"),
        ("max_new_tokens (9) leaves no room for a prompt", "max_new_tokens"),
        ("there is no file /data/x.jsonl: name one", "config"),
    ],
)
def test_the_setting_that_a_sentence_is_about_is_found(sentence: str, field: str) -> None:
    assert field_of(sentence) == field


# -- secrets and logs --------------------------------------------------------------------------------------------------

SECRET = {
    "max_new_tokens": 8,
    "rollout": {"options": {"api_key": "s3cret-value", "hf_token": "hf_abcdef", "password": 12345, "seed": 1}},
    "model": "https://user:hunter22@example.org/m",
}


def test_secrets_are_hidden_and_nothing_else_is() -> None:
    hide = Redactor(SECRET)

    assert hide.value(SECRET) == {
        "max_new_tokens": 8,
        "rollout": {"options": {"api_key": "***", "hf_token": "***", "password": "***", "seed": 1}},
        "model": "https://***@example.org/m",
    }
    assert hide.text("engine got s3cret-value, hunter22, hf_abcdef") == "engine got ***, ***, ***"
    assert Redactor({}).text("nothing to hide") == "nothing to hide"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"accessToken": "abcdef"}, {"accessToken": "***"}),
        ({"AWSSecret": "abcdef"}, {"AWSSecret": "***"}),
        ({"keys": ["ab", "abcdef"]}, {"keys": ["***", "***"]}),
        ({"auth": {"user": "me", "parts": [{"a": "b"}]}}, {"auth": {"user": "***", "parts": [{"a": "***"}]}}),
        ({"stop_tokens": [1, 2]}, {"stop_tokens": [1, 2]}),
        ({"tokenizer": "x", "monkey": "y", "author": "z"}, {"tokenizer": "x", "monkey": "y", "author": "z"}),
    ],
)
def test_what_is_secret_follows_from_its_name_and_from_those_above_it(given: Any, shown: Any) -> None:
    assert Redactor(given).value(given) == shown


def test_a_secret_is_hidden_in_every_form_in_which_it_is_written() -> None:
    hide = Redactor({"password": 'a<"b\\c'})

    for form in ('a<"b\\c', "a&lt;&quot;b\\c", 'a<\\"b\\\\c'):
        assert hide.text(f"with {form} in it") == "with *** in it"


def test_a_log_is_read_in_pieces_that_never_show_a_secret(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [f"line {n} with s3cret-value in it" for n in range(50)]
    path.write_text("\n".join(lines) + "\nunfinished s3cret-value")
    log = LogReader(path, Redactor(SECRET))
    shown = "".join(f"line {n} with *** in it\n" for n in range(50))

    at, text = 0, ""
    while True:
        piece, after = log.read(at, 100, ended=False)
        if after == at:
            break
        text, at = text + piece, after
    assert text == shown
    assert log.read(at, 100, ended=True)[0] == "unfinished ***"
    for offset in range(path.stat().st_size):
        assert "s3cret" not in log.read(offset, 1000, ended=True)[0].replace("line", "")
        assert "cret-value" not in log.read(offset, 1000, ended=True)[0]
    assert log.read(log.last_lines(3), 1000, ended=True)[0] == "".join(shown.splitlines(True)[-2:]) + "unfinished ***"


def test_a_log_has_nothing_behind_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("one\ntwo\n")

    assert LogReader(path, Redactor({})).read(1 << 50, 1000, ended=False) == ("", 8)


def test_a_line_without_end_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 300_000 + b"\nafter\n")
    log = LogReader(path, Redactor({}))

    at, text = 0, ""
    for _ in range(10):
        piece, at = log.read(at, 1 << 16, ended=True)
        text += piece

    assert text.endswith("after\n")
    assert len(text) < 1000
