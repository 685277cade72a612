"""Matryoshka BatchTopK: nested dictionaries in one (arXiv 2503.17547).

    L = mean over groups g of reconstruction(x, b_dec + sum over j < F_g of f_j d_j) + auxiliary loss

The latents up to the end F_g of every group reconstruct the rows by themselves, with codes that are selected once, by
BatchTopK over the whole dictionary. Early latents so have to be general ones; a general concept is then not divided
into the special ones that contain it.

Choices of ours: every prefix has twice the latents of the one before (the paper's groups double, up to rounding); the
prefixes' losses are averaged, where the paper adds them, so that the learning rate and the auxiliary loss weigh as in
BatchTopK. The auxiliary loss is about the residual of all latents. At inference it is BatchTopK, and so are its files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pipeline.numerics.settings import Bounds
from pipeline.numerics.sparsities.batch_topk import BatchTopK


@dataclass(frozen=True, kw_only=True)
class Matryoshka(BatchTopK):
    """BatchTopK whose first latents, in groups that double, reconstruct by themselves too."""

    kind: ClassVar[str] = "matryoshka"
    is_nested: ClassVar[bool] = True

    num_groups: Annotated[int, Bounds(ge=2, le=32)] = 5
    """Reconstructions: by all latents, by the first half, the first quarter, and so on."""

    def check_size(self, num_latents: int) -> None:
        """Raises ValueError unless the smallest group has a latent."""
        super().check_size(num_latents)
        fewest = 1 << (self.num_groups - 1)
        if num_latents < fewest:
            raise ValueError(
                f"expected num_latents >= {fewest} for num_groups {self.num_groups} of {self.kind}, got {num_latents}: "
                f"lower num_groups or raise num_latents"
            )

    def group_ends(self, num_latents: int) -> tuple[int, ...]:
        """Halves of halves, rounded down."""
        return tuple(num_latents >> place for place in reversed(range(self.num_groups)))
