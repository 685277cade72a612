"""Intervals of shares: published values, symmetry, and coverage counted over every possible outcome."""

import math

import numpy as np
import pytest

from pipeline.numerics.proportions import mean_of_two_rates, wilson_interval


@pytest.mark.parametrize(
    ("hits", "number", "low", "high"),
    [(20, 40, 0.3520, 0.6480), (81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)],
)
def test_wilson_interval_equals_published_values(hits: int, number: int, low: float, high: float) -> None:
    """The last three after Newcombe (1998, Statistics in Medicine 17, table I)."""
    assert wilson_interval(hits / number, number) == pytest.approx((low, high), abs=5e-5)


def test_an_end_that_nothing_can_pass_is_exact() -> None:
    for number in range(1, 200):
        assert wilson_interval(0.0, number).low == 0.0
        assert wilson_interval(1.0, number).high == 1.0


def test_an_interval_without_trials_is_undefined() -> None:
    assert all(math.isnan(end) for end in wilson_interval(0.3, 0))
    mean, interval = mean_of_two_rates((0.5, 4), (0.5, 0))
    assert math.isnan(mean)
    assert all(math.isnan(end) for end in interval)


def test_perfect_answers_to_few_questions_are_not_certain() -> None:
    mean, interval = mean_of_two_rates((1.0, 5), (1.0, 5))
    low = wilson_interval(1.0, 5).low
    assert mean == 1.0
    assert interval.high == 1.0
    assert interval.low == pytest.approx(1 - math.sqrt(2) * (1 - low) / 2)


@pytest.mark.parametrize(
    ("p", "q", "n", "m"), [(0.5, 0.5, 6, 6), (0.9, 0.7, 6, 6), (0.8, 0.8, 20, 20), (0.95, 0.5, 10, 5)]
)
def test_the_mean_of_two_rates_is_covered_in_93_percent_or_more(p: float, q: float, n: int, m: int) -> None:
    def binomial(rate: float, number: int) -> np.ndarray:
        return np.array([math.comb(number, k) * rate**k * (1 - rate) ** (number - k) for k in range(number + 1)])

    covered = 0.0
    for i, chance_i in enumerate(binomial(p, n)):
        for j, chance_j in enumerate(binomial(q, m)):
            _, (low, high) = mean_of_two_rates((i / n, n), (j / m, m))
            covered += chance_i * chance_j * (low <= (p + q) / 2 <= high)
    assert covered >= 0.93
