"""A text as both models and a crosscoder read it: codes at every token, both models' next tokens, the KL between them.

Shapes: T tokens, B rows, M models, K likeliest tokens, F latents, P active pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.analyses.next_tokens import NextTokens
from pipeline.explorer.sample import on_cpu
from pipeline.library.pair import Pair
from pipeline.library.texts import Text, tokenised
from pipeline.models.padding import pad_tokens
from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import Verdict
from pipeline.text.tokenizers import token_text, token_texts

RANK_COLUMNS = ("verdict", "is_confident", "max_activation", "frequency")
"""Columns of the latent table that `strongest` reads."""


class ReadText(NamedTuple):
    """One document."""

    tokens: list[str]
    """Joined, they give the document."""
    row_T: np.ndarray
    """Row of every token, int64; -1 for one that becomes no row, such as BOS."""
    codes: SparseCodes
    """Of the rows, on the CPU."""
    next: NextTokens
    """After every token."""
    next_texts: list[list[list[str]]]
    """Text of next.top_PMK[t][m][k]."""

    def activations(self, latent: int) -> np.ndarray:
        """f_j at every token, float64 [T]; 0 where it does not fire or there is no row."""
        f_B = np.zeros(self.codes.num_rows)
        is_own_P = self.codes.latents_P.numpy() == latent
        f_B[self.codes.rows_P().numpy()[is_own_P]] = self.codes.values_P.numpy()[is_own_P]
        padded = np.append(f_B, 0.0)
        at_T: np.ndarray = padded[self.row_T]
        return at_T

    def at(self, position: int, num: int) -> list[tuple[int, float]]:
        """The strongest latents of one token with f_j."""
        row = int(self.row_T[position])
        if row < 0:
            return []
        here = slice(int(self.codes.row_offsets[row]), int(self.codes.row_offsets[row + 1]))
        values_P, latents_P = self.codes.values_P[here], self.codes.latents_P[here]
        order = values_P.argsort(descending=True, stable=True)[:num]
        return list(zip(latents_P[order].tolist(), values_P[order].tolist(), strict=True))


class StrongLatent(NamedTuple):
    """A latent that fires on a text."""

    latent: int
    verdict: str
    is_confident: bool
    activation: float
    """Largest f_j on the text."""
    share: float
    """Of its largest f_j on the validation rows; above 1 where the text exceeds it, NaN where it is dead."""
    frequency: float


def largest_of(codes: SparseCodes) -> np.ndarray:
    """Largest f_j of every latent on a text, float64 [F]."""
    f_F = np.zeros(codes.num_latents)
    np.maximum.at(f_F, codes.latents_P.numpy(), codes.values_P.numpy())
    return f_F


def codes_of(pair: Pair, crosscoder: Crosscoder, text: Text) -> tuple[np.ndarray, SparseCodes]:
    """Positions of the rows of a text's last document, and their codes on the CPU.

    InputError where no token of the text becomes a row.
    """
    rows = pair.activations([text])
    last = tokenised(pair.tokenise, [text])["doc_id"][-1]
    is_last_B = rows.data.doc_id_B == last
    codes = crosscoder.encode(rows.x[is_last_B].float().to(crosscoder.W_dec_FMD.device))
    return rows.data.position_B[is_last_B].long().numpy(), on_cpu(codes)


def read_text(pair: Pair, crosscoder: Crosscoder, text: Text, *, num_top: int = 3) -> ReadText:
    """Both models on one text. InputError for a text without tokens or rows, or longer than a model's context."""
    ids_T = pad_tokens(tokenised(pair.tokenise, [text])["input_ids"][-1:]).ids_BT[0].tolist()
    position_B, codes = codes_of(pair, crosscoder, text)
    row_T = np.full(len(ids_T), -1, dtype=np.int64)
    row_T[position_B] = np.arange(len(position_B))
    predicted = pair.next_tokens(text, num_top=num_top)
    names = {index: token_text(pair.tokenizer, index) for index in set(predicted.top_PMK.flatten().tolist())}
    texts = [[[names[index] for index in own] for own in models] for models in predicted.top_PMK.tolist()]
    return ReadText(token_texts(pair.tokenizer, ids_T), row_T, codes, predicted, texts)


def strongest(read: ReadText, latents: pd.DataFrame, *, order: str, num: int) -> list[StrongLatent]:
    """The latents that fire on a text; `latents` holds RANK_COLUMNS of every latent.

    order: verdict (chat-specific first, then by share), share, or activation.
    """
    f_F = largest_of(read.codes)
    firing = np.flatnonzero(f_F)
    largest = latents["max_activation"].to_numpy()[firing]
    share = f_F[firing] / np.where(largest > 0, largest, np.nan)
    verdicts = latents["verdict"].to_numpy()[firing]
    keys: Sequence[np.ndarray] = [-np.nan_to_num(share)]
    if order == "activation":
        keys = [-f_F[firing]]
    elif order == "verdict":
        places = {verdict: place for place, verdict in enumerate(Verdict.ALL)}
        keys = [-np.nan_to_num(share), np.array([places[str(verdict)] for verdict in verdicts])]
    ranked: list[int] = np.lexsort(keys)[:num].tolist()
    return [
        StrongLatent(
            latent=int(firing[place]),
            verdict=str(verdicts[place]),
            is_confident=bool(latents["is_confident"].iloc[firing[place]]),
            activation=float(f_F[firing[place]]),
            share=float(share[place]),
            frequency=float(latents["frequency"].iloc[firing[place]]),
        )
        for place in ranked
    ]
