"""Errors in OpenAI's shape, on the routes that speak it: `{"error": {"message", "type", "param", "code"}}`.

It stands in front of everything else, so that whatever refuses a request is told in the one shape that its client
knows: the route, the limits, or the authentication.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from asyncflow_api.problems import MEDIA_TYPE
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROUTES: Final = re.compile(r"/v1/(fine_tuning|files)(/.*)?", re.DOTALL)
TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""Status → type; of the others, those from 500 on are `server_error`, and the rest `invalid_request_error`."""


class OpenAIErrors:
    """Rewrites problems; everything else goes through as it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or ROUTES.fullmatch(scope["path"]) is None:
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def rewritten(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and Headers(raw=message["headers"]).get("content-type") == (
                MEDIA_TYPE
            ):
                start = message
                return
            if start is None:
                await send(message)
                return
            body += message.get("body", b"")
            if message.get("more_body", False):
                return
            problem = json.loads(body)
            answer = json.dumps({"error": error_of(problem)}).encode()
            # What is wrong in a request is 400 there. Their clients send again what was answered with 409, which is of
            # no use here: a job that has ended stays so.
            start["status"] = 400 if problem["status"] in (409, 422) else problem["status"]
            headers = MutableHeaders(scope=start)
            headers["Content-Type"] = "application/json"
            headers["Content-Length"] = str(len(answer))
            await send(start)
            await send({"type": "http.response.body", "body": answer})

        await self._app(scope, receive, rewritten)


def error_of(problem: dict[str, Any]) -> dict[str, Any]:
    """A problem (`ProblemBody`) as an error of OpenAI."""
    status = problem["status"]
    kind = TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
    field = problem.get("field")
    param = None if field is None else field.removeprefix("body.").removeprefix("query.").removeprefix("path.")
    return {"message": problem["detail"], "type": kind, "param": param, "code": problem["code"]}
