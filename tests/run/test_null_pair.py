"""One model as base and as chat: no latent is chat-only, and every analysis says so instead of failing or inventing."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from runs import TINY, Finished, copied, run_file

from pipeline.config.run_file import load
from pipeline.run import runner
from pipeline.schema import Control, Verdict
from pipeline.storage.filesystem import Storage
from pipeline.terminal import SilentReporter
from pipeline.tracking.tracker import RecordingTracker

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.rare]


def test_an_empty_chat_only_set_goes_through_every_analysis(finished: Finished, tmp_path: Path) -> None:
    root = copied(finished, tmp_path, "organism", "corpus")
    models = {**TINY["models"], "chat": TINY["models"]["base"]}
    power = {"num_concepts": 8, "strengths": [1.0, 2.0], "frequency": 0.02}
    crosscoders = [{**TINY["crosscoders"][1], "seeds": 3, "power": power}]
    training = {"batch_rows": 256, "num_rows": 12_800}
    analyses = {**TINY["analyses"], "steering": {**TINY["analyses"]["steering"], "latents": [0]}}
    config = load(
        run_file(tmp_path, str(root), models=models, crosscoders=crosscoders, training=training, analyses=analyses)
    )
    outcome = runner.run(config, SilentReporter(), RecordingTracker())
    folders = {state.step.name: root / state.step.key.folder for state in runner.inspect(config, Storage(str(root)))}
    usual = [section for section in config.fitted if section.name != "batch_topk.power"]
    assert len(usual) == 3 and len(config.fitted) == 4
    for section in usual:
        latents = pd.read_parquet(folders[f"latents {section.name}"] / "latents.parquet")
        assert not latents["verdict"].isin([Verdict.CHAT_SPECIFIC, *Verdict.ARTIFACTS, Verdict.UNDECIDED]).any()
    for name in (section.name for section in config.crosscoders):
        controls = pd.read_parquet(folders[f"controls {name}"] / "controls.parquet").set_index("control")
        assert controls.loc[Control.NULL_PAIR, "value"] == 0
        assert np.isnan(controls.loc[Control.STATED, "value"])  # no call, so no error to state
        assert np.isnan(controls.loc[Control.RANDOM, "value"])
        assert set(controls.index) == {
            *(Control.STATED, Control.RANDOM, Control.NULL_PAIR, Control.REPLICATED),
            *("seed batch_topk.seed1", "seed batch_topk.seed2"),
            *("power at strength 1", "power at strength 2"),
        }
        causality = pd.read_parquet(folders[f"causality {name}"] / "causality.parquet")
        assert causality[causality["intervention"] == "none"]["kl"].abs().max() < 1e-6
        assert (causality["num_latents"] <= 128).all()
    planted = pd.read_parquet(folders["controls batch_topk"] / "power.parquet")
    seen = pd.read_parquet(folders["latents batch_topk.power"] / "latents.parquet").set_index("latent")
    assert planted["verdict"].tolist() == seen["verdict"][planted["latent"]].tolist()
    shares = planted.groupby("strength")["is_found"].mean()  # fifty steps find little; it is told as it is
    assert shares.tolist() == [controls.loc[f"{Control.POWER} {strength:g}", "value"] for strength in shares.index]
    assert "batch_topk" in outcome.verdict and "cannot be told apart" in outcome.verdict
    assert Path(outcome.report_path).stat().st_size > 10_000
