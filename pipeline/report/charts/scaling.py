"""Latent Scaling: nu_eps against nu_r of the chat-only latents, with both thresholds.

The frame holds the middle 96% of each ratio and both thresholds, so that a few extreme ratios do not push all others
into a corner. The caller says how many lie outside; dragging the figure shows them.
"""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from pipeline.report.charts.style import crosscoder_colour, layered, single, spelled, text_tooltips
from pipeline.report.palette import VERDICT_ROLES
from pipeline.schema import Verdict

THRESHOLDS = np.linspace(0, 1, 51).round(2)
MAX_DOTS = 3000
"""More dots than this are thinned evenly: a browser draws each as an element."""


def framed(ratios: pd.Series, threshold: float) -> tuple[float, float]:
    """Range that holds 0, the threshold with room beside it, and the middle 96% of the ratios."""
    low, high = np.quantile(ratios, [0.02, 0.98]) if len(ratios) else (0.0, threshold)
    low, high = min(float(low), 0.0), max(float(high), 1.5 * threshold)
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def frame_of(latents: pd.DataFrame, nu_eps_threshold: float, nu_r_threshold: float) -> dict[str, tuple[float, float]]:
    """Ranges of both axes."""
    return {"nu_eps": framed(latents["nu_eps"], nu_eps_threshold), "nu_r": framed(latents["nu_r"], nu_r_threshold)}


def num_outside(latents: pd.DataFrame, nu_eps_threshold: float, nu_r_threshold: float) -> int:
    """Latents with a ratio outside the frame."""
    ranges = frame_of(latents, nu_eps_threshold, nu_r_threshold).items()
    inside = [latents[name].between(low, high) for name, (low, high) in ranges]
    return int((~np.logical_and.reduce(inside)).sum())


def counts_below(latents: pd.DataFrame, ratio: str) -> pd.DataFrame:
    """Latents whose ratio is below each threshold in size: columns crosscoder, threshold, num_latents.

    `latents` has the columns of the latent table and `crosscoder`; thresholds are those of THRESHOLDS.
    """
    frames = []
    for name, own in latents.groupby("crosscoder", sort=False):
        sizes = np.sort(own[ratio].abs().dropna())
        if len(sizes):
            counts = np.searchsorted(sizes, THRESHOLDS)
            frames.append(pd.DataFrame({"crosscoder": name, "threshold": THRESHOLDS, "num_latents": counts}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def below_chart(counts: pd.DataFrame, ratio: str, names: Sequence[str]) -> alt.LayerChart:
    """Number of latents below a threshold of the ratio, one line per crosscoder, from `counts_below`."""
    encodings: dict[str, Any] = {
        "x": alt.X("threshold:Q", title=f"threshold of |{ratio}|", axis=alt.Axis(grid=False)),
        "y": alt.Y("num_latents:Q", title="latents below it"),
        "color": crosscoder_colour(names),
    }
    tooltip = [*text_tooltips(crosscoder="crosscoder"), "threshold:Q", "num_latents:Q"]
    lines = alt.Chart().mark_line(strokeWidth=1.6).encode(**encodings)
    dots = alt.Chart().mark_point(filled=True, opacity=0, size=60).encode(**encodings, tooltip=tooltip)
    return layered([lines, dots], counts, 170)


def nu_chart(latents: pd.DataFrame, nu_eps_threshold: float, nu_r_threshold: float) -> alt.LayerChart:
    """A dot per latent, coloured by verdict; columns of the latent table, and `card`, the anchor that a click opens."""
    axes = frame_of(latents, nu_eps_threshold, nu_r_threshold)
    dots = latents.iloc[:: -(-len(latents) // MAX_DOTS)] if len(latents) > MAX_DOTS else latents
    dots = dots.assign(eps=spelled(dots, "nu_eps", 2), r=spelled(dots, "nu_r", 2))
    dots = dots[["latent", "card", "verdict", "nu_eps", "nu_r", "eps", "r"]]
    verdicts = [name for name in Verdict.ALL if name in set(dots["verdict"])]
    colours = [f"var(--{VERDICT_ROLES[name]})" for name in verdicts]
    x = alt.X(
        "nu_r:Q",
        title="nu_r (high: other latents carry it in the base model)",
        scale=alt.Scale(domain=axes["nu_r"], nice=False),
    )
    y = alt.Y(
        "nu_eps:Q",
        title="nu_eps (high: shrunk away in the base model)",
        scale=alt.Scale(domain=axes["nu_eps"], nice=False),
    )
    # The corner that passes goes on to the left and below: room for a reader who drags the figure.
    left, below = (low - 3 * (high - low) for low, high in (axes["nu_r"], axes["nu_eps"]))
    corner = single(x=left, x2=nu_r_threshold, y=below, y2=nu_eps_threshold)
    corner = corner.mark_rect(color="var(--accept)", clip=True).encode(x="x:Q", x2="x2:Q", y="y:Q", y2="y2:Q")
    dashed: dict[str, Any] = {"strokeDash": [4, 3], "clip": True}
    lines = [
        single(x=nu_r_threshold).mark_rule(**dashed).encode(x="x:Q"),
        single(y=nu_eps_threshold).mark_rule(**dashed).encode(y="y:Q"),
    ]
    points = alt.Chart().mark_point(filled=True, opacity=0.75, size=34, clip=True, cursor="pointer")
    points = points.encode(
        x=x,
        y=y,
        color=alt.Color("verdict:N", scale=alt.Scale(domain=verdicts, range=colours), legend=alt.Legend(columns=2)),
        tooltip=text_tooltips(latent="latent", verdict="verdict", eps="nu_eps", r="nu_r"),
    )
    zoom = alt.selection_interval(bind="scales", zoom="wheel![event.altKey]", name="zoom")
    return layered([corner, *lines, points.add_params(zoom)], dots, 300)
