"""What cost and memory of a language model follow from: its width, its layers and their parameters.

torch and transformers are imported where a model is looked at, so that a finished run is planned without them.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.config.data import HubModel
from pipeline.config.run_file import RunConfig

if TYPE_CHECKING:
    from pipeline.stages.catalogue import DataSteps
    from pipeline.storage.artifacts import Record
    from pipeline.storage.filesystem import Storage

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NUM_CHOSEN = ("num_experts_per_tok", "moe_top_k", "top_k")

_log = logging.getLogger(__name__)


class ModelShape(NamedTuple):
    """What cost and memory follow from."""

    width: int
    layer_parameters: tuple[int, ...]
    """Of each layer, those of all experts included."""
    active_frac: float
    """Of these, how many a token meets: less than 1 in a mixture of experts."""
    vocab_size: int

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layer_parameters)

    @property
    def active_parameters(self) -> float:
        """Of the mean layer, that a token meets."""
        return self.active_frac * sum(self.layer_parameters) / self.num_layers


def is_assumed(config: RunConfig) -> bool:
    """Whether the chat model's size is taken from a table, since the model is one of the hub that is not here."""
    from pipeline.models.loading import ModelSpec, is_from_table

    chat = config.models.chat
    return isinstance(chat, HubModel) and is_from_table(ModelSpec(chat.source, revision=chat.revision))


def model_config(config: RunConfig, data: "DataSteps", records: "Mapping[str, Record]", storage: "Storage") -> Any:
    """The chat model's transformers configuration; of a generated pair that is not built, what it will be."""
    from pipeline.models.loading import check_pair, load_config
    from pipeline.stages.models import local_specs

    models = data.tokens.inputs.models
    if models.chat.folder and "organism" not in records:
        from pipeline.organisms.build import spec_of as organism_of
        from pipeline.organisms.training import model_config as organism_model

        assert config.organism is not None
        return organism_model(organism_of(config.organism.size).model, vocab_size=500)
    with local_specs(storage, *models) as (base, chat):
        check_pair(base, chat, layer=config.activations.layer_number)
        return load_config(chat)


def shape_of(model_config: Any) -> ModelShape:
    """The shape of a decoder from its transformers configuration, counted in the architecture itself without memory.

    Where that cannot be built (code of its own), a gated decoder of the same width is counted.
    """
    width, num_layers = int(model_config.hidden_size), int(model_config.num_hidden_layers)
    vocab_size = int(model_config.vocab_size)
    try:
        layers, active_frac = _counted(model_config, num_layers)
    except Exception as error:  # what an architecture raises has no bound
        _log.info("a plain decoder is counted in place of %s: %s", type(model_config).__name__, error)
        mlp_width = _setting(model_config, ("intermediate_size", "n_inner")) or 4 * width
        layers, active_frac = (4 * width**2 + 3 * width * mlp_width,) * num_layers, 1.0
    return ModelShape(width, layers, active_frac, vocab_size)


def _counted(model_config: Any, num_layers: int) -> tuple[tuple[int, ...], float]:
    """Parameters of each layer, and the share of all that a token meets."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(model_config)
    stacks = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    layers = next(stack for stack in stacks if len(stack) == num_layers)
    counts = tuple(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    experts = sum(own.numel() for name, own in layers.named_parameters() if ".experts." in name)
    chosen, there = _setting(model_config, _NUM_CHOSEN), _setting(model_config, _NUM_EXPERTS)
    idle_frac = 1 - min(1.0, chosen / there) if chosen and there else 0.0
    return counts, 1 - idle_frac * experts / max(1, sum(counts))


def _setting(model_config: Any, names: tuple[str, ...]) -> int | None:
    """The first whole number of a model's configuration among these; None where it has none, or one for each layer."""
    for name in names:
        try:
            value = getattr(model_config, name, None)
        except RuntimeError:  # transformers' answer for a number that differs between layers
            continue
        if isinstance(value, int | float) and value > 0:
            return int(value)
    return None
