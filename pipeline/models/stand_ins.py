"""Stand-ins for decoder layers: modules that take a layer's place while a model's own forward runs.

With them decoder.py stops a forward after a layer, starts it in the middle, or edits what a layer puts out, and no
architecture is named anywhere. Nothing here runs a model.

Shapes: B documents, T positions, D width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn


class LayerStandIn(nn.Module):
    """Runs `forward_as` in the layer's place; every other attribute that the model reads is the layer's own."""

    def __init__(self, layer: nn.Module, forward_as: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self.forward_as = forward_as

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer would return."""
        return self.forward_as(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class LayerReachedError(Exception):
    """Ends a forward at a layer and carries the residual stream out of it."""

    def __init__(self, hidden_BTD: Tensor, num_outputs: int | None) -> None:
        super().__init__("layer reached")
        self.hidden_BTD = hidden_BTD
        self.num_outputs = num_outputs


def hidden_of(output: Any) -> Tensor:
    """The residual stream in a layer's output: a tensor, or a tuple (in old models a list) that starts with it."""
    hidden_BTD: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden_BTD


def edited(layer: nn.Module, edit: Callable[[Tensor], Tensor]) -> LayerStandIn:
    """The layer, with its residual stream passed through `edit`."""

    def forward_as(*args: Any, **kwargs: Any) -> Any:
        output = layer(*args, **kwargs)
        hidden_BTD = edit(hidden_of(output))
        return (hidden_BTD, *output[1:]) if isinstance(output, tuple | list) else hidden_BTD

    return LayerStandIn(layer, forward_as)


def stop_before(layer: nn.Module) -> LayerStandIn:
    """Raises LayerReachedError with the layer's input."""

    def forward_as(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise LayerReachedError(hidden_states, None)

    return LayerStandIn(layer, forward_as)


def stop_after(layer: nn.Module) -> LayerStandIn:
    """Runs the layer and raises LayerReachedError with its output."""

    def forward_as(*args: Any, **kwargs: Any) -> NoReturn:
        output = layer(*args, **kwargs)
        raise LayerReachedError(hidden_of(output), len(output) if isinstance(output, tuple | list) else None)

    return LayerStandIn(layer, forward_as)


def skip(layer: nn.Module, h_BTD: Tensor | None, num_outputs: int | None) -> LayerStandIn:
    """Does not run the layer: returns h_BTD, or the layer's input where it is None.

    num_outputs: length of the tuple that the layer returns, its other parts (attention weights, states) None; None for
    a layer that returns a tensor.
    """

    def forward_as(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        given_BTD = hidden_states if h_BTD is None else h_BTD
        return given_BTD if num_outputs is None else (given_BTD, *[None] * (num_outputs - 1))

    return LayerStandIn(layer, forward_as)


class GivenBody(nn.Module):
    """Takes the place of a model's body and gives a known hidden state to the head.

    Settings that the head reads are the body's own. Its modules give the hidden state as well, since some models call
    one inside their body (OPT's `model.decoder`).
    """

    def __init__(self, body: nn.Module, hidden_BTD: Tensor) -> None:
        super().__init__()
        # Not as a module of this one: in `_modules` its parameters would count twice.
        object.__setattr__(self, "_body", body)
        self.hidden_BTD = hidden_BTD

    def forward(self, *_args: Any, **_kwargs: Any) -> "_GivenOutput":
        """The hidden state as a body's output."""
        return _GivenOutput(self.hidden_BTD)

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._body, name)
        return GivenBody(own, self.hidden_BTD) if isinstance(own, nn.Module) else own


class _GivenOutput:
    """A body's output with the hidden state alone; every other field that a head may read is None."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        self.last_hidden_state = hidden_BTD

    def __getattr__(self, _name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None


@contextmanager
def replaced(layers: nn.ModuleList, stand_ins: Mapping[int, nn.Module]) -> Iterator[None]:
    """Layers replaced in place, by index, and put back at the end."""
    originals = {i: layers[i] for i in stand_ins}
    for i, stand_in in stand_ins.items():
        layers[i] = stand_in
    try:
        yield
    finally:
        for i, original in originals.items():
            layers[i] = original
