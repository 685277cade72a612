"""The kernels on CUDA devices, written in Triton: what `choose_kernels` takes on a GPU.

Decoding and both kinds of gradients read each needed line of a matrix in coalesced pieces and never build P x N
numbers; collecting fuses ReLU, code weight and comparison into two passes over the pre-activations. This file decides
shapes and launches; `triton_programs` holds what runs on the device. Triton is an optional dependency and is
imported when the backend is constructed. With TRITON_INTERPRET=1 the same programs run on the CPU, slowly: for tests.

`collect` has to know P to return tensors of that length: one read of a number from the device per call. Block sizes
follow from cache and vector sizes, not from a search on the machine at hand.

Shapes: B rows, N = M * D flattened activation width, F latents, P active (row, latent) pairs.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.kernels.base import LatentOrder

LINE_BYTES = 512
"""Of one decoder line that a program reads at once: 32 threads x 16 bytes, the widest load. All F lines in pieces of
this size fit a second-level cache of 50 MB up to F = 98,304, so that a piece comes from memory once per step."""
LINES_PER_ROW_STEP = 16
"""Latents of a row that a decoding program reads together; rows have tens to hundreds."""
COLUMNS_PER_LATENT = 512
"""Columns per program of the weight gradients: wider than for decoding, since most latents have few rows to read and
the rows of a batch fit the cache anyway; fewer programs to start."""
LINES_PER_LATENT_STEP = 8
"""Rows of a latent that a weight-gradient program reads together."""
PAIRS_PER_DOT = 16
"""Pairs per program of the values' gradient."""
DOT_STEPS = 2
"""Pieces of LINE_BYTES per program of the values' gradient: more means fewer partial sums, fewer means cache hits."""
LATENTS_PER_CELL = 4096
"""Pre-activations per program of collect."""
PAIRS_PER_SUM = 128
"""Coefficients that a program of latent_sums reads together."""


class TritonKernels:
    """CUDA backend; implements base.Kernels. float32, float64 and bfloat16; float32 sums, float64 for float64."""

    name = "triton"
    dense_cutoff = 0.01

    def __init__(self) -> None:
        """Raises ValueError if triton is not installed, or if there is neither a CUDA device nor the interpreter."""
        if not self._is_interpreted and not torch.cuda.is_available():
            raise ValueError(
                "expected a CUDA device for kernels 'triton', got none that torch can use: set kernels to auto or cpu "
                "(TRITON_INTERPRET=1, set before triton is first imported, runs them on the CPU for tests)"
            )

    @property
    def _programs(self) -> ModuleType:
        return _load_programs()  # looked up, not held: a crosscoder that holds kernels must stay picklable

    @property
    def _is_interpreted(self) -> bool:
        return not hasattr(self._programs.sum_lines, "device_caches")

    def collect(self, preact_BF: Tensor, weight_F: Tensor, floor: float) -> SparseCodes:
        """Pairs with preact > 0 and score >= floor, exactly: a pass that counts and a pass that writes."""
        self._check(preact_BF, weight_F)
        num_rows, num_latents = preact_BF.shape
        num_cells = -(-num_latents // LATENTS_PER_CELL)
        device = preact_BF.device
        floor_1 = torch.full((1,), floor, dtype=weight_F.dtype, device=device)
        count_BC = torch.zeros(num_rows, num_cells, dtype=torch.int32, device=device)
        scores = (preact_BF, weight_F, floor_1, num_latents, num_cells)
        block = min(LATENTS_PER_CELL, _power_of_two(num_latents))
        grid = (num_rows * num_cells,)
        _launch(self._programs.count_reaching, grid, count_BC, *scores, BLOCK_F=block, num_warps=8)
        end_BC = count_BC.flatten().cumsum(0).view(num_rows, num_cells)
        row_offsets = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        row_offsets[1:] = end_BC[:, -1]
        num_pairs = int(row_offsets[-1])  # the one wait for the device
        values_P = torch.empty(num_pairs, dtype=weight_F.dtype, device=device)
        latents_P = torch.empty(num_pairs, dtype=torch.int64, device=device)
        if num_pairs:
            out = (values_P, latents_P, end_BC)
            _launch(self._programs.write_reaching, grid, *out, *scores, BLOCK_F=block, num_warps=8)
        return SparseCodes(values_P, latents_P, row_offsets, num_latents)

    def decode(self, codes: SparseCodes, W_dec_FN: Tensor) -> Tensor:
        """xh_BN without bias, in the dtype of W_dec_FN."""
        self._check(W_dec_FN, codes.values_P, codes.latents_P, codes.row_offsets)
        xh_BN = W_dec_FN.new_empty(codes.num_rows, W_dec_FN.shape[1])
        step, columns = LINES_PER_ROW_STEP, LINE_BYTES // W_dec_FN.element_size()
        self._sum_lines(xh_BN, W_dec_FN, codes.values_P, codes.latents_P, codes.row_offsets, (step, columns))
        return xh_BN

    def value_gradients(self, codes: SparseCodes, grad_BN: Tensor, W_dec_FN: Tensor) -> Tensor:
        """<grad_BN[row], W_dec_FN[latent]> per pair, in float32 (float64 if either table is float64)."""
        self._check(grad_BN, W_dec_FN, codes.latents_P, codes.row_offsets)
        dtype = _sum_dtype(torch.promote_types(grad_BN.dtype, W_dec_FN.dtype))
        num_pairs, width = codes.num_pairs, W_dec_FN.shape[1]
        block = min(LINE_BYTES // W_dec_FN.element_size(), _power_of_two(width))
        span = block * DOT_STEPS
        parts_CP = torch.empty(-(-width // span), num_pairs, dtype=dtype, device=grad_BN.device)
        if num_pairs:
            _launch(
                self._programs.dot_lines,
                (-(-num_pairs // PAIRS_PER_DOT), parts_CP.shape[0]),
                *(parts_CP, grad_BN, W_dec_FN, codes.rows_P(), codes.latents_P, num_pairs, width),
                SPAN=span,
                BLOCK_P=PAIRS_PER_DOT,
                BLOCK_N=block,
                ACC=self._triton_dtype(dtype),
                num_warps=4,
            )
        return parts_CP.sum(0)

    def weight_gradients(self, order: LatentOrder, coefficients_P: Tensor, rows_BN: Tensor, out_FN: Tensor) -> None:
        """out[j] = sum of coefficient * rows_BN[row] over the pairs of latent j."""
        self._check(rows_BN, coefficients_P, order.rows_P, order.latent_offsets, out_FN)
        shape = (LINES_PER_LATENT_STEP, COLUMNS_PER_LATENT)
        self._sum_lines(out_FN, rows_BN, coefficients_P, order.rows_P, order.latent_offsets, shape)

    def latent_sums(self, order: LatentOrder, coefficients_P: Tensor) -> Tensor:
        """Sum of coefficients per latent, in their dtype."""
        self._check(coefficients_P, order.latent_offsets)
        sums_F = coefficients_P.new_empty(order.latent_offsets.shape[0] - 1)
        _launch(
            self._programs.sum_segments,
            (sums_F.shape[0],),
            *(sums_F, coefficients_P, order.latent_offsets),
            BLOCK_P=PAIRS_PER_SUM,
            ACC=self._triton_dtype(_sum_dtype(coefficients_P.dtype)),
            num_warps=1,
        )
        return sums_F

    def _sum_lines(
        self,
        out_SN: Tensor,
        table_LN: Tensor,
        scale_P: Tensor,
        line_P: Tensor,
        offsets_S: Tensor,
        shape: tuple[int, int],
    ) -> None:
        """shape: lines and columns that a program reads at once."""
        assert scale_P.shape[0] < 2**31  # programs count pairs in int32
        width = out_SN.shape[1]
        block = min(shape[1], _power_of_two(width))
        dtype = _sum_dtype(torch.promote_types(table_LN.dtype, scale_P.dtype))
        _launch(
            self._programs.sum_lines,
            (out_SN.shape[0], -(-width // block)),
            *(out_SN, table_LN, scale_P, line_P, offsets_S, width),
            BLOCK_P=shape[0],
            BLOCK_N=block,
            ACC=self._triton_dtype(dtype),
            num_warps=4,
        )

    def _triton_dtype(self, dtype: torch.dtype) -> Any:
        language = self._programs.tl
        return language.float64 if dtype == torch.float64 else language.float32

    def _check(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            if not tensor.is_contiguous():
                raise ValueError(
                    f"expected contiguous tensors for kernels 'triton', got shape {list(tensor.shape)} with strides "
                    f"{list(tensor.stride())}: call .contiguous() first"
                )
            if not tensor.is_cuda and not self._is_interpreted:
                raise ValueError(
                    f"expected tensors on a CUDA device for kernels 'triton', got one on {str(tensor.device)!r}: move "
                    f"it, or set kernels to auto"
                )


def _load_programs() -> ModuleType:
    try:
        from pipeline.numerics.kernels import triton_programs
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        raise ValueError(
            "expected the package triton for kernels 'triton', got none: install crossray[triton] (torch for CUDA "
            "brings it), or set kernels to reference"
        ) from error
    return triton_programs


def _launch(program: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launches on the device of the first tensor; an empty grid is nothing to do, which CUDA would refuse."""
    if min(grid) == 0:
        return
    device = arguments[0].device
    if device.type == "cuda":
        with torch.cuda.device(device):
            program[grid](*arguments, **options)
    else:
        program[grid](*arguments, **options)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _power_of_two(size: int) -> int:
    """The smallest power of two >= size: block shapes must be powers of two."""
    return 1 << max(size - 1, 0).bit_length()
