import pytest
import torch

from pipeline.numerics.leave_one_out import leave_one_out_interval, totals_without_each
from pipeline.numerics.statistics import jackknife_interval


def _ratios(numerator_GF: torch.Tensor, denominator_GF: torch.Tensor) -> torch.Tensor:
    return totals_without_each(numerator_GF) / totals_without_each(denominator_GF)


def test_a_ratio_has_the_interval_of_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    denominator = torch.rand(20, 5, generator=generator).double() * 10
    numerator = denominator * torch.rand(20, 5, generator=generator)
    denominator[3], numerator[3] = 0, 0
    expected = jackknife_interval(numerator, denominator)
    ours = leave_one_out_interval(_ratios(numerator, denominator), denominator)
    for mine, closed in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, closed)


def test_groups_without_weight_change_nothing_and_one_group_has_no_interval() -> None:
    numerator, denominator = torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([[4.0], [5.0], [6.0]])
    plain = leave_one_out_interval(_ratios(numerator, denominator), denominator)
    padded = [torch.cat([part, torch.zeros(4, 1)]) for part in (numerator, denominator)]
    assert leave_one_out_interval(_ratios(*padded), padded[1]).low == pytest.approx(float(plain.low))
    alone = leave_one_out_interval(_ratios(numerator[:1], denominator[:1]), denominator[:1])
    assert alone.estimate == 0.25
    assert alone.low.isnan() and alone.high.isnan()


def test_intervals_of_a_correlation_of_clustered_rows_cover_it() -> None:
    """The square of the correlation of two variables with a common part that is constant inside a group."""
    generator = torch.Generator().manual_seed(1)
    trials, groups, rows, truth = 400, 48, 15, 0.25  # corr = 1 / (1 + 1)
    common = torch.randn(trials, groups, 1, generator=generator).double()
    own = torch.randn(trials, groups, rows, 2, generator=generator).double()
    x = common.expand(-1, -1, rows) + own[..., 0]
    y = common.expand(-1, -1, rows) + own[..., 1]
    covered = 0
    for trial in range(trials):
        sums = torch.stack([(x * x)[trial], (y * y)[trial], (x * y)[trial]], -1).sum(1)
        total = totals_without_each(sums)
        value = (total[:, 2] ** 2 / (total[:, 0] * total[:, 1]))[:, None]
        found = leave_one_out_interval(value, torch.full((groups, 1), float(rows)))
        covered += int(found.low <= truth <= found.high)
    assert 0.92 <= covered / trials <= 0.99


def test_values_must_be_one_more_than_the_groups() -> None:
    with pytest.raises(ValueError, match="3 groups, got 3"):
        leave_one_out_interval(torch.zeros(3, 1), torch.zeros(3, 1))
