"""A crosscoder as SAELens opens it: the folder by its own formulas, and by the real package where it is installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoints.saelens import SETTINGS_NAME, WEIGHTS_NAME, write_saelens
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder, Normalisation

B, F, M, D = 64, 40, 2, 12
KINDS = [
    {"activation": "relu"},
    {"activation": "jumprelu"},
    {"activation": "batch_topk", "k": 4, "code_weight": "crosscoder"},
    {"activation": "batch_topk", "k": 4, "code_weight": "sae"},
    {"activation": "topk", "k": 4, "code_weight": "none"},
]


def made(num_models: int = M, **kind: Any) -> Crosscoder:
    """Weights of size 1 and rows far from 0, as of residual streams."""
    torch.manual_seed(0)
    crosscoder = Crosscoder(F, num_models, D, **kind)
    with torch.no_grad():
        for parameter in crosscoder.parameters():
            parameter.normal_(std=0.3)
        crosscoder.threshold.fill_(0.7)
        crosscoder.jump_threshold_F.uniform_(0.1, 1.0)
    mean_MD = 20 * torch.randn(num_models, D)
    crosscoder.set_normalisation(Normalisation(mean_MD, torch.linspace(0.1, 0.4, num_models)))
    return crosscoder


def rows(crosscoder: Crosscoder) -> torch.Tensor:
    x_BMD: torch.Tensor = crosscoder.mean_MD + 5 * torch.randn(B, crosscoder.num_models, D)
    return x_BMD


def by_formula(folder: Path, x_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and reconstructions as SAELens computes them."""
    settings, tensors = json.loads((folder / SETTINGS_NAME).read_text()), load_file(folder / WEIGHTS_NAME)
    assert settings["apply_b_dec_to_input"] and settings["normalize_activations"] == "none"
    preact_BF = (x_BN - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    codes_BF = preact_BF.relu()
    if settings["architecture"] == "jumprelu":
        codes_BF = codes_BF * (preact_BF > tensors["threshold"])
    if settings["architecture"] == "topk":
        kept = preact_BF.topk(settings["k"])
        codes_BF = torch.zeros_like(preact_BF).scatter(1, kept.indices, kept.values.relu())
    return codes_BF, codes_BF @ tensors["W_dec"] + tensors["b_dec"]


def by_package(folder: Path, x_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the real package."""
    sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed")
    sae = sae_lens.SAE.load_from_disk(folder)
    codes_BF = sae.encode(x_BN)
    return codes_BF.detach(), sae.decode(codes_BF).detach()


@pytest.mark.parametrize("read", [by_formula, by_package])
@pytest.mark.parametrize("num_models", [1, 2])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_codes_and_reconstructions_are_the_crosscoders(
    kind: dict[str, Any], num_models: int, read: Any, tmp_path: Path
) -> None:
    crosscoder = made(num_models, **kind)
    x_BMD = rows(crosscoder)
    write_saelens(tmp_path / "sae", crosscoder, about={"crossray_layer": 3})
    codes_BF, x_hat_BN = read(tmp_path / "sae", x_BMD.flatten(1))
    expected_BF = crosscoder.encode(x_BMD).to_dense()
    assert 0.02 < (expected_BF > 0).float().mean() < 0.9
    torch.testing.assert_close(codes_BF, expected_BF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_hat_BN, crosscoder.decode(expected_BF).flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("model", "place"), [("base", 0), ("chat", 1)])
def test_a_half_sees_the_other_model_at_its_mean_and_says_so(model: str, place: int, tmp_path: Path) -> None:
    crosscoder = made(activation="relu")
    x_BMD = rows(crosscoder)
    write_saelens(tmp_path, crosscoder, model=model)
    codes_BF, x_hat_BD = by_formula(tmp_path, x_BMD[:, place])
    x_BMD[:, 1 - place] = crosscoder.mean_MD[1 - place]
    expected_BF = crosscoder.encode(x_BMD).to_dense()
    torch.testing.assert_close(codes_BF, expected_BF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_hat_BD, crosscoder.decode(expected_BF)[:, place], rtol=1e-5, atol=1e-5)
    assert f"{model} model's half, and not the crosscoder" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "kind",
    [
        {"activation": "topk", "k": 4, "code_weight": "crosscoder"},
        {"activation": "batch_topk", "k": 4, "code_weight": "decoupled"},
    ],
)
def test_what_saelens_cannot_select_is_refused(kind: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=kind["code_weight"]):
        write_saelens(tmp_path / "sae", made(**kind))
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize(("model", "num_models"), [("third", 2), ("chat", 1)])
def test_a_half_that_is_not_there_is_refused(model: str, num_models: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=model):
        write_saelens(tmp_path / "sae", made(num_models, activation="relu"), model=model)


def test_equal_crosscoders_are_written_as_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_saelens(tmp_path / name, made(activation="relu"))
    files = [sorted((path.name, path.read_bytes()) for path in (tmp_path / name).iterdir()) for name in ("a", "b")]
    assert files[0] == files[1] and len(files[0]) == 3
