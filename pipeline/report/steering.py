"""The steering figure: what adding a latent does to a behaviour, to the next token and to fluency, scale by scale.

One figure per behaviour with up to three panels that share the scale axis. The chat model steered everywhere is the
solid line; the base model with the same latent is dashed (what the direction brings by itself), other places of
steering are dotted, random latents of equal norm grey. Takes the steering table as it is; panels without a number are
left out.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from pipeline.numerics.proportions import wilson_interval
from pipeline.report import formatting as fmt
from pipeline.report.summary import CONTROL_LATENT, CONTROL_NONE, CONTROL_RANDOM, main_positions
from pipeline.report.svg import Axis, Box, Canvas, Plot, frame, legend, padded_range
from pipeline.schema import BASE, CHAT, MODEL_NAMES

SOLID, DASHED, DOTTED = "", "5 3", "1 3"


class SteerPoint(NamedTuple):
    """One scale of one line."""

    scale: float
    rate: float
    low: float
    """Wilson's 95% interval over prompts."""
    high: float
    kl: float
    nll: float


class SteerLine(NamedTuple):
    """The most effective latent of a sweep at each scale."""

    label: str
    dash: str
    points: Sequence[SteerPoint]


class RandomPoint(NamedTuple):
    """The random latents at one scale: mean, smallest and largest rate, mean KL and fluency."""

    scale: float
    rate: float
    low: float
    high: float
    kl: float
    nll: float


class SteeringSeries(NamedTuple):
    """What steering by one crosscoder's latents did to one behaviour."""

    name: str
    colour: str
    lines: Sequence[SteerLine]
    random: Sequence[RandomPoint]
    unsteered: SteerPoint | None
    """The chat model without steering."""


def steering_series(name: str, colour: str, rows: pd.DataFrame) -> SteeringSeries:
    """The lines of one behaviour from its rows of the steering table."""
    places = main_positions(rows)
    chat = rows[rows["model"] == MODEL_NAMES[CHAT]]
    lines = [_line("chat model", SOLID, chat[chat["positions"].isin(places[:1])])]
    base = rows[(rows["model"] == MODEL_NAMES[BASE]) & rows["positions"].isin(places[:1])]
    lines.append(_line("base model", DASHED, base))
    lines += [_line(f"chat model, {place} only", DOTTED, chat[chat["positions"] == place]) for place in places[1:]]
    random = []
    own = chat[chat["positions"].isin(places[:1]) & (chat["control"] == CONTROL_RANDOM)]
    for scale, at_scale in own.groupby("scale"):
        rate = at_scale["rate"]
        means = [float(at_scale[column].mean()) for column in ("kl", "nll")]
        random.append(RandomPoint(float(str(scale)), float(rate.mean()), float(rate.min()), float(rate.max()), *means))
    plain = chat[chat["control"] == CONTROL_NONE]
    return SteeringSeries(
        name, colour, [one for one in lines if one.points], random, _point(plain) if len(plain) else None
    )


def _line(label: str, dash: str, rows: pd.DataFrame) -> SteerLine:
    steered = rows[rows["control"] == CONTROL_LATENT]
    points = [
        _point(at_scale.sort_values(["rate", "kl"], ascending=False, kind="stable"))
        for _, at_scale in steered.groupby("scale")
    ]
    return SteerLine(label, dash, points)


def _point(rows: pd.DataFrame) -> SteerPoint:
    """The first row as a point."""
    row = rows.iloc[0]
    rate = float(row["rate"])
    low, high = wilson_interval(rate, int(row["num_prompts"]))
    return SteerPoint(float(row["scale"]), rate, low, high, float(row["kl"]), float(row["nll"]))


class _Panel(NamedTuple):
    """One quantity of the figure."""

    column: str
    label: str
    height: float


PANELS = (
    _Panel("rate", "answers that show the behaviour, % of prompts", 150),
    _Panel("kl", "KL of the next token from unsteered, nats", 72),
    _Panel("nll", "fluency: nats per generated token (lower is better)", 72),
)


def steering_chart(series: Sequence[SteeringSeries]) -> str:
    """Rate, KL and fluency by scale; dotted level: the unsteered chat model."""
    numbers = {panel.column: _numbers(series, panel.column) for panel in PANELS}
    panels = [panel for panel in PANELS if numbers[panel.column]]
    canvas = Canvas(460, 54 + sum(panel.height + 50 for panel in panels))
    grey = [("random latents", "var(--plain)")] if any(one.random for one in series) else []
    shift = legend(canvas, [(one.name, one.colour) for one in series] + grey)
    scales = [point.scale for one in series for line in one.lines for point in line.points]
    scales += [point.scale for one in series for point in one.random]
    low, high = padded_range([0.0, *scales])
    top = 54.0
    for panel in panels:
        is_last = panel is panels[-1]
        x_axis = Axis("scale, x largest activation" if is_last else "", low, high)
        box = Box(52, top, 448, top + panel.height).lower(shift)
        plot = frame(canvas, box, x_axis, _value_axis(panel, numbers[panel.column]))
        for one in series:
            _draw_random(plot, one, panel.column)
        for one in series:
            _draw_lines(plot, one, panel.column)
        top += panel.height + 50
    described = "solid: chat model; dashed: base model; dotted line: unsteered chat model"
    return canvas.render("What steering does, by scale", described)


def _numbers(series: Sequence[SteeringSeries], column: str) -> list[float]:
    points = [point for one in series for line in one.lines for point in line.points]
    found = [float(getattr(point, column)) for point in points]
    found += [float(getattr(point, column)) for one in series for point in one.random]
    found += [float(getattr(one.unsteered, column)) for one in series if one.unsteered and found]
    return [value for value in found if math.isfinite(value)]


def _value_axis(panel: _Panel, numbers: Sequence[float]) -> Axis:
    if panel.column == "rate":
        ticks = (0, 0.25, 0.5, 0.75, 1)
        return Axis(panel.label, 0.0, 1.0, ticks=ticks, tick_text=lambda value: f"{100 * value:g}")
    low, high = padded_range([0.0, *numbers] if panel.column == "kl" else numbers, floor=0.0)
    return Axis(panel.label, low, high)


def _draw_random(plot: Plot, one: SteeringSeries, column: str) -> None:
    if column == "rate":
        for point in one.random:
            x = plot.x(point.scale)
            if math.isfinite(point.low):
                ends = (x, plot.y(point.low), x, plot.y(point.high))
                plot.canvas.line(*ends, "var(--plain)", stroke_width=6, stroke_opacity=0.35)
    known = [(plot.x(p.scale), plot.y(getattr(p, column))) for p in one.random if math.isfinite(getattr(p, column))]
    plot.canvas.polyline(known, "var(--plain)", stroke_width=1.6)
    level = getattr(one.unsteered, column) if one.unsteered else math.nan
    if math.isfinite(level):
        y = plot.y(level)
        plot.canvas.line(plot.box.left, y, plot.box.right, y, "var(--muted)", stroke_dasharray="2 3")


def _draw_lines(plot: Plot, one: SteeringSeries, column: str) -> None:
    for line in one.lines:
        look: dict[str, float | str] = {"stroke_width": 1.8 if line.dash == SOLID else 1.4}
        if line.dash:
            look["stroke_dasharray"] = line.dash
        known = [point for point in line.points if math.isfinite(getattr(point, column))]
        plot.canvas.polyline([(plot.x(p.scale), plot.y(getattr(p, column))) for p in known], one.colour, **look)
        if column != "rate":
            continue
        for point in known:
            x, title = plot.x(point.scale), f"{one.name}, {line.label}: scale {point.scale:g}"
            if line.dash == SOLID and math.isfinite(point.low):
                plot.canvas.line(x, plot.y(point.low), x, plot.y(point.high), one.colour, stroke_width=1.2)
            title += f", {fmt.percent(point.rate)} of prompts"
            radius = 3.5 if line.dash == SOLID else 2.2
            plot.canvas.add("circle", title, cx=x, cy=plot.y(point.rate), r=radius, fill=one.colour)
