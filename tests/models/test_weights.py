"""Local models that would load wrong, or not at all: found without reading their weights, in one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import InputError
from pipeline.models.loading import LoadOptions, ModelSpec, check_model, check_pair
from pipeline.models.pair import ModelPair

Copy = Callable[[], Path]
OPTIONS = LoadOptions(layer=1, dtype="float32")


@pytest.fixture
def copy(saved_pairs: Callable[[str], tuple[str, str]], tmp_path: Path) -> Copy:
    """A fresh copy of a tiny Llama with its tokenizer."""
    return lambda: Path(shutil.copytree(saved_pairs("llama")[1], tmp_path / "model"))


def _weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _refused(folder: Path, expected: str) -> None:
    """Both before the weights are read and where the pair is loaded."""
    spec = ModelSpec(str(folder))
    with pytest.raises(InputError, match=expected) as early:
        check_pair(spec, spec, layer=1)
        check_model(spec)
    assert len(str(early.value)) < 1000


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            lambda w: w.update({"model.layers.4.mlp.up_proj.weight": torch.zeros(48, 32)}),
            "1 that the model does not kn",
        ),
        (lambda w: w.update({"model.layers.1.self_attn.k_proj.bias": torch.zeros(16)}), "k_proj.bias"),
        (lambda w: w.update({"model.layers.1.mlp.up_proj.lora_B.weight": torch.zeros(48, 2)}), "lora_B"),
        (lambda w: w.pop(NORM), "1 that it lacks"),
        (lambda w: w.update({NORM: torch.zeros(33)}), r"of another shape .*\[33\] for \[32\]"),
        (lambda w: w.update({Q_PROJ: w[Q_PROJ].to(torch.float8_e5m2)}), f"{Q_PROJ}' as F8_E5M2"),
        (lambda w: w.update({Q_PROJ: (w[Q_PROJ] * 9).to(torch.int8)}), f"{Q_PROJ}' as I8"),
    ],
    ids=["layer", "bias", "lora", "missing", "shape", "fp8", "int8"],
)
def test_weights_that_are_not_the_models_are_refused(
    copy: Copy, edit: Callable[[dict[str, torch.Tensor]], Any], expected: str
) -> None:
    folder = copy()
    _weights(folder, edit)
    _refused(folder, expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"quantization_config": {"quant_method": "homemade"}}, "got quant_method 'homemade'"),
        ({"quantization_config": {"bits": 3}}, "got quant_method None"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8}}, "its quantisation gptq needs"),
        ({"quantization_config": {"load_in_8bit": True}}, "its quantisation bitsandbytes needs"),
        ({"pad_token_id": 97}, "pad_token_id below 97 .*got 97"),
        ({"hidden_size": 0}, "hidden_size in its config, got 0"),
        ({"num_attention_heads": 7}, "cannot be loaded"),
        ({"vocab_size": [97]}, "cannot be loaded"),
        ({"_attn_implementation": "flash_attention_2"}, "[Ff]lash"),
        ({"model_type": "unheard_of", "auto_map": {"AutoConfig": "own.Config"}}, "custom code|unheard_of"),
    ],
    ids=["unknown", "unnamed", "gptq", "8bit", "pad", "width", "heads", "vocabulary", "flash", "remote"],
)
def test_configurations_that_cannot_work_here_are_refused(copy: Copy, changes: dict[str, Any], expected: str) -> None:
    folder = copy()
    _config(folder, **changes)
    _refused(folder, expected)


def _dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder.parent / "moved" / "model.safetensors")


def _looped(folder: Path) -> None:
    (folder / "vocab").symlink_to("vocab")


def _outside(folder: Path) -> None:
    (folder / "more").symlink_to(folder.parent)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Path("code that would run")}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_dangling, "the link 'model.safetensors'"),
        (_looped, "the link 'vocab'"),
        (_outside, "the link 'more'"),
        (_pickled, "cannot be loaded: Weights only load failed"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("[]"), "cannot be loaded"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "'adapter_config.json' of an adapter"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "a tokenizer at"),
        (
            lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
            "expected a tokenizer at",
        ),
    ],
    ids=["dangling", "looped", "outside", "pickled", "cut", "no-weights", "config", "adapter", "words", "no-tokenizer"],
)
def test_folders_that_are_not_whole_are_refused(copy: Copy, damage: Callable[[Path], Any], expected: str) -> None:
    folder = copy()
    damage(folder)
    _refused(folder, expected)


def test_links_to_files_elsewhere_are_read_as_in_the_hubs_cache(copy: Copy, tmp_path: Path) -> None:
    folder = copy()
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    check_model(ModelSpec(str(folder)))


def test_packages_of_other_machines_are_not_asked_for_here(copy: Copy) -> None:
    folder = copy()
    _config(folder, quantization_config={"load_in_8bit": True}, _attn_implementation="flash_attention_2")
    check_model(ModelSpec(str(folder)), is_used_here=False)
    with pytest.raises(InputError, match="bitsandbytes"):
        check_model(ModelSpec(str(folder)))


def _adapter(folder: Path, model: Any, edit: Callable[[dict[str, torch.Tensor]], Any] = lambda _: None) -> Path:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return folder


@pytest.mark.parametrize(
    ("architecture", "edit", "expected"),
    [
        ("llama", lambda w: [w.pop(name) for name in list(w) if "layers.3" in name], "2 that it lacks"),
        ("llama", lambda w: w.update({"base_model.model.model.x.lora_A.weight": torch.zeros(2, 32)}), "does not know"),
        ("gpt_neox", lambda _: None, "adapter"),
        ("llama", lambda w: [tensor.fill_(float("inf")) for tensor in w.values()], "NaN or infinity"),
    ],
    ids=["half", "more", "architecture", "infinite"],
)
def test_adapters_that_do_not_fit_are_refused(
    copy: Copy,
    random_model: Callable[..., Any],
    tmp_path: Path,
    architecture: str,
    edit: Callable[[dict[str, torch.Tensor]], Any],
    expected: str,
) -> None:
    folder = str(copy())
    if architecture == "gpt_neox":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM")
        get_peft_model(random_model("gpt_neox", seed=0), config).save_pretrained(tmp_path / "adapter")
    else:
        _adapter(tmp_path / "adapter", random_model("llama", seed=0), edit)
    spec = ModelSpec(folder, adapter=str(tmp_path / "adapter"))
    with pytest.raises(InputError, match=expected):
        check_model(spec)
        ModelPair.load(ModelSpec(folder), spec, OPTIONS)


@pytest.mark.parametrize(("made_for", "is_said"), [("org/Other-8B", True), ("org/MODEL", False), ("", False)])
def test_an_adapter_of_another_base_is_said(
    copy: Copy, random_model: Callable[..., Any], tmp_path: Path, caplog: Any, made_for: str, is_said: bool
) -> None:
    folder = str(copy())
    adapter = _adapter(tmp_path / "adapter", random_model("llama", seed=0))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": made_for}))
    check_model(ModelSpec(folder, adapter=str(adapter)))
    assert any("was trained on" in record.getMessage() for record in caplog.records) is is_said
