"""A pair of tiny random models and a random crosscoder for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fabricated_models import _one_thread, build_tokenizer, random_model, saved_pairs, tokenizers

from pipeline.library.crosscoder import Crosscoder
from pipeline.library.loading import load_pair
from pipeline.library.pair import Pair

__all__ = ["_one_thread", "build_tokenizer", "random_model", "saved_pairs", "tokenizers"]


@pytest.fixture(scope="session")
def pair(random_model: Callable[..., Any], tokenizers: dict[str, Any]) -> Pair:
    models = [random_model("gemma2", seed=seed) for seed in (0, 1)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizers["gemma"]), mean_resizing=False)
    return load_pair(*models, layer=1, tokenizer=tokenizers["gemma"])


@pytest.fixture(scope="session")
def crosscoder(pair: Pair) -> Crosscoder:
    generator = torch.Generator().manual_seed(0)
    made = Crosscoder(64, 2, pair.models.activation_dim)
    for parameter in (made.W_enc_FMD, made.W_dec_FMD, made.b_dec_MD):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    made.b_enc_F.copy_(torch.randn(64, generator=generator) - 0.5)
    made.set_normalisation(None)
    return made
