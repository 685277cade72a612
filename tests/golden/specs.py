"""Small crosscoders and rows for them: one of each sparsity, of a difference, with dedicated latents.

Rows come from numpy, whose streams are the same in every version. Torch and numpy alone, so that tests/bare.py can
train them too.
"""

from typing import Any

import numpy as np
import torch

from pipeline.numerics.sparsities.registry import SPARSITIES
from pipeline.numerics.spec import CrosscoderSpec

NUM_STEPS = 40
NUM_ROWS, NUM_MODELS, DIM, NUM_LATENTS, NUM_CONCEPTS = 64, 2, 12, 48, 30

_BATCH_TOPK: dict[str, Any] = {
    "k": 4,
    "k_start": 8,
    "k_anneal_steps": 10,
    "threshold_start_step": 5,
    "threshold_decay": 0.9,
    "dead_after_rows": 6 * NUM_ROWS,
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "l1": ("l1", {"mu": 0.05, "mu_warmup_steps": 10}, {"init_norm": 0.1}),
    "batch_topk": ("batch_topk", _BATCH_TOPK, {}),
    "topk": ("topk", {"k": 4, "dead_after_rows": 6 * NUM_ROWS}, {}),
    "jumprelu": ("jumprelu", {"mu": 0.01, "bandwidth": 0.1, "initial_threshold": 0.1}, {}),
    "difference": ("batch_topk", _BATCH_TOPK, {"inputs": "difference"}),
    "dedicated": ("batch_topk", _BATCH_TOPK, {"dedicated_frac": 0.125}),
    "decoupled mse": ("batch_topk", _BATCH_TOPK, {"code_weight": "decoupled", "reconstruction": "mse"}),
}
"""The sparsity, its settings, and the other settings."""


def make_spec(case: str, *, dtype: str = "float32", kernels: str = "auto") -> CrosscoderSpec:
    """The spec of one case."""
    kind, sparsity, settings = CASES[case]
    return CrosscoderSpec(
        num_models=NUM_MODELS,
        activation_dim=DIM,
        num_latents=NUM_LATENTS,
        num_steps=NUM_STEPS,
        lr=1e-2,
        lr_warmup_steps=5,
        lr_decay_frac=0.25,
        dtype=dtype,
        kernels=kernels,
        sparsity=SPARSITIES[kind](**sparsity),
        **settings,
    )


def make_rows(step: int) -> torch.Tensor:
    """x_BMD in float64: a few concepts of each row, a third of them only in the second model."""
    directions = np.random.default_rng(0).normal(size=(NUM_CONCEPTS, NUM_MODELS, DIM))
    directions[::3, 0] = 0
    generator = np.random.default_rng([1, step])
    strength = generator.random((NUM_ROWS, NUM_CONCEPTS)) * (generator.random((NUM_ROWS, NUM_CONCEPTS)) < 0.1)
    noise = 0.05 * generator.normal(size=(NUM_ROWS, NUM_MODELS, DIM))
    return torch.from_numpy(np.einsum("bc,cmd->bmd", strength, directions) + noise + 0.1)
