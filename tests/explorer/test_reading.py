"""A text read by both models and a crosscoder, against plain forwards and dense codes."""

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.errors import InputError
from pipeline.explorer.address import View
from pipeline.explorer.pages import exported, text_html
from pipeline.explorer.reading import largest_of, read_text, strongest
from pipeline.explorer.steering import steering_vector
from pipeline.library.crosscoder import Crosscoder
from pipeline.library.pair import Pair
from pipeline.schema import CHAT, Verdict

TEXT = "hello world, hello again and again"
DIALOGUE = [{"role": "user", "content": "What is the capital?"}, {"role": "assistant", "content": "hello world"}]


@pytest.mark.parametrize("text", [TEXT, DIALOGUE])
def test_codes_and_next_tokens_are_those_of_plain_forwards(pair: Pair, crosscoder: Crosscoder, text: object) -> None:
    read = read_text(pair, crosscoder, text, num_top=4)  # type: ignore[arg-type]
    rows = pair.activations([text])  # type: ignore[list-item]
    dense_BF = crosscoder.encode(rows.x.float()).to_dense().numpy()
    kept_T = read.row_T >= 0
    assert len(read.tokens) == len(read.row_T) and kept_T.sum() == len(rows)
    for latent in np.flatnonzero(dense_BF.max(0))[:10]:
        np.testing.assert_allclose(read.activations(int(latent))[kept_T], dense_BF[:, latent], rtol=1e-5)
        assert not read.activations(int(latent))[~kept_T].any()
    np.testing.assert_allclose(largest_of(read.codes), dense_BF.max(0), rtol=1e-5)
    position = int(np.flatnonzero(kept_T)[-1])
    best = np.argsort(-dense_BF[-1], kind="stable")[:3]
    assert [latent for latent, _ in read.at(position, 3)] == best.tolist()


def test_next_tokens_and_their_kl_are_those_of_the_models_themselves(pair: Pair) -> None:
    found = pair.next_tokens(TEXT, num_top=4)
    ids = torch.tensor([pair.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        base_TV, chat_TV = (own(ids).logits[0].double().log_softmax(-1) for own in (pair.base, pair.chat))
    kl_T = (chat_TV.exp() * (chat_TV - base_TV)).sum(-1)
    torch.testing.assert_close(found.kl_P, kl_T, rtol=1e-3, atol=1e-6)
    for model, own_TV in enumerate((base_TV, chat_TV)):
        expected = own_TV.exp().topk(4, dim=-1)
        torch.testing.assert_close(found.prob_PMK[:, model], expected.values, rtol=1e-4, atol=1e-7)
        assert found.top_PMK[:, model, 0].tolist() == expected.indices[:, 0].tolist()


def latents_of(largest_F: np.ndarray) -> pd.DataFrame:
    """A latent table in which every third latent is chat-specific."""
    number = len(largest_F)
    verdicts = [Verdict.CHAT_SPECIFIC if j % 3 == 0 else Verdict.SHARED for j in range(number)]
    maxima = np.where(np.arange(number) % 2, 2 * largest_F, 4 * largest_F)
    return pd.DataFrame(
        {
            "latent": np.arange(number),
            "verdict": verdicts,
            "is_confident": [False] * number,
            "max_activation": maxima,
            "frequency": [0.1] * number,
        }
    )


def test_latents_of_a_text_come_in_the_order_asked_for(pair: Pair, crosscoder: Crosscoder) -> None:
    read = read_text(pair, crosscoder, TEXT)
    table = latents_of(largest_of(read.codes))
    by_f = strongest(read, table, order="activation", num=64)
    assert [one.activation for one in by_f] == sorted((one.activation for one in by_f), reverse=True)
    assert {one.latent for one in by_f} == set(np.flatnonzero(largest_of(read.codes)).tolist())
    by_share = strongest(read, table, order="share", num=64)
    assert [one.share for one in by_share] == sorted((one.share for one in by_share), reverse=True)
    assert {one.share for one in by_share} == {0.25, 0.5}
    by_verdict = strongest(read, table, order="verdict", num=64)
    is_specific = [one.verdict == Verdict.CHAT_SPECIFIC for one in by_verdict]
    assert is_specific == sorted(is_specific, reverse=True)
    assert len(strongest(read, table, order="share", num=2)) == 2


def test_a_dead_latent_has_no_share(pair: Pair, crosscoder: Crosscoder) -> None:
    read = read_text(pair, crosscoder, TEXT)
    table = latents_of(largest_of(read.codes)).assign(max_activation=0.0)
    assert all(np.isnan(one.share) for one in strongest(read, table, order="verdict", num=5))


def test_hostile_texts_stay_texts(pair: Pair, crosscoder: Crosscoder) -> None:
    hostile = "<script>alert(1)</script> \u202eevil ${x} {{y}} <img src=x onerror=alert(2)>" + "w" * 300
    read = read_text(pair, crosscoder, TEXT)._replace(tokens=[hostile])
    read = read._replace(row_T=read.row_T[:1], next_texts=[[["<b>"], ["\u202e"]]])
    read = read._replace(next=read.next._replace(prob_PMK=read.next.prob_PMK[:1, :, :1], kl_P=read.next.kl_P[:1]))
    maxima_F = np.ones(crosscoder.num_latents)
    page = text_html(View(text=hostile), read, [], maxima_F)
    assert "<script" not in page and "<img" not in page and "<b>" not in page and "\u202e" not in page
    assert "&lt;script&gt;" in page
    whole = exported(page, "<title>")
    assert "<script" not in whole and "default-src 'none'" in whole


def test_the_steering_vector_is_the_sum_of_largest_contributions(crosscoder: Crosscoder) -> None:
    table = pd.DataFrame({"latent": np.arange(64), "max_activation": np.linspace(0.5, 2, 64)})
    decoder_FD = crosscoder.raw_decoder_FMD()[:, CHAT]
    expected_D = 2 * table["max_activation"][3] * decoder_FD[3] - 0.5 * table["max_activation"][9] * decoder_FD[9]
    torch.testing.assert_close(steering_vector(crosscoder, table, {3: 2.0, 9: -0.5}), expected_D, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="99"):
        steering_vector(crosscoder, table, {99: 1.0})
