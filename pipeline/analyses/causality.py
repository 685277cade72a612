"""Causality: how much of the two models' difference in behaviour a set of latents carries.

The residual stream at layer L is edited at all positions (interventions.py) and the chat model's upper half continues
from it; the measure is KL(p_chat || p_edited) in nats per token, at the positions that predict assistant tokens
(arXiv 2504.02922, section 4), the token that ends their turn included. Leading tokens that give no rows keep the chat
model's activations in every edit: no crosscoder has codes there. Both lower halves run once per batch for all
crosscoders; interventions that need no crosscoder are measured once for all.

Sums are kept per document, so parts merge by concatenation; the tables add up the documents of a conversation, and the
interval resamples conversations. The trade-off:
the chat model's upper half runs once per distinct edit, which takes most of the time; logits exist for one chunk of
positions at a time.

Shapes: B documents, T positions, M models, D width, V vocabulary, N tokens of a batch, P predicting positions,
G documents summed, I interventions, S position sets.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.analyses.causal_batch import (
    MEASURES,
    CausalityBatch,
    at_least_float32,
    measure_hidden,
    measure_streams,
    predicting_hidden,
)
from pipeline.analyses.causal_tables import POSITION_SETS, Bootstrap, CausalTables, causal_tables
from pipeline.analyses.interventions import (
    NO_BASELINES,
    Baselines,
    Intervention,
    Kind,
    SharedInputs,
    StreamEditor,
    shared_interventions,
    shared_stream,
)
from pipeline.analyses.latent_sets import require_latents
from pipeline.errors import InputError
from pipeline.extraction.activations import RowOptions, is_row, num_leading, plan_batches, within_norm_cap
from pipeline.models.padding import pad_tokens
from pipeline.models.pair import ModelPair
from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import BASE, CHAT, Flag
from pipeline.text.conversations import conversation_of

Sums = dict[str, Tensor]

NUM_FIRST = 10
"""Predicting positions at the start of a turn; without the template position among them, the paper's "first 9"."""


class PredictingPositions(NamedTuple):
    """Positions of one document whose next token an assistant wrote or ended its turn with."""

    position_P: np.ndarray
    """int64, ascending."""
    in_set_PS: np.ndarray
    """bool: membership in POSITION_SETS; `rest` is everything that is not in `first_9`."""
    place_in_turn_P: np.ndarray
    """int64: how many tokens of its turn come before the one that is predicted."""


class Causality:
    """KL of a list of interventions of one crosscoder: start, update, merge, table."""

    def __init__(self, crosscoder: Crosscoder, interventions: Sequence[Intervention]) -> None:
        require_latents({j for item in interventions for j in item.latents}, crosscoder.num_latents, "causality")
        self.interventions = tuple(interventions)
        self.num_latents = crosscoder.num_latents
        self._editor = StreamEditor(crosscoder)

    def start(self) -> Sums:
        """Empty sums."""
        return {
            "doc_id_G": torch.zeros(0, dtype=torch.int64),
            **{
                f"{name}_GIS": torch.zeros(0, len(self.interventions), len(POSITION_SETS), dtype=torch.float64)
                for name in MEASURES
            },
            "tokens_GS": torch.zeros(0, len(POSITION_SETS), dtype=torch.float64),
        }

    def update(self, sums: Sums, batch: CausalityBatch) -> None:
        """Adds a batch's documents to the sums, in place."""
        measured = {Intervention("", kind): value_PK for kind, value_PK in batch.shared_PK.items()}
        edits = [without_name(item) for item in self.interventions]
        missing = [edit for edit in dict.fromkeys(edits) if edit not in measured]
        streams = self._edited_streams(batch, missing)
        measured |= dict(zip(missing, measure_streams(batch, streams), strict=True))
        value_PIK = torch.stack([measured[edit] for edit in edits], dim=1).double()
        in_set_PS = batch.in_set_PS.double()
        size = len(batch.doc_id_B)
        tokens_GS = in_set_PS.new_zeros(size, len(POSITION_SETS)).index_add_(0, batch.document_P, in_set_PS)
        added = {"doc_id_G": batch.doc_id_B, "tokens_GS": tokens_GS.cpu()}
        for place, name in enumerate(MEASURES):
            summed_GIS = value_PIK.new_zeros(size, len(self.interventions), len(POSITION_SETS))
            # A NaN outside a set must not reach its sum.
            value_PIS = value_PIK[:, :, None, place].where(batch.in_set_PS[:, None, :], 0)
            added[f"{name}_GIS"] = summed_GIS.index_add_(0, batch.document_P, value_PIS).cpu()
        sums.update(self.merge(sums, added))

    def merge(self, a: Sums, b: Sums) -> Sums:
        """The documents of both."""
        return merge_documents(a, b)

    def tables(self, sums: Sums, bootstrap: Bootstrap | None = None) -> CausalTables:
        """KL, paired differences and curves (causal_tables.py). InputError where no conversation was seen."""
        if len(sums["doc_id_G"]) == 0:
            raise InputError(
                "expected validation dialogues with assistant turns for the causality analysis, got 0; add a chat "
                "corpus or turn the analysis off"
            )
        per_conversation = by_conversation(sums)
        return causal_tables(
            self.interventions, per_conversation, num_latents=self.num_latents, bootstrap=bootstrap or Bootstrap()
        )

    def _edited_streams(self, batch: CausalityBatch, edits: Sequence[Intervention]) -> Iterator[Tensor]:
        """h' [N, D] of each edit, on the crosscoder's device."""
        crosscoder = self._editor.crosscoder
        device = crosscoder.W_enc_FMD.device
        x_NMD = batch.x_NMD.to(device)
        codes = codes_of(crosscoder, batch)
        for edit in edits:
            stream_ND = self._editor.edited_stream(edit, x_NMD, codes)
            yield _with_leading_chat(stream_ND, x_NMD, batch.is_leading_N.to(device))


def merge_documents(a: Sums, b: Sums) -> Sums:
    """The documents of both parts, in order of their ids, so that the order of parts does not matter."""
    joined = {name: torch.cat([a[name], b[name]]) for name in a}
    order_G = joined["doc_id_G"].argsort(stable=True)
    return {name: value[order_G] for name, value in joined.items()}


def codes_of(crosscoder: Crosscoder, batch: CausalityBatch) -> SparseCodes:
    """Codes of a batch's tokens, on the crosscoder's device; none at tokens that it was not trained on."""
    codes = crosscoder.encode(batch.x_NMD.to(crosscoder.W_enc_FMD.device, crosscoder.W_enc_FMD.dtype))
    return codes.keep(batch.has_codes_N.to(codes.latents_P.device)[codes.rows_P()])


def by_conversation(sums: Sums) -> Sums:
    """The sums added up over the documents of each conversation."""
    conversation_G, place_G = torch.unique(conversation_of(sums["doc_id_G"]), return_inverse=True)
    added = {
        name: value.new_zeros(len(conversation_G), *value.shape[1:]).index_add_(0, place_G, value)
        for name, value in sums.items()
        if name != "doc_id_G"
    }
    return {"doc_id_G": conversation_G, **added}


def _with_leading_chat(stream_ND: Tensor, x_NMD: Tensor, is_leading_N: Tensor) -> Tensor:
    return torch.where(is_leading_N[:, None], x_NMD[:, CHAT], stream_ND)


def causality_batches(
    pair: ModelPair,
    documents: Mapping[str, Sequence[Any]],
    options: RowOptions,
    baselines: Baselines = NO_BASELINES,
) -> Iterator[CausalityBatch]:
    """Batches of the dialogues among token rows (schema.TOKEN_COLUMNS), longest first.

    options: as for the rows that the crosscoder was trained on; tokens that it drops are not edited by latents.
    baselines: what the interventions without a crosscoder need. Documents in which nothing predicts an assistant
    token are left out.
    """
    for direction in (baselines.mean_difference_D, baselines.principal_KD):
        if direction is not None and direction.shape[-1] != pair.activation_dim:
            raise InputError(
                f"expected directions of width {pair.activation_dim}, got {tuple(direction.shape)}; take them from "
                "activations of the same pair"
            )
    dialogues = [
        _Dialogue(int(doc_id), np.asarray(ids, dtype=np.int32), flags, predicting_positions(flags))
        for doc_id, ids, flags in zip(
            documents["doc_id"],
            documents["input_ids"],
            (np.asarray(row, dtype=np.int32) for row in documents["flags"]),
            strict=True,
        )
    ]
    dialogues = [dialogue for dialogue in dialogues if len(dialogue.predicting.position_P)]
    for batch in plan_batches([len(dialogue.ids) for dialogue in dialogues], options.tokens_per_batch).batches:
        yield _prepare(pair, [dialogues[i] for i in batch.tolist()], options, baselines)


def predicting_positions(flags: np.ndarray) -> PredictingPositions:
    """Positions t of a document whose token t + 1 is an assistant's or ends its turn; turns are runs of such tokens.

    A turn holds what the assistant wrote, the tag that closes its reasoning, and the control token right after it all.
    Earlier turns in the document of a later answer (Flag.HISTORY) are not predicted.
    """
    is_closing_tag = (flags & int(Flag.TEMPLATE)) != 0
    is_closing_tag &= (flags & int(Flag.REASONING)) != 0
    is_written = ((flags & int(Flag.ASSISTANT)) != 0) | is_closing_tag
    follows_written = np.concatenate([[False], is_written[:-1]])
    is_control = (flags & int(Flag.TEMPLATE | Flag.SPECIAL)) == int(Flag.TEMPLATE | Flag.SPECIAL)
    is_in_turn = is_written | (follows_written & is_control)
    is_in_turn &= (flags & int(Flag.HISTORY)) == 0
    is_template = ((flags & int(Flag.TEMPLATE)) != 0) & ~is_closing_tag
    predicted = np.flatnonzero(is_in_turn)
    starts = is_in_turn & ~np.concatenate([[False], is_in_turn[:-1]])
    turn_start = np.flatnonzero(starts)[np.cumsum(starts)[predicted] - 1] if len(predicted) else predicted
    place_in_turn = (predicted - turn_start)[predicted > 0]
    position_P = predicted[predicted > 0] - 1
    is_first_9 = (place_in_turn < NUM_FIRST) & ~is_template[position_P]
    sets = [np.ones(len(position_P), dtype=bool), is_first_9, ~is_first_9]
    return PredictingPositions(position_P, np.stack(sets, axis=1), place_in_turn)


class _Dialogue(NamedTuple):
    doc_id: int
    ids: np.ndarray
    flags: np.ndarray
    predicting: PredictingPositions


def _prepare(
    pair: ModelPair, dialogues: Sequence[_Dialogue], options: RowOptions, baselines: Baselines
) -> CausalityBatch:
    padded, device = pad_tokens([dialogue.ids for dialogue in dialogues]), pair.device
    width = padded.ids_BT.shape[1]
    h_BTMD = pair.activations(padded.ids_BT, padded.mask_BT)
    token_N = padded.mask_BT.flatten().nonzero().squeeze(1).to(device)
    has_codes_N = torch.from_numpy(np.concatenate([is_row(one.flags, options) for one in dialogues])).to(device)
    leading = [np.arange(len(one.flags)) < num_leading(one.flags, options) for one in dialogues]
    if options.norm_cap is not None:
        has_codes_N &= within_norm_cap(h_BTMD, padded.mask_BT, options.norm_cap).flatten().to(device)[token_N]
    places = [row * width + one.predicting.position_P for row, one in enumerate(dialogues)]
    documents = np.repeat(np.arange(len(dialogues)), [len(place) for place in places])
    batch = CausalityBatch(
        pair=pair,
        mask_BT=padded.mask_BT,
        token_N=token_N,
        x_NMD=at_least_float32(h_BTMD.flatten(0, 1)[token_N]),
        has_codes_N=has_codes_N,
        is_leading_N=torch.from_numpy(np.concatenate(leading)).to(device),
        predicting_P=torch.from_numpy(np.concatenate(places)).to(device),
        document_P=torch.from_numpy(documents).to(device),
        in_set_PS=torch.from_numpy(np.concatenate([one.predicting.in_set_PS for one in dialogues])).to(device),
        doc_id_B=torch.tensor([one.doc_id for one in dialogues], dtype=torch.int64),
        dtype=h_BTMD.dtype,
        next_id_P=padded.ids_BT.flatten()[np.concatenate(places) + 1].long().to(device),
        reference_PD=torch.empty(0),
        base_PD=torch.empty(0),
        shared_PK={},
    )
    reference_PD, base_PD = (predicting_hidden(batch, model, batch.x_NMD[:, model]) for model in (CHAT, BASE))
    batch = batch._replace(reference_PD=reference_PD, base_PD=base_PD)
    flags_N = torch.from_numpy(np.concatenate([one.flags for one in dialogues])).to(device)
    inputs = SharedInputs(
        batch.x_NMD,
        is_template_N=(flags_N & int(Flag.TEMPLATE)) != 0,
        has_codes_N=batch.has_codes_N,
        is_first_N=_is_first(batch, dialogues, baselines.num_first),
        baselines=baselines,
    )
    return batch._replace(shared_PK=_shared_measures(batch, inputs))


def _is_first(batch: CausalityBatch, dialogues: Sequence[_Dialogue], num_first: int) -> Tensor:
    """bool [N]: the first num_first predicting positions of each turn."""
    place_P = torch.from_numpy(np.concatenate([one.predicting.place_in_turn_P for one in dialogues]))
    is_first_BT = torch.zeros(batch.mask_BT.numel(), dtype=torch.bool, device=batch.token_N.device)
    is_first_BT[batch.predicting_P[(place_P < num_first).to(batch.predicting_P.device)]] = True
    return is_first_BT[batch.token_N]


def _shared_measures(batch: CausalityBatch, inputs: SharedInputs) -> dict[Kind, Tensor]:
    """`base` is the base model's own upper half; the others continue in the chat model's."""
    edits = [item.kind for item in shared_interventions(inputs.baselines) if item.kind != "base"]
    streams = (_with_leading_chat(shared_stream(kind, inputs), inputs.x_NMD, batch.is_leading_N) for kind in edits)
    measured = dict[Kind, Tensor](zip(edits, measure_streams(batch, streams), strict=True))
    return measured | {"base": measure_hidden(batch, [batch.base_PD], model=BASE)[0]}


def without_name(intervention: Intervention) -> Intervention:
    """What an intervention does, equal for interventions that do the same; an empty set leaves the base stream."""
    is_empty_set = intervention.kind in ("replace", "add") and not intervention.latents
    return Intervention("", "none") if is_empty_set else Intervention("", intervention.kind, intervention.latents)
