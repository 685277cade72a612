"""The evidence of a run: how different its models are at all, and what follows for the verdict."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from compared_pairs import rescaled
from runs import TINY, Finished, copied, make, run_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.analyses.distance import DISTANCE_COLUMNS, KL_FLOOR
from pipeline.analyses.evidence import STREAM_COLUMNS
from pipeline.config.run_file import load
from pipeline.errors import InputError
from pipeline.run import runner
from pipeline.run.flow import build_layers_flow
from pipeline.schema import Verdict
from pipeline.storage.artifacts import read_record
from pipeline.storage.filesystem import Storage
from pipeline.terminal import SilentReporter
from pipeline.tracking.tracker import RecordingTracker

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FACTOR = 8.0
BATCH_TOPK = TINY["crosscoders"][1]


def save_rescaled_pair(folder: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """A Llama and itself with a stream of FACTOR times the size, saved with the organism's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    base = LlamaForCausalLM(config).requires_grad_(False)
    for parameter in base.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    chat = rescaled(base, FACTOR, with_eps=False)
    chat.config.rms_norm_eps = config.rms_norm_eps * FACTOR**2
    for name, model in (("base", base), ("chat", chat)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: {"source": str(folder / name)} for name in ("base", "chat")} | {"dtype": "float32"}


def test_a_pair_that_differs_says_by_how_much_before_anything_is_fitted(finished: Finished) -> None:
    counts = finished.counts("evidence")
    distance = finished.table("evidence", "distance.parquet").set_index("tokens")
    streams = finished.table("evidence", "streams.parquet").set_index("measure")
    assert counts["is_distinguishable"]
    assert set(distance.index) == {"all", "assistant", "corpus documents", "corpus dialogues"}
    assert list(distance.reset_index()) == [column.name for column in DISTANCE_COLUMNS]
    assert list(streams.reset_index()) == [column.name for column in STREAM_COLUMNS]
    assert distance.loc["all", "kl"] == counts["kl"]["all"] > KL_FLOOR
    assert counts["disagreement"]["assistant"] == distance.loc["assistant", "disagreement"]
    assert counts["streams"]["difference"] == streams.loc["difference", "value"] > 0
    said = finished.reporter.messages
    place = next(number for number, line in enumerate(said) if line == f"evidence: {counts['reason']}")
    assert place < next(number for number, line in enumerate(said) if line.startswith("crosscoder "))
    assert counts["reason"] in finished.outcome.verdict
    assert finished.outcome.verdict.startswith("tiny: ")
    parent = next(run for run in finished.tracker.runs.values() if run.parent is None)
    assert {"evidence/is_distinguishable", "evidence/kl/all"} <= {point.name for point in parent.points}


def test_any_number_of_workers_and_either_mode_give_the_same_numbers(finished: Finished, tmp_path: Path) -> None:
    """The rows of stream mode are those of the store; only the step before it is another one."""
    tables = {}
    for mode, workers in (("store", 2), ("stream", 1)):
        folder = tmp_path / f"{mode}_{workers}"
        folder.mkdir()
        kept = ("organism", "corpus", "tokens", "activations")
        root = copied(finished, folder, *(kept if mode == "store" else kept[:3]))
        activations = {**TINY["activations"], "mode": mode}
        resources = {**TINY["resources"], "analyses": {"workers": workers}}
        config = load(run_file(folder, str(root), activations=activations, resources=resources))
        make(config, "evidence", *(["activations"] if mode == "stream" else []))
        (path,) = root.glob("evidence/*/distance.parquet")
        tables[mode, workers] = [
            pd.read_parquet(path.parent / name) for name in ("distance.parquet", "streams.parquet")
        ]
    for other in tables.values():
        for ours, theirs in zip(
            other, (finished.table("evidence", f"{n}.parquet") for n in ("distance", "streams")), strict=True
        ):
            pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


def test_where_the_models_cannot_be_told_apart_no_latent_is_called_chat_specific(
    finished: Finished, tmp_path: Path
) -> None:
    """A rule that would call any latent chat-specific, on a difference SAE of a model and its rescaled copy."""
    root = copied(finished, tmp_path, "organism", "corpus")
    models = save_rescaled_pair(tmp_path, next(root.glob("organism/*/chat")))
    crosscoders = [
        {**BATCH_TOPK, "name": "batch_topk"},
        {**BATCH_TOPK, "name": "difference", "inputs": "difference", "normalisation": "none"},
    ]
    analyses = {
        **dict.fromkeys(("causality", "steering", "planted", "examples", "controls")),
        "latent_scaling": {"num_resamples": 100, "nu_eps_threshold": 50, "nu_r_threshold": 50},
    }
    config_path = run_file(tmp_path, str(root), models=models, crosscoders=crosscoders, analyses=analyses)
    config = load(config_path)
    outcome = runner.run(config, SilentReporter(), RecordingTracker())
    states = {state.step.name: state for state in runner.inspect(config, Storage(str(root)))}
    record = states["evidence"].record
    assert record is not None and not record.counts["is_distinguishable"]
    assert record.counts["streams"]["scale_ratio"] == pytest.approx(FACTOR, rel=1e-3)
    assert record.counts["kl"]["all"] < KL_FLOOR
    num_withheld = 0
    for name in ("batch_topk", "difference"):
        table = pd.read_parquet(root / states[f"latents {name}"].step.key.folder / "latents.parquet")
        assert not (table["verdict"] == Verdict.CHAT_SPECIFIC).any()
        withheld = table[table["verdict"] == Verdict.WITHHELD]
        assert not withheld["is_confident"].any()
        assert (withheld["reason"] == record.counts["reason"]).all()
        num_withheld += len(withheld)
    assert num_withheld > 0
    first, second = outcome.verdict.splitlines()[:2]
    assert "cannot be told apart" in first and "no latent is called chat-specific" in first
    assert f"{num_withheld} call" in first and record.counts["reason"] in first
    assert second.startswith("tiny: ")
    assert first in Path(outcome.report_path).read_text()
    with pytest.raises(InputError, match=r"activations.layer: auto: No layer is recommended. The two models cannot be"):
        runner.with_layer(load(config_path, ["activations.layer=auto"]), SilentReporter())


def test_the_layer_is_measured_and_taken_before_anything_else(finished: Finished, tmp_path: Path) -> None:
    root = copied(finished, tmp_path, "organism", "corpus", "tokens")
    measured = {**TINY["analyses"], "layers": {"num_documents": 20}}
    config = load(run_file(tmp_path, str(root), activations={"layer": "auto"}, analyses=measured))
    storage = Storage(str(root))
    with pytest.raises(InputError, match=r"activations.layer: expected a number, got auto"):
        runner.inspect(config, storage)
    curve = runner.layers(config, SilentReporter())
    assert curve.layer is not None and curve.reason and len(curve.table.splitlines()) == 1 + 3
    chosen = runner.with_layer(config, SilentReporter())
    assert chosen.activations.layer == curve.layer
    by_number = load(run_file(tmp_path, str(root), activations={"layer": curve.layer}, analyses=measured))
    fingerprints = [
        [state.step.key.fingerprint for state in runner.inspect(one, storage)] for one in (config, chosen, by_number)
    ]
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]
    record = read_record(storage, build_layers_flow(config).layers.key)
    assert record is not None and set(record.counts["share"]) == {"0", "1", "2"}
