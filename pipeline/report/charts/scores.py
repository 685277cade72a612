"""Scores with intervals: AUROC of planted behaviours, balanced accuracy of explanations, controls of the verdict."""

import math
from collections.abc import Sequence

import altair as alt
import pandas as pd

from pipeline.report.charts.style import ROW_HEIGHT, crosscoder_colour, layered, rows_of, single, spelled, text_tooltips
from pipeline.report.summary import CANDIDATE_ANY, CANDIDATE_MEAN_DIFFERENCE, CANDIDATE_SPECIFIC


def planted_chart(scores: pd.DataFrame, names: Sequence[str]) -> alt.LayerChart:
    """AUROC per behaviour: filled = best chat-specific latent with its interval, hollow = what it is compared with.

    Columns of PLANTED_COLUMNS, and crosscoder and card, the anchor that a click opens.
    """
    drawn = scores[scores["auroc"].notna()]
    drawn = drawn.assign(spelled=spelled(drawn, "auroc"))
    drawn = drawn[
        ["crosscoder", "behavior", "candidate", "latent", "card", "auroc", "auroc_low", "auroc_high", "spelled"]
    ]
    encodings, height = rows_of(drawn, "behavior", names)
    lowest = min(0.5, math.floor(drawn[["auroc", "auroc_low"]].min().min() * 10 + 1e-9) / 10)
    x = alt.X("auroc:Q", title="AUROC on held-out rows (0.5 = chance)", scale=alt.Scale(domain=[lowest, 1]))
    tooltip = text_tooltips(
        crosscoder="crosscoder", behavior="behaviour", candidate="candidate", latent="latent", spelled="AUROC"
    )
    is_specific = alt.datum.candidate == CANDIDATE_SPECIFIC
    shapes = alt.Scale(domain=[CANDIDATE_ANY, CANDIDATE_MEAN_DIFFERENCE], range=["circle", "square"])
    others = alt.Chart().transform_filter(~is_specific).mark_point(size=110, strokeWidth=1.5, cursor="pointer")
    best = alt.Chart().transform_filter(is_specific).encode(**encodings, tooltip=tooltip)
    layers = [
        others.encode(**encodings, x=x, shape=alt.Shape("candidate:N", scale=shapes, legend=None), tooltip=tooltip),
        best.mark_rule(strokeWidth=2).encode(x=alt.X("auroc_low:Q"), x2="auroc_high:Q"),
        best.mark_point(filled=True, size=40, opacity=1, cursor="pointer").encode(x=x),
    ]
    return layered(layers, drawn, height)


def explanation_chart(scores: pd.DataFrame, names: Sequence[str]) -> alt.LayerChart:
    """Balanced accuracy of each explanation with its interval, best first within its crosscoder; dashed: chance.

    Columns crosscoder, latent, card, explanation, balanced_accuracy and its interval.
    """
    place = {name: index for index, name in enumerate(names)}
    drawn = scores.assign(place=scores["crosscoder"].map(place), spelled=spelled(scores, "balanced_accuracy", 2))
    drawn = drawn.sort_values(["place", "balanced_accuracy"], ascending=[True, False], kind="stable", ignore_index=True)
    drawn = drawn.assign(rank=drawn.index + drawn["place"])
    chance = single(y=0.5).mark_rule(strokeDash=[4, 3]).encode(y="y:Q")
    y = alt.Y("balanced_accuracy:Q", title="balanced accuracy on held-out contexts", scale=alt.Scale(domain=[0, 1]))
    base = alt.Chart().encode(
        x=alt.X(
            "rank:Q",
            title="latents, best explained first",
            axis=alt.Axis(labels=False, ticks=False, grid=False),
            scale=alt.Scale(zero=False, nice=False, padding=8),
        ),
        color=crosscoder_colour(names),
        tooltip=text_tooltips(crosscoder="crosscoder", latent="latent", explanation="in words", spelled="accuracy"),
    )
    layers = [
        chance,
        base.mark_rule(strokeWidth=1.2, opacity=0.55).encode(
            y=alt.Y("balanced_accuracy_low:Q"), y2="balanced_accuracy_high:Q"
        ),
        base.mark_point(filled=True, size=36, opacity=1, cursor="pointer").encode(y=y),
    ]
    return layered(layers, drawn, 180)


def control_chart(controls: pd.DataFrame, names: Sequence[str]) -> alt.LayerChart:
    """Each control as a dot with its interval; a grey tick marks what it is held against.

    Columns of schema.CONTROL_COLUMNS, and crosscoder.
    """
    drawn = controls[controls["value"].notna()]
    drawn = drawn.assign(spelled=spelled(drawn, "value", is_share=True))
    encodings, height = rows_of(drawn, "control", names)
    x = alt.X("value:Q", title="share, %", axis=alt.Axis(format="%"), scale=alt.Scale(zero=True))
    tooltip = text_tooltips(
        crosscoder="crosscoder", control="control", quantity="quantity", spelled="value", note="note"
    )
    base = alt.Chart().encode(**encodings, tooltip=tooltip)
    expected = (
        alt.Chart()
        .transform_filter("isValid(datum.expected)")
        .mark_tick(color="var(--muted)", thickness=2, size=ROW_HEIGHT)
    )
    layers = [
        expected.encode(y=encodings["y"], yOffset=encodings["yOffset"], x=alt.X("expected:Q")),
        base.mark_rule(strokeWidth=2).encode(x=alt.X("value_low:Q"), x2="value_high:Q"),
        base.mark_point(filled=True, size=50, opacity=1).encode(x=x),
    ]
    return layered(layers, drawn, height)
