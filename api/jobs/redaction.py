"""What leaves the service without its secrets: values of keys that sound like one, and passwords in URLs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

SECRET_KEY: Final = re.compile(
    r"(^|[_.-])(api_?key|key|token|secret|password|passwd|credential|auth|authorization)s?($|[_.-])", re.IGNORECASE
)
SECRET_NUMBER: Final = re.compile(r"secret|passw|credential", re.IGNORECASE)
"""Under other keys (`max_new_tokens`) a number is none."""
USERINFO: Final = re.compile(r"(?<=://)[^/\s@]+(?=@)")
HIDDEN: Final = "***"
SHORTEST: Final = 4
"""Characters below which a value is hidden where it stands, and not wherever it occurs."""


class Redactor:
    """Hides the secrets of one configuration."""

    def __init__(self, *configs: Mapping[str, Any] | None) -> None:
        found = {text for config in configs for text in _secrets(config) if len(text) >= SHORTEST}
        self._secrets = re.compile(
            "|".join(re.escape(text) for text in sorted(found, key=len, reverse=True)) or r"(?!)"
        )
        self.longest = max(map(len, found), default=0)
        """Characters of the longest secret."""

    def text(self, text: str) -> str:
        return USERINFO.sub(HIDDEN, self._secrets.sub(HIDDEN, text))

    def value(self, value: Any) -> Any:
        """Plain JSON values, at any depth."""
        match value:
            case Mapping():
                return {key: self._at(str(key), inner) for key, inner in value.items()}
            case list() | tuple():
                return [self.value(inner) for inner in value]
            case str():
                return self.text(value)
        return value

    def _at(self, key: str, value: Any) -> Any:
        return HIDDEN if _is_secret(key, value) else self.value(value)


def _is_secret(key: str, value: object) -> bool:
    names = SECRET_KEY if isinstance(value, str) else SECRET_NUMBER
    return isinstance(value, str | int | float) and not isinstance(value, bool) and names.search(key) is not None


def _secrets(value: object, key: str = "") -> Iterator[str]:
    match value:
        case Mapping():
            for name, inner in value.items():
                yield from _secrets(inner, str(name))
        case list() | tuple():
            for inner in value:
                yield from _secrets(inner, key)
        case str():
            if _is_secret(key, value):
                yield value
            for user in USERINFO.findall(value):
                yield user
                yield user.partition(":")[2]
