"""Answers of both models under steering: each behaviour's best chat-specific latent, the most specific ones, or any.

One worker call steers one behaviour with one crosscoder's latents. Prompts come from the organism or from a file. A
crosscoder without a chat-specific latent has the unsteered runs in its table and nothing else.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from pipeline.analyses.latent_sets import most_specific_latents
from pipeline.analyses.planted import ANY_LATENT, CHAT_SPECIFIC_LATENT
from pipeline.analyses.steering import SteeringOptions, SteeringRequest, steer
from pipeline.analyses.steering_columns import STEERING_COLUMNS, STEERING_SAMPLE_COLUMNS
from pipeline.analyses.steering_inputs import (
    directions_of,
    random_controls,
)
from pipeline.cluster.pools import Pool, run_pool
from pipeline.errors import InputError
from pipeline.schema import MODEL_NAMES
from pipeline.stages.catalogue import SteeringInputs
from pipeline.stages.finished_crosscoder import open_crosscoder
from pipeline.stages.latents import LATENTS_NAME, read_latents
from pipeline.stages.locations import Loading
from pipeline.stages.models import load_pair
from pipeline.stages.planted import PLANTED_NAME
from pipeline.stages.step import StageContext, Step
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, numbers_of, read_table, write_frame
from pipeline.terminal import Progress
from pipeline.text.files import read_json
from pipeline.text.prompts import BehaviorPrompts, parse_prompts

TABLE_NAME = "steering.parquet"
SAMPLES_NAME = "samples.parquet"
STEERING_SCHEMA = arrow_schema(STEERING_COLUMNS)
SAMPLE_SCHEMA = arrow_schema(STEERING_SAMPLE_COLUMNS)


class Job(NamedTuple):
    """One behaviour, steered with some latents of one crosscoder."""

    number: int
    """Place in the order of the tables."""
    crosscoder: str
    """Folder of the crosscoder."""
    latents: str
    """Folder of its latent table."""
    prompts: BehaviorPrompts
    chosen: tuple[int, ...]
    num_random: int
    seed: int


class Steered(NamedTuple):
    """What one job gave."""

    job: Job
    table: pd.DataFrame
    """STEERING_COLUMNS."""
    samples: pd.DataFrame
    """STEERING_SAMPLE_COLUMNS."""


def run(steps: Sequence[Step[SteeringInputs]], context: StageContext) -> None:
    """Publish both tables of every crosscoder."""
    started = time.monotonic()
    section, storage = steps[0].inputs.section, context.storage
    jobs: list[Job] = []
    for step in steps:
        jobs += _jobs(step.inputs, len(jobs), storage)
    options = SteeringOptions(
        scales=section.scales,
        max_new_tokens=section.max_new_tokens,
        num_samples=section.num_samples,
        models=tuple(MODEL_NAMES.index(name) for name in section.models),
        positions=section.positions,
        temperature=section.temperature,
        seed=section.seed,
    )
    pool = Pool("analyses", context.resources.analyses, Steer, (storage, steps[0].inputs.loading, options))
    progress = Progress(SteeringInputs.NAME, len(jobs), "behaviours")
    steered = context.follow(progress, run_pool(pool, jobs), lambda _: 1)
    results = sorted(steered, key=lambda result: result.job.number)
    for step in steps:
        own = [result for result in results if result.job.crosscoder == step.inputs.crosscoder.folder]
        table = pd.concat([result.table for result in own])
        write_frame(storage, f"{step.folder}/{TABLE_NAME}", table, STEERING_SCHEMA)
        samples = pd.concat([result.samples for result in own])
        write_frame(storage, f"{step.folder}/{SAMPLES_NAME}", samples, SAMPLE_SCHEMA)
        best = table.groupby(["model", "behavior", "control"], as_index=False)[["rate"]].max()
        counts = {
            "highest_rate": numbers_of(best, "rate", by=("model", "behavior", "control")),
            "num_latents": int(table.loc[table["latent"] >= 0, "latent"].nunique()),
        }
        context.finish(step, counts, time.monotonic() - started)


def _jobs(inputs: SteeringInputs, first: int, storage: Storage) -> list[Job]:
    """One job per behaviour, numbered from `first`."""
    section = inputs.section
    prompts_json, source = _prompts(inputs, storage)
    behaviors = parse_prompts(prompts_json, num_prompts=section.num_prompts, source=source)
    chosen = _chosen(inputs, storage, behaviors, source)
    return [
        Job(
            number,
            inputs.crosscoder.folder,
            inputs.latents.folder,
            prompts,
            chosen[prompts.behavior],
            section.num_random,
            section.seed,
        )
        for number, prompts in enumerate(behaviors, first)
    ]


def _chosen(
    inputs: SteeringInputs, storage: Storage, behaviors: Sequence[BehaviorPrompts], source: str
) -> dict[str, tuple[int, ...]]:
    """Latents to steer with, by behaviour."""
    section = inputs.section
    if section.latents or section.num_latents:
        latents = read_latents(storage, inputs.latents)
        check_latents(section.latents, latents)
        same = section.latents or most_specific_latents(latents, section.num_latents)
        return {prompts.behavior: same for prompts in behaviors}
    assert inputs.planted is not None, "the flow refuses a run file without it"
    planted = read_table(storage, f"{inputs.planted.folder}/{PLANTED_NAME}").to_pandas()
    unknown = [prompts.behavior for prompts in behaviors if prompts.behavior not in set(planted["behavior"])]
    if unknown:
        raise InputError(
            f"{source}: expected the planted behaviours {sorted(set(planted['behavior']))}, since each is steered with "
            f"its own best latent, got {unknown[0]!r}; set analyses.steering.latents or num_latents for other prompts"
        )
    best = best_latents(planted, read_latents(storage, inputs.latents))
    return {prompts.behavior: best.get(prompts.behavior, ()) for prompts in behaviors}


def best_latents(planted: pd.DataFrame, latents: pd.DataFrame) -> dict[str, tuple[int, ...]]:
    """Behaviour -> its best chat-specific latent by any scoring; where none is, the best live one of any verdict."""
    live = latents.loc[latents["max_activation"] > 0, "latent"]
    found: dict[str, tuple[int, ...]] = {}
    for candidate in (CHAT_SPECIFIC_LATENT, ANY_LATENT):
        rows = planted[(planted["candidate"] == candidate) & planted["latent"].isin(list(live))]
        best = rows.sort_values("auroc", ascending=False, kind="stable").drop_duplicates("behavior")
        for behavior, latent in zip(best["behavior"], best["latent"], strict=True):
            found.setdefault(str(behavior), (int(latent),))
    return found


def check_latents(chosen: Sequence[int], latents: pd.DataFrame) -> None:
    """InputError before any model is loaded."""
    wrong = [latent for latent in chosen if latent >= len(latents)]
    if wrong:
        raise InputError(
            f"analyses.steering.latents: expected latents between 0 and {len(latents) - 1}, got {wrong[0]}; choose "
            "among this crosscoder's own"
        )
    silent = latents.loc[latents["latent"].isin(list(chosen)) & ~(latents["max_activation"] > 0), "latent"].tolist()
    if silent:
        raise InputError(
            f"analyses.steering.latents: expected latents that fire on the validation rows, latent {silent[0]} never "
            "does, so its scale is unknown; steer with another one"
        )


def _prompts(inputs: SteeringInputs, storage: Storage) -> tuple[Any, str]:
    """The parsed prompts and where they come from."""
    path = inputs.section.prompts_path
    if path is None:
        assert inputs.organism is not None, "the flow refuses a run file without it"
        key = f"{inputs.organism.folder}/prompts.json"
        return storage.read_json(key), storage.url(key)
    return read_json(path, "analyses.steering.prompts_path"), path


class Steer:
    """Worker: both models whole; crosscoders are read as their jobs come."""

    def __init__(self, storage: Storage, loading: Loading, options: SteeringOptions) -> None:
        self.storage, self.options = storage, options
        self.pair = load_pair(storage, loading)

    def __call__(self, job: Job) -> Steered:
        """Both tables of one job."""
        latents = read_table(self.storage, f"{job.latents}/{LATENTS_NAME}").to_pandas()
        with open_crosscoder(self.storage, job.crosscoder) as crosscoder:
            directions = directions_of(crosscoder, latents, job.chosen)
            controls_RD = random_controls(crosscoder, latents, excluded=job.chosen, num=job.num_random, seed=job.seed)
        result = steer(self.pair, [SteeringRequest(job.prompts, directions, controls_RD)], self.options)
        return Steered(job, result.table, result.samples)
