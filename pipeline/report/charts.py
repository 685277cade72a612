"""Charts about latents and training: decoder norms, Latent Scaling ratios, training curves.

Each function takes plain numbers with names and colours and returns one SVG; choosing what to draw is figures.py's
work, effects on the model are drawn by effects.py. The trade-off: drawn by hand on svg.py, so a chart is a few dozen
lines, but it follows the page's theme and can be tested as text.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.report import formatting as fmt
from pipeline.report.palette import VERDICT_ROLES
from pipeline.report.summary import CHAT_ONLY_VERDICTS
from pipeline.report.svg import Axis, Box, Canvas, Plot, frame, legend, padded_range
from pipeline.schema import Verdict

OWNERSHIP_BANDS = (("base-only", 0.0, 0.1), ("shared", 0.4, 0.6), ("chat-only", 0.9, 1.0))
"""Classes by Delta_norm (arXiv 2504.02922, section 2)."""

NUM_BINS = 50
NU_LOW, NU_HIGH = -0.1, 1.5
"""Range of the Latent Scaling figure; ratios beyond it are drawn on its edge."""
MAX_CURVE_POINTS = 300
MAX_TOOLTIP_DOTS = 400
"""Above this many dots a verdict's dots become one path, without a tooltip each."""


class Series(NamedTuple):
    """Named, coloured values of one crosscoder."""

    name: str
    colour: str
    values: Sequence[float]


def delta_norm_histogram(series: Sequence[Series]) -> str:
    """Number of latents by Delta_norm, logarithmic, one outline per crosscoder, with the classes as bands."""
    canvas = Canvas(460, 290)
    counts = [np.histogram(np.clip(np.asarray(one.values, dtype=float), 0, 1), NUM_BINS, (0, 1))[0] for one in series]
    top = max([10, *(int(count.max()) for count in counts)])
    box = Box(52, 54, 448, 244).lower(legend(canvas, [(one.name, one.colour) for one in series]))
    for name, low, high in OWNERSHIP_BANDS:
        left, right = (box.left + edge * (box.right - box.left) for edge in (low, high))
        canvas.add("rect", x=left, y=box.top, width=right - left, height=box.bottom - box.top, fill="var(--band)")
        anchor = "start" if low == 0 else "end" if high == 1 else "middle"
        at = {"start": left + 2, "end": right - 2, "middle": (left + right) / 2}[anchor]
        canvas.text(at, box.top + 14, name, text_anchor=anchor)
    high = 10 ** math.ceil(math.log10(top) + 0.15)
    plot = frame(
        canvas,
        box,
        Axis("Delta_norm (0 = base-only, 1 = chat-only)", 0, 1, ticks=(0, 0.2, 0.4, 0.6, 0.8, 1)),
        Axis("latents per bin of 0.02", 0.5, high, is_log=True),
    )
    for one, count in zip(series, counts, strict=True):
        _draw_outline(plot, count, one.colour)
    described = "; ".join(f"{one.name}: {fmt.plural(len(one.values), 'latent')}" for one in series)
    return canvas.render("Histogram of Delta_norm", described)


def _draw_outline(plot: Plot, count: np.ndarray, colour: str) -> None:
    points = []
    for index, number in enumerate(count):
        height = plot.y(max(float(number), plot.y.low))
        points += [(plot.x(index / len(count)), height), (plot.x((index + 1) / len(count)), height)]
    ends = [(plot.box.left, plot.box.bottom), *points, (plot.box.right, plot.box.bottom)]
    area = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in ends) + "Z"
    plot.canvas.add("path", d=area, fill=colour, fill_opacity=0.1)
    plot.canvas.polyline(points, colour, stroke_width=1.6)


def nu_scatter(latents: pd.DataFrame, nu_eps_threshold: float, nu_r_threshold: float) -> str:
    """nu_eps against nu_r of the latents given (the chat-only ones), coloured by verdict, with both thresholds."""
    canvas = Canvas(460, 372)
    defined = latents[latents["nu_eps"].notna() & latents["nu_r"].notna()]
    parts = [(verdict, defined[defined["verdict"] == verdict]) for verdict in CHAT_ONLY_VERDICTS]
    parts = [(verdict, rows) for verdict, rows in parts if len(rows)]
    entries = [(f"{_SHORT_VERDICT[verdict]} {fmt.count(len(rows))}", _colour(verdict)) for verdict, rows in parts]
    box = Box(52, 54, 448, 322).lower(legend(canvas, entries))
    x_axis = Axis("nu_r (high: other latents carry it in the base model)", NU_LOW, NU_HIGH)
    y_axis = Axis("nu_eps (high: shrunk away in the base model)", NU_LOW, NU_HIGH)
    span = NU_HIGH - NU_LOW
    right = box.left + (nu_r_threshold - NU_LOW) / span * (box.right - box.left)
    top = box.bottom - (nu_eps_threshold - NU_LOW) / span * (box.bottom - box.top)
    canvas.add("rect", x=box.left, y=top, width=right - box.left, height=box.bottom - top, fill="var(--accept)")
    plot = frame(canvas, box, x_axis, y_axis)
    for x1, y1, x2, y2 in ((right, box.top, right, box.bottom), (box.left, top, box.right, top)):
        canvas.line(x1, y1, x2, y2, "var(--muted)", stroke_dasharray="4 3")
    canvas.text(right + 5, box.top + 12, f"{nu_r_threshold:g}")
    canvas.text(box.right - 2, top - 5, f"{nu_eps_threshold:g}", text_anchor="end")
    for verdict, rows in parts:
        _draw_dots(plot, rows, _colour(verdict))
    return canvas.render("nu_eps against nu_r of chat-only latents", f"{fmt.plural(len(defined), 'latent')}")


_SHORT_VERDICT = {
    Verdict.CHAT_SPECIFIC: "chat-specific",
    Verdict.SHRINKAGE: "shrinkage",
    Verdict.DECOUPLING: "decoupling",
    Verdict.BOTH: "both",
    Verdict.UNDECIDED: "undecided",
    Verdict.WITHHELD: "withheld",
}


def _colour(verdict: str) -> str:
    return f"var(--{VERDICT_ROLES[verdict]})"


def _draw_dots(plot: Plot, rows: pd.DataFrame, colour: str) -> None:
    x = [plot.x(float(value)) for value in rows["nu_r"]]
    y = [plot.y(float(value)) for value in rows["nu_eps"]]
    if len(rows) > MAX_TOOLTIP_DOTS:
        plot.canvas.dots(list(zip(x, y, strict=True)), colour, 4.0, opacity=0.6)
        return
    for at_x, at_y, latent, nu_eps, nu_r in zip(x, y, rows["latent"], rows["nu_eps"], rows["nu_r"], strict=True):
        title = f"latent {latent}: nu_eps {fmt.decimal(float(nu_eps), 2)}, nu_r {fmt.decimal(float(nu_r), 2)}"
        plot.canvas.add("circle", title, cx=at_x, cy=at_y, r=3, fill=colour, fill_opacity=0.75)


class Curve(NamedTuple):
    """One line of a training figure."""

    name: str
    colour: str
    steps: Sequence[float]
    values: Sequence[float]
    is_dashed: bool = False


def training_curves(curves: Sequence[Curve], label: str, *, floor: float | None, ceiling: float | None) -> str:
    """One quantity by training step; lines are thinned to MAX_CURVE_POINTS by averaging neighbours."""
    canvas = Canvas(460, 236)
    thinned = [_thinned(curve) for curve in curves]
    steps = [step for curve in thinned for step in curve.steps] or [0.0, 1.0]
    low, high = padded_range([value for curve in thinned for value in curve.values], floor=floor, ceiling=ceiling)
    x_axis = Axis("training step", 0.0, max(1.0, *steps))
    plot = frame(canvas, Box(52, 34, 448, 190), x_axis, Axis(label, low, high))
    for curve in thinned:
        points = [(plot.x(step), plot.y(value)) for step, value in zip(curve.steps, curve.values, strict=True)]
        dash = {"stroke_dasharray": "4 3"} if curve.is_dashed else {}
        canvas.polyline(points, curve.colour, stroke_width=1.6, **dash)
    last = "; ".join(f"{curve.name} ends at {fmt.significant(curve.values[-1])}" for curve in thinned if curve.values)
    return canvas.render(f"{label} by training step", last)


def _thinned(curve: Curve) -> Curve:
    steps, values = np.asarray(curve.steps, dtype=float), np.asarray(curve.values, dtype=float)
    keep = np.isfinite(steps) & np.isfinite(values)
    steps, values = steps[keep], values[keep]
    if len(steps) > MAX_CURVE_POINTS:
        steps, values = (
            np.array([part.mean() for part in np.array_split(column, MAX_CURVE_POINTS)]) for column in (steps, values)
        )
    return curve._replace(steps=steps.tolist(), values=values.tolist())
