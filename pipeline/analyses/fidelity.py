"""Fidelity: how much of the activations a crosscoder explains, with how many latents (method of arXiv 2504.02922).

FVE^m = 1 - sum_d Var(x^m - xh^m) / sum_d Var(x^m), per model and pooled over models (sums over both models above and
below the line). It is the fraction of variance explained, never the unexplained one: higher is better. Nothing here
changes a crosscoder's state; dead means that a latent fired on none of the rows seen. A difference SAE has one FVE,
that of x^chat - x^base, and none per model.

Shapes: B rows, M models, D width, F latents.
"""

import torch

from pipeline.analyses.rows import RowBatch, Sums, check_batch, merge_sums, require_rows
from pipeline.numerics.crosscoder import activation_difference
from pipeline.schema import BASE, CHAT, FIDELITY_KEYS


class Fidelity:
    """Row analysis with the numbers of schema.FIDELITY_KEYS."""

    def __init__(
        self, *, activation_dim: int, num_latents: int, num_models: int = 2, is_difference: bool = False
    ) -> None:
        self.activation_dim, self.num_latents, self.num_models = activation_dim, num_latents, num_models
        self.is_difference = is_difference

    def start(self) -> Sums:
        """First and second moments of x and of the error per model and dimension, norms, pairs and firing counts."""
        moments = (1 if self.is_difference else self.num_models, self.activation_dim)
        return {
            "num_rows": torch.zeros(1, dtype=torch.int64),
            "num_pairs": torch.zeros(1, dtype=torch.int64),
            "fired": torch.zeros(self.num_latents, dtype=torch.int64),
            "norm": torch.zeros(self.num_models, dtype=torch.float64),
            **{
                name: torch.zeros(moments, dtype=torch.float64) for name in ("x", "x_squared", "error", "error_squared")
            },
        }

    def update(self, sums: Sums, batch: RowBatch) -> None:
        """Adds a batch; moments in float64."""
        check_batch(batch, num_models=self.num_models, activation_dim=self.activation_dim, num_latents=self.num_latents)
        x_BMD = batch.x_BMD.double()
        error_BMD = x_BMD - batch.reconstruction_BMD.double()
        sums["num_rows"] += len(x_BMD)
        sums["num_pairs"] += batch.codes.num_pairs
        sums["fired"] += torch.bincount(batch.codes.latents_P, minlength=self.num_latents).cpu()
        sums["norm"] += x_BMD.norm(dim=2).sum(0).cpu()
        for name, value_BMD in (("x", x_BMD), ("error", error_BMD)):
            if self.is_difference:
                value_BMD = activation_difference(value_BMD)
            sums[name] += value_BMD.sum(0).cpu()
            sums[f"{name}_squared"] += value_BMD.square().sum(0).cpu()

    def merge(self, a: Sums, b: Sums) -> Sums:
        """All sums add."""
        return merge_sums(a, b)

    def table(self, sums: Sums) -> dict[str, float]:
        """The numbers by key; FVE is NaN where the activations have no variance, and per model for a difference."""
        num_rows = int(sums["num_rows"])
        require_rows(num_rows, "fidelity")
        variance_M, error_variance_M = (
            (sums[f"{name}_squared"] - sums[name].square() / num_rows).sum(1).clamp(min=0) for name in ("x", "error")
        )
        # Through rounding, constant activations get a small variance: a fraction of their mean's square.
        floor_M = sums["x_squared"].sum(1) * 1e-13
        fve_M = torch.where(variance_M > floor_M, 1 - error_variance_M / variance_M, torch.nan)
        total = variance_M.sum()
        pooled = 1 - error_variance_M.sum() / total if total > floor_M.sum() else torch.tensor(torch.nan)
        fve_base, fve_chat = (torch.nan, torch.nan) if self.is_difference else (fve_M[BASE], fve_M[CHAT])
        values = (
            torch.as_tensor(fve_base),
            torch.as_tensor(fve_chat),
            pooled,
            sums["num_pairs"][0] / num_rows,
            (sums["fired"] == 0).double().mean(),
            sums["norm"][BASE] / num_rows,
            sums["norm"][CHAT] / num_rows,
            torch.tensor(num_rows),
        )
        return {key: value.item() for key, value in zip(FIDELITY_KEYS, values, strict=True)}
