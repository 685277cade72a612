"""How far two forwards of one model may differ because numbers are rounded, and how far they do.

Shapes: T positions, D numbers compared at each.
"""

import torch
from torch import Tensor

ROUNDING = {
    torch.float64: 1e-8,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 8e-2,
}
"""Largest |ours - plain| / |plain| of a row that rounding explains, by the model's dtype."""


def relative_errors(ours_TD: Tensor, plain_TD: Tensor) -> Tensor:
    """|ours - plain| / |plain| per position; 0 where the plain forward overflows, infinite where ours alone does."""
    ours_TD = ours_TD.to(plain_TD.device)
    tiny = torch.finfo(plain_TD.dtype).tiny
    error_T: Tensor = (ours_TD - plain_TD).norm(dim=-1) / plain_TD.norm(dim=-1).clamp_min(tiny)
    error_T = error_T.masked_fill(~ours_TD.isfinite().all(dim=-1), float("inf"))
    return error_T.masked_fill(~plain_TD.isfinite().all(dim=-1), 0.0).cpu()
