"""Several trainers on one read of the rows: the loop of a run, of the planted benchmark and of the library.

Logging, checkpoints and errors are the caller's, between two steps.

Shapes: B rows, M models, D width.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from pipeline.numerics.crosscoder import Crosscoder
from pipeline.numerics.injection import Injection
from pipeline.numerics.trainer import CrosscoderTrainer
from pipeline.numerics.warm_start import start_from


def initialise(trainers: Sequence[CrosscoderTrainer], x_BMD: Tensor, starts: Sequence[Crosscoder | None] = ()) -> None:
    """Sets what depends on the size of the activations, from the first batch; before the first step.

    starts: a crosscoder whose weights a trainer begins with instead; none by default.
    """
    x_BMD = x_BMD.to(trainers[0].device).float()
    for trainer, start in zip(trainers, starts or [None] * len(trainers), strict=True):
        if start is None:
            trainer.initialise(x_BMD)
        else:
            start_from(trainer, start)


def steps(
    trainers: Sequence[CrosscoderTrainer],
    batches: Iterable[Tensor],
    *,
    first_step: int = 0,
    injections: Sequence[Injection | None] = (),
) -> Iterator[int]:
    """Takes a step of every trainer with each batch; gives the number of steps done after it.

    injections: what is put into the rows of each trainer; none by default.
    """
    injections = injections or [None] * len(trainers)
    for step, x_BMD in enumerate(batches, first_step + 1):
        x_BMD = x_BMD.to(trainers[0].device, non_blocking=True).float()
        for trainer, injection in zip(trainers, injections, strict=True):
            trainer.step(x_BMD if injection is None else injection(x_BMD))
        yield step
