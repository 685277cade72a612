"""Sources that are on this machine are sampled before a run has read them; mixtures of experts are counted whole."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from pipeline.config.run_file import load
from pipeline.planning import calibration, sizes
from pipeline.planning.estimate import estimate, estimate_text
from pipeline.planning.remarks import slow_dtype
from pipeline.planning.shapes import model_config, shape_of
from pipeline.run.flow import build_flow
from pipeline.run.runner import inspect
from pipeline.storage.filesystem import Storage

NUM_WORDS = 30
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} end {% endfor %}"


def words(number: int, length: int) -> str:
    return " ".join(f"w{(number * 7 + place) % NUM_WORDS} x{number}" for place in range(length // 2))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A run file for two configurations with a tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate(["?", *(f"w{i}" for i in range(NUM_WORDS)), "user", "assistant"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name in ("base", "chat"):
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
        AutoModelForCausalLM.from_config(LlamaConfig(**shape, vocab_size=64)).save_pretrained(tmp_path / name)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", chat_template=TEMPLATE)
        fast.save_pretrained(tmp_path / name)

    def make(*sources: dict[str, Any], **changes: Any) -> dict[str, Any]:
        return {
            "name": "sampled",
            "models": {name: {"source": str(tmp_path / name)} for name in ("base", "chat")},
            "corpus": {"sources": list(sources), "validation_frac": 0.2},
            "tokens": {"mixing": "everything"},
            "activations": {"layer": 1},
            "crosscoders": [{"name": "btk", "num_latents": 64, "sparsity": {"kind": "batch_topk", "k": 4}}],
            "training": {"num_rows": 20_000, "batch_rows": 1000},
            "analyses": {"causality": None},
            "storage": {"root": str(tmp_path / "runs")},
            **changes,
        }

    return make


def size_of(folder: Path, tree: dict[str, Any]) -> sizes.DataSize:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = load(path)
    found = sizes.data_size(config, build_flow(config).data, {}, Storage(config.storage.root))
    assert found is not None and not (folder / "runs").exists()
    return found


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("number", [40, 9000])
def test_local_files_are_sampled(tmp_path: Path, tree: Any, suffix: str, number: int) -> None:
    lengths = [20 + 20 * (i % 5) for i in range(number)]
    write(tmp_path / f"web{suffix}", [{"text": words(i, length)} for i, length in enumerate(lengths)])
    kind = "parquet" if suffix == ".parquet" else "jsonl"
    source = {"name": "web", "kind": kind, "paths": [str(tmp_path / f"web{suffix}")], "text_column": "text"}
    found = size_of(tmp_path, tree(source))
    assert found.source == sizes.SAMPLED
    assert found.num_documents == pytest.approx(number, rel=0 if number == 40 else 0.15)
    assert found.num_tokens == pytest.approx(sum(lengths), rel=0 if number == 40 else 0.15)
    assert found.dialogues is not None and found.dialogues.num_tokens == 0


def test_dialogues_filters_limits_and_several_files_are_seen(tmp_path: Path, tree: Any) -> None:
    for part in range(3):
        rows = [{"text": words(i, 40), "lang": ["en", "de"][i % 2]} for i in range(100 * part, 100 * part + 100)]
        write(tmp_path / f"web-{part}.jsonl", rows)
    turns = [[{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": f"a{i} w3 w4"}] for i in range(50)]
    write(tmp_path / "chat.parquet", [{"messages": own} for own in turns])
    web = {"name": "web", "kind": "jsonl", "paths": [str(tmp_path / "web-*.jsonl")], "text_column": "text"}
    chat = {"name": "chat", "kind": "parquet", "paths": [str(tmp_path / "chat.parquet")], "messages_column": "messages"}
    found = size_of(tmp_path, tree(web | {"where": {"lang": "en"}}, chat | {"max_documents": 20}))
    assert found.num_documents == 150 + 20
    assert found.num_tokens == 150 * 40 + 20 * (5 + 6)
    assert found.dialogues is not None
    assert (found.dialogues.num_documents, found.dialogues.num_tokens) == (20, 20 * 11)
    assert found.dialogues.assistant_frac == pytest.approx(3 / 11, abs=0.1)


def test_without_a_tokenizer_characters_are_counted_and_said(tmp_path: Path, tree: Any) -> None:
    write(tmp_path / "web.jsonl", [{"text": f"{i:09d}" * 5} for i in range(50)])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "chat" / name).unlink()
    source = {"name": "web", "kind": "jsonl", "paths": [str(tmp_path / "web.jsonl")], "text_column": "text"}
    found = size_of(tmp_path, tree(source))
    assert (found.source, found.num_documents, found.num_tokens) == (sizes.ASSUMED, 50, 500)
    assert "4.5 characters a token" in found.source


def test_every_stage_of_a_fresh_run_has_its_time_and_idle_workers_are_told(tmp_path: Path, tree: Any) -> None:
    write(tmp_path / "web.jsonl", [{"text": words(i, 40)} for i in range(300)])
    source = {"name": "web", "kind": "jsonl", "paths": [str(tmp_path / "web.jsonl")], "text_column": "text"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree(source, resources={"cluster": {"num_cpus": 2}})))
    config = load(path)
    storage = Storage(config.storage.root)
    text = estimate_text(config, inspect(config, storage), storage)
    stages = [line.split()[0] for line in text.splitlines()]
    assert stages[stages.index("start") : stages.index("total")] == [
        *("start", "corpus", "tokens", "activations", "crosscoder", "measurements", "evidence", "logit_lens"),
        "report",
    ]
    assert "what depends on the number of tokens" not in text
    assert "activations.rows_per_shard: 50,000 makes 1 of about 11,700 rows, but 2 workers" in text


@pytest.mark.parametrize(
    ("flops", "asked", "is_told"),
    [
        ({"float32": 6e10, "bfloat16": 1e10}, {}, True),
        ({"float32": 6e10, "bfloat16": 5e10}, {}, False),
        ({"float32": 6e10, "bfloat16": 1e10}, {"resources": {"extraction": {"gpus": 1}}}, False),
    ],
    ids=["slow", "as fast", "on a GPU"],
)
def test_a_format_that_this_cpu_has_no_instructions_for_is_told(
    tmp_path: Path,
    tree: Any,
    monkeypatch: pytest.MonkeyPatch,
    flops: dict[str, float],
    asked: dict[str, Any],
    is_told: bool,
) -> None:
    monkeypatch.setattr(calibration, "matmul_flops", lambda *_, dtype: flops[dtype])
    write(tmp_path / "web.jsonl", [{"text": "w1"}])
    source = {"name": "web", "kind": "jsonl", "paths": [str(tmp_path / "web.jsonl")], "text_column": "text"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree(source, **asked)))
    config = load(path)
    told = slow_dtype(config, build_flow(config).steps)
    assert (told is not None) == is_told
    assert told is None or told.startswith("models.dtype: bfloat16 takes 6.0 times")


def test_a_known_pair_of_the_hub_is_planned_without_a_network(
    tmp_path: Path, tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    write(tmp_path / "web.jsonl", [{"text": words(i, 40)} for i in range(300)])
    source = {"name": "web", "kind": "jsonl", "paths": [str(tmp_path / "web.jsonl")], "text_column": "text"}
    models = {"base": {"source": "google/gemma-2-2b"}, "chat": {"source": "google/gemma-2-2b-it"}}
    pools = {"extraction": {"gpus": 1}, "training": {"gpus": 1}}
    path = tmp_path / "run.yaml"
    changes = {"analyses": {"causality": None, "evidence": None}, "activations": {"layer": 13}}
    path.write_text(yaml.safe_dump(tree(source, models=models, resources=pools, **changes)))
    config, storage = load(path), Storage(str(tmp_path / "runs"))
    shape = shape_of(model_config(config, build_flow(config).data, {}, storage))
    assert (shape.width, shape.num_layers) == (2304, 26)
    assert shape.layer_parameters[13] == pytest.approx(77.9e6, rel=0.001)
    assert estimate(config, inspect(config, storage), storage).seconds["activations"] > 0


def test_all_experts_are_in_memory_and_few_are_used() -> None:
    common = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    mixtral = MixtralConfig(**common, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2, vocab_size=97)
    qwen = Qwen3MoeConfig(
        **common, moe_intermediate_size=16, num_experts=16, num_experts_per_tok=4, vocab_size=97, head_dim=8
    )
    for config, expert in ((mixtral, 8 * 3 * 32 * 48), (qwen, 16 * 3 * 32 * 16)):
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        shape = shape_of(config)
        assert sum(shape.layer_parameters) == sum(p.numel() for n, p in model.named_parameters() if "layers." in n)
        whole = shape.layer_parameters[0]
        assert shape.active_parameters == pytest.approx(whole - expert * (1 - 1 / 4))
