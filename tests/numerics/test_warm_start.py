"""Training that begins with a crosscoder's weights: its losses at step 0, what is refused; several fits on one read."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.numerics import fitting
from pipeline.numerics.crosscoder import Crosscoder, Normalisation
from pipeline.numerics.trainer import CrosscoderTrainer
from pipeline.numerics.warm_start import start_from
from tests.numerics.small import D, M, changed, make_spec, rows

SPECS: dict[str, Any] = {
    "batch_topk": make_spec(),
    "decoupled": make_spec(code_weight="decoupled"),
    "topk": make_spec(kind="topk"),
    "l1": make_spec(kind="l1", mu=0.05),
    "jumprelu": make_spec(kind="jumprelu", mu=0.02),
    "matryoshka": make_spec(kind="matryoshka", num_groups=3),
    "shared_l1": make_spec(kind="shared_l1", mu=0.05),
    "delta": make_spec(kind="delta", k=4),
    "difference": make_spec(inputs="difference"),
    "dedicated": make_spec(dedicated_frac=0.25),
}
NORMALISATION = Normalisation(torch.randn(M, D, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, 2.0]))


@pytest.mark.parametrize("name", SPECS)
def test_the_losses_of_a_published_folder_come_again_at_step_0(name: str, tmp_path: Path) -> None:
    """To what float32 files hold: the same reconstruction, codes and explained variance, and then the same steps."""
    spec, x_BMD = SPECS[name], rows(99, 200)
    first = CrosscoderTrainer(spec, normalisation=NORMALISATION)
    fitting.initialise([first], rows(0))
    for _ in fitting.steps([first], [rows(step) for step in range(20)]):
        pass
    first.crosscoder().save_pretrained(tmp_path)
    published = Crosscoder.from_pretrained(tmp_path)
    second = CrosscoderTrainer(changed(spec, seed=7), normalisation=published.normalisation)
    fitting.initialise([second], rows(5), [published])
    assert second.num_steps_done == 0
    assert second.evaluate(x_BMD) == pytest.approx(first.evaluate(x_BMD), rel=1e-5, nan_ok=True)
    torch.testing.assert_close(second.crosscoder()(x_BMD), published(x_BMD), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.state_dict()["threshold"], first.state_dict()["threshold"], rtol=1e-6, atol=0.0)
    first.step(x_BMD)
    second.step(x_BMD)
    for key in ("loss_reconstruction", "l0"):
        assert second.metrics()[key] == pytest.approx(first.metrics()[key], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_latents": 16}, r"\[16, 2, 8\] to start from, got \[32, 2, 8\]"),
        ({"activation_dim": 4}, r"\[32, 2, 4\] to start from, got \[32, 2, 8\]"),
        ({"kind": "topk"}, "activation 'topk' to start from, got 'batch_topk'"),
        ({"inputs": "difference"}, "inputs 'difference' to start from, got 'both'"),
        ({"code_weight": "sae"}, "code_weight 'sae' to start from, got 'crosscoder'"),
        ({"dedicated_frac": 0.25}, "64 other numbers in W_enc_FN"),
    ],
)
def test_a_crosscoder_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    start = CrosscoderTrainer(make_spec()).crosscoder()
    with pytest.raises(ValueError, match=message):
        start_from(CrosscoderTrainer(make_spec(**changes)), start)


def test_fits_on_one_read_are_those_of_single_reads() -> None:
    specs = [make_spec(k=k, lr=lr, seed=seed) for k in (2, 4) for lr in (1e-2, 1e-3) for seed in (0, 1)]
    batches = [rows(step) for step in range(8)]

    def fitted(own: list[Any]) -> list[dict[str, Any]]:
        trainers = [CrosscoderTrainer(spec) for spec in own]
        fitting.initialise(trainers, batches[0])
        assert list(fitting.steps(trainers, batches)) == list(range(1, 9))
        return [trainer.state_dict() for trainer in trainers]

    for spec, together in zip(specs, fitted(specs), strict=True):
        (alone,) = fitted([spec])
        for key, value in alone.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(together[key])), key
