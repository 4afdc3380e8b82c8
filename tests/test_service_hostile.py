"""Requests that mean harm, against a service in a process of its own: each is refused with a sentence, nothing is
started, read or called, and memory stays where it was."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.processes import DEADLINE, wait_until
from tests.running_service import tiny

MAX_GROWTH = 96 << 20
"""Bytes by which all of it together may let the service grow."""

ADDRESSES = (
    "http://127.0.0.1/",
    "http://localhost:22/",
    "http://[::1]/",
    "http://0.0.0.0/",
    "http://169.254.169.254/latest",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0177.0.0.1/",
    "http://127.1/",
    "http://[::ffff:127.0.0.1]/",
    "http://user:pw@10.0.0.1/",
    "https://metadata.google.internal/",
    "ftp://10.0.0.1/x",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_INFO",
    "dict://127.0.0.1:11211/stat",
    "ldap://127.0.0.1/",
    "jar:http://x!/",
    "s3://bucket/x",
    "gs://bucket/x",
    "hf://datasets/x/y",
    "//evil.example/x",
    "http:/\\evil.example",
    "http://evil.example\\@127.0.0.1/",
    "data:text/plain,x",
    "unix:///var/run/docker.sock",
    "http://①②⑦.0.0.1/",
    "HTTP://LOCALHOST/",
)
PATHS = (
    "/etc/passwd",
    "../../../etc/passwd",
    "....//....//etc/passwd",
    "/proc/self/environ",
    "/proc/self/fd/3",
    "/dev/zero",
    "/dev/stdin",
    "~/.ssh/id_rsa",
    "~root/x",
    "..",
    ".",
    "/",
    "./x.jsonl",
    "x/../../y.jsonl",
    "C:\\Windows\\x",
    "\\\\host\\share\\x",
    "%2e%2e%2fetc%2fpasswd",
    "..%c0%af..%c0%afetc/passwd",
    "a" * 5000,
    "x.jsonl\u0000.txt",
    "/run/x",
    "service.sqlite",
    "token",
    "./token",
    "$HOME/x",
    "`id`",
    "$(id).jsonl",
    "x;id",
    "-rf",
    "|id",
    "\n/etc/passwd",
)
IMPORTS = (
    "os:system",
    "subprocess:run",
    "builtins:eval",
    "importlib:import_module",
    "pty:spawn",
    "asyncflow_api.app:create_app",
    "os.path:join",
    "..os:system",
    "os:path.join",
    "__main__:x",
    ":",
    "a:",
    ":b",
    "os:system;id",
    "os:system:x",
    "tests.x:y",
    "asyncflow.runtime.local:run_local",
    "/tmp/x.py:f",
    "http://x/y.py:f",
    "os\u200b:system",
    "ｏｓ:system",
)


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """One request, and how it is to be refused."""

    name: str
    method: str = "POST"
    path: str = "/v1/jobs"
    content: bytes | None = None
    headers: dict[str, str | bytes] = field(default_factory=dict)
    statuses: tuple[int, ...] = (422,)
    field: str | None = None
    """That the answer names."""


def config(name: str, where: str, changes: dict[str, Any]) -> Hostile:
    body = json.dumps({"config": tiny(**changes)}).encode()
    return Hostile(name=f"{where}={name[:40]!r}", content=body, field=f"body.config.{where}")


def configurations() -> Iterator[Hostile]:
    for text in (*ADDRESSES, *PATHS):
        yield config(text, "data.train", {"data": {"train": text}})
    for text in (*ADDRESSES, *PATHS[:12]):
        yield config(text, "model", {"model": text})
    for text in IMPORTS:
        yield config(text, "reward.0.use", {"reward": text})
        yield config(text, "rollout.engine", {"rollout": {"engine": text}})
    for text in (*ADDRESSES[:8], *PATHS[:8], "os.system"):
        yield config(text, "rollout.options.a", {"rollout": {"engine": "fake", "options": {"a": text}}})
    for key in ("worker_cls", "trust_remote_code", "logits_processor_pickle", "Worker_Extension_CLS", "command"):
        yield config(key, f"rollout.options.{key}", {"rollout": {"engine": "fake", "options": {key: 1}}})
    yield config("run_dir", "run_dir", {"run_dir": "/tmp/x"})
    yield config("template", "data.template", {"data": {"train": "reasoning_gym:x", "template": "{a.__class__}"}})
    yield config("huge", "steps", {"steps": 0})
    yield config("name", "name", {"name": "../x"})


def raw(name: str, content: bytes, *statuses: int, path: str = "/v1/jobs", **headers: str) -> Hostile:
    return Hostile(name=name, path=path, content=content, statuses=statuses or (400,), headers=dict(headers))


def bodies() -> Iterator[Hostile]:
    wrap = '{{"config": {}}}'.format
    for name, text in {
        "NaN": "NaN",
        "Infinity": "Infinity",
        "minus infinity": "-Infinity",
        "1e999": "1e999",
        "-1e999": "-1e999",
        "65 bits": str(1 << 64),
        "5000 digits": "1" * 5000,
        "deep lists": "[" * 100_000 + "]" * 100_000,
        "deep objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
        "33 levels": "[" * 33 + "]" * 33,
        "surrogate": r'"\ud800"',
        "surrogate name": r'{"\udfff": 1}',
        "two high": r'"\ud83d\ud83d"',
        "twice": '{"a": 1, "a": 2}',
        "comment": "/* */ {}",
        "single quotes": "{'a': 1}",
        "trailing": "{},",
        "hex": "0x10",
        "plus": "+1",
        "leading zero": "01",
        "control": '"\x01"',
        "unfinished": '{"a',
    }.items():
        yield raw(name, wrap(text).encode())
    yield raw("not UTF-8", b'{"config": "\xff\xfe"}')
    yield raw("UTF-16", '{"config": {}}'.encode("utf-16"))
    yield raw("BOM", b"\xef\xbb\xbf{}")
    yield raw("NUL bytes", b"\0" * 1000)
    yield raw("two values", b"{} {}")
    yield raw("2 MiB", b'{"config": {"a": "' + b"x" * (2 << 20) + b'"}}', 413)
    for name, text in {
        "list": "[]",
        "null": "null",
        "text": '"x"',
        "number": "1",
        "no config": '{"config": null}',
        "config is a list": '{"config": []}',
        "config is text": '{"config": "x"}',
        "unknown key": '{"config": {}, "x": 1}',
        "proto": '{"config": {}, "__proto__": {}}',
        "priority text": '{"config": {}, "priority": "50"}',
        "priority true": '{"config": {}, "priority": true}',
        "priority 101": '{"config": {}, "priority": 101}',
        "priority -1": '{"config": {}, "priority": -1}',
        "priority 1.5": '{"config": {}, "priority": 1.5}',
        "name": '{"config": {}, "name": "../../x"}',
        "long name": json.dumps({"config": {}, "name": "x" * 101}),
        "name with a line": '{"config": {}, "name": "x\\ny"}',
        "labels list": '{"config": {}, "labels": []}',
        "label number": '{"config": {}, "labels": {"a": 1}}',
        "label name": '{"config": {}, "labels": {"a b": "c"}}',
        "many labels": json.dumps({"config": {}, "labels": {f"a{n}": "" for n in range(17)}}),
        "long label": json.dumps({"config": {}, "labels": {"a": "x" * 257}}),
        "resume path": '{"resume_from": "../x"}',
        "resume number": '{"resume_from": 1}',
        "empty": "{}",
        "many keys": json.dumps({"config": {f"k{n}": n for n in range(20_000)}}),
        "many rewards": json.dumps({"config": tiny(reward=["os:system"] * 20_000)}),
    }.items():
        yield raw(name, text.encode(), 422)
    yield raw("resume of nobody", json.dumps({"resume_from": "job_" + "0" * 20}).encode(), 404, 409)
    for kind in (
        "application/xml",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
    ):
        yield raw(
            kind, b"<!DOCTYPE x [<!ENTITY y SYSTEM 'file:///etc/passwd'>]>", 400, 415, 422, **{"Content-Type": kind}
        )
    for kind in ("application/x!y+json", "application/a b+json", ""):  # which a route may take for JSON all the same
        for name, text in {"NaN": '{"config": {"a": NaN}}', "twice": '{"config": {}, "config": {}}'}.items():
            yield raw(f"{name} as {kind!r}", text.encode(), **{"Content-Type": kind})
    for coding in ("gzip", "deflate", "br", "zstd", "gzip, identity", "x"):
        yield raw(f"coded {coding}", b"\x1f\x8b" + b"\0" * 100, 415, **{"Content-Encoding": coding})


def heads() -> Iterator[Hostile]:
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost:80@evil.example",
        "169.254.169.254",
        "[::2]",
        "127.0.0.1:99999",
        "127.0.0.1#x",
        "127.0.0.1/x",
        "xn--localhost-.com",
        "0.0.0.0",
    ):
        yield Hostile(name=f"host {host}", method="GET", headers={"Host": host}, statuses=(400, 421))
    for origin in ("https://evil.example", "null", "http://127.0.0.1", "file://", "http://localhost.evil", "x", " "):
        yield Hostile(name=f"origin {origin}", method="GET", headers={"Origin": origin}, statuses=(403,))
    for name, value, status in (
        ("If-Match", "x", 400),
        ("If-Match", '"1", "2"', 400),
        ("If-Match", '"' + "9" * 100 + '"', 400),
        ("If-Match", 'W/"1"', 400),
    ):
        path = "/v1/jobs/job_" + "0" * 20
        yield Hostile(
            name=f"{name} {value[:20]}", method="DELETE", path=path, headers={name: value}, statuses=(status,)
        )
    body = json.dumps({"config": tiny()}).encode()
    for key in ("x" * 129, "a b", "é".encode("latin-1").decode("latin-1"), "\t"):
        headers: dict[str, str | bytes] = {"Idempotency-Key": key.encode("latin-1")}
        yield Hostile(name=f"key {key[:9]!r}", content=body, headers=headers, statuses=(400, 422))
    yield Hostile(name="many headers", method="GET", headers={f"X-{n}": "x" for n in range(150)}, statuses=(431,))
    yield Hostile(name="long header", method="GET", headers={"X-Long": "x" * 100_000}, statuses=(400, 431))


def targets() -> Iterator[Hostile]:
    for job in (
        "..",
        "../../token",
        "..%2f..%2ftoken",
        "%2e%2e",
        "job_x",
        "job_" + "0" * 20,
        "job_" + "0" * 10_000,
        "%00",
        "job_' OR '1'='1",
        "%F0%28%8C%28",
        "job_0;ls",
        "{job_id}",
        "*",
        "%5c..%5c",
    ):
        for rest in ("", "/logs", "/report", "/events"):
            yield Hostile(
                name=f"{job[:30]}{rest}", method="GET", path=f"/v1/jobs/{job}{rest}", statuses=(400, 404, 405, 414)
            )
    for query in (
        "limit=0",
        "limit=101",
        "limit=x",
        "limit=1e3",
        "limit=",
        "limit=99999999999999999999",
        "cursor=x",
        "cursor=%00",
        "cursor=am9iczox",
        "cursor=am9iczotMQ",
        "cursor=" + "A" * 300,
        "state=dead",
        "state=",
        "cursor=ZXZlbnRzOjE",
    ):
        if query != "cursor=am9iczox":  # which is one
            yield Hostile(name=query[:30], method="GET", path=f"/v1/jobs?{query}", statuses=(400, 422))
    yield Hostile(name="long query", method="GET", path="/v1/jobs?label=" + "x" * 9000, statuses=(414,))
    for path in (
        "/static/../token",
        "/static/%2e%2e/token",
        "/.git/config",
        "/v1/../token",
        "//etc/passwd",
        "/v1/jobs/",
        "/service.sqlite",
        "/static/..%2f..%2fetc/passwd",
    ):
        yield Hostile(name=path, method="GET", path=path, statuses=(307, 400, 404))
    for method in ("PUT", "TRACE", "CONNECT", "PROPFIND", "X"):
        yield Hostile(name=method, method=method, statuses=(400, 404, 405))


TABLE = [*configurations(), *bodies(), *heads(), *targets()]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The service under attack."""

    home: Path
    process: psutil.Process
    host: str
    port: int
    token: str


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    home = tmp_path_factory.mktemp("hostile") / "home"
    settings = {"home": str(home), "body_timeout": 1.0, "rate": 1000.0}
    command = [sys.executable, "-m", "tests.service_server", json.dumps(settings)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_until((home / "service.json").exists, process)
        url = httpx.URL(json.loads((home / "service.json").read_text())["url"])
        assert url.port is not None
        yield Target(
            home=home,
            process=psutil.Process(process.pid),
            host=url.host,
            port=url.port,
            token=(home / "token").read_text(),
        )
        assert process.poll() is None, "the service did not survive"
        process.terminate()
        _, errors = process.communicate(timeout=DEADLINE)
    assert "Traceback" not in errors, errors


def send(target: Target, one: Hostile) -> httpx.Response:
    """As it is: no client is to put right what is wrong on purpose."""
    headers = {"Host": f"{target.host}:{target.port}", "Authorization": f"Bearer {target.token}", **one.headers}
    if one.content is not None:
        headers = {"Content-Type": "application/json", "Content-Length": str(len(one.content)), **headers}
    lines = [f"{one.method} {one.path} HTTP/1.1".encode("latin-1", "replace")]
    lines += [
        name.encode() + b": " + (value if isinstance(value, bytes) else value.encode("latin-1", "replace"))
        for name, value in headers.items()
    ]
    answer = exchange(target, b"\r\n".join([*lines, b"Connection: close", b"", one.content or b""]))
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *rest = head.decode("latin-1").split("\r\n")
    fields = [tuple(line.split(": ", 1)) for line in rest if not line.lower().startswith("transfer-encoding")]
    return httpx.Response(int(first.split()[1]), headers=[(name, value) for name, value in fields], content=body)


def exchange(target: Target, request: bytes) -> bytes:
    answer = b""
    with socket.create_connection((target.host, target.port), timeout=DEADLINE) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # it says no before it has all of it
            connection.sendall(request)
        with suppress(ConnectionResetError):
            while piece := connection.recv(1 << 16):
                answer += piece
    return answer


def test_hostile_requests_are_refused_and_leave_nothing_behind(target: Target) -> None:
    assert len(TABLE) >= 200
    before = target.process.memory_info().rss
    wrong = []
    for one in TABLE:
        answer = send(target, one)
        text = answer.text
        if answer.status_code not in one.statuses:
            wrong.append(f"{one.name}: {answer.status_code} {text[:200]}")
            continue
        if answer.headers.get("content-type") == "application/problem+json":
            problem = answer.json()
            if problem["status"] != answer.status_code or not problem["detail"] or len(text) > 20_000:
                wrong.append(f"{one.name}: no good problem: {text[:200]}")
            if one.field is not None and problem.get("field") != one.field:
                wrong.append(f"{one.name}: names {problem.get('field')} and not {one.field}: {problem['detail'][:200]}")
        elif answer.status_code >= 400 and "Invalid HTTP request" not in text:
            wrong.append(f"{one.name}: {answer.headers.get('content-type')} {text[:200]}")
        if "root:" in text or target.token in text:
            wrong.append(f"{one.name}: tells what it should not")
    grown = target.process.memory_info().rss - before

    print(f"\n{len(TABLE)} hostile requests, {grown / 2**20:.1f} MiB more memory")
    assert not wrong, "\n".join(wrong)
    assert grown < MAX_GROWTH
    assert list((target.home / "jobs").iterdir()) == []
    assert target.process.children(recursive=True) == []
    listed = send(target, Hostile(name="list", method="GET"))
    assert listed.json()["data"] == []


def test_bodies_that_do_not_come_hold_nobody_up(target: Target) -> None:
    head = (
        f"POST /v1/jobs HTTP/1.1\r\nHost: {target.host}:{target.port}\r\nAuthorization: Bearer {target.token}\r\n"
        "Content-Type: application/json\r\n"
    ).encode()
    starts = (
        head + b"Content-Length: 1000\r\n\r\n",
        head + b'Content-Length: 1000\r\n\r\n{"config": ',
        head + b"Transfer-Encoding: chunked\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\n3\r\n{}{\r\n",
    ) * 5
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda s=start: answers.append(exchange(target, s))) for start in starts]
    for thread in threads:
        thread.start()
    listed = send(target, Hostile(name="list", method="GET"))
    for thread in threads:
        thread.join(DEADLINE)

    assert listed.status_code == 200
    assert len(answers) == len(starts)
    assert {answer.split(b" ")[1] for answer in answers} == {b"408"}


def test_a_chunked_body_is_cut_off_where_its_limit_is(target: Target) -> None:
    head = (
        f"POST /v1/jobs HTTP/1.1\r\nHost: {target.host}:{target.port}\r\nAuthorization: Bearer {target.token}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    ).encode()
    before = target.process.memory_info().rss

    answer = exchange(target, head + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 512)

    assert answer.split(b" ")[1] == b"413"
    assert target.process.memory_info().rss - before < MAX_GROWTH
