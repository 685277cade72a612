"""One model as base and as chat: no latent is chat-only, some never fire, and every analysis of rows says so."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pipeline.analyses.activation_statistics import ActivationStatistics
from pipeline.analyses.controls import false_calls_row, random_row, stated_row
from pipeline.analyses.examples import Examples, contexts
from pipeline.analyses.fidelity import Fidelity
from pipeline.analyses.latent_scaling import LatentScaling
from pipeline.analyses.latent_sets import latents_with
from pipeline.analyses.ownership import delta_norm, ownership_table
from pipeline.analyses.planted import MeanDifference, Planted
from pipeline.analyses.rows import analyse
from pipeline.analyses.twins import Twins
from pipeline.analyses.units import judged_decoder
from pipeline.analyses.verdict import Limits, latent_table, verdict_counts, with_twins
from pipeline.schema import LATENT_COLUMNS, Verdict


def test_a_pair_without_a_difference_gives_shared_and_dead_latents_and_no_number_from_nothing(
    make_world: Callable,
) -> None:
    world = make_world(num_documents=60)
    crosscoder = world.crosscoder
    with torch.no_grad():
        for weights in (crosscoder.W_enc_FMD, crosscoder.W_dec_FMD, crosscoder.b_dec_MD):
            weights[..., 0, :] = weights[..., 1, :]
    world.rows["x"][:, 0] = world.rows["x"][:, 1]
    analyses = {
        "fidelity": Fidelity(activation_dim=6, num_latents=12),
        "scaling": LatentScaling(crosscoder, num_resamples=100),
        "templates": ActivationStatistics(num_latents=12, corpora=("web", "chat")),
        "twins": Twins(W_dec_FMD=crosscoder.W_dec_FMD),
        "examples": Examples(num_latents=12, num_contexts=2, corpora=("web", "chat")),
        "mean_difference": MeanDifference(activation_dim=6, chat_corpora=(1,), first_tokens=4),
        "planted": Planted(
            activation_dim=6, num_latents=12, labels=("a", "b"), chat_corpora=(1,), mean_difference_D=torch.zeros(6)
        ),
    }
    sums = analyse(analyses, world.batches())
    tables = {name: analyses[name].table(sums[name]) for name in ("fidelity", "scaling", "templates", "twins")}
    ownership = ownership_table(judged_decoder(crosscoder))
    table = with_twins(latent_table(ownership, tables["scaling"], tables["templates"]), tables["twins"])

    assert not (delta_norm(crosscoder.W_dec_FMD.detach()) >= 0.9).any()
    counts = verdict_counts(table)
    assert counts[Verdict.SHARED] + counts[Verdict.DEAD] == 12
    assert counts[Verdict.DEAD] >= 1
    assert latents_with(table, [Verdict.CHAT_SPECIFIC, *Verdict.ARTIFACTS, Verdict.UNDECIDED]) == []

    silent = table.iloc[0]  # latent 0 never fires
    assert silent["verdict"] == Verdict.DEAD
    assert silent["reason"] == "never fires on the validation rows"
    measured = [column.name for column in LATENT_COLUMNS if column.name.startswith(("nu_", "beta_"))]
    assert silent[[*measured, "artifact_probability", "mean_activation", "template_frac"]].isna().all()
    live = table[table["verdict"] == Verdict.SHARED]
    assert live["nu_act"].dropna().tolist() == pytest.approx([1.0] * live["nu_act"].notna().sum())

    assert tables["twins"].empty
    scored = analyses["planted"].table(sums["planted"], [])
    nobody = scored[scored["candidate"].str.contains("specific")]
    assert (nobody["latent"] == -1).all()
    assert nobody["auroc"].isna().all()
    assert analyses["mean_difference"].table(sums["mean_difference"])["norm"] == 0
    chosen = analyses["examples"].table_of(sums["examples"], [])
    assert contexts(chosen, world.batches(), window_tokens=2, token_texts=lambda ids: [str(i) for i in ids]).empty
    assert np.isnan(stated_row(table)["value"])
    assert np.isnan(random_row(table, None, Limits())["value"])
    assert false_calls_row(table, noise=0.0)["value"] == 0
