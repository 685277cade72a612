"""Loss curves of small crosscoders, on one thread.

In float32 with the kernels that a CPU run takes, in float64 with the reference.
"""

import pandas as pd
import torch

from pipeline.numerics.trainer import CrosscoderTrainer
from tests.golden.specs import CASES, NUM_STEPS, make_rows, make_spec

METRICS = ("loss", "loss_reconstruction", "loss_penalty", "loss_auxiliary", "l0", "fve", "dead_frac", "threshold")


def curves(dtype: str) -> pd.DataFrame:
    """METRICS of every step of every case; index (case, step)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return pd.DataFrame([row for case in CASES for row in _curve(case, dtype)]).set_index(["case", "step"])
    finally:
        torch.set_num_threads(before)


def _curve(case: str, dtype: str) -> list[dict[str, float | str]]:
    kernels = "auto" if dtype == "float32" else "reference"
    trainer = CrosscoderTrainer(make_spec(case, dtype=dtype, kernels=kernels))
    trainer.initialise(make_rows(0))
    rows: list[dict[str, float | str]] = []
    for step in range(NUM_STEPS):
        trainer.step(make_rows(step))
        metrics = trainer.metrics()
        rows.append({"case": case, "step": step, **{metric: metrics[metric] for metric in METRICS}})
    return rows
