"""A batch of dialogues whose residual stream is edited, and what an edited stream does to the next tokens.

The measures are those of arXiv 2504.02922's code, at the positions that predict assistant tokens: KL to the chat
model's own predictions, KL to those of the base model, and the loss on the text itself. The logits of all models exist
for one chunk of positions at a time.

Shapes: B documents, T positions, M models, D width, V vocabulary, N tokens of a batch, P predicting positions,
S position sets, K measures.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.analyses.interventions import Kind
from pipeline.models.pair import ModelPair
from pipeline.schema import BASE, CHAT

MEASURES = ("kl", "kl_base", "nll")
"""KL(p_chat || p_edited), KL(p_base || p_edited) and -log p_edited of the text's next token (NaN for an id that one of
the models lacks), each in nats per token."""


class CausalityBatch(NamedTuple):
    """Dialogues with everything that does not depend on a crosscoder."""

    pair: ModelPair
    mask_BT: Tensor
    token_N: Tensor
    """int64: place of every token in the flattened [B, T]."""
    x_NMD: Tensor
    """float32: both streams at layer L."""
    has_codes_N: Tensor
    """bool: rows of the kind that the crosscoder was trained on; the others stay unedited."""
    is_leading_N: Tensor
    """bool: leading tokens that give no rows; every edit has the chat model's activations there."""
    predicting_P: Tensor
    """int64: place of every predicting position in the flattened [B, T]."""
    document_P: Tensor
    """int64: its document, 0 .. B-1."""
    in_set_PS: Tensor
    """bool, see PredictingPositions."""
    doc_id_B: Tensor
    dtype: torch.dtype
    """The models' dtype, to which edited streams are cast."""
    next_id_P: Tensor
    """int64: the token that the text has after every predicting position."""
    reference_PD: Tensor
    """The chat model's final hidden state at predicting positions."""
    base_PD: Tensor
    """The base model's."""
    shared_PK: Mapping[Kind, Tensor]
    """MEASURES of the interventions that need no crosscoder, by kind."""


@torch.no_grad()
def measure_streams(batch: CausalityBatch, streams_ND: Iterator[Tensor]) -> list[Tensor]:
    """MEASURES [P, K] of each edited stream, on which the chat model continues; float32 (float64 models: float64).

    All hidden states are computed first, so that both models' own log-probabilities are computed once a chunk.
    """
    return measure_hidden(batch, [predicting_hidden(batch, CHAT, stream_ND) for stream_ND in streams_ND], model=CHAT)


@torch.no_grad()
def measure_hidden(batch: CausalityBatch, hidden: Sequence[Tensor], *, model: int) -> list[Tensor]:
    """MEASURES [P, K] of final hidden states of one model's upper half."""
    pair, parts = batch.pair, [list[Tensor]() for _ in hidden]
    for here in pair.decoders[CHAT].head_chunks(len(batch.reference_PD)):
        own = [
            _log_softmax(pair.shared_head(own_model, own_PD[here]))
            for own_model, own_PD in ((CHAT, batch.reference_PD), (BASE, batch.base_PD))
        ]
        probability = [log_PV.exp() for log_PV in own]
        id_P = batch.next_id_P[here].to(own[0].device)
        for part, hidden_PD in zip(parts, hidden, strict=True):
            edited_PV = _log_softmax(pair.shared_head(model, hidden_PD[here])).to(own[0].device)
            kl = [(p_PV * (log_PV - edited_PV)).sum(-1) for p_PV, log_PV in zip(probability, own, strict=True)]
            nll_P = -edited_PV.gather(1, id_P.clamp(max=edited_PV.shape[1] - 1)[:, None]).squeeze(1)
            part.append(torch.stack([*kl, nll_P.where(id_P < edited_PV.shape[1], torch.nan)], dim=1))
    return [torch.cat(part) for part in parts]


def predicting_hidden(batch: CausalityBatch, model: int, stream_ND: Tensor) -> Tensor:
    """hidden_PD of one model's upper half continued from a stream given at the tokens; padding is 0."""
    size_B, width_T = batch.mask_BT.shape
    h_BTD = torch.zeros(size_B * width_T, stream_ND.shape[1], dtype=batch.dtype, device=batch.token_N.device)
    h_BTD[batch.token_N] = stream_ND.to(h_BTD.device, batch.dtype)
    hidden_BTD = batch.pair.upper(model, h_BTD.view(size_B, width_T, -1), batch.mask_BT)
    return hidden_BTD.flatten(0, 1).to(batch.predicting_P.device)[batch.predicting_P]


def documents_of(batch: CausalityBatch, chosen_B: Tensor) -> tuple[CausalityBatch, Tensor]:
    """Some documents of a batch (ascending places) as a batch of their own, and which tokens it holds, bool [N].

    Measures of shared interventions are not carried over.
    """
    width = batch.mask_BT.shape[1]
    place_B = torch.full((len(batch.doc_id_B),), -1, device=chosen_B.device)
    place_B[chosen_B] = torch.arange(len(chosen_B), device=chosen_B.device)
    kept_N, kept_P = place_B[batch.token_N // width] >= 0, place_B[batch.document_P] >= 0

    def moved(token: Tensor) -> Tensor:
        return place_B[token // width] * width + token % width

    part = batch._replace(
        mask_BT=batch.mask_BT[chosen_B.to(batch.mask_BT.device)],
        token_N=moved(batch.token_N[kept_N]),
        x_NMD=batch.x_NMD[kept_N],
        has_codes_N=batch.has_codes_N[kept_N],
        is_leading_N=batch.is_leading_N[kept_N],
        predicting_P=moved(batch.predicting_P[kept_P]),
        document_P=place_B[batch.document_P[kept_P]],
        in_set_PS=batch.in_set_PS[kept_P],
        doc_id_B=batch.doc_id_B[chosen_B.cpu()],
        next_id_P=batch.next_id_P[kept_P],
        reference_PD=batch.reference_PD[kept_P.to(batch.reference_PD.device)],
        base_PD=batch.base_PD[kept_P.to(batch.base_PD.device)],
        shared_PK={},
    )
    return part, kept_N


def log_probabilities(batch: CausalityBatch, hidden_PD: Tensor) -> Tensor:
    """log p_PV of the chat model's next tokens; call it on chunks of positions."""
    return _log_softmax(batch.pair.head(CHAT, hidden_PD))


def _log_softmax(logits_PV: Tensor) -> Tensor:
    return at_least_float32(logits_PV).log_softmax(-1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
