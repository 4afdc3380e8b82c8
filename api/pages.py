"""Lists in pages: a cursor says where the next one begins, and nothing else about it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Generic, Literal, TypeVar

from asyncflow_api.problems import Problem
from fastapi import Query
from pydantic import BaseModel

Item = TypeVar("Item")

Limit = Annotated[int, Query(ge=1, le=100, description="At most so many.")]
CursorText = Annotated[
    str | None, Query(max_length=200, alias="cursor", description="The `next_cursor` of the page before.")
]


class Page(BaseModel, Generic[Item]):
    """A piece of a list."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    next_cursor: str | None = None


def page_of(kind: str, items: Sequence[Item], limit: int, after: Sequence[str]) -> Page[Item]:
    """A page of the first `limit` items; `after`: the position behind each of them, as `position` gives it back.

    The caller reads one item more than `limit`, to know whether there is more.
    """
    more = len(items) > limit
    return Page[Item](
        data=list(items[:limit]), has_more=more, next_cursor=encode(kind, after[limit - 1]) if more else None
    )


def encode(kind: str, position: str) -> str:
    """A cursor into lists of one kind."""
    return base64.urlsafe_b64encode(f"{kind}:{position}".encode()).decode().rstrip("=")


def position(kind: str, cursor: str | None) -> str | None:
    """Where a page begins; None at the beginning. Raises Problem for what is no cursor of this kind."""
    if cursor is None:
        return None
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        plain = base64.b64decode(padded.encode("ascii"), altchars=b"-_", validate=True)
        found, _, where = plain.decode().partition(":")
        if found == kind and encode(kind, where) == cursor:
            return where
    except (ValueError, binascii.Error):
        pass
    raise bad_cursor()


def number(kind: str, cursor: str | None) -> int | None:
    """The same where positions are numbers."""
    where = position(kind, cursor)
    if where is None:
        return None
    if not where.isdecimal() or len(where) > 18:
        raise bad_cursor()
    return int(where)


def bad_cursor() -> Problem:
    text = "cursor: take it from the next_cursor of the page before, or leave it out"
    return Problem(400, "bad_cursor", text, field="query.cursor")
