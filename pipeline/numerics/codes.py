"""The code of a batch in sparse form: which latents fired on which row, and how strongly.

Everything after the encoder works on this type: decoding, gradients, Latent Scaling, examples. It never holds B x F
numbers; `to_dense` is for tests and small batches. Compared with a dense code it costs an int64 index per active pair,
so it is smaller where fewer than about one code in five is active.

Shapes: B rows, M models, F latents, P active (row, latent) pairs.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class SparseCodes(NamedTuple):
    """Codes in CSR layout: the pairs of row i are `row_offsets[i] : row_offsets[i + 1]`, latents ascending."""

    values_P: Tensor
    """Kept codes f_ij > 0, floating point, sorted by (row, latent)."""
    latents_P: Tensor
    """Latent index of every pair, int64."""
    row_offsets: Tensor
    """First pair of every row and, at the end, P; int64 [B + 1]."""
    num_latents: int
    """F, the size of the dictionary."""
    model_mask_PM: Tensor | None = None
    """Only for the decoupled code weight: whether model m reads this pair; None means every model does."""

    @property
    def num_rows(self) -> int:
        """B, rows of the batch, also those on which nothing fired."""
        return self.row_offsets.shape[0] - 1

    @property
    def num_pairs(self) -> int:
        """P, active (row, latent) pairs."""
        return self.values_P.shape[0]

    def rows_P(self) -> Tensor:  # noqa: N802 (shape letter)
        """Row of every pair, int64 [P], ascending."""
        counts_B = self.row_offsets.diff()
        if counts_B.device.type == "cpu":  # numpy: threads cost more than they save here
            return torch.from_numpy(np.repeat(np.arange(self.num_rows), counts_B.numpy()))
        rows_B = torch.arange(self.num_rows, device=self.row_offsets.device)
        return rows_B.repeat_interleave(counts_B, output_size=self.num_pairs)

    def of_latents(self, values_F: Tensor) -> Tensor:
        """values_F of every pair's latent, [P]."""
        return pick(values_F, self.latents_P)

    def l0(self) -> Tensor:
        """Mean active latents per row, a float scalar; 0 for an empty batch."""
        return (self.values_P > 0).sum().to(self.values_P.dtype) / max(self.num_rows, 1)

    def to_dense(self) -> Tensor:
        """code_BF with zeros where nothing fired; B * F numbers."""
        code_BF = self.values_P.new_zeros(self.num_rows, self.num_latents)
        code_BF[self.rows_P(), self.latents_P] = self.values_P
        return code_BF

    @classmethod
    def from_dense(cls, code_BF: Tensor) -> "SparseCodes":
        """The positive entries of a dense code_BF."""
        rows_P, latents_P = (code_BF > 0).nonzero(as_tuple=True)
        offsets = row_offsets(rows_P, code_BF.shape[0])
        return cls(code_BF[rows_P, latents_P], latents_P, offsets, code_BF.shape[1])

    def keep(self, mask_P: Tensor) -> "SparseCodes":
        """The pairs where the boolean mask_P holds, in the same order."""
        if mask_P.device.type == "cpu":
            kept = torch.from_numpy(np.flatnonzero(mask_P.numpy()))
        else:
            kept = mask_P.nonzero().squeeze(1)
        return SparseCodes(
            pick(self.values_P, kept),
            pick(self.latents_P, kept),
            torch.searchsorted(kept, self.row_offsets),
            self.num_latents,
            None if self.model_mask_PM is None else self.model_mask_PM[kept],
        )


def pick(values_P: Tensor, places: Tensor) -> Tensor:
    """values_P[places]; on CPU by numpy, since torch's threads cost more than they save on arrays this small."""
    if values_P.device.type == "cpu" and not values_P.requires_grad:
        return torch.from_numpy(values_P.numpy()[places.numpy()])
    return values_P.index_select(0, places)


def count_true(mask: Tensor) -> Tensor:
    """Number of true entries of a boolean tensor, int64 scalar."""
    if mask.device.type == "cpu":
        return torch.tensor(int(np.count_nonzero(mask.numpy())))  # an order of magnitude faster than torch's
    return mask.sum()


def row_offsets(rows_P: Tensor, num_rows: int) -> Tensor:
    """CSR offsets, int64 [num_rows + 1], of ascending row indices."""
    return torch.searchsorted(rows_P, torch.arange(num_rows + 1, device=rows_P.device))


def concatenate(parts: list[SparseCodes]) -> SparseCodes:
    """The codes of consecutive blocks of rows as one batch; the parts share F and all or none carry a model mask."""
    if len(parts) == 1:
        return parts[0]
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.num_pairs)
    offsets = [part.row_offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    end = torch.full((1,), starts[-1], dtype=torch.int64, device=parts[0].row_offsets.device)
    masks = [part.model_mask_PM for part in parts if part.model_mask_PM is not None]
    return SparseCodes(
        torch.cat([part.values_P for part in parts]),
        torch.cat([part.latents_P for part in parts]),
        torch.cat([*offsets, end]),
        parts[0].num_latents,
        torch.cat(masks) if masks else None,
    )


def groups_of(latents_P: Tensor, group_ends: tuple[int, ...]) -> Tensor:
    """The group of every latent, int64 [P], where group g ends before latent group_ends[g]."""
    return torch.bucketize(latents_P, torch.tensor(group_ends, device=latents_P.device), right=True)


def split_groups(codes: SparseCodes, group_ends: tuple[int, ...]) -> SparseCodes:
    """The same pairs, with a row for every group and row: row g * B + i holds what group g says of row i."""
    rows_P = groups_of(codes.latents_P, group_ends) * codes.num_rows + codes.rows_P()
    order = rows_P.sort(stable=True).indices
    return SparseCodes(
        codes.values_P[order],
        codes.latents_P[order],
        row_offsets(rows_P[order], len(group_ends) * codes.num_rows),
        codes.num_latents,
        None if codes.model_mask_PM is None else codes.model_mask_PM[order],
    )


class ModelPairs(NamedTuple):
    """Codes with a model mask, written as ordinary codes in which every (row, model) is a row of its own."""

    codes: SparseCodes
    """Row i * M + m, latent j * M + m; for matrices viewed as [F * M, D]."""
    pairs_P: Tensor
    """int64: the pair of the original codes that each pair came from."""


def split_models(codes: SparseCodes) -> ModelPairs:
    """One pair per (row, latent, model) that the model mask keeps."""
    assert codes.model_mask_PM is not None
    num_models = codes.model_mask_PM.shape[1]
    pairs, models = codes.model_mask_PM.nonzero(as_tuple=True)
    rows = codes.rows_P()[pairs] * num_models + models
    order = rows.sort(stable=True).indices
    pairs, models, rows = pairs[order], models[order], rows[order]
    split = SparseCodes(
        codes.values_P[pairs],
        codes.latents_P[pairs] * num_models + models,
        row_offsets(rows, codes.num_rows * num_models),
        codes.num_latents * num_models,
    )
    return ModelPairs(split, pairs)
