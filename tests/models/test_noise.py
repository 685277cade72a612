"""Noise on weights: as large as asked, the same every time, and nowhere else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.models.loading import LoadOptions, ModelSpec, load_decoders
from pipeline.models.noise import add_weight_noise


def test_every_matrix_gets_noise_relative_to_its_size(random_model: Callable[..., Any]) -> None:
    model, again, before = (random_model("gemma2", seed=0) for _ in range(3))
    add_weight_noise(model, scale=0.1, seed=3)
    add_weight_noise(again, scale=0.1, seed=3)
    clean = dict(before.named_parameters())
    repeated = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, repeated[name])
        added = (parameter - clean[name]).detach()
        if parameter.dim() < 2:
            assert not added.any()
            continue
        size = clean[name].detach().square().mean().sqrt()
        assert float(added.std() / size) == pytest.approx(0.1, rel=0.1), name
        assert abs(float((added * clean[name].detach()).mean() / (0.1 * size * size))) < 0.15
    other = random_model("gemma2", seed=0)
    add_weight_noise(other, scale=0.1, seed=4)
    assert not any(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True) if p.dim() > 1
    )


def test_a_model_and_its_noisy_self_are_two_models(
    saved_pairs: Callable[[str], tuple[str, str]],
) -> None:
    base = ModelSpec(saved_pairs("gemma2")[0])
    options = LoadOptions(layer=0, dtype="float32")
    ids_BT = torch.tensor([[5, 6, 7]])
    mask_BT = torch.ones_like(ids_BT)
    noisy = load_decoders(base, base._replace(weight_noise=0.05), options)
    same = load_decoders(base, base, options)
    h_BTD = noisy.base.lower(ids_BT, mask_BT)
    assert torch.equal(h_BTD, same.chat.lower(ids_BT, mask_BT))
    change = (noisy.chat.lower(ids_BT, mask_BT) - h_BTD).norm() / h_BTD.norm()
    assert 0.01 < float(change) < 0.5
    assert noisy.num_shared_layers == 0
