"""How many leading layers two models have in common: run once, and kept in memory once.

Two cases. One model with an adapter that can be turned off: the layers below the first adapted one. Two checkpoints:
the leading layers whose tensors are equal byte by byte, together with everything that runs before them. Nothing is
shared in doubtful cases (another config, other replaced tokens, an adapted embedding).

Which modules run before the layers is observed on a forward of one token, so that no architecture is named here.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.adapters import adapted_modules
from pipeline.models.decoder import SplitDecoder

_CONFIG_KEYS_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_SAMPLE = 4096
"""Bytes that are compared first: tensors that differ nearly always differ there."""


def count_unadapted_layers(adapted: SplitDecoder) -> int:
    """Leading layers of a model with an adapter in which the adapter changes nothing; 0 if it changes what precedes."""
    changed = {module for _, module in adapted_modules(adapted.base)}
    if changed & set(modules_before_layers(adapted)):
        return 0
    for number, layer in enumerate(adapted.layers):
        if changed & set(layer.modules()):
            return number
    return len(adapted.layers)


def share_equal_prefix(base: SplitDecoder, chat: SplitDecoder) -> int:
    """Leading layers that are byte-equal in both models; base holds chat's tensors for them from here on."""
    if type(base.base) is not type(chat.base) or _effective_config(base) != _effective_config(chat):
        return 0
    before = list(zip(modules_before_layers(base), modules_before_layers(chat), strict=True))
    own = [(_own_tensors(b), _own_tensors(c)) for b, c in before]
    if not all(_are_equal(b, c) for b, c in own):
        return 0
    count = 0
    for base_layer, chat_layer in zip(base.layers, chat.layers, strict=True):
        tensors = (_all_tensors(base_layer), _all_tensors(chat_layer))
        if not _are_equal(*tensors):
            break
        own.append(tensors)
        count += 1
    if count:
        taken = {id(b): c[name] for left, c in own for name, b in left.items() if isinstance(b, nn.Parameter)}
        for module in base.whole.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in taken:
                    module._parameters[name] = taken[id(parameter)]  # type: ignore[assignment]
    return count


def modules_before_layers(decoder: SplitDecoder) -> list[nn.Module]:
    """The body's modules outside its layers that run before the first of them, the body itself first."""
    inside = set(decoder.layers.modules())
    candidates = [module for module in decoder.base.modules() if module not in inside and module is not decoder.base]
    ran: set[nn.Module] = set()
    handles = [module.register_forward_hook(lambda ran_one, *_: ran.add(ran_one)) for module in candidates]
    try:
        decoder.run_before_layers()
    finally:
        for handle in handles:
            handle.remove()
    return [decoder.base, *(module for module in candidates if module in ran)]


def _effective_config(decoder: SplitDecoder) -> dict[str, Any]:
    config: dict[str, Any] = decoder.base.config.get_text_config().to_dict()
    return {key: value for key, value in config.items() if key not in _CONFIG_KEYS_WITHOUT_EFFECT}


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the module itself, not of its children."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _all_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _are_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(_is_same_bytes(left[name], right[name]) for name in left)


def _is_same_bytes(left: Tensor, right: Tensor) -> bool:
    if left is right:
        return True
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left_N, right_N = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(left_N[:_SAMPLE], right_N[:_SAMPLE]) and torch.equal(left_N, right_N)
