"""Significance of ratios of sums over documents: p-values without resampling, and false discovery rates over many.

A bootstrap of R resamples cannot give a p-value below 1 / R, which a correction over thousands of latents needs. The
p-values here are parametric: the ratio's jackknife standard error over document groups, and Student's t with the
effective number of groups (statistics.py). They say nothing about what a ratio means.

Shapes: G document groups, F statistics (latents).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.numerics.statistics import jackknife_ratio

_MAX_ITERATIONS = 300
_TINY = 1e-300


def student_t_tail(t: Tensor, freedom: Tensor) -> Tensor:
    """P(T > t) for Student's t with real degrees of freedom > 0; float64, NaN where an argument is.

    Half the regularised incomplete beta function I_x(v/2, 1/2) at x = v / (v + t^2). torch has none, and this package's
    numerics use no other library.
    """
    freedom = freedom.double().expand_as(t)
    t = t.double()
    square = t.square()
    x = torch.where(square.isinf(), 0.0, freedom / (freedom + square))
    half = torch.full_like(freedom, 0.5)
    y = torch.where(square.isinf(), 1.0, square / (freedom + square))  # 1 - x without cancellation
    is_small = x < (freedom / 2 + 1) / (freedom / 2 + 2.5)  # there the continued fraction converges fast
    direct = _beta_fraction(torch.where(is_small, x, 0.5), freedom / 2, half, torch.where(is_small, y, 0.5))
    mirrored = 1 - _beta_fraction(torch.where(is_small, 0.5, y), half, freedom / 2, torch.where(is_small, 0.5, x))
    tail = torch.where(is_small, direct, mirrored) / 2
    return torch.where(t.isnan() | freedom.isnan(), torch.nan, torch.where(t >= 0, tail, 1 - tail))


def _beta_fraction(x: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """I_x(a, b) with y = 1 - x, by Lentz's continued fraction (Abramowitz and Stegun 26.5.8)."""
    log_front = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b) + a * x.log() + b * y.log()
    c = torch.ones_like(x)
    d = 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    value = d.clone()
    for m in range(1, _MAX_ITERATIONS):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away_from_zero(1 + step * d)
            c = _away_from_zero(1 + step / c)
            value = value * c * d
        if bool(((c * d - 1).abs().nan_to_num(0.0) < 1e-13).all()):
            break
    return torch.exp(log_front) * value / a


def _away_from_zero(value: Tensor) -> Tensor:
    return torch.where(value.abs() < _TINY, _TINY, value)


def p_absent(ratios: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """p-value, per statistic, against "at least one of several ratios is at or beyond its limit, on either side".

    `ratios` holds (numerator_GF, denominator_GF, limit) of each, limit > 0. A small value is evidence that every ratio
    lies strictly between -limit and limit. This is an intersection-union test (Berger 1982): the p-value is the largest
    of the one-sided ones, at both ends of every ratio, and needs no correction for their number. Float64 [F]; NaN where
    a ratio is undefined (its denominator is not above 0, or fewer than two effective groups carry it).
    """
    return torch.stack([_outside_p(*ratio) for ratio in ratios]).amax(0)


def p_held(ratios: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """p-value, per statistic, against "every ratio lies between -limit and limit"; float64 [F], NaN as in `p_absent`.

    A small value is evidence that at least one ratio is beyond its limit. The smallest of the one-sided p-values at
    both ends of every ratio, times their number (Bonferroni).
    """
    ends = torch.stack([1 - p_F for ratio in ratios for p_F in _end_p(*ratio)])
    return (len(ends) * ends.amin(0)).clamp(max=1.0)


def _outside_p(numerator_GF: Tensor, denominator_GF: Tensor, limit: float) -> Tensor:
    return torch.stack(_end_p(numerator_GF, denominator_GF, limit)).amax(0)


def _end_p(numerator_GF: Tensor, denominator_GF: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """One-sided p-values against ratio >= limit and against ratio <= -limit."""
    ratio = jackknife_ratio(numerator_GF.double().cpu(), denominator_GF.double().cpu())
    ends = []
    for distance_F in (limit - ratio.estimate, ratio.estimate + limit):
        t_F = torch.where(distance_F == 0, 0.0, distance_F / ratio.error)
        ends.append(student_t_tail(t_F, ratio.freedom))
    return ends[0], ends[1]


def q_values(p_F: Tensor) -> Tensor:
    """Benjamini and Hochberg's (1995) adjusted p-values over the defined ones; float64 [F], NaN stays NaN.

    Calling every statistic with a q-value of at most a has an expected share of at most a false calls among them, for
    independent or positively dependent statistics.
    """
    q_F = torch.full_like(p_F, torch.nan, dtype=torch.float64)
    known = (~p_F.isnan()).nonzero().squeeze(1)
    if not len(known):
        return q_F
    order = known[p_F[known].argsort(descending=True, stable=True)]
    rank = torch.arange(len(order), 0, -1, dtype=torch.float64)
    q_F[order] = (p_F[order].double() * len(order) / rank).cummin(0).values.clamp(max=1.0)
    return q_F
