"""KL of interventions, measured on held-out dialogues with both models in the worker.

One pass serves all crosscoders whose causality is missing: the lower halves of both models run once per batch, and each
crosscoder's interventions continue from there.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import cluster
from pipeline.analyses.causality import Causality, causality_batches
from pipeline.analyses.interventions import Intervention, plan_interventions
from pipeline.analyses.rows import sums_from_bytes, sums_to_bytes
from pipeline.errors import InputError
from pipeline.operators.activations import RowOptions
from pipeline.progress import Progress
from pipeline.schema import CAUSALITY_COLUMNS, Split
from pipeline.sections.analyses import CausalitySection
from pipeline.sections.data import ActivationsSection
from pipeline.stages.activations import read_token_rows
from pipeline.stages.base import Context, Pool, Step, run_pool, shown
from pipeline.stages.crosscoder import fitted
from pipeline.stages.measurements import LATENTS_NAME
from pipeline.stages.models import Loading, load_pair
from pipeline.stages.tables import arrow_schema, numbers_of, read_table, write_frame
from pipeline.stages.tokens import INDEX_NAME
from pipeline.storage import Storage

NAME = "causality"
VERSION = 1

TABLE_NAME = "causality.parquet"
CAUSALITY_SCHEMA = arrow_schema(CAUSALITY_COLUMNS)

_CALLS_PER_WORKER = 4
"""Worker calls per worker: more show progress more often and even out conversations of unequal length."""


def run(steps: Sequence[Step], context: Context) -> None:
    """Publish one table per crosscoder."""
    started = time.monotonic()
    # Crosscoders that ask for the same dialogues are measured together; with one analyses section that is all of them.
    section, tokens = steps[0].section, steps[0].inputs["tokens"]
    assert isinstance(section, CausalitySection)
    plans = {step.inputs["crosscoder"].key.folder: _interventions(step, context) for step in steps}
    index = _dialogues(steps[0], section, context)
    workers = cluster.pool_size(context.resources.analyses, index.num_rows)
    parts = np.array_split(np.arange(index.num_rows), min(index.num_rows, workers * _CALLS_PER_WORKER))
    progress = Progress(NAME, index.num_rows, "dialogues")
    shown(context, progress, 0)
    arguments = (context.storage, tokens.key.folder, steps[0].extra["loading"], _row_options(steps[0], section), plans)
    pool = Pool("analyses", context.resources.analyses, MeasureDialogues, (*arguments, steps[0].extra["layer"]))
    measures = {folder: _measure(folder, plans, context.storage) for folder in plans}
    sums = {folder: measure.start() for folder, measure in measures.items()}
    done = 0
    for result in run_pool(pool, [{"index": index.take(part)} for part in parts]):
        done += result["num_dialogues"]
        shown(context, progress, done)
        for folder, data in result["sums"].items():
            sums[folder] = measures[folder].merge(sums[folder], sums_from_bytes(data))
    for step in steps:
        folder = step.inputs["crosscoder"].key.folder
        table = measures[folder].table(sums[folder], num_resamples=section.num_resamples, seed=section.seed)
        write_frame(context.storage, f"{step.key.folder}/{TABLE_NAME}", table, CAUSALITY_SCHEMA)
        kl = numbers_of(table, "kl", by=("intervention", "positions"))
        counts = {"kl": kl, "num_conversations": int(table["num_conversations"].max())}
        context.finish(step, counts, time.monotonic() - started)


def _interventions(step: Step, context: Context) -> tuple[Intervention, ...]:
    section = step.section
    assert isinstance(section, CausalitySection)
    latents = read_table(context.storage, f"{step.inputs['latents'].key.folder}/{LATENTS_NAME}").to_pandas()
    return plan_interventions(
        latents,
        num_latents=section.max_latents,
        num_random_halves=section.num_random_halves,
        seed=section.seed,
    )


def _dialogues(step: Step, section: CausalitySection, context: Context) -> pa.Table:
    """The validation dialogues that are measured, in order of their hash, longest first within the chosen ones."""
    tokens = step.inputs["tokens"]
    index = read_table(context.storage, f"{tokens.key.folder}/{INDEX_NAME}")
    wanted = context.record_of(tokens).counts["dialogue_corpora"]
    frame = index.to_pandas()
    chosen = frame[(frame["split"] == Split.VALIDATION) & frame["corpus"].isin(wanted)]
    chosen = chosen.sort_values("doc_id").head(section.num_conversations)
    if chosen.empty:
        raise InputError(
            "analyses.causality: expected validation dialogues, got none; add a corpus with messages_column or set "
            "analyses.causality to null"
        )
    return index.take(chosen.index.to_numpy())


def _row_options(step: Step, section: CausalitySection) -> RowOptions:
    """The same rows have codes as in training."""
    rows = step.inputs["activations"].section
    assert isinstance(rows, ActivationsSection)
    return RowOptions(section.tokens_per_batch, rows.drop_first_tokens, rows.drop_bos, rows.norm_cap)


def _measure(folder: str, plans: Mapping[str, Sequence[Intervention]], storage: Storage) -> Causality:
    with fitted(storage, folder) as crosscoder:
        return Causality(crosscoder, plans[folder])


class MeasureDialogues:
    """Worker: both models whole, and every crosscoder."""

    def __init__(
        self,
        storage: Storage,
        tokens_folder: str,
        loading: Loading,
        options: RowOptions,
        plans: Mapping[str, Sequence[Intervention]],
        layer: int,
    ) -> None:
        self.storage, self.tokens_folder, self.options = storage, tokens_folder, options
        self.pair = load_pair(storage, loading, layer=layer)
        self.measures = {folder: _measure(folder, plans, storage) for folder in plans}

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Sums per crosscoder over some dialogues."""
        documents = read_token_rows(self.storage, self.tokens_folder, item["index"])
        sums = {folder: measure.start() for folder, measure in self.measures.items()}
        for batch in causality_batches(self.pair, documents, self.options):
            for folder, measure in self.measures.items():
                measure.update(sums[folder], batch)
        packed = {folder: sums_to_bytes(own) for folder, own in sums.items()}
        return {"num_dialogues": item["index"].num_rows, "sums": packed}
