"""Charts over latents in an order: KL by the number of latents added, and explanations from best to worst.

Each takes plain numbers with names and colours and returns one SVG. Intervals are drawn as ribbons or whiskers, and
what a reader compares with (random orders, chance) is drawn in the same chart.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.report import formatting as fmt
from pipeline.report.svg import Axis, Box, Canvas, Plot, frame, legend, padded_range

_ZERO_AT = 0.5
"""Where 0 latents stand on the logarithmic axis of numbers of latents."""


class CurvePoint(NamedTuple):
    """KL with so many latents added."""

    num_latents: int
    kl: float
    low: float
    high: float


class LatentCurve(NamedTuple):
    """KL by number of latents of one crosscoder, in order of evidence and in random orders."""

    name: str
    colour: str
    evidence: Sequence[CurvePoint]
    random: Sequence[Sequence[CurvePoint]]


def kl_curves(curves: Sequence[LatentCurve]) -> str:
    """KL by the number of latents added: solid with its interval in order of evidence, dashed in random orders."""
    canvas = Canvas(460, 300)
    lines = [line for curve in curves for line in (curve.evidence, *curve.random)]
    top = max([1, *(point.num_latents for line in lines for point in line)])
    kls = [value for line in lines for point in line for value in (point.kl, point.low, point.high)]
    low, high = padded_range([0.0, *kls], floor=0.0)
    box = Box(58, 54, 448, 254).lower(legend(canvas, [(curve.name, curve.colour) for curve in curves]))
    ticks = [_ZERO_AT, *(2.0**power for power in range(0, int(math.log2(top)) + 1, 1 + int(math.log2(top)) // 7))]
    x_axis = Axis("latents added", _ZERO_AT, max(2.0, top), True, ticks, lambda at: f"{0 if at < 1 else at:g}")
    plot = frame(canvas, box, x_axis, Axis("KL to the chat model, nats per token", low, high))
    for curve in curves:
        _draw_ribbon(plot, curve)
        for order in curve.random:
            _draw_line(plot, order, curve.colour, stroke_width=1.2, stroke_dasharray="4 3", stroke_opacity=0.8)
        _draw_line(plot, curve.evidence, curve.colour, stroke_width=1.8)
        for point in curve.evidence:
            spelled = f"{fmt.decimal(point.kl, 4)} {fmt.interval(point.low, point.high, 4)}".strip()
            title = f"{curve.name}: {fmt.plural(point.num_latents, 'latent')}, {spelled} nats per token"
            canvas.add("circle", title, cx=_x(plot, point), cy=plot.y(point.kl), r=3, fill=curve.colour)
    return canvas.render("KL by number of latents added", "solid: most chat-specific first; dashed: random order")


def _x(plot: Plot, point: CurvePoint) -> float:
    return plot.x(max(point.num_latents, _ZERO_AT))


def _draw_line(plot: Plot, points: Sequence[CurvePoint], colour: str, **look: float | str) -> None:
    plot.canvas.polyline([(_x(plot, point), plot.y(point.kl)) for point in points], colour, **look)


def _draw_ribbon(plot: Plot, curve: LatentCurve) -> None:
    known = [point for point in curve.evidence if math.isfinite(point.low) and math.isfinite(point.high)]
    if len(known) > 1:
        around = [(_x(plot, one), plot.y(one.high)) for one in known]
        around += [(_x(plot, one), plot.y(one.low)) for one in reversed(known)]
        area = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in around) + "Z"
        plot.canvas.add("path", d=area, fill=curve.colour, fill_opacity=0.14)


class ExplainedLatent(NamedTuple):
    """One latent's explanation and how well it holds."""

    latent: int
    explanation: str
    score: float
    low: float
    high: float


def explanation_scores(groups: Sequence[tuple[str, str, Sequence[ExplainedLatent]]]) -> str:
    """Balanced accuracy of each explanation, best first, crosscoder by crosscoder (name, colour, latents)."""
    canvas = Canvas(460, 262)
    shift = legend(canvas, [(name, colour) for name, colour, _ in groups])
    number = sum(len(latents) for _, _, latents in groups)
    y_axis = Axis("balanced accuracy on held-out contexts", 0.0, 1.0, ticks=(0, 0.25, 0.5, 0.75, 1))
    box = Box(52, 54, 448, 224).lower(shift)
    plot = frame(canvas, box, Axis("latents, best explained first", -0.5, number + len(groups) - 1.5, ticks=()), y_axis)
    canvas.line(box.left, plot.y(0.5), box.right, plot.y(0.5), "var(--muted)", stroke_dasharray="2 3")
    canvas.text(box.left + 4, plot.y(0.5) + 14, "chance")
    place = 0
    for name, colour, latents in groups:
        for one in sorted(latents, key=lambda latent: -latent.score):
            x = plot.x(place)
            if math.isfinite(one.low) and math.isfinite(one.high):
                canvas.line(x, plot.y(one.low), x, plot.y(one.high), colour, stroke_width=1.2, stroke_opacity=0.55)
            spelled = f"{fmt.decimal(one.score, 2)} {fmt.interval(one.low, one.high, 2)}".strip()
            title = f"{name}, latent {one.latent}: {one.explanation} ({spelled})"
            canvas.add("circle", title, cx=x, cy=plot.y(one.score), r=3, fill=colour)
            place += 1
        place += 1
    return canvas.render("Detection score of each explanation", f"{fmt.plural(number, 'explanation')}; 0.5 is chance")
