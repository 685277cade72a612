"""Every backend against the dense formula; the reference in float64 is the oracle."""

import pytest
import torch

from pipeline.numerics.codes import SparseCodes, concatenate
from pipeline.numerics.kernels.base import Kernels, latent_order
from pipeline.numerics.kernels.choose import choose_kernels
from pipeline.numerics.kernels.cpu import CpuKernels
from pipeline.numerics.kernels.reference import ReferenceKernels

BACKENDS = [ReferenceKernels(), CpuKernels(), CpuKernels(use_csr=False)]
backends = pytest.mark.parametrize("kernels", BACKENDS, ids=lambda kernels: kernels.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def random_codes(num_rows: int, num_latents: int, dtype: torch.dtype, *, share: float = 0.2) -> SparseCodes:
    generator = torch.Generator().manual_seed(num_rows + num_latents)
    code_BF = torch.rand(num_rows, num_latents, dtype=dtype, generator=generator)
    code_BF = torch.where(torch.rand(code_BF.shape, generator=generator) < share, code_BF, 0)
    code_BF[1] = 0
    code_BF[:, 2] = 0
    return SparseCodes.from_dense(code_BF)


@backends
@dtypes
def test_products_equal_the_dense_formula(kernels: Kernels, dtype: torch.dtype) -> None:
    codes = random_codes(11, 13, dtype)
    code_BF = codes.to_dense()
    W_FN, g_BN = torch.randn(13, 6, dtype=dtype), torch.randn(11, 6, dtype=dtype)
    torch.testing.assert_close(kernels.decode(codes, W_FN), code_BF @ W_FN)
    g_P = kernels.value_gradients(codes, g_BN, W_FN)
    torch.testing.assert_close(g_P, (g_BN @ W_FN.T)[codes.rows_P(), codes.latents_P])
    order = latent_order(codes)
    out_FN = torch.full_like(W_FN, torch.nan)
    kernels.weight_gradients(order, codes.values_P[order.order_P], g_BN, out_FN)
    torch.testing.assert_close(out_FN, code_BF.T @ g_BN)
    torch.testing.assert_close(kernels.latent_sums(order, codes.values_P[order.order_P]), code_BF.sum(0))


@backends
@dtypes
@pytest.mark.parametrize("floor", [0.0, 0.7])
def test_collect_returns_all_scores_from_the_floor(kernels: Kernels, dtype: torch.dtype, floor: float) -> None:
    generator = torch.Generator().manual_seed(1)
    preact_BF = torch.randn(9, 40, dtype=dtype, generator=generator)
    preact_BF[3, 4] = torch.nan
    weight_F = torch.rand(40, dtype=dtype, generator=generator) + 0.5
    weight_F[5] = 0
    codes = kernels.collect(preact_BF, weight_F, floor)
    score_BF = torch.nan_to_num(preact_BF).clamp(min=0) * weight_F
    expected = SparseCodes.from_dense(torch.where(score_BF >= floor, torch.nan_to_num(preact_BF), 0) * (weight_F > 0))
    assert torch.equal(codes.row_offsets, expected.row_offsets)
    assert torch.equal(codes.latents_P, expected.latents_P)
    assert torch.equal(codes.values_P, expected.values_P)


@backends
def test_collect_keeps_a_score_that_equals_the_floor(kernels: Kernels) -> None:
    preact_BF = torch.rand(50, 200, generator=torch.Generator().manual_seed(2))
    weight_F = torch.rand(200, generator=torch.Generator().manual_seed(3))
    scores = preact_BF * weight_F
    for floor in scores.view(-1)[::997]:
        codes = kernels.collect(preact_BF, weight_F, float(floor))
        kept = codes.values_P * weight_F[codes.latents_P]
        assert int((kept >= floor).sum()) == int((scores >= floor).sum())


@backends
def test_an_empty_batch_of_pairs(kernels: Kernels) -> None:
    codes = kernels.collect(-torch.ones(3, 5), torch.ones(5), 0.0)
    assert codes.num_pairs == 0
    assert torch.equal(kernels.decode(codes, torch.ones(5, 2)), torch.zeros(3, 2))
    assert kernels.value_gradients(codes, torch.ones(3, 2), torch.ones(5, 2)).shape == (0,)
    order = latent_order(codes)
    out_FN = torch.full((5, 2), torch.nan)
    kernels.weight_gradients(order, codes.values_P, torch.ones(3, 2), out_FN)
    assert torch.equal(out_FN, torch.zeros(5, 2))
    assert torch.equal(kernels.latent_sums(order, codes.values_P), torch.zeros(5))


def test_codes_survive_dense_keep_and_concatenation() -> None:
    codes = random_codes(7, 9, torch.float32)
    dense = codes.to_dense()
    assert torch.equal(SparseCodes.from_dense(dense).values_P, codes.values_P)
    kept = codes.keep(codes.values_P > 0.5)
    assert torch.equal(kept.to_dense(), torch.where(dense > 0.5, dense, 0))
    both = concatenate([codes, kept])
    assert torch.equal(both.to_dense(), torch.cat([dense, kept.to_dense()]))
    assert float(codes.l0()) == pytest.approx(float((dense > 0).sum()) / 7)


@pytest.mark.parametrize("num_latents", [50, 70_000])
def test_pairs_are_ordered_by_latent_and_then_row(num_latents: int) -> None:
    """Small dictionaries are sorted by 16-bit numbers, larger ones and all on CUDA by 32-bit numbers."""
    picks = torch.randint(num_latents - 1, (40, 30), generator=torch.Generator().manual_seed(5))
    picks[:, 0] = 7
    pairs = [(latent, row) for row, line in enumerate(picks.tolist()) for latent in sorted(set(line))]
    offsets = torch.tensor([0] + [sum(row <= last for _, row in pairs) for last in range(40)])
    latents_P = torch.tensor([latent for latent, _ in pairs])
    order = latent_order(SparseCodes(torch.ones(len(pairs)), latents_P, offsets, num_latents))
    assert order.rows_P.tolist() == [row for _, row in sorted(pairs)]
    assert latents_P[order.order_P].tolist() == [latent for latent, _ in sorted(pairs)]
    assert order.latent_offsets.shape == (num_latents + 1,)
    assert torch.equal(order.latent_offsets.diff(), torch.bincount(latents_P, minlength=num_latents))


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="'cuda_magic'"):
        choose_kernels(torch.device("cpu"), "cuda_magic")
