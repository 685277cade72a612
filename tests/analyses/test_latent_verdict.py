import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.analyses.activation_statistics import ActivationStatistics
from pipeline.analyses.latent_scaling import LatentScaling
from pipeline.analyses.latent_sets import latents_with
from pipeline.analyses.ownership import classify, ownership_table
from pipeline.analyses.rows import analyse, row_batch
from pipeline.analyses.twins import Twins
from pipeline.analyses.units import judged_decoder
from pipeline.analyses.verdict import (
    Limits,
    artifact_frac,
    latent_table,
    verdict_counts,
    with_calls_withheld,
    with_twins,
)
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import BETA_COLUMNS, GAIN_COLUMNS, LATENT_COLUMNS, Grounds, Ownership, Verdict

NAN = float("nan")
SURE, UNSURE = 1e-5, 0.3
CASES = [
    # ownership, (nu_eps, low, high), (nu_r, low, high), documents, frequency, verdict by the paper's rule, is_confident
    (Ownership.CHAT_ONLY, (0.05, 0.0, 0.1), (0.1, 0.0, 0.3), 40, 0.1, Verdict.CHAT_SPECIFIC, True),
    (Ownership.CHAT_ONLY, (0.15, 0.0, 0.3), (0.1, 0.0, 0.3), 40, 0.1, Verdict.CHAT_SPECIFIC, False),
    (Ownership.CHAT_ONLY, (0.1, NAN, NAN), (0.1, 0.0, 0.3), 40, 0.1, Verdict.CHAT_SPECIFIC, False),
    (Ownership.CHAT_ONLY, (0.2, 0.19, 0.3), (0.1, 0.0, 0.3), 40, 0.1, Verdict.SHRINKAGE, False),
    (Ownership.CHAT_ONLY, (0.6, 0.2, 0.9), (0.1, 0.0, 0.3), 40, 0.1, Verdict.SHRINKAGE, True),
    (Ownership.CHAT_ONLY, (0.1, 0.0, 0.15), (0.9, 0.5, 1.2), 40, 0.1, Verdict.DECOUPLING, True),
    (Ownership.CHAT_ONLY, (0.6, 0.3, 0.9), (0.9, 0.7, 1.2), 40, 0.1, Verdict.BOTH, True),
    (Ownership.CHAT_ONLY, (NAN, NAN, NAN), (0.1, 0.0, 0.3), 40, 0.1, Verdict.UNDECIDED, False),
    (Ownership.CHAT_ONLY, (0.05, 0.0, 0.1), (NAN, NAN, NAN), 40, 0.1, Verdict.UNDECIDED, False),
    (Ownership.CHAT_ONLY, (0.05, 0.0, 0.1), (0.1, 0.0, 0.3), 9, 0.1, Verdict.UNDECIDED, False),
    (Ownership.CHAT_ONLY, (0.05, 0.0, 0.1), (0.1, 0.0, 0.3), 10, 0.1, Verdict.CHAT_SPECIFIC, True),
    (Ownership.CHAT_ONLY, (NAN, NAN, NAN), (NAN, NAN, NAN), 0, 0.0, Verdict.DEAD, False),
    (Ownership.SHARED, (1.0, 0.9, 1.1), (1.0, 0.9, 1.1), 40, 0.1, Verdict.SHARED, False),
    (Ownership.BASE_ONLY, (0.0, 0.0, 0.1), (0.0, 0.0, 0.1), 40, 0.1, Verdict.BASE_ONLY, False),
    (Ownership.OTHER, (0.0, 0.0, 0.1), (0.0, 0.0, 0.1), 40, 0.1, Verdict.OTHER, False),
    (Ownership.SHARED, (NAN, NAN, NAN), (NAN, NAN, NAN), 0, 0.0, Verdict.DEAD, False),
]


def _tables() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    latent = np.arange(len(CASES), dtype=np.int32)
    ownership = pd.DataFrame({"latent": latent, "ownership": [case[0] for case in CASES]})
    ownership["delta_norm"] = np.where(ownership["ownership"] == Ownership.CHAT_ONLY, 0.9 + latent / 1000, 0.5)
    names = ("decoder_norm_base", "decoder_norm_chat", "decoder_cosine", "encoder_norm_base", "encoder_norm_chat")
    raw = ("delta_norm_raw", "delta_direction", "decoder_norm_base_raw", "decoder_norm_chat_raw")
    ownership[[*names, *raw]] = 1.0
    scaling = pd.DataFrame({"latent": latent})
    for name, values in (("nu_eps", [case[1] for case in CASES]), ("nu_r", [case[2] for case in CASES])):
        scaling[[name, f"{name}_low", f"{name}_high"]] = np.array(values)
    scaling[["nu_act_centred", "nu_act_centred_low", "nu_act_centred_high"]] = NAN
    names = [f"nu_act{kind}{end}" for kind in ("", "_no_bias") for end in ("", "_low", "_high")]
    scaling[[*names, "artifact_probability", *(column.name for column in (*BETA_COLUMNS, *GAIN_COLUMNS))]] = 1.0
    is_artifact = [case[5] in Verdict.ARTIFACTS for case in CASES]
    is_known = scaling["nu_eps"].notna() & scaling["nu_r"].notna()
    p = np.where([case[6] for case in CASES], SURE, UNSURE)
    scaling["p_value"] = np.where(is_known, np.where(is_artifact, 0.9, p), NAN)
    scaling["p_held"] = np.where(is_known, np.where(is_artifact, p, 0.9), NAN)
    templates = pd.DataFrame(
        {
            "latent": latent,
            "num_documents": [case[3] for case in CASES],
            "frequency": [case[4] for case in CASES],
            **{
                name: 0.5
                for name in ("max_activation", "mean_activation", "template_frac", "user_frac", "assistant_frac")
            },
            "bos_frac": 0.0,
            "control_token": "",
            "control_token_frac": 0.0,
            "frequency_web": 0.1,
        }
    )
    return ownership, scaling, templates


def _one(
    delta_norm: float,
    *,
    nu: tuple[float, float] = (0.05, 0.1),
    share: tuple[float, float, float] = (NAN, NAN, NAN),
    p_value: float = SURE,
    p_value_base: float | None = None,
) -> pd.Series:
    """The verdict on a single latent in 40 documents."""
    ownership, scaling, templates = (table.head(1).copy() for table in _tables())
    ownership["delta_norm"], ownership["ownership"] = delta_norm, classify(torch.tensor([delta_norm]))
    scaling["nu_eps"], scaling["nu_r"] = nu
    scaling[["nu_act_centred", "nu_act_centred_low", "nu_act_centred_high"]] = share
    scaling["p_value"], scaling["p_held"] = p_value, 1e-5 if max(map(abs, nu)) > 0.5 else 0.9
    base = None if p_value_base is None else pd.DataFrame({"latent": [0], "p_value": [p_value_base]})
    return latent_table(ownership, scaling, templates, base_scaling=base).iloc[0]


def test_each_verdict_of_the_papers_rule_follows_from_its_ratios() -> None:
    table = latent_table(*_tables(), rule="paper")
    assert table["verdict"].tolist() == [case[5] for case in CASES]
    assert table["is_confident"].tolist() == [case[6] for case in CASES]
    assert list(table.columns) == [*(column.name for column in LATENT_COLUMNS), "frequency_web"]
    assert table["is_confident"].dtype == bool


def test_by_evidence_what_is_not_significant_is_undecided() -> None:
    table = latent_table(*_tables())
    is_unsure = [case[5] == Verdict.CHAT_SPECIFIC and not case[6] for case in CASES]
    expected = [Verdict.UNDECIDED if unsure else case[5] for unsure, case in zip(is_unsure, CASES, strict=True)]
    # Not asked along the base model's direction, base-only stays a matter of Delta_norm.
    assert table["verdict"].tolist() == expected
    assert table["is_confident"].tolist() == [case[6] for case in CASES]
    assert sum(is_unsure) == 2


@pytest.mark.parametrize(
    ("delta_norm", "verdict", "grounds"),
    [
        (0.95, Verdict.CHAT_SPECIFIC, Grounds.NORM_AND_EVIDENCE),
        (0.75, Verdict.CHAT_SPECIFIC, Grounds.EVIDENCE_ALONE),
        (0.61, Verdict.CHAT_SPECIFIC, Grounds.EVIDENCE_ALONE),
        (0.6, Verdict.ROTATED, Grounds.NONE),
        (0.5, Verdict.ROTATED, Grounds.NONE),
        (0.3, Verdict.ROTATED, Grounds.NONE),
        (0.05, Verdict.BASE_ONLY, Grounds.NONE),
    ],
)
def test_what_the_base_model_lacks_is_new_only_where_its_row_is_shorter(
    delta_norm: float, verdict: str, grounds: str
) -> None:
    row = _one(delta_norm)
    assert (row["verdict"], row["grounds"]) == (verdict, grounds)
    assert row["is_confident"] == (verdict != Verdict.BASE_ONLY)
    assert _one(delta_norm, p_value=UNSURE)["verdict"] not in (Verdict.CHAT_SPECIFIC, Verdict.ROTATED)


def test_a_ratio_far_below_zero_is_held() -> None:
    row = _one(0.95, nu=(0.05, -1.77), p_value=1.0)
    assert (row["verdict"], row["is_confident"]) == (Verdict.DECOUPLING, True)
    assert row["reason"] == "nu_eps 0.05 < 0.2, |nu_r| 1.77 >= 0.5"


@pytest.mark.parametrize(
    ("delta_norm", "share", "verdict"),
    [
        (0.75, (0.5, 0.4, 0.6), Verdict.STRONGER),
        (0.75, (0.9, 0.8, 1.1), Verdict.OTHER),
        (0.75, (0.3, 0.1, 0.5), Verdict.OTHER),
        (0.55, (0.5, 0.4, 0.6), Verdict.SHARED),
        (0.95, (0.5, 0.4, 0.6), Verdict.SHRINKAGE),
    ],
)
def test_a_share_significantly_below_one_is_stronger_in_chat(
    delta_norm: float, share: tuple[float, float, float], verdict: str
) -> None:
    row = _one(delta_norm, nu=(0.6, 0.1), share=share, p_value=0.9)
    assert row["verdict"] == verdict
    if verdict == Verdict.STRONGER:
        assert row["reason"] == "the base model's share is 0.50 [0.40, 0.60], Delta_norm 0.75"


@pytest.mark.parametrize(
    ("delta_norm", "p_value_base", "verdict", "grounds"),
    [
        (0.05, SURE, Verdict.BASE_ONLY, Grounds.NORM_AND_EVIDENCE),
        (0.3, SURE, Verdict.BASE_ONLY, Grounds.EVIDENCE_ALONE),
        (0.05, UNSURE, Verdict.OTHER, Grounds.NONE),
        (0.3, UNSURE, Verdict.OTHER, Grounds.NONE),
        (0.05, NAN, Verdict.BASE_ONLY, Grounds.NONE),
    ],
)
def test_base_only_is_judged_as_chat_specific_is(
    delta_norm: float, p_value_base: float, verdict: str, grounds: str
) -> None:
    row = _one(delta_norm, nu=(3.0, 3.0), p_value=0.9, p_value_base=p_value_base)
    assert (row["verdict"], row["grounds"], row["is_confident"]) == (verdict, grounds, grounds != Grounds.NONE)


def test_false_discoveries_are_counted_among_the_latents_that_can_be_called() -> None:
    """A hundred sure rotated latents must not let doubtful ones through above them."""
    size = 104
    ownership, scaling, templates = (pd.concat([table.head(1)] * size, ignore_index=True) for table in _tables())
    for table in (ownership, scaling, templates):
        table["latent"] = np.arange(size, dtype=np.int32)
    ownership["delta_norm"], ownership["ownership"] = 0.5, Ownership.SHARED
    ownership.loc[:3, "delta_norm"], ownership.loc[:3, "ownership"] = 0.75, Ownership.OTHER
    scaling.loc[:3, "p_value"] = [0.001, 0.04, 0.045, 0.9]
    table = latent_table(ownership, scaling, templates)
    assert table["verdict"].value_counts()[Verdict.ROTATED] == 100
    assert table["q_value"].tolist()[:4] == pytest.approx([0.004, 0.06, 0.06, 0.9])
    assert (table["verdict"] == Verdict.CHAT_SPECIFIC).tolist()[:4] == [True, False, False, False]


def test_reasons_name_the_numbers_that_decided() -> None:
    reasons = latent_table(*_tables(), rule="paper")["reason"].tolist()
    assert reasons[0] == "nu_eps 0.05 < 0.2, nu_r 0.10 < 0.5"
    assert reasons[6] == "nu_eps 0.60 >= 0.2, nu_r 0.90 >= 0.5"
    assert reasons[7] == "nu_eps undefined: the chat model's scale is not significantly above 0"
    assert reasons[9] == "fires in 9 documents, fewer than 10"
    assert reasons[11] == "never fires on the validation rows"
    assert reasons[12] == "Delta_norm 0.50"
    reasons = latent_table(*_tables())["reason"].tolist()
    assert reasons[1] == "nu_eps 0.15 < 0.2, nu_r 0.10 < 0.5, q 0.6"
    assert _one(0.5)["reason"] == "nu_eps 0.05 < 0.2, nu_r 0.10 < 0.5, q 1e-05, Delta_norm 0.50"


@pytest.mark.parametrize(
    ("nu_act", "documents", "verdict", "is_confident", "reason"),
    [
        (
            (0.05, 0.0, 0.1),
            40,
            Verdict.CHAT_SPECIFIC,
            True,
            "nu_act_centred 0.05 < 0.2 (Delta_norm is 1 by construction)",
        ),
        (
            (0.15, 0.1, 0.3),
            40,
            Verdict.CHAT_SPECIFIC,
            False,
            "nu_act_centred 0.15 < 0.2 (Delta_norm is 1 by construction)",
        ),
        ((0.53, 0.5, 0.6), 40, Verdict.SHARED, True, "nu_act_centred 0.53 >= 0.2 (Delta_norm is 1 by construction)"),
        ((0.05, 0.0, 0.1), 9, Verdict.UNDECIDED, False, "fires in 9 documents, fewer than 10"),
        (
            (NAN, NAN, NAN),
            40,
            Verdict.UNDECIDED,
            False,
            "nu_act_centred undefined: the chat model's scale is not significantly above 0",
        ),
    ],
)
def test_a_latent_made_without_a_base_decoder_is_judged_by_the_activations(
    nu_act: tuple[float, float, float], documents: int, verdict: str, is_confident: bool, reason: str
) -> None:
    ownership, scaling, templates = (table.head(1).copy() for table in _tables())
    ownership["decoder_norm_base"] = 0.0
    scaling[["nu_eps", "nu_r"]] = 0.9  # of a difference SAE they mean nothing
    scaling[["nu_act_centred", "nu_act_centred_low", "nu_act_centred_high"]] = nu_act
    scaling["p_value"], scaling["p_held"] = (SURE, 0.9) if is_confident and nu_act[0] < 0.2 else (UNSURE, SURE)
    templates["num_documents"] = documents
    row = latent_table(ownership, scaling, templates, rule="paper").iloc[0]
    assert (row["verdict"], row["is_confident"], row["reason"]) == (verdict, is_confident, reason)


def test_a_latent_made_without_a_chat_decoder_is_base_only_by_construction() -> None:
    ownership, scaling, templates = (table[13:14].copy() for table in _tables())
    ownership[["decoder_norm_chat", "delta_norm"]] = 0.0
    row = latent_table(ownership, scaling, templates).iloc[0]
    assert (row["verdict"], row["reason"]) == (Verdict.BASE_ONLY, "Delta_norm 0.00 by construction")


def test_each_latent_is_given_its_most_parallel_twin() -> None:
    twins = pd.DataFrame(
        {
            "latent_chat": [0, 0, 1],
            "latent_base": [13, 14, 13],
            "cosine": [0.97, 0.95, 0.99],
            "divergence": [0.8, 0.7, NAN],
            "num_high_rows": [5, 6, 0],
        }
    )
    table = with_twins(latent_table(*_tables()), twins)
    assert table["twin"].tolist()[:2] == [13, 13]
    assert table["twin"][13] == 1
    assert table["twin"][14] == 0
    assert table["twin_cosine"][13] == 0.99
    assert table["twin_divergence"][0] == 0.8
    assert (table["twin"] >= 0).sum() == 4
    for untouched in (latent_table(*_tables()), with_twins(latent_table(*_tables()), twins.head(0))):
        assert (untouched["twin"] == -1).all()
        assert untouched["twin"].dtype == np.int32
        assert untouched["twin_cosine"].isna().all()


def test_thresholds_are_the_callers() -> None:
    table = latent_table(*_tables(), limits=Limits(nu_eps=2.0, nu_r=2.0, min_documents=1), rule="paper")
    is_decided = table["ownership"].eq(Ownership.CHAT_ONLY) & table["nu_eps"].notna() & table["nu_r"].notna()
    assert set(table[is_decided]["verdict"]) == {Verdict.CHAT_SPECIFIC}


def test_counts_name_every_verdict_and_add_up() -> None:
    counts = verdict_counts(latent_table(*_tables(), rule="paper"))
    assert tuple(counts) == Verdict.ALL
    assert counts[Verdict.CHAT_SPECIFIC] == 4
    assert sum(counts.values()) == len(CASES)
    assert verdict_counts(pd.DataFrame({"verdict": [Verdict.SHARED]}))[Verdict.CHAT_SPECIFIC] == 0


def test_the_share_of_artifacts_is_of_the_latents_that_were_judged() -> None:
    table = latent_table(*_tables(), rule="paper")
    assert artifact_frac(table) == 4 / 8  # of 12 chat-only latents three are undecided and one is dead
    assert np.isnan(artifact_frac(table[table["verdict"].isin([Verdict.DEAD, Verdict.UNDECIDED])]))


def test_latents_with_a_verdict_come_highest_delta_norm_first_and_may_be_none() -> None:
    table = latent_table(*_tables(), rule="paper")
    assert latents_with(table, [Verdict.CHAT_SPECIFIC]) == [10, 2, 1, 0]
    assert latents_with(table[table["verdict"] == Verdict.SHARED], [Verdict.CHAT_SPECIFIC]) == []
    with pytest.raises(InputError, match="got new"):
        latents_with(table, ["new"])


def _planted_world(seed: int) -> tuple[Crosscoder, dict[str, torch.Tensor]]:
    """A dictionary that knows its concepts, one axis each: a new one in chat, one that base holds outside of its
    reconstruction, one that base reconstructs with another latent, that latent, and a shared one."""
    generator = torch.Generator().manual_seed(seed)
    crosscoder = Crosscoder(6, 2, 6)
    W_dec_FMD = torch.zeros(6, 2, 6)
    for latent, axis, scales in ((0, 0, (0, 1)), (1, 1, (0, 1)), (2, 2, (0, 1)), (3, 2, (1, 0)), (4, 3, (1, 1))):
        W_dec_FMD[latent, :, axis] = torch.tensor(scales, dtype=torch.float32).clamp(min=1e-6)  # learnt, so never 0
    with torch.no_grad():
        crosscoder.W_dec_FMD.copy_(W_dec_FMD)
        crosscoder.W_enc_FMD.copy_(W_dec_FMD / W_dec_FMD.square().sum((1, 2), keepdim=True).clamp(min=1e-9))
        crosscoder.b_enc_F.fill_(-0.3)  # noise does not fire
    doc_id = torch.arange(60).repeat_interleave(20)
    strength = (1 + torch.rand(1200, 4, generator=generator)) * (torch.rand(1200, 4, generator=generator) > 0.6)
    x_BMD = 0.05 * torch.randn(1200, 2, 6, generator=generator)
    held_by_base = torch.tensor([0.0, 0.6, 1.0, 1.0])
    x_BMD[:, 0, :4] += held_by_base * strength
    x_BMD[:, 1, :4] += strength
    zeros = torch.zeros(1200, dtype=torch.int32)
    rows = {"x": x_BMD, "doc_id": doc_id, "token_id": zeros, "position": zeros, "flags": zeros, "corpus": zeros}
    return crosscoder, rows


def test_planted_concepts_get_the_verdict_that_made_them() -> None:
    crosscoder, rows = _planted_world(0)
    analyses = {
        "scaling": LatentScaling(crosscoder, num_resamples=200),
        "base_scaling": LatentScaling(crosscoder, num_resamples=200, owner=0, latents=torch.tensor([3])),
        "templates": ActivationStatistics(num_latents=6, corpora=("all",)),
        "twins": Twins(W_dec_FMD=crosscoder.W_dec_FMD),
    }
    sums = analyse(analyses, [row_batch(crosscoder, rows)])
    tables = {name: analysis.table(sums[name]) for name, analysis in analyses.items()}
    ownership = ownership_table(judged_decoder(crosscoder))
    table = latent_table(ownership, tables["scaling"], tables["templates"], base_scaling=tables["base_scaling"])
    table = with_twins(table, tables["twins"])
    # The chat model holds with latent 2 what latent 3 stands for: base-only by Delta_norm, not by the evidence.
    expected = ["chat-specific", "shrinkage artifact", "decoupling artifact", "other", "shared", "dead"]
    assert table["verdict"].tolist() == expected
    assert table["is_confident"].tolist() == [True, True, True, False, True, False]
    assert table["nu_eps"][1] == pytest.approx(0.6, abs=0.1)  # the encoder's bias leaves some of both in the errors
    assert table["twin"].tolist() == [-1, -1, 3, 2, -1, -1]
    assert table["twin_divergence"][2] == 0


def test_tables_of_two_crosscoders_do_not_join() -> None:
    ownership, scaling, templates = _tables()
    with pytest.raises(InputError, match="Latent Scaling table, got 3"):
        latent_table(ownership, scaling.head(3), templates)


def test_a_copy_with_a_rotated_residual_stream_holds_nothing_new() -> None:
    """The same function, each concept in another direction: the base model lacks d^chat, and still nothing is new."""
    crosscoder, rows = _planted_world(0)
    generator = torch.Generator().manual_seed(1)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    concepts = torch.eye(6)[:4]
    W_dec_FMD = torch.zeros(6, 2, 6)
    W_dec_FMD[:4, 0], W_dec_FMD[:4, 1] = concepts.roll(1, dims=0) @ rotation, concepts @ rotation
    with torch.no_grad():
        crosscoder.W_dec_FMD.copy_(W_dec_FMD)
        crosscoder.W_enc_FMD.copy_(W_dec_FMD / 2)
    strength = rows["x"][:, 1, :4].clamp(min=0)
    noise = 0.02 * torch.randn(1200, 2, 6, generator=generator)
    rows["x"] = torch.einsum("BF,FMD->BMD", strength, W_dec_FMD[:4]) + noise
    analyses = {
        "scaling": LatentScaling(crosscoder, num_resamples=200),
        "templates": ActivationStatistics(num_latents=6, corpora=("all",)),
    }
    sums = analyse(analyses, [row_batch(crosscoder, rows)])
    tables = {name: analysis.table(sums[name]) for name, analysis in analyses.items()}
    table = latent_table(ownership_table(judged_decoder(crosscoder)), tables["scaling"], tables["templates"])
    assert table["verdict"].tolist() == [Verdict.ROTATED] * 4 + [Verdict.DEAD] * 2
    assert table["delta_direction"].tolist()[:4] == pytest.approx([1.0] * 4, abs=1e-6)


def test_no_latent_says_that_models_differ_which_cannot_be_told_apart() -> None:
    difference = [Verdict.CHAT_SPECIFIC, Verdict.STRONGER, Verdict.ROTATED, Verdict.BASE_ONLY]
    verdicts = [*difference, Verdict.SHRINKAGE, Verdict.SHARED, Verdict.UNDECIDED, Verdict.DEAD]
    table = pd.DataFrame(
        {"verdict": verdicts, "is_confident": True, "grounds": Grounds.EVIDENCE_ALONE, "reason": "own"}
    )
    withheld = with_calls_withheld(table, "they are equal")
    assert withheld["verdict"].tolist() == [Verdict.WITHHELD, *[Verdict.OTHER] * 3, *verdicts[4:]]
    assert withheld["is_confident"].tolist() == [False] * 4 + [True] * 4
    assert withheld["grounds"].tolist() == [Grounds.NONE] * 4 + [Grounds.EVIDENCE_ALONE] * 4
    assert withheld["reason"].tolist() == ["they are equal"] * 4 + ["own"] * 4
    assert table["verdict"].tolist() == verdicts
