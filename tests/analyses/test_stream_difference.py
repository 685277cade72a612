import numpy as np
import pytest
import torch

from pipeline.analyses.rows import Sums, merge_sums
from pipeline.analyses.stream_difference import (
    add_stream_rows,
    add_to_sample,
    effective_rank,
    empty_row_sample,
    empty_stream_sums,
    merge_samples,
    row_keys,
    sampled_difference,
    stream_differences,
)

GROUPS, WIDTH = 16, 8


def _sums(x_NMD: torch.Tensor, group_N: torch.Tensor, groups: int = GROUPS) -> Sums:
    sums = empty_stream_sums(1, groups, x_NMD.shape[2])
    add_stream_rows(sums, 0, x_NMD, group_N)
    return sums


def _rows(number: int = 200, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(number, WIDTH, generator=generator) + 5
    chat = 2 * base + 0.5 * torch.randn(number, WIDTH, generator=generator) - 3
    return torch.stack([base, chat], dim=1), torch.randint(0, GROUPS, (number,), generator=generator)


def test_estimates_equal_least_squares_on_the_rows() -> None:
    x_NMD, group_N = _rows()
    found = stream_differences(_sums(x_NMD, group_N))
    base, chat = (x_NMD[:, m].double() for m in (0, 1))
    assert float(found.raw.estimate) == pytest.approx(float((chat - base).norm() / chat.norm()))
    base, chat = base - base.mean(0), chat - chat.mean(0)
    scale = np.linalg.lstsq(base.flatten()[:, None].numpy(), chat.flatten().numpy(), rcond=None)[0][0]
    assert float(found.fitted.estimate) == pytest.approx(float((chat - scale * base).norm() / chat.norm()))
    assert float(found.scale_ratio.estimate) == pytest.approx(float(chat.norm() / base.norm()))
    assert int(found.num_rows) == 200
    for interval in found[:3]:
        assert float(interval.low) < float(interval.estimate) < float(interval.high)


@pytest.mark.parametrize("factor", [0.1, 1, 2, 8, 100])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_scale_and_offset_of_a_model_are_no_difference(factor: float, offset: float) -> None:
    x_NMD, group_N = _rows()
    x_NMD[:, 1] = factor * x_NMD[:, 0] + offset
    found = stream_differences(_sums(x_NMD, group_N))
    assert float(found.fitted.high) < 1e-4  # what float32 rounds beside an offset
    assert float(found.scale_ratio.estimate) == pytest.approx(factor, rel=1e-5)
    if (factor, offset) == (1, 0):
        assert float(found.raw.high) == float(found.fitted.high) == 0  # exactly


def test_rows_that_do_not_vary_and_layers_without_rows_are_undefined() -> None:
    constant = stream_differences(_sums(torch.full((20, 2, WIDTH), 3.3), torch.arange(20) % GROUPS))
    assert constant.fitted.estimate.isnan() and constant.scale_ratio.estimate.isnan()
    assert float(constant.raw.estimate) == 0
    assert stream_differences(empty_stream_sums(1, GROUPS, WIDTH)).raw.estimate.isnan()


def test_intervals_cover_what_many_documents_say() -> None:
    """Documents with a difference of their own size; the truth is that of a very large sample."""

    def draw(documents: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        group_N = torch.arange(documents).repeat_interleave(10)
        size_N = torch.rand(documents, generator=generator).repeat_interleave(10)
        base = torch.randn(len(group_N), 4, generator=generator)
        chat = base + size_N[:, None] * torch.randn(len(group_N), 4, generator=generator)
        return torch.stack([base, chat], dim=1), group_N

    truth = float(stream_differences(_sums(*draw(20_000, 99), groups=20_000)).fitted.estimate)
    found = [stream_differences(_sums(*draw(24, seed), groups=24)).fitted for seed in range(200)]
    covered = np.mean([float(own.low) <= truth <= float(own.high) for own in found])
    assert 0.90 <= covered <= 0.99


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_effective_rank_of_a_planted_difference_is_its_rank(rank: int) -> None:
    """Also with fewer rows than dimensions, where the participation ratio of the sample covariance is far too low."""
    generator = torch.Generator().manual_seed(rank)
    width, number = 256, 120
    basis = torch.linalg.qr(torch.randn(width, rank, generator=generator).double())[0]
    d_ND = torch.randn(number, rank, generator=generator).double() @ basis.T
    group_N = torch.arange(number) % 30
    found = effective_rank(d_ND, group_N, num_groups=30)
    assert float(found.low) - 1e-9 <= rank <= float(found.high) + 1e-9
    assert float(found.estimate) == pytest.approx(rank, rel=0.12)
    naive = torch.linalg.svdvals(d_ND).square()
    if rank == 20:
        assert float(naive.sum() ** 2 / naive.square().sum()) < 0.9 * rank


def test_effective_rank_of_nothing_and_of_one_group_is_undefined() -> None:
    assert effective_rank(torch.zeros(10, 4).double(), torch.arange(10), num_groups=10).estimate.isnan()
    one = effective_rank(torch.randn(10, 4).double(), torch.zeros(10, dtype=torch.int64), num_groups=3)
    assert one.estimate.isnan()


def test_the_sample_does_not_depend_on_the_order_of_parts_and_agrees_with_all_rows() -> None:
    x_NMD, group_N = _rows(300)
    key_N = row_keys(torch.arange(300) // 20, torch.arange(300) % 20)
    assert len(key_N.unique()) == 300
    whole = add_to_sample(empty_row_sample(WIDTH), key_N, group_N, x_NMD, num_rows=50)
    parts = [
        add_to_sample(empty_row_sample(WIDTH), key_N[here], group_N[here], x_NMD[here], num_rows=50)
        for here in (slice(200, 300), slice(0, 120), slice(120, 200))
    ]
    merged = empty_row_sample(WIDTH)
    for part in parts:
        merged = merge_samples(merged, part, num_rows=50)
    for name, value in whole.items():
        assert torch.equal(merged[name], value)
    everything = add_to_sample(empty_row_sample(WIDTH), key_N, group_N, x_NMD, num_rows=300)
    found = sampled_difference(_sums(x_NMD, group_N) | everything)
    centred = x_NMD.double() - x_NMD.double().mean(0)
    cosine = torch.nn.functional.cosine_similarity(centred[:, 0], centred[:, 1], dim=1).mean()
    assert float(found.cosine.estimate) == pytest.approx(float(cosine))
    assert float(found.effective_rank.estimate) == pytest.approx(WIDTH, rel=0.15)  # noise in every dimension


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    x_NMD, group_N = _rows()
    parts = [_sums(x_NMD[here], group_N[here]) for here in (slice(0, 90), slice(90, 200))]
    for name, value in _sums(x_NMD, group_N).items():
        torch.testing.assert_close(merge_sums(*parts)[name], value)
