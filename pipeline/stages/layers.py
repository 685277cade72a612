"""The curve over layers: at which layer the difference between the two models happens, and the layer to look at.

Needs tokens alone, so it runs before a layer is chosen: for `crossray layers` and for `activations.layer: auto`.
analyses/layer_curve.py sums, analyses/layer_recommendation.py names the layer.

A worker call is a fixed slice of the chosen documents, and the calls' sums are merged along a tree over their numbers
(merging.py): the numbers are the same to the last bit with any number of workers.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa

from pipeline.analyses.layer_curve import LAYER_COLUMNS, LayerCurve, choose_layers, splice_scales
from pipeline.analyses.layer_recommendation import LayerChoice, recommend, text_table
from pipeline.analyses.next_tokens import ALL, ASSISTANT, next_token_batches
from pipeline.analyses.rows import Sums, sums_from_bytes, sums_to_bytes
from pipeline.cluster.pools import Pool, run_pool
from pipeline.extraction.activations import RowOptions
from pipeline.models.loading import PairShape, check_pair
from pipeline.schema import CHAT
from pipeline.stages.catalogue import LayersInputs
from pipeline.stages.evidence import choose_documents
from pipeline.stages.extractor import read_token_rows, row_options
from pipeline.stages.locations import Loading
from pipeline.stages.merging import MergeTree
from pipeline.stages.models import load_pair, local_specs
from pipeline.stages.step import StageContext, Step
from pipeline.stages.tokens import INDEX_NAME
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, read_table, write_frame
from pipeline.terminal import Progress

TABLE_NAME = "layers.parquet"
LAYERS_SCHEMA = arrow_schema(LAYER_COLUMNS)

_DOCUMENTS_PER_CALL = 50
"""Few calls, since the sums of each hold 64 x layers x width numbers. The same on any cluster."""
_NUM_SCALE_DOCUMENTS = 8
"""Documents behind the scales of the splice, the same in every worker."""


class LayerSettings(NamedTuple):
    """What every worker measures, and how."""

    layers: tuple[int, ...]
    shape: PairShape
    options: RowOptions
    max_positions: int


class _Documents(NamedTuple):
    """One worker call."""

    number: int
    index: pa.Table


class _CallSums(NamedTuple):
    """What one call has summed."""

    number: int
    num_documents: int
    packed: bytes
    scales: tuple[float, ...]


def run(steps: Sequence[Step[LayersInputs]], context: StageContext) -> None:
    """Publish the curve and the choice."""
    (step,) = steps
    started = time.monotonic()
    inputs, section, storage = step.inputs, step.inputs.section, context.storage
    with local_specs(storage, *inputs.loading.models) as (base, chat):
        shape = check_pair(base, chat, layer=0)
    layers = choose_layers(min(shape.num_layers), section.max_layers)
    options = row_options(inputs.rows, section.tokens_per_batch)
    settings = LayerSettings(layers, shape, options, section.max_positions)
    index = choose_documents(
        read_table(storage, f"{inputs.tokens.folder}/{INDEX_NAME}"),
        context.record_of(inputs.tokens).counts["dialogue_corpora"],
        set(),
        section.num_documents,
    )
    calls = [
        _Documents(number, index.slice(start, _DOCUMENTS_PER_CALL))
        for number, start in enumerate(range(0, index.num_rows, _DOCUMENTS_PER_CALL))
    ]
    first = index.slice(0, _NUM_SCALE_DOCUMENTS)
    arguments = (storage, inputs.tokens.folder, inputs.loading, settings, first)
    curve = _curve(settings, None)
    tree: MergeTree[Sums] = MergeTree(len(calls), curve.merge)
    progress = Progress(LayersInputs.NAME, index.num_rows, "documents")
    measured = run_pool(Pool("analyses", context.resources.analyses, MeasureLayers, arguments), calls)
    for result in context.follow(progress, measured, lambda result: result.num_documents):
        tree.add(result.number, sums_from_bytes(result.packed))
        curve = _curve(settings, result.scales)
    table = curve.table(tree.total(), dtype=inputs.loading.dtype)
    write_frame(storage, f"{step.folder}/{TABLE_NAME}", table, LAYERS_SCHEMA)
    context.finish(step, _counts(table, recommend(table, min_share=section.min_share)), time.monotonic() - started)


def choice_of(step: Step[LayersInputs], context: StageContext) -> LayerChoice:
    """The layer that a finished step names."""
    counts = context.record_of(step).counts
    return LayerChoice(counts["layer"], counts["reason"])


def curve_text(step: Step[LayersInputs], storage: Storage) -> str:
    """The finished curve as lines of text."""
    return text_table(read_table(storage, f"{step.folder}/{TABLE_NAME}").to_pandas())


def _counts(table: pd.DataFrame, choice: LayerChoice) -> dict[str, Any]:
    curve = table[table["tokens"] == (ASSISTANT if (table["tokens"] == ASSISTANT).any() else ALL)]
    shares = {
        str(layer): [float(number) for number in numbers]
        for layer, *numbers in curve[["layer", "share", "share_low", "share_high"]].itertuples(index=False)
        if all(number == number for number in numbers)
    }
    return {"layer": choice.layer, "reason": choice.reason, "share": shares}


def _curve(settings: LayerSettings, scales: Sequence[float] | None) -> LayerCurve:
    return LayerCurve(
        settings.layers,
        num_layers=settings.shape.num_layers[CHAT],
        activation_dim=settings.shape.activation_dim,
        scales=scales,
    )


class MeasureLayers:
    """Worker: both models whole. An item is a slice of the chosen documents."""

    def __init__(
        self, storage: Storage, tokens_folder: str, loading: Loading, settings: LayerSettings, first: pa.Table
    ) -> None:
        self.storage, self.tokens_folder, self.settings = storage, tokens_folder, settings
        self.pair = load_pair(storage, loading)
        documents = read_token_rows(storage, tokens_folder, first)
        self.scales = splice_scales(self.pair, documents, settings.layers, settings.options)
        self.curve = _curve(settings, self.scales)

    def __call__(self, call: _Documents) -> _CallSums:
        """Sums over some documents."""
        documents, settings = read_token_rows(self.storage, self.tokens_folder, call.index), self.settings
        sums = self.curve.start()
        for batch in next_token_batches(self.pair, documents, settings.options, max_positions=settings.max_positions):
            self.curve.update(sums, batch)
        return _CallSums(call.number, call.index.num_rows, sums_to_bytes(sums), self.scales)
