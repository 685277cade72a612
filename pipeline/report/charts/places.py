"""Where latents fire: by corpus and by speaker, the chat-specific latents beside the shared ones.

The shared latents are what to compare with: most of them fire on every corpus and on all speakers alike.
"""

import math
from collections.abc import Sequence

import altair as alt
import pandas as pd

from pipeline.report import formatting as fmt
from pipeline.report.charts.style import ROW_HEIGHT, ROW_LEGEND_OFFSET, layered, rows_of, text_tooltips
from pipeline.report.summary import ELSEWHERE, FREQUENCY_PREFIX, SPEAKERS
from pipeline.schema import Verdict

KINDS = (Verdict.CHAT_SPECIFIC, Verdict.SHARED)
SPEAKER_COLOURS = ("var(--place-template)", "var(--place-user)", "var(--place-assistant)", "var(--place-else)")
QUANTILES = {"p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}


def frequency_spreads(latents: pd.DataFrame, corpora: Sequence[str]) -> pd.DataFrame:
    """Quantiles of the frequency per corpus, crosscoder and kind of latent; a row without a latent is left out.

    `latents` has the columns of the latent table and `crosscoder`.
    """
    rows = []
    for corpus in corpora:
        for kind in KINDS:
            for name, own in latents[latents["verdict"] == kind].groupby("crosscoder", sort=False):
                values = own[f"{FREQUENCY_PREFIX}{corpus}"].dropna()
                if len(values):
                    spread = {key: float(values.quantile(share)) for key, share in QUANTILES.items()}
                    row = {"corpus": corpus, "kind": kind, "crosscoder": name, "num_latents": len(values)}
                    rows.append({**row, "label": f"{fmt.visible(corpus)}, {kind}", **spread})
    return pd.DataFrame(rows)


def frequency_chart(spreads: pd.DataFrame, names: Sequence[str]) -> alt.LayerChart:
    """Frequency by corpus on a log scale: line from 5 to 95%, box from 25 to 75%, tick at the median."""
    ends = spreads[list(QUANTILES)]
    floor = 10.0 ** math.floor(math.log10(ends[ends > 0].min().min())) if (ends > 0).any(axis=None) else 1e-4
    drawn = spreads.assign(**{name: ends[name].clip(lower=floor) for name in QUANTILES})
    drawn["spelled"] = [
        f"{fmt.percent(median)}, 5 to 95% of latents: {fmt.percent(low)} to {fmt.percent(high)}"
        for median, low, high in zip(spreads["median"], spreads["p05"], spreads["p95"], strict=True)
    ]
    encodings, height = rows_of(drawn, "label", names)
    tooltip = text_tooltips(crosscoder="crosscoder", label="latents", num_latents="number", spelled="median")
    base = alt.Chart().encode(**encodings, tooltip=tooltip)
    title = "share of the corpus' rows on which a latent fires"
    scale = alt.Scale(type="log", domain=[floor, 1])
    x = alt.X("p05:Q", title=title, scale=scale, axis=alt.Axis(format="~%", tickCount=4))
    layers = [
        base.mark_rule(strokeWidth=1.5).encode(x=x, x2="p95:Q"),
        base.mark_bar(opacity=0.4).encode(x=alt.X("p25:Q"), x2="p75:Q"),
        base.mark_tick(thickness=2.5, size=ROW_HEIGHT - 4, opacity=1).encode(x=alt.X("median:Q")),
    ]
    return layered(layers, drawn, height)


def speaker_shares(latents: pd.DataFrame) -> pd.DataFrame:
    """Mean share of activation per crosscoder, kind of latent and speaker; the shares of one bar sum to 1."""
    rows = []
    for name, of_crosscoder in latents.groupby("crosscoder", sort=False):
        for kind in KINDS:
            own = of_crosscoder[of_crosscoder["verdict"] == kind]
            if own.empty:
                continue
            shares = {speaker: float(own[column].fillna(0.0).mean()) for speaker, column in SPEAKERS.items()}
            shares[ELSEWHERE] = max(0.0, 1 - sum(shares.values()))
            row = {"label": f"{name}, {kind}", "num_latents": len(own)}
            rows += [
                {**row, "speaker": speaker, "order": order, "share": share}
                for order, (speaker, share) in enumerate(shares.items())
            ]
    return pd.DataFrame(rows)


def speaker_chart(shares: pd.DataFrame) -> alt.LayerChart:
    """Stacked bars of where activation lies, one per crosscoder and kind of latent."""
    labels = list(dict.fromkeys(shares["label"]))
    drawn = shares.assign(spelled=[fmt.percent(share, 0) for share in shares["share"]])
    bars = alt.Chart(drawn).mark_bar(size=ROW_HEIGHT)
    bars = bars.encode(
        x=alt.X("share:Q", title="share of activation, %", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("label:N", sort=labels, axis=alt.Axis(title=None, labelColor="var(--text)", grid=False)),
        color=alt.Color(
            "speaker:N",
            scale=alt.Scale(domain=[*SPEAKERS, ELSEWHERE], range=list(SPEAKER_COLOURS)),
            legend=alt.Legend(columns=4, offset=ROW_LEGEND_OFFSET),
        ),
        order="order:Q",
        tooltip=text_tooltips(label="latents", num_latents="number", speaker="speaker", spelled="mean share"),
    )
    return layered([bars], drawn, len(labels) * (ROW_HEIGHT + 10))
