"""Someone else's crosscoder as an artifact of this run: loaded, held against the activations, published as our own.

After this step nothing knows where a crosscoder came from: it lies in the published layout under `crosscoder/`, and
every analysis reads it there. Models, width and scale are checked before anything is measured. That it was trained on
this very pair and layer cannot be read from a file; the fraction of variance that it explains on some validation rows
tells, and is said in one line.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.analyses.fidelity import Fidelity
from pipeline.analyses.rows import analyse, document_slices, row_batch
from pipeline.checkpoints.layouts import PublishedCrosscoder
from pipeline.checkpoints.published import find_files, read_published
from pipeline.config.crosscoder import AdoptedCrosscoderSection
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import MODEL_NAMES, Split
from pipeline.stages.base import Context, Step
from pipeline.stages.encoded_rows import shard_rows
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.artifacts import Record, digest_of_path

VERSION = 1

_ROWS_LOOKED_AT = 2048
"""Rows behind the explained variance that is told at once; the analyses measure it on all validation rows."""


def run(steps: Sequence[Step], context: Context) -> None:
    """Adopt the crosscoders of `steps`, one after the other."""
    for step in steps:
        _adopt(step, context)


def identity_of(section: AdoptedCrosscoderSection) -> dict[str, Any]:
    """What a fingerprint says of an adopted crosscoder: the content of local files, the id and revision of the hub's.

    Raises InputError where the source looks like a path and holds no weights.
    """
    path = Path(section.source).expanduser()
    identity: dict[str, Any] = {"kind": section.kind, "activation_scale": section.activation_scale}
    if path.exists():
        try:
            files = find_files(path, revision=section.revision)
        except InputError as error:
            raise InputError(f"crosscoder {section.name!r}: source: {error}") from error
        return identity | {"source": [f"sha256:{digest_of_path(file)}" for file in files if file is not None]}
    if section.source.startswith(("/", ".", "~")):
        raise InputError(
            f"crosscoder {section.name!r}: source: expected a hub id, an existing folder or a weights file, got "
            f"{section.source!r}; correct the path"
        )
    return identity | {"source": section.source, "revision": section.revision}


def _adopt(step: Step, context: Context) -> None:
    started = time.monotonic()
    section = step.section
    assert isinstance(section, AdoptedCrosscoderSection)
    activations = context.record_of(step.inputs["activations"])
    store = ActivationStore(context.storage, step.inputs["activations"].key.folder)
    crosscoder, scale = load(section, activations)
    fve = _explained(crosscoder, store)
    if not fve > 0:
        context.reporter.message(
            f"{step.name}: explains {fve:.0%} of the variance on {_ROWS_LOOKED_AT} validation rows, less than the mean "
            f"row would: it belongs to another layer, pair or scale than activations.layer = "
            f"{activations.identity['section']['layer']}"
        )
    with tempfile.TemporaryDirectory(prefix="crossray-model-") as folder:
        crosscoder.save_pretrained(folder)
        context.storage.upload_folder(Path(folder), step.key.folder)
    counts = {
        "num_latents": crosscoder.num_latents,
        "activation_dim": crosscoder.activation_dim,
        "sparsity": crosscoder.sparsity.kind,
        "source": section.source,
        "fve_first_rows": fve,
        **{f"activation_scale_{name}": value for name, value in zip(MODEL_NAMES, scale or (), strict=False)},
    }
    context.finish(step, counts, time.monotonic() - started)


def load(section: AdoptedCrosscoderSection, activations: Record) -> tuple[Crosscoder, tuple[float, ...] | None]:
    """The crosscoder, and the activations' scales where they were given or measured; InputError where it does not fit.

    `activations` is the record of the rows that it will read.
    """
    width, scale = activations.counts["activation_dim"], section.activation_scale
    checkpoint = read(section, width)
    if checkpoint.is_scale_unknown:
        base, chat = (width**0.5 / activations.counts[f"mean_norm_{name}"] for name in MODEL_NAMES)
        scale = (base, chat)
        checkpoint = read(section.model_copy(update={"activation_scale": scale}), width)
    return Crosscoder.from_checkpoint(checkpoint), scale


def read(section: AdoptedCrosscoderSection, activation_dim: int) -> PublishedCrosscoder:
    """The checkpoint that is asked for; InputError where it cannot be read, or is not of two models of this width."""
    path = Path(section.source).expanduser()
    where = f"crosscoder {section.name!r}: source"
    try:
        checkpoint = read_published(
            path if path.exists() else section.source,
            revision=section.revision,
            activation_scale=section.activation_scale,
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if (checkpoint.num_models, checkpoint.activation_dim) != (len(MODEL_NAMES), activation_dim):
        raise InputError(
            f"{where}: expected a crosscoder of M = {len(MODEL_NAMES)} models and width D = {activation_dim}, as the "
            f"activations are, got M = {checkpoint.num_models} and D = {checkpoint.activation_dim} in "
            f"{section.source}; it was made for another pair: correct `models`, or adopt another crosscoder"
        )
    return checkpoint


def _explained(crosscoder: Crosscoder, store: ActivationStore) -> float:
    """Fraction of variance explained on the first validation rows, both models together."""
    shard = store.manifest.of_split(Split.VALIDATION)[0]
    rows = shard_rows(store, shard)
    part = document_slices(rows["doc_id"], max_rows=_ROWS_LOOKED_AT)[0]
    fidelity = Fidelity(activation_dim=crosscoder.activation_dim, num_latents=crosscoder.num_latents)
    batch = row_batch(crosscoder, {name: value[part] for name, value in rows.items()})
    return fidelity.table(analyse({"fidelity": fidelity}, [batch])["fidelity"])["fve"]
