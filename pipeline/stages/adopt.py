"""Someone else's crosscoder as an artifact of this run: loaded, compared with the activations, published as our own.

Afterwards the crosscoder is a folder in the published layout, like one that was fitted, and every analysis reads it
there. Models, width and scale are checked before anything is measured. Whether it was trained on this pair and
layer cannot be read from a file: the user is warned where it explains no variance of some validation rows.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.analyses.fidelity import Fidelity
from pipeline.analyses.rows import analyse, document_slices, row_batch
from pipeline.checkpoints.layouts import PublishedCrosscoder
from pipeline.checkpoints.published import read_published
from pipeline.config.crosscoder import AdoptedCrosscoderSection
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import MODEL_NAMES, Split
from pipeline.stages.catalogue import AdoptedCrosscoderInputs
from pipeline.stages.row_pass import shard_rows
from pipeline.stages.step import StageContext, Step
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.artifacts import Record

_NUM_CHECKED_ROWS = 2048
"""Rows behind the first explained variance; the analyses measure it on all validation rows."""


def run(steps: Sequence[Step[AdoptedCrosscoderInputs]], context: StageContext) -> None:
    """Adopt the crosscoders of `steps`, one after the other."""
    for step in steps:
        _adopt(step, context)


def _adopt(step: Step[AdoptedCrosscoderInputs], context: StageContext) -> None:
    started = time.monotonic()
    section, activations = step.inputs.section, step.inputs.activations
    crosscoder, scale = load(section, context.record_of(activations))
    fve = first_rows_fve(crosscoder, ActivationStore(context.storage, activations.folder))
    if not fve > 0:
        context.reporter.message(
            f"{step.name}: explains {fve:.0%} of the variance on {_NUM_CHECKED_ROWS} validation rows, less than the "
            "mean row would: it belongs to another layer, pair or scale than activations.layer = "
            f"{activations.inputs.section.layer}"
        )
    with tempfile.TemporaryDirectory(prefix="crossray-model-") as folder:
        crosscoder.save_pretrained(folder)
        context.storage.upload_folder(Path(folder), step.folder)
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
    checkpoint = read_checkpoint(section, width)
    if checkpoint.is_scale_unknown:
        base, chat = (width**0.5 / activations.counts[f"mean_norm_{name}"] for name in MODEL_NAMES)
        scale = (base, chat)
        checkpoint = read_checkpoint(section.model_copy(update={"activation_scale": scale}), width)
    return Crosscoder.from_checkpoint(checkpoint), scale


def read_checkpoint(section: AdoptedCrosscoderSection, activation_dim: int) -> PublishedCrosscoder:
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


def first_rows_fve(crosscoder: Crosscoder, store: ActivationStore) -> float:
    """Fraction of variance explained on the first validation rows, both models together."""
    shard = store.manifest.of_split(Split.VALIDATION)[0]
    rows = shard_rows(store, shard)
    part = document_slices(rows["doc_id"], max_rows=_NUM_CHECKED_ROWS)[0]
    fidelity = Fidelity(activation_dim=crosscoder.activation_dim, num_latents=crosscoder.num_latents)
    batch = row_batch(crosscoder, {name: value[part] for name, value in rows.items()})
    return fidelity.table(analyse({"fidelity": fidelity}, [batch])["fidelity"])["fve"]
