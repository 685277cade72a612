"""A very small drawing kit for SVG: a canvas of escaped elements, scales, ticks and one plot frame.

Enough for the report's charts and no more. Colours are roles (`var(--text)`, see palette.py), so that a figure inside
the page follows its theme; every number is rounded to keep files small. All text goes through
`escape`, since labels may come from a corpus or a configuration.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,'DejaVu Sans',sans-serif"
LEGEND_LEFT = 8.0
LEGEND_LETTERS = 40
"""Longer names lose their middle in legends; headings and tables hold them whole."""
TEXT_SIZE = 12.0
"""Font size in drawing units; figures are about 460 units wide and shown at about that many CSS pixels."""


class Scale(NamedTuple):
    """Maps data values to drawing units, linearly or by logarithm; values beyond the domain are clamped to it."""

    low: float
    high: float
    start: float
    """Drawing coordinate of `low`."""
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Drawing coordinate of a value."""
        clamped = min(max(value, self.low), self.high)
        if self.is_log:
            share = math.log(clamped / self.low) / math.log(self.high / self.low)
        else:
            share = (clamped - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def padded_range(values: Sequence[float], *, floor: float | None = None, ceiling: float | None = None) -> list[float]:
    """[low, high] around the finite values with a 5% margin, clipped to floor and ceiling; never of zero width."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - margin, high + margin
    if floor is not None:
        low = max(low, floor)
    if ceiling is not None:
        high = min(high, ceiling)
    return [low, high] if high > low else [low, low + 1.0]


def linear_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """About `target` round values (steps of 1, 2, 2.5 or 5 times a power of ten) within [low, high]."""
    rough = (high - low) / max(target, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high]; every second or third one where there are many."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = 1 + (last - first) // 6
    return [10.0**exponent for exponent in range(first, last + 1, stride)]


def tick_label(value: float) -> str:
    """Short text of a tick: 0.25, 2,000, 1.5M."""
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


class Canvas:
    """Elements of one SVG in drawing order."""

    def __init__(self, width: float, height: float) -> None:
        """An empty drawing of this size in units."""
        self.width = width
        self.height = height
        self._parts: list[str] = []

    def add(self, tag: str, tooltip: str = "", /, **attributes: float | str) -> None:
        """One element; underscores in attribute names become hyphens."""
        written = "".join(f' {name.replace("_", "-")}="{_attribute(value)}"' for name, value in attributes.items())
        body = f"><title>{escape(tooltip)}</title></{tag}>" if tooltip else "/>"
        self._parts.append(f"<{tag}{written}{body}")

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str = "var(--grid)", **more: float | str
    ) -> None:
        """A straight stroke."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour, **more)

    def text(self, x: float, y: float, label: str, colour: str = "var(--muted)", **more: float | str) -> None:
        """A label; `text_anchor` start (default), middle or end; more attributes as in SVG."""
        more.setdefault("font_size", TEXT_SIZE)
        written = "".join(f' {name.replace("_", "-")}="{_attribute(value)}"' for name, value in more.items())
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{written}>{escape(label)}</text>')

    def polyline(self, points: Sequence[tuple[float, float]], colour: str, **more: float | str) -> None:
        """A curve through the points; nothing for fewer than two."""
        if len(points) > 1:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            self.add("path", d=path, fill="none", stroke=colour, stroke_linejoin="round", **more)

    def dots(self, points: Sequence[tuple[float, float]], colour: str, size: float, **more: float | str) -> None:
        """Many round dots as one path, about ten bytes each."""
        if points:
            path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
            self.add("path", d=path, stroke=colour, stroke_width=size, stroke_linecap="round", **more)

    def render(self, title: str, description: str = "") -> str:
        """The whole SVG element, scalable, with an accessible name."""
        about = f"<title>{escape(title)}</title>" + (f"<desc>{escape(description)}</desc>" if description else "")
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'font-family="{FONT}" font-size="{TEXT_SIZE:g}">{about}{"".join(self._parts)}</svg>'
        )


class Axis(NamedTuple):
    """One axis of a plot: what it shows, its range and ticks."""

    label: str
    """Name and unit."""
    low: float
    high: float
    is_log: bool = False
    ticks: Sequence[float] | None = None
    """None = chosen here."""
    tick_text: Callable[[float], str] = tick_label


class Box(NamedTuple):
    """The plotting area inside a canvas, in drawing units."""

    left: float
    top: float
    right: float
    bottom: float

    def lower(self, distance: float) -> "Box":
        """The same box further down."""
        return self._replace(top=self.top + distance, bottom=self.bottom + distance)


class Plot(NamedTuple):
    """A canvas with axes drawn, and the scales to draw on it."""

    canvas: Canvas
    box: Box
    x: Scale
    y: Scale


def frame(canvas: Canvas, box: Box, x_axis: Axis, y_axis: Axis) -> Plot:
    """Draws horizontal grid lines, ticks and both axis names; returns the scales."""
    x = Scale(x_axis.low, x_axis.high, box.left, box.right, x_axis.is_log)
    y = Scale(y_axis.low, y_axis.high, box.bottom, box.top, y_axis.is_log)
    for value in _ticks(y_axis, target=4):
        canvas.line(box.left, y(value), box.right, y(value))
        canvas.text(box.left - 7, y(value) + 4, y_axis.tick_text(value), text_anchor="end")
    for value in _ticks(x_axis, target=5):
        canvas.line(x(value), box.bottom, x(value), box.bottom + 4, "var(--muted)")
        label = x_axis.tick_text(value)
        at = min(x(value), canvas.width - text_width(label) / 2)
        canvas.text(at, box.bottom + 18, label, text_anchor="middle")
    canvas.line(box.left, box.bottom, box.right, box.bottom, "var(--muted)")
    if x_axis.label:
        middle = (box.left + box.right) / 2
        canvas.text(middle, box.bottom + 36, x_axis.label, "var(--text)", text_anchor="middle")
    if y_axis.label:
        canvas.text(box.left, box.top - 10, y_axis.label, "var(--text)", text_anchor="start")
    return Plot(canvas, box, x, y)


def legend(canvas: Canvas, entries: Sequence[tuple[str, str]]) -> float:
    """Coloured squares with names along the top, in rows; returns by how much the canvas grew for further rows."""
    x, y = LEGEND_LEFT, 16.0
    for full_name, colour in entries:
        name = full_name if len(full_name) <= LEGEND_LETTERS else f"{full_name[:18]}...{full_name[-18:]}"
        width = 15 + text_width(name)
        if x > LEGEND_LEFT and x + width > canvas.width:
            x, y = LEGEND_LEFT, y + 17
        canvas.add("rect", x=x, y=y - 9, width=10, height=10, rx=2, fill=colour)
        canvas.text(x + 15, y, name, "var(--text)")
        x += width + 16
    canvas.height += y - 16
    return y - 16


def text_width(label: str) -> float:
    """Estimated width of a label in drawing units; generous, since narrow screens enlarge the text."""
    return 7.0 * len(label)


def _ticks(axis: Axis, target: int) -> Sequence[float]:
    if axis.ticks is not None:
        return axis.ticks
    return log_ticks(axis.low, axis.high) if axis.is_log else linear_ticks(axis.low, axis.high, target)


def _attribute(value: float | str) -> str:
    return escape(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
