"""Automatic interpretation: which contexts a language model reads about a latent, and how its answers are scored.

An explanation is written from the latent's strongest contexts. It is tested by detection: held-out contexts on which
the latent fires at several strengths, mixed with contexts of other documents on which it does not, and the question
which of them fit the explanation (after arXiv 2410.13928, section 3). Quiet contexts come from the corpora of the
active ones, so that telling chats from web pages is not enough. The requests are written in
`autointerp_prompts.py`; nothing here sends them.

Shapes: B rows of a batch of whole documents.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from pipeline.analyses.autointerp_columns import AUTOINTERP_COLUMNS, STRENGTHS, InterpStatus
from pipeline.analyses.rows import RowBatch, document_slices_of
from pipeline.numerics.proportions import Z_95, Interval, mean_of_two_rates
from pipeline.numerics.statistics import hash_documents

MIN_QUIET_PER_CORPUS = 64
"""Documents per corpus among which each latent's quiet contexts are looked for."""
_WINDOW_SALT = 3
"""Places the windows of quiet contexts independently of the other uses of a document's hash."""


class TokenWindow(NamedTuple):
    """Neighbouring tokens of one document: a context of a latent."""

    doc_id: int
    corpus: str
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    """f_j at each token; all 0 in a quiet context."""


class QuietWindow(NamedTuple):
    """A window, and which of the latents asked for fire in it."""

    window: TokenWindow
    active: frozenset[int]


class Sizes(NamedTuple):
    """How many contexts explain a latent and test the explanation."""

    num_explaining: int
    num_active: int
    num_quiet: int
    seed: int


class InterpTask(NamedTuple):
    """The contexts from which one latent is explained and on which the explanation is tested."""

    latent: int
    explaining: tuple[TokenWindow, ...]
    """Strongest first."""
    judged: tuple[TokenWindow, ...]
    """Held out, shuffled."""
    fires: tuple[bool, ...]
    """Whether the latent fires in each of `judged`."""


class Interpretation(NamedTuple):
    """The result for one latent."""

    latent: int
    status: str
    """One of InterpStatus."""
    explanation: str | None = None
    fires: tuple[bool, ...] = ()
    """Whether the latent fires in each context that was judged."""
    answers: tuple[bool, ...] = ()
    """What the language model answered, one for each of `fires`."""
    control: float = math.nan
    """Balanced accuracy of another latent's explanation on the same contexts; NaN without this control."""
    num_malformed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    strengths: tuple[float, ...] = ()
    """Activation in each of these contexts as a share of the latent's largest, one for each of `fires`."""


def choose_windows(
    doc_id_B: torch.Tensor, corpus_B: torch.Tensor, left: list[int], *, window_tokens: int
) -> torch.Tensor:
    """Mask of the rows of one window of up to 2 x window_tokens + 1 rows per document, bool [B].

    Documents are taken in order until `left`, the number still wanted of each corpus, is counted down to 0. A window's
    place depends on the document's id alone.
    """
    keep_B = torch.zeros_like(doc_id_B, dtype=torch.bool)
    for rows in document_slices_of(doc_id_B):
        corpus = int(corpus_B[rows.start])
        if left[corpus] > 0:
            left[corpus] -= 1
            size = min(rows.stop - rows.start, 2 * window_tokens + 1)
            places = rows.stop - rows.start - size + 1
            first = rows.start + int(hash_documents(doc_id_B[rows.start], num_groups=places, salt=_WINDOW_SALT))
            keep_B[first : first + size] = True
    return keep_B


def quiet_windows(
    batches: Iterable[RowBatch],
    latents: Collection[int],
    *,
    corpora: Sequence[str],
    token_texts: Callable[[list[int]], list[str]],
) -> list[QuietWindow]:
    """Each document of the batches (one window, see choose_windows) with those of `latents` that fire in it."""
    wanted = torch.tensor(sorted(latents), dtype=torch.int64)
    found = []
    for batch in batches:
        for rows in document_slices_of(batch.doc_id_B):
            start = rows.start
            pairs = slice(int(batch.codes.row_offsets[start]), int(batch.codes.row_offsets[rows.stop]))
            active = torch.unique(batch.codes.latents_P[pairs].cpu())
            texts = tuple(token_texts(batch.token_id_B[rows].tolist()))
            corpus = corpora[int(batch.corpus_B[start])]
            window = TokenWindow(int(batch.doc_id_B[start]), corpus, texts, (0.0,) * len(texts))
            found.append(QuietWindow(window, frozenset(active[torch.isin(active, wanted)].tolist())))
    return found


def interp_task(latent: int, examples: pd.DataFrame, quiet: Sequence[QuietWindow], sizes: Sizes) -> InterpTask | None:
    """The task of a latent; None where it has fewer than two active contexts or no quiet one.

    `examples` are the latent's rows of the example table, each context from another document. The strongest explain, at
    most half of them; of the rest, num_active evenly spaced by activation are held out to be judged.
    """
    rows = examples.sort_values(["activation", "doc_id"], ascending=[False, True], kind="stable")
    contexts = [
        TokenWindow(int(doc_id), str(corpus), tuple(map(str, tokens)), tuple(map(float, activations)))
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
    own_documents = {context.doc_id for context in contexts}
    usable = [one.window for one in quiet if latent not in one.active and one.window.doc_id not in own_documents]
    silent = _from_same_corpora([usable[i] for i in random.permutation(len(usable))], active, sizes.num_quiet)
    if not active or not silent:
        return None
    judged, fires = [*active, *silent], [True] * len(active) + [False] * len(silent)
    order = random.permutation(len(judged))
    return InterpTask(
        latent, tuple(contexts[:num_explaining]), tuple(judged[i] for i in order), tuple(fires[i] for i in order)
    )


def _from_same_corpora(left: list[TokenWindow], active: Sequence[TokenWindow], number: int) -> list[TokenWindow]:
    """Up to `number` of the windows left, from the corpora of the active ones in turn while these have any."""
    chosen: list[TokenWindow] = []
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


def detection(fires: Sequence[bool], answers: Sequence[bool]) -> Detection:
    """Balanced accuracy with its 95% interval; NaN unless contexts of both kinds were judged."""
    truth, answer = np.asarray(fires, dtype=bool), np.asarray(answers, dtype=bool)
    num_active, num_quiet = int(truth.sum()), int((~truth).sum())
    positive = float(answer[truth].mean()) if num_active else float("nan")
    negative = float((~answer[~truth]).mean()) if num_quiet else float("nan")
    mean, interval = mean_of_two_rates((positive, num_active), (negative, num_quiet))
    return Detection(mean, interval, positive, negative, num_active, num_quiet)


def interpretation_table(found: Sequence[Interpretation]) -> pd.DataFrame:
    """AUTOINTERP_COLUMNS, in the order given."""
    rows: list[Mapping[str, Any]] = []
    for one in found:
        score = detection(one.fires, one.answers)
        rows.append(
            {
                **one._asdict(),
                "balanced_accuracy": score.balanced_accuracy,
                "balanced_accuracy_low": score.interval.low,
                "balanced_accuracy_high": score.interval.high,
                "true_positive_frac": score.true_positive_frac,
                **_found_by_strength(one),
                "true_negative_frac": score.true_negative_frac,
                "control_accuracy": one.control,
                "num_active": score.num_active,
                "num_quiet": score.num_quiet,
            }
        )
    table = pd.DataFrame(rows, columns=[column.name for column in AUTOINTERP_COLUMNS])
    table["explanation"] = pd.Series([one.explanation for one in found], dtype=object)  # None stays None
    return table


def _found_by_strength(one: Interpretation) -> dict[str, float]:
    """found_*_frac: the share of the active contexts of each third of the range that the explanation is said to fit."""
    strength_N, found_N = np.array(one.strengths), np.array(one.answers, dtype=bool)[: len(one.strengths)]
    third_N = np.ceil(strength_N * len(STRENGTHS)).clip(max=len(STRENGTHS))  # 0 for a quiet context
    parts = [found_N[third_N == place] for place in range(1, len(STRENGTHS) + 1)]
    return {
        f"found_{name}_frac": float(part.mean()) if len(part) else math.nan
        for name, part in zip(STRENGTHS, parts, strict=True)
    }


def accuracy_groups(table: pd.DataFrame, latents: pd.DataFrame) -> pd.DataFrame:
    """Where explanations hold: columns group, quantity, value, value_low, value_high, num_latents, one row per group.

    Balanced accuracy by thirds of rank(nu_eps) + rank(nu_r) among the scored latents, the most chat-specific first; and
    the share of active contexts found, by their strength. A value is the mean over latents, its interval the normal
    one, which takes latents as independent; NaN for fewer than two. `latents` is the crosscoder's latent table.
    """
    scored = table[table["status"] == InterpStatus.SCORED].merge(latents[["latent", "nu_eps", "nu_r"]], on="latent")
    rank = (scored["nu_eps"].rank() + scored["nu_r"].rank()).rank(method="first", pct=True)
    groups = {
        f"{name} third by nu": scored.loc[np.ceil(rank * 3) == place, "balanced_accuracy"]
        for place, name in enumerate(("first", "middle", "last"), start=1)
    }
    groups |= {f"{name} contexts": scored[f"found_{name}_frac"].dropna() for name in STRENGTHS}
    rows = []
    for group, values in groups.items():
        half = Z_95 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        mean = float(values.mean())
        quantity = "contexts found" if group.endswith("contexts") else "balanced accuracy"
        rows.append((group, quantity, mean, mean - half, mean + half, len(values)))
    return pd.DataFrame(rows, columns=["group", "quantity", "value", "value_low", "value_high", "num_latents"])


def interpretation_numbers(table: pd.DataFrame) -> dict[str, float]:
    """The table in numbers, for the record: latents per outcome, mean scores, tokens as the endpoint counts them."""
    scored = table[table["status"] == InterpStatus.SCORED]
    return {
        "num_latents": len(table),
        "num_scored": len(scored),
        "num_above_chance": int((scored["balanced_accuracy_low"] > 0.5).sum()),
        "mean_balanced_accuracy": float(scored["balanced_accuracy"].mean()),
        "mean_control_accuracy": float(scored["control_accuracy"].mean()),
        **{name: int(table[name].sum()) for name in ("num_malformed", "tokens_in", "tokens_out")},
    }
