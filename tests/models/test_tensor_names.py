"""Files and models that name different tensors are refused: what is left out in silence is another model."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.errors import InputError
from pipeline.models.loading import LoadOptions, ModelSpec
from pipeline.models.pair import ModelPair

OPTIONS = LoadOptions(layer=2, dtype="float32")
Pairs = Callable[[str], tuple[str, str]]
Tensors = dict[str, torch.Tensor]


def saved_adapter(base: str, folder: Path, **settings: Any) -> Path:
    settings = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings}
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def rewrite(folder: Path, file: str, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change(load_file(folder / file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})


def load(base: str, adapter: Path) -> ModelPair:
    return ModelPair.load(ModelSpec(base), ModelSpec(base, adapter=str(adapter)), OPTIONS)


def other_prefix(tensors: Tensors) -> Tensors:
    return {name.replace("model.model.", "model.language_model.model.", 1): value for name, value in tensors.items()}


def first_half(tensors: Tensors) -> Tensors:
    return dict(sorted(tensors.items())[: len(tensors) // 2])


def one_more(tensors: Tensors) -> Tensors:
    name = next(name for name in tensors if "layers.0" in name)
    return tensors | {name.replace("layers.0", "layers.77"): tensors[name].clone()}


@pytest.mark.parametrize(
    ("change", "named"),
    [(other_prefix, ["8", "language_model"]), (first_half, ["4", "lora_"]), (one_more, ["1", "layers.77"])],
    ids=["another prefix", "half of it", "a layer too many"],
)
def test_an_adapter_that_does_not_fit_whole_is_refused(
    saved_pairs: Pairs, tmp_path: Path, change: Callable[[Tensors], Tensors], named: list[str]
) -> None:
    base, _ = saved_pairs("llama")
    adapter = saved_adapter(base, tmp_path / "adapter", layers_to_transform=[0, 1])
    assert load(base, adapter).num_shared_layers == 0
    rewrite(adapter, "adapter_model.safetensors", change)
    with pytest.raises(InputError) as refused:
        load(base, adapter)
    assert str(adapter) in str(refused.value)
    assert all(word in str(refused.value) for word in named)


def test_an_adapter_that_fits_is_loaded_without_a_warning(saved_pairs: Pairs, tmp_path: Path) -> None:
    base, _ = saved_pairs("llama")
    adapter = saved_adapter(base, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(base, adapter)


def test_an_adapter_that_adds_nothing_is_refused(saved_pairs: Pairs, tmp_path: Path) -> None:
    base, _ = saved_pairs("llama")
    fresh = saved_adapter(base, tmp_path / "fresh", init_lora_weights=True)
    with pytest.raises(InputError) as refused:
        load(base, fresh)
    assert str(fresh) in str(refused.value)


def test_an_adapter_that_replaces_embeddings_leaves_the_base_model_as_it_was(
    saved_pairs: Pairs, tmp_path: Path
) -> None:
    base, _ = saved_pairs("llama")
    adapter = saved_adapter(base, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base)
    key = "base_model.model.model.embed_tokens.weight"
    replaced = plain.get_input_embeddings().weight.detach() + 1.0
    rewrite(adapter, "adapter_model.safetensors", lambda tensors: tensors | {key: replaced})
    pair = load(base, adapter)
    ids, mask = torch.arange(6)[None], torch.ones(1, 6, dtype=torch.int64)
    h_BTMD = pair.activations(ids, mask)
    expected = plain(input_ids=ids, output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(h_BTMD[:, :, 0], expected, atol=1e-5, rtol=1e-5)
    assert (h_BTMD[:, :, 1] - h_BTMD[:, :, 0]).abs().max() > 0.1


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.4.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.1.mlp.up_proj.bias",
    ],
    ids=["a layer", "an adapter beside the weights", "a bias"],
)
def test_weights_that_the_architecture_does_not_know_are_refused(
    saved_pairs: Pairs, tmp_path: Path, extra: str
) -> None:
    base, chat = saved_pairs("llama")
    folder = tmp_path / "model"
    shutil.copytree(chat, folder)
    rewrite(folder, "model.safetensors", lambda tensors: tensors | {extra: torch.ones(3)})
    with pytest.raises(InputError) as refused:
        ModelPair.load(ModelSpec(base), ModelSpec(str(folder)), OPTIONS)
    assert str(folder) in str(refused.value) and extra in str(refused.value)


def test_missing_weights_are_refused_and_tied_ones_are_not(saved_pairs: Pairs, tmp_path: Path) -> None:
    base, chat = saved_pairs("llama")
    folder = tmp_path / "model"
    shutil.copytree(chat, folder)
    rewrite(folder, "model.safetensors", lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    with pytest.raises(InputError) as refused:
        ModelPair.load(ModelSpec(base), ModelSpec(str(folder)), OPTIONS)
    assert "lm_head.weight" in str(refused.value)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    ModelPair.load(ModelSpec(str(folder)), ModelSpec(str(folder)), OPTIONS)
