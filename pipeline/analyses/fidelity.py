"""Fidelity: how much of the activations a crosscoder explains, with how many latents (method of arXiv 2504.02922).

FVE^m = 1 - sum_d Var(x^m - xh^m) / sum_d Var(x^m), per model and pooled over models (sums over both models above and
below the line). It is the fraction of variance explained, never the unexplained one: higher is better. Nothing here
changes a crosscoder's state; dead means that a latent fired on none of the rows seen. A difference SAE has one FVE,
that of x^chat - x^base, and none per model.

One number can hide two faults, so two more stand beside it. A few attention sinks hold nearly all of the variance in
many models: FVE 0.998 with them can be 0.80 without. And one dimension of large variance can outweigh all others: the
standardised FVE is the mean over models and dimensions, each counted the same.

Shapes: B rows, M models, D width, F latents, N = M * D columns (D for a difference), R = 2 kinds of rows: others and
attention sinks.
"""

import torch
from torch import Tensor

from pipeline.analyses.rows import RowBatch, Sums, check_batch, document_slices_of, merge_sums, require_rows
from pipeline.extraction.activations import SINK_MULTIPLE, within_norm_cap
from pipeline.numerics.moments import Moments, moments_of, variance_explained
from pipeline.numerics.recipes import fitted_activations, fve_metrics
from pipeline.numerics.settings import Inputs
from pipeline.schema import BASE, CHAT, FIDELITY_KEYS

_MEASURED = ("x", "error")
_SINK = 1
"""Of the two kinds of rows."""


class Fidelity:
    """Row analysis with the numbers of schema.FIDELITY_KEYS."""

    def __init__(self, *, activation_dim: int, num_latents: int, num_models: int = 2, inputs: Inputs = "both") -> None:
        self.activation_dim, self.num_latents, self.num_models = activation_dim, num_latents, num_models
        self.inputs: Inputs = inputs

    def start(self) -> Sums:
        """Moments of x and of the error per kind of row and column, norms, pairs and firing counts."""
        num_columns = self.activation_dim * (self.num_models if self.inputs == "both" else 1)
        return {
            "num_pairs": torch.zeros(1, dtype=torch.int64),
            "fired": torch.zeros(self.num_latents, dtype=torch.int64),
            "norm": torch.zeros(self.num_models, dtype=torch.float64),
            "rows_R": torch.zeros(2, dtype=torch.float64),
            **{
                f"{name}_{part}_RN": torch.zeros(2, num_columns, dtype=torch.float64)
                for name in _MEASURED
                for part in ("mean", "square")
            },
        }

    def update(self, sums: Sums, batch: RowBatch) -> None:
        """Adds a batch; moments in float64."""
        check_batch(batch, num_models=self.num_models, activation_dim=self.activation_dim, num_latents=self.num_latents)
        x_BMD = batch.x_BMD.double()
        error_BMD = x_BMD - batch.reconstruction_BMD.double()
        sums["num_pairs"] += batch.codes.num_pairs
        sums["fired"] += torch.bincount(batch.codes.latents_P, minlength=self.num_latents).cpu()
        sums["norm"] += x_BMD.norm(dim=2).sum(0).cpu()
        is_sink_B = sinks(batch)
        for name, value_BMD in zip(_MEASURED, (x_BMD, error_BMD), strict=True):
            value_BMD = fitted_activations(value_BMD, self.inputs)
            for kind in range(2):
                own = moments_of(value_BMD[is_sink_B == kind].flatten(1).cpu()[:, :, None])
                _set_moments(sums, name, kind, _moments(sums, name, kind).merge(own))
        sums["rows_R"] += torch.tensor([(~is_sink_B).sum(), is_sink_B.sum()])

    def merge(self, a: Sums, b: Sums) -> Sums:
        """Counts and norms add, moments merge."""
        merged = merge_sums(a, b)
        for name in _MEASURED:
            for kind in range(2):
                _set_moments(merged, name, kind, _moments(a, name, kind).merge(_moments(b, name, kind)))
        return merged

    def table(self, sums: Sums) -> dict[str, float]:
        """The numbers by key; FVE is NaN where the activations have no variance, and per model for a difference."""
        num_rows = int(sums["rows_R"].sum())
        require_rows(num_rows, "fidelity")
        ordinary, every = ({name: _moments(sums, name, 0) for name in _MEASURED} for _ in range(2))
        for name in _MEASURED:
            every[name] = ordinary[name].merge(_moments(sums, name, _SINK))
        fve = self._fve(every)
        values = {
            **fve,
            "l0": float(sums["num_pairs"][0] / num_rows),
            "dead_frac": float((sums["fired"] == 0).double().mean()),
            "mean_norm_base": float(sums["norm"][BASE] / num_rows),
            "mean_norm_chat": float(sums["norm"][CHAT] / num_rows),
            "num_rows": num_rows,
            "fve_standardised": float(variance_explained(every["x"], every["error"]).nanmean()),
            "fve_without_sinks": self._fve(ordinary)["fve"],
            "num_sinks": int(sums["rows_R"][_SINK]),
        }
        return {key: values[key] for key in FIDELITY_KEYS}

    def _fve(self, measured: dict[str, Moments]) -> dict[str, float]:
        """fve_base, fve_chat and fve of the moments of columns."""
        x, error = (
            Moments(
                own.num_rows,
                own.mean_MD.view(-1, self.activation_dim),
                own.square_M.view(-1, self.activation_dim).sum(1),
            )
            for own in (measured["x"], measured["error"])
        )
        return fve_metrics(x, error, self.inputs)


def sinks(batch: RowBatch) -> Tensor:
    """bool [B]: rows whose norm in either model exceeds SINK_MULTIPLE times the median of their document's rows."""
    is_sink_B = torch.zeros(len(batch.x_BMD), dtype=torch.bool)
    for rows in document_slices_of(batch.doc_id_B):
        h_1BMD = batch.x_BMD[rows][None]
        is_sink_B[rows] = ~within_norm_cap(h_1BMD, torch.ones(h_1BMD.shape[:2]), SINK_MULTIPLE)[0].cpu()
    return is_sink_B


def _moments(sums: Sums, name: str, kind: int) -> Moments:
    """Of each column of one kind of row, as if every column were a model of width 1."""
    return Moments(sums["rows_R"][kind], sums[f"{name}_mean_RN"][kind][:, None], sums[f"{name}_square_RN"][kind])


def _set_moments(sums: Sums, name: str, kind: int, moments: Moments) -> None:
    sums[f"{name}_mean_RN"][kind] = moments.mean_MD[:, 0]
    sums[f"{name}_square_RN"][kind] = moments.square_M
