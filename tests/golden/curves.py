"""Loss curves of small crosscoders: one of each sparsity, of a difference, with dedicated latents.

Rows come from numpy, whose streams are the same in every version, and everything runs on one thread. In float32 with
the kernels that a CPU run takes, in float64 with the reference.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch

from pipeline.numerics.spec import CrosscoderSpec
from pipeline.numerics.trainer import CrosscoderTrainer

NUM_STEPS = 40
NUM_ROWS, NUM_MODELS, DIM, NUM_LATENTS, NUM_CONCEPTS = 64, 2, 12, 48, 30
METRICS = ("loss", "loss_reconstruction", "loss_penalty", "loss_auxiliary", "l0", "fve", "dead_frac", "threshold")

_BATCH_TOPK = {"kind": "batch_topk", "k": 4, "k_start": 8, "k_anneal_steps": 10}
SPECS: dict[str, dict[str, Any]] = {
    "l1": {"kind": "l1", "mu": 0.05, "mu_warmup_steps": 10, "init_norm": 0.1},
    "batch_topk": _BATCH_TOPK,
    "topk": {"kind": "topk", "k": 4},
    "jumprelu": {"kind": "jumprelu", "mu": 0.01, "bandwidth": 0.1, "initial_threshold": 0.1},
    "difference": {**_BATCH_TOPK, "inputs": "difference"},
    "dedicated": {**_BATCH_TOPK, "dedicated_frac": 0.125},
    "decoupled mse": {**_BATCH_TOPK, "code_weight": "decoupled", "reconstruction": "mse"},
}


def make_rows(step: int) -> torch.Tensor:
    """x_BMD in float64: a few concepts of each row, a third of them only in the second model."""
    directions = np.random.default_rng(0).normal(size=(NUM_CONCEPTS, NUM_MODELS, DIM))
    directions[::3, 0] = 0
    generator = np.random.default_rng([1, step])
    strength = generator.random((NUM_ROWS, NUM_CONCEPTS)) * (generator.random((NUM_ROWS, NUM_CONCEPTS)) < 0.1)
    noise = 0.05 * generator.normal(size=(NUM_ROWS, NUM_MODELS, DIM))
    return torch.from_numpy(np.einsum("bc,cmd->bmd", strength, directions) + noise + 0.1)


def curve(name: str, dtype: str) -> pd.DataFrame:
    """METRICS of every step; index (case, step)."""
    trainer = CrosscoderTrainer(
        CrosscoderSpec(
            num_models=NUM_MODELS,
            activation_dim=DIM,
            num_latents=NUM_LATENTS,
            num_steps=NUM_STEPS,
            lr=1e-2,
            lr_warmup_steps=5,
            lr_decay_frac=0.25,
            threshold_start_step=5,
            threshold_decay=0.9,
            dead_after_rows=6 * NUM_ROWS,
            dtype=dtype,
            kernels="auto" if dtype == "float32" else "reference",
            **SPECS[name],
        )
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer.initialise(make_rows(0))
        rows = []
        for step in range(NUM_STEPS):
            trainer.step(make_rows(step))
            metrics = trainer.metrics()
            rows.append({"case": name, "step": step, **{metric: metrics[metric] for metric in METRICS}})
    finally:
        torch.set_num_threads(before)
    return pd.DataFrame(rows).set_index(["case", "step"])
