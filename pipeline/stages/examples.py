"""What chosen latents of each crosscoder look like: contexts as texts, activation histograms, nearest decoder rows.

Contexts are those in which a latent fires most, and some sampled at random.

The first pass over the rows finds where every latent's contexts are (analyses/examples.py). Once the verdicts are
known, the documents of the chosen latents are read and encoded once more, spread over workers. Only finished windows
come back, as Arrow: the driver's memory depends on the number of contexts, never on the rows.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from pipeline.analyses.activation_histogram import ActivationHistogram
from pipeline.analyses.example_columns import HISTOGRAM_COLUMNS, NEIGHBOUR_COLUMNS
from pipeline.analyses.examples import Examples, contexts
from pipeline.analyses.latent_sets import listed_latents
from pipeline.analyses.neighbours import neighbour_table
from pipeline.analyses.rows import RowAnalysis, Sums, encoded_batches
from pipeline.cluster.pools import Pool, run_pool
from pipeline.config.analyses import ExamplesSection
from pipeline.errors import ArtifactError, InputError
from pipeline.models.loading import load_tokenizer
from pipeline.schema import EXAMPLE_COLUMNS
from pipeline.stages.catalogue import ExamplesInputs
from pipeline.stages.finished_crosscoder import open_crosscoder
from pipeline.stages.latents import read_latents
from pipeline.stages.locations import ModelLocation
from pipeline.stages.models import local_specs
from pipeline.stages.row_pass import Measured, ShardsCall, shard_calls, shard_rows
from pipeline.stages.step import StageContext, Step
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, write_frame, write_table
from pipeline.terminal import Progress
from pipeline.text.tokenizers import token_texts

EXAMPLES_NAME = "examples.parquet"
HISTOGRAMS_NAME = "histograms.parquet"
NEIGHBOURS_NAME = "neighbours.parquet"
EXAMPLE_SCHEMA = arrow_schema(EXAMPLE_COLUMNS)

_PLACE = "place"
"""Column of a context's place among those asked for; sent along with it and dropped in the end."""


class ExamplesWork:
    """One step: what it takes from the first pass over the rows, and its table."""

    def __init__(self, step: Step[ExamplesInputs], measured: Measured) -> None:
        section, num_latents = step.inputs.section, measured.crosscoder.num_latents
        check_example_latents(section, num_latents)
        self.step, self.context, self._store = step, measured.context, measured.store
        self._examples = Examples(
            num_latents=num_latents,
            num_contexts=section.num_contexts,
            num_sampled=section.num_sampled,
            corpora=self._store.manifest.corpora,
        )
        self._histogram = ActivationHistogram(num_latents=num_latents, corpora=self._store.manifest.corpora)

    def first_pass(self) -> Mapping[str, RowAnalysis]:
        """Where the contexts of every latent are, and how strongly it fires."""
        return {"examples": self._examples, "histogram": self._histogram}

    def publish(self, sums: Mapping[str, Sums]) -> None:
        """Contexts of every latent, or of the chat-only ones, chat-specific first, and those named."""
        started = time.monotonic()
        section, storage = self.step.inputs.section, self.context.storage
        latents = read_latents(storage, self.step.inputs.latents)
        chosen = self._listed(latents, section.latents)
        strongest = self._examples.table_of(sums["examples"], chosen)
        table = cut_contexts(self.step.inputs, strongest, self._store, self.context)
        write_table(storage, f"{self.step.folder}/{EXAMPLES_NAME}", table, EXAMPLE_SCHEMA)
        histograms = self._histogram.table_of(sums["histogram"], chosen)
        write_frame(storage, f"{self.step.folder}/{HISTOGRAMS_NAME}", histograms, arrow_schema(HISTOGRAM_COLUMNS))
        with open_crosscoder(storage, self.step.inputs.crosscoder.folder) as crosscoder:
            # Of a whole dictionary only the first max_latents by verdict: the work is quadratic.
            near = neighbour_table(
                crosscoder, self._listed(latents, () if section.latents == "all" else section.latents)
            )
        write_frame(storage, f"{self.step.folder}/{NEIGHBOURS_NAME}", near, arrow_schema(NEIGHBOUR_COLUMNS))
        num_latents = int(strongest["latent"].nunique())
        counts = {
            "num_contexts": len(table),
            "num_latents": num_latents,
            "num_silent_latents": len(chosen) - num_latents,  # chosen, but without a context since they never fire
        }
        self.context.finish(self.step, counts, time.monotonic() - started)

    def _listed(self, latents: pd.DataFrame, named: Literal["all"] | Sequence[int]) -> Sequence[int]:
        max_latents = self.step.inputs.section.max_latents
        return listed_latents(latents, named=named, max_latents=max_latents, where="analyses.examples.latents")


def check_example_latents(section: ExamplesSection, num_latents: int) -> None:
    """InputError before any row is read."""
    named = section.latents if isinstance(section.latents, tuple) else ()
    wrong = [latent for latent in named if latent >= num_latents]
    if wrong:
        raise InputError(
            f"analyses.examples.latents: expected latents between 0 and {num_latents - 1}, got {wrong[0]}; name only "
            "latents that every crosscoder of the run has"
        )


def cut_contexts(
    inputs: ExamplesInputs, strongest: pd.DataFrame, store: ActivationStore, context: StageContext
) -> pa.Table:
    """schema.EXAMPLE_COLUMNS of the contexts in `strongest` (analyses.examples.STRONGEST_COLUMNS), in its order.

    An empty `strongest` gives an empty table and reads nothing.
    """
    if strongest.empty:
        return EXAMPLE_SCHEMA.empty_table()
    strongest = strongest.reset_index(drop=True)
    window_tokens, chat = inputs.section.window_tokens, inputs.tokens.inputs.models.chat
    arguments = (context.storage, store.folder, inputs.crosscoder.folder, chat, window_tokens, strongest)
    cut = run_pool(Pool("analyses", context.resources.analyses, CutContexts, arguments), shard_calls(store))
    progress = Progress("cut examples", len(strongest), "contexts")
    tables = list(context.follow(progress, (pa.ipc.open_stream(data).read_all() for data in cut), len))
    if progress.done != len(strongest):
        raise ArtifactError(
            f"{context.storage.url(store.folder)}: expected the documents of {len(strongest)} contexts, found those of "
            f"{progress.done}; the activations changed while they were read, so run again"
        )
    joined = pa.concat_tables(tables)
    order = np.argsort(joined[_PLACE].to_numpy(), kind="stable")
    return joined.drop_columns([_PLACE]).take(pa.array(order))


class CutContexts:
    """Worker: finished contexts of some shards."""

    def __init__(
        self,
        storage: Storage,
        activations_folder: str,
        crosscoder: str,
        model: ModelLocation,
        window_tokens: int,
        strongest: pd.DataFrame,
    ) -> None:
        self.store = ActivationStore(storage, activations_folder)
        self.window_tokens, self.strongest = window_tokens, strongest
        self.wanted = torch.from_numpy(strongest["doc_id"].unique().astype(np.int64))
        with local_specs(storage, model) as (spec,):
            self.tokenizer = load_tokenizer(spec)
        with open_crosscoder(storage, crosscoder) as found:
            self.crosscoder = found

    def __call__(self, call: ShardsCall) -> bytes:
        """The contexts as an Arrow stream, with their places."""
        tables = [self._cut(shard_rows(self.store, shard)) for shard in call.shards]
        joined = pa.concat_tables(tables)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, joined.schema) as stream:
            stream.write_table(joined)
        data: bytes = sink.getvalue().to_pybytes()
        return data

    def _cut(self, rows: Mapping[str, torch.Tensor]) -> pa.Table:
        keep_B = torch.isin(rows["doc_id"], self.wanted)
        rows = {name: value[keep_B] for name, value in rows.items()}
        here = self.strongest[self.strongest["doc_id"].isin(np.unique(rows["doc_id"].numpy()))]
        table = contexts(
            here,
            encoded_batches(self.crosscoder, rows),
            window_tokens=self.window_tokens,
            token_texts=self._texts,
        )
        arrays = [pa.array(table[field.name].tolist(), field.type) for field in EXAMPLE_SCHEMA]
        return pa.Table.from_arrays([*arrays, pa.array(here.index.to_numpy())], names=[*EXAMPLE_SCHEMA.names, _PLACE])

    def _texts(self, ids: Sequence[int]) -> list[str]:
        return token_texts(self.tokenizer, ids)
