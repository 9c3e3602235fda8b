"""Charts as SVG: lines, points and heat maps in the colours of the page they stand in.

Every colour is a CSS variable, so a chart is light or dark with its page; `standalone` gives a
chart that is a file of its own the same variables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 260  # user units; a page scales the whole
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40
LINE = 15  # of the legend
LONGEST = 66  # letters of a legend's line
COLOURS = 8
# Wong's eight colours, lighter on a dark page
LIGHT = ("#0072b2", "#c25a00", "#00805c", "#a8407a", "#8a6d00", "#2f7fb5", "#6a51a3", "#555555")
DARK = ("#56b4e9", "#f0a040", "#30c090", "#e58abf", "#e8d44d", "#9ad0f5", "#b9a5e8", "#bbbbbb")

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points under one name.

    Attributes:
        label: in the legend.
        points: (x, y).
        colour: from 0; it also chooses the marker.
        line: connect them, in the order of x.
        markers: draw the points.
        dashed: the line.
        names: of the points, shown under the pointer; empty, or one for each.
    """

    label: str
    points: Sequence[Point]
    colour: int
    line: bool = True
    markers: bool = True
    dashed: bool = False
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """A scale from the smallest to the largest of `values`, on `length` units from `start`."""

    low: float
    high: float
    log: bool
    start: float
    length: float

    def place(self, value: float) -> float:
        f = math.log10 if self.log else float
        return self.start + self.length * (f(value) - f(self.low)) / (f(self.high) - f(self.low))

    def ticks(self) -> list[float]:
        if not self.log:
            step = _step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            return [n * step for n in range(first, int(self.high / step + 1e-9) + 1)]
        few = self.high / self.low < 200
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        thin = max(1, len(decades) // 6)
        values = [m * 10.0**d for d in decades[::thin] for m in ((1, 2, 5) if few else (1,))]
        return [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]


def colours(variables: Sequence[str]) -> str:
    """Declarations of the series' colours."""
    return "".join(f"--s{i}:{value};" for i, value in enumerate(variables))


INK = "--ink:#1b1f24;--dim:#57606a;--rule:#d8dee4;--paper:#ffffff;--panel:#f6f8fa;"
INK_DARK = "--ink:#e6edf3;--dim:#9aa5b1;--rule:#343b44;--paper:#0f1318;--panel:#171c23;"
VARIABLES = (
    f":root{{{INK}{colours(LIGHT)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{INK_DARK}{colours(DARK)}}}}}"
)
CLASSES = (
    "svg.chart{font:12px system-ui,sans-serif;background:var(--paper)}"
    "svg.chart text{fill:var(--ink)}svg.chart .dim{fill:var(--dim)}"
    "svg.chart .grid{stroke:var(--rule)}svg.chart .frame{stroke:var(--dim);fill:none}"
)


def standalone(svg: str) -> str:
    """The chart as a file of its own."""
    style = f"<style>{VARIABLES}{CLASSES}</style>"
    head, tail = svg.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{tail}\n'


def chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    title: str = "",
) -> str:
    """Lines and points over two axes, the legend below.

    Args:
        series: at least one point among them; with `log_x` all x are above 0.
        x_label: of the axis below.
        y_label: of the axis at the left.
        log_x: the axis below is logarithmic.
        title: for readers of the screen.
    """
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    across = _axis(xs, log_x, LEFT, WIDTH - LEFT - RIGHT)
    up = _axis(ys, False, HEIGHT - BOTTOM, -(HEIGHT - BOTTOM - TOP))
    parts = _frame(across, up, x_label, y_label)
    for s in series:
        parts += _drawn(s, across, up)
    for row, s in enumerate(series):
        parts += _legend(s, HEIGHT + LINE * row + 4)
    return _svg(WIDTH, HEIGHT + LINE * len(series) + 4, title, parts)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[float | None]],
    highest: float,
    title: str = "",
) -> str:
    """A table of values, each on a field that is the darker the nearer it is to `highest`.

    Args:
        rows: labels, from the top.
        columns: labels.
        cells: a list per row; None leaves a field empty.
        highest: the value of the full colour.
        title: for readers of the screen.
    """
    left, top, high, right = 64, 84, 22, 50  # the last turned label leans over the right edge
    wide = (WIDTH - left - right) / max(1, len(columns))
    parts = []
    for j, name in enumerate(columns):
        x = left + wide * (j + 0.5)
        turned = f'transform="rotate(-40 {x:.1f} {top - 6})"'
        parts.append(f'<text x="{x:.1f}" y="{top - 6}" {turned}>{_cut(name, 20)}</text>')
    for i, (name, values) in enumerate(zip(rows, cells, strict=True)):
        y = top + high * i
        parts.append(f'<text x="{left - 6}" y="{y + 15}" text-anchor="end">{_cut(name, 9)}</text>')
        for j, value in enumerate(values):
            if value is not None:
                parts += _field(left + wide * j, y, wide, high, value, value / (highest or 1.0))
    return _svg(WIDTH, top + high * len(rows) + 8, title, parts)


def strips(
    rows: Sequence[tuple[str, Sequence[float]]], x_label: str, line: float | None, title: str = ""
) -> str:
    """A row for each name with its values as rings and a bar at their mean.

    Args:
        rows: (name, values), from the top; at least one value among them.
        x_label: of the axis below.
        line: where a dashed line goes through all rows; None: nowhere.
        title: for readers of the screen.
    """
    left, high = 104, 20
    floor = TOP + high * len(rows)
    across = _axis([v for _, values in rows for v in values], False, left, WIDTH - left - RIGHT)
    parts = _ticks_below(across, floor)
    if line is not None:
        x = across.place(line)
        place = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"'
        parts.append(f'<line {place} stroke="var(--dim)" stroke-dasharray="5 4"/>')
    for i, (name, values) in enumerate(rows):
        y = TOP + high * (i + 0.5)
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{_cut(name, 15)}</text>')
        parts += [_marker(across.place(v), y, 4, "var(--s0)") for v in values]
        if len(values) > 1:
            x = across.place(sum(values) / len(values))
            place = f'x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8}" y2="{y + 8}"'
            parts.append(f'<line {place} stroke="var(--s1)" stroke-width="2.5"/>')
    size = f'width="{WIDTH - RIGHT - left}" height="{floor - TOP}"'
    parts.append(f'<rect class="frame" x="{left}" y="{TOP}" {size}/>')
    below = f'x="{(left + WIDTH - RIGHT) / 2:.0f}" y="{floor + 34}" text-anchor="middle"'
    parts.append(f"<text {below}>{escape(x_label)}</text>")
    return _svg(WIDTH, floor + BOTTOM, title, parts)


def _field(x: float, y: float, wide: float, high: float, value: float, share: float) -> list[str]:
    place = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{wide - 2:.1f}" height="{high - 2}"'
    text = f"{value:.0f}" if value == int(value) else f"{value:.1f}"
    return [
        f'<rect {place} rx="2" fill="var(--s0)" fill-opacity="{0.65 * share:.3f}"/>',
        f'<text x="{x + wide / 2:.1f}" y="{y + 15:.1f}" text-anchor="middle">{text}</text>',
    ]


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    box = f'viewBox="0 0 {width} {height:g}"'
    return (
        f'<svg class="chart" role="img" {box}><title>{escape(title)}</title>'
        + "".join(parts)
        + "</svg>"
    )


def _axis(values: Sequence[float], log: bool, start: float, length: float) -> Axis:
    """Room for all values and a margin of a twentieth."""
    low, high = min(values), max(values)
    if log:
        factor = max((high / low) ** 0.05, 1.1)
        return Axis(low / factor, high * factor, True, start, length)
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return Axis(low - margin, high + margin, False, start, length)


def _step(rough: float) -> float:
    """The next larger of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def _frame(across: Axis, up: Axis, x_label: str, y_label: str) -> list[str]:
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for v in up.ticks():
        y = up.place(v)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = f'<text class="dim" x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">'
        parts.append(f"{label}{_number(v)}</text>")
    parts += _ticks_below(across, floor)
    size = f'width="{right - LEFT}" height="{floor - TOP}"'
    middle = (TOP + floor) / 2
    parts.append(f'<rect class="frame" x="{LEFT}" y="{TOP}" {size}/>')
    below = f'x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle"'
    beside = f'transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle"'
    return [
        *parts,
        f"<text {below}>{escape(x_label)}</text>",
        f"<text {beside}>{escape(y_label)}</text>",
    ]


def _ticks_below(across: Axis, floor: float) -> list[str]:
    """Lines of the grid from the top to the floor, and their values under it."""
    parts = []
    for v in across.ticks():
        x = across.place(v)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"/>')
        label = f'<text class="dim" x="{x:.1f}" y="{floor + 15}" text-anchor="middle">'
        parts.append(f"{label}{_number(v)}</text>")
    return parts


def _drawn(s: Series, across: Axis, up: Axis) -> list[str]:
    parts = []
    places = [(across.place(x), up.place(y)) for x, y in sorted(s.points)]
    colour = f"var(--s{s.colour % COLOURS})"
    if s.line and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = ' stroke-dasharray="5 4"' if s.dashed else ""
        style = f'fill="none" stroke="{colour}" stroke-width="1.6"{dash}'
        parts.append(f'<polyline points="{path}" {style}/>')
    for i, point in enumerate(s.points if s.markers or len(places) == 1 else ()):
        mark = _marker(across.place(point[0]), up.place(point[1]), s.colour, colour)
        parts.append(f"<g><title>{escape(s.names[i])}</title>{mark}</g>" if s.names else mark)
    return parts


def _marker(x: float, y: float, number: int, colour: str) -> str:
    """A disc, a square, a triangle, a diamond or a ring, so that colour is not alone."""
    look = f'fill="{colour}" stroke="{colour}"'
    shape = number % 5
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" {look}/>'
    if shape == 1:
        return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6" {look}/>'
    if shape == 4:
        ring = f'fill="var(--paper)" stroke="{colour}" stroke-width="1.6"'
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" {ring}/>'
    bottom = (
        f"{x + 4:.1f},{y + 3:.1f} {x - 4:.1f},{y + 3:.1f}"
        if shape == 2
        else (f"{x + 4:.1f},{y:.1f} {x:.1f},{y + 4:.1f} {x - 4:.1f},{y:.1f}")
    )
    return f'<polygon points="{x:.1f},{y - 4:.1f} {bottom}" {look}/>'


def _legend(s: Series, y: float) -> list[str]:
    colour = f"var(--s{s.colour % COLOURS})"
    parts = []
    if s.line:
        dash = ' stroke-dasharray="5 4"' if s.dashed else ""
        line = f'x1="8" x2="34" y1="{y + 5}" y2="{y + 5}" stroke="{colour}" stroke-width="1.6"'
        parts.append(f"<line {line}{dash}/>")
    if s.markers:
        parts.append(_marker(21, y + 5, s.colour, colour))
    return [*parts, f'<text x="42" y="{y + 9}">{_cut(s.label, LONGEST)}</text>']


def _cut(text: str, letters: int) -> str:
    """The text in HTML; where it is too long its beginning, and all of it under the pointer."""
    if len(text) <= letters:
        return escape(text)
    return f"{escape(text[: letters - 1])}…<title>{escape(text)}</title>"


def _number(value: float) -> str:
    """A tick's label."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        digits = f"{value:.1e}".replace(".0e", "e").replace("e+0", "e").replace("e-0", "e-")
        return digits.replace("e+", "e")
    return f"{value:.6g}"
