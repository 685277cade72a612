"""What a run will cost, before it starts: rows, bytes, memory per worker, time per stage, requests to a language model.

Sizes are arithmetic (sizes.py); speeds are measured on the machine that plans with the run's own code (times.py,
calibration.py), so the hours hold for workers like it; the speed of GPUs is taken from data sheets (rates.py).
A run of which every step is done is answered from its records: no model, tokenizer or clock is touched.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pipeline.cluster.connect import local_cpus
from pipeline.config.run_file import RunConfig
from pipeline.errors import InputError
from pipeline.planning import shapes, sizes
from pipeline.planning.rates import GPU_SHARE
from pipeline.planning.remarks import slow_dtype
from pipeline.planning.sizes import DataSize, format_bytes
from pipeline.planning.times import PlanInputs, durations
from pipeline.stages.catalogue import AutointerpInputs, DataSteps, ReportInputs
from pipeline.terminal import format_seconds

if TYPE_CHECKING:
    from pipeline.run.runner import StepState
    from pipeline.storage.filesystem import Storage


class Estimate(NamedTuple):
    """Predicted size and cost of the missing part of a run."""

    data: DataSize | None
    """Documents, tokens and rows; None where neither budget nor corpus tells."""
    num_bytes: int | None
    """Bytes of the activation store."""
    checkpoint_bytes: int | None
    """Bytes of checkpoints and crosscoders; None where everything is done."""
    training_bytes_per_rank: int | None
    """Parameters, gradients, Adam state and one batch of pre-activations of one rank; None where nothing is trained."""
    extraction_bytes_per_worker: int | None
    """Both models up to layer L, one shard and one batch; None where everything is done."""
    seconds: dict[str, float]
    """Per stage that is not done."""


def estimate(
    config: RunConfig,
    states: "Sequence[StepState]",
    storage: "Storage",
    *,
    gpu: str = "A100",
    must_fit: bool = False,
) -> Estimate:
    """The prediction for what is not done; `gpu` names the GPU (rates.GPUS) of stages that ask for one.

    must_fit: InputError where the activation store cannot fit the free space.
    """
    steps = _data_steps(states)
    records = {state.step.key.stage: state.record for state in states if state.record is not None}
    missing = frozenset(state.step.key.stage for state in states if state.record is None)
    data = sizes.data_size(config, steps, records, storage)
    if not missing:
        activations = records.get("activations")
        num_bytes = None if activations is None else int(activations.counts["num_bytes"])
        return Estimate(data, num_bytes, None, None, None, {})
    from pipeline.run.checks import check_models, check_organism  # imports torch, which a finished run can do without

    adopted = [state.step for state in states if state.step.key.stage == "crosscoder"]
    check_models(steps.activations.inputs.loading, adopted, address=config.resources.cluster.address, only_local=True)
    check_organism([state.step for state in states if state.record is None], config.activations.layer_number)
    model_config = shapes.model_config(config, steps, records, storage)
    shape = shapes.shape_of(model_config)
    if must_fit and data is not None and "activations" in missing:
        sizes.require_space(config, data, shape.width, steps.activations, storage)
    tokenizer = sizes.local_tokenizer(steps, records, storage)
    inputs = PlanInputs(config, missing, records, data, model_config, tokenizer, storage)
    seconds = durations(inputs, gpu=gpu)
    if data is None:
        return Estimate(None, None, None, None, None, seconds)
    return Estimate(
        data,
        sizes.store_bytes(data.stored_rows, shape.width, config.activations.compression),
        sizes.checkpoint_bytes(config, shape.width),
        sizes.training_bytes(config, shape.width) if sizes.dictionary_sizes(config, shape.width) else None,
        sizes.extraction_bytes(config, shape),
        seconds,
    )


def estimate_text(config: RunConfig, states: "Sequence[StepState]", storage: "Storage", *, gpu: str = "A100") -> str:
    """The estimate in a few lines; an InputError where the store cannot fit the free space."""
    result = estimate(config, states, storage, gpu=gpu, must_fit=True)
    lines = ["estimate"]
    if result.data is not None:
        words = {sizes.SAMPLED: "about ", sizes.ASSUMED: "about ", sizes.BUDGET: "at most "}
        bound = words.get(result.data.source, "")
        lines.append(f"  tokens       {bound}{result.data.num_tokens:,} ({result.data.source})")
        lines.append(
            f"  rows         {bound}{result.data.num_rows:,} (both models, layer {config.activations.layer_number})"
        )
    training = config.resources.training
    mesh = f"{training.data} data x {training.latent} latent"
    for name, value, note in (
        ("store", result.num_bytes, f"compression {config.activations.compression}"),
        ("fits", result.checkpoint_bytes, "checkpoints and crosscoders"),
        ("extraction", result.extraction_bytes_per_worker, "of memory per worker"),
        ("training", result.training_bytes_per_rank, f"of memory per worker, {mesh}"),
    ):
        if value is not None:
            lines.append(f"  {name:<13}{format_bytes(value)} ({note})")
    lines += [f"  {stage:<13}{format_seconds(value)}" for stage, value in result.seconds.items()]
    if any(isinstance(state.step.inputs, AutointerpInputs) and state.record is None for state in states):
        lines.append(f"  autointerp   {_requests_text(config, states)}")
    is_complete = result.data is not None or not result.seconds
    unknown = "" if is_complete else " + what depends on the number of tokens"
    lines.append(f"  total        {format_seconds(sum(result.seconds.values()))}{unknown}")
    lines += [f"  {'this machine':<13}{remark}" for remark in _remarks(config, states, result.data)]
    if result.seconds and shapes.is_assumed(config):
        lines.append("  assumed      the models' shape from a table, since they are not on this machine")
    if named := _named_nodes(config):
        lines.append(f"  nodes        {named}")
    if result.seconds and (config.resources.extraction.gpus > 0 or training.gpus > 0):
        lines.append(f"  assumed      {gpu} at {GPU_SHARE.value:.0%} of its data sheet; name another with --gpu")
    return "\n".join(lines)


def _remarks(config: RunConfig, states: "Sequence[StepState]", data: DataSize | None) -> list[str]:
    """What will not work, or not well, on the machine that plans, where it is the one that runs."""
    missing = [state.step for state in states if state.record is None]
    if not missing or config.resources.cluster.address != "local":
        return []
    from pipeline.run.checks import check_local_resources

    remarks = []
    try:
        check_local_resources(missing, config.resources)
    except InputError as error:  # the run may be meant for another machine: said, not refused
        remarks.append(f"cannot hold this run: {error}")
    if slow := slow_dtype(config, missing):
        remarks.append(slow)
    if data is not None and "activations" in (step.key.stage for step in missing):
        remarks += _too_few_shards(config, data.stored_rows)
    return remarks


def _too_few_shards(config: RunConfig, num_rows: int) -> list[str]:
    """Said where extraction workers would stand idle, since each makes whole shards."""
    section, pool = config.activations, config.resources.extraction
    workers = pool.workers or max(1, int((config.resources.cluster.num_cpus or local_cpus()) / pool.cpus))
    num_shards = max(1, math.ceil(num_rows / section.rows_per_shard))
    if pool.gpus > 0 or num_shards >= workers or num_rows == 0:
        return []
    return [
        f"activations.rows_per_shard: {section.rows_per_shard:,} makes {num_shards} of about {num_rows:,} rows, but "
        f"{workers} workers could extract: the others stand idle, and a run that is killed begins anew; set it to "
        f"{max(1, num_rows // (4 * workers)):,} or less"
    ]


def _data_steps(states: "Sequence[StepState]") -> DataSteps:
    """The data steps of a run, which its report reads too."""
    (data,) = (state.step.inputs.data for state in states if isinstance(state.step.inputs, ReportInputs))
    return data


def _requests_text(config: RunConfig, states: "Sequence[StepState]") -> str:
    """What automatic interpretation will send at most; answers that are there already are not subtracted."""
    from pipeline.analyses.autointerp_prompts import Cost, cost_text, planned_cost
    from pipeline.stages.autointerp import planned_latents

    section, endpoint = config.analyses.autointerp, config.resources.autointerp
    assert section is not None
    cost = Cost(0, 0, 0)
    records = {state.step.key.fingerprint: state.record for state in states}
    for inputs in (state.step.inputs for state in states if state.record is None):
        if not isinstance(inputs, AutointerpInputs):
            continue
        record = records[inputs.latents.key.fingerprint]
        own = planned_cost(
            planned_latents(section, record.counts if record is not None else None),
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
    wanted = ((name, getattr(section, "custom", None)) for name, section in config.resources)
    return "; ".join(
        f"{name} where nodes offer {', '.join(f'{amount:g} {kind}' for kind, amount in custom.items())} per worker"
        for name, custom in wanted
        if custom
    )
