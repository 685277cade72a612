"""The few numbers that the first page and the terminal show, computed from a report's tables.

Counts per verdict with the range that the latents' own intervals leave open, what the latent set does to the chat
model's predictions (KL), what steering does to behaviours, and the planted score. No formatting and no markup here, and
no new statistics.
"""

import math
from typing import NamedTuple

import pandas as pd

from pipeline.analyses.controls import is_replicated, num_seeds_finding
from pipeline.analyses.planted_columns import Scoring
from pipeline.analyses.verdict import verdict_counts
from pipeline.numerics.proportions import Interval, wilson_interval
from pipeline.report.data import CrosscoderReport
from pipeline.schema import CHAT, MODEL_NAMES, Verdict

CANDIDATE_SPECIFIC = "chat-specific latent"
CANDIDATE_ANY = "any latent"
CANDIDATE_MEAN_DIFFERENCE = "mean difference"
CANDIDATE_PROBE = "linear probe"
"""Values of PLANTED_COLUMNS' candidate."""

CONTROL_LATENT = "latent"
CONTROL_RANDOM = "random"
CONTROL_NONE = "none"
"""Values of schema.STEERING_COLUMNS' control."""

EVIDENCE_ORDER = "evidence"
"""Value of schema.CAUSALITY_CURVE_COLUMNS' order; all others are random orders."""

FREQUENCY_PREFIX = "frequency_"
"""A latent table has one column with this prefix per corpus: the share of its rows on which a latent fires."""
SPEAKERS = {"template": "template_frac", "user": "user_frac", "assistant": "assistant_frac"}
"""Speaker and the column of a latent's share of activation on its tokens; what is left is ELSEWHERE."""
ELSEWHERE = "elsewhere"
TEMPLATE_SHARE = 0.5
"""A latent with more of its activation on template tokens is a template latent (arXiv 2504.02922, section 4)."""


def anchor(place: int, latent: int) -> str:
    """HTML id of the card of a latent of the crosscoder at this position of the report."""
    return f"latent-{place}-{latent}"


class VerdictSummary(NamedTuple):
    """How many latents of one crosscoder got each verdict."""

    num_latents: int
    num_alive: int
    num_chat_only: int
    """Alive latents that Delta_norm calls chat-only or the evidence calls chat-specific."""
    by_verdict: dict[str, int]
    num_confident_specific: int
    """Chat-specific at the run's false discovery rate."""
    num_confident_artifacts: int
    has_scaling: bool
    """Whether Latent Scaling was run; without it every chat-only latent is undecided."""

    @property
    def num_specific(self) -> int:
        """Chat-specific latents."""
        return self.by_verdict[Verdict.CHAT_SPECIFIC]

    @property
    def num_artifacts(self) -> int:
        """Latents that Delta_norm calls chat-only and Latent Scaling does not."""
        return sum(self.by_verdict[verdict] for verdict in Verdict.ARTIFACTS)

    @property
    def most_specific(self) -> int:
        """Chat-only latents that are not confidently artifacts: the count if every open case went the right way."""
        return self.num_chat_only - self.num_confident_artifacts


def verdict_summary(latents: pd.DataFrame) -> VerdictSummary:
    """Counts from a latent table; an empty table gives zeros."""
    verdict = latents["verdict"]
    confident = latents["is_confident"].fillna(value=False).astype(bool)
    by_verdict = verdict_counts(latents)
    return VerdictSummary(
        num_latents=len(latents),
        num_alive=len(latents) - by_verdict[Verdict.DEAD],
        num_chat_only=sum(by_verdict[name] for name in Verdict.CHAT_ONLY),
        by_verdict=by_verdict,
        num_confident_specific=int((confident & (verdict == Verdict.CHAT_SPECIFIC)).sum()),
        num_confident_artifacts=int((confident & verdict.isin(Verdict.ARTIFACTS)).sum()),
        has_scaling=bool(latents["beta_error_chat"].notna().any() or latents["nu_eps"].notna().any()),
    )


class Replication(NamedTuple):
    """Whether other training seeds find the chat-specific latents of a crosscoder again."""

    num_finding: dict[int, int]
    """Other seeds in which a latent is chat-specific again, by latent."""
    num_replicated: int
    """Latents that at least half of the other seeds find."""
    num_others: int


def replication(crosscoder: CrosscoderReport) -> Replication | None:
    """From the table of seeds; None without another seed or a chat-specific latent."""
    if crosscoder.seeds is None or crosscoder.seeds.empty:
        return None
    num_others, found = int(crosscoder.seeds["other"].nunique()), num_seeds_finding(crosscoder.seeds)
    return Replication(
        dict(zip(found.index.astype(int).tolist(), found.astype(int).tolist(), strict=True)),
        int(is_replicated(found, num_others).sum()),
        num_others,
    )


def chat_only_rows(latents: pd.DataFrame) -> pd.DataFrame:
    """The live latents that Delta_norm calls chat-only or the evidence calls chat-specific."""
    return latents[latents["verdict"].isin(Verdict.CHAT_ONLY)]


def corpora_of(latents: pd.DataFrame) -> list[str]:
    """Names of the corpora whose frequencies the table holds, in its order."""
    return [
        str(name).removeprefix(FREQUENCY_PREFIX) for name in latents.columns if str(name).startswith(FREQUENCY_PREFIX)
    ]


def num_template_latents(latents: pd.DataFrame) -> int:
    """Chat-specific latents with more than half of their activation on template tokens."""
    specific = latents[latents["verdict"] == Verdict.CHAT_SPECIFIC]
    return int((specific["template_frac"] > TEMPLATE_SHARE).sum())


class CausalSummary(NamedTuple):
    """What a set of latents takes off the KL between the two models, for one choice of positions."""

    positions: str
    kl_none: float
    """nats per token when the base model's stream replaces the chat model's."""
    kl_all: float
    """The same after adding every latent's difference."""

    @property
    def removed_frac(self) -> float:
        """Share of the KL that all latents remove; NaN where there was none to remove."""
        return 1 - self.kl_all / self.kl_none if self.kl_none > 0 else math.nan


def causal_summary(causality: pd.DataFrame | None, positions: str = "all") -> CausalSummary | None:
    """The interventions `none` and `all` at these positions, or None where one is missing."""
    if causality is None:
        return None
    rows = causality[causality["positions"] == positions]
    kl = {str(name): float(value) for name, value in zip(rows["intervention"], rows["kl"], strict=True)}
    if "none" not in kl or "all" not in kl:
        return None
    return CausalSummary(positions=positions, kl_none=kl["none"], kl_all=kl["all"])


AGREES = 0.8
"""Two rows do the same where the whole interval of their agreement is at least this."""


class Equivalents(NamedTuple):
    """How many latents of one verdict do the same to the chat model along either model's row."""

    verdict: str
    num_agreeing: int
    num_measured: int


def equivalents(equivalence: pd.DataFrame | None) -> list[Equivalents]:
    """By verdict, those with a measured agreement; empty where nothing was measured."""
    if equivalence is None:
        return []
    measured = equivalence[equivalence["agreement"].notna()]
    return [
        Equivalents(str(verdict), int((rows["agreement_low"] >= AGREES).sum()), len(rows))
        for verdict, rows in measured.groupby("verdict", sort=False)
    ]


class Difference(NamedTuple):
    """By how much one intervention leaves more KL than another, paired on the same tokens."""

    value: float
    """nats per token; positive where the first leaves more."""
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low > 0


def difference_of(
    differences: pd.DataFrame | None, intervention: str, reference: str, positions: str = "all"
) -> Difference | None:
    """KL(intervention) - KL(reference) at these positions, or None where it was not measured."""
    if differences is None:
        return None
    rows = differences[
        (differences["intervention"] == intervention)
        & (differences["reference"] == reference)
        & (differences["positions"] == positions)
    ]
    if rows.empty:
        return None
    row = rows.iloc[0]
    return Difference(float(row["difference"]), float(row["difference_low"]), float(row["difference_high"]))


class HalfWay(NamedTuple):
    """How few latents do half of the work of all."""

    num_evidence: int
    """Added in order of evidence."""
    num_random: float
    """Added in random order, mean over the orders; NaN without one."""
    num_latents: int


def half_way(curve: pd.DataFrame | None, positions: str = "all") -> HalfWay | None:
    """Latents needed for half of the KL that all of them take off; None where all of them take nothing off."""
    if curve is None:
        return None
    needed: dict[str, int] = {}
    total = 0
    for order, rows in curve[curve["positions"] == positions].groupby("order"):
        rows = rows.sort_values("num_latents")
        kl = rows["kl"].to_numpy(dtype=float)
        if len(kl) < 2 or not kl[0] > kl[-1]:
            continue
        is_reached = kl <= (kl[0] + kl[-1]) / 2
        needed[str(order)] = int(rows["num_latents"].iloc[int(is_reached.argmax())])
        total = max(total, int(rows["num_latents"].max()))
    if EVIDENCE_ORDER not in needed:
        return None
    random = [number for order, number in needed.items() if order != EVIDENCE_ORDER]
    return HalfWay(needed[EVIDENCE_ORDER], sum(random) / len(random) if random else math.nan, total)


class SteeringEffect(NamedTuple):
    """The strongest effect that a positive scale of one latent had on one behaviour, and its controls."""

    behavior: str
    latent: int
    scale: float
    num_scales: int
    """Positive scales tried; `scale` is the best of them, so the rate is an optimistic pick."""
    rate: float
    rate_interval: Interval
    unsteered_rate: float
    """NaN where the unsteered run is missing."""
    random_mean: float
    """Mean rate of the random latents at the same scale; NaN without them."""
    random_max: float
    num_random: int
    nll: float
    unsteered_nll: float
    num_prompts: int


def main_positions(steering: pd.DataFrame) -> list[str]:
    """Where directions were added, in the table's order; the first is what pages and sentences compare."""
    return [str(name) for name in steering["positions"].unique() if name != "none"]


def chat_runs(steering: pd.DataFrame) -> pd.DataFrame:
    """The chat model's runs, unsteered or steered at the first choice of positions."""
    is_main = steering["positions"].isin(["none", *main_positions(steering)[:1]])
    return steering[(steering["model"] == MODEL_NAMES[CHAT]) & is_main]


def steering_effects(steering: pd.DataFrame | None) -> list[SteeringEffect]:
    """One effect per behaviour that has a steered latent and a rate, in the table's order; see chat_runs."""
    if steering is None or steering.empty:
        return []
    effects = []
    for behavior, rows in chat_runs(steering).groupby("behavior", sort=False):
        steered = rows[(rows["control"] == CONTROL_LATENT) & (rows["scale"] > 0) & rows["rate"].notna()]
        if not steered.empty:
            effects.append(_strongest(str(behavior), rows, steered))
    return effects


def _strongest(behavior: str, rows: pd.DataFrame, steered: pd.DataFrame) -> SteeringEffect:
    best = steered.sort_values(["rate", "scale"], ascending=[False, True], kind="stable").iloc[0]
    plain = rows[rows["control"] == CONTROL_NONE]
    random = rows[(rows["control"] == CONTROL_RANDOM) & (rows["scale"] == best["scale"])]
    return SteeringEffect(
        behavior=behavior,
        latent=int(best["latent"]),
        scale=float(best["scale"]),
        num_scales=int(steered["scale"].nunique()),
        rate=float(best["rate"]),
        rate_interval=wilson_interval(float(best["rate"]), int(best["num_prompts"])),
        unsteered_rate=float(plain["rate"].mean()),
        random_mean=float(random["rate"].mean()),
        random_max=float(random["rate"].max()),
        num_random=len(random),
        nll=float(best["nll"]),
        unsteered_nll=float(plain["nll"].mean()),
        num_prompts=int(best["num_prompts"]),
    )


class PlantedScore(NamedTuple):
    """How well one candidate finds one planted behaviour."""

    latent: int
    """-1 for a direction that is not a latent."""
    auroc: float
    low: float
    high: float

    @property
    def exists(self) -> bool:
        """False where there was no candidate of this kind."""
        return not math.isnan(self.auroc)


NO_SCORE = PlantedScore(latent=-1, auroc=math.nan, low=math.nan, high=math.nan)


class PlantedRow(NamedTuple):
    """One planted behaviour under one crosscoder; scores of answers by their maximum, unless said otherwise."""

    behavior: str
    specific: PlantedScore
    any_latent: PlantedScore
    mean_difference: PlantedScore
    deciding: PlantedScore
    """The best chat-specific latent at the token that decides an answer."""
    token: PlantedScore
    """The best chat-specific latent on every token of a dialogue."""
    probe: PlantedScore
    """A linear probe of the chat model at the deciding token: about what a latent could reach."""
    num_positive_rows: int
    num_rows: int


def planted_rows(planted: pd.DataFrame | None) -> list[PlantedRow]:
    """Planted scores by behaviour, in the table's order; a candidate that is missing is NO_SCORE."""
    if planted is None or planted.empty:
        return []
    result = []
    for behavior, rows in planted.groupby("behavior", sort=False):
        scores = {
            (str(row["scoring"]), str(row["candidate"])): PlantedScore(
                latent=int(row["latent"]),
                auroc=float(row["auroc"]),
                low=float(row["auroc_low"]),
                high=float(row["auroc_high"]),
            )
            for row in rows.to_dict("records")
        }
        answers = rows[rows["scoring"] == Scoring.TURN]
        result.append(
            PlantedRow(
                behavior=str(behavior),
                specific=scores.get((Scoring.TURN, CANDIDATE_SPECIFIC), NO_SCORE),
                any_latent=scores.get((Scoring.TURN, CANDIDATE_ANY), NO_SCORE),
                mean_difference=scores.get((Scoring.TURN, CANDIDATE_MEAN_DIFFERENCE), NO_SCORE),
                deciding=scores.get((Scoring.DECIDING, CANDIDATE_SPECIFIC), NO_SCORE),
                token=scores.get((Scoring.TOKEN, CANDIDATE_SPECIFIC), NO_SCORE),
                probe=scores.get((Scoring.DECIDING, CANDIDATE_PROBE), NO_SCORE),
                num_positive_rows=int(answers["num_positive_rows"].max()),
                num_rows=int(answers["num_rows"].max()),
            )
        )
    return result


def behaviors_by_latent(crosscoder: CrosscoderReport) -> dict[int, list[PlantedRow]]:
    """Latent -> planted behaviours for which it is the best chat-specific latent."""
    found: dict[int, list[PlantedRow]] = {}
    for row in planted_rows(crosscoder.planted):
        if row.specific.exists and row.specific.latent >= 0:
            found.setdefault(row.specific.latent, []).append(row)
    return found
