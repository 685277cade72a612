"""Promoted tokens of a pair in memory, against the models' own modules."""

from collections.abc import Callable

import pytest
import torch

import crossray
from pipeline.library.crosscoder import Crosscoder
from pipeline.library.pair import Pair
from pipeline.library.rows import Rows


def test_latents_promote_what_their_rows_do_in_the_models_own_modules(pair: Pair, fitted: Crosscoder) -> None:
    table = pair.logit_lens(fitted, [5, 3], num_tokens=6).set_index(["latent", "member"])
    raw_FMD = fitted.raw_decoder_FMD()
    logits = {}
    for place, (member, model) in enumerate((("base", pair.base), ("chat", pair.chat))):
        normed_FD = raw_FMD[:, place] * (1 + model.model.norm.weight)
        logits[member] = (normed_FD @ model.lm_head.weight.T)[:, : len(pair.tokenizer)]
        logits[member] = logits[member] - logits[member].mean(1, keepdim=True)
    logits["difference"] = logits["chat"] - logits["base"]
    for latent in (5, 3):
        for member, expected_FV in logits.items():
            row = table.loc[(latent, member)]
            top = expected_FV[latent].topk(6)
            assert row["promoted_ids"] == top.indices.tolist()
            assert row["promoted_logits"] == pytest.approx(top.values.tolist(), rel=1e-3, abs=1e-5)
            assert row["suppressed_ids"] == (-expected_FV[latent]).topk(6).indices.tolist()


def test_first_tokens_need_no_crosscoder(pair: Pair, rows: Rows) -> None:
    table = pair.first_tokens(rows, num_positions=3, num_tokens=2)
    assert set(table["corpus"]) == set(rows.corpora)
    first = table.iloc[0]
    own_B = (rows.data.corpus_B == rows.corpora.index(first["corpus"])) & (rows.data.position_B == first["position"])
    difference_D = (rows.x[own_B, 1].double() - rows.x[own_B, 0].double()).mean(0)
    assert first["norm"] == pytest.approx(float(difference_D.norm()))
    assert first["num_documents"] == int(own_B.sum())


def test_what_does_not_belong_to_the_pair_is_refused(
    pair: Pair, rows: Rows, fitted: Crosscoder, make_pair: Callable[..., Pair]
) -> None:
    with pytest.raises(crossray.InputError, match=r"latent: expected latents between 0 and 63, got \[64\]"):
        pair.logit_lens(fitted, [64])
    with pytest.raises(crossray.InputError, match="num_tokens: expected at least 1, got 0"):
        pair.logit_lens(fitted, [0], num_tokens=0)
    with pytest.raises(crossray.InputError, match="other models"):
        make_pair("llama").first_tokens(rows)
    assert not torch.is_grad_enabled() or pair.logit_lens(fitted, []).empty
