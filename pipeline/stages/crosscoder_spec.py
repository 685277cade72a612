"""From the settings of a run file to the plain numbers that a trainer takes."""

from dataclasses import asdict

from pipeline.analyses.units import per_model_normalisation
from pipeline.config.crosscoder import CrosscoderSection, TrainingSection
from pipeline.config.resources import TrainingResources
from pipeline.errors import InputError
from pipeline.models.files import existing_path
from pipeline.numerics.crosscoder import Crosscoder, Normalisation
from pipeline.numerics.trainer import CrosscoderSpec
from pipeline.numerics.warm_start import check_start
from pipeline.storage.activation_store import Manifest


def start_of(section: CrosscoderSection) -> Crosscoder | None:
    """The crosscoder of init_from, on the CPU; InputError where it cannot be read."""
    if section.init_from is None:
        return None
    path = existing_path(section.init_from)
    try:
        return Crosscoder.from_pretrained(section.init_from if path is None else path)
    except InputError as error:
        raise InputError(f"crosscoder {section.name!r}: init_from: {error}") from error


def check_start_of(section: CrosscoderSection, spec: CrosscoderSpec, start: Crosscoder | None) -> None:
    """InputError where a fit cannot begin with the crosscoder of init_from."""
    if start is not None:
        try:
            check_start(spec, start)
        except ValueError as error:
            raise InputError(f"crosscoder {section.name!r}: init_from: {section.init_from}: {error}") from error


def normalisation_of(
    section: CrosscoderSection, manifest: Manifest, start: Crosscoder | None = None
) -> Normalisation | None:
    """What the crosscoder's rows are normalised with, from the store's moments; None where they stay raw.

    A fit that begins with another crosscoder's weights keeps that one's.
    """
    if start is not None:
        return start.normalisation
    if section.normalisation == "none":
        return None
    try:
        return per_model_normalisation(manifest.training_moments())
    except ValueError as error:
        raise InputError(f"crosscoder {section.name!r}: normalisation: {error}") from error


def spec_of(
    section: CrosscoderSection,
    training: TrainingSection,
    resources: TrainingResources,
    *,
    num_models: int,
    activation_dim: int,
) -> CrosscoderSpec:
    """The plain numbers of a crosscoder for activations of this shape; an InputError where they do not fit."""
    try:
        return CrosscoderSpec(
            num_models=num_models,
            activation_dim=activation_dim,
            num_latents=section.num_latents or (section.expansion or 0) * activation_dim,
            num_steps=training.num_steps,
            precision=training.precision,
            kernels=resources.kernels,
            sparsity=section.sparsity.settings(),
            **asdict(section.settings()),
        )
    except ValueError as error:
        raise InputError(f"crosscoder {section.name!r}: {error}") from error
