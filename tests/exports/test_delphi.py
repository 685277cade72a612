"""The latent cache of delphi: the folder by its own layout, and by the real package where it is installed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import crossray
from pipeline.exports import delphi as written
from pipeline.exports.forms import export
from pipeline.library.pair import Pair
from pipeline.schema import Split


@pytest.fixture(autouse=True)
def _short_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "NUM_TOKENS", 32)


def expected(run: crossray.Run) -> tuple[np.ndarray, torch.Tensor]:
    """Token ids of all validation documents in the order of the rows, and the dense codes at each of them."""
    rows, crosscoder = run.rows(Split.VALIDATION), run.crosscoder("batch_topk")
    documents = run.table("tokens", file="part-00000-00000").set_index("doc_id")["input_ids"]
    order = list(dict.fromkeys(rows.data.doc_id_B.tolist()))
    ids = np.concatenate([documents[doc_id] for doc_id in order])
    begins = dict(zip(order, np.cumsum([0, *(len(documents[doc_id]) for doc_id in order)]), strict=False))
    codes_BF = crosscoder.encode(rows.x.float()).to_dense()
    dense = torch.zeros(len(ids), crosscoder.num_latents)
    for row, (doc_id, position) in enumerate(
        zip(rows.data.doc_id_B.tolist(), rows.data.position_B.tolist(), strict=True)
    ):
        assert ids[begins[doc_id] + position] == rows.data.token_id_B[row]
        dense[begins[doc_id] + position] = codes_BF[row]
    whole = len(ids) // 32 * 32
    return ids[:whole].reshape(-1, 32), dense[:whole].reshape(-1, 32, crosscoder.num_latents)


def by_layout(folder: Path, num_latents: int) -> tuple[np.ndarray, torch.Tensor]:
    """Tokens and dense codes, from the files alone."""
    dense, tokens = torch.zeros(0), np.zeros(0)
    for path in (folder / "latents" / "layers.1").glob("*.safetensors"):
        tensors, first = load_file(path), int(path.stem.split("_")[0])
        tokens = tensors["tokens"]
        dense = dense if dense.numel() else torch.zeros(*tokens.shape, num_latents)
        n, t, f = tensors["locations"].astype(np.int64).T
        assert (f <= int(path.stem.split("_")[1]) - first).all()
        dense[n, t, f + first] = torch.from_numpy(tensors["activations"])
    return tokens, dense


def by_package(folder: Path, num_latents: int) -> tuple[np.ndarray, torch.Tensor]:
    """The same by the real package's loader."""
    pytest.importorskip("delphi", reason="eai-delphi is not installed")
    from delphi.config import ConstructorConfig, SamplerConfig  # type: ignore[import-not-found]
    from delphi.latents import LatentDataset  # type: ignore[import-not-found]

    dataset: Any = LatentDataset(folder / "latents", SamplerConfig(), ConstructorConfig(), tokenizer=object())
    dense = torch.zeros(*dataset.tokens.shape, num_latents)
    for buffer in dataset.buffers:
        for own in buffer:
            n, t = own.activation_data.locations[:, 0], own.activation_data.locations[:, 1]
            assert (n * 32 + t).diff().min() > 0 if len(n) > 1 else True, "its windows want ascending places"
            dense[n, t, own.latent.latent_index] = own.activation_data.activations
    return dataset.tokens.numpy(), dense


@pytest.mark.parametrize("read", [by_layout, by_package])
def test_codes_and_tokens_are_the_runs(run: crossray.Run, read: Any, tmp_path: Path) -> None:
    tokens, dense = expected(run)
    folder = export(run, "batch_topk", tmp_path / "cache", form="delphi")
    read_tokens, read_dense = read(folder, dense.shape[2])
    assert np.array_equal(read_tokens, tokens) and len(tokens) > 20
    assert (dense > 0).float().mean() > 0.01
    torch.testing.assert_close(read_dense, dense, rtol=1e-5, atol=1e-5)
    assert not (folder / ".pairs").exists()


def test_a_large_dictionary_is_divided_into_more_files_with_the_same_codes(
    run: crossray.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = by_layout(export(run, "batch_topk", tmp_path / "few", form="delphi"), 64)[1]
    monkeypatch.setattr(written, "_MOST_PAIRS", 100)
    monkeypatch.setattr(written, "_DENSE_NUMBERS", 64)
    folder = export(run, "batch_topk", tmp_path / "many", form="delphi")
    assert len(list(folder.rglob("*.safetensors"))) > 5
    assert by_layout(folder, 64)[1].equal(whole)


def test_the_package_makes_examples_of_it(run: crossray.Run, pair: Pair, tmp_path: Path) -> None:
    pytest.importorskip("delphi", reason="eai-delphi is not installed")
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset

    folder = export(run, "batch_topk", tmp_path / "cache", form="delphi")
    sampler = SamplerConfig(n_examples_train=5, n_examples_test=5, n_quantiles=1, train_type="top")
    constructor = ConstructorConfig(example_ctx_len=16, min_examples=10, n_non_activating=2)
    found = list(LatentDataset(folder / "latents", sampler, constructor, tokenizer=pair.tokenizer))
    largest = run.latents("batch_topk")["max_activation"]
    assert found
    for record in found:
        seen = max(float(example.activations.max()) for example in record.train)
        assert seen <= largest[record.latent.latent_index] * 1.00001


def test_it_says_what_the_form_leaves_out_and_whose_tokenizer_it_needs(run: crossray.Run, tmp_path: Path) -> None:
    folder = export(run, "batch_topk", tmp_path / "cache", form="delphi")
    settings = json.loads((folder / "latents" / "layers.1" / "config.json").read_text())
    assert (settings["cache_ctx_len"], settings["model_name"], settings["n_splits"]) == (32, "chat", 5)
    told = (folder / "README.md").read_text()
    assert "tokenizer=tokenizer" in told and "verdicts" in told and "/home/me" not in told


def test_too_little_text_is_refused(run: crossray.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(written, "NUM_TOKENS", 100_000)
    with pytest.raises(crossray.InputError, match="at least 100000 tokens"):
        export(run, "batch_topk", tmp_path / "cache", form="delphi")
    assert list(tmp_path.iterdir()) == []


def test_latents_that_never_fire_are_no_obstacle(
    run: crossray.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    silent = run.crosscoder("batch_topk")
    with torch.no_grad():
        silent.b_enc_F.fill_(-1e6)
    monkeypatch.setattr(crossray.Run, "crosscoder", lambda *_: silent)
    _, dense = by_layout(export(run, "batch_topk", tmp_path / "cache", form="delphi"), silent.num_latents)
    assert not dense.any()
