"""Gradients of the objective by all parameters, written by hand: no autograd graph over B x F numbers.

Two paths compute the same thing. `sparse_gradients` works on the selected pairs; its cost beyond the encoder's product
is proportional to the number of active pairs. `dense_gradients` is for codes too dense for that (the first steps of an
L1 run, small dictionaries): four matrix products. The tests hold both against autograd of the dense formula in float64.

Gradients of a rank are its share of the global mean: summing them over the data ranks gives the gradient of the whole
batch, whatever the number of ranks or blocks. Partial reconstructions are summed over the latent ranks here.

Shapes: B local rows, M models, D width, N = M * D, F latents of this rank, P active pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.numerics import moments
from pipeline.numerics.code_weight import add_code_weight_gradient, code_weights, decoder_norms
from pipeline.numerics.codes import SparseCodes, concatenate, count_true, pick, split_groups, split_models
from pipeline.numerics.kernels.base import Kernels, LatentOrder, latent_order
from pipeline.numerics.objective import LossGradient, Objective, auxiliary_loss, delta_loss, reconstruction_loss
from pipeline.numerics.parallel import Mesh, Pending
from pipeline.numerics.parameters import Parameters
from pipeline.numerics.sparsities.base import CodePenalty


class Setting(NamedTuple):
    """Where and how gradients are computed."""

    num_models: int
    """M."""
    kernels: Kernels
    mesh: Mesh
    group_ends: tuple[int, ...] = ()
    """Of this rank's latents, where the sparsity divides them into groups."""


class Encoded(NamedTuple):
    """Codes of the local rows."""

    codes: SparseCodes
    auxiliary: SparseCodes | None = None
    """The dead latents that explain the residual; None if nothing is dead."""
    preact_P: Tensor | None = None
    """Pre-activation of every pair, where a threshold is trained; see sparsities.base.Kept."""


class Losses(NamedTuple):
    """This rank's shares of the losses of a step, scalars, and what the metrics need."""

    reconstruction: Tensor
    penalty: Tensor
    auxiliary: Tensor
    num_active: Tensor
    """Active pairs of this rank."""
    fired_F: Tensor
    """bool: latents of this rank that fired on a local row."""
    residual: moments.Moments
    """Of the local rows' x - xh."""
    pending: Pending | None = None
    """The sum of the decoder's gradient over the data ranks, if it was begun while the encoder's was computed."""


class _Reconstructed(NamedTuple):
    """Both losses' shares, and their gradients by what the stacked pairs decode to."""

    reconstruction: Tensor
    auxiliary: Tensor
    table_RN: Tensor
    """dL/d(decoded) of B rows per group, and of B more for the auxiliary pairs if there are any."""
    residual: moments.Moments


def sparse_gradients(
    parameters: Parameters,
    x_BN: Tensor,
    *,
    encoded: Encoded,
    objective: Objective,
    setting: Setting,
    out: Parameters,
) -> Losses:
    """Overwrites out with this rank's share of the gradient; returns its share of the losses.

    The decoder's gradient is already being summed over the data ranks: `Losses.pending`.
    """
    codes, kernels = encoded.codes, setting.kernels
    stacked = _stack(encoded, setting.group_ends if objective.sparsity.is_nested else ())
    result = _reconstruct(
        parameters,
        x_BN,
        stacked=stacked,
        has_auxiliary=encoded.auxiliary is not None,
        objective=objective,
        setting=setting,
    )
    torch.sum(result.table_RN[: len(x_BN)], 0, out=out.b_dec_N)
    order = latent_order(stacked)
    _decoder_gradient(stacked, order, result.table_RN, out_FN=out.W_dec_FN, setting=setting)
    counted = stacked if encoded.auxiliary is None else codes
    sums_F = _code_sums(counted, order if counted is stacked else latent_order(codes), kernels)
    penalty = sums_F.new_zeros(())
    code_penalty = penalise_codes(parameters, out, sums_F=sums_F, objective=objective, setting=setting)
    pending = setting.mesh.start_sum(out.W_dec_FN, "data")
    grad_P = _value_gradients(parameters, stacked, result.table_RN, setting)
    if code_penalty is not None:
        penalty = code_penalty.loss
        grad_P = grad_P + codes.of_latents(code_penalty.grad_code_F)
    if encoded.preact_P is not None:
        assert parameters.log_threshold_F is not None and out.log_threshold_F is not None
        penalty, grad_P, grad_threshold_P = objective.sparsity.threshold_gradients(
            codes,
            encoded.preact_P,
            grad_P=grad_P,
            log_threshold_F=parameters.log_threshold_F,
            scale=objective.penalty / objective.num_rows,
        )
        out.log_threshold_F.copy_(kernels.latent_sums(order, pick(grad_threshold_P, order.order_P)))
    coefficients_P = pick(grad_P, order.order_P)
    if stacked is not codes:
        order = order._replace(rows_P=order.rows_P % len(x_BN))
    kernels.weight_gradients(order, coefficients_P, x_BN, out.W_enc_FN)
    out.b_enc_F.copy_(kernels.latent_sums(order, coefficients_P))
    num_active = count_true(codes.values_P > 0)
    return Losses(result.reconstruction, penalty, result.auxiliary, num_active, sums_F > 0, result.residual, pending)


def _code_sums(codes: SparseCodes, order: LatentOrder, kernels: Kernels) -> Tensor:
    """sum_i f_ij per latent; in a fixed order, so that two runs agree to the last bit."""
    return kernels.latent_sums(order, pick(codes.values_P, order.order_P))


def _stack(encoded: Encoded, group_ends: tuple[int, ...]) -> SparseCodes:
    """The pairs of all losses as one batch: B rows per group that reconstructs by itself (() for one that holds all
    latents), then B more that hold the auxiliary pairs, if there are any.
    """
    codes, auxiliary = encoded.codes, encoded.auxiliary
    codes = split_groups(codes, group_ends) if len(group_ends) > 1 else codes
    if auxiliary is None:
        return codes
    if codes.model_mask_PM is not None:
        every = codes.model_mask_PM.new_ones(auxiliary.num_pairs, codes.model_mask_PM.shape[1])
        auxiliary = auxiliary._replace(model_mask_PM=every)
    return concatenate([codes, auxiliary])


def _reconstruct(
    parameters: Parameters,
    x_BN: Tensor,
    *,
    stacked: SparseCodes,
    has_auxiliary: bool,
    objective: Objective,
    setting: Setting,
) -> _Reconstructed:
    """Decodes, and takes the gradients of all losses by what was decoded."""
    decoded_RN = setting.mesh.sum_(_decode(stacked, parameters.W_dec_FN, setting), "latent")
    num_rows = len(x_BN)
    num_groups = len(decoded_RN) // num_rows - has_auxiliary
    target_BN = x_BN - parameters.b_dec_N
    if num_groups == 1:
        residual_BMD = torch.sub(target_BN, decoded_RN[:num_rows]).view(num_rows, setting.num_models, -1)
        loss, grad_BMD = _losses(residual_BMD, objective)
    else:
        loss, grad_BMD, residual_BMD = _nested_losses(target_BN, decoded_RN, num_groups, objective, setting.num_models)
    spread = moments.moments_of(residual_BMD)
    if not has_auxiliary:
        return _Reconstructed(loss, loss.new_zeros(()), grad_BMD.flatten(1), spread)
    explained_BMD = decoded_RN[num_groups * num_rows :].view_as(residual_BMD)
    variation = moments.all_reduce(spread, setting.mesh).square_M.sum()
    auxiliary = auxiliary_loss(residual_BMD, explained_BMD, weight=objective.aux_weight, variation=variation)
    table_RN = torch.cat([grad_BMD, auxiliary.grad_BMD]).flatten(1)
    return _Reconstructed(loss, auxiliary.loss, table_RN, spread)


def _losses(residual_BMD: Tensor, objective: Objective, num_groups: int = 1) -> LossGradient:
    """What the reconstruction costs; the mean over num_groups reconstructions, which follow each other as rows."""
    num_rows = objective.num_rows * num_groups
    loss, grad_BMD = reconstruction_loss(residual_BMD, objective.reconstruction, num_rows)
    weight = objective.sparsity.delta_weight
    if weight == 0:
        return LossGradient(loss, grad_BMD)
    delta = delta_loss(residual_BMD, objective.reconstruction, num_rows, weight=weight)
    return LossGradient(loss + delta.loss, grad_BMD + delta.grad_BMD)


def _nested_losses(
    target_BN: Tensor, decoded_RN: Tensor, num_groups: int, objective: Objective, num_models: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss of the reconstructions by the first group, the first two, and so on.

    Returns it, its gradient by what each group decodes to (B rows per group; a group takes part in its own and in all
    later reconstructions), and the residual_BMD of all latents.
    """
    num_rows = len(target_BN)
    decoded_GBN = decoded_RN[: num_groups * num_rows].view(num_groups, num_rows, -1).cumsum(0)
    residual_RMD = (target_BN - decoded_GBN).view(num_groups * num_rows, num_models, -1)
    loss, grad_RMD = _losses(residual_RMD, objective, num_groups)
    grad_GBN = grad_RMD.view_as(decoded_GBN).flip(0).cumsum(0).flip(0)
    return loss, grad_GBN.view_as(residual_RMD), residual_RMD[-num_rows:]


def _decode(codes: SparseCodes, W_dec_FN: Tensor, setting: Setting) -> Tensor:
    if codes.model_mask_PM is None:
        return setting.kernels.decode(codes, W_dec_FN)
    matrix = W_dec_FN.view(len(W_dec_FN) * setting.num_models, -1)
    per_model = setting.kernels.decode(split_models(codes).codes, matrix)
    return per_model.view(codes.num_rows, -1)


def _value_gradients(parameters: Parameters, codes: SparseCodes, table_RN: Tensor, setting: Setting) -> Tensor:
    if codes.model_mask_PM is None:
        return setting.kernels.value_gradients(codes, table_RN, parameters.W_dec_FN)
    split, pairs = split_models(codes)
    width = table_RN.shape[1] // setting.num_models
    grad_split = setting.kernels.value_gradients(split, table_RN.view(-1, width), parameters.W_dec_FN.view(-1, width))
    return table_RN.new_zeros(codes.num_pairs).index_add_(0, pairs, grad_split)


def _decoder_gradient(
    codes: SparseCodes, order: LatentOrder, table_RN: Tensor, *, out_FN: Tensor, setting: Setting
) -> None:
    if codes.model_mask_PM is not None:
        codes = split_models(codes).codes
        order = latent_order(codes)
        width = table_RN.shape[1] // setting.num_models
        table_RN, out_FN = table_RN.view(-1, width), out_FN.view(-1, width)
    setting.kernels.weight_gradients(order, pick(codes.values_P, order.order_P), table_RN, out_FN)


def penalise_codes(
    parameters: Parameters, out: Parameters, *, sums_F: Tensor, objective: Objective, setting: Setting
) -> CodePenalty | None:
    """The sparsity's penalty on codes, if it has one; adds its gradient through the code weights to out.W_dec_FN."""
    if not objective.sparsity.penalises_codes or objective.penalty == 0:
        return None
    W_dec_FMD = parameters.W_dec_FN.view(len(sums_F), setting.num_models, -1)
    norm_FM = decoder_norms(W_dec_FMD)
    weight_F = code_weights(norm_FM, objective.code_weight)
    scale = objective.penalty / objective.num_rows
    penalty = objective.sparsity.code_penalty(sums_F, weight_F, scale=scale, group_ends=setting.group_ends)
    add_code_weight_gradient(
        out.W_dec_FN.view_as(W_dec_FMD),
        W_dec_FMD,
        norm_FM,
        grad_w_F=penalty.grad_weight_F,
        kind=objective.code_weight,
    )
    return penalty


def sum_over_ranks(losses: Losses, gradients: Parameters, mesh: Mesh) -> Tensor:
    """Global reconstruction, penalty and auxiliary loss and number of active pairs, float64 [4].

    Sums the gradients over the data ranks in place. Latent ranks hold equal shares of the losses that they computed
    together.
    """
    share = 1 / mesh.latent_size
    totals = torch.stack(
        [
            losses.reconstruction.double() * share,
            losses.penalty.double(),
            losses.auxiliary.double() * share,
            losses.num_active.double(),
        ]
    )
    mesh.sum_(totals, "world")
    if mesh.data_size > 1:
        _sum_over_data(losses, gradients, mesh)
    return totals


def _sum_over_data(losses: Losses, gradients: Parameters, mesh: Mesh) -> None:
    """Sums gradients and joins the fired latents over the data ranks, the small tensors in one message."""
    mesh.sum_(gradients.W_enc_FN, "data")
    small = [tensor for tensor in gradients.tensors() if tensor.ndim == 1]
    packed = mesh.sum_(torch.cat([*small, losses.fired_F.to(small[0].dtype)]), "data")
    *sums, fired_F = torch.split(packed, [len(tensor) for tensor in [*small, losses.fired_F]])
    for tensor, total in zip(small, sums, strict=True):
        tensor.copy_(total)
    losses.fired_F.copy_(fired_F > 0)
    if losses.pending is None:
        mesh.sum_(gradients.W_dec_FN, "data")
    else:
        losses.pending.wait()
