"""Promoted tokens: what latents, and the mean difference of the first tokens, add to the next token's logits.

A latent has two directions, d_j^base and d_j^chat. Each goes through the final norm and unembedding of its own model
(models/direction_head.py, numerics/logit_lens.py), and the difference of both logits says what the chat model makes of
the latent that the base model does not. The mean difference of the activations of the first tokens needs no dictionary:
it is the baseline of arXiv 2510.13900, which reads a fine-tuning's topic from texts that have nothing to do with it.

The lens reads a direction as though no layer followed. For a layer far below the last, what the layers between make of
it is missing.

Shapes: B rows, M models, L directions, D width, V vocabulary, C corpora, K positions.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.logit_lens_columns import DIFFERENCE, FIRST_TOKEN_COLUMNS, LOGIT_LENS_COLUMNS
from pipeline.analyses.rows import Sums, merge_sums
from pipeline.errors import InputError
from pipeline.models.direction_head import DirectionHead
from pipeline.models.pair import ModelPair
from pipeline.numerics.logit_lens import top_tokens
from pipeline.schema import BASE, CHAT, MODEL_NAMES
from pipeline.text.tokenizers import token_text


class LogitLens:
    """Both models' heads, for directions; num_tokens are named on each side."""

    def __init__(self, pair: ModelPair, tokenizer: Any, *, num_tokens: int) -> None:
        if num_tokens < 1:
            raise InputError(f"num_tokens: expected at least 1, got {num_tokens}")
        self.pair, self.tokenizer, self.num_tokens = pair, tokenizer, num_tokens
        # Rows of the unembedding beyond the tokenizer's ids are padding.
        self.vocab_size = min(pair.vocab_size, len(tokenizer))
        base, chat = pair.decoders
        heads = {own: DirectionHead(own) for own in dict.fromkeys((base, chat))}
        self.heads = (heads[base], heads[chat])

    def logits(self, model: int, direction_LD: Tensor) -> Tensor:
        """logits_LV of directions of one model, of the ids that both models predict, on the pair's device."""
        return self.heads[model].logits(direction_LD, self.vocab_size).to(self.pair.device)

    def latents(self, latents: Sequence[int], decoder_LMD: Tensor) -> pd.DataFrame:
        """LOGIT_LENS_COLUMNS of latents, given their decoder rows in units of raw activations."""
        tables = []
        for here in self.pair.decoders[CHAT].head_chunks(len(latents)):
            base_LV, chat_LV = (self.logits(model, decoder_LMD[here, model]) for model in (BASE, CHAT))
            members = {MODEL_NAMES[BASE]: base_LV, MODEL_NAMES[CHAT]: chat_LV, DIFFERENCE: chat_LV - base_LV}
            for member, logits_LV in members.items():
                tables.append(
                    pd.DataFrame({"latent": list(latents[here]), "member": member}).join(self.named(logits_LV))
                )
        columns = [column.name for column in LOGIT_LENS_COLUMNS]
        if not tables:
            return pd.DataFrame(columns=columns)
        order = {latent: place for place, latent in enumerate(latents)}
        joined = pd.concat(tables, ignore_index=True)
        # By latent in the order asked for; the members keep theirs.
        return joined.sort_values("latent", key=lambda own: own.map(order), kind="stable", ignore_index=True)[columns]

    def named(self, logits_LV: Tensor) -> pd.DataFrame:
        """TOKEN_LIST_COLUMNS of each row of logits."""
        columns: dict[str, Any] = {}
        for name, top in zip(("promoted", "suppressed"), top_tokens(logits_LV, self.num_tokens), strict=True):
            ids = top.ids_LN.tolist()
            columns[name] = [[token_text(self.tokenizer, index) for index in own] for own in ids]
            columns[f"{name}_ids"], columns[f"{name}_logits"] = ids, top.logits_LN.tolist()
        return pd.DataFrame(columns)


class FirstTokens:
    """Mean x^base and x^chat - x^base of the first positions, by corpus; start, update and merge as other analyses."""

    def __init__(self, *, corpora: Sequence[str], activation_dim: int, num_positions: int) -> None:
        if num_positions < 1 or not corpora:
            raise InputError(
                f"expected at least one position and the names of the corpora, got {num_positions} and {list(corpora)}"
            )
        self.corpora, self.activation_dim, self.num_positions = tuple(corpora), activation_dim, num_positions

    def start(self) -> Sums:
        """Empty sums."""
        shape = (len(self.corpora) * self.num_positions, self.activation_dim)
        sums = {name: torch.zeros(shape, dtype=torch.float64) for name in ("base_KD", "difference_KD")}
        return {**sums, "count_K": torch.zeros(shape[0], dtype=torch.int64)}

    def update(self, sums: Sums, x_BMD: Tensor, position_B: Tensor, corpus_B: Tensor) -> None:
        """Adds rows to the sums, in place."""
        keep_B = position_B < self.num_positions
        place_B = corpus_B[keep_B].long() * self.num_positions + position_B[keep_B].long()
        x_BMD = x_BMD[keep_B].double()  # x is bfloat16, and its differences cancel
        sums["base_KD"].index_add_(0, place_B, x_BMD[:, BASE])
        sums["difference_KD"].index_add_(0, place_B, x_BMD[:, CHAT] - x_BMD[:, BASE])
        sums["count_K"] += torch.bincount(place_B, minlength=len(sums["count_K"]))

    def merge(self, a: Sums, b: Sums) -> Sums:
        """The sums of both parts together."""
        return merge_sums(a, b)

    def table(self, sums: Sums, lens: LogitLens) -> pd.DataFrame:
        """FIRST_TOKEN_COLUMNS, by corpus and position; positions without a row are left out."""
        count_K = sums["count_K"]
        there_K = count_K > 0
        base_LD, difference_LD = (
            (sums[name] / count_K.clamp_min(1)[:, None])[there_K] for name in ("base_KD", "difference_KD")
        )
        places = there_K.nonzero().squeeze(1).tolist()
        table = pd.DataFrame(
            {
                "corpus": [self.corpora[place // self.num_positions] for place in places],
                "position": [place % self.num_positions for place in places],
                "num_documents": count_K[there_K].tolist(),
                "norm": difference_LD.norm(dim=1).tolist(),
                "norm_base": base_LD.norm(dim=1).tolist(),
            }
        )
        if not places:
            return pd.DataFrame(columns=[column.name for column in FIRST_TOKEN_COLUMNS])
        return table.join(lens.named(lens.logits(CHAT, difference_LD.float())))
