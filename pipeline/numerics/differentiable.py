"""Autograd for the sparse encoder and decoder, on the kernels of training: no B x F numbers forwards or backwards.

The crosscoder takes these functions where something that it reads asks for gradients. Which latents are kept is a
choice and has none; the kept values have f = sum_m x^m . W_enc^m + b_enc.

Shapes: B rows, N = M * D, F latents, P active pairs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.kernels.base import Kernels, latent_order


def asks_for_gradients(*tensors: Tensor) -> bool:
    """Whether autograd would follow an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def with_gradients(
    codes: SparseCodes, x_BN: Tensor, W_enc_FN: Tensor, b_enc_F: Tensor, kernels: Kernels
) -> SparseCodes:
    """The same codes, with values that lead back to the rows and the encoder's weights."""
    values_P: Tensor = _Values.apply(x_BN, W_enc_FN, b_enc_F, codes, kernels)  # type: ignore[no-untyped-call]
    return codes._replace(values_P=values_P)


def decoded(codes: SparseCodes, W_dec_FN: Tensor, kernels: Kernels) -> Tensor:
    """xh_BN without bias, which leads back to the codes' values and the decoder's weights."""
    xh_BN: Tensor = _Decoded.apply(codes.values_P, W_dec_FN, codes, kernels)  # type: ignore[no-untyped-call]
    return xh_BN


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BN: Tensor, W_enc_FN: Tensor, b_enc_F: Tensor, codes: SparseCodes, kernels: Kernels
    ) -> Tensor:
        ctx.save_for_backward(x_BN, W_enc_FN)
        ctx.codes, ctx.kernels, ctx.bias_shape = codes, kernels, b_enc_F.shape
        return codes.values_P.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        x_BN, W_enc_FN = ctx.saved_tensors
        x_grad, weight_grad, bias_grad = None, None, None
        if ctx.needs_input_grad[0]:
            x_grad = ctx.kernels.decode(ctx.codes._replace(values_P=grad_P.contiguous()), W_enc_FN)
        if any(ctx.needs_input_grad[1:3]):
            order = latent_order(ctx.codes)
            sorted_P = grad_P[order.order_P]
            weight_grad = torch.empty_like(W_enc_FN)
            ctx.kernels.weight_gradients(order, sorted_P, x_BN.contiguous(), weight_grad)
            bias_grad = ctx.kernels.latent_sums(order, sorted_P)
        return x_grad, weight_grad, bias_grad, None, None


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_P: Tensor, W_dec_FN: Tensor, codes: SparseCodes, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(values_P, W_dec_FN)
        ctx.codes, ctx.kernels = codes._replace(values_P=values_P.detach()), kernels
        return kernels.decode(ctx.codes, W_dec_FN.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BN: Tensor) -> tuple[Tensor | None, ...]:
        values_P, W_dec_FN = ctx.saved_tensors
        grad_BN = grad_BN.contiguous()
        values_grad, weight_grad = None, None
        if ctx.needs_input_grad[0]:
            values_grad = ctx.kernels.value_gradients(ctx.codes, grad_BN, W_dec_FN)
        if ctx.needs_input_grad[1]:
            order = latent_order(ctx.codes)
            weight_grad = torch.empty_like(W_dec_FN)
            ctx.kernels.weight_gradients(order, values_P[order.order_P], grad_BN, weight_grad)
        return values_grad, weight_grad, None, None
