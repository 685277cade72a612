"""What a run will cost, before it starts: rows, bytes, memory per worker, time per stage, questions to a model.

Sizes are arithmetic (sizes.py); speeds are measured on the machine that plans with the run's own code (times.py,
calibration.py), so the hours hold for workers like it. Stages that ask for a GPU are taken from a table of data sheets.
A store that cannot fit is refused here and again when a run starts.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.analyses.autointerp_prompts import Cost, cost_text, planned_cost
from pipeline.config.run_file import RunConfig
from pipeline.planning import sizes
from pipeline.planning.calibration import GPU_SHARE
from pipeline.planning.sizes import Reading, format_bytes
from pipeline.planning.times import Asked, durations
from pipeline.run.runner import DONE, StepState
from pipeline.stages.autointerp import planned_latents
from pipeline.stages.catalogue import AutointerpInputs, DataSteps, ReportInputs
from pipeline.storage.filesystem import Storage
from pipeline.terminal import format_seconds


class Estimate(NamedTuple):
    """Predicted size and cost of the missing part of a run."""

    reading: Reading | None
    """Documents, tokens and rows; None where neither budget nor corpus says."""
    num_bytes: int | None
    """Bytes of the activation store."""
    checkpoint_bytes: int | None
    """Bytes of checkpoints and crosscoders."""
    training_bytes_per_rank: int | None
    """Parameters, gradients, Adam state and one batch of pre-activations of one rank; None where nothing is fitted."""
    extraction_bytes_per_worker: int | None
    """Both models up to layer L, one shard and one batch."""
    seconds: dict[str, float]
    """Per stage that is not done."""


def estimate(config: RunConfig, states: Sequence[StepState], storage: Storage, *, gpu: str = "A100") -> Estimate:
    """The prediction for what is not done; `gpu` names the GPU (calibration.GPUS) of stages that ask for one."""
    return _estimate(_asked(config, states, storage), gpu)


def _asked(config: RunConfig, states: Sequence[StepState], storage: Storage) -> Asked:
    data = _data_of(states)
    records = {state.step.key.stage: state.record for state in states if state.record is not None}
    missing = frozenset(state.step.key.stage for state in states if state.state != DONE)
    read = sizes.reading(config, data, records, storage)
    model_config = sizes.model_config(config, data, records, storage)
    tokenizer = sizes.local_tokenizer(data, records, storage)
    return Asked(config, missing, records, read, model_config, tokenizer, storage)


def _data_of(states: Sequence[StepState]) -> DataSteps:
    """The data steps of a run, which its report reads too."""
    (data,) = (state.step.inputs.data for state in states if isinstance(state.step.inputs, ReportInputs))
    return data


def _estimate(asked: Asked, gpu: str) -> Estimate:
    config, read = asked.config, asked.reading
    seconds = durations(asked, gpu=gpu)
    if read is None:
        return Estimate(None, None, None, None, None, seconds)
    shape = sizes.shape_of(asked.model_config)
    return Estimate(
        read,
        sizes.store_bytes(read.stored_rows, shape.width, config.activations.compression),
        sizes.checkpoint_bytes(config, shape.width),
        sizes.training_bytes(config, shape.width) if sizes.dictionary_sizes(config, shape.width) else None,
        sizes.extraction_bytes(config, shape),
        seconds,
    )


def estimate_text(config: RunConfig, states: Sequence[StepState], storage: Storage, *, gpu: str = "A100") -> str:
    """The estimate in a few lines; an InputError where the store cannot fit the free space."""
    asked = _asked(config, states, storage)
    if asked.reading is not None and "activations" in asked.missing:
        activations = _data_of(states).activations
        sizes.require_space(config, asked.reading, sizes.shape_of(asked.model_config), activations, storage)
    result = _estimate(asked, gpu)
    lines = ["estimate"]
    read = result.reading
    if read is not None:
        bound = {sizes.EXACT: "", sizes.SAMPLED: "about ", sizes.KNOWN: "", sizes.BUDGET: "at most "}[read.source]
        lines.append(f"  tokens       {bound}{read.num_tokens:,} ({read.source})")
        lines.append(f"  rows         {bound}{read.num_rows:,} (both models, layer {config.activations.layer})")
    for name, value, note in (
        ("store", result.num_bytes, f"compression {config.activations.compression}"),
        ("fits", result.checkpoint_bytes, "checkpoints and crosscoders"),
        ("extraction", result.extraction_bytes_per_worker, "of memory per worker"),
        ("training", result.training_bytes_per_rank, f"of memory per worker, {_mesh(config)}"),
    ):
        if value is not None:
            lines.append(f"  {name:<13}{format_bytes(value)} ({note})")
    lines += [f"  {stage:<13}{format_seconds(value)}" for stage, value in result.seconds.items()]
    if config.analyses.autointerp is not None and any(_is_to_ask(state) for state in states):
        lines.append(f"  autointerp   {_asking_text(config, states)}")
    total = sum(result.seconds.values())
    lines.append(
        f"  total        {format_seconds(total)}"
        + ("" if result.num_bytes or not result.seconds else " + what depends on the number of tokens")
    )
    named = _named_nodes(config)
    if named:
        lines.append(f"  nodes        {named}")
    uses_gpu = config.resources.extraction.gpus > 0 or config.resources.training.gpus > 0
    if uses_gpu and result.seconds:
        lines.append(f"  assumed      {gpu} at {GPU_SHARE:.0%} of its data sheet; name another with --gpu")
    return "\n".join(lines)


def _is_to_ask(state: StepState) -> bool:
    return isinstance(state.step.inputs, AutointerpInputs) and state.state != DONE


def _asking_text(config: RunConfig, states: Sequence[StepState]) -> str:
    """What automatic interpretation will send at most; answers that are there already are not taken off."""
    section, endpoint = config.analyses.autointerp, config.resources.autointerp
    assert section is not None
    cost = Cost(0, 0, 0)
    records = {state.step.key.fingerprint: state.record for state in states}
    for inputs in (state.step.inputs for state in states if state.state != DONE):
        if not isinstance(inputs, AutointerpInputs):
            continue
        record = records[inputs.latents.key.fingerprint]
        num_latents = planned_latents(section, record.counts if record is not None else None)
        own = planned_cost(
            num_latents,
            section.num_explaining,
            section.num_active + section.num_quiet,
            num_tests=2 if section.with_control else 1,
            contexts_per_request=section.contexts_per_request,
            context_tokens=2 * inputs.examples.inputs.section.window_tokens + 1,
        )
        cost = cost.plus(own)
    return (
        f"at most {cost_text(cost, endpoint.price_in, endpoint.price_out)}, to {endpoint.base_url or 'no endpoint yet'}"
    )


def _named_nodes(config: RunConfig) -> str:
    """The custom resources that stages ask of their nodes; empty where none does."""
    stages = (name for name, section in config.resources if getattr(section, "custom", None))
    asked = {name: getattr(config.resources, name).custom for name in stages}
    return "; ".join(
        f"{name} where nodes offer {', '.join(f'{amount:g} {kind}' for kind, amount in custom.items())} per worker"
        for name, custom in asked.items()
    )


def _mesh(config: RunConfig) -> str:
    training = config.resources.training
    return f"{training.data} data x {training.latent} latent"
