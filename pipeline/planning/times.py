"""How long each stage of a run takes: start-up, and work over a speed measured on this machine or taken from a table.

Time of a stage = start-up x slowness + work / workers. Work by stage: tokens over the tokenizer's speed; tokens x
layers x models over a layer's speed; training steps; validation rows x passes; conversations x interventions x upper
layers; answers x tokens x layers. Start-up costs were read once, on the machine whose speed is calibration's reference.
Not predicted: downloads, queues, restarts, a language model that is asked.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.data import OrganismModel
from pipeline.config.resources import WorkersSection
from pipeline.config.run_file import RunConfig
from pipeline.errors import InputError
from pipeline.planning import sizes
from pipeline.planning.calibration import (
    GPU_SHARE,
    GPUS,
    REFERENCE_FLOPS,
    Gpu,
    layer_seconds,
    matmul_flops,
    step_seconds,
    tokens_per_second,
    write_bytes_per_second,
)
from pipeline.planning.sizes import NUM_MODELS, ModelShape, Reading
from pipeline.stages.crosscoder_spec import spec_of
from pipeline.storage.artifacts import Record
from pipeline.storage.filesystem import Storage
from pipeline.text.tokenise import Tokenise

START = {
    "start": 6.0,
    "corpus": 2.0,
    "tokens": 3.0,
    "activations": 9.0,
    "crosscoder": 12.0,
    "measurements": 2.5,
    "causality": 8.0,
    "steering": 9.0,
    "report": 1.0,
}
"""Seconds before a stage works: processes, imports, loading; of `measurements` per crosscoder, bootstrap included."""
_ORGANISM_SECONDS = {"demo": 88.0, "tiny": 10.0}
_CHARACTERS_PER_SECOND = 8e6
"""Read, hashed and written by one worker."""
_TOKENS_PER_SECOND = 300_000.0
"""Of a fast tokenizer in one process, where the run's own is not on this machine."""
_MASKING = 0.25
"""Share of the tokenizer's speed that is left when dialogues are rendered, masked and written too."""
_ROW_PASSES = 2.0
"""Cost of the analyses of a validation row, in training steps' shares of a row: two passes and Latent Scaling."""
_LOG_SECONDS = 0.004
"""Of one logged point: the metrics' wait for the device."""
_CHARACTERS_PER_TOKEN = 4.5
_STEP_FACTOR = 2.2
"""Cost of a training step as a multiple of its encoder matrix product (workloads/benchmarks/step_notes.md)."""
_SHARED_EDITS, _EDITS, _CURVE_POINTS = 5, 10, 8
"""Interventions that all crosscoders share, those of each, and points of one curve (analyses/interventions.py)."""
_BEHAVIOURS = 4
"""Of an organism; prompts of one's own may have more."""
_TRAINING_OVERHEAD = 1.1
"""Reading rows, checkpoints and dead latents, as a multiple of the steps alone."""
_DECODE_OVERHEAD = 1.8
"""Prompts, cache, hooks and the answers' likelihood, as a multiple of the layers' decode steps alone."""
_UPPER_OVERHEAD = 1.3
"""Edits, codes and KL sums, as a multiple of the upper layers alone."""
_GPU_MEMORY_BYTES_PER_SECOND = 2e12
"""For generation, which reads all weights for every token, and for Adam, which moves more than it computes."""
_ADAM_BYTES = 32
"""Per parameter and step: weight, gradient and two moments read, three of them written, the gradient cleared."""


class Speeds(NamedTuple):
    """Of this machine, or of the GPU that is assumed."""

    slowness: float
    """Multiple of the start-up times' reference."""
    num_cpus: int
    cpu_flops: float
    layer_token_seconds: float
    """One layer, one token, one extraction worker."""
    decode_token_seconds: float
    """One layer, one decode step of a batch of prompts, divided by the batch."""
    head_token_seconds: float
    """Unembedding of one token."""
    tokens_per_second: float
    """Of one tokenising worker."""
    step_seconds: float
    """One training step of all crosscoders."""
    write_bytes_per_second: float | None


class Asked(NamedTuple):
    """What is to be predicted."""

    config: RunConfig
    missing: frozenset[str]
    """Stages that are not done."""
    records: Mapping[str, Record]
    """Of the stages that are."""
    reading: Reading | None
    model_config: Any
    """The models' transformers configuration."""
    tokenizer: Any
    """The chat model's, where it lies on this machine; else None."""
    storage: Storage


def durations(asked: Asked, *, gpu: str) -> dict[str, float]:
    """Seconds per stage that is missing, in order; what depends on an unknown number of rows is left out."""
    if not asked.missing - {"report"}:
        return {stage: START["report"] for stage in asked.missing}
    shape = sizes.shape_of(asked.model_config)
    speeds = _speeds(asked, shape, gpu=gpu)
    seconds = {"start": START["start"] * speeds.slowness}
    seconds |= _data_seconds(asked, speeds)
    if asked.reading is None:
        return seconds
    if asked.missing & {"activations"}:
        seconds["activations"] = _extraction_seconds(asked, asked.reading, shape, speeds)
    seconds |= _dictionary_seconds(asked, asked.reading, shape, speeds)
    seconds |= _model_seconds(asked, asked.reading, shape, speeds)
    if "report" in asked.missing:
        seconds["report"] = START["report"] * speeds.slowness
    return seconds


def _speeds(asked: Asked, shape: ModelShape, *, gpu: str) -> Speeds:
    """Measure what the missing stages need; a few seconds."""
    if gpu not in GPUS:
        raise InputError(f"--gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    config, storage = asked.config, asked.storage
    here = len(os.sched_getaffinity(0))
    num_cpus = config.resources.cluster.num_cpus or here
    flops = matmul_flops(min(num_cpus, here))
    layer = decode = head = step = 0.0
    if asked.reading is not None:
        if asked.missing & {"activations", "causality", "steering"}:
            layer, decode, head = _model_speeds(config, asked.model_config, asked.reading, flops, GPUS[gpu])
        if asked.missing & {"crosscoder", "latents", "examples", "planted"}:
            step = _training_speed(config, shape.width, flops, GPUS[gpu])
    speed = write_bytes_per_second(Path(storage.root)) if storage.is_local else None
    slowness = REFERENCE_FLOPS / matmul_flops(1)
    tokenised = _TOKENS_PER_SECOND / slowness
    if "tokens" in asked.missing and asked.tokenizer is not None:
        tokenise = Tokenise(asked.tokenizer, max_tokens=1 << 20)
        # A folder without a tokenizer's files may load as one without words, which makes no tokens.
        tokenised = tokens_per_second(lambda text: tokenise.plain(text).input_ids) or tokenised
    return Speeds(slowness, num_cpus, flops, layer, decode, head, tokenised, step, speed)


def _model_speeds(
    config: RunConfig, model_config: Any, read: Reading, flops: float, gpu: Gpu
) -> tuple[float, float, float]:
    """Seconds of a layer per token, of a layer per token while decoding, of the unembedding per token."""
    shape = sizes.shape_of(model_config)
    num_prompts = config.analyses.steering.num_prompts if config.analyses.steering is not None else 1
    if config.resources.extraction.gpus > 0:
        reached = GPU_SHARE * (gpu.float32 if config.models.dtype == "float32" else gpu.bfloat16)
        layer = 2 * shape.layer_parameters / reached
        decode = shape.layer_parameters * 2 / _GPU_MEMORY_BYTES_PER_SECOND / num_prompts
        return layer, max(layer, decode), 2 * shape.width * shape.vocab_size / reached
    threads = max(1, int(config.resources.extraction.cpus))
    length = max(2, min(round(read.tokens_per_document), config.tokens.max_tokens_per_document))
    common: dict[str, Any] = {"dtype": config.models.dtype, "num_threads": threads, "flops": flops / 2}
    layer = layer_seconds(model_config, (max(1, sizes.batch_tokens(config) // length), length), **common)
    decode = layer_seconds(model_config, (num_prompts, 1), **common)
    return layer, decode, 2 * shape.width * shape.vocab_size / (flops * threads / max(1, len(os.sched_getaffinity(0))))


def _training_speed(config: RunConfig, width: int, flops: float, gpu: Gpu) -> float:
    """Seconds of one training step of all crosscoders on one of the ranks, which share the work."""
    ranks = config.resources.training
    num_ranks = ranks.data * ranks.latent
    fitted = [section for section in config.crosscoders if section.kind == "fitted"]
    if ranks.gpus > 0:
        speed = {"float32": gpu.float32, "tf32": gpu.tf32, "bfloat16": gpu.bfloat16}[config.training.precision]
        parameters = sizes.parameters(config, width)
        work = config.training.batch_rows * parameters  # of the encoder's product: half the weights, twice
        own = parameters / ranks.latent  # every data rank updates all of them
        update = _ADAM_BYTES * own / _GPU_MEMORY_BYTES_PER_SECOND
        return _STEP_FACTOR * work / (GPU_SHARE * speed) / num_ranks + update
    num_threads = max(1, int(ranks.cpus or len(os.sched_getaffinity(0)) / num_ranks))
    specs = [spec_of(s, config.training, ranks, num_models=NUM_MODELS, activation_dim=width) for s in fitted]
    seconds = [step_seconds(spec, config.training.batch_rows, num_threads=num_threads, flops=flops) for spec in specs]
    return sum(seconds) / num_ranks


def _data_seconds(asked: Asked, speeds: Speeds) -> dict[str, float]:
    """organism, corpus and tokens."""
    config, seconds = asked.config, {}
    if "organism" in asked.missing and config.organism is not None:
        seconds["organism"] = _ORGANISM_SECONDS[config.organism.size] * speeds.slowness
    num_tokens = 0 if asked.reading is None else asked.reading.num_tokens
    if "corpus" in asked.missing:
        reading_seconds = _CHARACTERS_PER_TOKEN * num_tokens / _CHARACTERS_PER_SECOND
        seconds["corpus"] = (START["corpus"] + reading_seconds) * speeds.slowness
    if "tokens" in asked.missing:
        known = asked.records["corpus"].counts.get("num_characters", {}) if "corpus" in asked.records else {}
        tokenised = max(num_tokens, sum(known.values()) / _CHARACTERS_PER_TOKEN)
        workers = _workers(config.resources.tokens, speeds, 64)
        work = tokenised / (speeds.tokens_per_second * _MASKING) / workers
        seconds["tokens"] = START["tokens"] * speeds.slowness + work
    return seconds


def _extraction_seconds(asked: Asked, read: Reading, shape: ModelShape, speeds: Speeds) -> float:
    """Both models' lower layers over every token, or the disk's time where that is longer."""
    config = asked.config
    num_read = 1 if _is_one_model(config) else NUM_MODELS
    num_shards = math.ceil(read.stored_rows / config.activations.rows_per_shard)
    num_tokens = read.num_tokens * read.stored_rows / max(1, read.num_rows)
    work = num_tokens * config.activations.layer * num_read * speeds.layer_token_seconds
    num_bytes = sizes.store_bytes(read.stored_rows, shape.width, config.activations.compression)
    written = num_bytes / speeds.write_bytes_per_second if speeds.write_bytes_per_second else 0.0
    workers = _workers(config.resources.extraction, speeds, num_shards)
    return START["activations"] * speeds.slowness + max(_spread(work, workers, num_shards), written)


def _dictionary_seconds(asked: Asked, read: Reading, shape: ModelShape, speeds: Speeds) -> dict[str, float]:
    """Fitting the crosscoders, and passing the validation rows through them."""
    config, seconds = asked.config, {}
    training, num_fits = config.training, len(config.crosscoders)
    num_latents = sum(sizes.dictionary_sizes(config, shape.width))
    if "crosscoder" in asked.missing:
        num_steps = training.num_steps if num_latents else 0
        logged = num_steps / config.tracking.log_every_steps * num_fits * _LOG_SECONDS * speeds.slowness
        seconds["crosscoder"] = START["crosscoder"] * speeds.slowness + logged
        seconds["crosscoder"] += num_steps * speeds.step_seconds * _TRAINING_OVERHEAD
        if config.activations.mode == "stream":
            num_read = 1 if _is_one_model(config) else NUM_MODELS
            tokens = training.num_rows * read.num_tokens / max(1, read.num_rows)
            work = tokens * config.activations.layer * num_read * speeds.layer_token_seconds
            workers = _workers(config.resources.extraction, speeds, 64)
            seconds["crosscoder"] += START["activations"] * speeds.slowness + work / workers
    if asked.missing & {"latents", "examples", "planted"}:
        ranks = config.resources.training
        per_row = speeds.step_seconds * ranks.data * ranks.latent / training.batch_rows
        if ranks.gpus > 0 and config.resources.analyses.gpus == 0:  # fitted on GPUs, measured on CPUs
            per_row = _STEP_FACTOR * 2 * NUM_MODELS * shape.width * num_latents / speeds.cpu_flops
        passes = _ROW_PASSES * (1.0 if config.analyses.planted is not None else 0.5)
        work = passes * read.num_rows * config.corpus.validation_frac * per_row
        seconds["measurements"] = START["measurements"] * num_fits * speeds.slowness + work
    return seconds


def _model_seconds(asked: Asked, read: Reading, shape: ModelShape, speeds: Speeds) -> dict[str, float]:
    """causality and steering: upper layers, once per intervention; all layers, once per generated token."""
    config, seconds = asked.config, {}
    num_fits, upper = len(config.crosscoders), shape.num_layers - config.activations.layer
    causality, steering = config.analyses.causality, config.analyses.steering
    if "causality" in asked.missing and causality is not None:
        conversations = causality.num_conversations
        if read.num_documents is not None:
            conversations = min(conversations, math.ceil(read.num_documents * config.corpus.validation_frac / 2))
        edits = _SHARED_EDITS + num_fits * (
            _EDITS + 2 * causality.num_random_halves + (1 + causality.num_random_orders) * _CURVE_POINTS
        )
        full = NUM_MODELS * shape.num_layers * speeds.layer_token_seconds
        edited = edits * (upper * speeds.layer_token_seconds * _UPPER_OVERHEAD + speeds.head_token_seconds)
        work = conversations * read.tokens_per_document * (full + edited)
        workers = _workers(config.resources.analyses, speeds, conversations)
        seconds["causality"] = START["causality"] * speeds.slowness + work / workers
    if "steering" in asked.missing and steering is not None:
        behaviours = _BEHAVIOURS * num_fits
        variants = 1 + (1 + steering.num_random) * len(steering.scales)
        answered = behaviours * variants * steering.num_prompts * steering.max_new_tokens
        per_token = shape.num_layers * speeds.decode_token_seconds * _DECODE_OVERHEAD + speeds.head_token_seconds
        workers = _workers(config.resources.analyses, speeds, behaviours)
        work = _spread(answered * per_token, workers, behaviours)
        seconds["steering"] = START["steering"] * speeds.slowness + work
    return seconds


def _workers(section: WorkersSection, speeds: Speeds, num_tasks: int) -> int:
    """As cluster.pool_size; one where each needs GPUs, of which nobody here knows the number."""
    fitting = 1 if section.gpus > 0 else max(1, int(speeds.num_cpus / section.cpus))
    return max(1, min(section.workers or fitting, num_tasks))


def _spread(work: float, workers: int, num_tasks: int) -> float:
    """Time of equal tasks on workers: the last round may be part empty."""
    return work * math.ceil(num_tasks / workers) / num_tasks


def _is_one_model(config: RunConfig) -> bool:
    """Whether base and chat are the same, which then runs once."""
    base, chat = config.models.base, config.models.chat
    if isinstance(base, OrganismModel) and isinstance(chat, OrganismModel):
        return base.member == chat.member
    return base == chat
