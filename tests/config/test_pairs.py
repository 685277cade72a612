"""The run files for real pairs are loaded and planned without a network: models/known.py has the shapes."""

from pathlib import Path

import pytest

from pipeline.config.run_file import load
from pipeline.models.known import KNOWN, known_config
from pipeline.planning.estimate import estimate
from pipeline.run.runner import inspect
from pipeline.storage.filesystem import Storage

FOLDER = Path(__file__).parent.parent.parent / "workloads" / "pairs"


SHAPES = {
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-9b": "google/gemma-2-9b",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "qwen-2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "lora": "Qwen/Qwen2.5-1.5B",
    "qwen-3-8b": "Qwen/Qwen3-8B",
}
BYTES_PER_GPU = 80e9


def test_every_pair_has_its_shape() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SHAPES)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_pair_is_planned_and_fits_its_hardware(name: str, tmp_path: Path) -> None:
    shape = KNOWN[SHAPES[name]]
    source = str(tmp_path / "model")
    known_config(SHAPES[name]).save_pretrained(source)
    settings = [f"models.base.source={source}", f"models.chat.source={source}", f"storage.root={tmp_path / 'runs'}"]
    config = load(FOLDER / f"{name}.yaml", settings)
    assert config.activations.layer == shape.num_layers // 2  # as the paper's runs: the middle layer
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
