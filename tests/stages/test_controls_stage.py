"""The controls of a finished run, and those that need a second seed or a pair whose answer is known."""

import dataclasses

import numpy as np
import pytest
from runs import TINY, Finished, run_file

from pipeline.config.run_file import load
from pipeline.run.flow import build_flow
from pipeline.run.identities import noise_between
from pipeline.run.runner import Unlogged
from pipeline.schema import CONTROL_COLUMNS, LATENT_COLUMNS, SEED_COLUMNS, Control, Verdict, latent_corpus_columns
from pipeline.stages import controls
from pipeline.stages.latents import LATENTS_NAME
from pipeline.stages.step import StageContext
from pipeline.storage.tables import arrow_schema, read_table, write_frame
from pipeline.terminal import SilentReporter

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize("name", ["l1", "batch_topk"])
def test_every_verdict_comes_with_its_stated_error_and_a_control(finished: Finished, name: str) -> None:
    table = finished.table(f"controls {name}", controls.TABLE_NAME)
    latents = finished.table(f"latents {name}", "latents.parquet")
    assert list(table.columns) == [column.name for column in CONTROL_COLUMNS]
    assert table["control"].tolist() == [Control.STATED, Control.RANDOM]
    called = latents[latents["verdict"] == Verdict.CHAT_SPECIFIC]
    stated = table.iloc[0]
    assert stated["num_latents"] == len(called)
    assert stated["value"] == pytest.approx(called["q_value"].fillna(1).max(), nan_ok=True)
    counts = finished.counts(f"latents {name}")
    assert counts["stated_false_discovery_rate"] == pytest.approx(stated["value"], nan_ok=True)
    is_judged = (latents["delta_norm"] > 0.6) & (latents["num_documents"] >= 10)
    assert table.iloc[1]["num_latents"] == is_judged.sum()
    seeds = finished.table(f"controls {name}", controls.SEEDS_NAME)
    assert list(seeds.columns) == [column.name for column in SEED_COLUMNS]
    assert seeds.empty


def test_seeds_of_one_crosscoder_and_known_nulls_are_recognised(finished: Finished) -> None:
    crosscoders = [
        {**TINY["crosscoders"][1], "name": "a"},
        {**TINY["crosscoders"][1], "name": "b", "seed": 1},
        {**TINY["crosscoders"][0], "name": "c"},
    ]
    models = {**TINY["models"], "chat": TINY["models"]["base"]}
    path = run_file(finished.folder / "..", str(finished.root), crosscoders=crosscoders, models=models)
    a, b, c = build_flow(load(path)).crosscoders
    of_a, of_b, of_c = (own.controls.inputs for own in (a, b, c) if own.controls is not None)
    assert of_a.other_seeds == (b.latents,)
    assert of_a.reads()["latents b"] is b.latents
    assert of_b.reads()["crosscoder a"] is a.crosscoder
    assert of_c.other_seeds == ()
    assert of_c.noise == 0.0
    (l1, *_) = build_flow(finished.config).crosscoders
    assert l1.controls is not None and l1.controls.inputs.noise is None


def test_further_seeds_of_a_crosscoder_are_fitted_and_nothing_else_is_made_of_them(finished: Finished) -> None:
    l1, batch_topk = TINY["crosscoders"]
    path = run_file(finished.folder / "..", str(finished.root), crosscoders=[{**l1, "seeds": 3}, batch_topk])
    flow, before = build_flow(load(path)), build_flow(finished.config)
    assert [own.crosscoder_name for own in flow.replicas] == ["l1.seed1", "l1.seed2"]
    assert [own.inputs.crosscoder.inputs.section.seed for own in flow.replicas] == [1, 2]  # type: ignore[union-attr]
    assert flow.crosscoders[0].latents.key == before.crosscoders[0].latents.key  # nothing is fitted anew
    controls_of = flow.crosscoders[0].controls
    assert controls_of is not None and controls_of.inputs.other_seeds == flow.replicas
    named = [step.name for step in flow.steps if "seed" in step.crosscoder_name]
    assert sorted(named) == sorted(
        f"{stage} {own}" for own in ("l1.seed1", "l1.seed2") for stage in ("crosscoder", "latents")
    )


def test_a_second_seed_and_a_null_pair_fill_their_rows(finished: Finished) -> None:
    """The step of a finished crosscoder told that its own twin is another seed: every latent finds itself."""
    own = build_flow(finished.config).crosscoders[1]
    assert own.controls is not None and own.controls.name == "controls batch_topk"
    latents = finished.table("latents batch_topk", "latents.parquet")
    latents.loc[latents["frequency"] > 0, "verdict"] = Verdict.CHAT_SPECIFIC
    called = dataclasses.replace(own.latents, key=own.latents.key._replace(fingerprint="called"))
    schema = arrow_schema((*LATENT_COLUMNS, *latent_corpus_columns(["dialogues", "documents"])))
    write_frame(finished.storage, f"{called.folder}/{LATENTS_NAME}", latents, schema)
    twin, other = (dataclasses.replace(called, crosscoder_name=name) for name in ("twin", "other"))
    again = dataclasses.replace(
        own.controls,
        key=own.controls.key._replace(fingerprint="second"),
        inputs=dataclasses.replace(own.controls.inputs, latents=called, other_seeds=(twin, other), noise=0.0),
    )
    context = StageContext(finished.storage, finished.config.resources, SilentReporter(), Unlogged(), "tiny", 1)
    controls.publish_controls(again, None, context, started=0.0)
    table = read_table(finished.storage, f"{again.folder}/{controls.TABLE_NAME}").to_pandas().set_index("control")
    seeds = read_table(finished.storage, f"{again.folder}/{controls.SEEDS_NAME}").to_pandas()
    finished.storage.delete(again.folder)
    finished.storage.delete(called.folder)
    num_live = int((latents["frequency"] > 0).sum())
    assert table.loc["seed twin", "value"] == table.loc["seed other", "value"] == 1
    assert table.loc[Control.REPLICATED, ["value", "num_latents"]].tolist() == [1, num_live]
    assert table.loc[Control.NULL_PAIR, "value"] == 1  # all live latents were called
    assert table.loc[Control.NULL_PAIR, "num_latents"] == num_live
    assert np.isnan(table.loc[Control.RANDOM, "value"])
    assert seeds["other"].tolist() == ["twin"] * num_live + ["other"] * num_live
    assert seeds["other_latent"].tolist() == seeds["latent"].tolist()
    assert seeds["cosine"].min() == pytest.approx(1)


def test_noise_alone_between_two_models_is_told_from_everything_else() -> None:
    base = {"source": "a", "source_revision": None}
    assert noise_between(base, base) == 0.0
    assert noise_between(base, {**base, "weight_noise": 0.01, "weight_noise_seed": 3}) == 0.01
    assert noise_between(base, {**base, "adapter": "b"}) is None
    assert noise_between(base, {"source": "b", "source_revision": None}) is None
