"""Closed forms of the small pure functions: schedules, moments, the geometric median, losses, code weights."""

import pytest
import torch

from pipeline.numerics import moments, schedule
from pipeline.numerics.code_weight import add_code_weight_gradient, code_weights, decoder_norms
from pipeline.numerics.objective import auxiliary_loss, reconstruction_loss
from pipeline.numerics.parallel import Mesh


def test_learning_rate_warms_up_holds_and_decays() -> None:
    rates = [schedule.learning_rate(step, lr=8.0, warmup_steps=4, num_steps=12, decay_frac=0.25) for step in range(13)]
    assert rates == [2, 4, 6, 8, 8, 8, 8, 8, 8, 6, 4, 2, 0]


@pytest.mark.parametrize("decay_frac", [0.0, 1.0])
def test_every_step_of_a_run_has_a_positive_rate(decay_frac: float) -> None:
    for num_steps in (1, 2, 7):
        for warmup in (0, 1, 100):
            rates = [
                schedule.learning_rate(step, lr=1.0, warmup_steps=warmup, num_steps=num_steps, decay_frac=decay_frac)
                for step in range(num_steps)
            ]
            assert all(0 < rate <= 1 for rate in rates)


def test_k_anneals_linearly_and_stays() -> None:
    seen = [schedule.active_latents(step, k=10, k_start=50, anneal_steps=4) for step in range(6)]
    assert seen == [50, 40, 30, 20, 10, 10]
    assert schedule.active_latents(0, k=10, k_start=None, anneal_steps=4) == 10
    assert [schedule.ramp(step, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert schedule.ramp(0, 0) == 1


def test_moments_merge_to_those_of_all_rows() -> None:
    x_BMD = torch.randn(50, 2, 3) * torch.tensor([1.0, 30.0])[:, None] + 1000
    whole = x_BMD.double()
    parts = [moments.moments_of(part) for part in x_BMD.split([1, 0, 20, 29])]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    torch.testing.assert_close(merged.mean_MD, whole.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(merged.variance_M(), whole.var(0, correction=0).sum(1), rtol=1e-4, atol=0)
    assert int(merged.num_rows) == 50


def test_variance_explained_is_one_for_nothing_left_and_nan_for_constant_rows() -> None:
    x = moments.moments_of(torch.randn(40, 2, 3))
    nothing = moments.moments_of(torch.zeros(40, 2, 3))
    assert moments.explained_fractions(x, nothing) == {"fve_base": 1, "fve_chat": 1, "fve": 1}
    assert moments.explained_fractions(x, x) == pytest.approx({"fve_base": 0, "fve_chat": 0, "fve": 0})
    assert moments.variance_explained(nothing, x).isnan().all()
    assert moments.explained_fractions(
        moments.moments_of(torch.randn(9, 3, 2)), moments.moments_of(torch.zeros(9, 3, 2))
    )


def test_the_geometric_median_ignores_an_outlier() -> None:
    square = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    torch.testing.assert_close(moments.geometric_median(square[:, None], Mesh()), torch.zeros(1, 2))
    line = torch.tensor([0.0, 1, 2, 3, 1e6]).view(5, 1, 1)
    assert float(moments.geometric_median(line, Mesh(), num_iterations=300)) == pytest.approx(2, abs=1e-2)


def test_reconstruction_losses_by_hand() -> None:
    residual_BMD = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    l2, mse = (reconstruction_loss(residual_BMD, kind, 1) for kind in ("l2", "mse"))
    assert (float(l2.loss), float(mse.loss)) == (2.5, 12.5)
    torch.testing.assert_close(l2.grad_BMD, -torch.tensor([[[0.3, 0.4], [0.0, 0.0]]]))
    torch.testing.assert_close(mse.grad_BMD, -residual_BMD)
    with pytest.raises(ValueError, match="'huber'"):
        reconstruction_loss(residual_BMD, "huber", 1)


def test_the_auxiliary_loss_of_a_residual_that_does_not_vary_is_zero() -> None:
    result = auxiliary_loss(torch.ones(2, 1, 1), torch.zeros(2, 1, 1), weight=1.0, variation=torch.tensor(0.0))
    assert float(result.loss) == 0
    assert float(result.grad_BMD.abs().max()) == 0


@pytest.mark.parametrize(
    ("kind", "expected"), [("crosscoder", 17.0), ("decoupled", 17.0), ("sae", 13.0), ("mixed", 14.7), ("none", 1.0)]
)
def test_code_weights_by_hand(kind: str, expected: float) -> None:
    W_dec_FMD = torch.tensor([[[3.0, 4.0], [12.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    norm_FM = decoder_norms(W_dec_FMD)
    assert code_weights(norm_FM, kind).tolist() == pytest.approx([expected, 1.0 if kind == "none" else 0.0])
    gradient = torch.zeros_like(W_dec_FMD)
    add_code_weight_gradient(gradient, W_dec_FMD, norm_FM, grad_w_F=torch.ones(2), kind=kind)
    assert bool(gradient.isfinite().all())
    leaf = W_dec_FMD[:1].clone().requires_grad_()
    code_weights(decoder_norms(leaf), kind).sum().backward() if kind != "none" else None
    torch.testing.assert_close(gradient[:1], torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
