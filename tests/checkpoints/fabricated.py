"""Small checkpoints of every published layout, and the published formulas computed on their own tensors."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

M, D, F = 2, 5, 7


def published_tensors(**extra: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "encoder.weight": torch.randn(M, D, F, generator=generator),
        "encoder.bias": torch.randn(F, generator=generator),
        "decoder.weight": torch.randn(M, F, D, generator=generator),
        "decoder.bias": torch.randn(M, D, generator=generator),
        **extra,
    }


def topk_tensors(**extra: Tensor) -> dict[str, Tensor]:
    return published_tensors(
        k=torch.tensor(3, dtype=torch.int32), threshold=torch.tensor(1.5, dtype=torch.float32), **extra
    )


def norm_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    std_MD = torch.rand(M, D, generator=generator) + 0.5
    target_rms = torch.tensor(10.0)
    return {
        "target_rms": target_rms,
        "activation_mean": torch.randn(M, D, generator=generator),
        "activation_std": std_MD,
        "activation_global_scale": target_rms / (std_MD.square().sum(1) + 1e-8).sqrt(),
    }


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "model.safetensors"))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def old_config(**extra: Any) -> dict[str, Any]:
    return {
        "activation_dim": D,
        "dict_size": F,
        "num_layers": M,
        "encoder_layers": None,
        "same_init_for_all_layers": True,
        "norm_init_scale": 0.005,
        "init_with_transpose": True,
        **extra,
    }


def code_weight_by_hand(tensors: dict[str, Tensor]) -> Tensor:
    """w_j, [1, F], or [M, F] for decoupled, from decoder.weight [M, F, D] and the number of the published choice."""
    norm_MF = tensors["decoder.weight"].norm(dim=2)
    together_F = tensors["decoder.weight"].transpose(0, 1).flatten(1).norm(dim=1)
    number = int(tensors.get("code_normalization_id", torch.tensor(1)))
    return {
        1: norm_MF.sum(0, keepdim=True),
        2: together_F[None],
        3: together_F[None] + 0.1 * norm_MF.sum(0, keepdim=True),
        4: torch.ones(1, F),
        5: norm_MF,
    }[number]


def encode_by_hand(tensors: dict[str, Tensor], x_BMD: Tensor) -> Tensor:
    """The published formula on the published tensors: code_BF, or code_BMF for decoupled."""
    if "activation_mean" in tensors and not tensors["activation_mean"].isnan().any():
        x_BMD = (x_BMD - tensors["activation_mean"]) * tensors["activation_global_scale"][None, :, None]
    code_BF = (torch.einsum("bmd,mdf->bf", x_BMD, tensors["encoder.weight"]) + tensors["encoder.bias"]).relu()
    if "threshold" not in tensors:
        return code_BF
    threshold = tensors["threshold"].reshape(-1, 1)
    code_BMF = code_BF[:, None] * (code_BF[:, None] * code_weight_by_hand(tensors) > threshold)
    return code_BMF if threshold.numel() > 1 else code_BMF[:, 0]


def decode_by_hand(tensors: dict[str, Tensor], code: Tensor) -> Tensor:
    """x_BMD of code_BF or code_BMF."""
    code_BMF = code if code.ndim == 3 else code[:, None].expand(-1, M, -1)
    xh_BMD = torch.einsum("bmf,mfd->bmd", code_BMF, tensors["decoder.weight"]) + tensors["decoder.bias"]
    if "activation_mean" in tensors and not tensors["activation_mean"].isnan().any():
        xh_BMD = xh_BMD / (tensors["activation_global_scale"][None, :, None] + 1e-8) + tensors["activation_mean"]
    return xh_BMD


def scaled_tensors() -> dict[str, Tensor]:
    tensors = published_tensors()
    return {
        "W_enc": tensors["encoder.weight"],
        "W_dec": tensors["decoder.weight"].transpose(0, 1).contiguous(),
        "b_enc": tensors["encoder.bias"],
        "b_dec": tensors["decoder.bias"],
    }


def write_scaled(folder: Path) -> Path:
    folder.mkdir(parents=True)
    torch.save(scaled_tensors(), folder / "cc_weights.pt")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "dict_size": F, "model_name": "a", "seed": 49}))
    return folder
