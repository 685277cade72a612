"""Placement of models on devices: both models on one, one each, or both spread over several.

`spread` cuts each model into runs of layers of about equal bytes and lets accelerate move the stream from device to
device; it is for models larger than one GPU. The devices then work one after the other, so several small workers are
faster than one spread pair wherever a model fits a device.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from pipeline.errors import InputError, first_line
from pipeline.models.decoder import SplitDecoder
from pipeline.models.shared_layers import modules_before_layers

Placement = Literal["one_device", "two_devices", "spread"]


def device_here() -> str:
    """Where models and crosscoders go if nobody says where: the GPU where there is one."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def put(decoder: SplitDecoder, devices: Sequence[str]) -> None:
    """Moves a model to one device, or spreads it over several. InputError without these devices or their memory."""
    try:
        if len(devices) == 1:
            decoder.to(devices[0])
        else:
            _spread(decoder, devices)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"expected room for the models on {', '.join(devices)}, it ran out: {first_line(error)}; use placement "
            "two_devices or spread with more GPUs per worker"
        ) from error
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"expected a device of this machine, got {', '.join(map(repr, devices))}: {first_line(error)}"
        ) from error


def spread_map(decoder: SplitDecoder, devices: Sequence[str]) -> dict[str, str]:
    """Device of every layer and of every other module with tensors of its own, by name in `decoder.whole`.

    Layers go to the devices in order, cut where the bytes are shared evenly; what runs before them goes with the first
    layer, what runs after them with the last. Tied tensors stay together.
    """
    name_of = {module: name for name, module in decoder.whole.named_modules()}
    sizes = [sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in decoder.layers]
    total, passed = sum(sizes), 0
    placed: dict[str, str] = {}
    for layer, size in zip(decoder.layers, sizes, strict=True):
        place = min(len(devices) - 1, int(len(devices) * (passed + size / 2) / total)) if total else 0
        placed[name_of[layer]] = devices[place]
        passed += size
    inside = set(decoder.layers.modules())
    before = set(modules_before_layers(decoder))
    device_of_tensor: dict[int, str] = {}
    others = [module for module in decoder.whole.modules() if module not in inside]
    for module in sorted(others, key=lambda other: other not in before):
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not tensors:
            continue
        own = devices[0] if module in before else devices[-1]
        placed[name_of[module]] = next((device_of_tensor[id(t)] for t in tensors if id(t) in device_of_tensor), own)
        device_of_tensor.update({id(tensor): placed[name_of[module]] for tensor in tensors})
    return placed


def _spread(decoder: SplitDecoder, devices: Sequence[str]) -> None:
    try:
        from accelerate import dispatch_model
    except ImportError as error:
        raise InputError(
            "expected the package accelerate for placement spread, it is not installed; pip install 'crossray[spread]'"
        ) from error
    whole: nn.Module = decoder.whole
    dispatch_model(
        whole,
        device_map=spread_map(decoder, devices),
        main_device=devices[0],
        skip_keys=getattr(whole, "_skip_keys_device_placement", None),
        force_hooks=True,
    )
    decoder.was_moved()
