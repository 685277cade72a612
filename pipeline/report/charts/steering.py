"""Steering: what adding a latent does to a behaviour, to the next token and to fluency, scale by scale.

One figure per behaviour with up to three panels that share the scale axis. Solid: the chat model, steered at every
position. Dashed: the base model with the same latent. Dotted: other places of steering. Grey: random latents.
"""

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from pipeline.numerics.proportions import wilson_interval
from pipeline.report.charts.style import ROW_LEGEND_OFFSET, WIDTH, crosscoder_colour, spelled, text_tooltips
from pipeline.report.summary import CONTROL_LATENT, CONTROL_NONE, CONTROL_RANDOM, main_positions
from pipeline.schema import BASE, CHAT, MODEL_NAMES

RANDOM_LATENTS = "random latents"
UNSTEERED = "unsteered"
CHAT_LINE = "chat model"
BASE_LINE = "base model"
PANELS = (
    ("rate", "answers that show the behaviour, % of prompts", 130),
    ("kl", "KL of the next token from unsteered, nats", 70),
    ("nll", "fluency: nats per generated token (lower is better)", 70),
)
"""Column, axis title and height of each panel."""


def sweep_lines(steering: pd.DataFrame) -> pd.DataFrame:
    """One behaviour of one crosscoder as lines: line, scale, latent, rate with interval, kl, nll.

    Per scale the latent with the highest rate is drawn, with Wilson's interval over prompts; of random latents the mean
    rate, and in place of the interval the smallest and the largest. `unsteered` is one row at scale 0.
    """
    places = main_positions(steering)
    chat = steering[steering["model"] == MODEL_NAMES[CHAT]]
    base = steering[(steering["model"] == MODEL_NAMES[BASE]) & steering["positions"].isin(places[:1])]
    main = chat[chat["positions"].isin(places[:1])]
    parts = [_best_per_scale(main, CHAT_LINE), _best_per_scale(base, BASE_LINE)]
    parts += [_best_per_scale(chat[chat["positions"] == one], f"{CHAT_LINE}, {one} only") for one in places[1:]]
    random = main[main["control"] == CONTROL_RANDOM].groupby("scale")
    means = random[["rate", "kl", "nll"]].mean().assign(rate_low=random["rate"].min(), rate_high=random["rate"].max())
    parts.append(means.reset_index().assign(line=RANDOM_LATENTS, latent=-1))
    parts.append(_with_interval(chat[chat["control"] == CONTROL_NONE].head(1), UNSTEERED))
    columns = ["line", "scale", "latent", "rate", "rate_low", "rate_high", "kl", "nll"]
    return pd.concat([part[columns] for part in parts if len(part)] or [pd.DataFrame(columns=columns)])


def _best_per_scale(rows: pd.DataFrame, line: str) -> pd.DataFrame:
    rows = rows[rows["control"] == CONTROL_LATENT]
    best = rows.sort_values(["rate", "kl"], ascending=False, kind="stable").drop_duplicates("scale")
    return _with_interval(best.sort_values("scale"), line)


def _with_interval(rows: pd.DataFrame, line: str) -> pd.DataFrame:
    ends = [wilson_interval(float(rate), int(n)) for rate, n in zip(rows["rate"], rows["num_prompts"], strict=True)]
    return rows.assign(line=line, rate_low=[low for low, _ in ends], rate_high=[high for _, high in ends])


def steering_chart(lines: pd.DataFrame, names: Sequence[str]) -> alt.VConcatChart:
    """Panels of rate, KL and fluency by scale; panels without a number are left out.

    Columns of `sweep_lines`, and `crosscoder` and `card`: the anchor that a click on a latent's point opens.
    """
    panels = [panel for panel in PANELS if lines.loc[lines["line"] != UNSTEERED, panel[0]].notna().any()]
    drawn = lines.assign(spelled=spelled(lines, "rate", is_share=True))
    drawn["series"] = drawn["crosscoder"].where(drawn["line"] != RANDOM_LATENTS, RANDOM_LATENTS)
    last = panels[-1][0] if panels else ""
    places = sorted({str(line) for line in drawn["line"] if str(line).endswith("only")})
    charts = [
        _panel(column, title, names, places, is_last=column == last).properties(width=WIDTH, height=height)
        for column, title, height in panels
    ]
    column = alt.VConcatChart(data=drawn, vconcat=charts, spacing=18)
    chart: alt.VConcatChart = column.resolve_scale(x="shared", color="shared", strokeDash="shared")
    return chart


def _panel(column: str, title: str, names: Sequence[str], places: Sequence[str], *, is_last: bool) -> alt.LayerChart:
    is_rate = column == "rate"
    order = [CHAT_LINE, BASE_LINE, *places, RANDOM_LATENTS]
    dashes = [[1, 0], [5, 3], *([[1, 3]] * len(places)), [1, 0]]
    # KL starts at 0; the rate spans all shares; fluency has no natural zero.
    y_scale = alt.Scale(domain=[0, 1]) if is_rate else alt.Scale(zero=column == "kl", nice=True)
    encodings: dict[str, Any] = {
        "x": alt.X("scale:Q", title="scale, x largest activation" if is_last else None, axis=alt.Axis(grid=False)),
        "color": crosscoder_colour(names, RANDOM_LATENTS, column="series", offset=ROW_LEGEND_OFFSET),
        "strokeDash": alt.StrokeDash("line:N", scale=alt.Scale(domain=order, range=dashes), legend=None),
    }
    y = alt.Y(f"{column}:Q", title=title, scale=y_scale, axis=alt.Axis(format="%" if is_rate else "", tickCount=3))
    tooltip = [
        *text_tooltips(crosscoder="crosscoder", line="line", latent="latent", scale="scale", spelled="rate"),
        alt.Tooltip("kl:Q", title="KL, nats", format=".3f"),
        alt.Tooltip("nll:Q", title="nats per token", format=".3f"),
    ]
    level = alt.Chart().transform_filter(alt.datum.line == UNSTEERED).mark_rule(strokeDash=[2, 3])
    base = alt.Chart().transform_filter(alt.datum.line != UNSTEERED).encode(**encodings)
    layers: list[alt.Chart] = [level.encode(y=alt.Y(f"{column}:Q"))]
    if is_rate:
        has_bar = alt.FieldOneOfPredicate("line", [CHAT_LINE, RANDOM_LATENTS])
        bars = alt.Chart().transform_filter(has_bar).encode(**encodings)
        layers.append(bars.mark_rule(strokeWidth=1.4, opacity=0.6).encode(y=alt.Y("rate_low:Q"), y2="rate_high:Q"))
    detail = ["crosscoder:N", "line:N"]
    layers.append(base.mark_line(strokeWidth=1.6).encode(y=y, detail=detail))
    layers.append(base.mark_point(filled=True, size=34, opacity=1, cursor="pointer").encode(y=y, tooltip=tooltip))
    return alt.LayerChart(layer=layers)
