"""How a run appears in the tracker: after a failure in the middle, and the data that it reads."""

from pathlib import Path

from runs import Finished, run_file

from pipeline.config.run_file import load
from pipeline.run.flow import build_flow
from pipeline.storage.artifacts import write_record
from pipeline.storage.filesystem import Storage
from pipeline.tracking.run_log import RunLog
from pipeline.tracking.tracker import Point, RecordingTracker


def test_a_failure_ends_what_was_under_way_and_leaves_finished_steps_as_they_are(tmp_path: Path) -> None:
    config = load(run_file(tmp_path, str(tmp_path / "runs")))
    storage, tracker, flow = Storage(config.storage.root), RecordingTracker(), build_flow(config)
    log = RunLog(tracker, config, storage, flow)
    done, under_way = flow.steps[0], flow.steps[1]
    record = write_record(storage, done.key, name=done.name, counts={}, seconds=1.0, run_name="tiny")
    log.finished(done, record, reused=False)
    log.points(under_way, [Point("x", 1.0, 1, 1)])
    log.close(succeeded=False)
    ended = {run.name: run.ended for run in tracker.runs.values()}
    assert ended == {"tiny": [False], done.name: [True], under_way.name: [False]}


def test_every_step_names_the_data_that_it_reads(finished: Finished) -> None:
    runs = {run.name: run for run in finished.tracker.runs.values()}
    names = {name: [dataset.name for dataset in run.inputs] for name, run in runs.items()}
    assert names["tiny"] == ["corpus", "tokens", "activations"]
    assert (names["corpus"], names["tokens"], names["activations"]) == ([], ["corpus"], ["tokens"])
    assert names["crosscoder l1"] == ["activations"] and set(names["planted l1"]) == {"activations", "tokens"}
    corpus, tokens, activations = runs["tiny"].inputs
    assert runs["crosscoder l1"].inputs == [activations]
    key = finished.states["activations"].step.key
    assert (activations.digest, activations.source) == (key.fingerprint, finished.storage.url(key.folder))
    assert activations.profile["num_rows"] == finished.counts("activations")["num_rows"]
    assert activations.profile["num_bytes"] == finished.counts("activations")["num_bytes"]
    assert corpus.profile["num_rows"] == sum(finished.counts("corpus")["num_documents"].values())
    assert tokens.profile["num_rows"] == finished.counts("tokens")["num_documents"]
    folder = Path(tokens.source)
    assert tokens.profile["num_bytes"] == sum(p.stat().st_size for p in folder.iterdir() if p.name != "record.json")
