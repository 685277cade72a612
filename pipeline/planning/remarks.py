"""What will not go well on the machine that runs, told by `plan` and by the run itself."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config.run_file import RunConfig

if TYPE_CHECKING:
    from pipeline.run.flow import AnyStep

_NOTICEABLE_SLOWDOWN = 1.5
"""Of a dtype against float32, from which on it is told."""


def slow_dtype(config: RunConfig, missing: "Sequence[AnyStep]") -> str | None:
    """Said where models are to run on this machine's CPU in a format for which it has no instructions."""
    reads_models = any(step.key.stage in ("activations", "evidence") for step in missing)
    dtype, on_cpu = config.models.dtype, config.resources.extraction.gpus == 0
    if not reads_models or not on_cpu or dtype == "float32" or config.resources.cluster.address != "local":
        return None
    from pipeline.planning.calibration import matmul_flops

    slowdown = matmul_flops(1, dtype="float32") / matmul_flops(1, dtype=dtype)
    if slowdown <= _NOTICEABLE_SLOWDOWN:
        return None
    return (
        f"models.dtype: {dtype} takes {slowdown:.1f} times as long as float32 on this machine's CPU, which has no "
        f"instructions for it; float32 gives finer numbers for twice the memory"
    )
