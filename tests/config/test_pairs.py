"""The run files for real pairs are loaded and planned without a network: the models' shapes are written here."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import Gemma2Config, LlamaConfig, Qwen2Config, Qwen3Config

from pipeline.config.run_file import load
from pipeline.planning.estimate import estimate
from pipeline.run.runner import inspect
from pipeline.storage.filesystem import Storage

FOLDER = Path(__file__).parent.parent.parent / "workloads" / "pairs"


class Shape(NamedTuple):
    """What the models' published configurations say of their size."""

    kind: type[Any]
    width: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    inner: int
    vocabulary: int

    def save(self, folder: Path) -> str:
        """A folder with this configuration alone."""
        self.kind(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_width,
            intermediate_size=self.inner,
            vocab_size=self.vocabulary,
        ).save_pretrained(folder)
        return str(folder)


SHAPES = {
    "gemma-2-2b": Shape(Gemma2Config, 2304, 26, 8, 4, 256, 9216, 256_000),
    "gemma-2-9b": Shape(Gemma2Config, 3584, 42, 16, 8, 256, 14_336, 256_000),
    "llama-3.2-1b": Shape(LlamaConfig, 2048, 16, 32, 8, 64, 8192, 128_256),
    "llama-3.1-8b": Shape(LlamaConfig, 4096, 32, 32, 8, 128, 14_336, 128_256),
    "llama-3.1-70b": Shape(LlamaConfig, 8192, 80, 64, 8, 128, 28_672, 128_256),
    "qwen-2.5-1.5b": Shape(Qwen2Config, 1536, 28, 12, 2, 128, 8960, 151_936),
    "lora": Shape(Qwen2Config, 1536, 28, 12, 2, 128, 8960, 151_936),
    "qwen-3-8b": Shape(Qwen3Config, 4096, 36, 32, 8, 128, 12_288, 151_936),
}
BYTES_PER_GPU = 80e9


def test_every_pair_has_its_shape() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SHAPES)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_pair_is_planned_and_fits_its_hardware(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    source = shape.save(tmp_path / "model")
    settings = [f"models.base.source={source}", f"models.chat.source={source}", f"storage.root={tmp_path / 'runs'}"]
    config = load(FOLDER / f"{name}.yaml", settings)
    assert config.activations.layer == shape.layers // 2  # as the paper's runs: the middle layer
    storage = Storage(config.storage.root)
    predicted = estimate(config, inspect(config, storage), storage, gpu="H100")
    assert predicted.data is not None and predicted.training_bytes_per_rank is not None
    assert 0.9 * 102e6 < predicted.data.num_tokens <= 102e6
    per_row = 2 * 2 * shape.width
    assert predicted.num_bytes is not None and predicted.num_bytes <= 1.02 * 102e6 * per_row
    if config.activations.mode == "stream":
        assert predicted.num_bytes < 0.05 * 102e6 * per_row
    assert predicted.training_bytes_per_rank < BYTES_PER_GPU
    assert predicted.extraction_bytes_per_worker is not None
    assert predicted.extraction_bytes_per_worker < BYTES_PER_GPU * config.resources.extraction.gpus
    assert {"corpus", "tokens", "activations", "crosscoder", "causality"} <= set(predicted.seconds)
