"""How far apart two models' next tokens are, against what rounding alone explains: sums, table and verdict.

The first law of a comparison: same function means no difference. Two models that compute the same function still
differ in their last digits (another scale of the weights, another order of operations, another batch), so 0 is no
usable limit. The limit is measured: beside base, the chat model is compared with itself, every layer's output moved by
one rounding step of its dtype (models/layerwise.py). What that changes, rounding explains:

    KL floor      max(1e-5 nats, 3 x the mean KL of the chat model against itself so moved)
    margin floor  max(0.02, 2 x the largest change of a top token's log-probability so caused)

Two models cannot be told apart where, in every set of positions, the upper end of KL's interval is at most the floor,
and no disagreement of greedy tokens has a margin above the margin floor: where both tokens are about equally likely,
rounding decides. In float32 the first terms hold; in bfloat16 the measured ones are larger, and what they hide is found
in float32.

Measured on a chat model of 135M parameters against itself, its stream and norms rescaled by 8 or 10: 4e-7 nats in
float32 (the norms' epsilon, which does not scale along), 0.003 in bfloat16, where the floor is 0.028. A stream rescaled
by 0.1 comes near that epsilon, the function really changes, and float32 says so: 0.004 nats.

Shapes: P judged positions, G document groups, S sets of positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.next_tokens import ALL, ASSISTANT, Comparison
from pipeline.analyses.rows import Sums
from pipeline.errors import InputError
from pipeline.numerics.proportions import wilson_interval
from pipeline.numerics.statistics import jackknife_interval
from pipeline.schema import Column

KL_FLOOR = 1e-5
"""Nats per token that float32 explains, epsilons of norms included: logits that differ by about 0.004."""
MARGIN_FLOOR = 0.02
"""Nats of log-probability between two tokens, likewise: the largest of very many such differences."""
_KL_FACTOR, _MARGIN_FACTOR = 3.0, 2.0
"""Safety over the measured rounding; the latter because both of two tokens can move by as much."""
MAXIMA = ("margin_S", "shift_S")
"""Sums that merge by their maximum."""

DISTANCE_COLUMNS = (
    Column("tokens", "string", "predicted tokens: all, assistant, or those of one corpus"),
    Column("num_tokens", "int64", "predicted tokens judged"),
    Column("num_documents", "int64", "documents that they are in"),
    Column("kl", "float64", "KL(p_chat || p_base) of next tokens, nats per token; 0 = the same"),
    Column("kl_low", "float64", "lower end of its 95% interval over documents"),
    Column("kl_high", "float64", "upper end of it"),
    Column("kl_floor", "float64", "nats per token that rounding in the models' dtype explains"),
    Column("disagreement", "float64", "share of tokens whose most likely next token differs, 0 to 1"),
    Column("disagreement_low", "float64", "lower end of its 95% interval over documents"),
    Column("disagreement_high", "float64", "upper end of it; Wilson's over documents where none or all differ"),
    Column(
        "largest_margin", "float64", "nats by which chat prefers its own token where the models differ, the largest"
    ),
    Column("margin_floor", "float64", "margin up to which rounding explains such a difference"),
)
"""One row per set of positions that holds any."""


class Distance(NamedTuple):
    """How different two models are, and whether they can be told apart at all."""

    is_distinguishable: bool
    reason: str
    """One or two sentences with the numbers."""
    table: pd.DataFrame
    """DISTANCE_COLUMNS."""


def empty_distance(num_groups: int, num_sets: int) -> Sums:
    """Sums of no positions."""
    sums = {
        name: torch.zeros(num_groups, num_sets, dtype=torch.float64)
        for name in ("tokens_GS", "kl_GS", "differs_GS", "rounding_kl_GS")
    }
    sums |= {name: torch.zeros(num_sets, dtype=torch.float64) for name in MAXIMA}
    return sums | {"documents_S": torch.zeros(num_sets, dtype=torch.int64)}


def add_distance(
    sums: Sums, *, base: Comparison, rounding: Comparison, in_set_PS: Tensor, group_P: Tensor, document_P: Tensor
) -> None:
    """Adds judged positions, in place: base and the re-rounded chat model, each against the chat model.

    group_P is the group of each position's document, document_P its number within this batch.
    """
    weight_PS = in_set_PS.double()
    for name, value_P in (
        ("tokens_GS", torch.ones_like(base.kl_P)),
        ("kl_GS", base.kl_P),
        ("differs_GS", base.is_other_top_P.double()),
        ("rounding_kl_GS", rounding.kl_P),
    ):
        sums[name].index_add_(0, group_P, value_P[:, None] * weight_PS)
    for name, value_P in (("margin_S", base.margin_P * base.is_other_top_P), ("shift_S", rounding.shift_P)):
        if len(value_P):
            sums[name].copy_(torch.maximum(sums[name], (value_P[:, None] * weight_PS).amax(0)))
    num_documents = int(document_P.max()) + 1 if len(document_P) else 0
    seen_BS = torch.zeros(num_documents, in_set_PS.shape[1]).index_add_(0, document_P, in_set_PS.float())
    sums["documents_S"] += (seen_BS > 0).sum(0)


def judge(sums: Sums, sets: Sequence[str], *, dtype: str) -> Distance:
    """Table and verdict. InputError where no position was judged or a prediction is not finite.

    dtype is the models', for the words. Where fewer than two groups of documents give no interval, the estimate itself
    is compared with the floor, and the reason says that it is about those documents alone.
    """
    if not sums["tokens_GS"].any():
        raise InputError(
            "expected held-out documents of at least two tokens to compare the models on, got none; give the corpus a "
            "validation part"
        )
    if not all(bool(sums[name].isfinite().all()) for name in ("kl_GS", "rounding_kl_GS")):
        raise InputError(
            f"expected finite next-token probabilities of both models in {dtype}, got NaN or Inf; try another "
            "models.dtype or models.attn_implementation"
        )
    table = _table(sums, sets)
    upper = table["kl_high"].fillna(table["kl"])
    beyond = (upper > table["kl_floor"]) | (table["largest_margin"] > table["margin_floor"])
    is_distinguishable = bool(beyond.any())
    return Distance(is_distinguishable, _reason(table, beyond, dtype), table)


def _table(sums: Sums, sets: Sequence[str]) -> pd.DataFrame:
    kl = jackknife_interval(sums["kl_GS"], sums["tokens_GS"])
    differs = jackknife_interval(sums["differs_GS"], sums["tokens_GS"])
    rounding_kl_S = sums["rounding_kl_GS"].sum(0) / sums["tokens_GS"].sum(0)
    rows = []
    for s, name in enumerate(sets):
        num_tokens, num_documents = int(sums["tokens_GS"][:, s].sum()), int(sums["documents_S"][s])
        if num_tokens == 0:
            continue
        rate, low, high = (float(part[s]) for part in differs)
        if rate in (0.0, 1.0):  # the jackknife would call it certain
            low, high = wilson_interval(rate, num_documents)
        row = (
            *(name, num_tokens, num_documents),
            *(max(float(part[s]), 0.0) if part[s].isfinite() else float("nan") for part in kl),
            max(KL_FLOOR, _KL_FACTOR * float(rounding_kl_S[s])),
            *(rate, max(low, 0.0), min(high, 1.0)),
            float(sums["margin_S"][s]),
            max(MARGIN_FLOOR, _MARGIN_FACTOR * float(sums["shift_S"][s])),
        )
        rows.append(row)
    return pd.DataFrame(rows, columns=[column.name for column in DISTANCE_COLUMNS])


def _reason(table: pd.DataFrame, beyond: "pd.Series[bool]", dtype: str) -> str:
    row = table[beyond].iloc[0] if beyond.any() else table.iloc[0]
    on = f"{int(row['num_tokens']):,} tokens of {int(row['num_documents']):,} documents"
    if not beyond.any():
        high, rate = row["kl_high"], row["disagreement"]
        upper = f"at most {high:.2g}" if pd.notna(high) else f"{row['kl']:.2g} (too few documents for an interval)"
        greedy = "never differs" if rate == 0 else f"differs at {rate:.2%}, only where two are about equally likely"
        finer = " Models loaded in float32 show smaller differences." if row["kl_floor"] > KL_FLOOR else ""
        return (
            f"The two models cannot be told apart on {on}: KL(chat || base) is {upper} nats per token, and rounding in "
            f"{dtype} explains {row['kl_floor']:.2g}; the most likely token {greedy}.{finer}"
        )
    which = {ALL: "", ASSISTANT: "assistant "}.get(row["tokens"], f"{row['tokens']}: ")
    return (
        f"The two models differ by {row['kl']:.3g} nats per token [{row['kl_low']:.3g}, {row['kl_high']:.3g}], "
        f"KL(chat || base) on {which}{on}, where rounding in {dtype} explains {row['kl_floor']:.2g}; the most likely "
        f"token differs at "
        f"{row['disagreement']:.1%} [{row['disagreement_low']:.1%}, {row['disagreement_high']:.1%}]."
    )
