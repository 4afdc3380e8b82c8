"""Configuration files as bodies of requests: what they say as JSON, and what is not taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from asyncflow_api.app import create_app
from asyncflow_api.problems import Problem
from asyncflow_api.settings import Settings
from asyncflow_api.yaml_bodies import MAX_YAML, as_json
from fastapi.testclient import TestClient

from tests.test_configs import FILES

YAML = {"Content-Type": "application/yaml"}


@pytest.fixture
def http(tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(home=tmp_path / "home")
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8765") as client:
        client.headers["Authorization"] = f"Bearer {settings.token_file.read_text()}"
        yield client


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_that_ships_says_the_same_as_json(path: Path) -> None:
    assert json.loads(as_json(path.read_bytes())) == {"config": yaml.safe_load(path.read_text())}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "key: value"),
        ("- steps: 1", "key: value"),
        ("steps: [1", "in line 1: send valid YAML"),
        ("a: 1\nb: 2\na: 3", "twice in what begins in line 1"),
        ("a:\n  b: {c: 1, c: 2}", "twice in what begins in line 2"),
        ("1: a\n'1': b", "twice"),
        ("a: &x [1]\nb: *x", "alias"),
        ("a: &x {b: 1}\nc: {<<: *x, d: 1}", "alias"),
        ("a: &x [*x]", "alias"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper than 32"),
        ("a: " + "[" * 30_000, "nested deeper than 32"),
        ("a: .nan", "number that JSON cannot say"),
        ("a: -.inf", "number that JSON cannot say"),
        ("a: " + "9" * 5_000, "number that JSON cannot say"),
        ("a: " + "9" * 30, "too large a number"),
        ("a: 0x" + "f" * 50_000, "number that JSON cannot say"),
        ("a: 1" + ":1" * 5_000, "number that JSON cannot say"),
        ("a: 2024-01-01", "put dates in quotes"),
        ("a: !!binary eA==", "JSON cannot say"),
        ("a: !!set {x}", "JSON cannot say"),
        ("? [a]\n: b", "unhashable"),
        ("a: !!python/object/apply:os.system [ls]", "constructor"),
        ("a: !mine x", "constructor"),
        ("a: 1\n---\na: 2", "another document"),
        ('a: "\\uD800"', "surrogate"),
        ("a: \x07", "cannot be seen"),
    ],
)
def test_what_is_no_plain_configuration_is_refused_with_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(Problem, match="is not taken") as caught:
        as_json(text.encode())

    assert (caught.value.status, caught.value.field) == (400, "body")
    assert sentence in caught.value.detail
    assert len(caught.value.detail) < 400


def test_what_is_no_text_or_too_long_is_refused() -> None:
    with pytest.raises(Problem, match="UTF-8"):
        as_json(b"a: \xff")
    with pytest.raises(Problem, match="may have 65536 bytes") as caught:
        as_json(b"#" * (MAX_YAML + 1))
    assert caught.value.status == 413


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs:validate"])
def test_a_file_is_the_configuration_of_the_request(http: TestClient, path: str) -> None:
    wrong = http.post(path, content=b"a: [", headers=YAML)
    assert (wrong.status_code, wrong.json()["code"]) == (400, "bad_yaml")
    assert wrong.headers["content-type"] == "application/problem+json"
    long = http.post(path, content=b"#" * (MAX_YAML + 1), headers=YAML)
    assert (long.status_code, long.json()["code"]) == (413, "too_large")

    for kind in ("application/yaml", "text/yaml; charset=utf-8", "application/x-yaml"):
        answer = http.post(path, content=b"model: tiny\nstepps: 1\n", headers={"Content-Type": kind})
        said = answer.json()
        assert answer.status_code == (422 if path == "/v1/jobs" else 200)
        assert "stepps is not a setting" in answer.text
        fields = [error["field"] for error in said["errors"]]
        assert "stepps" in [field.removeprefix("body.config.") for field in fields]


def test_no_other_route_takes_yaml(http: TestClient) -> None:
    answer = http.post("/v1/tokens", content=b"name: x\nscope: admin\n", headers=YAML)

    assert answer.status_code == 422
    assert len(http.get("/v1/tokens").json()["data"]) == 1


def test_the_specification_says_where_a_file_is_taken(http: TestClient) -> None:
    taken = {
        path
        for path, methods in http.get("/openapi.json").json()["paths"].items()
        for operation in methods.values()
        if "application/yaml" in operation.get("requestBody", {}).get("content", {})
    }

    assert taken == {"/v1/jobs", "/v1/jobs:validate"}
