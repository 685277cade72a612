"""A finished run through the library: what it opens, fits and judges is what the stages made."""

import pandas as pd
import pytest
import torch
from runs import Finished, contents

import crossray
from pipeline.schema import DELTA_NORM_ORIENTATION


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
