"""The texts of contexts: each worker cuts those that lie in its shards, the driver puts them in order.

The pass of the measurements has found where every latent's contexts are (analyses/examples.py). Their documents are
read and encoded once more here, spread over workers, and nothing but finished windows comes back, as Arrow: memory
follows the number of contexts asked for, never the rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from pipeline.analyses.examples import contexts
from pipeline.errors import ArtifactError
from pipeline.models.loading import load_tokenizer
from pipeline.schema import EXAMPLE_COLUMNS
from pipeline.stages.base import Context, Pool, run_pool, shown
from pipeline.stages.crosscoder import fitted
from pipeline.stages.encoded_rows import batches, shard_rows, validation_calls
from pipeline.stages.models import ModelLocation, local_specs
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema
from pipeline.terminal import Progress
from pipeline.text.tokenise import token_texts

EXAMPLE_SCHEMA = arrow_schema(EXAMPLE_COLUMNS)

_PLACE = "place"
"""Where a context stands among those asked for; travels with it and is dropped in the end."""


def cut_contexts(
    strongest: pd.DataFrame,
    store: ActivationStore,
    context: Context,
    *,
    crosscoder: str,
    model: ModelLocation,
    window_tokens: int,
) -> pa.Table:
    """schema.EXAMPLE_COLUMNS of the contexts in `strongest` (analyses.examples.STRONGEST_COLUMNS), in its order.

    crosscoder: folder of its artifact; model: the one whose tokenizer gives the texts. An empty `strongest` gives an
    empty table and reads nothing.
    """
    if strongest.empty:
        return EXAMPLE_SCHEMA.empty_table()
    strongest = strongest.reset_index(drop=True)
    progress = Progress("cut examples", len(strongest), "contexts")
    shown(context, progress, 0)
    arguments = (context.storage, store.folder, crosscoder, model, window_tokens, strongest)
    tables: list[pa.Table] = []
    done = 0
    pool = Pool("analyses", context.resources.analyses, CutContexts, arguments)
    for result in run_pool(pool, validation_calls(store)):
        tables.append(pa.ipc.open_stream(result["table"]).read_all())
        done += len(tables[-1])
        shown(context, progress, done)
    if done != len(strongest):
        raise ArtifactError(
            f"{context.storage.url(store.folder)}: expected the documents of {len(strongest)} contexts, found those of "
            f"{done}; the activations changed while they were read, so run again"
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
        with fitted(storage, crosscoder) as found:
            self.crosscoder = found

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The contexts as the bytes of an Arrow stream, with their places."""
        tables = [self._cut(shard_rows(self.store, shard)) for shard in item["shards"]]
        joined = pa.concat_tables(tables)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, joined.schema) as stream:
            stream.write_table(joined)
        return {"table": sink.getvalue().to_pybytes()}

    def _cut(self, rows: Mapping[str, torch.Tensor]) -> pa.Table:
        keep_B = torch.isin(rows["doc_id"], self.wanted)
        rows = {name: value[keep_B] for name, value in rows.items()}
        here = self.strongest[self.strongest["doc_id"].isin(np.unique(rows["doc_id"].numpy()))]
        table = contexts(
            here,
            batches(self.crosscoder, rows),
            window_tokens=self.window_tokens,
            token_texts=self._texts,
        )
        arrays = [pa.array(table[field.name].tolist(), field.type) for field in EXAMPLE_SCHEMA]
        return pa.Table.from_arrays([*arrays, pa.array(here.index.to_numpy())], names=[*EXAMPLE_SCHEMA.names, _PLACE])

    def _texts(self, ids: Sequence[int]) -> list[str]:
        return token_texts(self.tokenizer, ids)
