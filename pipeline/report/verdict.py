"""The verdict as text for a terminal: one column per crosscoder, then the planted behaviours.

The same numbers as the report's first page, in plain ASCII, about twelve lines, for `crossray run` and the README. It
returns text and prints nothing.
"""

from collections.abc import Sequence

from pipeline.report import formatting as fmt
from pipeline.report.data import CrosscoderReport, ReportData
from pipeline.report.headlines import cannot_tell, no_verdict
from pipeline.report.summary import (
    PlantedScore,
    SteeringEffect,
    planted_rows,
    replication,
    steering_effects,
    verdict_summary,
)
from pipeline.schema import Verdict
from pipeline.terminal import text_table

_REPLICATED = "replicated"
VERDICT_ROWS = (
    ("latents alive / all", "alive"),
    ("FVE base / chat", "fve"),
    ("L0", "l0"),
    ("chat-only by norm or evidence", "chat_only"),
    ("  chat-specific (confident)", Verdict.CHAT_SPECIFIC),
    ("    found again by other seeds", _REPLICATED),
    ("  shrinkage artifact", Verdict.SHRINKAGE),
    ("  decoupling artifact", Verdict.DECOUPLING),
    ("  shrinkage and decoupling", Verdict.BOTH),
    ("  undecided", Verdict.UNDECIDED),
    ("  withheld", Verdict.WITHHELD),
    ("stronger in chat / rotated", Verdict.STRONGER),
    ("base-only", Verdict.BASE_ONLY),
    ("shared / other", "shared"),
)
"""Label and key of each row of the verdict table."""
_OPTIONAL = (Verdict.WITHHELD, _REPLICATED)
"""Rows that are left out where no crosscoder has anything there."""


def verdict_table(crosscoders: Sequence[CrosscoderReport]) -> list[list[str]]:
    """Rows of strings, header first: ["", crosscoder...], then one row per entry of VERDICT_ROWS."""
    columns = [_column(crosscoder) for crosscoder in crosscoders]
    rows = [["", *(crosscoder.name for crosscoder in crosscoders)]]
    rows.extend(
        [label, *(column[key] for column in columns)]
        for label, key in VERDICT_ROWS
        if key not in _OPTIONAL or any(column[key] not in ("0", fmt.DASH) for column in columns)
    )
    return rows


def verdict_text(data: ReportData) -> str:
    """The verdict table, aligned, ASCII, without a final newline; what was not run shows as "-".

    What the models themselves say stands above it: on the first line where they cannot be told apart.
    """
    models = data.models
    of = f" (of {models.num_layers}, counted from 0)" if models.num_layers is not None else ""
    lines = [f"{data.run_name}: {models.base} (base) against {models.chat} (chat), layer {models.layer}{of}"]
    if nothing := cannot_tell(data):
        lines.insert(0, nothing)
    elif data.evidence is not None:
        lines.append(data.evidence.reason)
    if data.layer_note:
        lines.append(data.layer_note)
    lines += [f"{one.name}: {no_verdict(one)}" for one in data.crosscoders if one.shortcomings]
    header, *rows = verdict_table(data.crosscoders)
    lines += ["", text_table(header, map(_ascii, rows))]
    header, *rows = _planted_table(data)
    if rows:
        lines += ["", text_table(header, map(_ascii, rows))]
    return "\n".join(lines)


def _column(crosscoder: CrosscoderReport) -> dict[str, str]:
    keys = [key for _, key in VERDICT_ROWS]
    column = dict.fromkeys(keys, fmt.DASH)
    fidelity = crosscoder.fidelity
    if fidelity is not None:
        column["fve"] = f"{fmt.decimal(fidelity['fve_base'])} / {fmt.decimal(fidelity['fve_chat'])}"
        if fmt.is_missing(fidelity["fve_chat"]) and not fmt.is_missing(fidelity["fve"]):
            column["fve"] = f"{fmt.decimal(fidelity['fve'])} (difference)"
        column["l0"] = fmt.decimal(fidelity["l0"], 1)
    if crosscoder.latents is None:
        return column
    counts = verdict_summary(crosscoder.latents)
    column["alive"] = f"{fmt.count(counts.num_alive)} / {fmt.count(counts.num_latents)}"
    column["chat_only"] = fmt.count(counts.num_chat_only)
    column["shared"] = f"{fmt.count(counts.by_verdict[Verdict.SHARED])} / {fmt.count(counts.by_verdict[Verdict.OTHER])}"
    column[Verdict.STRONGER] = " / ".join(
        fmt.count(counts.by_verdict[name]) for name in (Verdict.STRONGER, Verdict.ROTATED)
    )
    column[Verdict.BASE_ONLY] = fmt.count(counts.by_verdict[Verdict.BASE_ONLY])
    column[Verdict.UNDECIDED] = share_of(counts.by_verdict[Verdict.UNDECIDED], counts.num_chat_only)
    if (again := replication(crosscoder)) is not None:
        column[_REPLICATED] = f"{fmt.count(again.num_replicated)} (at least half of {again.num_others})"
    num_withheld = counts.by_verdict[Verdict.WITHHELD]
    column[Verdict.WITHHELD] = share_of(num_withheld, counts.num_chat_only) if num_withheld else "0"
    if counts.has_scaling or counts.num_chat_only == 0:
        column[Verdict.CHAT_SPECIFIC] = f"{fmt.count(counts.num_specific)} ({fmt.count(counts.num_confident_specific)})"
        for verdict in Verdict.ARTIFACTS:
            column[verdict] = share_of(counts.by_verdict[verdict], counts.num_chat_only)
    return column


def share_of(part: int, whole: int) -> str:
    """A count with its share of a whole, "40 (33%)"; the count alone where the whole is 0."""
    return f"{fmt.count(part)} ({fmt.percent(part / whole, 0)})" if whole else fmt.count(part)


def _planted_table(data: ReportData) -> list[list[str]]:
    head = ["planted behaviour", "crosscoder", "latent", "AUROC [95%]", "deciding", "token", "rate when steered"]
    rows = [head]
    for crosscoder in data.crosscoders:
        effects = {effect.behavior: effect for effect in steering_effects(crosscoder.steering)}
        rows.extend(
            [
                row.behavior,
                crosscoder.name,
                str(row.specific.latent) if row.specific.latent >= 0 else fmt.DASH,
                score_text(row.specific),
                fmt.decimal(row.deciding.auroc, 2),
                fmt.decimal(row.token.auroc, 2),
                effect_text(effects.get(row.behavior), known=row.specific.latent),
            ]
            for row in planted_rows(crosscoder.planted)
        )
    return rows


def score_text(score: PlantedScore) -> str:
    """AUROC with its interval, or a dash."""
    return f"{fmt.decimal(score.auroc, 2)} {fmt.interval(score.low, score.high, 2)}".strip()


def effect_text(effect: SteeringEffect | None, *, known: int) -> str:
    """Rate before and after steering and the random control, or a dash; whose it is, unless the `known` latent's."""
    if effect is None:
        return fmt.DASH
    text = f"{fmt.percent(effect.unsteered_rate, 0)} -> {fmt.percent(effect.rate, 0)}"
    if effect.num_random:
        text += f" (random {fmt.percent(effect.random_mean, 0)})"
    return text if effect.latent == known else f"{text} by {effect.latent}"


def _ascii(cells: list[str]) -> list[str]:
    return [cell.replace(fmt.DASH, "-") for cell in cells]
