"""Latents of each crosscoder scored by planted labels: the known truth of a generated pair.

The first pass over the rows gives the mean difference of the models, a baseline; the second scores it with the latents.
"""

import time
from collections.abc import Mapping

from pipeline.analyses.latent_sets import latents_with
from pipeline.analyses.planted import MeanDifference, Planted
from pipeline.analyses.planted_columns import PLANTED_COLUMNS
from pipeline.analyses.rows import RowAnalysis, Sums
from pipeline.errors import InputError
from pipeline.schema import Verdict
from pipeline.stages.catalogue import PlantedInputs
from pipeline.stages.latents import read_latents
from pipeline.stages.row_pass import Measured
from pipeline.stages.step import Step
from pipeline.storage.tables import arrow_schema, numbers_of, write_frame

PLANTED_NAME = "planted.parquet"
PLANTED_SCHEMA = arrow_schema(PLANTED_COLUMNS)


class PlantedWork:
    """One step: what it takes from both passes over the rows, and its table."""

    def __init__(self, step: Step[PlantedInputs], measured: Measured) -> None:
        manifest = measured.store.manifest
        self.step, self.context = step, measured.context
        self._labels, self._dialogues = manifest.labels, manifest.dialogue_corpora
        if not self._dialogues or not self._labels:
            raise InputError(
                "analyses.planted: expected a corpus of dialogues with planted labels, got labels "
                f"{list(self._labels)}; set analyses.planted to null"
            )
        self._mean_difference = MeanDifference(
            activation_dim=manifest.activation_dim,
            chat_corpora=self._dialogues,
            first_tokens=step.inputs.section.first_tokens,
        )

    def first_pass(self) -> Mapping[str, RowAnalysis]:
        """The mean difference of the models."""
        return {"mean_difference": self._mean_difference}

    def second_pass(self, sums: Mapping[str, Sums]) -> Mapping[str, RowAnalysis]:
        """The scores, from the sums of the first pass."""
        self._started = time.monotonic()
        section = self.step.inputs.section
        self._planted = Planted(
            activation_dim=self._mean_difference.activation_dim,
            num_latents=self.context.record_of(self.step.inputs.crosscoder).counts["num_latents"],
            labels=self._labels,
            chat_corpora=self._dialogues,
            mean_difference_D=self._mean_difference.direction(sums["mean_difference"]),
            num_resamples=section.num_resamples,
            seed=section.seed,
        )
        return {"planted": self._planted}

    def publish(self, sums: Mapping[str, Sums]) -> None:
        """Write the table and the record, from the sums of the second pass."""
        latents = read_latents(self.context.storage, self.step.inputs.latents)
        table = self._planted.table(sums["planted"], latents_with(latents, [Verdict.CHAT_SPECIFIC]))
        write_frame(self.context.storage, f"{self.step.folder}/{PLANTED_NAME}", table, PLANTED_SCHEMA)
        counts = {"auroc": numbers_of(table, "auroc", by=("behavior", "scoring", "candidate"))}
        self.context.finish(self.step, counts, time.monotonic() - self._started)
