"""The ways to a pair: folders, an adapter, modules; they agree."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.data import HubModel
from pipeline.library.loading import load_pair
from pipeline.library.origin import ModelOrigin
from pipeline.library.pair import Pair
from pipeline.library.runs import _named
from pipeline.models.loading import ModelSpec
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.run.identities import model_identity

TEXTS = ["hello world, hello again", "What is the capital of Norland?"]


@pytest.fixture(scope="module")
def folders(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    for name, model in (("base", pair.base), ("chat", pair.chat)):
        model.save_pretrained(folder / name)
        pair.tokenizer.save_pretrained(folder / name)
    return str(folder / "base"), str(folder / "chat")


def test_folders_and_modules_give_the_same_rows_and_the_same_origin(pair: Pair, folders: tuple[str, str]) -> None:
    loaded = load_pair(*folders, layer=1, device="cpu")
    assert loaded.origin.base.digest == pair.origin.base.digest != loaded.origin.chat.digest == pair.origin.chat.digest
    assert torch.equal(loaded.activations(TEXTS).x, pair.activations(TEXTS).x)
    assert loaded.generate(TEXTS, max_new_tokens=5) == pair.generate(TEXTS, max_new_tokens=5)
    half = load_pair(*folders, layer=1, device="cpu", dtype=torch.bfloat16)
    assert half.origin.base.digest == pair.origin.base.digest


def test_a_preset_says_which_rows_and_what_the_base_model_reads(folders: tuple[str, str]) -> None:
    base = ModelSpec(folders[0], token_replacements=((20, 30),))
    pair = load_pair(base, folders[1], layer=1, device="cpu", preset="qwen-2.5", drop_bos=False)
    assert (pair.options.drop_first_tokens, pair.options.drop_bos, pair.options.norm_cap) == (21, False, 10.0)
    assert pair.models.decoders[0].read(torch.tensor([[20, 21]])).tolist() == [[30, 21]]


def test_sampled_answers_are_those_of_the_seed(pair: Pair) -> None:
    drawn = [pair.generate(TEXTS, max_new_tokens=8, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert pair.generate(TEXTS[:1], max_new_tokens=8, temperature=2.0, seed=1) == drawn[0][:1]


def test_an_adapter_on_one_copy_is_switched_and_spliced(folders: tuple[str, str], tmp_path: Path) -> None:
    """Base and chat are one module: its edits belong to the chat model, and the base model's stream has none."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(folders[0])
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    shared = load_pair(folders[0], tmp_path / "adapter", layer=1, device="cpu")
    assert shared.base is shared.chat
    apart = load_pair(AutoModelForCausalLM.from_pretrained(folders[0]), merged, layer=1, tokenizer=shared.tokenizer)
    assert shared.origin.base.digest == apart.origin.base.digest
    torch.testing.assert_close(shared.activations(TEXTS).x, apart.activations(TEXTS).x)
    crosscoder = Crosscoder(16, 2, 32)
    for parameter in crosscoder.parameters():
        parameter.copy_(torch.randn(parameter.shape) / 4)

    def logits(pair: Pair, ids: Any) -> Any:
        return pair.chat(ids).logits

    ids = torch.tensor([[7, 8, 9, 50, 60]])
    with torch.no_grad():
        for edit in (
            lambda pair: pair.splice(crosscoder),
            lambda pair: pair.steer(crosscoder, 3, 2.0),
        ):
            found = []
            for pair in (shared, apart):
                with edit(pair), pair.steer(crosscoder, 5, 1.0):
                    found.append(logits(pair, ids))
            torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
            assert (found[0] - logits(shared, ids)).abs().max() > 0.01


def test_a_local_model_of_a_run_has_no_name_that_could_differ(saved_pairs: Callable[[str], tuple[str, str]]) -> None:
    """Its identity holds contents: rows of the same folder must not be refused for another name."""
    folder, _ = saved_pairs("llama")
    identity = model_identity(HubModel(source=folder), "models.base")
    assert _named(identity) == ModelOrigin("")
    assert _named({"source": "google/gemma-2-2b", "source_revision": None}) == ModelOrigin("google/gemma-2-2b")
    assert _named({"source": "google/gemma-2-2b", "adapter": "someone/adapter"}) == ModelOrigin("")
