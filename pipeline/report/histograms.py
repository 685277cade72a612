"""Activation histograms of latents: one bar for each bin, the same bins for all corpora of a latent."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from pipeline.analyses.activation_bins import EDGES


class Bar(NamedTuple):
    """One bin."""

    low: float
    high: float
    num_rows: int
    height: float
    """log(1 + rows) relative to the latent's largest, in [0, 1]."""


class Histogram(NamedTuple):
    """Rows of one corpus by activation, from the lowest bin that a corpus of the latent has to the highest."""

    corpus: str
    bars: list[Bar]


def histograms(rows: pd.DataFrame, corpora: Sequence[str]) -> list[Histogram]:
    """One per corpus, also where it has no row; empty for a latent that never fires.

    rows: HISTOGRAM_COLUMNS of one latent.
    """
    if rows.empty:
        return []
    low, high = float(rows["low"].min()), float(rows["high"].max())
    bins = [
        ends for ends in zip(EDGES[:-1].tolist(), EDGES[1:].tolist(), strict=True) if low <= ends[0] and ends[1] <= high
    ]
    most = math.log1p(int(rows["num_rows"].max()))
    made = []
    for corpus in corpora:
        own = rows[rows["corpus"] == corpus]
        found = {float(start): int(number) for start, number in zip(own["low"], own["num_rows"], strict=True)}
        counts = [found.get(start, 0) for start, _ in bins]
        bars = [Bar(*ends, number, math.log1p(number) / most) for ends, number in zip(bins, counts, strict=True)]
        made.append(Histogram(corpus, bars))
    return made
