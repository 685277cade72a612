"""Concepts of known direction and strength, added to the chat model's rows: what could this run have found?

A crosscoder that is fitted on such rows is judged like any other, and the share of the concepts that the verdict calls
chat-specific is the power of the whole procedure on these very activations (analyses/power.py).

Whether a concept is present in a row, and how strongly, is a hash of the base model's row. So it does not depend on the
order of the rows, on the number of ranks or on a resumed fit, and every epoch sees the same.

Shapes: B rows, M models (0 = base, 1 = chat), C concepts, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_BASE, _CHAT = 0, 1
_BITS = 31
_FIRST, _SECOND = 0x9E3779B97F4A7C1, 0x3F58476D1CE4E5B
"""Odd multipliers that mix the bits of a hash."""
_STRENGTH_SPREAD = 0.5
"""A concept's strength varies from row to row, evenly between 1 - this and 1 + this times its mean."""


@dataclass(frozen=True)
class Injection:
    """What is added, and how often."""

    direction_CD: Tensor
    """What a concept adds to the chat model's row on average, float32; its norm is the concept's strength."""
    frequency: float
    """Share of the rows on which each concept is present, independently of the others."""
    seed: int = 0
    """Of which rows those are."""

    def __call__(self, x_BMD: Tensor) -> Tensor:
        """The rows [B, M, D], float32 or bfloat16, with the concepts in the chat model's; the given rows stay."""
        changed_BMD = x_BMD.clone()
        added_BD = self.strengths(x_BMD) @ self.direction_CD.to(x_BMD.device)
        changed_BMD[:, _CHAT] += added_BD.to(x_BMD.dtype)
        return changed_BMD

    def strengths(self, x_BMD: Tensor) -> Tensor:
        """How strongly every concept is present, in multiples of its mean; 0 where it is absent. float32 [B, C]."""
        generator = torch.Generator().manual_seed(self.seed)
        odd_D, odd_C, shift_C = (
            (2 * torch.randint(1 << 61, (count,), generator=generator) + 1).to(x_BMD.device)
            for count in (x_BMD.shape[2], len(self.direction_CD), len(self.direction_CD))
        )
        # bfloat16 is what stores hold, so the hash is the same before and after a row went through one.
        bits_BD = x_BMD[:, _BASE].contiguous().bfloat16().view(torch.int16).long()
        hash_BC = _mixed((bits_BD * odd_D).sum(1)[:, None] * odd_C + shift_C)
        is_present_BC = _uniform(hash_BC) < self.frequency
        factor_BC = 1 + _STRENGTH_SPREAD * (2 * _uniform(_mixed(hash_BC + 1)) - 1)
        return is_present_BC * factor_BC


def _mixed(hash_BC: Tensor) -> Tensor:
    """Spreads every bit over all others; int64 products wrap around."""
    hash_BC = (hash_BC ^ (hash_BC >> 29)) * _FIRST
    hash_BC = (hash_BC ^ (hash_BC >> 32)) * _SECOND
    return hash_BC ^ (hash_BC >> 30)


def _uniform(hash_BC: Tensor) -> Tensor:
    """Numbers in [0, 1) from the upper bits of a hash, float32."""
    return ((hash_BC >> (63 - _BITS)) & ((1 << _BITS) - 1)).double().div(1 << _BITS).float()


def directions(x_BD: Tensor, *, norm_C: Tensor, seed: int = 0) -> Tensor:
    """One direction [C, D] of each norm, float32: differences of random pairs of a model's own rows.

    Such directions lie where the activations vary. A random one in all dimensions would be easier to find than any real
    concept, since it lies where hardly anything else does.
    """
    generator = torch.Generator().manual_seed(seed)
    first_C, step_C = (
        torch.randint(low, len(x_BD), (len(norm_C),), generator=generator) for low in (0, min(1, len(x_BD) - 1))
    )
    difference_CD = x_BD[first_C].double() - x_BD[(first_C + step_C) % len(x_BD)].double()
    direction_CD: Tensor = torch.nn.functional.normalize(difference_CD, dim=1) * norm_C.double()[:, None]
    return direction_CD.float()
