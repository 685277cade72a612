"""Someone else's crosscoder as an artifact of this run: loaded, compared with the activations, published as our own.

Afterwards the crosscoder is a folder in the published layout, like one that was fitted, and every analysis reads it
there. Models, width and scale are checked before anything is measured. Where it was trained on another layer or model
the user is warned: by the settings that were published with it, and by its L0 and explained variance on some validation
rows.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.analyses.fidelity import Fidelity
from pipeline.analyses.rows import analyse, document_slices, row_batch
from pipeline.checkpoints.layouts import PublishedCrosscoder
from pipeline.checkpoints.published import read_published
from pipeline.config.crosscoder import AdoptedCrosscoderSection
from pipeline.config.data import HubModel
from pipeline.errors import InputError
from pipeline.models.files import existing_path
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import MODEL_NAMES, Split
from pipeline.stages.catalogue import ActivationsInputs, AdoptedCrosscoderInputs
from pipeline.stages.row_pass import shard_rows
from pipeline.stages.step import StageContext, Step
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.artifacts import Record

_NUM_CHECKED_ROWS = 2048
"""Rows behind the first explained variance; the analyses measure it on all validation rows."""
_MIN_FVE, _MAX_L0_RATIO = 0.5, 1.3
"""Below the one, or further from k than the other, an adopted crosscoder does not fit the rows: read one layer early, a
demo crosscoder fell from an FVE of 0.95 and an L0 of 16.1 to 0.74 and 27.7."""


def run(steps: Sequence[Step[AdoptedCrosscoderInputs]], context: StageContext) -> None:
    """Adopt the crosscoders of `steps`, one after the other."""
    for step in steps:
        _adopt(step, context)


def _adopt(step: Step[AdoptedCrosscoderInputs], context: StageContext) -> None:
    started = time.monotonic()
    section, activations = step.inputs.section, step.inputs.activations
    checkpoint, scale = load_checkpoint(section, context.record_of(activations))
    crosscoder = Crosscoder.from_checkpoint(checkpoint)
    found = first_rows_fidelity(crosscoder, ActivationStore(context.storage, activations.folder))
    for line in (
        settings_mismatch(checkpoint.settings.get("trainer"), activations.inputs),
        fidelity_mismatch(found, checkpoint.k, layer=activations.inputs.section.layer_number),
    ):
        if line:
            context.reporter.message(f"{step.name}: {line}")
    with tempfile.TemporaryDirectory(prefix="crossray-model-") as folder:
        crosscoder.save_pretrained(folder)
        context.storage.upload_folder(Path(folder), step.folder)
    counts = {
        "num_latents": crosscoder.num_latents,
        "activation_dim": crosscoder.activation_dim,
        "sparsity": crosscoder.sparsity.kind,
        "source": section.source,
        "fve_first_rows": found["fve"],
        "l0_first_rows": found["l0"],
        **{f"activation_scale_{name}": value for name, value in zip(MODEL_NAMES, scale or (), strict=False)},
    }
    context.finish(step, counts, time.monotonic() - started)


def load(section: AdoptedCrosscoderSection, activations: Record) -> tuple[Crosscoder, tuple[float, ...] | None]:
    """The crosscoder and the scales of `load_checkpoint`."""
    checkpoint, scale = load_checkpoint(section, activations)
    return Crosscoder.from_checkpoint(checkpoint), scale


def load_checkpoint(
    section: AdoptedCrosscoderSection, activations: Record
) -> tuple[PublishedCrosscoder, tuple[float, ...] | None]:
    """The checkpoint, and the activations' scales where they were given or measured; InputError where it does not fit.

    `activations` is the record of the rows that it will read.
    """
    width, scale = activations.counts["activation_dim"], section.activation_scale
    checkpoint = read_checkpoint(section, width)
    if checkpoint.is_scale_unknown:
        base, chat = (width**0.5 / activations.counts[f"mean_norm_{name}"] for name in MODEL_NAMES)
        scale = (base, chat)
        checkpoint = read_checkpoint(section.model_copy(update={"activation_scale": scale}), width)
    return checkpoint, scale


def read_checkpoint(section: AdoptedCrosscoderSection, activation_dim: int) -> PublishedCrosscoder:
    """The checkpoint that is asked for; InputError where it cannot be read, or is not of two models of this width."""
    path = existing_path(section.source)
    where = f"crosscoder {section.name!r}: source"
    try:
        checkpoint = read_published(
            section.source if path is None else path,
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


def settings_mismatch(trainer: Any, activations: ActivationsInputs) -> str:
    """Where a published trainer_config.json names another layer or model than the run; empty where it agrees.

    Layers are compared as both count them, from 0. `lm_name` is one hub id or two in one text: it must hold the name of
    one of the run's models, owners aside. Local folders may be called anything, so they are not compared. Settings that
    are missing, or not a number or a text, say nothing.
    """
    named = trainer if isinstance(trainer, Mapping) else {}
    layer, name, own = named.get("layer"), named.get("lm_name"), activations.section.layer_number
    faults = []
    if isinstance(layer, int) and not isinstance(layer, bool) and layer != own:
        faults.append(f"layer {layer} and not activations.layer = {own}")
    models = [location.model for location in activations.loading.models]
    sources = [model.source for model in models if isinstance(model, HubModel) and existing_path(model.source) is None]
    if isinstance(name, str) and sources and not any(_short_name(source) in name.lower() for source in sources):
        faults.append(f"the model {name} and not {' or '.join(sources)}")
    return f"its trainer_config.json says that it was trained on {', and on '.join(faults)}" if faults else ""


def _short_name(source: str) -> str:
    return source.rstrip("/").rsplit("/", 1)[-1].lower()


def fidelity_mismatch(found: Mapping[str, float], k: int | None, *, layer: int) -> str:
    """Where a crosscoder explains little of these rows, or codes them with another L0 than its own; else empty."""
    measured = f"on {int(found['num_rows']):,} validation rows it explains {found['fve']:.0%} of the variance"
    if k is not None:
        measured += f" with {found['l0']:.1f} active latents per row, where its k is {k}"
    low_fve, other_l0 = not found["fve"] >= _MIN_FVE, False
    if k is not None:
        other_l0 = not k / _MAX_L0_RATIO <= found["l0"] <= k * _MAX_L0_RATIO
    if not low_fve and not other_l0:
        return ""
    worse = ", less than the mean row would" if not found["fve"] > 0 else ""
    return f"{measured}{worse}: it may belong to another layer, pair or scale than activations.layer = {layer}"


def first_rows_fidelity(crosscoder: Crosscoder, store: ActivationStore) -> dict[str, float]:
    """Numbers of schema.FIDELITY_KEYS on the first validation rows, both models together."""
    shard = store.manifest.of_split(Split.VALIDATION)[0]
    rows = shard_rows(store, shard)
    part = document_slices(rows["doc_id"], max_rows=_NUM_CHECKED_ROWS)[0]
    fidelity = Fidelity(activation_dim=crosscoder.activation_dim, num_latents=crosscoder.num_latents)
    batch = row_batch(crosscoder, {name: value[part] for name, value in rows.items()})
    return fidelity.table(analyse({"fidelity": fidelity}, [batch])["fidelity"])
