import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import InputError
from pipeline.models.decoder import SplitDecoder
from pipeline.models.loading import LoadOptions, ModelSpec, check_pair, load_tokenizer
from pipeline.models.pair import ModelPair
from pipeline.models.verification import require_plain_forward
from pipeline.schema import BASE, CHAT

ARCHITECTURES = ("gemma2", "gemma3", "llama", "qwen2", "qwen3", "gpt_neox", "mistral", "gpt2")
LENGTHS = (11, 3, 17, 1, 8)


def _documents(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (length,), generator=generator).tolist() for length in LENGTHS]


def _padded(documents: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, documents))
    ids = torch.zeros(len(documents), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        columns = slice(0, len(document)) if side == "right" else slice(longest - len(document), longest)
        ids[row, columns] = torch.tensor(document)
        mask[row, columns] = 1
    return ids, mask


def _load(saved_pairs: Callable[[str], tuple[str, str]], architecture: str, layer: int = 1, **kwargs: Any) -> ModelPair:
    base, chat = saved_pairs(architecture)
    return ModelPair.load(ModelSpec(base), ModelSpec(chat), LoadOptions(layer=layer, dtype="float32", **kwargs))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_lower_half_equals_plain_hidden_states_of_each_document_alone(
    random_model: Callable[..., Any], architecture: str, side: str
) -> None:
    model = random_model(architecture, seed=3)
    documents = _documents()
    ids, mask = _padded(documents, side)
    for layer in (0, 2):
        h_BTD = SplitDecoder(model, layer).lower(ids, mask)
        for row, document in enumerate(documents):
            with torch.no_grad():
                plain = model(torch.tensor([document]), output_hidden_states=True).hidden_states[layer + 1][0]
            torch.testing.assert_close(h_BTD[row][mask[row] == 1], plain, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_last_layer_is_taken_before_the_final_norm(random_model: Callable[..., Any], architecture: str) -> None:
    model = random_model(architecture, seed=3)
    ids = torch.tensor([_documents()[0]])
    ones = torch.ones_like(ids)
    ours = SplitDecoder(model, 3).lower(ids, ones)
    with torch.no_grad():
        normalised = model(ids, output_hidden_states=True).hidden_states[4]
        entering_layer_3 = model(ids, output_hidden_states=True).hidden_states[3]
    assert (ours - normalised).abs().max() > 0.1
    norm = next(m for name, m in model.base_model.named_children() if name in ("norm", "final_layer_norm", "ln_f"))
    with torch.no_grad():
        torch.testing.assert_close(norm(ours), normalised)
    assert not torch.equal(ours, entering_layer_3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_upper_half_of_the_unedited_stream_gives_the_plain_logits(
    random_model: Callable[..., Any], architecture: str, side: str, layer: int
) -> None:
    model = random_model(architecture, seed=3)
    decoder = SplitDecoder(model, layer)
    documents = _documents()
    ids, mask = _padded(documents, side)
    hidden = decoder.upper(decoder.lower(ids, mask), mask)
    for row, document in enumerate(documents):
        with torch.no_grad():
            plain = model(torch.tensor([document])).logits[0]
        torch.testing.assert_close(decoder.head(hidden[row][mask[row] == 1]), plain, rtol=2e-4, atol=2e-4)
    again = decoder.upper(decoder.lower(ids, mask), mask)
    assert torch.equal(hidden, again)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_halves_leave_the_model_as_it_was(random_model: Callable[..., Any], architecture: str) -> None:
    model = random_model(architecture, seed=3)
    ids = torch.tensor([_documents()[0]])
    ones = torch.ones_like(ids)
    with torch.no_grad():
        before = model(ids).logits
    decoder = SplitDecoder(model, 1)
    decoder.head(decoder.upper(decoder.lower(ids, ones), ones)[0])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_plain_forward_agrees_in_every_dtype_and_a_wrong_layer_is_refused(
    saved_pairs: Callable[[str], tuple[str, str]], dtype: str, layer: int
) -> None:
    base, chat = saved_pairs("gemma3")
    options = LoadOptions(layer=layer, dtype=dtype, is_lower_only=True)
    pair = ModelPair.load(ModelSpec(base), ModelSpec(chat), options)
    require_plain_forward(pair, _documents())
    # A chat model whose layers give something else inside a padded batch than alone.
    first = pair.decoders[CHAT].layers[0]
    first.register_forward_pre_hook(lambda _layer, args: (args[0] * (1 + 0.2 * (len(args[0]) > 1)), *args[1:]))
    with pytest.raises(InputError, match=f"layer {layer} of the chat model within .* got 0"):
        require_plain_forward(pair, _documents())


def test_layers_above_the_cut_do_not_run_and_are_freed(random_model: Callable[..., Any]) -> None:
    model = random_model("llama", seed=3)
    ran: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    decoder = SplitDecoder(model, 1)
    ids = torch.tensor([_documents()[0]])
    expected = decoder.lower(ids, torch.ones_like(ids))
    assert ran == [0, 1]
    decoder.drop_upper()
    assert len(decoder.layers) == 2
    assert torch.equal(decoder.lower(ids, torch.ones_like(ids)), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_pair_equals_the_plain_forward(saved_pairs: Callable[[str], tuple[str, str]], architecture: str) -> None:
    pair = _load(saved_pairs, architecture)
    verification = require_plain_forward(pair, _documents())
    assert max(verification.relative_difference) < 1e-5
    assert max(verification.logits_difference) < 1e-5
    lower = _load(saved_pairs, architecture, is_lower_only=True)
    before = require_plain_forward(lower, _documents())
    assert before.relative_difference == verification.relative_difference
    assert all(map(math.isnan, before.logits_difference))
    lower.drop_upper()
    assert len(lower.decoders[CHAT].layers) == 2
    ids, mask = _padded(_documents(), "right")
    h_BTMD = lower.activations(ids, mask)
    assert torch.equal(h_BTMD, pair.activations(ids, mask))
    assert h_BTMD.shape == (5, 17, 2, 32)
    assert not torch.equal(h_BTMD[:, :, BASE], h_BTMD[:, :, CHAT])


def test_upper_logits_equal_the_chunked_head(saved_pairs: Callable[[str], tuple[str, str]]) -> None:
    pair = _load(saved_pairs, "gemma2")
    ids, mask = _padded(_documents(), "right")
    h_BTD = pair.lower(CHAT, ids, mask)
    logits = pair.upper_logits(CHAT, h_BTD, mask)
    assert logits.shape == (5, 17, 97)
    torch.testing.assert_close(logits[0], pair.head(CHAT, pair.upper(CHAT, h_BTD, mask)[0]))


def test_same_model_twice_is_loaded_once(saved_pairs: Callable[[str], tuple[str, str]]) -> None:
    _, chat = saved_pairs("llama")
    pair = ModelPair.load(ModelSpec(chat), ModelSpec(chat), LoadOptions(layer=1, dtype="float32"))
    assert pair.decoders[BASE] is pair.decoders[CHAT]
    h_BTMD = pair.activations(*_padded(_documents(), "right"))
    assert torch.equal(h_BTMD[:, :, BASE], h_BTMD[:, :, CHAT])


def test_token_replacements_change_what_one_model_reads(random_model: Callable[..., Any]) -> None:
    model = random_model("gpt2", seed=3)
    ids = torch.tensor([[5, 6, 7]])
    ones = torch.ones_like(ids)
    replaced = SplitDecoder(model, 1, {6: 9}).lower(ids, ones)
    assert torch.equal(replaced, SplitDecoder(model, 1).lower(torch.tensor([[5, 9, 7]]), ones))
    with pytest.raises(InputError, match=r"between 0 and 96 .* got 400"):
        SplitDecoder(model, 1, {6: 400})


@pytest.mark.parametrize("layer", [4, 5, -1])
def test_layer_out_of_range_names_the_number_of_layers(
    saved_pairs: Callable[[str], tuple[str, str]], random_model: Callable[..., Any], layer: int
) -> None:
    with pytest.raises(InputError, match=f"between 0 and 3 .* 4 decoder layers, counted from 0\\), got layer {layer}"):
        _load(saved_pairs, "gemma2", layer=layer)
    with pytest.raises(InputError, match="between 0 and 3"):
        SplitDecoder(random_model("llama", seed=0), layer)


def test_what_is_no_pair_is_refused_before_weights_are_read(
    saved_pairs: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    base, chat = saved_pairs("llama")
    config = json.loads((Path(chat) / "config.json").read_text())
    for name, change, message in (
        ("wide", {"hidden_size": 64}, "same width, got 32 .* and 64"),
        ("vocab", {"vocab_size": 0}, "vocab_size in its config, got 0"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            check_pair(ModelSpec(base), ModelSpec(str(tmp_path / name)), layer=0)
    shape = check_pair(ModelSpec(base), ModelSpec(chat), layer=3)
    assert shape == ((4, 4), 32, 97)


def test_missing_models_and_wrong_settings_are_input_errors(
    saved_pairs: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    base, _ = saved_pairs("llama")
    missing = ModelSpec(str(tmp_path / "missing"))
    with pytest.raises(InputError, match="no such folder"):
        check_pair(ModelSpec(base), missing, layer=0)
    with pytest.raises(InputError, match=r"a tokenizer at .* no such folder"):
        load_tokenizer(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded"):
        check_pair(ModelSpec(str(tmp_path / "empty")), ModelSpec(base), layer=0)
    spec = ModelSpec(base)
    with pytest.raises(InputError, match=r"dtype among .* got 'int8'"):
        ModelPair.load(spec, spec, LoadOptions(layer=0, dtype="int8"))
    with pytest.raises(InputError, match="device of this machine, got 'nonsense'"):
        ModelPair.load(spec, spec, LoadOptions(layer=0, dtype="float32", devices=("nonsense",)))
    with pytest.raises(InputError, match="cannot be loaded"):
        ModelPair.load(spec, spec, LoadOptions(layer=0, dtype="float32", attn_implementation="nonsense"))


def test_incomplete_weights_and_unknown_hub_ids_are_refused(
    saved_pairs: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    _, chat = saved_pairs("llama")
    shutil.copytree(chat, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    broken = ModelSpec(str(tmp_path / "broken"))
    with pytest.raises(InputError, match=r"got 1 that it lacks .*'model.layers.1.mlp.up_proj.weight'"):
        ModelPair.load(broken, broken, LoadOptions(layer=0, dtype="float32"))
    damaged = tmp_path / "broken" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be loaded"):
        ModelPair.load(broken, broken, LoadOptions(layer=0, dtype="float32"))
    with pytest.raises(InputError, match="'nobody/no-such-model', it cannot be loaded"):
        check_pair(ModelSpec("nobody/no-such-model"), ModelSpec(chat), layer=0)


def test_attention_that_an_architecture_cannot_do_is_an_input_error(
    saved_pairs: Callable[[str], tuple[str, str]],
) -> None:
    with pytest.raises(InputError, match=r"cannot be loaded: .*scaled_dot_product_attention"):
        _load(saved_pairs, "gemma2", attn_implementation="sdpa")


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_layer_l_is_the_output_of_the_models_own_layer_l(random_model: Callable[..., Any], architecture: str) -> None:
    """As papers and published crosscoders count; `model.layers` is the list that they name."""
    model, ids = random_model(architecture, seed=3), torch.tensor([_documents()[0]])
    for layer in range(4):
        seen: list[Any] = []
        handle = model.model.layers[layer].register_forward_hook(lambda *args, seen=seen: seen.append(args[-1]))
        with torch.no_grad():
            model(ids)
        handle.remove()
        (output,) = seen
        plain = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(SplitDecoder(model, layer).lower(ids, torch.ones_like(ids)), plain)
