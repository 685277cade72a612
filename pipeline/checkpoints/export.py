"""Writes a crosscoder so that others can read it: the published layout, in a folder.

crossray keeps its own crosscoders in this form too. `model.safetensors` holds the tensors with the published names and
axes, `config.json` only the fields that the published code's constructors take (they refuse others); the rest goes into
the safetensors header, which readers may skip. Each file is written under a temporary name and then renamed, weights
last, so a folder with weights is complete. Weights are float32 and not compressed: a 2-model crosscoder takes 16 D F
bytes.

F latents, M models, D width.
"""

import json
import math
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints.layouts import (
    MIXED_ALPHAS,
    OWN_SETTINGS,
    WEIGHT_KEYS,
    ActivationNorm,
    PublishedCrosscoder,
    finite_weights,
)
from pipeline.checkpoints.published import TRAINER_NAME
from pipeline.errors import InputError
from pipeline.numerics.settings import CODE_WEIGHTS
from pipeline.schema import TABLE_METADATA


def published_tensors(checkpoint: PublishedCrosscoder) -> dict[str, Tensor]:
    """Name to tensor as published readers expect them; contiguous and on the CPU."""
    M, D = checkpoint.num_models, checkpoint.activation_dim
    norm = checkpoint.norm
    nan_MD = torch.full((M, D), torch.nan)
    tensors = {
        "encoder.weight": checkpoint.W_enc_FMD.permute(1, 2, 0),
        "encoder.bias": checkpoint.b_enc_F,
        "decoder.weight": checkpoint.W_dec_FMD.permute(1, 0, 2),
        "decoder.bias": checkpoint.b_dec_MD,
        "code_normalization_id": torch.tensor(CODE_WEIGHTS.index(checkpoint.code_weight) + 1),
        "target_rms": torch.tensor(1.0 if norm is None else norm.target_rms),
        "activation_mean": nan_MD if norm is None else norm.mean_MD,
        "activation_std": nan_MD.clone() if norm is None else _standard_deviations(norm),
        "activation_global_scale": torch.ones(M) if norm is None else norm.scale_M,
    }
    if checkpoint.k is not None:
        tensors["k"] = torch.tensor(checkpoint.k, dtype=torch.int32)
    if checkpoint.threshold is not None:
        tensors["threshold"] = checkpoint.threshold.to(torch.float32)
    if checkpoint.jump_threshold_F is not None:
        tensors["jump_threshold"] = checkpoint.jump_threshold_F
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def published_settings(checkpoint: PublishedCrosscoder) -> dict[str, Any]:
    """The content of config.json. Settings of initialisation come from the file that was read, else the defaults."""
    found = checkpoint.settings
    settings = {
        "activation_dim": checkpoint.activation_dim,
        "dict_size": checkpoint.num_latents,
        "num_layers": checkpoint.num_models,
        "encoder_layers": None,
        "same_init_for_all_layers": found.get("same_init_for_all_layers", True),
        "norm_init_scale": found.get("norm_init_scale", checkpoint.sparsity.default_init_norm),
        "init_with_transpose": found.get("init_with_transpose", True),
        "code_normalization": checkpoint.code_weight.upper(),
        "dict_class": checkpoint.dict_class,
    }
    if checkpoint.code_weight == "mixed":
        settings.update(MIXED_ALPHAS)
    if checkpoint.k is not None:
        settings["k"] = checkpoint.k
    return settings


def write_published(
    folder: str | Path,
    checkpoint: PublishedCrosscoder,
    *,
    trainer: Mapping[str, Any] | None = None,
) -> None:
    """Writes model.safetensors and config.json (and trainer_config.json) into `folder`, which is made if missing.

    `trainer` is the trainer's settings (`layer`, `lm_name`, ...), written as {"trainer": ...}; without it, those that
    the checkpoint was read with are kept. The float64 threshold, which others read rounded to float32, is kept exactly
    in the header. A crosscoder whose activation scale is unknown is refused: the layout has no field to say so.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if checkpoint.is_scale_unknown:
        raise InputError(
            f"expected a crosscoder with known activation scales, came one without (read from cfg.json and "
            f"cc_weights.pt), to be written to {folder}: read it again with activation_scale=(sqrt(D) / mean |x| of "
            f"each model)"
        )
    tensors, settings = published_tensors(checkpoint), published_settings(checkpoint)
    for key in WEIGHT_KEYS:  # nothing is written that could not be read again
        finite_weights(tensors, key, tensors[key].ndim, f"what is to be written to {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    trainer = checkpoint.settings.get("trainer") if trainer is None else trainer
    if trainer is not None:
        replace_file(folder / TRAINER_NAME, lambda path: _write_json(path, {"trainer": dict(trainer)}))
    replace_file(folder / "config.json", lambda path: _write_json(path, settings))
    header = {"format": "pt", **TABLE_METADATA}
    if checkpoint.threshold is not None:
        header[OWN_SETTINGS] = json.dumps({"threshold": checkpoint.threshold.tolist()})

    def write(path: Path) -> None:
        save_file(tensors, str(path), metadata=header)
        sort_header(path)

    replace_file(folder / "model.safetensors", write)


def sort_header(path: Path) -> None:
    """Puts the header of a safetensors file in sorted order, in place: the library writes metadata in a random one.

    Equal weights then give equal bytes, so that checksums can be compared. The tensors are not read.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        content = json.loads(file.read(size))
        header = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(header) == size, "the library writes its header without blanks too, but for the end"
        file.seek(8)
        file.write(header)


def _standard_deviations(norm: ActivationNorm) -> Tensor:
    """[M, D] with the scale they imply; equal in every dimension where only the scale is known."""
    if norm.std_MD is not None:
        return norm.std_MD
    M, D = norm.mean_MD.shape
    std_M: Tensor = norm.target_rms / (norm.scale_M * math.sqrt(D))
    return std_M[:, None].expand(M, D)


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Writes under a temporary name in the same folder, then renames: readers see the old file or the new one.

    Whoever may read the folder may read the file; safetensors alone would keep it to its owner.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        temporary.chmod(path.parent.stat().st_mode & 0o666)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """A text file, written as replace_file does."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    replace_file(path, write)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
