"""Training on a CUDA device against the CPU; skipped where there is none."""

import pytest
import torch
from torch import Tensor

from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer
from tests.numerics.small import changed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
M, D, F, B = 2, 64, 1024, 256
SPEC = CrosscoderSpec(
    num_models=M,
    activation_dim=D,
    num_latents=F,
    num_steps=30,
    sparsity=BatchTopK(k=8, threshold_start_step=10, threshold_decay=0.9, dead_after_rows=8 * B),
    lr=1e-3,
    lr_warmup_steps=5,
    init_norm=1.0,
    clip_norm=1.0,
)


def rows(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    concepts = torch.randn(100, M * D, generator=torch.Generator().manual_seed(999))
    codes = torch.rand(B, 100, generator=generator) * (torch.rand(B, 100, generator=generator) < 0.05)
    return (codes @ concepts).view(B, M, D)


def train(spec: CrosscoderSpec, device: str) -> CrosscoderTrainer:
    trainer = CrosscoderTrainer(spec, device=device)
    trainer.initialise(rows(0))
    for step in range(spec.num_steps):
        trainer.step(rows(step).to(device))
    return trainer


@pytest.mark.parametrize("kind", ["batch_topk", "l1", "topk", "jumprelu"])
def test_cuda_trains_what_the_cpu_trains(kind: str) -> None:
    spec = changed(SPEC, kind=kind, mu=0.05)
    cpu, cuda = (train(spec, device).metrics() for device in ("cpu", "cuda"))
    assert cuda == pytest.approx(cpu, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("kind", ["batch_topk", "l1"])
def test_lower_precision_stays_close(kind: str, precision: str) -> None:
    exact = train(changed(SPEC, kind=kind, mu=0.05), "cuda").metrics()
    rough = train(changed(SPEC, kind=kind, mu=0.05, precision=precision), "cuda").metrics()
    assert rough["fve"] == pytest.approx(exact["fve"], abs=0.02)
    assert rough["loss"] == pytest.approx(exact["loss"], rel=0.03)


def test_two_runs_on_cuda_agree_to_the_last_bit() -> None:
    first, second = (train(SPEC, "cuda").state_dict() for _ in range(2))
    for name, value in first.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[name])), name


def test_a_bad_loss_on_cuda_leaves_the_weights_alone_and_is_reported() -> None:
    trainer = train(SPEC, "cuda")
    before = trainer.state_dict()
    x_BMD = rows(3).cuda()
    x_BMD[2, 0, 0] = torch.nan
    trainer.step(x_BMD)
    trainer.step(rows(4).cuda())  # also what comes after it, until someone asks
    assert torch.equal(trainer._parameters.W_dec_FN, before["weights.W_dec_FN"])
    assert torch.equal(trainer._rows_since_fired_F, before["rows_since_fired_F"])
    with pytest.raises(FloatingPointError, match="first at step 30"):
        trainer.metrics()
    trainer.load_state_dict(before)
    trainer.step(rows(4).cuda())
    assert trainer.metrics()["fve"] <= 1
