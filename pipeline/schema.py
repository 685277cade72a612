"""Names, orders, dtypes and units of everything that crossray writes.

Every other file imports them from here. Nothing in this file reads or writes; it needs the standard library alone.

Model order: 0 = base, 1 = chat. Delta_norm: 1 = chat-only, 0 = base-only.
"""

from collections.abc import Iterable
from enum import IntFlag
from typing import NamedTuple

SCHEMA_VERSION = 1
"""Raised when a column, bit or file layout changes meaning; older artifacts are then refused by name."""

MODEL_NAMES = ("base", "chat")
"""Order of the model axis M in every tensor and table."""
BASE, CHAT = 0, 1

DELTA_NORM_ORIENTATION = "1 = chat-only, 0 = base-only"
"""Written into the metadata of every table with a delta_norm column (published tables also use 1 - Delta_norm)."""

TABLE_METADATA = {
    "schema_version": str(SCHEMA_VERSION),
    "model_order": ",".join(MODEL_NAMES),
    "delta_norm": DELTA_NORM_ORIENTATION,
}
"""Key-value metadata of every Parquet file."""


class Flag(IntFlag):
    """Bits of the int32 mask that accompanies every token. Planted labels take the bits from PLANTED_SHIFT upward."""

    SPECIAL = 1
    """A control token of the tokenizer (BOS, end of turn, ...)."""
    TEMPLATE = 2
    """Written by the chat template rather than by a speaker: control tokens, role names, separators."""
    USER = 4
    """Content of a user turn (system prompts count as template)."""
    ASSISTANT = 8
    """Written by the assistant: answers, reasoning, tool calls."""
    BOS = 16
    """The tokenizer's BOS: SPECIAL, neither TEMPLATE nor any speaker's. Of a token that opens all turns, the first."""
    REASONING = 32
    """Reasoning: beside ASSISTANT, or beside TEMPLATE for the tag that closes it."""
    TOOL = 64
    """A tool call (beside ASSISTANT), or what a tool answered."""
    HISTORY = 128
    """Earlier turns in the document of a later answer: context, which has its rows in its own document."""


PLANTED_SHIFT = 8
"""Bit of the first planted label; label i of the corpus' label list has bit PLANTED_SHIFT + i."""
MAX_PLANTED_LABELS = 16


class Split:
    """Names of the two parts of a corpus; the part is a function of the document's hash alone."""

    TRAIN = "train"
    VALIDATION = "validation"


class Column(NamedTuple):
    """One documented column of a written table."""

    name: str
    dtype: str
    """numpy dtype name, or list<...>."""
    doc: str
    """Meaning, unit, range, and which direction is better where that applies."""


CORPUS_COLUMNS = (
    Column("doc_id", "int64", "first 63 bits of the SHA-256 of the document's canonical text; identity and split"),
    Column("corpus", "string", "name of the corpus in the configuration"),
    Column("split", "string", "train or validation, decided by doc_id"),
    Column("text", "string", "plain document, or null for a dialogue"),
    Column("messages", "string", "JSON list of {role, content, labels, ...} (text/messages.py), or null"),
)

_DOCUMENT_COLUMNS = tuple(column._replace(doc="as in the corpus") for column in CORPUS_COLUMNS[:3])

TOKEN_COLUMNS = (
    *_DOCUMENT_COLUMNS,
    Column("input_ids", "list<int32>", "token ids that both models read"),
    Column("flags", "list<int32>", "per token, bits of schema.Flag and planted labels"),
    Column("num_cut", "int32", "tokens of the document after the longest length allowed; they are not read"),
)

INDEX_COLUMNS = (
    *_DOCUMENT_COLUMNS,
    Column("num_tokens", "int32", "tokens of the document after truncation"),
    Column("num_history", "int32", "those of earlier turns (Flag.HISTORY): read as context, they give no rows"),
    Column("part", "string", "token file that holds it"),
    Column("row", "int32", "its row in that file"),
)
"""The documents that a run uses, in the order in which their activations are stored."""

QUARANTINE_COLUMNS = (
    *_DOCUMENT_COLUMNS,
    Column("num_tokens", "int32", "tokens of the document after truncation; 0 where they cannot be read"),
    Column("reason", "string", "why it is in quarantine: cannot be read, the forward pass failed, NaN or Inf"),
)
"""Documents in quarantine: no activations could be made of them."""

SHARD_TENSORS = (
    Column("x", "bfloat16 [rows, M, D]", "residual stream after decoder layer L, model order base, chat"),
    Column("token_id", "int32 [rows]", "the token read at this row"),
    Column("doc_id", "int64 [rows]", "the document of this row"),
    Column("position", "int32 [rows]", "token position in the document, counted before any row is dropped"),
    Column("flags", "int32 [rows]", "bits of schema.Flag and planted labels"),
    Column("corpus", "int32 [rows]", "index into the manifest's list of corpora"),
)


class Verdict:
    """Verdict on one latent, in the order of the printed table."""

    CHAT_SPECIFIC = "chat-specific"
    """The base model does not hold the latent (analyses/verdict.py); column `grounds` says on what grounds."""
    STRONGER = "stronger in chat"
    """Both models hold it along the chat model's direction, the base model significantly less of it."""
    ROTATED = "rotated"
    """Both models hold it with decoder rows of about one length, in different directions."""
    SHRINKAGE = "shrinkage artifact"
    """Delta_norm says chat-only, but nu_eps is high: the base model has the concept, and the penalty shrank it to 0."""
    DECOUPLING = "decoupling artifact"
    """Delta_norm says chat-only, but nu_r is high: other latents carry the concept in the base model."""
    BOTH = "shrinkage and decoupling"
    """Both kinds of artifact at once."""
    UNDECIDED = "undecided"
    """Delta_norm says chat-only, but the rows do not decide: too few documents, no ratio, or too much uncertainty."""
    WITHHELD = "withheld"
    """The rule says chat-specific, but the models cannot be told apart at all (analyses/evidence.py)."""
    BASE_ONLY = "base-only"
    """Delta_norm says so, or the evidence along the base model's direction does."""
    SHARED = "shared"
    """Delta_norm between 0.4 and 0.6; or Delta_norm is 1 by construction, and the base model's activations hold it."""
    OTHER = "other"
    """Delta_norm between the classes; or it says base-only, and the chat model's activations hold the latent; or the
    rule says that one model holds more of it, and the models cannot be told apart."""
    DEAD = "dead"
    """Never fires on the validation rows; no statement about which model owns it."""

    ALL = (
        CHAT_SPECIFIC, STRONGER, ROTATED, SHRINKAGE, DECOUPLING, BOTH, UNDECIDED, WITHHELD, BASE_ONLY, SHARED, OTHER,
        DEAD,
    )  # fmt: skip
    ARTIFACTS = (SHRINKAGE, DECOUPLING, BOTH)
    CHAT_ONLY = (CHAT_SPECIFIC, *ARTIFACTS, UNDECIDED, WITHHELD)
    """Verdicts of a live latent that Delta_norm or the evidence calls chat-only, in the order of bars and tables."""


class Grounds:
    """Why a latent is called chat-specific or base-only: column `grounds` of the latent table."""

    NORM_AND_EVIDENCE = "norm_and_evidence"
    """The class by Delta_norm says so too."""
    EVIDENCE_ALONE = "evidence_alone"
    """Delta_norm lies between that class and the shared one."""
    NONE = ""
    """No such call, or one by Delta_norm alone."""


class Ownership:
    """Class of a latent by Delta_norm alone, before any evidence from rows."""

    CHAT_ONLY = "chat-only"
    BASE_ONLY = "base-only"
    SHARED = "shared"
    OTHER = "other"
    """Between the classes, or undefined because both decoder rows are 0."""


DELTA_NORM_RANGES = {
    Ownership.BASE_ONLY: (0.0, 0.1),
    Ownership.SHARED: (0.4, 0.6),
    Ownership.CHAT_ONLY: (0.9, 1.0),
}
"""Delta_norm of each class, ends included; everything else is Ownership.OTHER (arXiv 2504.02922, section 2)."""


def interval_columns(name: str, doc: str, method: str = "bootstrap over documents") -> tuple[Column, ...]:
    """An estimate and both ends of its 95% interval."""
    return (
        Column(name, "float64", doc),
        Column(f"{name}_low", "float64", f"lower end of the 95% interval of {name}, {method}"),
        Column(f"{name}_high", "float64", f"upper end of the 95% interval of {name}, {method}"),
    )


SCALING_TARGETS = ("activation", "activation_no_bias", "reconstruction", "error")
"""Latent Scaling's targets in table order (method: arXiv 2504.02922, section 3)."""

BETA_COLUMNS = tuple(
    column
    for target in SCALING_TARGETS
    for model in MODEL_NAMES
    for column in interval_columns(
        f"beta_{target}_{model}",
        f"least-squares scale of the latent in the {model} model's {target} target; NaN where it never fires",
        "jackknife over documents",
    )
)
GAIN_COLUMNS = tuple(
    Column(
        f"gain_{target}_{model}",
        "float64",
        f"share of what the {model} model's {target} beta takes off the squared error that the other half of the "
        "documents' beta takes off; 1 = all, below 0 = worse than none; NaN where a half is silent",
    )
    for target in ("reconstruction", "error")
    for model in MODEL_NAMES
)
CHECKED_NU_COLUMNS = tuple(
    Column(f"{nu}_{rows}", "float64", f"{nu} {where}; NaN where that was not asked for")
    for rows, where in (("training", "on training rows"), ("strong", "on rows above a share of the latent's maximum"))
    for nu in ("nu_eps", "nu_r")
)

LATENT_COLUMNS = (
    Column("latent", "int32", "index of the latent, 0 .. F-1"),
    Column("verdict", "string", "one of schema.Verdict.ALL"),
    Column("grounds", "string", "one of schema.Grounds: what a chat-specific or base-only call rests on"),
    Column("is_confident", "bool", "the call holds at the run's false discovery rate (analyses/verdict.py)"),
    Column("reason", "string", "the numbers that the verdict follows from, as a phrase"),
    Column("delta_norm", "float64", f"relative decoder norm in comparable units, {DELTA_NORM_ORIENTATION}"),
    Column("delta_norm_raw", "float64", "the same in units of raw activations; it follows the scales of the models"),
    Column("delta_direction", "float64", "as delta_norm, the base row's length taken along d_j^chat; in [0, 1]"),
    Column("ownership", "string", "class by delta_norm alone: base-only, shared, chat-only, other"),
    Column("decoder_norm_base", "float64", "|d_j^base|"),
    Column("decoder_norm_chat", "float64", "|d_j^chat|"),
    Column("decoder_cosine", "float64", "cosine of d_j^base and d_j^chat; NaN where a norm is 0"),
    Column("decoder_norm_base_raw", "float64", "|d_j^base| in units of raw activations"),
    Column("decoder_norm_chat_raw", "float64", "|d_j^chat| in units of raw activations"),
    Column("encoder_norm_base", "float64", "|W_enc_j^base|"),
    Column("encoder_norm_chat", "float64", "|W_enc_j^chat|"),
    Column("frequency", "float64", "share of validation rows on which the latent fires, in [0, 1]"),
    Column("num_documents", "int64", "validation documents in which the latent fires"),
    Column("max_activation", "float64", "largest f_j on the validation rows"),
    Column("mean_activation", "float64", "mean f_j over the rows on which it fires; NaN where it never fires"),
    Column("template_frac", "float64", "share of the latent's summed activation on template tokens, in [0, 1]"),
    Column("user_frac", "float64", "the same on user tokens"),
    Column("assistant_frac", "float64", "the same on assistant tokens"),
    Column("bos_frac", "float64", "the same on the BOS token"),
    Column("control_token", "string", "the template's control token on which it fires on most rows; empty for none"),
    Column("control_token_frac", "float64", "share of the rows on which it fires that are this token, in [0, 1]"),
    *interval_columns("nu_eps", "beta(error, base) / beta(error, chat); high = complete shrinkage"),
    *interval_columns("nu_r", "beta(reconstruction, base) / beta(reconstruction, chat); high = latent decoupling"),
    *interval_columns("nu_act", "beta(activation, base) / beta(activation, chat)"),
    *interval_columns("nu_act_no_bias", "the same with the decoder's bias taken from the activations"),
    *interval_columns("nu_act_centred", "base model's share: cov(f, <d^chat, x^base>) / cov(f, <d^chat, x^chat>)"),
    Column(
        "artifact_probability",
        "float64",
        "bootstrap probability that a ratio that decides (nu_eps or nu_r; nu_act_centred where decoder_norm_base is 0) "
        "is at or above its threshold; NaN where undefined",
    ),
    Column("p_value", "float64", "against `the base model holds it`: a deciding ratio at or beyond its threshold"),
    Column("q_value", "float64", "p_value after Benjamini-Hochberg over its family; NaN where not judged"),
    Column("p_held", "float64", "against `the base model does not hold it`: all deciding ratios within thresholds"),
    Column("q_held", "float64", "p_held after Benjamini-Hochberg over all judged latents; NaN where not judged"),
    Column("p_value_base", "float64", "p_value with the models exchanged, along d_j^base; NaN for delta_norm >= 0.4"),
    Column("q_value_base", "float64", "p_value_base after Benjamini-Hochberg; NaN where not judged"),
    *BETA_COLUMNS,
    *GAIN_COLUMNS,
    *CHECKED_NU_COLUMNS,
    Column("twin", "int32", "most parallel twin of a chat-only or base-only latent (TWIN_COLUMNS); -1 = none"),
    Column("twin_cosine", "float64", "decoder cosine with the twin; NaN without one"),
    Column("twin_divergence", "float64", "activation divergence from the twin, in [0, 1]; NaN without one"),
)
"""The latent table: Parquet, one row per latent; the columns of `latent_corpus_columns` follow these."""


def latent_corpus_columns(corpora: Iterable[str]) -> tuple[Column, ...]:
    """Two columns of the latent table per corpus of the run."""
    frequency, largest = "share of {}'s validation rows on which it fires; NaN without", "largest f_j on the rows of {}"
    return tuple(
        Column(f"{name}_{corpus}", "float64", doc.format(corpus))
        for corpus in corpora
        for name, doc in (("frequency", frequency), ("max_activation", largest))
    )


CAUSALITY_COLUMNS = (
    Column("intervention", "string", "what replaced the residual stream at layer L (method, section 6)"),
    Column("positions", "string", "all, first_9 or rest: which predicting positions of assistant turns"),
    *interval_columns("kl", "mean KL(p_chat || p_edited), nats per token; resampled by conversation"),
    *interval_columns("kl_base", "mean KL(p_base || p_edited), likewise"),
    *interval_columns("nll", "mean -log p_edited of the text's next token; NaN for an id that one model lacks"),
    Column("num_tokens", "int64", "positions averaged"),
    Column("num_conversations", "int64", "conversations averaged"),
    Column("num_latents", "int64", "size of the latent set, or 0 where none is used"),
)

CAUSALITY_DIFFERENCE_COLUMNS = (
    Column("intervention", "string", "as in the causality table; random_half_mean_* is the mean over random halves"),
    Column("reference", "string", "the intervention whose KL is subtracted"),
    Column("positions", "string", "as in the causality table"),
    *interval_columns("difference", "KL(intervention) - KL(reference), nats per token; paired within conversations"),
    Column("num_tokens", "int64", "positions averaged"),
    Column("num_conversations", "int64", "conversations averaged"),
)
"""Paired differences between interventions of one crosscoder; with `none` it is what the reference takes off the KL."""

CAUSALITY_CURVE_COLUMNS = (
    Column("order", "string", "evidence (most chat-specific first: rank(nu_eps) + rank(nu_r)), or random_<i>"),
    Column("positions", "string", "as in the causality table"),
    Column("num_latents", "int64", "latents added to the base stream: 0, 1, 2, 4, ..., N"),
    *interval_columns("kl", "mean KL(p_chat || p_edited), nats per token; resampled by conversation"),
    *interval_columns(
        "kl_per_latent",
        "KL taken off per latent since the point before, nats per token and latent, paired; NaN at 0 latents",
    ),
)
"""KL against the number of latents added, in order of evidence and, as control, in random orders."""

TWIN_COLUMNS = (
    Column("latent_chat", "int32", "a chat-only latent"),
    Column("latent_base", "int32", "a base-only latent that points the same way"),
    Column("cosine", "float64", "cosine of d^chat of the one and d^base of the other; > 0.9 by definition"),
    Column("divergence", "float64", "share of rows with one high that have the other low, in [0, 1]; NaN if none"),
    Column("num_high_rows", "int64", "rows on which at least one of the two is above 0.4 of the pair's maximum"),
)
"""Twins: the trace that Latent Decoupling leaves (arXiv 2504.02922, section 3)."""

EXAMPLE_COLUMNS = (
    Column("latent", "int32", "index of the latent"),
    Column("rank", "int32", "0 = strongest context of this latent"),
    Column("doc_id", "int64", "document of the context"),
    Column("position", "int32", "position of the maximum in the document"),
    Column("activation", "float64", "f_j at that position"),
    Column("corpus", "string", "corpus of the document"),
    Column("tokens", "list<string>", "texts of the tokens around the maximum"),
    Column("activations", "list<float32>", "f_j at each of these tokens"),
)


FIDELITY_KEYS = (
    "fve_base",
    "fve_chat",
    "fve",
    "l0",
    "dead_frac",
    "mean_norm_base",
    "mean_norm_chat",
    "num_rows",
    "fve_standardised",
    "fve_without_sinks",
    "num_sinks",
)
"""Numbers of the fidelity analysis: fraction of variance explained (higher is better), mean active latents per row,
share of latents that never fire, mean |x|, rows; FVE with every dimension counted the same, FVE without attention
sinks, and how many rows those are."""


class Control:
    """Kinds of controls: CONTROL_COLUMNS, column `control`."""

    STATED = "stated error"
    """A bound of the chat-specific set's false discovery rate, by the verdict's own account."""
    RANDOM = "random directions"
    """Of other latents, in place of a latent's own."""
    NULL_PAIR = "null pair"
    """One model as base and as chat."""
    NOISE_PAIR = "noise pair"
    """A model against itself with noise on its weights."""
    SEED = "seed"
    """Followed by the name of the crosscoder that differs in its seed alone."""
    REPLICATED = "replicated"
    """Chat-specific in at least half of the other seeds, of those that are chat-specific here."""
    POWER = "power at strength"
    """Followed by the strength: how many concepts put into the chat model's rows are called chat-specific."""


CONTROL_COLUMNS = (
    Column("control", "string", "one of schema.Control; seed is followed by the name of the other crosscoder"),
    Column("quantity", "string", "what value is, as a phrase"),
    Column("value", "float64", "the measured share or index, in [0, 1]; NaN where there is no latent to measure it on"),
    Column("value_low", "float64", "lower end of its 95% interval (Wilson's); 0 for stated error, which is a bound"),
    Column("value_high", "float64", "upper end of its 95% interval"),
    Column("expected", "float64", "value to compare with: 0, or what the verdict states; NaN for none"),
    Column("num_latents", "int64", "latents that the share is of"),
    Column("note", "string", "the numbers behind it, as a sentence"),
)

EQUIVALENCE_COLUMNS = (
    Column("latent", "int32", "index in the dictionary"),
    Column("verdict", "string", "its verdict"),
    *interval_columns("agreement", "cosine of the effects of d^chat and d^base on the chat model's next tokens"),
    Column("num_conversations", "int64", "conversations in which it was tried and had an effect"),
)

SEED_COLUMNS = (
    Column("other", "string", "name of the crosscoder that differs in its seed alone"),
    Column("latent", "int32", "a chat-specific latent of this crosscoder"),
    Column("other_latent", "int32", "its mutual best match by the cosine of [d^base, d^chat]; -1 = none"),
    Column("other_verdict", "string", "the verdict on the match; null without one"),
    Column("cosine", "float64", "cosine with the most parallel latent of the other crosscoder, match or not"),
)
