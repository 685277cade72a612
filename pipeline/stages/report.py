"""Every artifact of a run becomes one page, its figures, and the verdict table that the terminal prints.

No Ray: the tables are small. The page is rendered from records and tables alone, so `crossray report` can do it again
at any time.
"""

import time
from collections.abc import Mapping, Sequence
from datetime import datetime

import pandas as pd

from pipeline.analyses.quality import Limits, shortcomings
from pipeline.config.analyses import QualitySection
from pipeline.config.crosscoder import CrosscoderSection
from pipeline.report.data import CrosscoderReport, EvidenceReport, LineageRow, ModelPairInfo, ReportData
from pipeline.report.figures import figures
from pipeline.report.page import render
from pipeline.report.verdict import verdict_text
from pipeline.schema import Split
from pipeline.stages import autointerp, causality, controls, logit_lens, steering
from pipeline.stages.catalogue import CrosscoderSteps, DataSteps, ReportInputs
from pipeline.stages.evidence import DISTANCE_NAME, STREAMS_NAME, judgement_of
from pipeline.stages.examples import EXAMPLES_NAME, HISTOGRAMS_NAME, NEIGHBOURS_NAME
from pipeline.stages.finished_crosscoder import read_curve
from pipeline.stages.latents import FIDELITY_NAME, RATIOS_NAME, TWINS_NAME, read_latents
from pipeline.stages.planted import PLANTED_NAME
from pipeline.stages.step import StageContext, StageInputs, Step
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.artifacts import provenance, read_record
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import read_table

_LINEAGE_SETTINGS = {
    "organism": ("size", "seed"),
    "corpus": ("validation_frac",),
    "tokens": ("num_tokens", "max_tokens_per_document"),
    "activations": ("layer", "dtype", "rows_per_shard"),
    "crosscoder": ("sparsity", "num_latents", "expansion", "lr", "seed", "source", "revision"),
}
"""Fields of a stage's section that the lineage table shows."""


LITTLE_SHARE = 0.2
"""A run at a layer that carries less of the difference in behaviour says so first."""


def run(steps: Sequence[Step[ReportInputs]], context: StageContext) -> None:
    """Render the page, write its figures and the verdict table."""
    (step,) = steps
    started = time.monotonic()
    data = _report_data(step.inputs, context)
    storage, folder = context.storage, step.folder
    storage.write_bytes(f"{folder}/report.html", render(data).encode())
    storage.write_bytes(f"{folder}/verdict.txt", verdict_text(data).encode())
    for name, content in figures(data).items():
        storage.write_bytes(f"{folder}/figures/{name}", content)
    counts = {"num_crosscoders": len(data.crosscoders), "base": data.models.base, "chat": data.models.chat}
    context.finish(step, counts, time.monotonic() - started)


def _report_data(inputs: ReportInputs, context: StageContext) -> ReportData:
    created = provenance()
    return ReportData(
        run_name=context.run_name,
        created=datetime.fromisoformat(str(created["created"])),
        code_version=str(created["code_version"]),
        models=_models(inputs.data, context),
        evidence=_evidence(inputs.data, context),
        layer_note=_layer_note(inputs, context),
        crosscoders=[_crosscoder(own, inputs.section.quality, context) for own in inputs.crosscoders],
        lineage=[_lineage(source, context) for source in inputs.reads().values()],
        settings=inputs.run_settings,
    )


def _models(data: DataSteps, context: StageContext) -> ModelPairInfo:
    models = data.tokens.inputs.models
    tokens, activations = context.record_of(data.tokens), context.record_of(data.activations)
    return ModelPairInfo(
        base=models.base.label,
        chat=models.chat.label,
        layer=data.activations.inputs.section.layer_number,
        num_layers=activations.counts["num_layers"],
        num_documents=tokens.counts["num_documents"],
        num_tokens=tokens.counts["num_tokens"],
        num_rows=activations.counts["num_rows"],
    )


def _evidence(data: DataSteps, context: StageContext) -> EvidenceReport | None:
    distance, streams = (_table(context.storage, data.evidence, name) for name in (DISTANCE_NAME, STREAMS_NAME))
    if data.evidence is None or distance is None or streams is None:
        return None
    judgement = judgement_of(data.evidence, context)
    return EvidenceReport(
        is_distinguishable=judgement.is_distinguishable, reason=judgement.reason, distance=distance, streams=streams
    )


def _layer_note(inputs: ReportInputs, context: StageContext) -> str:
    """Where the curve over layers has been measured, and this layer is on it with a small share."""
    record, layer = read_record(context.storage, inputs.layers.key), inputs.data.activations.inputs.section.layer_number
    found = None if record is None else record.counts["share"].get(str(layer))
    if record is None or found is None or found[0] >= LITTLE_SHARE:
        return ""
    share, low, high = found
    better = f" `crossray layers` names layer {record.counts['layer']}." if record.counts["layer"] is not None else ""
    return (
        f"Layer {layer} carries only {share:.0%} [{low:.0%}, {high:.0%}] of the difference in behaviour between the "
        f"models.{better}"
    )


def _lineage(source: Step[StageInputs], context: StageContext) -> LineageRow:
    section, names = context.record_of(source).identity["section"], _LINEAGE_SETTINGS.get(source.key.stage, ())
    return LineageRow(
        stage=source.name,
        fingerprint=source.key.fingerprint,
        path=context.storage.url(source.folder),
        settings={name: section[name] for name in names if section.get(name) is not None},
    )


def _crosscoder(own: CrosscoderSteps, quality: QualitySection | None, context: StageContext) -> CrosscoderReport:
    storage, section = context.storage, own.crosscoder.inputs.section
    curve = read_curve(storage, own.crosscoder.folder)
    if isinstance(section, CrosscoderSection):
        kind: str = section.sparsity.kind
    else:
        kind = context.record_of(own.crosscoder).counts["sparsity"]
    scaling = own.latents.inputs.section
    fidelity = storage.read_json(f"{own.latents.folder}/{FIDELITY_NAME}")
    return CrosscoderReport(
        name=section.name,
        kind=kind,
        settings=section.model_dump(mode="json", exclude={"name"}),
        fidelity=fidelity,
        shortcomings=_shortcomings(own, fidelity, quality, context),
        latents=read_latents(storage, own.latents),
        causality=_table(storage, own.causality, causality.TABLE_NAME),
        causality_differences=_table(storage, own.causality, causality.DIFFERENCES_NAME),
        causality_curve=_table(storage, own.causality, causality.CURVE_NAME),
        equivalence=_table(storage, own.causality, causality.EQUIVALENCE_NAME),
        controls=_table(storage, own.controls, controls.TABLE_NAME),
        seeds=_table(storage, own.controls, controls.SEEDS_NAME),
        steering=_table(storage, own.steering, steering.TABLE_NAME),
        steering_samples=_table(storage, own.steering, steering.SAMPLES_NAME),
        examples=_table(storage, own.examples, EXAMPLES_NAME),
        histograms=_table(storage, own.examples, HISTOGRAMS_NAME),
        neighbours=_table(storage, own.examples, NEIGHBOURS_NAME),
        logit_lens=_table(storage, own.logit_lens, logit_lens.TABLE_NAME),
        first_tokens=_table(storage, own.logit_lens, logit_lens.FIRST_TOKENS_NAME),
        planted=_table(storage, own.planted, PLANTED_NAME),
        twins=_table(storage, own.latents, TWINS_NAME),
        ratios=_table(storage, own.latents, RATIOS_NAME),
        curves=None if curve is None else curve.to_pandas(),
        autointerp=_table(storage, own.autointerp, autointerp.TABLE_NAME),
        autointerp_model="" if own.autointerp is None else own.autointerp.inputs.section.model,
        nu_eps_threshold=scaling.nu_eps_threshold,
        nu_r_threshold=scaling.nu_r_threshold,
    )


def _shortcomings(
    own: CrosscoderSteps, fidelity: Mapping[str, float], quality: QualitySection | None, context: StageContext
) -> tuple[str, ...]:
    if quality is None:
        return ()
    counts = context.record_of(own.crosscoder).counts
    shards = ActivationStore(context.storage, own.latents.inputs.activations.folder).manifest.of_split(Split.VALIDATION)
    return shortcomings(
        fidelity,
        num_latents=counts["num_latents"],
        num_training_rows=counts.get("num_rows"),
        num_documents=sum(shard.num_documents for shard in shards),
        limits=Limits(**quality.model_dump()),
    )


def _table(storage: Storage, step: Step[StageInputs] | None, name: str) -> pd.DataFrame | None:
    """A finished table; None where the analysis is off."""
    return None if step is None else read_table(storage, f"{step.folder}/{name}").to_pandas()
