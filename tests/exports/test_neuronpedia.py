"""Requests of Neuronpedia's upload: within its limits, with the run's numbers, and text as it was."""

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import crossray
from pipeline.exports import neuronpedia
from pipeline.exports.forms import export


def features_of(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "features").iterdir(), key=lambda path: int(path.stem.split("-")[1]))
    return [feature for path in paths for feature in json.loads(path.read_text())["features"]]


def require_within_limits(body: dict[str, Any]) -> None:
    """The conditions that the request names."""
    assert body["modelId"] == body["modelId"].lower() and body["source"] == body["source"].lower()
    assert 1 <= len(body["features"]) <= 128
    for feature in body["features"]:
        assert isinstance(feature["index"], int) and 0 <= feature["density"] <= 1
        assert len(feature["topLogits"] or []) <= 20 and len(feature["bottomLogits"] or []) <= 20
        assert all(1 <= len(one["text"]) <= 512 for one in feature["explanations"]) and feature["activations"]
        for one in feature["activations"]:
            assert 1 <= len(one["tokens"]) == len(one["values"]) <= 1024
        tokens = [token for one in feature["activations"] for token in one["tokens"]]
        tokens += [one["token"] for one in (feature["topLogits"] or []) + (feature["bottomLogits"] or [])]
        assert all(token and "\0" not in token for token in tokens)
        "".join(tokens).encode()


def test_contexts_density_and_promoted_tokens_are_the_runs(run: crossray.Run, tmp_path: Path) -> None:
    folder = export(run, "batch_topk", tmp_path / "np", form="neuronpedia")
    (path,) = (folder / "features").iterdir()
    body = json.loads(path.read_text())
    require_within_limits(body)
    assert (body["modelId"], body["source"]) == ("chat", "1-crossray-made-batch-topk")
    examples, latents = run.examples("batch_topk"), run.latents("batch_topk")
    assert [feature["index"] for feature in body["features"]] == sorted(set(examples["latent"]))
    for feature in body["features"]:
        own = examples[examples["latent"] == feature["index"]].sort_values("rank")
        assert feature["density"] == latents["frequency"][feature["index"]]
        assert [one["values"] for one in feature["activations"]] == [
            list(map(float, row)) for row in own["activations"]
        ]
        assert max(feature["activations"][0]["values"]) == pytest.approx(own["activation"].iloc[0], rel=1e-5)
        lens = run.table("logit_lens", "batch_topk", where=("member", "chat")).set_index("latent").loc[feature["index"]]
        assert [one["value"] for one in feature["topLogits"]] == list(map(float, lens["promoted_logits"]))
        assert [one["token"] for one in feature["bottomLogits"]] == list(lens["suppressed"])


def test_the_model_that_is_asked_for_gives_its_name_and_tokens(run: crossray.Run, tmp_path: Path) -> None:
    base = export(run, "batch_topk", tmp_path / "base", form="neuronpedia", model="base")
    chat = export(run, "batch_topk", tmp_path / "chat", form="neuronpedia")
    assert json.loads((base / "features" / "batch-0.json").read_text())["modelId"] == "base"
    assert features_of(base)[0]["topLogits"] != features_of(chat)[0]["topLogits"]
    assert features_of(base)[0]["activations"] == features_of(chat)[0]["activations"]


def test_many_latents_are_several_requests(run: crossray.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = features_of(export(run, "batch_topk", tmp_path / "one", form="neuronpedia"))
    monkeypatch.setattr(neuronpedia, "MAX_FEATURES", 4)
    folder = export(run, "batch_topk", tmp_path / "more", form="neuronpedia")
    assert len(list((folder / "features").iterdir())) == 2 and features_of(folder) == whole


def test_long_contexts_odd_tokens_and_explanations_stay_within_the_limits(
    run: crossray.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokens, values = [f"t{place}" for place in range(3000)], [0.0] * 3000
    values[2000], tokens[2000:2003] = 2.5, ["", "a\0b", "\ud83d<script>"]
    frame = pd.DataFrame({"latent": [7], "rank": [0], "tokens": [tokens], "activations": [values]})
    said = pd.DataFrame({"latent": [7], "explanation": ["\0why " * 200]})
    own = {"examples": frame, "autointerp": said}
    real = run.table
    monkeypatch.setattr(run, "table", lambda stage, *a, **k: own[stage] if stage in own else real(stage, *a, **k))
    monkeypatch.setattr(run, "has", lambda stage, _name="": stage in own)
    folder = export(run, "batch_topk", tmp_path / "np", form="neuronpedia")
    body = json.loads((folder / "features" / "batch-0.json").read_text())
    require_within_limits(body)
    (feature,) = body["features"]
    (one,) = feature["activations"]
    place = one["values"].index(2.5)
    assert one["tokens"][place : place + 3] == ["\ufffd", "a\ufffdb", "\ufffd<script>"] and place == 512
    assert feature["topLogits"] is None and feature["explanations"][0]["text"].endswith("...")


def test_a_run_without_contexts_is_refused(run: crossray.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing = run.examples("batch_topk").head(0)
    monkeypatch.setattr(run, "table", lambda *_, **__: nothing)
    with pytest.raises(crossray.InputError, match=r"analyses\.examples"):
        export(run, "batch_topk", tmp_path / "np", form="neuronpedia")
    assert list(tmp_path.iterdir()) == []


def test_its_readme_names_the_request_and_what_is_left_out(run: crossray.Run, tmp_path: Path) -> None:
    text = (export(run, "batch_topk", tmp_path / "np", form="neuronpedia") / "README.md").read_text()
    assert "/api/feature/upload-batch" in text and "verdicts" in text and "/home/me" not in text
    assert 'SourceSet.new(model_id="chat", name="crossray-made-batch-topk")' in text


def test_the_package_reads_the_same_fields(run: crossray.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("neuronpedia", reason="neuronpedia is not installed")
    from neuronpedia.np_activation import Activation  # type: ignore[import-not-found]
    from neuronpedia.np_feature import Feature, Logit  # type: ignore[import-not-found]
    from neuronpedia.requests.feature_request import FeatureRequest  # type: ignore[import-not-found]

    folder = export(run, "batch_topk", tmp_path / "np", form="neuronpedia")
    body = json.loads((folder / "features" / "batch-0.json").read_text())
    sent = io.StringIO()
    monkeypatch.setattr(FeatureRequest, "__init__", lambda *_: None)
    monkeypatch.setattr(FeatureRequest, "send_request", lambda *_, **own: json.dump(own["json"], sent))
    names = (body["modelId"], body["source"])
    features = [
        Feature(
            *(*names, own["index"], own["density"]),
            top_logits=[Logit(**one) for one in own["topLogits"]],
            bottom_logits=[Logit(**one) for one in own["bottomLogits"]],
            activations=[Activation(*names, own["index"], **one) for one in own["activations"]],
        )
        for own in body["features"]
    ]
    FeatureRequest().upload_batch(*names, features)
    theirs = json.loads(sent.getvalue())
    for feature in theirs["features"]:
        for one in feature["activations"]:
            assert {one.pop(f"quantile{end}") for end in ("Max", "Min", "Fraction")} == {None}
    assert theirs == body
