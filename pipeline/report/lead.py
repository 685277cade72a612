"""The first words of the page: three short answers from the crosscoder that deserves most trust.

A hurried reader wants to know what is new in the chat model, how sure that is and what it does, once, not once per
crosscoder. Which crosscoder answers is a rule, and the page states it. Plain text; the page escapes and places it.
"""

from typing import NamedTuple

from pipeline.report import formatting as fmt
from pipeline.report.data import CrosscoderReport, ReportData
from pipeline.report.headlines import (
    NOT_YET,
    cannot_tell,
    control_sentences,
    does_sentences,
    no_verdict,
    unknown_power,
)
from pipeline.report.latents import explanations
from pipeline.report.summary import VerdictSummary, verdict_summary

MAX_DOES = 3
MAX_NAMED = 3
"""Explanations quoted."""
TRUSTED_SCORE = 0.7
"""Explanations from this balanced accuracy on are quoted on the first page."""


class Lead(NamedTuple):
    """What the page says first."""

    place: int
    """Position of the crosscoder among the report's."""
    name: str
    why: str
    """Why this crosscoder answers; empty where there is no other."""
    new: str
    sure: list[str]
    does: list[str]


def lead(data: ReportData) -> Lead | None:
    """The answer of the crosscoder that explains most of the activations; None without a verdict.

    Of those that explain as much, to two digits, the one with the largest share of confident chat-specific latents
    among its chat-only ones answers. Crosscoders that are not good enough for a verdict, whose latents were not tested,
    or that have no chat-only latent where another one has, do not answer; where none is good enough, the best one says
    what it lacks.
    """
    judged = [
        (place, one, verdict_summary(one.latents))
        for place, one in enumerate(data.crosscoders)
        if one.latents is not None and len(one.latents)
    ]
    found = [part for part in judged if not part[1].shortcomings] or judged
    tested = [part for part in found if part[2].num_chat_only and part[2].has_scaling]
    if not found or (not tested and any(counts.num_chat_only for _, _, counts in found)):
        return None
    place, crosscoder, counts = max(tested or found, key=lambda part: _quality(part[1], part[2]))
    why = ""
    if len(data.crosscoders) > 1 and crosscoder.fidelity is not None:
        why = f"It answers because it explains most of the activations (FVE {fmt.decimal(_fve(crosscoder), 2)})."
    sure = control_sentences(crosscoder.controls)
    if counts.num_chat_only == 0:
        sure += unknown_power(crosscoder)
    if crosscoder.controls is None:
        sure = ["Controls were not run: this rests on intervals over documents alone."]
    if nothing := cannot_tell(data):
        return Lead(place, crosscoder.name, why, nothing, sure, _effects_and_words(crosscoder))
    if crosscoder.shortcomings:
        new = f"{data.layer_note} {no_verdict(crosscoder)}".strip()
        return Lead(place, crosscoder.name, why, new, [NOT_YET], _effects_and_words(crosscoder))
    new = f"{data.layer_note} {_unseen_difference(data, counts) or _new_sentence(counts)}".strip()
    return Lead(place, crosscoder.name, why, new, sure, _effects_and_words(crosscoder))


def _quality(crosscoder: CrosscoderReport, counts: VerdictSummary) -> tuple[float, float, int]:
    """What decides who answers, largest first."""
    share = counts.num_confident_specific / counts.num_chat_only if counts.num_chat_only else 0.0
    return round(_fve(crosscoder), 2), share, counts.num_confident_specific


def _fve(crosscoder: CrosscoderReport) -> float:
    """Attention sinks aside; 0 where it was not measured."""
    fve = 0.0 if crosscoder.fidelity is None else crosscoder.fidelity["fve_without_sinks"]
    return 0.0 if fmt.is_missing(fve) else fve


def _unseen_difference(data: ReportData, counts: VerdictSummary) -> str:
    """Where the models differ and no latent is new: the difference comes first, for "nothing" would be wrong."""
    if data.evidence is None or not data.evidence.is_distinguishable or counts.num_chat_only:
        return ""
    alive = fmt.plural(counts.num_alive, "live latent")
    return f"{data.evidence.reason} No latent shows that difference: none of {alive} belongs to the chat model alone."


def _new_sentence(counts: VerdictSummary) -> str:
    if counts.num_chat_only == 0:
        return f"Nothing: none of {fmt.plural(counts.num_alive, 'live latent')} belongs to the chat model alone."
    verb = "is" if counts.num_specific == 1 else "are"
    text = f"{fmt.plural(counts.num_specific, 'latent')} of {fmt.count(counts.num_alive)} {verb} new in the chat model"
    low, high = counts.num_confident_specific, counts.most_specific
    span = f", at least {fmt.count(low)} and at most {fmt.count(high)} by their 95% intervals."
    text += span if low < high else ": no 95% interval says otherwise."
    rest = counts.num_chat_only - counts.num_specific
    if rest:
        looks = "looks" if rest == 1 else "look"
        text += (
            f" {fmt.count(rest)} more {looks} new by decoder norm alone: {fmt.count(counts.num_artifacts)} "
            f"{'is an artifact' if counts.num_artifacts == 1 else 'are artifacts'} of training, "
            f"{fmt.count(rest - counts.num_artifacts)} undecided."
        )
    return text


def _effects_and_words(crosscoder: CrosscoderReport) -> list[str]:
    """What the latents do, then what they are said to stand for."""
    sentences = does_sentences(crosscoder)[:MAX_DOES]
    trusted = [one for one in explanations(crosscoder).values() if one.balanced_accuracy >= TRUSTED_SCORE]
    trusted.sort(key=lambda one: -one.balanced_accuracy)
    if trusted:
        named = "; ".join(f'"{one.text}" ({one.score})' for one in trusted[:MAX_NAMED])
        sentences.append(f"Best explained latents, with balanced accuracy on held-out contexts: {named}.")
    return sentences or ["No analysis of effects was run."]
