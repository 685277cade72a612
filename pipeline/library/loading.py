"""`load_pair`: two models from the hub, from folders, as an adapter, or already loaded, as a Pair."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config.data import ActivationsSection, TokensSection
from pipeline.config.presets import PRESETS, PresetName
from pipeline.config.run_file import validated
from pipeline.errors import InputError
from pipeline.extraction.activations import RowOptions
from pipeline.library.pair import Pair
from pipeline.models.decoder import SplitDecoder
from pipeline.models.files import is_adapter_folder
from pipeline.models.loading import DTYPES, LoadOptions, ModelSpec
from pipeline.models.memory import automatic_tokens_per_batch
from pipeline.models.pair import ModelPair
from pipeline.models.placement import device_here
from pipeline.text.tokenise import Tokenise

Model = str | Path | ModelSpec | nn.Module


def load_pair(
    base: Model,
    chat: Model,
    *,
    layer: int,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    preset: PresetName | None = None,
    max_tokens: int | None = None,
    attn_implementation: str | None = None,
    **rows: Any,
) -> Pair:
    """A base and a chat model, cut at one layer.

    Args:
        base: hub id, folder, `ModelSpec`, or a loaded transformers model.
        chat: likewise; the folder of a LoRA adapter stands for the base model with it.
        layer: counted from 0: the output of `model.layers[layer]`.
        tokenizer: for loaded models, which are used as they are (in evaluation mode); else the chat model's own.
        device: "cpu", "cuda", "cuda:1"; the GPU where there is one.
        dtype: of the models; bfloat16 on a GPU, float32 on a CPU.
        preset: family of the models, as in a run file: which leading tokens are no rows, what a base model reads in
            place of template tokens.
        max_tokens: longer documents are cut; 1024.
        attn_implementation: attention code of transformers; the model's default.
        rows: which tokens become rows, with names and defaults of a run file's `activations`: drop_first_tokens,
            drop_bos, norm_cap, tokens_per_batch, rows={"keep": [...], "leave_out": [...]}.

    Raises InputError where the models do not form a pair, cannot be loaded, or have no such layer.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    settings = PRESETS[preset] if preset is not None else {}
    own = {"layer": layer, **settings.get("activations", {}), **rows}
    section = validated(ActivationsSection, own, "load_pair")
    is_loaded = [isinstance(model, nn.Module) for model in (base, chat)]
    if any(is_loaded):
        if not all(is_loaded) or tokenizer is None:
            raise InputError("load_pair: expected two loaded models and their tokenizer, or none that is loaded")
        models = _of_modules(base, chat, tokenizer, layer)
        names = (_name_of(base), _name_of(chat))
    else:
        replaced = settings.get("models", {}).get("base", {}).get("token_replacements", {})
        specs = _specs(base, chat, tuple(sorted(replaced.items())))
        models = ModelPair.load(*specs, _load_options(layer, device, dtype, attn_implementation))
        names = (_label(specs[0]), _label(specs[1]))
    tokenise = Tokenise(
        models.tokenizer if tokenizer is None else tokenizer,
        max_tokens=max_tokens or TokensSection().max_tokens_per_document,
    )
    return Pair(models, _row_options(section, models), tokenise, names)


def _row_options(section: ActivationsSection, models: ModelPair) -> RowOptions:
    asked, kinds = section.tokens_per_batch, section.rows
    budget = automatic_tokens_per_batch(models) if asked == "auto" else asked
    return RowOptions(
        budget, section.drop_first_tokens, section.drop_bos, section.norm_cap, kinds.keep, kinds.leave_out
    )


def _load_options(
    layer: int, device: str | torch.device | None, dtype: str | torch.dtype | None, attention: str | None
) -> LoadOptions:
    place = device_here() if device is None else str(device)
    default = "float32" if place == "cpu" else "bfloat16"
    name = default if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return LoadOptions(layer=layer, dtype=name, devices=(place,), attn_implementation=attention)


def _specs(base: Any, chat: Any, replacements: tuple[tuple[int, int], ...]) -> tuple[ModelSpec, ModelSpec]:
    first = base if isinstance(base, ModelSpec) else ModelSpec(str(base), token_replacements=replacements)
    if isinstance(chat, ModelSpec):
        return first, chat
    if is_adapter_folder(str(chat)):
        return first, first._replace(adapter=str(chat), token_replacements=())
    return first, ModelSpec(str(chat))


def _of_modules(base: Any, chat: Any, tokenizer: Any, layer: int) -> ModelPair:
    """The models as they are."""
    chat_decoder = SplitDecoder(chat, layer)
    base_decoder = chat_decoder if base is chat else SplitDecoder(base, layer)
    for attribute, word in (("activation_dim", "width"), ("vocab_size", "vocabulary size")):
        sizes = [getattr(decoder, attribute) for decoder in (base_decoder, chat_decoder)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"load_pair: expected two models of the same {word}, got {sizes[0]} and {sizes[1]}; choose a base "
                "model and its fine-tuned version"
            )
    return ModelPair(base_decoder, chat_decoder, tokenizer)


def _name_of(model: Any) -> str:
    return str(model.config.name_or_path or type(model).__name__)


def _label(spec: ModelSpec) -> str:
    return spec.source if spec.adapter is None else f"{spec.source} with {spec.adapter}"
