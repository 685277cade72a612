"""`fit`: crosscoders from rows in memory, by the trainer and in the order of a run; no run file, no Ray.

Settings are those of a run file, checked by its sections. What a run would fit from the same rows, settings and seed is
fitted here to the last bit. A checkpoint folder makes a fit one that can be stopped and continued.
"""

import os
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import pandas as pd
import torch

from pipeline.checkpoints.export import replace_file
from pipeline.config.crosscoder import CrosscoderSection, TrainingSection
from pipeline.config.resources import TrainingResources
from pipeline.config.run_file import validated
from pipeline.errors import InputError, first_line
from pipeline.library.crosscoder import Crosscoder
from pipeline.library.rows import Rows
from pipeline.models.placement import device_here
from pipeline.numerics import crosscoder as numerics
from pipeline.numerics import fitting
from pipeline.numerics.sparsities.registry import SPARSITIES
from pipeline.numerics.spec import FitSettings
from pipeline.numerics.trainer import CrosscoderTrainer
from pipeline.stages.crosscoder_spec import check_start_of, normalisation_of, spec_of, start_of
from pipeline.storage.artifacts import fingerprint_of
from pipeline.storage.row_order import TrainingRows
from pipeline.terminal import Console, Progress, Reporter, SilentReporter

_WARM_UP_FRAC = 0.1
"""Of a short fit for the learning rate's warm-up and the threshold's start, which take 1000 steps in a run."""
_STATE_NAME = "state.pt"
_EXPANSION = 8


class _Plan(NamedTuple):
    """What is fitted."""

    sections: tuple[CrosscoderSection, ...]
    """One per seed."""
    training: TrainingSection


def fit(
    rows: Rows,
    *,
    k: int | None = None,
    expansion: int | None = None,
    num_latents: int | None = None,
    sparsity: str | Mapping[str, Any] = "batch_topk",
    seed: int = 0,
    seeds: int = 1,
    num_steps: int = 3000,
    batch_rows: int = 2048,
    shuffle_seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | Reporter = False,
    log_every_steps: int = 50,
    checkpoint: str | Path | None = None,
    checkpoint_every_steps: int = 500,
    **settings: Any,
) -> Crosscoder:
    """A crosscoder fitted on all of these rows.

    Args:
        rows: of a pair; keep some back for `latents` with `rows.split()`.
        k: mean active latents per row (BatchTopK and TopK).
        expansion: latents as a multiple of the width; 8, unless num_latents is given.
        num_latents: size of the dictionary.
        sparsity: its kind, or kind and settings as in a run file: {"kind": "l1", "mu": 0.04}.
        seed: of the initial weights.
        seeds: how many to fit, from `seed` on, on one read of the rows; the others are the result's `replicas`.
        num_steps: optimiser steps; batch_rows * num_steps rows are read, the same ones again as often as it takes.
        batch_rows: rows per step.
        shuffle_seed: of the order of the rows.
        device: the GPU where there is one.
        progress: shows how far it is, on standard error; or a reporter of your own.
        log_every_steps: between two rows of the result's `curve`.
        checkpoint: folder for the state; a fit that was stopped goes on from there.
        checkpoint_every_steps: how often the state is written.
        settings: further ones of a run file's crosscoder: lr, code_weight, normalisation, init_from ... Where a fit is
            shorter than ten times their default, lr_warmup_steps and threshold_start_step are a tenth of it.

    Raises InputError for settings that make no sense, and where the loss is not finite.
    """
    kind = {"kind": sparsity} if isinstance(sparsity, str) else dict(sparsity)
    plan = _plan(
        {"num_latents": num_latents, "expansion": expansion, **settings, "seed": seed, "seeds": seeds},
        kind if k is None else kind | {"k": k},
        training={"batch_rows": batch_rows, "num_rows": num_steps * batch_rows, "shuffle_seed": shuffle_seed},
    )
    starts = [start_of(section) for section in plan.sections]
    trainers = _trainers(plan, rows, device, starts)
    state = _State(checkpoint, checkpoint_every_steps, plan, rows)
    with reporting(progress) as reporter:
        curves = _train(trainers, plan, rows, starts, reporter=reporter, state=state, log_every_steps=log_every_steps)
    return _published(trainers, rows, curves)


def _published(trainers: Sequence[CrosscoderTrainer], rows: Rows, curves: list[list[dict[str, float]]]) -> Crosscoder:
    """The first trainer's crosscoder, which holds the others'."""
    made = [Crosscoder.of(trainer.crosscoder(), rows.origin) for trainer in trainers]
    for crosscoder, curve in zip(made, curves, strict=True):
        crosscoder.curve = pd.DataFrame(curve)
    made[0].replicas = tuple(made[1:])
    return made[0]


def _plan(settings: Mapping[str, Any], sparsity: Mapping[str, Any], *, training: Mapping[str, Any]) -> _Plan:
    """The sections of a run file that ask for the same; InputError for what they refuse."""
    if settings["num_latents"] is None and settings["expansion"] is None:
        settings = {**settings, "expansion": _EXPANSION}
    read = validated(TrainingSection, dict(training), "fit")
    brief = int(read.num_steps * _WARM_UP_FRAC)
    own, beside = dict(sparsity), dict(settings)
    start_step = getattr(SPARSITIES.get(str(sparsity.get("kind"))), "threshold_start_step", None)
    if start_step is not None:
        own.setdefault("threshold_start_step", min(brief, start_step))
    beside.setdefault("lr_warmup_steps", min(brief, FitSettings.lr_warmup_steps))
    section = validated(CrosscoderSection, {"name": "fit", "sparsity": own, **beside}, "fit")
    if section.power is not None:
        raise InputError("fit: expected no power, which the controls of a run measure, got one; use crossray.run")
    return _Plan((section, *section.further_seeds()), read)


def _trainers(
    plan: _Plan, rows: Rows, device: str | torch.device | None, starts: Sequence[numerics.Crosscoder | None]
) -> list[CrosscoderTrainer]:
    device = device_here() if device is None else device
    manifest = rows.store().manifest
    shape = {"num_models": manifest.num_models, "activation_dim": manifest.activation_dim}
    specs = [spec_of(section, plan.training, TrainingResources(), **shape) for section in plan.sections]
    for section, spec, start in zip(plan.sections, specs, starts, strict=True):
        check_start_of(section, spec, start)
    try:
        return [
            CrosscoderTrainer(spec, device=device, normalisation=normalisation_of(section, manifest, start))
            for section, spec, start in zip(plan.sections, specs, starts, strict=True)
        ]
    except (ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"fit on {str(device)!r}: {first_line(error)}") from error


def _train(
    trainers: Sequence[CrosscoderTrainer],
    plan: _Plan,
    rows: Rows,
    starts: Sequence[numerics.Crosscoder | None],
    *,
    reporter: Reporter,
    state: "_State",
    log_every_steps: int,
) -> list[list[dict[str, float]]]:
    """All steps that are not done yet; each crosscoder's curve."""
    training = plan.training
    order = TrainingRows(rows.store(), seed=training.shuffle_seed, batch_rows=training.batch_rows)
    progress = Progress("fit", training.num_steps * training.batch_rows, "rows")
    first_step = state.restore(trainers)
    curves = state.curves
    if first_step == 0:
        fitting.initialise(trainers, next(order.batches(0, 1)), starts)
    done = first_step
    try:
        for done in fitting.steps(trainers, order.batches(first_step, training.num_steps), first_step=first_step):
            if done % log_every_steps == 0 or done == training.num_steps:
                for curve, trainer in zip(curves, trainers, strict=True):
                    curve.append({"step": float(done), **trainer.metrics()})
                losses = "  ".join(f"{curve[-1]['loss']:.3f}" for curve in curves)
                reporter.progress(progress.update(done * training.batch_rows, f"loss {losses}"))
            if done % state.every_steps == 0 and done < training.num_steps:
                state.save(trainers, done)
    except KeyboardInterrupt:
        state.save(trainers, done)
        raise
    except FloatingPointError as error:
        raise InputError(f"fit: {error}") from error
    state.save(trainers, done)
    return curves


class _State:
    """The state of a fit in a folder, or nowhere."""

    def __init__(self, folder: str | Path | None, every_steps: int, plan: _Plan, rows: Rows) -> None:
        self.every_steps = every_steps
        self.curves: list[list[dict[str, float]]] = [[] for _ in plan.sections]
        self._path = None if folder is None else Path(folder).expanduser() / _STATE_NAME
        asked = [section.model_dump(mode="json", exclude={"name"}) for section in plan.sections]
        self._identity = (
            "" if folder is None else fingerprint_of([asked, plan.training.model_dump(mode="json"), _about(rows)])
        )

    def restore(self, trainers: Sequence[CrosscoderTrainer]) -> int:
        """Steps that were done; InputError where the folder holds the state of another fit."""
        if self._path is None or not self._path.is_file():
            return 0
        try:
            state = torch.load(self._path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"{self._path}: expected the state of a fit: {first_line(error)}; remove it") from error
        if state["identity"] != self._identity:
            raise InputError(
                f"checkpoint: expected a folder for this fit, got {str(self._path.parent)!r}, which holds the state of "
                "one with other rows or settings; name another folder or remove it"
            )
        for trainer, own in zip(trainers, state["trainers"], strict=True):
            trainer.load_state_dict(own)
        self.curves = state["curves"]
        return int(state["step"])

    def save(self, trainers: Sequence[CrosscoderTrainer], step: int) -> None:
        """Replaces the state in one step."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        states = [trainer.state_dict() for trainer in trainers]
        content = {"identity": self._identity, "step": step, "trainers": states, "curves": self.curves}
        replace_file(self._path, partial(torch.save, content))


def _about(rows: Rows) -> dict[str, Any]:
    """What tells these rows from others without reading all of them."""
    moments = rows.moments()
    return {
        "sizes": list(rows.shard_sizes),
        "variance": moments.variance_M().tolist(),
        "mean": moments.mean_MD.sum(1).tolist(),
    }


@contextmanager
def reporting(progress: bool | Reporter) -> Iterator[Reporter]:
    """The reporter that a function of the library was asked for: silent, on standard error, or the caller's."""
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield SilentReporter()
    else:
        with _terminal() as terminal, closing(Console(terminal)) as console:
            yield console


@contextmanager
def _terminal() -> Iterator[IO[str]]:
    """A copy of standard error, since a run sends the original to a log file; a notebook's own stream as it is."""
    try:
        number = sys.stderr.fileno()
    except (OSError, ValueError):  # a stream without a file
        yield sys.stderr
        return
    with os.fdopen(os.dup(number), "w") as terminal:
        yield terminal
