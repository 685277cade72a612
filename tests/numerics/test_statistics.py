"""Bootstrap intervals against closed forms and coverage, AUROC against its definition by pairs."""

import math

import pytest
import torch

from pipeline.numerics.statistics import (
    auroc_by_latent,
    auroc_interval,
    bootstrap_counts,
    bootstrap_interval,
    effective_groups,
    exceedance_probability,
    hash_documents,
    jackknife_interval,
    small_sample_factor,
    student_t_quantile,
)


def test_student_t_quantiles_match_the_printed_table() -> None:
    """Two-sided 95% values of any table of Student's t."""
    freedom = torch.tensor([1.0, 2, 3, 5, 10, 30, 120, 1e6])
    expected = torch.tensor([12.7062, 4.3027, 3.1824, 2.5706, 2.2281, 2.0423, 1.9799, 1.9600], dtype=torch.float64)
    torch.testing.assert_close(student_t_quantile(0.975, freedom), expected, rtol=2e-4, atol=0)


def test_small_samples_widen_and_large_ones_do_not() -> None:
    factor = small_sample_factor(torch.tensor([1.5, 2.0, 10.0, 1e5]))
    assert math.isnan(factor[0])
    assert float(factor[1]) == pytest.approx(2**0.5 * 12.7062 / 1.95996, rel=1e-3)
    assert float(factor[2]) == pytest.approx((10 / 9) ** 0.5 * 2.2622 / 1.95996, rel=1e-3)
    assert float(factor[3]) == pytest.approx(1, abs=1e-3)


def test_effective_groups_of_equal_dominated_and_absent_weights() -> None:
    weight = torch.tensor([[1.0, 1000.0, 0.0], [1.0, 1.0, 0.0], [-1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    effective = effective_groups(weight)
    assert effective.tolist() == pytest.approx([4, 2, 0], abs=0.01)  # sqrt(4 * 4), sqrt(4 * 1.006), none


def test_hashed_groups_are_even_stable_and_independent_by_salt() -> None:
    doc_id = torch.arange(20_000)
    groups = hash_documents(doc_id, num_groups=16)
    assert groups.bincount(minlength=16).min() > 1100  # 1250 expected, standard deviation 34
    torch.testing.assert_close(hash_documents(doc_id.flip(0), num_groups=16).flip(0), groups)
    halves = hash_documents(doc_id, num_groups=2, salt=1)
    per_group = torch.bincount(groups[halves == 0], minlength=16).double() / groups.bincount(minlength=16)
    assert (per_group - 0.5).abs().max() < 0.06
    extreme = hash_documents(torch.tensor([-1, 2**63 - 1, -(2**63)]), num_groups=5)
    assert ((extreme >= 0) & (extreme < 5)).all()
    # Pinned: artifacts written by one version must meet the same groups in the next.
    assert hash_documents(torch.tensor([0, 1, 2**62 + 12345]), num_groups=64).tolist() == [47, 1, 41]


def test_counts_are_seeded_and_sum_to_the_number_of_groups() -> None:
    counts = bootstrap_counts(10, num_resamples=50, seed=3)
    assert counts.sum(1).tolist() == [10.0] * 50
    torch.testing.assert_close(counts, bootstrap_counts(10, num_resamples=50, seed=3))
    assert not torch.equal(counts, bootstrap_counts(10, num_resamples=50, seed=4))


def test_the_jackknife_interval_of_a_mean_is_students() -> None:
    """With equal denominators the ratio is a mean of n values: mean +- t_(n-1) s / sqrt(n - 1)."""
    value = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    interval = jackknife_interval(value, torch.ones_like(value))
    half = 2.2010 * value.std(0) / 11**0.5
    torch.testing.assert_close(interval.estimate, value.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(interval.high - interval.estimate, half, rtol=3e-4, atol=0)
    torch.testing.assert_close(interval.estimate - interval.low, half, rtol=3e-4, atol=0)
    undefined = jackknife_interval(value, -torch.ones_like(value))
    assert all(part.isnan().all() for part in undefined)


def test_the_probability_beyond_a_limit_agrees_with_the_interval_that_ends_there() -> None:
    generator = torch.Generator().manual_seed(0)
    denominator = torch.rand(40, 4, dtype=torch.float64, generator=generator) + 0.5
    numerator = 0.3 * denominator + 0.2 * torch.randn(40, 4, dtype=torch.float64, generator=generator)
    interval = bootstrap_interval(numerator, denominator, seed=3)
    for end, expected in ((interval.low, 0.975), (interval.high, 0.025)):
        beyond = [
            exceedance_probability([(numerator[:, [j]], denominator[:, [j]], float(end[j]))], seed=3) for j in range(4)
        ]
        torch.testing.assert_close(torch.cat(beyond), torch.full((4,), expected).double(), rtol=0, atol=2e-3)
    far, twice = (numerator, denominator, 9.0), (numerator, denominator, float(interval.estimate[0]))
    assert exceedance_probability([far]).tolist() == [0.0] * 4
    torch.testing.assert_close(exceedance_probability([far, twice]), exceedance_probability([twice]))
    assert exceedance_probability([far, (numerator, -denominator, 1.0)]).isnan().all()


def test_a_ratio_that_is_the_same_in_every_group_has_no_uncertainty() -> None:
    denominator = torch.rand(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    interval = bootstrap_interval(2.5 * denominator, denominator)
    for value in interval:
        torch.testing.assert_close(value, torch.full((3,), 2.5, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(interval.estimate, torch.full((3,), 2.5, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_interval_of_a_mean_is_the_student_t_interval() -> None:
    value = torch.randn(40, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3
    interval = bootstrap_interval(value, torch.ones_like(value), num_resamples=4000)
    half_width = 2.0227 * value.std(0) / 40**0.5
    torch.testing.assert_close(interval.estimate, value.mean(0))
    ratio = (interval.high - interval.low) / (2 * half_width)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.02)


def test_chunks_do_not_change_the_result() -> None:
    generator = torch.Generator().manual_seed(2)
    numerator, denominator = (torch.rand(16, 11, generator=generator) for _ in range(2))
    for a, b in zip(
        bootstrap_interval(numerator, denominator, chunk=3), bootstrap_interval(numerator, denominator), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_undefined_ratios_are_nan_and_never_a_number() -> None:
    denominator = torch.zeros(30, 4)
    denominator[:, 1] = torch.tensor([1.0, -1.0]).repeat(15)  # sums to 0
    denominator[:3, 2] = 1  # three groups: one resample in twenty has none of them
    denominator[:, 3] = -1  # significantly below 0
    interval = bootstrap_interval(torch.ones(30, 4), denominator)
    for value in interval:
        assert value.isnan().all()


def test_one_dominating_group_has_an_estimate_but_no_interval_to_rely_on() -> None:
    denominator = torch.full((3, 1), 1e-3)
    denominator[0] = 1e6
    interval = bootstrap_interval(torch.ones(3, 1), denominator)
    assert interval.low.isnan() or interval.high - interval.low > 1


def test_bad_input_names_the_value() -> None:
    with pytest.raises(ValueError, match=r"got 1\.5"):
        bootstrap_interval(torch.ones(3, 1), torch.ones(3, 1), confidence=1.5)
    with pytest.raises(ValueError, match=r"got \(3, 1\) and \(3, 2\)"):
        bootstrap_interval(torch.ones(3, 1), torch.ones(3, 2))
    with pytest.raises(ValueError, match="got 0"):
        hash_documents(torch.arange(3), num_groups=0)
    with pytest.raises(ValueError, match="got 5 and 1"):
        bootstrap_counts(5, num_resamples=1)
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        auroc_by_latent(
            torch.zeros(2, dtype=torch.int64),
            torch.ones(1),
            torch.ones(2, 1),
            num_latents=1,
            num_positive_L=torch.ones(1),
            num_rows=2,
        )


def _auroc_by_pairs(scores: torch.Tensor, positive: torch.Tensor) -> float:
    wins, pairs = 0.0, 0
    for a in scores[positive].tolist():
        for b in scores[~positive].tolist():
            wins += 1.0 if a > b else 0.5 if a == b else 0.0
            pairs += 1
    return wins / pairs if pairs else math.nan


def test_auroc_of_sparse_latents_equals_the_definition_by_pairs() -> None:
    generator = torch.Generator().manual_seed(4)
    num_rows, num_latents = 60, 9
    code = torch.randint(0, 5, (num_rows, num_latents), generator=generator).float()  # many ties, many zeros
    code = torch.where(torch.rand(code.shape, generator=generator) > 0.5, code, 0.0)
    code[:, 4] = 0
    positive = torch.rand(num_rows, 3, generator=generator) > 0.7
    positive[:, 2] = False
    rows, latents = (code > 0).nonzero(as_tuple=True)
    auroc = auroc_by_latent(
        latents,
        code[rows, latents],
        positive[rows],
        num_latents=num_latents,
        num_positive_L=positive.sum(0),
        num_rows=num_rows,
    )
    for latent in range(num_latents):
        for label in range(3):
            expected = _auroc_by_pairs(code[:, latent], positive[:, label])
            assert float(auroc[latent, label]) == pytest.approx(expected, nan_ok=True)
    assert auroc[4, :2].tolist() == [0.5, 0.5]
    assert auroc[:, 2].isnan().all()


def test_no_active_pair_at_all_is_chance() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    auroc = auroc_by_latent(
        none, none.float(), torch.zeros(0, 1), num_latents=2, num_positive_L=torch.tensor([3]), num_rows=10
    )
    assert auroc.tolist() == [[0.5], [0.5]]


def test_auroc_interval_equals_the_definition_and_a_loop_over_resamples() -> None:
    generator = torch.Generator().manual_seed(5)
    groups = torch.randint(0, 12, (150,), generator=generator) * 7
    positive = torch.rand(150, generator=generator) > 0.6
    scores = (torch.randn(150, generator=generator) + positive).round(decimals=1)
    interval = auroc_interval(scores, positive, groups, num_resamples=200, seed=1)
    assert float(interval.estimate) == pytest.approx(_auroc_by_pairs(scores, positive))
    values = []
    for counts in bootstrap_counts(12, num_resamples=200, seed=1).long():
        rows = torch.cat([(groups == group * 7).nonzero().squeeze(1).repeat(int(counts[group])) for group in range(12)])
        values.append(_auroc_by_pairs(scores[rows], positive[rows]))
    resampled = torch.tensor(values, dtype=torch.float64)
    weights = torch.bincount(groups[positive] // 7, minlength=12).double()[:, None]
    factor = small_sample_factor(effective_groups(weights))[0]
    low = interval.estimate - factor * (interval.estimate - resampled.quantile(0.025))
    high = interval.estimate + factor * (resampled.quantile(0.975) - interval.estimate)
    assert float(interval.low) == pytest.approx(float(low))
    assert float(interval.high) == pytest.approx(min(1.0, float(high)))


def test_auroc_edges() -> None:
    groups = torch.arange(6)
    positive = torch.tensor([True, True, True, False, False, False])
    perfect = auroc_interval(torch.tensor([3.0, 3, 2, 1, 1, 0]), positive, groups)
    assert [float(value) for value in perfect] == pytest.approx(
        [1.0, 3 / (3 + 1.96**2), 1.0], abs=1e-4
    )  # Wilson, 3 of 3
    constant = auroc_interval(torch.zeros(6), positive, groups)
    half = 1.96 * (0.25 / 3 + 1.96**2 / 36) ** 0.5 / (1 + 1.96**2 / 3)
    assert [float(value) for value in constant] == pytest.approx([0.5, 0.5 - half, 0.5 + half], abs=1e-4)
    for labels in (torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)):
        assert all(value.isnan() for value in auroc_interval(torch.rand(6), labels, groups))
    single = auroc_interval(torch.rand(6), positive, torch.zeros(6))
    assert single.estimate.isfinite()
    assert single.low.isnan()
    none = auroc_interval(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    assert all(value.isnan() for value in none)


@pytest.mark.parametrize("num_wrong", [0, 1])
def test_an_auroc_of_hardly_any_mistake_is_not_certain(num_wrong: int) -> None:
    """20 documents of 50 rows: none, or one of 10,000 pairs in the wrong order. It printed as 1.00 [1.00, 1.00]."""
    positive = torch.arange(1000) % 5 == 0
    scores = positive.double() + 1e-4 * torch.arange(1000)
    scores[1] = 1.5 if num_wrong else 0.0
    interval = auroc_interval(scores, positive, torch.arange(1000) // 50)
    assert float(interval.estimate) > 0.99
    assert 0.8 < float(interval.low) < 0.9  # 20 of 20: 0.84
    assert float(interval.high) == 1


def test_auroc_intervals_cover_the_truth() -> None:
    """Scores shifted by 1 for positives with a document effect; the truth is Phi(1 / sqrt(2 (1 + 0.25)))."""
    generator = torch.Generator().manual_seed(6)
    truth = 0.5 * (1 + math.erf(1 / (2 * (1 + 0.25)) ** 0.5 / 2**0.5))
    documents = torch.arange(400) // 10
    hits = 0
    for repeat in range(300):
        positive = torch.rand(400, generator=generator) > 0.7
        effect = 0.5 * torch.randn(40, generator=generator)[documents]
        scores = torch.randn(400, generator=generator) + effect + positive
        interval = auroc_interval(scores, positive, documents, num_resamples=300, seed=repeat)
        hits += bool(interval.low <= truth <= interval.high)
    assert 0.92 <= hits / 300 <= 0.985
