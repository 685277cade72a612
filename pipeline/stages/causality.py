"""KL of interventions, measured on held-out dialogues with both models in the worker.

One pass serves all crosscoders whose causality is missing: the lower halves of both models run once per batch, and each
crosscoder's interventions continue from there. The directions of the difference, a baseline, are taken first, from
rows of the validation dialogues: so many that they do not fit the measured dialogues by chance.
"""

import time
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from pipeline.analyses.causal_batch import MEASURES, CausalityBatch
from pipeline.analyses.causal_tables import Bootstrap
from pipeline.analyses.causality import Causality, Sums, causality_batches
from pipeline.analyses.equivalence import Equivalence, with_verdicts
from pipeline.analyses.interventions import (
    Baselines,
    Intervention,
    further_interventions,
    plan_curve,
    plan_interventions,
    principal_directions,
)
from pipeline.analyses.latent_sets import causality_latents, equivalence_latents, is_of_chat_alone, reads_chat_alone
from pipeline.analyses.rows import sums_from_bytes, sums_to_bytes
from pipeline.cluster.connect import worker_cpus
from pipeline.cluster.pools import Pool, run_pool, run_task
from pipeline.config.analyses import CausalitySection
from pipeline.errors import InputError
from pipeline.extraction.activations import RowOptions
from pipeline.schema import (
    BASE,
    CAUSALITY_COLUMNS,
    CAUSALITY_CURVE_COLUMNS,
    CAUSALITY_DIFFERENCE_COLUMNS,
    CHAT,
    EQUIVALENCE_COLUMNS,
    Split,
)
from pipeline.stages.catalogue import CausalityInputs
from pipeline.stages.extractor import read_rejected, read_token_rows, row_options
from pipeline.stages.finished_crosscoder import open_crosscoder
from pipeline.stages.latents import read_latents
from pipeline.stages.locations import Loading
from pipeline.stages.models import load_pair
from pipeline.stages.step import StageContext, Step
from pipeline.stages.tokens import INDEX_NAME
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, numbers_of, read_table, write_frame
from pipeline.terminal import Progress
from pipeline.text.conversations import conversation_of

TABLE_NAME = "causality.parquet"
DIFFERENCES_NAME = "differences.parquet"
CURVE_NAME = "curve.parquet"
EQUIVALENCE_NAME = "equivalence.parquet"
CAUSALITY_SCHEMA = arrow_schema(CAUSALITY_COLUMNS)
DIFFERENCES_SCHEMA = arrow_schema(CAUSALITY_DIFFERENCE_COLUMNS)
CURVE_SCHEMA = arrow_schema(CAUSALITY_CURVE_COLUMNS)
EQUIVALENCE_SCHEMA = arrow_schema(EQUIVALENCE_COLUMNS)

_MEAN_DIFFERENCE_ROWS = 200_000
"""Rows behind the mean difference: whole shards are read until there are as many."""

_PRINCIPAL_ROWS = 20_000

_DIALOGUES_PER_CALL = 16
"""Dialogues of one worker call, about a batch of tokens. The same on any cluster: the last digits of a dialogue's KL
depend on the other dialogues of its batch."""


class Plan(NamedTuple):
    """What is measured of one crosscoder."""

    interventions: tuple[Intervention, ...]
    equivalence: tuple[int, ...]
    """Latents whose causal equivalence is measured."""
    rms_M: torch.Tensor
    """Root mean square of each model's rows (analyses/units.py)."""


Plans = Mapping[str, Plan]
"""By the crosscoder's folder."""


class Measures(NamedTuple):
    """The two measures of one crosscoder."""

    causality: Causality
    equivalence: Equivalence

    def start(self) -> tuple[Sums, Sums]:
        """Empty sums of both."""
        return self.causality.start(), self.equivalence.start()

    def update(self, sums: tuple[Sums, Sums], batch: CausalityBatch) -> None:
        """Adds a batch to both, in place."""
        self.causality.update(sums[0], batch)
        self.equivalence.update(sums[1], batch)

    def merge(self, a: tuple[Sums, Sums], b: tuple[Sums, Sums]) -> tuple[Sums, Sums]:
        """Both sums of both parts."""
        return self.causality.merge(a[0], b[0]), self.equivalence.merge(a[1], b[1])


class _DialogueSums(NamedTuple):
    """What one worker call has summed."""

    num_dialogues: int
    packed: dict[str, tuple[bytes, bytes]]
    """Sums of both measures as bytes, by the crosscoder's folder."""


def run(steps: Sequence[Step[CausalityInputs]], context: StageContext) -> None:
    """Publish one table per crosscoder."""
    started = time.monotonic()
    # The steps of a run have one section, so they measure the same dialogues.
    first, storage = steps[0].inputs, context.storage
    index = _dialogues(first, context)
    cpus = worker_cpus(context.resources.analyses.cpus)
    baselines = run_task(difference_directions, storage, first.activations.folder, first.section, num_cpus=cpus)
    options = row_options(first.activations.inputs.section, first.section.tokens_per_batch)
    plans = {step.inputs.crosscoder.folder: _plan(step.inputs, baselines, storage) for step in steps}
    arguments = (storage, first.tokens.folder, (first.loading, options), plans, baselines)
    calls = [index.slice(start, _DIALOGUES_PER_CALL) for start in range(0, index.num_rows, _DIALOGUES_PER_CALL)]
    measures = {folder: _measure(folder, plans, storage) for folder in plans}
    sums = {folder: measure.start() for folder, measure in measures.items()}
    measured = run_pool(Pool("analyses", context.resources.analyses, MeasureDialogues, arguments), calls)
    progress = Progress(CausalityInputs.NAME, index.num_rows, "dialogues")
    for result in context.follow(progress, measured, lambda result: result.num_dialogues):
        for folder, data in result.packed.items():
            found = sums_from_bytes(data[0]), sums_from_bytes(data[1])
            sums[folder] = measures[folder].merge(sums[folder], found)
    for step in steps:
        folder = step.inputs.crosscoder.folder
        bootstrap = Bootstrap(first.section.num_resamples, first.section.seed)
        tables = measures[folder].causality.tables(sums[folder][0], bootstrap)
        equivalence = with_verdicts(
            measures[folder].equivalence.table(sums[folder][1], bootstrap), read_latents(storage, step.inputs.latents)
        )
        write_frame(storage, f"{step.folder}/{TABLE_NAME}", tables.kl, CAUSALITY_SCHEMA)
        write_frame(storage, f"{step.folder}/{DIFFERENCES_NAME}", tables.differences, DIFFERENCES_SCHEMA)
        write_frame(storage, f"{step.folder}/{CURVE_NAME}", tables.curve, CURVE_SCHEMA)
        write_frame(storage, f"{step.folder}/{EQUIVALENCE_NAME}", equivalence, EQUIVALENCE_SCHEMA)
        counts = {
            **{name: numbers_of(tables.kl, name, by=("intervention", "positions")) for name in MEASURES},
            "num_conversations": int(tables.kl["num_conversations"].max()),
            "num_latents": int(tables.curve["num_latents"].max()),
            "agreement": equivalence.groupby("verdict")["agreement"].mean().dropna().to_dict(),
        }
        context.finish(step, counts, time.monotonic() - started)


def _plan(inputs: CausalityInputs, baselines: Baselines, storage: Storage) -> Plan:
    latents = read_latents(storage, inputs.latents)
    asked = equivalence_latents(latents, num_each=inputs.section.num_equivalence_latents, seed=inputs.section.seed)
    rms_M = ActivationStore(storage, inputs.activations.folder).manifest.training_rms_M()
    return Plan(_interventions(inputs, latents, baselines, storage), asked, rms_M)


def _interventions(
    inputs: CausalityInputs, latents: pd.DataFrame, baselines: Baselines, storage: Storage
) -> tuple[Intervention, ...]:
    section, scaling = inputs.section, inputs.latents.inputs.section
    limit, least = section.max_latents, section.min_latents
    if section.set_size == "larger_class":
        others = (read_latents(storage, other) for other in inputs.compared)
        # A dictionary without base rows is chat-only as a whole: its class says nothing about the others.
        tables = [table for table in (latents, *others) if not is_of_chat_alone(table)] or [latents]
        largest = max(len(causality_latents(table)) for table in tables)
        limit = least = max(least, largest if limit is None else min(limit, largest))
    chosen = causality_latents(latents, num_latents=limit, min_latents=least)
    return (
        *plan_interventions(
            chosen,
            num_random_halves=section.num_random_halves,
            seed=section.seed,
            baselines=baselines,
            with_whole=not reads_chat_alone(latents),
        ),
        *further_interventions(
            latents, chosen, section.further_sets, thresholds=(scaling.nu_eps_threshold, scaling.nu_r_threshold)
        ),
        *plan_curve(chosen, num_random_orders=section.num_random_orders, seed=section.seed),
    )


def _dialogues(inputs: CausalityInputs, context: StageContext) -> pa.Table:
    """Index rows of the validation dialogues that are measured."""
    return choose_dialogues(
        read_table(context.storage, f"{inputs.tokens.folder}/{INDEX_NAME}"),
        context.record_of(inputs.tokens).counts["dialogue_corpora"],
        read_rejected(context.storage, inputs.activations.folder),
        inputs.section.num_conversations,
    )


def choose_dialogues(
    index: pa.Table, dialogue_corpora: Sequence[str], rejected: Set[int], num_conversations: int
) -> pa.Table:
    """The first validation dialogues in order of their hash, without those that extraction has quarantined.

    A dialogue that is several documents counts once, and all of them are taken.
    """
    frame = index.to_pandas()
    chosen = frame[(frame["split"] == Split.VALIDATION) & frame["corpus"].isin(dialogue_corpora)]
    chosen = chosen[~chosen["doc_id"].isin(rejected)].assign(
        conversation=lambda rows: conversation_of(rows["doc_id"].to_numpy())
    )
    taken = np.unique(chosen["conversation"])[:num_conversations]
    chosen = chosen[chosen["conversation"].isin(taken)].sort_values(["conversation", "doc_id"])
    if chosen.empty:
        raise InputError(
            "analyses.causality: expected validation dialogues, got none; add a corpus with messages_column or set "
            "analyses.causality to null"
        )
    return index.take(chosen.index.to_numpy())


def difference_directions(storage: Storage, activations_folder: str, section: CausalitySection) -> Baselines:
    """Mean and principal directions of x^chat - x^base over rows of the validation dialogues; runs in a worker.

    The mean is over up to _MEAN_DIFFERENCE_ROWS rows, the directions are those of the first _PRINCIPAL_ROWS of them.
    """
    store = ActivationStore(storage, activations_folder)
    manifest = store.manifest
    dialogues = torch.tensor(manifest.dialogue_corpora)
    total_D = torch.zeros(manifest.activation_dim, dtype=torch.float64)
    num_rows, kept = 0, list[torch.Tensor]()
    for shard in manifest.of_split(Split.VALIDATION):
        rows = store.read(shard)
        x_BMD = rows.x_BMD[torch.isin(rows.corpus_B.long(), dialogues)]
        # Each row exactly, the sum in float64: x is bfloat16, and its differences cancel.
        difference_BD = x_BMD[:, CHAT].float() - x_BMD[:, BASE].float()
        total_D += difference_BD.sum(0, dtype=torch.float64)
        kept.append(difference_BD[: max(0, _PRINCIPAL_ROWS - num_rows)])
        num_rows += len(x_BMD)
        if num_rows >= _MEAN_DIFFERENCE_ROWS:
            break
    if num_rows == 0:
        raise InputError(
            "analyses.causality: expected activation rows of validation dialogues, got none; add a corpus with "
            "messages_column or set analyses.causality to null"
        )
    principal_KD = principal_directions(torch.cat(kept), section.num_principal, seed=section.seed)
    return Baselines((total_D / num_rows).float(), principal_KD, section.num_first)


def _measure(folder: str, plans: Plans, storage: Storage) -> Measures:
    plan = plans[folder]
    with open_crosscoder(storage, folder) as crosscoder:
        return Measures(
            Causality(crosscoder, plan.interventions), Equivalence(crosscoder, plan.equivalence, plan.rms_M)
        )


class MeasureDialogues:
    """Worker: both models whole, and every crosscoder. An item is a part of the tokens' index."""

    def __init__(
        self,
        storage: Storage,
        tokens_folder: str,
        models: tuple[Loading, RowOptions],
        plans: Plans,
        baselines: Baselines,
    ) -> None:
        loading, self.options = models
        self.storage, self.tokens_folder, self.baselines = storage, tokens_folder, baselines
        self.pair = load_pair(storage, loading)
        self.measures = {folder: _measure(folder, plans, storage) for folder in plans}

    def __call__(self, index: pa.Table) -> _DialogueSums:
        """Sums per crosscoder over some dialogues."""
        documents = read_token_rows(self.storage, self.tokens_folder, index)
        sums = {folder: measure.start() for folder, measure in self.measures.items()}
        for batch in causality_batches(self.pair, documents, self.options, self.baselines):
            for folder, measure in self.measures.items():
                measure.update(sums[folder], batch)
        packed = {folder: (sums_to_bytes(own[0]), sums_to_bytes(own[1])) for folder, own in sums.items()}
        return _DialogueSums(index.num_rows, packed)
