"""What happened to a job, told once and in order: what the service did, and what the run measured.

The two have one history. A cursor `n.m` says how much of each was told: n events of the service, m lines of the run's
metrics. Both only grow, so a reader that comes back with its cursor misses nothing and gets nothing twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from asyncflow_api.jobs.rows import EventRow, Level

LINE_LEVEL: Final[Mapping[str, Level]] = {"alarm": "warning", "failure": "error"}


@dataclass(frozen=True, order=True)
class Cursor:
    """How much was told."""

    own: int = 0
    lines: int = 0

    def __str__(self) -> str:
        return f"{self.own}.{self.lines}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Raises ValueError."""
        own, dot, lines = text.partition(".")
        if not (dot and all(part.isascii() and part.isdecimal() and len(part) < 19 for part in (own, lines))):
            raise ValueError(f"{text!r} is not the id of an event: take one from an event, or leave it out")
        return cls(int(own), int(lines))


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened."""

    id: str
    """The cursor with which reading goes on after it."""
    job_id: str
    created_at: float
    type: str
    level: Level
    message: str
    data: Mapping[str, Any]


def merge(
    job_id: str, after: Cursor, own: list[EventRow], lines: list[dict[str, Any] | None], limit: int
) -> tuple[list[Event], Cursor]:
    """The next events by time, at most `limit`, and the cursor after them.

    Each is one place further than the one before (n + m), so whoever was not told one knows it.
    """
    told: list[Event] = []
    n, m = after.own, after.lines
    mine, measured = iter(own), iter(lines)
    row, line = next(mine, None), next(measured, _END)
    while len(told) < limit and (row is not None or line is not _END):
        if line is None:  # unreadable: a killed run tore it
            m += 1
            told.append(_gap(job_id, f"{n}.{m}", next((_time(one) for one in lines[m - after.lines :] if one), 0.0)))
            line = next(measured, _END)
        elif line is _END or (row is not None and row.created_at <= _time(line)):
            assert row is not None
            n = row.n
            told.append(
                Event(id=f"{n}.{m}", job_id=job_id, created_at=row.created_at, type=row.type, level=row.level,
                      message=row.message, data=row.data)
            )  # fmt: skip
            row = next(mine, None)
        else:
            m += 1
            told.append(_measured(job_id, f"{n}.{m}", line))
            line = next(measured, _END)
    return told, Cursor(n, m)


_END: Final[dict[str, Any]] = {}


def _time(line: Mapping[str, Any]) -> float:
    at = line.get("at")
    return float(at) if isinstance(at, int | float) and math.isfinite(at) else 0.0


def _gap(job_id: str, id_: str, at: float) -> Event:
    """`at`: of the next line that can be read."""
    text = "a line of the run's measurements cannot be read: the run was killed while it wrote it"
    return Event(id=id_, job_id=job_id, created_at=at, type="gap", level="warning", message=text, data={})


def _measured(job_id: str, id_: str, line: Mapping[str, Any]) -> Event:
    kind = str(line.get("kind", "unknown"))
    data = {key: _finite(value) for key, value in line.items() if key not in ("kind", "at")}
    level: Level = "error" if line.get("severity") == "error" else LINE_LEVEL.get(kind, "info")
    return Event(
        id=id_, job_id=job_id, created_at=_time(line), type=kind, level=level, message=_sentence(kind, line), data=data
    )


def _sentence(kind: str, line: Mapping[str, Any]) -> str:
    step = line.get("step")
    plain = {
        "step": f"step {step}: reward {_number(line.get('reward'))}",
        "eval": f"accuracy {_number(line.get('eval/accuracy'))} after step {step}",
        "alarm": line.get("text", "an alarm"),
        "failure": line.get("reason", "the run failed"),
        "set": ", ".join(f"{key} is now {value}" for key, value in line.items() if key not in ("kind", "at")),
        "resumed": f"the run goes on after step {step}",
    }
    return str(plain.get(kind) or (kind if step is None else f"{kind} of step {step}"))


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "unknown"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list():
            return [_finite(inner) for inner in value]
    return value
