"""Difference dictionaries and dedicated latents: what is trained, what stays 0, what is published."""

from pathlib import Path

import pytest
import torch

from pipeline.numerics.crosscoder import Crosscoder, Normalisation
from pipeline.numerics.parallel import Mesh
from pipeline.numerics.recipes import fitted_activations, fixed_rows, inputs_of
from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer
from tests.numerics.small import B, D, F, M, changed, make_spec, rows

SPEC = make_spec(dead_after_rows=3 * B)
DIFFERENCE = changed(SPEC, inputs="difference")
CHAT = changed(SPEC, inputs="chat")
DEDICATED = changed(SPEC, dedicated_frac=0.25)
CHAT_ONLY, BASE_ONLY, FREE = slice(0, 8), slice(8, 16), slice(16, F)
KINDS = {
    "batch_topk": {},
    "topk": {"kind": "topk"},
    "l1": {"kind": "l1", "mu": 0.05},
    "jumprelu": {"kind": "jumprelu", "mu": 0.02, "bandwidth": 0.1},
}


def train(spec: CrosscoderSpec, num_steps: int = 12, inputs: str = "both") -> CrosscoderTrainer:
    """inputs: what the rows given are; the trainer itself does as the spec says."""
    trainer = CrosscoderTrainer(spec)
    trainer.initialise(fitted_activations(rows(0), inputs))
    for step in range(num_steps):
        trainer.step(fitted_activations(rows(step), inputs))
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_a_difference_dictionary_is_the_one_model_dictionary_of_the_difference(kind: str) -> None:
    spec = changed(DIFFERENCE, **KINDS[kind])
    ours = train(spec)
    plain = train(changed(spec, inputs="both", num_models=1), inputs="difference")
    for name, value in plain.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(ours.state_dict()[name])), name
    assert ours.metrics()["fve"] == plain.metrics()["fve"]
    x_BMD, published, single = rows(99, 200), ours.crosscoder(), plain.crosscoder()
    codes, expected = published.encode(x_BMD), single.encode(fitted_activations(x_BMD, "difference"))
    torch.testing.assert_close(codes.to_dense(), expected.to_dense(), rtol=1e-4, atol=1e-5)
    x_hat_BMD = published.decode(expected)
    torch.testing.assert_close(x_hat_BMD[:, 1:] - x_hat_BMD[:, :1], single.decode(expected))
    assert ours.evaluate(x_BMD)["fve"] == pytest.approx(
        plain.evaluate(fitted_activations(x_BMD, "difference"))["fve"], abs=1e-4
    )
    assert inputs_of(published) == "difference" and inputs_of(train(SPEC, 1).crosscoder()) == "both"


@pytest.mark.parametrize("kind", KINDS)
def test_a_sae_of_the_chat_model_is_the_one_model_dictionary_of_its_rows(kind: str) -> None:
    spec = changed(CHAT, **KINDS[kind])
    ours, plain = train(spec), train(changed(spec, inputs="both", num_models=1), inputs="chat")
    for name, value in plain.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(ours.state_dict()[name])), name
    metrics = ours.metrics()
    assert (
        metrics["fve"] == metrics["fve_chat"] == plain.metrics()["fve"] and metrics["fve_base"] != metrics["fve_base"]
    )
    x_BMD, published, single = rows(99, 200), ours.crosscoder(), plain.crosscoder()
    codes, expected = published.encode(x_BMD), single.encode(x_BMD[:, 1:])
    torch.testing.assert_close(codes.to_dense(), expected.to_dense(), rtol=1e-4, atol=1e-5)
    x_hat_BMD = published.decode(expected)
    torch.testing.assert_close(x_hat_BMD[:, 1:], single.decode(expected))
    assert not x_hat_BMD[:, 0].any() and inputs_of(published) == "chat"
    assert torch.equal(
        published.encode(x_BMD.flip(0) * torch.tensor([[5.0], [1.0]])).to_dense().flip(0), codes.to_dense()
    )


def test_a_normalised_difference_is_published_in_raw_units() -> None:
    generator = torch.Generator().manual_seed(4)
    normalisation = Normalisation(torch.randn(M, D, generator=generator), torch.tensor([0.5, 2.0]))
    trainer = CrosscoderTrainer(DIFFERENCE, normalisation=normalisation)
    for step in range(5):
        trainer.step(rows(step))
    x_BMD, crosscoder = rows(99), trainer.crosscoder()
    x_hat_BMD = (crosscoder(x_BMD) - normalisation.mean_MD) * normalisation.scale_M[:, None]
    residual_BMD = fitted_activations(
        (x_BMD - normalisation.mean_MD) * normalisation.scale_M[:, None] - x_hat_BMD, "difference"
    )
    expected = float(residual_BMD.norm(dim=2).mean())
    assert trainer.evaluate(x_BMD)["loss_reconstruction"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dedicated_latents_never_touch_the_other_model(kind: str) -> None:
    spec = changed(DEDICATED, **KINDS[kind])
    trainer = train(spec)
    crosscoder, free = trainer.crosscoder(), train(changed(spec, dedicated_frac=0.0)).crosscoder()
    for name in ("W_enc_FMD", "W_dec_FMD"):
        weights, others = getattr(crosscoder, name), getattr(free, name)
        assert not weights[CHAT_ONLY, 0].any() and not weights[BASE_ONLY, 1].any()
        assert bool(weights[CHAT_ONLY, 1].any(1).all()) and bool(weights[BASE_ONLY, 0].any(1).all())
        assert bool(weights[FREE].any(2).all()) and bool(others.any(2).all())
    start = CrosscoderTrainer(spec).crosscoder()
    assert not torch.equal(start.W_dec_FMD[CHAT_ONLY, 1], crosscoder.W_dec_FMD[CHAT_ONLY, 1])


def test_masked_gradients_are_those_of_a_crosscoder_without_the_other_rows() -> None:
    spec = changed(DEDICATED, kind="l1", mu=0.05, clip_norm=None, dtype="float64", lr_warmup_steps=0)
    trainer = CrosscoderTrainer(spec)
    x_BMD = rows(3).double()
    parameters = trainer.state_dict()
    weights = {name: parameters[f"weights.{name}"].clone().requires_grad_() for name in ("W_enc_FN", "W_dec_FN")}
    f_BF = torch.relu(x_BMD.flatten(1) @ weights["W_enc_FN"].T)
    residual_BMD = x_BMD - (f_BF @ weights["W_dec_FN"]).view(B, M, D)
    norm_FM = (weights["W_dec_FN"].view(F, M, D).square().sum(2) + 1e-300).sqrt()
    loss = residual_BMD.norm(dim=2).mean() + 0.05 * (f_BF * norm_FM.sum(1)).sum() / B
    loss.backward()
    trainer.step(x_BMD)
    state = trainer.state_dict()
    for name, weight in weights.items():
        assert weight.grad is not None
        gradient_FMD = weight.grad.view(F, M, D)
        gradient_FMD[CHAT_ONLY, 0] = gradient_FMD[BASE_ONLY, 1] = 0
        # Adam's first moment after one step is (1 - beta1) times the gradient.
        torch.testing.assert_close(state[f"means.{name}"], 0.1 * weight.grad, rtol=1e-9, atol=1e-12)
    assert trainer.metrics()["grad_norm"] == pytest.approx(
        float(torch.cat([state[name].flatten() for name in state if name.startswith("means.")]).norm()) / 0.1
    )


@pytest.mark.parametrize("spec", [DIFFERENCE, CHAT, DEDICATED], ids=["difference", "chat", "dedicated"])
def test_resume_is_bit_exact_and_a_saved_crosscoder_is_the_same(spec: CrosscoderSpec, tmp_path: Path) -> None:
    straight, first = train(spec, 12), train(spec, 7)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = CrosscoderTrainer(spec)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(7, 12):
        resumed.step(rows(step))
    for name, value in straight.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state_dict()[name])), name
    straight.crosscoder().save_pretrained(tmp_path / "saved")
    loaded, x_BMD = Crosscoder.from_pretrained(tmp_path / "saved"), rows(50)
    assert torch.equal(loaded.encode(x_BMD).to_dense(), straight.crosscoder().encode(x_BMD).to_dense())
    assert torch.equal(loaded(x_BMD), straight.crosscoder()(x_BMD))
    assert inputs_of(loaded) == spec.inputs


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_rank_fixes_its_own_part_of_the_dedicated_latents(num_ranks: int) -> None:
    spec = changed(DEDICATED, num_latents=36, dedicated_frac=0.3)
    whole = torch.ones(36, M * D)
    for own in fixed_rows(spec, slice(0, 36)):
        whole[own.latents, own.columns] = 0
    assert whole[:10, :D].sum() == whole[10:20, D:].sum() == 0 and whole.sum() == 36 * M * D - 20 * D
    parts = []
    for rank in range(num_ranks):
        latents = Mesh(latent_size=num_ranks, latent_rank=rank).latent_slice(36)
        part = torch.ones(latents.stop - latents.start, M * D)
        for own in fixed_rows(spec, latents):
            part[own.latents, own.columns] = 0
        parts.append(part)
    assert torch.equal(torch.cat(parts), whole)


def test_a_state_with_numbers_in_fixed_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="got 64 other numbers in W_enc_FN"):
        CrosscoderTrainer(DEDICATED).load_state_dict(train(SPEC, 1).state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": "base"}, "inputs to be one of both, difference, chat, got 'base'"),
        ({"inputs": "chat", "num_models": 3}, "got 3"),
        ({"dedicated_frac": 0.6}, "dedicated_frac .*got 0.6"),
        ({"inputs": "difference", "num_models": 3}, "got 3"),
        ({"inputs": "difference", "code_weight": "decoupled"}, "got 0.0 and 'decoupled'"),
        ({"inputs": "difference", "dedicated_frac": 0.1}, "got 0.1 and 'crosscoder'"),
        ({"dedicated_frac": 0.1, "num_models": 1}, "got 1"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(SPEC, **changes)
