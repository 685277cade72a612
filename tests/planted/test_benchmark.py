"""The small benchmark's numbers, its artifacts, and the way in for foreign checkpoints."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.config.run_file import load_as
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.planted import benchmark
from pipeline.planted.score import RULES, SCORE_COLUMNS, score_text
from pipeline.planted.settings import BenchmarkConfig
from pipeline.planted.trial import Trial, read_truth
from pipeline.storage.activation_store import ActivationStore
from pipeline.terminal import SilentReporter
from tests.planted.conftest import FILE, Benchmark


def test_batch_topk_is_right_where_l1_takes_artifacts_for_chat_only(small: Benchmark) -> None:
    l1, batch_topk = small.row("l1", "Delta_norm"), small.row("batch_topk", "Latent Scaling")
    assert batch_topk["precision"] >= 0.95 and batch_topk["recall"] >= 0.75
    assert l1["precision"] <= 0.7
    assert l1["wrong_half_present"] + l1["wrong_loose"] >= 3
    assert abs(l1["l0"] - batch_topk["l0"]) < 0.6


def test_the_evidence_finds_what_delta_norm_bars_and_calls_nothing_false(small: Benchmark) -> None:
    """The default rule: at least the paper's recall, at its precision; a rule by direction alone is no substitute."""
    evidence, paper = small.row("batch_topk", "evidence"), small.row("batch_topk", "Latent Scaling")
    assert evidence["precision"] >= 0.95 and evidence["recall"] >= paper["recall"]
    assert small.row("l1", "direction")["precision"] <= small.row("l1", "evidence")["precision"]
    difference = small.row("difference", "evidence")
    assert difference["precision"] >= small.row("difference", "Latent Scaling")["precision"]


def test_what_other_seeds_find_again_is_at_most_what_one_seed_calls(small: Benchmark) -> None:
    """And no stated rate of false discoveries is below the true one, up to the one latent that chance allows."""
    one, again = small.row("batch_topk", "evidence"), small.row("batch_topk", "evidence, replicated")
    assert 0 < again["num_called"] <= one["num_called"] and again["precision"] >= one["precision"]
    for row in (one, again):
        assert 1 - row["precision"] <= row["stated"] + 1 / row["num_called"]
    assert np.isnan(small.row("batch_topk", "Delta_norm")["stated"])


@pytest.mark.parametrize("recipe", ["l1", "difference", "dedicated"])
def test_latent_scaling_makes_every_recipe_more_precise_at_the_same_recall(small: Benchmark, recipe: str) -> None:
    before, after = small.row(recipe, "Delta_norm"), small.row(recipe, "Latent Scaling")
    assert after["precision"] > before["precision"] + 0.2
    assert after["recall"] >= before["recall"] - 0.25


def test_a_difference_explains_differences_and_says_what_it_is_judged_by(small: Benchmark) -> None:
    job = next(job for job in small.trials if job.name == "difference")
    latents = pd.read_parquet(small.storage.url(f"{job.key.folder}/latents.parquet"))
    alive = latents[latents["frequency"] > 0]
    assert (alive["delta_norm"] == 1).all()
    assert alive[alive["verdict"] == "shared"]["reason"].str.contains(r"nu_act_centred\|? .* by construction").all()
    assert small.row("difference", "Delta_norm")["fve"] > 0.7


def test_the_table_has_every_recipe_under_both_rules(small: Benchmark) -> None:
    assert list(small.table.columns) == [column.name for column in SCORE_COLUMNS]
    expected = [r.name for r in small.config.recipes for rule in RULES if rule != "by_replication" or r.seeds > 1]
    assert small.table["recipe"].tolist() == expected
    assert small.table["precision_low"].isna().all()  # one seed has no interval
    text = score_text(small.table)
    assert len(text.splitlines()) == 2 + len(small.table) and "batch_topk" in text


def test_what_is_finished_is_read_and_not_made_again(small: Benchmark) -> None:
    results = benchmark.run(small.config, SilentReporter())
    assert results.num_made == 0
    pd.testing.assert_frame_equal(results.table, small.table)
    for name in ("scores.parquet", "scores.json", "scores.txt"):
        assert small.storage.exists(f"planted_results/planted/{name}")


def test_a_foreign_checkpoint_is_judged_as_its_recipe_was(small: Benchmark, tmp_path: Path) -> None:
    own = next(job for job in small.trials if job.name == "batch_topk")
    source = tmp_path / "foreign"
    Crosscoder.from_pretrained(small.storage.url(own.key.folder)).save_pretrained(source)
    config = benchmark.with_checkpoints(small.config, [f"mine@0={source}"])
    worlds, trials = benchmark.jobs_of(config)
    job = trials[-1]
    benchmark.record_job(config, small.storage, job, Trial(small.storage, config.training, config.judge)(job.item))
    table = benchmark.scored(config, small.storage, worlds, trials).set_index(["recipe", "rule"])
    columns = ["precision", "recall", "num_called", "l0", "fve"]
    for rule in [name for key, name in RULES.items() if key != "by_replication"]:
        ours, theirs = table.loc[("batch_topk", rule), columns], table.loc[("mine", rule), columns]
        np.testing.assert_allclose(ours.to_numpy(dtype=float), theirs.to_numpy(dtype=float))


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(small: Benchmark, tmp_path: Path) -> None:
    crosscoder = Crosscoder(4, 2, 8)
    crosscoder.save_pretrained(tmp_path / "narrow")
    item = {"folder": "x", "activations": small.worlds[0].key.folder, "source": str(tmp_path / "narrow")}
    with pytest.raises(InputError, match=r"2 models.* 32.* 2 and 8"):
        Trial(small.storage, small.config.training, small.config.judge)(item)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["mine"], "expected NAME=SOURCE or NAME@SEED=SOURCE, got 'mine'"),
        (["mine@a=x"], "got 'mine@a=x'"),
        (["l1=x"], "names that no recipe has, got \\['l1'\\]"),
        (["mine@7=x"], "seeds of \\[0\\], got \\[7\\]"),
        (["mine=x", "mine=y"], "distinct"),
    ],
)
def test_a_wrong_checkpoint_option_is_named(small_config: BenchmarkConfig, texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        benchmark.with_checkpoints(small_config, texts)


def test_a_wrong_key_of_the_file_is_named_with_the_nearest_one() -> None:
    with pytest.raises(InputError, match="did you mean 'frequency_min'"):
        load_as(BenchmarkConfig, FILE, ["world.frequency_mn=0.1"])
    with pytest.raises(InputError, match=r"at most frequency_max = 0\.15, got 0\.2"):
        load_as(BenchmarkConfig, FILE, ["world.frequency_min=0.2"])
    with pytest.raises(InputError, match=r"world.base_strength: expected \[low, high\]"):
        load_as(BenchmarkConfig, FILE, ["world.base_strength=[0.5, 0.3]"])


def test_activations_are_an_ordinary_store_with_the_truth_beside_it(small: Benchmark) -> None:
    folder = small.worlds[0].key.folder
    manifest = ActivationStore(small.storage, folder).manifest
    assert (manifest.num_rows("train"), manifest.num_rows("validation")) == (16000, 16000)
    assert (manifest.num_models, manifest.activation_dim, len(manifest.shards)) == (2, 32, 4)
    direction_CMD, truth = read_truth(small.storage, folder)
    assert len(direction_CMD) == len(truth) == 48
