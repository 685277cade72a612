"""Token rows to activation rows: both models, layers 0..L only, with little padding computed and none kept.

A call takes the documents of one shard, runs them in batches of similar length and returns one row per kept token, in
the order of the documents, positions ascending. The rows depend on the documents and options alone: the same call gives
the same bytes on every worker and every time. Only where memory runs out are batches cut differently, which changes
nothing but rounding.

It knows no shards or files. The trade-off: documents are sorted by length inside a call, so more documents a call
means less padding, and all rows of a call are in memory at once.

Shapes: B rows, M models, D width; inside a batch B documents, T positions.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.models.failures import is_out_of_memory
from pipeline.models.padding import TokenBatch, pad_tokens
from pipeline.models.pair import ModelPair
from pipeline.schema import MODEL_NAMES, Flag

OVERHEAD_TOKENS = 64
"""Cost of starting one more batch, in tokens; less padding than that is cheaper than another batch."""
SINK_MULTIPLE = 10.0
"""A row whose norm in either model exceeds this multiple of its document's median is an attention sink."""

_ROLES = int(Flag.SPECIAL | Flag.BOS | Flag.TEMPLATE | Flag.USER | Flag.ASSISTANT | Flag.REASONING | Flag.TOOL)
PLAIN = "plain"
"""Kind of the tokens of plain documents that are not special."""
KINDS: dict[str, int] = {
    name: int(Flag[name.upper()]) for name in ("special", "template", "user", "assistant", "reasoning", "tool")
}
"""Kinds of tokens with a bit of their own."""

HISTORY = "earlier turns"
FIRST_TOKENS = "first tokens"
BOS = "BOS"
NOT_KEPT = "not among activations.rows.keep"


class RowOptions(NamedTuple):
    """Which tokens become rows, and how they are run."""

    tokens_per_batch: int
    """Tokens of one forward pass, padding included; raising it costs memory. A longer document runs alone."""
    drop_first_tokens: int = 0
    """Leading tokens of every document that become no rows."""
    drop_bos: bool = False
    """Whether BOS becomes no row, wherever it stands."""
    norm_cap: float | None = None
    """A token whose norm in either model exceeds this multiple of its document's median becomes no row."""
    keep: tuple[str, ...] = ()
    """Kinds of tokens (KINDS, PLAIN) that become rows; empty for all."""
    leave_out: tuple[str, ...] = ()
    """Kinds that become no rows, even if they are of a kind to keep."""


class BatchPlan(NamedTuple):
    """Which documents run together."""

    batches: tuple[np.ndarray, ...]
    """Indices of documents, each exactly once, int64; the longest documents come first."""
    real_token_frac: float
    """Tokens over tokens computed, padding included; 1 without any token."""


class ActivationRows(NamedTuple):
    """Rows in the order of the documents given, positions ascending; on the CPU."""

    x_BMD: Tensor
    """bfloat16, residual stream after layer L, model order of the schema."""
    token_id_B: Tensor
    """int32."""
    doc_id_B: Tensor
    """int64."""
    position_B: Tensor
    """int32, counted in the document before any row is dropped."""
    flags_B: Tensor
    """int32."""
    real_token_frac: float
    """Of the forward passes that made these rows."""
    num_capped: int
    """Rows left out by norm_cap alone."""
    num_out_of_memory: int = 0
    """How often a batch did not fit and the budget was halved."""
    left_out: Mapping[str, int] = MappingProxyType({})
    """Tokens that became no rows, by reason; without those of norm_cap."""


class ExtractRows:
    """Callable on token rows (schema.TOKEN_COLUMNS as a dict of columns): ActivationRows of all their documents."""

    def __init__(self, pair: ModelPair, options: RowOptions) -> None:
        check_options(options)
        self.pair = pair
        self.options = options
        self.tokens_per_batch = options.tokens_per_batch
        """Budget of the next call: the options', until memory runs out."""

    def __call__(
        self, documents: Mapping[str, Sequence[Any]], on_batch: Callable[[int], None] | None = None
    ) -> ActivationRows:
        """Rows of the documents; a document of which everything is dropped gives none.

        on_batch: told the tokens of each batch that is done.

        A batch that does not fit into memory is run again in halves, and later calls keep the smaller budget. Raises
        InputError where one document alone does not fit.
        """
        ids = [np.asarray(row, dtype=np.int32) for row in documents["input_ids"]]
        flags = [np.asarray(row, dtype=np.int32) for row in documents["flags"]]
        positions = [kept_positions(row, self.options) for row in flags]
        ends = np.cumsum([len(row) for row in positions], dtype=np.int64)
        num_rows = int(ends[-1]) if len(ends) else 0
        x_BMD = torch.empty(num_rows, len(MODEL_NAMES), self.pair.activation_dim, dtype=torch.bfloat16)
        is_within_cap_B = torch.ones(num_rows, dtype=torch.bool)
        lengths = [len(row) for row in ids]
        num_computed, num_out_of_memory = 0, 0
        waiting = self._plan(np.arange(len(ids)), lengths)
        while waiting:
            members = waiting.pop()
            batch = pad_tokens([ids[i] for i in members])
            width = batch.ids_BT.shape[1]
            source = np.concatenate([row * width + positions[i] for row, i in enumerate(members)])
            taken = self._run(batch, torch.from_numpy(source))
            if taken is None:
                num_out_of_memory += 1
                self._halve(len(members), width)
                waiting = self._plan(np.concatenate([*waiting, members]), lengths)
                continue
            num_computed += batch.ids_BT.numel()
            target = np.concatenate([np.arange(ends[i] - len(positions[i]), ends[i]) for i in members])
            x_BMD[torch.from_numpy(target)] = taken.x_BMD
            is_within_cap_B[torch.from_numpy(target)] = taken.is_within_cap_B
            if on_batch is not None:
                on_batch(sum(lengths[i] for i in members))
        num_rows_of = [len(row) for row in positions]
        rows = ActivationRows(
            x_BMD,
            _take(ids, positions),
            torch.from_numpy(np.repeat(np.asarray(documents["doc_id"], dtype=np.int64), num_rows_of)),
            torch.from_numpy(_concatenate(positions).astype(np.int32)),
            _take(flags, positions),
            sum(lengths) / num_computed if num_computed else 1.0,
            int((~is_within_cap_B).sum()),
            num_out_of_memory,
            dict(sum((count_left_out(row, self.options) for row in flags), Counter())),
        )
        return rows if rows.num_capped == 0 else _of_rows(rows, is_within_cap_B)

    def _plan(self, members: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
        """Batches of some documents for the present budget; the last one is to be run first."""
        plan = plan_batches([lengths[i] for i in members], self.tokens_per_batch)
        return [members[batch] for batch in reversed(plan.batches)]

    def _run(self, batch: TokenBatch, source_B: Tensor) -> "_TakenRows | None":
        """Rows of a batch, or None where memory ran out; the memory of a failed attempt is freed before the return."""
        try:
            h_BTMD = self.pair.activations(batch.ids_BT, batch.mask_BT)
            source_B = source_B.to(h_BTMD.device)
            kept_BMD = h_BTMD.flatten(0, 1)[source_B]
            is_within_B = torch.ones(len(kept_BMD), dtype=torch.bool)
            if self.options.norm_cap is not None:
                is_within_BT = within_norm_cap(h_BTMD, batch.mask_BT, self.options.norm_cap)
                is_bad_B = ~kept_BMD.isfinite().flatten(1).all(dim=1)  # a fault of the document, not a large norm
                is_within_B = (is_within_BT.flatten()[source_B] | is_bad_B).cpu()
            return _TakenRows(kept_BMD.to(torch.bfloat16).cpu(), is_within_B)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _halve(self, num_documents: int, width: int) -> None:
        if num_documents == 1:
            raise InputError(
                f"expected memory on {self.pair.device} for one document of {width} tokens, it ran out; lower "
                "tokens.max_tokens_per_document, or give each worker more memory or fewer neighbours (resources)"
            )
        self.tokens_per_batch = max(1, num_documents * width // 2)


class _TakenRows(NamedTuple):
    """Rows of one batch, on the CPU."""

    x_BMD: Tensor
    is_within_cap_B: Tensor


def is_row(flags: np.ndarray, options: RowOptions) -> np.ndarray:
    """bool [T]: which tokens of a document become rows, from their flags; norm_cap is `within_norm_cap`'s."""
    is_kept: np.ndarray = np.ones(len(flags), dtype=bool)
    for is_left_out in _left_out(flags, options).values():
        is_kept &= ~is_left_out
    return is_kept


def count_left_out(flags: np.ndarray, options: RowOptions) -> Counter[str]:
    """Tokens of a document that become no rows, each under the first reason that holds; norm_cap's are not counted."""
    counts: Counter[str] = Counter()
    is_counted = np.zeros(len(flags), dtype=bool)
    for reason, is_left_out in _left_out(flags, options).items():
        counts[reason] = int((is_left_out & ~is_counted).sum())
        is_counted |= is_left_out
    return +counts


def num_leading(flags: np.ndarray, options: RowOptions) -> int:
    """Tokens at the start of a document that give no rows in any document: the first ones, and BOS where it is left."""
    starts_with_bos = options.drop_bos and len(flags) > 0 and bool(flags[0] & Flag.BOS)
    return min(len(flags), max(options.drop_first_tokens, int(starts_with_bos)))


def _left_out(flags: np.ndarray, options: RowOptions) -> dict[str, np.ndarray]:
    """bool [T] by reason; the masks may overlap."""
    reasons = {
        HISTORY: (flags & int(Flag.HISTORY)) != 0,
        FIRST_TOKENS: np.arange(len(flags)) < options.drop_first_tokens,
    }
    if options.drop_bos:
        reasons[BOS] = (flags & int(Flag.BOS)) != 0
    reasons |= {kind: _is_of(kind, flags) for kind in options.leave_out}
    if options.keep:
        reasons[NOT_KEPT] = ~np.any([_is_of(kind, flags) for kind in options.keep], axis=0)
    return reasons


def _is_of(kind: str, flags: np.ndarray) -> np.ndarray:
    is_of: np.ndarray = (flags & _ROLES) == 0 if kind == PLAIN else (flags & KINDS[kind]) != 0
    return is_of


def kept_positions(flags: np.ndarray, options: RowOptions) -> np.ndarray:
    """Positions of a document that become rows, int64 ascending."""
    return np.flatnonzero(is_row(flags, options))


def within_norm_cap(h_BTMD: Tensor, mask_BT: Tensor, norm_cap: float) -> Tensor:
    """bool [B, T]: tokens whose norm is at most norm_cap times the median of their document, in every model.

    The median is over all tokens of the document, whether they become rows or not, so the answer depends on no other
    document; of an even number it is the lower of the middle two, so that a sink beside one other token is found.
    False at padding.
    """
    is_token_BT1 = (mask_BT.to(h_BTMD.device) != 0)[:, :, None]
    norm_BTM = h_BTMD.float().norm(dim=-1).masked_fill(~is_token_BT1, float("nan"))
    median_B1M = norm_BTM.nanmedian(dim=1, keepdim=True).values
    is_within_BT: Tensor = (norm_BTM <= norm_cap * median_B1M).all(dim=-1)
    return is_within_BT


def check_options(options: RowOptions) -> None:
    """InputError where an option has no meaning."""
    if options.tokens_per_batch < 1:
        raise InputError(f"expected tokens_per_batch of at least 1, got {options.tokens_per_batch}")
    if options.drop_first_tokens < 0:
        raise InputError(f"expected drop_first_tokens of at least 0, got {options.drop_first_tokens}")
    if options.norm_cap is not None and not options.norm_cap > 0:
        raise InputError(f"expected a norm_cap above 0, got {options.norm_cap}")
    unknown = {*options.keep, *options.leave_out} - {*KINDS, PLAIN}
    if unknown:
        raise InputError(f"expected kinds of tokens of {', '.join((*KINDS, PLAIN))}, got {', '.join(sorted(unknown))}")


def plan_batches(lengths: Sequence[int], tokens_per_batch: int, *, overhead_tokens: int = OVERHEAD_TOKENS) -> BatchPlan:
    """The cheapest way to run documents in batches of consecutive lengths, each at most tokens_per_batch.

    Cost of a batch = its padded tokens + overhead_tokens; the minimum over all divisions of the documents sorted by
    length, found exactly by dynamic programming. Documents without tokens are in no batch.
    """
    length_N = np.asarray(lengths, dtype=np.int64)
    order_N = np.argsort(-length_N, kind="stable")
    order_N = order_N[length_N[order_N] > 0]
    num_documents = len(order_N)
    cost = np.full(num_documents + 1, np.iinfo(np.int64).max // 2, dtype=np.int64)
    cost[0] = 0
    came_from = np.zeros(num_documents + 1, dtype=np.int64)
    for start in range(num_documents):
        longest = int(length_N[order_N[start]])
        most = min(max(1, tokens_per_batch // longest), num_documents - start)
        ends = slice(start + 1, start + most + 1)
        offered = cost[start] + overhead_tokens + longest * np.arange(1, most + 1)
        is_better = offered < cost[ends]
        cost[ends][is_better] = offered[is_better]
        came_from[ends][is_better] = start
    batches: list[np.ndarray] = []
    end = num_documents
    while end:
        batches.append(order_N[came_from[end] : end])
        end = int(came_from[end])
    batches.reverse()
    computed = sum(int(length_N[batch[0]]) * len(batch) for batch in batches)
    return BatchPlan(tuple(batches), int(length_N.sum()) / computed if computed else 1.0)


def _of_rows(rows: ActivationRows, is_kept_B: Tensor) -> ActivationRows:
    return rows._replace(
        x_BMD=rows.x_BMD[is_kept_B],
        token_id_B=rows.token_id_B[is_kept_B],
        doc_id_B=rows.doc_id_B[is_kept_B],
        position_B=rows.position_B[is_kept_B],
        flags_B=rows.flags_B[is_kept_B],
    )


def _take(columns: Sequence[np.ndarray], positions: Sequence[np.ndarray]) -> Tensor:
    taken = [column[kept] for column, kept in zip(columns, positions, strict=True)]
    return torch.from_numpy(_concatenate(taken).astype(np.int32))


def _concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) else np.zeros(0, dtype=np.int64)
