"""The whole OpenAPI document, against the application that it describes: schemathesis makes up the requests.

`make test` sends CASES requests at least, `make test-long` ASYNCFLOW_CASES; what they are follows from seeds, except
that in sequences ids are those of the answers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import schemathesis
from asyncflow_api.auth import PUBLIC
from asyncflow_api.openai_errors import ROUTES
from asyncflow_api.problems import MEDIA_TYPE
from fastapi.testclient import TestClient
from schemathesis.engine import events, from_schema
from schemathesis.hooks import unregister
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.processes import DEADLINE
from tests.specified_service import HOST, Finder, FirstPiece, Fleet

pytestmark = pytest.mark.timeout(3600)

CASES: Final = 300
MANY: Final = int(os.environ.get("ASYNCFLOW_CASES", "5000"))


PHASES: Final = ("examples", "coverage", "fuzzing", "stateful")
ALONE: Final = {"extra-data-sources": {"responses": False}}
"""Requests follow from the seed, and not from earlier answers as well: those hold ids and times."""
CHECKS: Final[Mapping[str, Mapping[str, Any]]] = {
    # A request can be well-formed and yet impossible: a job has ended, a lease is over, a configuration has no model.
    "positive_data_acceptance": {"enabled": False},
    # Each kind of credentials on each route: tests/test_service_auth.py.
    "ignored_auth": {"enabled": False},
    # A job that was just made has no report, checkpoint or run yet.
    "ensure_resource_availability": {"enabled": False},
    # 413 and 414 come before anybody looks at values.
    "negative_data_rejection": {"expected-statuses": ["4xx"]},
}
"""All of schemathesis' but these."""


def fuzzing(requests: int) -> dict[str, Any]:
    """So many of each route, where so many different ones can be made."""
    return {"generation": {"max-examples": requests}, "error-feedback": {"enabled": False}, **ALONE}


def stateful(scenarios: int) -> dict[str, Any]:
    """So many sequences, in which requests take up what earlier ones were answered."""
    return {"generation": {"max-examples": scenarios}, "max-steps": 6}


@schemathesis.check
def every_error_has_its_shape(ctx: Any, response: schemathesis.Response, case: schemathesis.Case[Any]) -> None:
    if response.status_code < 400:
        return
    openai = ROUTES.fullmatch(response.request.path_url.partition("?")[0]) is not None
    assert response.headers["content-type"] == ["application/json" if openai else MEDIA_TYPE]
    body = response.json()
    if openai:
        assert set(body) == {"error"}
        assert body["error"]["message"]
        return
    assert body["status"] == response.status_code
    assert body["detail"]
    assert response.headers["x-request-id"] == [body["request_id"]]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("schema") / "home")
    with fleet.serving():
        yield fleet


@pytest.fixture
def finder(fleet: Fleet) -> Iterator[Finder]:
    with finding(fleet) as finder:
        yield finder


@contextmanager
def finding(fleet: Fleet) -> Iterator[Finder]:
    """Changes every request on its way."""
    finder = Finder(fleet)

    @schemathesis.hook
    def before_call(context: Any, case: schemathesis.Case[Any], kwargs: Any) -> None:
        finder.change(case)

    @schemathesis.hook
    def after_call(context: Any, case: schemathesis.Case[Any], response: schemathesis.Response) -> None:
        finder.settle(case, response.status_code)

    try:
        yield finder
    finally:
        unregister(before_call)
        unregister(after_call)


class Campaign:
    """What was sent, and what came of it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.sent = Counter[str]()
        """Phase → requests."""
        self.served = Counter[str]()
        """Route → requests that it has done."""
        self.wrong = dict[str, str]()
        """Check and route → the first request that shows it, and its answer."""

    def run(self, seed: int, *, phases: Mapping[str, Mapping[str, Any]]) -> None:
        """Send the requests of these phases; all of them follow from the seed."""
        config = {
            "seed": seed,
            "headers": {"Authorization": f"Bearer {self._fleet.token}"},
            "request-timeout": DEADLINE,
            "continue-on-failure": True,
            "generation": {"with-security-parameters": False, "no-shrink": True, "database": "none"},
            "checks": CHECKS,
            "phases": {name: {"enabled": name in phases, **phases.get(name, {})} for name in PHASES},
        }
        app = self._fleet.app
        schema = schemathesis.openapi.from_dict(app.openapi(), config=schemathesis.Config.from_dict(config))
        schema.app = _without_lifespan(FirstPiece(app))
        for event in from_schema(schema).execute():
            if isinstance(event, events.NonFatalError):
                raise event.value
            if isinstance(event, events.ScenarioFinished):
                self._note(event)

    def _note(self, event: events.ScenarioFinished) -> None:
        for case_id, seen in event.recorder.interactions.items():
            self.sent[event.phase.value] += 1
            route = event.recorder.cases[case_id].value.operation.label
            if seen.response is not None and seen.response.status_code < 300:
                self.served[route] += 1
            for check in event.recorder.checks.get(case_id, ()):
                if (found := check.failure_info) is not None:
                    answer = "" if seen.response is None else seen.response.text[:500]
                    text = f"{found.failure.message}\n{found.code_sample[:1000]}\n{answer}"
                    self.wrong.setdefault(f"{route}: {check.name}", text)


def _without_lifespan(app: ASGIApp) -> ASGIApp:
    """Started and ended elsewhere."""

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        await app(scope, receive, send)

    return called


def check(campaign: Campaign, fleet: Fleet, wanted: int, *, unserved: int) -> None:
    print(f"{campaign.sent.total()} requests: {dict(campaign.sent)}")
    print(f"done least often: {campaign.served.most_common()[-8:]}")
    assert not campaign.wrong, "\n\n".join(f"{what}\n{text}" for what, text in campaign.wrong.items())
    assert campaign.sent.total() >= wanted
    paths = fleet.app.openapi()["paths"]
    # Stateful requests follow from answers, which hold ids and times: with few of them some routes may get nothing that
    # they can do, such as a job that may be deleted. Whether there is room for more prompts is the run's to say.
    routes = {f"{method.upper()} {path}" for path in paths for method in paths[path]}
    assert len(missed := routes - set(campaign.served)) <= unserved, missed
    assert fleet.jobs.get(f"job_{fleet.live}").state == "running"


def test_some_hundred_requests_are_answered_as_the_specification_says(fleet: Fleet, finder: Finder) -> None:
    campaign = Campaign(fleet)

    campaign.run(1, phases={"fuzzing": fuzzing(8), "stateful": stateful(20)})

    check(campaign, fleet, CASES, unserved=6)


@pytest.mark.long
def test_thousands_of_requests_are_answered_as_the_specification_says(tmp_path: Path) -> None:
    # One of its own, since requests end jobs and use up samples.
    fleet = Fleet(tmp_path / "home")
    with fleet.serving(), finding(fleet):
        campaign = Campaign(fleet)
        campaign.run(1, phases={"coverage": ALONE, "fuzzing": fuzzing(30), "stateful": stateful(60)})
        seed = 2
        while campaign.sent.total() < MANY:
            campaign.run(seed, phases={"fuzzing": fuzzing(30), "stateful": stateful(60)})
            seed += 1

        check(campaign, fleet, MANY, unserved=1)


def test_every_route_says_what_it_is(fleet: Fleet) -> None:
    whole = fleet.app.openapi()
    operations = [(method, path, one) for path, found in whole["paths"].items() for method, one in found.items()]

    assert whole["openapi"].startswith("3.1")
    assert len({one["operationId"] for _, _, one in operations}) == len(operations) > 50
    for method, path, one in operations:
        assert one["tags"], path
        assert one["summary"], path
        assert one["security"] or path in PUBLIC, path
        assert {"400", "401", "403", "413", "415", "429", "500"} <= one["responses"].keys(), path
        assert ("404" in one["responses"]) is ("{" in path or path == "/v1/completions"), path
        answers = [status for status in one["responses"] if status.startswith("2")]
        assert answers, (method, path)


def test_every_number_and_every_parameter_says_what_it_is(fleet: Fleet) -> None:
    whole = fleet.app.openapi()
    operations = [one for found in whole["paths"].values() for one in found.values()]
    bodies = [taken["schema"] for one in operations for taken in one.get("requestBody", {}).get("content", {}).values()]

    for name, schema in [*whole["components"]["schemas"].items(), *(("body", body) for body in bodies)]:
        for field, value in schema.get("properties", {}).items():
            assert value.get("description") or not _is_number(value), f"{name}.{field}"
    for one in operations:
        for parameter in one.get("parameters", ()):
            assert parameter.get("description"), (one["operationId"], parameter["name"])
            assert {"type": "null"} not in parameter["schema"].get("anyOf", ()), "nothing in an address is null"


def _is_number(schema: Mapping[str, Any]) -> bool:
    """Or several, or one of some things."""
    inner = [*schema.get("anyOf", ()), schema.get("items"), schema.get("additionalProperties")]
    return schema.get("type") in ("integer", "number") or any(_is_number(one) for one in inner if isinstance(one, dict))


def test_a_path_says_which_methods_it_has(fleet: Fleet) -> None:
    http = TestClient(fleet.app, base_url=f"http://{HOST}", headers={"Authorization": f"Bearer {fleet.token}"})

    assert http.put("/v1/jobs/any").headers["allow"] == "DELETE, GET, PATCH"
    assert http.put("/v1/files").headers["allow"] == "GET, POST"
    assert http.put("/v1/jobs/any").json()["code"] == "method_not_allowed"


def test_what_is_no_number_is_not_taken_for_one(fleet: Fleet) -> None:
    http = TestClient(fleet.app, base_url=f"http://{HOST}", headers={"Authorization": f"Bearer {fleet.token}"})
    path = f"/v1/jobs/job_{fleet.live}/stages/reward/leases"

    for field, value in (("timeout_seconds", False), ("timeout_seconds", "0"), ("max_samples", True)):
        answer = http.post(path, json={"worker": "judge", field: value})
        assert (answer.status_code, answer.json()["field"]) == (422, f"body.{field}")
