"""What is read: the model pair, the corpora, the tokens, and the rows of activations."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from pipeline.config.section import Fraction, Name, Section


class OrganismSection(Section):
    """A generated model pair with planted behaviours; for demonstrations and tests, where the truth must be known."""

    seed: NonNegativeInt = 0
    """Seed of the language, the dialogues and both trainings."""
    size: Literal["demo", "tiny"] = "demo"
    """demo: both models learn what they should, about 90 s on two cores. tiny: a few seconds, quality irrelevant."""


class _NoisyModel(Section):
    weight_noise: NonNegativeFloat = 0.0
    """A control: Gaussian noise on every weight matrix, relative to its size. Such a model holds nothing new."""
    weight_noise_seed: NonNegativeInt = 0
    """Seed of that noise."""


class HubModel(_NoisyModel):
    """A model from the hub or from a local folder."""

    kind: Literal["pretrained"] = "pretrained"
    source: str
    """Hub id (google/gemma-2-2b) or local folder."""
    revision: str | None = None
    """Commit or tag of a hub id; pin it, or the hub may change the result under an unchanged name."""
    adapter: str | None = None
    """Hub id or folder of a LoRA adapter on top of `source`. Where base is that source, both share one copy of it."""
    adapter_revision: str | None = None
    """Commit or tag of an adapter on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such models are refused."""
    token_replacements: dict[NonNegativeInt, NonNegativeInt] = Field(default_factory=dict)
    """Ids that this model reads as other ids: template tokens that a base model never saw in training."""


class OrganismModel(_NoisyModel):
    """One of the two models of the run's `organism`."""

    kind: Literal["organism"]
    member: Literal["base", "chat"]
    """Which of the two."""


def _model_kind(value: Any) -> str:
    """A model without `kind` is a pretrained one: hub ids are what nearly everyone writes."""
    return str(value.get("kind", "pretrained") if isinstance(value, dict) else getattr(value, "kind", "pretrained"))


ModelSource = Annotated[
    Annotated[HubModel, Tag("pretrained")] | Annotated[OrganismModel, Tag("organism")], Discriminator(_model_kind)
]


class ModelsSection(Section):
    """The pair that is compared. Both read the same token ids, made by the chat model's tokenizer."""

    base: ModelSource
    """The model before fine-tuning: index 0 of every tensor and table."""
    chat: ModelSource
    """The fine-tuned model: index 1."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of both models' forward passes."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention code of transformers; None leaves the choice to the model."""


class FiltersSection(Section):
    """Documents of a corpus that are left out. The record counts every reason; the defaults leave out nothing."""

    min_characters: NonNegativeInt = 0
    """Shorter documents go; of a dialogue all contents count together."""
    max_characters: PositiveInt | None = None
    """Longer documents go; to cut them instead, see tokens.max_tokens_per_document."""
    min_messages: NonNegativeInt = 0
    """Dialogues with fewer messages go; system prompts do not count."""
    max_messages: PositiveInt | None = None
    """Dialogues with more messages go."""
    alternating_roles: bool = False
    """Only dialogues user, assistant, user, ... stay; a system prompt may stand in front."""
    ends_with_assistant: bool = False
    """Only dialogues whose last message is the assistant's stay."""
    max_repeated_frac: Annotated[float, Field(ge=0, le=1)] | None = None
    """Documents go whose characters lie in lines that repeat an earlier line to a larger share than this."""
    min_letter_frac: Annotated[float, Field(ge=0, le=1)] | None = None
    """Documents go that have a smaller share of letters (of any script) among their characters that are not blank."""


class _FileCorpus(Section):
    name: Name
    """Name of the corpus in tables and figures."""
    weight: PositiveFloat = 1.0
    """Share of the tokens relative to the other corpora; equal weights mix 1:1 by tokens."""
    max_documents: PositiveInt | None = None
    """Keep at most this many documents, the first ones of the files in their order; None keeps all."""
    filters: FiltersSection = FiltersSection()
    """Which documents are left out."""


class _ColumnCorpus(_FileCorpus):
    text_column: str | None = None
    """Column (JSON key) of a plain document's text; give this or messages_column."""
    messages_column: str | None = None
    """Column (JSON key) of a dialogue's list of messages."""
    role_key: str = "role"
    """Key of a message's role ("from" in ShareGPT's layout)."""
    content_key: str = "content"
    """Key of a message's text ("value" in ShareGPT's layout)."""
    role_names: dict[str, str] = Field(default_factory=dict)
    """What roles of other names mean: {human: user, gpt: assistant}."""
    where: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Only rows whose columns have these values are used: {language: English}."""

    @model_validator(mode="after")
    def _one_column(self) -> Self:
        if (self.text_column is None) == (self.messages_column is None):
            raise ValueError(
                f"corpus {self.name!r}: expected exactly one of text_column and messages_column, "
                f"got text_column={self.text_column!r} and messages_column={self.messages_column!r}"
            )
        return self


class JsonlCorpus(_ColumnCorpus):
    """JSON lines: one document or dialogue per line."""

    kind: Literal["jsonl"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Files or globs, local or on any fsspec URL (s3://bucket/chat-*.jsonl.gz)."""


class ParquetCorpus(_ColumnCorpus):
    """Parquet files with one document or dialogue per row."""

    kind: Literal["parquet"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Files or globs, local or on any fsspec URL (s3://bucket/chat-*.jsonl.gz)."""


class TextCorpus(_FileCorpus):
    """Plain text files."""

    kind: Literal["text"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Files or globs, local or on any fsspec URL (s3://bucket/chat-*.jsonl.gz)."""
    split_on: Literal["file", "blank_line", "line"] = "blank_line"
    """What ends a document: the file, an empty line, or every line."""


class HubCorpus(_ColumnCorpus):
    """A data set of the hub, read with `datasets` (streamed, so that only what is used is fetched)."""

    kind: Literal["hub"]
    dataset: str
    """Hub id."""
    subset: str | None = None
    """Configuration name of the data set."""
    split: str = "train"
    """Split of the data set; crossray makes its own train and validation parts from it."""
    revision: str | None = None
    """Commit or tag; pin it."""


class OrganismCorpus(_FileCorpus):
    """The text that comes with the run's `organism`, with token-level labels of its planted behaviours."""

    kind: Literal["organism"]
    part: Literal["documents", "dialogues"]
    """Plain documents, or chat with planted behaviours."""


CorpusSource = Annotated[
    JsonlCorpus | ParquetCorpus | TextCorpus | HubCorpus | OrganismCorpus, Field(discriminator="kind")
]


class CorpusSection(Section):
    """Which texts, and which part of them is held out."""

    sources: tuple[CorpusSource, ...] = Field(min_length=1)
    """Corpora to mix. Identical documents are kept once, in the first corpus that has them."""
    validation_frac: Fraction = 0.1
    """Share of documents held out for validation and all analyses; chosen by the document's hash, never by order."""

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"corpus.sources: expected distinct names, got {names}")
        return self


class TokensSection(Section):
    """How text becomes token ids."""

    max_tokens_per_document: int = Field(1024, ge=2)
    """Documents are truncated to this many tokens."""
    num_tokens: PositiveInt | None = None
    """Token budget over all corpora and both splits; None takes as much as the mixing allows."""
    mixing: Literal["by_weight", "everything"] = "by_weight"
    """by_weight: shares of tokens follow the weights to a document; where one corpus runs out, the others are cut too.
    everything: one that runs out gives all it has, the others keep their part of the budget (without a budget: all)."""
    chat_template: str | None = None
    """File or URL of a Jinja chat template in place of the one that comes with the chat model's tokenizer."""


class ActivationsSection(Section):
    """Which rows of which layer enter the crosscoder."""

    mode: Literal["store", "stream"] = "store"
    """store: all rows are extracted once and kept. stream: only the validation rows are kept; training rows go from
    extraction into the trainer, and every epoch costs another pass of both models."""
    layer: PositiveInt
    """Output of this decoder layer, counted from 1 (transformers' hidden_states[layer], never after the final norm)."""
    drop_first_tokens: NonNegativeInt = 0
    """Leading tokens of each document to leave out (25 for Llama 3, 21 for Qwen 2.5: their default system prompt)."""
    drop_bos: bool = True
    """Leave out the BOS row: an attention sink whose norm can exceed the median a hundredfold."""
    norm_cap: PositiveFloat | None = None
    """Leave out rows whose norm, in either model, exceeds this multiple of the median norm of their document's tokens
    in that model: attention sinks other than BOS. None keeps every row."""
    rows_per_shard: PositiveInt = 50_000
    """Rows in one file of the store; a killed run repeats at most the shards in work."""
    compression: Literal["none", "lossless", "int8"] = "none"
    """How shards are kept. lossless: the same numbers in about two thirds of the bytes, slower to write and read. int8:
    half the bytes, one scale per row and model; adds noise of at most 1/254 of a row's largest value."""
    tokens_per_batch: PositiveInt | Literal["auto"] = "auto"
    """Tokens in one forward pass, padding included; auto takes what the GPU has memory for, 16,384 on a CPU. A batch
    that does not fit after all is run in halves."""
    max_rejected_frac: float = Field(0.01, ge=0, le=1)
    """Share of documents that may be set aside because they cannot be read, fail or give NaN or Inf; more end the run.
    0 allows none."""
