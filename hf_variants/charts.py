"""Line and bar charts as SVG, in the colours of the drawings, without references to anything outside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .drawing import COLOURS, INKS, STYLE, width_of


WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 44, 52
LINE = 16
# Of series, one after the other: outlines of kinds of boxes, which differ on both grounds.
SERIES = ("embedding", "attention", "feed_forward", "head", "norm", "projection")
DASHES = ("", "7 4", "2 3")


@dataclass(frozen=True)
class Series:
    """
    Attributes:
        name: for the legend.
        points: (x, y); those that are no number, or not above 0 on a logarithmic axis, are left out.
    """

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False
) -> str:
    """
    Lines over a plane.

    Args:
        title: above it.
        series: the lines, in the order of the legend.
        x_label, y_label: of the axes.
        log_x, log_y: logarithmic axes.

    Returns:
        an SVG document.
    """
    drawn = [(each.name, [(x, y) for x, y in each.points if _fits(x, log_x) and _fits(y, log_y)]) for each in series]
    points = [point for _, found in drawn for point in found]
    if not points:
        return _document(title, [], 0)
    horizontal = _Axis([x for x, _ in points], LEFT, WIDTH - RIGHT, log_x)
    vertical = _Axis([y for _, y in points], HEIGHT - BOTTOM, TOP, log_y)
    shapes = [*_grid(horizontal, vertical), *_labels(x_label, y_label)]
    for index, (_, found) in enumerate(drawn):
        where = " ".join(f"{horizontal(x):.1f},{vertical(y):.1f}" for x, y in found)
        shapes.append(f'<polyline class="s{index % len(SERIES)}" points="{where}"{_dash(index)}/>')
        if len(found) <= 12:
            shapes += [
                f'<circle class="f{index % len(SERIES)}" cx="{horizontal(x):.1f}" cy="{vertical(y):.1f}" r="2.6"/>'
                for x, y in found
            ]
    legend, rows = _legend([name for name, _ in drawn])
    return _document(title, shapes + legend, rows)


def bar_chart(title: str, bars: dict[str, dict[str, float]], label: str) -> str:
    """
    Stacked bars from left to right.

    Args:
        title: above them.
        bars: name -> part -> size; parts are drawn in the order in which they come first.
        label: of the axis.

    Returns:
        an SVG document.
    """
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    axis = _Axis([0.0, *(sum(bar.values()) for bar in bars.values())], LEFT + 60, WIDTH - RIGHT, False)
    room = (HEIGHT - TOP - BOTTOM) / max(1, len(bars))
    shapes = [
        f'<path class="grid" d="M{axis(tick):.1f} {TOP} V{HEIGHT - BOTTOM}"/>'
        f'<text x="{axis(tick):.1f}" y="{HEIGHT - BOTTOM + 18}">{_short(tick)}</text>'
        for tick in axis.ticks()
    ]
    shapes += _labels(label, "")
    for row, (name, bar) in enumerate(bars.items()):
        y, start = TOP + room * (row + 0.15), 0.0
        shapes.append(f'<text class="end" x="{LEFT + 52}" y="{y + room * 0.35 + 4:.1f}">{escape(name[:18])}</text>')
        for part, size in bar.items():
            index = parts.index(part) % len(SERIES)
            wide = axis(start + size) - axis(start)
            shapes.append(
                f'<rect class="f{index}" x="{axis(start):.1f}" y="{y:.1f}" width="{wide:.1f}" '
                f'height="{room * 0.7:.1f}"><title>{escape(f"{part}: {_short(size)}")}</title></rect>'
            )
            start += size
    legend, rows = _legend(parts, lines=False)
    return _document(title, shapes + legend, rows)


def _fits(value: float | None, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


class _Axis:
    """From values to pixels."""

    def __init__(self, values: Sequence[float], first: float, last: float, log: bool):
        self.log, self.first, self.last = log, first, last
        low, high = min(values), max(values)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        elif not log:
            room = (high - low) * 0.04
            low, high = (low if low == 0 else low - room), high + room
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return self.first + (value - low) / (high - low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            found = [10.0**power for power in powers][:: max(1, len(powers) // 6)]
            if len(found) >= 2:
                return found
            steps = [m * 10.0**p for p in range(math.floor(math.log10(self.low)) - 1, 19) for m in (1, 2, 3, 5)]
            return [each for each in steps if self.low <= each <= self.high][:8] or [self.low, self.high]
        rough = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [round(step * index, 12) for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _grid(horizontal: _Axis, vertical: _Axis) -> list[str]:
    shapes = []
    for tick in horizontal.ticks():
        x = horizontal(tick)
        shapes.append(f'<path class="grid" d="M{x:.1f} {TOP} V{HEIGHT - BOTTOM}"/>')
        shapes.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}">{_short(tick)}</text>')
    for tick in vertical.ticks():
        y = vertical(tick)
        shapes.append(f'<path class="grid" d="M{LEFT} {y:.1f} H{WIDTH - RIGHT}"/>')
        shapes.append(f'<text class="end" x="{LEFT - 8}" y="{y + 4:.1f}">{_short(tick)}</text>')
    return shapes


def _labels(x_label: str, y_label: str) -> list[str]:
    return [
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - BOTTOM + 38}">{escape(x_label)}</text>',
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">{escape(y_label)}</text>',
    ]


def _legend(names: Sequence[str], lines: bool = True) -> tuple[list[str], int]:
    """Below the plane, in as many rows as it takes."""
    shapes, x, row = [], float(LEFT), 0
    for index, name in enumerate(names):
        wide = width_of(name) + 44
        if x + wide > WIDTH - RIGHT and x > LEFT:
            x, row = LEFT, row + 1
        y = HEIGHT + LINE * row
        mark = (
            f'<path class="s{index % len(SERIES)}" d="M{x} {y} h22"{_dash(index)}/>'
            if lines
            else f'<rect class="f{index % len(SERIES)}" x="{x + 6}" y="{y - 5}" width="10" height="10"/>'
        )
        shapes.append(f'{mark}<text class="note" x="{x + 27}" y="{y + 4}">{escape(name)}</text>')
        x += wide
    return shapes, row + 1 if names else 0


def _dash(index: int) -> str:
    dash = DASHES[index // len(SERIES) % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _short(value: float) -> str:
    """1.5 G; 20 k; 0.003."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{value:.3g}"


def _document(title: str, shapes: list[str], rows: int) -> str:
    height = HEIGHT + LINE * rows

    def colours(shade: int) -> str:
        text, ground, _, frame = INKS[shade]
        found = [f"text {{ fill: {text}; }} .ground {{ fill: {ground}; }} .grid {{ stroke: {frame}; }}"]
        for index, kind in enumerate(SERIES):
            outline = COLOURS[kind][shade][1]
            found.append(f".s{index} {{ stroke: {outline}; }} .f{index} {{ fill: {outline}; }}")
        return "\n".join(found)

    own = ".end { text-anchor: end; } .grid { stroke-width: 0.5; opacity: 0.5; fill: none; }\n"
    own += ", ".join(f".s{index}" for index in range(len(SERIES))) + " { fill: none; stroke-width: 2; }\n"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
            'role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}{own}{colours(0)}",
            f"@media (prefers-color-scheme: dark) {{\n{colours(1)}\n}}</style>",
            f'<rect class="ground" width="{WIDTH}" height="{height}" rx="8"/>',
            f'<text class="name" x="{WIDTH / 2}" y="26">{escape(title)}</text>',
            *shapes,
            "</svg>\n",
        ]
    )
