"""The timeline as a picture: a few steps of every stage, and below them each completion, so that the long tail shows.

Marks are SVG in units of 1000 across, words are HTML, as in `charts`. A picture stays small however long the run was:
it shows a window, neighbouring bars that would touch are one, and of many completions only some are drawn.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from asyncflow.report.bottleneck import LEARNER, PREFIX, in_words, waits_of
from asyncflow.report.charts import SIZE, Scale, number, ticks
from asyncflow.runtime.timeline import Span

STEPS = 3
"""Steps in the picture."""
MAX_LANES = 160
"""Completions in the picture."""
TOUCH = 0.6
"""Units between two bars that are drawn as one, and the narrowest bar."""

FIRST, LAST = ("feeder", "rollout"), ("actor_update", "weights", "evaluator")
LANES = "generation/"

TONES = {
    "busy": "accent",
    "blocked": "faint",
    "optimizer": "accent-2",
    "commit": "accent-3",
    "publish": "accent-3",
    "drain": "accent-3",
}
"""What is drawn, in the order in which it is drawn; the rest of a row's time is idle."""

KEYS = (
    ("computes", "fill accent"),
    ("optimizer", "fill accent-2"),
    ("commits and publishes; waits until the engine is empty", "fill accent-3"),
    ("has work and may not go on", "fill faint"),
    ("a version is published", "ink"),
    ("the engine has taken it", "dashed"),
)


SPANNING = ("completion with tokens of two versions or more", "fill accent")


@dataclass(frozen=True, kw_only=True)
class Window:
    """Some steps that follow each other."""

    first: int
    last: int
    """Steps, counted from 1."""
    began: float
    ended: float
    """Seconds since the epoch."""


def windows(steps: Sequence[Mapping[str, Any]]) -> list[Window]:
    """Windows of three, two and one steps in the middle of the run; empty when no step was timed.

    The first step, in which everything has to fill up, and steps beside an evaluation are left out where possible.
    """
    keys = ("step", "at", "step_time")
    timed = [step for step in steps if all(isinstance(step.get(key), int | float) for key in keys)]
    steady, any_ = [], []
    for count in range(min(STEPS, len(timed)), 0, -1):
        runs = [timed[i : i + count] for i in range(len(timed) - count + 1)]
        runs = [run for run in runs if all(b["step"] == a["step"] + 1 for a, b in pairwise(run))]
        any_ += _middle(runs)
        steady += _middle([run for run in runs if run[0] is not timed[0] and not any(_evaluates(step) for step in run)])
    return steady or any_


def _middle(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[Window]:
    """The window of the run of steps in the middle, if there is one."""
    if not runs:
        return []
    first, last = runs[len(runs) // 2][0], runs[len(runs) // 2][-1]
    return [
        Window(first=first["step"], last=last["step"], began=first["at"] - first["step_time"], ended=last["at"]),
    ]


def _evaluates(step: Mapping[str, Any]) -> bool:
    return bool(step.get(f"{PREFIX}evaluator/busy"))


def narrowed(spans: Sequence[Span], candidates: Sequence[Window]) -> tuple[Window, list[Span]]:
    """The widest window whose completions can all be drawn, or the narrowest one, with its spans."""
    for window in candidates:
        inside = [span for span in spans if span.began < window.ended and span.ended > window.began]
        if sum(span.track.startswith(LANES) for span in inside) <= MAX_LANES or window is candidates[-1]:
            return window, inside
    raise ValueError("there is no window")


def gantt(spans: Sequence[Span], window: Window) -> tuple[str, str]:
    """The picture, and what it shows in words."""
    across = Scale(window.began, window.ended)
    tracks = _rows(spans)
    lanes = sorted((s for s in spans if s.track.startswith(LANES)), key=lambda s: (s.began, s.ended))
    every = -(-len(lanes) // MAX_LANES)
    shown = lanes[::every] if every else []
    words = _words(tracks, lanes, every, window)
    lines, tags = _versions(spans, window, across)
    stages = "".join(_row(tracks[track], place, across) for place, track in enumerate(tracks))
    names: list[tuple[float, str]] = [(place, track) for place, track in enumerate(tracks)]
    completions = "".join(_completion(span, place, across) for place, span in enumerate(shown))
    pitch = max(0.125, min(0.3125, 16 / max(1, len(shown))))
    longest = max((len(name) for name in tracks), default=0)
    keys = [*KEYS, *([SPANNING] if any(_spans_versions(span) for span in shown) else [])]
    legend = "".join(f'<li><i class="key {tone}"></i>{escape(name)}</li>' for name, tone in keys)
    html = [
        f'<ul class="legend">{legend}</ul>',
        f'<div class="plot gantt" role="img" aria-label="{escape(words)}" style="--y:{longest}ch">',
        _strip(stages, lines, rows=len(tracks), height=1.5 * len(tracks), names=names, tags=tags),
    ]
    if shown:
        names = [(len(shown) / 2 - 0.5, "completions")]
        html.append(_strip(completions, lines, rows=len(shown), height=pitch * len(shown), names=names))
    seconds = ticks(0, window.ended - window.began, 5)
    labels = "".join(
        f'<span style="left:{across.percent(window.began + x)}">{number(x)} s</span>'
        for x in seconds
        if x <= window.ended - window.began
    )
    html.append(f'<div class="x">{labels}</div></div>')
    return "".join(html), words


def _rows(spans: Iterable[Span]) -> dict[str, list[Span]]:
    """Tracks that do something in the window, in data order → their spans."""
    rows: dict[str, list[Span]] = {}
    for span in spans:
        if "/" not in span.track:
            rows.setdefault(span.track, []).append(span)
    middle = [track for track in rows if track not in FIRST + LAST]
    order = [*FIRST, *middle, *LAST]
    return {t: rows[t] for t in order if t in rows and any(span.name == "busy" for span in rows[t])}


def _row(spans: Sequence[Span], place: int, across: Scale) -> str:
    """One track: a bar where it computes, a low one where it is blocked, a line where it is idle."""
    marks = [f'<path class="axis" d="M0 {place + 0.5}H1000"/>']
    for name, tone in TONES.items():
        low = name == "blocked"
        top, height = (place + 0.38, 0.24) if low else (place + 0.22, 0.56)
        bars = merged((across.share(s.began) * SIZE, across.share(s.ended) * SIZE) for s in spans if s.name == name)
        if bars:
            marks.append(f'<path class="fill {tone}" d="{"".join(_bar(a, b, top, height) for a, b in bars)}"/>')
    return "".join(marks)


def merged(bars: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Bars (from, to) in order, cut to the picture; those that would touch are one."""
    found: list[tuple[float, float]] = []
    for left, right in sorted((max(0.0, a), min(SIZE, max(b, a + TOUCH))) for a, b in bars):
        if found and left - found[-1][1] < TOUCH:
            found[-1] = found[-1][0], max(found[-1][1], right)
        else:
            found.append((left, right))
    return found


def _bar(left: float, right: float, top: float, height: float) -> str:
    return f"M{left:.1f} {top:g}h{right - left:.1f}v{height:g}H{left:.1f}z"


def _completion(span: Span, place: int, across: Scale) -> str:
    (bar,) = merged([(across.share(span.began) * SIZE, across.share(span.ended) * SIZE)])
    versions = span.args.get("versions")
    spanning = _spans_versions(span)
    facts = [span.name, f"{span.args.get('tokens', '?')} tokens", f"{number(span.seconds)} s"]
    if isinstance(versions, list):
        facts.append(f"version {', '.join(str(version) for version in versions)}")
    shape = f'<path class="fill {"accent" if spanning else "accent-2"}" d="{_bar(*bar, place + 0.1, 0.8)}"/>'
    return f"<g><title>{escape(', '.join(facts))}</title>{shape}</g>"


def _spans_versions(span: Span) -> bool:
    versions = span.args.get("versions")
    return isinstance(versions, list) and len(versions) > 1


def _versions(
    spans: Iterable[Span], window: Window, across: Scale
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Vertical lines (class, place) where versions were published and where the engine had taken them, and the names
    of the former (place, name)."""
    lines, tags = [], []
    for span in spans:
        if window.began < span.ended < window.ended and span.name in ("publish", "load"):
            kind = "published" if span.name == "publish" else "loaded"
            lines.append((kind, across.units(span.ended)))
            if span.name == "publish":
                tags.append((across.percent(span.ended), str(span.args.get("version", ""))))
    return lines, tags


def _strip(
    marks: str,
    lines: Sequence[tuple[str, str]],
    *,
    rows: int,
    height: float,
    names: Sequence[tuple[float, str]],
    tags: Sequence[tuple[str, str]] = (),
) -> str:
    """Rows of equal height with their names beside them; `height` in rem."""
    beside = "".join(
        f'<span style="bottom:{(1 - (place + 0.5) / rows) * 100:.2f}%">{escape(name)}</span>' for place, name in names
    )
    marks += "".join(f'<path class="{kind}" d="M{x} 0V{rows}"/>' for kind, x in lines)
    above = "".join(f'<span class="version" style="left:{left}">{escape(name)}</span>' for left, name in tags)
    return (
        f'<div class="y">{beside}</div><div class="area" style="height:{height:g}rem">'
        f'<svg viewBox="0 0 1000 {rows}" preserveAspectRatio="none" aria-hidden="true">{marks}</svg>{above}</div>'
    )


def _words(tracks: Mapping[str, Sequence[Span]], lanes: Sequence[Span], every: int, window: Window) -> str:
    steps = f"Steps {window.first} to {window.last}" if window.last > window.first else f"Step {window.first}"
    said = [f"{steps}: {number(window.ended - window.began)} s."]
    if LEARNER in tracks:
        busy = sum(min(s.ended, window.ended) - max(s.began, window.began) for s in tracks[LEARNER] if s.name == "busy")
        said.append(f"The learner was busy for {busy / (window.ended - window.began):.0%} of it.")
    if lanes:
        longest = max(lanes, key=lambda span: span.seconds)
        said.append(
            f"Half of the {len(lanes):,} completions took less than "
            f"{number(statistics.median(span.seconds for span in lanes))} s, the longest {number(longest.seconds)} s "
            f"({longest.name}, {longest.args.get('tokens', '?')} tokens)."
        )
    if every > 1:
        said.append(f"Drawn is one in {every} of them, in the order in which they began.")
    return " ".join(said)


def stage_shares(shares: Mapping[str, float]) -> tuple[str, str]:
    """Busy, blocked and idle shares of each stage as bars with their numbers, and the same in words.

    `shares` as `bottleneck.mean_shares` gives them; there must be a stage with a share that is not zero.
    """
    names = {key.split("/")[0] for key, share in shares.items() if key.endswith("/busy") and share}
    middle = sorted(name for name in names if name not in FIRST + LAST)
    lines, words = [], []
    for name in (name for name in (*FIRST, *middle, *LAST) if name in names):
        busy, blocked = shares[f"{name}/busy"], shares.get(f"{name}/blocked", 0.0)
        waits = sorted(waits_of(shares, name).items(), key=lambda wait: -wait[1])
        waits = [(cause, share) for cause, share in waits if share >= 0.01 and cause != "end"]
        parts = [f"busy {busy:.0%}"] + [f"{share:.0%} for {in_words(cause)}" for cause, share in waits]
        bars = "".join(
            f'<i class="{tone}" style="width:{min(1.0, share) * 100:.1f}%"></i>'
            for tone, share in (("accent", busy), ("faint", blocked))
        )
        said = f"{parts[0]}{'; waited ' if parts[1:] else ''}{', '.join(parts[1:])}"
        lines.append(
            f'<div class="share"><b>{escape(name)}</b><span class="bar" aria-hidden="true">{bars}</span>'
            f"<span>{escape(said)}</span></div>"
        )
        words.append(f"{name} {said}")
    return f'<div class="shares">{"".join(lines)}</div>', "; ".join(words)
