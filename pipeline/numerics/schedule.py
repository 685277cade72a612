"""Learning rate, k and penalty as pure functions of the step, so that a checkpoint holds none of them.

Steps are counted from 0. Zero annealing steps mean the final value from the first step, zero warm-up steps mean the
full value, and a run shorter than its warm-up ends below the full value.
"""


def ramp(step: int, num_steps: int) -> float:
    """Share in (0, 1] of a linear warm-up after step `step`: 1 / num_steps at step 0, 1 from step num_steps - 1 on."""
    return 1.0 if num_steps <= 0 else min(1.0, (step + 1) / num_steps)


def learning_rate(step: int, *, lr: float, warmup_steps: int, num_steps: int, decay_frac: float = 0.0) -> float:
    """lr after a linear warm-up; over the last decay_frac of num_steps it falls linearly towards 0.

    The last step has a rate above 0. decay_frac lies in [0, 1]; 0 keeps lr constant.
    """
    rate = lr * ramp(step, warmup_steps)
    decay_steps = round(decay_frac * num_steps)
    if decay_steps > 0:
        rate *= min(1.0, max(0.0, (num_steps - step) / (decay_steps + 1)))
    return rate


def active_latents(step: int, *, k: int, k_start: int | None, anneal_steps: int) -> float:
    """Active latents per row at a step: linear from k_start to k over anneal_steps and rounded, then k.

    Rounded to whole latents per row as the paper's code does, so that a step keeps the same number of codes.
    """
    if k_start is None or anneal_steps <= 0 or step >= anneal_steps:
        return float(k)
    return float(max(1, round(k_start + (k - k_start) * step / anneal_steps)))
