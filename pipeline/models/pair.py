"""The two language models of a run, side by side and cut at the same layer.

ModelPair gives the residual streams of both models on the same ids, the upper half continued from an edited stream,
answers with steering, and the check against the library's own forward. Layers that both models have in common run once.
loading.py loads the models.

It plans no batches (extraction/activations.py) and edits nothing (analyses/). Results are on the chat model's device
(`device`).

Shapes: B documents, T positions, M models in schema order, D width, P chosen positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.models.decoder import SplitDecoder
from pipeline.models.generation import AnswerLikelihood, Sampling, Steering, answer_likelihood, generate
from pipeline.models.loading import LoadOptions, ModelSpec, load_decoders, load_tokenizer
from pipeline.models.padding import pad_tokens
from pipeline.models.stand_ins import hidden_of
from pipeline.schema import CHAT, MODEL_NAMES
from pipeline.text.tokenizers import end_of_turn_id

PLAIN_FORWARD_TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 8e-2,
}
"""Largest |ours - plain| / |plain| of a row that rounding explains."""


class Verification(NamedTuple):
    """How far our batches are from the library's plain forward of each document alone."""

    relative_difference: tuple[float, float]
    """Of base and chat: largest |ours - plain| / |plain| over the rows after layer L, norms over D; 0 is exact."""
    logits_max_abs_difference: float
    """Of the logits continued from layer L, over both models; NaN where the upper halves were dropped."""


class ModelPair:
    """Base and chat model, cut at one layer; `load` makes one from folders or the hub.

    num_shared_layers: leading layers that are the same in both models, up to L + 1 of them.
    """

    def __init__(self, base: SplitDecoder, chat: SplitDecoder, tokenizer: Any, *, num_shared_layers: int = 0) -> None:
        self.decoders = (base, chat)
        self.tokenizer = tokenizer
        self.layer = chat.layer
        self.num_layers = chat.num_layers
        self.activation_dim = chat.activation_dim
        self.vocab_size = chat.vocab_size
        self.device = chat.device
        self.num_shared_layers = chat.num_lower if base is chat else num_shared_layers
        self.commits: tuple[str | None, str | None] = (None, None)

    @classmethod
    def load(cls, base: ModelSpec, chat: ModelSpec, options: LoadOptions) -> "ModelPair":
        """Both models on their devices. InputError where they do not form a pair, cannot be loaded or do not fit."""
        loaded = load_decoders(base, chat, options)
        pair = cls(loaded.base, loaded.chat, load_tokenizer(chat), num_shared_layers=loaded.num_shared_layers)
        pair.commits = loaded.commits
        return pair

    def drop_upper(self) -> None:
        """Frees everything above layer L in both models; only `activations` and `lower` work afterwards."""
        for decoder in dict.fromkeys(self.decoders):
            decoder.drop_upper()

    def activations(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """h_BTMD after layer L of both models in the models' dtype; values at padding are undefined.

        mask_BT is 1 on tokens and 0 on padding; padding may be on either side. Layers above L do not run.
        """
        base, chat = self.decoders
        shared = self.num_shared_layers
        if shared == 0:
            # On two devices both forwards are started before either result is needed.
            return self._stack(base.lower(ids_BT, mask_BT), chat.lower(ids_BT, mask_BT))
        if shared >= self.decoders[CHAT].num_lower:
            chat_BTD = chat.lower(ids_BT, mask_BT)
            base.returns_tuple = chat.returns_tuple
            return self._stack(chat_BTD, chat_BTD)
        run = chat.lower_and_prefix(ids_BT, mask_BT, shared)
        base.returns_tuple = chat.returns_tuple
        return self._stack(base.lower_from(run.prefix_BTD, shared, ids_BT, mask_BT), run.h_BTD)

    def _stack(self, base_BTD: Tensor, chat_BTD: Tensor) -> Tensor:
        return torch.stack([base_BTD.to(self.device), chat_BTD.to(self.device)], dim=2)

    def lower(self, model: int, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """h_BTD of one model (schema.BASE or schema.CHAT) after layer L."""
        return self.decoders[model].lower(ids_BT, mask_BT).to(self.device)

    def upper(self, model: int, h_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """hidden_BTD after one model's final norm, continued from h_BTD at layer L."""
        return self.decoders[model].upper(h_BTD, mask_BT).to(self.device)

    def head(self, model: int, hidden_PD: Tensor) -> Tensor:
        """logits_PV of chosen positions of `upper`; call it on chunks of positions to bound memory."""
        return self.decoders[model].head(hidden_PD).to(self.device)

    def upper_logits(self, model: int, h_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """logits_BTV continued from h_BTD at layer L; `upper` and `head` do the same in chunks."""
        hidden_BTD = self.upper(model, h_BTD, mask_BT)
        return self.head(model, hidden_BTD.flatten(0, 1)).reshape(*hidden_BTD.shape[:2], -1)

    def stop_token_ids(self) -> frozenset[int]:
        """Ids that end the chat model's answer: its generation config's, its tokenizer's, and the end of a turn."""
        ids = {self.tokenizer.eos_token_id, end_of_turn_id(self.tokenizer)}
        model = self.decoders[CHAT].model
        configured = getattr(model.generation_config, "eos_token_id", None) if model is not None else None
        ids |= set(configured) if isinstance(configured, list | tuple) else {configured}
        return frozenset(int(index) for index in ids if index is not None)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        steering: Steering | None = None,
        *,
        model: int = CHAT,
        sampling: Sampling | None = None,
        use_cache: bool = True,
    ) -> list[list[int]]:
        """One model's answers, greedy without sampling, one batch, without their stop token."""
        return generate(
            self.decoders[model],
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_token_ids(),
            steering=steering,
            sampling=sampling,
            use_cache=use_cache,
        )

    def answer_likelihood(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> AnswerLikelihood:
        """Nats of every answer under the unsteered chat model."""
        return answer_likelihood(self.decoders[CHAT], prompts, answers)

    @torch.no_grad()
    def verify_against_plain_forward(self, documents: Sequence[Sequence[int]]) -> Verification:
        """Our halves on all documents in one padded batch, against the library's forward of each document alone.

        The plain side is `output_hidden_states` of layer L; for the last layer, whose hidden state the library has
        already normalised, the layer's output, taken by a hook.
        """
        ours_BTMD = self.activations(*pad_tokens(documents))
        relative: list[list[Tensor]] = [[] for _ in MODEL_NAMES]
        logits: list[Tensor] = []
        for model, decoder in enumerate(self.decoders):
            for row, document in enumerate(documents):
                plain_TD, plain_TV = _plain_forward(decoder, document)
                ours_TD = ours_BTMD[row, : len(document), model].to(plain_TD.device, torch.float64)
                relative[model].append(_relative_errors(ours_TD, plain_TD.double()).cpu())
                if plain_TV is None:
                    continue
                ones_1T = torch.ones(1, len(document), dtype=torch.int64)
                hidden_1TD = decoder.upper(ours_BTMD[row : row + 1, : len(document), model], ones_1T)
                logits.append((decoder.head(hidden_1TD[0]) - plain_TV.to(decoder.device)).abs().max().cpu())
        base_difference, chat_difference = (float(torch.cat(own).max()) for own in relative)
        logits_difference = float(torch.stack(logits).max()) if logits else float("nan")
        return Verification((base_difference, chat_difference), logits_difference)

    def require_plain_forward(self, documents: Sequence[Sequence[int]]) -> Verification:
        """The verification; InputError where the difference is larger than rounding in the models' dtype explains."""
        verification = self.verify_against_plain_forward(documents)
        for name, decoder, found in zip(MODEL_NAMES, self.decoders, verification.relative_difference, strict=True):
            tolerance = PLAIN_FORWARD_TOLERANCE[decoder.base.dtype]
            if not found <= tolerance:
                raise InputError(
                    f"expected layer {self.layer} of the {name} model within {tolerance:g} of the library's own "
                    f"forward (relative, {decoder.base.dtype}), got {found:.3g}; try another "
                    "models.attn_implementation or models.dtype: extraction would store wrong rows"
                )
        return verification


def _plain_forward(decoder: SplitDecoder, document: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """stream_TD after layer L of one uninterrupted forward, and logits_TV where the head is there."""
    seen: list[Tensor] = []
    layer = decoder.layers[decoder.layer]
    with layer.register_forward_hook(lambda *args: seen.append(hidden_of(args[-1]))):
        decoder.select()
        output = decoder.whole(
            input_ids=decoder.read(torch.tensor([list(document)])), use_cache=False, output_hidden_states=True
        )
    is_last = len(decoder.layers) == decoder.num_lower
    stream_BTD = seen[0] if is_last else output.hidden_states[decoder.num_lower]
    return stream_BTD[0], None if decoder.model is None else output.logits[0]


def _relative_errors(ours_TD: Tensor, plain_TD: Tensor) -> Tensor:
    """|ours - plain| / |plain| per position; 0 where the plain forward overflows, infinite where ours alone does."""
    tiny = torch.finfo(plain_TD.dtype).tiny
    error_T: Tensor = (ours_TD - plain_TD).norm(dim=-1) / plain_TD.norm(dim=-1).clamp_min(tiny)
    error_T = error_T.masked_fill(~ours_TD.isfinite().all(dim=-1), float("inf"))
    return error_T.masked_fill(~plain_TD.isfinite().all(dim=-1), 0.0)
