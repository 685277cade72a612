"""The stream of every layer and the model continued from any, against plain forwards with hooks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_pairs import NUM_LAYERS, VOCAB, model

from pipeline.models.decoder import SplitDecoder, hidden_of
from pipeline.models.layerwise import at_layer, continued_from, layer_streams, rerounded_hidden
from pipeline.models.loading import LoadOptions, ModelSpec
from pipeline.models.pair import ModelPair
from pipeline.schema import BASE, CHAT

LENGTHS = (9, 3, 12)


def _padded(side: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, VOCAB, (length,), generator=generator) for length in LENGTHS]
    ids, mask = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.int64)
    for row, document in enumerate(documents):
        columns = slice(0, len(document)) if side == "right" else slice(12 - len(document), 12)
        ids[row, columns], mask[row, columns] = document, 1
    return documents, ids, mask


def _layers(plain: Any) -> Any:
    return plain.transformer.h if hasattr(plain, "transformer") else plain.model.layers


def _plain(plain: Any, document: torch.Tensor, put_in: dict[int, torch.Tensor] | None = None) -> tuple[Any, Any]:
    """Streams after every layer and the normalised hidden state of one document alone, some layers' output replaced."""
    seen: dict[int, torch.Tensor] = {}

    def hook(layer: int) -> Callable[..., Any]:
        def see(_module: Any, _args: Any, output: Any) -> Any:
            seen[layer] = hidden_of(output)
            if put_in is None or layer not in put_in:
                return output
            return (put_in[layer], *output[1:]) if isinstance(output, tuple) else put_in[layer]

        return see

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(_layers(plain))]
    with torch.no_grad():
        hidden = plain.base_model(input_ids=document[None], use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return seen, hidden[0]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_layer_and_every_continuation_equal_plain_forwards(architecture: str, side: str) -> None:
    base, chat = model(architecture, seed=0), model(architecture, seed=1)
    documents, ids, mask = _padded(side)
    layers = range(NUM_LAYERS)
    runs = [layer_streams(SplitDecoder(own, 1), ids, mask, layers) for own in (base, chat)]
    for row, document in enumerate(documents):
        kept = mask[row] == 1
        base_seen, base_hidden = _plain(base, document)
        chat_seen, chat_hidden = _plain(chat, document)
        torch.testing.assert_close(runs[BASE].hidden_BTD[row][kept], base_hidden, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(runs[CHAT].hidden_BTD[row][kept], chat_hidden, rtol=1e-4, atol=1e-4)
        for layer in layers:
            for run, seen in zip(runs, (base_seen, chat_seen), strict=True):
                torch.testing.assert_close(run.stream_BTD[layer][row][kept], seen[layer][0], rtol=1e-4, atol=1e-4)
            spliced = continued_from(runs[CHAT], layer, runs[BASE].stream_BTD[layer], mask)
            _, expected = _plain(chat, document, {layer: base_seen[layer]})
            torch.testing.assert_close(spliced[row][kept], expected, rtol=1e-4, atol=1e-4)


def test_a_models_own_stream_put_back_at_any_layer_changes_nothing() -> None:
    decoder = SplitDecoder(model("qwen3"), 1)
    _, ids, mask = _padded("right")
    run = layer_streams(decoder, ids, mask, (0, 3, 5))
    for place, layer in enumerate((0, 3, 5)):
        assert torch.equal(continued_from(run, layer, run.stream_BTD[place], mask), run.hidden_BTD)


def test_views_share_the_model_and_leave_the_cut_where_it_was() -> None:
    decoder = SplitDecoder(model("llama"), 1)
    _, ids, mask = _padded("right")
    before = decoder.lower(ids, mask)
    view = at_layer(decoder, 4)
    assert view.model is decoder.model and view.layers is decoder.layers
    layer_streams(decoder, ids, mask, (5,))
    rerounded_hidden(decoder, ids, mask)
    assert torch.equal(decoder.lower(ids, mask), before)
    assert all(not layer._forward_hooks for layer in decoder.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rerounding_moves_a_model_by_about_its_dtypes_precision(dtype: torch.dtype) -> None:
    decoder = SplitDecoder(model("llama").to(dtype), 1)
    _, ids, mask = _padded("right")
    plain = layer_streams(decoder, ids, mask, ()).hidden_BTD[mask == 1]
    moved = rerounded_hidden(decoder, ids, mask)[mask == 1]
    assert torch.equal(rerounded_hidden(decoder, ids, mask)[mask == 1], moved)
    relative = float((moved.float() - plain.float()).norm() / plain.float().norm())
    eps = torch.finfo(dtype).eps
    assert eps / 2 < relative < 20 * eps


def test_an_adapter_on_one_copy_of_the_weights_is_off_for_base(
    saved_pairs: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder, _ = saved_pairs("llama")
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(tmp_path)
    options = LoadOptions(layer=1, dtype="float32")
    pair = ModelPair.load(ModelSpec(folder), ModelSpec(folder, adapter=str(tmp_path)), options)
    _, ids, mask = _padded("right")
    with torch.no_grad():
        expected = plain(ids[:1, :9], output_hidden_states=True).hidden_states
    for _ in range(2):
        base, chat = (layer_streams(decoder, ids[:1, :9], mask[:1, :9], (0, 1, 2)) for decoder in pair.decoders)
        for layer in range(3):
            torch.testing.assert_close(base.stream_BTD[layer], expected[layer + 1])
            assert (chat.stream_BTD[layer] - expected[layer + 1]).abs().max() > 1e-3
