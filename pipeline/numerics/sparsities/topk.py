"""TopK: every row keeps its k largest scores, in training as at inference; and what it shares with BatchTopK."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.numerics.settings import NonNegativeFloat, PositiveInt
from pipeline.numerics.sparsities.base import DEAD_AFTER_ROWS, Kept, Sparsity

if TYPE_CHECKING:
    from pipeline.numerics.batch import InferenceBlock, TrainingBatch
    from pipeline.numerics.codes import SparseCodes


@dataclass(frozen=True, kw_only=True)
class CountedSparsity(Sparsity):
    """A sparsity that keeps a set number of codes, and trains dead latents by an auxiliary loss."""

    k: PositiveInt = 100
    """Mean active latents per row."""
    aux_weight: NonNegativeFloat = 1 / 32
    """Weight of the auxiliary loss that revives dead latents; 0 turns it off."""
    aux_k: PositiveInt | None = None
    """Dead latents used per row by the auxiliary loss; None means half the activation width."""
    dead_after_rows: PositiveInt = DEAD_AFTER_ROWS
    """A latent that has not fired for this many rows counts as dead."""

    def check_size(self, num_latents: int) -> None:
        """Raises ValueError unless the dictionary has at least k latents."""
        self._check_count("k", self.k, num_latents)

    def _check_count(self, name: str, value: int, num_latents: int) -> None:
        if not 1 <= value <= num_latents:
            raise ValueError(
                f"expected 1 <= {name} <= num_latents = {num_latents} for {self.kind}, got {name}={value}: lower "
                f"{name} or raise num_latents"
            )

    def active_latents(self, step: int) -> float:  # noqa: ARG002
        """k."""
        return float(self.k)


@dataclass(frozen=True, kw_only=True)
class TopK(CountedSparsity):
    """The k largest weighted codes of each row."""

    kind: ClassVar[str] = "topk"
    activation: ClassVar[str] = "topk"
    published_class: ClassVar[str] = "TopKCrossCoder"
    published_tensors: ClassVar[tuple[str, ...]] = ("k",)

    def select_in_training(self, batch: TrainingBatch, k: float) -> Kept:
        """The k largest positive scores of every row over all latent ranks; ties go to the smaller latent."""
        return Kept(batch.encode(lambda preact_BF: batch.top_of_rows(preact_BF, round(k))))

    @classmethod
    def select_at_inference(cls, block: InferenceBlock) -> SparseCodes:
        """The same as in training."""
        return block.top_of_rows()
