"""How long each stage of a run takes: start-up, and work over a speed measured on this machine or taken from rates.py.

Time of a stage = start-up x slowness + work / workers. Work by stage: tokens over the tokenizer's speed; tokens x
layers x models over a layer's speed; training steps; validation rows x passes; conversations x interventions x upper
layers; answers x tokens x layers. Not predicted: downloads, queues, restarts, the answers of a language model.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.cluster.connect import local_cpus
from pipeline.config.analyses import CausalitySection
from pipeline.config.data import OrganismModel
from pipeline.config.resources import WorkersSection
from pipeline.config.run_file import RunConfig
from pipeline.errors import InputError
from pipeline.planning import rates, sizes
from pipeline.planning.rates import GPU_SHARE, GPUS, START_SECONDS, Gpu
from pipeline.planning.shapes import ModelShape, shape_of
from pipeline.planning.sizes import NUM_MODELS, DataSize
from pipeline.planning.texts import TextSize

if TYPE_CHECKING:
    from pipeline.storage.artifacts import Record
    from pipeline.storage.filesystem import Storage

_SHARED_EDITS, _HALVES = 9, 8
"""Interventions that all crosscoders share but the chat model itself, and the halves of each crosscoder's latents."""
_ASSUMED_LATENTS = 32
"""In a crosscoder's chat-only set, before it is known."""
_DOCUMENTS_PER_BATCH, _DIALOGUES_PER_CALL = 4, 16
"""Documents on which a latent's causal equivalence is tried, of those of one call (analyses/equivalence.py)."""
_COMPARED_FORWARDS = 3
"""Of the evidence: the base model, the chat model, and the chat model with its rounding moved."""
_BEHAVIORS = 4
"""Of a generated pair; a prompts file may have more."""


class Speeds(NamedTuple):
    """Of this machine, or of the GPU that is assumed."""

    slowness: float
    """Start-up times here over those of rates.START_SECONDS."""
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


class PlanInputs(NamedTuple):
    """What a prediction starts from."""

    config: RunConfig
    missing: frozenset[str]
    """Stages that are not done."""
    records: "Mapping[str, Record]"
    """Of the stages that are."""
    data: DataSize | None
    model_config: Any
    """The models' transformers configuration."""
    tokenizer: Any
    """The chat model's, where it is on this machine; else None."""
    storage: "Storage"


def durations(inputs: PlanInputs, *, gpu: str) -> dict[str, float]:
    """Seconds per stage that is missing, in order; stages of which the number of rows is unknown are left out."""
    if not inputs.missing - {"report"}:
        return {stage: START_SECONDS["report"] for stage in inputs.missing}
    shape = shape_of(inputs.model_config)
    speeds = _speeds(inputs, shape, gpu=gpu)
    seconds = {"start": START_SECONDS["start"] * speeds.slowness}
    seconds |= _data_seconds(inputs, speeds)
    if inputs.data is None:
        return seconds
    if inputs.missing & {"activations"}:
        seconds["activations"] = _extraction_seconds(inputs, inputs.data, shape, speeds)
    seconds |= _crosscoder_seconds(inputs, inputs.data, shape, speeds)
    seconds |= _model_seconds(inputs, inputs.data, shape, speeds)
    if "report" in inputs.missing:
        seconds["report"] = START_SECONDS["report"] * speeds.slowness
    return seconds


def _speeds(inputs: PlanInputs, shape: ModelShape, *, gpu: str) -> Speeds:
    """Measure what the missing stages need; a few seconds."""
    if gpu not in GPUS:
        raise InputError(f"--gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    config, storage = inputs.config, inputs.storage
    from pipeline.planning.calibration import matmul_flops, tokens_per_second, write_bytes_per_second

    here = local_cpus()
    num_cpus = config.resources.cluster.num_cpus or here
    flops = matmul_flops(min(num_cpus, here))
    layer = decode = head = step = 0.0
    if inputs.data is not None:
        if inputs.missing & {"activations", "evidence", "logit_lens", "causality", "steering"}:
            layer, decode, head = _model_speeds(config, inputs.model_config, inputs.data, flops, GPUS[gpu])
        if inputs.missing & {"crosscoder", "latents", "examples", "planted"}:
            step = _training_speed(config, shape.width, flops, GPUS[gpu])
    speed = write_bytes_per_second(Path(storage.root)) if storage.is_local else None
    slowness = rates.REFERENCE_FLOPS.value / matmul_flops(1)
    tokenised = rates.TOKENS_PER_SECOND.value / slowness
    if "tokens" in inputs.missing and inputs.tokenizer is not None:
        from pipeline.text.tokenise import Tokenise

        tokenise = Tokenise(inputs.tokenizer, max_tokens=1 << 20)
        # A folder without a tokenizer's files may load as a tokenizer without words, which makes no tokens.
        tokenised = tokens_per_second(lambda text: tokenise.plain(text).input_ids) or tokenised
    return Speeds(slowness, num_cpus, flops, layer, decode, head, tokenised, step, speed)


def _model_speeds(
    config: RunConfig, model_config: Any, data: DataSize, flops: float, gpu: Gpu
) -> tuple[float, float, float]:
    """Seconds of a layer per token, of a layer per token while decoding, of the unembedding per token."""
    shape = shape_of(model_config)
    num_prompts = config.analyses.steering.num_prompts if config.analyses.steering is not None else 1
    if config.resources.extraction.gpus > 0:
        reached = GPU_SHARE.value * (gpu.float32 if config.models.dtype == "float32" else gpu.bfloat16)
        layer = 2 * shape.active_parameters / reached
        decode = shape.active_parameters * 2 / rates.GPU_MEMORY.value / num_prompts
        return layer, max(layer, decode), 2 * shape.width * shape.vocab_size / reached
    from pipeline.planning.calibration import layer_seconds

    threads = max(1, int(config.resources.extraction.cpus))
    length = max(2, min(round(data.tokens_per_document), config.tokens.max_tokens_per_document))
    common: dict[str, Any] = {"dtype": config.models.dtype, "num_threads": threads, "flops": flops / 2}
    layer = layer_seconds(model_config, (max(1, sizes.batch_tokens(config) // length), length), **common)
    decode = layer_seconds(model_config, (num_prompts, 1), **common)
    return layer, decode, 2 * shape.width * shape.vocab_size / (flops * threads / max(1, local_cpus()))


def _training_speed(config: RunConfig, width: int, flops: float, gpu: Gpu) -> float:
    """Seconds of one training step of all crosscoders on one of the ranks, which share the work."""
    ranks = config.resources.training
    num_ranks = ranks.data * ranks.latent
    if ranks.gpus > 0:
        speed = {"float32": gpu.float32, "tf32": gpu.tf32, "bfloat16": gpu.bfloat16}[config.training.precision]
        parameters = sizes.num_parameters(config, width)
        work = config.training.batch_rows * parameters  # of the encoder's product: half the weights, twice
        own = parameters / ranks.latent  # every data rank updates all of them
        update = rates.ADAM_BYTES.value * own / rates.GPU_MEMORY.value
        return rates.STEP_OVER_ENCODER.value * work / (GPU_SHARE.value * speed) / num_ranks + update
    from pipeline.planning.calibration import step_seconds
    from pipeline.stages.crosscoder_spec import spec_of

    num_threads = max(1, int(ranks.cpus or local_cpus() / num_ranks))
    specs = [spec_of(s, config.training, ranks, num_models=NUM_MODELS, activation_dim=width) for s in config.fitted]
    seconds = [step_seconds(spec, config.training.batch_rows, num_threads=num_threads, flops=flops) for spec in specs]
    return sum(seconds) / num_ranks


def _data_seconds(inputs: PlanInputs, speeds: Speeds) -> dict[str, float]:
    """organism, corpus and tokens."""
    config, seconds = inputs.config, {}
    if "organism" in inputs.missing and config.organism is not None:
        doses = (1 + 2 * config.organism.dose) / 3  # the chat training takes two thirds
        seconds["organism"] = rates.ORGANISM_SECONDS[config.organism.size] * doses * speeds.slowness
    num_tokens = 0 if inputs.data is None else inputs.data.num_tokens
    if "corpus" in inputs.missing:
        work = rates.CHARACTERS_PER_TOKEN.value * num_tokens / rates.CHARACTERS_PER_SECOND.value
        seconds["corpus"] = (START_SECONDS["corpus"] + work) * speeds.slowness
    if "tokens" in inputs.missing:
        known = inputs.records["corpus"].counts.get("num_characters", {}) if "corpus" in inputs.records else {}
        tokenised = max(num_tokens, sum(known.values()) / rates.CHARACTERS_PER_TOKEN.value)
        workers = _workers(config.resources.tokens, speeds, 64)
        work = tokenised / (speeds.tokens_per_second * rates.MASKING_SHARE.value) / workers
        seconds["tokens"] = START_SECONDS["tokens"] * speeds.slowness + work
    return seconds


def _extraction_seconds(inputs: PlanInputs, data: DataSize, shape: ModelShape, speeds: Speeds) -> float:
    """Both models' lower layers over every token, or the disk's time where that is longer."""
    config = inputs.config
    num_read = 1 if _is_one_model(config) else NUM_MODELS
    num_shards = max(1, math.ceil(data.stored_rows / config.activations.rows_per_shard))
    num_tokens = data.num_tokens * data.stored_rows / max(1, data.num_rows)
    work = num_tokens * (config.activations.layer_number + 1) * num_read * speeds.layer_token_seconds
    num_bytes = sizes.store_bytes(data.stored_rows, shape.width, config.activations.compression)
    written = num_bytes / speeds.write_bytes_per_second if speeds.write_bytes_per_second else 0.0
    workers = _workers(config.resources.extraction, speeds, num_shards)
    return START_SECONDS["activations"] * speeds.slowness + max(_spread(work, workers, num_shards), written)


def _crosscoder_seconds(inputs: PlanInputs, data: DataSize, shape: ModelShape, speeds: Speeds) -> dict[str, float]:
    """Training the crosscoders, and passing the validation rows through them."""
    config, seconds = inputs.config, {}
    training, num_fits = config.training, len(config.crosscoders) + len(config.replicas)
    num_latents = sum(sizes.dictionary_sizes(config, shape.width))
    if "crosscoder" in inputs.missing:
        num_steps = training.num_steps if num_latents else 0
        logged = num_steps / config.tracking.log_every_steps * num_fits * rates.LOG_SECONDS.value * speeds.slowness
        seconds["crosscoder"] = START_SECONDS["crosscoder"] * speeds.slowness + logged
        seconds["crosscoder"] += num_steps * speeds.step_seconds * rates.TRAINING_OVERHEAD.value
        if config.activations.mode == "stream":
            num_read = 1 if _is_one_model(config) else NUM_MODELS
            tokens = training.num_rows * data.num_tokens / max(1, data.num_rows)
            work = tokens * (config.activations.layer_number + 1) * num_read * speeds.layer_token_seconds
            workers = _workers(config.resources.extraction, speeds, 64)
            seconds["crosscoder"] += START_SECONDS["activations"] * speeds.slowness + work / workers
    if inputs.missing & {"latents", "examples", "planted"}:
        ranks = config.resources.training
        per_row = speeds.step_seconds * ranks.data * ranks.latent / training.batch_rows
        if ranks.gpus > 0 and config.resources.analyses.gpus == 0:  # trained on GPUs, measured on CPUs
            per_row = rates.STEP_OVER_ENCODER.value * 2 * NUM_MODELS * shape.width * num_latents / speeds.cpu_flops
        passes = rates.ROW_PASSES.value * (1.0 if config.analyses.planted is not None else 0.5)
        work = passes * data.num_rows * config.corpus.validation_frac * per_row
        seconds["measurements"] = START_SECONDS["measurements"] * num_fits * speeds.slowness + work
    return seconds


def _model_seconds(inputs: PlanInputs, data: DataSize, shape: ModelShape, speeds: Speeds) -> dict[str, float]:
    """evidence, logit_lens, causality, steering: all layers, heads, upper layers per edit, all per generated token."""
    config, seconds = inputs.config, {}
    num_fits, upper = len(config.crosscoders), shape.num_layers - config.activations.layer_number - 1
    causality, steering = config.analyses.causality, config.analyses.steering
    if "evidence" in inputs.missing and config.analyses.evidence is not None:
        section = config.analyses.evidence
        num_documents = 2 * section.num_documents
        if data.num_documents is not None:
            num_documents = min(num_documents, math.ceil(data.num_documents * config.corpus.validation_frac))
        positions = min(data.tokens_per_document, section.max_positions)
        work = _COMPARED_FORWARDS * data.tokens_per_document * shape.num_layers * speeds.layer_token_seconds
        work = num_documents * (work + _COMPARED_FORWARDS * positions * speeds.head_token_seconds)
        seconds["evidence"] = START_SECONDS["evidence"] * speeds.slowness + work / _workers(
            config.resources.analyses, speeds, math.ceil(num_documents / 16)
        )
    if "logit_lens" in inputs.missing and config.analyses.logit_lens is not None:
        directions = shape.width + num_fits * config.analyses.logit_lens.max_latents
        work = NUM_MODELS * directions * speeds.head_token_seconds
        seconds["logit_lens"] = START_SECONDS["logit_lens"] * speeds.slowness + work
    if "causality" in inputs.missing and causality is not None:
        work = _causality_work(causality, num_fits, _dialogues(inputs, data), (shape.num_layers, upper), speeds)
        workers = _workers(config.resources.analyses, speeds, math.ceil(causality.num_conversations / 16))
        seconds["causality"] = START_SECONDS["causality"] * speeds.slowness + work / workers
    if "steering" in inputs.missing and steering is not None:
        behaviors = _BEHAVIORS * num_fits
        variants = 1 + (1 + steering.num_random) * len(steering.scales)
        answered = behaviors * variants * steering.num_prompts * steering.max_new_tokens
        per_token = (
            shape.num_layers * speeds.decode_token_seconds * rates.DECODE_OVERHEAD.value + speeds.head_token_seconds
        )
        workers = _workers(config.resources.analyses, speeds, behaviors)
        work = _spread(answered * per_token, workers, behaviors)
        seconds["steering"] = START_SECONDS["steering"] * speeds.slowness + work
    return seconds


def _dialogues(inputs: PlanInputs, data: DataSize) -> TextSize:
    """The validation dialogues that are measured; half of all documents are dialogues where only a budget is known."""
    documents = TextSize(data.num_documents or math.inf, data.num_tokens, is_dialogues=True)
    known = documents._replace(num_documents=documents.num_documents / 2) if data.dialogues is None else data.dialogues
    per_document = (
        data.tokens_per_document if data.dialogues is None else known.num_tokens / max(1, known.num_documents)
    )
    number = min(
        known.num_documents * inputs.config.corpus.validation_frac,
        inputs.config.analyses.causality.num_conversations if inputs.config.analyses.causality is not None else 0,
    )
    return known._replace(num_documents=number, num_tokens=number * per_document)


def _causality_work(
    section: CausalitySection, num_fits: int, dialogues: TextSize, layers: tuple[int, int], speeds: Speeds
) -> float:
    """Seconds of one worker: every distinct edit continues through the upper layers; logits where an answer follows.

    layers: all, and those above the layer. An edit on no latents is the unedited one and costs nothing more.
    """
    num_layers, upper = layers
    num_latents = _ASSUMED_LATENTS if section.max_latents is None else min(section.max_latents, _ASSUMED_LATENTS)
    num_latents = max(num_latents, section.min_latents)
    halves = _HALVES + 2 * section.num_random_halves
    points = (1 + section.num_random_orders) * (1 + num_latents.bit_length())
    own = 2 + halves + points
    # The two edits of a latent's equivalence run on a few documents of a batch.
    equivalence = 2 * 2 * section.num_equivalence_latents * _DOCUMENTS_PER_BATCH / _DIALOGUES_PER_CALL
    edits = _SHARED_EDITS + num_fits * (own + equivalence)
    per_token = (2 * num_layers - upper) * speeds.layer_token_seconds
    per_token += edits * upper * speeds.layer_token_seconds * rates.UPPER_OVERHEAD.value
    per_answer_token = (1 + edits) * speeds.head_token_seconds
    return dialogues.num_tokens * (per_token + dialogues.assistant_frac * per_answer_token)


def _workers(section: WorkersSection, speeds: Speeds, num_tasks: int) -> int:
    """As cluster.pool_size; one where each needs GPUs, whose number is not known here."""
    fitting = 1 if section.gpus > 0 else max(1, int(speeds.num_cpus / section.cpus))
    return max(1, min(section.workers or fitting, num_tasks))


def _spread(work: float, workers: int, num_tasks: int) -> float:
    """Time of equal tasks on workers, whose last round may not use them all."""
    return work * math.ceil(num_tasks / workers) / num_tasks


def _is_one_model(config: RunConfig) -> bool:
    """Whether base and chat are the same, which then runs once."""
    base, chat = config.models.base, config.models.chat
    if isinstance(base, OrganismModel) and isinstance(chat, OrganismModel):
        return base.member == chat.member
    return base == chat
