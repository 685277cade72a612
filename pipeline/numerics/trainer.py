"""Trains one crosscoder, a global batch per step, on any number of ranks.

A step: encode and select (encoder.py), decode and differentiate (gradients.py), sum gradients over data ranks, clip,
Adam, then the counters: threshold, dead latents. Loop, data and files are the caller's; a checkpoint holds
`state_dict`, which is everything that decides the next step, so a resumed run continues bit for bit on the same ranks
and within rounding on others. `evaluate` changes nothing. What depends on the kind of sparsity is asked of
`spec.sparsity` (sparsities/).

`metrics`, `evaluate`, `state_dict` and `crosscoder` wait for the device. A loss or gradient that is not finite never
reaches the weights: on CPU its step raises; on CUDA it and all later steps change nothing, and the next of these calls
raises. After `load_state_dict` training can go on.

Shapes: B local rows, M models, D width, N = M * D, F latents (of this rank where a rank is meant).
"""

import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.numerics import moments
from pipeline.numerics.adam import Adam, global_norm
from pipeline.numerics.bad_rows import describe_bad_step
from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.crosscoder import Crosscoder, Normalisation, check_activations, check_normalisation
from pipeline.numerics.encoder import TrainingEncoder, check_precision, matrix_products
from pipeline.numerics.evaluation import evaluate_rows
from pipeline.numerics.gradients import Encoded, Losses, Setting, sparse_gradients, sum_over_ranks
from pipeline.numerics.gradients_dense import Block, dense_gradients, merge_losses
from pipeline.numerics.initial import initial_parameters
from pipeline.numerics.kernels.choose import choose_kernels
from pipeline.numerics.l0_control import L0Control
from pipeline.numerics.objective import Objective
from pipeline.numerics.parallel import Mesh, check_equal_rows
from pipeline.numerics.parameters import Parameters
from pipeline.numerics.recipes import (
    check_fixed_rows,
    check_tied_rows,
    fitted_activations,
    fixed_rows,
    fve_metrics,
    published,
    tie_rows,
    zero_fixed_rows,
)
from pipeline.numerics.spec import CrosscoderSpec

__all__ = ["CrosscoderSpec", "CrosscoderTrainer"]
_log = logging.getLogger(__name__)
_L0_GAP = 0.1
"""Share of training's L0 by which that of inference may differ at the end without a warning."""


class _Step(NamedTuple):
    """What the metrics of a step are made of, still on the device."""

    totals: Tensor
    """float64 [4]: reconstruction, penalty and auxiliary loss, number of active pairs."""
    objective: Objective
    k: float
    lr: float
    grad_norm: Tensor
    x_BN: Tensor
    """This rank's rows."""
    residual: moments.Moments
    """Of this rank's rows."""

    @property
    def l0(self) -> float:
        """Mean active latents per row."""
        return float(self.totals[3]) / self.objective.num_rows


class CrosscoderTrainer:
    """One crosscoder in training."""

    def __init__(
        self,
        spec: CrosscoderSpec,
        *,
        device: torch.device | str = "cpu",
        mesh: Mesh | None = None,
        normalisation: Normalisation | None = None,
    ) -> None:
        """Initial weights depend on the spec alone, not on the mesh. Raises ValueError for what does not fit."""
        self.spec = spec
        self.device = torch.device(device)
        check_precision(spec.precision, self.device)
        self.mesh = mesh or Mesh()
        self.normalisation = self._on_device(normalisation)
        self.kernels = choose_kernels(self.device, spec.kernels)
        self._latents = self.mesh.latent_slice(spec.num_latents)
        self._parameters = initial_parameters(spec, self._latents, self.device)
        self._gradients = self._parameters.empty_like()
        self._fixed_rows = fixed_rows(spec, self._latents)
        self._setting = Setting(spec.fitted_models, self.kernels, self.mesh, spec.group_ends(self._latents))
        self._adam = Adam(self._parameters, spec)
        self._encoder = TrainingEncoder(spec, self.kernels, self.mesh, self.device)
        self.num_steps_done = 0
        self.num_rows_seen = 0
        self._rows_since_fired_F = torch.zeros(len(self._parameters.b_enc_F), dtype=torch.int64, device=self.device)
        start = spec.sparsity.start_threshold
        self._threshold = torch.full(spec.threshold_shape, start, dtype=torch.float64, device=self.device)
        self._l0_control = L0Control.of(spec, self.device)
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self._last: _Step | None = None
        _log.info("%s on %s with %s kernels, rank %s", spec, self.device, self.kernels.name, self.mesh[:4])

    @torch.no_grad()
    def initialise(self, x_BMD: Tensor) -> None:
        """Sets what depends on the size of the activations, where the sparsity asks for it.

        BatchTopK's decoder bias becomes the rows' geometric median per model; JumpReLU's thresholds are multiplied by
        the typical pre-activation, without this call they start at initial_threshold itself.
        Call once, before the first step, with the first batch; collective over the mesh.
        """
        if self.num_steps_done:
            raise ValueError(f"expected no step before initialise, got {self.num_steps_done} done: call it first")
        x_BN = self._prepare(x_BMD)
        if self.spec.sparsity.starts_at_median:
            self._parameters.b_dec_N.copy_(moments.geometric_median(self._per_model(x_BN), self.mesh).flatten())
        if self._parameters.log_threshold_F is not None:
            self._encoder.refresh(self._parameters)
            typical = self._encoder.typical_preactivation(self._parameters, x_BN)
            self._parameters.log_threshold_F.add_(math.log(typical))

    @torch.no_grad()
    def step(self, x_BMD: Tensor) -> None:
        """One optimiser step over the global batch, of which x_BMD are this data rank's rows.

        Raw activations, as many rows on every data rank, equal rows on the latent ranks of one data rank. Raises
        ValueError for a shape that does not fit and FloatingPointError, weights untouched, for a loss or gradient that
        is not finite; the message names the first bad row if it is an input's fault.
        """
        x_BN = self._prepare(x_BMD)
        objective = self._objective(len(x_BN))
        k = self.spec.sparsity.active_latents(self.num_steps_done)
        self._encoder.refresh(self._parameters)
        with matrix_products(self.spec.precision, self.device):
            losses, smallest = self._differentiate(x_BN, objective, k)
        totals = sum_over_ranks(losses, self._gradients, self.mesh)
        zero_fixed_rows(self._gradients.W_enc_FN, self._fixed_rows)
        zero_fixed_rows(self._gradients.W_dec_FN, self._fixed_rows)
        tie_rows(self._gradients.W_dec_FN, self.spec, self._latents)
        grad_norm = global_norm(self._gradients, self.mesh)
        is_finite = totals.isfinite().all() & grad_norm.isfinite() & (self._bad_step < 0)
        if self.device.type == "cpu" and not bool(is_finite):
            raise FloatingPointError(
                describe_bad_step(x_BMD, totals[:3], grad_norm=grad_norm, step=self.num_steps_done)
            )
        lr = self.spec.learning_rate(self.num_steps_done)
        self._adam.update(self._parameters, self._gradients, lr=lr, grad_norm=grad_norm, is_finite=is_finite)
        if self._l0_control is not None:
            self._l0_control.update(totals[3] / objective.num_rows, self.num_steps_done, is_finite)
        self._count(losses.fired_F, smallest, objective.num_rows, is_finite)
        self._last = _Step(totals, objective, k, lr, grad_norm, x_BN, losses.residual)

    def _prepare(self, x_BMD: Tensor) -> Tensor:
        """What the dictionary reads, x_BN on the trainer's device in its dtype: the only place that normalises."""
        check_activations(x_BMD, self.spec.num_models, self.spec.activation_dim)
        check_equal_rows(len(x_BMD), self.mesh, self.device)
        x_BMD = x_BMD.to(self.device, self._parameters.b_dec_N.dtype)
        if self.normalisation is not None:
            x_BMD = (x_BMD - self.normalisation.mean_MD) * self.normalisation.scale_M[:, None]
        return fitted_activations(x_BMD, self.spec.inputs).flatten(1).contiguous()

    def _per_model(self, x_BN: Tensor) -> Tensor:
        return x_BN.view(len(x_BN), self.spec.fitted_models, -1)

    def _objective(self, num_local_rows: int) -> Objective:
        spec, control = self.spec, self._l0_control
        factor = 1.0 if control is None else control.factor(self.num_steps_done)
        return Objective(
            sparsity=spec.sparsity,
            code_weight=spec.code_weight,
            reconstruction=spec.reconstruction,
            num_rows=num_local_rows * self.mesh.data_size,
            penalty=spec.sparsity.penalty_weight(self.num_steps_done) * factor,
            aux_weight=spec.sparsity.aux_weight,
        )

    def _differentiate(self, x_BN: Tensor, objective: Objective, k: float) -> tuple[Losses, Tensor | None]:
        """This rank's share of losses and gradients, and the smallest kept score if there was a selection."""
        setting, out = self._setting, self._gradients
        if self._encoder.is_dense(self._parameters, x_BN):
            parts: list[Losses] = []
            for rows_BN, preact_BF in self._encoder.blocks(self._parameters, x_BN):
                block = Block(preact_BF, self._encoder.scratch(preact_BF), is_first=not parts)
                losses = dense_gradients(
                    self._parameters, rows_BN, block=block, objective=objective, setting=setting, out=out
                )
                parts.append(losses)
            return merge_losses(parts), None
        kept = self._encoder.select(self._parameters, x_BN, k=k)
        dead_F = self._dead_latents(kept.codes, objective.num_rows)
        auxiliary = None if dead_F is None else self._encoder.strongest_dead(self._parameters, x_BN, dead_F)
        losses = sparse_gradients(
            self._parameters,
            x_BN,
            encoded=Encoded(kept.codes, auxiliary, kept.preact_P),
            objective=objective,
            setting=setting,
            out=out,
        )
        return losses, kept.smallest

    def _dead_latents(self, codes: SparseCodes, num_rows: int) -> Tensor | None:
        """This rank's latents that have not fired for dead_after_rows, this batch included as in the paper's code.

        None where there is no auxiliary loss or nothing can be dead yet. Collective over data ranks.
        """
        sparsity = self.spec.sparsity
        if sparsity.aux_weight == 0 or self.num_rows_seen + num_rows < sparsity.dead_after_rows:
            return None
        fired_F = torch.zeros_like(self._rows_since_fired_F)
        fired_F[codes.latents_P] = 1
        self.mesh.max_(fired_F, "data")
        is_silent_F = self._rows_since_fired_F + num_rows >= sparsity.dead_after_rows
        return (is_silent_F & (fired_F == 0)).nonzero().squeeze(1)

    def _count(self, fired_F: Tensor, smallest: Tensor | None, num_rows: int, is_finite: Tensor) -> None:
        """Updates dead counters, threshold, and counts of steps and rows."""
        self._rows_since_fired_F.add_(num_rows * is_finite).masked_fill_(fired_F & is_finite, 0)
        if smallest is not None:
            moved = self.spec.sparsity.next_threshold(
                self._threshold, smallest, step=self.num_steps_done, num_steps=self.spec.num_steps
            )
            self._threshold = torch.where(is_finite, moved, self._threshold)
        self._bad_step = torch.where(is_finite | (self._bad_step >= 0), self._bad_step, self.num_steps_done)
        self.num_steps_done += 1
        self.num_rows_seen += num_rows

    def _raise_if_bad(self) -> None:
        step = int(self._bad_step)
        if step >= 0:
            raise FloatingPointError(
                f"expected finite losses and gradients, got NaN or Inf first at step {step} of {self.num_steps_done}: "
                f"the weights are those before it; look for NaN or Inf in the activations, or lower lr"
            )

    def metrics(self) -> dict[str, float]:
        """Numbers of the last step; collective over the mesh, waits for the device.

        loss (with its parts loss_reconstruction, of all that the sparsity wants reconstructed, loss_penalty,
        loss_auxiliary; lower is better), l0 (mean active latents per row), l0_inference (the same rows by the rule of
        inference), mu (weight of the penalty in use, 0 without one), fve_<model> and fve (fraction of variance
        explained of this batch, at most 1, higher is better), dead_frac (latents that have not fired for
        dead_after_rows), threshold (mean over models or groups), lr, k, grad_norm (before clipping), rows (seen so
        far). Raises ValueError before the first step.
        """
        last = self._last
        if last is None:
            raise ValueError(f"expected at least one step before metrics, got {self.num_steps_done}: call step first")
        self._raise_if_bad()
        reconstruction, penalty, auxiliary, _ = last.totals.tolist()
        x = moments.all_reduce(moments.moments_of(self._per_model(last.x_BN)), self.mesh)
        residual = moments.all_reduce(last.residual, self.mesh)
        num_dead = (self._rows_since_fired_F >= self.spec.sparsity.dead_after_rows).sum()
        return {
            "loss": reconstruction + penalty + auxiliary,
            "loss_reconstruction": reconstruction,
            "loss_penalty": penalty,
            "loss_auxiliary": auxiliary,
            "l0": last.l0,
            "l0_inference": self._l0_at_inference(last),
            "mu": last.objective.penalty,
            **fve_metrics(x, residual, self.spec.inputs),
            "dead_frac": float(self.mesh.sum_(num_dead, "latent")) / self.spec.num_latents,
            "threshold": float(self._threshold.mean()),
            "lr": last.lr,
            "k": last.k,
            "grad_norm": float(last.grad_norm),
            "rows": float(self.num_rows_seen),
        }

    @torch.no_grad()
    def _l0_at_inference(self, last: _Step) -> float:
        """L0 of the last batch by the rule of inference; warns after the last step where training's is far from it."""
        if not self.spec.sparsity.compares_scores:  # all others keep in training what they keep at inference
            return last.l0
        self._encoder.refresh(self._parameters)
        l0_inference = self._encoder.l0_at_inference(self._parameters, last.x_BN, self._threshold)
        if self.num_steps_done >= self.spec.num_steps and abs(l0_inference - last.l0) > _L0_GAP * last.l0:
            _log.warning(
                "expected L0 at inference within 10%% of training's %.4g, got %.4g: train longer with the final k",
                last.l0,
                l0_inference,
            )
        return l0_inference

    @torch.no_grad()
    def evaluate(self, x_BMD: Tensor) -> dict[str, float]:
        """Reconstruction loss, l0, fve and share of silent latents on this rank's rows, in inference mode.

        No counter, threshold or weight changes. Collective over latent ranks, not over data ranks. The L0 of training
        mode stands beside that of inference in `metrics`.
        """
        self._raise_if_bad()
        x_BMD = x_BMD.to(self.device, self._parameters.b_dec_N.dtype)
        return evaluate_rows(self.crosscoder(), x_BMD, inputs=self.spec.inputs, loss=self.spec.reconstruction)

    @torch.no_grad()
    def crosscoder(self) -> Crosscoder:
        """A copy of all latents for inference, with threshold and normalisation. Collective over latent ranks."""
        self._raise_if_bad()
        whole = Parameters(*(self._whole(name, tensor) for name, tensor in self._parameters._asdict().items()))
        return published(self.spec, whole, threshold=self._threshold, normalisation=self.normalisation)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, over all latents, as tensors and numbers on this device.

        Independent of the mesh; a normalisation is part of it. Collective over latent ranks; raises if a step was not
        finite, so that a checkpoint never holds one.
        """
        self._raise_if_bad()
        names = [name for name, tensor in self._parameters._asdict().items() if tensor is not None]
        state: dict[str, Any] = {"num_steps_done": self.num_steps_done, "num_rows_seen": self.num_rows_seen}
        for prefix, tensors in self._groups().items():
            for name, tensor in zip(names, tensors, strict=True):
                state[f"{prefix}.{name}"] = self._whole(name, tensor).clone()
        state["rows_since_fired_F"] = self._whole("rows_since_fired_F", self._rows_since_fired_F).clone()
        state["threshold"] = self._threshold.clone()
        state["adam_step"] = self._adam.num_updates.clone()
        if self._l0_control is not None:
            state["l0_control"] = self._l0_control.state.clone()
        if self.normalisation is not None:
            state |= {name: tensor.clone() for name, tensor in self.normalisation._asdict().items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`, also of another mesh; raises ValueError for a state of another shape.

        The state's normalisation takes the place of this trainer's.
        """
        names = [name for name, tensor in self._parameters._asdict().items() if tensor is not None]
        targets = {
            f"{prefix}.{name}": tensor
            for prefix, tensors in self._groups().items()
            for name, tensor in zip(names, tensors, strict=True)
        }
        targets |= {"rows_since_fired_F": self._rows_since_fired_F, "threshold": self._threshold}
        targets |= {"adam_step": self._adam.num_updates}
        targets |= {} if self._l0_control is None else {"l0_control": self._l0_control.state}
        normalisation = self._normalisation_of(state)
        expected = targets.keys() | {"num_steps_done", "num_rows_seen"}
        if missing := sorted(expected ^ (state.keys() - set(Normalisation._fields))):
            raise ValueError(
                f"expected a trainer state with the tensors of a {self.spec.sparsity.kind} crosscoder, got differences "
                f"in {missing}: it was written for another kind of crosscoder"
            )
        for name, target in targets.items():
            source = state[name]
            if self._is_divided(name) and len(source) == self.spec.num_latents:
                source = source[self._latents]
            if source.shape != target.shape:
                raise ValueError(
                    f"expected {name} of shape {list(target.shape)} (F={self.spec.num_latents}, "
                    f"M={self.spec.num_models}, D={self.spec.activation_dim}), got {list(state[name].shape)}: the "
                    f"checkpoint belongs to a crosscoder of another size"
                )
            target.copy_(source)
        check_fixed_rows(self._parameters, self._fixed_rows)
        check_tied_rows(self._parameters, self.spec, self._latents)
        self.num_steps_done, self.num_rows_seen = int(state["num_steps_done"]), int(state["num_rows_seen"])
        self.normalisation = normalisation
        self._bad_step.fill_(-1)

    def _normalisation_of(self, state: dict[str, Any]) -> Normalisation | None:
        has = [name in state for name in Normalisation._fields]
        if not any(has) and self.normalisation is None:
            return None
        if not all(has):
            raise ValueError(
                f"expected mean_MD and scale_M of a normalisation in the trainer state, got {sorted(state)}: it was "
                f"written by a trainer without one; build this trainer without normalisation too"
            )
        return self._on_device(Normalisation(*(state[name] for name in Normalisation._fields)))

    def _groups(self) -> dict[str, list[Tensor]]:
        return {"weights": self._parameters.tensors(), "means": self._adam.means, "squares": self._adam.squares}

    @staticmethod
    def _is_divided(name: str) -> bool:
        """Whether latent ranks hold parts of the tensor: its name ends in shape letters that begin with F."""
        return name.rsplit("_", 1)[-1].startswith("F")

    def _whole(self, name: str, tensor: Tensor | None) -> Any:
        if tensor is None or not self._is_divided(name):
            return tensor
        return self.mesh.gather(tensor, "latent").flatten(0, 1)

    def _on_device(self, normalisation: Normalisation | None) -> Normalisation | None:
        if normalisation is None:
            return None
        check_normalisation(normalisation, self.spec.num_models, self.spec.activation_dim)
        dtype = getattr(torch, self.spec.dtype)
        return Normalisation(*(tensor.to(self.device, dtype) for tensor in normalisation))
