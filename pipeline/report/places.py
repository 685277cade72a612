"""Where latents fire: by corpus, and by who speaks, for the chat-specific latents beside the shared ones.

Summaries of the latent table's frequency and share columns, and the two charts made from them. The shared latents are
the yardstick: most of them fire on both corpora and on all speakers alike.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from pipeline.report import formatting as fmt
from pipeline.report.svg import Axis, Box, Canvas, frame, legend, text_width
from pipeline.schema import Verdict

FREQUENCY_PREFIX = "frequency_"
"""A latent table has one column with this prefix per corpus: the share of its rows on which a latent fires."""
TEMPLATE_SHARE = 0.5
"""A latent with more of its activation on template tokens is a template latent (arXiv 2504.02922, section 4)."""
SPEAKERS = (("template", "template_frac"), ("user", "user_frac"), ("assistant", "assistant_frac"))
"""Name and column of each place; what is left is elsewhere."""
KINDS = ((Verdict.CHAT_SPECIFIC, "chat-specific"), (Verdict.SHARED, "shared"))
ROW_HEIGHT = 22


def corpora_of(latents: pd.DataFrame) -> list[str]:
    """Names of the corpora whose frequencies the table holds, in its order."""
    return [
        str(name).removeprefix(FREQUENCY_PREFIX) for name in latents.columns if str(name).startswith(FREQUENCY_PREFIX)
    ]


def num_template_latents(latents: pd.DataFrame) -> int:
    """Chat-specific latents with more than half of their activation on template tokens."""
    specific = latents[latents["verdict"] == Verdict.CHAT_SPECIFIC]
    return int((specific["template_frac"] > TEMPLATE_SHARE).sum())


class Spread(NamedTuple):
    """Quantiles of one number over some latents."""

    label: str
    colour: str
    number: int
    low: float
    """5%."""
    first: float
    """25%."""
    median: float
    third: float
    high: float


def frequency_spreads(latents: pd.DataFrame, corpus: str, colour: str, name: str) -> list[Spread]:
    """Frequencies on one corpus of the chat-specific and of the shared latents; kinds without a latent are left out."""
    spreads = []
    for verdict, kind in KINDS:
        values = latents.loc[latents["verdict"] == verdict, f"{FREQUENCY_PREFIX}{corpus}"].dropna()
        if len(values):
            quantiles = [float(values.quantile(share)) for share in (0.05, 0.25, 0.5, 0.75, 0.95)]
            own = colour if verdict == Verdict.CHAT_SPECIFIC else "var(--plain)"
            spreads.append(Spread(f"{name}, {kind}", own, len(values), *quantiles))
    return spreads


def frequency_chart(groups: Sequence[tuple[str, Sequence[Spread]]], series: Sequence[tuple[str, str]]) -> str:
    """Frequency by corpus on a log scale: line from 5 to 95%, box from 25 to 75%, tick at the median."""
    left = min(170.0, 16 + max((text_width(name) for name, _ in groups), default=80))
    bottom = 40 + sum(len(spreads) * ROW_HEIGHT + 12 for _, spreads in groups)
    canvas = Canvas(460, bottom + 46)
    grey = [("shared latents", "var(--plain)")]
    box = Box(left, 34, 440, bottom).lower(legend(canvas, [*series, *grey]))
    ends = [end for _, spreads in groups for one in spreads for end in (one.low, one.high) if end > 0]
    low = 10.0 ** math.floor(math.log10(min(ends, default=1e-4)))
    plot = frame(
        canvas, box, Axis("share of the corpus' rows on which a latent fires", low, 1.0, is_log=True), _NO_AXIS
    )
    y = box.top + 4.0
    for name, spreads in groups:
        canvas.text(left - 10, y + len(spreads) * ROW_HEIGHT / 2 + 4, name, "var(--text)", text_anchor="end")
        for one in spreads:
            middle = y + ROW_HEIGHT / 2
            ends_at = [plot.x(max(value, low)) for value in (one.low, one.first, one.median, one.third, one.high)]
            title = f"{one.label} on {name}: median {fmt.percent(one.median)}, {fmt.plural(one.number, 'latent')}"
            canvas.line(ends_at[0], middle, ends_at[4], middle, one.colour, stroke_width=1.5)
            width = max(ends_at[3] - ends_at[1], 2)
            look: dict[str, float | str] = {"fill": one.colour, "fill_opacity": 0.35, "stroke": one.colour}
            canvas.add("rect", title, x=ends_at[1], y=middle - 6, width=width, height=12, **look)
            canvas.line(ends_at[2], middle - 6, ends_at[2], middle + 6, one.colour, stroke_width=2.5)
            y += ROW_HEIGHT
        y += 12
    return canvas.render("Frequency by corpus", "line: 5 to 95%, box: 25 to 75%, tick: median")


class Shares(NamedTuple):
    """Mean share of activation by place, over some latents."""

    label: str
    number: int
    shares: tuple[float, ...]
    """Of SPEAKERS in order, then elsewhere; sums to 1."""


def speaker_shares(latents: pd.DataFrame, name: str) -> list[Shares]:
    """One row for the chat-specific and one for the shared latents of a crosscoder."""
    rows = []
    for verdict, kind in KINDS:
        own = latents[latents["verdict"] == verdict]
        means = [float(own[column].fillna(0.0).mean()) for _, column in SPEAKERS] if len(own) else []
        if means:
            rows.append(Shares(f"{name}, {kind}", len(own), (*means, max(0.0, 1 - sum(means)))))
    return rows


def shares_chart(rows: Sequence[Shares]) -> str:
    """Stacked bars of where activation lies, one per kind of latent."""
    names = [*(name for name, _ in SPEAKERS), "elsewhere"]
    colours = ["var(--place-template)", "var(--place-user)", "var(--place-assistant)", "var(--place-else)"]
    left = min(215.0, 16 + max((text_width(row.label) for row in rows), default=80))
    bottom = 40 + len(rows) * (ROW_HEIGHT + 8)
    canvas = Canvas(460, bottom + 46)
    box = Box(left, 34, 440, bottom).lower(legend(canvas, list(zip(names, colours, strict=True))))
    axis = Axis(
        "share of activation, %", 0, 1, ticks=(0, 0.25, 0.5, 0.75, 1), tick_text=lambda value: f"{100 * value:g}"
    )
    plot = frame(canvas, box, axis, _NO_AXIS)
    y = box.top + 4.0
    for row in rows:
        canvas.text(left - 10, y + ROW_HEIGHT / 2 + 4, row.label, "var(--text)", text_anchor="end")
        start = 0.0
        for name, colour, share in zip(names, colours, row.shares, strict=True):
            x, end = plot.x(start), plot.x(start + share)
            title = f"{row.label}: {name} {fmt.percent(share, 0)}, mean over {fmt.plural(row.number, 'latent')}"
            canvas.add("rect", title, x=x, y=y + 2, width=max(end - x, 0.0), height=ROW_HEIGHT - 4, fill=colour)
            start += share
        y += ROW_HEIGHT + 8
    return canvas.render("Where latents fire", "mean share of activation by speaker")


_NO_AXIS = Axis("", 0, 1, ticks=())
