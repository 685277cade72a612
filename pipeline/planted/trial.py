"""Writes one world; fits one recipe on it and judges the result.

Both classes are workers: built once per process and called with one item; two calls with one item give one result.
Store, trainer and analyses are those of a run. Only the matching at the end knows what is planted; score.py counts it.
"""

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load, save
from torch import Tensor

from pipeline.analyses.controls import is_replicated, match_latents, num_seeds_finding, seed_table
from pipeline.analyses.latent_tables import limits_of, verdict_analyses, verdict_table
from pipeline.analyses.rows import analyse, encoded_batches
from pipeline.analyses.units import judged_decoder
from pipeline.analyses.verdict import Limits, by_evidence, by_paper
from pipeline.cluster.connect import Board
from pipeline.config.analyses import LatentScalingSection
from pipeline.config.crosscoder import CrosscoderSection, TrainingSection
from pipeline.config.resources import TrainingResources
from pipeline.errors import InputError
from pipeline.numerics import fitting
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.numerics.moments import Moments
from pipeline.numerics.trainer import CrosscoderTrainer
from pipeline.planted.settings import RowsSection, WorldSection
from pipeline.planted.world import World
from pipeline.schema import (
    CHAT,
    DELTA_NORM_RANGES,
    LATENT_COLUMNS,
    Column,
    Ownership,
    Split,
    Verdict,
    latent_corpus_columns,
)
from pipeline.stages.crosscoder_spec import normalisation_of, spec_of
from pipeline.stages.row_pass import shard_rows
from pipeline.storage.activation_store import MANIFEST_NAME, ActivationStore, Manifest, Shard, StoredMoments
from pipeline.storage.filesystem import Storage
from pipeline.storage.row_order import TrainingRows
from pipeline.storage.shards import Rows, publish_shard, summarise
from pipeline.storage.tables import arrow_schema, write_frame

TRUTH_NAME = "truth.safetensors"
CONCEPTS_NAME = "concepts.json"
LATENTS_NAME = "latents.parquet"
MATCHES_NAME = "matches.parquet"
CORPUS = "planted"

MATCH_COLUMNS = (
    Column("latent", "int32", "index of the latent"),
    Column(
        "concept", "int32", "the concept of the chat model whose direction is most like d^chat; -1 where d^chat is 0"
    ),
    Column("cosine", "float64", "cosine of the two directions"),
    Column("truth", "string", "what that concept is (world.Truth)"),
    Column("by_delta_norm", "bool", "fires, and Delta_norm alone calls it chat-only"),
    Column("by_direction", "bool", "fires, and delta_direction lies in Delta_norm's range for chat-only"),
    Column("by_latent_scaling", "bool", "the verdict by the rule `paper` calls it chat-specific"),
    Column("by_evidence", "bool", "the verdict by the rule `evidence` calls it chat-specific"),
    Column("by_replication", "bool", "that, and at least half of the recipe's other seeds find it again"),
    Column("q_value", "float64", "its false discovery rate by the rule `evidence`"),
)


class Plant:
    """Worker: writes the activations of one seed's world as a store, with the truth beside it."""

    def __init__(self, storage: Storage, world: WorldSection, rows: RowsSection) -> None:
        self.storage, self.world, self.rows = storage, world, rows

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """item: `seed`, `folder`. The manifest is written last; returns the folder and counts."""
        folder, world = item["folder"], World(self.world.spec(), item["seed"])
        shards: list[Shard] = []
        moments: dict[str, Moments] = {}
        for split, num_rows in ((Split.TRAIN, self.rows.train), (Split.VALIDATION, self.rows.validation)):
            num_documents = max(1, num_rows // self.world.document_rows)
            per_shard = max(1, self.rows.per_shard // self.world.document_rows)
            for number, first in enumerate(range(0, num_documents, per_shard)):
                name = f"{split}-{number:05d}.safetensors"
                made = world.documents(split, number, min(per_shard, num_documents - first))
                zeros_B = torch.zeros(len(made.x_BMD), dtype=torch.int32)
                position_B = made.position_B.int()
                rows = Rows(made.x_BMD.bfloat16(), zeros_B, made.doc_id_B, position_B, zeros_B, zeros_B)
                file = publish_shard(self.storage, f"{folder}/{name}", rows)
                count = len(made.x_BMD) // self.world.document_rows
                shards.append(Shard(name, split, len(made.x_BMD), count, file.num_bytes, file.sha256))
                own = summarise(rows.x_BMD).moments
                moments[split] = moments[split].merge(own) if split in moments else own
        self._publish(folder, world, shards, moments)
        num_rows = sum(shard.num_rows for shard in shards)
        return {"folder": folder, "num_rows": num_rows, "num_concepts": len(world.concepts.truth)}

    def _publish(self, folder: str, world: World, shards: list[Shard], moments: Mapping[str, Moments]) -> None:
        concepts = world.concepts
        tensors = {name: value.contiguous() for name, value in concepts._asdict().items() if isinstance(value, Tensor)}
        self.storage.write_bytes(f"{folder}/{TRUTH_NAME}", bytes(save(tensors)))
        self.storage.write_json(f"{folder}/{CONCEPTS_NAME}", {"truth": list(concepts.truth)})
        stored = {split: StoredMoments.of(own) for split, own in moments.items()}
        manifest = Manifest(tuple(shards), 2, world.spec.activation_dim, (CORPUS,), (), (), moments=stored)
        self.storage.write_json(f"{folder}/{MANIFEST_NAME}", manifest.to_json())


class Trial:
    """Worker: fits one recipe on one world, or reads a foreign crosscoder, and judges it."""

    def __init__(
        self, storage: Storage, training: TrainingSection, judge: LatentScalingSection, board: Board | None = None
    ) -> None:
        """board: where the steps done are posted, or None."""
        self.storage, self.training, self.judge, self.board = storage, training, judge, board

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """item: `folder`, `activations`, and `recipe` with `seed`, or `source`; returns folder, fidelity, seconds.

        Publishes the crosscoder, its latent table and the concept that every latent is most like.
        """
        started = time.monotonic()
        store = ActivationStore(self.storage, item["activations"])
        others: list[Crosscoder] = []
        if "source" in item:
            crosscoder = Crosscoder.from_pretrained(item["source"])
            shape, expected = tuple(crosscoder.W_dec_FMD.shape[1:]), (2, store.manifest.activation_dim)
            if shape != expected:
                raise InputError(
                    f"{item['source']}: expected a crosscoder of 2 models and width {expected[1]}, got {shape[0]} and "
                    f"{shape[1]}: fit it on the activations of this benchmark (docs/planted.md)"
                )
        else:
            crosscoder, *others = self._fit(item["recipe"], item["seed"], store)
        with tempfile.TemporaryDirectory(prefix="crossray-planted-") as folder:
            crosscoder.save_pretrained(folder)
            self.storage.upload_folder(Path(folder), item["folder"])
        table, fidelity = judged(crosscoder, store, self.judge)
        columns = (*LATENT_COLUMNS, *latent_corpus_columns((CORPUS,)))
        write_frame(self.storage, f"{item['folder']}/{LATENTS_NAME}", table, arrow_schema(columns))
        truth = read_truth(self.storage, item["activations"])
        calls = called(table, limits_of(self.judge))
        calls["by_replication"] = calls["by_evidence"] & self._is_replicated(crosscoder, others, table, store)
        matches = matched(crosscoder, calls, *truth)
        write_frame(self.storage, f"{item['folder']}/{MATCHES_NAME}", matches, arrow_schema(MATCH_COLUMNS))
        return {"folder": item["folder"], "fidelity": fidelity, "seconds": time.monotonic() - started}

    def _fit(self, recipe: CrosscoderSection, seed: int, store: ActivationStore) -> list[Crosscoder]:
        """The recipe's crosscoder, and those of its further seeds, from one read of the rows."""
        shape = {"num_models": store.manifest.num_models, "activation_dim": store.manifest.activation_dim}
        trainers = []
        for section in (recipe, *recipe.further_seeds()):
            spec = spec_of(section, self.training, TrainingResources(), **shape)
            normalisation = normalisation_of(section, store.manifest)
            trainers.append(
                CrosscoderTrainer(dataclasses.replace(spec, seed=section.seed + seed), normalisation=normalisation)
            )
        rows = TrainingRows(store, seed=self.training.shuffle_seed + seed, batch_rows=self.training.batch_rows)
        num_steps = self.training.num_steps
        fitting.initialise(trainers, next(rows.batches(0, 1)))
        for step in fitting.steps(trainers, rows.batches(0, num_steps)):
            if self.board is not None and (step % 100 == 0 or step == num_steps):
                self.board.post(((step - 1) % 100 + 1, f"{recipe.name}, seed {seed}"))
        return [trainer.crosscoder() for trainer in trainers]

    def _is_replicated(
        self, crosscoder: Crosscoder, others: Sequence[Crosscoder], table: pd.DataFrame, store: ActivationStore
    ) -> "pd.Series[bool]":
        """Whether at least half of the other seeds find a latent again; never where there is no other seed."""
        if not others:
            return pd.Series(data=False, index=table.index)
        rms_M = store.manifest.training_rms_M()
        specific = table.loc[table["verdict"] == Verdict.CHAT_SPECIFIC, "latent"].tolist()
        own_FMD, found = judged_decoder(crosscoder, rms_M).W_dec_FMD, []
        for number, other in enumerate(others):
            matches = match_latents(own_FMD, judged_decoder(other, rms_M).W_dec_FMD, specific)
            found.append(seed_table(table, judged(other, store, self.judge)[0], matches, other=str(number)))
        again = is_replicated(num_seeds_finding(pd.concat(found)), len(others))
        return table["latent"].map(again).fillna(value=False).astype(bool)


def judged(
    crosscoder: Crosscoder, store: ActivationStore, judge: LatentScalingSection
) -> tuple[pd.DataFrame, dict[str, float]]:
    """The latent table and the fidelity on the validation rows, as a run makes them."""
    rms_M = store.manifest.training_rms_M()
    analyses = verdict_analyses(crosscoder, judge, corpora=(CORPUS,), rms_M=rms_M)
    shards = store.manifest.of_split(Split.VALIDATION)
    sums = analyse(
        analyses, (batch for shard in shards for batch in encoded_batches(crosscoder, shard_rows(store, shard)))
    )
    tables: dict[str, Any] = {name: analysis.table(sums[name]) for name, analysis in analyses.items()}
    return verdict_table(judged_decoder(crosscoder, rms_M), tables, judge), tables["fidelity"]


def read_truth(storage: Storage, folder: str) -> tuple[Tensor, list[str]]:
    """direction_CMD and the kind of every concept of a planted store."""
    tensors = load(storage.read_bytes(f"{folder}/{TRUTH_NAME}"))
    return tensors["direction_CMD"], list(storage.read_json(f"{folder}/{CONCEPTS_NAME}")["truth"])


def called(table: pd.DataFrame, limits: Limits) -> pd.DataFrame:
    """latent, and per rule (a key of score.RULES) whether it calls the latent chat-only, from a latent table."""
    is_live, low = table["frequency"] > 0, DELTA_NORM_RANGES[Ownership.CHAT_ONLY][0]
    return pd.DataFrame(
        {
            "latent": table["latent"],
            "by_delta_norm": (table["ownership"] == Ownership.CHAT_ONLY) & is_live,
            "by_direction": (table["delta_direction"] >= low) & is_live,
            "by_latent_scaling": by_paper(table, limits) == Verdict.CHAT_SPECIFIC,
            "by_evidence": by_evidence(table, limits) == Verdict.CHAT_SPECIFIC,
            "q_value": table["q_value"].fillna(1.0),
        }
    )


def matched(crosscoder: Crosscoder, calls: pd.DataFrame, direction_CMD: Tensor, truth: list[str]) -> pd.DataFrame:
    """MATCH_COLUMNS: for every latent of `called` the concept of the chat model that its chat decoder is most like."""
    normalize = torch.nn.functional.normalize
    decoder_FD = normalize(crosscoder.raw_decoder_FMD()[:, CHAT].double().cpu(), dim=1)
    cosine_FC = decoder_FD @ normalize(direction_CMD[:, CHAT].double(), dim=1).T
    cosine_FC[:, direction_CMD[:, CHAT].norm(dim=1) == 0] = -1
    best = cosine_FC.max(1)
    has_chat_F = (decoder_FD.norm(dim=1) > 0).numpy()
    concept_F = np.where(has_chat_F, best.indices.numpy(), -1)
    return pd.DataFrame(
        {
            "concept": concept_F,
            "cosine": np.where(has_chat_F, best.values.numpy(), np.nan),
            "truth": [truth[concept] if concept >= 0 else "" for concept in concept_F],
            **calls,
        },
        columns=[column.name for column in MATCH_COLUMNS],
    )
