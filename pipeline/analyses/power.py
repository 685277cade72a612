"""The power of a verdict: which concepts of known strength it would have found in this run's own activations.

A further crosscoder is fitted on rows to which concepts were added (numerics/injection.py). A concept counts as found
where the verdict calls the latent chat-specific whose chat decoder is most like it, with a cosine of at least
MIN_COSINE: the rule of the planted benchmark.

Shapes: F latents, C concepts, D width.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.controls import control_row, share_of_trials
from pipeline.schema import Column, Control, Verdict

MIN_COSINE = 0.7

POWER_COLUMNS = (
    Column("concept", "int32", "number of a concept put into the chat model's rows"),
    Column("strength", "float64", "its mean norm where it is present, in multiples of the rows' root mean square"),
    Column("latent", "int32", "the latent whose chat decoder is most like it, in the crosscoder that saw it"),
    Column("cosine", "float64", "cosine of the two"),
    Column("verdict", "string", "that latent's verdict"),
    Column("is_found", "bool", "called chat-specific, with a cosine of at least 0.7"),
)


def strengths_of(num_concepts: int, strengths: Sequence[float]) -> Tensor:
    """The strength of each concept, one after the other: float64 [C]."""
    return torch.tensor([strengths[index % len(strengths)] for index in range(num_concepts)], dtype=torch.float64)


def power_table(d_chat_FD: Tensor, latents: pd.DataFrame, direction_CD: Tensor, strength_C: Tensor) -> pd.DataFrame:
    """POWER_COLUMNS: for every concept the latent that is most like it, and whether it was found.

    d_chat_FD: the chat decoder in units of the activations. latents: the table of the crosscoder that saw the concepts.
    """
    normalize = torch.nn.functional.normalize
    cosine_CF = normalize(direction_CD.double(), dim=1) @ normalize(d_chat_FD.double().cpu(), dim=1).T
    best = cosine_CF.max(1)
    verdicts = latents.set_index("latent")["verdict"].loc[best.indices.tolist()].to_numpy()
    return pd.DataFrame(
        {
            "concept": range(len(direction_CD)),
            "strength": strength_C.tolist(),
            "latent": best.indices.tolist(),
            "cosine": best.values.tolist(),
            "verdict": verdicts,
            "is_found": (best.values >= MIN_COSINE).numpy() & (verdicts == Verdict.CHAT_SPECIFIC),
        },
        columns=[column.name for column in POWER_COLUMNS],
    ).astype({"concept": "int32", "latent": "int32"})


def power_rows(table: pd.DataFrame, *, frequency: float) -> list[dict[str, Any]]:
    """schema.CONTROL_COLUMNS: one row per strength, with Wilson's interval over concepts."""
    rows = []
    for strength, own in table.groupby("strength"):
        num_found, num_close = int(own["is_found"].sum()), int((own["cosine"] >= MIN_COSINE).sum())
        rows.append(
            control_row(
                f"{Control.POWER} {strength:g}",
                "share of concepts put into the chat model's rows that the verdict calls chat-specific",
                share_of_trials(num_found, len(own)),
                num_latents=len(own),
                note=f"{num_found} of {len(own)} concepts of {strength:g} times the rows' root mean square, each on "
                f"{frequency:.2%} of the rows; {num_close} have a latent (cosine >= {MIN_COSINE:g})",
            )
        )
    return rows
