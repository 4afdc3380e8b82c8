"""The HTTP service."""

from __future__ import annotations

from importlib.metadata import version

from asyncflow_api.app import create_app
from fastapi.testclient import TestClient


def test_healthz_says_that_the_service_is_alive_and_which_one_it_is() -> None:
    with TestClient(create_app()) as client:
        answer = client.get("/healthz")

    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "version": version("asyncflow")}


def test_nothing_is_served_that_needs_another_site() -> None:
    with TestClient(create_app()) as client:
        assert client.get("/docs").status_code == client.get("/redoc").status_code == 404
        assert "/healthz" in client.get("/openapi.json").json()["paths"]


def test_each_application_is_a_new_one() -> None:
    assert create_app() is not create_app()
