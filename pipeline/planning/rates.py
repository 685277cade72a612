"""Every rate and fixed cost that a plan is made of, in one table; each says whether it was measured or assumed.

`crossray plan` (times.py) and the model of large clusters (infra/scaling.py) read them here. Speeds of the machine at
hand are not in this table: calibration.py measures them. Nothing is imported, so that reading it costs nothing.
"""

from typing import Literal, NamedTuple


class Rate(NamedTuple):
    """One number of the table."""

    value: float
    basis: Literal["measured", "assumed", "data sheet"]
    meaning: str
    """Unit, and where it was read."""


class Gpu(NamedTuple):
    """A GPU's dense matrix speed by data sheet, FLOP/s."""

    bfloat16: float
    tf32: float
    float32: float


GPUS = {
    "T4": Gpu(65e12, 8.1e12, 8.1e12),
    "V100": Gpu(125e12, 15.7e12, 15.7e12),
    "RTX4090": Gpu(165e12, 82e12, 82e12),
    "A100": Gpu(312e12, 156e12, 19.5e12),
    "L40S": Gpu(362e12, 183e12, 91e12),
    "H100": Gpu(989e12, 494e12, 67e12),
    "H200": Gpu(989e12, 494e12, 67e12),
}
"""Data sheets; float16 on T4 and V100, which have no bfloat16 units."""
GPU_SHARE = Rate(0.4, "assumed", "of a GPU's data sheet that forward passes and training steps reach")
GPU_MEMORY = Rate(2e12, "data sheet", "bytes per second of an A100; bounds generation and Adam")
ADAM_BYTES = Rate(32, "assumed", "per parameter and step: weight, gradient, moments read; three written, one cleared")
STEP_OVER_ENCODER = Rate(1.41, "measured", "a training step over its encoder product (step_notes.md, CPU, one thread)")
TRAINING_OVERHEAD = Rate(1.1, "assumed", "of reading rows, checkpoints and dead latents, over the steps alone")
DENSE_SHARE = Rate(0.1, "assumed", "of an L1 or JumpReLU training with codes so dense that a step takes the dense path")
ROW_PASSES = Rate(2.0, "assumed", "analyses of a validation row, in a training step's share of a row")
LOG_SECONDS = Rate(0.004, "assumed", "of one logged point: the metrics wait for the device")
UPPER_OVERHEAD = Rate(1.3, "assumed", "edits, codes and KL sums, over the upper layers alone")
DECODE_OVERHEAD = Rate(1.8, "assumed", "prompts, cache, hooks and the answers' likelihood, over the decode steps alone")
CHARACTERS_PER_SECOND = Rate(8e6, "assumed", "read, hashed and written by one worker")
CHARACTERS_PER_TOKEN = Rate(4.5, "assumed", "of English text")
TOKENS_PER_SECOND = Rate(300_000, "assumed", "of a fast tokenizer in one process, where the run's own is not here")
MASKING_SHARE = Rate(0.25, "assumed", "of the tokenizer's speed that is left once dialogues are rendered and masked")
LOSSLESS_SHARE = Rate(0.67, "measured", "of a bfloat16's bytes after lossless compression (store_notes.md)")
REFERENCE_FLOPS = Rate(87e9, "measured", "float32 product, one thread, of the machine of START_SECONDS (Zen 4)")

START_SECONDS = {
    "start": 6.0,
    "corpus": 2.0,
    "tokens": 3.0,
    "activations": 9.0,
    "crosscoder": 12.0,
    "measurements": 2.5,
    "evidence": 8.0,
    "logit_lens": 8.0,
    "causality": 8.0,
    "steering": 9.0,
    "report": 1.0,
}
"""Measured on demo runs: seconds before a stage works (processes, imports, loading); `measurements` per crosscoder."""
ORGANISM_SECONDS = {"demo": 88.0, "tiny": 10.0}
"""Measured: building a generated pair."""
ORGANISM_TEXTS = {
    "demo": {"documents": (6000, 248_083), "dialogues": (4195, 242_807)},
    "tiny": {"documents": (300, 11_189), "dialogues": (200, 11_363)},
}
"""Measured: documents and tokens of a generated pair's texts (seed 0; other seeds differ by a percent or two)."""
