"""Both models read every token once, up to layer L; the rows become shards of the activation store.

Which documents make up which shard is planned before anything runs, from the index of tokens alone. A worker call makes
one shard and publishes it under its final name together with a small description, the description last: a killed run
repeats at most the shards that were being made, and a shard that is made twice has the same bytes. Documents that
cannot be run are quarantined: listed in a table beside the shards, and counted. More of them than allowed end the run.

In stream mode only the validation rows are stored, which the analyses read twice; the training rows are extracted while
crosscoders are fitted (stages/stream.py).
"""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.cluster.connect import Board, listening
from pipeline.cluster.pools import Pool, run_pool
from pipeline.errors import InputError
from pipeline.extraction.activations import BOS, FIRST_TOKENS
from pipeline.numerics.moments import Moments
from pipeline.schema import MODEL_NAMES, Split
from pipeline.stages.catalogue import ActivationsInputs
from pipeline.stages.extractor import REJECTED_NAME, Extractor, check_rejected, write_rejected
from pipeline.stages.step import StageContext, Step
from pipeline.stages.tokens import INDEX_NAME
from pipeline.storage.activation_store import MANIFEST_NAME, Manifest, Shard, StoredMoments
from pipeline.storage.filesystem import Storage
from pipeline.storage.shards import publish_shard, summarise
from pipeline.storage.tables import read_table
from pipeline.terminal import Progress

_DESCRIPTION_SUFFIX = ".json"
_SECONDS_BETWEEN_EVENTS = 0.5


class PlannedShard(NamedTuple):
    """One shard before it is made."""

    name: str
    split: str
    documents: np.ndarray
    """Rows of the tokens' index, int64."""
    num_tokens: int


@dataclass(frozen=True)
class ShardDescription:
    """One finished shard; kept as a JSON file beside it, together with the moments of its rows."""

    name: str
    split: str
    num_rows: int
    num_documents: int
    num_bytes: int
    num_tokens: int
    sha256: str
    real_token_frac: float
    num_capped: int
    num_out_of_memory: int
    left_out: dict[str, int]
    """Tokens that became no rows, by reason; without those left out for their norm."""
    plain_forward_difference: list[float]
    """Of base and chat."""
    commits: list[str | None]
    """Of base and chat."""
    mean_norm: list[float]
    """Of base and chat."""
    shape: list[int]
    """[M, D]."""
    num_layers: int
    rejected: list[dict[str, Any]]
    """Quarantined documents: schema.QUARANTINE_COLUMNS by name."""


_SIMILAR_SCALES = 1.25
"""Ratios of the models' scales within this factor are not worth a remark; fine-tuning alone changes little more."""


def run(steps: Sequence[Step[ActivationsInputs]], context: StageContext) -> None:
    """Make the missing shards, then the manifest."""
    (step,) = steps
    started = time.monotonic()
    described, rejected = _make_shards(step, context)
    write_rejected(context.storage, step.folder, rejected)
    described = _with_rows(described)
    manifest = _manifest(step, context, described)
    context.storage.write_json(f"{step.folder}/{MANIFEST_NAME}", manifest.to_json())
    counts = {**_counts(described), **_scales(manifest), "num_rejected_documents": len(rejected)}
    for line in _remarks(counts, step.inputs.section.norm_cap):
        context.reporter.message(line)
    context.finish(step, counts, time.monotonic() - started, files=[MANIFEST_NAME, REJECTED_NAME])


def _make_shards(
    step: Step[ActivationsInputs], context: StageContext
) -> tuple[list[ShardDescription], list[dict[str, Any]]]:
    """All shards in the order of the plan, those that were not there made now; the quarantined documents."""
    inputs, section = step.inputs, step.inputs.section
    index = read_table(context.storage, f"{inputs.tokens.folder}/{INDEX_NAME}")
    plan = plan_shards(index, section.rows_per_shard)
    if section.mode == "stream":
        plan = [shard for shard in plan if shard.split == Split.VALIDATION]
    done = finished_shards(context.storage, step.folder)
    missing = [shard for shard in plan if shard.name not in done]
    progress = ShardProgress(context, plan, done)
    max_rejected = int(section.max_rejected_frac * sum(len(shard.documents) for shard in plan))
    rejected = [document for shard in plan if shard.name in done for document in done[shard.name].rejected]
    check_rejected(rejected, max_rejected)
    if missing:
        extractor = Extractor(
            context.storage,
            inputs.tokens.folder,
            section=section,
            loading=inputs.loading,
            corpora=_corpora(index),
            max_rejected=max_rejected,
        )
        workers = context.resources.extraction
        with listening(lambda event: progress.batch(*event)) as board:
            arguments = (context.storage, step.folder, extractor, board)
            pool = Pool(
                "extraction", workers, ExtractShard, arguments, uses_actors=True, min_workers=workers.min_workers
            )
            for result in run_pool(pool, missing):
                done[result.name] = result
                rejected += result.rejected
                check_rejected(rejected, max_rejected)
                progress.shard(result.name, f"{len(rejected)} documents quarantined" if rejected else "")
    return [done[shard.name] for shard in plan], rejected


class ShardProgress:
    """Tokens of finished shards and of finished batches of the others; told by the driver and by workers' events."""

    def __init__(self, context: StageContext, plan: Sequence[PlannedShard], done: Collection[str]) -> None:
        self._context, self._lock = context, Lock()
        self._planned = {shard.name: shard.num_tokens for shard in plan}
        self._done = {name: self._planned[name] for name in done if name in self._planned}
        self._finished = set(self._done)
        self._progress = Progress(ActivationsInputs.NAME, sum(self._planned.values()), "tokens")
        self._report(f"{len(self._done)} of {len(plan)} shards were there" if self._done else "")

    def batch(self, name: str, num_tokens: int) -> None:
        """So many tokens of a shard are done; fewer than before where another worker begins it anew."""
        with self._lock:
            if name not in self._finished:
                # A shard whose documents are quarantined is run in parts once more.
                self._done[name] = min(num_tokens, self._planned[name])
                self._report(self._progress.note)

    def shard(self, name: str, note: str) -> None:
        """A shard is published."""
        with self._lock:
            self._finished.add(name)
            self._done[name] = self._planned[name]
            self._report(note)

    def _report(self, note: str) -> None:
        self._context.report_progress(self._progress, sum(self._done.values()), note)


def _corpora(index: pa.Table) -> tuple[str, ...]:
    return tuple(sorted(set(index["corpus"].to_pylist())))


def _with_rows(described: Sequence[ShardDescription]) -> list[ShardDescription]:
    """The shards that hold rows; an InputError where a split has none."""
    for split in sorted({shard.split for shard in described}):
        if not any(shard.num_rows for shard in described if shard.split == split):
            raise InputError(
                f"activations: expected rows in the {split} split, got none of {len(described)} shards; add documents, "
                "or lower activations.drop_first_tokens"
            )
    return [shard for shard in described if shard.num_rows]


def plan_shards(index: pa.Table, rows_per_shard: int) -> list[PlannedShard]:
    """Which documents (rows of the index) go into which shard, per split, in the order of the index.

    Cut by tokens, an upper bound of rows: dropped rows make shards a little smaller, never larger than asked by more
    than one document.
    """
    splits = np.asarray(index["split"].to_pylist(), dtype=object)
    lengths = index["num_tokens"].to_numpy()
    plan: list[PlannedShard] = []
    for split in (Split.TRAIN, Split.VALIDATION):
        rows = np.flatnonzero(splits == split)
        if not len(rows):
            raise InputError(
                f"corpus.validation_frac: expected at least one {split} document, got none of {len(splits)}; "
                "add documents"
            )
        shard_of = (np.cumsum(lengths[rows]) - lengths[rows]) // rows_per_shard
        for number, shard in enumerate(np.unique(shard_of)):
            members = rows[shard_of == shard].astype(np.int64)
            name = f"{split}-{number:05d}.safetensors"
            plan.append(PlannedShard(name, split, members, int(lengths[members].sum())))
    return plan


class ExtractShard:
    """Worker: one shard of the store per call. `board` hears how far it is."""

    def __init__(self, storage: Storage, folder: str, extractor: Extractor, board: Board | None = None) -> None:
        self.storage, self.folder, self.extractor, self.board = storage, folder, extractor, board

    def __call__(self, planned: PlannedShard) -> ShardDescription:
        """Publish the shard, then its description; return the description."""
        num_done, told = 0, time.monotonic()

        def on_batch(num_tokens: int) -> None:
            nonlocal num_done, told
            num_done += num_tokens
            if self.board is not None and time.monotonic() - told >= _SECONDS_BETWEEN_EVENTS:
                told = time.monotonic()
                self.board.post((planned.name, num_done))

        extracted = self.extractor(planned.documents, on_batch)
        rows = extracted.rows
        key = f"{self.folder}/{planned.name}"
        summary = summarise(rows.x_BMD)
        file = publish_shard(self.storage, key, rows, self.extractor.section.compression)
        description = ShardDescription(
            name=planned.name,
            split=planned.split,
            num_rows=len(rows.x_BMD),
            num_documents=len(planned.documents) - len(extracted.rejected),
            num_bytes=file.num_bytes,
            num_tokens=planned.num_tokens,
            sha256=file.sha256,
            real_token_frac=extracted.real_token_frac,
            num_capped=extracted.num_capped,
            num_out_of_memory=extracted.num_out_of_memory,
            left_out=dict(extracted.left_out),
            plain_forward_difference=list(self.extractor.verification.relative_difference),
            commits=list(self.extractor.commits),
            mean_norm=summary.mean_norm_M.tolist(),
            shape=list(rows.x_BMD.shape[1:]),
            num_layers=self.extractor.num_layers,
            rejected=[dict(document) for document in extracted.rejected],
        )
        # The moments are D numbers a shard: they are left in the file until all shards are there.
        moments = asdict(StoredMoments.of(summary.moments))
        self.storage.write_json(f"{key}{_DESCRIPTION_SUFFIX}", {**asdict(description), "moments": moments})
        return description


def finished_shards(storage: Storage, folder: str) -> dict[str, ShardDescription]:
    """The shards that a former run has published, by name."""
    names = set(storage.files(folder))
    described = [name for name in names if name.endswith(f".safetensors{_DESCRIPTION_SUFFIX}")]
    found = {}
    for name in described:
        value = storage.read_json(f"{folder}/{name}")
        if value["name"] in names:
            found[value["name"]] = ShardDescription(**{key: own for key, own in value.items() if key != "moments"})
    return found


def _manifest(step: Step[ActivationsInputs], context: StageContext, described: Sequence[ShardDescription]) -> Manifest:
    tokens, storage = context.record_of(step.inputs.tokens), context.storage
    corpora = _corpora(read_table(storage, f"{step.inputs.tokens.folder}/{INDEX_NAME}"))
    num_models, width = described[0].shape
    return Manifest(
        shards=tuple(
            Shard(own.name, own.split, own.num_rows, own.num_documents, own.num_bytes, own.sha256) for own in described
        ),
        num_models=num_models,
        activation_dim=width,
        corpora=corpora,
        labels=tuple(tokens.counts["labels"]),
        dialogue_corpora=tuple(corpora.index(name) for name in tokens.counts["dialogue_corpora"] if name in corpora),
        compression=step.inputs.section.compression,
        moments={
            split: _merged_moments(storage, step.folder, [own.name for own in described if own.split == split])
            for split in sorted({own.split for own in described})
        },
    )


def _merged_moments(storage: Storage, folder: str, names: Sequence[str]) -> StoredMoments:
    """Moments of all rows of these shards, merged in their order; one description is in memory at a time."""
    total: Moments | None = None
    for name in names:
        described = storage.read_json(f"{folder}/{name}{_DESCRIPTION_SUFFIX}")
        own = StoredMoments.from_json(described["moments"]).moments()
        total = own if total is None else total.merge(own)
    assert total is not None, "a split has at least one shard"
    return StoredMoments.of(total)


def _scales(manifest: Manifest) -> dict[str, float]:
    """Root mean square of either model's rows around their mean, and how much larger the chat model's is."""
    rms = dict(zip(MODEL_NAMES, manifest.training_rms_M().tolist(), strict=True))
    ratio = rms["chat"] / rms["base"] if rms["base"] > 0 else float("nan")
    return {**{f"rms_{name}": value for name, value in rms.items()}, "scale_ratio": ratio}


def _remarks(counts: dict[str, Any], norm_cap: float | None) -> list[str]:
    """What a user should know of the rows: how many sinks were left out, and whether the models' scales differ."""
    remarks = []
    num_sinks = counts["num_rows_above_norm_cap"]
    if num_sinks:
        share = num_sinks / (counts["num_rows"] + num_sinks)
        remarks.append(
            f"activations: {num_sinks:,} rows ({share:.2%}) left out as attention sinks, whose norm is above "
            f"{norm_cap:g} times the median of their document (activations.norm_cap)"
        )
    chosen = {why: num for why, num in counts["num_rows_left_out"].items() if why not in (BOS, FIRST_TOKENS)}
    if chosen:
        told = ", ".join(f"{num:,} ({why})" for why, num in chosen.items())
        remarks.append(f"activations: {counts['num_rows']:,} rows; tokens left out beside them: {told}")
    if not 1 / _SIMILAR_SCALES <= counts["scale_ratio"] <= _SIMILAR_SCALES:
        remarks.append(
            f"activations: the chat model's rows are {counts['scale_ratio']:.3g} times as large as the base model's; "
            "verdicts are drawn in units in which both are equally large"
        )
    return remarks


def _counts(described: Sequence[ShardDescription]) -> dict[str, Any]:
    num_rows = sum(own.num_rows for own in described)
    norms = np.asarray([own.mean_norm for own in described])
    weights = np.asarray([own.num_rows for own in described])
    tokens = np.asarray([own.num_tokens for own in described])
    fractions = np.asarray([own.real_token_frac for own in described])
    first = described[0]
    counts: dict[str, Any] = {
        "num_rows": num_rows,
        "num_rows_train": sum(own.num_rows for own in described if own.split == Split.TRAIN),
        "num_rows_validation": sum(own.num_rows for own in described if own.split == Split.VALIDATION),
        "num_rows_above_norm_cap": sum(own.num_capped for own in described),
        "num_rows_left_out": dict(sum((Counter(own.left_out) for own in described), Counter())),
        "num_out_of_memory": sum(own.num_out_of_memory for own in described),
        "num_shards": len(described),
        "num_bytes": sum(own.num_bytes for own in described),
        "activation_dim": first.shape[1],
        "num_layers": first.num_layers,
        "kept_frac": num_rows / float(tokens.sum()),
        "real_token_frac": float(tokens.sum() / (tokens / fractions).sum()),
    }
    for m, name in enumerate(MODEL_NAMES):
        counts[f"plain_forward_difference_{name}"] = max(own.plain_forward_difference[m] for own in described)
        counts[f"commit_{name}"] = first.commits[m]
        counts[f"mean_norm_{name}"] = float(norms[:, m] @ weights / num_rows)
    return counts
