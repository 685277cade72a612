"""At which layer the difference between two models happens: a curve over layers, and the layer to look at.

For each layer l the base model's residual stream takes the place of the chat model's, whose layers above l, final norm
and head go on from it. With p_l what they predict then,

    share_l = KL(p_chat || p_l) / KL(p_chat || p_base)

is how much of the difference in behaviour is present in the stream at layer l: near 0 where base's stream does for the
chat model (nothing has happened yet), near 1 where it brings base's behaviour with it. Beside it stands how different
the streams are after the best scale and shift (stream_difference.py). A dictionary fitted at a layer of small share can
explain its rows perfectly and still miss what fine-tuning did.

Layers count from 0 (output of decoder layer l). Cost for L layers: one forward of each model, one more of chat for the
rounding floor, L upper halves and L + 3 heads; layers where both streams are equal cost nothing. Memory: 2 L [B, T, D].
`layer_recommendation.py` names the layer.

Shapes: B documents, T positions, M models, D width, P judged positions, N rows, G document groups, L layers, S sets.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from pipeline.analyses.distance import MAXIMA, Distance, add_distance, empty_distance, judge
from pipeline.analyses.next_tokens import (
    NextTokenBatch,
    Prediction,
    at_places,
    compare,
    document_groups,
    in_sets,
    next_token_batches,
    position_sets,
    rows_without_sinks,
)
from pipeline.analyses.rows import Sums, merge_sums
from pipeline.analyses.stream_difference import (
    StreamDifference,
    add_stream_rows,
    empty_stream_sums,
    stream_differences,
)
from pipeline.errors import InputError
from pipeline.extraction.activations import RowOptions
from pipeline.models.layerwise import LayerStreams, continued_from, layer_streams, rerounded_hidden
from pipeline.models.pair import ModelPair
from pipeline.numerics.statistics import Interval, jackknife_interval
from pipeline.schema import BASE, CHAT, Column

NUM_GROUPS = 32
SCALE_TOLERANCE = 0.25
"""Ratios of scale between 1 / 1.25 and 1.25 are the fine-tune's own and stay in the splice; others are undone."""

LAYER_COLUMNS = (
    Column("layer", "int64", "decoder layer whose output this is, counted from 0"),
    Column("num_layers_above", "int64", "decoder layers of the chat model above it"),
    Column("tokens", "string", "predicted tokens: all, or those an assistant wrote"),
    Column("share", "float64", "part of the difference in behaviour present at this layer, 0 to about 1"),
    Column("share_low", "float64", "lower end of its 95% interval over documents"),
    Column("share_high", "float64", "upper end of it; NaN, all three, where the models cannot be told apart"),
    Column("kl", "float64", "KL(p_chat || p_l), nats per token, base's stream put in at this layer"),
    Column("kl_low", "float64", "lower end of its 95% interval over documents"),
    Column("kl_high", "float64", "upper end of it"),
    Column("kl_total", "float64", "KL(p_chat || p_base), nats per token"),
    Column("kl_total_low", "float64", "lower end of its 95% interval over documents"),
    Column("kl_total_high", "float64", "upper end of it"),
    Column("kl_floor", "float64", "nats per token that rounding in the models' dtype explains"),
    Column("difference", "float64", "relative difference of the streams after the best scale and shift, 0 to 1"),
    Column("difference_low", "float64", "lower end of its 95% interval over documents"),
    Column("difference_high", "float64", "upper end of it"),
    Column("raw_difference", "float64", "relative difference of the streams as they are"),
    Column("scale_ratio", "float64", "root mean square of centred chat rows over that of centred base rows"),
    Column("splice_scale", "float64", "what base's stream was multiplied by before it was put in"),
    Column("num_tokens", "int64", "predicted tokens judged"),
    Column("num_documents", "int64", "documents that they are in"),
    Column("is_distinguishable", "bool", "whether the models can be told apart at all; the same in every row"),
    Column("reason", "string", "the numbers behind that; the same in every row"),
)
"""One row per layer and set of predicted tokens, layers ascending."""


class LayerCurve:
    """Sums over batches of next_tokens.next_token_batches, for some layers of a pair of num_layers.

    scales: what base's stream is multiplied by before it is put into the chat model, one per layer (`splice_scales`);
    None is 1 everywhere.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        num_layers: int,
        activation_dim: int,
        scales: Sequence[float] | None = None,
        num_groups: int = NUM_GROUPS,
    ) -> None:
        wrong = [layer for layer in layers if not 0 <= layer < num_layers]
        if wrong or not layers:
            raise InputError(
                f"expected layers between 0 and {num_layers - 1} (both models have {num_layers} decoder layers), got "
                f"{wrong[0] if wrong else 'none'}; change the layers"
            )
        self.layers, self.num_layers, self.sets = tuple(sorted(set(layers))), num_layers, position_sets()
        self.scales = tuple(scales) if scales is not None else (1.0,) * len(self.layers)
        if len(self.scales) != len(self.layers):
            raise InputError(f"expected one scale for each of {len(self.layers)} layers, got {len(self.scales)}")
        self.activation_dim, self.num_groups = activation_dim, num_groups

    def start(self) -> Sums:
        """Empty sums."""
        shape = (self.num_groups, len(self.layers), len(self.sets))
        return {
            **empty_distance(self.num_groups, len(self.sets)),
            **empty_stream_sums(len(self.layers), self.num_groups, self.activation_dim),
            "layer_kl_GLS": torch.zeros(shape, dtype=torch.float64),
        }

    @torch.no_grad()
    def update(self, sums: Sums, batch: NextTokenBatch) -> None:
        """Adds a batch of documents to the sums, in place."""
        pair, group_B = batch.pair, document_groups(batch, self.num_groups)
        base, chat = _both_streams(batch, self.layers)
        hidden = {BASE: base.hidden_BTD, CHAT: chat.hidden_BTD}
        reference, plain = (Prediction(model, at_places(hidden[model], batch.place_P)) for model in (CHAT, BASE))
        rerounded_BTD = rerounded_hidden(pair.decoders[CHAT], batch.ids_BT, batch.mask_BT)
        again = Prediction(CHAT, at_places(rerounded_BTD, batch.place_P))
        spliced = {}
        for place, layer in enumerate(self.layers):
            h_BTMD = torch.stack([run.stream_BTD[place].to(pair.device) for run in (base, chat)], dim=2)
            rows = rows_without_sinks(batch, h_BTMD)
            add_stream_rows(sums, place, rows.x_NMD, group_B[rows.document_N])
            if not torch.equal(h_BTMD[:, :, BASE], h_BTMD[:, :, CHAT]):
                put_in_BTD = h_BTMD[:, :, BASE] * self.scales[place]
                hidden_BTD = continued_from(chat, layer, put_in_BTD, batch.mask_BT)
                spliced[place] = Prediction(CHAT, at_places(hidden_BTD, batch.place_P))
        found = compare(pair, reference, [plain, again, *spliced.values()])
        group_P, in_set_PS = group_B[batch.document_P], in_sets(batch)
        add_distance(
            sums,
            base=found[0],
            rounding=found[1],
            in_set_PS=in_set_PS,
            group_P=group_P,
            document_P=batch.document_P,
        )
        for place, comparison in zip(spliced, found[2:], strict=True):
            sums["layer_kl_GLS"][:, place].index_add_(0, group_P, comparison.kl_P[:, None] * in_set_PS)

    def merge(self, a: Sums, b: Sums) -> Sums:
        """The sums of both parts together; the order of parts does not matter."""
        return merge_sums(a, b, maxima=MAXIMA)

    def distance(self, sums: Sums, *, dtype: str) -> Distance:
        """How far apart the two models are on these documents (distance.py)."""
        return judge(sums, self.sets, dtype=dtype)

    def table(self, sums: Sums, *, dtype: str) -> pd.DataFrame:
        """LAYER_COLUMNS; dtype is the models', for the words. InputError where nothing was judged."""
        distance, streams = self.distance(sums, dtype=dtype), stream_differences(sums)
        totals = distance.table.set_index("tokens")
        rows = []
        for s, name in enumerate(self.sets):
            if name in totals.index:
                rows += self._rows_of_set(sums, s, totals.loc[[name]].iloc[0], distance, streams)
        frame = pd.DataFrame(rows, columns=[column.name for column in LAYER_COLUMNS])
        return frame.sort_values(["layer", "tokens"], ignore_index=True)

    def _rows_of_set(
        self, sums: Sums, s: int, total: "pd.Series[Any]", distance: Distance, streams: StreamDifference
    ) -> list[dict[str, Any]]:
        kl_GL = sums["layer_kl_GLS"][:, :, s]
        tokens_GL, total_GL = (sums[name][:, s, None].expand_as(kl_GL) for name in ("tokens_GS", "kl_GS"))
        # Base and chat are measured on the same tokens, so the interval of their share leaves out both sides together.
        share = jackknife_interval(kl_GL, total_GL)
        if not distance.is_distinguishable:
            share = Interval(*(torch.full_like(part, torch.nan) for part in share))
        kl = jackknife_interval(kl_GL, tokens_GL)
        return [
            {
                "layer": layer,
                "num_layers_above": self.num_layers - 1 - layer,
                "tokens": self.sets[s],
                **_interval_columns("share", share, place),
                **_interval_columns("kl", kl, place),
                **{f"kl_total{end}": float(total[f"kl{end}"]) for end in ("", "_low", "_high")},
                "kl_floor": float(total["kl_floor"]),
                **_interval_columns("difference", streams.fitted, place),
                "raw_difference": float(streams.raw.estimate[place]),
                "scale_ratio": float(streams.scale_ratio.estimate[place]),
                "splice_scale": self.scales[place],
                "num_tokens": int(total["num_tokens"]),
                "num_documents": int(total["num_documents"]),
                "is_distinguishable": distance.is_distinguishable,
                "reason": distance.reason,
            }
            for place, layer in enumerate(self.layers)
        ]


def choose_layers(num_layers: int, max_layers: int | None = None) -> tuple[int, ...]:
    """At most max_layers layers of num_layers, evenly spaced with the last among them; None takes all."""
    if max_layers is None or max_layers >= num_layers:
        return tuple(range(num_layers))
    if max_layers < 1:
        raise InputError(f"expected at least 1 layer to measure, got {max_layers}")
    return tuple(sorted({num_layers - 1 - round(i * num_layers / max_layers) for i in range(max_layers)}))


def splice_scales(
    pair: ModelPair, documents: Mapping[str, Sequence[Any]], layers: Sequence[int], options: RowOptions
) -> tuple[float, ...]:
    """What base's stream is to be multiplied by at each layer to be in the chat model's units, from a few documents.

    The ratio of the root mean squares of centred rows, attention sinks left out; 1 where it is within SCALE_TOLERANCE,
    so that a change of norm that fine-tuning made stays a difference. Every worker must use the same documents.
    """
    sums = empty_stream_sums(len(layers), NUM_GROUPS, pair.activation_dim)
    for batch in next_token_batches(pair, documents, options):
        group_B = document_groups(batch, NUM_GROUPS)
        base, chat = _both_streams(batch, layers)
        for place in range(len(layers)):
            h_BTMD = torch.stack([run.stream_BTD[place].to(pair.device) for run in (base, chat)], dim=2)
            rows = rows_without_sinks(batch, h_BTMD)
            add_stream_rows(sums, place, rows.x_NMD, group_B[rows.document_N])
    ratios = stream_differences(sums).scale_ratio.estimate.tolist()
    limit = 1 + SCALE_TOLERANCE
    return tuple(ratio if ratio == ratio and not 1 / limit <= ratio <= limit else 1.0 for ratio in ratios)


def _both_streams(batch: NextTokenBatch, layers: Sequence[int]) -> tuple[LayerStreams, LayerStreams]:
    """One forward of each model; one of both where they are the same."""
    base, chat = batch.pair.decoders
    chat_run = layer_streams(chat, batch.ids_BT, batch.mask_BT, layers)
    base_run = chat_run if base is chat else layer_streams(base, batch.ids_BT, batch.mask_BT, layers)
    return base_run, chat_run


def _interval_columns(name: str, interval: Interval, place: int) -> dict[str, float]:
    ends = zip(("", "_low", "_high"), interval, strict=True)
    return {f"{name}{end}": float(part[place]) for end, part in ends}
