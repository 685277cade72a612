"""The two language models of a run, side by side and cut at the same layer.

ModelPair gives the residual streams of both models on the same ids, the upper half continued from an edited stream,
and answers with steering. Layers that both models have in common run once. loading.py loads the models,
verification.py compares their halves with the library's own forward.

It plans no batches (extraction/activations.py) and edits nothing (analyses/). Results are on the chat model's device
(`device`).

Shapes: B documents, T positions, M models in schema order, D width, P chosen positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.models.decoder import SplitDecoder
from pipeline.models.generation import AnswerLikelihood, OnToken, Sampling, Steering, answer_likelihood, generate
from pipeline.models.loading import LoadOptions, ModelSpec, load_decoders, load_tokenizer
from pipeline.schema import CHAT
from pipeline.text.tokenizers import end_of_turn_id


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
        self.vocab_size = min(base.vocab_size, chat.vocab_size)
        """Ids that both models predict: one may have been given tokens, or padding, that the other lacks."""
        self.num_readable = min(base.num_readable, chat.num_readable)
        """Ids that both models read, token replacements counted."""
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
            base.num_outputs = chat.num_outputs
            return self._stack(chat_BTD, chat_BTD)
        run = chat.lower_and_prefix(ids_BT, mask_BT, shared)
        base.num_outputs = chat.num_outputs
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

    def shared_head(self, model: int, hidden_PD: Tensor) -> Tensor:
        """As `head`, of the ids that both models predict, so that their predictions can be compared."""
        return self.head(model, hidden_PD)[:, : self.vocab_size]

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
        on_token: OnToken | None = None,
    ) -> list[list[int]]:
        """One model's answers as generation.generate gives them: greedy without sampling, without their stop token."""
        return generate(
            self.decoders[model],
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_token_ids(),
            steering=steering,
            sampling=sampling,
            use_cache=use_cache,
            on_token=on_token,
        )

    def answer_likelihood(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> AnswerLikelihood:
        """Nats of every answer under the unsteered chat model."""
        return answer_likelihood(self.decoders[CHAT], prompts, answers)
