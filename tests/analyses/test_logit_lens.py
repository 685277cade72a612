"""Promoted tokens against the models' own modules, one direction at a time."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from compared_pairs import NUM_LAYERS, VOCAB, WIDTH, changed, model, pair_of
from torch import Tensor

from pipeline.analyses.logit_lens import FirstTokens, LogitLens
from pipeline.errors import InputError
from pipeline.models.decoder import SplitDecoder
from pipeline.models.direction_head import DirectionHead
from pipeline.numerics.logit_lens import LinearNorm, lens_logits, top_tokens
from pipeline.schema import BASE, CHAT
from pipeline.text.tokenizers import token_text


class Words:
    """A tokenizer of as many words as the models have ids."""

    def __len__(self) -> int:
        return VOCAB

    def decode(self, ids: list[int], **_options: Any) -> str:
        return "".join(f" w{index}" for index in ids)


def brute_force(architecture: str, own: Any, direction_LD: Tensor) -> Tensor:
    """Weights by the names that the family gives them, in numpy."""
    weight = {name: value.double().numpy() for name, value in own.state_dict().items()}
    d_LD = direction_LD.double().numpy()
    if architecture == "gpt2":
        d_LD = (d_LD - d_LD.mean(1, keepdims=True)) * weight["transformer.ln_f.weight"]
    else:
        d_LD = d_LD * ((architecture == "gemma2") + weight["model.norm.weight"])
    logits_LV = d_LD @ weight["lm_head.weight"].T
    return torch.from_numpy(logits_LV - logits_LV.mean(1, keepdims=True))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3", "gpt2"])
@pytest.mark.parametrize("layer", [0, NUM_LAYERS - 1])
def test_a_models_linear_head_is_its_norms_gain_and_its_unembedding(architecture: str, layer: int) -> None:
    own = model(architecture)
    direction_LD = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    logits_LV = DirectionHead(SplitDecoder(own, layer)).logits(direction_LD, VOCAB)
    expected_LV = brute_force(architecture, own, direction_LD)
    torch.testing.assert_close(logits_LV.double(), expected_LV, rtol=1e-4, atol=1e-4)
    assert logits_LV.mean(1).abs().max() < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_tokens_are_in_the_order_of_the_models_own_lens(architecture: str) -> None:
    """The model's norm, which divides by the direction's size, and its head, soft-cap included, rank tokens alike."""
    own = model(architecture)
    if architecture == "gemma2":
        assert own.config.final_logit_softcapping
    direction_LD = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    plain_LV = own.lm_head(own.model.norm(direction_LD[None]))[0]
    cap = own.config.final_logit_softcapping if architecture == "gemma2" else None
    plain_LV = plain_LV if cap is None else torch.tanh(plain_LV / cap) * cap
    logits_LV = DirectionHead(SplitDecoder(own, 2)).logits(direction_LD, VOCAB)
    assert torch.equal(logits_LV.argsort(dim=1), plain_LV.argsort(dim=1))


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_logits_are_what_a_direction_adds_at_a_row_of_known_size(architecture: str) -> None:
    """After the last layer, per unit of the row's size and along directions that leave the size as it is."""
    own = model(architecture)
    generator = torch.Generator().manual_seed(2)
    row_D = torch.randn(WIDTH, generator=generator).double() * 50
    d_D = torch.randn(WIDTH, generator=generator).double()
    d_D -= row_D * (row_D @ d_D) / (row_D @ row_D)
    own = copy.deepcopy(own).double()

    def logits(x_D: Tensor) -> Tensor:
        made: Tensor = own.lm_head(own.model.norm(x_D[None, None]))[0, 0]
        return made

    step = 1.0
    slope_V = (logits(row_D + step * d_D) - logits(row_D - step * d_D)) / (2 * step)
    slope_V = (slope_V - slope_V.mean()) * row_D.square().mean().sqrt()
    found_V = DirectionHead(SplitDecoder(own, 2)).logits(d_D[None], VOCAB)[0]
    torch.testing.assert_close(found_V, slope_V.float(), rtol=1e-3, atol=1e-3)


def test_a_head_in_bfloat16_is_read_without_a_further_rounding() -> None:
    own = model("gemma2").to(torch.bfloat16)
    direction_LD = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    logits_LV = DirectionHead(SplitDecoder(own, 2)).logits(direction_LD, VOCAB)
    # 1 + w is rounded to bfloat16 by the model itself, as its norm writes it.
    gain_D = (1 + own.model.norm.weight.float()).to(torch.bfloat16).float()
    expected_LV = lens_logits(LinearNorm(gain_D, False), own.lm_head.weight.T, direction_LD)
    torch.testing.assert_close(logits_LV, expected_LV, rtol=1e-4, atol=1e-4)


def test_without_a_final_norm_directions_go_to_the_head_as_they_are() -> None:
    own = model("llama")
    own.model.norm = torch.nn.Identity()
    direction_LD = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    logits_LV = DirectionHead(SplitDecoder(own, 2)).logits(direction_LD, VOCAB)
    expected_LV = lens_logits(LinearNorm(torch.ones(WIDTH), False), own.lm_head.weight.T, direction_LD)
    torch.testing.assert_close(logits_LV, expected_LV, rtol=1e-4, atol=1e-4)


def test_an_end_that_mixes_coordinates_is_refused() -> None:
    own = model("llama")
    own.model.norm = torch.nn.Sequential(own.model.norm, torch.nn.Linear(WIDTH, WIDTH))
    with pytest.raises(InputError, match=r"analyses\.logit_lens"):
        DirectionHead(SplitDecoder(own, 2))


def test_the_table_of_latents_equals_a_loop_over_them() -> None:
    models = model("gemma2"), changed(model("gemma2"), "lm_head")
    lens = LogitLens(pair_of(*models), Words(), num_tokens=4)
    decoder_LMD = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(3))
    table = lens.latents([7, 2, 5], decoder_LMD)
    assert table["latent"].tolist() == [7, 7, 7, 2, 2, 2, 5, 5, 5]
    assert table["member"].tolist() == ["base", "chat", "difference"] * 3
    for place, (_, rows) in enumerate(table.groupby("latent", sort=False)):
        base, chat = (brute_force("gemma2", models[m], decoder_LMD[place, m][None])[0].numpy() for m in (BASE, CHAT))
        for row, logits in zip(rows.to_dict("records"), (base, chat, chat - base), strict=True):
            order = np.argsort(logits)
            assert row["promoted_ids"] == order[::-1][:4].tolist()
            assert row["suppressed_ids"] == order[:4].tolist()
            assert row["promoted"] == [f" w{index}" for index in row["promoted_ids"]]
            np.testing.assert_allclose(row["promoted_logits"], logits[row["promoted_ids"]], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(row["suppressed_logits"], logits[row["suppressed_ids"]], rtol=1e-3, atol=1e-4)


def test_no_latents_give_an_empty_table_and_one_model_twice_no_difference() -> None:
    own = model("llama")
    lens = LogitLens(pair_of(own, own), Words(), num_tokens=3)
    assert lens.latents([], torch.zeros(0, 2, WIDTH)).empty
    same_LMD = torch.randn(2, 1, WIDTH).expand(2, 2, WIDTH)
    difference = lens.latents([0, 1], same_LMD).query("member == 'difference'")
    assert np.abs(np.stack(difference["promoted_logits"].tolist())).max() == 0


def test_first_tokens_are_the_means_of_their_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BMD = torch.randn(400, 2, WIDTH, generator=generator).bfloat16()
    position_B = torch.randint(1, 9, (400,), generator=generator).int()  # position 0 is BOS, which gives no row
    corpus_B = torch.randint(0, 2, (400,), generator=generator).int()
    lens = LogitLens(pair_of(model("llama"), model("llama", seed=1)), Words(), num_tokens=3)
    first = FirstTokens(corpora=("web", "chat"), activation_dim=WIDTH, num_positions=4)
    parts = []
    for half in (slice(0, 150), slice(150, 400)):
        parts.append(first.start())
        first.update(parts[-1], x_BMD[half], position_B[half], corpus_B[half])
    table = first.table(first.merge(*parts), lens)
    assert list(zip(table["corpus"], table["position"], strict=True)) == [
        (name, position) for name in ("web", "chat") for position in (1, 2, 3)
    ]
    for row in table.to_dict("records"):
        own_B = (corpus_B == ("web", "chat").index(row["corpus"])) & (position_B == row["position"])
        mean_MD = x_BMD[own_B].double().mean(0)
        difference_D = mean_MD[CHAT] - mean_MD[BASE]
        assert row["num_documents"] == int(own_B.sum())
        assert row["norm"] == pytest.approx(float(difference_D.norm()))
        assert row["norm_base"] == pytest.approx(float(mean_MD[BASE].norm()))
        logits_V = brute_force("llama", model("llama", seed=1), difference_D[None])[0]
        assert row["promoted_ids"] == logits_V.argsort(descending=True)[:3].tolist()


def test_the_most_extreme_tokens_come_first_and_are_no_more_than_there_are() -> None:
    promoted, suppressed = top_tokens(torch.tensor([[0.0, 3.0, -2.0, 1.0]]), 9)
    assert promoted.ids_LN.tolist() == [[1, 3, 0, 2]]
    assert suppressed.ids_LN.tolist() == [[2, 0, 3, 1]]


def test_a_tokens_text_keeps_the_space_before_it() -> None:
    assert token_text(Words(), 5) == " w5"
