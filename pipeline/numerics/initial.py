"""The weights that training starts from: a function of the spec alone.

Directions are drawn block by block, each block of latents from a generator of its own, so a rank that holds some of
the latents draws no others and gets the same numbers. All models share a direction and the encoder starts as the
decoder's transpose (arXiv 2504.02922, section 2).

Shapes: M models, D width, N = M * D, F latents of this rank.
"""

import math

import torch
from torch import Tensor

from pipeline.numerics.parameters import Parameters
from pipeline.numerics.recipes import fixed_rows, zero_fixed_rows
from pipeline.numerics.spec import CrosscoderSpec

_BLOCK_LATENTS = 1024
"""Latents that share a generator; another number gives other weights for the same seed."""


def initial_parameters(spec: CrosscoderSpec, latents: slice, device: torch.device) -> Parameters:
    """Weights of the latents in `latents`: decoder rows of norm start_norm per model, encoder equal, biases 0.

    Rows that a dedicated latent does not have are 0.
    """
    dtype = getattr(torch, spec.dtype)
    direction_FD = torch.cat(
        [
            _directions(spec, block)[max(latents.start - block, 0) : latents.stop - block]
            for block in range(latents.start // _BLOCK_LATENTS * _BLOCK_LATENTS, latents.stop, _BLOCK_LATENTS)
        ]
    )
    W_dec_FN = (spec.start_norm * direction_FD).to(device, dtype).repeat(1, spec.fitted_models)
    log_threshold_F, threshold = None, spec.sparsity.initial_threshold
    if threshold is not None:
        log_threshold_F = torch.full((len(W_dec_FN),), math.log(threshold), dtype=dtype, device=device)
    zero_fixed_rows(W_dec_FN, fixed_rows(spec, latents))
    bias_F, bias_N = W_dec_FN.new_zeros(len(W_dec_FN)), W_dec_FN.new_zeros(W_dec_FN.shape[1])
    return Parameters(W_dec_FN.clone(), bias_F, W_dec_FN, bias_N, log_threshold_F)


def _directions(spec: CrosscoderSpec, block: int) -> Tensor:
    """Unit directions [_BLOCK_LATENTS, D] of the latents from `block` on; drawn on CPU so that devices agree."""
    generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + block)
    direction_FD = torch.randn(_BLOCK_LATENTS, spec.activation_dim, dtype=torch.float32, generator=generator)
    return torch.nn.functional.normalize(direction_FD, dim=1)
