"""The latent table of each crosscoder: fidelity, Latent Scaling, ownership, templates, twins and the verdict."""

import time
from collections.abc import Mapping
from copy import copy
from typing import Any

import pandas as pd
import torch

from pipeline.analyses.activation_statistics import control_token_counts
from pipeline.analyses.controls import stated_error
from pipeline.analyses.latent_scaling import LatentScaling
from pipeline.analyses.latent_tables import CHECKED_ROWS, latent_scaling, verdict_analyses, verdict_table
from pipeline.analyses.ownership import classify, delta_norm
from pipeline.analyses.ratio_statistics import RATIO_COLUMNS, ratio_statistics
from pipeline.analyses.rows import RowAnalysis, Sums
from pipeline.analyses.twins import Twins
from pipeline.analyses.units import judged_decoder
from pipeline.analyses.verdict import artifact_frac, verdict_counts, with_calls_withheld, with_twins
from pipeline.errors import InputError
from pipeline.models.loading import load_tokenizer
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import LATENT_COLUMNS, TWIN_COLUMNS, Ownership, Split, Verdict, latent_corpus_columns
from pipeline.stages.catalogue import LatentsInputs
from pipeline.stages.evidence import judgement_of
from pipeline.stages.finished_crosscoder import open_crosscoder
from pipeline.stages.models import local_specs
from pipeline.stages.row_pass import Measured
from pipeline.stages.step import Step
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, numbers_of, read_table, write_frame

LATENTS_NAME = "latents.parquet"
FIDELITY_NAME = "fidelity.json"
TWINS_NAME = "twins.parquet"
RATIOS_NAME = "ratios.parquet"
TWIN_SCHEMA = arrow_schema(TWIN_COLUMNS)
RATIO_SCHEMA = arrow_schema(RATIO_COLUMNS)


class LatentsWork:
    """One step: what it takes from the first pass over the rows, and its tables."""

    def __init__(self, step: Step[LatentsInputs], measured: Measured) -> None:
        self.step, self.context, self._started = step, measured.context, time.monotonic()
        self._corpora = measured.store.manifest.corpora
        self._rms_M = measured.store.manifest.training_rms_M()
        crosscoder, section = measured.crosscoder, step.inputs.section
        self._analyses = verdict_analyses(crosscoder, section, corpora=self._corpora, rms_M=self._rms_M)
        self._checked = _checked_scaling(step, crosscoder, self._rms_M, measured.store)
        self._analyses["twins"] = Twins(W_dec_FMD=judged_decoder(crosscoder, self._rms_M).W_dec_FMD)

    def first_pass(self) -> Mapping[str, RowAnalysis]:
        """The verdict's sums, and those of twins."""
        return self._analyses

    def strong_pass(self, sums: Mapping[str, Sums]) -> Mapping[str, RowAnalysis]:
        """Latent Scaling on rows above a share of each latent's maximum in the first pass; nothing where not asked."""
        share, scaling = self.step.inputs.section.activation_share, copy(self._checked)
        if not share or scaling is None:
            return {}
        scaling.floor_F = share * sums["templates"]["max"].amax(0)
        return {"strong": scaling}

    def training_pass(self) -> Mapping[str, RowAnalysis]:
        """Latent Scaling on training rows; nothing where not asked."""
        is_asked = self.step.inputs.section.training_rows and self._checked is not None
        return {"training": self._checked} if is_asked and self._checked is not None else {}

    def publish(self, sums: Mapping[str, Sums]) -> None:
        """Write the tables and the record; `sums` are those of all passes."""
        step, storage, folder = self.step, self.context.storage, self.step.folder
        tables: dict[str, Any] = {name: analysis.table(sums[name]) for name, analysis in self._analyses.items()}
        with open_crosscoder(storage, step.inputs.crosscoder.folder) as crosscoder:
            decoder = judged_decoder(crosscoder, self._rms_M)
        for rows in CHECKED_ROWS:
            tables[rows] = None if rows not in sums or self._checked is None else self._checked.table(sums[rows])
        table = with_twins(verdict_table(decoder, tables, step.inputs.section), tables["twins"])
        if step.inputs.evidence is not None:
            judgement = judgement_of(step.inputs.evidence, self.context)
            table = table if judgement.is_distinguishable else with_calls_withheld(table, judgement.reason)
        table["control_token"] = self._with_texts(table["control_token"])
        schema = arrow_schema((*LATENT_COLUMNS, *latent_corpus_columns(self._corpora)))
        write_frame(storage, f"{folder}/{LATENTS_NAME}", table, schema)
        write_frame(storage, f"{folder}/{TWINS_NAME}", tables["twins"], TWIN_SCHEMA)
        ratios = ratio_statistics(table)
        write_frame(storage, f"{folder}/{RATIOS_NAME}", ratios, RATIO_SCHEMA)
        storage.write_json(f"{folder}/{FIDELITY_NAME}", tables["fidelity"])
        counts = _counts(table) | {"num_twins": len(tables["twins"]), "fidelity": dict(tables["fidelity"])}
        counts["ratios"] = numbers_of(ratios, "value", by=("latents", "quantity", "statistic"))
        self.context.finish(step, counts, time.monotonic() - self._started)

    def _with_texts(self, ids: "pd.Series[str]") -> "pd.Series[str]":
        """Texts of the token ids of a column."""
        with local_specs(self.context.storage, self.step.inputs.activations.inputs.tokens.inputs.models.chat) as (
            spec,
        ):
            tokenizer = load_tokenizer(spec)
        return ids.map({index: str(tokenizer.decode([int(index)])) if index else "" for index in ids.unique()})


def _checked_scaling(
    step: Step[LatentsInputs], crosscoder: Crosscoder, rms_M: torch.Tensor, store: ActivationStore
) -> LatentScaling | None:
    """Latent Scaling of the chat-only latents, to be estimated once more on other rows; None where not asked."""
    section = step.inputs.section
    if section.training_rows and not store.manifest.of_split(Split.TRAIN):
        raise InputError(
            f"analyses.latent_scaling.training_rows: expected stored training rows to read {section.training_rows} of, "
            "got none, since activations.mode is stream; set it to 0 or store the rows"
        )
    is_chat_only_F = classify(delta_norm(judged_decoder(crosscoder, rms_M).W_dec_FMD)) == Ownership.CHAT_ONLY
    if not (section.training_rows or section.activation_share) or not is_chat_only_F.any():
        return None
    return latent_scaling(crosscoder, section, rms_M=rms_M, latents=torch.from_numpy(is_chat_only_F.nonzero()[0]))


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
        "control_tokens": control_token_counts(table),
        "artifact_frac": artifact_frac(table),
        "stated_false_discovery_rate": stated_error(table).rate,
    }
