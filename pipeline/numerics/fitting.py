"""Several trainers on one read of the rows: the loop of a run, of the planted benchmark and of the library.

Logging, checkpoints and errors are the caller's, between two steps.

Shapes: B rows, M models, D width.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from pipeline.numerics.trainer import CrosscoderTrainer


def initialise(trainers: Sequence[CrosscoderTrainer], x_BMD: Tensor) -> None:
    """Sets what depends on the size of the activations, from the first batch; before the first step."""
    x_BMD = x_BMD.to(trainers[0].device).float()
    for trainer in trainers:
        trainer.initialise(x_BMD)


def steps(trainers: Sequence[CrosscoderTrainer], batches: Iterable[Tensor], *, first_step: int = 0) -> Iterator[int]:
    """Takes a step of every trainer with each batch; gives the number of steps done after it."""
    for step, x_BMD in enumerate(batches, first_step + 1):
        x_BMD = x_BMD.to(trainers[0].device, non_blocking=True).float()
        for trainer in trainers:
            trainer.step(x_BMD)
        yield step
