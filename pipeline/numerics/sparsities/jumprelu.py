"""JumpReLU: codes above a threshold per latent, which is trained by a straight-through estimator (arXiv 2407.14435).

The loss has a penalty on the number of active latents. Neither it nor the reconstruction has a gradient by the
threshold; section 3 of the paper estimates one from the pairs whose pre-activation is near it. The encoder gets the
gradient of active pairs alone, as there.

Nothing here depends on the size of the activations: "near" is a share of the threshold, the threshold starts at the
size of the first batch's pre-activations, and what is trained is its logarithm. Adam moves a logarithm by about its
learning rate per step whatever mu is, so mu decides where thresholds settle and the rate whether they get there:
threshold_lr_factor makes them faster than the weights.

Shapes: B rows, F latents, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pipeline.numerics.settings import Bounds, NonNegativeFloat, PositiveFloat
from pipeline.numerics.sparsities.base import DenseCodes, DenseThresholdGradients, Kept, ThresholdGradients
from pipeline.numerics.sparsities.penalised import PenalisedSparsity

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.numerics.batch import InferenceBlock, TrainingBatch
    from pipeline.numerics.codes import SparseCodes


@dataclass(frozen=True, kw_only=True)
class JumpRelu(PenalisedSparsity):
    """Codes above a learned threshold per latent."""

    kind: ClassVar[str] = "jumprelu"
    activation: ClassVar[str] = "jumprelu"
    published_class: ClassVar[str] = "JumpReLUCrossCoder"
    published_tensors: ClassVar[tuple[str, ...]] = ("jump_threshold",)
    may_be_dense: ClassVar[bool] = True

    mu: NonNegativeFloat = 1e-2
    """Weight of the mean number of active latents; raising it lowers L0. On rows of root mean square sqrt(width) the
    range is 1e-4 (nearly no penalty) to 10 (nearly nothing active)."""
    bandwidth: Annotated[float, Bounds(gt=0, lt=2)] = 1.0
    """Width of the straight-through estimator around a threshold, as a share of the threshold."""
    initial_threshold: PositiveFloat = 1.0
    """Threshold of every latent at the start, as a multiple of the first batch's typical pre-activation (the geometric
    mean of the absolute ones)."""
    threshold_lr_factor: PositiveFloat = 10.0
    """Learning rate of the logarithm of the thresholds, as a multiple of lr."""

    def select_in_training(self, batch: TrainingBatch, k: float) -> Kept:  # noqa: ARG002
        """Pairs above the threshold less half a bandwidth; those at or below the threshold have the code 0."""
        log_threshold_F = batch.parameters.log_threshold_F
        assert log_threshold_F is not None
        least_F = self.least_preactivation(log_threshold_F)

        def above(preact_BF: Tensor) -> SparseCodes:
            found = batch.positive(preact_BF)
            return found.keep(found.values_P > found.of_latents(least_F))

        near = batch.encode(above)
        threshold_P = log_threshold_F.exp()[near.latents_P]
        codes = near._replace(values_P=near.values_P.where(near.values_P > threshold_P, 0.0))
        return Kept(codes, preact_P=near.values_P)

    def threshold_gradients(
        self, codes: SparseCodes, preact_P: Tensor, *, grad_P: Tensor, log_threshold_F: Tensor, scale: float
    ) -> ThresholdGradients:
        """The straight-through gradients of the active and the near pairs."""
        threshold_P = log_threshold_F.exp()[codes.latents_P]
        is_active_P = preact_P > threshold_P
        jump_P = self._near(preact_P, threshold_P) / self.bandwidth
        # The code jumps by the threshold, the count of active latents by 1.
        grad_threshold_P = -(threshold_P * grad_P + scale) * jump_P
        return ThresholdGradients(scale * is_active_P.sum().to(grad_P.dtype), grad_P * is_active_P, grad_threshold_P)

    def least_preactivation(self, log_threshold_F: Tensor | None) -> Tensor:
        """The threshold less half a bandwidth, [F]."""
        assert log_threshold_F is not None
        return log_threshold_F.exp() * (1 - self.bandwidth / 2)

    def _near(self, preact: Tensor, threshold: Tensor) -> Tensor:
        return (preact - threshold).abs() < threshold * (self.bandwidth / 2)

    def dense_codes(self, preact_BF: Tensor, log_threshold_F: Tensor | None) -> DenseCodes:
        """Pre-activations above the threshold."""
        assert log_threshold_F is not None
        threshold_F = log_threshold_F.exp()
        near_BF = self._near(preact_BF, threshold_F)
        return DenseCodes(preact_BF.mul_(preact_BF > threshold_F), near_BF)

    def dense_threshold_gradients(
        self, codes: DenseCodes, *, grad_BF: Tensor, num_active: Tensor, log_threshold_F: Tensor, scale: float
    ) -> DenseThresholdGradients:
        """The same as threshold_gradients, summed over the block."""
        assert codes.near_BF is not None
        threshold_F = log_threshold_F.exp()
        near_sum_F = grad_BF.where(codes.near_BF, 0.0).sum(0)
        grad_F = -(threshold_F * near_sum_F + scale * codes.near_BF.sum(0)) / self.bandwidth
        return DenseThresholdGradients(scale * num_active.to(grad_BF.dtype), grad_F)

    @classmethod
    def select_at_inference(cls, block: InferenceBlock) -> SparseCodes:
        """Codes above their latent's threshold."""
        codes = block.positive()
        return codes.keep(codes.values_P > block.jump_threshold_F[codes.latents_P])
