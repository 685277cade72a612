"""Attention-sink rows, found without a preset, and what they do to the fraction of variance explained.

A few tokens (mostly a document's first) have norms a hundred times the median in many models. They hold nearly all of
the variance, so a crosscoder that explains them explains "everything": FVE 0.998 with them can be 0.80 without. Here:

- `NormHistogram`: a mergeable estimate of each model's median row norm (a histogram of log norms, exact to 1.1%);
- `SinkRule`: a row is a sink where its norm in either model exceeds a multiple of that model's median;
- `SinkRows`: a row analysis with FVE with and without sinks, as it is and with every dimension at unit variance.

Finding the median takes a pass over norms; the rule then applies to any batch on its own. Nothing is dropped here.

Shapes: B rows, M models, D width, K bins, R = 2 kinds of rows (not sinks, sinks).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.analyses.rows import RowBatch, Sums, merge_sums, require_rows
from pipeline.errors import InputError
from pipeline.schema import MODEL_NAMES

DEFAULT_MULTIPLE = 10.0
"""Well above what ordinary rows reach (2 to 4 medians) and well below sinks (50 and more)."""
_BINS_PER_OCTAVE = 64
_LOWEST, _HIGHEST = -40, 40
"""Powers of two between which norms are told apart; others count in the first and last bin."""
_NUM_BINS = (_HIGHEST - _LOWEST) * _BINS_PER_OCTAVE


class SinkRule(NamedTuple):
    """Which rows are attention sinks."""

    median_M: tuple[float, ...]
    """Median row norm of each model over the corpus."""
    multiple: float = DEFAULT_MULTIPLE

    def is_sink(self, x_BMD: Tensor) -> Tensor:
        """bool [...]: whether a row [..., M, D] exceeds the limit in any model; False for NaN and Inf, other faults."""
        norm_BM = x_BMD.float().norm(dim=-1)
        limit_M = self.multiple * torch.tensor(self.median_M, device=norm_BM.device)
        is_finite_B = norm_BM.isfinite().all(dim=-1)
        is_sink_B: Tensor = (norm_BM > limit_M).any(dim=-1) & is_finite_B
        return is_sink_B


class NormHistogram:
    """Counts of rows by the logarithm of their norm, per model; start, update, merge, and the medians."""

    def __init__(self, num_models: int = len(MODEL_NAMES)) -> None:
        self.num_models = num_models

    def start(self) -> Sums:
        """No rows."""
        return {"norms_MK": torch.zeros(self.num_models, _NUM_BINS, dtype=torch.int64)}

    def update(self, sums: Sums, x_BMD: Tensor) -> None:
        """Adds rows, in place; those with NaN or Inf are not counted."""
        norm_BM = x_BMD.float().norm(dim=2)
        norm_BM = norm_BM[norm_BM.isfinite().all(dim=1)].double()
        bin_BM = ((norm_BM.log2() - _LOWEST) * _BINS_PER_OCTAVE).floor().clamp(0, _NUM_BINS - 1).long().cpu()
        for model in range(self.num_models):
            sums["norms_MK"][model] += torch.bincount(bin_BM[:, model], minlength=_NUM_BINS)

    def merge(self, a: Sums, b: Sums) -> Sums:
        """The counts of both parts together."""
        return merge_sums(a, b)

    def medians(self, sums: Sums) -> tuple[float, ...]:
        """The lower median norm of each model, to 1.1%: the geometric middle of its bin. InputError without rows."""
        below_MK = sums["norms_MK"].cumsum(1)
        require_rows(int(below_MK[0, -1]), "norm")
        # Half of the rows, rounded up: of two rows the smaller, so that one sink beside one other row is found.
        middle_M = (below_MK >= (below_MK[:, -1:] + 1) // 2).long().argmax(dim=1)
        return tuple(2.0 ** (_LOWEST + (place + 0.5) / _BINS_PER_OCTAVE) for place in middle_M.tolist())

    def rule(self, sums: Sums, multiple: float = DEFAULT_MULTIPLE) -> SinkRule:
        """The rule for these rows."""
        if not multiple > 1:
            raise InputError(f"expected a multiple of the median norm above 1, got {multiple}; 10 is usual")
        return SinkRule(self.medians(sums), multiple)


class SinkRows:
    """Row analysis: how many rows are sinks, and FVE with and without them.

    Keys of the table, NaN where undefined (higher is better for all FVE):

    num_rows, num_sinks, sink_frac; sink_variance_frac_<model>: share of the summed squared deviation from the mean
    that goes with the sink rows; largest_norm_<model>, in medians;
    fve[_standardised][_without_sinks][_<model>]: 1 - sum_d Var(error_d) / sum_d Var(x_d), pooled over models without
    <model>; standardised divides each dimension by its variance over the same rows, so every dimension that varies
    counts the same.
    """

    def __init__(self, rule: SinkRule, *, activation_dim: int) -> None:
        self.rule, self.activation_dim = rule, activation_dim
        self.num_models = len(rule.median_M)

    def start(self) -> Sums:
        """First and second moments of x and of the error, per kind of row, model and dimension."""
        shape = (2, self.num_models, self.activation_dim)
        sums = {
            name: torch.zeros(shape, dtype=torch.float64)
            for name in ("x_RMD", "x_squared_RMD", "error_RMD", "error_squared_RMD")
        }
        return sums | {
            "rows_R": torch.zeros(2, dtype=torch.int64),
            "largest_norm_M": torch.zeros(self.num_models, dtype=torch.float64),
        }

    def update(self, sums: Sums, batch: RowBatch) -> None:
        """Adds a batch; moments in float64."""
        if batch.x_BMD.shape[1:] != (self.num_models, self.activation_dim):
            raise InputError(
                f"expected rows [rows, {self.num_models}, {self.activation_dim}], got {tuple(batch.x_BMD.shape)}: the "
                "medians are those of other activations"
            )
        kind_B = self.rule.is_sink(batch.x_BMD).long().cpu()
        x_BMD = batch.x_BMD.double()
        error_BMD = x_BMD - batch.reconstruction_BMD.double()
        sums["rows_R"] += torch.bincount(kind_B, minlength=2)
        for name, value_BMD in (("x", x_BMD), ("error", error_BMD)):
            sums[f"{name}_RMD"].index_add_(0, kind_B, value_BMD.cpu())
            sums[f"{name}_squared_RMD"].index_add_(0, kind_B, value_BMD.square().cpu())
        if len(x_BMD):
            largest_M = x_BMD.norm(dim=2).amax(0).cpu()
            sums["largest_norm_M"].copy_(torch.maximum(sums["largest_norm_M"], largest_M))

    def merge(self, a: Sums, b: Sums) -> Sums:
        """All sums add; the largest norm is the larger one."""
        return merge_sums(a, b, maxima=("largest_norm_M",))

    def table(self, sums: Sums) -> dict[str, float]:
        """The numbers by key. InputError where no row was seen."""
        num_rows, num_sinks = int(sums["rows_R"].sum()), int(sums["rows_R"][1])
        require_rows(num_rows, "sink")
        found: dict[str, float] = {"num_rows": num_rows, "num_sinks": num_sinks, "sink_frac": num_sinks / num_rows}
        deviation_M = _squared_deviations(sums, "x", slice(None)).sum(1)
        without_M = _squared_deviations(sums, "x", slice(0, 1)).sum(1)
        for model, name in enumerate(self._names()):
            total = float(deviation_M[model])
            found[f"sink_variance_frac_{name}"] = 1 - float(without_M[model]) / total if total > 0 else math.nan
            found[f"largest_norm_{name}"] = float(sums["largest_norm_M"][model]) / self.rule.median_M[model]
        for suffix, kinds in (("", slice(None)), ("_without_sinks", slice(0, 1))):
            found |= self._fve(sums, suffix, kinds)
        return found

    def _names(self) -> tuple[str, ...]:
        return MODEL_NAMES if self.num_models == len(MODEL_NAMES) else tuple(map(str, range(self.num_models)))

    def _fve(self, sums: Sums, suffix: str, kinds: slice) -> dict[str, float]:
        """FVE and its standardised form of some kinds of rows, per model and pooled."""
        x_MD, error_MD = (_squared_deviations(sums, name, kinds) for name in ("x", "error"))
        # Rounding leaves a little of the mean's square behind in the variance of a constant dimension.
        varies_MD = x_MD > 1e-13 * sums["x_squared_RMD"][kinds].sum(0)
        left_MD = torch.where(varies_MD, error_MD / x_MD, 0.0)
        parts = {
            "fve": (error_MD.sum(1), torch.where(varies_MD, x_MD, 0.0).sum(1)),
            "fve_standardised": (left_MD.sum(1), varies_MD.double().sum(1)),
        }
        found = {}
        for key, (unexplained_M, total_M) in parts.items():
            for name, unexplained, total in zip(self._names(), unexplained_M.tolist(), total_M.tolist(), strict=True):
                found[f"{key}{suffix}_{name}"] = 1 - unexplained / total if total > 0 else math.nan
            pooled = float(total_M.sum())
            found[f"{key}{suffix}"] = 1 - float(unexplained_M.sum()) / pooled if pooled > 0 else math.nan
        return found


def _squared_deviations(sums: Sums, name: str, kinds: slice) -> Tensor:
    """Summed squared deviation from the mean of those rows, per model and dimension [M, D]; at least 0."""
    num_rows = sums["rows_R"][kinds].sum().clamp(min=1)
    total_MD, squared_MD = (sums[f"{name}{part}_RMD"][kinds].sum(0) for part in ("", "_squared"))
    return (squared_MD - total_MD.square() / num_rows).clamp(min=0)
