"""The kernels on CPU: embedding bags for rows, sparse-times-dense products into preallocated memory for weights.

Measured on two cores at D=512, M=2, F=16384, 64 pairs per row, 1024 rows (workloads/benchmarks/step_notes.md): decode
and value gradients take a few percent of the encoder's matrix product. The weight gradients use torch's CSR product
because it writes into memory that exists already: fresh pages for F x N numbers cost more than the arithmetic.
float32 and float64; no bfloat16. Nothing is kept between calls, so threads may share an object.

Shapes: B rows, N = M * D flattened activation width, F latents, P active (row, latent) pairs.
"""

import threading
import warnings

import numpy as np
import torch
from torch import Tensor

from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.kernels.base import LatentOrder

_SUM = 0
"""embedding_bag's mode number for a sum."""
_WARNING_FILTERS = threading.Lock()
"""Filters belong to the process: threads that restore them must not interleave."""


class CpuKernels:
    """Fast CPU backend; implements base.Kernels."""

    dense_cutoff = 0.1

    def __init__(self, *, use_csr: bool | None = None) -> None:
        """use_csr: CSR products for the weight gradients; None takes them where torch has MKL, as on x86 Linux."""
        has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        self._use_csr = has_mkl if use_csr is None else use_csr
        self.name = "cpu" if self._use_csr else "cpu without MKL"
        with _WARNING_FILTERS, warnings.catch_warnings():
            # torch says once per process that CSR tensors are in beta; the tests compare every product we use.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
            _csr(torch.tensor([0, 0]), torch.empty(0, dtype=torch.int64), torch.empty(0), 1)

    def collect(self, preact_BF: Tensor, weight_F: Tensor, floor: float) -> SparseCodes:
        """Pairs with preact above floor / weight, lowered by a few roundings so that none is lost."""
        preact = preact_BF.to(weight_F.dtype)
        num_latents = preact.shape[1]
        eps = torch.finfo(weight_F.dtype).eps
        # Where the weight is 0 the score is 0, and the bound infinite.
        bound_F = torch.where(weight_F > 0, floor / weight_F * (1 - 4 * eps), torch.inf)
        # numpy from here: it skips zero words, and on arrays this small torch's threads cost more than they save.
        flat_P = np.flatnonzero((preact > bound_F).numpy())
        line_starts = np.arange(preact.shape[0] + 1) * num_latents
        offsets = np.searchsorted(flat_P, line_starts)
        latents_P = flat_P - np.repeat(line_starts[:-1], np.diff(offsets))
        values_P = preact.view(-1).numpy()[flat_P]
        return SparseCodes(
            torch.from_numpy(values_P), torch.from_numpy(latents_P), torch.from_numpy(offsets), num_latents
        )

    def decode(self, codes: SparseCodes, W_dec_FN: Tensor) -> Tensor:
        """xh_BN without bias."""
        return torch.nn.functional.embedding_bag(
            codes.latents_P,
            W_dec_FN,
            codes.row_offsets,
            mode="sum",
            per_sample_weights=codes.values_P,
            include_last_offset=True,
        )

    def value_gradients(self, codes: SparseCodes, grad_BN: Tensor, W_dec_FN: Tensor) -> Tensor:
        """<grad_BN[row], W_dec_FN[latent]> per pair: the backward of an embedding bag for its weights."""
        gradients: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_BN, W_dec_FN, codes.latents_P, codes.row_offsets, codes.rows_P(), _SUM
        )
        return gradients

    def weight_gradients(self, order: LatentOrder, coefficients_P: Tensor, rows_BN: Tensor, out_FN: Tensor) -> None:
        """out = S @ rows with S_FB the sparse matrix of coefficients."""
        if not self._use_csr:
            bags = torch.nn.functional.embedding_bag(
                order.rows_P,
                rows_BN,
                order.latent_offsets,
                mode="sum",
                per_sample_weights=coefficients_P,
                include_last_offset=True,
            )
            out_FN.copy_(bags)
            return
        matrix_FB = _csr(order.latent_offsets, order.rows_P, coefficients_P, rows_BN.shape[0])
        # beta = 0: what out_FN held, NaN included, does not count.
        torch.addmm(out_FN, matrix_FB, rows_BN, beta=0, out=out_FN)

    def latent_sums(self, order: LatentOrder, coefficients_P: Tensor) -> Tensor:
        """Sum of coefficients per latent."""
        return torch.segment_reduce(coefficients_P, "sum", offsets=order.latent_offsets, initial=0)


def _csr(offsets: Tensor, columns_P: Tensor, values_P: Tensor, num_columns: int) -> Tensor:
    """Sparse matrix with one line per offset interval; int32 indices, which the product needs anyway."""
    return torch.sparse_csr_tensor(
        offsets.to(torch.int32),
        columns_P.to(torch.int32),
        values_P,
        (offsets.shape[0] - 1, num_columns),
        check_invariants=False,
    )
