"""Steers the weight of a penalty until L0 meets a target.

A proportional-integral controller on the logarithm of the weight, multiplicative because L0 answers to ratios of mu:

    e = log(mean L0 / target) within [-1, 1/2]            mean L0: moving average in the logarithm, decay 0.9
    log factor = integral + 0.5 e                         integral grows by 20 e / num_steps per step

The weight in use is factor times what the sparsity says. It falls faster than it rises, since latents die under a mu
that is too large. In one run the integral can raise mu by at most e^9, so mu should start within a factor of ten or so
of what is needed. Steering begins when the penalty has its whole weight. Over the last twentieth of the run the factor
is the integral and no longer changes. L0 is that of the global batch, so every rank computes the same factor; the state
is two numbers.
"""

import math

import torch
from torch import Tensor

from pipeline.numerics.spec import CrosscoderSpec

_DECAY = 0.9
_PROPORTIONAL = 0.5
_INTEGRAL_PER_RUN = 20.0
_ERRORS = (-1.0, 0.5)
_FROZEN_FRAC = 0.05
_SMALLEST_L0 = 1e-3
"""Taken in place of an L0 of 0, whose logarithm does not exist."""


class L0Control:
    """The controller of one run, with its state."""

    def __init__(self, target: float, *, first_step: int, num_steps: int, device: torch.device) -> None:
        """Steers to target from first_step on in a run of num_steps."""
        self._target = target
        self._first_step = first_step
        self._num_steps = num_steps
        self.state = torch.tensor([0.0, math.nan], dtype=torch.float64, device=device)
        """[2]: the integral, and the mean log L0 (NaN before the first step)."""

    @classmethod
    def of(cls, spec: CrosscoderSpec, device: torch.device) -> "L0Control | None":
        """What a spec asks for; None where it names no target."""
        sparsity = spec.sparsity
        if sparsity.target_l0 is None:
            return None
        return cls(sparsity.target_l0, first_step=sparsity.mu_warmup_steps, num_steps=spec.num_steps, device=device)

    def factor(self, step: int) -> float:
        """By what the penalty's weight is multiplied at a step. Waits for the device."""
        integral, mean = self.state.tolist()
        if self._is_frozen(step) or math.isnan(mean):
            return math.exp(integral)
        return math.exp(integral + _PROPORTIONAL * self._error(mean))

    def update(self, l0: Tensor, step: int, is_finite: Tensor) -> None:
        """Takes in the L0 of a step; a step that was not finite changes nothing."""
        if step < self._first_step or self._is_frozen(step):
            return
        integral, mean = self.state.tolist()
        latest = math.log(max(float(l0), _SMALLEST_L0))
        mean = latest if math.isnan(mean) else _DECAY * mean + (1 - _DECAY) * latest
        integral += _INTEGRAL_PER_RUN / self._num_steps * self._error(mean)
        moved = torch.tensor([integral, mean], dtype=torch.float64, device=self.state.device)
        self.state.copy_(torch.where(is_finite, moved, self.state))

    def _error(self, mean: float) -> float:
        return min(_ERRORS[1], max(_ERRORS[0], mean - math.log(self._target)))

    def _is_frozen(self, step: int) -> bool:
        return step >= (1 - _FROZEN_FRAC) * self._num_steps
