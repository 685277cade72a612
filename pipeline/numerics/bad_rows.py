"""Names the rows of a batch that hold NaN or Inf, for messages that a user can act on.

Called only after a loss or gradient was not finite, which the step notices at no cost; this looks for the cause in the
input.

Shapes: B rows, M models, D width.
"""

from torch import Tensor


def describe_bad_rows(x_BMD: Tensor) -> str | None:
    """The first row with NaN or Inf, its models and how many such rows there are; None if all numbers are finite."""
    bad_BM = (~x_BMD.isfinite()).any(2)
    rows = bad_BM.any(1).nonzero().squeeze(1)
    if len(rows) == 0:
        return None
    first = int(rows[0])
    models = bad_BM[first].nonzero().squeeze(1).tolist()
    return (
        f"row {first} of this rank's batch has NaN or Inf in the activations of model {models} ({len(rows)} such rows)"
    )


def describe_bad_step(x_BMD: Tensor, losses: Tensor, *, grad_norm: Tensor, step: int) -> str:
    """The message for a step that was not taken; losses are reconstruction, penalty and auxiliary."""
    came = ", ".join(f"{value:.4g}" for value in losses.tolist())
    cause = describe_bad_rows(x_BMD)
    remedy = "drop or cap these rows" if cause else "lower lr or clip_norm"
    return (
        f"expected a finite loss and gradient, got {came} (reconstruction, penalty, auxiliary) and a gradient of norm "
        f"{float(grad_norm):.4g} at step {step}: {cause or 'rows are finite on this rank'}: {remedy}; the weights are "
        f"those of the step before"
    )
