"""Every artifact of a run becomes one page, its figures, and the verdict table that the terminal prints.

No Ray: the tables are small. The page is rendered from records and tables alone, so `crossray report` can do it again
at any time.
"""

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pandas as pd

from pipeline.config.crosscoder import AdoptedCrosscoderSection, CrosscoderSection
from pipeline.report.data import CrosscoderReport, LineageRow, ModelPairInfo, ReportData
from pipeline.report.figures import figures
from pipeline.report.page import render
from pipeline.report.verdict import verdict_text
from pipeline.stages import autointerp, causality, controls, steering
from pipeline.stages.base import Context, Step
from pipeline.stages.crosscoder import read_curve
from pipeline.stages.measurements import EXAMPLES_NAME, FIDELITY_NAME, LATENTS_NAME, PLANTED_NAME, TWINS_NAME
from pipeline.storage.artifacts import provenance
from pipeline.storage.tables import read_table

NAME = "report"
VERSION = 1

_SHOWN_SETTINGS = {
    "organism": ("size", "seed"),
    "corpus": ("validation_frac",),
    "tokens": ("num_tokens", "max_tokens_per_document"),
    "activations": ("layer", "dtype", "rows_per_shard"),
    "crosscoder": ("sparsity", "num_latents", "expansion", "lr", "seed", "source", "revision"),
}


def run(steps: Sequence[Step], context: Context) -> None:
    """Render the page, write its figures and the verdict table."""
    (step,) = steps
    started = time.monotonic()
    data = _report_data(step, context)
    folder = step.key.folder
    context.storage.write_bytes(f"{folder}/report.html", render(data).encode())
    context.storage.write_bytes(f"{folder}/verdict.txt", verdict_text(data).encode())
    for name, content in figures(data).items():
        context.storage.write_bytes(f"{folder}/figures/{name}", content)
    context.finish(step, {"num_crosscoders": len(data.crosscoders)}, time.monotonic() - started)


def _report_data(step: Step, context: Context) -> ReportData:
    created = provenance()
    inputs = list(step.inputs.values())
    fits = [source for source in inputs if source.key.stage == "crosscoder"]
    return ReportData(
        run_name=context.run_name,
        created=datetime.fromisoformat(str(created["created"])),
        code_version=str(created["code_version"]),
        models=_models(step, context),
        crosscoders=[_crosscoder(fit, inputs, context) for fit in fits],
        lineage=[_lineage(source, context) for source in inputs],
        settings=step.extra["settings"],
    )


def _models(step: Step, context: Context) -> ModelPairInfo:
    by_stage = {source.key.stage: source for source in step.inputs.values()}
    tokens, activations = (context.record_of(by_stage[stage]) for stage in ("tokens", "activations"))
    base, chat = step.extra["locations"]
    return ModelPairInfo(
        base=base.shown,
        chat=chat.shown,
        layer=activations.identity["section"]["layer"],
        num_layers=activations.counts["num_layers"],
        num_documents=tokens.counts["num_documents"],
        num_tokens=tokens.counts["num_tokens"],
        num_rows=activations.counts["num_rows"],
    )


def _lineage(source: Step, context: Context) -> LineageRow:
    section: Mapping[str, Any] = context.record_of(source).identity["section"]
    shown = {key: section[key] for key in _SHOWN_SETTINGS.get(source.key.stage, ()) if section.get(key) is not None}
    return LineageRow(
        stage=source.name,
        fingerprint=source.key.fingerprint,
        path=context.storage.url(source.key.folder),
        settings=shown,
    )


def _crosscoder(fit: Step, inputs: Sequence[Step], context: Context) -> CrosscoderReport:
    section, curve = fit.section, read_curve(context.storage, fit.key.folder)
    if isinstance(section, CrosscoderSection):
        kind: str = section.sparsity.kind
    else:
        assert isinstance(section, AdoptedCrosscoderSection)
        kind = context.record_of(fit).counts["sparsity"]
    own = {source.key.stage: source for source in inputs if source.inputs.get("crosscoder") is fit}
    latents = own["latents"]
    scaling = context.record_of(latents).identity["section"]

    def table(stage: str, name: str) -> pd.DataFrame | None:
        if stage not in own:
            return None
        frame: pd.DataFrame = read_table(context.storage, f"{own[stage].key.folder}/{name}").to_pandas()
        return frame

    return CrosscoderReport(
        name=section.name,
        kind=kind,
        settings=section.model_dump(mode="json", exclude={"name"}),
        fidelity=context.storage.read_json(f"{latents.key.folder}/{FIDELITY_NAME}"),
        latents=table("latents", LATENTS_NAME),
        causality=table("causality", causality.TABLE_NAME),
        causality_differences=table("causality", causality.DIFFERENCES_NAME),
        causality_curve=table("causality", causality.CURVE_NAME),
        controls=table("controls", controls.TABLE_NAME),
        seeds=table("controls", controls.SEEDS_NAME),
        steering=table("steering", steering.TABLE_NAME),
        steering_samples=table("steering", steering.SAMPLES_NAME),
        examples=table("examples", EXAMPLES_NAME),
        planted=table("planted", PLANTED_NAME),
        twins=table("latents", TWINS_NAME),
        curves=None if curve is None else curve.to_pandas(),
        autointerp=table("autointerp", autointerp.TABLE_NAME),
        autointerp_model=context.record_of(own["autointerp"]).identity["section"]["model"]
        if "autointerp" in own
        else "",
        nu_eps_threshold=scaling["nu_eps_threshold"],
        nu_r_threshold=scaling["nu_r_threshold"],
    )
