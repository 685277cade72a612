"""The whole path through the real entry points: real Ray, a generated pair, no network.

One tiny run is made per session and looked at from many sides. Quality is not the question here (the tiny organism has
learnt next to nothing); that every number, row and file is where it should be is.
"""

from pathlib import Path

import pandas as pd
import pytest
from runs import Finished, command, contents, run_file

from pipeline.analyses.steering_columns import STEERING_COLUMNS
from pipeline.config.run_file import load
from pipeline.run import runner
from pipeline.schema import LATENT_COLUMNS, TABLE_METADATA, Verdict, latent_corpus_columns
from pipeline.storage.activation_store import ActivationStore
from pipeline.terminal import SilentReporter
from pipeline.tracking.tracker import NOTE_TAG, RecordingTracker

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_every_step_is_done_and_says_so(finished: Finished) -> None:
    assert {state.state for state in finished.states.values()} == {"done"}
    assert list(finished.states)[:7] == [
        "organism", "corpus", "tokens", "activations", "evidence", "crosscoder l1", "crosscoder batch_topk",
    ]  # fmt: skip
    assert finished.outcome.num_made == len(finished.states)


def test_a_second_run_writes_nothing(finished: Finished) -> None:
    before = contents(finished.root)
    done = command("run", str(finished.path), cwd=finished.folder)
    assert done.returncode == 0, done.stderr
    assert f"all {len(finished.states)} steps are done, nothing was written" in done.stderr
    assert finished.outcome.verdict in done.stdout
    assert contents(finished.root) == before


def test_plan_touches_nothing_and_names_what_differs(finished: Finished) -> None:
    before = contents(finished.root)
    override = "crosscoders.batch_topk.sparsity.k=9"
    done = command("plan", str(finished.path), "--set", override, cwd=finished.folder)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert "section.sparsity.k: 8 -> 9" in lines
    assert any(line.startswith("stale   crosscoder batch_topk") for line in lines)
    assert any(line.startswith("done    crosscoder l1") for line in lines)
    assert any(line.startswith("total") for line in lines)
    assert contents(finished.root) == before


@pytest.mark.parametrize(
    "override",
    [
        "resources.training.data=2",
        "tracking.kind=none",
        "crosscoders.l1.name=renamed",
        "resources.cluster.num_cpus=7",
        "resources.training.custom={train: 1}",
    ],
)
def test_where_and_how_never_make_a_crosscoder_stale(finished: Finished, override: str) -> None:
    states = runner.inspect(load(finished.path, [override]), finished.storage)
    assert [state.state for state in states if state.step.key.stage == "crosscoder"] == ["done", "done"]


def test_each_kept_token_is_in_the_store_exactly_once(finished: Finished) -> None:
    tokens = finished.states["tokens"].step.key.folder
    index = pd.read_parquet(finished.root / tokens / "index.parquet")
    parts = {name: pd.read_parquet(finished.root / tokens / name) for name in index["part"].unique()}
    expected: set[tuple[int, int, int]] = set()
    for row in index.itertuples():
        document = parts[str(row.part)].iloc[int(row.row)]  # type: ignore[arg-type]
        ids = document["input_ids"]
        expected |= {(int(document["doc_id"]), p, int(ids[p])) for p in range(1, len(ids))}  # BOS is dropped
    store = ActivationStore(finished.storage, finished.states["activations"].step.key.folder)
    stored: list[tuple[int, int, int]] = []
    for shard in store.manifest.shards:
        rows = store.read(shard)
        stored += zip(rows.doc_id_B.tolist(), rows.position_B.tolist(), rows.token_id_B.tolist(), strict=True)
    assert len(stored) == len(set(stored)) == finished.counts("activations")["num_rows"]
    assert set(stored) == expected


def test_the_splits_share_no_document(finished: Finished) -> None:
    index = finished.table("tokens", "index.parquet")
    splits = index.groupby("doc_id")["split"].nunique()
    assert (splits == 1).all()
    frac = (index["split"] == "validation").mean()
    assert 0.1 < frac < 0.3


def test_the_latent_table_is_complete_and_its_verdicts_add_up(finished: Finished) -> None:
    for name in ("l1", "batch_topk"):
        table = finished.table(f"latents {name}", "latents.parquet")
        store = ActivationStore(finished.storage, finished.states["activations"].step.key.folder)
        columns = (*LATENT_COLUMNS, *latent_corpus_columns(store.manifest.corpora))
        assert list(table.columns) == [column.name for column in columns]
        assert table["latent"].tolist() == list(range(128))
        assert set(table["verdict"]) <= set(Verdict.ALL)
        counts = finished.counts(f"latents {name}")
        assert counts["num_shared"] == int((table["verdict"] == Verdict.SHARED).sum())


def test_every_table_says_which_way_delta_norm_points(finished: Finished) -> None:
    import pyarrow.parquet as pq

    tables = [path for path in finished.root.rglob("*.parquet") if "organism" not in path.parts]
    assert len(tables) > 10
    for path in tables:
        metadata = {key.decode(): value.decode() for key, value in (pq.read_schema(path).metadata or {}).items()}
        assert metadata.items() >= TABLE_METADATA.items(), path


def test_causality_is_zero_for_the_unedited_chat_model(finished: Finished) -> None:
    table = finished.table("causality batch_topk", "causality.parquet")
    chat = table[table["intervention"] == "chat"]
    assert len(chat) == 3
    assert (chat["kl"] == 0).all()
    assert (table[table["intervention"] == "none"]["kl"] > 0).all()
    assert {"mean_difference", "mean_difference_projection"} <= set(table["intervention"])
    differences = finished.table("causality batch_topk", "differences.parquet")
    assert ("none", "all") in set(zip(differences["intervention"], differences["reference"], strict=True))
    curve = finished.table("causality batch_topk", "curve.parquet")
    none = table[table["intervention"] == "none"]["kl"].tolist()
    assert curve[(curve["order"] == "evidence") & (curve["num_latents"] == 0)]["kl"].tolist() == none


def test_steering_answers_with_both_models_and_unsteered_runs_have_no_kl(finished: Finished) -> None:
    table = finished.table("steering l1", "steering.parquet")
    assert list(table.columns) == [column.name for column in STEERING_COLUMNS]
    unsteered = table[table["control"] == "none"]
    assert set(unsteered["model"]) == {"base", "chat"}
    assert (unsteered["kl"] == 0).all()
    steered = table[table["control"] == "latent"]
    assert finished.counts("steering l1")["num_latents"] == steered["latent"].nunique()
    assert (steered["kl"] > 0).all()
    assert (table["rate"].between(0, 1)).all()


def test_promoted_tokens_are_named_of_every_latent_with_contexts(finished: Finished) -> None:
    for name in ("l1", "batch_topk"):
        table = finished.table(f"logit_lens {name}", "logit_lens.parquet")
        assert set(table["latent"]) >= set(finished.table(f"examples {name}", "examples.parquet")["latent"])
        assert set(table["member"]) == {"base", "chat", "difference"}
        assert (table["promoted"].map(len) == 10).all()
        assert len(table) == 3 * finished.counts(f"logit_lens {name}")["num_latents"]
        first = finished.table(f"logit_lens {name}", "first_tokens.parquet")
        assert set(first["corpus"]) == {"documents", "dialogues"}
        assert first["position"].between(1, 4).all()  # position 0 is BOS, which gives no row
        assert (first["norm"] > 0).all()


def test_examples_hold_windows_of_every_latent_asked_for(finished: Finished) -> None:
    table, counts = finished.table("examples l1", "examples.parquet"), finished.counts("examples l1")
    assert counts["num_contexts"] == len(table) > 0
    fires = finished.table("latents l1", "latents.parquet").set_index("latent")["max_activation"] > 0
    assert set(table["latent"]) >= {latent for latent in (0, 1, 2, 3) if fires[latent]}
    for _, own in table.groupby("latent"):
        assert own["rank"].tolist() == list(range(len(own)))
        assert own["doc_id"].is_unique
    for row in table.to_dict("records"):
        assert len(row["tokens"]) == len(row["activations"]) <= 33
        assert max(row["activations"]) >= row["activation"] * (1 - 1e-6)


def test_the_tracker_knows_the_run_its_steps_and_their_inputs(finished: Finished) -> None:
    runs = finished.tracker.runs
    parent = next(run for run in runs.values() if run.parent is None)
    children = {run.name: run for run in runs.values() if run.parent is not None}
    assert children.keys() == finished.states.keys()
    assert all(run.ended == [True] for run in runs.values())
    assert parent.params["crosscoders.l1.sparsity.mu"] == "0.01"
    assert {"report.html", "verdict.txt", "run.json"} <= parent.files.keys()
    assert any(name.startswith("figures/") for name in parent.files)
    fit = children["crosscoder batch_topk"]
    assert len(fit.models) == 1
    assert fit.tags["crossray.input.activations"] == finished.states["activations"].step.key.fingerprint
    losses = [point for point in fit.points if point.name == "train/loss"]
    assert [point.step for point in losses] == list(range(10, 101, 10))
    names = {point.name for point in fit.points}
    wanted = ("loss", "l0", "fve_base", "fve_chat", "dead_frac", "threshold", "lr", "rows_per_second")
    assert {f"train/{name}" for name in wanted} <= names
    latents = children["latents batch_topk"]
    assert "latents.parquet" in latents.files
    assert {"num_shared", "fidelity/fve_chat"} <= {point.name for point in latents.points}
    assert finished.outcome.verdict.strip() in parent.tags[NOTE_TAG]
    told = [point.value for point in parent.points if point.name == "batch_topk/num_latents"]
    assert told == [finished.counts("latents batch_topk")["num_latents"]]
    of_each = [{point.name for point in children[f"crosscoder {name}"].points} for name in ("l1", "batch_topk")]
    wanted = {f"{stage}/num_latents" for stage in ("latents", "examples")} | {"latents/num_shared", "train/loss"}
    assert all(wanted <= names for names in of_each)


def test_lineage_leads_from_the_report_to_the_organism(finished: Finished) -> None:
    by_fingerprint = {state.step.key.fingerprint: state.record for state in finished.states.values()}
    seen, queue = set(), [finished.states["report"].step.key.fingerprint]
    while queue:
        record = by_fingerprint[queue.pop()]
        assert record is not None
        seen.add(record.name)
        queue += record.identity["inputs"].values()
    assert seen == set(finished.states)


def test_the_report_holds_both_crosscoders_and_no_address(finished: Finished) -> None:
    page = Path(finished.outcome.report_path).read_text()
    assert "batch_topk" in page
    assert "l1" in page
    assert 'src="http' not in page
    assert "organism chat" in page


def test_report_renders_again_the_same_verdict(finished: Finished) -> None:
    again = runner.render(finished.config, SilentReporter())
    assert again.verdict == finished.outcome.verdict


def test_a_fitted_crosscoder_loads_by_the_public_call(finished: Finished) -> None:
    from pipeline.numerics.crosscoder import Crosscoder

    folder = finished.root / finished.states["crosscoder batch_topk"].step.key.folder
    crosscoder = Crosscoder.from_pretrained(folder)
    assert (crosscoder.num_latents, crosscoder.num_models, crosscoder.activation_dim) == (128, 2, 32)


def test_the_same_model_twice_has_no_chat_specific_latent(finished: Finished, tmp_path: Path) -> None:
    base = {"kind": "organism", "member": "base"}
    models = {"base": base, "chat": base, "dtype": "float32"}
    analyses = {"latent_scaling": {"num_resamples": 100}, "causality": None, "examples": None}
    path = run_file(tmp_path, str(finished.root), name="null", models=models, analyses=analyses)
    runner.run(load(path), SilentReporter(), RecordingTracker())
    states = {state.step.name: state for state in runner.inspect(load(path), finished.storage)}
    for name in ("l1", "batch_topk"):
        record = states[f"latents {name}"].record
        assert record is not None
        assert record.counts["num_chat_only"] == record.counts["num_chat_specific"] == 0
        assert record.counts["num_shared"] + record.counts["num_dead"] == 128
