"""p-values of ratios against their definition under the null, false discovery rates stated against realised."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.numerics.significance import p_absent, p_held, q_values, student_t_tail
from pipeline.numerics.statistics import student_t_quantile
from workloads.benchmarks.false_discovery import LIMIT, PRIORS, RATE, new_or_shared, simulate
from workloads.benchmarks.false_discovery import document_sums as sums


def test_tails_of_students_t_are_those_of_the_closed_forms_and_the_quantiles() -> None:
    t = torch.tensor([-3.0, 0.0, 0.5, 1.0, 4.0, 50.0, math.inf], dtype=torch.float64)
    cauchy = 0.5 - t.atan() / math.pi
    torch.testing.assert_close(student_t_tail(t, torch.tensor(1.0)), cauchy, rtol=1e-9, atol=1e-16)
    two = 0.5 - t[:-1] / (2 * (2 + t[:-1] ** 2).sqrt())
    torch.testing.assert_close(student_t_tail(t[:-1], torch.tensor(2.0)), two, rtol=1e-9, atol=0)
    freedom = torch.tensor([1.0, 2.5, 11, 63, 5000], dtype=torch.float64)
    tail = student_t_tail(student_t_quantile(0.975, freedom), freedom)
    torch.testing.assert_close(tail, torch.full((5,), 0.025).double(), rtol=2e-3, atol=0)
    far = student_t_tail(torch.tensor([20.0]), torch.tensor(1e6))
    assert float(far) == pytest.approx(0.5 * math.erfc(20 / 2**0.5), rel=1e-2)  # no underflow to 0, no cancellation
    assert student_t_tail(torch.tensor([math.nan]), torch.tensor(3.0)).isnan().all()


@pytest.mark.parametrize("documents", [12, 25, 64])
@pytest.mark.parametrize("nu", [LIMIT, -LIMIT])
def test_p_values_are_uniform_where_a_ratio_is_exactly_at_its_limit(documents: int, nu: float) -> None:
    numerator, denominator = sums(torch.full((6000,), nu).double(), documents=documents, spread=0.1, seed=documents)
    p = p_absent([(numerator, denominator, LIMIT)])
    for level in (0.5, 0.05, 0.01):
        assert float((p <= level).double().mean()) == pytest.approx(level, rel=0.35)
    held = p_held([(numerator, denominator, LIMIT)])
    assert float((held <= 0.05).double().mean()) <= 0.05


def test_p_values_of_two_ratios_are_conservative_and_have_power() -> None:
    null, documents = torch.full((1500,), LIMIT).double(), 20
    first, second = (sums(null, documents=documents, spread=0.2, seed=seed) for seed in (1, 2))
    both = p_absent([(*first, LIMIT), (*second, LIMIT)])
    torch.testing.assert_close(
        both, torch.maximum(p_absent([(*first, LIMIT)]), p_absent([(*second, LIMIT)])), rtol=0, atol=0
    )
    assert float((both <= 0.05).double().mean()) < 0.05
    new = sums(torch.full((1500,), 0.01).double(), documents=documents, spread=0.2, seed=3)
    assert float((p_absent([(*new, LIMIT), (*new, 0.5)]) <= 0.01).double().mean()) > 0.5
    shared = sums(torch.ones(1500).double(), documents=documents, spread=0.2, seed=4)
    assert float(p_absent([(*new, LIMIT), (*shared, 0.5)]).min()) > 0.5
    assert float((p_held([(*new, LIMIT), (*shared, 0.5)]) <= 0.001).double().mean()) > 0.9


def test_a_ratio_of_the_opposite_sign_is_held_and_not_absent() -> None:
    reversed_ = sums(torch.full((100,), -1.77).double(), documents=20, spread=0.2, seed=5)
    assert float(p_absent([(*reversed_, 0.5)]).min()) > 0.99
    assert float(p_held([(*reversed_, 0.5)]).max()) < 0.01


def test_undefined_ratios_have_no_p_value_and_constant_ones_are_certain() -> None:
    ones = torch.ones(10, 1, dtype=torch.float64)
    assert p_absent([(ones, -ones, LIMIT)]).isnan().all()
    single = torch.cat([ones[:1], 0 * ones[1:]])
    assert p_absent([(single, single, LIMIT)]).isnan().all()  # one group
    assert float(p_absent([(0.1 * ones, ones, LIMIT)])) == pytest.approx(0, abs=1e-12)
    assert float(p_absent([(0.3 * ones, ones, LIMIT)])) == pytest.approx(1)


def test_q_values_are_those_of_benjamini_and_hochberg() -> None:
    p = torch.tensor([0.04, 0.001, math.nan, 0.03, 0.9, 0.012], dtype=torch.float64)
    # Sorted 0.001, 0.012, 0.03, 0.04, 0.9 times 5 / rank: 0.005, 0.03, 0.05, 0.05, 0.9.
    expected = torch.tensor([0.05, 0.005, math.nan, 0.05, 0.9, 0.03], dtype=torch.float64)
    torch.testing.assert_close(q_values(p), expected, equal_nan=True, rtol=1e-9, atol=0)
    assert q_values(torch.tensor([math.nan])).isnan().all()
    assert len(q_values(torch.zeros(0))) == 0


@pytest.mark.parametrize("documents", [12, 40, 100])
@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: prior.__name__)
def test_the_realised_false_discovery_rate_is_not_above_the_stated_one(
    prior: Callable[[int, torch.Generator], Tensor], documents: int
) -> None:
    """400 latents, 10 samples of documents. Without the correction 0.74 were false."""
    runs = [simulate(prior, documents=documents, latents=400, seed=seed) for seed in range(10)]
    realised, found, _ = torch.tensor(runs).unbind(1)
    assert float(realised.mean()) <= RATE + 2 * float(realised.std()) / 10**0.5
    if prior is new_or_shared and documents >= 40:
        assert float(found.mean()) > 0.8
