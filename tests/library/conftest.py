"""Pairs of tiny random models, their rows and a short fit, each made once a session."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fabricated_models import _one_thread, build_tokenizer, random_model, saved_pairs, tokenizers
from little_texts import DIALOGUES, TEXTS, VOCABULARY

from pipeline.library.crosscoder import Crosscoder
from pipeline.library.fitting import fit
from pipeline.library.loading import load_pair
from pipeline.library.pair import Pair
from pipeline.library.rows import Rows

__all__ = ["_one_thread", "build_tokenizer", "random_model", "saved_pairs", "tokenizers"]


def resized(model: Any, *, seed: int) -> Any:
    """The fabricated model with room for every id of the fabricated tokenizers."""
    torch.manual_seed(seed)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    return model.eval()


@pytest.fixture(scope="session")
def make_pair(random_model: Callable[..., Any], tokenizers: dict[str, Any]) -> Callable[..., Pair]:
    """A pair of an architecture from two loaded models; made once with the same arguments."""
    made: dict[tuple[str, int, torch.dtype], Pair] = {}

    def make(architecture: str, *, layer: int = 1, dtype: torch.dtype = torch.float32) -> Pair:
        key = architecture, layer, dtype
        if key not in made:
            models = [resized(random_model(architecture, seed=seed), seed=seed).to(dtype) for seed in (0, 1)]
            made[key] = load_pair(*models, layer=layer, tokenizer=tokenizers["gemma"])
        return made[key]

    return make


@pytest.fixture(scope="session")
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair("gemma2")


@pytest.fixture(scope="session")
def rows(pair: Pair) -> Rows:
    return pair.activations([*TEXTS, *DIALOGUES])


@pytest.fixture(scope="session")
def fitted(rows: Rows) -> Crosscoder:
    return fit(rows, k=4, expansion=2, num_steps=60, batch_rows=256, lr=3e-3, device="cpu")
