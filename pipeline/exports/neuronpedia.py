"""Latents as Neuronpedia takes them in: bodies of its request `POST /api/feature/upload-batch` (as of August 2026).

    features/batch-0.json ...   at most 128 latents each: contexts, density, promoted tokens, explanations
    README.md                   how to make the source set and upload, and what the form leaves out

Latents are those of which the run keeps contexts; the request refuses a latent without one. Limits below are the
request's own.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.checkpoints.export import replace_text
from pipeline.errors import InputError
from pipeline.exports.card import models_of
from pipeline.exports.markdown import plain
from pipeline.library.runs import Run
from pipeline.schema import MODEL_NAMES

FORMAT_VERSION = 1
"""Of the folder's layout."""
MAX_FEATURES, MAX_TOKENS, MAX_LOGITS, MAX_EXPLANATION = 128, 1024, 20, 512
_CHAT = MODEL_NAMES[1]
_UNSAFE = re.compile("[\x00\ud800-\udfff]")
"""What its database cannot hold: NUL, and halves of a letter."""


def write_neuronpedia(run: Run, name: str, folder: Path, *, model: str | None = None) -> None:
    """Writes features/ and README.md into a folder that is there.

    model: whose name and whose promoted tokens are given; the chat model's by default.
    """
    member = model or _CHAT
    examples = run.table("examples", name)
    if examples.empty:
        raise InputError(f"{run.name}: expected contexts of latents of {name}, got none; see analyses.examples")
    model_id, source = _ids(run, name, member)
    (folder / "features").mkdir()
    number, written = 0, 0
    for features in _batches(run, name, examples, member):
        body = {"modelId": model_id, "source": source, "features": features}
        replace_text(folder / "features" / f"batch-{number}.json", json.dumps(body, allow_nan=False) + "\n")
        number, written = number + 1, written + len(features)
    replace_text(folder / "README.md", _readme(run, name, member, written))


def _ids(run: Run, name: str, member: str) -> tuple[str, str]:
    """Ids of the model and of the source, in the letters that Neuronpedia allows."""
    own = getattr(run.origin, member).name or models_of(run)[MODEL_NAMES.index(member)]
    model_id = _slug(own.rpartition("/")[2], "_") or member
    return model_id, f"{run.origin.layer}-{_slug(f'crossray-{run.name}-{name}')}"


def _slug(text: str, also: str = "") -> str:
    return re.sub(rf"[^a-z0-9{also}]+", "-", text.lower()).strip("-")[:64]


def _batches(run: Run, name: str, examples: pd.DataFrame, member: str) -> Iterator[list[dict[str, Any]]]:
    density = run.table("latents", name, columns=["latent", "frequency"]).set_index("latent")["frequency"]
    logits = _by_latent(run, "logit_lens", name, ("member", member))
    explained = _by_latent(run, "autointerp", name, None)
    features: list[dict[str, Any]] = []
    for latent, own in examples.sort_values(["latent", "rank"], kind="stable").groupby("latent"):
        index = int(str(latent))
        features.append(
            {
                "index": index,
                "density": float(density[index]),
                **_logits(logits.get(index)),
                "explanations": _explanations(explained.get(index)),
                "activations": [_context(row["tokens"], row["activations"]) for row in own.to_dict("records")],
            }
        )
        if len(features) == MAX_FEATURES:
            yield features
            features = []
    if features:
        yield features


def _by_latent(run: Run, stage: str, name: str, where: tuple[str, Any] | None) -> dict[int, Mapping[Any, Any]]:
    """Rows of a table by latent; empty where its analysis was off."""
    if not run.has(stage, name):
        return {}
    return {int(row["latent"]): row for row in run.table(stage, name, where=where).to_dict("records")}


def _logits(row: Mapping[Any, Any] | None) -> dict[str, Any]:
    """The tokens that the latent's decoder row promotes and suppresses in one model."""
    if row is None:
        return {"topLogits": None, "bottomLogits": None}
    return {
        field: [
            {"token": _text(token), "value": float(value)}
            for token, value in zip(row[side][:MAX_LOGITS], row[f"{side}_logits"][:MAX_LOGITS], strict=True)
        ]
        for field, side in (("topLogits", "promoted"), ("bottomLogits", "suppressed"))
    }


def _explanations(row: Mapping[Any, Any] | None) -> list[dict[str, Any]]:
    """Without a method and a model: Neuronpedia takes only those that it knows."""
    text = None if row is None else row["explanation"]
    if not isinstance(text, str) or not text.strip():
        return []
    text = _text(text.strip())
    return [{"text": text if len(text) <= MAX_EXPLANATION else f"{text[: MAX_EXPLANATION - 3]}..."}]


def _context(tokens: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    """One context; a long one is cut around its strongest token."""
    strongest = max(range(len(values)), key=lambda place: values[place])
    begin = max(0, min(strongest - MAX_TOKENS // 2, len(tokens) - MAX_TOKENS))
    kept = slice(begin, begin + MAX_TOKENS)
    return {"tokens": [_text(token) for token in tokens[kept]], "values": [float(value) for value in values[kept]]}


def _text(text: str) -> str:
    """A text that is not empty and that its database can hold."""
    return _UNSAFE.sub("\ufffd", text) or "\ufffd"


def _readme(run: Run, name: str, member: str, num_latents: int) -> str:
    base, chat = models_of(run)
    model_id, source = _ids(run, name, member)
    layer, _, set_name = source.partition("-")
    return f"""# Latents for Neuronpedia

{num_latents:,} latents of the crosscoder {plain(name)} of {plain(base)} and {plain(chat)}, layer {run.origin.layer}, of
the run {plain(run.name)}, written by crossray (layout {FORMAT_VERSION}). Each file in `features/` is the body of one
request `POST /api/feature/upload-batch` of Neuronpedia.

The model `{model_id}` and the source set `{set_name}` must be there first and be yours. With the package `neuronpedia`:

```python
from neuronpedia.np_source_set import SourceSet

SourceSet.new(model_id="{model_id}", name="{set_name}")  # makes the source {source}, layer {layer}
```

Then, with your key in NEURONPEDIA_API_KEY:

```sh
for file in features/batch-*.json; do
  curl --fail -X POST https://www.neuronpedia.org/api/feature/upload-batch \\
    -H "x-api-key: $NEURONPEDIA_API_KEY" -H "Content-Type: application/json" --data @"$file"
done
```

To use other names, change `modelId` and `source` in the files.

- Latents of which the run keeps no context are left out: the request refuses them. `analyses.examples` says which are
  kept.
- Activations are the crosscoder's codes on the rows of both models. Neuronpedia knows one model, here the {member}
  model: its id, and the tokens that the latent promotes and suppresses in it.
- Neither verdicts and their evidence nor decoder rows have a place there, so it cannot steer with these latents.
- Empty tokens, NUL and half letters are written as U+FFFD; explanations are cut at {MAX_EXPLANATION} letters.
"""
