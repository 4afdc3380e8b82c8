"""The charts of the report: inline SVG for the marks, HTML for the words.

Marks are drawn in a square of 1000 by 1000 that is stretched to the size of the page, with strokes that do not scale;
words are ordinary text beside and above it. So one chart has readable labels and even lines on a phone and on a wide
screen, and takes its colours from the page's style sheet in light and in dark. No script, no library, nothing to fetch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Literal

Point = tuple[float, float]
Tone = Literal["accent", "ink", "muted", "faint"]
Mark = Literal["line", "dots"]

SIZE = 1000.0
MAX_POINTS = 400
"""Points of one line; more are drawn as the means of so many buckets."""
MAX_BARS = 80
"""Stacked bars in one chart."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    label: str
    points: Sequence[Point]
    tone: Tone = "accent"
    mark: Mark = "line"


def number(value: float) -> str:
    """A number for a person: three significant digits, thousands apart, tiny ones as a power of ten."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if size >= 100:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that span `low` to `high`: the first is not above, the last not below."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(step))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= step * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """The same curve with at most so many points: means of equal runs."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(run[len(run) // 2][0], sum(y for _, y in run) / len(run)) for run in runs]


def rolling(points: Sequence[Point], width: int) -> list[Point]:
    """The mean over the last `width` points, at each point."""
    sums = list(accumulate((y for _, y in points), initial=0.0))
    return [(x, (sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width)) for i, (x, _) in enumerate(points)]


class Scale:
    """Values to the 1000 units of the drawing and to per cent of the page."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.span = low, (high - low) or 1.0

    def share(self, value: float) -> float:
        return (value - self.low) / self.span

    def units(self, value: float) -> str:
        return f"{self.share(value) * SIZE:.1f}"

    def up(self, value: float) -> str:
        """The same from below, because a drawing counts from above."""
        return f"{(1 - self.share(value)) * SIZE:.1f}"

    def percent(self, value: float) -> str:
        return f"{self.share(value) * 100:.2f}%"


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    y_range: tuple[float, float] | None = None,
    form: Callable[[float], str] = number,
    bound: tuple[float, str] | None = None,
    short: bool = False,
    legend: bool = True,
) -> str:
    """Lines and dots over steps. `y_range` is shown at least; `bound` is a dashed line with a name.

    `label` says in words what is seen. There must be at least one point.
    """
    points = [point for each in series for point in each.points]
    values = [y for _, y in points] + ([bound[0]] if bound else []) + list(y_range or ())
    y_ticks = ticks(min(values), max(values), 2 if short else 5)
    across = Scale(min(x for x, _ in points), max(x for x, _ in points))
    upward = Scale(y_ticks[0], y_ticks[-1])
    marks = [_grid(y_ticks, upward)]
    if bound:
        marks.append(f'<path class="bound" d="M0 {upward.up(bound[0])}H1000"/>')
    marks += [_series(each, across, upward) for each in series]
    words = _bound_tag(f"bottom:{upward.percent(bound[0])}", bound[1]) if bound else ""
    x_ticks = [x for x in ticks(across.low, across.low + across.span, 5) if across.low <= x <= across.low + across.span]
    below = _steps([x for x in x_ticks if x == int(x)], across)
    keys = [(each.label, f"{each.mark} {each.tone}") for each in series] if legend else []
    beside = [(upward.percent(y), form(y)) for y in y_ticks]
    return _plot("".join(marks), label=label, words=words, beside=beside, below=below, short=short, keys=keys)


def _series(series: Series, across: Scale, upward: Scale) -> str:
    if series.mark == "dots":
        dots = "".join(f"M{across.units(x)} {upward.up(y)}h.01" for x, y in series.points)
        return f'<path class="line {series.tone}" d="{_path(series.points, across, upward)}"/>' + (
            f'<path class="dots {series.tone}" d="{dots}"/>'
        )
    points = thin(series.points)
    if len(points) == 1:
        return _series(Series(label=series.label, points=points, tone=series.tone, mark="dots"), across, upward)
    return f'<path class="line {series.tone}" d="{_path(points, across, upward)}"/>'


def _path(points: Sequence[Point], across: Scale, upward: Scale) -> str:
    return "M" + "L".join(f"{across.units(x)} {upward.up(y)}" for x, y in points)


def histogram(counts: Mapping[int, int], *, bound: int, label: str) -> str:
    """Bars for whole numbers from 0, and a line behind the last number that is allowed."""
    last = max([bound + 1, *counts])
    values = range(min([0, *counts]), last + 1)
    across = Scale(values[0] - 0.5, last + 0.5)
    y_ticks = ticks(0, max(counts.values(), default=1), 4)
    upward = Scale(0, y_ticks[-1])
    width = 0.62
    marks = [_grid(y_ticks, upward)]
    for value, count in counts.items():
        left, wide = across.share(value - width / 2) * SIZE, width / across.span * SIZE
        tone = "accent" if value <= bound else "bad"
        top = upward.share(count) * SIZE
        marks.append(
            f'<rect class="{tone}" x="{left:.1f}" y="{SIZE - top:.1f}" width="{wide:.1f}" height="{top:.1f}"/>'
        )
    edge = across.percent(bound + 0.5)
    marks.append(f'<path class="bound" d="M{across.units(bound + 0.5)} 0V1000"/>')
    words = _bound_tag(f"left:{edge};top:0", f"bound {bound}", upright=True)
    total = sum(counts.values())
    if len(values) <= 8:
        for value, count in counts.items():
            words += (
                f'<span class="count" style="left:{across.percent(value)};bottom:{upward.percent(count)}">'
                f"{count / total:.0%}</span>"
            )
    every = math.ceil(len(values) / 12)
    below = [(across.percent(value), str(value)) for value in values if value % every == 0]
    beside = [(upward.percent(y), number(y)) for y in y_ticks]
    return _plot("".join(marks), label=label, words=words, beside=beside, below=below)


def stacked_bars(
    layers: Sequence[tuple[str, str, Sequence[Point]]], *, label: str, form: Callable[[float], str] = number
) -> str:
    """Layers (name, tone, points) on top of each other; all have the same x values."""
    thinned = [(name, tone, thin(points, MAX_BARS)) for name, tone, points in layers]
    xs = [x for x, _ in thinned[0][2]]
    gap = (xs[-1] - xs[0]) / (len(xs) - 1) if len(xs) > 1 else 1.0
    totals = [sum(points[i][1] for _, _, points in thinned) for i in range(len(xs))]
    y_ticks = ticks(0, max(totals), 5)
    across, upward = Scale(xs[0] - gap / 2, xs[-1] + gap / 2), Scale(0, y_ticks[-1])
    floor = [0.0] * len(xs)
    marks = [_grid(y_ticks, upward)]
    wide = gap * 0.8 / across.span * SIZE
    for _, tone, points in thinned:
        rects = []
        for i, (x, y) in enumerate(points):
            left = across.share(x - gap * 0.4) * SIZE
            top, height = (1 - upward.share(floor[i] + y)) * SIZE, upward.share(y) * SIZE
            rects.append(f"M{left:.1f} {top:.1f}h{wide:.1f}v{height:.1f}h-{wide:.1f}z")
            floor[i] += y
        marks.append(f'<path class="fill {tone}" d="{"".join(rects)}"/>')
    x_ticks = [x for x in ticks(xs[0], xs[-1], 5) if xs[0] <= x <= xs[-1] and x == int(x)] or xs[:1]
    below = _steps(x_ticks, across)
    beside = [(upward.percent(y), form(y)) for y in y_ticks]
    keys = [(name, f"fill {tone}") for name, tone, _ in reversed(thinned)]
    return _plot("".join(marks), label=label, beside=beside, below=below, keys=keys)


def _grid(y_ticks: Sequence[float], upward: Scale) -> str:
    lines = "".join(f"M0 {upward.up(y)}H1000" for y in y_ticks[1:])
    return f'<path class="grid" d="{lines}"/><path class="axis" d="M0 {upward.up(y_ticks[0])}H1000"/>'


def _steps(values: Sequence[float], across: Scale) -> list[tuple[str, str]]:
    """Labels below a chart over steps; the first one says what they are."""
    return [(across.percent(x), f"{'step ' if i == 0 else ''}{number(x)}") for i, x in enumerate(values)]


def _bound_tag(place: str, text: str, *, upright: bool = False) -> str:
    return f'<span class="tag{" upright" if upright else ""}" style="{place}">{escape(text)}</span>'


def _plot(
    marks: str,
    *,
    label: str,
    beside: Sequence[tuple[str, str]],
    below: Sequence[tuple[str, str]],
    words: str = "",
    short: bool = False,
    keys: Sequence[tuple[str, str]] = (),
) -> str:
    """One picture with its words. To a screen reader it is an image that `label` describes."""
    y_labels = "".join(f'<span style="bottom:{place}">{escape(text)}</span>' for place, text in beside)
    x_labels = "".join(f'<span style="left:{place}">{escape(text)}</span>' for place, text in below)
    widest = max(len(text) for _, text in beside)
    legend = "".join(f'<li><i class="key {tone}"></i>{escape(name)}</li>' for name, tone in keys)
    return (
        (f'<ul class="legend">{legend}</ul>' if keys else "")
        + f'<div class="plot{" short" if short else ""}" role="img" aria-label="{escape(label)}"'
        + f' style="--y:{widest}ch"><div class="y">{y_labels}</div>'
        + '<div class="area"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">'
        + f'{marks}</svg>{words}</div><div class="x">{x_labels}</div></div>'
    )
