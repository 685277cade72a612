"""Rows as a sparsity sees them: the global batch of a training step, and a block of rows at inference.

Both offer what a sparsity is made of: codes from pre-activations, and the exact selections of selection.py. The batch
hides blocks and ranks: pre-activations exist for one block of rows at a time.

Shapes: B rows, M models, F latents of this rank, P pairs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.numerics.code_weight import decoder_norms
from pipeline.numerics.codes import SparseCodes, concatenate, groups_of
from pipeline.numerics.kernels.base import Kernels
from pipeline.numerics.parallel import Mesh
from pipeline.numerics.parameters import Parameters
from pipeline.numerics.selection import (
    Selection,
    is_enough,
    select_batch,
    select_batch_per_model,
    top_codes_of_rows,
)


@dataclass
class TrainingBatch:
    """The global batch of one step; this rank holds some of its rows and latents."""

    blocks: Callable[[], Iterator[Tensor]]
    """Pre-activations of this rank's rows, block by block; a block is valid until the next one."""
    sample: Callable[[], Tensor]
    """Pre-activations of a few rows."""
    num_local_rows: int
    parameters: Parameters
    norm_FM: Tensor
    """Decoder norms."""
    weight_F: Tensor
    """Code weights."""
    is_decoupled: bool
    """Whether every model has scores of its own, f_ij |d_j^m|."""
    group_ends: tuple[int, ...]
    """Of this rank's latents."""
    kernels: Kernels
    mesh: Mesh
    last_floor: float | None = None
    """Guess of a floor from the last step."""

    @property
    def num_rows(self) -> int:
        """Rows of the global batch."""
        return self.num_local_rows * self.mesh.data_size

    def encode(self, sparsify: Callable[[Tensor], SparseCodes]) -> SparseCodes:
        """What sparsify keeps of every block's pre-activations, as the codes of all rows of this rank."""
        return concatenate([sparsify(preact_BF) for preact_BF in self.blocks()])

    def positive(self, preact_BF: Tensor) -> SparseCodes:
        """Every positive pair of a block."""
        return self.kernels.collect(preact_BF, torch.ones_like(self.weight_F), 0.0)

    def top_of_rows(self, preact_BF: Tensor, k: int) -> SparseCodes:
        """The k largest positive scores of every row of a block, over the latent ranks."""
        return top_codes_of_rows(preact_BF, self.weight_F, k=k, mesh=self.mesh)

    def collect(self, bound_F: Tensor, floor: float) -> SparseCodes:
        """Every pair of all rows whose f_ij bound_j reaches the floor, and perhaps some just below it."""
        return self.encode(lambda preact_BF: self.kernels.collect(preact_BF, bound_F, floor))

    def floors(self, bound_F: Tensor, num_keep: int) -> Iterator[float]:
        """Guesses, from high to low, of a floor above which num_keep scores lie; 0, the last, always suffices.

        A guess can cost time, it never changes a selection. Equal on all ranks.
        """
        if self.last_floor:
            yield self.last_floor
        scores = (self.sample() * bound_F).flatten()
        share = num_keep / (self.num_rows * len(bound_F) * self.mesh.latent_size)
        place = min(scores.numel(), int(1.5 * share * scores.numel()) + 8)
        estimate = scores.kthvalue(scores.numel() - place + 1).values.to(torch.float64).nan_to_num(0.0)
        lowest = float(-self.mesh.max_(-estimate, "world"))
        if lowest > 0:
            yield lowest
        yield 0.0

    def is_enough(self, score_P: Tensor, num_keep: int, floor: float) -> bool:
        """Whether candidates collected above floor hold the num_keep largest scores of the global batch."""
        return is_enough(score_P, num_keep, floor=floor, mesh=self.mesh)

    def of_groups(self, candidates: SparseCodes, score_P: Tensor) -> list[Tensor]:
        """Per group of latents, the scores of its pairs, and 0 for all others."""
        group_P = groups_of(candidates.latents_P, self.group_ends)
        return [score_P.where(group_P == group, 0.0) for group in range(len(self.group_ends))]

    def largest(self, candidates: SparseCodes, score_PM: Tensor, num_keep: int) -> Selection:
        """The num_keep largest scores of the global batch, per model where decoupled, else of the only column."""
        if self.is_decoupled:
            return select_batch_per_model(candidates, score_PM, num_keep=num_keep, mesh=self.mesh)
        return select_batch(candidates, score_PM.squeeze(1), num_keep=num_keep, mesh=self.mesh)


class InferenceBlock(NamedTuple):
    """Pre-activations of a block of rows, and what a crosscoder keeps for inference."""

    preact_BF: Tensor
    weight_F: Tensor
    """Code weights."""
    W_dec_FMD: Tensor
    is_decoupled: bool
    kernels: Kernels
    k: int | None
    threshold: Tensor
    """float64, scalar, or [M] where decoupled scores are compared."""
    jump_threshold_F: Tensor
    """Threshold of every latent; empty where the sparsity has none."""

    @property
    def norm_FM(self) -> Tensor:  # noqa: N802 (shape letter)
        """Decoder norms."""
        return decoder_norms(self.W_dec_FMD)

    def positive(self) -> SparseCodes:
        """Every positive code."""
        return self.kernels.collect(self.preact_BF, torch.ones_like(self.weight_F), 0.0)

    def top_of_rows(self) -> SparseCodes:
        """The k largest positive scores of every row."""
        assert self.k is not None
        return top_codes_of_rows(self.preact_BF, self.weight_F, k=self.k, mesh=Mesh())
