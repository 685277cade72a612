"""Mergeable mean and variance of activations, and their geometric median.

Moments of parts (batches, shards, ranks) merge exactly, by the parallel update of Chan, Golub and LeVeque (1979), in
float64. Normalisation and the fraction of variance explained follow from them. No sums of squares are subtracted from
each other, so a mean far from 0 costs no digits.

Shapes: B rows, M models, D width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.numerics.parallel import Mesh

_ROUNDING = 1e-13
"""Above the square of float32's rounding, relative to the numbers."""


class Moments(NamedTuple):
    """Count, mean and summed squared deviation of rows; float64."""

    num_rows: Tensor
    """Scalar."""
    mean_MD: Tensor
    """Mean row; 0 for no rows."""
    square_M: Tensor
    """sum over rows and d of (x - mean)^2, per model."""

    def variance_M(self) -> Tensor:  # noqa: N802 (shape letter)
        """sum_d Var(x_d) per model, population variance; NaN for no rows."""
        return self.square_M / self.num_rows

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of rows together."""
        num_rows = self.num_rows + other.num_rows
        share = other.num_rows / num_rows.clamp(min=1)
        gap_MD = other.mean_MD - self.mean_MD
        between_M = gap_MD.square().sum(1) * self.num_rows * share
        return Moments(num_rows, self.mean_MD + gap_MD * share, self.square_M + other.square_M + between_M)


def moments_of(x_BMD: Tensor) -> Moments:
    """Moments of one batch; any floating dtype. The deviations are taken from the batch mean, in float32 at least."""
    x_BMD = x_BMD.to(torch.promote_types(x_BMD.dtype, torch.float32))
    count = torch.tensor(x_BMD.shape[0], dtype=torch.float64, device=x_BMD.device)
    if x_BMD.shape[0] == 0:
        return Moments(count, x_BMD.new_zeros(x_BMD.shape[1:], dtype=torch.float64), count.new_zeros(x_BMD.shape[1]))
    mean_MD = x_BMD.mean(0)
    norm_BM = torch.linalg.vector_norm(x_BMD - mean_MD, dim=2)
    return Moments(count, mean_MD.to(torch.float64), norm_BM.to(torch.float64).square().sum(0))


def all_reduce(moments: Moments, mesh: Mesh) -> Moments:
    """Moments of the rows of all data ranks; collective over the data axis."""
    if mesh.data_size == 1:
        return moments
    packed = torch.cat([moments.num_rows[None], moments.mean_MD.flatten(), moments.square_M])
    shape_MD = moments.mean_MD.shape
    total: Moments | None = None
    for part in mesh.gather(packed, "data"):
        count, mean, square = torch.split(part, [1, shape_MD.numel(), shape_MD[0]])
        single = Moments(count[0], mean.view(shape_MD), square)
        total = single if total is None else total.merge(single)
    assert total is not None
    return total


def variance_explained(x: Moments, residual: Moments) -> Tensor:
    """FVE per model, [M], at most 1, higher is better: 1 - sum_d Var(x - xh) / sum_d Var(x); NaN for constant x."""
    total_M = x.variance_M()
    return torch.where(_varies(x), 1 - residual.variance_M() / total_M, torch.nan)


def _varies(x: Moments) -> Tensor:
    """bool [M]: False for constant rows, whose variance is what rounding leaves of their mean's square."""
    return x.variance_M() > _ROUNDING * x.mean_MD.square().sum(1)


def explained_fractions(x: Moments, residual: Moments) -> dict[str, float]:
    """FVE as fve_<model> and, over all models pooled, fve; two models are called base and chat, others by number."""
    fve_M = variance_explained(x, residual).tolist()
    names = ("base", "chat") if len(fve_M) == 2 else tuple(str(model) for model in range(len(fve_M)))
    total = float(x.square_M[_varies(x)].sum())
    pooled = 1 - float(residual.square_M.sum()) / total if total > 0 else math.nan
    return {**{f"fve_{name}": value for name, value in zip(names, fve_M, strict=True)}, "fve": pooled}


def geometric_median(x_BMD: Tensor, mesh: Mesh, *, num_iterations: int = 50, tolerance: float = 1e-6) -> Tensor:
    """Per model the point with the smallest summed distance to all rows of all data ranks, [M, D], dtype of x.

    Weiszfeld's iteration from the mean, until the point moves by less than tolerance of its row distance. Identical on
    every rank. Collective over the data axis.
    """
    sums = mesh.sum_(torch.cat([x_BMD.sum(0, dtype=torch.float64).flatten(), x_BMD.new_tensor([len(x_BMD)])]), "data")
    point_MD = (sums[:-1] / sums[-1]).view(x_BMD.shape[1:])
    for _ in range(num_iterations):
        distance_BM = torch.linalg.vector_norm(x_BMD - point_MD.to(x_BMD.dtype), dim=2).clamp(min=1e-12)
        weight_BM = 1 / distance_BM
        weighted_MD = torch.einsum("BM,BMD->MD", weight_BM, x_BMD).to(torch.float64)
        packed = torch.cat([weighted_MD.flatten(), weight_BM.sum(0).to(torch.float64)])
        weighted, weight_M = torch.split(mesh.sum_(packed, "data"), [point_MD.numel(), point_MD.shape[0]])
        moved_MD = weighted.view_as(point_MD) / weight_M[:, None] - point_MD
        point_MD = point_MD + moved_MD
        if float((torch.linalg.vector_norm(moved_MD, dim=1) * weight_M / sums[-1]).max()) < tolerance:
            break
    return point_MD.to(x_BMD.dtype)
