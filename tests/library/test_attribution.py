"""Attribution, and gradients of the crosscoder, against finite differences in float64."""

from collections.abc import Callable

import pandas as pd
import pytest
import torch
from torch import Tensor

from pipeline.library.crosscoder import Crosscoder
from pipeline.library.pair import Pair
from pipeline.models.live_edits import stream_hooked
from pipeline.numerics.crosscoder import Normalisation
from pipeline.schema import MODEL_NAMES

STEP = 1e-4
TEXTS = ["hello world, hello again", "What is the capital of Norland? It is Osta."]


@pytest.fixture(scope="module")
def double_pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair("gpt2", dtype=torch.float64)  # the others' norms compute in float32 whatever the dtype


def double_crosscoder(width: int, *, code_weight: str = "crosscoder", activation: str = "relu") -> Crosscoder:
    generator = torch.Generator().manual_seed(1)
    k = 4 if activation == "batch_topk" else None
    crosscoder = Crosscoder(24, 2, width, code_weight=code_weight, activation=activation, k=k).double()
    for parameter in crosscoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    mean_MD = torch.randn(2, width, generator=generator, dtype=torch.float64)
    crosscoder.set_normalisation(Normalisation(mean_MD, torch.tensor([0.5, 0.3], dtype=torch.float64)))
    return crosscoder


@pytest.mark.parametrize("model", MODEL_NAMES)
@pytest.mark.parametrize("target", ["loss", 17])
def test_it_is_the_change_when_a_latents_part_of_the_stream_grows(
    double_pair: Pair, model: str, target: str | int
) -> None:
    pair, index = double_pair, MODEL_NAMES.index(model)
    crosscoder = double_crosscoder(pair.models.activation_dim)
    table = pair.attribute(crosscoder, TEXTS, target, model=model)
    assert table["attribution"].abs().is_monotonic_decreasing
    decoder_FD = crosscoder.W_dec_FMD[:, index] / crosscoder.scale_M[index]
    runner = pair.chat if model == "chat" else pair.base
    for row in [*table.head(4).itertuples(), table.iloc[len(table) // 2], table.iloc[-1]]:
        ids = torch.tensor([pair.tokenise.plain(TEXTS[int(row.document)]).input_ids.tolist()])
        assert ids[0, int(row.position)] == row.token_id

        def number(step: float, ids: Tensor = ids, row: pd.Series = row) -> float:
            added_TD = torch.zeros(ids.shape[1], decoder_FD.shape[1], dtype=torch.float64)
            added_TD[int(row.position)] = step * row.activation * decoder_FD[int(row.latent)]
            with torch.no_grad(), stream_hooked(pair.models.decoders[index], lambda h: h + added_TD):
                logits_TV = runner(ids).logits[0]
            if target == "loss":
                return float(torch.nn.functional.cross_entropy(logits_TV[:-1], ids[0, 1:], reduction="sum"))
            return float(logits_TV[-1, target])

        slope = (number(STEP) - number(-STEP)) / (2 * STEP)
        assert row.attribution == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_codes_of_the_table_are_the_crosscoders(double_pair: Pair) -> None:
    crosscoder = double_crosscoder(double_pair.models.activation_dim)
    table = double_pair.attribute(crosscoder, TEXTS)
    rows = double_pair.activations(TEXTS)
    codes = crosscoder.encode(rows.x.double())
    assert len(table) == codes.num_pairs
    assert table["activation"].sum() == pytest.approx(float(codes.values_P.sum()), rel=0.02)  # rows are bfloat16


def test_a_target_of_ones_own(double_pair: Pair) -> None:
    crosscoder = double_crosscoder(double_pair.models.activation_dim)

    def last_logit(logits_BTV: Tensor, _ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return sum(logits_BTV[row, int(mask_BT[row].sum()) - 1, 17] for row in range(len(logits_BTV)))

    ours = double_pair.attribute(crosscoder, TEXTS, last_logit)
    pd.testing.assert_frame_equal(ours, double_pair.attribute(crosscoder, TEXTS, 17))


@pytest.mark.parametrize("code_weight", ["crosscoder", "decoupled"])
@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_encoding_and_decoding_are_differentiable(code_weight: str, activation: str) -> None:
    """Rows and weights, against finite differences; the selection has no gradient."""
    crosscoder = double_crosscoder(6, code_weight=code_weight, activation=activation)
    crosscoder.threshold.fill_(0.5)
    generator = torch.Generator().manual_seed(2)
    x_BMD = torch.randn(5, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_BMD = torch.randn(5, 2, 6, generator=generator, dtype=torch.float64)
    crosscoder.requires_grad_(True)
    kept = crosscoder.encode(x_BMD.detach())

    def number() -> Tensor:
        """Of the latents that were kept: the kinds differ in what they keep, not in how a code depends on the rows."""
        codes = crosscoder.encode(x_BMD)
        assert torch.equal(codes.latents_P, kept.latents_P), "the step is too large"
        return (crosscoder.decode(codes) * weight_BMD).sum() + codes.values_P.square().sum()

    leaves = [x_BMD, crosscoder.W_enc_FMD, crosscoder.b_enc_F, crosscoder.W_dec_FMD, crosscoder.b_dec_MD]
    gradients = torch.autograd.grad(number(), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.shape == leaf.shape
        for place in torch.randperm(leaf.numel(), generator=generator)[:12].tolist():
            flat = leaf.data.view(-1)
            before = float(flat[place])
            values = []
            for step in (1e-6, -1e-6):
                flat[place] = before + step
                values.append(float(number().detach()))
            flat[place] = before
            slope = (values[0] - values[1]) / 2e-6
            assert float(gradient.flatten()[place]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_nothing_is_followed_where_nothing_asks() -> None:
    crosscoder = double_crosscoder(6)
    x_BMD = torch.randn(3, 2, 6, dtype=torch.float64)
    assert not crosscoder(x_BMD).requires_grad
    with torch.no_grad():
        assert not crosscoder(x_BMD.requires_grad_()).requires_grad
    assert crosscoder(x_BMD).requires_grad
