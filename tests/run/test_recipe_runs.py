"""A difference SAE and a crosscoder with dedicated latents through the whole path: Ray Train, analyses, tables."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from runs import TINY, Finished, copied, run_file

from pipeline.config.run_file import load
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.numerics.recipes import inputs_of
from pipeline.run import runner
from pipeline.schema import Ownership, Verdict
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.terminal import SilentReporter
from pipeline.tracking.tracker import RecordingTracker

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.rare]

NUM_DEDICATED = 16
"""Of each model: an eighth of the tiny run's 128 latents."""


class Made:
    """Tables and crosscoders of the run of both recipes."""

    def __init__(self, finished: Finished, folder: Path) -> None:
        root = copied(finished, folder, "organism", "corpus", "tokens", "activations")
        batch_topk = TINY["crosscoders"][1]
        crosscoders = [
            {**batch_topk, "name": "difference", "inputs": "difference"},
            {**batch_topk, "name": "dedicated", "dedicated_frac": NUM_DEDICATED / batch_topk["num_latents"]},
        ]
        analyses = {**TINY["analyses"], "steering": None, "planted": None}
        config = load(run_file(folder, str(root), crosscoders=crosscoders, analyses=analyses))
        self.outcome = runner.run(config, SilentReporter(), RecordingTracker())
        self.root = root
        self.states = {state.step.name: state for state in runner.inspect(config, Storage(str(root)))}

    def table(self, step: str, name: str) -> pd.DataFrame:
        return pd.read_parquet(self.root / self.states[step].step.key.folder / name)

    def counts(self, step: str) -> dict[str, Any]:
        record = self.states[step].record
        assert record is not None
        return record.counts

    def crosscoder(self, name: str) -> Crosscoder:
        return Crosscoder.from_pretrained(self.root / self.states[f"crosscoder {name}"].step.key.folder)


@pytest.fixture(scope="module")
def made(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(finished, tmp_path_factory.mktemp("recipes"))


def test_every_step_of_both_recipes_is_done(made: Made) -> None:
    assert {state.state for state in made.states.values()} == {"done"}
    assert Path(made.outcome.report_path).stat().st_size > 10_000


def test_a_difference_is_measured_on_the_difference(made: Made, finished: Finished) -> None:
    crosscoder = made.crosscoder("difference")
    assert inputs_of(crosscoder) == "difference"
    latents = made.table("latents difference", "latents.parquet")
    alive = latents[latents["frequency"] > 0]
    assert len(alive) > 20
    assert (latents["decoder_norm_base"] == 0).all() and (alive["decoder_norm_chat"] > 0).all()
    np.testing.assert_allclose(latents["encoder_norm_base"], latents["encoder_norm_chat"])
    assert (alive["delta_norm"] == 1).all() and (alive["ownership"] == Ownership.CHAT_ONLY).all()
    # Judged by the activations alone: neither kind of artifact can be said of a latent that base never had a row for.
    assert set(alive["verdict"]) <= {Verdict.CHAT_SPECIFIC, Verdict.STRONGER, Verdict.SHARED, Verdict.UNDECIDED}
    judged = alive[alive["verdict"] != Verdict.UNDECIDED]
    assert len(judged) and judged["nu_act_centred"].notna().all()
    is_held = judged["verdict"] != Verdict.CHAT_SPECIFIC
    assert (judged.loc[~is_held, "nu_act_centred"].abs() < 0.2).all()
    assert (judged.loc[is_held, "nu_act_centred"].abs() >= 0.2).all()
    stronger = judged[judged["verdict"] == Verdict.STRONGER]
    assert (stronger["nu_act_centred_low"] >= 0.2).all() and (stronger["nu_act_centred_high"] < 1).all()

    fidelity = made.counts("latents difference")["fidelity"]
    store = ActivationStore(finished.storage, made.states["activations"].step.key.folder)
    x_BMD = np.concatenate([store.read(s).x_BMD.float().numpy() for s in store.manifest.of_split("validation")])
    residual_BMD = torch.from_numpy(x_BMD) - crosscoder(torch.from_numpy(x_BMD))
    difference_BD, left_BD = x_BMD[:, 1] - x_BMD[:, 0], (residual_BMD[:, 1] - residual_BMD[:, 0]).numpy()
    assert fidelity["fve"] == pytest.approx(1 - left_BD.var(0).sum() / difference_BD.var(0).sum(), abs=1e-4)
    assert 0.1 < fidelity["fve"] < 1
    assert np.isnan([fidelity["fve_base"], fidelity["fve_chat"]]).all()


def test_the_latents_of_a_difference_close_the_kl(made: Made) -> None:
    """x^base + sum_j f_j d_j^chat is the chat model's stream as reconstructed, up to the bias."""
    kl = made.table("causality difference", "causality.parquet").set_index(["intervention", "positions"])["kl"]
    assert kl["chat", "all"] == pytest.approx(0, abs=1e-6)
    assert kl["all", "all"] < kl["none", "all"]


def test_dedicated_latents_have_nothing_in_the_other_model(made: Made) -> None:
    crosscoder, latents = made.crosscoder("dedicated"), made.table("latents dedicated", "latents.parquet")
    assert inputs_of(crosscoder) == "both"
    chat, base = latents.iloc[:NUM_DEDICATED], latents.iloc[NUM_DEDICATED : 2 * NUM_DEDICATED]
    free = latents.iloc[2 * NUM_DEDICATED :]
    for own, other, rows in (("chat", "base", chat), ("base", "chat", base)):
        assert (rows[f"decoder_norm_{other}"] == 0).all() and (rows[f"encoder_norm_{other}"] == 0).all()
        assert (rows[f"decoder_norm_{own}"] > 0).all() and (rows[f"encoder_norm_{own}"] > 0).all()
    assert (free[["decoder_norm_base", "decoder_norm_chat"]] > 0).all(axis=None)
    assert (chat["delta_norm"] == 1).all() and (base["delta_norm"] == 0).all()
    assert (chat["frequency"] > 0).any() and (base["frequency"] > 0).any()
    could_be = {Verdict.CHAT_SPECIFIC, Verdict.STRONGER, Verdict.SHARED, Verdict.UNDECIDED, Verdict.DEAD}
    assert set(chat["verdict"]) <= could_be
    assert set(base["verdict"]) <= {Verdict.BASE_ONLY, Verdict.OTHER, Verdict.DEAD}
    assert base["nu_eps"].isna().all()  # no chat direction to look for
    measured = chat[(chat["frequency"] > 0) & (chat["num_documents"] >= 10)]
    assert len(measured) and measured["beta_activation_chat"].notna().all()
    fidelity = made.counts("latents dedicated")["fidelity"]
    assert all(0 < fidelity[name] < 1 for name in ("fve", "fve_base", "fve_chat"))


def test_controls_and_contexts_follow_the_verdict_of_either_recipe(made: Made) -> None:
    for name in ("difference", "dedicated"):
        latents = made.table(f"latents {name}", "latents.parquet").set_index("latent")
        controls = made.table(f"controls {name}", "controls.parquet").set_index("control")
        is_called = latents["verdict"] == Verdict.CHAT_SPECIFIC
        assert controls.loc["stated error", "num_latents"] == is_called.sum()
        documented = (latents["ownership"] == Ownership.CHAT_ONLY) & (latents["num_documents"] >= 10)
        assert controls.loc["random directions", "num_latents"] == documented.sum()
        shown = made.table(f"examples {name}", "examples.parquet")["latent"].unique()
        assert set(latents.index[is_called]) <= set(shown)
