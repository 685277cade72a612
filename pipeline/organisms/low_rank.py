"""LoRA of the demo pair's models: each weight matrix of the layers plus a product of two thin ones (arXiv 2106.09685).

The thin matrices alone are trained; afterwards the products are added to the weights, so that what is saved is a model
like any other. Embeddings, which are the unembedding too, and norms stay those of the base model.

Shapes: O outputs, I inputs, R rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """W + up down; up starts at 0, so that training starts at the base model."""

    def __init__(self, weight_OI: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight_OI.shape
        self.down_RI = nn.Parameter(torch.randn(rank, inputs, generator=generator) * inputs**-0.5)
        self.up_OR = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight_OI: Tensor) -> Tensor:
        """The weight that the model uses."""
        return weight_OI + self.up_OR @ self.down_RI


@contextmanager
def low_rank(layers: nn.Module, rank: int, generator: torch.Generator) -> Iterator[None]:
    """Within the block every matrix of the layers is W + up down with W frozen; afterwards it is their sum.

    Freezes nothing beside these matrices; the caller freezes the rest of its model.
    """
    linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        linear.weight.requires_grad_(False)
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank, generator))
    try:
        yield
    finally:
        for linear in linears:
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
