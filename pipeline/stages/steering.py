"""Answers of both models under steering: each behaviour's best chat-specific latent, the most specific ones, or any.

One worker call steers one behaviour with one crosscoder's latents. Prompts come from the organism or from a file. A
crosscoder without a chat-specific latent has the unsteered runs in its table and nothing else.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import fsspec
import pandas as pd

from pipeline.analyses.latent_sets import most_specific_latents
from pipeline.analyses.planted import CHAT_SPECIFIC_LATENT
from pipeline.analyses.steering import SteeringOptions, SteeringRequest, steer
from pipeline.analyses.steering_inputs import (
    BehaviorPrompts,
    directions_of,
    parse_prompts,
    random_controls,
)
from pipeline.config.analyses import SteeringSection
from pipeline.errors import InputError
from pipeline.schema import MODEL_NAMES, STEERING_COLUMNS, STEERING_SAMPLE_COLUMNS
from pipeline.stages.base import Context, Pool, Step, run_pool, shown
from pipeline.stages.crosscoder import fitted
from pipeline.stages.measurements import LATENTS_NAME, PLANTED_NAME
from pipeline.stages.models import Loading, load_pair
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, numbers_of, read_table, write_frame
from pipeline.terminal import Progress

NAME = "steering"
VERSION = 2

TABLE_NAME = "steering.parquet"
SAMPLES_NAME = "samples.parquet"
STEERING_SCHEMA = arrow_schema(STEERING_COLUMNS)
SAMPLE_SCHEMA = arrow_schema(STEERING_SAMPLE_COLUMNS)


class Job(NamedTuple):
    """One behaviour, steered with some latents of one crosscoder."""

    crosscoder: str
    """Folder of the crosscoder."""
    latents: str
    """Folder of its latent table."""
    prompts: BehaviorPrompts
    chosen: tuple[int, ...]
    num_random: int
    seed: int


def run(steps: Sequence[Step], context: Context) -> None:
    """Publish both tables of every crosscoder."""
    started = time.monotonic()
    section = steps[0].section
    assert isinstance(section, SteeringSection)
    jobs = [job for step in steps for job in _jobs(step, section, context)]
    progress = Progress(NAME, len(jobs), "behaviours")
    shown(context, progress, 0)
    options = SteeringOptions(
        scales=section.scales,
        max_new_tokens=section.max_new_tokens,
        num_samples=section.num_samples,
        models=tuple(MODEL_NAMES.index(name) for name in section.models),
        positions=section.positions,
        temperature=section.temperature,
        seed=section.seed,
    )
    arguments = (context.storage, steps[0].extra["loading"], steps[0].extra["layer"], options)
    pool = Pool("analyses", context.resources.analyses, Steer, arguments)
    results: list[dict[str, Any]] = []
    for result in run_pool(pool, [{"order": order, "job": job} for order, job in enumerate(jobs)]):
        results.append(result)
        shown(context, progress, len(results))
    results.sort(key=lambda result: int(result["order"]))
    for step in steps:
        own = [result for result in results if result["crosscoder"] == step.inputs["crosscoder"].key.folder]
        table, samples = (pd.concat([result[name] for result in own]) for name in ("table", "samples"))
        write_frame(context.storage, f"{step.key.folder}/{TABLE_NAME}", table, STEERING_SCHEMA)
        write_frame(context.storage, f"{step.key.folder}/{SAMPLES_NAME}", samples, SAMPLE_SCHEMA)
        best = table.groupby(["model", "behavior", "control"], as_index=False)["rate"].max()
        counts = {
            "highest_rate": numbers_of(best, "rate", by=("model", "behavior", "control")),
            "num_latents": int(table.loc[table["latent"] >= 0, "latent"].nunique()),
        }
        context.finish(step, counts, time.monotonic() - started)


def _jobs(step: Step, section: SteeringSection, context: Context) -> list[Job]:
    prompts_json, source = _prompts(step, section, context)
    behaviors = parse_prompts(prompts_json, num_prompts=section.num_prompts, source=source)
    chosen = _chosen(step, section, context, behaviors, source)
    return [
        Job(
            step.inputs["crosscoder"].key.folder,
            step.inputs["latents"].key.folder,
            prompts,
            chosen[prompts.behavior],
            section.num_random,
            section.seed,
        )
        for prompts in behaviors
    ]


def _chosen(
    step: Step, section: SteeringSection, context: Context, behaviors: Sequence[BehaviorPrompts], source: str
) -> dict[str, tuple[int, ...]]:
    """Latents to steer with, by behaviour."""
    if section.latents or section.num_latents:
        latents = read_table(context.storage, f"{step.inputs['latents'].key.folder}/{LATENTS_NAME}").to_pandas()
        check_latents(section.latents, latents)
        same = section.latents or most_specific_latents(latents, section.num_latents)
        return {prompts.behavior: same for prompts in behaviors}
    planted = read_table(context.storage, f"{step.inputs['planted'].key.folder}/{PLANTED_NAME}").to_pandas()
    unknown = [prompts.behavior for prompts in behaviors if prompts.behavior not in set(planted["behavior"])]
    if unknown:
        raise InputError(
            f"{source}: expected the planted behaviours {sorted(set(planted['behavior']))}, since each is steered with "
            f"its own best latent, got {unknown[0]!r}; set analyses.steering.latents or num_latents for other prompts"
        )
    best = planted[(planted["candidate"] == CHAT_SPECIFIC_LATENT) & (planted["latent"] >= 0)]
    return {
        prompts.behavior: tuple(int(latent) for latent in best.loc[best["behavior"] == prompts.behavior, "latent"])
        for prompts in behaviors
    }


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


def _prompts(step: Step, section: SteeringSection, context: Context) -> tuple[Any, str]:
    """The parsed prompts and where they come from."""
    if section.prompts_path is None:
        key = f"{step.inputs['organism'].key.folder}/prompts.json"
        return context.storage.read_json(key), context.storage.url(key)
    try:
        with fsspec.open(section.prompts_path, "rt", encoding="utf-8") as stream:
            return json.load(stream), section.prompts_path
    except (OSError, ValueError) as error:
        raise InputError(
            f"analyses.steering.prompts_path: expected a JSON file, got {section.prompts_path!r}: {error}"
        ) from error


class Steer:
    """Worker: both models whole; crosscoders are read as they come."""

    def __init__(self, storage: Storage, loading: Loading, layer: int, options: SteeringOptions) -> None:
        self.storage, self.options = storage, options
        self.pair = load_pair(storage, loading, layer=layer)

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Both tables of one job."""
        job: Job = item["job"]
        latents = read_table(self.storage, f"{job.latents}/{LATENTS_NAME}").to_pandas()
        with fitted(self.storage, job.crosscoder) as crosscoder:
            directions = directions_of(crosscoder, latents, job.chosen)
            controls_RD = random_controls(crosscoder, latents, excluded=job.chosen, num=job.num_random, seed=job.seed)
        result = steer(self.pair, [SteeringRequest(job.prompts, directions, controls_RD)], self.options)
        return {
            "order": item["order"],
            "crosscoder": job.crosscoder,
            "table": result.table,
            "samples": result.samples,
        }
