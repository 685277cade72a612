"""What a run will cost, before it starts: rows, bytes, memory per worker and hours per stage.

Arithmetic comes from the settings (and from records, where a step is done already); speed comes from a half-second
matrix product on the machine that plans, so the hours hold for workers like it. Start-up times were measured once and
are constants. A store that cannot fit is refused here, before anything is computed for it.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.analyses.autointerp_prompts import Cost, cost_text, planned_cost
from pipeline.config import RunConfig
from pipeline.errors import InputError
from pipeline.progress import format_seconds
from pipeline.runner import DONE, StepState
from pipeline.schema import MODEL_NAMES
from pipeline.sections.crosscoder import CrosscoderSection
from pipeline.stages import autointerp
from pipeline.storage import Storage

_START_CLUSTER_SECONDS = 5.0
_START_TRAIN_SECONDS = 12.0
_START_POOL_SECONDS = 5.0
_ORGANISM_SECONDS = {"demo": 90.0, "tiny": 10.0}
_LOAD_PAIR_SECONDS = 10.0
_TOKENS_PER_SECOND = 100_000.0
_FORWARD_EFFICIENCY = 0.2
"""Share of the matrix product's speed that small transformer layers reach on a CPU."""
_STEP_OVERHEAD_SECONDS = 0.008
"""Of one training step of one crosscoder, whatever its size."""
_MEASURE_SECONDS = 20.0
"""Both passes over few validation rows: start-up, intervals, scores."""
_MODEL_ANALYSIS_SECONDS = 12.0
"""Causality or steering of tiny models; of large ones it depends on their upper halves and is not predicted."""
_STEP_FACTOR = 2.2
"""Cost of a training step as a multiple of its encoder matrix product (workloads/benchmarks/step_notes.md)."""
_BYTES_BF16, _BYTES_FP32 = 2, 4


class Estimate(NamedTuple):
    """Predicted size and cost of the missing part of a run."""

    num_rows: int | None
    """Rows of the activation store, in stream mode those of validation; None where neither budget nor index says."""
    num_bytes: int | None
    """Bytes of the activation store."""
    training_bytes_per_rank: int | None
    """Parameters, gradients, Adam state and one batch of pre-activations of one rank; None where nothing is fitted."""
    seconds: dict[str, float]
    """Per stage that is not done."""


def estimate(config: RunConfig, states: Sequence[StepState], activation_dim: int | None) -> Estimate:
    """The prediction; `activation_dim` is the models' width, where it is known."""
    records = {state.step.key.stage: state.record for state in states if state.record is not None}
    missing = {state.step.key.stage for state in states if state.state != DONE}
    num_tokens = records["tokens"].counts["num_tokens"] if "tokens" in records else config.tokens.num_tokens
    num_rows = records["activations"].counts["num_rows"] if "activations" in records else num_tokens
    width = records["activations"].counts["activation_dim"] if "activations" in records else activation_dim
    flops = _measured_flops()
    seconds: dict[str, float] = {}
    if missing - {"report"}:
        seconds["start"] = _START_CLUSTER_SECONDS
    if "organism" in missing and config.organism is not None:
        seconds["organism"] = _ORGANISM_SECONDS[config.organism.size]
    if "tokens" in missing and num_tokens is not None:
        seconds["tokens"] = _START_POOL_SECONDS + num_tokens / _TOKENS_PER_SECOND
    if num_rows is None or width is None:
        return Estimate(num_rows, None, None, seconds)
    num_models = len(MODEL_NAMES)
    is_streamed = config.activations.mode == "stream"
    if is_streamed and "activations" not in records:
        num_rows = int(num_rows * config.corpus.validation_frac)  # the training rows are not kept
    extract_seconds = 24 * width**2 * config.activations.layer * num_models / (flops * _FORWARD_EFFICIENCY)
    if "activations" in missing:
        seconds["activations"] = _LOAD_PAIR_SECONDS + num_rows * extract_seconds
    fitted = [section for section in config.crosscoders if isinstance(section, CrosscoderSection)]
    sizes = [section.num_latents or (section.expansion or 0) * width for section in fitted]
    encoder_flops = 2 * sum(sizes) * num_models * width
    if "crosscoder" in missing and fitted:
        per_row = encoder_flops * _STEP_FACTOR / flops
        num_steps = config.training.num_rows / config.training.batch_rows
        overhead = num_steps * len(sizes) * _STEP_OVERHEAD_SECONDS
        seconds["crosscoder"] = _START_TRAIN_SECONDS + config.training.num_rows * per_row + overhead
        if is_streamed:
            seconds["crosscoder"] += _LOAD_PAIR_SECONDS + config.training.num_rows * extract_seconds
    if "latents" in missing:
        num_validation = num_rows * (1.0 if is_streamed else config.corpus.validation_frac)
        seconds["latents"] = _MEASURE_SECONDS + 2 * num_validation * encoder_flops * 2 / flops
    seconds |= {stage: _MODEL_ANALYSIS_SECONDS for stage in ("causality", "steering") if stage in missing}
    ranks = config.resources.training
    own_rows = config.training.batch_rows / ranks.data
    parameters = sum(2 * size * num_models * width for size in sizes) / ranks.latent
    training_bytes = int(
        parameters * 4 * _BYTES_FP32 + 2.5 * own_rows * max(sizes, default=0) / ranks.latent * _BYTES_FP32
    )
    num_bytes = num_rows * num_models * width * _BYTES_BF16
    return Estimate(num_rows, num_bytes, training_bytes if fitted else None, seconds)


def estimate_text(config: RunConfig, states: Sequence[StepState], storage: Storage) -> str:
    """The estimate in a few lines; an InputError where the store cannot fit the free space."""
    result = estimate(config, states, _width_of(config))
    lines = ["estimate"]
    if result.num_rows is not None:
        lines.append(f"  rows        {result.num_rows:,} (both models, layer {config.activations.layer})")
    if result.num_bytes is not None:
        lines.append(f"  store       {_format_bytes(result.num_bytes)}")
        _check_space(result.num_bytes, states, storage)
    if result.training_bytes_per_rank is not None:
        lines.append(f"  training    {_format_bytes(result.training_bytes_per_rank)} per worker, {_workers(config)}")
    lines += [f"  {stage:<12}{format_seconds(value)}" for stage, value in result.seconds.items()]
    if config.analyses.autointerp is not None and any(_is_to_ask(state) for state in states):
        lines.append(f"  autointerp  {_asking_text(config, states)}")
    total = sum(result.seconds.values())
    known = result.num_bytes is not None
    lines.append(f"  total       {format_seconds(total)}" + ("" if known else " + what depends on the models' width"))
    return "\n".join(lines)


def _is_to_ask(state: StepState) -> bool:
    return state.step.key.stage == autointerp.NAME and state.state != DONE


def _asking_text(config: RunConfig, states: Sequence[StepState]) -> str:
    """What automatic interpretation will send at most; answers that are there already are not taken off."""
    section, endpoint = config.analyses.autointerp, config.resources.autointerp
    assert section is not None
    cost = Cost(0, 0, 0)
    records = {state.step.key.fingerprint: state.record for state in states}
    for step in (state.step for state in states if _is_to_ask(state)):
        record = records[step.inputs["latents"].key.fingerprint]
        num_latents = autointerp.planned_latents(section, record.counts if record is not None else None)
        own = planned_cost(
            num_latents,
            section.num_explaining,
            section.num_active + section.num_quiet,
            contexts_per_request=section.contexts_per_request,
            context_tokens=2 * step.extra["window_tokens"] + 1,
        )
        cost = cost.plus(own)
    return (
        f"at most {cost_text(cost, endpoint.price_in, endpoint.price_out)}, to {endpoint.base_url or 'no endpoint yet'}"
    )


def _workers(config: RunConfig) -> str:
    training = config.resources.training
    return f"{training.data} data x {training.latent} latent"


def _width_of(config: RunConfig) -> int | None:
    """Residual width from the chat model's config; None for an organism that is not built yet."""
    from pipeline.sections.data import HubModel

    chat, base = config.models.chat, config.models.base
    if not isinstance(chat, HubModel) or not isinstance(base, HubModel):
        return None
    from pipeline.operators.loading import ModelSpec, check_pair

    specs = [ModelSpec(m.source, m.revision, m.adapter, m.trust_remote_code) for m in (base, chat)]
    return check_pair(specs[0], specs[1], layer=config.activations.layer).activation_dim


def _check_space(num_bytes: int, states: Sequence[StepState], storage: Storage) -> None:
    is_done = any(state.step.key.stage == "activations" and state.state == DONE for state in states)
    free = storage.free_bytes()
    if not is_done and free is not None and num_bytes > free:
        raise InputError(
            f"storage.root: expected {_format_bytes(num_bytes)} of free space for the activations, got "
            f"{_format_bytes(free)} on {storage.root}; lower tokens.num_tokens to about "
            f"{int(free / num_bytes * 100)}% or set storage.root elsewhere"
        )


def _measured_flops() -> float:
    """Floating-point operations per second of a float32 matrix product on this machine."""
    import torch

    side = 1024
    a, b = torch.randn(side, side), torch.randn(side, side)
    a @ b
    started, count = time.monotonic(), 0
    while time.monotonic() - started < 0.5:
        a @ b
        count += 1
    return 2 * side**3 * count / (time.monotonic() - started)


def _format_bytes(number: int) -> str:
    value = float(number)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:,.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError
