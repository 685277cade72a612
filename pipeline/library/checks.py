"""What the library's functions refuse before anything runs, each fault in one place."""

from collections.abc import Iterable

from pipeline.analyses.latent_sets import require_latents
from pipeline.errors import InputError
from pipeline.library.origin import Origin, require_same_origin
from pipeline.models.pair import ModelPair
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import MODEL_NAMES


def model_index(model: str) -> int:
    """schema.BASE or schema.CHAT by name."""
    if model not in MODEL_NAMES:
        raise InputError(f"model: expected one of {', '.join(MODEL_NAMES)}, got {model!r}")
    return MODEL_NAMES.index(model)


def require_fit(
    crosscoder: Crosscoder, *, num_models: int, activation_dim: int, origin: Origin | None, owner: str
) -> None:
    """InputError where a crosscoder cannot belong to these activations."""
    if (crosscoder.num_models, crosscoder.activation_dim) != (num_models, activation_dim):
        raise InputError(
            f"expected a crosscoder of {num_models} models and width {activation_dim}, as {owner}, got one of "
            f"{crosscoder.num_models} and {crosscoder.activation_dim}; it belongs to other models or another layer"
        )
    require_same_origin(getattr(crosscoder, "origin", None), origin, what="a crosscoder", owner=owner)


def require_pair_fit(crosscoder: Crosscoder, pair: ModelPair, origin: Origin) -> None:
    """InputError where a crosscoder does not belong to a pair, or lies on another device."""
    require_fit(crosscoder, num_models=2, activation_dim=pair.activation_dim, origin=origin, owner="the pair")
    device = crosscoder.W_dec_FMD.device
    if device != pair.device:
        raise InputError(
            f"expected a crosscoder on {pair.device}, where the pair is, got one on {device}; move it with "
            f".to({str(pair.device)!r})"
        )


def require_own_latents(latents: Iterable[int], crosscoder: Crosscoder) -> None:
    """InputError for latents that the crosscoder does not have."""
    require_latents(latents, crosscoder.num_latents, "latent")
