"""Who owns the latents: how many have which Delta_norm, with the classes as bands."""

from collections.abc import Sequence

import altair as alt
import numpy as np
import pandas as pd

from pipeline.report.charts.style import crosscoder_colour, layered, text_tooltips
from pipeline.schema import DELTA_NORM_RANGES

NUM_BINS = 50
FLOOR = 0.5
"""Where an empty bin lies on the logarithmic axis."""


def binned(delta_norms: pd.DataFrame) -> pd.DataFrame:
    """Latents per bin of Delta_norm from columns crosscoder and delta_norm: start, end and num_latents of each bin."""
    frames = []
    for name, rows in delta_norms.groupby("crosscoder", sort=False):
        counts, edges = np.histogram(np.clip(rows["delta_norm"].dropna(), 0, 1), NUM_BINS, (0, 1))
        bins = {"start": edges[:-1].round(4), "end": edges[1:].round(4), "num_latents": counts}
        frames.append(pd.DataFrame({"crosscoder": name, **bins}))
    return pd.concat(frames, ignore_index=True)


def delta_norm_chart(delta_norms: pd.DataFrame, names: Sequence[str]) -> alt.LayerChart:
    """Outline of the histogram of Delta_norm, one per crosscoder, on a logarithmic axis."""
    bins = binned(delta_norms)
    bins = bins.assign(height=bins["num_latents"].clip(lower=FLOOR), middle=(bins["start"] + bins["end"]) / 2)
    bins["range"] = [f"{start:.2f} to {end:.2f}" for start, end in zip(bins["start"], bins["end"], strict=True)]
    top = float(max(10, 3 * bins["num_latents"].max()))
    bands = pd.DataFrame(
        [(name, low, high) for name, (low, high) in DELTA_NORM_RANGES.items()], columns=["name", "a", "b"]
    )
    x = alt.X("a:Q", scale=alt.Scale(domain=[0, 1], nice=False))
    band = alt.Chart(bands).mark_rect(color="var(--band)").encode(x=x, x2="b:Q")
    named = alt.Chart(bands.assign(middle=bands[["a", "b"]].mean(axis=1))).mark_text(baseline="top", dy=3)
    y = alt.Y("height:Q", title="latents per bin of 0.02", scale=alt.Scale(type="log", domain=[FLOOR, top], nice=False))
    outline = alt.Chart().mark_line(interpolate="step", strokeWidth=1.6)
    over = alt.Chart().mark_point(opacity=0, size=60, filled=True)
    at = alt.X("middle:Q", title="Delta_norm (0 = base-only, 1 = chat-only)", axis=alt.Axis(grid=False))
    over = over.encode(tooltip=[*text_tooltips(crosscoder="crosscoder", range="Delta_norm"), "num_latents:Q"])
    lines = [one.encode(x=at, y=y, color=crosscoder_colour(names)) for one in (outline, over)]
    text = named.encode(x=alt.X("middle:Q"), y=alt.value(0), text="name:N")
    return layered([band, *lines, text], bins, 200)
