"""Pairs that have weights in common: an adapter on one copy, equal leading layers, and where everything lies."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import InputError
from pipeline.models.decoder import SplitDecoder
from pipeline.models.generation import Steering
from pipeline.models.loading import LoadOptions, ModelSpec
from pipeline.models.pair import ModelPair
from pipeline.models.placement import spread_map
from pipeline.models.shared_layers import modules_before_layers
from pipeline.models.verification import require_plain_forward
from pipeline.schema import BASE, CHAT

peft = pytest.importorskip("peft")

NUM_LOWER = 3
OPTIONS = LoadOptions(layer=NUM_LOWER - 1, dtype="float32")
TARGETS = {
    "gemma2": ["q_proj", "down_proj"],
    "llama": ["q_proj", "down_proj"],
    "gpt_neox": ["query_key_value"],
    "gpt2": ["c_attn"],
}


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([12, 5, 9])[:, None]).long()
    return ids, mask


def _save_adapter(base: str, folder: Path, targets: list[str], **settings: Any) -> str:
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"fan_in_fan_out": targets == TARGETS["gpt2"], "init_lora_weights": False, **settings}
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **settings)
    torch.manual_seed(0)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return str(folder)


def _save_merged(base: str, adapter: str, folder: Path) -> str:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    shutil.copytree(base, folder)
    model.merge_and_unload().save_pretrained(folder)
    return str(folder)


def _num_bytes(pair: ModelPair) -> int:
    tensors = {
        tensor.data_ptr(): tensor.nbytes for decoder in pair.decoders for tensor in decoder.whole.state_dict().values()
    }
    return sum(tensors.values())


def _layers_run(pair: ModelPair) -> list[int]:
    """Numbers of the layers that one call of activations runs, both models together."""
    ran: list[int] = []
    lists = {id(decoder.layers): decoder.layers for decoder in pair.decoders}
    handles = [
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        for layers in lists.values()
        for number, layer in enumerate(layers)
    ]
    pair.activations(*_batch())
    for handle in handles:
        handle.remove()
    return sorted(ran)


@pytest.mark.parametrize("architecture", TARGETS)
def test_adapter_on_one_copy_equals_two_full_copies(
    saved_pairs: Callable[[str], tuple[str, str]], tmp_path: Path, architecture: str
) -> None:
    base, _ = saved_pairs(architecture)
    adapter = _save_adapter(base, tmp_path / "adapter", TARGETS[architecture], layers_to_transform=[2, 3])
    merged = _save_merged(base, adapter, tmp_path / "merged")
    one = ModelPair.load(ModelSpec(base), ModelSpec(base, adapter=adapter), OPTIONS)
    two = ModelPair.load(ModelSpec(base), ModelSpec(merged), OPTIONS._replace(placement="two_devices"))
    assert one.decoders[BASE].model is one.decoders[CHAT].model
    assert (one.num_shared_layers, two.num_shared_layers) == (2, 0)
    assert _layers_run(one) == [0, 1, 2, 2]
    ids, mask = _batch()
    kept = mask == 1
    expected = two.activations(ids, mask)
    for _ in range(2):
        ours = one.activations(ids, mask)
        torch.testing.assert_close(ours[kept], expected[kept], rtol=1e-4, atol=1e-4)
    assert (ours[kept][:, BASE] - ours[kept][:, CHAT]).abs().max() > 0.01
    for model in (CHAT, BASE, CHAT):
        torch.testing.assert_close(one.lower(model, ids, mask)[kept], expected[kept][:, model], rtol=1e-4, atol=1e-4)
        logits = one.upper_logits(model, ours[:, :, model], mask)[kept]
        plain = two.upper_logits(model, expected[:, :, model], mask)[kept]
        torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-3)
    one.lower(BASE, ids, mask)
    prompts, vector = [[5, 6, 7], [8]], torch.randn(32, generator=torch.Generator().manual_seed(1))
    for steering in (None, Steering(vector)):
        assert one.generate(prompts, 6, steering) == two.generate(prompts, 6, steering)
    one.lower(BASE, ids, mask)
    nll = one.answer_likelihood(prompts, [[1, 2], [3]]).nll_B
    torch.testing.assert_close(nll, two.answer_likelihood(prompts, [[1, 2], [3]]).nll_B, rtol=1e-4, atol=1e-4)
    assert max(require_plain_forward(one, [row.tolist() for row in ids]).relative_difference) < 1e-5
    assert _num_bytes(one) < 1.1 * _num_bytes(two) / 2


def test_only_layers_up_to_the_cut_of_an_adapted_model_remain(
    saved_pairs: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    base, _ = saved_pairs("llama")
    adapter = _save_adapter(base, tmp_path / "adapter", ["q_proj"], layers_to_transform=[1])
    whole = ModelPair.load(ModelSpec(base), ModelSpec(base, adapter=adapter), OPTIONS)
    lower = ModelPair.load(ModelSpec(base), ModelSpec(base, adapter=adapter), OPTIONS._replace(is_lower_only=True))
    assert max(require_plain_forward(lower, [[1, 2, 3], [4]]).relative_difference) < 1e-5
    lower.drop_upper()
    assert [len(decoder.layers) for decoder in lower.decoders] == [NUM_LOWER, NUM_LOWER]
    assert torch.equal(lower.activations(*_batch()), whole.activations(*_batch()))
    above = _save_adapter(base, tmp_path / "above", ["q_proj"], layers_to_transform=[3])
    same = ModelPair.load(ModelSpec(base), ModelSpec(base, adapter=above), OPTIONS)
    assert same.num_shared_layers == NUM_LOWER
    h_BTMD = same.activations(*_batch())
    assert torch.equal(h_BTMD[:, :, BASE], h_BTMD[:, :, CHAT])
    logits = [same.upper_logits(model, h_BTMD[:, :, model], _batch()[1]) for model in (BASE, CHAT)]
    assert (logits[BASE] - logits[CHAT]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "num_shared", "is_one_copy"),
    [
        ({"modules_to_save": ["embed_tokens"], "layers_to_transform": [2]}, 0, True),
        ({"bias": "lora_only", "layers_to_transform": [2]}, 0, False),
        ({"use_dora": True, "layers_to_transform": [1]}, 1, True),
    ],
)
def test_adapters_that_change_more_share_less(
    saved_pairs: Callable[[str], tuple[str, str]],
    tmp_path: Path,
    settings: dict[str, Any],
    num_shared: int,
    is_one_copy: bool,
) -> None:
    base, _ = saved_pairs("llama")
    adapter = _save_adapter(base, tmp_path / "adapter", ["q_proj"], **settings)
    pair = ModelPair.load(ModelSpec(base), ModelSpec(base, adapter=adapter), OPTIONS)
    assert pair.num_shared_layers == num_shared
    assert (pair.decoders[BASE].model is pair.decoders[CHAT].model) is is_one_copy
    plain = ModelPair.load(ModelSpec(base), ModelSpec(base), OPTIONS)
    kept = _batch()[1] == 1
    ours, expected = pair.activations(*_batch())[kept], plain.activations(*_batch())[kept]
    torch.testing.assert_close(ours[:, BASE], expected[:, BASE], rtol=1e-5, atol=1e-5)
    assert (ours[:, CHAT] - expected[:, CHAT]).abs().max() > 1e-3


def test_replaced_tokens_keep_one_copy_but_share_no_run(
    saved_pairs: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    base, _ = saved_pairs("llama")
    adapter = _save_adapter(base, tmp_path / "adapter", ["q_proj"], layers_to_transform=[2])
    spec = ModelSpec(base, token_replacements=((5, 9),))
    pair = ModelPair.load(spec, ModelSpec(base, adapter=adapter), OPTIONS)
    assert pair.num_shared_layers == 0
    assert pair.decoders[BASE].model is pair.decoders[CHAT].model
    ones = torch.ones(1, 3, dtype=torch.int64)
    replaced, plain = (pair.lower(BASE, torch.tensor([[4, i, 6]]), ones) for i in (5, 9))
    assert torch.equal(replaced, plain)


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "gpt_neox"])
def test_equal_leading_layers_run_once_and_lie_in_memory_once(
    saved_pairs: Callable[[str], tuple[str, str]], tmp_path: Path, architecture: str
) -> None:
    base, _ = saved_pairs(architecture)
    shutil.copytree(base, tmp_path / "chat")
    model = AutoModelForCausalLM.from_pretrained(base)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    for parameter in layers[2].parameters():
        parameter.data += 0.1
    model.save_pretrained(tmp_path / "chat")
    pair = ModelPair.load(ModelSpec(base), ModelSpec(str(tmp_path / "chat")), OPTIONS)
    apart = ModelPair.load(
        ModelSpec(base), ModelSpec(str(tmp_path / "chat")), OPTIONS._replace(placement="two_devices")
    )
    assert (pair.num_shared_layers, apart.num_shared_layers) == (2, 0)
    assert _layers_run(pair) == [0, 1, 2, 2]
    assert _layers_run(apart) == [0, 0, 1, 1, 2, 2]
    assert torch.equal(pair.activations(*_batch()), apart.activations(*_batch()))
    mask = _batch()[1]
    h_BTMD = pair.activations(*_batch())
    for index in (BASE, CHAT):
        logits = (p.upper_logits(index, h_BTMD[:, :, index], mask) for p in (pair, apart))
        assert torch.equal(*logits)
    layer_bytes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    assert _num_bytes(apart) - _num_bytes(pair) >= sum(layer_bytes[:2])
    shorter = ModelPair.load(
        ModelSpec(base), ModelSpec(str(tmp_path / "chat")), OPTIONS._replace(layer=1, is_lower_only=True)
    )
    assert shorter.num_shared_layers == 2
    assert _layers_run(shorter) == [0, 1]


@pytest.mark.parametrize(
    ("architecture", "names"),
    [("gemma2", {"", "embed_tokens", "rotary_emb"}), ("gpt2", {"", "wte", "wpe", "drop"}), ("llama", None)],
)
def test_what_runs_before_the_layers_is_found_without_running_a_layer(
    random_model: Callable[..., Any], architecture: str, names: set[str] | None
) -> None:
    decoder = SplitDecoder(random_model(architecture, seed=0), 1)
    ran: list[int] = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda *_: ran.append(1))
    name_of = {module: name for name, module in decoder.base.named_modules()}
    found = {name_of[module] for module in modules_before_layers(decoder)}
    assert found == (names or {"", "embed_tokens", "rotary_emb"})
    assert not ran


def test_another_config_or_embedding_shares_nothing(
    saved_pairs: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    base, chat = saved_pairs("llama")
    assert ModelPair.load(ModelSpec(base), ModelSpec(chat), OPTIONS).num_shared_layers == 0
    shutil.copytree(base, tmp_path / "eps")
    config = (tmp_path / "eps" / "config.json").read_text()
    (tmp_path / "eps" / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert "1e-05" in (tmp_path / "eps" / "config.json").read_text()
    assert ModelPair.load(ModelSpec(base), ModelSpec(str(tmp_path / "eps")), OPTIONS).num_shared_layers == 0
    shutil.copytree(base, tmp_path / "copy")
    assert ModelPair.load(ModelSpec(base), ModelSpec(str(tmp_path / "copy")), OPTIONS).num_shared_layers == NUM_LOWER


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "llama"])
def test_spread_models_give_the_same_numbers(saved_pairs: Callable[[str], tuple[str, str]], architecture: str) -> None:
    pytest.importorskip("accelerate")
    base, chat = (ModelSpec(source) for source in saved_pairs(architecture))
    one = ModelPair.load(base, chat, OPTIONS)
    # Two names of the CPU: the models get accelerate's hooks on every layer, as on two GPUs.
    spread = ModelPair.load(base, chat, OPTIONS._replace(placement="spread", devices=("cpu", "cpu")))
    assert hasattr(spread.decoders[CHAT].layers[0], "_hf_hook")
    h_BTMD = one.activations(*_batch())
    assert torch.equal(spread.activations(*_batch()), h_BTMD)
    mask = _batch()[1]
    for model in (BASE, CHAT):
        logits = (pair.upper_logits(model, h_BTMD[:, :, model], mask) for pair in (one, spread))
        assert torch.equal(*logits)
    assert spread.generate([[5, 6, 7], [8]], 5) == one.generate([[5, 6, 7], [8]], 5)
    lower = ModelPair.load(base, chat, OPTIONS._replace(placement="spread", devices=("cpu", "cpu"), is_lower_only=True))
    assert max(require_plain_forward(lower, [[1, 2, 3], [4]]).relative_difference) < 1e-5
    lower.drop_upper()
    assert torch.equal(lower.activations(*_batch()), h_BTMD)


def test_spread_shares_bytes_evenly_and_keeps_tied_tensors_together(
    saved_pairs: Callable[[str], tuple[str, str]],
) -> None:
    for architecture, head in (("gemma2", "a"), ("llama", "b")):
        pair = ModelPair.load(*(ModelSpec(source) for source in saved_pairs(architecture)), OPTIONS)
        placed = spread_map(pair.decoders[CHAT], ("a", "b"))
        assert [placed[f"model.layers.{i}"] for i in range(4)] == ["a", "a", "b", "b"]
        assert (placed["model.embed_tokens"], placed["model.norm"], placed["lm_head"]) == ("a", "b", head)
    three = spread_map(pair.decoders[CHAT], ("a", "b", "c"))
    assert [three[f"model.layers.{i}"] for i in range(4)] == ["a", "b", "b", "c"]


def test_wrong_adapters_are_input_errors(saved_pairs: Callable[[str], tuple[str, str]], tmp_path: Path) -> None:
    base, _ = saved_pairs("llama")
    with pytest.raises(InputError, match="expected an adapter of this model at"):
        ModelPair.load(ModelSpec(base), ModelSpec(base, adapter=str(tmp_path)), OPTIONS)
    other = _save_adapter(saved_pairs("gpt2")[0], tmp_path / "other", ["c_attn"])
    with pytest.raises(InputError, match="expected an adapter of this model at"):
        ModelPair.load(ModelSpec(base), ModelSpec(base, adapter=other), OPTIONS)
