"""What the store and a run refuse, as the routes about runs answer it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from asyncflow_api.problems import Problem
from asyncflow_api.runs import NoRoom, NotBegun, NotLive, NotYours
from fastapi import Request, Response
from fastapi.routing import APIRoute

from asyncflow.errors import (
    AsyncFlowError,
    Closed,
    ControlError,
    DataError,
    IllegalTransition,
    LeaseLost,
    LedgerError,
    StalenessViolation,
    StoreError,
    Unreachable,
)
from asyncflow.report.follow import BeingRead


def problem_of(error: AsyncFlowError) -> Problem | None:  # noqa: PLR0911 - a table
    """None: it is nothing that a client can do something about."""
    match error:
        case NotBegun():
            return Problem(409, "run_not_begun", str(error))
        case BeingRead():
            return Problem(409, "run_being_read", str(error), headers={"Retry-After": "1"})
        case NotLive() | Closed() | Unreachable():
            return Problem(409, "run_not_live", str(error))
        case NoRoom():
            return Problem(429, "no_room", str(error), headers={"Retry-After": "1"})
        case NotYours() | LeaseLost():
            return Problem(409, "lease_lost", str(error))
        case IllegalTransition() | StalenessViolation():
            return Problem(409, "illegal_transition", str(error))
        case ControlError():
            return Problem(409, "not_possible_now", str(error))
        case LedgerError():
            return Problem(409, "run_unreadable", str(error))
        case StoreError() | DataError():
            return Problem(422, "invalid_request", str(error))
    return None


class RunRoute(APIRoute):
    """A route about one run."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except AsyncFlowError as error:
                if (problem := problem_of(error)) is None:
                    raise
                raise problem from error

        return handled
