"""The training encoder: one matrix product per block of rows, and from it the selected pairs of the whole batch.

Pre-activations exist for one block of rows at a time, in memory that is reused; what leaves a block is what the
sparsity keeps of it. BatchTopK collects candidates above a floor: a guess (the last step's cut, lowered; else an
estimate from a few rows; else 0) that only saves work, because a floor that proves too high is lowered and the blocks
are encoded again. Blocks are therefore gradient accumulation that equals the large batch exactly, for selections over
the whole batch as well.

Shapes: B local rows, N = M * D, F latents of this rank, P pairs, K dead latents per row.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.numerics.batch import InferenceBlock, TrainingBatch
from pipeline.numerics.code_weight import code_weights, decoder_norms
from pipeline.numerics.codes import SparseCodes, concatenate, row_offsets
from pipeline.numerics.kernels.base import Kernels
from pipeline.numerics.parallel import Mesh
from pipeline.numerics.parameters import Parameters
from pipeline.numerics.selection import top_of_rows
from pipeline.numerics.sparsities.base import Kept
from pipeline.numerics.spec import CrosscoderSpec

_FLOOR_SHARE = 0.9
"""The next floor as a share of this step's cut: low enough that a step rarely has to encode twice."""
_BLOCK_NUMBERS = {"cpu": 1 << 23, "cuda": 1 << 29}
"""Pre-activations of a block by default, per kind of device: enough for the matrix product's full speed."""
_MIN_BLOCK_ROWS = 256
_SAMPLE_ROWS = 32
"""Rows from which the first floor is estimated."""


class TrainingEncoder:
    """Holds the block's memory and the floor; everything else comes in as arguments."""

    def __init__(self, spec: CrosscoderSpec, kernels: Kernels, mesh: Mesh, device: torch.device) -> None:
        self.floor: float | None = None
        """Guess for the next step's floor; any number gives the same selection."""
        self._spec = spec
        self._kernels = kernels
        self._mesh = mesh
        self._group_ends = spec.group_ends(mesh.latent_slice(spec.num_latents))
        self._block_rows = spec.block_rows or max(_MIN_BLOCK_ROWS, _block_numbers(device) // spec.num_latents)
        self._W_half_FN: Tensor | None = None
        self._buffer_BF: Tensor | None = None
        self._scratch_BF: Tensor | None = None

    def refresh(self, parameters: Parameters) -> None:
        """Call once per step, before anything else: the weights have changed (bfloat16 keeps a rounded copy)."""
        if self._spec.precision == "bfloat16":
            if self._W_half_FN is None:
                self._W_half_FN = torch.empty_like(parameters.W_enc_FN, dtype=torch.bfloat16)
            self._W_half_FN.copy_(parameters.W_enc_FN)

    def blocks(self, parameters: Parameters, x_BN: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, their pre-activations) block by block; a pre-activation block is valid until the next one."""
        for block in torch.split(x_BN, self._block_rows):
            yield block, self._preactivations(parameters, block)

    def scratch(self, preact_BF: Tensor) -> Tensor:
        """Memory of a block's shape, for the dense gradients; reused by the next block."""
        if self._scratch_BF is None or len(self._scratch_BF) < len(preact_BF):
            self._scratch_BF = torch.empty_like(preact_BF)
        return self._scratch_BF[: len(preact_BF)]

    def is_dense(self, parameters: Parameters, x_BN: Tensor) -> bool:
        """Whether codes are so dense that matrix products beat pairs; guessed from a few rows.

        Depends on the rows and weights alone, so a resumed run takes the same path. Collective over the mesh's world.
        """
        if not self._spec.sparsity.may_be_dense:
            return False
        least = self._spec.sparsity.least_preactivation(parameters.log_threshold_F)
        share = (self._sample(parameters, x_BN) > least).double().mean()
        return float(self._mesh.max_(share, "world")) > self._kernels.dense_cutoff

    def _sample(self, parameters: Parameters, x_BN: Tensor) -> Tensor:
        return self._preactivations(parameters, x_BN[: min(_SAMPLE_ROWS, self._block_rows)])

    def select(self, parameters: Parameters, x_BN: Tensor, *, k: float) -> Kept:
        """The pairs that this step keeps; k is the step's Sparsity.active_latents. Collective over the mesh."""
        norm_FM = self._decoder_norms(parameters)
        batch = TrainingBatch(
            blocks=lambda: (preact_BF for _, preact_BF in self.blocks(parameters, x_BN)),
            sample=lambda: self._sample(parameters, x_BN),
            num_local_rows=len(x_BN),
            parameters=parameters,
            norm_FM=norm_FM,
            weight_F=code_weights(norm_FM, self._spec.code_weight),
            is_decoupled=self._spec.code_weight == "decoupled",
            group_ends=self._group_ends,
            kernels=self._kernels,
            mesh=self._mesh,
            last_floor=self.floor,
        )
        kept = self._spec.sparsity.select_in_training(batch, k)
        if kept.smallest is not None:
            self.floor = float(kept.smallest.min()) * _FLOOR_SHARE
        return kept

    def strongest_dead(self, parameters: Parameters, x_BN: Tensor, dead_F: Tensor) -> SparseCodes | None:
        """The dead latents with the largest positive scores on every row, which explain the residual.

        dead_F holds the indices of this rank's dead latents; None if no rank has one. Costs their share of the
        encoder's product. Collective over latent ranks.
        """
        num_dead = int(self._mesh.sum_(torch.tensor(len(dead_F), device=dead_F.device), "latent"))
        if num_dead == 0:
            return None
        k, num_latents = min(self._spec.aux_latents, num_dead), len(parameters.b_enc_F)
        weight_F = code_weights(self._decoder_norms(parameters), self._spec.code_weight)[dead_F]
        W_enc_FN, bias_F, parts = self._W_enc_FN(parameters)[dead_F], parameters.b_enc_F[dead_F], []
        for block_BN in torch.split(x_BN, self._block_rows):
            preact_BF = _product(block_BN, W_enc_FN, bias_F, out_BF=block_BN.new_empty(len(block_BN), len(dead_F)))
            scores_BK, places_BK = top_of_rows(preact_BF * weight_F, k, self._mesh)
            rows_P, slots_P = (scores_BK > 0).nonzero(as_tuple=True)
            places_P = places_BK[rows_P, slots_P]
            offsets = row_offsets(rows_P, len(block_BN))
            parts.append(SparseCodes(preact_BF[rows_P, places_P], dead_F[places_P], offsets, num_latents))
        return concatenate(parts)

    def l0_at_inference(self, parameters: Parameters, x_BN: Tensor, threshold: Tensor) -> float:
        """Mean active latents per row of the global batch by the rule of inference, where it compares scores.

        Collective over the mesh.
        """
        norm_FM, sparsity = self._decoder_norms(parameters), self._spec.sparsity
        weight_F = code_weights(norm_FM, self._spec.code_weight)
        jump_threshold_F = norm_FM.new_zeros(0)
        if sparsity.has_group_thresholds:
            jump_threshold_F = sparsity.latent_thresholds(threshold, weight_F, self._group_ends)
        num_active = torch.zeros((), dtype=torch.float64, device=x_BN.device)
        for _, preact_BF in self.blocks(parameters, x_BN):
            block = InferenceBlock(
                preact_BF,
                weight_F,
                parameters.W_dec_FN.view(*norm_FM.shape, -1),
                is_decoupled=self._spec.code_weight == "decoupled",
                kernels=self._kernels,
                k=sparsity.k,
                threshold=threshold,
                jump_threshold_F=jump_threshold_F,
            )
            num_active += sparsity.select_at_inference(block).num_pairs
        return float(self._mesh.sum_(num_active, "world")) / (len(x_BN) * self._mesh.data_size)

    def typical_preactivation(self, parameters: Parameters, x_BN: Tensor) -> float:
        """Geometric mean of the absolute pre-activations of the global batch, which a few huge rows do not move.

        1 if all are 0. Collective over the mesh.
        """
        total = torch.zeros(2, dtype=torch.float64, device=x_BN.device)
        for _, preact_BF in self.blocks(parameters, x_BN):
            log_BF = preact_BF.abs().log()
            is_any_BF = log_BF.isfinite()
            total += torch.stack([log_BF.where(is_any_BF, 0.0).sum(dtype=torch.float64), is_any_BF.sum()])
        log_sum, count = self._mesh.sum_(total, "world").tolist()
        return math.exp(log_sum / max(count, 1.0))

    def _decoder_norms(self, parameters: Parameters) -> Tensor:
        return decoder_norms(parameters.W_dec_FN.view(len(parameters.b_enc_F), self._spec.fitted_models, -1))

    def _W_enc_FN(self, parameters: Parameters) -> Tensor:  # noqa: N802 (shape letter)
        return parameters.W_enc_FN if self._W_half_FN is None else self._W_half_FN

    def _preactivations(self, parameters: Parameters, block_BN: Tensor) -> Tensor:
        """x W_enc + b_enc for a block, in reused memory."""
        if self._buffer_BF is None or len(self._buffer_BF) < len(block_BN):
            self._buffer_BF = block_BN.new_empty(len(block_BN), len(parameters.b_enc_F))
        out_BF = self._buffer_BF[: len(block_BN)]
        return _product(block_BN, self._W_enc_FN(parameters), parameters.b_enc_F, out_BF=out_BF)


def _product(block_BN: Tensor, W_enc_FN: Tensor, bias_F: Tensor, *, out_BF: Tensor) -> Tensor:
    """x W_enc + b_enc into out_BF; in bfloat16 where the weights are."""
    if W_enc_FN.dtype == torch.bfloat16:
        half_BN = block_BN.bfloat16()
        if out_BF.is_cuda:
            # Rounded factors, but sums and results in float32: scores stay distinct.
            torch.mm(half_BN, W_enc_FN.T, out_dtype=torch.float32, out=out_BF)
            return out_BF.add_(bias_F)
        return torch.add(half_BN @ W_enc_FN.T, bias_F, out=out_BF)
    return torch.addmm(bias_F, block_BN, W_enc_FN.T, out=out_BF)


def _block_numbers(device: torch.device) -> int:
    return _BLOCK_NUMBERS.get(device.type, _BLOCK_NUMBERS["cpu"])


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError for tf32 on a device without it: the products would be float32 without a word."""
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(
            f"expected a CUDA device for precision 'tf32', got device {str(device)!r}, which has no such products: set "
            f"precision to float32, or give training a GPU"
        )


@contextmanager
def matrix_products(precision: str, device: torch.device) -> Iterator[None]:
    """Within it, float32 products on CUDA run in TF32 unless precision is float32; other devices are untouched."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
