"""The sentences of the first page: what is new in the chat model, how sure that is, and what it does.

Every sentence is made from numbers of summary.py and says what is missing where an analysis was off or found nothing.
Plain text; the page escapes and places it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

from pipeline.report import formatting as fmt
from pipeline.report.data import CrosscoderReport, ReportData
from pipeline.report.summary import (
    AGREES,
    PlantedScore,
    VerdictSummary,
    causal_summary,
    difference_of,
    equivalents,
    planted_rows,
    steering_effects,
    verdict_summary,
)
from pipeline.schema import Control, Verdict

GOOD_AUROC = 0.9
"""A planted behaviour counts as found from here on."""
NOT_YET = "Not at all: train it longer or on more rows, or choose other settings (analyses.quality holds the limits)."
"""How sure a crosscoder is that is not good enough for a verdict."""
CHANCE = 0.5
"""Balanced accuracy of an explanation that says nothing."""


class Headline(NamedTuple):
    """One crosscoder on the first page."""

    number: str
    """The figure to remember; empty where there is no verdict."""
    label: str
    """What the figure counts."""
    new: str
    """One sentence: out of how many, and the range that the intervals leave open."""
    sure: list[str]
    does: list[str]


def cannot_tell(data: ReportData) -> str:
    """What comes before everything else where the models cannot be told apart; empty where they can, or none looked."""
    if data.evidence is None or data.evidence.is_distinguishable:
        return ""
    tables = [one.latents for one in data.crosscoders if one.latents is not None]
    num_withheld = sum(int((table["verdict"] == Verdict.WITHHELD).sum()) for table in tables)
    withheld = f" ({fmt.plural(num_withheld, 'call')} withheld)" if num_withheld else ""
    return f"Base and chat cannot be told apart: no latent is called chat-specific{withheld}. {data.evidence.reason}"


def no_verdict(crosscoder: CrosscoderReport) -> str:
    """What a crosscoder lacks for a verdict; empty where it lacks nothing."""
    if not crosscoder.shortcomings:
        return ""
    return f"No verdict yet: {'; '.join(crosscoder.shortcomings)}."


def headline(crosscoder: CrosscoderReport) -> Headline:
    """The first page's text for one crosscoder."""
    does = [*does_sentences(crosscoder), *_explanation_sentences(crosscoder)]
    does = does or ["No analysis of effects was run for this crosscoder."]
    if crosscoder.latents is None:
        new = "Which model owns a latent was not analysed for this crosscoder."
        return Headline("", "No verdict", new, [], does)
    if crosscoder.shortcomings:
        return Headline("", "No verdict yet", no_verdict(crosscoder), [NOT_YET], does)
    counts = verdict_summary(crosscoder.latents)
    number, label, new = _new_in_chat(counts)
    sure = [*_confidence_sentences(counts, crosscoder), *control_sentences(crosscoder.controls)]
    return Headline(number, label, new, sure, does)


def control_sentences(controls: pd.DataFrame | None) -> list[str]:
    """What the controls say about the count of chat-specific latents, one sentence each; none for undefined values."""
    sentences = []
    for row in [] if controls is None else controls[controls["value"].notna()].to_dict("records"):
        control, value, num_latents = str(row["control"]), float(row["value"]), int(row["num_latents"])
        share = f"{fmt.percent(value)} {fmt.percent_interval(row['value_low'], row['value_high'])}"
        if control == Control.STATED:
            number = fmt.decimal(value * num_latents, 1)
            sentences.append(
                f"At most {number} of the {fmt.count(num_latents)} are expected to be false "
                f"({fmt.percent(value)}, Benjamini-Hochberg)."
            )
        elif control == Control.RANDOM:
            passed = f"{fmt.count(round(value * num_latents))} of {fmt.count(num_latents)}"
            sentences.append(
                f"With other latents' directions in place of their own, {passed} would have passed ({share})."
            )
        elif control in (Control.NULL_PAIR, Control.NOISE_PAIR):
            sentences.append(f"This is a {control}: every chat-specific latent is false, {share} of all.")
        elif control == Control.REPLICATED:
            number = fmt.count(round(value * num_latents))
            sentences.append(
                f"At least half of the other seeds find {number} of the {fmt.count(num_latents)} again ({share})."
            )
        elif control.startswith(Control.POWER):
            found, strength = fmt.count(round(value * num_latents)), control.removeprefix(Control.POWER).strip()
            sentences.append(
                f"Of {fmt.count(num_latents)} concepts put into the chat model's rows at {strength} of their root mean "
                f"square, the verdict finds {found} ({share})."
            )
        elif control.startswith(Control.SEED):
            other = control.removeprefix(Control.SEED).strip()
            sentences.append(f"Training again with another seed ({other}) finds the same set to {share}.")
    return sentences


def does_sentences(crosscoder: CrosscoderReport) -> list[str]:
    """What the latents find, what adding them causes, and how much of the KL they carry; only what was measured."""
    return [
        *_planted_sentences(crosscoder),
        *_steering_sentences(crosscoder),
        *_causal_sentences(crosscoder),
        *_equivalence_sentences(crosscoder),
    ]


def _new_in_chat(counts: VerdictSummary) -> tuple[str, str, str]:
    """Number, label and sentence about how much is new."""
    if counts.num_chat_only == 0:
        new = (
            f"None of the {fmt.plural(counts.num_alive, 'live latent')} is chat-only by its decoder norm or by the "
            "evidence."
        )
        return "0", "latents are new in the chat model", new
    candidates = fmt.count(counts.num_chat_only)
    if not counts.has_scaling:
        noun = "latent is" if counts.num_chat_only == 1 else "latents are"
        new = "Latent Scaling was not run: Delta_norm alone says so, and artifacts are not told apart."
        return candidates, f"{noun} chat-only by decoder norm, untested", new
    label = "latent is new in the chat model" if counts.num_specific == 1 else "latents are new in the chat model"
    low, high = fmt.count(counts.num_confident_specific), fmt.count(counts.most_specific)
    span = f"exactly {low}" if low == high else f"between {low} and {high}"
    new = (
        f"Out of {candidates} candidates, {fmt.count(counts.num_chat_only_by_norm)} of them chat-only by decoder norm "
        f"and the others by the evidence alone; {span} when every latent is counted at the worst "
        "and at the best end of its 95% intervals."
    )
    return fmt.count(counts.num_specific), label, new


def unknown_power(crosscoder: CrosscoderReport) -> list[str]:
    """A sentence where nothing was found and nobody knows what could have been."""
    controls = crosscoder.controls
    is_known = controls is not None and controls["control"].str.startswith(Control.POWER).any()
    advice = f"What could have been found was not measured: set power: {{}} for crosscoder {crosscoder.name}."
    return [] if is_known else [advice]


def _confidence_sentences(counts: VerdictSummary, crosscoder: CrosscoderReport) -> list[str]:
    if counts.num_chat_only == 0:
        return ["No chat-only latent exists, so no ratio had to be estimated.", *unknown_power(crosscoder)]
    if not counts.has_scaling:
        return ["Not at all yet: no test for shrinkage or decoupling was made."]
    verdicts = counts.by_verdict
    sentences = [
        f"{fmt.count(counts.num_confident_specific)} of the {fmt.count(counts.num_specific)} are confident: nu_eps "
        f"below {crosscoder.nu_eps_threshold:g} and nu_r below {crosscoder.nu_r_threshold:g} at the run's false "
        "discovery rate."
    ]
    if counts.num_artifacts:
        verb = "is an artifact" if counts.num_artifacts == 1 else "are artifacts"
        sentences.append(
            f"{fmt.count(counts.num_artifacts)} of {fmt.count(counts.num_chat_only)} "
            f"({fmt.percent(counts.num_artifacts / counts.num_chat_only, 0)}) {verb} of training: shrinkage "
            f"{fmt.count(verdicts[Verdict.SHRINKAGE])}, decoupling {fmt.count(verdicts[Verdict.DECOUPLING])}, "
            f"both {fmt.count(verdicts[Verdict.BOTH])}."
        )
    else:
        sentences.append("No artifact among the chat-only latents.")
    undecided = verdicts[Verdict.UNDECIDED]
    if undecided:
        sentences.append(f"{fmt.count(undecided)} {'fires' if undecided == 1 else 'fire'} too rarely to decide.")
    if verdicts[Verdict.WITHHELD]:
        sentences.append(f"{fmt.count(verdicts[Verdict.WITHHELD])} withheld: the models cannot be told apart.")
    return sentences


def _planted_sentences(crosscoder: CrosscoderReport) -> list[str]:
    rows = planted_rows(crosscoder.planted)
    if not rows:
        return []
    found, decided = (_num_found(row.specific for row in rows), _num_found(row.deciding for row in rows))
    sentences = [
        f"A chat-specific latent finds {found} of {fmt.plural(len(rows), 'planted behaviour')} in held-out answers "
        f"(AUROC of {GOOD_AUROC:g} or more), and {decided} already at the token that decides the answer."
    ]
    missed = [row for row in rows if not _num_found([row.specific])]
    if missed:
        others = [
            f"a latent of another verdict finds {_num_found(row.any_latent for row in missed)}",
            f"the mean difference {_num_found(row.mean_difference for row in missed)}",
            f"a linear probe of the chat model {_num_found(row.probe for row in missed)}",
        ]
        sentences.append(f"Of the {len(missed)} that none finds, {others[0]}, {others[1]} and {others[2]}.")
    return sentences


def _num_found(scores: Iterable[PlantedScore]) -> int:
    return sum(score.exists and score.auroc >= GOOD_AUROC for score in scores)


def _steering_sentences(crosscoder: CrosscoderReport) -> list[str]:
    effects = steering_effects(crosscoder.steering)
    if not effects:
        return []
    best = max(effects, key=lambda effect: effect.rate - effect.unsteered_rate)
    above = sum(
        effect.num_random > 0 and effect.rate > max(effect.random_max, effect.unsteered_rate) for effect in effects
    )
    control = f" (random latents: {fmt.percent(best.random_mean, 0)})" if best.num_random else ""
    sentence = (
        f'Adding latent {best.latent} to the chat model takes "{fmt.words(best.behavior)}" from '
        f"{fmt.percent(best.unsteered_rate, 0)} to {fmt.percent(best.rate, 0)} of neutral prompts{control}"
    )
    if any(effect.num_random for effect in effects):
        return [f"{sentence}; {above} of {fmt.plural(len(effects), 'behaviour')} rise above every random latent."]
    return [f"{sentence}."]


def _causal_sentences(crosscoder: CrosscoderReport) -> list[str]:
    causality = crosscoder.causality
    summary = causal_summary(causality)
    if causality is None or summary is None:
        return []
    share = summary.removed_frac
    verb = "removes" if not share < 0 else "adds"
    sentence = (
        f"Adding every latent's difference to the base stream {verb} {fmt.percent(abs(share), 0)} of its KL to the "
        f"chat model ({fmt.decimal(summary.kl_none)} to {fmt.decimal(summary.kl_all)} nats per token)"
    )
    rows = causality[causality["positions"] == summary.positions]
    rows = rows[rows["num_latents"] > 0]
    halves = {str(name): float(kl) for name, kl in zip(rows["intervention"], rows["kl"], strict=True)}
    best = next((kl for name, kl in halves.items() if name.startswith("best_half")), None)
    worst = next((kl for name, kl in halves.items() if name.startswith("worst_half")), None)
    if best is not None and worst is not None:
        sentence += f"; the best half of the latents measured leaves {fmt.decimal(best)}, the worst half "
        sentence += f"{fmt.decimal(worst)}"
        paired = difference_of(crosscoder.causality_differences, "worst_half_replace", "best_half_replace")
        if paired is not None:
            found = "told apart" if paired.is_clear else "not told apart"
            sentence += f" ({found} by the paired difference, {fmt.decimal(paired.value)} "
            sentence += f"{fmt.interval(paired.low, paired.high)})"
    return [sentence + "."]


def _equivalence_sentences(crosscoder: CrosscoderReport) -> list[str]:
    found = [f"{one.num_agreeing} of {one.num_measured} {one.verdict}" for one in equivalents(crosscoder.equivalence)]
    if not found:
        return []
    return [
        f"Adding d^base does to the chat model's next tokens what adding d^chat does for {' and '.join(found)} latents "
        f"(agreement of at least {AGREES:g} over its interval)."
    ]


def _explanation_sentences(crosscoder: CrosscoderReport) -> list[str]:
    table = crosscoder.autointerp
    scored = None if table is None else table[table["balanced_accuracy"].notna()]
    if scored is None or scored.empty:
        return []
    above = int((scored["balanced_accuracy_low"] > CHANCE).sum())
    sentence = (
        f"A language model's explanations of {fmt.plural(len(scored), 'latent')} hold on held-out contexts with a mean "
        f"balanced accuracy of {fmt.decimal(float(scored['balanced_accuracy'].mean()), 2)}"
    )
    if scored["control_accuracy"].notna().any():
        control = float(scored["control_accuracy"].mean())
        sentence += f" (explanations of other latents on the same contexts: {fmt.decimal(control, 2)})"
    return [f"{sentence}; {above} lie above chance with their whole interval."]
