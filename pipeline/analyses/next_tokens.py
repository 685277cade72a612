"""What two models predict next on the same documents, compared position by position.

Token rows become batches of whole documents with the positions whose next token is judged; `compare` gives, for each of
several predictions, KL(p_reference || p_other) in nats and whether the most likely token differs. The evidence about a
pair (evidence.py) and the curve over layers (layer_curve.py) are made of these numbers. No sums are kept here.

Log-probabilities are taken in float64: in float32 their own rounding gives a KL of 1e-7 nats, which is what is to be
told from 0. The logits exist for a chunk of positions at a time.

Shapes: B documents, T positions, M models, D width, V vocabulary, P judged positions, N rows, S sets of positions, K
likeliest tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.errors import InputError
from pipeline.extraction.activations import SINK_MULTIPLE, RowOptions, kept_positions, plan_batches, within_norm_cap
from pipeline.models.pair import ModelPair
from pipeline.numerics.statistics import hash_documents
from pipeline.schema import BASE, CHAT, Flag

ALL, ASSISTANT = "all", "assistant"
"""Sets of positions: every one; those whose next token an assistant wrote."""
_LOG_PROBS_PER_CHUNK = 1 << 23
"""Numbers in one chunk of log-probabilities: 64 MiB in float64."""


class NextTokenBatch(NamedTuple):
    """Whole documents, padded on the right, with the positions to judge and the tokens that count as rows."""

    pair: ModelPair
    ids_BT: Tensor
    mask_BT: Tensor
    doc_id_B: Tensor
    corpus_B: tuple[str, ...]
    place_P: Tensor
    """int64: place of every judged position in the flattened [B, T]."""
    document_P: Tensor
    """int64: its document, 0 .. B-1."""
    is_assistant_P: Tensor
    """bool: whether an assistant wrote the next token."""
    place_N: Tensor
    """int64: place of every row in the flattened [B, T]."""
    document_N: Tensor
    position_N: Tensor
    """int64: the row's position in its document."""


class Prediction(NamedTuple):
    """Hidden states after a final norm, and the model whose head reads them."""

    model: int
    hidden_PD: Tensor


class Comparison(NamedTuple):
    """One prediction against the reference, on the CPU; float64 unless said."""

    kl_P: Tensor
    """KL(p_reference || p_other), nats."""
    is_other_top_P: Tensor
    """bool: whether the most likely token is another one."""
    margin_P: Tensor
    """log p_reference of its own most likely token less that of the other's; 0 where they agree."""
    shift_P: Tensor
    """|log p_other - log p_reference| at the reference's most likely token."""


class RowsOfBatch(NamedTuple):
    """Rows of both models at one layer."""

    x_NMD: Tensor
    document_N: Tensor
    """int64: the document in the batch, 0 .. B-1."""
    position_N: Tensor
    num_sinks: int
    """Rows left out."""


def next_token_batches(
    pair: ModelPair,
    documents: Mapping[str, Sequence[Any]],
    options: RowOptions,
    *,
    max_positions: int | None = None,
) -> Iterator[NextTokenBatch]:
    """Batches of token rows (schema.TOKEN_COLUMNS as a dict of columns), longest documents first.

    options says which tokens count as rows; its norm_cap is not applied here. max_positions bounds the judged positions
    of a document (drawn by its id, the same in every batch); None judges all. Documents of fewer than two tokens
    predict nothing and are left out.
    """
    if max_positions is not None and max_positions < 1:
        raise InputError(f"expected max_positions of at least 1 or None, got {max_positions}; None judges every token")
    ids = [np.asarray(row, dtype=np.int64) for row in documents["input_ids"]]
    used = [i for i, row in enumerate(ids) if len(row) > 1]
    for members in plan_batches([len(ids[i]) for i in used], options.tokens_per_batch).batches:
        chosen = [used[i] for i in members.tolist()]
        own = {name: [documents[name][i] for i in chosen] for name in ("doc_id", "corpus", "flags")}
        yield _batch(pair, [ids[i] for i in chosen], own, options, max_positions)


def _batch(
    pair: ModelPair,
    ids: Sequence[np.ndarray],
    columns: Mapping[str, Sequence[Any]],
    options: RowOptions,
    max_positions: int | None,
) -> NextTokenBatch:
    lengths = [len(row) for row in ids]
    flags = [np.asarray(row, dtype=np.int64) for row in columns["flags"]]
    width, device = max(lengths), pair.device
    judged = [
        _judged_positions(length, int(doc_id), max_positions)
        for length, doc_id in zip(lengths, columns["doc_id"], strict=True)
    ]
    rows = [kept_positions(own, options) for own in flags]
    is_assistant = [own[positions + 1] & int(Flag.ASSISTANT) != 0 for own, positions in zip(flags, judged, strict=True)]

    def places(positions: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([b * width + own for b, own in enumerate(positions)])).to(device)

    def documents_of(positions: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.repeat(np.arange(len(positions)), [len(own) for own in positions]))

    return NextTokenBatch(
        pair=pair,
        ids_BT=pad_sequence([torch.from_numpy(row) for row in ids], batch_first=True),
        mask_BT=(torch.arange(width)[None] < torch.tensor(lengths)[:, None]).to(torch.int64),
        doc_id_B=torch.tensor([int(doc_id) for doc_id in columns["doc_id"]], dtype=torch.int64),
        corpus_B=tuple(str(corpus) for corpus in columns["corpus"]),
        place_P=places(judged),
        document_P=documents_of(judged),
        is_assistant_P=torch.from_numpy(np.concatenate(is_assistant)),
        place_N=places(rows),
        document_N=documents_of(rows),
        position_N=torch.from_numpy(np.concatenate(rows)),
    )


def _judged_positions(length: int, doc_id: int, max_positions: int | None) -> np.ndarray:
    """Positions of a document whose next token is judged, int64 ascending: all but the last, or as many as allowed."""
    positions = np.arange(length - 1)
    if max_positions is None or len(positions) <= max_positions:
        return positions
    drawn = np.random.default_rng(doc_id & (2**63 - 1)).choice(positions, max_positions, replace=False)
    return np.sort(drawn)


def position_sets(corpora: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the sets of positions: all, assistant, and one for each corpus."""
    return (ALL, ASSISTANT, *(f"corpus {name}" for name in corpora))


def in_sets(batch: NextTokenBatch, corpora: Sequence[str] = ()) -> Tensor:
    """in_set_PS, bool: which positions of a batch are in which of `position_sets(corpora)`."""
    corpus_B = torch.tensor([corpora.index(name) if name in corpora else -1 for name in batch.corpus_B])
    is_of_corpus_PC = corpus_B[batch.document_P][:, None] == torch.arange(len(corpora))[None]
    everywhere_P = torch.ones_like(batch.is_assistant_P)
    return torch.cat([everywhere_P[:, None], batch.is_assistant_P[:, None], is_of_corpus_PC], dim=1)


def document_groups(batch: NextTokenBatch, num_groups: int) -> Tensor:
    """group_B, int64: the group of every document, by its id alone."""
    return hash_documents(batch.doc_id_B, num_groups=num_groups)


def at_places(hidden_BTD: Tensor, place_P: Tensor) -> Tensor:
    """The values at places of the flattened [B, T]; trailing dimensions stay."""
    return hidden_BTD.flatten(0, 1)[place_P.to(hidden_BTD.device)]


def rows_without_sinks(batch: NextTokenBatch, h_BTMD: Tensor) -> RowsOfBatch:
    """The rows of a batch at one layer, attention sinks of that layer left out."""
    is_kept_N = at_places(within_norm_cap(h_BTMD, batch.mask_BT, SINK_MULTIPLE), batch.place_N).cpu()
    x_NMD = at_places(h_BTMD, batch.place_N[is_kept_N.to(batch.place_N.device)])
    return RowsOfBatch(x_NMD, batch.document_N[is_kept_N], batch.position_N[is_kept_N], int((~is_kept_N).sum()))


@torch.no_grad()
def compare(pair: ModelPair, reference: Prediction, others: Sequence[Prediction]) -> list[Comparison]:
    """Every other prediction against the reference, at the same positions; the reference's head runs once a chunk."""
    num_positions = len(reference.hidden_PD)
    parts: list[list[Comparison]] = [[] for _ in others]
    size = max(1, _LOG_PROBS_PER_CHUNK // pair.vocab_size)
    for start in range(0, num_positions, size):
        here = slice(start, start + size)
        reference_PV = _log_probs(pair, reference, here)
        for part, other in zip(parts, others, strict=True):
            part.append(_compare_chunk(reference_PV, _log_probs(pair, other, here).to(reference_PV.device)))
    return [Comparison(*(torch.cat(own) for own in zip(*part, strict=True))) for part in parts]


class NextTokens(NamedTuple):
    """The likeliest next tokens of both models at the same positions, and how far they are apart; on the CPU."""

    top_PMK: Tensor
    """int64 token ids, likeliest first, of the ids that both models predict."""
    prob_PMK: Tensor
    """float64, their probabilities."""
    kl_P: Tensor
    """float64, KL(p_chat || p_base), nats."""


@torch.no_grad()
def side_by_side(pair: ModelPair, base_PD: Tensor, chat_PD: Tensor, *, num_top: int) -> NextTokens:
    """Both models' predictions from their hidden states after the final norm; each head runs once a position."""
    parts = []
    size = max(1, _LOG_PROBS_PER_CHUNK // pair.vocab_size)
    for start in range(0, len(chat_PD), size):
        here = slice(start, start + size)
        chat_PV = _log_probs(pair, Prediction(CHAT, chat_PD), here)
        base_PV = _log_probs(pair, Prediction(BASE, base_PD), here).to(chat_PV.device)
        log_PMK, top_PMK = torch.stack([base_PV, chat_PV], dim=1).topk(min(num_top, pair.vocab_size), dim=-1)
        parts.append(NextTokens(top_PMK.cpu(), log_PMK.exp().cpu(), _compare_chunk(chat_PV, base_PV).kl_P))
    return NextTokens(*(torch.cat(own) for own in zip(*parts, strict=True)))


def _log_probs(pair: ModelPair, prediction: Prediction, here: slice) -> Tensor:
    return pair.shared_head(prediction.model, prediction.hidden_PD[here]).double().log_softmax(-1)


def _compare_chunk(reference_PV: Tensor, other_PV: Tensor) -> Comparison:
    kl_P = (reference_PV.exp() * (reference_PV - other_PV)).sum(-1)
    top_P1, other_top_P1 = reference_PV.argmax(-1, keepdim=True), other_PV.argmax(-1, keepdim=True)
    own_P = reference_PV.gather(1, top_P1).squeeze(1)
    margin_P = own_P - reference_PV.gather(1, other_top_P1).squeeze(1)
    shift_P = (other_PV.gather(1, top_P1).squeeze(1) - own_P).abs()
    is_other_P = (top_P1 != other_top_P1).squeeze(1)
    return Comparison(kl_P.cpu(), is_other_P.cpu(), margin_P.cpu(), shift_P.cpu())
