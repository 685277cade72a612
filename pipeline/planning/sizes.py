"""How much a run reads, stores and holds: rows, bytes and memory, from settings, records and samples.

Exact where tokens exist; before that sampled (texts.py), the known size of a generated pair, or the budget. Arithmetic
alone: nothing is timed here (times.py). The one refusal is a store that does not fit. torch, the stages and
transformers are imported where a model or a table is read, so that a finished run is planned without them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.config.run_file import RunConfig
from pipeline.errors import InputError
from pipeline.planning.rates import CHARACTERS_PER_TOKEN, LOSSLESS_SHARE
from pipeline.planning.shapes import ModelShape, model_config
from pipeline.planning.texts import TextSize, known_texts, texts_of_corpus, texts_of_sources
from pipeline.schema import MODEL_NAMES
from pipeline.text.mixing import tokens_to_take

if TYPE_CHECKING:
    from pipeline.stages.catalogue import ActivationsInputs, DataSteps
    from pipeline.stages.step import Step
    from pipeline.storage.artifacts import Record
    from pipeline.storage.filesystem import Storage

NUM_MODELS = len(MODEL_NAMES)
BYTES_PER_ROW_BESIDE_X = 24
"""token_id, position, flags, corpus (4 bytes each) and doc_id (8) of schema.SHARD_TENSORS."""
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_TOKENS_PER_DOCUMENT = 256.0
"""Where only a budget is known."""

EXACT, SAMPLED, KNOWN, BUDGET = "exact", "sampled", "known of the organism", "budget"
ASSUMED = f"sampled, at {CHARACTERS_PER_TOKEN.value:g} characters a token, since the tokenizer is not on this machine"


class DataSize(NamedTuple):
    """What the models will read."""

    num_documents: int | None
    """None where only a budget is known."""
    num_tokens: int
    num_rows: int
    stored_rows: int
    """num_rows, in stream mode those of the validation documents."""
    source: str
    """EXACT, SAMPLED, ASSUMED, KNOWN or BUDGET (an upper bound)."""
    tokens_per_document: float
    dialogues: TextSize | None
    """Those that the models read; None where only a budget is known."""


def data_size(
    config: RunConfig, data: "DataSteps", records: "Mapping[str, Record]", storage: "Storage"
) -> DataSize | None:
    """What a run reads, or None where neither records nor settings say how much there is."""
    if "tokens" in records:
        counts = records["tokens"].counts
        num_documents, num_tokens = int(counts["num_documents"]), int(counts["num_tokens"])
        if "activations" in records:
            num_rows = int(records["activations"].counts["num_rows"])
            if config.activations.mode == "stream":  # the record counts what is stored
                num_rows = round(num_rows / config.corpus.validation_frac)
        else:
            num_rows = _rows_of_index(config, data, storage, has_bos=bool(counts.get("has_bos", True)))
        of_dialogues = sum(
            tokens for name, tokens in counts["tokens"].items() if name.rsplit("/", 1)[0] in counts["dialogue_corpora"]
        )
        dialogues = TextSize(num_documents, num_tokens, is_dialogues=True).taken(of_dialogues)
        return _sized(config, num_documents, num_tokens, num_rows, EXACT, dialogues)
    have, source = _texts(config, data, records, storage)
    budget = config.tokens.num_tokens
    if have is None:
        return None if budget is None else _sized(config, None, budget, budget, BUDGET)
    weights = {corpus.name: corpus.weight for corpus in config.corpus.sources}
    have_tokens = {name: own.num_tokens for name, own in have.items()}
    took = tokens_to_take(have_tokens, weights, budget, mixing=config.tokens.mixing)
    taken = [have[name].taken(took[name]) for name in weights]
    num_tokens, num_documents = (round(sum(own[place] for own in taken)) for place in (1, 0))
    num_rows = max(0, num_tokens - num_documents * _dropped_per_document(config, has_bos=True))
    spoken = [own for own in taken if own.is_dialogues]
    spoken_tokens = sum(own.num_tokens for own in spoken)
    assistant_tokens = sum(own.num_tokens * own.assistant_frac for own in spoken)
    dialogues = TextSize(
        sum(own.num_documents for own in spoken),
        spoken_tokens,
        is_dialogues=True,
        assistant_frac=assistant_tokens / max(1.0, spoken_tokens),
    )
    return _sized(config, num_documents, num_tokens, num_rows, source, dialogues)


def _sized(
    config: RunConfig,
    num_documents: int | None,
    num_tokens: int,
    num_rows: int,
    source: str,
    dialogues: TextSize | None = None,
) -> DataSize:
    is_stored = config.activations.mode == "store"
    stored_rows = num_rows if is_stored else round(num_rows * config.corpus.validation_frac)
    per_document = _TOKENS_PER_DOCUMENT if num_documents is None else num_tokens / max(1, num_documents)
    return DataSize(num_documents, num_tokens, num_rows, stored_rows, source, per_document, dialogues)


def _rows_of_index(config: RunConfig, data: "DataSteps", storage: "Storage", *, has_bos: bool) -> int:
    """Rows that the tokens of a run will give."""
    import numpy as np

    from pipeline.stages.tokens import INDEX_NAME
    from pipeline.storage.tables import read_table

    index = read_table(storage, f"{data.tokens.folder}/{INDEX_NAME}")
    lengths = index["num_tokens"].to_numpy().astype(np.int64) - index["num_history"].to_numpy()
    return int(np.maximum(lengths - _dropped_per_document(config, has_bos=has_bos), 0).sum())


def _dropped_per_document(config: RunConfig, *, has_bos: bool) -> int:
    return max(config.activations.drop_first_tokens, 1 if config.activations.drop_bos and has_bos else 0)


def _texts(
    config: RunConfig, data: "DataSteps", records: "Mapping[str, Record]", storage: "Storage"
) -> tuple[dict[str, TextSize] | None, str]:
    """Documents and tokens per corpus before any mixing, and where they come from."""
    corpus = records.get("corpus")
    has_corpus = corpus is not None and "num_characters" in corpus.counts
    if not has_corpus and (known := known_texts(config)) is not None:
        return known, KNOWN
    tokenizer = local_tokenizer(data, records, storage)
    source = ASSUMED if tokenizer is None else SAMPLED
    if corpus is not None and has_corpus:
        return texts_of_corpus(config, data, corpus, storage, tokenizer), source
    sampled = texts_of_sources(config, tokenizer)
    return (None, BUDGET) if sampled is None else (sampled, source)


def local_tokenizer(data: "DataSteps", records: "Mapping[str, Record]", storage: "Storage") -> Any:
    """The chat model's tokenizer where it is on this machine, else None."""
    from pipeline.models.loading import is_here, load_tokenizer
    from pipeline.stages.models import local_specs

    location = data.tokens.inputs.models.chat
    if location.folder and "organism" not in records:
        return None
    try:
        with local_specs(storage, location) as (spec,):
            return load_tokenizer(spec) if is_here(spec) else None
    except InputError:  # the plan goes on without it; the run itself will say what is wrong
        return None


def store_bytes(num_rows: int, width: int, compression: str) -> int:
    """Bytes of the activation store's shards."""
    x_bytes = {
        "none": NUM_MODELS * width * 2,
        "lossless": NUM_MODELS * width * 2 * LOSSLESS_SHARE.value,
        "int8": NUM_MODELS * (width + 4),
    }[compression]
    return round(num_rows * (x_bytes + BYTES_PER_ROW_BESIDE_X))


def dictionary_sizes(config: RunConfig, width: int) -> list[int]:
    """F of every crosscoder that is trained here."""
    return [section.num_latents or (section.expansion or 0) * width for section in config.fitted]


def num_parameters(config: RunConfig, width: int) -> int:
    """Weights of the encoders and decoders of all crosscoders that are trained here, without biases."""
    return 2 * NUM_MODELS * width * sum(dictionary_sizes(config, width))


def training_bytes(config: RunConfig, width: int) -> int:
    """Parameters, gradients, moments and one batch of pre-activations of one rank, for what is fitted at once."""
    ranks = config.resources.training
    sizes = dictionary_sizes(config, width)
    at_once = ranks.fits_at_a_time or max(len(sizes), 1)
    most_latents = max((sum(sizes[first : first + at_once]) for first in range(0, len(sizes), at_once)), default=0)
    parameters = 2 * NUM_MODELS * width * most_latents
    own_rows = config.training.batch_rows / ranks.data
    return int(parameters / ranks.latent * 4 * 4 + 2.5 * own_rows * max(sizes, default=0) / ranks.latent * 4)


def checkpoint_bytes(config: RunConfig, width: int) -> int:
    """Disk that checkpoints (weights and both moments, one more while it is written) and the crosscoders take."""
    kept = config.resources.training.checkpoints_kept + 1
    num_steps = config.training.num_steps
    written = min(kept, (num_steps - 1) // config.resources.training.checkpoint_every_steps)
    return num_parameters(config, width) * 4 * (3 * written + 1)


def batch_tokens(config: RunConfig) -> int:
    """Tokens of one forward pass of the extraction; with `auto` those of a CPU, since a GPU finds its own."""
    from pipeline.models.memory import CPU_TOKENS_PER_BATCH

    budget = config.activations.tokens_per_batch
    return CPU_TOKENS_PER_BATCH if budget == "auto" else budget


def extraction_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Both models up to layer L, a shard's rows twice (made and packed), and one batch's hidden states."""
    lower = sum(shape.layer_parameters[: config.activations.layer_number + 1])
    weights = NUM_MODELS * (lower + shape.vocab_size * shape.width)
    shard = 2 * config.activations.rows_per_shard * NUM_MODELS * shape.width * 2
    hidden = 6 * batch_tokens(config) * shape.width * 4
    return int(weights * _DTYPE_BYTES[config.models.dtype] + shard + hidden)


def check_space(config: RunConfig, data: "DataSteps", records: "Mapping[str, Record]", storage: "Storage") -> None:
    """InputError where the activation store cannot fit the free space, naming what would fit.

    Shards that an earlier run has published need no space again. The space of an object store is not known.
    """
    if storage.free_bytes() is None or "activations" in records:
        return
    size = data_size(config, data, records, storage)
    if size is not None:
        width = int(model_config(config, data, records, storage).hidden_size)
        require_space(config, size, width, data.activations, storage)


def require_space(
    config: RunConfig,
    size: DataSize,
    width: int,
    activations: "Step[ActivationsInputs]",
    storage: "Storage",
) -> None:
    """As check_space, for this size of data and models of this width."""
    from pipeline.stages.activations import finished_shards

    free = storage.free_bytes()
    if free is None or size.source == ASSUMED:
        return
    compression = config.activations.compression
    there = sum(shard.num_bytes for shard in finished_shards(storage, activations.folder).values())
    needed = store_bytes(size.stored_rows, width, compression) - there
    if needed <= free:
        return
    options = [f"tokens.num_tokens: {int(size.num_tokens * (free + there) / (needed + there) * 0.98):,} fit"]
    for other in ("lossless", "int8"):
        num_bytes = store_bytes(size.stored_rows, width, other)
        if num_bytes < store_bytes(size.stored_rows, width, compression) and num_bytes - there <= free:
            options.append(f"activations.compression: {other} ({format_bytes(num_bytes)}) fits")
    if config.activations.mode == "store":
        num_bytes = store_bytes(round(size.num_rows * config.corpus.validation_frac), width, compression)
        fits = "fits" if num_bytes <= free else "does not"
        options.append(f"activations.mode: stream ({format_bytes(num_bytes)}) {fits}")
    raise InputError(
        f"storage.root: expected {format_bytes(needed)} of free space for the activations, got {format_bytes(free)} on "
        f"{storage.root}; {', '.join(options)}, or set storage.root elsewhere"
    )


def format_bytes(number: float) -> str:
    """A size with a decimal unit: 1.3 MB."""
    value = float(number)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:,.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError
