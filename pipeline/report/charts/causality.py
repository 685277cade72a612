"""Causal effect: KL per intervention, and KL by the number of latents added.

Interventions are dots with intervals. Whole edits share an axis from 0; the halves of the latents have an axis of their
own that does not start at 0, since their differences are small beside the KL that all of them leave.
"""

import re
from collections.abc import Sequence

import altair as alt
import pandas as pd

from pipeline.analyses.interventions import SHARED_KINDS
from pipeline.report import formatting as fmt
from pipeline.report.charts.style import (
    ROW_LEGEND_OFFSET,
    crosscoder_colour,
    layered,
    rows_of,
    single,
    spelled,
    text_tooltips,
)

KL_TITLE = "KL to the chat model, nats per token"
NO_CROSSCODER = "no crosscoder"
"""Name in place of a crosscoder's where an intervention needs none."""
SHARED_INTERVENTIONS = SHARED_KINDS
"""Interventions that use no crosscoder: drawn once."""
SANITY_INTERVENTIONS = ("base", "chat")
"""Only in the page's table: both read the whole stream of one model, so they say nothing about latents."""
WHOLE_EDITS = {
    "none": "no edit",
    "template": "template tokens",
    "first": "first positions of answers",
    "template_and_first": "template and first positions",
    "mean_difference": "mean difference",
    "mean_difference_projection": "mean difference, projected",
    "principal_1": "first principal direction",
    "principal_all": "principal directions",
    "all": "all latents",
    "error": "error",
}
HALVES = tuple(
    (f"{half}_half_{kind}{suffix}", f"{verb}: {label}")
    for kind, verb in (("replace", "replaced"), ("add", "added"))
    for half, suffix, label in (
        ("best", "", "best half"),
        (r"random", "", "random halves"),
        ("worst", "", "worst half"),
        ("best", "_by_delta_norm", "best by Delta_norm"),
        ("worst", "_by_delta_norm", "worst by Delta_norm"),
    )
)


def _label(intervention: str) -> tuple[int, str]:
    """Place and label of an intervention; those that are not known by name come last."""
    if intervention in WHOLE_EDITS:
        return list(WHOLE_EDITS).index(intervention), WHOLE_EDITS[intervention]
    name = re.sub(r"^random_half_\d+_", "random_half_", intervention)
    for place, (half, label) in enumerate(HALVES):
        if name == half:
            return 100 + place, label
    return 50, fmt.visible(fmt.words(intervention))


def intervention_rows(causality: pd.DataFrame, *, halves: bool) -> pd.DataFrame:
    """Rows to draw, with `label`, in order: the halves of the latents, or all other interventions.

    `causality` has the columns of schema.CAUSALITY_COLUMNS and `crosscoder`; rows that need no crosscoder come once.
    """
    rows = causality[~causality["intervention"].isin(SANITY_INTERVENTIONS) & causality["kl"].notna()]
    found = [_label(str(name)) for name in rows["intervention"]]
    rows = rows.assign(place=[place for place, _ in found], label=[label for _, label in found])
    rows = rows[(rows["place"] >= 100) == halves]
    is_shared = rows["intervention"].isin(SHARED_INTERVENTIONS)
    rows = rows.assign(crosscoder=rows["crosscoder"].where(~is_shared, NO_CROSSCODER))
    rows = rows[~is_shared | ~rows.duplicated("intervention")]
    return rows.sort_values("place", kind="stable", ignore_index=True)


def kl_chart(rows: pd.DataFrame, names: Sequence[str], *, baseline: float | None = None) -> alt.LayerChart:
    """Dots with intervals from `intervention_rows`; with a baseline the axis is zoomed and a dashed line marks it."""
    drawn = rows.assign(spelled=spelled(rows, "kl", 4))
    drawn = drawn[["crosscoder", "label", "kl", "kl_low", "kl_high", "spelled", "num_latents"]]
    has_plain = (drawn["crosscoder"] == NO_CROSSCODER).any()
    used = [name for name in names if (drawn["crosscoder"] == name).any()]
    encodings, height = rows_of(drawn, "label", used or [NO_CROSSCODER])
    encodings["color"] = crosscoder_colour(names, NO_CROSSCODER if has_plain else "", offset=ROW_LEGEND_OFFSET)
    scale = alt.Scale(domainMin=0) if baseline is None else alt.Scale(zero=False, padding=8)
    x = alt.X("kl:Q", title=KL_TITLE, scale=scale)
    tooltip = text_tooltips(crosscoder="crosscoder", label="intervention", spelled="KL", num_latents="latents")
    layers: list[alt.Chart] = []
    if baseline is not None:
        rule = single(kl=baseline, what="no edit").mark_rule(strokeDash=[4, 3])
        layers.append(rule.encode(x="kl:Q", tooltip=[*text_tooltips(what="line"), alt.Tooltip("kl:Q", format=".4f")]))
    # Rows without a crosscoder stand in the middle of their band.
    plain = alt.datum.crosscoder == NO_CROSSCODER
    for part in (~plain, plain) if has_plain else (~plain,):
        own = {key: value for key, value in encodings.items() if part is not plain or key != "yOffset"}
        base = alt.Chart().transform_filter(part).encode(**own, tooltip=tooltip)
        layers += [
            base.mark_rule(strokeWidth=2).encode(x=alt.X("kl_low:Q"), x2="kl_high:Q"),
            base.mark_point(filled=True, size=50, opacity=1).encode(x=x),
        ]
    return layered(layers, drawn, height)


def kl_curve_chart(curve: pd.DataFrame, names: Sequence[str]) -> alt.LayerChart:
    """KL by latents added: solid with its interval in order of evidence, dashed in random orders.

    Columns of schema.CAUSALITY_CURVE_COLUMNS and crosscoder, and is_evidence, which tells the two apart.
    """
    drawn = curve.assign(spelled=spelled(curve, "kl", 4))
    drawn = drawn[["crosscoder", "order", "is_evidence", "num_latents", "kl", "kl_low", "kl_high", "spelled"]]
    sizes = sorted(set(drawn["num_latents"]))
    x = alt.X(
        "num_latents:Q",
        title="latents added",
        scale=alt.Scale(type="symlog", constant=1, nice=False),
        axis=alt.Axis(values=sizes, grid=False, labelOverlap="greedy"),
    )
    y = alt.Y("kl:Q", title=KL_TITLE, scale=alt.Scale(zero=False, nice=False, padding=6))
    colour = crosscoder_colour(names)
    tooltip = text_tooltips(crosscoder="crosscoder", order="order", num_latents="latents added", spelled=KL_TITLE)
    base = alt.Chart().transform_filter("datum.is_evidence").encode(x=x, color=colour)
    layers = [
        base.mark_area(opacity=0.16, line=False).encode(y=alt.Y("kl_low:Q"), y2="kl_high:Q"),
        alt.Chart()
        .transform_filter("!datum.is_evidence")
        .mark_line(strokeDash=[4, 3], strokeWidth=1.2, opacity=0.8)
        .encode(x=x, y=y, color=colour, detail="order:N", tooltip=tooltip),
        base.mark_line(strokeWidth=1.8).encode(y=y),
        base.mark_point(filled=True, size=36, opacity=1).encode(y=y, tooltip=tooltip),
    ]
    return layered(layers, drawn, 210)
