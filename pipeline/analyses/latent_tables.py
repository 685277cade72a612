"""The latent table as a whole: which analyses its columns come from, and the verdict over them.

The stage of a run, the planted benchmark and the library all ask here, so a latent has one verdict wherever it is
judged. The settings are those of a run file's `analyses.latent_scaling`, whose fields bear the same names.

Shapes: M models, F latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import pandas as pd
from torch import Tensor

from pipeline.analyses.activation_statistics import ActivationStatistics
from pipeline.analyses.fidelity import Fidelity
from pipeline.analyses.latent_scaling import LatentScaling
from pipeline.analyses.ownership import delta_norm, ownership_table
from pipeline.analyses.rows import RowAnalysis
from pipeline.analyses.units import JudgedDecoder, judged_decoder
from pipeline.analyses.verdict import SHARED_LOW, Limits, latent_table
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.numerics.recipes import inputs_of
from pipeline.schema import BASE

CHECKED_ROWS = ("training", "strong")
"""Rows on which the ratios of chat-only latents may be estimated once more (schema.CHECKED_NU_COLUMNS)."""


class VerdictSettings(Protocol):
    """What the verdict depends on beside the rows; documented at the section of a run file."""

    @property
    def rule(self) -> Literal["evidence", "paper"]: ...  # noqa: D102
    @property
    def false_discovery_rate(self) -> float: ...  # noqa: D102
    @property
    def nu_eps_threshold(self) -> float: ...  # noqa: D102
    @property
    def nu_r_threshold(self) -> float: ...  # noqa: D102
    @property
    def min_documents(self) -> int: ...  # noqa: D102
    @property
    def num_groups(self) -> int: ...  # noqa: D102
    @property
    def num_resamples(self) -> int: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102


def verdict_analyses(
    crosscoder: Crosscoder, settings: VerdictSettings, *, corpora: Sequence[str], rms_M: Tensor
) -> dict[str, RowAnalysis]:
    """What the verdict takes from the rows, by name; `verdict_table` takes their tables.

    rms_M is the root mean square of each model's rows (units.py).
    """
    num_latents = crosscoder.num_latents
    analyses: dict[str, RowAnalysis] = {
        "fidelity": Fidelity(
            activation_dim=crosscoder.activation_dim,
            num_latents=num_latents,
            inputs=inputs_of(crosscoder),
        ),
        "scaling": latent_scaling(crosscoder, settings, rms_M=rms_M),
        "templates": ActivationStatistics(num_latents=num_latents, corpora=corpora),
    }
    may_be_base_only_F = delta_norm(judged_decoder(crosscoder, rms_M).W_dec_FMD) < SHARED_LOW
    if settings.rule == "evidence" and may_be_base_only_F.any():
        chosen = may_be_base_only_F.nonzero().squeeze(1)
        analyses["base_scaling"] = latent_scaling(crosscoder, settings, rms_M=rms_M, owner=BASE, latents=chosen)
    return analyses


def latent_scaling(crosscoder: Crosscoder, settings: VerdictSettings, **options: Any) -> LatentScaling:
    """Latent Scaling with these settings; `options` are its further arguments."""
    return LatentScaling(
        crosscoder,
        num_groups=settings.num_groups,
        num_resamples=settings.num_resamples,
        seed=settings.seed,
        thresholds=(settings.nu_eps_threshold, settings.nu_r_threshold),
        **options,
    )


def verdict_table(decoder: JudgedDecoder, tables: Mapping[str, Any], settings: VerdictSettings) -> pd.DataFrame:
    """The latent table, twins aside, from the tables of `verdict_analyses` and any of CHECKED_ROWS."""
    table = latent_table(
        ownership_table(decoder),
        tables["scaling"],
        tables["templates"],
        base_scaling=tables.get("base_scaling"),
        limits=limits_of(settings),
        rule=settings.rule,
    )
    for rows in CHECKED_ROWS:
        if tables.get(rows) is not None:
            again = tables[rows].set_index("latent")
            for name in ("nu_eps", "nu_r"):
                table[f"{name}_{rows}"] = table["latent"].map(again[name])
    return table


def limits_of(settings: VerdictSettings) -> Limits:
    """The numbers that the verdict depends on."""
    return Limits(
        nu_eps=settings.nu_eps_threshold,
        nu_r=settings.nu_r_threshold,
        min_documents=settings.min_documents,
        false_discovery_rate=settings.false_discovery_rate,
    )
