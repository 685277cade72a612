"""How well a crosscoder reconstructs some rows, in inference mode and in the units that it was fitted in.

The trainer calls this on whatever rows it is given; the verdict's own measurements over a store are in analyses/.

Shapes: B rows, M models, D width.
"""

import torch
from torch import Tensor

from pipeline.numerics import moments
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.numerics.objective import reconstruction_loss
from pipeline.numerics.recipes import fitted_activations, fve_metrics


@torch.no_grad()
def evaluate_rows(crosscoder: Crosscoder, x_BMD: Tensor, *, inputs: str, loss: str) -> dict[str, float]:
    """loss_reconstruction, l0, FVE and dead_frac, the share of latents that do not fire on these raw activations.

    inputs and loss: CrosscoderSpec.inputs and .reconstruction of the fit.
    """
    x_hat_BMD, codes = crosscoder(x_BMD, output_features=True)
    scale = crosscoder.scale_M[:, None] if crosscoder.is_normalised else 1.0
    fitted_BMD = fitted_activations(x_BMD * scale, inputs)
    residual_BMD = fitted_activations((x_BMD - x_hat_BMD) * scale, inputs)
    fired_F = torch.zeros(crosscoder.num_latents, dtype=torch.bool, device=x_BMD.device)
    fired_F[codes.latents_P] = True
    return {
        "loss_reconstruction": float(reconstruction_loss(residual_BMD, loss, len(x_BMD)).loss),
        "l0": float(codes.l0()),
        **fve_metrics(moments.moments_of(fitted_BMD), moments.moments_of(residual_BMD), inputs),
        "dead_frac": float((~fired_F).double().mean()),
    }
