import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.analyses.interventions import (
    Baselines,
    Intervention,
    SharedInputs,
    StreamEditor,
    curve_sizes,
    further_interventions,
    plan_curve,
    plan_interventions,
    principal_directions,
    shared_interventions,
    shared_stream,
)
from pipeline.analyses.latent_sets import causality_latents, is_of_chat_alone, rank_by_delta_norm, rank_by_nu
from pipeline.errors import InputError
from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import BASE, CHAT, Ownership


def _latents() -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "latent": np.arange(8, dtype=np.int32),
            "ownership": [Ownership.CHAT_ONLY] * 7 + [Ownership.SHARED],
            "delta_norm": [0.99, 0.95, 1.0, 0.97, 0.93, 0.98, 0.96, 0.5],
            "nu_eps": [0.1, 0.5, 0.0, 3.0, 0.2, np.nan, 0.05, 0.0],
            "nu_r": [0.2, 0.6, 0.3, 0.1, 0.1, 0.1, 0.4, 0.0],
            "nu_act": [0.05, -0.5, 0.2, 0.7, 0.1, -0.02, np.nan, 0.9],
            "decoder_norm_base": 0.1,
            "frequency": [0.1] * 7 + [0.2],
        }
    )
    return table.sample(frac=1, random_state=0)


def test_only_chat_only_latents_with_meaningful_ratios_are_chosen() -> None:
    assert sorted(causality_latents(_latents())["latent"]) == [0, 1, 2, 4, 6]
    assert causality_latents(_latents(), num_latents=2)["latent"].tolist() == [2, 0]
    with pytest.raises(InputError, match="nu_r is missing"):
        causality_latents(_latents().drop(columns="nu_r"))


def test_rankings_follow_rank_sums_and_delta_norm() -> None:
    chosen = causality_latents(_latents())
    # nu_eps ranks of 0 1 2 4 6: 3 5 1 4 2; nu_r ranks: 2 5 3 1 4; sums: 5 10 4 5 6
    assert rank_by_nu(chosen).tolist() == [2, 0, 4, 6, 1]
    assert rank_by_delta_norm(chosen).tolist() == [2, 0, 6, 1, 4]


def _chosen() -> pd.DataFrame:
    return causality_latents(_latents())


def test_plan_names_every_intervention_with_its_set() -> None:
    plan = {item.name: item for item in plan_interventions(_chosen(), num_random_halves=2, seed=1)}
    assert list(plan)[:6] == ["none", "template", "chat", "base", "all", "error"]
    assert plan["best_half_replace"].latents == (0, 2)
    assert plan["worst_half_add"] == Intervention("worst_half_add", "add", (1, 6))
    assert plan["best_half_replace_by_delta_norm"].latents == (0, 2)
    assert plan["worst_half_replace_by_delta_norm"].latents == (1, 4)
    random = [plan[f"random_half_{i}_{kind}"].latents for i in range(2) for kind in ("replace", "add")]
    assert random[0] == random[1]
    assert random[2] == random[3]
    assert all(len(members) == 2 and set(members) <= {0, 1, 2, 4, 6} for members in random)
    assert plan == {item.name: item for item in plan_interventions(_chosen(), num_random_halves=2, seed=1)}
    assert len(plan) == 6 + 8 + 4


def test_plan_without_qualifying_latents_has_empty_sets() -> None:
    nothing = causality_latents(_latents().query("latent == 7"))
    plan = plan_interventions(nothing, baselines=Baselines(torch.ones(3)))
    assert all(item.latents == () for item in plan)
    assert [item.name for item in plan][4:6] == ["mean_difference", "mean_difference_projection"]
    assert [item.name for item in plan_curve(nothing)] == ["first_0_evidence", "first_0_random_0"]


def test_a_dictionary_without_base_rows_is_ranked_by_the_activations_ratio() -> None:
    table = _latents().assign(decoder_norm_base=0.0, ownership=Ownership.CHAT_ONLY)
    assert is_of_chat_alone(table) and not is_of_chat_alone(_latents())
    chosen = causality_latents(table, num_latents=4)
    assert chosen["latent"].tolist() == [5, 0, 4, 2]  # no range of nu_eps, |nu_act| = 0.02, 0.05, 0.1, 0.2
    plan = {item.name: item.latents for item in plan_interventions(chosen, num_random_halves=0)}
    assert plan["best_half_add"] == (0, 5) and plan["worst_half_add"] == (2, 4)


def test_further_sets_follow_their_limits() -> None:
    table = _latents()
    assert further_interventions(table, _chosen(), ()) == ()
    sets = {item.name: item.latents for item in further_interventions(table, _chosen(), ("thresholds",))}
    assert sets == {
        "nu_act_below_0.1_add": (0, 4, 5),
        "nu_act_below_0.3_add": (0, 2, 4, 5),
        "nu_act_below_0.6_add": (0, 1, 2, 4, 5),
        "nu_act_above_0.6_add": (3, 7),
        "delta_norm_above_0.7_add": (0, 1, 2, 3, 4, 5, 6),
        "both_ratios_below_add": (0, 2, 6),
        "a_ratio_above_add": (1, 3, 4, 5),
    }
    table.loc[table["latent"].isin([3, 7]), "ownership"] = Ownership.BASE_ONLY
    found = further_interventions(table, _chosen(), ("base_only",))
    assert {item.name: (item.kind, item.latents) for item in found} == {
        "base_only_replace": ("replace", (3, 7)),
        "best_half_base_only_replace": ("replace", (0, 2, 3, 7)),
        "worst_half_base_only_replace": ("replace", (1, 3, 6, 7)),
    }


def test_principal_directions_are_the_eigenvectors_of_the_covariance() -> None:
    generator = torch.Generator().manual_seed(1)
    scale_D = torch.tensor([9.0, 5, 3, 0.4, 0.3, 0.2, 0.1, 0.1])
    turn_DD = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    rows_ND = torch.randn(500, 8, generator=generator) * scale_D @ turn_DD + 7
    principal_KD = principal_directions(rows_ND, 3, seed=0)
    assert principal_KD is not None
    vectors_DD = torch.linalg.eigh(torch.cov(rows_ND.double().T))[1].flip(1)
    torch.testing.assert_close(
        (principal_KD.double() @ vectors_DD[:, :3]).abs(), torch.eye(3).double(), atol=1e-4, rtol=0
    )
    assert torch.equal(principal_KD, principal_directions(rows_ND, 3, seed=0))
    assert principal_directions(rows_ND, 0, seed=0) is None
    assert principal_directions(rows_ND[:2], 9, seed=0).shape == (2, 8)  # type: ignore[union-attr]


def test_a_set_that_is_too_small_is_filled_by_delta_norm() -> None:
    assert causality_latents(_latents(), min_latents=5)["latent"].tolist() == [2, 0, 6, 1, 4]
    # latent 7 is shared but has ratios; 3 and 5 have none that mean anything
    assert causality_latents(_latents(), min_latents=8)["latent"].tolist() == [2, 0, 6, 1, 4, 7]
    assert causality_latents(_latents(), num_latents=2, min_latents=1)["latent"].tolist() == [2, 0]


def test_curves_add_latents_in_powers_of_two_and_end_in_the_same_set() -> None:
    assert [curve_sizes(n) for n in (0, 1, 2, 3, 4, 5, 8)] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 4, 5], [0, 1, 2, 4, 8],
    ]  # fmt: skip
    curve = plan_curve(_chosen(), num_random_orders=2, seed=3)
    by_order = {name: [item.latents for item in curve if item.order == name] for name in ("evidence", "random_1")}
    assert by_order["evidence"] == [(), (2,), (0, 2), (0, 2, 4, 6), (0, 1, 2, 4, 6)]
    assert [len(members) for members in by_order["random_1"]] == [0, 1, 2, 4, 5]
    assert by_order["random_1"][-1] == by_order["evidence"][-1]
    assert all(set(a) < set(b) for a, b in zip(by_order["random_1"], by_order["random_1"][1:], strict=False))
    assert curve == plan_curve(_chosen(), num_random_orders=2, seed=3)
    assert len({item.name for item in curve}) == len(curve) == 15


@pytest.mark.parametrize("with_mask", [False, True])
def test_edited_streams_equal_the_dense_formulas(with_mask: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    crosscoder = Crosscoder(9, 2, 5)
    with torch.no_grad():
        crosscoder.W_dec_FMD.copy_(torch.randn(9, 2, 5, generator=generator))
    code_BF = (torch.randn(6, 9, generator=generator) - 0.3).relu()
    codes = SparseCodes.from_dense(code_BF)
    mask_PM = torch.rand(codes.num_pairs, 2, generator=generator) > 0.4
    if with_mask:
        codes = codes._replace(model_mask_PM=mask_PM)
    code_BMF = code_BF[:, None].repeat(1, 2, 1)
    if with_mask:
        code_BMF[codes.rows_P(), :, codes.latents_P] *= mask_PM
    x_BMD = torch.randn(6, 2, 5, generator=generator)
    part_BMFD = code_BMF[..., None] * crosscoder.W_dec_FMD.detach().permute(1, 0, 2)
    delta_BFD = part_BMFD[:, CHAT] - part_BMFD[:, BASE]
    chosen = torch.isin(torch.arange(9), torch.tensor([1, 4, 5]))
    expected = {
        "all": x_BMD[:, BASE] + delta_BFD.sum(1),
        "error": x_BMD[:, CHAT] - delta_BFD.sum(1),
        "replace": x_BMD[:, BASE] + delta_BFD[:, chosen].sum(1),
        "add": x_BMD[:, BASE] + part_BMFD[:, CHAT][:, chosen].sum(1),
    }
    editor = StreamEditor(crosscoder)
    for kind, stream in expected.items():
        ours = editor.edited_stream(Intervention(kind, kind, (1, 4, 5)), x_BMD, codes)
        torch.testing.assert_close(ours, stream)
    empty = editor.edited_stream(Intervention("none", "replace"), x_BMD, codes)
    assert torch.equal(empty, x_BMD[:, BASE])


def test_streams_without_a_crosscoder_equal_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    x_NMD, mean_D = torch.randn(6, 2, 5, generator=generator), torch.randn(5, generator=generator)
    is_template = torch.tensor([True, False, False, True, True, False])
    has_codes = torch.tensor([False, True, True, True, True, True])
    is_first = torch.tensor([False, False, True, True, False, False])
    principal_KD = torch.linalg.qr(torch.randn(5, 3, generator=generator))[0].T
    inputs = SharedInputs(x_NMD, is_template, has_codes, is_first, Baselines(mean_D, principal_KD, 5))
    base_ND, chat_ND = x_NMD[:, BASE], x_NMD[:, CHAT]
    unit_D = mean_D / mean_D.norm()
    projected_ND = torch.stack([row + ((other - row) @ unit_D) * unit_D for row, other in zip(base_ND, chat_ND)])  # noqa: B905

    def along(number: int) -> torch.Tensor:
        return sum(torch.outer((chat_ND - base_ND) @ v_D, v_D) for v_D in principal_KD[:number])  # type: ignore[return-value]

    expected = {
        "none": base_ND,
        "base": base_ND,
        "chat": chat_ND,
        "template": torch.where(is_template[:, None], chat_ND, base_ND),
        "first": torch.where(is_first[:, None], chat_ND, base_ND),
        "template_and_first": torch.where((is_first | is_template)[:, None], chat_ND, base_ND),
        "principal_1": torch.where(has_codes[:, None], base_ND + along(1), base_ND),
        "principal_all": torch.where(has_codes[:, None], base_ND + along(3), base_ND),
        "mean_difference": torch.where(has_codes[:, None], base_ND + mean_D, base_ND),
        "mean_difference_projection": torch.where(has_codes[:, None], projected_ND, base_ND),
    }
    assert {item.kind for item in shared_interventions(inputs.baselines)} == set(expected)
    for kind, stream in expected.items():
        torch.testing.assert_close(shared_stream(kind, inputs), stream)
    no_difference = inputs._replace(baselines=Baselines(torch.zeros(5)))
    assert torch.equal(shared_stream("mean_difference_projection", no_difference), base_ND)


def test_more_than_two_models_are_refused() -> None:
    with pytest.raises(InputError, match="one over 3 activations"):
        StreamEditor(Crosscoder(4, 3, 5))
