"""Training curves: one quantity by training step, framed by the last three quarters of training.

The first steps are often far outside that range and would flatten what a reader compares, e.g. an L0 of 15 with one of
16. They stay in the chart's data: drag the figure, or turn the wheel with Alt held down, to see them.
"""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from pipeline.report.charts.style import crosscoder_colour, layered, text_tooltips

MAX_CURVE_POINTS = 150
FRAMED_FROM = 0.25
"""Share of training after which a value decides the range of the axis."""


def thinned(curve: pd.DataFrame) -> pd.DataFrame:
    """Columns `step` and `value` without undefined rows, neighbours averaged to at most MAX_CURVE_POINTS rows."""
    curve = curve[np.isfinite(curve["value"])]
    if len(curve) <= MAX_CURVE_POINTS:
        return curve
    groups = np.arange(len(curve)) * MAX_CURVE_POINTS // len(curve)
    return curve.groupby(groups).agg({name: "mean" if name in ("step", "value") else "first" for name in curve})


def framed_range(curves: pd.DataFrame) -> tuple[float, float]:
    """Range of `value` after the first quarter of training, with a margin of 5%; never of zero width."""
    late = curves[curves["step"] >= FRAMED_FROM * curves["step"].max()]["value"]
    low, high = float(late.min()), float(late.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def num_outside(curves: pd.DataFrame) -> int:
    """Rows above or below the frame."""
    low, high = framed_range(curves)
    return int(((curves["value"] < low) | (curves["value"] > high)).sum())


def curve_chart(curves: pd.DataFrame, label: str, names: Sequence[str]) -> alt.LayerChart:
    """Lines of `value` by `step`; columns crosscoder, model ("" where it does not matter, else chat or base)."""
    low, high = framed_range(curves)
    zoom = alt.selection_interval(bind="scales", zoom="wheel![event.altKey]", name="zoom")
    encodings: dict[str, Any] = {
        "x": alt.X("step:Q", title="training step", axis=alt.Axis(grid=False)),
        "y": alt.Y("value:Q", title=label, scale=alt.Scale(domain=[low, high], zero=False)),
        "color": crosscoder_colour(names),
    }
    digits = max(0, 3 - math.floor(math.log10(abs(high) or 1)))
    tooltip = text_tooltips(crosscoder="crosscoder", model="model")
    tooltip += [alt.Tooltip("step:Q", format=",.0f"), alt.Tooltip("value:Q", title=label, format=f",.{digits}f")]
    lines = alt.Chart().mark_line(clip=True, strokeWidth=1.6).encode(**encodings)
    models = [name for name in ("chat", "base") if name in set(curves["model"])]
    if models:
        legend = alt.Legend(symbolType="stroke", symbolStrokeColor="var(--text)")
        dash = alt.Scale(domain=models, range=[[1, 0], [5, 3]][: len(models)])
        lines = lines.encode(strokeDash=alt.StrokeDash("model:N", scale=dash, legend=legend))
    # Transparent dots on the lines carry the tooltips.
    dots = alt.Chart().mark_point(clip=True, filled=True, opacity=0, size=60)
    dots = dots.encode(**encodings, detail="model:N", tooltip=tooltip if models else [tooltip[0], *tooltip[2:]])
    return layered([lines.add_params(zoom), dots], curves, 170)
