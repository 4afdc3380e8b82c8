"""A configuration file as the body of a request: it is read once, strictly, and goes on as the JSON that says the same.

POST /v1/jobs, Content-Type: application/yaml     steps: 6     ─►     {"config": {"steps": 6}}
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, Final

import yaml
from asyncflow_api.limits import MAX_DEPTH, check_json, replay, too_large
from asyncflow_api.problems import Problem, request_id
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

YAML_TYPE: Final = re.compile(r"(application|text)/(x-)?yaml\b", re.IGNORECASE)
TAKES_YAML: Final = frozenset({"/v1/jobs", "/v1/jobs:validate"})
MAX_YAML: Final = 64 << 10
"""Bytes. YAML takes much longer to read than JSON, and no configuration is as long."""
REQUEST_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "content": {
            "application/yaml": {
                "schema": {"type": "object", "description": "A configuration file: `config`, and nothing beside it."}
            }
        }
    }
}
"""For the specification of a route that takes one."""


class YamlBodies:
    """Stands behind `Limits`: whole bodies of a known size come here, and routes see JSON alone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not takes_yaml(scope):
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.to_thread(as_json, (await receive())["body"])
        except Problem as problem:
            await problem.response(request_id(scope))(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        headers["content-type"], headers["content-length"] = "application/json", str(len(body))
        await self._app(scope, replay(body, receive), send)


def takes_yaml(scope: Scope) -> bool:
    """Whether a request brings a configuration file to where one is taken."""
    if scope["type"] != "http" or scope["path"] not in TAKES_YAML:
        return False
    return YAML_TYPE.match(Headers(scope=scope).get("content-type", "")) is not None


def as_json(body: bytes) -> bytes:
    """The request that a configuration file stands for. Raises Problem for what is none."""
    if len(body) > MAX_YAML:
        raise too_large(MAX_YAML)
    try:
        loader = _Loader(body.decode("utf-8"))
        values = loader.get_single_data()
        if not isinstance(values, dict):
            raise _bad("it must hold `key: value` lines")
        found = json.dumps({"config": values}, allow_nan=False).encode()
    except UnicodeDecodeError:
        raise _bad("it is not UTF-8: encode it so") from None
    except yaml.MarkedYAMLError as error:
        at = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise _bad(f"{error.problem or error.context}{at}: send valid YAML") from None
    except yaml.YAMLError:
        raise _bad("it has characters that cannot be seen: send plain text") from None
    except TypeError as error:
        raise _bad(f"JSON cannot say all of it ({error}): put dates in quotes") from None
    except ValueError:
        raise _bad("it has a number that JSON cannot say: send one that a double can hold") from None
    check_json(found)
    return found


class _Loader(yaml.SafeLoader):
    """Plain values only, nothing twice, and nothing that is short here and long when it is read."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise _bad("it has an alias (*name): write out what it stands for")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _bad(f"it is nested deeper than {MAX_DEPTH} levels: make it flatter")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=deep)
        if len(found) < len(node.value):
            line = node.start_mark.line + 1
            raise _bad(f"a name is there twice in what begins in line {line}: write each once")
        return found


def _bad(detail: str) -> Problem:
    return Problem(400, "bad_yaml", f"the configuration is not taken: {detail}", field="body")
