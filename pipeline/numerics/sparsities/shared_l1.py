"""Shared latents with a reduced penalty (Anthropic, "Insights on Crosscoder Model Diffing", February 2025).

    L = reconstruction + mu mean_i (r sum over shared j of f_ij w_j + sum over all other j of f_ij w_j)

The first latents of the dictionary are shared: d_j^base = d_j^chat, one decoder row that training moves as one. They
cost the share r of what others cost. What both models do alike is then explained by them, and latents of one model need
not be dense to pay for themselves.

The note keeps the shared set small and r between 0.1 and 0.2; its numbers depend on the model, so the defaults are
ours. Their encoder rows are free, as all others. Rows are tied in the dictionary's own units: with per-model
normalisation the directions in raw units are equal and the norms differ by the models' scales. At inference, and in
files, it is L1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pipeline.numerics.settings import Bounds
from pipeline.numerics.sparsities.base import CodePenalty
from pipeline.numerics.sparsities.l1 import L1

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SharedL1(L1):
    """L1 with latents that both models share by construction, at a reduced penalty."""

    kind: ClassVar[str] = "shared_l1"
    ties_first_group: ClassVar[bool] = True

    shared_frac: Annotated[float, Bounds(gt=0, lt=1)] = 0.1
    """Share of the latents whose decoder row is one and the same in both models; their Delta_norm is 0.5 by
    construction."""
    shared_penalty: Annotated[float, Bounds(ge=0, le=1)] = 0.15
    """Their penalty as a share of the others'."""

    def check_size(self, num_latents: int) -> None:
        """Raises ValueError unless there are shared latents and others."""
        super().check_size(num_latents)
        check_shared(self.kind, self.shared_frac, num_latents)

    def group_ends(self, num_latents: int) -> tuple[int, ...]:
        """The shared latents, and all others."""
        return (int(self.shared_frac * num_latents), num_latents)

    def code_penalty(
        self, sums_F: Tensor, weight_F: Tensor, *, scale: float, group_ends: tuple[int, ...]
    ) -> CodePenalty:
        """scale * sum_j r_j w_j sum_i f_ij, with r_j = shared_penalty for shared latents and 1 for all others."""
        scale_F = weight_F.new_full(weight_F.shape, scale)
        scale_F[: group_ends[0]] *= self.shared_penalty
        grad_weight_F = scale_F * sums_F
        return CodePenalty((weight_F * grad_weight_F).sum(), grad_weight_F, scale_F * weight_F)


def check_shared(kind: str, shared_frac: float, num_latents: int) -> None:
    """Raises ValueError unless shared_frac leaves both shared latents and others."""
    if not 0 < int(shared_frac * num_latents) < num_latents:
        raise ValueError(
            f"expected shared and other latents for {kind}, got shared_frac {shared_frac:g} of {num_latents}: raise "
            f"num_latents"
        )
