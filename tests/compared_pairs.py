"""Tiny models for comparisons: pairs of one function in other units, and pairs with a known difference."""

import copy
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config

from pipeline.models.decoder import SplitDecoder
from pipeline.models.pair import ModelPair
from pipeline.schema import Flag
from workloads.benchmarks import same_function

WIDTH, VOCAB, NUM_LAYERS = 32, 61, 6
_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "gemma2": lambda: Gemma2Config(**_SIZES, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=8),
    "gpt2": lambda: GPT2Config(
        n_embd=WIDTH, n_layer=NUM_LAYERS, n_head=4, vocab_size=VOCAB, n_positions=64, tie_word_embeddings=False
    ),
}


def model(architecture: str, *, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def changed(original: Any, name: str, *, size: float = 0.3, seed: int = 7) -> Any:
    """A copy with noise on every parameter whose name contains `name`."""
    made = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(seed)
    found = [parameter for own, parameter in made.named_parameters() if name in own]
    assert found, name
    for parameter in found:
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return made


def rescaled(original: Any, factor: float, *, with_eps: bool = True) -> Any:
    """A copy of a Llama or Gemma 2 whose residual stream is `factor` times as large; the norms that read it undo that.

    with_eps scales the norms' epsilon as well: without it, they undo it only where epsilon is far below the stream.
    """
    made = same_function.rescaled(original, factor)
    reading = [made.model.norm]
    for layer in made.model.layers:
        is_gemma = hasattr(layer, "pre_feedforward_layernorm")
        reading += [
            layer.input_layernorm,
            layer.pre_feedforward_layernorm if is_gemma else layer.post_attention_layernorm,
        ]
    if with_eps:
        for norm in reading:
            name = "eps" if hasattr(norm, "eps") else "variance_epsilon"
            setattr(norm, name, getattr(norm, name) * factor**2)
    return made


def shifted(original: Any, offset: float) -> Any:
    """A copy of a GPT-2 with a constant added to every number of its stream; LayerNorm subtracts the mean."""
    made = copy.deepcopy(original)
    made.transformer.wpe.weight.add_(offset)
    return made


def fine_tuned(original: Any, *, num_steps: int = 8, lr: float = 3e-3) -> Any:
    """A copy trained for a few steps to answer with ascending tokens."""
    made = copy.deepcopy(original).requires_grad_(True)
    optimiser = torch.optim.Adam(made.parameters(), lr=lr)
    starts = torch.randint(0, VOCAB, (16, 1), generator=torch.Generator().manual_seed(3))
    ids = (starts + torch.arange(12)) % VOCAB
    for _ in range(num_steps):
        loss = made(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return made.eval().requires_grad_(False)


def pair_of(base: Any, chat: Any, *, layer: int = 2) -> ModelPair:
    """Cut after layer `layer`, from 0. The same object twice is one decoder, as loading gives."""
    chat_decoder = SplitDecoder(chat, layer)
    return ModelPair(chat_decoder if base is chat else SplitDecoder(base, layer), chat_decoder, None)


def documents(number: int = 12, *, seed: int = 0, longest: int = 24) -> dict[str, list[Any]]:
    """Token rows: even ones are plain documents of the corpus web, odd ones dialogues of the corpus chat."""
    generator = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {"doc_id": [], "corpus": [], "input_ids": [], "flags": []}
    for index in range(number):
        length = int(generator.integers(6, longest))
        flags = np.zeros(length, np.int32)
        if index % 2:
            flags[:3], flags[3:5], flags[5:] = int(Flag.TEMPLATE), int(Flag.USER), int(Flag.ASSISTANT)
        flags[0] |= int(Flag.BOS)
        columns["doc_id"].append(1000 + 37 * index)
        columns["corpus"].append("chat" if index % 2 else "web")
        columns["input_ids"].append(generator.integers(0, VOCAB, length).astype(np.int32))
        columns["flags"].append(flags)
    return columns
