"""Precision and recall of "chat-only" against the truth, per trial and over seeds.

A latent that a rule calls chat-only is right if the concept that its chat decoder is most like, among all concepts
that the chat model has, is a chat-only one, at a cosine of at least min_cosine. Precision is the share of called
latents that are right, recall the share of chat-only concepts that a right latent is like; two right latents of one
concept both count as right and find one concept. Intervals are Student-t over the seeds, cut to [0, 1]; where every
seed says 0, or every seed 1, the exact binomial one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from pipeline.numerics.statistics import student_t_quantile
from pipeline.planted.world import Truth
from pipeline.schema import Column
from pipeline.terminal import text_table

RULES = {
    "by_delta_norm": "Delta_norm",
    "by_direction": "direction",
    "by_latent_scaling": "Latent Scaling",
    "by_evidence": "evidence",
    "by_replication": "evidence, replicated",
}
"""Column of a match table and the name of the rule that it holds."""
STATING = ("by_evidence", "by_replication")
"""Rules that state a false discovery rate."""
NOTHING = "nothing"
"""Truth of a latent that is like no concept of the chat model."""
MISTAKES = (Truth.SHARED, Truth.HALF_PRESENT, Truth.ROTATED, Truth.LOOSE, NOTHING)


def _interval_columns(name: str, doc: str) -> tuple[Column, ...]:
    return (
        Column(name, "float64", doc),
        Column(
            f"{name}_low", "float64", f"lower end of the 95% interval of {name} over the trials (score.mean_interval)"
        ),
        Column(
            f"{name}_high", "float64", f"upper end of the 95% interval of {name} over the trials (score.mean_interval)"
        ),
    )


SCORE_COLUMNS = (
    Column("data", "string", "what was judged on: planted activations, or the name of a run"),
    Column("recipe", "string", "name of the crosscoder"),
    Column(
        "rule",
        "string",
        "what calls a latent chat-only: Delta_norm, delta_direction, the verdict by paper, or that by evidence, also "
        "only where at least half of the other seeds find it again",
    ),
    *_interval_columns("precision", "share of called latents that are right; NaN where none is called"),
    *_interval_columns("recall", "share of chat-only concepts that a called latent finds"),
    Column("stated", "float64", "stated false discovery rate, a bound of 1 - precision; mean over the trials"),
    Column("num_called", "float64", "called latents, mean over the trials"),
    Column("l0", "float64", "mean active latents per validation row, mean over the trials"),
    Column("fve", "float64", "fraction of variance explained, both models (of the difference for a difference SAE)"),
    *(Column(f"wrong_{truth}".replace("-", "_"), "float64", f"called latents that are {truth}") for truth in MISTAKES),
    Column("num_trials", "int64", "worlds judged; precision is averaged over those with a called latent"),
)


class TrialScore(NamedTuple):
    """One rule on one trial."""

    precision: float
    recall: float
    num_called: int
    num_concepts: int
    """Concepts, or behaviours, that could be found."""
    wrong: dict[str, int]
    """Called latents that are wrong, by what they are instead (MISTAKES)."""
    stated: float = float("nan")
    """The false discovery rate that the verdict states of the called latents; NaN for a rule that states none."""


def trial_score(matches: pd.DataFrame, rule: str, truth: Sequence[str], *, min_cosine: float) -> TrialScore:
    """The score of one match table under a rule (a key of RULES); truth names the kind of every concept."""
    called = matches[matches[rule]]
    found = np.where(called["cosine"] >= min_cosine, called["truth"], NOTHING)
    is_right = found == Truth.CHAT_ONLY
    found_concepts, num_concepts = set(called["concept"][is_right]), list(truth).count(Truth.CHAT_ONLY)
    return TrialScore(
        float(is_right.mean()) if len(called) else float("nan"),
        len(found_concepts) / num_concepts if num_concepts else float("nan"),
        len(called),
        num_concepts,
        {name: int((found == name).sum()) for name in MISTAKES},
        float(called["q_value"].max()) if rule in STATING and len(called) else float("nan"),
    )


def mean_interval(values: Sequence[float], counts: Sequence[int]) -> tuple[float, float, float]:
    """Mean and 95% Student-t interval of the finite values, ends cut to [0, 1]; NaN ends for fewer than two.

    counts says of how many things each value is a share. Where all trials say exactly 0 or exactly 1 there is no spread
    to go by; the open end is then the exact binomial one of all things together (Clopper and Pearson 1934).
    """
    pairs = [(value, count) for value, count in zip(values, counts, strict=True) if np.isfinite(value)]
    finite, num_things = np.array([value for value, _ in pairs]), sum(count for _, count in pairs)
    if len(finite) == 0:
        return float("nan"), float("nan"), float("nan")
    mean = float(finite.mean())
    if len(finite) < 2:
        return mean, float("nan"), float("nan")
    if mean in (0.0, 1.0):
        open_end = 0.025 ** (1 / max(num_things, 1))
        return (mean, open_end, 1.0) if mean == 1 else (mean, 0.0, 1 - open_end)
    freedom = torch.tensor(float(len(finite) - 1))
    half = float(student_t_quantile(0.975, freedom)) * float(finite.std(ddof=1)) / len(finite) ** 0.5
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def score_row(
    scores: Sequence[TrialScore], fidelities: Sequence[dict[str, float]], *, data: str, recipe: str, rule: str
) -> dict[str, Any]:
    """One row of SCORE_COLUMNS from the trials of one recipe."""
    row: dict[str, Any] = {"data": data, "recipe": recipe, "rule": RULES[rule]}
    for name, size in (("precision", "num_called"), ("recall", "num_concepts")):
        values = mean_interval([getattr(score, name) for score in scores], [getattr(score, size) for score in scores])
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
    stated = [score.stated for score in scores if np.isfinite(score.stated)]
    row["stated"] = float(np.mean(stated)) if stated else float("nan")
    row["num_called"] = float(np.mean([score.num_called for score in scores]))
    row |= {name: float(np.mean([own[name] for own in fidelities])) for name in ("l0", "fve")}
    for name in MISTAKES:
        row[f"wrong_{name}".replace("-", "_")] = float(np.mean([score.wrong[name] for score in scores]))
    return row | {"num_trials": len(scores)}


def score_text(table: pd.DataFrame) -> str:
    """The table for a terminal."""
    columns = ["recipe", "called by", "precision [95%]", "recall [95%]", "stated", "called", "wrong", "L0", "FVE"]
    rows = []
    for row in table.to_dict("records"):
        wrong = ", ".join(
            f"{row[key]:.1f} {name}" for name in MISTAKES if row[key := f"wrong_{name}".replace("-", "_")] > 0
        )
        rows.append(
            [
                str(row["recipe"]),
                str(row["rule"]),
                *(_with_interval(row, name) for name in ("precision", "recall")),
                f"{row['stated']:.3f}" if np.isfinite(row["stated"]) else "-",
                f"{row['num_called']:.1f}",
                wrong or "-",
                f"{row['l0']:.1f}",
                f"{row['fve']:.3f}",
            ]
        )
    return text_table(columns, rows, align_numbers=False)


def _with_interval(row: dict[Any, Any], name: str) -> str:
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if not np.isfinite(value):
        return "-"
    return f"{value:.2f} [{low:.2f}, {high:.2f}]" if np.isfinite(low) else f"{value:.2f}"
