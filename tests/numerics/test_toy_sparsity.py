"""A sparsity that only this file knows, added as CONTRIBUTING says: one class and one line in the registry.

A soft threshold keeps what a pre-activation has above a constant: f = relu(preact - amount). It is trained, saved,
loaded and run without a change anywhere else, and its gradients are held against autograd of the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from torch import Tensor

from pipeline.config.crosscoder import field_docs, section_fields
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.numerics.settings import PositiveFloat
from pipeline.numerics.sparsities.base import Kept, Sparsity
from pipeline.numerics.sparsities.registry import SPARSITIES
from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer
from tests.numerics.small import D, F, M, rows

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.numerics.batch import InferenceBlock, TrainingBatch
    from pipeline.numerics.codes import SparseCodes


@dataclass(frozen=True, kw_only=True)
class SoftThreshold(Sparsity):
    """What a pre-activation has above a constant."""

    kind: ClassVar[str] = "soft"
    activation: ClassVar[str] = "soft"
    published_class: ClassVar[str] = "SoftThresholdCrossCoder"
    published_tensors: ClassVar[tuple[str, ...]] = ("threshold",)

    amount: PositiveFloat = 0.25
    """What is taken off every pre-activation; raising it lowers L0."""

    @property
    def start_threshold(self) -> float:
        """Kept for inference."""
        return self.amount

    def select_in_training(self, batch: TrainingBatch, k: float) -> Kept:
        """Pairs above the amount, less the amount."""
        return Kept(batch.encode(lambda preact_BF: batch.positive(preact_BF - self.amount)))

    @classmethod
    def select_at_inference(cls, block: InferenceBlock) -> SparseCodes:
        """The same with the crosscoder's threshold."""
        amount = float(block.threshold)
        return block._replace(preact_BF=block.preact_BF - amount).positive()


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> CrosscoderSpec:
    monkeypatch.setitem(SPARSITIES, SoftThreshold.kind, SoftThreshold)
    return CrosscoderSpec(
        num_models=M,
        activation_dim=D,
        num_latents=F,
        num_steps=40,
        sparsity=SoftThreshold(amount=0.5),
        lr=1e-2,
        lr_warmup_steps=0,
        dtype="float64",
    )


def test_a_toy_sparsity_trains_and_is_saved_and_loaded(spec: CrosscoderSpec, tmp_path: Path) -> None:
    trainer = CrosscoderTrainer(spec)
    trainer.initialise(rows(0).double())
    before = trainer.evaluate(rows(99).double())
    for step in range(spec.num_steps):
        trainer.step(rows(step).double())
    after = trainer.evaluate(rows(99).double())
    assert after["loss_reconstruction"] < before["loss_reconstruction"]
    crosscoder = trainer.crosscoder().float()
    crosscoder.save_pretrained(tmp_path)
    loaded, x_BMD = Crosscoder.from_pretrained(tmp_path), rows(7)
    assert (loaded.activation, float(loaded.threshold)) == ("soft", 0.5)
    assert torch.equal(loaded(x_BMD), crosscoder(x_BMD))
    preact_BF = x_BMD.flatten(1) @ loaded.W_enc_FMD.detach().flatten(1).T + loaded.b_enc_F.detach()
    torch.testing.assert_close(loaded.encode(x_BMD).to_dense(), (preact_BF - 0.5).relu(), rtol=1e-5, atol=1e-5)
    resumed = CrosscoderTrainer(spec)
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.evaluate(rows(99).double()) == after


def test_its_first_step_follows_autograd(spec: CrosscoderSpec) -> None:
    trainer, x_BMD = CrosscoderTrainer(spec), rows(3).double()
    state = trainer.state_dict()
    W_enc_FN, W_dec_FN = (state[f"weights.{name}"].requires_grad_() for name in ("W_enc_FN", "W_dec_FN"))
    code_BF = (x_BMD.flatten(1) @ W_enc_FN.T - 0.5).relu()
    (x_BMD - (code_BF @ W_dec_FN).view_as(x_BMD)).norm(dim=2).mean().backward()
    trainer.step(x_BMD)
    means: list[Tensor] = [trainer.state_dict()[f"means.{name}"] for name in ("W_enc_FN", "W_dec_FN")]
    clip = max(1.0, trainer.metrics()["grad_norm"])
    for mean_FN, weights_FN in zip(means, (W_enc_FN, W_dec_FN), strict=True):
        assert weights_FN.grad is not None
        # Adam's first moment after one step is (1 - beta1) times the clipped gradient.
        torch.testing.assert_close(mean_FN * clip * 10, weights_FN.grad)


def test_its_settings_become_the_fields_of_a_section() -> None:
    assert field_docs(SoftThreshold) == {"amount": "What is taken off every pre-activation; raising it lowers L0."}
    (name,) = section_fields(SoftThreshold)
    assert name == "amount"
    with pytest.raises(ValueError, match=r"amount > 0 and finite, got 0\.0"):
        SoftThreshold(amount=0.0)
