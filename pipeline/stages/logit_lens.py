"""Promoted tokens of latents and of the first tokens' mean difference, with both models in the worker.

One worker call is one crosscoder. The mean difference needs no crosscoder: it is a call of its own, which reads the
stored validation rows once, and it is published beside every table, so that each says what a reader would see without
a dictionary.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from pipeline.analyses.latent_sets import listed_latents
from pipeline.analyses.logit_lens import FirstTokens, LogitLens
from pipeline.analyses.logit_lens_columns import FIRST_TOKEN_COLUMNS, LOGIT_LENS_COLUMNS
from pipeline.cluster.pools import Pool, run_pool
from pipeline.config.analyses import LogitLensSection
from pipeline.schema import Split
from pipeline.stages.catalogue import LogitLensInputs
from pipeline.stages.finished_crosscoder import open_crosscoder
from pipeline.stages.latents import read_latents
from pipeline.stages.locations import Loading
from pipeline.stages.models import load_pair
from pipeline.stages.step import StageContext, Step
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, write_frame
from pipeline.terminal import Progress

TABLE_NAME = "logit_lens.parquet"
FIRST_TOKENS_NAME = "first_tokens.parquet"
LOGIT_LENS_SCHEMA = arrow_schema(LOGIT_LENS_COLUMNS)
FIRST_TOKENS_SCHEMA = arrow_schema(FIRST_TOKEN_COLUMNS)


class Job(NamedTuple):
    """One crosscoder."""

    crosscoder: str
    """Its folder."""
    latents: tuple[int, ...]


class Promoted(NamedTuple):
    """What one call gave."""

    crosscoder: str | None
    """None for the first tokens."""
    table: pd.DataFrame
    """LOGIT_LENS_COLUMNS of a crosscoder, or FIRST_TOKEN_COLUMNS."""


def run(steps: Sequence[Step[LogitLensInputs]], context: StageContext) -> None:
    """Publish both tables of every crosscoder."""
    started = time.monotonic()
    first, storage = steps[0].inputs, context.storage
    # The first tokens come first: they read all rows, while a crosscoder reads its weights alone.
    calls = [None, *(Job(step.inputs.crosscoder.folder, _chosen(step.inputs, storage)) for step in steps)]
    arguments = (storage, first.loading, first.activations.folder, first.section)
    progress = Progress(LogitLensInputs.NAME, len(calls), "tables")
    found = run_pool(Pool("analyses", context.resources.analyses, PromotedTokens, arguments), calls)
    tables = {result.crosscoder: result.table for result in context.follow(progress, found, lambda _: 1)}
    for step in steps:
        table = tables[step.inputs.crosscoder.folder]
        write_frame(storage, f"{step.folder}/{TABLE_NAME}", table, LOGIT_LENS_SCHEMA)
        write_frame(storage, f"{step.folder}/{FIRST_TOKENS_NAME}", tables[None], FIRST_TOKENS_SCHEMA)
        counts = {"num_latents": int(table["latent"].nunique()), "num_positions": len(tables[None])}
        context.finish(step, counts, time.monotonic() - started)


def _chosen(inputs: LogitLensInputs, storage: Storage) -> tuple[int, ...]:
    section = inputs.section
    table = read_latents(storage, inputs.latents)
    return listed_latents(
        table, named=section.latents, max_latents=section.max_latents, where="analyses.logit_lens.latents"
    )


class PromotedTokens:
    """Worker: both models whole. An item is one crosscoder, or None for the first tokens."""

    def __init__(self, storage: Storage, loading: Loading, activations_folder: str, section: LogitLensSection) -> None:
        self.storage, self.activations_folder, self.section = storage, activations_folder, section
        pair = load_pair(storage, loading)
        self.lens = LogitLens(pair, pair.tokenizer, num_tokens=section.num_tokens)

    def __call__(self, job: Job | None) -> Promoted:
        """One table."""
        if job is None:
            return Promoted(None, self._first_tokens())
        with open_crosscoder(self.storage, job.crosscoder) as crosscoder:
            decoder_LMD = crosscoder.raw_decoder_FMD()[list(job.latents)]
        return Promoted(job.crosscoder, self.lens.latents(job.latents, decoder_LMD))

    def _first_tokens(self) -> pd.DataFrame:
        store = ActivationStore(self.storage, self.activations_folder)
        manifest = store.manifest
        means = FirstTokens(
            corpora=manifest.corpora,
            activation_dim=manifest.activation_dim,
            num_positions=self.section.first_tokens,
        )
        sums = means.start()
        for shard in manifest.of_split(Split.VALIDATION):
            rows = store.read(shard)
            means.update(sums, rows.x_BMD, rows.position_B, rows.corpus_B)
        return means.table(sums, self.lens)
