"""What a finished run says, as plain values: `run.summary()` in Python, `crossray show NAME --json` in a shell.

The layout is a contract: `crossray schema show` prints its JSON schema (docs/schema/show.json), fields keep their name
and meaning, and `version` is raised where one does not. A number that does not exist is null. Numbers are those of the
run's tables; nothing is computed anew.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict

from pipeline.analyses.steering_columns import STEERING_COLUMNS
from pipeline.report import formatting as fmt
from pipeline.report.latents import by_verdict
from pipeline.report.summary import verdict_summary
from pipeline.schema import CAUSALITY_COLUMNS, FIDELITY_KEYS, Verdict
from pipeline.terminal import text_table

NUM_EXAMPLES = 3
"""Contexts told of each latent."""
_LATENT_NUMBERS = (
    *("delta_norm", "frequency", "max_activation", "q_value"),
    *(f"{name}{end}" for name in ("nu_eps", "nu_r") for end in ("", "_low", "_high")),
)
"""Columns of the latent table that a latent's summary holds."""
_NO_SHARED = (Verdict.SHARED, Verdict.OTHER, Verdict.DEAD)
"""Verdicts of latents that nobody looks for."""

Row = dict[str, str | int | float | None]
"""A row of one of the run's tables: column -> value. `crossray schema show` lists the columns."""


class _Plain(BaseModel):
    """What all parts share; texts of a corpus may hold anything, so a run file's rules do not apply."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Example(_Plain):
    """A text around a place where a latent fires."""

    corpus: str
    """Name of its corpus."""
    document: int
    """Id of its document (doc_id)."""
    position: int
    """Position of the strongest token in the document."""
    activation: float
    """The latent's activation there."""
    tokens: tuple[str, ...]
    """Texts of the tokens around it."""
    activations: tuple[float, ...]
    """Activation at each of these tokens."""


class Latent(_Plain):
    """One latent."""

    latent: int
    """Index in the dictionary."""
    verdict: str
    """As in the latent table."""
    is_confident: bool
    """Whether the call holds at the run's false discovery rate."""
    reason: str
    """The numbers that the verdict follows from."""
    numbers: dict[str, float | None]
    """Columns of the latent table: delta_norm, nu_eps, nu_r, each nu with its 95% interval, and more."""
    examples: tuple[Example, ...]
    """Strongest contexts first."""


class CrosscoderSummary(_Plain):
    """One crosscoder."""

    name: str
    """In the run."""
    num_latents: int
    """Size of the dictionary."""
    num_alive: int
    """Latents that fire on validation rows."""
    num_confident: int
    """Chat-specific latents whose call holds at the run's false discovery rate."""
    verdicts: dict[str, int]
    """Latents by verdict; every verdict is named."""
    fidelity: dict[str, float | None]
    """FVE of base and chat, mean active latents per row (l0) and more: schema.FIDELITY_KEYS."""
    latents: tuple[Latent, ...]
    """In the order of the verdict table, then by activation mass; shared and dead ones are left out."""
    causality: tuple[Row, ...]
    """Rows of the causality table: KL to the chat model after each intervention, nats per token, with intervals."""
    steering: tuple[Row, ...]
    """Rows of the steering table: what was steered by how much, and how many answers show the behaviour."""


class Summary(_Plain):
    """One finished run."""

    version: Literal[1] = 1
    """Of this layout."""
    name: str
    """Of the run."""
    created: str
    """When its report was written, ISO 8601."""
    root: str
    """Storage root."""
    report: str
    """Path or URL of the page."""
    base: str
    """The base model; empty where the run's records do not name it."""
    chat: str
    """The chat model."""
    layer: int
    """Counted from 0."""
    is_distinguishable: bool | None
    """Whether the two models can be told apart at all; null where that was not measured."""
    crosscoders: tuple[CrosscoderSummary, ...]
    """In the run's order."""


def crosscoder_summary(
    name: str,
    table: pd.DataFrame,
    *,
    examples: pd.DataFrame | None,
    causality: pd.DataFrame | None,
    steering: pd.DataFrame | None,
    num_latents: int,
) -> CrosscoderSummary:
    """From a run's tables, None where an analysis was off; the latent table with its fidelity in `attrs`."""
    counts = verdict_summary(table)
    return CrosscoderSummary(
        name=name,
        num_latents=counts.num_latents,
        num_alive=counts.num_alive,
        num_confident=counts.num_confident_specific,
        verdicts=counts.by_verdict,
        fidelity=_numbers(table.attrs["fidelity"], FIDELITY_KEYS),
        latents=_latents(table, examples, num_latents),
        causality=_rows(causality, [column.name for column in CAUSALITY_COLUMNS]),
        steering=_rows(steering, [column.name for column in STEERING_COLUMNS]),
    )


def latents_text(summary: Summary) -> str:
    """The strongest latents of every crosscoder as a table, each with its strongest token; empty without any."""
    rows = [
        [
            f"{own.name} {one.latent}",
            one.verdict + " (confident)" * one.is_confident,
            *(fmt.decimal(one.numbers[name], 2).replace(fmt.DASH, "-") for name in ("delta_norm", "nu_eps", "nu_r")),
            fmt.percent(one.numbers["frequency"]).replace(fmt.DASH, "-"),
            repr(strongest_token(one))[1:-1],
        ]
        for own in summary.crosscoders
        for one in own.latents
    ]
    header = ["latent", "verdict", "Delta_norm", "nu_eps", "nu_r", "fires on", "strongest at"]
    return text_table(header, rows) + "\n" if rows else ""


def strongest_token(latent: Latent) -> str:
    """The token on which a latent fires most; empty where no context is kept."""
    if not latent.examples:
        return ""
    first = latent.examples[0]
    return first.tokens[max(range(len(first.tokens)), key=lambda place: first.activations[place])]


def _latents(table: pd.DataFrame, examples: pd.DataFrame | None, number: int) -> tuple[Latent, ...]:
    kept = table[~table["verdict"].isin(_NO_SHARED)]
    mass = (kept["frequency"] * kept["mean_activation"]).fillna(0.0)
    ranked = by_verdict(kept.assign(_mass=mass).sort_values("_mass", ascending=False, kind="stable"))
    return tuple(
        Latent(
            latent=int(row["latent"]),
            verdict=str(row["verdict"]),
            is_confident=bool(row["is_confident"]),
            reason=str(row["reason"] or ""),
            numbers=_numbers(row, _LATENT_NUMBERS),
            examples=_examples(examples, int(row["latent"])),
        )
        for row in ranked.head(number).to_dict("records")
    )


def _examples(examples: pd.DataFrame | None, latent: int) -> tuple[Example, ...]:
    if examples is None:
        return ()
    own = examples[examples["latent"] == latent].sort_values("rank", kind="stable").head(NUM_EXAMPLES)
    return tuple(
        Example(
            corpus=str(row["corpus"]),
            document=int(row["doc_id"]),
            position=int(row["position"]),
            activation=float(row["activation"]),
            tokens=tuple(map(str, row["tokens"])),
            activations=tuple(map(float, row["activations"])),
        )
        for row in own.to_dict("records")
    )


def _rows(table: pd.DataFrame | None, columns: list[str]) -> tuple[Row, ...]:
    rows = [] if table is None else table[columns].to_dict("records")
    return tuple({str(name): _plain(value) for name, value in row.items()} for row in rows)


def _numbers(row: Mapping[Any, Any], names: Iterable[str]) -> dict[str, float | None]:
    return {name: _finite(float(row[name])) for name in names}


def _plain(value: Any) -> str | int | float | None:
    return _finite(value) if isinstance(value, float) else value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
