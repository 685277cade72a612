"""Models in GGUF files: the same rows as from safetensors, identified by the file's content, refused in one line."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import crossray
from pipeline.config.data import HubModel
from pipeline.models import loading
from pipeline.models.loading import ModelSpec, check_model, check_pair, is_config_alone
from pipeline.run.identities import model_identity

WIDTH, LAYERS, HEADS, KEY_HEADS, VOCABULARY = 32, 3, 4, 2, 300
TEXTS = ["hello world", "the other text", "and a third one, longer than both"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def tiny_llama(*, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


def interleaved(weights: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rows of queries and keys in the order that GGUF has for rotary positions."""
    halves = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCABULARY)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, "he", "ll", "<|end|>"]
    words += [f"<unused{number}>" for number in range(VOCABULARY - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * (len(letters) + 2) + [3] + [5] * (VOCABULARY - len(letters) - 3))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(len(letters) + 2)
    writer.add_eos_token_id(len(letters) + 2)
    for name, tensor in model.state_dict().items():
        place, inner = "", name.removesuffix(".weight")
        if ".layers." in inner:
            layer, inner = inner.removeprefix("model.layers.").split(".", 1)
            place = f"blk.{layer}."
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KEY_HEADS}.get(inner)
        weights = tensor.numpy() if heads is None else interleaved(tensor.numpy(), heads)
        writer.add_tensor(f"{place}{NAMES[inner]}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model alone in its folder, and a chat model beside other files."""
    folder = tmp_path_factory.mktemp("gguf")
    for seed, name in enumerate(("base", "chat")):
        (folder / name).mkdir()
        write_gguf(folder / name / "tiny.gguf", tiny_llama(seed=seed))
    (folder / "chat" / "README.md").write_text("A model.")
    return folder / "base" / "tiny.gguf", folder / "chat" / "tiny.gguf"


def test_rows_are_those_of_the_same_weights(files: tuple[Path, Path]) -> None:
    base, chat = files
    packed = crossray.load_pair(base, chat.parent, layer=1)  # a file, and a folder that holds one
    plain = crossray.load_pair(tiny_llama(seed=0), tiny_llama(seed=1), layer=1, tokenizer=packed.tokenizer)
    rows, expected = packed.activations(TEXTS), plain.activations(TEXTS)
    assert len(rows) == len(expected) > 20
    torch.testing.assert_close(rows.x, expected.x, rtol=1e-2, atol=1e-2)  # stored as bfloat16
    assert torch.equal(rows.data.token_id_B, expected.data.token_id_B)
    logits = [pair.chat(input_ids=torch.arange(9)[None]).logits for pair in (packed, plain)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_shape_and_files_are_checked_before_weights_are_read(files: tuple[Path, Path]) -> None:
    base, chat = (ModelSpec(str(path)) for path in files)
    found = check_pair(base, chat, layer=1)
    assert found == ((LAYERS, LAYERS), WIDTH, VOCABULARY)
    check_model(base)
    assert not is_config_alone(base) and not is_config_alone(ModelSpec(str(files[0].parent)))
    with pytest.raises(crossray.InputError, match="3"):
        check_pair(base, chat, layer=LAYERS)


def test_it_is_identified_by_its_content(files: tuple[Path, Path], tmp_path: Path) -> None:
    def identity(path: Path) -> Any:
        return model_identity(HubModel(source=str(path)), "models.base")["source"]

    base, chat = files
    moved = tmp_path / "other.gguf"
    moved.write_bytes(base.read_bytes())
    assert identity(moved) == identity(base) == identity(base.parent) != identity(chat)
    changed = bytearray(base.read_bytes())
    changed[-1] ^= 1
    moved.write_bytes(changed)
    assert identity(moved) != identity(base)


def test_what_cannot_be_read_is_one_line(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    sources = {str(tmp_path): "a.gguf, b.gguf", str(tmp_path / "a.gguf"): "a.gguf", "models/none.gguf": "none.gguf"}
    for source, named in sources.items():
        with pytest.raises(crossray.InputError, match=named) as error:
            check_pair(ModelSpec(source), ModelSpec(source), layer=0)
        assert "\n" not in str(error.value) and len(str(error.value)) < 700
    with pytest.raises(crossray.InputError, match=r"models/none\.gguf"):
        model_identity(HubModel(source="models/none.gguf"), "models.base")
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    with pytest.raises(crossray.InputError, match=r"crossray\[gguf\]"):
        check_pair(ModelSpec(str(files[0])), ModelSpec(str(files[0])), layer=0)
