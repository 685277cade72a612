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
    steering_effects,
)

MAX_SAMPLES = 3
"""Prompts shown per behaviour."""


class Sample(NamedTuple):
    """One prompt answered three ways."""

    prompt: str
    plain: str
    steered: str
    random: str
    """Empty where there is none."""
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
    groups = []
    for behavior, rows in table.groupby("behavior", sort=False):
        steered = rows[rows["control"] == CONTROL_LATENT]
        if steered.empty:
            continue
        latent, scale = _shown_run(steered, best.get(str(behavior)))
        steered = steered[(steered["latent"] == latent) & (steered["scale"] == scale)]
        steered = steered.sort_values("shows_behavior", ascending=False, kind="stable")
        plain = _answers(rows[rows["control"] == CONTROL_NONE])
        random = _answers(rows[(rows["control"] == CONTROL_RANDOM) & (rows["scale"] == scale)])
        samples = [
            Sample(
                prompt=str(row["prompt"]),
                plain=plain.get(str(row["prompt"]), ""),
                steered=str(row["answer"]),
                random=random.get(str(row["prompt"]), ""),
                steered_shows=bool(row["shows_behavior"]),
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
