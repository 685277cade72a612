"""A model and its adapter on one copy of the weights: the base model is the same object with the adapter off.

Used where base and chat are the same checkpoint and chat has an adapter; otherwise the adapter is merged into the
weights at loading. The trade-off: every chat forward computes the adapter's products, which for low ranks costs less
than the memory of a second model.
"""

import logging
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from pipeline.errors import InputError
from pipeline.models.failures import is_out_of_memory

_log = logging.getLogger(__name__)


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
    adapted = _attached(model, adapter, revision)
    deltas = _deltas(adapted)
    if deltas is not None and not all(is_finite for is_finite, _ in deltas):
        raise InputError(f"expected numbers in the adapter {adapter!r}, got NaN or infinity; save it again")
    if deltas is not None and not any(changes for _, changes in deltas):
        raise InputError(
            f"expected an adapter that changes the model, got {adapter!r}, whose weights add 0 to every module: it was "
            "saved before its training, or its trained weights were lost; save the trained adapter again"
        )
    return adapted.eval().requires_grad_(False)


def _attached(model: Any, adapter: str, revision: str | None) -> Any:
    """The model with all of the adapter's tensors in their places."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(
            f"expected the package peft for the adapter {adapter!r}, it is not installed; pip install 'crossray[lora]'"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below, with the numbers
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # nothing is to be copied
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft asks; nothing is trained
            adapted = PeftModel.from_pretrained(model, adapter, revision=revision)
            keys = adapted.load_adapter(adapter, "default", revision=revision)  # from_pretrained keeps its keys secret
    except Exception as error:  # what settings and files of others can raise has no bound
        if is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:400] or type(error).__name__
        raise InputError(f"expected an adapter of this model at {adapter!r}: {said}") from error
    if any(config.is_prompt_learning for config in adapted.peft_config.values()):
        raise InputError(
            f"expected an adapter of weights, such as LoRA, at {adapter!r}, got one that learns a prompt; both models "
            "must read the same tokens"
        )
    require_all_keys(f"adapter {adapter!r}", missing=keys.missing_keys, unused=keys.unexpected_keys)
    return adapted


def check_adapter(model: Any, adapter: str, revision: str | None) -> None:
    """InputError where an adapter does not fit a model, which may be without memory (the meta device).

    Shapes tell no base model from its own fine-tuned version, so another name of the base is only said.
    """
    source = str(model.config.name_or_path)
    for config in _attached(model, adapter, revision).peft_config.values():
        made_for = str(config.base_model_name_or_path or "")
        if made_for and _short_name(made_for) != _short_name(source):
            _log.warning(
                "adapter %r was trained on %r and is used on %r: unless that is the same model, the pair means nothing",
                adapter,
                made_for,
                source,
            )


def _short_name(source: str) -> str:
    """A model's name without owner and folders, also that of a snapshot in the hub's cache."""
    parts = Path(source).parts
    cached = [part for part in parts if part.startswith("models--")]
    return (cached[-1].split("--")[-1] if cached else parts[-1] if parts else "").lower()


def require_all_keys(
    what: str, *, missing: Collection[str], unused: Collection[str], misshapen: Collection[str] = ()
) -> None:
    """InputError unless a file and a model name the same tensors: half of a model is another model.

    Args:
        what: the file's owner, as the message names it.
        missing: tensors of the model that the file does not hold.
        unused: tensors of the file that the model does not have.
        misshapen: tensors of another shape than the model's.
    """
    faults = [
        f"{len(names)} {kind} (first: {', '.join(map(repr, sorted(names)[:3]))})"
        for kind, names in (
            ("that it lacks", missing),
            ("that the model does not know", unused),
            ("of another shape", misshapen),
        )
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


def _deltas(adapted: Any) -> list[tuple[bool, bool]] | None:
    """Of what the adapter adds to every module: whether it is finite, whether it is anything but 0.

    None for kinds of adapters that cannot tell.
    """
    modules: list[Any] = [module for _, module in adapted_modules(adapted)]
    if not all(hasattr(module, "get_delta_weight") for module in modules):
        return None
    deltas = (module.get_delta_weight(name) for module in modules for name in module.active_adapters)
    return [(bool(delta.isfinite().all()), bool(delta.any())) for delta in deltas]
