"""One causal language model cut in two at the output of decoder layer L.

    ids -> [embedding, layers 0..L] -> h -> [layers L+1..N-1, final norm] -> hidden -> [head] -> logits
                  lower                               upper                          head

The halves are the model's own forward with some layers replaced while it runs (stand_ins.py): the lower half ends by
an exception raised right after layer L, the upper half skips layers 0..L and starts from the given h, the head runs the
model's outermost forward on a given hidden state. So masks, rotary embeddings, sliding windows, soft-capping and logit
scaling stay the architecture's own code, and no architecture is named here.

L counts from 0, as `model.layers[L]` does; h is that layer's output (`hidden_states[L + 1]`), for the last layer before
the final norm. Two decoders may share one
model that is switched between them (an adapter on and off) or have their first layers in common (`lower_and_prefix`,
`lower_from`). The trade-off: layers are replaced in place, so one model object serves one thread at a time.

Shapes: B documents, T positions, D width, P chosen positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.models.rounding import ROUNDING, relative_errors
from pipeline.models.stand_ins import (
    GivenBody,
    LayerReachedError,
    edited,
    hidden_of,
    replaced,
    skip,
    stop_after,
    stop_before,
)

_MOST_ADDED_TOKENS = 1 << 16
"""Beyond a model's vocabulary, of the ids that it reads as others."""
LOGITS_PER_CHUNK = 1 << 25
"""Numbers in one chunk of logits: 128 MiB in float32."""


class LowerRun(NamedTuple):
    """Two points of one forward through the lower half."""

    prefix_BTD: Tensor
    """The residual stream after the first layers asked for."""
    h_BTD: Tensor
    """The residual stream after layer L."""


class SplitDecoder:
    """A causal language model whose two halves run separately.

    layer: L, from 0. token_replacements: ids that this model reads as other ids (for a base model that was not trained
    on the template's tokens). select: called before every forward of a model that two decoders share.
    """

    def __init__(
        self,
        model: Any,
        layer: int,
        token_replacements: Mapping[int, int] | None = None,
        *,
        select: Callable[[], None] | None = None,
    ) -> None:
        config = model.config.get_text_config()
        self.num_layers: int = config.num_hidden_layers
        self.activation_dim: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        context = getattr(config, "max_position_embeddings", None)
        self.context: int | None = context if context and context > 0 else None  # some write -1 for no limit
        check_layer(layer, self.num_layers, f"the model {config.name_or_path!r}")
        self.layer = layer
        self.model: Any = model.eval()
        # In most models the body is the attribute that the class names as its prefix; a few (Llama 4) name another.
        prefix = model.base_model_prefix
        self._body_name = prefix if hasattr(model, prefix) else "model"
        self.base: Any = getattr(model, self._body_name, model)
        if self.base is model:
            raise InputError(
                f"expected a causal language model made of a body and a head, got {type(model).__name__} without a "
                "separate body; this architecture cannot be cut at a layer"
            )
        self.layers = find_layers(self.base, self.num_layers)
        self.device = next(self.base.parameters()).device
        self._replacements = self._replacement_table(token_replacements or {})
        # Length of the tuples that this architecture's layers return, None for tensors; from the first lower forward.
        self.num_outputs: int | None = None
        self._select = select

    def body(self, **inputs: Any) -> Any:
        """The output of the model's body, without its head."""
        self.select()
        return self.base(**inputs)

    def select(self) -> None:
        """Switches a shared model to this decoder; `body`, `lower`, `upper` and `head` call it themselves."""
        if self._select is not None:
            self._select()

    @torch.no_grad()
    def lower(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """h_BTD, the residual stream after layer L, in the model's dtype; values at padding are undefined.

        mask_BT: 1 on tokens, 0 on padding, on either side.
        """
        return self._run_lower(ids_BT, mask_BT, {})

    @torch.no_grad()
    def lower_and_prefix(self, ids_BT: Tensor, mask_BT: Tensor, num_layers: int) -> LowerRun:
        """As `lower`, with the stream after the first num_layers layers (at least 1, fewer than num_lower)."""
        assert 1 <= num_layers < self.num_lower, f"a prefix of {num_layers} of {self.num_lower} layers"
        seen: list[Tensor] = []
        with self.layers[num_layers - 1].register_forward_hook(lambda *args: seen.append(hidden_of(args[-1]))):
            h_BTD = self._run_lower(ids_BT, mask_BT, {})
        return LowerRun(seen[0], h_BTD)

    @torch.no_grad()
    def lower_from(self, prefix_BTD: Tensor, num_layers: int, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """As `lower`, continued from the stream after the first num_layers layers, which do not run."""
        assert 1 <= num_layers < self.num_lower, f"a prefix of {num_layers} of {self.num_lower} layers"
        return self._run_lower(ids_BT, mask_BT, self._starting_from(prefix_BTD, num_layers))

    @torch.no_grad()
    def run_before_layers(self) -> None:
        """Runs what comes before the first layer on one token, on any device and with any attention code."""
        try:
            with replaced(self.layers, {0: stop_before(self.layers[0])}):
                self.body(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device), use_cache=False)
        except LayerReachedError:
            return
        raise AssertionError(f"the forward of {type(self.base).__name__} never reached its first layer")

    def _run_lower(self, ids_BT: Tensor, mask_BT: Tensor, stand_ins: Mapping[int, nn.Module]) -> Tensor:
        if self.context is not None and ids_BT.shape[1] > self.context:
            raise InputError(
                f"expected documents of at most {self.context} tokens (context of {self.base.config.name_or_path!r}), "
                f"got one of {ids_BT.shape[1]}; lower tokens.max_tokens_per_document"
            )
        stop = stop_after(self.layers[self.layer])
        try:
            with replaced(self.layers, {**stand_ins, self.layer: stop}):
                self.body(input_ids=self.read(ids_BT), **self.attention(mask_BT), use_cache=False)
        except LayerReachedError as reached:
            self.num_outputs = reached.num_outputs
            expected, shape = (*ids_BT.shape, self.activation_dim), tuple(reached.hidden_BTD.shape)
            if shape != expected:
                raise InputError(
                    f"expected one vector per token from layer {self.layer}, {list(expected)}, got {list(shape)} from "
                    f"{type(self.base).__name__} ({self.base.config.name_or_path!r}): this architecture has no single "
                    "residual stream; choose another model"
                ) from None
            return reached.hidden_BTD.to(self.device)
        raise AssertionError(f"the forward of {type(self.base).__name__} never reached its layer {self.layer}")

    def _starting_from(self, h_BTD: Tensor, num_layers: int) -> dict[int, nn.Module]:
        """Stand-ins for the first layers that put the given stream in the place of the last one's output."""
        return {
            i: skip(self.layers[i], h_BTD if i == num_layers - 1 else None, self.num_outputs) for i in range(num_layers)
        }

    @cached_property
    @torch.no_grad()
    def ignores_left_padding(self) -> bool:
        """Whether padding on the left leaves the tokens after it as they are; recurrent layers may read it."""
        ids_1T = torch.ones(1, 3, dtype=torch.int64, device=self.device)
        padded_1T = torch.cat([torch.zeros_like(ids_1T), ids_1T], dim=1)
        mask_1T = torch.cat([torch.zeros_like(ids_1T), ids_1T], dim=1)
        alone_D, beside_D = (
            self.body(input_ids=self.read(own_1T), use_cache=False, **arguments).last_hidden_state[0, -1].double()
            for own_1T, arguments in ((ids_1T, {}), (padded_1T, self.attention(mask_1T)))
        )
        return bool(relative_errors(beside_D, alone_D) <= ROUNDING[self.base.dtype])

    def attention(self, mask_BT: Tensor) -> dict[str, Tensor | None]:
        """The arguments that keep padding out of every real token's view.

        A causal model never sees padding on the right, so nothing is passed and the fast causal kernels apply.
        Otherwise the mask and positions counted from the first real token are passed.
        """
        if bool((mask_BT[:, 1:] <= mask_BT[:, :-1]).all()):
            return {"attention_mask": None, "position_ids": None}
        mask_BT = mask_BT.to(self.device, torch.int64)
        return {"attention_mask": mask_BT, "position_ids": (mask_BT.cumsum(1) - 1).clamp_min(0)}

    @torch.no_grad()
    def upper(self, h_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """hidden_BTD after the final norm, continued from h_BTD (taken in the model's dtype) at layer L."""
        assert self.has_upper, "the upper half was dropped; load the pair with both halves"
        h_BTD = h_BTD.to(self.device, self.base.dtype)
        with replaced(self.layers, self._starting_from(h_BTD, self.num_lower)):
            output = self.body(inputs_embeds=h_BTD, **self.attention(mask_BT), use_cache=False)
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD.to(self.device)

    @torch.no_grad()
    def head(self, hidden_PD: Tensor) -> Tensor:
        """logits_PV of chosen hidden states, in the model's dtype, with everything the model does to its logits."""
        assert self.has_upper, "the head was dropped with the upper half; load the pair with both halves"
        self.select()
        hidden_1PD = hidden_PD.unsqueeze(0).to(self.device)
        setattr(self.model, self._body_name, GivenBody(self.base, hidden_1PD))
        try:
            logits_PV: Tensor = self.model(inputs_embeds=hidden_1PD, use_cache=False).logits[0]
        finally:
            setattr(self.model, self._body_name, self.base)
        return logits_PV.to(self.device)

    def head_chunks(self, num_positions: int) -> Iterator[slice]:
        """Slices of the positions whose logits may exist at the same time (LOGITS_PER_CHUNK numbers)."""
        chunk = max(1, LOGITS_PER_CHUNK // self.vocab_size)
        for start in range(0, num_positions, chunk):
            yield slice(start, min(start + chunk, num_positions))

    @property
    def num_readable(self) -> int:
        """Ids below this number can be read, those beyond the vocabulary where they are replaced."""
        return self.vocab_size if self._replacements is None else len(self._replacements)

    @property
    def num_lower(self) -> int:
        """Decoder layers of the lower half, L + 1."""
        return self.layer + 1

    @property
    def has_upper(self) -> bool:
        """Whether layers above L and the head are still there."""
        return self.model is not None

    @property
    def whole(self) -> nn.Module:
        """What is left of the model: all of it, or its body after `drop_upper`."""
        whole: nn.Module = self.base if self.model is None else self.model
        return whole

    def drop_upper(self, num_kept: int = 0) -> None:
        """Frees the layers above L (but num_kept of them) and the head; only `lower` works afterwards."""
        del self.layers[self.num_lower + num_kept :]
        self.model = None

    def to(self, device: str) -> None:
        """Moves what is left of the model to a device."""
        self.whole.to(device)
        self.was_moved()

    def was_moved(self) -> None:
        """Call it after the model was moved; inputs go to the device of its first parameter."""
        self.device = next(self.base.parameters()).device
        if self._replacements is not None:
            self._replacements = self._replacements.to(self.device)

    @contextmanager
    def stream_edited(self, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Runs the body with `edit` applied to the residual stream after layer L."""
        with replaced(self.layers, {self.layer: edited(self.layers[self.layer], edit)}):
            yield

    def read(self, ids_BT: Tensor) -> Tensor:
        """The ids as this model reads them: int64 on its device, token replacements done."""
        ids_BT = ids_BT.to(self.device, torch.int64)
        return ids_BT if self._replacements is None else self._replacements[ids_BT]

    def _replacement_table(self, replacements: Mapping[int, int]) -> Tensor | None:
        if not replacements:
            return None
        # Ids that are replaced may lie beyond the vocabulary: tokens that the other model was given later.
        outside = [i for i in replacements.values() if not 0 <= i < self.vocab_size]
        outside += [i for i in replacements if not 0 <= i < self.vocab_size + _MOST_ADDED_TOKENS]
        if outside:
            raise InputError(
                f"expected token replacements between 0 and {self.vocab_size - 1} (the model's vocabulary), got "
                f"{outside[0]}; change token_replacements"
            )
        table = torch.arange(max(self.vocab_size, max(replacements) + 1))
        table[list(replacements)] = torch.tensor(list(replacements.values()))
        return table.to(self.device)


def check_layer(layer: int, num_layers: int, model: str) -> None:
    """InputError where a model has no such layer; `model` names it."""
    if not 0 <= layer < num_layers:
        raise InputError(
            f"expected a layer between 0 and {num_layers - 1} ({model} has {num_layers} decoder layers, counted from "
            f"0), got layer {layer}; change the layer"
        )


def find_layers(base: nn.Module, num_layers: int) -> nn.ModuleList:
    """The model's list of decoder layers; InputError where it has none or more than one of that length."""
    found = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    outer = [m for m in found if not any(m is not other and m in set(other.modules()) for other in found)]
    if len(outer) != 1:
        raise InputError(
            f"expected a decoder-only model with one list of {num_layers} layers, found {len(outer)} such lists in "
            f"{type(base).__name__}; this architecture cannot be cut at a layer"
        )
    return outer[0]
