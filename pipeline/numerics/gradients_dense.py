"""The same gradients as gradients.py by dense matrix products, for codes that are not sparse yet.

A new L1 or JumpReLU run starts with about half of all codes active; gathering pairs then costs more than multiplying
zeros. Works block by block on the pre-activations that the encoder just wrote, and turns them into codes in place. The
trade-off: two B x F blocks of memory and four matrix products, independent of how sparse the codes are.

Shapes: B rows of the block, M models, N = M * D, F latents of this rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.numerics import moments
from pipeline.numerics.codes import count_true
from pipeline.numerics.gradients import Losses, Setting, penalise_codes
from pipeline.numerics.objective import Objective, reconstruction_loss
from pipeline.numerics.parameters import Parameters


class Block(NamedTuple):
    """A block of rows' pre-activations and the memory to work in; both are used up."""

    preact_BF: Tensor
    scratch_BF: Tensor
    is_first: bool
    """Whether this block overwrites the gradient instead of adding to it."""


def dense_gradients(
    parameters: Parameters,
    x_BN: Tensor,
    *,
    block: Block,
    objective: Objective,
    setting: Setting,
    out: Parameters,
) -> Losses:
    """Adds a block's share of the gradient to out, or overwrites out with the first block's.

    The penalty's gradient through the code weights is included, so blocks simply add up.
    """
    sparsity, is_first = objective.sparsity, block.is_first
    codes = sparsity.dense_codes(block.preact_BF, parameters.log_threshold_F)
    decoded_BN = setting.mesh.sum_(codes.code_BF @ parameters.W_dec_FN, "latent")
    residual_BMD = torch.sub(x_BN - parameters.b_dec_N, decoded_BN).view(len(x_BN), setting.num_models, -1)
    loss, grad_BMD = reconstruction_loss(residual_BMD, objective.reconstruction, objective.num_rows)
    grad_BN = grad_BMD.flatten(1)
    beta = 0.0 if is_first else 1.0
    torch.addmm(out.W_dec_FN, codes.code_BF.T, grad_BN, beta=beta, out=out.W_dec_FN)
    _accumulate(out.b_dec_N, grad_BN.sum(0), is_first)
    penalty, sums_F = loss.new_zeros(()), _line_sums(codes.code_BF)
    constant_F = torch.zeros_like(sums_F)
    num_active = count_true(codes.code_BF > 0)
    code_penalty = penalise_codes(parameters, out, sums_F=sums_F, objective=objective, setting=setting)
    if code_penalty is not None:
        penalty, constant_F = code_penalty.loss, code_penalty.grad_code_F
    grad_BF = torch.addmm(constant_F, grad_BN, parameters.W_dec_FN.T, out=block.scratch_BF)
    if codes.near_BF is not None:
        assert parameters.log_threshold_F is not None and out.log_threshold_F is not None
        penalty, grad_threshold_F = sparsity.dense_threshold_gradients(
            codes,
            grad_BF=grad_BF,
            num_active=num_active,
            log_threshold_F=parameters.log_threshold_F,
            scale=objective.penalty / objective.num_rows,
        )
        _accumulate(out.log_threshold_F, grad_threshold_F, is_first)
    # Zero where the code is zero, in place.
    torch.ops.aten.threshold_backward.grad_input(grad_BF, codes.code_BF, 0, grad_input=grad_BF)
    torch.addmm(out.W_enc_FN, grad_BF.T, x_BN, beta=beta, out=out.W_enc_FN)
    _accumulate(out.b_enc_F, _line_sums(grad_BF), is_first)
    residual = moments.moments_of(residual_BMD)
    return Losses(loss, penalty, loss.new_zeros(()), num_active, sums_F > 0, residual)


def _line_sums(values_BF: Tensor) -> Tensor:
    """Sums over rows, as a matrix product: torch's own reduction over the outer axis is several times slower on CPU."""
    return values_BF.new_ones(len(values_BF)) @ values_BF


def _accumulate(total: Tensor, part: Tensor, is_first: bool) -> None:
    if is_first:
        total.copy_(part)
    else:
        total.add_(part)


def merge_losses(parts: list[Losses]) -> Losses:
    """The losses of consecutive blocks as those of all their rows."""
    total = parts[0]
    for part in parts[1:]:
        total = Losses(
            total.reconstruction + part.reconstruction,
            total.penalty + part.penalty,
            total.auxiliary + part.auxiliary,
            total.num_active + part.num_active,
            total.fired_F | part.fired_F,
            total.residual.merge(part.residual),
        )
    return total
