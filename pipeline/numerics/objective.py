"""The losses of a crosscoder, their gradients by the reconstruction, and the numbers that define a step's objective.

Reconstruction (mean over rows and models of the unsquared L2 norm, or of the squared one), the same of the models'
difference where a sparsity asks for it, and the auxiliary loss that lets dead latents explain the residual (arXiv
2504.02922, section 2 and appendix; weight 1/32). Gradients by weights are
in gradients.py. Losses are means over the rows of the global batch: a rank returns its share, and shares add up.

Shapes: B local rows, M models, D width.
"""

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from pipeline.numerics.settings import Reconstruction, check_choice
from pipeline.numerics.sparsities.base import Sparsity


class Objective(NamedTuple):
    """The numbers of one step's loss."""

    sparsity: Sparsity
    code_weight: str
    reconstruction: str
    num_rows: int
    """Rows of the global batch, what every mean is taken over."""
    penalty: float = 0.0
    """Weight of the sparsity's penalty at this step."""
    aux_weight: float = 0.0


class LossGradient(NamedTuple):
    """A rank's share of a loss, and its gradient."""

    loss: Tensor
    """Scalar."""
    grad_BMD: Tensor
    """dL/d(reconstruction)."""


def reconstruction_loss(residual_BMD: Tensor, kind: str, num_rows: int) -> LossGradient:
    """Share of the reconstruction loss of these rows, residual = x - xh; num_rows counts the global batch.

    l2: sum |r_im| / (num_rows M), gradient -r / (|r| num_rows M), and 0 where the residual is exactly 0.
    mse: sum |r_im|^2 / (num_rows M). NaN in a residual stays NaN in the loss.
    """
    check_choice("reconstruction", kind, get_args(Reconstruction))
    scale = 1.0 / (num_rows * residual_BMD.shape[1])
    if kind == "mse":
        return LossGradient(residual_BMD.square().sum() * scale, residual_BMD * (-2 * scale))
    norm_BM = torch.linalg.vector_norm(residual_BMD, dim=2, keepdim=True)
    tiny = torch.finfo(norm_BM.dtype).tiny
    return LossGradient(norm_BM.sum() * scale, residual_BMD * (-scale / norm_BM.clamp(min=tiny)))


def delta_loss(residual_BMD: Tensor, kind: str, num_rows: int, *, weight: float) -> LossGradient:
    """Share of weight times the reconstruction loss of the difference x^1 - x^0 of two models, as one activation."""
    loss, grad_BMD = reconstruction_loss(residual_BMD[:, 1:] - residual_BMD[:, :1], kind, num_rows)
    return LossGradient(weight * loss, torch.cat([-weight * grad_BMD, weight * grad_BMD], dim=1))


def auxiliary_loss(residual_BMD: Tensor, explained_BMD: Tensor, *, weight: float, variation: Tensor) -> LossGradient:
    """Share of weight * sum |residual - explained|^2 / variation, with the residual taken as a constant.

    explained is what the dead latents reconstruct (no bias), the gradient is by it. variation is the residual's summed
    squared deviation from its mean over the global batch; a residual that does not vary gives 0.
    """
    scale = torch.where(variation > 0, weight / variation, 0.0).to(residual_BMD.dtype)
    gap_BMD = explained_BMD - residual_BMD
    return LossGradient(gap_BMD.square().sum() * scale, gap_BMD * (2 * scale))
