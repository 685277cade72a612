"""A folder that runs the explorer over one crosscoder of a run, as a Space of the hub or on any machine.

It carries this package's code, so that no index has to have it, and of the run what the explorer reads: tables,
weights, as many validation rows as its sample takes, and records. The models are not in it. Where both are on the hub,
the Space loads them if it is told to; else no text is read and nothing is steered.
"""

import dataclasses
import json
import re
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from pipeline.cluster.job_package import pack_code
from pipeline.explorer.sample import MAX_ROWS
from pipeline.exports.card import models_of
from pipeline.exports.markdown import front_matter, plain
from pipeline.library.runs import Run
from pipeline.schema import MODEL_NAMES, Split
from pipeline.storage.activation_store import MANIFEST_NAME, ActivationStore
from pipeline.storage.artifacts import RECORD_NAME
from pipeline.storage.filesystem import Storage

GRADIO_VERSION = "6.31.0"
"""The one that the Space gets: the explorer is tested with it."""
MODELS_VARIABLE = "CROSSRAY_SPACE_MODELS"
_UNREAD = ("corpus", "tokens", "organism")
"""Stages of which the record alone travels."""
_UNUSED = frozenset(
    {"ray", "mlflow", "sqlalchemy", "psutil", "openai", "vl-convert-python", "shtab", "s3fs", "botocore", "aiohttp"}
    | {"requests", "altair"}
)
"""Requirements of the package that the explorer over a local folder does without."""
_ROW_SETTINGS = ("drop_bos", "drop_first_tokens", "norm_cap", "rows")
_APP = '''"""The explorer of crossray over one finished run."""

import os
from pathlib import Path

import crossray

run = crossray.open(Path(__file__).resolve().parent / "runs", {name!r})
pair = None
{models}is_space = "SPACE_ID" in os.environ
explorer = crossray.explore(
    run,
    pair=pair,
    host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0" if is_space else "127.0.0.1"),
    port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
    without_token=is_space,  # a Space decides who sees it; with the secret CROSSRAY_EXPLORE_TOKEN it asks for that
)
print(explorer.url, f"token {{explorer.made_token}}" if explorer.made_token else "", flush=True)
explorer.wait()
'''
_MODELS = """if os.environ.get({variable!r}) == "1":
    base, chat = (crossray.ModelSpec(**spec) for spec in {specs!r})
    pair = crossray.load_pair(base, chat, layer={layer}, **{rows!r})
"""


def write_space(run: Run, crosscoder: str, folder: Path) -> None:
    """Writes app.py, requirements.txt, README.md, the code and the run's artifacts into a folder that is there."""
    for package in ("pipeline", "crossray"):
        pack_code(folder, package)
    storage = Storage(str(folder / "runs"))
    for role, artifact in run.artifacts().items():
        stage, _, owner = role.partition(" ")
        if owner not in ("", crosscoder):
            continue
        if stage == "activations":
            _copy_rows(run, artifact, storage)
        else:
            names = [RECORD_NAME] if stage in _UNREAD else run.storage.files(artifact)
            for name in names:
                storage.write_bytes(f"{artifact}/{name}", run.storage.read_bytes(f"{artifact}/{name}"))
    _write_report(run, crosscoder, storage)
    storage = Storage(str(folder))
    storage.write_bytes("app.py", _app(run).encode())
    storage.write_bytes("requirements.txt", requirements().encode())
    storage.write_bytes("README.md", _readme(run, crosscoder).encode())


def _copy_rows(run: Run, artifact: str, target: Storage) -> None:
    """The smallest validation shards that hold as many rows as the explorer's sample takes, and their manifest."""
    manifest = ActivationStore(run.storage, artifact).manifest
    kept, num_rows = [], 0
    for shard in sorted(manifest.of_split(Split.VALIDATION), key=lambda own: own.num_rows):
        if num_rows < MAX_ROWS:
            kept.append(shard)
            num_rows += shard.num_rows
    names = {shard.name for shard in kept}
    for name in names:
        target.write_bytes(f"{artifact}/{name}", run.storage.read_bytes(f"{artifact}/{name}"))
    own = dataclasses.replace(manifest, shards=tuple(shard for shard in manifest.shards if shard.name in names))
    target.write_json(f"{artifact}/{MANIFEST_NAME}", own.to_json())
    record = run.storage.read_json(f"{artifact}/{RECORD_NAME}")
    digest = target.digest(f"{artifact}/{MANIFEST_NAME}")[1]
    target.write_json(f"{artifact}/{RECORD_NAME}", {**record, "checksums": {MANIFEST_NAME: digest}})


def _write_report(run: Run, crosscoder: str, target: Storage) -> None:
    """The record by which the run is found, of this crosscoder alone, and the verdict; models by their shown names."""
    record = run.storage.read_json(f"{run.folder}/{RECORD_NAME}")
    base, chat = models_of(run)
    identity = record["identity"]
    inputs = {role: own for role, own in identity["inputs"].items() if role.partition(" ")[2] in ("", crosscoder)}
    section = {**identity["section"], "crosscoders": [crosscoder]}
    record["identity"] = {**identity, "section": section, "inputs": inputs}
    record["counts"] = {**record["counts"], "base": base, "chat": chat, "num_crosscoders": 1}
    record["checksums"] = {}
    target.write_bytes(f"{run.folder}/verdict.txt", run.verdict().encode())
    target.write_json(f"{run.folder}/{RECORD_NAME}", record)


def _app(run: Run) -> str:
    specs = [_spec(run, name) for name in MODEL_NAMES]
    section = run.settings()["activations"]
    models = ""
    if all(specs):
        rows = {name: section[name] for name in _ROW_SETTINGS if name in section}
        rows = json.loads(json.dumps(rows))  # lists and mappings alone
        models = _MODELS.format(variable=MODELS_VARIABLE, specs=specs, layer=run.origin.layer, rows=rows)
    return _APP.format(name=run.name, models=models)


def _spec(run: Run, member: str) -> dict[str, Any]:
    """Arguments of ModelSpec; empty for a model that is not on the hub as a whole."""
    identity = run.settings()["activations"]["models"][member]
    if not getattr(run.origin, member).name:
        return {}
    replaced = tuple(map(tuple, identity.get("token_replacements", ())))
    return {
        "source": identity["source"],
        "revision": identity.get("source_revision"),
        **({"token_replacements": replaced} if replaced else {}),
    }


def requirements() -> str:
    """Packages that the explorer needs, as the installed package declares them."""
    found = []
    for line in requires("crossray") or []:
        text, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", text)
        assert name is not None, line
        if (not marker or 'extra == "explore"' in marker) and name[0].lower() not in _UNUSED:
            found.append(text.strip())
    return "--extra-index-url https://download.pytorch.org/whl/cpu\n" + "\n".join(sorted(found)) + "\n"


def _readme(run: Run, crosscoder: str) -> str:
    base, chat = models_of(run)
    head = {
        "title": f"{crosscoder} of {run.name}"[:60],
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "python_version": "3.11",
        "app_file": "app.py",
        "pinned": False,
        "tags": ["crosscoder", "model-diffing", "interpretability"],
    }
    models = "The models are not in it: no text is read and nothing is steered."
    if all(_spec(run, name) for name in MODEL_NAMES):
        models = (
            f"With the variable `{MODELS_VARIABLE}` set to 1 it loads both models from the hub, so that texts can be "
            "read and answers be steered; the hardware must hold both. A GPU needs requirements.txt without its first "
            "line."
        )
    return f"""{front_matter(head)}
# What fine-tuning changed in {plain(chat)}

The explorer of crossray over the crosscoder {plain(crosscoder)} of {plain(base)} and {plain(chat)}, layer
{run.origin.layer}: latents with their verdict, evidence and contexts, and conditions to find them by.

{models}

Whoever sees this Space sees contexts of the texts on which the run was made. With the secret `CROSSRAY_EXPLORE_TOKEN`
(16 letters or more) it asks for that token. On any machine: `pip install -r requirements.txt`, then `python app.py`,
which listens on 127.0.0.1; with GRADIO_SERVER_NAME set to another interface it prints a token that it asks for.
"""
