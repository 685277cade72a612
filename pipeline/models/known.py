"""Models whose configurations are known here, so that a pair of them is drafted and planned without a network.

Numbers are those of the published config.json. What is loaded is never taken from here.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class KnownModel(NamedTuple):
    """The size of a published model."""

    preset: str
    """Family in config/presets.py."""
    model_type: str
    """As transformers names the architecture."""
    width: int
    num_layers: int
    num_heads: int
    num_key_heads: int
    head_width: int
    inner_width: int
    vocab_size: int


_GEMMA_2B = KnownModel("gemma-2", "gemma2", 2304, 26, 8, 4, 256, 9216, 256_000)
_GEMMA_9B = KnownModel("gemma-2", "gemma2", 3584, 42, 16, 8, 256, 14_336, 256_000)
_LLAMA_1B = KnownModel("llama-3.2", "llama", 2048, 16, 32, 8, 64, 8192, 128_256)
_LLAMA_8B = KnownModel("llama-3.1", "llama", 4096, 32, 32, 8, 128, 14_336, 128_256)
_LLAMA_70B = KnownModel("llama-3.1", "llama", 8192, 80, 64, 8, 128, 28_672, 128_256)
_QWEN_1B = KnownModel("qwen-2.5", "qwen2", 1536, 28, 12, 2, 128, 8960, 151_936)
_QWEN_8B = KnownModel("qwen-3", "qwen3", 4096, 36, 32, 8, 128, 12_288, 151_936)

KNOWN: Mapping[str, KnownModel] = {
    "google/gemma-2-2b": _GEMMA_2B,
    "google/gemma-2-2b-it": _GEMMA_2B,
    "google/gemma-2-9b": _GEMMA_9B,
    "google/gemma-2-9b-it": _GEMMA_9B,
    "meta-llama/Llama-3.2-1B": _LLAMA_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_1B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_70B,
    "Qwen/Qwen2.5-1.5B": _QWEN_1B,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN_1B,
    "Qwen/Qwen3-8B-Base": _QWEN_8B,
    "Qwen/Qwen3-8B": _QWEN_8B,
}
"""The models of the ready pairs in workloads/, by hub id."""


def known_config(source: str) -> Any:
    """A transformers configuration with the numbers of a model of KNOWN."""
    from transformers import AutoConfig

    model = KNOWN[source]
    return AutoConfig.for_model(
        model.model_type,
        hidden_size=model.width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_key_heads,
        head_dim=model.head_width,
        intermediate_size=model.inner_width,
        vocab_size=model.vocab_size,
    )
