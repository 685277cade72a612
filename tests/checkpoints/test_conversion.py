"""Crosscoder.from_pretrained and save_pretrained: codes and reconstructions equal the published formulas."""

from pathlib import Path

import pytest
import torch
from fabricated import (
    D,
    F,
    M,
    decode_by_hand,
    encode_by_hand,
    norm_tensors,
    old_config,
    published_tensors,
    scaled_tensors,
    topk_tensors,
    write,
    write_scaled,
)
from torch import Tensor

from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder, Normalisation

FILES = {
    "l1": published_tensors(),
    "l1 normalised": published_tensors(**norm_tensors()),
    "unset threshold": {**topk_tensors(), "threshold": torch.tensor(-1.0)},
    **{
        f"batch_topk {name}": topk_tensors(code_normalization_id=torch.tensor(number), **norm_tensors())
        for number, name in enumerate(["crosscoder", "sae", "mixed", "none"], start=1)
    },
    "batch_topk decoupled": {
        **topk_tensors(code_normalization_id=torch.tensor(5)),
        "threshold": torch.tensor([2.0, 4.0]),
    },
}


def activations() -> Tensor:
    return 3 * torch.randn(50, M, D, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("tensors", FILES.values(), ids=FILES)
def test_codes_and_reconstruction_equal_the_published_formula(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    crosscoder = Crosscoder.from_pretrained(write(tmp_path, tensors))
    x_BMD = activations()
    expected = encode_by_hand(tensors, x_BMD)
    xh_BMD, codes = crosscoder(x_BMD, output_features=True)
    seen_BF = expected if expected.ndim == 2 else expected.amax(1)
    assert 0 < int((seen_BF > 0).sum()) < seen_BF.numel()
    torch.testing.assert_close(codes.to_dense(), seen_BF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(xh_BMD, decode_by_hand(tensors, expected), rtol=1e-5, atol=1e-4)
    if codes.model_mask_PM is not None:
        mask_PM = (expected > 0).transpose(1, 2)[codes.rows_P(), codes.latents_P]
        assert torch.equal(codes.model_mask_PM, mask_PM)
        assert not bool(mask_PM.all())


def test_scaled_layout_equals_its_own_formula_on_scaled_activations(tmp_path: Path) -> None:
    tensors, scale_M = scaled_tensors(), torch.tensor([0.3, 0.2])
    crosscoder = Crosscoder.from_pretrained(write_scaled(tmp_path / "a"), activation_scale=(0.3, 0.2))
    x_BMD = activations()
    scaled_BMD = x_BMD * scale_M[:, None]
    code_BF = (torch.einsum("bmd,mdf->bf", scaled_BMD, tensors["W_enc"]) + tensors["b_enc"]).relu()
    expected_BMD = torch.einsum("bf,fmd->bmd", code_BF, tensors["W_dec"]) + tensors["b_dec"]
    torch.testing.assert_close(crosscoder.encode(x_BMD).to_dense(), code_BF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(crosscoder(x_BMD), expected_BMD / scale_M[:, None], rtol=1e-5, atol=1e-4)
    unscaled = Crosscoder.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(unscaled(scaled_BMD), expected_BMD, rtol=1e-5, atol=1e-4)


def random_crosscoder(activation: str, code_weight: str = "crosscoder") -> Crosscoder:
    crosscoder = Crosscoder(F, M, D, activation=activation, code_weight=code_weight, k=2)
    generator = torch.Generator().manual_seed(3)
    for parameter in crosscoder.parameters():
        parameter.data.normal_(generator=generator)
    crosscoder.threshold.fill_(0.1 + 1e-12)
    crosscoder.jump_threshold_F.uniform_(generator=generator)
    return crosscoder


@pytest.mark.parametrize("is_normalised", [False, True])
@pytest.mark.parametrize(
    ("activation", "code_weight"),
    [
        ("relu", "none"),
        ("batch_topk", "sae"),
        ("batch_topk", "decoupled"),
        ("topk", "mixed"),
        ("jumprelu", "crosscoder"),
    ],
)
def test_saved_and_loaded_is_the_same_to_the_last_bit(
    tmp_path: Path, activation: str, code_weight: str, is_normalised: bool
) -> None:
    crosscoder = random_crosscoder(activation, code_weight)
    if is_normalised:
        crosscoder.set_normalisation(Normalisation(torch.ones(M, D), torch.tensor([0.1, 0.7])))
    crosscoder.save_pretrained(tmp_path)
    loaded = Crosscoder.from_pretrained(tmp_path)
    assert repr(loaded) == repr(crosscoder).replace("k=2", "k=2" if "topk" in activation else "k=None")
    assert loaded.is_normalised == is_normalised
    for (name, saved), (_, came) in zip(crosscoder.state_dict().items(), loaded.state_dict().items(), strict=True):
        if name != "threshold" or activation == "batch_topk":
            assert torch.equal(saved, came), name
    x_BMD = activations()
    assert torch.equal(loaded(x_BMD), crosscoder(x_BMD))


def test_other_dtypes_are_saved_in_float32(tmp_path: Path) -> None:
    random_crosscoder("relu").double().save_pretrained(tmp_path)
    assert torch.equal(Crosscoder.from_pretrained(tmp_path).W_enc_FMD, random_crosscoder("relu").W_enc_FMD)


def test_loading_a_file_of_another_kind_is_an_input_error(tmp_path: Path) -> None:
    write(tmp_path, {"weight": torch.ones(2)}, old_config())
    with pytest.raises(InputError, match=r"encoder\.weight, encoder\.bias, decoder\.weight, decoder\.bias is missing"):
        Crosscoder.from_pretrained(tmp_path)
