"""The latent cache that EleutherAI's delphi reads (eai-delphi 0.1.3): where each latent fires in the validation texts.

    FOLDER/latents/layers.<L>/config.json         which model's tokenizer, how long the sequences are
    FOLDER/latents/layers.<L>/0_204.safetensors   latents 0 to 204: locations, activations, tokens

Codes are those of the crosscoder on the rows of both models. Documents follow each other as the models read them and
are cut into sequences of equal length, as delphi does itself. Codes go through files on the way, so that memory is
bounded by one range of latents.

N sequences, T tokens of each, F latents, P active pairs, B rows, K documents.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from pipeline.analyses.rows import document_slices, document_starts
from pipeline.checkpoints.export import replace_file, replace_text, sort_header
from pipeline.errors import InputError
from pipeline.exports.card import models_of
from pipeline.exports.markdown import plain
from pipeline.library.crosscoder import Crosscoder
from pipeline.library.runs import Run
from pipeline.schema import Split

FORMAT_VERSION = "0.1.3"
"""Of eai-delphi: the release that the files were checked with."""
NUM_TOKENS = 256
"""Of a sequence, as delphi's own."""
_NUM_SPLITS = 5
"""Files, as delphi's own; more where one would hold too many pairs."""
_MOST_PAIRS = 1 << 25
"""In one file, about: half a gigabyte of memory."""
_DENSE_NUMBERS = 1 << 24
"""In one batch of codes before most of them become 0."""
_PAIR = np.dtype([("place", np.int64), ("latent", np.int32), ("value", np.float32)])
"""A token of the joined texts on which a latent fires."""


class _Batch(NamedTuple):
    """The codes of some documents."""

    doc_id_K: np.ndarray
    pairs_P: np.ndarray
    """By place."""
    num_tokens: int
    """Of the documents, those without a row included."""


def write_delphi(run: Run, name: str, folder: Path) -> None:
    """Writes latents/ and README.md into a folder that is there."""
    crosscoder = run.crosscoder(name)
    index = _index(run)
    ends = _ends(run, name, crosscoder.num_latents)
    on_the_way, out = folder / ".pairs", folder / "latents" / f"layers.{run.origin.layer}"
    on_the_way.mkdir()
    out.mkdir(parents=True)
    documents: list[np.ndarray] = []
    with_pairs = [on_the_way / str(place) for place in range(len(ends) - 1)]
    num_tokens = 0
    for batch in _batches(run, crosscoder, index):
        documents.append(batch.doc_id_K)
        num_tokens += batch.num_tokens
        place_P = np.searchsorted(ends, batch.pairs_P["latent"], side="right") - 1
        for place, path in enumerate(with_pairs):
            with path.open("ab") as file:
                batch.pairs_P[place_P == place].tofile(file)
    if num_tokens < NUM_TOKENS:
        raise InputError(
            f"{run.name}: expected validation texts of at least {NUM_TOKENS} tokens, got {num_tokens}; delphi reads "
            "sequences of that length"
        )
    tokens_NT = _joined(run, index, np.concatenate(documents))
    for path, first, end in zip(with_pairs, ends[:-1], ends[1:], strict=True):
        pairs_P = np.fromfile(path, dtype=_PAIR) if path.exists() else np.zeros(0, dtype=_PAIR)
        _write_range(out / f"{first}_{end - 1}.safetensors", pairs_P, int(first), tokens_NT)
    shutil.rmtree(on_the_way)
    replace_text(out / "config.json", json.dumps(_config(run, tokens_NT, len(with_pairs)), indent=4) + "\n")
    replace_text(folder / "README.md", _readme(run, name, num_tokens, tokens_NT))


def _index(run: Run) -> pd.DataFrame:
    """Validation documents by doc_id: how long they are and where their tokens lie."""
    frame = run.table("tokens", file="index", columns=["doc_id", "split", "num_tokens", "part", "row"])
    return frame[frame["split"] == Split.VALIDATION].set_index("doc_id")


def _ends(run: Run, name: str, num_latents: int) -> np.ndarray:
    """Where the range of latents of each file begins, and where the last one ends."""
    fidelity = run.latents(name).attrs["fidelity"]
    wanted = max(_NUM_SPLITS, math.ceil(fidelity["l0"] * fidelity["num_rows"] / _MOST_PAIRS))
    return np.linspace(0, num_latents, min(wanted, num_latents) + 1).astype(np.int64)


@torch.no_grad()
def _batches(run: Run, crosscoder: Crosscoder, index: pd.DataFrame) -> Iterator[_Batch]:
    """The codes of all validation rows, in the order of the store."""
    store, begin = run.activation_store(), 0
    for shard in store.manifest.of_split(Split.VALIDATION):
        rows = store.read(shard)
        for part in document_slices(rows.doc_id_B, max_rows=max(1, _DENSE_NUMBERS // crosscoder.num_latents)):
            codes = crosscoder.encode(rows.x_BMD[part].float())
            doc_id_B, position_B = rows.doc_id_B[part].numpy(), rows.position_B[part].numpy()
            start_K = document_starts(rows.doc_id_B[part]).numpy()
            doc_id_K = doc_id_B[start_K]
            length_K = index.loc[doc_id_K, "num_tokens"].to_numpy(np.int64)
            begin_K = begin + np.cumsum(length_K) - length_K
            place_B = np.repeat(begin_K, np.diff(np.r_[start_K, len(doc_id_B)])) + position_B
            pairs_P = np.empty(len(codes.values_P), dtype=_PAIR)
            pairs_P["place"] = place_B[codes.rows_P().numpy()]
            pairs_P["latent"] = codes.latents_P.numpy()
            pairs_P["value"] = codes.values_P.numpy()
            begin += int(length_K.sum())
            yield _Batch(doc_id_K, pairs_P, int(length_K.sum()))


def _joined(run: Run, index: pd.DataFrame, doc_id_K: np.ndarray) -> np.ndarray:
    """Token ids of the documents one after the other, int32 [N, T]; what fills no sequence is left out."""
    own = index.loc[doc_id_K]
    length_K = own["num_tokens"].to_numpy(np.int64)
    begin_K = np.cumsum(length_K) - length_K
    joined = np.zeros(int(length_K.sum()), dtype=np.int32)
    parts = own["part"].to_numpy()
    for part in dict.fromkeys(parts):
        ids = run.table("tokens", file=part.removesuffix(".parquet"), columns=["input_ids"])["input_ids"]
        for place in np.flatnonzero(parts == part):
            begin = begin_K[place]
            joined[begin : begin + length_K[place]] = ids.iloc[own["row"].iloc[place]]
    num_sequences = len(joined) // NUM_TOKENS
    return joined[: num_sequences * NUM_TOKENS].reshape(num_sequences, NUM_TOKENS)


def _write_range(path: Path, pairs_P: np.ndarray, first: int, tokens_NT: np.ndarray) -> None:
    from safetensors.numpy import save_file

    pairs_P = pairs_P[pairs_P["place"] < tokens_NT.size]
    columns = (*np.divmod(pairs_P["place"], NUM_TOKENS), pairs_P["latent"] - first)
    locations = np.stack(columns, axis=1)
    is_small = not locations.size or locations.max() < 1 << 16
    tensors = {
        "locations": locations.astype(np.uint16 if is_small else np.uint32),
        "activations": np.ascontiguousarray(pairs_P["value"]),
        "tokens": tokens_NT,
    }

    def write(temporary: Path) -> None:
        save_file(tensors, str(temporary))
        sort_header(temporary)

    replace_file(path, write)


def _config(run: Run, tokens_NT: np.ndarray, num_splits: int) -> dict[str, object]:
    return {
        "dataset_repo": "",
        "dataset_split": Split.VALIDATION,
        "dataset_name": f"crossray run {run.name}",
        "dataset_column": "text",
        "batch_size": 1,
        "cache_ctx_len": NUM_TOKENS,
        "n_tokens": tokens_NT.size,
        "n_splits": num_splits,
        "model_name": run.origin.chat.name or models_of(run)[1],
    }


def _readme(run: Run, name: str, num_tokens: int, tokens_NT: np.ndarray) -> str:
    base, chat = models_of(run)
    named = (
        "`config.json` names the chat model, whose tokenizer made the ids."
        if run.origin.chat.name
        else "The chat model is not on the hub, so give its tokenizer: `LatentDataset(..., tokenizer=tokenizer)`."
    )
    return f"""# Latent cache for delphi

Where the latents of the crosscoder {plain(name)} of {plain(base)} and {plain(chat)}, layer {run.origin.layer}, fire in
the validation texts of the run {plain(run.name)}; written by crossray for eai-delphi {FORMAT_VERSION}.

```python
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.latents import LatentDataset

dataset = LatentDataset("FOLDER/latents", SamplerConfig(), ConstructorConfig())
```

{named}

- {tokens_NT.shape[0]:,} sequences of {NUM_TOKENS} tokens: the documents one after the other as both models read them.
  {num_tokens - tokens_NT.size} tokens at the end fill no sequence and are left out.
- Activations are the crosscoder's codes on the rows of both models, in float32. Tokens that are no rows of the run
  (such as BOS) count as places where nothing fires.
- delphi explains no latent with fewer than `min_examples` (200) windows; a small run needs a smaller number.
- It knows neither verdicts nor which model a latent belongs to; those are in the run's latent table.
"""
