"""BatchTopK: the k * rows largest scores of the whole global batch (arXiv 2412.06410; 2504.02922, section 2).

Kept values are the raw codes and the selection passes no gradient to the code weight. At inference a row must not
depend on its neighbours, so a code is kept where its score is above a threshold: the average, over the last steps, of
the smallest score that training kept of the whole global batch, which every rank knows. Under the decoupled code weight
the models are selected one by one, each with a threshold.

Shapes: B rows, M models, F latents, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.numerics import schedule
from pipeline.numerics.settings import DecayFloat, NonNegativeInt, PositiveInt
from pipeline.numerics.sparsities.base import Kept
from pipeline.numerics.sparsities.topk import CountedSparsity

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.numerics.batch import InferenceBlock, TrainingBatch
    from pipeline.numerics.codes import SparseCodes

_AVERAGED_FRAC = 0.05
"""Share of the run over which the threshold is averaged at most: the scores drift while weights are trained."""


@dataclass(frozen=True, kw_only=True)
class BatchTopK(CountedSparsity):
    """The k * batch_rows largest weighted codes of the whole global batch."""

    kind: ClassVar[str] = "batch_topk"
    activation: ClassVar[str] = "batch_topk"
    published_class: ClassVar[str] = "BatchTopKCrossCoder"
    published_tensors: ClassVar[tuple[str, ...]] = ("k", "threshold")
    compares_scores: ClassVar[bool] = True
    starts_at_median: ClassVar[bool] = True

    k_start: PositiveInt | None = None
    """Begin with this k and go down linearly, in whole latents per row; None starts at k."""
    k_anneal_steps: NonNegativeInt = 0
    """Steps from k_start to k; 0 means k from the first step."""
    threshold_decay: DecayFloat = 0.999
    """Decay per step of the inference threshold's moving average, which covers at most a twentieth of the run."""
    threshold_start_step: NonNegativeInt = 1000
    """The threshold's moving average begins after this step, and not before k is final."""

    def check_size(self, num_latents: int) -> None:
        """Raises ValueError unless the dictionary has at least k and k_start latents."""
        super().check_size(num_latents)
        if self.k_start is not None:
            self._check_count("k_start", self.k_start, num_latents)

    def active_latents(self, step: int) -> float:
        """k, after its annealing."""
        return schedule.active_latents(step, k=self.k, k_start=self.k_start, anneal_steps=self.k_anneal_steps)

    def select_in_training(self, batch: TrainingBatch, k: float) -> Kept:
        """The largest scores of the global batch, exactly: candidates above a floor that is lowered until it holds."""
        num_keep = max(1, round(k * batch.num_rows))
        bound_F = batch.norm_FM.amax(1) if batch.is_decoupled else batch.weight_F
        for floor in batch.floors(bound_F, num_keep):
            candidates = batch.collect(bound_F, floor)
            if batch.is_decoupled:
                score_PM = candidates.values_P[:, None] * batch.norm_FM[candidates.latents_P]
            else:  # one column: the models are selected together
                score_PM = (candidates.values_P * candidates.of_latents(bound_F))[:, None]
            if all(batch.is_enough(score_P, num_keep, floor) for score_P in score_PM.unbind(1)):
                break
        selection = batch.largest(candidates, score_PM, num_keep)
        return Kept(selection.codes, selection.smallest)

    def next_threshold(self, threshold: Tensor, smallest: Tensor, *, step: int, num_steps: int) -> Tensor:
        """The mean of the smallest kept scores, then a moving average of them; a step's own before it begins.

        It begins after threshold_start_step and not before k is final, since scores kept with a larger k are smaller
        and would lower the threshold for long. Unchanged if nothing was kept.
        """
        begin = max(self.threshold_start_step + 1, self.k_anneal_steps if self.k_start is not None else 0)
        num_averaged = min(step - begin + 1, 1 / (1 - self.threshold_decay), num_steps * _AVERAGED_FRAC)
        share = 1 / max(1.0, num_averaged)
        return (threshold + share * (smallest - threshold)).where(smallest > 0, threshold)

    @classmethod
    def select_at_inference(cls, block: InferenceBlock) -> SparseCodes:
        """Codes whose score is above the threshold; all positive ones while it is 0 (not trained yet)."""
        if block.is_decoupled:
            codes = block.kernels.collect(block.preact_BF, block.weight_F, 0.0)
            score_PM = codes.values_P[:, None] * block.norm_FM[codes.latents_P]
            mask_PM = score_PM.double() > block.threshold.clamp(min=0)
            return codes._replace(model_mask_PM=mask_PM).keep(mask_PM.any(1))
        floor = max(float(block.threshold), 0.0)
        codes = block.kernels.collect(block.preact_BF, block.weight_F, floor)
        return codes.keep((codes.values_P * block.weight_F[codes.latents_P]).double() > floor)
