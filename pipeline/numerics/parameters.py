"""The tensors that training changes, on one rank.

Shapes: N = M * D, F latents of this rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Parameters(NamedTuple):
    """Trained tensors, or their gradients."""

    W_enc_FN: Tensor
    b_enc_F: Tensor
    W_dec_FN: Tensor
    b_dec_N: Tensor
    log_threshold_F: Tensor | None = None
    """Log of every latent's threshold, where the sparsity trains one (JumpReLU)."""

    def tensors(self) -> list[Tensor]:
        """The tensors that exist, in field order."""
        return [tensor for tensor in self if tensor is not None]

    def empty_like(self) -> "Parameters":
        """Uninitialised tensors of the same shapes."""
        return Parameters(*(None if tensor is None else torch.empty_like(tensor) for tensor in self))  # type: ignore[arg-type]
