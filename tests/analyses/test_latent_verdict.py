import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.analyses.activation_statistics import ActivationStatistics
from pipeline.analyses.latent_scaling import LatentScaling
from pipeline.analyses.latent_sets import latents_with
from pipeline.analyses.ownership import ownership_table
from pipeline.analyses.rows import analyse, row_batch
from pipeline.analyses.twins import Twins
from pipeline.analyses.units import judged_decoder
from pipeline.analyses.verdict import artifact_frac, latent_table, verdict_counts, with_twins
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import BETA_COLUMNS, LATENT_COLUMNS, Ownership, Verdict

NAN = float("nan")
CASES = [
    # ownership, (nu_eps, low, high), (nu_r, low, high), documents, frequency, verdict, is_confident
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
    raw = ("delta_norm_raw", "decoder_norm_base_raw", "decoder_norm_chat_raw")
    ownership[[*names, *raw]] = 1.0
    scaling = pd.DataFrame({"latent": latent})
    for name, values in (("nu_eps", [case[1] for case in CASES]), ("nu_r", [case[2] for case in CASES])):
        scaling[[name, f"{name}_low", f"{name}_high"]] = np.array(values)
    scaling[["nu_act_centred", "nu_act_centred_low", "nu_act_centred_high"]] = NAN
    names = [f"nu_act{kind}{end}" for kind in ("", "_no_bias") for end in ("", "_low", "_high")]
    scaling[[*names, "artifact_probability", *(column.name for column in BETA_COLUMNS)]] = 1.0
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
            "frequency_web": 0.1,
        }
    )
    return ownership, scaling, templates


def test_each_verdict_follows_from_its_evidence() -> None:
    table = latent_table(*_tables())
    assert table["verdict"].tolist() == [case[5] for case in CASES]
    assert table["is_confident"].tolist() == [case[6] for case in CASES]
    assert list(table.columns) == [*(column.name for column in LATENT_COLUMNS), "frequency_web"]
    assert table["is_confident"].dtype == bool


def test_reasons_name_the_numbers_that_decided() -> None:
    reasons = latent_table(*_tables())["reason"].tolist()
    assert reasons[0] == "nu_eps 0.05 < 0.2, nu_r 0.10 < 0.5"
    assert reasons[6] == "nu_eps 0.60 >= 0.2, nu_r 0.90 >= 0.5"
    assert reasons[7] == "nu_eps undefined: the chat model's scale is not significantly above 0"
    assert reasons[9] == "fires in 9 documents, fewer than 10"
    assert reasons[11] == "never fires on the validation rows"
    assert reasons[12] == "Delta_norm 0.50"


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
    templates["num_documents"] = documents
    row = latent_table(ownership, scaling, templates).iloc[0]
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
    table = latent_table(*_tables(), nu_eps_threshold=2.0, nu_r_threshold=2.0, min_documents=1)
    is_decided = table["ownership"].eq(Ownership.CHAT_ONLY) & table["nu_eps"].notna() & table["nu_r"].notna()
    assert set(table[is_decided]["verdict"]) == {Verdict.CHAT_SPECIFIC}


def test_counts_name_every_verdict_and_add_up() -> None:
    counts = verdict_counts(latent_table(*_tables()))
    assert tuple(counts) == Verdict.ALL
    assert counts[Verdict.CHAT_SPECIFIC] == 4
    assert sum(counts.values()) == len(CASES)
    assert verdict_counts(pd.DataFrame({"verdict": [Verdict.SHARED]}))[Verdict.CHAT_SPECIFIC] == 0


def test_the_share_of_artifacts_is_of_the_latents_that_were_judged() -> None:
    table = latent_table(*_tables())
    assert artifact_frac(table) == 4 / 8  # of 12 chat-only latents three are undecided and one is dead
    assert np.isnan(artifact_frac(table[table["verdict"].isin([Verdict.DEAD, Verdict.UNDECIDED])]))


def test_latents_with_a_verdict_come_highest_delta_norm_first_and_may_be_none() -> None:
    table = latent_table(*_tables())
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
        "templates": ActivationStatistics(num_latents=6, corpora=("all",)),
        "twins": Twins(W_dec_FMD=crosscoder.W_dec_FMD),
    }
    sums = analyse(analyses, [row_batch(crosscoder, rows)])
    tables = {name: analysis.table(sums[name]) for name, analysis in analyses.items()}
    ownership = ownership_table(judged_decoder(crosscoder))
    table = latent_table(ownership, tables["scaling"], tables["templates"])
    table = with_twins(table, tables["twins"])
    expected = ["chat-specific", "shrinkage artifact", "decoupling artifact", "base-only", "shared", "dead"]
    assert table["verdict"].tolist() == expected
    assert table["is_confident"].tolist() == [True, True, True, False, False, False]
    assert table["nu_eps"][1] == pytest.approx(0.6, abs=0.1)  # the encoder's bias leaves some of both in the errors
    assert table["twin"].tolist() == [-1, -1, 3, 2, -1, -1]
    assert table["twin_divergence"][2] == 0


def test_tables_of_two_crosscoders_do_not_join() -> None:
    ownership, scaling, templates = _tables()
    with pytest.raises(InputError, match="Latent Scaling table, got 3"):
        latent_table(ownership, scaling.head(3), templates)
