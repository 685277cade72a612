"""How fast this machine is at this moment, measured in a few seconds with the code that a run uses.

Nothing is read from the run's models or data: layers have the real shapes and random weights, training steps the real
sizes and random rows. What is too large for a sample runs on fewer rows and latents and is scaled by arithmetic. A few
megabytes are written into an unnamed temporary file. GPUs and fixed costs are in rates.py.

Shapes: B rows, M models, D width, F latents.
"""

import copy
import dataclasses
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.spec import CrosscoderSpec
from pipeline.numerics.trainer import CrosscoderTrainer
from pipeline.planning.rates import DENSE_SHARE

_log = logging.getLogger(__name__)
_SAMPLE_SECONDS = 0.25
"""Rough time of one measurement; there are a handful."""
_SAMPLE_BYTES = 16 << 20
_FEWEST_TOKENS = 512
"""Of a timed forward pass: with fewer, reading the weights takes most of the time, as it does in no batch of a run."""
_TEXT = "the report says that seven old bridges over this river were closed because of heavy autumn floods. " * 18


def matmul_flops(num_threads: int, *, side: int = 1024, dtype: str = "float32") -> float:
    """Floating-point operations per second of a matrix product on this machine's CPUs."""
    a, b = (torch.randn(side, side).to(getattr(torch, dtype)) for _ in range(2))
    with _threads(num_threads):
        return 2 * side**3 / _best_seconds(lambda: a @ b)


def step_seconds(spec: CrosscoderSpec, batch_rows: int, *, num_threads: int, flops: float) -> float:
    """Seconds of one training step of a crosscoder on this machine's CPUs.

    Sparse steps are timed with BatchTopK, whatever the kind (other kinds cost the same once their codes are sparse);
    L1 and JumpReLU add their dense beginning.
    """
    counted = BatchTopK(k=min(spec.sparsity.k or 32, spec.num_latents))
    sparse = dataclasses.replace(spec, sparsity=counted, code_weight="crosscoder")
    seconds = _step_seconds(sparse, batch_rows, num_threads, flops)
    if spec.sparsity.may_be_dense:
        seconds += DENSE_SHARE.value * (_step_seconds(spec, batch_rows, num_threads, flops) - seconds)
    return seconds


def _step_seconds(spec: CrosscoderSpec, batch_rows: int, num_threads: int, flops: float) -> float:
    """One step, on fewer latents and rows where the encoder product alone would take too long."""
    width = spec.num_models * spec.activation_dim
    excess = 2 * batch_rows * spec.num_latents * width / (flops * _SAMPLE_SECONDS / 2)
    num_latents, num_rows = spec.num_latents, batch_rows
    if excess > 1:
        num_latents = max(min(num_latents, 1024), int(num_latents / excess))
        excess /= spec.num_latents / num_latents
    if excess > 1:
        num_rows = max(min(num_rows, 128), int(num_rows / excess))
    sampled = _sampled_step(spec, num_rows, num_latents, num_threads)
    if num_latents < spec.num_latents:
        # Decoding and its gradients cost the same for any dictionary: only what grows with it is scaled.
        fewer = _sampled_step(spec, num_rows, num_latents // 2, num_threads)
        encoder = 2 * num_rows * width / flops
        per_latent = min(max((sampled - fewer) / (num_latents - num_latents // 2), encoder), sampled / num_latents)
        sampled += per_latent * (spec.num_latents - num_latents)
    return sampled * batch_rows / num_rows


def _sampled_step(spec: CrosscoderSpec, num_rows: int, num_latents: int, num_threads: int) -> float:
    """Seconds of one step of a crosscoder like this one with so many rows and latents."""
    sample = dataclasses.replace(
        spec,
        num_latents=num_latents,
        sparsity=spec.sparsity if spec.sparsity.k is None else BatchTopK(k=min(spec.sparsity.k, num_latents)),
        precision="float32",
        kernels="auto",
    )
    trainer = CrosscoderTrainer(sample)
    x_BMD = torch.randn(num_rows, spec.num_models, spec.activation_dim)
    seconds = float("inf")
    for threads in sorted({1, num_threads}):  # on a busy machine, several threads can be slower than one
        with _threads(threads):
            seconds = min(seconds, _best_seconds(lambda: trainer.step(x_BMD)))
    return seconds


def layer_seconds(config: Any, shape: tuple[int, int], *, dtype: str, num_threads: int, flops: float) -> float:
    """Seconds per token of one decoder layer on this machine's CPUs, for (documents, tokens each) in one batch.

    `config` is a transformers configuration; its layers get random weights, its vocabulary is made small. Where an
    architecture cannot be built so small, a plain decoder of the same width stands for it.
    """
    width = int(config.hidden_size)
    num_layers = min(4 if width <= 1024 else 1, int(config.num_hidden_layers))
    num_documents, length = shape
    affordable = int(flops * _SAMPLE_SECONDS / (24 * width**2 * num_layers * length))
    affordable = max(math.ceil(_FEWEST_TOKENS / length) if length > 1 else 1, affordable)
    ids_BT = torch.randint(0, 256, (min(num_documents, affordable), length))
    with _threads(num_threads), torch.no_grad():
        try:
            seconds = _forward_seconds(_small(config, num_layers), ids_BT, dtype)
        except Exception as error:  # what an architecture raises on a size that nobody made it for has no bound
            _log.info("a plain decoder is timed in place of %s: %s", type(config).__name__, error)
            seconds = _forward_seconds(_plain_decoder(width, num_layers), ids_BT, dtype)
    return seconds / (ids_BT.numel() * num_layers)


def _forward_seconds(config: Any, ids_BT: torch.Tensor, dtype: str) -> float:
    from transformers import AutoModel

    model = AutoModel.from_config(config).to(getattr(torch, dtype)).eval()
    return _best_seconds(lambda: model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)))


def _small(config: Any, num_layers: int) -> Any:
    """The same architecture with few layers and a small vocabulary."""
    config = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[:num_layers]
    config.num_hidden_layers, config.vocab_size, config.use_cache = num_layers, 256, False
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return config


def _plain_decoder(width: int, num_layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=1,
        vocab_size=256,
        use_cache=False,
    )


def tokens_per_second(tokenise: Callable[[str], Sized]) -> float:
    """Tokens per second of one process that tokenises documents of a few hundred words."""
    return len(tokenise(_TEXT)) / _best_seconds(lambda: tokenise(_TEXT))


def write_bytes_per_second(folder: Path) -> float | None:
    """Speed of writing and syncing a file below `folder`; None where nothing can be written there."""
    while not folder.exists():
        folder = folder.parent
    data = bytes(_SAMPLE_BYTES)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return _SAMPLE_BYTES / (time.perf_counter() - started)
    except OSError:
        return None


def _best_seconds(call: Callable[[], object]) -> float:
    """Shortest time of a call over as many as fit the sample time, at least three, after one that is not counted.

    The shortest, because other work on the machine comes in bursts, which average out over a stage of minutes.
    """
    call()
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < _SAMPLE_SECONDS and len(seconds) < 50):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
