"""The HTTP application as a whole."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from asyncflow_api.app import create_app
from asyncflow_api.openai_errors import ROUTES
from asyncflow_api.settings import Settings
from fastapi.testclient import TestClient


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def http(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8765") as client:
        client.headers["Authorization"] = f"Bearer {settings.token_file.read_text()}"
        yield client


def test_healthz_says_that_the_service_is_alive_and_which_one_it_is(http: TestClient) -> None:
    del http.headers["Authorization"]

    answer = http.get("/healthz")

    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "version": version("asyncflow")}


def test_nothing_is_served_that_needs_another_site(http: TestClient) -> None:
    assert http.get("/docs").status_code == http.get("/redoc").status_code == 404


def test_the_specification_has_every_route_and_every_kind_of_error(http: TestClient) -> None:
    specification = http.get("/openapi.json").json()

    assert specification["openapi"].startswith("3.1")
    assert {"/healthz", "/v1/jobs", "/v1/jobs/{job_id}/events", "/v1/tokens"} <= specification["paths"].keys()
    for path, methods in specification["paths"].items():
        for method, operation in methods.items():
            errors = {status: what for status, what in operation["responses"].items() if status >= "400"}
            assert {"400", "500"} <= errors.keys(), (method, path)
            openai = ROUTES.fullmatch(path) is not None
            for status, what in errors.items():
                name = f"{'OpenAI' if openai else 'Problem'}{status}"
                assert what == {"$ref": f"#/components/responses/{name}"}, (method, path)
                (content,) = specification["components"]["responses"][name]["content"].items()
                kind, schema = ("json", "OpenAIError") if openai else ("problem+json", "ProblemBody")
                assert content == (f"application/{kind}", {"schema": {"$ref": f"#/components/schemas/{schema}"}})


def test_each_application_is_a_new_one(settings: Settings) -> None:
    assert create_app(settings) is not create_app(settings)


def test_a_fault_of_ours_is_answered_without_its_details(settings: Settings) -> None:
    app = create_app(settings)

    def broken() -> None:
        raise RuntimeError("a secret of the inside")

    app.add_api_route("/v1/broken", broken)
    with TestClient(app, base_url="http://127.0.0.1:8765") as http:
        answer = http.get("/v1/broken", headers={"Authorization": f"Bearer {settings.token_file.read_text()}"})

    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "internal_error"
    assert "secret" not in answer.text


def test_the_service_needs_nothing_heavy() -> None:
    program = (
        "import sys, asyncflow_api.app, asyncflow_api.server; "
        "print(*(name for name in ('torch', 'transformers', 'vllm', 'reasoning_gym') if name in sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []
