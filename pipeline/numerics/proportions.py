"""Intervals of shares: one rate, and the mean of two independent ones.

Closed forms for few trials, where a bootstrap would give 5 out of 5 an interval of no width. Standard library alone;
used by controls and detection scores (analyses) and by the report's rates over prompts.
"""

import math
from typing import NamedTuple

Z_95 = 1.959963984540054
"""Two-sided 95% point of the standard normal distribution."""


class Interval(NamedTuple):
    """A 95% interval."""

    low: float
    high: float


def wilson_interval(rate: float, number: float) -> Interval:
    """Wilson's 95% interval of a rate over `number` trials, which may be effective ones; (NaN, NaN) without any."""
    if number == 0 or math.isnan(rate):
        return Interval(math.nan, math.nan)
    z = Z_95
    centre = rate + z * z / (2 * number)
    spread = z * math.sqrt(rate * (1 - rate) / number + z * z / (4 * number * number))
    scale = 1 + z * z / number
    low, high = (centre - spread) / scale, (centre + spread) / scale
    # At rates of 0 and 1 one end is exact, but for rounding.
    return Interval(0.0 if rate == 0 else max(0.0, low), 1.0 if rate == 1 else min(1.0, high))


def mean_of_two_rates(first: tuple[float, int], second: tuple[float, int]) -> tuple[float, Interval]:
    """Mean of two independent rates, each (rate, number of trials), with its 95% interval.

    The interval combines the distances of both Wilson limits in squares (Zou and Donner 2008; for differences, Newcombe
    1998, method 10), so that 1.0 over five trials each is not called certain. NaN where one of the two has no trial.
    """
    if first[1] == 0 or second[1] == 0:
        return math.nan, Interval(math.nan, math.nan)
    mean = (first[0] + second[0]) / 2
    below, above = 0.0, 0.0
    for rate, number in (first, second):
        low, high = wilson_interval(rate, number)
        below += (rate - low) ** 2
        above += (high - rate) ** 2
    return mean, Interval(max(0.0, mean - math.sqrt(below) / 2), min(1.0, mean + math.sqrt(above) / 2))
