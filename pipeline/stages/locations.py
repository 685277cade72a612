"""Where the two models of a run are: the organism's artifact, a local folder or the hub.

A `ModelLocation` and a `Loading` are plain values that travel to any worker; stages/models.py loads from them. Nothing
heavy is imported here.
"""

from typing import Literal, NamedTuple

from pipeline.config.data import HubModel, OrganismModel


class ModelLocation(NamedTuple):
    """A model of the run file, with its folder if it is in the storage."""

    model: HubModel | OrganismModel
    folder: str = ""
    """Folder below the storage root where the run has made the model itself; empty elsewhere."""
    chat_template: str = ""
    """Jinja text in place of the tokenizer's own chat template; empty keeps that."""

    @property
    def label(self) -> str:
        """How tables and the report name the model."""
        model = self.model
        noise = f" + noise {model.weight_noise:g}" if model.weight_noise else ""
        if isinstance(model, OrganismModel):
            return f"organism {model.member}{noise}"
        revision = f"@{model.revision}" if model.revision else ""
        return model.source + revision + (f" + {model.adapter}" if model.adapter else "") + noise


class ModelPairLocation(NamedTuple):
    """Both models; they carry the same template, so that equal models stay equal."""

    base: ModelLocation
    chat: ModelLocation


def locate(model: HubModel | OrganismModel, organism_folder: str = "", chat_template: str = "") -> ModelLocation:
    """The location of a configured model; `organism_folder` is the folder of the run's organism, if it has one."""
    folder = f"{organism_folder}/{model.member}" if isinstance(model, OrganismModel) else ""
    return ModelLocation(model, folder, chat_template)


class Loading(NamedTuple):
    """How a worker loads the pair."""

    models: ModelPairLocation
    layer: int
    """L, from 0: both models are cut after it (activations.layer)."""
    dtype: str
    attn_implementation: str | None
    placement: Literal["one_device", "two_devices", "spread"]
    gpus: float
    """Of the worker; 0 loads onto the CPU."""
