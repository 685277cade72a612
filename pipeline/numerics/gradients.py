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
from pipeline.numerics.codes import SparseCodes, concatenate, count_true, pick, split_models
from pipeline.numerics.kernels.base import Kernels, LatentOrder, latent_order
from pipeline.numerics.objective import Objective, auxiliary_loss, reconstruction_loss
from pipeline.numerics.parallel import Mesh, Pending
from pipeline.numerics.parameters import Parameters
from pipeline.numerics.sparsities.base import CodePenalty


class Setting(NamedTuple):
    """Where and how gradients are computed."""

    num_models: int
    """M."""
    kernels: Kernels
    mesh: Mesh


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
    """dL/d(decoded) of B rows, and of B more for the auxiliary pairs if there are any."""
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
    stacked = _stack(encoded)
    result = _reconstruct(parameters, x_BN, encoded=encoded, objective=objective, setting=setting)
    torch.sum(result.table_RN[: len(x_BN)], 0, out=out.b_dec_N)
    order = latent_order(stacked)
    _decoder_gradient(stacked, order, result.table_RN, out_FN=out.W_dec_FN, setting=setting)
    sums_F = _code_sums(codes, order if encoded.auxiliary is None else latent_order(codes), kernels)
    penalty = sums_F.new_zeros(())
    code_penalty = penalise_codes(parameters, out, sums_F=sums_F, objective=objective, num_models=setting.num_models)
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
    if encoded.auxiliary is not None:
        order = order._replace(rows_P=order.rows_P % len(x_BN))
    kernels.weight_gradients(order, coefficients_P, x_BN, out.W_enc_FN)
    out.b_enc_F.copy_(kernels.latent_sums(order, coefficients_P))
    num_active = count_true(codes.values_P > 0)
    return Losses(result.reconstruction, penalty, result.auxiliary, num_active, sums_F > 0, result.residual, pending)


def _code_sums(codes: SparseCodes, order: LatentOrder, kernels: Kernels) -> Tensor:
    """sum_i f_ij per latent; in a fixed order, so that two runs agree to the last bit."""
    return kernels.latent_sums(order, pick(codes.values_P, order.order_P))


def _stack(encoded: Encoded) -> SparseCodes:
    """The pairs of both losses as one batch: B rows, then B more that hold the auxiliary pairs, if there are any."""
    codes, auxiliary = encoded.codes, encoded.auxiliary
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
    encoded: Encoded,
    objective: Objective,
    setting: Setting,
) -> _Reconstructed:
    """Decodes, and takes the gradients of both losses by what was decoded."""
    decoded_RN = setting.mesh.sum_(_decode(_stack(encoded), parameters.W_dec_FN, setting), "latent")
    residual_BMD = torch.sub(x_BN - parameters.b_dec_N, decoded_RN[: len(x_BN)]).view(len(x_BN), setting.num_models, -1)
    loss, grad_BMD = reconstruction_loss(residual_BMD, objective.reconstruction, objective.num_rows)
    spread = moments.moments_of(residual_BMD)
    if encoded.auxiliary is None:
        return _Reconstructed(loss, loss.new_zeros(()), grad_BMD.flatten(1), spread)
    explained_BMD = decoded_RN[len(x_BN) :].view_as(residual_BMD)
    variation = moments.all_reduce(spread, setting.mesh).square_M.sum()
    auxiliary = auxiliary_loss(residual_BMD, explained_BMD, weight=objective.aux_weight, variation=variation)
    table_RN = torch.cat([grad_BMD, auxiliary.grad_BMD]).flatten(1)
    return _Reconstructed(loss, auxiliary.loss, table_RN, spread)


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
    parameters: Parameters, out: Parameters, *, sums_F: Tensor, objective: Objective, num_models: int
) -> CodePenalty | None:
    """The sparsity's penalty on codes, if it has one; adds its gradient through the code weights to out.W_dec_FN."""
    if not objective.sparsity.penalises_codes or objective.penalty == 0:
        return None
    W_dec_FMD = parameters.W_dec_FN.view(len(sums_F), num_models, -1)
    norm_FM = decoder_norms(W_dec_FMD)
    weight_F = code_weights(norm_FM, objective.code_weight)
    penalty = objective.sparsity.code_penalty(sums_F, weight_F, scale=objective.penalty / objective.num_rows)
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
