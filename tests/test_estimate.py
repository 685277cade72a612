"""The estimate: exact where it is arithmetic, only for what is missing, refused where it cannot fit."""

from pathlib import Path

import pytest
import yaml
from runs import TINY

from pipeline.config import RunConfig, load
from pipeline.errors import InputError
from pipeline.estimate import estimate, estimate_text
from pipeline.runlog import numeric
from pipeline.runner import inspect
from pipeline.storage import Storage


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**TINY, "tokens": {"num_tokens": 10_000}, "storage": {"root": str(tmp_path)}}))
    return load(path)


def test_sizes_are_arithmetic(config: RunConfig, tmp_path: Path) -> None:
    result = estimate(config, inspect(config, Storage(str(tmp_path))), 32)
    assert result.num_rows == 10_000
    assert result.num_bytes == 10_000 * 2 * 32 * 2
    parameters = 2 * (2 * 128 * 2 * 32)  # two crosscoders, encoder and decoder
    assert result.training_bytes_per_rank == parameters * 4 * 4 + int(2.5 * 256 * 128 * 4)


def test_a_stream_stores_the_validation_rows_and_extracts_while_it_trains(config: RunConfig, tmp_path: Path) -> None:
    states = inspect(config, Storage(str(tmp_path)))
    section = config.activations.model_copy(update={"mode": "stream"})
    streamed = estimate(config.model_copy(update={"activations": section}), states, 32)
    stored = estimate(config, states, 32)
    assert streamed.num_bytes == 2_000 * 2 * 32 * 2  # a fifth of the documents is held out
    assert streamed.seconds["activations"] < stored.seconds["activations"]
    assert streamed.seconds["crosscoder"] > stored.seconds["crosscoder"] + 9


def test_every_missing_stage_has_its_time(config: RunConfig, tmp_path: Path) -> None:
    result = estimate(config, inspect(config, Storage(str(tmp_path))), 32)
    stages = {"start", "organism", "tokens", "activations", "crosscoder", "latents", "causality", "steering"}
    assert result.seconds.keys() == stages
    assert all(seconds > 0 for seconds in result.seconds.values())


def test_latent_ranks_share_the_memory(config: RunConfig, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    resources = config.resources.model_copy(
        update={"training": config.resources.training.model_copy(update={"latent": 2})}
    )
    split = config.model_copy(update={"resources": resources})
    whole, half = (estimate(c, inspect(c, storage), 32).training_bytes_per_rank or 0 for c in (config, split))
    assert half == pytest.approx(whole / 2, rel=1e-6)


def test_an_unknown_width_is_said(config: RunConfig, tmp_path: Path) -> None:
    text = estimate_text(config, inspect(config, Storage(str(tmp_path))), Storage(str(tmp_path)))
    assert "what depends on the models' width" in text


def test_a_store_that_does_not_fit_is_refused(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    monkeypatch.setattr("pipeline.estimate._width_of", lambda _: 32)
    monkeypatch.setattr(Storage, "free_bytes", lambda _: 640_000)
    with pytest.raises(
        InputError, match=r"expected 1\.3 MB of free space for the activations, got 640 kB .* about 50%"
    ):
        estimate_text(config, inspect(config, storage), storage)


def test_numbers_of_nested_counts_get_names_that_mlflow_takes() -> None:
    counts = {"a": {"b": 1, "c": float("nan")}, "flag": True, "text": "x", "dropped": {"too (long)": 2}}
    found = numeric(counts)
    assert found["a/b"] == 1.0
    assert set(found) - {"a/b"} == {name for name in found if name.startswith("dropped/too _long_")}
    assert len(found) == 2


def test_questions_to_a_language_model_are_counted_and_priced(config: RunConfig, tmp_path: Path) -> None:
    tree = config.model_dump(mode="json")
    tree["analyses"]["autointerp"] = {"model": "m", "latents": [1, 2, 3], "contexts_per_request": 5}
    tree["resources"]["autointerp"] |= {"base_url": "http://host/v1", "price_in": 1.0, "price_out": 2.0}
    asking = RunConfig.model_validate(tree)
    storage = Storage(str(tmp_path))
    (line,) = (
        one for one in estimate_text(asking, inspect(asking, storage), storage).splitlines() if "requests" in one
    )
    # Two crosscoders, three latents each, one explanation and three detections of 12 contexts in fives.
    assert line.strip().startswith("autointerp  at most 24 requests, about ")
    assert line.endswith("at the configured prices, to http://host/v1")
    assert "requests" not in estimate_text(config, inspect(config, storage), storage)
