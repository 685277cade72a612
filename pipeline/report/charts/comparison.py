"""The crosscoders of a run side by side: how much each explains with how many active latents."""

from collections.abc import Sequence

import altair as alt
import pandas as pd

from pipeline.report.charts.style import crosscoder_colour, layered, text_tooltips


def fidelity_chart(table: pd.DataFrame, names: Sequence[str]) -> alt.LayerChart:
    """FVE by L0, one point per crosscoder; columns crosscoder, fve, l0, specific (as text)."""
    points = alt.Chart().mark_point(filled=True, size=90, opacity=1)
    tooltip = text_tooltips(crosscoder="crosscoder", specific="chat-specific latents")
    tooltip += [alt.Tooltip("fve:Q", title="FVE", format=".3f"), alt.Tooltip("l0:Q", title="L0", format=",.1f")]
    points = points.encode(
        x=alt.X("l0:Q", title="L0, active latents per row", scale=alt.Scale(zero=False, padding=14)),
        y=alt.Y("fve:Q", title="FVE, share of variance", scale=alt.Scale(zero=False, padding=14)),
        color=crosscoder_colour(names),
        tooltip=tooltip,
    )
    return layered([points], table, 170)
