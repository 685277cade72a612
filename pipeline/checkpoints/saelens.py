"""Writes a crosscoder as a sparse autoencoder that SAELens opens: `SAE.load_from_disk(folder)`, as of its release 6.54.

SAELens knows one stream. A crosscoder's code depends on the rows of all its models, so what equals it is an autoencoder
of the concatenated rows [x^base; x^chat], d_in = M * D: the same codes and reconstructions in raw activations. One
model's half on its own is another function: its encoder sees that model's rows, with the other models at the mean of
the training rows. It is written only where it is asked for, and its README says so.

The normalisation is folded into the weights; the input is centred by the decoder's bias, as SAELens does, so that large
means are not multiplied. F latents, M models, D width, N = width that is exported.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.checkpoints.export import replace_file, replace_text, sort_header
from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.numerics.crosscoder import Crosscoder

FORMAT_VERSION = "6.54.12"
"""Of SAELens: the release that the files were checked with."""
WEIGHTS_NAME, SETTINGS_NAME = "sae_weights.safetensors", "cfg.json"
_MODELS = ("base", "chat")


def write_saelens(
    folder: str | Path, crosscoder: "Crosscoder", *, model: str | None = None, about: Mapping[str, Any] | None = None
) -> None:
    """Writes cfg.json, README.md and the weights, which come last, into `folder`, which is made if missing.

    Args:
        folder: where the files go.
        crosscoder: on any device; written in float32.
        model: base or chat for that model's half of a crosscoder of two; None for all models, concatenated.
        about: further metadata, such as the layer.

    Raises InputError for codes that SAELens cannot express.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    architecture, extra, threshold_F = _selection(crosscoder)
    kept = _kept_models(crosscoder, model)
    tensors = _tensors(crosscoder, kept)
    if threshold_F is not None:
        tensors["threshold"] = threshold_F
    F, N = tensors["W_dec"].shape
    settings = {
        **{"d_in": N, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True},
        **{"normalize_activations": "none", "reshape_activations": "none", "architecture": architecture, **extra},
        "metadata": {
            "sae_lens_version": FORMAT_VERSION,
            "sae_lens_training_version": None,
            "crossray_models": model or "concatenated",
            **(about or {}),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / SETTINGS_NAME, json.dumps(settings, indent=2) + "\n")
    replace_text(folder / "README.md", _readme(crosscoder, model, N))

    def write_weights(path: Path) -> None:
        save_file(tensors, str(path), metadata={"format": "pt"})
        sort_header(path)

    replace_file(folder / WEIGHTS_NAME, write_weights)


def _kept_models(crosscoder: "Crosscoder", model: str | None) -> list[int]:
    if model is None:
        return list(range(crosscoder.num_models))
    if model not in _MODELS or crosscoder.num_models != len(_MODELS):
        raise InputError(
            f"expected base or chat of a crosscoder of two models, got {model!r} of one of {crosscoder.num_models}: "
            "leave the model out to write all of them"
        )
    return [_MODELS.index(model)]


def _selection(crosscoder: "Crosscoder") -> tuple[str, dict[str, Any], Tensor | None]:
    """Architecture, its own settings, and the threshold of every latent: f > threshold keeps a code."""
    activation = crosscoder.activation
    weight_F = crosscoder.code_weights_F().double().cpu()
    if activation == "relu":
        return "standard", {}, None
    if activation == "jumprelu":
        return "jumprelu", {}, crosscoder.jump_threshold_F.float().cpu()
    if activation == "batch_topk" and crosscoder.code_weight != "decoupled":
        floor = crosscoder.threshold.cpu().clamp(min=0)
        # A score f * w above the threshold is a code above threshold / w; a latent without a decoder has no code.
        threshold_F = torch.where(weight_F > 0, floor / weight_F, torch.inf if float(floor) else 0.0)
        return "jumprelu", {}, threshold_F.float()
    if activation == "topk" and crosscoder.code_weight == "none":
        return "topk", {"k": crosscoder.k}, None
    raise InputError(
        "expected codes that SAELens can select (relu, jumprelu, batch_topk by one threshold, topk of unweighted "
        f"codes), got {activation} with code weight {crosscoder.code_weight}: keep crossray's own format for it"
    )


@torch.no_grad()
def _tensors(crosscoder: "Crosscoder", kept: list[int]) -> dict[str, Tensor]:
    """Weights in units of raw activations; computed in double."""
    scale_M1 = crosscoder.scale_M.double().cpu()[:, None]
    W_enc_FMD = crosscoder.W_enc_FMD.double().cpu()
    b_dec_MD = crosscoder.b_dec_MD.double().cpu()
    # relu(b + W (x - mean) scale) = relu(b + W b_dec + scale W (x - b_raw)), where b_raw = b_dec / scale + mean
    b_enc_F = crosscoder.b_enc_F.double().cpu() + torch.einsum("FMD,MD->F", W_enc_FMD[:, kept], b_dec_MD[kept])
    tensors = {
        "W_enc": (W_enc_FMD * scale_M1)[:, kept].flatten(1).T,
        "b_enc": b_enc_F,
        "W_dec": (crosscoder.W_dec_FMD.double().cpu() / scale_M1)[:, kept].flatten(1),
        "b_dec": (b_dec_MD / scale_M1 + crosscoder.mean_MD.double().cpu())[kept].flatten(),
    }
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def _readme(crosscoder: "Crosscoder", model: str | None, width: int) -> str:
    D, F = crosscoder.activation_dim, crosscoder.num_latents
    lines = [
        "# A crosscoder as an autoencoder for SAELens",
        "",
        f"Written by crossray; opens with `SAE.load_from_disk(folder)` of SAELens {FORMAT_VERSION}. {F} latents, "
        f"d_in = {width}, raw activations in and out.",
        "",
    ]
    if model is None:
        lines += [
            f"Its input is the row of every model, one after the other ({crosscoder.num_models} x {D}: base, then chat "
            "where there are two), taken at the same token. Codes and reconstructions equal the crosscoder's, up to "
            "rounding in float32.",
        ]
    else:
        lines += [
            f"**This is the {model} model's half, and not the crosscoder.** The crosscoder's codes depend on both "
            f"models' rows; here the encoder sees those of the {model} model alone, and the other model's stay at the "
            "mean of the training rows. Codes and reconstructions differ from the crosscoder's, so no verdict carries "
            "over to them. The decoder directions are the crosscoder's.",
        ]
    if crosscoder.activation == "batch_topk":
        lines += [
            "",
            "BatchTopK selects by one threshold on weighted codes; here it is a JumpReLU with one per latent.",
        ]
    return "\n".join(lines) + "\n"
