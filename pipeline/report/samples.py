"""What the chat model answered under steering, prompt by prompt: the side-by-side samples of the page.

Chooses which run of a behaviour is shown (the most effective one that has samples) and puts the unsteered and the
random answer beside each steered one. Texts stay plain here; the template escapes them.
"""

from typing import NamedTuple

import pandas as pd

from pipeline.report.data import CrosscoderReport
from pipeline.report.summary import (
    CONTROL_LATENT,
    CONTROL_NONE,
    CONTROL_RANDOM,
    SteeringEffect,
    chat_runs,
    main_positions,
    steering_effects,
)
from pipeline.schema import BASE, MODEL_NAMES

MAX_SAMPLES = 3
"""Prompts shown per behaviour."""


class Sample(NamedTuple):
    """One prompt answered up to four ways."""

    prompt: str
    plain: str
    steered: str
    random: str
    """Empty where there is none."""
    base: str
    """The base model with the same latent; empty where it was not asked."""
    steered_shows: bool


class SampleGroup(NamedTuple):
    """Steering examples of one behaviour under one crosscoder."""

    behavior: str
    crosscoder: str
    latent: int
    scale: float
    samples: list[Sample]


def sample_groups(crosscoder: CrosscoderReport) -> list[SampleGroup]:
    """Prompts whose steered answer shows the behaviour come first; the scale is the one that was most effective."""
    table = crosscoder.steering_samples
    if table is None or table.empty:
        return []
    best = {effect.behavior: effect for effect in steering_effects(crosscoder.steering)}
    of_base = table[(table["model"] == MODEL_NAMES[BASE]) & table["positions"].isin(main_positions(table)[:1])]
    groups = []
    for behavior, rows in chat_runs(table).groupby("behavior", sort=False):
        steered = rows[rows["control"] == CONTROL_LATENT]
        if steered.empty:
            continue
        latent, scale = _shown_run(steered, best.get(str(behavior)))
        steered = steered[(steered["latent"] == latent) & (steered["scale"] == scale)]
        steered = steered.sort_values("shows_behavior", ascending=False, kind="stable")
        plain = _answers(rows[rows["control"] == CONTROL_NONE])
        random = _answers(rows[(rows["control"] == CONTROL_RANDOM) & (rows["scale"] == scale)])
        is_same = (of_base["behavior"] == behavior) & (of_base["latent"] == latent) & (of_base["scale"] == scale)
        base = _answers(of_base[is_same & (of_base["control"] == CONTROL_LATENT)])
        samples = [
            Sample(
                prompt=str(row["prompt"]),
                plain=plain.get(str(row["prompt"]), ""),
                steered=str(row["answer"]),
                random=random.get(str(row["prompt"]), ""),
                base=base.get(str(row["prompt"]), ""),
                steered_shows=row["shows_behavior"] is True or row["shows_behavior"] == 1,
            )
            for row in steered.drop_duplicates("prompt").head(MAX_SAMPLES).to_dict("records")
        ]
        groups.append(SampleGroup(str(behavior), crosscoder.name, latent, scale, samples))
    return groups


def _shown_run(steered: pd.DataFrame, effect: SteeringEffect | None) -> tuple[int, float]:
    """Latent and scale to show: those of the strongest effect where it has samples, else those with most hits."""
    if effect is not None:
        has_effect = (steered["latent"] == effect.latent) & (steered["scale"] == effect.scale)
        if has_effect.any():
            return effect.latent, effect.scale
    row = steered.sort_values("shows_behavior", ascending=False, kind="stable").iloc[0]
    return int(row["latent"]), float(row["scale"])


def _answers(rows: pd.DataFrame) -> dict[str, str]:
    first = rows.drop_duplicates("prompt")
    return {str(prompt): str(answer) for prompt, answer in zip(first["prompt"], first["answer"], strict=True)}
