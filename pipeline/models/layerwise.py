"""The residual stream after every decoder layer, and the model continued from any of them.

A SplitDecoder is cut at one layer. Here light copies of it, which share the model, its weights and its switch (an
adapter on or off), are cut at other layers, so that one forward gives the stream of all layers and the upper half can
start anywhere. Nothing is loaded again and no architecture is named.

Layers are counted as the field does: layer l is the output of decoder layer l, from 0 (`hidden_states[l + 1]` of
transformers).

Shapes: B documents, T positions, D width.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.models.decoder import SplitDecoder
from pipeline.models.stand_ins import hidden_of


class LayerStreams(NamedTuple):
    """One forward of a model, seen at several layers."""

    stream_BTD: tuple[Tensor, ...]
    """The residual stream after each layer asked for, in the model's dtype; values at padding mean nothing."""
    hidden_BTD: Tensor
    """After the final norm: what the head reads."""
    decoder: SplitDecoder
    """The model cut at its last layer. It knows what its layers return, as `continued_from` needs."""


def at_layer(decoder: SplitDecoder, layer: int) -> SplitDecoder:
    """The same model cut after decoder layer `layer` (from 0); shares everything with `decoder`."""
    assert 0 <= layer < decoder.num_layers, f"layer {layer} of {decoder.num_layers}"
    view = copy.copy(decoder)
    view.layer = layer
    return view


@torch.no_grad()
def layer_streams(decoder: SplitDecoder, ids_BT: Tensor, mask_BT: Tensor, layers: Sequence[int]) -> LayerStreams:
    """One forward through all layers. Memory: one [B, T, D] for each layer asked for.

    mask_BT: 1 on tokens, 0 on padding, on either side.
    """
    whole = at_layer(decoder, decoder.num_layers - 1)
    seen: dict[int, Tensor] = {}
    handles = [
        decoder.layers[layer].register_forward_hook(
            lambda _module, _args, output, layer=layer: seen.__setitem__(layer, hidden_of(output))
        )
        for layer in dict.fromkeys(layers)
    ]
    try:
        last_BTD = whole.lower(ids_BT, mask_BT)
    finally:
        for handle in handles:
            handle.remove()
    hidden_BTD = whole.upper(last_BTD, mask_BT)
    return LayerStreams(tuple(seen[layer] for layer in layers), hidden_BTD, whole)


def continued_from(run: LayerStreams, layer: int, h_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """hidden_BTD after the final norm of the model of `run`, with h_BTD in the place of its stream after `layer`."""
    return at_layer(run.decoder, layer).upper(h_BTD, mask_BT)


@torch.no_grad()
def rerounded_hidden(decoder: SplitDecoder, ids_BT: Tensor, mask_BT: Tensor, *, seed: int = 0) -> Tensor:
    """hidden_BTD after the final norm, with every layer's output moved by one rounding step of the model's dtype.

    Each number is multiplied by 1 + eps or 1 - eps, at random (eps of the dtype, 2^-7 in bfloat16). It stands for what
    another order of operations, another batch or another scale of the weights would round differently. The same seed
    and shapes give the same signs on every device.
    """
    whole = at_layer(decoder, decoder.num_layers - 1)
    with _rerounded(decoder, seed):
        last_BTD = whole.lower(ids_BT, mask_BT)
    # The last layer's output has moved already: the hook sits on the layer, which `upper` does not run.
    return whole.upper(last_BTD, mask_BT)


@contextmanager
def _rerounded(decoder: SplitDecoder, seed: int) -> Iterator[None]:
    generator = torch.Generator().manual_seed(seed)

    def move(_module: Any, _args: Any, output: Any) -> Any:
        hidden_BTD = hidden_of(output)
        # A sign per position times a sign per dimension: a fresh one for every number takes longer than the layer.
        sign_BT, sign_D = (
            (torch.randint(0, 2, shape, generator=generator) * 2 - 1).to(hidden_BTD)
            for shape in (hidden_BTD.shape[:2], hidden_BTD.shape[2:])
        )
        step_BTD = torch.finfo(hidden_BTD.dtype).eps * sign_BT[..., None] * sign_D
        moved_BTD = hidden_BTD + hidden_BTD * step_BTD
        return (moved_BTD, *output[1:]) if isinstance(output, tuple | list) else moved_BTD

    handles = [layer.register_forward_hook(move) for layer in decoder.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
