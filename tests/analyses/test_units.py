"""Same function means no difference: a model against its own rescaled, shifted copy, judged from planted rows."""

import pytest
import torch

from pipeline.analyses.activation_statistics import ActivationStatistics
from pipeline.analyses.latent_scaling import LatentScaling
from pipeline.analyses.ownership import ownership_table
from pipeline.analyses.rows import RowAnalysis, analyse, row_batch
from pipeline.analyses.units import judged_decoder, per_model_normalisation
from pipeline.analyses.verdict import latent_table
from pipeline.numerics.crosscoder import Crosscoder, Normalisation
from pipeline.numerics.moments import moments_of
from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.sparsities.l1 import L1
from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer
from pipeline.schema import Ownership, Verdict

D, F, ROWS, DOCUMENTS = 24, 64, 4096, 256
SPARSITIES = {
    "batch_topk": BatchTopK(k=4, threshold_start_step=50, threshold_decay=0.9),
    "l1": L1(mu=0.05),
}


def rows_of_one_model(seed: int = 0) -> torch.Tensor:
    """x_BD of 48 sparse concepts with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    direction_CD = torch.nn.functional.normalize(torch.randn(48, D, generator=generator), dim=1)
    present_BC = torch.rand(ROWS, 48, generator=generator) < 0.06
    strength_BC = 2 + torch.rand(ROWS, 48, generator=generator)
    return (present_BC * strength_BC) @ direction_CD + 0.05 * torch.randn(ROWS, D, generator=generator)


def pair(scale: float, shift: float) -> torch.Tensor:
    """x_BMD: the chat model is the base model with another scale and a constant vector added."""
    x_BD = rows_of_one_model()
    offset_D = shift * torch.randn(D, generator=torch.Generator().manual_seed(9))
    return torch.stack([x_BD, scale * (x_BD + offset_D)], dim=1)


def fitted(x_BMD: torch.Tensor, kind: str, normalisation: Normalisation | None) -> Crosscoder:
    init_norm = 0.005 if kind == "l1" else 1.0
    spec = CrosscoderSpec(
        num_models=2,
        activation_dim=D,
        num_latents=F,
        num_steps=300,
        lr=5e-3,
        lr_warmup_steps=20,
        init_norm=init_norm,
        sparsity=SPARSITIES[kind],
    )
    trainer = CrosscoderTrainer(spec, normalisation=normalisation)
    trainer.initialise(x_BMD[:512])
    for step in range(300):
        start = step * 512 % ROWS
        trainer.step(x_BMD[start : start + 512])
    return trainer.crosscoder()


def verdicts(x_BMD: torch.Tensor, crosscoder: Crosscoder) -> dict[str, int]:
    rms_M = moments_of(x_BMD).variance_M().sqrt()
    analyses: dict[str, RowAnalysis] = {
        "scaling": LatentScaling(crosscoder, num_resamples=200, rms_M=rms_M),
        "templates": ActivationStatistics(num_latents=F, corpora=("all",)),
    }
    zeros_B = torch.zeros(ROWS, dtype=torch.int32)
    rows = {
        "x": x_BMD,
        "token_id": zeros_B,
        "doc_id": torch.arange(ROWS) // (ROWS // DOCUMENTS),
        "position": torch.arange(ROWS, dtype=torch.int32),
        "flags": zeros_B,
        "corpus": zeros_B,
    }
    batch = row_batch(crosscoder, rows)
    sums = analyse(analyses, [batch])
    table = latent_table(
        ownership_table(judged_decoder(crosscoder, rms_M)),
        analyses["scaling"].table(sums["scaling"]),
        analyses["templates"].table(sums["templates"]),
    )
    live = table[table["verdict"] != Verdict.DEAD]
    return {
        "live": len(live),
        "chat-specific": int((live["verdict"] == Verdict.CHAT_SPECIFIC).sum()),
        "chat-only": int((live["ownership"] == Ownership.CHAT_ONLY).sum()),
        "shared": int((live["ownership"] == Ownership.SHARED).sum()),
    }


@pytest.mark.parametrize("kind", list(SPARSITIES))
@pytest.mark.parametrize(("scale", "shift"), [(0.1, 0), (2, 0), (8, 0), (10, 3), (100, 0), (1, 30)])
def test_a_rescaled_or_shifted_copy_holds_nothing_new(kind: str, scale: float, shift: float) -> None:
    x_BMD = pair(scale, shift)
    counts = verdicts(x_BMD, fitted(x_BMD, kind, per_model_normalisation(moments_of(x_BMD))))
    assert counts["live"] >= 40
    assert (counts["chat-specific"], counts["chat-only"]) == (0, 0)
    assert counts["shared"] >= 0.9 * counts["live"]


@pytest.mark.parametrize("scale", [0.1, 8, 100])
def test_latents_fitted_on_raw_rows_are_judged_in_comparable_units(scale: float) -> None:
    """The same dictionary with the chat model's half rescaled by hand, so that only the judgement differs."""
    x_BMD = pair(1, 0)
    plain = fitted(x_BMD, "batch_topk", None)
    rescaled = Crosscoder(F, 2, D, activation="batch_topk", code_weight="none", k=4)
    scale_M1 = torch.tensor([1.0, scale])[:, None]
    with torch.no_grad():
        rescaled.W_enc_FMD.copy_(plain.W_enc_FMD / scale_M1)
        rescaled.W_dec_FMD.copy_(plain.W_dec_FMD * scale_M1)
        rescaled.b_dec_MD.copy_(plain.b_dec_MD * scale_M1)
        rescaled.b_enc_F.copy_(plain.b_enc_F)
    rescaled.threshold.copy_(plain.threshold / 2)
    counts = verdicts(x_BMD * scale_M1, rescaled)
    assert counts["live"] >= 40
    assert (counts["chat-specific"], counts["chat-only"]) == (0, 0)
    assert counts["shared"] >= 0.9 * counts["live"]


def test_normalised_rows_have_mean_0_and_equal_lengths() -> None:
    x_BMD = pair(10, 3)
    mean_MD, scale_M = per_model_normalisation(moments_of(x_BMD))
    normalised = moments_of((x_BMD - mean_MD) * scale_M[:, None])
    torch.testing.assert_close(
        normalised.variance_M(), torch.full((2,), float(D), dtype=torch.float64), rtol=1e-5, atol=0
    )
    assert normalised.mean_MD.abs().max() < 1e-4


def test_a_model_whose_rows_never_vary_is_refused() -> None:
    x_BMD = pair(1, 0)
    x_BMD[:, 0] = 1.0
    with pytest.raises(ValueError) as refused:
        per_model_normalisation(moments_of(x_BMD))
    assert "0.0" in str(refused.value)
