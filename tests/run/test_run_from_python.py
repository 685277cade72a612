"""A finished run through the library: what it opens, fits and judges is what the stages made."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from jsonschema import Draft202012Validator
from runs import Finished, contents

import crossray
from pipeline.arguments import FORMS
from pipeline.cli import main
from pipeline.config.resources import StorageSection, TrackingSection
from pipeline.library.comparison import compare
from pipeline.library.summary import _latents
from pipeline.run import runner
from pipeline.schema import DELTA_NORM_ORIENTATION, Verdict
from pipeline.terminal import SilentReporter
from pipeline.tracking.tracker import RecordingTracker


@pytest.fixture(scope="module")
def run(finished: Finished) -> crossray.Run:
    return crossray.open(finished.root, "tiny")


@pytest.mark.ray
@pytest.mark.parametrize("name", ["l1", "batch_topk"])
def test_a_fit_from_memory_is_the_runs_own(run: crossray.Run, finished: Finished, name: str) -> None:
    """To the last bit with as many threads; within rounding here, whatever the run's worker had."""
    section = next(own for own in finished.config.crosscoders if own.name == name)
    assert section.kind == "fitted"
    mine = crossray.fit(
        run.rows("train"),
        num_latents=section.num_latents,
        sparsity=section.sparsity.model_dump(),
        num_steps=100,
        batch_rows=256,
        lr=1e-3,
        lr_warmup_steps=10,
        device="cpu",
    )
    theirs = run.crosscoder(name)
    for key, tensor in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)
    assert theirs.curve is not None and mine.origin == theirs.origin == run.origin
    x_BMD = run.rows().x[:500].float()
    assert float(mine.encode(x_BMD).l0()) == pytest.approx(float(theirs.encode(x_BMD).l0()), rel=0.01)


@pytest.mark.ray
@pytest.mark.parametrize("name", ["l1", "batch_topk"])
def test_the_latent_table_from_memory_is_the_runs_own(run: crossray.Run, name: str) -> None:
    table = crossray.latents(run.crosscoder(name), run.rows(), training_rows=run.rows("train"), num_resamples=100)
    theirs = run.latents(name)
    assert ((table["control_token"] == "") == (theirs["control_token"] == "")).all()  # ids here, their texts there
    table, theirs = (one.drop(columns="control_token") for one in (table, theirs))
    pd.testing.assert_frame_equal(table[theirs.columns], theirs, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert table.attrs["fidelity"] == pytest.approx(theirs.attrs["fidelity"], rel=1e-6)
    assert theirs.attrs["delta_norm"] == DELTA_NORM_ORIENTATION


@pytest.mark.ray
def test_tables_and_the_page_are_found(run: crossray.Run, finished: Finished) -> None:
    assert run.crosscoders == ("l1", "batch_topk")
    assert run.report() == finished.outcome.report_path and run.verdict() == finished.outcome.verdict
    assert {"none", "all"} <= set(run.causality("l1")["intervention"])
    assert len(run.examples("l1")) and len(run.steering("l1")) and len(run.table("causality", "l1", file="curve"))
    assert "var(--" not in crossray.plot.kl(run.causality("batch_topk")).to_json()
    for call, what in (
        (lambda: crossray.open(finished.root, "small"), "tiny"),
        (lambda: run.latents("topk"), "batch_topk"),
        (lambda: run.table("autointerp", "l1"), "autointerp"),
        (lambda: run.table("latents", "l1", file="nothing"), "twins"),
    ):
        with pytest.raises(crossray.InputError, match=what):
            call()


@pytest.mark.ray
def test_running_it_again_from_python_opens_it(finished: Finished) -> None:
    before = contents(finished.root)
    for config in (finished.config, finished.path, finished.config.model_dump(mode="json")):
        assert crossray.run(config, progress=False).name == "tiny"
    assert contents(finished.root) == before


@pytest.mark.ray
def test_what_show_prints_for_programs_follows_its_schema(
    run: crossray.Run, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "tiny", "--root", str(finished.root), "--json", "--latents", "4"]) == 0
    shown = json.loads(capsys.readouterr().out)
    schema = json.loads((Path(__file__).parent.parent.parent / "docs" / "schema" / "show.json").read_text())
    assert list(Draft202012Validator(schema).iter_errors(shown)) == []
    assert (shown["name"], shown["layer"], shown["chat"]) == ("tiny", 1, "organism chat")
    for told, name in zip(shown["crosscoders"], run.crosscoders, strict=True):
        table, causality = run.latents(name), run.causality(name)
        assert told["verdicts"] == {verdict: int((table["verdict"] == verdict).sum()) for verdict in Verdict.ALL}
        assert told["fidelity"]["fve_base"] == pytest.approx(table.attrs["fidelity"]["fve_base"])
        assert [row["kl"] for row in told["causality"]] == pytest.approx(list(causality["kl"]))
        assert len(told["steering"]) == len(run.steering(name))


@pytest.mark.ray
def test_a_summary_tells_the_strongest_latents_with_their_examples(run: crossray.Run) -> None:
    """With a verdict that the tiny pair does not give."""
    table, examples = run.latents("l1"), run.examples("l1")
    table.loc[table["latent"] == 2, "verdict"] = Verdict.CHAT_SPECIFIC
    (latent,) = _latents(table, examples, 5)
    own = examples[examples["latent"] == 2].sort_values("rank")
    assert latent.latent == 2 and latent.numbers["nu_eps"] == pytest.approx(table["nu_eps"][2])
    assert [one.activation for one in latent.examples] == pytest.approx(list(own["activation"][:3]))
    assert latent.examples[0].tokens == tuple(own["tokens"].iloc[0])


@pytest.mark.ray
def test_two_runs_are_compared_with_what_differs_in_their_settings(
    run: crossray.Run, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.root, tmp_path / "runs")
    for path in (tmp_path / "runs").glob("*/*/record.json"):
        record = json.loads(path.read_text())
        section = record["identity"]["section"]
        if record["stage"] == "report":
            section["name"] = "other"
        if record["stage"] == "crosscoder" and section["sparsity"]["kind"] == "l1":
            section["sparsity"]["mu"] = 0.5
        path.write_text(json.dumps(record))
    compared = compare(run, crossray.open(tmp_path / "runs", "other"))
    assert compared.table[0][1:] == ["tiny: l1", "tiny: batch_topk", "other: l1", "other: batch_topk"]
    assert all(row[1:3] == row[3:] for row in compared.table[1:])
    assert "crosscoder l1.sparsity.mu: 0.01 -> 0.5" in compared.differences
    assert main(["compare", "tiny", "tiny", "--root", str(finished.root)]) == 2


@pytest.mark.ray
def test_a_finished_run_is_logged_later_as_it_was_logged_then(finished: Finished, tmp_path: Path) -> None:
    tracker = RecordingTracker()
    runner.track(finished.config, SilentReporter(), tracker)
    then = {run.name: run for run in finished.tracker.runs.values()}
    later = {run.name: run for run in tracker.runs.values()}
    assert set(later) == set(then) and all(run.ended == [True] for run in later.values())
    for name, run in later.items():
        assert run.files.keys() == then[name].files.keys() and len(run.models) == len(then[name].models)
        assert {point[:3] for point in run.points} == {point[:3] for point in then[name].points}, name
    missing = finished.config.model_copy(update={"storage": StorageSection(root=str(tmp_path))})
    with pytest.raises(crossray.InputError, match="steps are missing"):
        runner.track(missing, SilentReporter(), tracker)
    silent = finished.config.model_copy(update={"tracking": TrackingSection(kind="none")})
    with pytest.raises(crossray.InputError, match=r"tracking\.kind"):
        runner.track(silent, SilentReporter())


@pytest.mark.ray
def test_a_finished_run_is_logged_later_on_a_real_server(finished: Finished, mlflow_server: str) -> None:
    import mlflow

    tracking = TrackingSection(uri=mlflow_server, experiment="later")
    link = runner.track(finished.config.model_copy(update={"tracking": tracking}), SilentReporter())
    client = mlflow.MlflowClient(tracking_uri=mlflow_server)
    experiment = client.get_experiment_by_name("later")
    runs = client.search_runs([experiment.experiment_id])
    names = {run.info.run_name: run for run in runs}
    assert len(names) == len(runs) and set(names) == {run.name for run in finished.tracker.runs.values()}
    assert all(run.info.status == "FINISHED" for run in runs)
    parent = names["tiny"]
    assert link.startswith(mlflow_server) and parent.info.run_id in link
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs if run is not parent} == {parent.info.run_id}
    told = parent.data.tags["mlflow.note.content"]
    for name in ("l1", "batch_topk"):
        assert name in told and names[f"crosscoder {name}"].outputs.model_outputs
        curve = client.get_metric_history(names[f"crosscoder {name}"].info.run_id, "train/loss")
        assert len(curve) > 1 and curve[-1].value < curve[0].value


@pytest.mark.ray
@pytest.mark.parametrize("form", FORMS)
def test_a_run_is_written_in_every_form(run: crossray.Run, form: str, tmp_path: Path) -> None:
    folder = crossray.export(run, "l1", tmp_path / form, form=form)
    assert ("organism chat" in (folder / "README.md").read_text()) == (form != "saelens")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.ray
def test_a_latent_of_a_run_has_its_page(run: crossray.Run) -> None:
    (latent, *_) = run.examples("l1")["latent"]
    page = run.dashboard("l1", latent)
    assert f"{run.latents('l1')['delta_norm'][latent]:.3f}" in page.html and "<mark" in page.html
    for call, what in ((lambda: run.dashboard("l1", 128), "127.*128"), (lambda: run.dashboard("l2", 0), "batch_topk")):
        with pytest.raises(crossray.InputError, match=what):
            call()
