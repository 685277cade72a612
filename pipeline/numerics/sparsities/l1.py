"""L1: every positive code counts, and a penalty on codes times code weights keeps them few.

The penalty's gradient passes through the code weight to the decoder norms (arXiv 2504.02922, section 2). The paper
shows what follows: concepts that both models have lose their decoder in one of them and look chat-only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.numerics.settings import NonNegativeFloat
from pipeline.numerics.sparsities.base import CodePenalty, Kept
from pipeline.numerics.sparsities.penalised import PenalisedSparsity

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.numerics.batch import InferenceBlock, TrainingBatch
    from pipeline.numerics.codes import SparseCodes


@dataclass(frozen=True, kw_only=True)
class L1(PenalisedSparsity):
    """ReLU codes with a penalty; kept as the field's reference, known to invent chat-only latents."""

    kind: ClassVar[str] = "l1"
    activation: ClassVar[str] = "relu"
    published_class: ClassVar[str] = "CrossCoder"
    default_init_norm: ClassVar[float] = 0.005
    default_clip_norm: ClassVar[float | None] = None
    penalises_codes: ClassVar[bool] = True
    may_be_dense: ClassVar[bool] = True

    mu: NonNegativeFloat = 4.1e-2
    """Weight of the sum of weighted codes; raising it lowers L0."""

    def select_in_training(self, batch: TrainingBatch, k: float) -> Kept:  # noqa: ARG002
        """Every positive pair."""
        return Kept(batch.encode(batch.positive))

    def code_penalty(
        self,
        sums_F: Tensor,
        weight_F: Tensor,
        *,
        scale: float,
        group_ends: tuple[int, ...],  # noqa: ARG002
    ) -> CodePenalty:
        """scale * sum_j w_j sum_i f_ij."""
        grad_weight_F = scale * sums_F
        return CodePenalty((weight_F * grad_weight_F).sum(), grad_weight_F, scale * weight_F)

    @classmethod
    def select_at_inference(cls, block: InferenceBlock) -> SparseCodes:
        """Every positive code."""
        return block.positive()
