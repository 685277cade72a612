"""A crosscoder small enough to train dozens of times in a test, and rows for it."""

import dataclasses

import torch
from torch import Tensor

from pipeline.numerics.spec import CrosscoderSpec

M, D, F, B = 2, 8, 32, 24


def make_spec(**changes: object) -> CrosscoderSpec:
    """BatchTopK whose warm-up, threshold and decay all happen within a few steps."""
    spec = CrosscoderSpec(
        num_models=M,
        activation_dim=D,
        num_latents=F,
        num_steps=40,
        k=3,
        lr=1e-2,
        lr_warmup_steps=5,
        threshold_start_step=5,
        threshold_decay=0.5,
    )
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


def rows(seed: int, num_rows: int = B) -> Tensor:
    """x_BMD of independent normal numbers."""
    return torch.randn(num_rows, M, D, generator=torch.Generator().manual_seed(seed))
