"""Begins training with the weights of a crosscoder for inference, in place of random ones.

The trainer then computes what the crosscoder computes, in its normalisation; Adam's moments, counts of dead latents and
schedules begin at 0. Of a threshold per group the first latent with a weight of the group tells the value.

Shapes: M models, D width, F latents of the whole dictionary, N = fitted models * D.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.numerics.crosscoder import Crosscoder
from pipeline.numerics.recipes import inputs_of
from pipeline.numerics.spec import CrosscoderSpec
from pipeline.numerics.trainer import CrosscoderTrainer


def check_start(spec: CrosscoderSpec, crosscoder: Crosscoder) -> None:
    """Raises ValueError where a crosscoder cannot be the start of this fit."""
    names = ("num_latents", "num_models", "activation_dim")
    expected, got = ([getattr(one, name) for name in names] for one in (spec, crosscoder))
    if expected != got:
        raise ValueError(
            f"expected a crosscoder with F, M, D = {expected} to start from, got {got}: change num_latents, or take "
            f"one of this layer and pair"
        )
    for name, wanted, found in (
        ("activation", spec.sparsity.activation, crosscoder.activation),
        ("code_weight", spec.code_weight, crosscoder.code_weight),
        ("inputs", spec.inputs, inputs_of(crosscoder)),
    ):
        if wanted != found:
            raise ValueError(f"expected a crosscoder with {name} {wanted!r} to start from, got {found!r}")


@torch.no_grad()
def start_from(trainer: CrosscoderTrainer, crosscoder: Crosscoder) -> None:
    """Gives an untrained trainer the weights, thresholds and normalisation of a crosscoder.

    In place of `initialise`. The trainer must have been built with the crosscoder's normalisation. Collective over
    latent ranks; raises ValueError where the crosscoder does not fit.
    """
    check_start(trainer.spec, crosscoder)
    state = trainer.state_dict()
    trainer.load_state_dict(state | _weights(trainer.spec, crosscoder, state))


def _weights(spec: CrosscoderSpec, crosscoder: Crosscoder, state: dict[str, Any]) -> dict[str, Tensor]:
    models = slice(None) if spec.inputs == "both" else slice(1, 2)  # a SAE's weights are those of the chat model
    found = {
        "weights.W_enc_FN": crosscoder.W_enc_FMD[:, models].flatten(1),
        "weights.b_enc_F": crosscoder.b_enc_F,
        "weights.W_dec_FN": crosscoder.W_dec_FMD[:, models].flatten(1),
        "weights.b_dec_N": crosscoder.b_dec_MD[models].flatten(),
        "threshold": crosscoder.threshold,
    }
    if "weights.log_threshold_F" in state:
        found["weights.log_threshold_F"] = crosscoder.jump_threshold_F.log()
    elif spec.sparsity.has_group_thresholds:
        found["threshold"] = _group_thresholds(spec, crosscoder)
    if crosscoder.normalisation is not None:
        found |= crosscoder.normalisation._asdict()
    return {name: tensor.detach() for name, tensor in found.items()}


def _group_thresholds(spec: CrosscoderSpec, crosscoder: Crosscoder) -> Tensor:
    """The threshold of scores of each group, float64."""
    weight_F, start, found = crosscoder.code_weights_F(), 0, []
    for end in spec.group_ends(slice(0, spec.num_latents)):
        latent = start + int((weight_F[start:end] > 0).double().argmax())
        found.append(crosscoder.jump_threshold_F[latent].double() * weight_F[latent])
        start = end
    return torch.stack(found)
