"""The OpenAPI document: what FastAPI derives of the routes, and what stands in front of all of them.

Middleware refuses before a route is asked, so the errors of a route follow from what it is (its method, its path, its
tags), not from its function: `statuses` is the one place that says which.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Final

from asyncflow_api.auth import COOKIE, PUBLIC, Need
from asyncflow_api.meanings import MEANINGS, MOMENT, MOMENTS
from asyncflow_api.openai_errors import ROUTES as OPENAI_ROUTES
from asyncflow_api.problems import MEDIA_TYPE, ProblemBody
from asyncflow_api.schemas_openai import OpenAIError
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

ERRORS: Final[Mapping[int, str]] = {
    400: "The request is malformed, or says what this service cannot do",
    401: "No token, or one that is not known or has expired",
    403: "The token may not do this, or the request comes from a page of another site",
    404: "There is nothing of this id",
    406: "This is only to be had as another media type",
    408: "The body was not complete in time",
    409: "Not possible as things are now",
    412: "It has changed since the ETag in If-Match",
    413: "The body is too large",
    414: "Path and query are too long",
    415: "The body has a media type or an encoding that is not taken",
    421: "This service does not answer to this host name",
    422: "A value is not what it should be: `errors` names each",
    429: "Too much at once: `Retry-After` says when to come back",
    431: "Too many headers, or too long ones",
    500: "A fault of the service: its log says more, under the request id",
}
ALWAYS: Final = (400, 401, 403, 408, 413, 414, 415, 421, 429, 431, 500)
"""What can be answered before a route is asked."""
ABOUT_RUNS: Final = frozenset({"queue", "workers", "samples", "exchange", "metrics", "completions"})
"""Tags of routes that a run answers, which may not have begun or not go on."""
HEADERS: Final[Mapping[int, Mapping[str, Any]]] = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}}},
    429: {
        "Retry-After": {"required": True, "description": "Seconds.", "schema": {"type": "integer", "minimum": 1}},
    },
}
ETAG: Final = {"ETag": {"required": True, "description": "For `If-Match`.", "schema": {"type": "string"}}}
SECURITY: Final = {
    "token": {
        "type": "http",
        "scheme": "bearer",
        "description": "A token; its scope is `read`, `submit` or `admin`, each of which may what those before it may.",
    },
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": COOKIE,
        "description": "Of `POST /v1/login`. Changes need the headers `X-CSRF: 1` and `Origin` with it.",
    },
}


def answers(*media_types: str, description: str) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers with text or bytes and not with a model."""
    return {200: {"content": {one: {"schema": _plain(one)} for one in media_types}, "description": description}}


def _plain(media_type: str) -> dict[str, str]:
    return {"type": "string"} if media_type.startswith("text/") else {"type": "string", "format": "binary"}


def install(app: FastAPI) -> None:
    """Let an application have the whole document."""
    derived = app.openapi
    made: dict[str, Any] = {}

    def whole() -> dict[str, Any]:
        if not made:
            made.update(_completed(derived(), app))
        return made

    app.openapi = whole  # type: ignore[method-assign]


def statuses(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[int]:
    """The errors that a route can answer."""
    yield from ALWAYS
    tags, parameters = set(operation["tags"]), operation.get("parameters", [])
    openai = OPENAI_ROUTES.fullmatch(path) is not None
    if "{" in path or "completions" in tags:
        yield 404
    if not openai and (parameters or "requestBody" in operation):
        yield 422
    if (path.startswith("/v1/jobs") and method != "get") or tags & ABOUT_RUNS:
        yield 409
    if any(one["name"].lower() == "if-match" for one in parameters):
        yield 412
    if path == "/v1/events":
        yield 406


def _completed(found: dict[str, Any], app: FastAPI) -> dict[str, Any]:
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)  # FastAPI's own, which nobody is answered with
    for model in (ProblemBody, OpenAIError):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
        schemas |= schema.pop("$defs", {}) | {model.__name__: schema}
    components["responses"] = {
        f"{shape}{status}": _error(status, shape, media_type)
        for status in ERRORS
        for shape, media_type in (("Problem", MEDIA_TYPE), ("OpenAI", "application/json"))
    }
    components["securitySchemes"] = SECURITY
    routes = {(method.lower(), one.path_format): one for one in _routes(app) for method in one.methods}
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            _complete(operation, method, path, routes[method, path])
    for name, schema in schemas.items():
        _explain(schema, name)
    return found


def _explain(schema: Mapping[str, Any], model: str) -> None:
    """Let every field say what it means."""
    for name, field in schema.get("properties", {}).items():
        kinds = {one.get("type") for one in (field, *field.get("anyOf", ()))}
        text = MOMENT if name in MOMENTS and "string" in kinds else MEANINGS.get(f"{model}.{name}", MEANINGS.get(name))
        if text is not None:
            field.setdefault("description", text)


def _routes(app: FastAPI) -> Iterator[APIRoute]:
    return (one for one in app.routes if isinstance(one, APIRoute))


def _error(status: int, shape: str, media_type: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{'ProblemBody' if shape == 'Problem' else 'OpenAIError'}"}
    error: dict[str, Any] = {"description": ERRORS[status], "content": {media_type: {"schema": schema}}}
    return error | ({"headers": HEADERS[status]} if status in HEADERS else {})


def _complete(operation: dict[str, Any], method: str, path: str, route: APIRoute) -> None:
    answered = operation["responses"]
    answered.pop("422", None)
    shape = "OpenAI" if OPENAI_ROUTES.fullmatch(path) else "Problem"
    for status in sorted(statuses(method, path, operation)):
        answered[str(status)] = {"$ref": f"#/components/responses/{shape}{status}"}
    for parameter in operation.get("parameters", ()):
        parameter["schema"] = _without_null(parameter["schema"])
        if text := MEANINGS.get(parameter["name"].lower()):
            parameter.setdefault("description", text)
    for taken in operation.get("requestBody", {}).get("content", {}).values():
        _explain(taken["schema"], "")
    for answer in answered.values():
        if answer.get("content", {}).get("application/json", {}).get("schema") == {"$ref": "#/components/schemas/Job"}:
            answer["headers"] = ETAG | answer.get("headers", {})
    if route.summary is None:
        # The first sentence of its docstring, which the description goes on with.
        first, _, rest = inspect.cleandoc(route.endpoint.__doc__ or "").partition(".")
        operation["summary"] = " ".join(first.split())
        operation["description"] = rest.strip()
    scopes = sorted({need.scope for need in _needs(route.dependant)})
    operation["security"] = [] if path in PUBLIC else [{"token": scopes}, {"session": scopes}]


def _without_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What a parameter may be that can be left out: in an address nothing is null."""
    kinds = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name != "anyOf"}
    return rest | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})


def _needs(dependant: Dependant) -> Iterator[Need]:
    for one in dependant.dependencies:
        if isinstance(one.call, Need):
            yield one.call
        yield from _needs(one)
