"""Every error that is answered, as RFC 9457 problem+json: what is wrong, where, and what would be right."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Final

from asyncflow_api.jobs.database import Changed, KeyReused, NoSuchJob
from asyncflow_api.jobs.lifecycle import IllegalMove
from asyncflow_api.jobs.service import Busy, Invalid
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncflow.errors import AsyncFlowError, ControlError, UserError

logger = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"
MOST_ERRORS: Final = 50
"""Things that are named at once, of those that are wrong."""
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


class FieldProblem(BaseModel):
    """One thing that is wrong in a request."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    field: str
    """Dotted path: `body.priority`, `query.limit`, `body.config.steps`, `header.if-match`."""
    message: str


class ProblemBody(BaseModel):
    """An error as it is answered."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    """A sentence that says what would be right."""
    code: str
    """For programs."""
    field: str | None = None
    errors: list[FieldProblem] = Field(default_factory=list)
    request_id: str


class Problem(AsyncFlowError):
    """An error that a route answers."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        field: str | None = None,
        errors: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`errors`: (field, sentence) of each thing that is wrong, where there can be several."""
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.field = field or (errors[0][0] if errors else None)
        self.errors = tuple(errors)
        self.headers = dict(headers or {})

    def response(self, request_id: str) -> JSONResponse:
        body = ProblemBody(
            title=HTTPStatus(self.status).phrase,
            status=self.status,
            detail=self.detail,
            code=self.code,
            field=self.field,
            errors=[FieldProblem(field=field, message=text) for field, text in self.errors],
            request_id=request_id,
        )
        values = body.model_dump(exclude_none=True, exclude_defaults=False)
        if not self.errors:
            values.pop("errors")
        return JSONResponse(values, self.status, headers=self.headers, media_type=MEDIA_TYPE)


def from_error(error: AsyncFlowError) -> Problem:  # noqa: PLR0911 - a table
    """What an error of the service is on the wire."""
    match error:
        case Problem():
            return error
        case NoSuchJob():
            return Problem(404, "no_such_job", f"{error}: GET /v1/jobs lists those that there are")
        case Changed():
            return Problem(412, "changed", str(error), field="header.if-match")
        case KeyReused():
            return Problem(409, "idempotency_key_reused", str(error), field="header.idempotency-key")
        case IllegalMove():
            return Problem(409, "illegal_state", str(error))
        case Busy():
            return Problem(429, "busy", str(error), headers={"Retry-After": str(error.seconds)})
        case Invalid():
            found = [(_within_body(one.field), one.message) for one in error.errors[:MOST_ERRORS]]
            return Problem(422, "invalid_config", "; ".join(text for _, text in found), errors=found)
        case ControlError():
            return Problem(409, "not_possible_now", str(error))
        case UserError():
            return Problem(409, "not_possible", str(error))
    logger.error("a request failed", exc_info=error)
    return Problem(500, "internal_error", "the service could not do it: its log says why")


def _within_body(field: str) -> str:
    return f"body.{field}" if field in ("config", "resume_from") else f"body.config.{field}"


def install(app: FastAPI) -> None:
    """Let an application answer all errors so."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, AsyncFlowError)
        return from_error(error).response(request_id(request.scope))

    async def malformed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        # What was sent is not sent back: it may be anything.
        found = [(".".join(map(str, one["loc"])), str(one["msg"])) for one in error.errors()[:MOST_ERRORS]]
        text = "; ".join(f"{field}: {message}" for field, message in found)
        return Problem(422, "invalid_request", text, errors=found).response(request_id(request.scope))

    async def not_found(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        code = phrase.lower().replace(" ", "_")
        text = {404: "there is nothing at this path: see /openapi.json", 405: "this path has other methods"}
        detail = text.get(error.status_code, error.detail)
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(sorted(methods(request)))
        return Problem(error.status_code, code, detail, headers=headers).response(request_id(request.scope))

    app.add_exception_handler(AsyncFlowError, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, not_found)


def methods(request: Request) -> set[str]:
    """What may be done with the path of a request, whichever of its routes does it."""
    found = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    return {method for route in found for method in getattr(route, "methods", None) or ()}


def request_id(scope: Scope) -> str:
    """The id of the request that is being answered."""
    found: str = scope["state"]["request_id"]
    return found


def new_request_id() -> str:
    return f"req_{secrets.token_hex(8)}"


class Outermost:
    """Gives every request an id, every answer the headers that keep browsers careful, and every fault an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        own = asked if REQUEST_ID.fullmatch(asked) else new_request_id()
        scope.setdefault("state", {})["request_id"] = own
        began = False

        async def send_with_headers(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = own
                headers["X-Content-Type-Options"] = "nosniff"
                headers.setdefault("Referrer-Policy", "no-referrer")
                headers.setdefault("Cache-Control", "no-store")
                headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            logger.error("%s %s failed (%s)", scope["method"], scope["path"], own, exc_info=error)
            if began:
                raise  # the connection breaks, so that nobody takes half an answer for a whole one
            fault = Problem(500, "internal_error", f"the service failed: its log says why, at {own}")
            await fault.response(own)(scope, receive, send_with_headers)
