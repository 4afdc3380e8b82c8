"""The whole OpenAPI document, against the application that it describes: schemathesis makes up the requests.

`make test` sends CASES requests at least, always the same ones; `make test-long` sends ASYNCFLOW_CASES.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import schemathesis
from asyncflow_api.openai_errors import ROUTES
from asyncflow_api.problems import MEDIA_TYPE
from fastapi import FastAPI
from schemathesis.engine import events, from_schema
from schemathesis.python.asgi import shutdown_lifespans

from tests.specified_service import Finder, FirstPiece, Fleet

pytestmark = pytest.mark.timeout(3600)

CASES: Final = 300
MANY: Final = int(os.environ.get("ASYNCFLOW_CASES", "5000"))


@schemathesis.check
def every_error_has_its_shape(ctx: Any, response: schemathesis.Response, case: schemathesis.Case) -> None:
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
