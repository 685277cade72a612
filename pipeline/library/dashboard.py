"""Examples of a latent from rows in memory, and the page of one latent that a notebook shows."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pipeline.analyses import examples as analysis
from pipeline.analyses.rows import analyse, encoded_batches
from pipeline.errors import InputError
from pipeline.library.checks import require_fit, require_own_latents
from pipeline.library.rows import Rows
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.report.card import latent_page
from pipeline.report.data import CrosscoderReport
from pipeline.schema import EXAMPLE_COLUMNS
from pipeline.text.tokenizers import token_texts

_HEIGHT = 460
"""Of the page in a notebook, in pixels; it scrolls."""


class Dashboard:
    """A latent's page: shown by a notebook, `html` elsewhere."""

    def __init__(self, crosscoder: CrosscoderReport, latent: int) -> None:
        self.html = latent_page(crosscoder, latent)
        """The page; it needs no network and runs no script."""

    def save(self, path: str | Path) -> None:
        """Writes the page to a file."""
        Path(path).write_text(self.html, encoding="utf-8")

    def _repr_html_(self) -> str:
        """In a frame of its own, so that its style does not reach the notebook's."""
        source = html.escape(self.html, quote=True)
        return f'<iframe srcdoc="{source}" style="width:100%;height:{_HEIGHT}px;border:0" title="latent"></iframe>'


def tokenizer_of(rows: Rows, tokenizer: Any) -> Any:
    """The tokenizer that was given, or that of the rows; InputError where there is none."""
    tokenizer = rows.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise InputError(
            "expected rows of a pair in memory, which know their tokenizer, got rows that were loaded; give "
            "tokenizer=pair.tokenizer"
        )
    return tokenizer


def find_examples(
    crosscoder: Crosscoder,
    rows: Rows,
    latents: Sequence[int],
    *,
    num_contexts: int,
    window_tokens: int,
    tokenizer: Any,
) -> pd.DataFrame:
    """schema.EXAMPLE_COLUMNS: the strongest contexts of some latents, by the analysis of a run's own stage."""
    about = {"num_models": rows.num_models, "activation_dim": rows.activation_dim}
    require_fit(crosscoder, **about, origin=rows.origin, owner="the rows")
    require_own_latents(latents, crosscoder)
    tokenizer = tokenizer_of(rows, tokenizer)
    found = analysis.Examples(num_latents=crosscoder.num_latents, num_contexts=num_contexts, corpora=rows.corpora)
    columns = {name: column.to(crosscoder.W_dec_FMD.device) for name, column in rows.columns().items()}
    sums = analyse({"examples": found}, encoded_batches(crosscoder, columns))
    strongest = found.table_of(sums["examples"], latents)
    if strongest.empty:
        return pd.DataFrame(columns=[column.name for column in EXAMPLE_COLUMNS])
    wanted = torch.from_numpy(strongest["doc_id"].unique()).to(columns["doc_id"].device)
    keep_B = torch.isin(columns["doc_id"], wanted)
    return analysis.contexts(
        strongest,
        encoded_batches(crosscoder, {name: column[keep_B] for name, column in columns.items()}),
        window_tokens=window_tokens,
        token_texts=lambda ids: token_texts(tokenizer, ids),
    )
