"""The estimate: exact where it is arithmetic, only for what is missing, refused where it cannot fit."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from runs import TINY, Finished
from transformers import AutoModel, Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig

from pipeline.config.run_file import RunConfig, load
from pipeline.errors import InputError
from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.sparsities.l1 import L1
from pipeline.numerics.spec import CrosscoderSpec
from pipeline.planning import shapes, sizes
from pipeline.planning.calibration import layer_seconds, matmul_flops, step_seconds
from pipeline.planning.estimate import Estimate, estimate, estimate_text
from pipeline.planning.rates import GPU_SHARE, GPUS, STEP_OVER_ENCODER
from pipeline.run.flow import build_flow
from pipeline.run.runner import inspect
from pipeline.stages.catalogue import DataSteps
from pipeline.stages.tokens import INDEX_SCHEMA, select, tokens_per_corpus
from pipeline.storage.filesystem import Storage
from pipeline.text.mixing import tokens_to_take
from pipeline.tracking.mlflow_tracker import safe_name
from pipeline.tracking.run_log import numeric


def test_planning_imports_nothing_heavy() -> None:
    code = "import sys, pipeline.planning.estimate; print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**TINY, "tokens": {"num_tokens": 10_000}, "storage": {"root": str(tmp_path)}}))
    return load(path)


def known(finished: Finished, *stages: str) -> tuple[DataSteps, dict[str, Any]]:
    """Steps of the finished run, and the records of some of its stages alone."""
    return build_flow(finished.config).data, {stage: finished.states[stage].record for stage in stages}


def gemma(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run file for a pair with the shape of Gemma-2-2b: configurations, no weights."""
    for name in ("base", "chat"):
        Gemma2Config().save_pretrained(folder / name)
    return {
        "name": "gemma",
        "preset": "gemma-2",
        "models": {name: {"source": str(folder / name)} for name in ("base", "chat")},
        "corpus": {"sources": [{"name": "web", "kind": "hub", "dataset": "a/b", "text_column": "text"}]},
        "tokens": {"num_tokens": 100_000_000},
        "activations": {"layer": 13},
        "crosscoders": [{"name": "btk", "expansion": 32, "sparsity": {"kind": "batch_topk", "k": 100}}],
        "training": {"precision": "bfloat16"},
        "analyses": {"causality": None},
        "resources": {"extraction": {"gpus": 1}, "training": {"gpus": 1}},
        "storage": {"root": str(folder / "runs")},
        **changes,
    }


def planned(folder: Path, tree: dict[str, Any], **options: str) -> Estimate:
    config = loaded(folder, tree)
    storage = Storage(config.storage.root)
    return estimate(config, inspect(config, storage), storage, **options)


def loaded(folder: Path, tree: dict[str, Any]) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load(path)


def test_a_generated_pair_is_known_before_it_is_built_and_every_stage_has_its_time(
    config: RunConfig, tmp_path: Path
) -> None:
    result = estimate(config, inspect(config, Storage(str(tmp_path))), Storage(str(tmp_path)))
    assert result.data is not None
    assert result.data.source == "known of the organism"
    assert result.data.num_tokens == 10_000
    assert result.data.num_rows == 10_000 - (result.data.num_documents or 0)
    assert result.num_bytes == result.data.num_rows * (2 * 32 * 2 + 24)
    parameters = 2 * (2 * 128 * 2 * 32)  # two crosscoders, encoder and decoder
    assert result.training_bytes_per_rank == parameters * 4 * 4 + int(2.5 * 256 * 128 * 4)
    assert result.checkpoint_bytes == parameters * 4 * (3 * 3 + 1)
    assert list(result.seconds) == [
        *("start", "organism", "corpus", "tokens", "activations", "crosscoder", "measurements"),
        *("evidence", "logit_lens", "causality", "steering", "report"),
    ]
    assert all(0 < seconds < float("inf") for seconds in result.seconds.values())


def test_a_stream_stores_the_validation_rows_alone(config: RunConfig, tmp_path: Path) -> None:
    data = build_flow(config).data
    section = config.activations.model_copy(update={"mode": "stream"})
    streaming = config.model_copy(update={"activations": section})
    streamed, stored = (sizes.data_size(c, data, {}, Storage(str(tmp_path))) for c in (streaming, config))
    assert streamed.num_rows == stored.num_rows == stored.stored_rows
    assert streamed.stored_rows == pytest.approx(stored.num_rows / 5, abs=1)  # a fifth is held out


@pytest.mark.ray
def test_a_finished_run_costs_nothing_more_and_no_model_is_read(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(shapes, "model_config")
    monkeypatch.delattr(sizes, "local_tokenizer")
    states = list(finished.states.values())
    result = estimate(finished.config, states, finished.storage)
    assert result.seconds == {}
    assert result.num_bytes == finished.counts("activations")["num_bytes"]
    assert "  total        0 s" in estimate_text(finished.config, states, finished.storage)
    assert result.data is not None
    assert result.data.num_rows == finished.counts("activations")["num_rows"]


@pytest.mark.ray
def test_rows_and_bytes_are_exact_once_tokens_exist(finished: Finished) -> None:
    data, records = known(finished, "organism", "corpus", "tokens")
    read = sizes.data_size(finished.config, data, records, finished.storage)
    counts = finished.counts("activations")
    assert (read.num_tokens, read.num_rows) == (finished.counts("tokens")["num_tokens"], counts["num_rows"])
    width = counts["activation_dim"]
    assert sizes.store_bytes(read.num_rows, width, "none") == pytest.approx(counts["num_bytes"], rel=0.02)


@pytest.mark.ray
def test_a_sample_of_the_corpus_comes_close(finished: Finished) -> None:
    data, records = known(finished, "organism", "corpus")
    read = sizes.data_size(finished.config, data, records, finished.storage)
    assert read.source == "sampled"
    assert read.num_tokens == pytest.approx(finished.counts("tokens")["num_tokens"], rel=0.05)
    guessed = sizes.data_size(finished.config, data, {}, finished.storage)
    assert guessed.source == "known of the organism"
    assert guessed.num_tokens == pytest.approx(read.num_tokens, rel=0.05)


@pytest.mark.parametrize("mixing", ["by_weight", "everything"])
@pytest.mark.parametrize("budget", [None, 900, 4000])
def test_mixing_is_predicted_as_it_is_done(mixing: str, budget: int | None) -> None:
    lengths = {"web": [3] * 500, "chat": [2] * 300}
    columns = {
        "doc_id": list(range(800)),
        "corpus": ["web"] * 500 + ["chat"] * 300,
        "split": ["train"] * 800,
        "num_tokens": [length for own in lengths.values() for length in own],
        "num_history": [0] * 800,
        "part": ["p"] * 800,
        "row": list(range(800)),
    }
    weights = {"web": 2.0, "chat": 1.0}
    used = select(pa.table(columns).cast(INDEX_SCHEMA), weights, budget, mixing=mixing)
    predicted = tokens_to_take({name: sum(own) for name, own in lengths.items()}, weights, budget, mixing=mixing)
    for name, tokens in tokens_per_corpus(used).items():
        assert predicted[name] == pytest.approx(tokens, abs=3)


@pytest.mark.parametrize(("compression", "expected"), [("none", 4 * 96 + 24), ("int8", 2 * (96 + 4) + 24)])
def test_compressed_rows_are_counted(compression: str, expected: int) -> None:
    assert sizes.store_bytes(1000, 96, compression) == 1000 * expected
    assert sizes.store_bytes(1000, 96, "int8") < sizes.store_bytes(1000, 96, "lossless") < 1000 * (4 * 96 + 24)


def test_latent_ranks_share_the_memory(config: RunConfig) -> None:
    training = config.resources.training.model_copy(update={"latent": 2})
    split = config.model_copy(update={"resources": config.resources.model_copy(update={"training": training})})
    assert sizes.training_bytes(split, 32) == pytest.approx(sizes.training_bytes(config, 32) / 2, rel=1e-6)


def test_a_real_pair_on_a_gpu_that_is_not_here_is_told_in_hours(tmp_path: Path) -> None:
    result = planned(tmp_path, gemma(tmp_path))
    rows = 100_000_000
    assert result.num_bytes == rows * (2 * 2304 * 2 + 24)  # 9.2 kB a row
    attention, mlp = 2304 * 256 * (2 * 8 + 2 * 4), 3 * 2304 * 9216
    extraction = rows * 2 * 13 * 2 * (attention + mlp) / (GPU_SHARE.value * GPUS["A100"].bfloat16)
    assert result.seconds["activations"] > extraction > 3000
    training = STEP_OVER_ENCODER.value * 200_000_000 * 2 * 2 * 2304 * 73_728 / (GPU_SHARE.value * GPUS["A100"].bfloat16)
    assert 3 * training > result.seconds["crosscoder"] > training > 1500  # curves and start-up depend on this machine
    faster = planned(tmp_path, gemma(tmp_path), gpu="H100")
    assert faster.seconds["crosscoder"] < result.seconds["crosscoder"]
    assert (result.training_bytes_per_rank or 0) > 2 * 73_728 * 2 * 2304 * 16
    assert (result.extraction_bytes_per_worker or 0) > 2 * 13 * 77e6 * 2


def test_an_unknown_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--gpu: expected one of T4, .*, got 'A1000'"):
        planned(tmp_path, gemma(tmp_path), gpu="A1000")


def test_a_corpus_of_unknown_size_is_said(tmp_path: Path) -> None:
    config = loaded(tmp_path, gemma(tmp_path, tokens={}))
    storage = Storage(config.storage.root)
    text = estimate_text(config, inspect(config, storage), storage)
    assert "what depends on the number of tokens" in text
    assert "assumed      A100 at 40% of its data sheet" in text


def test_a_store_that_does_not_fit_is_refused_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = loaded(tmp_path, gemma(tmp_path))
    storage = Storage(config.storage.root)
    monkeypatch.setattr(Storage, "free_bytes", lambda _: 700_000_000_000)
    with pytest.raises(InputError) as refused:
        estimate_text(config, inspect(config, storage), storage)
    line = str(refused.value)
    assert "expected 924 GB of free space for the activations, got 700 GB" in line
    assert f"tokens.num_tokens: {int(1e8 * 700e9 / (1e8 * (2 * 2304 * 2 + 24)) * 0.98):,} fit" in line
    assert "activations.compression: lossless (620 GB) fits" in line
    assert "activations.compression: int8 (464 GB) fits" in line
    assert "activations.mode: stream (92.4 GB) fits" in line
    assert "set storage.root elsewhere" in line
    assert not (tmp_path / "runs").exists()


def test_a_speed_is_measured_for_small_and_for_huge_sizes() -> None:
    small = CrosscoderSpec(num_models=2, activation_dim=32, num_latents=256, num_steps=10, sparsity=BatchTopK(k=8))
    huge = CrosscoderSpec(num_models=2, activation_dim=2304, num_latents=73_728, num_steps=10)
    flops = matmul_flops(1, side=256)
    seconds = step_seconds(small, 256, num_threads=1, flops=flops)
    assert (
        0 < seconds < step_seconds(dataclasses.replace(small, sparsity=L1(mu=0.0)), 256, num_threads=1, flops=flops) * 9
    )
    assert step_seconds(huge, 2048, num_threads=1, flops=flops) > 100 * seconds


def test_every_architecture_has_a_shape_and_a_layer_that_can_be_timed() -> None:
    sizes_of = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    for model_config in (
        Gemma2Config(**sizes_of, num_key_value_heads=2, head_dim=8, vocab_size=97),
        LlamaConfig(**sizes_of, num_key_value_heads=2, vocab_size=97),
        GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=97),
        GPTNeoXConfig(**sizes_of, vocab_size=97),
    ):
        shape = shapes.shape_of(model_config)
        model = AutoModel.from_config(model_config)
        layers = [parameter.numel() for name, parameter in model.named_parameters() if ".0." in name or "h.0" in name]
        assert (shape.width, shape.num_layers) == (32, 3)
        assert shape.layer_parameters[0] == sum(layers)
        assert layer_seconds(model_config, (2, 5), dtype="float32", num_threads=1, flops=1e9) > 0


def test_numbers_of_nested_counts_get_names_that_mlflow_takes() -> None:
    counts = {"a": {"b": 1, "c": float("nan")}, "flag": True, "text": "x", "dropped": {"too (long)": 2}}
    found = numeric(counts)
    assert found == {"a/b": 1.0, "dropped/too (long)": 2.0}
    assert safe_name("a/b") == "a/b" and safe_name("dropped/too (long)").startswith("dropped/too _long_")


def test_questions_to_a_language_model_are_counted_and_priced(config: RunConfig, tmp_path: Path) -> None:
    tree = config.model_dump(mode="json")
    tree["analyses"]["autointerp"] = {"model": "m", "latents": [1, 2, 3], "contexts_per_request": 5}
    tree["resources"]["autointerp"] |= {"base_url": "http://host/v1", "price_in": 1.0, "price_out": 2.0}
    asking = RunConfig.model_validate(tree)
    storage = Storage(str(tmp_path))
    (line,) = (
        one for one in estimate_text(asking, inspect(asking, storage), storage).splitlines() if "requests" in one
    )
    # Two crosscoders, three latents each, one explanation, 12 contexts judged twice (with control) in fives.
    assert line.strip().startswith("autointerp   at most 42 requests, about ")
    assert line.endswith("at the configured prices, to http://host/v1")
