"""Both models read every token once, up to layer L; the rows become shards of the activation store.

Which documents make up which shard is planned before anything runs, from the index of tokens alone. A worker call makes
one shard and publishes it under its final name together with a small description, the description last: a killed run
repeats at most the shards in work, and a shard that is made twice has the same bytes. Documents that cannot be run are
set aside, listed in a table beside the shards, and counted; more of them than allowed end the run.

In stream mode only the validation rows are stored, which the analyses read twice; the training rows are extracted while
crosscoders are fitted (stages.stream).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config.data import ActivationsSection
from pipeline.errors import InputError
from pipeline.numerics.moments import Moments
from pipeline.schema import MODEL_NAMES, Split
from pipeline.stages.base import Context, Pool, Step, run_pool, shown
from pipeline.stages.extractor import REJECTED_NAME, Extractor, check_rejected, write_rejected
from pipeline.stages.models import Loading
from pipeline.stages.tokens import INDEX_NAME
from pipeline.storage.activation_store import MANIFEST_NAME, Manifest, Shard, StoredMoments
from pipeline.storage.artifacts import Record
from pipeline.storage.filesystem import Storage
from pipeline.storage.shards import publish_shard, summarise
from pipeline.storage.tables import read_table
from pipeline.terminal import Progress

NAME = "activations"
VERSION = 3

_DESCRIPTION_SUFFIX = ".json"


def run(steps: Sequence[Step], context: Context) -> None:
    """Make the missing shards, then the manifest."""
    (step,) = steps
    section = step.section
    assert isinstance(section, ActivationsSection)
    started = time.monotonic()
    tokens = context.record_of(step.inputs["tokens"])
    tokens_folder = step.inputs["tokens"].key.folder
    index = read_table(context.storage, f"{tokens_folder}/{INDEX_NAME}")
    corpora = tuple(sorted(set(index["corpus"].to_pylist())))
    plan = plan_shards(index, section.rows_per_shard)
    if section.mode == "stream":
        plan = [item for item in plan if item["split"] == Split.VALIDATION]
    done = finished_shards(context.storage, step.key.folder)
    progress = Progress(NAME, sum(item["num_tokens"] for item in plan), "tokens")
    num_done = sum(item["num_tokens"] for item in plan if item["name"] in done)
    shown(context, progress, num_done, f"{len(done)} of {len(plan)} shards were there" if done else "")
    missing = [item for item in plan if item["name"] not in done]
    max_rejected = int(section.max_rejected_frac * sum(len(item["documents"]) for item in plan))
    rejected = [document for item in plan if item["name"] in done for document in done[item["name"]]["rejected"]]
    check_rejected(rejected, max_rejected)
    if missing:
        loading: Loading = step.extra["loading"]
        extractor = Extractor(
            context.storage,
            tokens_folder,
            section=section,
            loading=loading,
            corpora=corpora,
            max_rejected=max_rejected,
        )
        workers = context.resources.extraction
        arguments = (context.storage, step.key.folder, extractor)
        pool = Pool("extraction", workers, ExtractShard, arguments, uses_actors=True, min_workers=workers.min_workers)
        for result in run_pool(pool, missing):
            done[result["name"]] = result
            num_done += result["num_tokens"]
            rejected += result["rejected"]
            check_rejected(rejected, max_rejected)
            shown(context, progress, num_done, f"{len(rejected)} documents set aside" if rejected else "")
    write_rejected(context.storage, step.key.folder, rejected)
    described = _with_rows([done[item["name"]] for item in plan])
    _publish_manifest(step, context, described, corpora, tokens)
    counts = {**_counts(described), "num_rejected_documents": len(rejected)}
    context.finish(step, counts, time.monotonic() - started, files=[MANIFEST_NAME, REJECTED_NAME])


def _with_rows(described: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shards that hold rows; an InputError where a split has none."""
    for split in sorted({shard["split"] for shard in described}):
        if not any(shard["num_rows"] for shard in described if shard["split"] == split):
            raise InputError(
                f"activations: expected rows in the {split} split, got none of {len(described)} shards; add documents, "
                "or lower activations.drop_first_tokens"
            )
    return [shard for shard in described if shard["num_rows"]]


def plan_shards(index: pa.Table, rows_per_shard: int) -> list[dict[str, Any]]:
    """Which documents (rows of the index) go into which shard, per split, in the order of the index.

    Cut by tokens, an upper bound of rows: dropped rows make shards a little smaller, never larger than asked by more
    than one document.
    """
    splits = np.asarray(index["split"].to_pylist(), dtype=object)
    lengths = index["num_tokens"].to_numpy()
    plan: list[dict[str, Any]] = []
    for split in (Split.TRAIN, Split.VALIDATION):
        rows = np.flatnonzero(splits == split)
        if not len(rows):
            raise InputError(
                f"corpus.validation_frac: expected at least one {split} document, got none of {len(splits)}; "
                "add documents"
            )
        shard_of = (np.cumsum(lengths[rows]) - lengths[rows]) // rows_per_shard
        for number, shard in enumerate(np.unique(shard_of)):
            members = rows[shard_of == shard]
            plan.append(
                {
                    "name": f"{split}-{number:05d}.safetensors",
                    "split": split,
                    "documents": members.astype(np.int64),
                    "num_tokens": int(lengths[members].sum()),
                }
            )
    return plan


class ExtractShard:
    """Worker: one shard of the store per call."""

    def __init__(self, storage: Storage, folder: str, extractor: Extractor) -> None:
        self.storage, self.folder, self.extractor = storage, folder, extractor

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Publish the shard, then its description; return the description."""
        extracted = self.extractor(item["documents"])
        rows = extracted.rows
        key = f"{self.folder}/{item['name']}"
        summary = summarise(rows.x_BMD)
        file = publish_shard(self.storage, key, rows, self.extractor.section.compression)
        description = {
            "name": item["name"],
            "split": item["split"],
            "num_rows": len(rows.x_BMD),
            "num_documents": len(item["documents"]) - len(extracted.rejected),
            "num_bytes": file.num_bytes,
            "num_tokens": item["num_tokens"],
            "sha256": file.sha256,
            "real_token_frac": extracted.real_token_frac,
            "num_capped": extracted.num_capped,
            "num_out_of_memory": extracted.num_out_of_memory,
            "plain_forward_difference": list(self.extractor.verification.relative_difference),
            "commits": list(self.extractor.commits),
            "mean_norm": summary.mean_norm_M.tolist(),
            "shape": list(rows.x_BMD.shape[1:]),
            "num_layers": self.extractor.num_layers,
            "rejected": [dict(document) for document in extracted.rejected],
        }
        moments = asdict(StoredMoments.of(summary.moments))  # D numbers: the driver reads them when all is there
        self.storage.write_json(f"{key}{_DESCRIPTION_SUFFIX}", {**description, "moments": moments})
        return description


def finished_shards(storage: Storage, folder: str) -> dict[str, dict[str, Any]]:
    """Descriptions of the shards that a former run has published."""
    names = set(storage.files(folder))
    described = [name for name in names if name.endswith(f".safetensors{_DESCRIPTION_SUFFIX}")]
    found = ({**storage.read_json(f"{folder}/{name}"), "moments": None} for name in described)
    return {value["name"]: value for value in found if value["name"] in names}


def _publish_manifest(
    step: Step, context: Context, described: Sequence[Mapping[str, Any]], corpora: tuple[str, ...], tokens: Record
) -> None:
    fields = Shard.__dataclass_fields__
    assert isinstance(step.section, ActivationsSection)
    num_models, width = described[0]["shape"]
    manifest = Manifest(
        shards=tuple(Shard(**{name: value[name] for name in fields}) for value in described),
        num_models=num_models,
        activation_dim=width,
        corpora=corpora,
        labels=tuple(tokens.counts["labels"]),
        dialogue_corpora=tuple(corpora.index(name) for name in tokens.counts["dialogue_corpora"] if name in corpora),
        compression=step.section.compression,
        moments={
            split: _merged_moments(
                context.storage, step.key.folder, [v["name"] for v in described if v["split"] == split]
            )
            for split in sorted({value["split"] for value in described})
        },
    )
    context.storage.write_json(f"{step.key.folder}/{MANIFEST_NAME}", manifest.to_json())


def _merged_moments(storage: Storage, folder: str, names: Sequence[str]) -> StoredMoments:
    """Moments of all rows of these shards, merged in their order; one description is in memory at a time."""
    total: Moments | None = None
    for name in names:
        described = storage.read_json(f"{folder}/{name}{_DESCRIPTION_SUFFIX}")
        own = StoredMoments.from_json(described["moments"]).moments()
        total = own if total is None else total.merge(own)
    assert total is not None, "a split has at least one shard"
    return StoredMoments.of(total)


def _counts(described: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    num_rows = sum(value["num_rows"] for value in described)
    norms = np.asarray([value["mean_norm"] for value in described])
    weights = np.asarray([value["num_rows"] for value in described])
    tokens = np.asarray([value["num_tokens"] for value in described])
    fractions = np.asarray([value["real_token_frac"] for value in described])
    return {
        "num_rows": num_rows,
        "num_rows_train": sum(value["num_rows"] for value in described if value["split"] == Split.TRAIN),
        "num_rows_validation": sum(value["num_rows"] for value in described if value["split"] == Split.VALIDATION),
        "num_rows_above_norm_cap": sum(value["num_capped"] for value in described),
        "num_out_of_memory": sum(value["num_out_of_memory"] for value in described),
        "num_shards": len(described),
        "num_bytes": sum(value["num_bytes"] for value in described),
        "activation_dim": described[0]["shape"][1],
        "num_layers": described[0]["num_layers"],
        "kept_frac": num_rows / float(tokens.sum()),
        "real_token_frac": float(tokens.sum() / (tokens / fractions).sum()),
        **{
            f"plain_forward_difference_{name}": max(value["plain_forward_difference"][m] for value in described)
            for m, name in enumerate(MODEL_NAMES)
        },
        **{f"commit_{name}": described[0]["commits"][m] for m, name in enumerate(MODEL_NAMES)},
        **{f"mean_norm_{name}": float(norms[:, m] @ weights / num_rows) for m, name in enumerate(MODEL_NAMES)},
    }
