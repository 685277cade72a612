"""A crosscoder's reconstruction in the place of one model's stream, in the real modules.

At layer L of the edited model h becomes xh^m = decode(encode(h^base, h^chat))^m; or, with the error kept, h itself
less what chosen latents contribute. The other model runs up to layer L beside it, on the same ids, with a cache of its
own that follows the edited model's. Positions that are no rows (padding, BOS, first tokens, attention sinks) stay as
they are: the crosscoder was not trained on them.

With a cache the norms of a document's earlier positions are gone, so sinks are looked for where a document begins;
generated tokens are rows.

Shapes: B documents, T positions, M models, D width, N = B * T.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from pipeline.errors import InputError
from pipeline.extraction.activations import RowOptions, within_norm_cap
from pipeline.models.live_edits import stream_beside, stream_hooked
from pipeline.models.pair import ModelPair
from pipeline.numerics.crosscoder import Crosscoder

_PASSED = ("attention_mask", "position_ids", "cache_position", "token_type_ids")
"""Inputs of the edited model's body that the other one gets too."""


@contextmanager
def spliced(
    pair: ModelPair,
    crosscoder: Crosscoder,
    options: RowOptions,
    *,
    model: int,
    keeps_error: bool,
    without: Sequence[int],
) -> Iterator[None]:
    """Every forward of one model of the pair reads the reconstruction from layer L on, within the block.

    Args:
        pair: both models.
        crosscoder: of this pair and layer, on the pair's device.
        options: which tokens are rows.
        model: schema.BASE or schema.CHAT, the one that is edited.
        keeps_error: adds what the reconstruction misses, so that only `without` changes anything.
        without: latents whose contribution is left out.
    """
    splice = _Splice(pair, crosscoder, options, model, keeps_error=keeps_error, without=without)
    decoder = pair.decoders[model]
    handles = [
        decoder.base.register_forward_pre_hook(splice.before_body, with_kwargs=True),
        decoder.base.register_forward_hook(splice.after_body),
    ]
    try:
        with stream_hooked(decoder, splice.edit):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Splice:
    """The hooks of one block; holds the other model's stream while the edited model runs."""

    def __init__(
        self,
        pair: ModelPair,
        crosscoder: Crosscoder,
        options: RowOptions,
        model: int,
        *,
        keeps_error: bool,
        without: Sequence[int],
    ) -> None:
        self.pair, self.crosscoder, self.options, self.model = pair, crosscoder, options, model
        self.own, self.other = pair.decoders[model], pair.decoders[1 - model]
        self.keeps_error = keeps_error
        self.without = torch.tensor(sorted(without), dtype=torch.int64, device=crosscoder.W_dec_FMD.device)
        self._caches: WeakKeyDictionary[Any, DynamicCache] = WeakKeyDictionary()
        self._new_cache: DynamicCache | None = None
        self._is_beside = False
        self._other_BTD: Tensor | None = None
        self._is_row_BT: Tensor | None = None
        self._is_start = True

    def before_body(self, _body: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Runs the other model on what the edited one is about to read."""
        if self._is_beside:
            return
        ids_BT = inputs.get("input_ids", args[0] if args else None)
        if ids_BT is None:
            raise InputError(
                "splice: expected a model that is called with input_ids, got none; the other model reads them"
            )
        cache = self._cache_beside(inputs)
        passed = {name: _moved(inputs[name], self.other.device) for name in _PASSED if inputs.get(name) is not None}
        self._is_row_BT = self._rows_among(ids_BT, inputs.get("attention_mask"), cache)
        self._is_beside = True
        try:
            with torch.no_grad():
                self._other_BTD = stream_beside(
                    self.other,
                    self.own,
                    {**passed, "input_ids": self.other.read(ids_BT), "past_key_values": cache}
                    | {"use_cache": cache is not None},
                )
        finally:
            self._is_beside = False

    def after_body(self, _body: nn.Module, _args: Any, output: Any) -> None:
        """Remembers which cache of the other model belongs to the one that the body has made."""
        made = getattr(output, "past_key_values", None)
        if not self._is_beside and made is not None and self._new_cache is not None and made not in self._caches:
            self._caches[made] = self._new_cache

    def edit(self, h_BTD: Tensor) -> Tensor:
        """The stream after layer L of the edited model, spliced."""
        if self._is_beside:
            return h_BTD
        assert self._other_BTD is not None and self._is_row_BT is not None, "the body's hook comes first"
        streams = [h_BTD, self._other_BTD.to(h_BTD)]
        x_BTMD = torch.stack(streams if self.model == 0 else streams[::-1], dim=2)
        is_row_BT = self._is_row_BT.to(h_BTD.device)
        if self._is_start and self.options.norm_cap is not None:
            is_row_BT = is_row_BT & within_norm_cap(x_BTMD.detach(), self._is_token_BT, self.options.norm_cap)
        spliced_ND = self._spliced(x_BTMD.flatten(0, 1)[is_row_BT.flatten()])
        edited_ND = h_BTD.flatten(0, 1).clone()
        edited_ND[is_row_BT.flatten()] = spliced_ND.to(h_BTD.dtype)
        return edited_ND.view_as(h_BTD)

    def _spliced(self, x_NMD: Tensor) -> Tensor:
        codes = self.crosscoder.encode(x_NMD)
        kept = codes.keep(~torch.isin(codes.latents_P, self.without)) if len(self.without) else codes
        reconstruction_ND = self.crosscoder.decode(kept)[:, self.model]
        if not self.keeps_error:
            return reconstruction_ND
        x_ND = x_NMD[:, self.model]
        change_ND = reconstruction_ND - self.crosscoder.decode(codes)[:, self.model]
        return x_ND + change_ND.to(torch.promote_types(x_ND.dtype, change_ND.dtype))

    def _cache_beside(self, inputs: dict[str, Any]) -> DynamicCache | None:
        """The other model's cache that belongs to the edited model's; new where that one is new or to be made."""
        past = inputs.get("past_key_values")
        self._new_cache, self._is_start = None, past is None or past.get_seq_length() == 0
        if past is None:
            uses_cache = inputs.get("use_cache")
            if uses_cache is None:
                uses_cache = self.own.base.config.use_cache
            self._new_cache = DynamicCache(config=self.other.base.config) if uses_cache else None
            return self._new_cache
        if self._is_start:
            self._caches[past] = DynamicCache(config=self.other.base.config)
        cache = self._caches.get(past)
        if cache is None or cache.get_seq_length() != past.get_seq_length():
            raise InputError(
                f"splice: expected a cache that was begun within the block and is only appended to, got one of "
                f"{past.get_seq_length()} tokens beside {0 if cache is None else cache.get_seq_length()}; start the "
                "generation inside `with pair.splice(...)`, without beam search"
            )
        return cache

    def _rows_among(self, ids_BT: Tensor, mask: Any, cache: DynamicCache | None) -> Tensor:
        """bool [B, T]: the new positions that the crosscoder reads, the norm cap aside."""
        num_past = 0 if cache is None else int(cache.get_seq_length())
        is_plain = isinstance(mask, Tensor) and mask.ndim == 2
        mask_BT = mask if is_plain else torch.ones(len(ids_BT), num_past + ids_BT.shape[1], device=ids_BT.device)
        position_BT = (mask_BT.to(torch.int64).cumsum(1) - 1)[:, -ids_BT.shape[1] :]
        self._is_token_BT = mask_BT[:, -ids_BT.shape[1] :] != 0
        is_row_BT = self._is_token_BT & (position_BT >= self.options.drop_first_tokens)
        bos = self.pair.tokenizer.bos_token_id if self.options.drop_bos and self.pair.tokenizer is not None else None
        return is_row_BT if bos is None else is_row_BT & (ids_BT != bos)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _moved(own, device) for name, own in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
