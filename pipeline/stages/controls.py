"""The controls of each crosscoder's verdict, as tables: stated error, random directions, known nulls, other seeds.

Latent Scaling with random directions rides on the pass over the rows that measurements.py makes; everything else is
read from latent tables and decoders. The rules are those of analyses/controls.py.
"""

import time
from collections.abc import Callable, Mapping

import pandas as pd

from pipeline.analyses import controls
from pipeline.analyses.latent_scaling import LatentScaling
from pipeline.analyses.ownership import chat_only_latents, delta_norm
from pipeline.analyses.rows import Sums
from pipeline.config.analyses import ControlsSection, LatentScalingSection
from pipeline.config.crosscoder import CrosscoderSection
from pipeline.config.section import Section
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import CHAT, CONTROL_COLUMNS, SEED_COLUMNS, Verdict
from pipeline.stages.base import Context, Step
from pipeline.stages.crosscoder import fitted
from pipeline.storage.tables import arrow_schema, numbers_of, write_frame

NAME = "controls"
VERSION = 3
TABLE_NAME = "controls.parquet"
SEEDS_NAME = "seeds.parquet"
SCHEMA = arrow_schema(CONTROL_COLUMNS)
SEED_SCHEMA = arrow_schema(SEED_COLUMNS)


def differ_in_seed(one: Section, other: Section) -> bool:
    """Whether two crosscoders of a run are the same but for seed and name."""
    if not isinstance(one, CrosscoderSection) or not isinstance(other, CrosscoderSection):
        return False
    excluded = {"name", "seed"}
    return one.seed != other.seed and one.model_dump(exclude=excluded) == other.model_dump(exclude=excluded)


def noise_of(base: Mapping[str, object], chat: Mapping[str, object]) -> float | None:
    """From the identities of two models: the noise that alone tells them apart (0 for none), or None."""
    rest = {key: value for key, value in chat.items() if not key.startswith("weight_noise")}
    noise = chat.get("weight_noise", 0.0)
    return float(str(noise)) if rest == dict(base) else None


def random_scaling(step: Step, crosscoder: Crosscoder) -> LatentScaling | None:
    """Latent Scaling of the chat-only latents with random directions; None where there is no such latent."""
    section, scaling = step.section, step.inputs["latents"].section
    assert isinstance(section, ControlsSection)
    assert isinstance(scaling, LatentScalingSection)
    chosen = chat_only_latents(delta_norm(crosscoder.W_dec_FMD.detach())).sort().values
    if not len(chosen):
        return None
    return LatentScaling(
        crosscoder,
        num_groups=scaling.num_groups,
        num_resamples=scaling.num_resamples,
        seed=scaling.seed,
        direction_FD=controls.random_directions(crosscoder.W_dec_FMD[chosen, CHAT], seed=section.seed),
        latents=chosen,
    )


def publish(
    step: Step,
    analysis: LatentScaling | None,
    sums: Sums | None,
    latents_of: Callable[[Step], pd.DataFrame],
    context: Context,
) -> None:
    """Write both tables; `sums` are those of `random_scaling`, `latents_of` reads a finished latent table."""
    started = time.monotonic()
    scaling = step.inputs["latents"].section
    assert isinstance(scaling, LatentScalingSection)
    latents = latents_of(step.inputs["latents"])
    rows = [
        controls.stated_row(latents),
        controls.random_row(
            latents,
            None if analysis is None or sums is None else analysis.table(sums),
            thresholds=(scaling.nu_eps_threshold, scaling.nu_r_threshold),
            min_documents=scaling.min_documents,
        ),
    ]
    if step.extra["noise"] is not None:
        rows.append(controls.false_calls_row(latents, noise=step.extra["noise"]))
    seeds = [
        _matched(step, other, latents, latents_of(step.inputs[f"latents {other}"]), context)
        for other in step.extra["seeds"]
    ]
    rows += [row for row, _ in seeds]
    table = pd.DataFrame(rows, columns=[column.name for column in CONTROL_COLUMNS])
    matches = pd.concat([pd.DataFrame(columns=[column.name for column in SEED_COLUMNS]), *(part for _, part in seeds)])
    write_frame(context.storage, f"{step.key.folder}/{TABLE_NAME}", table, SCHEMA)
    write_frame(context.storage, f"{step.key.folder}/{SEEDS_NAME}", matches, SEED_SCHEMA)
    context.finish(step, {"value": numbers_of(table, "value", by=("control",))}, time.monotonic() - started)


def _matched(
    step: Step, other: str, latents: pd.DataFrame, others: pd.DataFrame, context: Context
) -> tuple[dict[str, object], pd.DataFrame]:
    """The row and the matches of one other seed."""
    section = step.section
    assert isinstance(section, ControlsSection)
    called = latents.loc[latents["verdict"] == Verdict.CHAT_SPECIFIC, "latent"]
    with (
        fitted(context.storage, step.inputs["crosscoder"].key.folder) as crosscoder,
        fitted(context.storage, step.inputs[f"crosscoder {other}"].key.folder) as second,
    ):
        matches = controls.match_latents(
            crosscoder.W_dec_FMD, second.W_dec_FMD, called.tolist(), min_cosine=section.min_match_cosine
        )
    seeds = controls.seed_table(latents, others, matches, other=other)
    return controls.seed_row(seeds, others, other=other, min_cosine=section.min_match_cosine), seeds
