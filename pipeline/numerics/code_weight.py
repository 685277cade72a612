"""What a latent costs: its code weight, a function of the decoder norms alone.

The code weight w_j turns a code f_ij into the score v_ij = f_ij w_j that BatchTopK compares and the L1 penalty sums
(arXiv 2504.02922, section 2). The penalty's gradient passes through it, the selection's does not. Rows play no part.

Shapes: M models, D width, F latents, N = M * D.
"""

import torch
from torch import Tensor

from pipeline.numerics.settings import CODE_WEIGHTS, check_choice

MIXED_SHARE = 0.1
"""Share of the crosscoder weight in `mixed`."""


def decoder_norms(W_dec_FMD: Tensor) -> Tensor:
    """|d_j^m|, [F, M]."""
    norm_FM: Tensor = torch.linalg.vector_norm(W_dec_FMD, dim=2)
    return norm_FM


def code_weights(norm_FM: Tensor, kind: str) -> Tensor:
    """w_j, [F], from the decoder norms. `decoupled` costs what `crosscoder` costs; its scores are per model."""
    check_choice("code_weight", kind, CODE_WEIGHTS)
    if kind == "none":
        return torch.ones_like(norm_FM[:, 0])
    if kind in ("crosscoder", "decoupled"):
        return norm_FM.sum(1)
    both_F: Tensor = torch.linalg.vector_norm(norm_FM, dim=1)
    return both_F if kind == "sae" else both_F + MIXED_SHARE * norm_FM.sum(1)


def add_code_weight_gradient(
    grad_W_FMD: Tensor, W_dec_FMD: Tensor, norm_FM: Tensor, *, grad_w_F: Tensor, kind: str
) -> None:
    """Adds dL/dw_j * dw_j/dd_j^m to grad_W_FMD in place; a decoder row of norm 0 gets the subgradient 0."""
    if kind == "none":
        return
    per_model_FM = torch.where(norm_FM > 0, 1 / norm_FM, 0.0)
    if kind in ("sae", "mixed"):
        both_F1 = torch.linalg.vector_norm(norm_FM, dim=1, keepdim=True)
        share = MIXED_SHARE if kind == "mixed" else 0.0
        per_model_FM = share * per_model_FM + torch.where(both_F1 > 0, 1 / both_F1, 0.0)
    grad_W_FMD.addcmul_(W_dec_FMD, (grad_w_F[:, None] * per_model_FM)[:, :, None])
