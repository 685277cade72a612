"""A model and its adapter on one copy of the weights: the base model is the same object with the adapter off.

Used where base and chat are the same checkpoint and chat has an adapter; otherwise the adapter is merged into the
weights at loading. The trade-off: every chat forward computes the adapter's products, which for low ranks costs less
than the memory of a second model.
"""

import warnings
from collections.abc import Collection
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import nn

from pipeline.errors import InputError, first_line


class AdapterSwitch:
    """The adapter of a model, on or off; on after loading."""

    def __init__(self, adapted: Any) -> None:
        self._tuner = adapted.base_model
        self._is_on = True

    def turn_on(self) -> None:
        """The model is the fine-tuned one from now on."""
        if not self._is_on:
            self._tuner.enable_adapter_layers()
        self._is_on = True

    def turn_off(self) -> None:
        """The model is the base model from now on."""
        if self._is_on:
            self._tuner.disable_adapter_layers()
        self._is_on = False


class AdaptedModel(NamedTuple):
    """A model with an adapter inside."""

    model: Any
    """The causal language model; its adapted modules are replaced in place."""
    switch: AdapterSwitch | None
    """None where the adapter was merged, because it cannot be turned off exactly."""


def attach_adapter(model: Any, adapter: str, revision: str | None) -> AdaptedModel:
    """The model with the adapter that can be turned off; merged where turning it off would not give the base model."""
    adapted = _load_adapter(model, adapter, revision)
    # Trained biases and whole tensors overwrite the base model's own.
    trains_biases = any(getattr(config, "bias", "none") != "none" for config in adapted.peft_config.values())
    if trains_biases or _overwritten_tensors(adapted, adapter, revision):
        return AdaptedModel(adapted.merge_and_unload(), None)
    return AdaptedModel(adapted.get_base_model(), AdapterSwitch(adapted))


def merge_adapter(model: Any, adapter: str, revision: str | None) -> Any:
    """The model with the adapter in its weights."""
    return _load_adapter(model, adapter, revision).merge_and_unload()


def adapted_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that an adapter changed, with their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def _load_adapter(model: Any, adapter: str, revision: str | None) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(
            f"expected the package peft for the adapter {adapter!r}, it is not installed; pip install 'crossray[lora]'"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below, with the numbers
            adapted = PeftModel.from_pretrained(model, adapter, revision=revision)
            keys = adapted.load_adapter(adapter, "default", revision=revision)  # from_pretrained keeps its keys secret
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"expected an adapter of this model at {adapter!r}: {first_line(error)}") from error
    if any(config.is_prompt_learning for config in adapted.peft_config.values()):
        raise InputError(
            f"expected an adapter of weights, such as LoRA, at {adapter!r}, got one that learns a prompt; both models "
            "must read the same tokens"
        )
    require_all_keys(f"adapter {adapter!r}", missing=keys.missing_keys, unused=keys.unexpected_keys)
    if not _changes_anything(adapted):
        raise InputError(
            f"expected an adapter that changes the model, got {adapter!r}, whose weights add 0 to every module: it was "
            "saved before its training, or its trained weights were lost; save the trained adapter again"
        )
    return adapted.eval().requires_grad_(False)


def require_all_keys(what: str, *, missing: Collection[str], unused: Collection[str]) -> None:
    """InputError unless a file and a model name the same tensors: half of a model is another model.

    Args:
        what: the file's owner, as the message names it.
        missing: tensors of the model that the file does not hold.
        unused: tensors of the file that the model does not have.
    """
    faults = [
        f"{len(names)} {kind} (first: {', '.join(map(repr, sorted(names)[:3]))})"
        for kind, names in (("that it lacks", missing), ("that the model does not know", unused))
        if names
    ]
    if faults:
        raise InputError(
            f"{what}: expected exactly the model's tensors, got {' and '.join(faults)}; it was saved from another "
            "architecture or under another prefix: save it again from the model that it belongs to"
        )


def _overwritten_tensors(adapted: Any, adapter: str, revision: str | None) -> set[str]:
    """Tensors of the base model that the adapter's file replaces whole, such as resized embeddings."""
    from peft.utils import load_peft_weights

    own = {name for name, _ in adapted.named_parameters()}
    return own & set(load_peft_weights(adapter, device="cpu", revision=revision))


def _changes_anything(adapted: Any) -> bool:
    """Whether any adapted module differs from its original; True for kinds that cannot tell."""
    modules: list[Any] = [module for _, module in adapted_modules(adapted)]
    if not all(hasattr(module, "get_delta_weight") for module in modules):
        return True
    deltas = (module.get_delta_weight(name) for module in modules for name in module.active_adapters)
    return any(bool(delta.any()) for delta in deltas)
