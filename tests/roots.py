"""A small storage root made by hand: tokens of six documents and a store of their activations, to be damaged."""

from pathlib import Path

import numpy as np
import torch

from pipeline.run.verify import Verified, verify
from pipeline.schema import Flag
from pipeline.stages.tokens import INDEX_NAME, INDEX_SCHEMA
from pipeline.storage.activation_store import MANIFEST_NAME, Manifest, Shard
from pipeline.storage.artifacts import ArtifactKey, all_folders, artifact_key, write_record
from pipeline.storage.filesystem import Storage
from pipeline.storage.shards import Rows, publish_shard
from pipeline.storage.tables import TOKEN_SCHEMA, write_table
from pipeline.terminal import SilentReporter

LENGTHS = {11: 5, 12: 9, 13: 1, 14: 6, 15: 8, 16: 4}
SPLITS = {doc_id: "validation" if doc_id > 14 else "train" for doc_id in LENGTHS}
SHARDS = {"train-00000.safetensors": (11, 12, 13), "train-00001.safetensors": (14,), "validation.safetensors": (15, 16)}


def token_ids(doc_id: int) -> np.ndarray:
    return np.arange(LENGTHS[doc_id], dtype=np.int32) + 100 * doc_id


def rows_of(*doc_ids: int) -> Rows:
    """The rows of whole documents without their first token, which is BOS."""
    ids = [torch.from_numpy(token_ids(doc_id)[1:]) for doc_id in doc_ids]
    positions = [torch.arange(1, LENGTHS[doc_id], dtype=torch.int32) for doc_id in doc_ids]
    num_rows = sum(map(len, ids))
    return Rows(
        x_BMD=torch.ones(num_rows, 2, 3, dtype=torch.bfloat16),
        token_id_B=torch.cat(ids),
        doc_id_B=torch.cat([torch.full((len(own),), doc_id) for doc_id, own in zip(doc_ids, ids, strict=True)]),
        position_B=torch.cat(positions),
        flags_B=torch.zeros(num_rows, dtype=torch.int32),
        corpus_B=torch.zeros(num_rows, dtype=torch.int32),
    )


class Root:
    """A storage root with tokens in two parts, and a store of their activations."""

    def __init__(self, storage: Storage, kind: str = "none") -> None:
        self.storage = storage
        tokens = artifact_key("tokens", 1, {"max_tokens_per_document": 10}, {})
        for part, doc_ids in (("part-0.parquet", (11, 13, 15)), ("part-1.parquet", (12, 14, 16))):
            flags = [np.r_[int(Flag.BOS), np.zeros(LENGTHS[doc_id] - 1)].astype(np.int32) for doc_id in doc_ids]
            columns = {
                "doc_id": doc_ids,
                "corpus": ["web"] * 3,
                "split": [SPLITS[doc_id] for doc_id in doc_ids],
                "input_ids": [token_ids(doc_id) for doc_id in doc_ids],
                "flags": flags,
                "num_cut": [0] * 3,
            }
            write_table(storage, f"{tokens.folder}/{part}", columns, TOKEN_SCHEMA)
        index = {
            "doc_id": list(LENGTHS),
            "corpus": ["web"] * 6,
            "split": list(SPLITS.values()),
            "num_tokens": list(LENGTHS.values()),
            "num_history": [0] * 6,
            "part": ["part-0.parquet", "part-1.parquet"] * 3,
            "row": [0, 0, 1, 1, 2, 2],
        }
        write_table(storage, f"{tokens.folder}/{INDEX_NAME}", index, INDEX_SCHEMA)
        write_record(storage, tokens, name="tokens", counts={}, seconds=1.0, run_name="r")
        section = {"layer": 1, "drop_first_tokens": 0, "drop_bos": True}
        self.tokens = tokens
        self.activations = artifact_key("activations", 1, section, {"tokens": tokens.fingerprint})
        self.kind = kind
        self.publish({name: rows_of(*doc_ids) for name, doc_ids in SHARDS.items()})

    def publish(self, shards: dict[str, Rows], **counts: int) -> None:
        """A store of these shards, as if extraction had made them."""
        folder = self.activations.folder
        described = []
        for name, rows in shards.items():
            file = publish_shard(self.storage, f"{folder}/{name}", rows, self.kind)
            described.append(Shard(name, name.split("-")[0].split(".")[0], len(rows.x_BMD), 1, *file))
        manifest = Manifest(tuple(described), 2, 3, ("web",), (), (), self.kind)
        self.storage.write_json(f"{folder}/{MANIFEST_NAME}", manifest.to_json())
        self.finish(self.activations, [MANIFEST_NAME], **counts)

    def finish(self, key: ArtifactKey, files: list[str] | None, **counts: int) -> None:
        write_record(self.storage, key, name=key.stage, counts=counts, seconds=1.0, run_name="r", files=files)

    def path(self, name: str) -> Path:
        return Path(self.storage.url(f"{self.activations.folder}/{name}"))

    def verify(self) -> Verified:
        return verify(self.storage, all_folders(self.storage), SilentReporter())

    def only_fault(self) -> str:
        (fault,) = self.verify().faults
        return f"{fault.where}: {fault.what}"
