"""Pairs of which one model was given tokens, or rows of padding, that the other lacks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.analyses.next_tokens import Prediction, compare
from pipeline.errors import InputError
from pipeline.models.loading import LoadOptions, ModelSpec, check_pair, check_used_ids, load_tokenizer
from pipeline.models.padding import pad_tokens
from pipeline.models.pair import ModelPair
from pipeline.models.verification import probe_documents, require_plain_forward
from pipeline.schema import BASE, CHAT

ADDED = ["<|think|>", "<|call|>"]
Specs = tuple[ModelSpec, ModelSpec]


@pytest.fixture
def grown(random_model: Callable[..., Any], build_tokenizer: Callable[..., Any], tmp_path: Path) -> Specs:
    """A base model, and a chat model with two tokens and six rows more."""
    for seed, name in enumerate(("base", "chat")):
        model, tokenizer = random_model("llama", seed=seed), build_tokenizer("gemma")
        model.resize_token_embeddings(len(tokenizer))
        if name == "chat":
            tokenizer.add_tokens(ADDED, special_tokens=True)
            model.resize_token_embeddings(len(tokenizer) + 4)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return ModelSpec(str(tmp_path / "base")), ModelSpec(str(tmp_path / "chat"))


def _load(specs: Specs) -> ModelPair:
    return ModelPair.load(*specs, LoadOptions(layer=1, dtype="float32"))


def test_predictions_are_compared_over_the_ids_that_both_have(grown: Specs) -> None:
    base, chat = grown
    num_base = len(load_tokenizer(base))
    assert check_pair(base, chat, layer=1).vocab_size == num_base
    pair = _load(grown)
    assert (pair.vocab_size, pair.num_readable) == (num_base, num_base)
    require_plain_forward(pair, probe_documents(pair), ("rows", "logits", "answers"))
    hidden_P1D = torch.randn(4, 32)
    (found,) = compare(pair, Prediction(CHAT, hidden_P1D), [Prediction(BASE, hidden_P1D)])
    chat_PV, base_PV = (pair.head(model, hidden_P1D).double()[:, :num_base].log_softmax(-1) for model in (CHAT, BASE))
    torch.testing.assert_close(found.kl_P, (chat_PV.exp() * (chat_PV - base_PV)).sum(-1))


def test_only_texts_that_use_the_ids_of_one_model_are_refused(grown: Specs) -> None:
    tokenizers = [load_tokenizer(spec) for spec in grown]
    plain = tokenizers[CHAT]("hello world")["input_ids"]
    check_used_ids(grown, tokenizers, plain)
    added = tokenizers[CHAT].convert_tokens_to_ids(ADDED)
    with pytest.raises(InputError, match=f"got 2 of {len(set(plain)) + 2} ids .* base model .*{added[0]}, {added[1]}"):
        check_used_ids(grown, tokenizers, [*plain, *added, *added])
    replacing = (grown[BASE]._replace(token_replacements=tuple((index, plain[0]) for index in added)), grown[CHAT])
    check_used_ids(replacing, tokenizers, [*plain, *added])


def test_an_added_token_is_read_as_the_one_that_replaces_it(grown: Specs) -> None:
    number = len(load_tokenizer(grown[BASE]))
    pair = _load((grown[BASE]._replace(token_replacements=((number, 7), (number + 1, 8))), grown[CHAT]))
    assert pair.num_readable == number + 2
    added, replaced = (pad_tokens([[5, *ids, 6]]) for ids in ((number, number + 1), (7, 8)))
    torch.testing.assert_close(
        pair.activations(*added)[:, :, BASE], pair.activations(*replaced)[:, :, BASE], rtol=0, atol=0
    )
    assert not torch.equal(pair.activations(*added)[:, :, CHAT], pair.activations(*replaced)[:, :, CHAT])
    with pytest.raises(InputError, match="got 100000"):
        _load((grown[BASE]._replace(token_replacements=((100_000, 7),)), grown[CHAT]))
