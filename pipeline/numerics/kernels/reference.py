"""The kernels in plain torch, on any device: the oracle that the fast backends are tested against.

Each method is the formula of its docstring in base.py, written for reading. It builds P x N numbers where the fast
backends do not, so it is for tests, small problems and devices without a backend of their own.

Shapes: B rows, N = M * D flattened activation width, F latents, P active (row, latent) pairs.
"""

import torch
from torch import Tensor

from pipeline.numerics.codes import SparseCodes, row_offsets
from pipeline.numerics.kernels.base import LatentOrder


class ReferenceKernels:
    """Plain torch; implements base.Kernels."""

    name = "reference"
    dense_cutoff = 0.05

    def collect(self, preact_BF: Tensor, weight_F: Tensor, floor: float) -> SparseCodes:
        """Pairs with preact > 0 and score >= floor."""
        preact = preact_BF.to(weight_F.dtype)
        score_BF = preact * weight_F
        rows_P, latents_P = ((preact > 0) & (weight_F > 0) & (score_BF >= floor)).nonzero(as_tuple=True)
        offsets = row_offsets(rows_P, preact.shape[0])
        return SparseCodes(preact[rows_P, latents_P], latents_P, offsets, preact.shape[1])

    def decode(self, codes: SparseCodes, W_dec_FN: Tensor) -> Tensor:
        """xh_BN without bias."""
        xh_BN = W_dec_FN.new_zeros(codes.num_rows, W_dec_FN.shape[1])
        return xh_BN.index_add_(0, codes.rows_P(), codes.values_P[:, None] * W_dec_FN[codes.latents_P])

    def value_gradients(self, codes: SparseCodes, grad_BN: Tensor, W_dec_FN: Tensor) -> Tensor:
        """<grad_BN[row], W_dec_FN[latent]> per pair."""
        return (grad_BN[codes.rows_P()] * W_dec_FN[codes.latents_P]).sum(1)

    def weight_gradients(self, order: LatentOrder, coefficients_P: Tensor, rows_BN: Tensor, out_FN: Tensor) -> None:
        """out[j] = sum of coefficient * rows_BN[row] over the pairs of j."""
        latents_P = self._latents(order)
        out_FN.zero_().index_add_(0, latents_P, coefficients_P[:, None] * rows_BN[order.rows_P])

    def latent_sums(self, order: LatentOrder, coefficients_P: Tensor) -> Tensor:
        """Sum of coefficients per latent."""
        sums_F = coefficients_P.new_zeros(order.latent_offsets.shape[0] - 1)
        return sums_F.index_add_(0, self._latents(order), coefficients_P)

    @staticmethod
    def _latents(order: LatentOrder) -> Tensor:
        counts_F = order.latent_offsets.diff()
        latents_F = torch.arange(counts_F.shape[0], device=counts_F.device)
        return latents_F.repeat_interleave(counts_F, output_size=order.rows_P.shape[0])
