"""Latent Scaling against targets spelled out per latent, and its intervals against planted truth."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.scaling import (
    TARGETS,
    ScalingEstimates,
    add_scaling_sums,
    empty_scaling_sums,
    scaling_estimates,
    target_sums,
)
from pipeline.numerics.statistics import Interval


def _problem(dtype: torch.dtype, *, num_rows: int = 200, num_latents: int = 15, width: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    code_BF = torch.rand(num_rows, num_latents, generator=generator, dtype=torch.float64)
    code_BF = torch.where(code_BF > 0.7, code_BF, 0.0)
    code_BF[:, 3] = 0  # never fires
    W_dec_FMD = torch.randn(num_latents, 2, width, generator=generator, dtype=torch.float64)
    b_dec_MD = torch.randn(2, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_rows, 2, width, generator=generator, dtype=torch.float64)
    problem = {"code_BF": code_BF, "W_dec_FMD": W_dec_FMD, "b_dec_MD": b_dec_MD}
    problem["x_BMD"] = torch.einsum("BF,FMD->BMD", code_BF, W_dec_FMD) + b_dec_MD + 0.3 * noise
    return {name: value.to(dtype) for name, value in problem.items()}


def _sums(problem: dict[str, Tensor], direction_FD: Tensor, rows: slice, num_groups: int) -> Tensor:
    code_BF, W_dec_FMD, b_dec_MD = problem["code_BF"][rows], problem["W_dec_FMD"], problem["b_dec_MD"]
    reconstruction_BMD = torch.einsum("BF,FMD->BMD", code_BF, W_dec_FMD) + b_dec_MD
    sums_SGF = empty_scaling_sums(num_groups=num_groups, num_models=2, num_latents=code_BF.shape[1])
    add_scaling_sums(
        sums_SGF,
        SparseCodes.from_dense(code_BF),
        error_BMD=problem["x_BMD"][rows] - reconstruction_BMD,
        reconstruction_BMD=reconstruction_BMD,
        groups_B=(torch.arange(len(problem["code_BF"])) // 5 % num_groups)[rows],
        direction_FD=direction_FD,
    )
    return sums_SGF


def _estimates(problem: dict[str, Tensor], sums_SGF: Tensor, direction_FD: Tensor) -> ScalingEstimates:
    return scaling_estimates(
        sums_SGF, W_dec_FMD=problem["W_dec_FMD"], b_dec_MD=problem["b_dec_MD"], direction_FD=direction_FD
    )


def _beta_by_least_squares(problem: dict[str, Tensor], direction_FD: Tensor) -> Tensor:
    """beta_TMF with every target built for every latent, solved as the regression that defines it; float64."""
    x_BMD, code_BF, W_dec_FMD, b_dec_MD = (
        problem[name].double() for name in ("x_BMD", "code_BF", "W_dec_FMD", "b_dec_MD")
    )
    num_latents = code_BF.shape[1]
    beta_TMF = torch.full((4, 2, num_latents), torch.nan, dtype=torch.float64)
    for latent in range(num_latents):
        f_B = code_BF[:, latent]
        if f_B.sum() == 0:
            continue
        regressor = torch.outer(f_B, direction_FD[latent].double()).reshape(-1, 1)
        for model in range(2):
            xh_BD = code_BF @ W_dec_FMD[:, model] + b_dec_MD[model]
            without_latent_BD = xh_BD - torch.outer(f_B, W_dec_FMD[latent, model])
            targets = (
                x_BMD[:, model],
                x_BMD[:, model] - b_dec_MD[model],
                xh_BD,
                x_BMD[:, model] - without_latent_BD,
            )
            for index, target_BD in enumerate(targets):
                beta_TMF[index, model, latent] = torch.linalg.lstsq(regressor, target_BD.reshape(-1, 1)).solution
    return beta_TMF


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-6)])
@pytest.mark.parametrize("is_chat_direction", [True, False])
def test_betas_equal_the_regression_that_defines_them(
    dtype: torch.dtype, tolerance: float, is_chat_direction: bool
) -> None:
    problem = _problem(dtype)
    direction_FD = problem["W_dec_FMD"][:, 1].contiguous()
    if not is_chat_direction:  # the random-direction control
        direction_FD = torch.randn(direction_FD.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    estimates = _estimates(problem, _sums(problem, direction_FD, slice(None), 8), direction_FD)
    expected_TMF = _beta_by_least_squares(problem, direction_FD)
    beta_TMF = torch.stack([estimates.beta[target].estimate for target in TARGETS])
    torch.testing.assert_close(beta_TMF, expected_TMF, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert torch.isnan(beta_TMF[:, :, 3]).all()
    for index, target in enumerate(TARGETS):
        is_ordered = (estimates.beta[target].low <= beta_TMF[index]) & (beta_TMF[index] <= estimates.beta[target].high)
        assert (is_ordered | beta_TMF[index].isnan()).all()
        nu_F = estimates.nu[target].estimate
        ratio_F = expected_TMF[index, 0] / expected_TMF[index, 1]
        is_defined_F = ~nu_F.isnan()
        torch.testing.assert_close(
            nu_F[is_defined_F], ratio_F[is_defined_F], rtol=100 * tolerance, atol=100 * tolerance
        )
        assert torch.isnan(nu_F[3])


def test_merged_shards_equal_one_pass() -> None:
    problem = _problem(torch.float64)
    direction_FD = problem["W_dec_FMD"][:, 1].contiguous()
    whole = _sums(problem, direction_FD, slice(None), 8)
    parts = [_sums(problem, direction_FD, slice(a, b), 8) for a, b in ((0, 30), (30, 31), (31, 31), (31, 200))]
    torch.testing.assert_close(sum(parts[1:], parts[0]), whole, rtol=1e-12, atol=1e-12)


def test_a_decoupled_code_returns_to_the_error_of_the_models_that_read_it_only() -> None:
    problem = _problem(torch.float64)
    code_BF, W_dec_FMD, b_dec_MD = problem["code_BF"], problem["W_dec_FMD"], problem["b_dec_MD"]
    codes = SparseCodes.from_dense(code_BF)
    is_read_PM = torch.rand(codes.num_pairs, 2, generator=torch.Generator().manual_seed(2)) > 0.3
    codes = codes._replace(model_mask_PM=is_read_PM)
    read_BMF = torch.zeros(len(code_BF), 2, code_BF.shape[1], dtype=torch.float64)
    for model in range(2):
        read_BMF[codes.rows_P(), model, codes.latents_P] = codes.values_P * is_read_PM[:, model]
    reconstruction_BMD = torch.einsum("BMF,FMD->BMD", read_BMF, W_dec_FMD) + b_dec_MD
    direction_FD = W_dec_FMD[:, 1].contiguous()
    sums_SGF = empty_scaling_sums(num_groups=4, num_models=2, num_latents=15, is_decoupled=True)
    arguments = {
        "error_BMD": problem["x_BMD"] - reconstruction_BMD,
        "reconstruction_BMD": reconstruction_BMD,
        "groups_B": torch.arange(len(code_BF)) % 4,
        "direction_FD": direction_FD,
    }
    add_scaling_sums(sums_SGF, codes, **arguments)
    sums_TMGF = target_sums(sums_SGF, W_dec_FMD=W_dec_FMD, b_dec_MD=b_dec_MD, direction_FD=direction_FD)
    for latent in range(15):
        for model in range(2):
            own_BD = torch.outer(read_BMF[:, model, latent], W_dec_FMD[latent, model])
            target_BD = arguments["error_BMD"][:, model] + own_BD
            expected = (code_BF[:, latent, None] * target_BD).sum(0) @ direction_FD[latent]
            assert float(sums_TMGF[3, model, :, latent].sum()) == pytest.approx(float(expected), abs=1e-9)
    with pytest.raises(ValueError, match="is_decoupled"):
        add_scaling_sums(empty_scaling_sums(num_groups=4, num_models=2, num_latents=15), codes, **arguments)


def test_a_concept_that_only_the_error_holds_is_shrinkage_and_one_in_other_latents_is_decoupling() -> None:
    """Three planted chat-only latents: new, shrunk away in base, and carried by another latent in base."""
    generator = torch.Generator().manual_seed(3)
    num_rows, width = 600, 8
    W_dec_FMD = torch.zeros(4, 2, width)
    W_dec_FMD[0, 1, 0] = W_dec_FMD[1, 1, 1] = W_dec_FMD[2, 1, 2] = 1  # the chat-only latents
    W_dec_FMD[3, 0, 2] = 1  # a base-only latent with the direction of latent 2
    code_BF = torch.rand(num_rows, 4, generator=generator) * (torch.rand(num_rows, 4, generator=generator) > 0.5)
    code_BF[:, 3] = code_BF[:, 2]
    noise_BMD = 0.05 * torch.randn(num_rows, 2, width, generator=generator)
    x_BMD = torch.einsum("BF,FMD->BMD", code_BF, W_dec_FMD) + noise_BMD
    x_BMD[:, 0, 1] += 0.8 * code_BF[:, 1]
    problem = {"x_BMD": x_BMD, "code_BF": code_BF, "W_dec_FMD": W_dec_FMD, "b_dec_MD": torch.zeros(2, width)}
    direction_FD = W_dec_FMD[:, 1].contiguous()
    nu = _estimates(problem, _sums(problem, direction_FD, slice(None), 32), direction_FD).nu
    torch.testing.assert_close(nu["error"].estimate[:3], torch.tensor([0.0, 0.8, 0.0]).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(
        nu["reconstruction"].estimate[:3], torch.tensor([0.0, 0.0, 1.0]).double(), atol=1e-6, rtol=0
    )
    assert math.isnan(nu["error"].estimate[3])  # u = 0: this latent has no chat direction
    assert nu["error"].high[0] < 0.2 <= nu["error"].low[1]


def _planted_latents(num_latents: int, documents: int, *, nu: float, spread: float, seed: int) -> ScalingEstimates:
    """Every latent fires in its own documents, a few rows each; base holds nu of it, varying between documents."""
    generator = torch.Generator().manual_seed(seed)
    width, rows_per_document = 6, 4
    num_rows = num_latents * documents * rows_per_document
    document_B = torch.arange(num_rows) // rows_per_document
    latent_B = document_B // documents
    strength = torch.exp(0.5 * torch.randn(num_latents * documents, generator=generator))
    f_B = strength[document_B] * (0.5 + torch.rand(num_rows, generator=generator))
    share = nu + spread * torch.randn(num_latents * documents, generator=generator)
    direction_FD = torch.randn(num_latents, width, generator=generator)
    own_BD = f_B[:, None] * direction_FD[latent_B]
    noise_BMD = 0.5 * torch.randn(num_rows, 2, width, generator=generator)
    x_BMD = torch.stack([share[document_B, None] * own_BD, own_BD], dim=1) + noise_BMD
    W_dec_FMD = torch.stack([torch.zeros_like(direction_FD), direction_FD], dim=1)
    reconstruction_BMD = torch.stack([torch.zeros_like(own_BD), own_BD], dim=1)
    codes = SparseCodes(f_B, latent_B, torch.arange(num_rows + 1), num_latents)
    sums_SGF = empty_scaling_sums(num_groups=64, num_models=2, num_latents=num_latents)
    add_scaling_sums(
        sums_SGF,
        codes,
        error_BMD=x_BMD - reconstruction_BMD,
        reconstruction_BMD=reconstruction_BMD,
        groups_B=torch.randint(64, (num_latents * documents,), generator=generator)[document_B],
        direction_FD=direction_FD,
    )
    return scaling_estimates(
        sums_SGF,
        W_dec_FMD=W_dec_FMD,
        b_dec_MD=torch.zeros(2, width),
        direction_FD=direction_FD,
        num_resamples=500,
    )


@pytest.mark.parametrize(("documents", "spread"), [(8, 0.3), (20, 0.3), (20, 0.0), (100, 0.3)])
def test_intervals_of_nu_contain_the_planted_truth_as_often_as_they_say(documents: int, spread: float) -> None:
    """1000 repeats: every latent is a repeat, with documents, rows and noise of its own."""
    estimates = _planted_latents(1000, documents, nu=0.3, spread=spread, seed=documents)
    # The planted beta(error, base) is nu too: the latent's direction is the concept's.
    for interval in (estimates.nu["error"], Interval(*(value_MF[0] for value_MF in estimates.beta["error"]))):
        assert interval.estimate.isfinite().float().mean() > 0.99
        is_covered = (interval.low <= 0.3) & (interval.high >= 0.3)
        assert 0.93 <= is_covered[interval.low.isfinite()].double().mean() <= 0.97


def test_two_documents_are_too_few_for_any_ratio() -> None:
    interval = _planted_latents(50, 2, nu=0.3, spread=0.1, seed=0).nu["error"]
    assert interval.estimate.isnan().all()
    assert interval.low.isnan().all()


def test_wrong_shapes_say_what_was_expected() -> None:
    problem = _problem(torch.float32)
    direction_FD = problem["W_dec_FMD"][:, 1].contiguous()
    with pytest.raises(ValueError, match="does not fit these activations"):
        _sums(problem, direction_FD[:, :5], slice(None), 8)
    with pytest.raises(ValueError, match="start the sums for this crosscoder"):
        _sums(problem, direction_FD[:5], slice(None), 8)
    one_model = empty_scaling_sums(num_groups=8, num_models=1, num_latents=15)
    with pytest.raises(ValueError, match="two models"):
        scaling_estimates(
            one_model,
            W_dec_FMD=problem["W_dec_FMD"][:, :1],
            b_dec_MD=problem["b_dec_MD"][:1],
            direction_FD=direction_FD,
        )
