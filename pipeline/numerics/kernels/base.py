"""The seam between the mathematics of a training step and the code that makes it fast on one kind of device.

Beside the encoder's matrix product a sparse step needs five operations: collect candidate pairs from pre-activations,
decode, gradients of the kept values, gradients of a weight matrix, sums per latent. `reference` states them in plain
torch and every test compares with it; `cpu` and `triton` are fast. choose.py picks one.

Kernels do not select exactly (selection.py), know no losses, and do not exchange anything between ranks.

Shapes: B rows, N = M * D flattened activation width, F latents (of this rank), P active (row, latent) pairs.
All matrices are contiguous with one latent or one row per line: x_BN, W_FN, preact_BF.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.numerics.codes import SparseCodes, pick

_RADIX_LATENTS = 1 << 16


class LatentOrder(NamedTuple):
    """The pairs of a batch sorted by (latent, row): what the weight gradients read."""

    order_P: Tensor
    """int64 [P]: position in the (row, latent)-sorted pairs of each latent-sorted pair."""
    rows_P: Tensor
    """int64 [P]: row of each latent-sorted pair, an index into the lines of the row table."""
    latent_offsets: Tensor
    """int64 [F + 1]: the pairs of latent j are latent_offsets[j] : latent_offsets[j + 1]; may be empty."""


class Kernels(Protocol):
    """What a backend implements. Every method is deterministic: equal inputs give equal bits on one device."""

    name: str
    """Shown in logs and benchmark output, e.g. "reference", "cpu", "triton"."""
    dense_cutoff: float
    """Share of positive codes above which dense matrix products beat the sparse path (used for L1 and JumpReLU)."""

    def collect(self, preact_BF: Tensor, weight_F: Tensor, floor: float) -> SparseCodes:
        """Pairs whose score may reach floor, with values f = relu(preact), sorted by (row, latent).

        The score of a pair is v_ij = preact_ij * weight_j, computed in the dtype of weight_F.

        Args:
            preact_BF: pre-activations with the bias added, float32, float64 or bfloat16; not modified. May hold NaN,
                which never counts as reaching the floor.
            weight_F: code weight w_j >= 0, same dtype as the codes to return (float32 or float64).
            floor: a score >= 0. Every pair with preact > 0 and v >= floor must be returned; pairs slightly below the
                floor may be returned too (rounding), which the caller drops. With floor = 0 exactly the pairs with
                preact > 0 and weight > 0 are returned.

        Returns:
            SparseCodes with values in the dtype of weight_F, num_latents = F, int64 indices. P may be 0.
        """
        ...

    def decode(self, codes: SparseCodes, W_dec_FN: Tensor) -> Tensor:
        """xh_BN = sum over the pairs of a row of value * W_dec_FN[latent], without bias; empty rows are 0.

        Dtype of W_dec_FN; a backend may accumulate in float32. codes.model_mask_PM is ignored.
        """
        ...

    def value_gradients(self, codes: SparseCodes, grad_BN: Tensor, W_dec_FN: Tensor) -> Tensor:
        """dL/df of every pair, [P]: <grad_BN[row], W_dec_FN[latent]>, in the order of codes.

        Only the indices of codes are read, never its values.
        """
        ...

    def weight_gradients(self, order: LatentOrder, coefficients_P: Tensor, rows_BN: Tensor, out_FN: Tensor) -> None:
        """Overwrites out_FN with out[j] = sum over pairs of latent j of coefficient * rows_BN[row].

        With (values, dL/dxh) this is the decoder's gradient, with (dL/df, x) the encoder's. Latents without a pair
        get 0. The lines of rows_BN may be more than B (stacked tables); order.rows_P indexes them.

        Args:
            order: from `latent_order`.
            coefficients_P: in the latent-sorted order (index with order.order_P first), dtype of rows_BN.
            rows_BN: table of rows.
            out_FN: preallocated output, contiguous.
        """
        ...

    def latent_sums(self, order: LatentOrder, coefficients_P: Tensor) -> Tensor:
        """[F]: sum of the latent-sorted coefficients_P of each latent; 0 where a latent has no pair."""
        ...


def latent_order(codes: SparseCodes, rows_P: Tensor | None = None) -> LatentOrder:
    """Pairs sorted by latent, rows ascending within a latent; rows_P overrides codes.rows_P() (stacked tables)."""
    rows = codes.rows_P() if rows_P is None else rows_P
    if rows.device.type == "cpu" and codes.num_latents <= _RADIX_LATENTS:
        # numpy sorts 16-bit integers by radix: an order of magnitude faster than a comparison sort.
        narrow = codes.latents_P.numpy().astype(np.uint16)
        order_P = torch.from_numpy(np.argsort(narrow, kind="stable"))
        counts_F = torch.bincount(codes.latents_P, minlength=codes.num_latents)
        return LatentOrder(order_P, pick(rows, order_P), torch.nn.functional.pad(counts_F.cumsum(0), (1, 0)))
    # Half the bits to sort; counting (bincount) would wait for a CUDA device.
    latents_P, order_P = codes.latents_P.to(torch.int32).sort(stable=True)
    bounds = torch.arange(codes.num_latents + 1, dtype=torch.int32, device=rows.device)
    return LatentOrder(order_P, pick(rows, order_P), torch.searchsorted(latents_P, bounds))
