"""Charts as small pieces of HTML that follow the page's width and colours; text keeps its size on a phone.

Each function returns markup; all text in it is escaped. Series have the page's colours ``--s1`` to ``--s4``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 600.0, 180.0


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes
    ----------
    name
        In the legend.
    points
        ``(x, y)`` in order of x.
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
        In the units of the scale.
    low, high
        Ends of its interval; the value itself if there is none.
    strong
        Whether it is the row that matters.
    """

    name: str
    shown: str
    value: float
    low: float | None = None
    high: float | None = None
    strong: bool = False


def intervals(rows: Sequence[Bar]) -> Markup:
    """Ticks with their intervals on a scale from 0 to 100 %; values in 0..1."""
    parts = [Markup('<div class="rows stacked">')]
    for row in rows:
        low, high = row.low if row.low is not None else row.value, row.high if row.high is not None else row.value
        parts.append(
            Markup(
                '<div class="row{strong}"><span class="name">{name}</span><span class="track">'
                '<i class="range" style="left:{left:.2f}%;width:{width:.2f}%"></i>'
                '<i class="tick" style="left:{dot:.2f}%"></i></span><span class="value">{shown}{ends}</span></div>'
            ).format(
                strong=" strong" if row.strong else "",
                name=row.name,
                left=100 * low,
                width=100 * (high - low),
                dot=100 * row.value,
                shown=row.shown,
                ends=_ends(low, high) if high > low else "",
            )
        )
    parts.append(Markup('<div class="row scale"><span></span><span class="track">'))
    ticks = (("0", 0), ("25", 25), ("50", 50), ("75", 75), ("100 %", 100))
    parts += [Markup('<b style="left:{}%">{}</b>').format(place, text) for text, place in ticks]
    return Markup("").join([*parts, Markup("</span><span></span></div></div>")])


def _ends(low: float, high: float) -> Markup:
    return Markup(" <small>{:.1f} to {:.1f}</small>").format(100 * low, 100 * high)


def bars(rows: Sequence[Bar], series: int = 1) -> Markup:
    """Horizontal bars from 0 to the largest value."""
    most = max((row.value for row in rows), default=0.0) or 1.0
    cell = Markup(
        '<div class="row{strong}"><span class="name">{name}</span><span class="track plain">'
        '<i class="bar" style="width:{width:.2f}%;background:var(--s{series})"></i></span>'
        '<span class="value">{shown}</span></div>'
    )
    inner = Markup("").join(
        cell.format(
            name=row.name,
            width=100 * row.value / most,
            shown=row.shown,
            series=series,
            strong=" strong" if row.strong else "",
        )
        for row in rows
    )
    return Markup('<div class="rows">{}</div>').format(inner)


def class_dots(
    names: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]], *, values: bool = True
) -> Markup:
    """One row a class, one dot for each series, on a scale from 0 to 100 %; `values`: the last one's in figures."""
    parts = [legend([name for name, _ in series]), Markup('<div class="rows scroll">')]
    for place, name in enumerate(names):
        dots = Markup("")
        for number, (title, rates) in enumerate(series, 1):
            value = rates[place]
            if value is not None:
                dots += Markup(
                    '<i class="dot" style="left:{:.2f}%;background:var(--s{})" title="{}: {:.1f} %"></i>'
                ).format(100 * value, number, title, 100 * value)
        last = series[-1][1][place]
        shown = "" if not values else "–" if last is None else f"{100 * last:.0f} %"
        parts.append(
            Markup(
                '<div class="row"><span class="name">{}</span><span class="track">{}</span>'
                '<span class="value">{}</span></div>'
            ).format(name, dots, shown)
        )
    return Markup("").join([*parts, Markup("</div>")])


def heat(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    shown: Sequence[Sequence[str]] | None = None,
    corner: str = "",
) -> Markup:
    """Table whose cells are tinted by their value in 0..1, in a box that scrolls by itself if it is wide."""
    head = Markup("").join(Markup('<th scope="col"><span>{}</span></th>').format(name) for name in columns)
    parts = [Markup('<div class="wide"><table class="heat"><tr><th>{}</th>{}</tr>').format(corner, head)]
    cell = Markup('<td style="--v:{:.0f}%"{} title="{} → {}">{}</td>')
    for number, (name, line) in enumerate(zip(rows, values, strict=True)):
        cells = Markup("").join(
            cell.format(
                100 * min(1.0, max(0.0, value)),
                Markup(' class="full"') if value > 0.55 else "",
                name,
                column,
                shown[number][place] if shown else "",
            )
            for place, (value, column) in enumerate(zip(line, columns, strict=True))
        )
        parts.append(Markup('<tr><th scope="row">{}</th>{}</tr>').format(name, cells))
    return Markup("").join([*parts, Markup("</table></div>")])


def lines(series: Sequence[Series], *, x: str, y: str, log: bool = False) -> Markup:
    """Line chart with a legend; empty markup if there is nothing to draw.

    Parameters
    ----------
    series
        Lines; points that are not finite, or not positive on a log scale, are left out.
    x, y
        Names of the axes.
    log
        Whether y is logarithmic.
    """
    kept = [
        [(a, b) for a, b in line.points if b is not None and math.isfinite(b) and (b > 0 or not log)] for line in series
    ]
    every = [point for points in kept for point in points]
    if not every:
        return Markup("")
    scale = math.log10 if log else float
    left, right = min(a for a, _ in every), max(a for a, _ in every)
    ticks = _log_ticks(every) if log else _ticks(min(0.0, *(b for _, b in every)), max(b for _, b in every))
    bottom, top = scale(ticks[0]), scale(ticks[-1])

    def place(a: float, b: float) -> tuple[float, float]:
        return (
            _WIDTH * (a - left) / ((right - left) or 1.0),
            _HEIGHT * (1 - (scale(b) - bottom) / ((top - bottom) or 1.0)),
        )

    first = 3 if len(series) == 1 else 1  # a single line is the one that matters
    drawn = [
        f'<path d="{_path([place(a, b) for a, b in points])}" style="stroke:var(--s{number})"/>'
        for number, points in enumerate(kept, first)
        if points
    ]
    rules = [f'<line x1="0" x2="{_WIDTH:g}" y1="{place(left, t)[1]:.1f}" y2="{place(left, t)[1]:.1f}"/>' for t in ticks]
    labels = Markup("").join(
        Markup('<b style="top:{:.1f}%">{}</b>').format(100 * place(left, t)[1] / _HEIGHT, f"{t:g}") for t in ticks
    )
    svg = (
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(y)} over {escape(x)}"><g class="rules">{"".join(rules)}</g>{"".join(drawn)}</svg>'
    )
    return Markup('{}<div class="plot"><div class="yaxis">{}</div>{}</div><div class="xaxis">{}</div>').format(
        legend([line.name for line in series], first),
        labels,
        Markup(svg),
        Markup("<span>{}</span><span>{}</span><span>{}</span>").format(f"{left:g}", x, f"{right:g}"),
    )


def legend(names: Sequence[str], first: int = 1) -> Markup:
    """Coloured marks with names, in the order of the series; `first` is the number of the first colour."""
    items = Markup("").join(
        Markup('<span><i style="background:var(--s{})"></i>{}</span>').format(number, name)
        for number, name in enumerate(names, first)
    )
    return Markup('<div class="legend">{}</div>').format(items)


def _path(points: Sequence[tuple[float, float]]) -> str:
    if len(points) == 1:
        (a, b), far = points[0], points[0][0] + 1.0
        return f"M{a:.1f},{b:.1f}L{far:.1f},{b:.1f}"
    return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in points)


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers that enclose a range."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 10) for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(points: Sequence[tuple[float, float]]) -> list[float]:
    """Powers of ten that enclose the values, five at most and a step more."""
    low, high = math.log10(min(b for _, b in points)), math.log10(max(b for _, b in points))
    first = math.floor(low + 1e-9)
    span = max(math.ceil(high - 1e-9) - first, 1)
    step = max(1, -(-span // 4))
    return [10.0 ** (first + step * number) for number in range(-(-span // step) + 1)]
