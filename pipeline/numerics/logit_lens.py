"""The logit lens of directions: which tokens a direction of the residual stream promotes and suppresses.

    logits(d) = W_U (g * d),  less their mean over the vocabulary          (d - mean(d) in place of d for a LayerNorm)

g is the gain of the model's final norm, W_U its unembedding. The norm also divides every row by the row's own size. A
direction has no such size: what it adds to the logits of a row is logits(d) over the size of that row, one positive
factor for all tokens. So only the gain is applied, as when a norm's gain is folded into the unembedding (arXiv
2401.12181); the map is linear, and logits of two models can be subtracted. For one direction the tokens and their order
are those of the plain logit lens, which divides by the direction's own size (arXiv 2510.13900). A constant on all
logits changes no probability, hence the mean taken off. Biases and soft-capping belong to rows and are left out.

Shapes: L directions, D width, V vocabulary, N tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LinearNorm(NamedTuple):
    """What a norm does to a direction, the division by a row's size aside."""

    gain_D: Tensor
    """Factor of each coordinate, float32."""
    is_centred: bool
    """Whether the mean over coordinates is taken off first, as LayerNorm does."""

    def __call__(self, direction_LD: Tensor) -> Tensor:
        """The normed directions, float32."""
        direction_LD = direction_LD.to(self.gain_D)
        if self.is_centred:
            direction_LD = direction_LD - direction_LD.mean(-1, keepdim=True)
        return direction_LD * self.gain_D


class TopTokens(NamedTuple):
    """Tokens of the largest or the smallest logits, the most extreme first."""

    ids_LN: Tensor
    logits_LN: Tensor


def lens_logits(norm: LinearNorm, unembedding_DV: Tensor, direction_LD: Tensor, *, columns: int = 8192) -> Tensor:
    """logits_LV of directions, float32, with mean 0 over the vocabulary.

    columns: of the unembedding that are held in float32 at the same time.
    """
    normed_LD = norm(direction_LD.to(unembedding_DV.device))
    logits_LV = torch.cat(
        [normed_LD @ part_DC.float() for part_DC in torch.split(unembedding_DV, columns, dim=1)], dim=1
    )
    return logits_LV - logits_LV.mean(-1, keepdim=True)


def top_tokens(logits_LV: Tensor, number: int) -> tuple[TopTokens, TopTokens]:
    """The most promoted and the most suppressed tokens of each direction, at most the vocabulary."""
    number = min(number, logits_LV.shape[1])
    highest, lowest = (logits_LV.topk(number, dim=1, largest=largest) for largest in (True, False))
    return TopTokens(highest.indices, highest.values), TopTokens(lowest.indices, lowest.values)
