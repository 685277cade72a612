"""Interval of any statistic of sums per document group, by leaving out one group at a time.

`statistics.jackknife_interval` is the closed form for one ratio of sums. Here the caller evaluates the statistic itself
without each group, so it may be any smooth function of the sums (a correlation, a ratio of spreads, a participation
ratio). Nothing is resampled.

Shapes: G document groups, F statistics.
"""

import torch
from torch import Tensor

from pipeline.numerics.statistics import DEFAULT_CONFIDENCE, Interval, effective_groups, student_t_quantile


def totals_without_each(sums_GX: Tensor) -> Tensor:
    """[1 + G, ...]: the total over all groups, then the totals without group 0, 1, ...; any trailing dimensions."""
    total_X = sums_GX.sum(0, keepdim=True)
    return torch.cat([total_X, total_X - sums_GX])


def leave_one_out_interval(values_VF: Tensor, weight_GF: Tensor, *, confidence: float = DEFAULT_CONFIDENCE) -> Interval:
    """Interval of F statistics, float64 [F], from their values on `totals_without_each` (V = 1 + G).

    weight_GF (at least 0) is what each group contributes, such as its number of rows: groups without any count for
    nothing, and unequal ones widen the interval as in `jackknife_interval`, which is the same for a ratio. NaN ends
    where the effective number of groups is below 2 or the statistic is undefined without one of the groups.
    """
    if len(values_VF) != len(weight_GF) + 1:
        raise ValueError(
            f"expected the statistic on the total and without each of {len(weight_GF)} groups, got {len(values_VF)} "
            "values: evaluate it on totals_without_each"
        )
    values_VF, weight_GF = values_VF.double(), weight_GF.double()
    estimate_F = values_VF[0]
    change_GF = torch.where(weight_GF > 0, estimate_F - values_VF[1:], 0.0)
    size_F = effective_groups(weight_GF)
    quantile_F = student_t_quantile((1 + confidence) / 2, (size_F - 1).clamp(min=1.0))
    half_F = torch.where(size_F >= 2, quantile_F * change_GF.square().sum(0).sqrt(), torch.nan)
    return Interval(estimate_F, estimate_F - half_F, estimate_F + half_F)
