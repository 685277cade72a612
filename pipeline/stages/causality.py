"""KL of interventions, measured on held-out dialogues with both models in the worker.

One pass serves all crosscoders whose causality is missing: the lower halves of both models run once per batch, and each
crosscoder's interventions continue from there. The mean difference is taken before, over rows of the validation
dialogues: D numbers from very many more rows, so that it flatters this baseline by next to nothing.
"""

import time
from collections.abc import Mapping, Sequence, Set
from typing import Any

import pyarrow as pa
import torch

from pipeline.analyses.causal_tables import Bootstrap
from pipeline.analyses.causality import Causality, causality_batches
from pipeline.analyses.interventions import Intervention, plan_curve, plan_interventions
from pipeline.analyses.latent_sets import causality_latents
from pipeline.analyses.rows import sums_from_bytes, sums_to_bytes
from pipeline.cluster import connect as cluster
from pipeline.config.analyses import CausalitySection
from pipeline.config.data import ActivationsSection
from pipeline.errors import InputError
from pipeline.extraction.activations import RowOptions
from pipeline.schema import (
    BASE,
    CAUSALITY_COLUMNS,
    CAUSALITY_CURVE_COLUMNS,
    CAUSALITY_DIFFERENCE_COLUMNS,
    CHAT,
    Split,
)
from pipeline.stages.base import Context, Pool, Step, run_pool, run_task, shown
from pipeline.stages.crosscoder import fitted
from pipeline.stages.extractor import read_rejected, read_token_rows, row_options
from pipeline.stages.measurements import LATENTS_NAME
from pipeline.stages.models import Loading, load_pair
from pipeline.stages.tokens import INDEX_NAME
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, numbers_of, read_table, write_frame
from pipeline.terminal import Progress

NAME = "causality"
VERSION = 2

TABLE_NAME = "causality.parquet"
DIFFERENCES_NAME = "differences.parquet"
CURVE_NAME = "curve.parquet"
CAUSALITY_SCHEMA = arrow_schema(CAUSALITY_COLUMNS)
DIFFERENCES_SCHEMA = arrow_schema(CAUSALITY_DIFFERENCE_COLUMNS)
CURVE_SCHEMA = arrow_schema(CAUSALITY_CURVE_COLUMNS)

_MEAN_DIFFERENCE_ROWS = 200_000
"""Rows behind the mean difference: whole shards are read until there are as many."""

_DIALOGUES_PER_CALL = 16
"""Dialogues of one worker call, about a batch of tokens. The same on any cluster: what else is in a batch shows in the
last digits of a dialogue's KL."""


def run(steps: Sequence[Step], context: Context) -> None:
    """Publish one table per crosscoder."""
    started = time.monotonic()
    # Crosscoders that ask for the same dialogues are measured together; with one analyses section that is all of them.
    section, tokens = steps[0].section, steps[0].inputs["tokens"]
    assert isinstance(section, CausalitySection)
    plans = {step.inputs["crosscoder"].key.folder: _interventions(step, context) for step in steps}
    index = _dialogues(steps[0], section, context)
    calls = [
        {"index": index.slice(start, _DIALOGUES_PER_CALL)} for start in range(0, index.num_rows, _DIALOGUES_PER_CALL)
    ]
    progress = Progress(NAME, index.num_rows, "dialogues")
    shown(context, progress, 0)
    activations = steps[0].inputs["activations"].key.folder
    cpus = cluster.worker_cpus(context.resources.analyses.cpus)
    mean_difference_D = run_task(mean_difference, context.storage, activations, num_cpus=cpus)
    rows = steps[0].inputs["activations"].section
    assert isinstance(rows, ActivationsSection)
    models = (steps[0].extra["loading"], steps[0].extra["layer"], row_options(rows, section.tokens_per_batch))
    arguments = (context.storage, tokens.key.folder, models, plans, mean_difference_D)
    pool = Pool("analyses", context.resources.analyses, MeasureDialogues, arguments)
    measures = {folder: _measure(folder, plans, context.storage) for folder in plans}
    sums = {folder: measure.start() for folder, measure in measures.items()}
    done = 0
    for result in run_pool(pool, calls):
        done += result["num_dialogues"]
        shown(context, progress, done)
        for folder, data in result["sums"].items():
            sums[folder] = measures[folder].merge(sums[folder], sums_from_bytes(data))
    for step in steps:
        folder = step.inputs["crosscoder"].key.folder
        tables = measures[folder].tables(sums[folder], Bootstrap(section.num_resamples, section.seed))
        write_frame(context.storage, f"{step.key.folder}/{TABLE_NAME}", tables.kl, CAUSALITY_SCHEMA)
        write_frame(context.storage, f"{step.key.folder}/{DIFFERENCES_NAME}", tables.differences, DIFFERENCES_SCHEMA)
        write_frame(context.storage, f"{step.key.folder}/{CURVE_NAME}", tables.curve, CURVE_SCHEMA)
        kl = numbers_of(tables.kl, "kl", by=("intervention", "positions"))
        counts = {
            "kl": kl,
            "num_conversations": int(tables.kl["num_conversations"].max()),
            "num_latents": int(tables.curve["num_latents"].max()),
        }
        context.finish(step, counts, time.monotonic() - started)


def _interventions(step: Step, context: Context) -> tuple[Intervention, ...]:
    section = step.section
    assert isinstance(section, CausalitySection)
    latents = read_table(context.storage, f"{step.inputs['latents'].key.folder}/{LATENTS_NAME}").to_pandas()
    chosen = causality_latents(latents, num_latents=section.max_latents, min_latents=section.min_latents)
    return (
        *plan_interventions(
            chosen, num_random_halves=section.num_random_halves, seed=section.seed, with_mean_difference=True
        ),
        *plan_curve(chosen, num_random_orders=section.num_random_orders, seed=section.seed),
    )


def _dialogues(step: Step, section: CausalitySection, context: Context) -> pa.Table:
    """Index rows of the validation dialogues that are measured."""
    tokens = step.inputs["tokens"]
    return choose_dialogues(
        read_table(context.storage, f"{tokens.key.folder}/{INDEX_NAME}"),
        context.record_of(tokens).counts["dialogue_corpora"],
        read_rejected(context.storage, step.inputs["activations"].key.folder),
        section.num_conversations,
    )


def choose_dialogues(
    index: pa.Table, dialogue_corpora: Sequence[str], rejected: Set[int], num_conversations: int
) -> pa.Table:
    """The first validation dialogues in order of their hash; what extraction set aside would fail here as well."""
    frame = index.to_pandas()
    chosen = frame[(frame["split"] == Split.VALIDATION) & frame["corpus"].isin(dialogue_corpora)]
    chosen = chosen[~chosen["doc_id"].isin(rejected)].sort_values("doc_id").head(num_conversations)
    if chosen.empty:
        raise InputError(
            "analyses.causality: expected validation dialogues, got none; add a corpus with messages_column or set "
            "analyses.causality to null"
        )
    return index.take(chosen.index.to_numpy())


def mean_difference(storage: Storage, activations_folder: str) -> torch.Tensor:
    """Mean of x^chat - x^base over rows of the validation dialogues, float32 [D]; runs in a worker."""
    store = ActivationStore(storage, activations_folder)
    manifest = store.manifest
    dialogues = torch.tensor(manifest.dialogue_corpora)
    total_D = torch.zeros(manifest.activation_dim, dtype=torch.float64)
    num_rows = 0
    for shard in manifest.of_split(Split.VALIDATION):
        rows = store.read(shard)
        x_BMD = rows.x_BMD[torch.isin(rows.corpus_B.long(), dialogues)]
        # Each row exactly, the sum in float64: x is bfloat16, and its differences cancel.
        total_D += (x_BMD[:, CHAT].float() - x_BMD[:, BASE].float()).sum(0, dtype=torch.float64)
        num_rows += len(x_BMD)
        if num_rows >= _MEAN_DIFFERENCE_ROWS:
            break
    if num_rows == 0:
        raise InputError(
            "analyses.causality: expected activation rows of validation dialogues, got none; add a corpus with "
            "messages_column or set analyses.causality to null"
        )
    return (total_D / num_rows).float()


def _measure(folder: str, plans: Mapping[str, Sequence[Intervention]], storage: Storage) -> Causality:
    with fitted(storage, folder) as crosscoder:
        return Causality(crosscoder, plans[folder])


class MeasureDialogues:
    """Worker: both models whole, and every crosscoder."""

    def __init__(
        self,
        storage: Storage,
        tokens_folder: str,
        models: tuple[Loading, int, RowOptions],
        plans: Mapping[str, Sequence[Intervention]],
        mean_difference_D: torch.Tensor,
    ) -> None:
        loading, layer, self.options = models
        self.storage, self.tokens_folder, self.mean_difference_D = storage, tokens_folder, mean_difference_D
        self.pair = load_pair(storage, loading, layer=layer)
        self.measures = {folder: _measure(folder, plans, storage) for folder in plans}

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Sums per crosscoder over some dialogues."""
        documents = read_token_rows(self.storage, self.tokens_folder, item["index"])
        sums = {folder: measure.start() for folder, measure in self.measures.items()}
        for batch in causality_batches(self.pair, documents, self.options, self.mean_difference_D):
            for folder, measure in self.measures.items():
                measure.update(sums[folder], batch)
        packed = {folder: sums_to_bytes(own) for folder, own in sums.items()}
        return {"num_dialogues": item["index"].num_rows, "sums": packed}
