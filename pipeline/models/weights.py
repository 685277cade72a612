"""What the files of a local model say before any weight is read: links, adapters, quantisation, kinds of numbers.

Numbers of few bits mean nothing without the scales that belong to them, so a file that holds some is loaded only with a
quantisation that this version of transformers knows. Nothing here builds a model (loading.py does, without memory).
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.errors import InputError

_ADAPTER = ("adapter_config.json", "adapter_model.")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def check_folder(folder: Path, what: str) -> None:
    """InputError for links among a model's files that lead nowhere, in a circle or to a folder elsewhere, and for an
    adapter beside the model, which the library would load or leave out without a word."""
    adapters = sorted(path.name for path in folder.glob("adapter_*") if path.name.startswith(_ADAPTER))
    if adapters:
        raise InputError(
            f"{what}: expected a whole model, got {adapters[0]!r} of an adapter in its folder; name the adapter's "
            "folder as adapter and its base model as source, or remove the file"
        )
    for path in sorted(folder.iterdir()):
        if not path.is_symlink():
            continue
        if not path.exists():
            raise InputError(
                f"{what}: expected files, got the link {path.name!r}, which leads to {str(path.readlink())!r}, where "
                "nothing can be read; copy the model again, with its files"
            )
        if path.is_dir() and not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"{what}: expected files and folders of the model, got the link {path.name!r} to the folder "
                f"{str(path.resolve())!r} outside it; remove the link or copy what it leads to"
            )


def check_quantisation(settings: Any, what: str, *, is_used_here: bool) -> bool:
    """Whether a config asks for a quantisation; InputError where this version of transformers cannot read it.

    is_used_here: whether the packages of this machine are those of the workers.
    """
    if not settings:
        return False
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer  # imports accelerate

    asked = settings if isinstance(settings, dict) else settings.to_dict()
    method = asked.get("quant_method")
    is_bits_and_bytes = bool(asked.get("load_in_8bit") or asked.get("load_in_4bit"))
    if not is_bits_and_bytes and str(getattr(method, "value", method)) not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise InputError(
            f"{what}: expected a quantisation that this version of transformers reads "
            f"({', '.join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))}), got quant_method {method!r} in its config: its "
            "weights would be read as plain numbers; use a checkpoint that is not quantised"
        )
    if is_used_here:
        try:
            AutoHfQuantizer.from_config(asked, pre_quantized=True).validate_environment(device_map=None)
        except (ImportError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, AssertionError) as error:
            said = " ".join(str(error).split())[:300]
            raise InputError(
                f"{what}: expected what its quantisation {method or 'bitsandbytes'} needs on this machine: {said}; or "
                "use a checkpoint that is not quantised"
            ) from error
    return True


def check_numbers(folder: Path, what: str, *, parameters: Collection[str], is_quantised: bool) -> None:
    """InputError where a parameter of the model is stored as numbers that are not its weights.

    parameters: the model's own names, with or without the prefix of its body. Whole numbers under other names (masks,
    positions) are buffers of old checkpoints.
    """
    names = {name.split(".", 1)[1] for name in parameters if "." in name} | set(parameters)
    kinds = dict(_kinds_of_numbers(folder, what))
    for name, kind in sorted(kinds.items()):
        if kind in _FLOATS:
            continue
        is_weight = kind.startswith("F") or name in names
        has_scale = any(other.startswith(name) and "scale" in other.removeprefix(name) for other in kinds)
        if is_weight and not (is_quantised and has_scale):
            missing = "scales beside them" if is_quantised else "a quantization_config in config.json"
            raise InputError(
                f"{what}: expected weights as {', '.join(sorted(_FLOATS))}, got {name!r} as {kind} without {missing}: "
                "they would be read as plain numbers; use a checkpoint that is not quantised, or one that is complete"
            )


def _kinds_of_numbers(folder: Path, what: str) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    yield name, file.get_slice(name).get_dtype()
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{what}: expected weights in {path.name}, it cannot be read: {error}; copy the file again"
            ) from error
