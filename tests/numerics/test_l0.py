"""What decides L0 is what the settings say: mu over its range, a target, k after its annealing; and what is dead.

Rows are sparse sums of more concepts than dimensions, half of them on one row in a hundred and the most frequent on one
in two, normalised per model as a run does by default.
"""

import itertools
import logging

import pytest
import torch
from torch import Tensor

from pipeline.config.crosscoder import CrosscoderSection
from pipeline.numerics.crosscoder import Normalisation
from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.sparsities.jumprelu import JumpRelu
from pipeline.numerics.sparsities.l1 import L1
from pipeline.numerics.spec import CrosscoderSpec
from pipeline.numerics.trainer import CrosscoderTrainer
from tests.numerics.small import changed
from tests.numerics.small import make_spec as make_small_spec
from tests.numerics.small import rows as small_rows

M, D, C, F, B = 2, 48, 160, 256, 256


def rows(seed: int, num_rows: int = B) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    concepts_CMD = torch.nn.functional.normalize(torch.randn(C, 1, D, generator=generator), dim=2).repeat(1, M, 1)
    concepts_CMD[::4, 0] = 0
    generator = torch.Generator().manual_seed(100 + seed)
    is_present = torch.rand(num_rows, C, generator=generator) < torch.logspace(-0.3, -2, C)
    code_BC = is_present * (0.5 + torch.rand(num_rows, C, generator=generator))
    noise = 0.02 * torch.randn(num_rows, M, D, generator=generator)
    return torch.einsum("BC,CMD->BMD", code_BC, concepts_CMD) + noise


def normalisation() -> Normalisation:
    x_BMD = rows(999_999, 4096)
    centred_BMD = x_BMD - x_BMD.mean(0)
    return Normalisation(x_BMD.mean(0), (D / centred_BMD.square().sum(2).mean(0)).sqrt())


def spec_with(sparsity: L1 | JumpRelu | BatchTopK, *, num_steps: int, lr: float) -> CrosscoderSpec:
    return CrosscoderSpec(
        num_models=M,
        activation_dim=D,
        num_latents=F,
        num_steps=num_steps,
        sparsity=sparsity,
        lr=lr,
        lr_warmup_steps=20,
        lr_decay_frac=0.3,
    )


def fit(spec: CrosscoderSpec, num_rows: int = B) -> CrosscoderTrainer:
    trainer = CrosscoderTrainer(spec, normalisation=normalisation())
    trainer.initialise(rows(0))
    for step in range(spec.num_steps):
        trainer.step(rows(step, num_rows))
    return trainer


def test_jumprelu_mu_sets_l0_over_five_decades() -> None:
    held_out = rows(500_000, 2048)
    found = [
        fit(spec_with(JumpRelu(mu=mu), num_steps=200, lr=3e-3), 64).evaluate(held_out)["l0"]
        for mu in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    ]
    assert all(larger > smaller for larger, smaller in itertools.pairwise(found)), found
    assert found[0] > 20 and found[-1] < 1, found


@pytest.mark.parametrize("kind", [L1, JumpRelu])
def test_a_target_is_met_at_inference(kind: type[L1] | type[JumpRelu]) -> None:
    trainer = fit(spec_with(kind(target_l0=32), num_steps=500, lr=1e-2 if kind is L1 else 3e-3))
    assert trainer.evaluate(rows(500_000, 2048))["l0"] == pytest.approx(32, rel=0.05)
    assert trainer.metrics()["mu"] != pytest.approx(kind().mu, rel=0.1)


def test_mu_follows_l0_and_stands_still_at_the_end() -> None:
    spec = make_small_spec(kind="l1", mu=0.01, target_l0=2.0, mu_warmup_steps=4)
    trainer, seen = CrosscoderTrainer(spec), []
    for step in range(spec.num_steps):
        trainer.step(small_rows(step))
        seen.append(trainer.metrics()["mu"])
    assert seen[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])  # steering begins after the warm-up
    assert seen[5] > 0.01  # half of all latents fire at the start, and that is more than 2
    assert seen[-2] == seen[-1]


@pytest.mark.parametrize("kind", ["l1", "jumprelu"])
def test_a_steered_run_resumes_bit_for_bit(kind: str) -> None:
    spec = make_small_spec(kind=kind, mu=0.01, target_l0=2.0)
    straight, first = CrosscoderTrainer(spec), CrosscoderTrainer(spec)
    for step in range(12):
        straight.step(small_rows(step))
        if step < 5:
            first.step(small_rows(step))
    resumed = CrosscoderTrainer(spec)
    resumed.load_state_dict(first.state_dict())
    for step in range(5, 12):
        resumed.step(small_rows(step))
    for name, value in straight.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state_dict()[name])), name


def test_thresholds_start_at_the_size_of_the_activations() -> None:
    """A model ten times larger begins with the same codes, and a few huge rows change little."""
    spec, x_BMD = spec_with(JumpRelu(), num_steps=10, lr=1e-3), rows(0)
    trainers = [CrosscoderTrainer(spec) for _ in range(3)]
    huge = x_BMD.clone()
    huge[:4] *= 1000
    for trainer, first in zip(trainers, (x_BMD, 10 * x_BMD, huge), strict=True):
        trainer.initialise(first)
    plain, larger, outliers = (float(trainer.crosscoder().jump_threshold_F[0]) for trainer in trainers)
    assert larger == pytest.approx(10 * plain, rel=1e-5)
    assert outliers == pytest.approx(plain, rel=0.15)


def test_after_annealing_inference_keeps_k() -> None:
    sparsity = BatchTopK(k=12, k_start=80, k_anneal_steps=200, threshold_start_step=50)
    trainer = fit(spec_with(sparsity, num_steps=300, lr=3e-3))
    metrics = trainer.metrics()
    assert metrics["l0"] == pytest.approx(12, abs=0.01)
    assert metrics["l0_inference"] == pytest.approx(12, rel=0.05)
    assert trainer.evaluate(rows(500_000, 2048))["l0"] == pytest.approx(12, rel=0.05)


def test_a_gap_between_training_and_inference_is_said_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    spec = make_small_spec(num_steps=6)
    trainer = CrosscoderTrainer(spec)
    for step in range(6):
        trainer.step(small_rows(step))
        trainer.metrics()
    caplog.clear()
    state = trainer.state_dict()
    state["threshold"] *= 0.2
    trainer.load_state_dict(state)
    with caplog.at_level(logging.WARNING):
        metrics = trainer.metrics()
    assert metrics["l0"] == 3 and metrics["l0_inference"] > 3.3
    assert f"{metrics['l0_inference']:.4g}" in caplog.text


def test_a_latent_that_fires_in_this_step_is_not_dead_in_it() -> None:
    """As the paper's code counts: with rows of one batch as the limit, exactly the latents that do not fire are."""
    spec = make_small_spec(dead_after_rows=24, k=1)
    trainer = CrosscoderTrainer(spec)
    trainer.step(small_rows(0))
    fired = trainer.state_dict()["rows_since_fired_F"] == 0
    assert trainer.metrics()["loss_auxiliary"] > 0  # the first step has dead latents already
    moved = (trainer.state_dict()["means.W_enc_FN"] != 0).any(1)
    assert bool(moved[fired].all()) and bool(moved[~fired].any())
    # All latents fire: none is dead, whatever the counters said before.
    everything = CrosscoderTrainer(changed(spec, k=32))
    state = everything.state_dict()
    state["rows_since_fired_F"] += 1000
    state["num_rows_seen"] = 1000
    everything.load_state_dict(state)
    everything.step(small_rows(0, 96))
    assert everything.metrics()["loss_auxiliary"] == 0


def test_a_bare_kind_has_the_papers_start_and_clipping() -> None:
    for kind, start, clip in (("l1", 0.005, None), ("batch_topk", 1.0, 1.0)):
        section = CrosscoderSection(name="a", num_latents=128, sparsity={"kind": kind})  # type: ignore[arg-type]
        dumped = section.model_dump(mode="json")
        assert (dumped["init_norm"], dumped["clip_norm"]) == (start, clip)
    own = CrosscoderSection(name="a", num_latents=128, init_norm=0.1, clip_norm=1.0, sparsity={"kind": "l1"})  # type: ignore[arg-type]
    assert (own.init_norm, own.clip_norm) == (0.1, 1.0)
    bare = changed(make_small_spec(kind="l1", mu=0.1), init_norm="auto", clip_norm="auto")
    assert (bare.start_norm, bare.max_grad_norm) == (0.005, None)
    state = CrosscoderTrainer(bare).state_dict()
    assert float(state["weights.W_dec_FN"].view(32, 2, 8).norm(dim=2).mean()) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("l1", {"mu": 0.0, "target_l0": 8.0}, "mu > 0 with target_l0 8, got 0"),
        ("jumprelu", {"target_l0": 32.0}, "target_l0 < num_latents = 32 .*target_l0=32"),
        ("jumprelu", {"bandwidth": 2.0}, "bandwidth .*got 2.0"),
        ("l1", {"init_norm": "small"}, "init_norm .*'small'"),
        ("l1", {"clip_norm": "none"}, "clip_norm .*'none'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_small_spec(kind=kind, **changes)
