"""Both models read every token once, up to layer L; the rows become shards of the activation store.

Which documents make up which shard is planned before anything runs, from the index of tokens alone. A worker call makes
one shard and publishes it under its final name together with a small description, the description last: a killed run
repeats at most the shards in work, and a shard that is made twice has the same bytes.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts import Record
from pipeline.errors import InputError
from pipeline.operators.activations import ExtractRows, RowOptions
from pipeline.progress import Progress
from pipeline.schema import MODEL_NAMES, Split
from pipeline.sections.data import ActivationsSection
from pipeline.shards import Rows, publish_shard, require_finite, summarise
from pipeline.stages.base import Context, Pool, Step, run_pool, shown
from pipeline.stages.models import Loading, load_pair
from pipeline.stages.tables import read_table
from pipeline.stages.tokens import INDEX_NAME
from pipeline.storage import Storage
from pipeline.store import MANIFEST_NAME, Manifest, Shard, StoredMoments

NAME = "activations"
VERSION = 2

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
    done = _finished_shards(context.storage, step.key.folder)
    progress = Progress(NAME, sum(item["num_tokens"] for item in plan), "tokens")
    num_done = sum(item["num_tokens"] for item in plan if item["name"] in done)
    shown(context, progress, num_done, f"{len(done)} of {len(plan)} shards were there" if done else "")
    missing = [item for item in plan if item["name"] not in done]
    if missing:
        loading: Loading = step.extra["loading"]
        arguments = (context.storage, tokens_folder, step.key.folder, section, loading, corpora)
        pool = Pool("extraction", context.resources.extraction, ExtractShard, arguments, uses_actors=True)
        for result in run_pool(pool, missing):
            done[result["name"]] = result
            num_done += result["num_tokens"]
            shown(context, progress, num_done)
    described = [done[item["name"]] for item in plan]
    _publish_manifest(step, context, described, corpora, tokens)
    counts = _counts(described)
    context.finish(step, counts, time.monotonic() - started, files=[MANIFEST_NAME])


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
    """Worker: both models in one process, one shard per call."""

    def __init__(
        self,
        storage: Storage,
        tokens_folder: str,
        folder: str,
        section: ActivationsSection,
        loading: Loading,
        corpora: Sequence[str],
    ) -> None:
        self.storage, self.tokens_folder, self.folder, self.corpora = storage, tokens_folder, folder, corpora
        pair = load_pair(storage, loading, layer=section.layer, is_lower_only=True)
        options = RowOptions(
            tokens_per_batch=section.tokens_per_batch,
            drop_first_tokens=section.drop_first_tokens,
            drop_bos=section.drop_bos,
            norm_cap=section.norm_cap,
        )
        self.num_layers = pair.num_layers
        self.compression = section.compression
        self.extract = ExtractRows(pair, options)
        self.index = read_table(storage, f"{tokens_folder}/{INDEX_NAME}")

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Publish the shard, then its description; return the description."""
        documents = read_token_rows(self.storage, self.tokens_folder, self.index.take(item["documents"]))
        extracted = self.extract(documents)
        corpus_of = {
            doc_id: self.corpora.index(name)
            for doc_id, name in zip(documents["doc_id"], documents["corpus"], strict=True)
        }
        rows = Rows(
            x_BMD=extracted.x_BMD,
            token_id_B=extracted.token_id_B,
            doc_id_B=extracted.doc_id_B,
            position_B=extracted.position_B,
            flags_B=extracted.flags_B,
            corpus_B=_lookup(extracted.doc_id_B, corpus_of),
        )
        key = f"{self.folder}/{item['name']}"
        require_finite(rows, key)
        summary = summarise(rows.x_BMD)
        file = publish_shard(self.storage, key, rows, self.compression)
        description = {
            "name": item["name"],
            "split": item["split"],
            "num_rows": len(rows.x_BMD),
            "num_documents": len(documents["doc_id"]),
            "num_bytes": file.num_bytes,
            "num_tokens": item["num_tokens"],
            "sha256": file.sha256,
            "real_token_frac": extracted.real_token_frac,
            "num_capped": extracted.num_capped,
            "mean_norm": summary.mean_norm_M.tolist(),
            "moments": asdict(StoredMoments.of(summary.moments)),
            "shape": list(rows.x_BMD.shape[1:]),
            "num_layers": self.num_layers,
        }
        self.storage.write_json(f"{key}{_DESCRIPTION_SUFFIX}", description)
        return description


def read_token_rows(storage: Storage, tokens_folder: str, index: pa.Table) -> dict[str, list[Any]]:
    """Token rows of the indexed documents, in the order of the index; each part is read once."""
    parts = index["part"].to_pylist()
    numbers = index["row"].to_numpy()
    rows: dict[str, list[Any]] = {}
    for part in sorted(set(parts)):
        places = [place for place, name in enumerate(parts) if name == part]
        taken = read_table(storage, f"{tokens_folder}/{part}").take(numbers[places])
        for name in taken.column_names:
            column = taken[name]
            is_list = pa.types.is_list(column.type)
            values = [np.asarray(v.values, dtype=np.int32) for v in column] if is_list else column.to_pylist()
            target = rows.setdefault(name, [None] * len(parts))
            for place, value in zip(places, values, strict=True):
                target[place] = value
    return rows


def _lookup(doc_id_B: Any, corpus_of: Mapping[int, int]) -> Any:
    import torch

    return torch.tensor([corpus_of[doc_id] for doc_id in doc_id_B.tolist()], dtype=torch.int32)


def _finished_shards(storage: Storage, folder: str) -> dict[str, dict[str, Any]]:
    """Descriptions of the shards that a former run has published."""
    names = set(storage.files(folder))
    described = [name for name in names if name.endswith(f".safetensors{_DESCRIPTION_SUFFIX}")]
    found = [storage.read_json(f"{folder}/{name}") for name in described]
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
        moments={split: _merged_moments(described, split) for split in (Split.TRAIN, Split.VALIDATION)},
    )
    context.storage.write_json(f"{step.key.folder}/{MANIFEST_NAME}", manifest.to_json())


def _merged_moments(described: Sequence[Mapping[str, Any]], split: str) -> StoredMoments:
    """Moments of all rows of a split, merged in the order of its shards."""
    first, *others = (
        StoredMoments.from_json(value["moments"]).moments() for value in described if value["split"] == split
    )
    for other in others:
        first = first.merge(other)
    return StoredMoments.of(first)


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
        "num_shards": len(described),
        "num_bytes": sum(value["num_bytes"] for value in described),
        "activation_dim": described[0]["shape"][1],
        "num_layers": described[0]["num_layers"],
        "real_token_frac": float(tokens.sum() / (tokens / fractions).sum()),
        **{f"mean_norm_{name}": float(norms[:, m] @ weights / num_rows) for m, name in enumerate(MODEL_NAMES)},
    }
