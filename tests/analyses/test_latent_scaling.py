from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.analyses.latent_scaling import NU_COLUMNS, LatentScaling
from pipeline.analyses.rows import RowBatch, analyse
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder, Normalisation
from pipeline.numerics.scaling import CENTRED
from pipeline.numerics.statistics import hash_documents
from pipeline.schema import BETA_COLUMNS
from pipeline.text.conversations import conversation_of


def _table(crosscoder: Crosscoder, batch: RowBatch, **options: object) -> pd.DataFrame:
    analysis = LatentScaling(crosscoder, num_resamples=100, **options)  # type: ignore[arg-type]
    return analysis.table(analyse({"s": analysis}, [batch])["s"])


def test_columns_hold_the_betas_of_a_loop_over_latents(make_world: Callable) -> None:
    world = make_world(num_documents=80)
    batch, crosscoder = world.batch(), world.crosscoder
    table = _table(crosscoder, batch)
    x_BMD, xh_BMD, code_BF = batch.x_BMD.double(), batch.reconstruction_BMD.double(), batch.codes.to_dense().double()
    W_dec_FMD, b_dec_MD = crosscoder.W_dec_FMD.detach().double(), crosscoder.b_dec_MD.detach().double()
    for latent in range(12):
        f_B, u_D = code_BF[:, latent], W_dec_FMD[latent, 1]
        beta = {}
        for model, name in enumerate(("base", "chat")):
            put_back = torch.outer(f_B, W_dec_FMD[latent, model])
            targets = {
                "activation": x_BMD[:, model],
                "activation_no_bias": x_BMD[:, model] - b_dec_MD[model],
                "reconstruction": xh_BMD[:, model],
                "error": x_BMD[:, model] - xh_BMD[:, model] + put_back,
            }
            for target, y_BD in targets.items():
                beta[f"beta_{target}_{name}"] = float((f_B[:, None] * y_BD).sum(0) @ u_D / (f_B @ f_B * (u_D @ u_D)))
        row = table.iloc[latent]
        assert {name: row[name] for name in beta} == pytest.approx(beta, rel=1e-4, nan_ok=True)
        for nu, target in NU_COLUMNS.items():
            if target == CENTRED:
                continue
            if row[nu] == row[nu]:
                assert row[nu] == pytest.approx(beta[f"beta_{target}_base"] / beta[f"beta_{target}_chat"], rel=1e-3)
                assert row[f"{nu}_low"] <= row[nu] <= row[f"{nu}_high"]
        dots_BM = torch.einsum("BMD,D->BM", x_BMD, u_D)
        covariance_M = (f_B[:, None] * (dots_BM - dots_BM.mean(0))).sum(0)
        if row["nu_act_centred"] == row["nu_act_centred"]:
            assert row["nu_act_centred"] == pytest.approx(float(covariance_M[0] / covariance_M[1]), rel=1e-3)
            assert row["nu_act_centred_low"] <= row["nu_act_centred"] <= row["nu_act_centred_high"]
    names = {name for beta_name in beta for name in (beta_name, f"{beta_name}_low", f"{beta_name}_high")}
    assert names == {column.name for column in BETA_COLUMNS} <= set(table.columns)
    assert table["nu_eps"].notna().sum() >= 4
    assert table["nu_act_centred"].notna().sum() >= 2
    assert table.iloc[0].drop("latent").isna().all()  # never fires: no number at all


def test_a_gain_is_the_error_that_the_other_half_of_the_documents_betas_take_off(make_world: Callable) -> None:
    world = make_world(num_documents=80)
    batch, crosscoder = world.batch(), world.crosscoder
    table = _table(crosscoder, batch)
    W_dec_FMD, code_BF = crosscoder.W_dec_FMD.detach().double(), batch.codes.to_dense().double()
    x_BMD, xh_BMD = batch.x_BMD.double(), batch.reconstruction_BMD.double()
    half_B = hash_documents(conversation_of(batch.doc_id_B), num_groups=64) % 2
    for latent in range(1, 12):
        f_B, u_D = code_BF[:, latent], W_dec_FMD[latent, 1]
        for model, name in enumerate(("base", "chat")):
            put_back = torch.outer(f_B, W_dec_FMD[latent, model])
            for target, y_BD in (
                ("reconstruction", xh_BMD[:, model]),
                ("error", x_BMD[:, model] - xh_BMD[:, model] + put_back),
            ):
                parts = [(y_BD[half_B == half], torch.outer(f_B[half_B == half], u_D)) for half in (0, 1)]
                betas = [float((y * fu).sum() / fu.square().sum()) for y, fu in parts]
                removed = [
                    [float(y.square().sum() - (y - beta * fu).square().sum()) for beta in betas] for y, fu in parts
                ]
                expected = (removed[0][1] + removed[1][0]) / (removed[0][0] + removed[1][1])
                assert table[f"gain_{target}_{name}"][latent] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_floor_leaves_out_the_rows_on_which_a_latent_is_weak(make_world: Callable) -> None:
    world = make_world(num_documents=80)
    batch, chosen = world.batch(), torch.tensor([2, 3, 7])
    floor_F = batch.codes.to_dense().amax(0) / 2
    strong = _table(world.crosscoder, batch, latents=chosen, floor_F=floor_F)
    kept = batch.codes.keep(batch.codes.values_P >= floor_F[batch.codes.latents_P])
    assert 0 < kept.num_pairs < batch.codes.num_pairs
    pd.testing.assert_frame_equal(
        strong, _table(world.crosscoder, batch._replace(codes=kept)).iloc[chosen].reset_index(drop=True)
    )


def test_a_normalised_crosscoder_is_judged_in_its_own_units(make_world: Callable) -> None:
    """The same dictionary on normalised activations, and on raw ones with the map folded in, gives one answer."""
    plain, normalised = make_world(num_documents=80), make_world(num_documents=80)
    mean_MD, scale_M = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 3.0])
    normalised.crosscoder.set_normalisation(Normalisation(mean_MD, scale_M))
    normalised.rows["x"] = plain.rows["x"] / scale_M[:, None] + mean_MD
    expected = _table(plain.crosscoder, plain.batch())
    pd.testing.assert_frame_equal(_table(normalised.crosscoder, normalised.batch()), expected, rtol=1e-3, atol=1e-4)


def test_an_offset_of_a_model_changes_no_centred_ratio(make_world: Callable) -> None:
    """The same codes beside activations that are moved by a constant per model, as residual streams are."""
    batch, crosscoder = (world := make_world(num_documents=80)).batch(), world.crosscoder
    offset_MD = 50 * torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    moved = batch._replace(x_BMD=batch.x_BMD + offset_MD)
    before, after = _table(crosscoder, batch), _table(crosscoder, moved)
    centred = after["nu_act_centred"].to_numpy()
    np.testing.assert_allclose(centred, before["nu_act_centred"].to_numpy(), rtol=1e-2, atol=1e-2)
    assert (after["nu_act"] - before["nu_act"]).abs().max() > 0.5


def test_random_directions_find_no_owner(make_world: Callable) -> None:
    """The control: with u random, the error holds next to nothing of u but what latent j itself puts there."""
    world = make_world(num_documents=80)
    direction = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    table = _table(world.crosscoder, world.batch(), direction_FD=direction)
    own = _table(world.crosscoder, world.batch())
    assert table["beta_error_chat"].abs().mean() < own["beta_error_chat"].abs().mean()


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="two models"):
        LatentScaling(Crosscoder(4, 3, 2))
    with pytest.raises(InputError, match="got 2"):
        LatentScaling(Crosscoder(4, 2, 2), num_groups=2)
    with pytest.raises(InputError, match=r"directions \[4, 2\], got \[4, 3\]"):
        LatentScaling(Crosscoder(4, 2, 2), direction_FD=torch.zeros(4, 3))


def test_the_base_models_view_is_that_of_the_pair_with_its_models_exchanged(make_world: Callable) -> None:
    world = make_world(num_documents=60)
    chosen = torch.tensor([1, 4, 6])
    mirrored = LatentScaling(world.crosscoder, num_resamples=50, owner=0, latents=chosen)
    table = mirrored.table(analyse({"s": mirrored}, world.batches())["s"])
    with torch.no_grad():
        for weights in (world.crosscoder.W_enc_FMD, world.crosscoder.W_dec_FMD, world.crosscoder.b_dec_MD):
            weights.copy_(weights.flip(-2))
    world.rows["x"] = world.rows["x"].flip(1)
    exchanged = LatentScaling(world.crosscoder, num_resamples=50, latents=chosen)
    expected = exchanged.table(analyse({"s": exchanged}, world.batches())["s"])
    pd.testing.assert_frame_equal(table, expected, rtol=1e-4, atol=1e-6)
    assert table["p_value"].notna().any()
