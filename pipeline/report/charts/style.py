"""What all charts share: the look, the colours of crosscoders, marks with intervals, and how a chart becomes JSON.

Colours are roles (`var(--text)`, see palette.py): inside the page they follow the reader's theme, and figures.py writes
the light values into a file. Charts are 420 units wide; the page's script fits them to the reader's screen.
"""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from pipeline.report import formatting as fmt
from pipeline.report.palette import series_colour

Chart = alt.LayerChart | alt.VConcatChart

WIDTH = 420
LEGEND_OFFSET, ROW_LEGEND_OFFSET = 30, 10
ROW_HEIGHT = 16
"""Height of one crosscoder's mark in a chart of rows."""


def crosscoder_colour(
    names: Sequence[str], plain: str = "", *, column: str = "crosscoder", offset: int = LEGEND_OFFSET
) -> alt.Color:
    """Names of crosscoders as colour, the same for a crosscoder in every figure; what is called `plain` is grey.

    `offset` is the legend's distance from the plot: a row chart has no y title between the two.
    """
    domain, colours = list(names), [series_colour(index) for index in range(len(names))]
    if plain:
        domain, colours = [*domain, plain], [*colours, "var(--plain)"]
    scale = alt.Scale(domain=domain, range=colours)
    return alt.Color(f"{column}:N", scale=scale, legend=alt.Legend(offset=offset))


def layered(layers: Sequence[alt.Chart], data: pd.DataFrame, height: int) -> alt.LayerChart:
    """Layers over one table, first below last, in the width of all figures."""
    chart: alt.LayerChart = alt.LayerChart(data=data, layer=list(layers)).properties(width=WIDTH, height=height)
    return chart


def single(**values: float | str) -> alt.Chart:
    """A chart with one row of its own, for a line or an area that belongs to no row of the table."""
    return alt.Chart(pd.DataFrame([values]))


def text_tooltips(**titles: str) -> list[alt.Tooltip]:
    """Tooltip of text columns: column=title."""
    return [alt.Tooltip(f"{name}:N", title=title) for name, title in titles.items()]


def spelled(frame: pd.DataFrame, name: str, digits: int = 3, *, is_share: bool = False) -> list[str]:
    """The column with its interval (`_low`, `_high`) as tooltips write it: 0.847 [0.840, 0.853]."""
    texts = []
    for value, low, high in zip(frame[name], frame[f"{name}_low"], frame[f"{name}_high"], strict=True):
        if is_share:
            texts.append(f"{fmt.percent(value)} {fmt.percent_interval(low, high)}".strip())
        else:
            texts.append(f"{fmt.decimal(value, digits)} {fmt.interval(low, high, digits)}".strip())
    return texts


def rows_of(frame: pd.DataFrame, column: str, names: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Encodings of a chart of rows: `column` from top to bottom as in the table, crosscoders side by side within it.

    The second value is the height that keeps every row readable.
    """
    labels = list(dict.fromkeys(frame[column]))
    axis = alt.Axis(title=None, labelColor="var(--text)", grid=False)
    encodings: dict[str, Any] = {
        "y": alt.Y(f"{column}:N", sort=labels, axis=axis, scale=alt.Scale(paddingInner=0.25, paddingOuter=0.15)),
        "yOffset": alt.YOffset("crosscoder:N", sort=list(names), scale=alt.Scale(domain=list(names))),
        "color": crosscoder_colour(names, offset=ROW_LEGEND_OFFSET),
    }
    return encodings, len(labels) * (max(len(names), 1) * ROW_HEIGHT + 8)


def spec_of(chart: Chart, description: str) -> dict[str, Any]:
    """The chart as Vega-Lite JSON without configuration, with a description for screen readers.

    Floats are cut to six digits; NaN becomes null.
    """
    with alt.data_transformers.enable("default", max_rows=None):
        spec: dict[str, Any] = chart.to_dict(validate=False)  # validating takes a second; the tests compile every chart
    for key in ("$schema", "config"):
        spec.pop(key, None)
    spec["description"] = description
    spec["datasets"] = {
        name: [{key: _short(value) for key, value in row.items()} for row in rows]
        for name, rows in spec.get("datasets", {}).items()
    }
    return spec


def _short(value: object) -> object:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
