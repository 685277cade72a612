"""Everything that is known of one latent: its card, its numbers, where it fires, and which latents are near it."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.analyses.activation_bins import EDGES, bin_of
from pipeline.analyses.examples import contexts
from pipeline.analyses.neighbours import neighbour_table
from pipeline.explorer.sample import Cofiring, Sampled
from pipeline.explorer.source import Explored
from pipeline.report.histograms import Histogram, histograms
from pipeline.report.latents import LatentCard, Neighbour, TokenContext, card_of, neighbours_of, token_contexts
from pipeline.schema import LATENT_COLUMNS, SEED_COLUMNS, latent_corpus_columns
from pipeline.text.tokenizers import token_texts

QUANTILES = (1.0, 0.9, 0.75, 0.5, 0.25)
"""Of the activations above 0, for the examples."""
_NUM_NEAR = 8
_WINDOW_TOKENS = 20
_SAMPLE_SECONDS = 1.5
"""How long a page waits for the sample to be complete."""


class Number(NamedTuple):
    """One column of the latent table."""

    name: str
    value: float | str
    low: float
    """Lower end of the 95% interval; NaN without one."""
    high: float
    doc: str


class LatentPage(NamedTuple):
    """What the page shows."""

    card: LatentCard
    """Without what the page shows of the sample."""
    numbers: list[Number]
    histograms: list[Histogram]
    quantiles: list[tuple[float, TokenContext]]
    """A context at each quantile."""
    cofiring: list[Cofiring]
    neighbours: list[Neighbour]
    seeds: list[dict[str, object]]
    """Rows of SEED_COLUMNS: what other seeds have of it."""
    num_sampled: int
    """Validation rows that histogram, quantiles and co-firing are from."""
    is_complete: bool
    """Whether the sample is read to its end."""


def latent_page(explored: Explored, crosscoder: str, latent: int) -> LatentPage:
    """The page of one latent. InputError for one that the crosscoder does not have."""
    name = explored.crosscoder_name(crosscoder)
    report = explored.run.latent_report(name, latent)
    assert report.latents is not None
    sample = explored.sampler(name).so_far(wait_seconds=_SAMPLE_SECONDS)
    near = neighbour_table(explored.crosscoder(name), [latent], _NUM_NEAR)
    return LatentPage(
        card=card_of(report, latent)._replace(histograms=[], weaker=[], neighbours=[]),
        numbers=numbers_of(report.latents),
        histograms=_histograms(sample, latent),
        quantiles=_quantiles(explored, sample, latent),
        cofiring=sample.cofiring(latent, _NUM_NEAR),
        neighbours=neighbours_of(near),
        seeds=_seeds(explored, name, latent),
        num_sampled=sample.num_rows,
        is_complete=sample.is_complete,
    )


def numbers_of(row: pd.DataFrame) -> list[Number]:
    """Every column of one row of the latent table, intervals beside their estimate."""
    (values,), columns = row.to_dict("records"), list(row.columns)
    corpora = [name.removeprefix("frequency_") for name in columns if name.startswith("frequency_")]
    docs = {column.name: column.doc for column in (*LATENT_COLUMNS, *latent_corpus_columns(corpora))}
    ends = {f"{name}{end}" for name in columns for end in ("_low", "_high") if f"{name}_low" in columns}
    return [
        Number(
            name,
            value if isinstance(value := values[name], str) else float(value) if value is not None else np.nan,
            float(values.get(f"{name}_low", np.nan)),
            float(values.get(f"{name}_high", np.nan)),
            docs.get(name, ""),
        )
        for name in columns
        if name not in ends
    ]


def _histograms(sample: Sampled, latent: int) -> list[Histogram]:
    fired = sample.of(latent)
    if not len(fired.row_N):
        return []
    corpus_N, bin_N = sample.column("corpus")[fired.row_N], bin_of(fired.value_N)
    counts = pd.Series(1, index=[corpus_N, bin_N]).groupby(level=[0, 1]).sum()
    places = counts.index.get_level_values(1).to_numpy()
    rows = pd.DataFrame(
        {
            "corpus": [sample.corpora[place] for place in counts.index.get_level_values(0)],
            "low": EDGES[places],
            "high": EDGES[places + 1],
            "num_rows": counts.to_numpy(),
        }
    )
    return histograms(rows, sample.corpora)


def _quantiles(explored: Explored, sample: Sampled, latent: int) -> list[tuple[float, TokenContext]]:
    """The context at each quantile of the activations; none without the models, whose tokenizer spells tokens."""
    fired = sample.of(latent)
    if not len(fired.row_N) or not explored.has_models:
        return []
    last = len(fired.row_N) - 1
    quantile_of = {round((1 - quantile) * last): quantile for quantile in reversed(QUANTILES)}
    rows = fired.row_N[list(quantile_of)]
    columns = {name: sample.column(name)[rows] for name in ("doc_id", "position", "corpus")}
    chosen = pd.DataFrame(
        {
            **columns,
            "latent": latent,
            "rank": np.arange(len(rows)),
            "activation": fired.value_N[list(quantile_of)].astype(np.float64),
            "corpus": [sample.corpora[place] for place in columns["corpus"]],
        }
    )
    tokenizer = explored.tokenizer
    spelled = contexts(
        chosen,
        sample.batches,
        window_tokens=_WINDOW_TOKENS,
        token_texts=lambda ids: token_texts(tokenizer, ids),
    )
    return list(zip(quantile_of.values(), token_contexts(spelled), strict=True))


def _seeds(explored: Explored, name: str, latent: int) -> list[dict[str, object]]:
    """What the controls say of it; none where they were off or compared no seeds."""
    if not explored.run.has("controls", name):
        return []
    found = explored.run.table("controls", name, file="seeds", where=("latent", latent))
    columns = [column.name for column in SEED_COLUMNS]
    return [{str(key): value for key, value in row.items()} for row in found[columns].to_dict("records")]
