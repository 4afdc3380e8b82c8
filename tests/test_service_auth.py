"""Who is let in: every route there is, with every kind of credential that should not do."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asyncflow_api.app import create_app
from asyncflow_api.auth import PUBLIC
from asyncflow_api.openai_errors import ROUTES
from asyncflow_api.settings import Settings
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from asyncflow.clock import SystemClock
from tests.processes import DEADLINE

URL = "http://127.0.0.1:8765"
EXAMPLES = {"job_id": "job_" + "0" * 20, "token_id": "tok_0"}


class MovableClock(SystemClock):
    """The machine's, and some seconds more."""

    ahead = 0.0
    later = 0.0
    """For what is measured, which never goes back."""

    def wall(self) -> float:
        return super().wall() + self.ahead

    def monotonic(self) -> float:
        return super().monotonic() + self.later


class Service:
    """An application with one token of each scope."""

    def __init__(self, home: Path, **more: Any) -> None:
        self.clock = MovableClock()
        self.settings = Settings(home=home, failure_rate=1e6, anonymous_rate=1e6, rate=1e6, **more)
        self.app: FastAPI = create_app(self.settings, clock=self.clock)
        self.http = TestClient(self.app, base_url=URL)

    def __enter__(self) -> Service:
        self.http.__enter__()
        tokens = self.app.state.tokens
        self.tokens = {scope: tokens.make(scope, scope)[1] for scope in ("read", "submit", "admin")}
        self.expired = tokens.make("expired", "admin", 60.0)[1]
        return self

    def __exit__(self, *_: object) -> None:
        self.http.__exit__(None, None, None)

    def call(self, method: str, path: str, token: str | None = None, **more: Any) -> Any:
        headers = dict(more.pop("headers", {}))
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        return self.http.request(method, path, headers=headers, **more)

    def log_in(self, scope: str = "admin") -> None:
        answer = self.call("POST", "/v1/login", json={"token": self.tokens[scope]})
        assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("auth") / "home") as service:
        yield service


@pytest.fixture
def service(shared: Service) -> Service:
    shared.http.cookies.clear()
    return shared


def routes() -> list[tuple[str, str]]:
    """Every method and path of the application, so that a new route is covered by itself."""
    app = create_app(Settings(home=Path("never-made")))
    found = [
        (method, re.sub(r"{(\w+)(:\w+)?}", lambda name: EXAMPLES.get(name[1], "x"), route.path))
        for route in app.routes
        for method in sorted(getattr(route, "methods", None) or ())
        if method != "HEAD"
    ]
    assert len(found) >= len([route for route in app.routes if isinstance(route, APIRoute)]) > 15
    return [one for one in found if one[1] not in PUBLIC and not one[1].startswith("/static")]


def scope_of(method: str, path: str) -> str:
    """What a route needs: this is the rule, and the application has to follow it."""
    if path.startswith("/v1/tokens"):
        return "admin"
    return "read" if method == "GET" or path == "/v1/logout" else "submit"


def code_of(answer: Any, path: str) -> Any:
    """Of an error, in the shape that the route has for it."""
    openai = ROUTES.fullmatch(path) is not None
    assert answer.headers["content-type"] == ("application/json" if openai else "application/problem+json")
    return answer.json()["error"]["code"] if openai else answer.json()["code"]


@pytest.mark.parametrize(("method", "path"), routes())
def test_no_route_answers_without_a_token_that_holds(service: Service, method: str, path: str) -> None:
    service.clock.ahead = 61.0
    for name, token, code in (
        ("missing", None, "no_token"),
        ("wrong", "af_" + "x" * 43, "wrong_token"),
        ("empty", "", "wrong_token"),
        ("expired", service.expired, "wrong_token"),
    ):
        answer = service.call(method, path, token)

        assert answer.status_code == 401, (name, answer.text)
        assert code_of(answer, path) == code
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path"), [one for one in routes() if scope_of(*one) != "read"])
def test_a_token_that_may_only_read_changes_nothing(service: Service, method: str, path: str) -> None:
    answer = service.call(method, path, service.tokens["read"])

    assert answer.status_code == 403, answer.text
    assert code_of(answer, path) == "scope_too_small"
    if scope_of(method, path) == "admin":
        assert service.call(method, path, service.tokens["submit"]).status_code == 403


@pytest.mark.parametrize(("method", "path"), [one for one in routes() if one[0] != "GET"])
def test_a_cookie_alone_changes_nothing(service: Service, method: str, path: str) -> None:
    service.log_in()

    for headers in ({}, {"X-CSRF": "1"}, {"Origin": URL}):
        answer = service.call(method, path, headers=headers)
        assert (answer.status_code, code_of(answer, path)) == (403, "no_csrf_header")
    assert service.call(method, path, headers={"X-CSRF": "1", "Origin": "https://evil.example"}).status_code == 403


@pytest.mark.parametrize("header", ["Basic abc", "Bearer", "bearer  ", "Token x", "Bearer é", "", "Bearer a b"])
def test_other_kinds_of_credentials_do_not_do(service: Service, header: str) -> None:
    answer = service.call("GET", "/v1/me", headers={"Authorization": header.encode("latin-1")})

    assert answer.status_code == 401


def test_each_scope_may_what_those_below_may(service: Service) -> None:
    for scope in ("read", "submit", "admin"):
        me = service.call("GET", "/v1/me", service.tokens[scope])
        assert me.json() == {
            "object": "identity", "name": scope, "scope": scope, "expires_at": None, "session": False
        }  # fmt: skip
        assert service.call("GET", "/v1/jobs", service.tokens[scope]).status_code == 200
    assert service.call("GET", "/v1/tokens", service.tokens["admin"]).status_code == 200


def test_a_browser_logs_in_changes_something_and_logs_out(service: Service) -> None:
    answer = service.call("POST", "/v1/login", json={"token": service.tokens["admin"]})
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert service.tokens["admin"] not in cookie
    assert service.call("GET", "/v1/me").json()["session"] is True

    made = service.call(
        "POST", "/v1/tokens", headers={"X-CSRF": "1", "Origin": URL}, json={"name": "ci", "scope": "read"}
    )
    assert made.status_code == 201
    assert service.call("GET", "/v1/me", made.json()["token"]).json()["name"] == "ci"

    session = service.http.cookies["asyncflow_session"]
    assert service.call("POST", "/v1/logout", headers={"X-CSRF": "1", "Origin": URL}).status_code == 204
    stolen = service.call("GET", "/v1/me", headers={"Cookie": f"asyncflow_session={session}"})
    assert stolen.status_code == 401


def test_a_session_ends_with_its_time_and_with_its_token(service: Service) -> None:
    made = service.call("POST", "/v1/tokens", service.tokens["admin"], json={"name": "t", "scope": "read"}).json()
    assert service.call("POST", "/v1/login", json={"token": made["token"]}).status_code == 200
    assert service.call("GET", "/v1/me").status_code == 200

    assert service.call("DELETE", f"/v1/tokens/{made['id']}", service.tokens["admin"]).status_code == 204

    assert service.call("GET", "/v1/me").status_code == 401
    service.http.cookies.clear()
    service.log_in("read")
    before, service.clock.ahead = service.clock.ahead, service.clock.ahead + 13 * 3600
    assert service.call("GET", "/v1/me").status_code == 401
    service.clock.ahead = before
    assert service.call("DELETE", f"/v1/tokens/{made['id']}", service.tokens["admin"]).status_code == 404


def test_a_token_is_shown_once_and_kept_nowhere(service: Service) -> None:
    made = service.call(
        "POST", "/v1/tokens", service.tokens["admin"], json={"name": "ci", "scope": "submit", "expires_in": 3600}
    ).json()

    listed = service.call("GET", "/v1/tokens?limit=100", service.tokens["admin"])
    assert made["id"] in listed.text
    assert made["token"] not in listed.text
    for file in service.settings.home.glob("service.sqlite*"):
        assert made["token"].encode() not in file.read_bytes()


def test_the_first_token_and_everything_beside_it_is_for_its_owner_only(service: Service) -> None:
    token = service.settings.token_file

    assert service.call("GET", "/v1/me", token.read_text()).json()["scope"] == "admin"
    for path in (token, service.settings.database):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(service.settings.home.stat().st_mode) == 0o700


def test_whoever_guesses_has_to_wait_and_others_do_not(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    clock = MovableClock()
    app = create_app(settings, clock=clock)
    with TestClient(app, base_url=URL) as http:
        answers = [http.get("/v1/me", headers={"Authorization": "Bearer guess"}) for _ in range(30)]

        assert [answer.status_code for answer in answers][:20] == [401] * 20
        assert answers[-1].status_code == 429
        assert int(answers[-1].headers["retry-after"]) >= 1
        token = settings.token_file.read_text()  # by somebody else, from the same address
        assert http.get("/v1/me", headers={"Authorization": f"Bearer {token}"}).status_code == 200
        clock.later += 10.0
        assert http.get("/v1/me", headers={"Authorization": "Bearer guess"}).status_code == 401


def test_too_many_requests_are_told_when_to_come_back(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", rate=2.0)
    clock = MovableClock()
    with TestClient(create_app(settings, clock=clock), base_url=URL) as http:
        headers = {"Authorization": f"Bearer {settings.token_file.read_text()}"}
        codes = [http.get("/v1/me", headers=headers).status_code for _ in range(15)]

        assert codes[:8] == [200] * 8
        assert codes[-1] == 429
        clock.later += 1.0
        assert http.get("/v1/me", headers=headers).status_code == 200


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_it_does_not_listen_for_other_hosts_without_tls(tmp_path: Path, address: str) -> None:
    from asyncflow_api.settings import is_loopback

    assert not is_loopback(address)
    if address == "0.0.0.0":
        command = [sys.executable, "-m", "asyncflow.cli", "serve", "--home", str(tmp_path / "home"), "--port", "0"]
        done = subprocess.run(
            [*command, "--host", address], capture_output=True, text=True, timeout=DEADLINE, check=False
        )
        assert done.returncode == 2
        assert "--tls-cert and --tls-key" in done.stderr
        assert not (tmp_path / "home").exists()


def test_a_page_elsewhere_cannot_call_it_by_another_name(service: Service) -> None:
    token = service.tokens["admin"]
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil", "user@127.0.0.1:8765", "127.0.0.1:x", ""):
        answer = service.call("GET", "/v1/me", token, headers={"Host": host})
        assert answer.status_code == 421, host
    for host in ("localhost", "LOCALHOST:8765", "127.0.0.1", "[::1]:8765"):
        assert service.call("GET", "/v1/me", token, headers={"Host": host}).status_code == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:8765", "http://localhost"):
        answer = service.call("GET", "/v1/me", token, headers={"Origin": origin})
        assert (answer.status_code, answer.json()["code"]) == (403, "wrong_origin"), origin


def test_every_answer_keeps_browsers_careful_and_has_an_id(service: Service) -> None:
    for path, status in (("/healthz", 200), ("/v1/me", 401), ("/v1/nothing", 401)):
        answer = service.call("GET", path, headers={"X-Request-Id": "mine-1"})
        assert answer.status_code == status
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    forged = service.call("GET", "/healthz", headers={"X-Request-Id": "a b\tc"})
    assert forged.headers["x-request-id"].startswith("req_")
