"""Delta crosscoder: a loss of the models' difference, and a k of its own for what explains it (arXiv 2603.04426).

    L = reconstruction(x) + delta_weight reconstruction(x^chat - x^base) + auxiliary loss

The first latents are shared, d_j^base = d_j^chat, and add nothing to the difference, so the second term is about all
others: sum over them of f_j (d_j^chat - d_j^base). A narrow change of the chat model is a small part of the rows and a
large one of their difference. Dual k: BatchTopK selects among the shared latents and among the others separately, each
with a share of k and a threshold of its own, so that common concepts cannot take the places of changed ones.

The paper's abstract names these three parts (delta loss, dual k, paired activations as contrast, which every crosscoder
has). The rest is a choice of ours: tied rows for the shared latents, both losses of one kind and averaged over the same
rows, and the shares. Files hold one threshold per latent, t_g / w_j, and are read as JumpReLU, which is the same rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pipeline.numerics.settings import Bounds, NonNegativeFloat
from pipeline.numerics.sparsities.base import Kept
from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.sparsities.jumprelu import JumpRelu
from pipeline.numerics.sparsities.shared_l1 import check_shared

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.numerics.batch import InferenceBlock, TrainingBatch
    from pipeline.numerics.codes import SparseCodes


@dataclass(frozen=True, kw_only=True)
class Delta(BatchTopK):
    """BatchTopK with shared latents, a k for all others, and a loss of the models' difference."""

    kind: ClassVar[str] = "delta"
    activation: ClassVar[str] = JumpRelu.activation
    published_class: ClassVar[str] = JumpRelu.published_class
    published_tensors: ClassVar[tuple[str, ...]] = JumpRelu.published_tensors
    ties_first_group: ClassVar[bool] = True
    has_group_thresholds: ClassVar[bool] = True

    shared_frac: Annotated[float, Bounds(gt=0, lt=1)] = 0.8
    """Share of the latents whose decoder row is one and the same in both models; their Delta_norm is 0.5 by
    construction."""
    delta_k_frac: Annotated[float, Bounds(gt=0, lt=1)] = 0.25
    """Share of the k active latents that the others get."""
    delta_weight: NonNegativeFloat = 1.0
    """Weight of the loss of the difference."""

    def check_size(self, num_latents: int) -> None:
        """Raises ValueError unless there are shared latents and others, enough for their shares of k."""
        super().check_size(num_latents)
        check_shared(self.kind, self.shared_frac, num_latents)
        num_shared, _ = self.group_ends(num_latents)
        most = max(self.k, self.k_start or 0)
        for name, size, frac in (
            ("shared", num_shared, 1 - self.delta_k_frac),
            ("other", num_latents - num_shared, self.delta_k_frac),
        ):
            if most * frac > size:
                raise ValueError(
                    f"expected at most {size} active of {size} {name} latents for {self.kind}, got {most * frac:g} of "
                    f"k {most}: change delta_k_frac or shared_frac, or raise num_latents"
                )

    def group_ends(self, num_latents: int) -> tuple[int, ...]:
        """The shared latents, and all others."""
        return (int(self.shared_frac * num_latents), num_latents)

    def select_in_training(self, batch: TrainingBatch, k: float) -> Kept:
        """The largest scores of the global batch among the shared latents, and among all others."""
        counts = [max(1, round(k * frac * batch.num_rows)) for frac in (1 - self.delta_k_frac, self.delta_k_frac)]
        for floor in batch.floors(batch.weight_F, sum(counts)):
            candidates = batch.collect(batch.weight_F, floor)
            score_P = candidates.values_P * candidates.of_latents(batch.weight_F)
            groups = list(zip(batch.of_groups(candidates, score_P), counts, strict=True))
            if all(batch.is_enough(own_P, count, floor) for own_P, count in groups):
                break
        shared, others = (batch.largest(candidates, own_P[:, None], count) for own_P, count in groups)
        smallest = shared.smallest.new_tensor([float(shared.smallest), float(others.smallest)])
        return Kept(candidates.keep(shared.mask_P | others.mask_P), smallest)

    @classmethod
    def latent_thresholds(cls, threshold: Tensor, weight_F: Tensor, group_ends: tuple[int, ...]) -> Tensor:
        """t_g / w_j; the largest number where a latent has no weight, so that it never fires."""
        of_group_F = threshold.new_empty(len(weight_F))
        start = 0
        for group, end in enumerate(group_ends):
            of_group_F[start:end] = threshold[group].clamp(min=0)
            start = end
        return (of_group_F / weight_F.clamp(min=1e-30)).clamp(max=1e30).to(weight_F.dtype)

    @classmethod
    def select_at_inference(cls, block: InferenceBlock) -> SparseCodes:
        """Codes above their latent's threshold."""
        return JumpRelu.select_at_inference(block)
