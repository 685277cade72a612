"""Automatic interpretation: which contexts a language model reads about a latent, and how its answers are scored.

An explanation is written from the latent's strongest contexts. It is tested by detection: held-out contexts on which
the latent fires at several strengths, mixed with contexts of other documents on which it does not, and the question
which of them fit the explanation (after arXiv 2410.13928, section 3). Quiet contexts come from the corpora of the
active ones, so that telling chats from web pages is not enough. Words are made in `autointerp_prompts.py`; nothing
here talks to anybody.

Shapes: B rows of a batch of whole documents.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from pipeline.analyses.rows import RowBatch, document_starts
from pipeline.numerics.proportions import Interval, mean_of_two_rates
from pipeline.numerics.statistics import hash_documents
from pipeline.schema import AUTOINTERP_COLUMNS, InterpStatus

MIN_QUIET_PER_CORPUS = 64
"""Documents per corpus among which each latent's quiet contexts are looked for."""
_WINDOW_SALT = 3
"""Places the windows of quiet contexts independently of the other uses of a document's hash."""


class Context(NamedTuple):
    """Some neighbouring tokens of one document."""

    doc_id: int
    corpus: str
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    """f_j at each token; all 0 in a quiet context."""


class QuietContext(NamedTuple):
    """A context and those of the latents asked for that fire in it."""

    context: Context
    active: frozenset[int]


class Sizes(NamedTuple):
    """How many contexts a latent's explanation and its test take."""

    num_explaining: int
    num_active: int
    num_quiet: int
    seed: int


class Case(NamedTuple):
    """What is asked about one latent."""

    latent: int
    explaining: tuple[Context, ...]
    """Strongest first."""
    judged: tuple[Context, ...]
    """Held out, shuffled."""
    fires: tuple[bool, ...]
    """The truth about `judged`."""


class Interpretation(NamedTuple):
    """What came back about one latent."""

    latent: int
    status: str
    """One of schema.InterpStatus."""
    explanation: str | None = None
    fires: tuple[bool, ...] = ()
    """The truth about the contexts that were judged."""
    said: tuple[bool, ...] = ()
    """The model's answers, one for each of `fires`."""
    control: float = math.nan
    """Balanced accuracy of another latent's explanation on the same contexts; NaN where it was not asked for."""
    num_malformed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


def choose_windows(
    doc_id_B: torch.Tensor, corpus_B: torch.Tensor, left: list[int], *, window_tokens: int
) -> torch.Tensor:
    """Mask of the rows of one window of up to 2 x window_tokens + 1 rows per document, bool [B].

    Documents are taken in their order while their corpus has any left; `left` (by corpus) is counted down. Where a
    window lies depends on the document's id alone.
    """
    keep_B = torch.zeros_like(doc_id_B, dtype=torch.bool)
    starts = document_starts(doc_id_B).tolist()
    for start, stop in zip(starts, [*starts[1:], len(doc_id_B)], strict=True):
        corpus = int(corpus_B[start])
        if left[corpus] > 0:
            left[corpus] -= 1
            size = min(stop - start, 2 * window_tokens + 1)
            places = stop - start - size + 1
            first = start + int(hash_documents(doc_id_B[start], num_groups=places, salt=_WINDOW_SALT))
            keep_B[first : first + size] = True
    return keep_B


def quiet_contexts(
    batches: Iterable[RowBatch],
    latents: Collection[int],
    *,
    corpora: Sequence[str],
    token_texts: Callable[[list[int]], list[str]],
) -> list[QuietContext]:
    """Each document of the batches (one window, see choose_windows) with those of `latents` that fire in it."""
    wanted = torch.tensor(sorted(latents), dtype=torch.int64)
    found = []
    for batch in batches:
        starts = document_starts(batch.doc_id_B).tolist()
        for start, stop in zip(starts, [*starts[1:], len(batch.doc_id_B)], strict=True):
            pairs = slice(int(batch.codes.row_offsets[start]), int(batch.codes.row_offsets[stop]))
            active = torch.unique(batch.codes.latents_P[pairs].cpu())
            texts = tuple(token_texts(batch.token_id_B[start:stop].tolist()))
            corpus = corpora[int(batch.corpus_B[start])]
            context = Context(int(batch.doc_id_B[start]), corpus, texts, (0.0,) * len(texts))
            found.append(QuietContext(context, frozenset(active[torch.isin(active, wanted)].tolist())))
    return found


def case_of(latent: int, examples: pd.DataFrame, quiet: Sequence[QuietContext], sizes: Sizes) -> Case | None:
    """What to ask about a latent; None where its contexts do not suffice (two active ones and a quiet one).

    `examples` are the latent's rows of the example table, each context from another document. The strongest explain, at
    most half of them; of the rest, num_active evenly spaced by activation are held out to be judged.
    """
    rows = examples.sort_values(["activation", "doc_id"], ascending=[False, True], kind="stable")
    contexts = [
        Context(int(doc_id), str(corpus), tuple(map(str, tokens)), tuple(map(float, activations)))
        for doc_id, corpus, tokens, activations in zip(
            rows["doc_id"], rows["corpus"], rows["tokens"], rows["activations"], strict=True
        )
    ]
    num_explaining = min(sizes.num_explaining, (len(contexts) + 1) // 2)
    rest = contexts[num_explaining:]
    num_active = min(sizes.num_active, len(rest))
    places = np.linspace(0, len(rest) - 1, num_active).round().astype(int)
    active = [rest[place] for place in places] if rest else []
    random = np.random.default_rng([sizes.seed, latent])
    silent = _silent(latent, {context.doc_id for context in contexts}, active, quiet, sizes.num_quiet, random)
    if not active or not silent:
        return None
    judged, fires = [*active, *silent], [True] * len(active) + [False] * len(silent)
    order = random.permutation(len(judged))
    return Case(
        latent, tuple(contexts[:num_explaining]), tuple(judged[i] for i in order), tuple(fires[i] for i in order)
    )


def _silent(
    latent: int,
    own_documents: Collection[int],
    active: Sequence[Context],
    quiet: Sequence[QuietContext],
    number: int,
    random: np.random.Generator,
) -> list[Context]:
    """Contexts of other documents in which the latent is silent, from the corpora of the active ones in turn."""
    usable = [one.context for one in quiet if latent not in one.active and one.context.doc_id not in own_documents]
    left = [usable[i] for i in random.permutation(len(usable))]
    chosen: list[Context] = []
    while active and left and len(chosen) < number:
        corpus = active[len(chosen) % len(active)].corpus
        place = next((i for i, context in enumerate(left) if context.corpus == corpus), 0)
        chosen.append(left.pop(place))
    return chosen


class Detection(NamedTuple):
    """How well an explanation tells active contexts from quiet ones; 0.5 is chance."""

    balanced_accuracy: float
    interval: Interval
    true_positive_frac: float
    true_negative_frac: float
    num_active: int
    num_quiet: int


def detection(fires: Sequence[bool], said: Sequence[bool]) -> Detection:
    """Balanced accuracy with its 95% interval; NaN unless contexts of both kinds were judged."""
    truth, answer = np.asarray(fires, dtype=bool), np.asarray(said, dtype=bool)
    num_active, num_quiet = int(truth.sum()), int((~truth).sum())
    positive = float(answer[truth].mean()) if num_active else float("nan")
    negative = float((~answer[~truth]).mean()) if num_quiet else float("nan")
    mean, interval = mean_of_two_rates((positive, num_active), (negative, num_quiet))
    return Detection(mean, interval, positive, negative, num_active, num_quiet)


def interpretation_table(found: Sequence[Interpretation]) -> pd.DataFrame:
    """schema.AUTOINTERP_COLUMNS, in the order given."""
    rows: list[Mapping[str, Any]] = []
    for one in found:
        score = detection(one.fires, one.said)
        rows.append(
            {
                **one._asdict(),
                "balanced_accuracy": score.balanced_accuracy,
                "balanced_accuracy_low": score.interval.low,
                "balanced_accuracy_high": score.interval.high,
                "true_positive_frac": score.true_positive_frac,
                "true_negative_frac": score.true_negative_frac,
                "control_accuracy": one.control,
                "num_active": score.num_active,
                "num_quiet": score.num_quiet,
            }
        )
    table = pd.DataFrame(rows, columns=[column.name for column in AUTOINTERP_COLUMNS])
    table["explanation"] = pd.Series([one.explanation for one in found], dtype=object)  # None stays None
    return table


def interpretation_numbers(table: pd.DataFrame) -> dict[str, float]:
    """What a record holds of the table: counts per outcome, the mean score, tokens used as the endpoint counts them."""
    scored = table[table["status"] == InterpStatus.SCORED]
    return {
        "num_latents": len(table),
        "num_scored": len(scored),
        "num_above_chance": int((scored["balanced_accuracy_low"] > 0.5).sum()),
        "mean_balanced_accuracy": float(scored["balanced_accuracy"].mean()),
        "mean_control_accuracy": float(scored["control_accuracy"].mean()),
        **{name: int(table[name].sum()) for name in ("num_malformed", "tokens_in", "tokens_out")},
    }
