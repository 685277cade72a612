"""Guesses of the training encoder (floors, blocks, dense or sparse) cost time at most: the result never changes."""

import pytest
import torch
from torch import Tensor

from pipeline.numerics.encoder import TrainingEncoder
from pipeline.numerics.initial import initial_parameters
from pipeline.numerics.kernels.cpu import CpuKernels
from pipeline.numerics.parallel import Mesh
from pipeline.numerics.sparsities.base import Kept
from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer
from tests.numerics.small import changed

SPEC = CrosscoderSpec(
    num_models=2,
    activation_dim=8,
    num_latents=64,
    num_steps=20,
    sparsity=BatchTopK(k=3),
    lr=1e-2,
    lr_warmup_steps=2,
    dtype="float64",
    init_norm=1.0,
    clip_norm=1.0,
)


def rows(seed: int, num_rows: int = 50) -> Tensor:
    return torch.randn(num_rows, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def select(spec: CrosscoderSpec, floor: float | None) -> Kept:
    parameters = initial_parameters(spec, slice(0, spec.num_latents), torch.device("cpu"))
    encoder = TrainingEncoder(spec, CpuKernels(), Mesh(), torch.device("cpu"))
    encoder.floor = floor
    return encoder.select(parameters, rows(0).flatten(1), k=float(spec.sparsity.k or 0))


@pytest.mark.parametrize("code_weight", ["crosscoder", "decoupled"])
@pytest.mark.parametrize("floor", [1e-9, 1.0, 5.0, 1e9])
@pytest.mark.parametrize("block_rows", [7, 1000])
def test_the_floor_and_the_blocks_never_change_the_selection(code_weight: str, floor: float, block_rows: int) -> None:
    spec = changed(SPEC, code_weight=code_weight)
    expected = select(spec, None)
    actual = select(changed(spec, block_rows=block_rows), floor)
    assert actual.smallest is not None and expected.smallest is not None
    assert torch.equal(actual.smallest, expected.smallest)
    for ours, theirs in zip(actual.codes, expected.codes, strict=True):
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
        elif isinstance(ours, Tensor):
            assert torch.equal(ours, theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["l1", "jumprelu"])
def test_dense_and_sparse_steps_train_the_same_crosscoder(kind: str) -> None:
    states = []
    for cutoff in (0.0, 1.0):
        trainer = CrosscoderTrainer(changed(SPEC, kind=kind, mu=0.05, block_rows=20))
        trainer.kernels.dense_cutoff = cutoff
        for step in range(10):
            trainer.step(rows(step))
        states.append(trainer.state_dict() | {"l0": trainer.metrics()["l0"]})
    for name, value in states[0].items():
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(states[1][name]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["batch_topk", "l1"])
def test_bfloat16_products_over_float32_weights_stay_close(kind: str) -> None:
    spec = changed(SPEC, kind=kind, mu=0.05, dtype="float32")
    losses = []
    for precision in ("float32", "bfloat16"):
        trainer = CrosscoderTrainer(changed(spec, precision=precision))
        for step in range(15):
            trainer.step(rows(step).float())
        losses.append(trainer.metrics()["loss"])
        assert trainer.state_dict()["weights.W_enc_FN"].dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_initial_weights_follow_the_seed_and_not_the_division() -> None:
    spec = changed(SPEC, num_latents=2500, init_norm=0.3)
    cpu = torch.device("cpu")
    whole = initial_parameters(spec, slice(0, 2500), cpu)
    parts = [initial_parameters(spec, slice(start, start + 625), cpu) for start in range(0, 2500, 625)]
    assert torch.equal(torch.cat([part.W_dec_FN for part in parts]), whole.W_dec_FN)
    W_dec_FMD = whole.W_dec_FN.view(2500, 2, 8)
    torch.testing.assert_close(W_dec_FMD.norm(dim=2), torch.full((2500, 2), 0.3, dtype=torch.float64))
    assert torch.equal(W_dec_FMD[:, 0], W_dec_FMD[:, 1])
    assert torch.equal(whole.W_enc_FN, whole.W_dec_FN)
    other = initial_parameters(changed(spec, seed=1), slice(0, 2500), cpu)
    assert not torch.equal(other.W_dec_FN, whole.W_dec_FN)
