"""Charts as pieces of HTML and SVG that adapt to the width and the colours of the page.

Text is HTML, not SVG, so that it has the same size on every screen. Each function returns markup with its text
escaped. The colours of the series are the CSS variables ``--s1`` to ``--s4``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

_WIDTH, _HEIGHT = 600.0, 180.0
_LINEAR = MaxNLocator(5, steps=[1, 2, 5, 10])
_DECADES = MaxNLocator(4, steps=[1, 2, 3, 4, 5, 10], integer=True)


@dataclass(frozen=True)
class Series:
    """One line of a line chart.

    Attributes
    ----------
    name
        Text in the legend.
    points
        Pairs ``(x, y)`` in ascending order of x.
    """

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """One row of `bars` or `intervals`.

    Attributes
    ----------
    name, shown
        Text on the left and on the right.
    value
        Position on the scale: 0 to 1 in `intervals`, at least 0 in `bars`.
    low, high
        Ends of the interval; None: no interval.
    strong
        Whether the row is highlighted.
    """

    name: str
    shown: str
    value: float
    low: float | None = None
    high: float | None = None
    strong: bool = False


def intervals(rows: Sequence[Bar]) -> Markup:
    """Draw one mark with its interval for each row, on a scale from 0 to 100 %."""
    return _draw("intervals", rows=rows)


def bars(rows: Sequence[Bar], series: int = 1) -> Markup:
    """Draw horizontal bars on a scale from 0 to the largest value; `series` is the number of their colour."""
    most = max((row.value for row in rows), default=0.0) or 1.0
    return _draw("bars", rows=rows, most=most, series=series)


def class_dots(
    names: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]], *, values: bool = True
) -> Markup:
    """Draw one row for each class and in it one dot for each series, on a scale from 0 to 100 %.

    Parameters
    ----------
    names
        C class names.
    series
        Name and C rates in 0..1 of each series; None: no dot.
    values
        Whether to print the rates of the last series.
    """
    return _draw("class_dots", names=names, series=series, values=values)


def heat(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    shown: Sequence[Sequence[str]] | None = None,
    corner: str = "",
) -> Markup:
    """Draw a table whose cells are tinted by their values, in a box that scrolls if it is wider than the page.

    Parameters
    ----------
    rows, columns
        Names.
    values
        Tint of each cell, by row: 0 is the background, 1 the full colour. Values outside 0..1 are clipped.
    shown
        Text of each cell; None: no text.
    corner
        Text of the cell above the row names.
    """
    lines = [
        (name, [(column, min(1.0, max(0.0, value))) for column, value in zip(columns, line, strict=True)])
        for name, line in zip(rows, values, strict=True)
    ]
    return _draw("heat", lines=lines, columns=columns, shown=shown, corner=corner)


def lines(series: Sequence[Series], *, x: str, y: str, log: bool = False) -> Markup:
    """Draw a line chart with a legend; return empty markup if there is no point to draw.

    Parameters
    ----------
    series
        Lines. Points that are not finite are left out, and on a logarithmic scale those that are not positive.
    x, y
        Names of the axes.
    log
        Whether the y axis is logarithmic.
    """
    kept = [
        [(a, b) for a, b in line.points if b is not None and math.isfinite(b) and (b > 0 or not log)] for line in series
    ]
    every = [point for points in kept for point in points]
    if not every:
        return Markup("")
    left, right = min(a for a, _ in every), max(a for a, _ in every)
    low, high = min(b for _, b in every), max(b for _, b in every)
    scale = math.log10 if log else float
    ticks = _log_ticks(low, high) if log else _ticks(min(0.0, low), high)
    bottom, top = scale(ticks[0]), scale(ticks[-1])

    def place(a: float, b: float) -> tuple[float, float]:
        return _WIDTH * (a - left) / ((right - left) or 1.0), _HEIGHT * (1 - (scale(b) - bottom) / (top - bottom))

    drawn = [[place(a, b) for a, b in points] for points in kept]
    first = 3 if len(series) == 1 else 1  # a single line has the accent colour
    return _draw(
        "lines",
        names=[line.name for line in series],
        first=first,
        paths=[(number, _path(places)) for number, places in enumerate(drawn, first) if places],
        ticks=[(tick, place(left, tick)[1]) for tick in ticks],
        width=_WIDTH,
        height=_HEIGHT,
        left=left,
        right=right,
        x=x,
        y=y,
    )


def legend(names: Sequence[str], first: int = 1) -> Markup:
    """Draw the names of the series with their colours; `first` is the number of the first colour."""
    return _draw("legend", names=names, first=first)


def _path(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points of a line; a single point is extended to a short line, because a point is not visible."""
    return points if len(points) > 1 else [*points, (points[0][0] + 1, points[0][1])]


def _ticks(low: float, high: float) -> list[float]:
    """Return two to seven round numbers that enclose a range."""
    return [float(tick) for tick in _LINEAR.tick_values(low, high if high > low else low + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return two to six powers of ten that enclose a range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0 ** (first + step) for step in _DECADES.tick_values(0, max(last - first, 1))]


def _draw(macro: str, **values: object) -> Markup:
    drawn: Markup = getattr(_MACROS, macro)(**values)
    return drawn


_MACROS = (
    Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    .from_string("""
{% macro intervals(rows) %}
<div class="rows stacked">
{% for row in rows %}
{% set low = row.value if row.low is none else row.low %}
{% set high = row.value if row.high is none else row.high %}
<div class="row{{ " strong" if row.strong }}"><span class="name">{{ row.name }}</span><span class="track">
<i class="range" style="left:{{ "%.2f"|format(100 * low) }}%;width:{{ "%.2f"|format(100 * (high - low)) }}%"></i>
<i class="tick" style="left:{{ "%.2f"|format(100 * row.value) }}%"></i></span><span class="value">{{ row.shown }}
{%- if high > low %} <small>{{ "%.1f to %.1f"|format(100 * low, 100 * high) }}</small>{% endif %}</span></div>
{% endfor %}
<div class="row scale"><span></span><span class="track">
{% for place in (0, 25, 50, 75, 100) %}
<b style="left:{{ place }}%">{{ place }}{{ " %" if loop.last }}</b>
{% endfor %}
</span><span></span></div></div>
{% endmacro %}

{% macro bars(rows, most, series) %}
<div class="rows">
{% for row in rows %}
<div class="row{{ " strong" if row.strong }}"><span class="name">{{ row.name }}</span><span class="track plain">
<i class="bar" style="width:{{ "%.2f"|format(100 * row.value / most) }}%;background:var(--s{{ series }})"></i></span>
<span class="value">{{ row.shown }}</span></div>
{% endfor %}
</div>
{% endmacro %}

{% macro class_dots(names, series, values) %}
{{ legend(series|map("first")) }}
<div class="rows scroll">
{% for name in names %}
{% set number = loop.index0 %}
<div class="row"><span class="name">{{ name }}</span><span class="track">
{% for title, rates in series %}
{% if rates[number] is not none %}
<i class="dot" style="left:{{ "%.2f"|format(100 * rates[number]) }}%;background:var(--s{{ loop.index }})"
title="{{ title }}: {{ "%.1f"|format(100 * rates[number]) }} %"></i>
{% endif %}
{% endfor %}
{% set last = series[-1][1][number] %}
</span><span class="value">
{%- if values %}{{ "–" if last is none else "%.0f %%"|format(100 * last) }}{% endif %}</span></div>
{% endfor %}
</div>
{% endmacro %}

{% macro heat(lines, columns, shown, corner) %}
<div class="wide"><table class="heat"><tr><th>{{ corner }}</th>
{% for name in columns %}
<th scope="col"><span>{{ name }}</span></th>
{% endfor %}
</tr>
{% for name, cells in lines %}
{% set number = loop.index0 %}
<tr><th scope="row">{{ name }}</th>
{% for column, value in cells %}
<td style="--v:{{ "%.0f"|format(100 * value) }}%"
{%- if value > 0.55 %} class="full"{% endif %} title="{{ name }} → {{ column }}">
{{- shown[number][loop.index0] if shown }}</td>
{% endfor %}
</tr>
{% endfor %}
</table></div>
{% endmacro %}

{% macro lines(names, first, paths, ticks, width, height, left, right, x, y) %}
{{ legend(names, first) }}
<div class="plot"><div class="yaxis">
{% for tick, top in ticks %}
<b style="top:{{ "%.1f"|format(100 * top / height) }}%">{{ "%g"|format(tick) }}</b>
{% endfor %}
</div>
<svg viewBox="0 0 {{ "%g %g"|format(width, height) }}" preserveAspectRatio="none" role="img"
aria-label="{{ y }} over {{ x }}"><g class="rules">
{% for _, top in ticks %}
<line x1="0" x2="{{ "%g"|format(width) }}" y1="{{ "%.1f"|format(top) }}" y2="{{ "%.1f"|format(top) }}"/>
{% endfor %}
</g>
{% for number, points in paths %}
<path d="{% for a, b in points %}{{ "M" if loop.first else "L" }}{{ "%.1f,%.1f"|format(a, b) }}{% endfor %}"
style="stroke:var(--s{{ number }})"/>
{% endfor %}
</svg></div>
<div class="xaxis"><span>{{ "%g"|format(left) }}</span><span>{{ x }}</span><span>{{ "%g"|format(right) }}</span></div>
{% endmacro %}

{% macro legend(names, first=1) %}
<div class="legend">
{% for name in names %}
<span><i style="background:var(--s{{ first + loop.index0 }})"></i>{{ name }}</span>
{% endfor %}
</div>
{% endmacro %}
""")
    .module
)
