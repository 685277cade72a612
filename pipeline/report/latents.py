"""Latents on the page: cards with their numbers, an explanation where there is one, and highlighted contexts.

Every latent with contexts or an explanation has a card. The chat-specific ones that matter most stand on the page, at
most MAX_CARDS per crosscoder; the others wait in template elements until a reader opens them from the latent table or a
figure. Texts stay plain here; the page's template escapes them.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from pipeline.analyses.logit_lens_columns import DIFFERENCE
from pipeline.report import formatting as fmt
from pipeline.report.data import CrosscoderReport
from pipeline.report.histograms import Histogram, histograms
from pipeline.report.palette import VERDICT_ROLES
from pipeline.report.samples import Sample, SampleGroup, sample_groups
from pipeline.report.summary import (
    FREQUENCY_PREFIX,
    Replication,
    anchor,
    behaviors_by_latent,
    chat_only_rows,
    corpora_of,
    replication,
    steering_effects,
)
from pipeline.schema import CHAT, MODEL_NAMES, Verdict

MAX_CARDS = 24
MAX_OTHER_CARDS = 400
"""Further cards per crosscoder that can be opened from the table."""
MAX_CONTEXTS = 5
MAX_CARD_SAMPLES = 2
WEAKER_SHARES = (0.75, 0.5, 0.25)
"""Shares of a latent's maximum near which further contexts are shown."""
MAX_TOKENS = 6
_MEMBERS = {MODEL_NAMES[CHAT]: "In the chat model", DIFFERENCE: "More than in the base model"}


class ContextToken(NamedTuple):
    """A piece of a context: plain text where `share` is 0, else highlighted."""

    text: str
    share: float
    """Activation relative to the latent's strongest example, in [0, 1]."""
    activation: float


class TokenContext(NamedTuple):
    """One highlighted context."""

    corpus: str
    activation: float
    doc_id: int
    tokens: list[ContextToken]


class Neighbour(NamedTuple):
    """Another latent whose decoder row points the same way."""

    latent: int
    cosine_base: float
    """NaN where a row d^base is 0."""
    cosine_chat: float


class Explanation(NamedTuple):
    """What a language model says that a latent stands for."""

    text: str
    score: str
    """Balanced accuracy with its interval, or why there is none."""
    balanced_accuracy: float
    """NaN where the explanation was not tested."""


class PromotedTokens(NamedTuple):
    """Tokens of one member of a latent, the most extreme first."""

    member: str
    """Whose direction, in words."""
    promoted: list[str]
    suppressed: list[str]


class LatentCard(NamedTuple):
    """One latent with its numbers and contexts."""

    anchor: str
    latent: int
    verdict: str
    role: str
    """Colour role of the verdict."""
    is_confident: bool
    reason: str
    """The numbers that the verdict follows from."""
    facts: list[tuple[str, str]]
    behaviors: list[str]
    """Planted behaviours that it finds best, and what steering by it does."""
    explanation: Explanation | None
    shares: list[tuple[str, float]]
    """Where it fires: template, user, assistant, elsewhere; sums to 1."""
    corpora: list[tuple[str, float]]
    """Share of each corpus' rows on which it fires."""
    contexts: list[TokenContext]
    weaker: list[TokenContext]
    """Contexts near WEAKER_SHARES of the maximum, falling."""
    histograms: list[Histogram]
    neighbours: list[Neighbour]
    tokens: list[PromotedTokens]
    """What its directions add to the logits."""
    samples: list[Sample]
    """Prompts answered under steering by it."""


class CardSources(NamedTuple):
    """What the cards of one crosscoder are made of: read once from its tables, by latent."""

    place: int
    notes: Mapping[int, list[str]]
    explanations: Mapping[int, Explanation]
    contexts: Mapping[int, pd.DataFrame]
    histograms: Mapping[int, pd.DataFrame]
    neighbours: Mapping[int, pd.DataFrame]
    tokens: Mapping[int, list[PromotedTokens]]
    groups: Sequence[SampleGroup]
    """Answers under steering, by behaviour."""
    samples: Mapping[int, list[Sample]]
    """The first of these, by latent."""
    corpora: list[str]
    replication: Replication | None


def card_sources(crosscoder: CrosscoderReport, index: int) -> CardSources:
    """The sources of the crosscoder at this position of the report."""
    groups = sample_groups(crosscoder)
    samples: dict[int, list[Sample]] = {}
    for group in groups:
        samples.setdefault(group.latent, []).extend(group.samples[:MAX_CARD_SAMPLES])
    corpora = [] if crosscoder.latents is None else corpora_of(crosscoder.latents)
    return CardSources(
        place=index,
        notes=_behavior_notes(crosscoder),
        explanations=explanations(crosscoder),
        contexts=_rows_by_latent(crosscoder.examples),
        histograms=_rows_by_latent(crosscoder.histograms),
        neighbours=_rows_by_latent(crosscoder.neighbours),
        tokens=promoted_tokens(crosscoder),
        groups=groups,
        samples=samples,
        corpora=corpora,
        replication=replication(crosscoder),
    )


def _rows_by_latent(table: pd.DataFrame | None) -> dict[int, pd.DataFrame]:
    return {} if table is None else {int(str(latent)): rows for latent, rows in table.groupby("latent", sort=False)}


def latent_cards(crosscoder: CrosscoderReport, sources: CardSources) -> list[LatentCard]:
    """Cards of the chat-specific latents that have contexts; of other chat-only ones where none is chat-specific.

    Order: those that find a planted behaviour, then confident ones, then by activation mass; at most MAX_CARDS.
    """
    if crosscoder.latents is None or not sources.contexts:
        return []
    rows = crosscoder.latents[crosscoder.latents["latent"].isin(list(sources.contexts))]
    specific = rows[rows["verdict"] == Verdict.CHAT_SPECIFIC]
    rows = specific if len(specific) else chat_only_rows(rows)
    mass = (rows["frequency"] * rows["mean_activation"]).fillna(0.0)
    ranked = rows.assign(_found=rows["latent"].isin(list(behaviors_by_latent(crosscoder))), _mass=mass)
    ranked = ranked.sort_values(["_found", "is_confident", "_mass"], ascending=False, kind="stable")
    return [_card(row, sources) for row in ranked.head(MAX_CARDS).to_dict("records")]


def other_cards(crosscoder: CrosscoderReport, sources: CardSources, shown: Collection[int]) -> list[LatentCard]:
    """Cards of further latents with contexts or an explanation, by verdict, then index; at most MAX_OTHER_CARDS."""
    if crosscoder.latents is None:
        return []
    latents = (set(sources.contexts) | set(sources.explanations)) - set(shown)
    rows = crosscoder.latents[crosscoder.latents["latent"].isin(list(latents))]
    return [_card(row, sources) for row in by_verdict(rows).head(MAX_OTHER_CARDS).to_dict("records")]


def card_of(crosscoder: CrosscoderReport, latent: int) -> LatentCard:
    """The card of one latent of the latent table, whatever its verdict."""
    assert crosscoder.latents is not None
    (row,) = crosscoder.latents[crosscoder.latents["latent"] == latent].to_dict("records")
    return _card(row, card_sources(crosscoder, 0))


def by_verdict(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a latent table in the order of schema.Verdict, otherwise as they stand."""
    order = rows["verdict"].map({verdict: number for number, verdict in enumerate(Verdict.ALL)})
    return rows.loc[order.sort_values(kind="stable").index]


def explanations(crosscoder: CrosscoderReport) -> dict[int, Explanation]:
    """Latent -> what it was said to stand for; latents without an explanation are left out."""
    table = crosscoder.autointerp
    if table is None:
        return {}
    found = {}
    for row in table[table["explanation"].notna()].to_dict("records"):
        numbers = [number_of(row[f"balanced_accuracy{end}"]) for end in ("", "_low", "_high")]
        text = f"{fmt.decimal(numbers[0], 2)} {fmt.interval(numbers[1], numbers[2], 2)}".strip()
        score = str(row["status"]) if math.isnan(numbers[0]) else text
        found[int(row["latent"])] = Explanation(str(row["explanation"]), score, numbers[0])
    return found


def promoted_tokens(crosscoder: CrosscoderReport) -> dict[int, list[PromotedTokens]]:
    """Latent -> tokens of the chat model's direction and of the difference from the base model's."""
    found: dict[int, list[PromotedTokens]] = {}
    if crosscoder.logit_lens is not None:
        for row in crosscoder.logit_lens.to_dict("records"):
            if str(row["member"]) in _MEMBERS:
                lists = ([str(text) for text in row[name]][:MAX_TOKENS] for name in ("promoted", "suppressed"))
                found.setdefault(int(row["latent"]), []).append(PromotedTokens(_MEMBERS[str(row["member"])], *lists))
    return found


def _behavior_notes(crosscoder: CrosscoderReport) -> dict[int, list[str]]:
    notes: dict[int, list[str]] = {}
    for latent, rows in behaviors_by_latent(crosscoder).items():
        for row in rows:
            notes.setdefault(latent, []).append(
                f"finds {fmt.words(row.behavior)}, AUROC {fmt.decimal(row.specific.auroc, 2)}"
            )
    for effect in steering_effects(crosscoder.steering):
        notes.setdefault(effect.latent, []).append(
            f"steers {fmt.words(effect.behavior)} to {fmt.percent(effect.rate, 0)} of prompts"
        )
    return notes


def _card(row: Mapping[object, object], sources: CardSources) -> LatentCard:
    numbers = {str(name): number_of(value) for name, value in row.items()}
    latent, verdict = int(numbers["latent"]), str(row["verdict"])
    shares = [numbers[f"{place}_frac"] for place in ("template", "user", "assistant")]
    shares = [0.0 if math.isnan(share) else share for share in shares]
    contexts, bins, near = (own.get(latent) for own in (sources.contexts, sources.histograms, sources.neighbours))
    facts = _facts(numbers)
    if sources.replication is not None and latent in sources.replication.num_finding:
        others = fmt.plural(sources.replication.num_others, "other seed")
        facts.append(("found again by", f"{sources.replication.num_finding[latent]} of {others}"))
    return LatentCard(
        anchor=anchor(sources.place, latent),
        latent=latent,
        verdict=verdict,
        role=VERDICT_ROLES.get(verdict, "plain"),
        is_confident=bool(row["is_confident"]),
        reason=str(row["reason"] or ""),
        facts=facts,
        behaviors=sources.notes.get(latent, []),
        explanation=sources.explanations.get(latent),
        shares=list(
            zip(("template", "user", "assistant", "elsewhere"), [*shares, max(0.0, 1 - sum(shares))], strict=True)
        ),
        corpora=[(corpus, numbers[f"{FREQUENCY_PREFIX}{corpus}"]) for corpus in sources.corpora],
        contexts=[] if contexts is None else token_contexts(contexts),
        weaker=[] if contexts is None else weaker_contexts(contexts),
        histograms=[] if bins is None else histograms(bins, sources.corpora),
        neighbours=[] if near is None else neighbours_of(near),
        tokens=sources.tokens.get(latent, []),
        samples=sources.samples.get(latent, []),
    )


def _facts(numbers: Mapping[str, float]) -> list[tuple[str, str]]:
    facts = [
        ("Delta_norm", fmt.decimal(numbers["delta_norm"])),
        ("nu_eps", _with_interval(numbers, "nu_eps")),
        ("nu_r", _with_interval(numbers, "nu_r")),
    ]
    if numbers["decoder_norm_base"] == 0:
        facts.append(("nu_act, centred", _with_interval(numbers, "nu_act_centred")))
    facts += [
        ("artifact, probability", fmt.percent(numbers["artifact_probability"])),
        ("fires on", f"{fmt.percent(numbers['frequency'])} of rows"),
        ("documents", fmt.count(numbers["num_documents"])),
        ("max f", fmt.significant(numbers["max_activation"])),
        ("cosine", fmt.decimal(numbers["decoder_cosine"], 2)),
    ]
    if numbers["twin"] >= 0:
        spelled = f"{numbers['twin']:.0f}, cosine {fmt.decimal(numbers['twin_cosine'], 2)}"
        facts.append(("twin", f"{spelled}, divergence {fmt.decimal(numbers['twin_divergence'], 2)}"))
    return facts


def _with_interval(numbers: Mapping[str, float], name: str) -> str:
    low, high = numbers[f"{name}_low"], numbers[f"{name}_high"]
    return f"{fmt.decimal(numbers[name], 2)} {fmt.interval(low, high, 2)}".strip()


def number_of(value: object) -> float:
    """A table's value as a number; NaN for what is none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def token_contexts(examples: pd.DataFrame) -> list[TokenContext]:
    """Rows of EXAMPLE_COLUMNS of one latent as highlighted contexts, at most MAX_CONTEXTS."""
    strongest = float(examples["activation"].max())
    rows = examples.sort_values("rank", kind="stable").head(MAX_CONTEXTS).to_dict("records")
    return [_context(row, strongest) for row in rows]


def weaker_contexts(examples: pd.DataFrame) -> list[TokenContext]:
    """For each of WEAKER_SHARES the context nearest to it that `token_contexts` left out, each once."""
    ranked = examples.sort_values("rank", kind="stable")
    strongest, left = float(ranked["activation"].max()), ranked.iloc[MAX_CONTEXTS:]
    places: list[Any] = []
    for share in WEAKER_SHARES:
        distance = (left.drop(index=places)["activation"] / strongest - share).abs()
        places += [] if distance.empty else [distance.idxmin()]
    return [_context(row, strongest) for row in left.loc[places].to_dict("records")]


def _context(row: Mapping[Any, Any], strongest: float) -> TokenContext:
    texts, activations = [str(text) for text in row["tokens"]], [float(f) for f in row["activations"]]
    tokens = _tokens(texts, activations, strongest)
    return TokenContext(str(row["corpus"]), float(row["activation"]), int(row["doc_id"]), tokens)


def neighbours_of(rows: pd.DataFrame) -> list[Neighbour]:
    """NEIGHBOUR_COLUMNS of one latent, nearest first."""
    return [
        Neighbour(int(row["neighbour"]), float(row["cosine_base"]), float(row["cosine_chat"]))
        for row in rows.sort_values("rank", kind="stable").to_dict("records")
    ]


def _tokens(texts: Sequence[str], activations: Sequence[float], strongest: float) -> list[ContextToken]:
    """Tokens with neighbours that do not fire merged into one."""
    tokens: list[ContextToken] = []
    for text, activation in zip(texts, activations, strict=True):
        share = min(1.0, activation / strongest) if strongest > 0 and activation > 0 else 0.0
        if share == 0 and tokens and tokens[-1].share == 0:
            tokens[-1] = tokens[-1]._replace(text=tokens[-1].text + fmt.visible(text))
        else:
            tokens.append(ContextToken(fmt.visible(text), round(share, 2), activation))
    return tokens
