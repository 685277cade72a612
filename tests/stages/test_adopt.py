"""Someone else's crosscoder enters at the analyses: the same latents as when it was fitted here, or one clear line."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from runs import TINY, Finished, copied, run_file
from safetensors.torch import load_file, save_file

from pipeline.config.crosscoder import AdoptedCrosscoderSection
from pipeline.config.data import HubModel
from pipeline.config.run_file import load
from pipeline.errors import InputError
from pipeline.run import runner
from pipeline.run.flow import build_flow
from pipeline.run.runner import Unlogged
from pipeline.stages import adopt
from pipeline.stages.finished_crosscoder import open_crosscoder
from pipeline.stages.locations import ModelPairLocation, locate
from pipeline.stages.step import StageContext
from pipeline.storage.filesystem import Storage
from pipeline.terminal import SilentReporter
from pipeline.tracking.tracker import RecordingTracker

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def published(finished: Finished, tmp_path: Path) -> Path:
    """The finished run's BatchTopK crosscoder as a stranger would publish it: weights and settings, nothing else."""
    folder = tmp_path / "published"
    with open_crosscoder(finished.storage, finished.states["crosscoder batch_topk"].step.key.folder) as crosscoder:
        crosscoder.save_pretrained(folder)
    return folder


@pytest.fixture
def rows_only(finished: Finished, tmp_path: Path) -> Path:
    """A root that holds the finished run up to its activations."""
    return copied(finished, tmp_path, "organism", "corpus", "tokens", "activations")


def adopting(folder: Path, root: Path, source: Path, **entry: Any) -> Path:
    analyses = {"latent_scaling": {"num_resamples": 100}, "causality": None, "examples": None}
    entries = [{"name": "theirs", "kind": "adopted", "source": str(source), **entry}]
    return run_file(folder, str(root), crosscoders=entries, analyses=analyses, tracking={"kind": "none"})


def in_layout_of_weights_and_cfg(folder: Path, target: Path) -> Path:
    """The weights of a published folder in the other published layout, cfg.json and cc_weights.pt."""
    tensors = load_file(folder / "model.safetensors")
    target.mkdir()
    W_dec = tensors["decoder.weight"].transpose(0, 1).contiguous()
    weights = {"W_enc": tensors["encoder.weight"], "b_enc": tensors["encoder.bias"]}
    torch.save({**weights, "W_dec": W_dec, "b_dec": tensors["decoder.bias"]}, target / "cc_weights.pt")
    (target / "cfg.json").write_text(json.dumps({"d_in": W_dec.shape[2], "dict_size": len(W_dec)}))
    return target


def test_an_adopted_crosscoder_gets_the_latent_table_that_it_got_where_it_was_fitted(
    finished: Finished, published: Path, rows_only: Path, tmp_path: Path
) -> None:
    config = load(adopting(tmp_path, rows_only, published))
    storage, tracker = Storage(str(rows_only)), RecordingTracker()
    outcome = runner.run(config, SilentReporter(), tracker)
    states = {state.step.name: state for state in runner.inspect(config, storage)}
    folder = states["latents theirs"].step.key.folder
    pd.testing.assert_frame_equal(
        pd.read_parquet(rows_only / folder / "latents.parquet"),
        finished.table("latents batch_topk", "latents.parquet"),
    )
    record = states["crosscoder theirs"].record
    assert record is not None
    assert record.counts["num_latents"] == 128
    assert record.counts["sparsity"] == "batch_topk"
    assert "theirs" in outcome.verdict
    child = next(run for run in tracker.runs.values() if run.name == "crosscoder theirs")
    assert child.models
    assert {point.name for point in child.points} >= {"num_latents", "fve_first_rows"}
    again = runner.run(config, SilentReporter(), RecordingTracker())
    assert again.num_made == 0


def test_its_content_is_its_identity(finished: Finished, published: Path, tmp_path: Path) -> None:
    """A copy elsewhere under another name is the same; another number in the weights is not."""

    def fingerprint(source: Path, **entry: Any) -> str:
        config = load(adopting(tmp_path, finished.root, source, **entry))
        return next(
            state.step.key.fingerprint
            for state in runner.inspect(config, finished.storage)
            if state.step.key.stage == "crosscoder"
        )

    before = fingerprint(published)
    copy = shutil.copytree(published, tmp_path / "copy")
    assert fingerprint(copy, name="renamed") == fingerprint(copy / "model.safetensors") == before
    tensors = load_file(copy / "model.safetensors")
    tensors["decoder.bias"][0, 0] += 1
    save_file(tensors, copy / "model.safetensors")
    assert fingerprint(copy) != before


def test_a_layout_without_scales_is_scaled_by_the_rows_that_it_reads(
    finished: Finished, published: Path, tmp_path: Path
) -> None:
    source = in_layout_of_weights_and_cfg(published, tmp_path / "scaled")
    record = finished.states["activations"].record
    assert record is not None
    section = AdoptedCrosscoderSection(kind="adopted", name="theirs", source=str(source))
    crosscoder, scale = adopt.load(section, record)
    expected = [32**0.5 / record.counts[f"mean_norm_{name}"] for name in ("base", "chat")]
    assert scale == pytest.approx(expected)
    assert crosscoder.scale_M.tolist() == pytest.approx(expected)
    given = adopt.load(section.model_copy(update={"activation_scale": (0.5, 0.25)}), record)
    assert given[0].scale_M.tolist() == [0.5, 0.25]


def test_a_crosscoder_of_another_width_or_number_of_models_is_refused_in_one_line(
    published: Path, rows_only: Path, tmp_path: Path
) -> None:
    tensors = load_file(published / "model.safetensors")
    narrow = {name: value[:, :20] for name, value in tensors.items() if name in ("encoder.weight", "decoder.bias")}
    narrow["decoder.weight"] = tensors["decoder.weight"][..., :20]
    single = {name: tensors[name][:1] for name in ("encoder.weight", "decoder.weight", "decoder.bias")}
    for changed, expected in ((narrow, "got M = 2 and D = 20"), (single, "got M = 1 and D = 32")):
        kept = {name: tensors[name] for name in ("encoder.bias", "k", "threshold")}
        save_file(
            {name: value.contiguous() for name, value in {**kept, **changed}.items()}, published / "model.safetensors"
        )
        (published / "config.json").unlink(missing_ok=True)
        config = load(adopting(tmp_path, rows_only, published))
        with pytest.raises(
            InputError, match=f"crosscoder 'theirs': source: expected a crosscoder of M = 2.*{expected}"
        ):
            runner.run(config, SilentReporter(), RecordingTracker())
        assert not list(rows_only.glob("crosscoder/*/*"))


def test_a_folder_without_weights_or_with_half_of_them_is_refused_when_planned(
    finished: Finished, published: Path, tmp_path: Path
) -> None:
    config = load(adopting(tmp_path, finished.root, published))
    weights = published / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    with pytest.raises(InputError, match=r"crosscoder 'theirs': source: expected model\.safetensors or cc_weights\.pt"):
        runner.inspect(config, finished.storage)
    with pytest.raises(InputError, match="crosscoder 'theirs': source: expected a hub id, an existing folder"):
        runner.inspect(load(adopting(tmp_path, finished.root, tmp_path / "absent")), finished.storage)
    save_file({name: value for name, value in tensors.items() if name != "encoder.bias"}, weights)
    with pytest.raises(InputError, match=r"crosscoder 'theirs': source: .*encoder\.bias is missing"):
        adopt.read_checkpoint(AdoptedCrosscoderSection(kind="adopted", name="theirs", source=str(published)), 32)


def test_a_crosscoder_of_other_rows_is_adopted_with_a_warning(published: Path, rows_only: Path, tmp_path: Path) -> None:
    tensors = load_file(published / "model.safetensors")
    tensors["decoder.weight"] *= -3
    save_file(tensors, published / "model.safetensors")
    storage = Storage(str(rows_only))
    config = load(adopting(tmp_path, rows_only, published))
    (own,) = build_flow(config).crosscoders
    reporter = SilentReporter()
    adopt.run([own.crosscoder], StageContext(storage, config.resources, reporter, Unlogged(), config.name, 1))
    (line,) = reporter.messages
    assert line.startswith("crosscoder theirs: on ") and "explains -" in line
    assert "less than the mean row would: it may belong to another layer, pair or scale" in line


def with_trainer(folder: Path, **settings: Any) -> None:
    (folder / "trainer_config.json").write_text(
        json.dumps({"trainer": {"dict_class": "BatchTopKCrossCoder", **settings}})
    )


@pytest.mark.parametrize(("layer", "is_said"), [(TINY["activations"]["layer"], False), (2, True)])
def test_the_layer_that_was_published_with_it_is_compared(
    published: Path, rows_only: Path, tmp_path: Path, layer: int, is_said: bool
) -> None:
    with_trainer(published, layer=layer)
    config = load(adopting(tmp_path, rows_only, published))
    (own,) = build_flow(config).crosscoders
    reporter = SilentReporter()
    context = StageContext(Storage(str(rows_only)), config.resources, reporter, Unlogged(), config.name, 1)
    adopt.run([own.crosscoder], context)
    said = [line for line in reporter.messages if "trainer_config.json" in line]
    assert len(said) == is_said
    assert all(f"layer {layer} and not activations.layer = 1" in line for line in said)


def test_the_models_that_were_published_with_it_are_compared() -> None:
    pair = ModelPairLocation(*(locate(HubModel(source=f"google/gemma-2-2b{end}")) for end in ("", "-it")))
    inputs: Any = SimpleNamespace(section=SimpleNamespace(layer_number=13), loading=SimpleNamespace(models=pair))
    for silent in (
        {"lm_name": "google/gemma-2-2b-it", "layer": 13},
        {"lm_name": "gemma-2-2b"},
        {"layer": "13"},
        {},
        None,
    ):
        assert adopt.settings_mismatch(silent, inputs) == ""
    said = adopt.settings_mismatch({"lm_name": "meta-llama/Llama-3.2-1B", "layer": 12}, inputs)
    assert "layer 12" in said and "Llama-3.2-1B" in said and "gemma-2-2b-it" in said


@pytest.mark.parametrize(
    ("fve", "l0", "k", "is_said"),
    [
        (0.9, 16.0, 16, False),
        (0.9, 20.7, 16, False),
        (0.9, 20.9, 16, True),
        (0.9, 12.4, 16, False),
        (0.9, 12.2, 16, True),
        (0.49, 16.0, 16, True),
        (0.9, 500.0, None, False),
        (float("nan"), 16.0, 16, True),
    ],
)
def test_an_l0_far_from_k_or_a_low_fve_is_said(fve: float, l0: float, k: int | None, is_said: bool) -> None:
    found = {"fve": fve, "l0": l0, "num_rows": 2048.0}
    assert bool(adopt.fidelity_mismatch(found, k, layer=13)) == is_said
