"""A model and its adapter on one copy of the weights: the base model is the same object with the adapter off.

Used where base and chat are the same checkpoint and chat has an adapter; otherwise the adapter is merged into the
weights at loading. The trade-off: every chat forward computes the adapter's products, which for low ranks costs less
than the memory of a second model.
"""

from typing import Any, NamedTuple

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
    # Adapters that train biases overwrite the base model's own.
    if any(getattr(config, "bias", "none") != "none" for config in adapted.peft_config.values()):
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
        adapted = PeftModel.from_pretrained(model, adapter, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"expected an adapter of this model at {adapter!r}: {first_line(error)}") from error
    if any(config.is_prompt_learning for config in adapted.peft_config.values()):
        raise InputError(
            f"expected an adapter of weights, such as LoRA, at {adapter!r}, got one that learns a prompt; both models "
            "must read the same tokens"
        )
    return adapted.eval().requires_grad_(False)
