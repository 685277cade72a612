"""Edits of the residual stream in the real modules: every forward of a model passes through them, whoever calls it.

SplitDecoder.stream_edited serves our own loops, where a stand-in is put in a layer's place for one call. Here a hook
stays on the layer for the length of a block, so that the user's own calls, the library's `generate` and our halves all
see it. Hooks of several blocks apply in the order in which the blocks were entered.

Shapes: B documents, T positions, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pipeline.models.decoder import SplitDecoder
from pipeline.models.stand_ins import LayerReachedError, LayerStandIn, hidden_of, replaced, stop_after


@contextmanager
def stream_hooked(decoder: SplitDecoder, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Passes the stream after layer L through `edit`, h_BTD to h_BTD, in every forward within the block."""
    decoder.select()

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden_BTD = edit(hidden_of(output))
        return (hidden_BTD, *output[1:]) if isinstance(output, tuple) else hidden_BTD

    handle = decoder.layers[decoder.layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def stream_beside(decoder: SplitDecoder, running: SplitDecoder, inputs: dict[str, Any]) -> Tensor:
    """h_BTD of `decoder` for the inputs with which the body of `running` was called; layers above L do not run.

    A cache among the inputs is filled up to layer L. Where both decoders are one module, hooks on its layer are left
    out, since they are those of `running`; `running` is selected again.
    """
    layer = decoder.layers[decoder.layer]
    is_shared = decoder.base is running.base
    stop = _stop_after_unhooked(layer) if is_shared else stop_after(layer)
    try:
        with replaced(decoder.layers, {decoder.layer: stop}):
            decoder.body(**inputs)
    except LayerReachedError as reached:
        return reached.hidden_BTD
    finally:
        if is_shared:
            running.select()
    raise AssertionError(f"the forward of {type(decoder.base).__name__} never reached its layer {decoder.layer}")


def _stop_after_unhooked(layer: nn.Module) -> LayerStandIn:
    def forward_as(*args: Any, **kwargs: Any) -> Any:
        output = layer.forward(*args, **kwargs)
        raise LayerReachedError(hidden_of(output), len(output) if isinstance(output, tuple | list) else None)

    return LayerStandIn(layer, forward_as)
