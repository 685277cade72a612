"""Noise on a model's weights: a chat model with nothing new in it, for a pair whose right verdict is known.

A control. Every matrix gets Gaussian noise relative to its own size. Vectors (biases, weights of norms) stay as they
are, because noise on an RMS norm would change the scale of the stream.
"""

import hashlib

import torch
from torch import nn


@torch.no_grad()
def add_weight_noise(model: nn.Module, *, scale: float, seed: int) -> None:
    """Adds scale * rms(W) * N(0, 1) to every matrix W of a model, in place.

    Drawn in float32 per parameter from seed and its name, then rounded to the weights' dtype; the same model, scale and
    seed give the same weights on every machine and in every order of loading.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        size = parameter.float().square().mean().sqrt()
        parameter.copy_(parameter.float() + scale * size * noise)
