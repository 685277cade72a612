"""What L1 and JumpReLU share: a penalty of weight mu on the codes, and an optional target for L0 that mu is steered to.

The steering itself, and its state, are in l0_control.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.numerics import schedule
from pipeline.numerics.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat
from pipeline.numerics.sparsities.base import Sparsity


@dataclass(frozen=True, kw_only=True)
class PenalisedSparsity(Sparsity):
    """A sparsity whose L0 follows from the weight of a penalty."""

    mu: NonNegativeFloat
    """Weight of the penalty; raising it lowers L0."""
    mu_warmup_steps: NonNegativeInt = 0
    """The penalty grows linearly from 0 over this many steps."""
    target_l0: PositiveFloat | None = None
    """Mean active latents per row that training is steered to: mu is then only the start, it is raised while L0 lies
    above the target and lowered while it lies below, and stays constant over the last part of the run. None keeps
    mu."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of bounds, and for a target that no factor of mu can reach."""
        super().__post_init__()
        if self.target_l0 is not None and self.mu == 0:
            raise ValueError(f"expected mu > 0 with target_l0 {self.target_l0:g}, got 0: give mu a start to be scaled")

    def check_size(self, num_latents: int) -> None:
        """Raises ValueError unless the dictionary has more latents than target_l0."""
        if self.target_l0 is not None and self.target_l0 >= num_latents:
            raise ValueError(
                f"expected target_l0 < num_latents = {num_latents} for {self.kind}, got target_l0={self.target_l0:g}: "
                f"lower target_l0 or raise num_latents"
            )

    def penalty_weight(self, step: int) -> float:
        """mu, after its warm-up."""
        return self.mu * schedule.ramp(step, self.mu_warmup_steps)
