"""The controls of each crosscoder's verdict, as tables: stated error, random directions, known nulls, other seeds.

Latent Scaling with random directions is part of the first pass over the rows; everything else is read from latent
tables and decoders. analyses/controls.py explains each control.
"""

import time
from collections.abc import Mapping

import pandas as pd

from pipeline.analyses import controls
from pipeline.analyses.latent_scaling import LatentScaling
from pipeline.analyses.latent_tables import latent_scaling, limits_of
from pipeline.analyses.ownership import delta_norm
from pipeline.analyses.power import POWER_COLUMNS, power_rows, power_table, strengths_of
from pipeline.analyses.rows import RowAnalysis, Sums
from pipeline.analyses.units import judged_decoder
from pipeline.analyses.verdict import SHARED_HIGH
from pipeline.config.crosscoder import InjectedCrosscoderSection
from pipeline.schema import CHAT, CONTROL_COLUMNS, SEED_COLUMNS, Verdict
from pipeline.stages.catalogue import ControlsInputs, LatentsInputs
from pipeline.stages.finished_crosscoder import open_crosscoder, read_injection
from pipeline.stages.latents import read_latents
from pipeline.stages.row_pass import Measured
from pipeline.stages.step import StageContext, Step
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.tables import arrow_schema, numbers_of, write_frame

TABLE_NAME = "controls.parquet"
SEEDS_NAME = "seeds.parquet"
POWER_NAME = "power.parquet"
SCHEMA = arrow_schema(CONTROL_COLUMNS)
SEED_SCHEMA = arrow_schema(SEED_COLUMNS)


class ControlsWork:
    """One step: what it takes from the first pass over the rows, and its tables."""

    def __init__(self, step: Step[ControlsInputs], measured: Measured) -> None:
        self.step, self.context = step, measured.context
        self._random = random_scaling(step.inputs, measured)

    def first_pass(self) -> Mapping[str, RowAnalysis]:
        """Latent Scaling with random directions; nothing where no latent could be chat-specific."""
        return {} if self._random is None else {"random": self._random}

    def publish(self, sums: Mapping[str, Sums]) -> None:
        """Write both tables and the record; the latent tables of all seeds are finished by now."""
        started = time.monotonic()
        random = None if self._random is None else self._random.table(sums["random"])
        publish_controls(self.step, random, self.context, started)


def random_scaling(inputs: ControlsInputs, measured: Measured) -> LatentScaling | None:
    """Latent Scaling, along other latents' directions, of those that could be called chat-specific; None for none."""
    rms_M = measured.store.manifest.training_rms_M()
    W_dec_FMD = judged_decoder(measured.crosscoder, rms_M).W_dec_FMD
    chosen = (delta_norm(W_dec_FMD) > SHARED_HIGH).nonzero().squeeze(1)
    if not len(chosen):
        return None
    direction_FD = controls.random_directions(W_dec_FMD[:, CHAT], chosen, seed=inputs.section.seed)
    return latent_scaling(
        measured.crosscoder, inputs.latents.inputs.section, direction_FD=direction_FD, latents=chosen, rms_M=rms_M
    )


def publish_controls(
    step: Step[ControlsInputs], random: pd.DataFrame | None, context: StageContext, started: float
) -> None:
    """Write both tables and the record; `random` is the table of `random_scaling`."""
    inputs, storage = step.inputs, context.storage
    latents = read_latents(storage, inputs.latents)
    limits = limits_of(inputs.latents.inputs.section)
    rows = [controls.stated_row(latents), controls.random_row(latents, random, limits)]
    if inputs.noise is not None:
        rows.append(controls.false_calls_row(latents, noise=inputs.noise))
    seeds = [_matched(inputs, other, latents, context) for other in inputs.other_seeds]
    rows += [row for row, _ in seeds]
    matches = pd.concat([pd.DataFrame(columns=[column.name for column in SEED_COLUMNS]), *(part for _, part in seeds)])
    if len(seeds) > 1:
        rows.append(controls.replicated_row(matches))
    if inputs.injected is not None:
        rows += _power_rows(inputs.injected, step.folder, context)
    table = pd.DataFrame(rows, columns=[column.name for column in CONTROL_COLUMNS])
    write_frame(storage, f"{step.folder}/{TABLE_NAME}", table, SCHEMA)
    write_frame(storage, f"{step.folder}/{SEEDS_NAME}", matches, SEED_SCHEMA)
    context.finish(step, {"value": numbers_of(table, "value", by=("control",))}, time.monotonic() - started)


def _power_rows(injected: Step[LatentsInputs], folder: str, context: StageContext) -> list[dict[str, object]]:
    """The rows about planted concepts; their table is written beside that of the controls."""
    storage, crosscoder_folder = context.storage, injected.inputs.crosscoder.folder
    section = injected.inputs.crosscoder.inputs.section
    injection = read_injection(storage, crosscoder_folder)
    assert isinstance(section, InjectedCrosscoderSection) and section.power is not None and injection is not None
    strength_C = strengths_of(section.power.num_concepts, section.power.strengths)
    with open_crosscoder(storage, crosscoder_folder) as crosscoder:
        d_chat_FD = crosscoder.raw_decoder_FMD()[:, CHAT].float()
    table = power_table(d_chat_FD, read_latents(storage, injected), injection.direction_CD, strength_C)
    write_frame(storage, f"{folder}/{POWER_NAME}", table, arrow_schema(POWER_COLUMNS))
    return power_rows(table, frequency=injection.frequency)


def _matched(
    inputs: ControlsInputs, other: Step[LatentsInputs], latents: pd.DataFrame, context: StageContext
) -> tuple[dict[str, object], pd.DataFrame]:
    """The row and the matches of one other seed."""
    min_cosine, others = inputs.section.min_match_cosine, read_latents(context.storage, other)
    called = latents.loc[latents["verdict"] == Verdict.CHAT_SPECIFIC, "latent"]
    rms_M = ActivationStore(context.storage, inputs.activations.folder).manifest.training_rms_M()
    with (
        open_crosscoder(context.storage, inputs.crosscoder.folder) as crosscoder,
        open_crosscoder(context.storage, other.inputs.crosscoder.folder) as second,
    ):
        own_FMD, other_GMD = (judged_decoder(one, rms_M).W_dec_FMD for one in (crosscoder, second))
        matches = controls.match_latents(own_FMD, other_GMD, called.tolist(), min_cosine=min_cosine)
    seeds = controls.seed_table(latents, others, matches, other=other.crosscoder_name)
    return controls.seed_row(seeds, others, other=other.crosscoder_name, min_cosine=min_cosine), seeds
