"""Causal equivalence against whole forwards, and on rows that agree, disagree and do nothing by construction."""

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from compared_pairs import NUM_LAYERS, VOCAB, WIDTH, documents, model, pair_of, rescaled

from pipeline.analyses.causal_tables import Bootstrap
from pipeline.analyses.causality import causality_batches
from pipeline.analyses.equivalence import DOCUMENTS_PER_BATCH, Equivalence, with_verdicts
from pipeline.analyses.latent_sets import equivalence_latents
from pipeline.errors import InputError
from pipeline.extraction.activations import RowOptions
from pipeline.models.pair import ModelPair
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import CHAT, EQUIVALENCE_COLUMNS, Flag, Verdict

LAYER, NUM_LATENTS = 2, 12
OPTIONS = RowOptions(tokens_per_batch=64)
SAME, SCALED, OTHER, OPPOSITE = 0, 1, 2, 3
"""Latents whose base row is the chat row, half of it, another direction, the reverse."""


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    base = model("llama").double()
    return pair_of(base, copy.deepcopy(base), layer=LAYER)


def crosscoder_of(scale: tuple[float, float] = (1.0, 1.0)) -> Crosscoder:
    """Fires on about half of the rows; its rows are small beside the stream, as a latent's are."""
    generator = torch.Generator().manual_seed(1)
    made = Crosscoder(NUM_LATENTS, 2, WIDTH, activation="batch_topk", k=4).double()
    with torch.no_grad():
        made.W_enc_FMD.copy_(torch.randn(made.W_enc_FMD.shape, generator=generator) * 0.2)
        chat_FD = torch.randn(NUM_LATENTS, WIDTH, generator=generator).double() * 0.1
        base_FD = chat_FD.clone()
        base_FD[SCALED] *= 0.5
        base_FD[OTHER] = torch.randn(WIDTH, generator=generator) * 0.1
        base_FD[OPPOSITE] *= -1
        made.W_dec_FMD.copy_(torch.stack([base_FD, chat_FD], dim=1) * torch.tensor(scale)[:, None])
    return made


def measured(pair: ModelPair, equivalence: Equivalence, rows: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
    sums = equivalence.start()
    for batch in causality_batches(pair, rows, OPTIONS):
        equivalence.update(sums, batch)
    return sums


def test_rows_agree_as_they_were_made(pair: ModelPair) -> None:
    equivalence = Equivalence(crosscoder_of(), range(NUM_LATENTS), torch.ones(2))
    table = equivalence.table(measured(pair, equivalence, documents(40)), Bootstrap(200)).set_index("latent")
    assert (table["num_conversations"] > 3).all()
    assert table.loc[SAME, ["agreement", "agreement_low"]].tolist() == pytest.approx([1, 1])
    assert table.loc[SCALED, "agreement_low"] > 0.95
    assert table.loc[OPPOSITE, "agreement_high"] < -0.9
    assert table.loc[OTHER, "agreement_high"] < table.loc[SCALED, "agreement_low"]
    assert abs(table.loc[OTHER, "agreement"]) < 0.7


def test_the_products_are_those_of_whole_forwards(pair: ModelPair) -> None:
    """Each document alone through the library's own model, the stream replaced by a hook."""
    equivalence, rows = Equivalence(crosscoder_of(), [OTHER], torch.ones(2)), documents(8, seed=4)
    sums = measured(pair, equivalence, rows)
    crosscoder, chat = crosscoder_of(), pair.decoders[CHAT].model
    expected = {}
    for doc_id, ids, flags in zip(rows["doc_id"], rows["input_ids"], rows["flags"], strict=True):
        if not (flags & int(Flag.ASSISTANT)).any():
            continue
        ids_1T = torch.tensor(ids[None].astype(np.int64))
        streams: list[torch.Tensor] = []
        with chat.model.layers[LAYER].register_forward_hook(lambda *a, to=streams: to.append(a[-1])):  # type: ignore[misc]
            plain_TV = chat(ids_1T).logits[0].log_softmax(-1)
        (x_1TD,) = streams
        x_TMD = torch.stack([x_1TD[0], x_1TD[0]], dim=1)  # equal models
        f_T = crosscoder.encode(x_TMD).to_dense()[:, OTHER]
        effects = []
        for m in (1, 0):
            edited_1TD = x_1TD + f_T[None, :, None] * crosscoder.W_dec_FMD[OTHER, m]
            with chat.model.layers[LAYER].register_forward_hook(lambda *_, to=edited_1TD: to):  # type: ignore[misc]
                change_TV = chat(ids_1T).logits[0].log_softmax(-1) - plain_TV
            effects.append(change_TV - (plain_TV.exp() * change_TV).sum(-1, keepdim=True))
        positions = np.flatnonzero(flags & int(Flag.ASSISTANT)) - 1
        pairs = ((0, 0), (1, 1), (0, 1))
        products = [(plain_TV.exp() * effects[a] * effects[b]).sum(-1)[positions].sum() for a, b in pairs]
        expected[doc_id] = torch.stack(products)
    found = dict(zip(sums["doc_id_G"].tolist(), sums["products_GJK"][:, 0], strict=True))
    assert found.keys() == expected.keys()
    for doc_id, products in expected.items():
        torch.testing.assert_close(found[doc_id], products, rtol=1e-6, atol=1e-12)


def test_units_are_the_chat_models_whatever_the_scale_of_the_base_model() -> None:
    """The base model's stream is eight times as large, so is its row: the effect is the same."""
    chat = model("llama").double()
    scaled = pair_of(rescaled(chat, 8.0), chat, layer=LAYER)
    plain = pair_of(copy.deepcopy(chat), chat, layer=LAYER)
    tables = []
    for own, scale in ((plain, (1.0, 1.0)), (scaled, (8.0, 1.0))):
        crosscoder = crosscoder_of(scale)
        with torch.no_grad():
            crosscoder.W_enc_FMD[:, 0] /= scale[0]
            # Codes depend on the row's length, so that of the larger model is taken out.
            crosscoder.threshold.fill_(0.0)
        equivalence = Equivalence(crosscoder, [SAME, SCALED, OTHER], torch.tensor(scale))
        tables.append(equivalence.table(measured(own, equivalence, documents(12)), Bootstrap(100)))
    pd.testing.assert_frame_equal(*tables, rtol=1e-4)


def test_parts_in_any_order_give_the_table_of_the_whole(pair: ModelPair) -> None:
    equivalence, rows = Equivalence(crosscoder_of(), [SAME, OTHER], torch.ones(2)), documents(12)
    batches = list(causality_batches(pair, rows, OPTIONS))
    assert len(batches) > 1
    parts = []
    for batch in batches:
        parts.append(equivalence.start())
        equivalence.update(parts[-1], batch)
    whole = measured(pair, equivalence, rows)
    merged = equivalence.start()
    for part in reversed(parts):
        merged = equivalence.merge(merged, part)
    pd.testing.assert_frame_equal(equivalence.table(merged), equivalence.table(whole))
    most = max(int((part["products_GJK"][:, 0, 0] > 0).sum()) for part in parts)
    assert most <= DOCUMENTS_PER_BATCH


def test_a_latent_that_never_fires_has_no_agreement(pair: ModelPair) -> None:
    silent = crosscoder_of()
    with torch.no_grad():
        silent.b_enc_F[SAME] = -1e6
    equivalence = Equivalence(silent, [SAME], torch.ones(2))
    row = equivalence.table(measured(pair, equivalence, documents(6)), Bootstrap(100)).iloc[0]
    assert np.isnan([row["agreement"], row["agreement_low"], row["agreement_high"]]).all()
    assert row["num_conversations"] == 0
    empty = Equivalence(silent, [], torch.ones(2))
    assert empty.table(measured(pair, empty, documents(6))).empty
    with pytest.raises(InputError, match=f"{NUM_LATENTS}"):
        Equivalence(silent, [NUM_LATENTS], torch.ones(2))


def test_latents_are_the_most_specific_ones_and_shared_ones_that_are_met() -> None:
    latents = pd.DataFrame(
        {
            "latent": range(8),
            "verdict": [Verdict.CHAT_SPECIFIC] * 3 + [Verdict.SHARED] * 4 + [Verdict.DEAD],
            "nu_eps": [0.1, 0.05, 0.15, *[1.0] * 5],
            "nu_r": [0.1, 0.05, 0.15, *[1.0] * 5],
            "decoder_norm_base": 0.1,
            "delta_norm": 0.5,
            "frequency": [0.1, 0.1, 0.1, 0.01, 0.02, 1e-4, 0.03, 0],
        }
    )
    chosen = equivalence_latents(latents, num_each=2, seed=0)
    assert chosen[:2] == (1, 0) and len(chosen) == 4 and set(chosen[2:]) < {3, 4, 6}
    assert equivalence_latents(latents, num_each=0, seed=0) == ()
    assert NUM_LAYERS > LAYER + 1 and VOCAB > 2
    table = pd.DataFrame({"latent": [1, 4], "agreement": 1.0, "agreement_low": 1.0, "agreement_high": 1.0})
    joined = with_verdicts(table.assign(num_conversations=3), latents)
    assert list(joined) == [column.name for column in EQUIVALENCE_COLUMNS]
    assert joined["verdict"].tolist() == [Verdict.CHAT_SPECIFIC, Verdict.SHARED]
