"""How different two models are, measured before any dictionary is fitted.

Both models read the same held-out documents and dialogues. Of their next tokens: KL(p_chat || p_base) in nats per token
and how often the most likely token differs, for all tokens, those an assistant wrote, and each corpus (distance.py says
whether the models can be told apart at all). Of their residual streams at the pair's layer: how different
they are as they are and after the best scale and shift, the cosine of centred rows, the ratio of scales and the
effective rank of the difference (stream_difference.py). Attention sinks, whose norms would drown every other row, are
left out and counted.

start, update, merge, table as the other analyses; sums are per group of documents, so every interval is over documents.
Each batch costs one forward of base, two of chat, and three of the head.

The trade-off: an orthogonal map between the streams is not fitted. It has D (D - 1) / 2 free numbers, more than a few
hundred documents can settle, so a rotated model shows as different in its stream and as equal in its next tokens.

Shapes: B documents, T positions, M models, D width, P judged positions, N rows, G document groups, S sets of positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.distance import MAXIMA, Distance, add_distance, empty_distance, judge
from pipeline.analyses.next_tokens import (
    NextTokenBatch,
    Prediction,
    at_places,
    compare,
    document_groups,
    in_sets,
    position_sets,
    rows_without_sinks,
)
from pipeline.analyses.rows import Sums, merge_sums
from pipeline.analyses.stream_difference import (
    add_stream_rows,
    add_to_sample,
    empty_row_sample,
    empty_stream_sums,
    merge_samples,
    row_keys,
    sampled_difference,
    stream_differences,
)
from pipeline.models.layerwise import rerounded_hidden
from pipeline.numerics.statistics import Interval
from pipeline.schema import BASE, CHAT, Column

NUM_GROUPS = 64
NUM_SAMPLED_ROWS = 1024
"""Rows behind the cosine and the effective rank: 38 MB for a width of 4,608."""

STREAM_COLUMNS = (
    Column("measure", "string", "raw_difference, difference, cosine, scale_ratio or effective_rank"),
    Column("value", "float64", "the estimate"),
    Column("low", "float64", "lower end of its 95% interval over documents"),
    Column("high", "float64", "upper end of it"),
    Column("num_rows", "int64", "rows that it is taken from"),
    Column("num_sinks", "int64", "rows left out as attention sinks"),
)
"""One row per measure of the streams at the layer; `difference` is what the best scale and shift leaves."""


class EvidenceTables(NamedTuple):
    """What the evidence publishes."""

    distance: Distance
    """The next tokens' table and whether the models can be told apart."""
    streams: pd.DataFrame
    """STREAM_COLUMNS."""


class Evidence:
    """Sums over batches of next_tokens.next_token_batches; corpora names the corpora that are told apart."""

    def __init__(
        self,
        *,
        corpora: Sequence[str],
        activation_dim: int,
        num_groups: int = NUM_GROUPS,
        num_sampled_rows: int = NUM_SAMPLED_ROWS,
    ) -> None:
        self.corpora, self.sets = tuple(corpora), position_sets(corpora)
        self.activation_dim, self.num_groups, self.num_sampled_rows = activation_dim, num_groups, num_sampled_rows

    def start(self) -> Sums:
        """Empty sums."""
        return {
            **empty_distance(self.num_groups, len(self.sets)),
            **empty_stream_sums(1, self.num_groups, self.activation_dim),
            **empty_row_sample(self.activation_dim),
            "num_sinks": torch.zeros(1, dtype=torch.int64),
        }

    @torch.no_grad()
    def update(self, sums: Sums, batch: NextTokenBatch) -> None:
        """Adds a batch of documents to the sums, in place."""
        pair, group_B = batch.pair, document_groups(batch, self.num_groups)
        h_BTMD = pair.activations(batch.ids_BT, batch.mask_BT)
        chat, base = (
            Prediction(model, at_places(pair.upper(model, h_BTMD[:, :, model], batch.mask_BT), batch.place_P))
            for model in (CHAT, BASE)
        )
        rerounded_BTD = rerounded_hidden(pair.decoders[CHAT], batch.ids_BT, batch.mask_BT)
        again = Prediction(CHAT, at_places(rerounded_BTD, batch.place_P))
        base_comparison, rounding = compare(pair, chat, [base, again])
        add_distance(
            sums,
            base=base_comparison,
            rounding=rounding,
            in_set_PS=in_sets(batch, self.corpora),
            group_P=group_B[batch.document_P],
            document_P=batch.document_P,
        )
        self._add_rows(sums, batch, h_BTMD, group_B)

    def _add_rows(self, sums: Sums, batch: NextTokenBatch, h_BTMD: Tensor, group_B: Tensor) -> None:
        rows = rows_without_sinks(batch, h_BTMD)
        sums["num_sinks"] += rows.num_sinks
        group_N, key_N = group_B[rows.document_N], row_keys(batch.doc_id_B[rows.document_N], rows.position_N)
        add_stream_rows(sums, 0, rows.x_NMD, group_N)
        sums.update(add_to_sample(sums, key_N, group_N, rows.x_NMD, num_rows=self.num_sampled_rows))

    def merge(self, a: Sums, b: Sums) -> Sums:
        """The sums of both parts together; the order of parts does not matter."""
        samples = [{name: part[name] for name in part if name.startswith("sample_")} for part in (a, b)]
        rest = [{name: part[name] for name in part if name not in samples[0]} for part in (a, b)]
        return merge_sums(*rest, maxima=MAXIMA) | merge_samples(*samples, num_rows=self.num_sampled_rows)

    def tables(self, sums: Sums, *, dtype: str) -> EvidenceTables:
        """The answer; dtype is the models', for the words. InputError where nothing was judged."""
        distance = judge(sums, self.sets, dtype=dtype)
        streams, sampled = stream_differences(sums), sampled_difference(sums)
        num_rows, num_sampled = int(streams.num_rows[0]), len(sums["sample_key_N"])

        def at_layer(every: Interval) -> Interval:
            return Interval(*(part[0] for part in every))

        measures = [
            ("raw_difference", at_layer(streams.raw), num_rows),
            ("difference", at_layer(streams.fitted), num_rows),
            ("scale_ratio", at_layer(streams.scale_ratio), num_rows),
            ("cosine", sampled.cosine, num_sampled),
            ("effective_rank", sampled.effective_rank, num_sampled),
        ]
        num_sinks = int(sums["num_sinks"])
        rows = [(name, *map(float, interval), number, num_sinks) for name, interval, number in measures]
        return EvidenceTables(distance, pd.DataFrame(rows, columns=[column.name for column in STREAM_COLUMNS]))
