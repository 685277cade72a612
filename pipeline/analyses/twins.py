"""Twins: a chat-only and a base-only latent that point the same way, the trace of Latent Decoupling.

Pairs are found from the decoder alone (cosine > 0.9; arXiv 2504.02922, section 3); whether the two really fire on
different rows is measured in one pass, on contributions f |d|: with the chat row's length for the one, the base row's
for the other. Contributions stay the same however a latent's scale is divided between code and decoder. Relative to the
pair's maximum, high > 0.4 and low <= 0.1, the divergence is (#(A high, B low) + #(B high, A low)) / #(A high or B
high). The maximum is known only at the end, so rows that may still be high are kept as (pair, a, b) and dropped once a
larger maximum excludes them.

Shapes: B rows, D width, F latents, W twins, U latents that have a twin, N kept rows.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.ownership import classify, delta_norm
from pipeline.analyses.rows import RowBatch, Sums, check_codes
from pipeline.errors import InputError
from pipeline.schema import BASE, CHAT, Ownership

MIN_COSINE = 0.9
HIGH, LOW = 0.4, 0.1
_CHUNK_NUMBERS = 1 << 22


class TwinPairs(NamedTuple):
    """Twins by decoder direction; both index tensors int64 [W], cosine float64 [W]."""

    latent_chat: Tensor
    latent_base: Tensor
    cosine: Tensor


def find_twins(W_dec_FMD: Tensor, *, min_cosine: float = MIN_COSINE) -> TwinPairs:
    """All pairs of a chat-only and a base-only latent with cos(d^chat, d^base) > min_cosine; may be empty."""
    if W_dec_FMD.dim() != 3 or W_dec_FMD.shape[1] != 2:
        raise InputError(
            f"expected a decoder [latents, 2, width], got {tuple(W_dec_FMD.shape)}: twins belong to two models"
        )
    W_dec_FMD = W_dec_FMD.detach().cpu()
    classes_F = classify(delta_norm(W_dec_FMD))
    chat = torch.from_numpy(np.flatnonzero(classes_F == Ownership.CHAT_ONLY))
    base = torch.from_numpy(np.flatnonzero(classes_F == Ownership.BASE_ONLY))
    base_unit = torch.nn.functional.normalize(W_dec_FMD[base, BASE].double(), dim=1)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    size = max(1, _CHUNK_NUMBERS // max(1, len(base)))
    for start in range(0, max(1, len(chat)), size):
        part = chat[start : start + size]
        cosine = torch.nn.functional.normalize(W_dec_FMD[part, CHAT].double(), dim=1) @ base_unit.T
        row, column = (cosine > min_cosine).nonzero(as_tuple=True)
        found.append((part[row], base[column], cosine[row, column]))
    return TwinPairs(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class Twins:
    """Row analysis: schema.TWIN_COLUMNS for the twins of a decoder."""

    def __init__(self, *, W_dec_FMD: Tensor, min_cosine: float = MIN_COSINE) -> None:
        self.num_latents = len(W_dec_FMD)
        self.pairs = find_twins(W_dec_FMD, min_cosine=min_cosine)
        twin_latents = torch.unique(torch.cat([self.pairs.latent_chat, self.pairs.latent_base]))
        self._slot_F = torch.full((self.num_latents,), -1, dtype=torch.int64)
        self._slot_F[twin_latents] = torch.arange(len(twin_latents))
        self._num_slots = len(twin_latents)
        norm_FM = W_dec_FMD.detach().cpu().float().norm(dim=2)
        self._chat_norm_W, self._base_norm_W = (
            norm_FM[self.pairs.latent_chat, CHAT],
            norm_FM[self.pairs.latent_base, BASE],
        )

    def start(self) -> Sums:
        """The largest contribution of each pair, and no kept row."""
        return {
            "max": torch.zeros(len(self.pairs.cosine)),
            "pair": torch.zeros(0, dtype=torch.int64),
            "chat": torch.zeros(0),
            "base": torch.zeros(0),
        }

    def update(self, sums: Sums, batch: RowBatch) -> None:
        """Keeps the rows on which a twin may be high."""
        codes = batch.codes
        check_codes(codes, self.num_latents)
        if self._num_slots == 0:
            return
        slot_P = self._slot_F[codes.latents_P.cpu()]
        row_P, value_P = codes.rows_P().cpu()[slot_P >= 0], codes.values_P.float().cpu()[slot_P >= 0]
        slot_P = slot_P[slot_P >= 0]
        rows_per_chunk = max(1, _CHUNK_NUMBERS // (self._num_slots + len(self.pairs.cosine)))
        for start in range(0, codes.num_rows, rows_per_chunk):
            in_chunk_P = (row_P >= start) & (row_P < start + rows_per_chunk)
            value_BU = torch.zeros(min(rows_per_chunk, codes.num_rows - start), self._num_slots)
            value_BU[row_P[in_chunk_P] - start, slot_P[in_chunk_P]] = value_P[in_chunk_P]
            sums.update(self.merge(sums, self._rows_of(value_BU)))

    def _rows_of(self, value_BU: Tensor) -> Sums:
        chat_BW = value_BU[:, self._slot_F[self.pairs.latent_chat]] * self._chat_norm_W
        base_BW = value_BU[:, self._slot_F[self.pairs.latent_base]] * self._base_norm_W
        larger_BW = torch.maximum(chat_BW, base_BW)
        row, pair = (larger_BW > 0).nonzero(as_tuple=True)
        return {"max": larger_BW.amax(0), "pair": pair, "chat": chat_BW[row, pair], "base": base_BW[row, pair]}

    def merge(self, a: Sums, b: Sums) -> Sums:
        """Both parts' rows that are high by the larger of the maxima."""
        merged = {name: torch.cat([a[name], b[name]]) for name in ("pair", "chat", "base")}
        max_W = torch.maximum(a["max"], b["max"])
        is_high = torch.maximum(merged["chat"], merged["base"]) > HIGH * max_W[merged["pair"]]
        return {"max": max_W, **{name: value[is_high] for name, value in merged.items()}}

    def table(self, sums: Sums) -> pd.DataFrame:
        """schema.TWIN_COLUMNS, one row per pair, highest cosine first; empty where there are no twins."""
        num_twins, pair = len(self.pairs.cosine), sums["pair"]
        largest = sums["max"][pair]
        is_split = torch.minimum(sums["chat"], sums["base"]) <= LOW * largest
        high_W = torch.bincount(pair, minlength=num_twins)
        split_W = torch.bincount(pair[is_split], minlength=num_twins)
        table = pd.DataFrame(
            {
                "latent_chat": self.pairs.latent_chat.numpy().astype(np.int32),
                "latent_base": self.pairs.latent_base.numpy().astype(np.int32),
                "cosine": self.pairs.cosine.numpy(),
                "divergence": (split_W.double() / high_W).numpy(),
                "num_high_rows": high_W.numpy(),
            }
        )
        return table.sort_values("cosine", ascending=False, kind="stable", ignore_index=True)
