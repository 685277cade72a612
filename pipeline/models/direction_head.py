"""The final norm and the unembedding of a model as one linear map of directions (numerics/logit_lens.py).

Both are read from what the modules do, not from their names. The norm is the model's own upper half with nothing left
of it but the norm; its gain is what it does to a vector of equal sizes and alternating signs, so that Gemma's 1 + w is
found as it is. The unembedding is asked for the rows of the identity, so that an adapter on it counts.

The trade-off: the unembedding is held a second time, in the model's dtype.

Shapes: L directions, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.models.decoder import LOGITS_PER_CHUNK, SplitDecoder
from pipeline.models.layerwise import at_layer
from pipeline.numerics.logit_lens import LinearNorm, lens_logits

_SIZE = 256.0
"""Of the probe's numbers: a norm's epsilon is nothing beside it."""
_LEAST_COSINE = 0.999
"""Of the norm's output on a random row and of the linear map's."""


class DirectionHead:
    """What directions of one model's residual stream add to its logits, to first order."""

    def __init__(self, decoder: SplitDecoder) -> None:
        """InputError where the model has no unembedding, or ends in more than a norm."""
        self.unembedding_DV = _unembedding(decoder)
        gain_D, is_centred = final_norm(decoder)
        self.norm = LinearNorm(gain_D.to(self.unembedding_DV.device), is_centred)

    def logits(self, direction_LD: Tensor, vocab_size: int) -> Tensor:
        """logits_LV of the first vocab_size ids, float32, with mean 0 over them."""
        columns = max(1, LOGITS_PER_CHUNK // len(self.unembedding_DV))
        return lens_logits(self.norm, self.unembedding_DV[:, :vocab_size], direction_LD, columns=columns)


@torch.no_grad()
def final_norm(decoder: SplitDecoder) -> LinearNorm:
    """What comes between the last layer and the unembedding; InputError where it is not a norm or nothing."""
    whole = at_layer(decoder, decoder.num_layers - 1)
    one_11 = torch.ones(1, 1, dtype=torch.int64)
    whole.lower(torch.zeros_like(one_11), one_11)  # shows what the layers return

    def ends_as(row_D: Tensor) -> Tensor:
        return whole.upper(row_D.expand(1, 1, -1), one_11)[0, 0].float()

    signs_D = 1.0 - 2.0 * (torch.arange(decoder.activation_dim) % 2)
    random_D = torch.randn(decoder.activation_dim, generator=torch.Generator().manual_seed(0))
    above_D, below_D, double_D = (ends_as(factor * _SIZE * signs_D) for factor in (1, -1, 2))
    if above_D.shape == signs_D.shape:
        signs_D, random_D = signs_D.to(above_D), random_D.to(above_D)
        gain_D, bias_D = (above_D - below_D) / 2 * signs_D, (above_D + below_D) / 2
        # A norm gives the same for twice the row; without one, twice as much comes out.
        is_norm = bool((double_D - above_D).norm() < above_D.norm() / 2)
        constant_D = ends_as(torch.full_like(signs_D, _SIZE)) - bias_D
        norm = LinearNorm(gain_D if is_norm else gain_D / _SIZE, bool(constant_D.norm() < gain_D.norm() / 2))
        found_D = ends_as(random_D * _SIZE) - bias_D
        if torch.cosine_similarity(found_D, norm(random_D), dim=0) > _LEAST_COSINE:
            return norm
    raise InputError(
        f"expected a model that ends in a norm of each row, got {type(decoder.base).__name__} "
        f"({decoder.base.config.name_or_path!r}), whose end changes directions otherwise; set analyses.logit_lens to "
        "null"
    )


@torch.no_grad()
def _unembedding(decoder: SplitDecoder) -> Tensor:
    """W_U as the model applies it, [D, V] in the model's dtype."""
    decoder.select()
    head: Any = decoder.model.get_output_embeddings()
    if head is None:
        raise InputError(
            f"expected a model with an unembedding, got {type(decoder.model).__name__} without one; set "
            "analyses.logit_lens to null"
        )
    weight = next(head.parameters())
    identity_DD = torch.eye(decoder.activation_dim, device=weight.device, dtype=weight.dtype)
    bias_V = head(torch.zeros_like(identity_DD[:1]))[0]
    rows = max(1, LOGITS_PER_CHUNK // decoder.vocab_size)
    return torch.cat([head(part_CD) - bias_V for part_CD in torch.split(identity_DD, rows)])
