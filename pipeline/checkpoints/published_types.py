"""The types that settings and tensors of a published crosscoder must have, checked before anything is read from them.

A list where a number stands, whole numbers as normalisation or weights that are stored sparsely would otherwise give
plausible latents or end far from their cause. What is not named here is not read, and may be anything.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError, short

_Kind = type | tuple[type, ...]
_WHOLE: tuple[_Kind, str] = (int, "a whole number")
_NUMBER: tuple[_Kind, str] = ((int, float), "a number")
_TEXT: tuple[_Kind, str] = (str, "a text")
_OBJECT: tuple[_Kind, str] = (Mapping, "an object")
_SETTINGS = {
    **dict.fromkeys(("activation_dim", "dict_size", "num_layers", "num_decoder_layers", "d_in", "k"), _WHOLE),
    **dict.fromkeys(("code_normalization_alpha_sae", "code_normalization_alpha_cc", "norm_init_scale"), _NUMBER),
    **dict.fromkeys(("code_normalization", "dict_class"), _TEXT),
    **dict.fromkeys(("trainer", "crossray"), _OBJECT),
}
_REAL_TENSORS = (
    *("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", "threshold", "jump_threshold"),
    *("target_rms", "activation_mean", "activation_std", "activation_global_scale", "W_enc", "W_dec", "b_enc", "b_dec"),
)


def check_settings_types(settings: Mapping[str, Any], where: str) -> None:
    """InputError for a setting that is there and of another type; null is absent."""
    trainer = settings.get("trainer")
    named = [(name, settings[name], kind) for name, kind in _SETTINGS.items() if name in settings]
    named += [("dict_class", trainer.get("dict_class"), _TEXT)] if isinstance(trainer, Mapping) else []
    layers = settings.get("encoder_layers")
    named += [("encoder_layers", one, _WHOLE) for one in (layers if isinstance(layers, list) else [])]
    for name, value, (kind, expected) in named:
        is_absent = value is None and name != "encoder_layers"
        if not is_absent and (not isinstance(value, kind) or isinstance(value, bool)):
            raise InputError(f"{name} must be {expected}, came {short(value)} in {where}: correct the settings")


def check_tensor_types(named: Mapping[str, Tensor], where: str) -> None:
    """InputError for a tensor that holds no plain real numbers, or whole ones where fractions belong."""
    for name, tensor in named.items():
        is_odd = tensor.is_meta or tensor.is_quantized or tensor.is_complex() or tensor.dtype == torch.bool
        is_plain = tensor.layout == torch.strided and not is_odd
        if not is_plain or (name in _REAL_TENSORS and not tensor.is_floating_point()):
            kind = "meta" if tensor.is_meta else str(tensor.dtype if tensor.layout == torch.strided else tensor.layout)
            expected = "floating-point tensor" if name in _REAL_TENSORS else "tensor of numbers"
            raise InputError(
                f"{name} must be a {expected} with all of its numbers, came {kind} {list(tensor.shape)} in "
                f"{where}: the file is not a crosscoder of this layout"
            )
