"""Charts about effects: KL per intervention, and the planted score.

Like charts.py, each function takes plain numbers with names and colours and returns one SVG; intervals are always
drawn. Steering has a file of its own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.report import formatting as fmt
from pipeline.report.svg import LEGEND_LEFT, Axis, Box, Canvas, Plot, frame, legend, text_width

BAR_HEIGHT = 13
GROUP_GAP = 9


class Bar(NamedTuple):
    """One bar with its interval."""

    series: str
    """Crosscoder, or "" for an intervention that needs none."""
    colour: str
    value: float
    low: float
    high: float


class BarGroup(NamedTuple):
    """The bars of one kind of intervention; without bars it is a heading."""

    name: str
    bars: Sequence[Bar]


def kl_bars(groups: Sequence[BarGroup], series: Sequence[tuple[str, str]]) -> str:
    """Mean KL per intervention with 95% intervals, one bar per crosscoder; `series` is the legend."""
    left = min(190.0, 14 + max((text_width(group.name) for group in groups if group.bars), default=80))
    num_rows = sum(len(group.bars) or 1 for group in groups)
    bottom = 36 + num_rows * (BAR_HEIGHT + 2) + len(groups) * GROUP_GAP
    canvas = Canvas(460, bottom + 46)
    shift = legend(canvas, series)
    ends = [value for group in groups for bar in group.bars for value in (bar.value, bar.high) if math.isfinite(value)]
    box = Box(left, 30, 402, bottom).lower(shift)
    x_axis = Axis("KL to the chat model, nats per token", 0.0, max([1e-6, *ends]) * 1.02)
    plot = frame(canvas, box, x_axis, Axis("", 0, 1, ticks=()))
    top = box.top + GROUP_GAP
    for group in groups:
        if not group.bars:
            canvas.text(LEGEND_LEFT, top + BAR_HEIGHT, group.name, "var(--muted)")
            top += BAR_HEIGHT + 2 + GROUP_GAP
            continue
        middle = top + len(group.bars) * (BAR_HEIGHT + 2) / 2
        canvas.text(left - 8, middle + 3, group.name, "var(--text)", text_anchor="end")
        for bar in group.bars:
            _draw_bar(plot, bar, top, group.name)
            top += BAR_HEIGHT + 2
        top += GROUP_GAP
    num_groups = sum(bool(group.bars) for group in groups)
    return canvas.render("KL per intervention", f"{fmt.plural(num_groups, 'intervention')}, 95% intervals")


def _draw_bar(plot: Plot, bar: Bar, top: float, group: str) -> None:
    canvas, start = plot.canvas, plot.x.start
    middle = top + BAR_HEIGHT / 2
    end = plot.x(bar.value) if math.isfinite(bar.value) else start
    spelled = f"{fmt.decimal(bar.value)} {fmt.interval(bar.low, bar.high)}".strip()
    title = f"{bar.series or 'no crosscoder'}: {group}, {spelled} nats per token"
    look: dict[str, float | str] = {"fill": bar.colour, "fill_opacity": 0.72}
    canvas.add("rect", title, x=start, y=top, width=max(end - start, 0.5), height=BAR_HEIGHT, **look)
    label_at = end
    if math.isfinite(bar.low) and math.isfinite(bar.high):
        low, high = plot.x(bar.low), plot.x(bar.high)
        canvas.line(low, middle, high, middle, "var(--text)", stroke_width=1.2)
        for at in (low, high):
            canvas.line(at, middle - 3, at, middle + 3, "var(--text)", stroke_width=1.2)
        label_at = max(label_at, high)
    canvas.text(label_at + 6, middle + 4, fmt.decimal(bar.value), "var(--text)")


class ScoreMark(NamedTuple):
    """One candidate's AUROC in the planted figure."""

    name: str
    value: float
    low: float
    high: float


class ScoreRow(NamedTuple):
    """One behaviour under one crosscoder."""

    label: str
    colour: str
    specific: ScoreMark
    others: Sequence[ScoreMark]
    """Baselines, drawn as hollow marks."""


def planted_scores(groups: Sequence[tuple[str, Sequence[ScoreRow]]], series: Sequence[tuple[str, str]]) -> str:
    """AUROC per planted behaviour: filled = best chat-specific latent with interval, hollow = baselines."""
    left = min(200.0, 14 + max((text_width(fmt.words(name)) for name, _ in groups), default=80))
    height = 20
    bottom = 40 + sum(len(rows) * height + 10 for _, rows in groups)
    canvas = Canvas(460, bottom + 46)
    box = Box(left, 36, 440, bottom).lower(legend(canvas, series))
    marks = [mark for _, rows in groups for row in rows for mark in (row.specific, *row.others)]
    lowest = min([0.5, *(value for mark in marks for value in (mark.value, mark.low) if math.isfinite(value))])
    axis = Axis("AUROC on held-out rows (0.5 = chance)", math.floor(lowest * 10 + 1e-9) / 10, 1.0)
    plot = frame(canvas, box, axis, Axis("", 0, 1, ticks=()))
    for value in (0.5, 0.9, 1.0):
        canvas.line(plot.x(value), box.top, plot.x(value), box.bottom, "var(--grid)")
    y = box.top + 4.0
    for name, rows in groups:
        canvas.text(left - 10, y + len(rows) * height / 2 + 4, fmt.words(name), "var(--text)", text_anchor="end")
        for row in rows:
            _draw_scores(plot, row, y + height / 2)
            y += height
        y += 10
    return canvas.render("AUROC per planted behaviour", "filled: best chat-specific latent; hollow: baselines")


def _draw_scores(plot: Plot, row: ScoreRow, y: float) -> None:
    canvas = plot.canvas
    canvas.line(plot.box.left, y, plot.box.right, y)
    for mark, is_square in zip(row.others, (False, True), strict=False):
        if not math.isfinite(mark.value):
            continue
        title = f"{row.label}: {mark.name}, AUROC {fmt.decimal(mark.value)}"
        look: dict[str, float | str] = {"fill": "var(--page)", "stroke": row.colour, "stroke_width": 1.5}
        if is_square:
            canvas.add("rect", title, x=plot.x(mark.value) - 4, y=y - 4, width=8, height=8, **look)
        else:
            canvas.add("circle", title, cx=plot.x(mark.value), cy=y, r=5.5, **look)
    best = row.specific
    if not math.isfinite(best.value):
        canvas.text(plot.box.left + 6, y + 4, "no chat-specific latent")
        return
    if math.isfinite(best.low) and math.isfinite(best.high):
        canvas.line(plot.x(best.low), y, plot.x(best.high), y, row.colour, stroke_width=2)
    title = f"{row.label}: {best.name}, AUROC {fmt.decimal(best.value)} {fmt.interval(best.low, best.high)}"
    canvas.add("circle", title, cx=plot.x(best.value), cy=y, r=3.6, fill=row.colour)
