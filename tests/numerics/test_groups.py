"""Recipes that divide the dictionary into groups: Matryoshka, shared latents with a reduced penalty, delta crosscoders.

Loss and gradients against autograd of the formulas in the sparsities' docstrings, written with dense codes; selection
against a full sort; files against training's own rule.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.numerics.codes import SparseCodes, groups_of, split_groups
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.numerics.parallel import Mesh
from pipeline.numerics.sparsities.delta import Delta
from pipeline.numerics.sparsities.matryoshka import Matryoshka
from pipeline.numerics.sparsities.shared_l1 import SharedL1
from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer
from tests.numerics.small import B, D, F, M, changed, make_spec, rows

MATRYOSHKA = make_spec(kind="matryoshka", num_groups=3, dtype="float64", lr_warmup_steps=0, clip_norm=None)
SHARED = make_spec(kind="shared_l1", mu=0.05, shared_frac=0.3, dtype="float64", lr_warmup_steps=0, clip_norm=None)
DELTA = make_spec(
    kind="delta", k=4, shared_frac=0.75, delta_k_frac=0.4, dtype="float64", lr_warmup_steps=0, clip_norm=None
)
ALL = {"matryoshka": MATRYOSHKA, "shared_l1": SHARED, "delta": DELTA}
SPLIT = {"matryoshka": (8, 16, F), "shared_l1": (9, F), "delta": (24, F)}
each = pytest.mark.parametrize("kind", ALL)


def train(spec: CrosscoderSpec, num_steps: int) -> CrosscoderTrainer:
    trainer = CrosscoderTrainer(spec)
    trainer.initialise(rows(0).double())
    for step in range(num_steps):
        trainer.step(rows(step).double())
    return trainer


def largest(score_BF: Tensor, num_keep: int) -> Tensor:
    """Whether a score is among the largest of the matrix, by a full sort."""
    cut = score_BF.flatten().sort(descending=True).values[num_keep - 1]
    return (score_BF >= cut) & (score_BF > 0)


def formula(spec: CrosscoderSpec, weights: dict[str, Tensor], x_BMD: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and codes of a step without dead latents, as the docstrings state them."""
    W_dec_FMD = weights["W_dec_FN"].view(F, M, D)
    f_BF = torch.relu(x_BMD.flatten(1) @ weights["W_enc_FN"].T + weights["b_enc_F"])
    bias_MD, w_F = weights["b_dec_N"].view(M, D), W_dec_FMD.norm(dim=2).sum(1)

    def missing(code_BF: Tensor) -> Tensor:
        return x_BMD - bias_MD - torch.einsum("BF,FMD->BMD", code_BF, W_dec_FMD)

    score_BF = (f_BF * w_F).detach()
    if spec.sparsity.kind == "matryoshka":
        code_BF = f_BF * largest(score_BF, 3 * B)
        prefixes = [missing(code_BF * (torch.arange(F) < end)).norm(dim=2).mean() for end in (8, 16, F)]
        return torch.stack(prefixes).mean(), code_BF
    if spec.sparsity.kind == "shared_l1":
        share_F = torch.where(torch.arange(F) < 9, torch.tensor(0.15, dtype=torch.float64), 1.0)
        return missing(f_BF).norm(dim=2).mean() + 0.05 * (f_BF * w_F * share_F).sum() / B, f_BF
    is_shared_F = torch.arange(F) < 24
    keep_BF = largest(score_BF * is_shared_F, round(0.6 * 4 * B)) | largest(score_BF * ~is_shared_F, round(0.4 * 4 * B))
    residual_BMD = missing(f_BF * keep_BF)
    difference_BD = x_BMD[:, 1] - x_BMD[:, 0] - (bias_MD[1] - bias_MD[0])
    # Shared latents are equal in both models: the difference is explained by the others alone.
    others_BF = f_BF * keep_BF * ~is_shared_F
    apart_FD = W_dec_FMD[:, 1] - W_dec_FMD[:, 0]
    delta = (difference_BD - others_BF @ apart_FD).norm(dim=1).mean()
    return residual_BMD.norm(dim=2).mean() + delta, f_BF * keep_BF


@each
@pytest.mark.parametrize("num_steps", [0, 3])
def test_loss_and_gradients_are_those_of_autograd(kind: str, num_steps: int) -> None:
    spec, x_BMD = ALL[kind], rows(99).double()
    trainer = train(spec, num_steps)
    before = trainer.state_dict()
    names = ("W_enc_FN", "b_enc_F", "W_dec_FN", "b_dec_N")
    weights = {name: before[f"weights.{name}"].clone().requires_grad_() for name in names}
    loss, code_BF = formula(spec, weights, x_BMD)
    loss.backward()
    trainer.step(x_BMD)
    metrics, after = trainer.metrics(), trainer.state_dict()
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
    assert metrics["l0"] == pytest.approx(float((code_BF > 0).sum()) / B)
    for name, weight in weights.items():
        gradient = weight.grad
        assert gradient is not None
        if name == "W_dec_FN" and spec.sparsity.ties_first_group:
            shared_FMD = gradient.view(F, M, D)[: SPLIT[kind][0]]
            shared_FMD.copy_(shared_FMD.mean(1, keepdim=True).expand_as(shared_FMD))
        # Adam's first moment moves by (1 - beta1) times the gradient.
        moved = after[f"means.{name}"] - 0.9 * before[f"means.{name}"]
        torch.testing.assert_close(moved, 0.1 * gradient, rtol=1e-8, atol=1e-12)


@each
def test_finite_differences_agree(kind: str) -> None:
    """The step's own loss, moved along a direction that keeps what is selected."""
    spec, x_BMD = ALL[kind], rows(99).double()
    trainer = train(spec, 2)
    state = trainer.state_dict()
    generator = torch.Generator().manual_seed(0)
    direction_FN = torch.randn(F, M * D, generator=generator, dtype=torch.float64)
    if spec.sparsity.ties_first_group:
        shared_FMD = direction_FN.view(F, M, D)[: SPLIT[kind][0]]
        shared_FMD.copy_(shared_FMD.mean(1, keepdim=True).expand_as(shared_FMD))
    losses = []
    for sign in (1, -1):
        moved = CrosscoderTrainer(spec)
        moved.load_state_dict(state | {"weights.W_dec_FN": state["weights.W_dec_FN"] + sign * 1e-6 * direction_FN})
        moved.step(x_BMD)
        losses.append(moved.metrics()["loss"])
    trainer.step(x_BMD)
    gradient_FN = (trainer.state_dict()["means.W_dec_FN"] - 0.9 * state["means.W_dec_FN"]) / 0.1
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(float((gradient_FN * direction_FN).sum()), rel=1e-4)


@pytest.mark.parametrize("kind", ["matryoshka", "delta"])
def test_dead_latents_still_explain_the_residual_of_all(kind: str) -> None:
    spec = changed(ALL[kind], dead_after_rows=2 * B, k=2)
    trainer = train(spec, 12)
    assert trainer.metrics()["loss_auxiliary"] > 0
    plain = train(changed(spec, aux_weight=0.0), 12)
    assert plain.metrics()["loss_auxiliary"] == 0
    before = trainer.state_dict()
    silent_F = before["rows_since_fired_F"] >= 2 * B
    trainer.step(rows(12).double())
    moved = (trainer.state_dict()["means.W_dec_FN"] - 0.9 * before["means.W_dec_FN"])[silent_F]
    assert bool(moved.any())


@each
def test_blocks_of_rows_change_nothing_and_a_run_resumes_to_the_bit(kind: str) -> None:
    straight, blocks = train(ALL[kind], 8), train(changed(ALL[kind], block_rows=5), 8)
    first, resumed = train(ALL[kind], 5), CrosscoderTrainer(ALL[kind])
    resumed.load_state_dict(first.state_dict())
    for step in range(5, 8):
        resumed.step(rows(step).double())
    for name, value in straight.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state_dict()[name])), name
        torch.testing.assert_close(torch.as_tensor(blocks.state_dict()[name]), torch.as_tensor(value))


@each
def test_a_saved_crosscoder_is_the_same_and_keeps_what_training_keeps(kind: str, tmp_path: Path) -> None:
    trainer = train(changed(ALL[kind], dtype="float32", lr=1e-3), 40)
    crosscoder, x_BMD = trainer.crosscoder(), rows(50)
    crosscoder.save_pretrained(tmp_path)
    loaded = Crosscoder.from_pretrained(tmp_path)
    assert torch.equal(loaded(x_BMD), crosscoder(x_BMD))
    assert loaded.activation == {"matryoshka": "batch_topk", "shared_l1": "relu", "delta": "jumprelu"}[kind]
    codes = loaded.encode(rows(39))
    assert codes.num_pairs / B == pytest.approx(trainer.metrics()["l0_inference"])
    if kind == "delta":
        f_BF = torch.relu(rows(39).flatten(1) @ loaded.W_enc_FMD.flatten(1).T + loaded.b_enc_F)
        score_BF, threshold = f_BF * loaded.code_weights_F(), trainer.state_dict()["threshold"]
        of_latent_F = torch.where(torch.arange(F) < 24, threshold[0], threshold[1])
        torch.testing.assert_close(codes.to_dense(), f_BF * (score_BF > of_latent_F))


@pytest.mark.parametrize("kind", ["shared_l1", "delta"])
def test_shared_latents_have_one_decoder_row_to_the_bit(kind: str) -> None:
    trainer = train(ALL[kind], 10)
    W_dec_FMD, (num_shared, _) = trainer.crosscoder().W_dec_FMD, SPLIT[kind]
    assert torch.equal(W_dec_FMD[:num_shared, 0], W_dec_FMD[:num_shared, 1])
    assert bool((W_dec_FMD[num_shared:, 0] != W_dec_FMD[num_shared:, 1]).any(1).all())
    state = trainer.state_dict()
    state["weights.W_dec_FN"][1, 0] += 1
    with pytest.raises(ValueError, match="1 of them"):
        CrosscoderTrainer(ALL[kind]).load_state_dict(state)


def test_early_latents_of_a_matryoshka_reconstruct_more_than_those_of_batch_topk() -> None:
    x_BMD = rows(77, 500).double()
    missing = []
    for spec in (MATRYOSHKA, changed(MATRYOSHKA, kind="batch_topk")):
        crosscoder = train(spec, 40).crosscoder()
        code_BF = crosscoder.encode(x_BMD).to_dense()
        code_BF[:, 8:] = 0
        missing.append(float((x_BMD - crosscoder.decode(code_BF)).norm(dim=2).mean()))
    assert missing[0] < missing[1]


def test_a_split_by_groups_holds_the_same_pairs() -> None:
    code_BF = torch.relu(torch.randn(5, 12, generator=torch.Generator().manual_seed(2)))
    ends = (0, 3, 3, 12)
    split = split_groups(SparseCodes.from_dense(code_BF), ends)
    parts = [
        torch.where((torch.arange(12) >= a) & (torch.arange(12) < b), code_BF, 0.0)
        for a, b in zip((0, *ends[:-1]), ends, strict=True)
    ]
    assert torch.equal(split.to_dense(), torch.cat(parts))
    assert groups_of(torch.arange(12), ends).tolist() == [1] * 3 + [3] * 9


@each
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_divide_the_groups(kind: str, num_ranks: int) -> None:
    spec = ALL[kind]
    slices = [Mesh(latent_size=num_ranks, latent_rank=rank).latent_slice(F) for rank in range(num_ranks)]
    whole = groups_of(torch.arange(F), spec.group_ends(slice(0, F)))
    parts = [groups_of(torch.arange(one.stop - one.start), spec.group_ends(one)) for one in slices]
    assert spec.group_ends(slice(0, F)) == SPLIT[kind] and torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("matryoshka", {"num_latents": 3}, "num_latents >= 4 for num_groups 3 .*got 3"),
        ("matryoshka", {"num_groups": 1}, "num_groups >= 2.*got 1"),
        ("shared_l1", {"num_latents": 3}, r"shared_frac 0\.3 of 3"),
        ("shared_l1", {"shared_frac": 1.0}, r"shared_frac > 0 and < 1.*got 1\.0"),
        ("shared_l1", {"inputs": "difference"}, "got 'difference'"),
        ("delta", {"code_weight": "decoupled"}, "'decoupled'"),
        ("delta", {"dedicated_frac": 0.1}, r"0\.1"),
        ("delta", {"num_models": 3}, "got 3"),
        ("delta", {"k": 30}, "at most 8 active of 8 other latents .*got 12 of k 30"),
        ("delta", {"k": 4, "k_start": 30}, "k 30"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(ALL[kind], **changes)


def test_defaults_fit_dictionaries_of_usual_size() -> None:
    for sparsity in (Matryoshka(), SharedL1(), Delta()):
        sparsity.check_size(1024)
        assert sparsity.group_ends(1024)[-1] == 1024
