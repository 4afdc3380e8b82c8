"""What leaves the service without its secrets: values of keys that sound like one, and passwords in URLs."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

SECRET_KEY: Final = re.compile(
    r"(^|[_.-])(api_?key|key|token|secret|password|passwd|credential|auth|authorization)s?($|[_.-])", re.IGNORECASE
)
SECRET_NUMBER: Final = re.compile(r"secret|passw|credential", re.IGNORECASE)
"""Under other keys (`max_new_tokens`) a number is none."""
CAMEL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
USERINFO: Final = re.compile(r"(?<=://)[^/\s@]+(?=@)")
HIDDEN: Final = "***"
SHORTEST: Final = 4
"""Characters below which a value is hidden where it stands, and not wherever it occurs."""


class Redactor:
    """Hides the secrets of one configuration."""

    def __init__(self, *configs: Mapping[str, Any] | None) -> None:
        plain = {text for config in configs for text in _secrets(config) if len(text) >= SHORTEST}
        # As a page or a line of JSON writes them, too.
        found = plain | {html.escape(text) for text in plain} | {json.dumps(text)[1:-1] for text in plain}
        self._secrets = re.compile(
            "|".join(re.escape(text) for text in sorted(found, key=len, reverse=True)) or r"(?!)"
        )
        self.longest = max(map(len, found), default=0)
        """Characters of the longest secret."""

    def text(self, text: str) -> str:
        return USERINFO.sub(HIDDEN, self._secrets.sub(HIDDEN, text))

    def value(self, value: Any, key: str = "") -> Any:
        """Plain JSON values, at any depth; `key` is dotted: what stands below a secret's name is secret."""
        match value:
            case Mapping():
                return {name: self.value(inner, f"{key}.{name}") for name, inner in value.items()}
            case list() | tuple():
                return [self.value(inner, key) for inner in value]
            case _ if _is_secret(key, value):
                return HIDDEN
            case str():
                return self.text(value)
        return value


def _is_secret(key: str, value: object) -> bool:
    names = SECRET_KEY if isinstance(value, str) else SECRET_NUMBER
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return False
    return names.search(CAMEL.sub("_", key)) is not None


def _secrets(value: object, key: str = "") -> Iterator[str]:
    match value:
        case Mapping():
            for name, inner in value.items():
                yield from _secrets(inner, f"{key}.{name}")
        case list() | tuple():
            for inner in value:
                yield from _secrets(inner, key)
        case str():
            if _is_secret(key, value):
                yield value
            for user in USERINFO.findall(value):
                yield user
                yield user.partition(":")[2]
