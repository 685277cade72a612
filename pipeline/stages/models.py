"""The two models of a run in a worker process: found and loaded.

Copies from an object store live as long as the block that asks for them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pipeline.config.data import OrganismModel
from pipeline.models.loading import LoadOptions, ModelSpec
from pipeline.models.pair import ModelPair
from pipeline.models.placement import Placement
from pipeline.stages.locations import Loading, ModelLocation
from pipeline.storage.filesystem import Storage


def model_spec(location: ModelLocation, folder: str = "") -> ModelSpec:
    """A location as the loader takes it; `folder` is the local folder of a model that is in the storage."""
    model = location.model
    if isinstance(model, OrganismModel):
        spec = ModelSpec(folder)
    else:
        spec = ModelSpec(
            model.source,
            model.revision,
            model.adapter,
            model.trust_remote_code,
            tuple(sorted(model.token_replacements.items())),
            adapter_revision=model.adapter_revision,
        )
    return spec._replace(
        chat_template=location.chat_template,
        weight_noise=model.weight_noise,
        weight_noise_seed=model.weight_noise_seed,
    )


@contextmanager
def local_specs(storage: Storage, *locations: ModelLocation) -> Iterator[tuple[ModelSpec, ...]]:
    """ModelSpecs that can be loaded on this machine, for the length of the block."""
    with ExitStack() as stack:
        yield tuple(
            model_spec(own, str(stack.enter_context(storage.local_folder(own.folder))) if own.folder else "")
            for own in locations
        )


def load_pair(storage: Storage, loading: Loading, *, is_lower_only: bool = False) -> ModelPair:
    """Both models in this process; `is_lower_only` as in LoadOptions."""
    options = LoadOptions(
        layer=loading.layer,
        dtype=loading.dtype,
        devices=worker_devices(loading.gpus, loading.placement),
        placement=loading.placement,
        attn_implementation=loading.attn_implementation,
        is_lower_only=is_lower_only,
    )
    with local_specs(storage, *loading.models) as (base, chat):
        return ModelPair.load(base, chat, options)


def worker_devices(gpus: float, placement: Placement) -> tuple[str, ...]:
    """Devices of a worker as it names them: Ray shows it its own GPUs alone, counted from 0."""
    if gpus == 0:
        return ("cpu",) if placement == "one_device" else ("cpu", "cpu")
    return tuple(f"cuda:{index}" for index in range(max(1, int(gpus))))
