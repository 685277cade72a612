"""What a run reads: the model pair, the corpora, the tokens, and the rows of activations.

Every field here enters the identity of the artifact that it shapes: a change makes that artifact and all that follow
from it anew.
"""

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
from pipeline.errors import InputError


class OrganismSection(Section):
    """A generated model pair with planted behaviours, for demonstrations and tests that need a known truth."""

    seed: NonNegativeInt = 0
    """Seed of the language, the dialogues and both trainings."""
    size: Literal["demo", "tiny"] = "demo"
    """demo trains both models until they show the behaviours, in about 100 s on two cores. tiny takes seconds, and its
    models know nothing."""
    behaviors: tuple[Literal["refuse_danger", "refuse_private", "correct_false", "decline_personal"], ...] = (
        "refuse_danger",
        "refuse_private",
        "correct_false",
        "decline_personal",
    )
    """What the chat model is taught. Without any, it is fine-tuned on harmless dialogues: a control."""
    marked: bool = False
    """Whether the training also asks for one known direction of the chat model's residual stream per behaviour: a
    calibration, in which the truth is known exactly. Without it, behaviours are learnt from text alone."""

    method: Literal["full", "lora"] = "full"
    """full trains all weights of the chat model. lora trains changes of rank 8 of the layers' matrices."""
    dose: PositiveFloat = 1.0
    """Steps of the chat training, as a multiple of the size's own. Below 1 the behaviours are learnt less well."""
    ordinary_chat: bool = True
    """Whether harmless dialogues are among those that teach. Without them every answer shows a behaviour."""
    weight_penalty: NonNegativeFloat = 0.0
    """Times the summed square of how far the chat model's weights have moved from the base model's, beside the loss in
    nats per token. It keeps the models close, so that behaviours are harder to find."""

    @model_validator(mode="after")
    def _can_be_taught(self) -> Self:
        if not self.behaviors and not self.ordinary_chat:
            raise ValueError(
                "organism: expected behaviors or ordinary_chat to teach, got neither; name a behaviour, or leave "
                "ordinary_chat on for a control"
            )
        if self.method == "lora" and self.weight_penalty:
            raise ValueError(
                f"organism.weight_penalty: expected 0 with method lora, whose changes are small by their rank, got "
                f"{self.weight_penalty:g}; use method full"
            )
        return self


class _NoisyModel(Section):
    weight_noise: NonNegativeFloat = 0.0
    """Gaussian noise on every weight matrix, relative to its standard deviation: a control whose right verdict is that
    nothing is new."""
    weight_noise_seed: NonNegativeInt = 0
    """Seed of the noise."""


class HubModel(_NoisyModel):
    """A model from the hub or from a local folder."""

    kind: Literal["pretrained"] = "pretrained"
    source: str
    """Hub id (google/gemma-2-2b), local folder, or GGUF file (needs the package gguf)."""
    revision: str | None = None
    """Commit or tag of a hub id. Without one, a change on the hub can change the result of the same file."""
    adapter: str | None = None
    """Hub id or folder of a LoRA adapter on top of `source`. If base is the same source, both share its weights."""
    adapter_revision: str | None = None
    """Commit or tag of an adapter on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. While it is off, a model that needs its own code is refused."""
    token_replacements: dict[NonNegativeInt, NonNegativeInt] = Field(default_factory=dict)
    """Token ids that this model reads as other ids, for template tokens that a base model never saw in training."""


class OrganismModel(_NoisyModel):
    """One of the two models of the run's `organism`."""

    kind: Literal["organism"]
    member: Literal["base", "chat"]
    """Which of the two models."""


def _model_kind(value: Any) -> str:
    """A model without `kind` is a pretrained one, which is what most run files name."""
    return str(value.get("kind", "pretrained") if isinstance(value, dict) else getattr(value, "kind", "pretrained"))


ModelSource = Annotated[
    Annotated[HubModel, Tag("pretrained")] | Annotated[OrganismModel, Tag("organism")], Discriminator(_model_kind)
]


class ModelsSection(Section):
    """The two models. Both read the same token ids, made by the chat model's tokenizer."""

    base: ModelSource
    """The model before fine-tuning. It has index 0 in every tensor and table."""
    chat: ModelSource
    """The fine-tuned model. It has index 1."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the forward passes of both models."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention implementation of transformers. null uses the model's default."""


class FiltersSection(Section):
    """Which documents of a corpus to drop. The record counts them by reason. The defaults keep every document."""

    min_characters: NonNegativeInt = 0
    """Drop documents with fewer characters. In a dialogue, all messages count together."""
    max_characters: PositiveInt | None = None
    """Drop documents with more characters. To truncate them instead, use tokens.max_tokens_per_document."""
    min_messages: NonNegativeInt = 0
    """Drop dialogues with fewer messages. System prompts do not count."""
    max_messages: PositiveInt | None = None
    """Drop dialogues with more messages."""
    alternating_roles: bool = False
    """Keep only dialogues whose roles are user, assistant, user and so on. A system prompt may come first."""
    ends_with_assistant: bool = False
    """Keep only dialogues whose last message is from the assistant."""
    max_repeated_frac: Annotated[float, Field(ge=0, le=1)] | None = None
    """Drop documents in which repeated lines hold a larger share of the characters than this."""
    min_letter_frac: Annotated[float, Field(ge=0, le=1)] | None = None
    """Drop documents with a smaller share of letters, of any script, among the characters that are not blank."""


class _FileCorpus(Section):
    name: Name
    """Name of the corpus in tables and figures."""
    weight: PositiveFloat = 1.0
    """Share of the tokens relative to the other corpora. Equal weights mix 1:1 by tokens."""
    max_documents: PositiveInt | None = None
    """Keep at most this many documents, in the order of the files. null keeps all."""
    filters: FiltersSection = FiltersSection()
    """Which documents to drop."""


class _ColumnCorpus(_FileCorpus):
    text_column: str | None = None
    """Column or JSON key that holds the text of a plain document. Give this or messages_column."""
    messages_column: str | None = None
    """Column or JSON key that holds the list of messages of a dialogue."""
    role_key: str = "role"
    """Key of the role in a message. ShareGPT uses "from"."""
    content_key: str = "content"
    """Key of the text in a message. ShareGPT uses "value"."""
    role_names: dict[str, str] = Field(default_factory=dict)
    """Roles with other names, and what they mean: {human: user, gpt: assistant}."""
    where: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Use only rows whose columns have these values: {language: English}."""

    @model_validator(mode="after")
    def _one_column(self) -> Self:
        if (self.text_column is None) == (self.messages_column is None):
            raise ValueError(
                f"corpus {self.name!r}: expected exactly one of text_column and messages_column, "
                f"got text_column={self.text_column!r} and messages_column={self.messages_column!r}"
            )
        return self


class JsonlCorpus(_ColumnCorpus):
    """JSON lines, with one document or dialogue per line."""

    kind: Literal["jsonl"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Files or globs, local or at any fsspec URL: s3://bucket/chat-*.jsonl.gz."""


class ParquetCorpus(_ColumnCorpus):
    """Parquet files with one document or dialogue per row."""

    kind: Literal["parquet"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Files or globs, local or at any fsspec URL: s3://bucket/chat-*.parquet."""


class TextCorpus(_FileCorpus):
    """Plain text files."""

    kind: Literal["text"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Files or globs, local or at any fsspec URL: s3://bucket/notes-*.txt."""
    split_on: Literal["file", "blank_line", "line"] = "blank_line"
    """What ends a document: the end of the file, an empty line, or the end of each line."""


class HubCorpus(_ColumnCorpus):
    """A data set of the hub. It is streamed with `datasets`, so only the documents in use are downloaded."""

    kind: Literal["hub"]
    dataset: str
    """Hub id of the data set."""
    subset: str | None = None
    """Configuration name of the data set."""
    split: str = "train"
    """Split of the data set. crossray divides it into its own training and validation parts."""
    revision: str | None = None
    """Commit or tag. Without one, a change on the hub can change the result of the same file."""


class OrganismCorpus(_FileCorpus):
    """Text generated with the run's `organism`, with a label for every token of a planted behaviour."""

    kind: Literal["organism"]
    part: Literal["documents", "dialogues"]
    """Plain documents, or dialogues with planted behaviours."""


CorpusSource = Annotated[
    JsonlCorpus | ParquetCorpus | TextCorpus | HubCorpus | OrganismCorpus, Field(discriminator="kind")
]


class CorpusSection(Section):
    """The texts, and the share of them that is held out."""

    sources: tuple[CorpusSource, ...] = Field(min_length=1)
    """Corpora to mix. Identical documents are deduplicated: the first corpus that has one keeps it."""
    validation_frac: Fraction = 0.1
    """Share of documents held out for validation and all analyses. A document's hash decides, never its order. Raising
    it narrows every interval and leaves less to train on."""
    max_unusable_frac: float = Field(0.5, ge=0, le=1)
    """Largest share of a corpus that may be unusable: no text, no dialogue that can be read, or one that the chat
    template cannot render. A larger share ends the run. What filters and max_documents leave out does not count."""

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"corpus.sources: expected distinct names, got {names}")
        return self


class TokensSection(Section):
    """How text becomes token ids."""

    max_tokens_per_document: int = Field(1024, ge=2)
    """Longer documents are truncated to this many tokens. Raising it needs more memory in a forward pass."""
    num_tokens: PositiveInt | None = None
    """Token budget over all corpora and both splits. null takes as many as the mixing allows."""
    mixing: Literal["by_weight", "everything"] = "by_weight"
    """by_weight: the shares of tokens follow the weights; a corpus that runs out limits the others too.
    everything: a corpus that runs out gives all it has, and the others keep their part of the budget."""
    dialogues: Literal["auto", "whole", "per_turn"] = "auto"
    """auto: a dialogue is one document if the chat template writes earlier turns as they were, else one document per
    answer, rendered as the model read it at that answer (many templates drop the reasoning of earlier turns). Earlier
    turns are then context and give no rows. whole drops dialogues with text that the template rewrites. per_turn always
    divides."""
    chat_template: str | None = None
    """File or URL of a Jinja chat template. null uses the template of the chat model's tokenizer."""


TokenKind = Literal["special", "template", "user", "assistant", "reasoning", "tool", "plain"]
"""Kinds of tokens, by their bits in schema.Flag; `plain` are the tokens of plain documents that are not special."""


class RowsSection(Section):
    """Which tokens become rows, for training and for every analysis. The record counts the others by reason."""

    keep: tuple[TokenKind, ...] = ()
    """Only tokens of at least one of these kinds. Empty keeps every kind. A token can be of several kinds: reasoning is
    the assistant's too, and a control token of the template is special and template."""
    leave_out: tuple[TokenKind, ...] = ()
    """No tokens of these kinds, even if `keep` names another of their kinds."""

    @model_validator(mode="after")
    def _something_is_kept(self) -> Self:
        if self.keep and set(self.keep) <= set(self.leave_out):
            raise ValueError(
                f"expected a kind to keep that is not left out, got keep {list(self.keep)} and leave_out "
                f"{list(self.leave_out)}; change one of them"
            )
        return self


class ActivationsSection(Section):
    """The layer that is read, and the rows of it that are kept."""

    mode: Literal["store", "stream"] = "store"
    """store extracts all rows once and keeps them. stream keeps the validation rows only: training rows go straight to
    the trainer, and every epoch costs another pass of both models."""
    layer: NonNegativeInt | Literal["auto"]
    """Number of the decoder layer whose output is read, counted from 0 as papers do: the output of model.layers[layer]
    in transformers, which is hidden_states[layer + 1], before the final norm. auto measures first (analyses.layers) and
    takes the layer that `crossray layers` names."""
    drop_first_tokens: NonNegativeInt = 0
    """Leading tokens of each document to drop, such as a default system prompt: 26 for Llama 3, 21 for Qwen 2.5."""
    drop_bos: bool = True
    """Drop the rows of BOS, wherever it stands. It is an attention sink: its norm can be a hundred times the median."""
    rows: RowsSection = RowsSection()
    """Which tokens become rows: {leave_out: [template]}, {keep: [plain, assistant]}."""
    norm_cap: PositiveFloat | None = 10.0
    """Drop rows whose norm in either model exceeds this multiple of the median norm of their document: attention sinks
    other than BOS, which reach a hundred medians where other rows stay below ten. A few of them would dominate every
    mean, variance and FVE. The run says how many there are. null keeps every row, as the paper's runs do."""
    rows_per_shard: PositiveInt = 50_000
    """Rows in one shard, a file of the store. Raising it gives fewer files, and a killed run repeats more rows."""
    compression: Literal["none", "lossless", "int8"] = "none"
    """Form of the shards on disk. lossless keeps the same numbers in two thirds of the bytes, but writes and reads
    more slowly. int8 takes half the bytes and adds noise of at most 1/254 of the largest value of a row."""
    tokens_per_batch: PositiveInt | Literal["auto"] = "auto"
    """Tokens in one forward pass, padding included. auto takes what the GPU has memory for, and 16,384 on a CPU. A
    batch that does not fit is run again in halves."""
    max_rejected_frac: float = Field(0.01, ge=0, le=1)
    """Largest share of documents that may go into quarantine because they cannot be read, fail, or give NaN or Inf. A
    larger share ends the run. 0 allows none."""

    @property
    def layer_number(self) -> int:
        """The layer as a number; InputError where it is yet to be measured."""
        if self.layer == "auto":
            raise InputError(
                "activations.layer: expected a number, got auto, which is measured when the run starts; `crossray "
                "layers` measures it now"
            )
        return self.layer
