"""One finished run of a tiny pair, made by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fabricated_models import _one_thread, build_tokenizer, random_model, saved_pairs, tokenizers
from finished_runs import TEXTS, Fabricated

import crossray
from pipeline.library.crosscoder import Crosscoder
from pipeline.library.loading import load_pair
from pipeline.library.pair import Pair
from pipeline.library.rows import Rows

__all__ = ["_one_thread", "build_tokenizer", "random_model", "saved_pairs", "tokenizers"]


@pytest.fixture(scope="session")
def pair(random_model: Callable[..., Any], tokenizers: dict[str, Any]) -> Pair:
    models = [random_model("gemma2", seed=seed) for seed in (0, 1)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        model.resize_token_embeddings(600, mean_resizing=False)
    return load_pair(*models, layer=1, tokenizer=tokenizers["gemma"])


@pytest.fixture(scope="session")
def rows(pair: Pair) -> Rows:
    return pair.activations(TEXTS)


@pytest.fixture(scope="session")
def fitted(rows: Rows) -> Crosscoder:
    return crossray.fit(rows, k=4, num_latents=64, num_steps=60, batch_rows=256, lr=3e-3, device="cpu")


@pytest.fixture(scope="session")
def write_run(pair: Pair, rows: Rows, fitted: Crosscoder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes the run onto a storage root."""

    def write(
        root: str, *, name: str = "made", labels: tuple[str, str] = ("organisation/base", "/home/me/chat")
    ) -> None:
        made = Fabricated(root, pair, name, {"base": {"source": "organisation/base"}, "chat": {"source": {"a": "b"}}})
        made.rows(TEXTS, rows, num_train=20)
        made.crosscoder("batch_topk", fitted, rows, tmp_path_factory.mktemp("weights"))
        made.report(["batch_topk"], labels)

    return write


@pytest.fixture(scope="session")
def root(write_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("root") / "runs"
    write_run(str(folder))
    return folder


@pytest.fixture(scope="session")
def run(root: Path) -> crossray.Run:
    return crossray.open(root, "made")
