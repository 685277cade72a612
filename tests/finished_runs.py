"""A finished run made by hand in seconds, without Ray: records and tables as the stages write them."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from fabricated_models import SENTENCES

from pipeline.library.crosscoder import Crosscoder
from pipeline.library.pair import Pair
from pipeline.library.rows import Rows
from pipeline.library.tables import latents as latent_table
from pipeline.library.texts import Text, tokenised
from pipeline.schema import Split
from pipeline.stages.tokens import INDEX_NAME, INDEX_SCHEMA
from pipeline.storage.activation_store import MANIFEST_NAME, Manifest, Shard, StoredMoments
from pipeline.storage.artifacts import ArtifactKey, artifact_key, write_record
from pipeline.storage.filesystem import Storage
from pipeline.storage.shards import publish_shard
from pipeline.storage.tables import TOKEN_SCHEMA, write_table

PART = "part-00000-00000.parquet"
TEXTS = [f"{first} {second} {number}" for number in range(4) for first in SENTENCES for second in SENTENCES[:3]]
HOSTILE = "<script>alert(1)</script> | [x](http://evil) `y` \u202egnp\n# title\n---\nkey: !!python/object"
"""A name that no run file allows, but a record may hold."""
MODELS = {"base": {"source": "organisation/base"}, "chat": {"source": "organisation/chat"}}


class Fabricated:
    """Writes the artifacts of one run, one after the other; the report's record comes last."""

    def __init__(self, root: str, pair: Pair, name: str = "made", models: Mapping[str, Any] = MODELS) -> None:
        self.storage, self.pair, self.name, self.models = Storage(root), pair, name, models
        self.inputs: dict[str, str] = {}

    def begin(self, role: str, section: Mapping[str, Any]) -> ArtifactKey:
        """Where an artifact goes, before its files are written."""
        return artifact_key(role.partition(" ")[0], 1, section, self.inputs)

    def finish(self, role: str, key: ArtifactKey, **counts: Any) -> None:
        """Its record."""
        write_record(self.storage, key, name=role, counts=counts, seconds=0.0, run_name=self.name)
        self.inputs[role] = key.fingerprint

    def add(self, role: str, section: Mapping[str, Any], files: Mapping[str, Any], **counts: Any) -> None:
        """One artifact; files are tables, bytes, or values for JSON."""
        key = self.begin(role, section)
        for name, content in files.items():
            target = f"{key.folder}/{name}"
            if isinstance(content, pd.DataFrame):
                buffer = io.BytesIO()
                content.to_parquet(buffer)
                self.storage.write_bytes(target, buffer.getvalue())
            elif isinstance(content, bytes):
                self.storage.write_bytes(target, content)
            else:
                self.storage.write_json(target, content)
        self.finish(role, key, **counts)

    def rows(self, texts: list[Text], rows: Rows, *, num_train: int) -> None:
        """Corpus, tokens, and the store; the first documents are training's."""
        sources = [{"kind": "jsonl", "name": name, "paths": ["sha256:0"]} for name in rows.corpora]
        self.add("corpus", {"sources": sources, "validation_frac": 0.1}, {})
        documents = tokenised(self.pair.tokenise, texts)
        number = len(documents["doc_id"])
        documents["split"] = [Split.TRAIN if place < num_train else Split.VALIDATION for place in range(number)]
        index = {name: documents[name] for name in ("doc_id", "corpus", "split")}
        index |= {"num_tokens": [len(ids) for ids in documents["input_ids"]], "num_history": [0] * number}
        index |= {"part": [PART] * number, "row": list(range(number))}
        key = self.begin("tokens", {"models": self.models})
        write_table(self.storage, f"{key.folder}/{PART}", documents, TOKEN_SCHEMA)
        write_table(self.storage, f"{key.folder}/{INDEX_NAME}", index, INDEX_SCHEMA)
        self.finish("tokens", key, num_documents=number)
        key = self.begin("activations", {"layer": self.pair.layer, "models": self.models, "dtype": "float32"})
        is_train = torch.isin(rows.data.doc_id_B, torch.tensor(documents["doc_id"][:num_train]))
        shards, moments = [], {}
        for split, is_own in ((Split.TRAIN, is_train), (Split.VALIDATION, ~is_train)):
            part, name = rows._of(is_own), f"{split}-00000.safetensors"
            published = publish_shard(self.storage, f"{key.folder}/{name}", part.data)
            shards.append(Shard(name, split, len(part), part.num_documents, *published))
            moments[split] = StoredMoments.of(part.moments())
        sizes = (rows.num_models, rows.activation_dim, rows.corpora, (), rows.dialogue_corpora)
        manifest = Manifest(tuple(shards), *sizes, moments=moments)
        self.storage.write_json(f"{key.folder}/{MANIFEST_NAME}", manifest.to_json())
        self.finish("activations", key, num_layers=self.pair.models.num_layers)

    def crosscoder(self, name: str, crosscoder: Crosscoder, rows: Rows, folder: Path, **sections: Any) -> None:
        """A crosscoder with its tables; `folder` is for its files on the way."""
        plain = Crosscoder.of(crosscoder, None)
        plain.save_pretrained(folder)
        files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.add(f"crosscoder {name}", {"sparsity": {"kind": "batch_topk", "k": crosscoder.k}, **sections}, files)
        table = latent_table(crosscoder, rows, num_resamples=100)
        fidelity = table.attrs["fidelity"]
        table.attrs = {}
        self.add(f"latents {name}", {"rule": "evidence"}, {"latents.parquet": table, "fidelity.json": fidelity})
        alive = [int(one) for one in table.loc[table["frequency"] > 0, "latent"][:6]]
        examples = crosscoder.examples(rows, alive, num_contexts=3, window_tokens=4)
        self.add(f"examples {name}", {"num_contexts": 3, "window_tokens": 4}, {"examples.parquet": examples})
        lens = self.pair.logit_lens(crosscoder, alive, num_tokens=4)
        self.add(f"logit_lens {name}", {"num_tokens": 4}, {"logit_lens.parquet": lens})

    def report(self, crosscoders: list[str], labels: tuple[str, str]) -> None:
        """The report, by which the run is found."""
        section = {"name": self.name, "crosscoders": crosscoders}
        key = artifact_key("report", 1, section, self.inputs)
        self.storage.write_bytes(f"{key.folder}/verdict.txt", b"verdict")
        self.storage.write_bytes(f"{key.folder}/report.html", b"<p>report</p>")
        counts = {"base": labels[0], "chat": labels[1]}
        write_record(self.storage, key, name="report", counts=counts, seconds=0.0, run_name=self.name)
