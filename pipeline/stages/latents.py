"""The latent table of each crosscoder: fidelity, Latent Scaling, ownership, templates, twins and the verdict."""

import time
from collections.abc import Mapping
from typing import Any

import pandas as pd

from pipeline.analyses.controls import stated_error
from pipeline.analyses.latent_tables import verdict_analyses, verdict_table
from pipeline.analyses.rows import RowAnalysis, Sums
from pipeline.analyses.twins import Twins
from pipeline.analyses.units import judged_decoder
from pipeline.analyses.verdict import artifact_frac, verdict_counts, with_calls_withheld, with_twins
from pipeline.schema import LATENT_COLUMNS, TWIN_COLUMNS, Ownership, Verdict, latent_corpus_columns
from pipeline.stages.catalogue import LatentsInputs
from pipeline.stages.evidence import judgement_of
from pipeline.stages.finished_crosscoder import open_crosscoder
from pipeline.stages.row_pass import Measured
from pipeline.stages.step import Step
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, read_table, write_frame

LATENTS_NAME = "latents.parquet"
FIDELITY_NAME = "fidelity.json"
TWINS_NAME = "twins.parquet"
TWIN_SCHEMA = arrow_schema(TWIN_COLUMNS)


class LatentsWork:
    """One step: what it takes from the first pass over the rows, and its tables."""

    def __init__(self, step: Step[LatentsInputs], measured: Measured) -> None:
        self.step, self.context, self._started = step, measured.context, time.monotonic()
        self._corpora = measured.store.manifest.corpora
        self._rms_M = measured.store.manifest.training_rms_M()
        crosscoder, section = measured.crosscoder, step.inputs.section
        self._analyses = verdict_analyses(crosscoder, section, corpora=self._corpora, rms_M=self._rms_M)
        self._analyses["twins"] = Twins(W_dec_FMD=judged_decoder(crosscoder, self._rms_M).W_dec_FMD)

    def first_pass(self) -> Mapping[str, RowAnalysis]:
        """The verdict's sums, and those of twins."""
        return self._analyses

    def publish(self, sums: Mapping[str, Sums]) -> None:
        """Write the tables and the record."""
        step, storage, folder = self.step, self.context.storage, self.step.folder
        tables: dict[str, Any] = {name: analysis.table(sums[name]) for name, analysis in self._analyses.items()}
        with open_crosscoder(storage, step.inputs.crosscoder.folder) as crosscoder:
            decoder = judged_decoder(crosscoder, self._rms_M)
        table = with_twins(verdict_table(decoder, tables, step.inputs.section), tables["twins"])
        if step.inputs.evidence is not None:
            judgement = judgement_of(step.inputs.evidence, self.context)
            table = table if judgement.is_distinguishable else with_calls_withheld(table, judgement.reason)
        schema = arrow_schema((*LATENT_COLUMNS, *latent_corpus_columns(self._corpora)))
        write_frame(storage, f"{folder}/{LATENTS_NAME}", table, schema)
        write_frame(storage, f"{folder}/{TWINS_NAME}", tables["twins"], TWIN_SCHEMA)
        storage.write_json(f"{folder}/{FIDELITY_NAME}", tables["fidelity"])
        counts = _counts(table) | {"num_twins": len(tables["twins"]), "fidelity": dict(tables["fidelity"])}
        self.context.finish(step, counts, time.monotonic() - self._started)


def read_latents(storage: Storage, step: Step[LatentsInputs]) -> pd.DataFrame:
    """The finished latent table of a step."""
    frame: pd.DataFrame = read_table(storage, f"{step.folder}/{LATENTS_NAME}").to_pandas()
    return frame


def _counts(table: pd.DataFrame) -> dict[str, Any]:
    is_specific = table["verdict"] == Verdict.CHAT_SPECIFIC
    return {
        **{f"num_{name.replace(' ', '_').replace('-', '_')}": n for name, n in verdict_counts(table).items()},
        "num_latents": len(table),
        "num_chat_only": int((table["ownership"] == Ownership.CHAT_ONLY).sum()),
        "num_chat_specific_confident": int((is_specific & table["is_confident"]).sum()),
        "artifact_frac": artifact_frac(table),
        "stated_false_discovery_rate": stated_error(table).rate,
    }
