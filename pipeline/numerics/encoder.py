"""The training encoder: one matrix product per block of rows, and from it the selected pairs of the whole batch.

Pre-activations exist for one block of rows at a time, in memory that is reused; what leaves a block is the candidate
pairs above a floor. The floor is a guess (the last step's cut, lowered; else an estimate from a few rows; else 0) and
only saves work: when the exact selection finds it was too high, the block is encoded again with a lower one. Blocks are
therefore gradient accumulation that equals the large batch exactly, for selections over the whole batch as well.

Shapes: B local rows, N = M * D, F latents of this rank, P pairs, K auxiliary latents per row.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.numerics import sparsity
from pipeline.numerics.codes import SparseCodes, concatenate, pick
from pipeline.numerics.crosscoder import row_candidates_selected
from pipeline.numerics.gradients import Encoded, Parameters
from pipeline.numerics.kernels.base import Kernels
from pipeline.numerics.parallel import Mesh
from pipeline.numerics.selection import is_enough, select_batch, select_batch_per_model, top_of_rows
from pipeline.numerics.spec import CrosscoderSpec

_FLOOR_SHARE = 0.9
"""The next floor as a share of this step's cut: low enough that a step rarely has to encode twice."""
_BLOCK_NUMBERS = {"cpu": 1 << 23, "cuda": 1 << 29}
"""Pre-activations of a block by default, per kind of device: enough for the matrix product's full speed."""
_MIN_BLOCK_ROWS = 256
_SAMPLE_ROWS = 32
"""Rows from which the first floor is estimated."""


class Selected(NamedTuple):
    """What a step works on."""

    encoded: Encoded
    smallest: Tensor
    """float64, scalar or [M]: the smallest kept score of the global batch; 0 if nothing was kept or compared."""


class TrainingEncoder:
    """Holds the block's memory and the floor; everything else comes in as arguments."""

    def __init__(self, spec: CrosscoderSpec, kernels: Kernels, mesh: Mesh, device: torch.device) -> None:
        self._spec = spec
        self._kernels = kernels
        self._mesh = mesh
        self._floor: float | None = None
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
        """Whether l1 or jumprelu codes are so dense that matrix products beat pairs; guessed from a few rows.

        Depends on the rows and weights alone, so a resumed run takes the same path. Collective over the mesh's world.
        """
        preact_BF = self._sample(parameters, x_BN)
        share = (preact_BF > self._least_F(parameters)).double().mean()
        return float(self._mesh.max_(share, "world")) > self._kernels.dense_cutoff

    def _least_F(self, parameters: Parameters) -> Tensor:  # noqa: N802 (shape letter)
        """Pre-activation above which a pair has a gradient, for l1 and jumprelu."""
        if parameters.log_threshold_F is None:
            return torch.zeros_like(parameters.b_enc_F)
        return (parameters.log_threshold_F.exp() - self._spec.bandwidth / 2).clamp(min=0)

    def _sample(self, parameters: Parameters, x_BN: Tensor) -> Tensor:
        return self._preactivations(parameters, x_BN[: min(_SAMPLE_ROWS, self._block_rows)])

    def select(self, parameters: Parameters, x_BN: Tensor, *, k: float, dead_F: Tensor | None) -> Selected:
        """The pairs that this step keeps, and the dead latents that explain the residual if dead_F is given.

        k is the mean active latents per row of the global batch for batch_topk, exact for topk. dead_F holds the
        indices of this rank's dead latents. Collective over the mesh.
        """
        norm_FM = sparsity.decoder_norms(
            parameters.W_dec_FN.view(len(parameters.b_enc_F), self._spec.fitted_models, -1)
        )
        weight_F = sparsity.code_weights(norm_FM, self._spec.code_weight)
        if self._spec.kind == "batch_topk":
            return self._select_batch(parameters, x_BN, k=k, norm_FM=norm_FM, dead_F=dead_F)
        gather, auxiliary = self._auxiliary_gatherer(weight_F, dead_F)
        parts = []
        for _, preact_BF in self.blocks(parameters, x_BN):
            gather(preact_BF)
            if self._spec.kind == "topk":
                parts.append(row_candidates_selected(preact_BF, weight_F, k=round(k), mesh=self._mesh))
            else:
                parts.append(self._collect_positive(parameters, preact_BF, weight_F))
        codes = concatenate(parts)
        nothing = torch.zeros((), dtype=torch.float64, device=x_BN.device)
        if parameters.log_threshold_F is None:
            return Selected(Encoded(codes, auxiliary()), nothing)
        threshold_P = parameters.log_threshold_F.exp()[codes.latents_P]
        cut = codes._replace(values_P=torch.where(codes.values_P > threshold_P, codes.values_P, 0.0))
        return Selected(Encoded(cut, None, codes.values_P), nothing)

    def _collect_positive(self, parameters: Parameters, preact_BF: Tensor, weight_F: Tensor) -> SparseCodes:
        """All positive pairs for l1; for jumprelu those above the threshold less half a bandwidth."""
        codes = self._kernels.collect(preact_BF, torch.ones_like(weight_F), 0.0)
        if parameters.log_threshold_F is None:
            return codes
        return codes.keep(codes.values_P > pick(self._least_F(parameters), codes.latents_P))

    def _select_batch(
        self,
        parameters: Parameters,
        x_BN: Tensor,
        *,
        k: float,
        norm_FM: Tensor,
        dead_F: Tensor | None,
    ) -> Selected:
        weight_F = sparsity.code_weights(norm_FM, self._spec.code_weight)
        num_keep = max(1, round(k * len(x_BN) * self._mesh.data_size))
        is_decoupled = self._spec.code_weight == "decoupled"
        bound_F = norm_FM.amax(1) if is_decoupled else weight_F
        for floor in self._floors(parameters, x_BN, weight_F=bound_F, num_keep=num_keep):
            gather, auxiliary = self._auxiliary_gatherer(weight_F, dead_F)
            parts = []
            for _, preact_BF in self.blocks(parameters, x_BN):
                gather(preact_BF)
                parts.append(self._kernels.collect(preact_BF, bound_F, floor))
            candidates = concatenate(parts)
            if is_decoupled:
                score_PM = candidates.values_P[:, None] * norm_FM[candidates.latents_P]
                if all(is_enough(score_P, num_keep, floor=floor, mesh=self._mesh) for score_P in score_PM.unbind(1)):
                    selection = select_batch_per_model(candidates, score_PM, num_keep=num_keep, mesh=self._mesh)
                    break
            else:
                score_P = candidates.values_P * pick(bound_F, candidates.latents_P)
                if is_enough(score_P, num_keep, floor=floor, mesh=self._mesh):
                    selection = select_batch(candidates, score_P, num_keep=num_keep, mesh=self._mesh)
                    break
        self._floor = float(selection.smallest.min()) * _FLOOR_SHARE
        return Selected(Encoded(selection.codes, auxiliary()), selection.smallest)

    def _floors(self, parameters: Parameters, x_BN: Tensor, *, weight_F: Tensor, num_keep: int) -> Iterator[float]:
        """Guesses from high to low; the last one, 0, is always enough. Equal on all ranks."""
        if self._floor:
            yield self._floor
        sample_BF = self._sample(parameters, x_BN)
        scores = (sample_BF * weight_F).flatten()
        share = num_keep / (len(x_BN) * self._mesh.data_size * len(weight_F) * self._mesh.latent_size)
        place = min(scores.numel(), int(1.5 * share * scores.numel()) + 8)
        estimate = scores.kthvalue(scores.numel() - place + 1).values.to(torch.float64).nan_to_num(0.0)
        lowest = float(-self._mesh.max_(-estimate, "world"))
        if lowest > 0:
            yield lowest
        yield 0.0

    def _preactivations(self, parameters: Parameters, block_BN: Tensor) -> Tensor:
        """x W_enc + b_enc for a block, in reused memory."""
        if self._buffer_BF is None or len(self._buffer_BF) < len(block_BN):
            self._buffer_BF = block_BN.new_empty(len(block_BN), len(parameters.b_enc_F))
        out_BF = self._buffer_BF[: len(block_BN)]
        if self._W_half_FN is not None:
            half_BN = block_BN.bfloat16()
            if out_BF.is_cuda:
                # Rounded factors, but sums and results in float32: scores stay distinct.
                torch.mm(half_BN, self._W_half_FN.T, out_dtype=torch.float32, out=out_BF)
                return out_BF.add_(parameters.b_enc_F)
            return torch.add(half_BN @ self._W_half_FN.T, parameters.b_enc_F, out=out_BF)
        return torch.addmm(parameters.b_enc_F, block_BN, parameters.W_enc_FN.T, out=out_BF)

    def _auxiliary_gatherer(
        self, weight_F: Tensor, dead_F: Tensor | None
    ) -> tuple[Callable[[Tensor], None], Callable[[], SparseCodes | None]]:
        """(called with every block, called at the end): collects the strongest dead latents of every row."""
        if dead_F is None:
            return lambda _: None, lambda: None
        num_dead = int(self._mesh.sum_(torch.tensor(len(dead_F), device=weight_F.device), "latent"))
        k = min(self._spec.aux_latents, num_dead)
        parts: list[SparseCodes] = []

        def gather(preact_BF: Tensor) -> None:
            preact_dead = preact_BF[:, dead_F]
            scores_BK, places_BK = top_of_rows(preact_dead * weight_F[dead_F], k, self._mesh)
            rows_P, slots_P = (scores_BK > 0).nonzero(as_tuple=True)
            places_P = places_BK[rows_P, slots_P]
            offsets = torch.nn.functional.pad((scores_BK > 0).sum(1).cumsum(0), (1, 0))
            values_P = preact_dead[rows_P, places_P]
            parts.append(SparseCodes(values_P, dead_F[places_P], offsets, len(weight_F)))

        return gather, lambda: concatenate(parts)


def _block_numbers(device: torch.device) -> int:
    return _BLOCK_NUMBERS.get(device.type, _BLOCK_NUMBERS["cpu"])


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError for tf32 where there is none: it would silently be float32."""
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
