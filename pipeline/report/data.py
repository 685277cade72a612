"""What a report is made of: plain frozen records of tables and settings, with no behaviour beyond checking columns.

The report stage fills a `ReportData` from artifacts; `page.render`, `figures.figures` and `verdict.verdict_text` read
it. Any analysis may have been off: its table is then None, and the page says so instead of showing an empty section.
Columns are those of `pipeline.schema`; more columns are welcome and ignored, missing ones are refused here, by name,
so that no chart fails halfway through a page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import pandas as pd

from pipeline import schema
from pipeline.analyses.autointerp_columns import AUTOINTERP_COLUMNS
from pipeline.analyses.example_columns import HISTOGRAM_COLUMNS, NEIGHBOUR_COLUMNS
from pipeline.analyses.logit_lens_columns import FIRST_TOKEN_COLUMNS, LOGIT_LENS_COLUMNS
from pipeline.analyses.planted_columns import PLANTED_COLUMNS
from pipeline.analyses.ratio_statistics import RATIO_COLUMNS
from pipeline.analyses.steering_columns import STEERING_COLUMNS, STEERING_SAMPLE_COLUMNS
from pipeline.errors import ArtifactError

CURVE_COLUMNS = ("step", "loss", "l0", "fve_base", "fve_chat", "dead_frac")
"""Columns that a table of training curves must have; threshold, lr and rows_per_second may be there too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LineageRow:
    """One artifact that the report's numbers descend from."""

    stage: str
    fingerprint: str
    path: str
    settings: Mapping[str, object] = field(default_factory=dict)
    """The few settings that a reader looks for first, e.g. {"layer": 3}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPairInfo:
    """The two models and how much text they read."""

    base: str
    """Hub id or path, with revision or adapter if there is one."""
    chat: str
    layer: int
    """Number of the decoder layer whose output was compared, counted from 0."""
    num_layers: int | None = None
    num_documents: int | None = None
    num_tokens: int | None = None
    num_rows: int | None = None
    """Activation rows, training and validation together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvidenceReport:
    """How different the two models are at all, measured without any crosscoder."""

    is_distinguishable: bool
    """False withholds every chat-specific call of the run."""
    reason: str
    """One or two sentences with the numbers."""
    distance: pd.DataFrame
    """analyses.distance.DISTANCE_COLUMNS: next tokens, by set of positions."""
    streams: pd.DataFrame
    """analyses.evidence.STREAM_COLUMNS: residual streams at the layer, by measure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CrosscoderReport:
    """Everything known about one crosscoder. A table is None (or empty) where its analysis was off."""

    name: str
    kind: str
    """Sparsity, e.g. "l1" or "batchtopk"; crosscoders of one kind share a colour family."""
    settings: Mapping[str, object] = field(default_factory=dict)
    fidelity: Mapping[str, float] | None = None
    """Keys of schema.FIDELITY_KEYS."""
    shortcomings: Sequence[str] = ()
    """What the crosscoder lacks for a verdict (analyses/quality.py); the page says it in place of an answer."""
    latents: pd.DataFrame | None = None
    causality: pd.DataFrame | None = None
    causality_differences: pd.DataFrame | None = None
    causality_curve: pd.DataFrame | None = None
    equivalence: pd.DataFrame | None = None
    controls: pd.DataFrame | None = None
    seeds: pd.DataFrame | None = None
    steering: pd.DataFrame | None = None
    steering_samples: pd.DataFrame | None = None
    examples: pd.DataFrame | None = None
    histograms: pd.DataFrame | None = None
    """How strongly the latents of `examples` fire on each corpus."""
    neighbours: pd.DataFrame | None = None
    """Latents with decoder rows near theirs."""
    logit_lens: pd.DataFrame | None = None
    """Tokens that its latents promote and suppress."""
    first_tokens: pd.DataFrame | None = None
    """Those of the first tokens' mean difference, the same for all crosscoders of a run."""
    planted: pd.DataFrame | None = None
    twins: pd.DataFrame | None = None
    ratios: pd.DataFrame | None = None
    curves: pd.DataFrame | None = None
    """Training curves by step; CURVE_COLUMNS and optionally more."""
    autointerp: pd.DataFrame | None = None
    """Explanations of latents by a language model, with their detection scores."""
    autointerp_model: str = ""
    """The model that explained, as its endpoint calls it."""
    nu_eps_threshold: float = 0.2
    """Below it the base model's reconstruction error does not hold the latent (arXiv 2504.02922, section 3)."""
    nu_r_threshold: float = 0.5
    """Below it other latents do not carry the concept in the base model's reconstruction."""

    def __post_init__(self) -> None:
        """Refuse tables that lack a column of the schema."""
        for name, columns in _REQUIRED.items():
            table: pd.DataFrame | None = getattr(self, name)
            if table is not None:
                _require_columns(table, columns, f"table {name} of crosscoder {self.name!r}")
        missing = [key for key in schema.FIDELITY_KEYS if self.fidelity is not None and key not in self.fidelity]
        if missing:
            raise ArtifactError(
                f"expected the fidelity of crosscoder {self.name!r} to have {', '.join(schema.FIDELITY_KEYS)}, "
                f"came without {', '.join(missing)}; run the fidelity analysis again"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """Input of the report: one run, its models, its crosscoders, and where every number came from."""

    run_name: str
    created: datetime
    """Time-zone aware."""
    code_version: str
    models: ModelPairInfo
    evidence: EvidenceReport | None = None
    """None where the run has not compared the models."""
    layer_note: str = ""
    """A sentence where the layer is known to carry little of the difference between the models."""
    crosscoders: Sequence[CrosscoderReport] = ()
    lineage: Sequence[LineageRow] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    """The resolved configuration, nested as in the YAML file."""


_REQUIRED = {
    "latents": tuple(column.name for column in schema.LATENT_COLUMNS),
    "causality": tuple(column.name for column in schema.CAUSALITY_COLUMNS),
    "causality_differences": tuple(column.name for column in schema.CAUSALITY_DIFFERENCE_COLUMNS),
    "causality_curve": tuple(column.name for column in schema.CAUSALITY_CURVE_COLUMNS),
    "equivalence": tuple(column.name for column in schema.EQUIVALENCE_COLUMNS),
    "controls": tuple(column.name for column in schema.CONTROL_COLUMNS),
    "seeds": tuple(column.name for column in schema.SEED_COLUMNS),
    "steering": tuple(column.name for column in STEERING_COLUMNS),
    "steering_samples": tuple(column.name for column in STEERING_SAMPLE_COLUMNS),
    "examples": tuple(column.name for column in schema.EXAMPLE_COLUMNS),
    "histograms": tuple(column.name for column in HISTOGRAM_COLUMNS),
    "neighbours": tuple(column.name for column in NEIGHBOUR_COLUMNS),
    "logit_lens": tuple(column.name for column in LOGIT_LENS_COLUMNS),
    "first_tokens": tuple(column.name for column in FIRST_TOKEN_COLUMNS),
    "planted": tuple(column.name for column in PLANTED_COLUMNS),
    "twins": tuple(column.name for column in schema.TWIN_COLUMNS),
    "ratios": tuple(column.name for column in RATIO_COLUMNS),
    "curves": CURVE_COLUMNS,
    "autointerp": tuple(column.name for column in AUTOINTERP_COLUMNS),
}


def _require_columns(table: pd.DataFrame, columns: Sequence[str], where: str) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ArtifactError(
            f"expected {where} to have the columns of schema version {schema.SCHEMA_VERSION}, came without "
            f"{', '.join(missing)}; run that analysis again with this version of crossray"
        )
