"""Statistics over a crosscoder's ratios, as arXiv 2504.02922 reports them: everything follows from the latent table.

Do the ratios say the same as the decoder norms (correlations)? Do chat-only latents look like shared ones of the same
frequency (the share inside their central 95%)? Do betas hold on documents that they were not fitted on, and ratios on
training rows and on strong activations (numerics/scaling.py, the stage `latents`)? Intervals are over latents: they
say how far another dictionary of this kind may differ, not how well a latent's ratio is known.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from pipeline.analyses.latent_sets import NU_RANGE
from pipeline.numerics.proportions import Z_95, wilson_interval
from pipeline.schema import CHECKED_NU_COLUMNS, GAIN_COLUMNS, Column, Ownership, Verdict

RATIO_COLUMNS = (
    Column("latents", "string", "which latents: live (those that fire) or chat-only (of these, by Delta_norm)"),
    Column("quantity", "string", "the ratio or beta that the statistic is about"),
    Column("statistic", "string", "what value is (analyses/ratio_statistics.py)"),
    Column("value", "float64", "the number; NaN where too few latents have the quantity"),
    Column("value_low", "float64", "lower end of its 95% interval over latents; of a median the 2.5th percentile"),
    Column("value_high", "float64", "upper end of its 95% interval; of a median the 97.5th percentile"),
    Column("num_latents", "int64", "latents behind it"),
)
"""Statistics of one crosscoder's ratios: correlations with Delta_norm, matched shared latents, held-out betas."""

LIVE, CHAT_ONLY = "live", "chat-only"
RATIOS = ("nu_eps", "nu_r")
WITHIN_SHARED = "within matched shared"
"""Share of the chat-only latents inside the central 95% of the shared latents matched by frequency."""
MATCHED_MEDIAN, OWN_MEDIAN = "median of matched shared", "median"
HELD_OUT = "helps on other documents"
"""Share of latents whose beta lowers the squared error on the half of the documents that it was not fitted on."""
DIFFERENCE = "median difference"
"""Of a ratio on other rows less the ratio on the validation rows."""
SPEARMAN_FACTOR = 1.06
"""Variance of the transformed rank correlation times n - 3 (Fieller, Hartley and Pearson 1957)."""


def ratio_statistics(latents: pd.DataFrame) -> pd.DataFrame:
    """RATIO_COLUMNS of a latent table (schema.LATENT_COLUMNS)."""
    rows = list(_rows(latents[latents["verdict"] != Verdict.DEAD]))
    return pd.DataFrame(rows, columns=[column.name for column in RATIO_COLUMNS])


def _rows(live: pd.DataFrame) -> Iterator[dict[str, Any]]:
    chat_only = live[live["ownership"] == Ownership.CHAT_ONLY]
    sets = {LIVE: live, CHAT_ONLY: chat_only}
    for name in RATIOS:
        for latents, table in sets.items():
            known = table[table[name].between(*NU_RANGE)]
            yield _row(latents, name, "pearson", *correlation(known["delta_norm"], known[name]))
            ranks = known["delta_norm"].rank(), known[name].rank()
            yield _row(latents, name, "spearman", *correlation(*ranks, factor=SPEARMAN_FACTOR))
        own, matched = chat_only[name].dropna(), matched_shared(live, name)[name]
        yield _row(CHAT_ONLY, name, OWN_MEDIAN, *_quantiles(own), len(own))
        yield _row(CHAT_ONLY, name, MATCHED_MEDIAN, *_quantiles(matched), len(matched))
        _, low, high = _quantiles(matched)
        yield _share_row(CHAT_ONLY, name, WITHIN_SHARED, own.between(low, high)[: len(own) if len(matched) else 0])
    for column in (column.name for column in GAIN_COLUMNS):
        for latents, table in sets.items():
            yield _share_row(latents, column.replace("gain", "beta"), HELD_OUT, table[column].dropna() > 0)
    for column in (column.name for column in CHECKED_NU_COLUMNS):
        difference = (chat_only[column] - chat_only[column.rsplit("_", 1)[0]]).dropna()
        if len(difference):
            yield _row(CHAT_ONLY, column, DIFFERENCE, *_quantiles(difference), len(difference))


def correlation(
    x: "pd.Series[float]", y: "pd.Series[float]", *, factor: float = 1.0
) -> tuple[float, float, float, int]:
    """Pearson's r of x and y, both ends of its 95% interval, and their number.

    The interval is Fisher's, tanh(atanh r -+ 1.96 sqrt(factor / (n - 3))); NaN for fewer than four latents or where one
    side does not vary. For ranks, r is Spearman's and factor is SPEARMAN_FACTOR.
    """
    number = len(x)
    if number < 4 or x.nunique() < 2 or y.nunique() < 2:
        return math.nan, math.nan, math.nan, number
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    half = Z_95 * math.sqrt(factor / (number - 3))
    with np.errstate(divide="ignore"):
        z = np.arctanh(r)
    return r, float(np.tanh(z - half)), float(np.tanh(z + half)), number


def matched_shared(live: pd.DataFrame, ratio: str) -> pd.DataFrame:
    """For each chat-only latent with this ratio a shared one of nearest log frequency, none twice, while there are any.

    The most frequent chat-only latents choose first, since shared latents of their frequency are the rarest.
    """
    known = live[live[ratio].notna() & (live["frequency"] > 0)]
    chat_only, shared = (
        known[known["ownership"] == name].sort_values(["frequency", "latent"], ascending=False)
        for name in (Ownership.CHAT_ONLY, Ownership.SHARED)
    )
    left = list(-np.log(shared["frequency"].to_numpy()))  # ascending
    places, chosen = list(range(len(shared))), []
    for wanted in -np.log(chat_only["frequency"].to_numpy()):
        if not left:
            break
        at = int(np.searchsorted(left, wanted))
        at -= at == len(left) or (at > 0 and wanted - left[at - 1] <= left[at] - wanted)
        chosen.append(places.pop(at))
        left.pop(at)
    return shared.iloc[chosen]


def _quantiles(values: "pd.Series[float]") -> tuple[float, float, float]:
    """Median, 2.5th and 97.5th percentile; NaN of nothing."""
    median, low, high = values.quantile([0.5, 0.025, 0.975])
    return float(median), float(low), float(high)


def _share_row(latents: str, quantity: str, statistic: str, hits: "pd.Series[bool]") -> dict[str, Any]:
    share = float(hits.mean()) if len(hits) else math.nan
    return _row(latents, quantity, statistic, share, *wilson_interval(share, len(hits)), len(hits))


def _row(
    latents: str, quantity: str, statistic: str, value: float, low: float, high: float, number: int
) -> dict[str, Any]:
    values = (latents, quantity, statistic, value, low, high, number)
    return dict(zip((column.name for column in RATIO_COLUMNS), values, strict=True))
