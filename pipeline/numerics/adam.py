"""Clipping and Adam over the parameters of all ranks, in torch's fused kernel.

The global gradient norm is taken once, and the fused update applies the clipping factor, which saves a pass over the
gradients. A step whose loss or gradient is not finite changes nothing; the host does not wait to find out. Updates are
dense: Adam's moments decay also where a latent did not fire.

Shapes: F latents of this rank, N = M * D.
"""

import torch
from torch import Tensor
from torch.optim.adam import adam

from pipeline.numerics.parallel import Mesh
from pipeline.numerics.parameters import Parameters
from pipeline.numerics.spec import CrosscoderSpec

_NUM_WEIGHTS = Parameters._fields.index("log_threshold_F")
"""Tensors before the trained thresholds, which have a learning rate of their own."""


class Adam:
    """First and second moments, and the count of updates."""

    def __init__(self, parameters: Parameters, spec: CrosscoderSpec) -> None:
        self._spec = spec
        self.means = [torch.zeros_like(tensor) for tensor in parameters.tensors()]
        self.squares = [torch.zeros_like(tensor) for tensor in parameters.tensors()]
        self.num_updates = torch.zeros((), dtype=torch.float32, device=parameters.b_dec_N.device)

    def update(
        self, parameters: Parameters, gradients: Parameters, *, lr: float, grad_norm: Tensor, is_finite: Tensor
    ) -> None:
        """Changes parameters in place (not at all where the boolean is_finite is false); uses up the gradients."""
        scale = None
        if self._spec.max_grad_norm is not None:
            scale = (grad_norm / self._spec.max_grad_norm).clamp(min=1).to(self.num_updates.dtype)
        groups = [(slice(_NUM_WEIGHTS), lr), (slice(_NUM_WEIGHTS, None), lr * self._spec.sparsity.threshold_lr_factor)]
        for own, rate in groups[: 1 + (parameters.log_threshold_F is not None)]:
            adam(
                parameters.tensors()[own],
                gradients.tensors()[own],
                self.means[own],
                self.squares[own],
                [],
                [self.num_updates.clone() for _ in self.means[own]],
                fused=True,
                grad_scale=scale,
                found_inf=(~is_finite).to(self.num_updates.dtype),
                amsgrad=False,
                beta1=self._spec.beta1,
                beta2=self._spec.beta2,
                lr=rate,
                weight_decay=0.0,
                eps=self._spec.epsilon,
                maximize=False,
            )
        self.num_updates += is_finite


def global_norm(gradients: Parameters, mesh: Mesh) -> Tensor:
    """Norm over all parameters, float64 scalar; collective over the latent axis.

    The decoder bias is the same on every latent rank and counts once.
    """
    divided = [tensor for tensor in gradients.tensors() if tensor is not gradients.b_dec_N]
    square = torch.stack([torch.linalg.vector_norm(tensor).double().square() for tensor in divided]).sum()
    mesh.sum_(square, "latent")
    norm: Tensor = (square + torch.linalg.vector_norm(gradients.b_dec_N).double().square()).sqrt()
    return norm
