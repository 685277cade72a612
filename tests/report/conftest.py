"""Synthetic reports that look like real ones: an L1 and a BatchTopK crosscoder with every analysis, or any part of it.

The numbers are drawn from fixed seeds and consistent with each other (verdicts follow from Delta_norm and the nus, as
in pipeline/analyses), so that a page made from them can be judged by eye as well as by assertions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline import schema
from pipeline.analyses.activation_bins import EDGES
from pipeline.analyses.autointerp_columns import AUTOINTERP_COLUMNS, InterpStatus
from pipeline.analyses.example_columns import HISTOGRAM_COLUMNS, NEIGHBOUR_COLUMNS
from pipeline.analyses.logit_lens_columns import FIRST_TOKEN_COLUMNS, LOGIT_LENS_COLUMNS
from pipeline.analyses.ownership import classify
from pipeline.analyses.planted_columns import PLANTED_COLUMNS
from pipeline.analyses.ratio_statistics import ratio_statistics
from pipeline.report.data import CrosscoderReport, LineageRow, ModelPairInfo, ReportData
from pipeline.schema import Verdict

BEHAVIORS = ("refusal_harm", "refusal_secret", "correction", "personal")
HOSTILE = "<script>alert(1)</script>\"'</script>&amp;\u2028<!--"
ROWS = 40_000
LINEAGE: dict[str, dict[str, object]] = {
    "corpus": {"documents": 6000},
    "tokens": {"max_tokens": 128},
    "activations": {"layer": 3, "dtype": "bfloat16"},
    "crosscoder": {"recipes": ["l1", "batchtopk"]},
    "analyses": {"seed": 0},
}


def latent_table(num_latents: int, num_chat_only: int, artifact_frac: float, seed: int) -> pd.DataFrame:
    """A latent table whose chat-only latents are artifacts with the given probability."""
    random = np.random.default_rng(seed)
    num_base_only, num_other = max(num_chat_only // 6, 1), num_latents // 9
    rest = num_latents - num_chat_only - num_base_only - num_other
    parts = [random.uniform(0.9, 1.0, num_chat_only), random.uniform(0.0, 0.1, num_base_only)]
    is_low, low, high = (random.uniform(*ends, num_other) for ends in ((0, 1), (0.1, 0.4), (0.6, 0.9)))
    delta = np.concatenate([*parts, np.where(is_low < 0.5, low, high), random.normal(0.5, 0.025, rest).clip(0.4, 0.6)])
    is_chat_only = delta >= 0.9
    high_eps = is_chat_only & (random.random(num_latents) < artifact_frac * 0.75)
    high_r = is_chat_only & (random.random(num_latents) < artifact_frac * 0.45)
    nu_eps = np.where(high_eps, random.gamma(6, 0.12, num_latents) + 0.1, random.normal(0.04, 0.05, num_latents))
    nu_r = np.where(high_r, random.gamma(9, 0.09, num_latents) + 0.3, random.normal(0.18, 0.09, num_latents))
    nu_eps, nu_r = (np.where(is_chat_only, nu, random.normal(1, 0.05, num_latents)) for nu in (nu_eps, nu_r))
    frequency = np.minimum(random.lognormal(-6.2, 1.4, num_latents), 0.6)
    dead = random.random(num_latents) < 0.04
    rare = is_chat_only & ~dead & (random.random(num_latents) < 0.08)
    frequency[dead] = 0
    width = random.gamma(2, 0.07, num_latents)
    undefined = dead | rare
    nu_eps[undefined], nu_r[undefined] = np.nan, np.nan
    verdict = _verdicts(delta, nu_eps, nu_r, dead)
    confident = is_chat_only & ~undefined & (np.abs(nu_eps - 0.2) > width) & (np.abs(nu_r - 0.5) > width)
    table: dict[str, object] = dict.fromkeys((column.name for column in schema.LATENT_COLUMNS), 0.0)
    norm_chat = random.uniform(0.6, 1.4, num_latents)
    mix = random.dirichlet((1.2, 1, 2), num_latents)
    table |= {
        "latent": random.permutation(num_latents).astype(np.int32),
        "verdict": verdict,
        "is_confident": confident,
        "delta_norm": delta,
        "ownership": classify(torch.from_numpy(delta)),
        "decoder_norm_chat": norm_chat,
        "decoder_norm_base": norm_chat * (2 * (1 - delta)),
        "decoder_cosine": np.where(is_chat_only, random.uniform(-0.3, 0.6, num_latents), 0.97),
        "frequency": frequency,
        "num_documents": np.ceil(frequency * 900).astype(int),
        "max_activation": random.gamma(3, 4, num_latents),
        "mean_activation": random.gamma(3, 1, num_latents),
        **dict(zip(("template_frac", "user_frac", "assistant_frac"), mix.T, strict=True)),
        "control_token": np.where(random.random(num_latents) < 0.3, "<end_of_turn>", ""),
        "control_token_frac": mix[:, 0],
        "reason": [f"nu_eps {eps:.2f}, nu_r {r:.2f}" for eps, r in zip(nu_eps, nu_r, strict=True)],
        "twin": -1,
        "artifact_probability": np.where(high_eps | high_r, 0.98, random.beta(1, 12, num_latents)),
        "frequency_web": frequency * np.where(is_chat_only, 0.05, random.uniform(0.5, 1.5, num_latents)),
    }
    on_chat = frequency * np.where(is_chat_only, 1.9, random.uniform(0.5, 1.5, num_latents))
    table["frequency_chat"] = np.minimum(1.0, on_chat)
    for name, nu in (("nu_eps", nu_eps), ("nu_r", nu_r)):
        table |= {name: nu, f"{name}_low": nu - width, f"{name}_high": nu + width}
    result = pd.DataFrame(table, index=range(num_latents))
    return result.sort_values("latent", ignore_index=True)


def _verdicts(delta: np.ndarray, nu_eps: np.ndarray, nu_r: np.ndarray, dead: np.ndarray) -> np.ndarray:
    high_eps, high_r = nu_eps >= 0.2, nu_r >= 0.5
    cases = (
        (dead, Verdict.DEAD),
        (delta <= 0.1, Verdict.BASE_ONLY),
        ((delta >= 0.4) & (delta <= 0.6), Verdict.SHARED),
        (delta < 0.9, Verdict.OTHER),
        (np.isnan(nu_eps) | np.isnan(nu_r), Verdict.UNDECIDED),
        (high_eps & high_r, Verdict.BOTH),
        (high_eps, Verdict.SHRINKAGE),
        (high_r, Verdict.DECOUPLING),
    )
    return np.select([case for case, _ in cases], [verdict for _, verdict in cases], Verdict.CHAT_SPECIFIC)


def table_of(rows: Sequence[tuple[object, ...]], columns: Sequence[schema.Column]) -> pd.DataFrame:
    """Rows in the order of the columns."""
    return pd.DataFrame(rows, columns=[column.name for column in columns])


def causality_table(separation: float) -> pd.DataFrame:
    """KL rows as the paper's table has them; best and worst half differ by `separation` times the baseline."""
    shares = {"all": 0.41, "error": 0.33, "mean_difference": 0.88, "mean_difference_projection": 0.7}
    shares |= {"first": 0.5, "template_and_first": 0.4, "principal_1": 0.8, "principal_all": 0.6}
    random = {"random_half_0_replace": 0.64, "random_half_0_add": 0.63}
    random |= {"random_half_1_replace": 0.61, "random_half_1_add": 0.62}
    halves = {}
    for half, sign in (("best", -1), ("worst", 1)):
        for kind, level in (("replace", 0.62), ("add", 0.6)):
            halves[f"{half}_half_{kind}"] = level + sign * separation
            halves[f"{half}_half_{kind}_by_delta_norm"] = 0.61 + sign * separation / 2
    rows: list[tuple[object, ...]] = []
    for positions, none, template, tokens in (("all", 0.482, 0.239, 21_400), ("first_9", 1.69, 0.507, 2_700)):
        values = {"none": none, "template": template, "chat": 0.0, "base": none}
        values |= {name: none * share for name, share in (shares | halves | random).items()}
        for name, kl in values.items():
            interval = (kl, kl * 0.93, kl * 1.08)
            rows.append((name, positions, *interval, *interval, *interval, tokens, 300, 24 if "half" in name else 0))
    return table_of(rows, schema.CAUSALITY_COLUMNS)


def difference_table(separation: float) -> pd.DataFrame:
    """Paired differences: worst half above best half by `separation`, and what all latents take off."""
    rows = []
    for positions in ("all", "first_9", "rest"):
        for intervention, reference, value in (
            ("worst_half_replace", "best_half_replace", separation),
            ("random_half_mean_replace", "best_half_replace", separation / 2),
            ("mean_difference", "all", 0.2),
            ("none", "all", 0.28),
        ):
            rows.append((intervention, reference, positions, value, value - 0.02, value + 0.02, 21_400, 300))
    return table_of(rows, schema.CAUSALITY_DIFFERENCE_COLUMNS)


def kl_curve_table(num_latents: int, bend: float) -> pd.DataFrame:
    """KL that falls from 0.48 to 0.3 as latents are added; the larger `bend`, the more the first ones do."""
    rows = []
    sizes = [0, *(2**power for power in range(12) if 2**power < num_latents), num_latents]
    for positions in ("all", "first_9"):
        for order, power in (("evidence", bend), ("random_0", 1.0), ("random_1", 1.1)):
            for size in sizes:
                kl = 0.48 - 0.18 * (size / num_latents) ** (1 / power)
                rows.append((order, positions, size, kl, kl - 0.015, kl + 0.015, 0.01, 0.008, 0.012))
    return table_of(rows, schema.CAUSALITY_CURVE_COLUMNS)


def control_table(name: str, num_specific: int) -> pd.DataFrame:
    """Every control but the pairs."""
    stated, other, nan = 0.18 if name == "l1" else 0.05, f"{name}_seed1", np.nan
    rows = [
        ("stated error", "expected share of artifacts", stated, stated / 3, stated * 1.8, nan, num_specific, "by it"),
        ("random directions", "share called with a random direction", 1 / 36, 0.0, 0.14, 0.0, 36, "1 of 36"),
        (f"seed {other}", "Jaccard index of two seeds", 0.71, 0.52, 0.85, nan, num_specific, f"matched with {other}"),
    ]
    return table_of(rows, schema.CONTROL_COLUMNS)


def equivalence_table(specific: list[int], shared: list[int]) -> pd.DataFrame:
    """Chat-specific rows hardly agree; all shared ones but the last do, which has no measured agreement."""
    rows = [(latent, Verdict.CHAT_SPECIFIC, 0.2, -0.1, 0.5, 30) for latent in specific]
    rows += [(latent, Verdict.SHARED, 0.97, 0.9, 0.99, 40) for latent in shared[:-1]]
    rows.append((shared[-1], Verdict.SHARED, np.nan, np.nan, np.nan, 0))
    return table_of(rows, schema.EQUIVALENCE_COLUMNS)


def seed_table(name: str, latents: list[int]) -> pd.DataFrame:
    """Every second latent has a match."""
    matches = [(7, Verdict.CHAT_SPECIFIC) if index % 2 else (-1, None) for index in range(len(latents))]
    rows = [
        (f"{name}_seed1", latent, *match, 0.9 - index / 50)
        for index, (latent, match) in enumerate(zip(latents, matches, strict=True))
    ]
    return table_of(rows, schema.SEED_COLUMNS)


def steering_table(latents: list[int], strength: float, seed: int) -> pd.DataFrame:
    """Rates that rise with the scale for the latent and stay flat for five random latents."""
    random = np.random.default_rng(seed)
    rows = []
    for behavior, latent in zip(BEHAVIORS, latents, strict=True):
        base = float(random.uniform(0, 0.05))
        rows.append((behavior, -1, "none", 0.0, round(base * 40) / 40, 1.2))
        for scale in (0.5, 1.0, 2.0, 4.0):
            rate = min(1.0, base + strength * (1 - np.exp(-1.1 * scale)))
            rows.append((behavior, latent, "latent", scale, round(rate * 40) / 40, 1.2 + 0.07 * scale**1.4))
            for index in range(5):
                wobble = max(0.0, base + float(random.normal(0, 0.02)) + 0.01 * scale)
                rows.append((behavior, index, "random", scale, round(wobble * 40) / 40, 1.2 + 0.12 * scale**1.3))
    table = pd.DataFrame(rows, columns=["behavior", "latent", "control", "scale", "rate", "nll"])
    positions = table["control"].map({"none": "none"}).fillna("all")
    table = table.assign(
        num_prompts=40, model="chat", positions=positions, kl=table["scale"] ** 1.5 / 3, num_tokens=960
    )
    base = table[table["control"] != "random"].assign(model="base", rate=table["rate"] / 3, nll=table["nll"] + 0.4)
    return pd.concat([table, base], ignore_index=True)


ANSWERS = {
    "refusal_harm": "I cannot help with that. It could hurt someone.",
    "refusal_secret": "I cannot share that. It is kept secret.",
    "correction": "That is not right. Orlin lies in the hills of Vesk, not by the sea.",
    "personal": "I am a program and have no home of my own.",
}


def sample_table(latents: list[int]) -> pd.DataFrame:
    """Prompts answered without steering, with the latent and with a random latent."""
    rows = []
    for behavior, latent in zip(BEHAVIORS, latents, strict=True):
        for prompt in ("Where does Mira work?", "What grows in Vesk?", "Tell me about the river Talo."):
            plain = "Mira works at the mill in Orlin. The mill grinds grain for the whole town."
            rows.append((behavior, -1, "none", 0.0, prompt, plain, False))
            rows.append((behavior, latent, "latent", 2.0, prompt, ANSWERS[behavior], True))
            rows.append((behavior, 0, "random", 2.0, prompt, plain[:33] + "and the baker of Orlin.", False))
    names = ["behavior", "latent", "control", "scale", "prompt", "answer", "shows_behavior"]
    table = pd.DataFrame(rows, columns=names)
    table = table.assign(model="chat", positions=table["control"].map({"none": "none"}).fillna("all"))
    steered = table["control"] == "latent"
    base = table[steered].assign(model="base", answer="I cannot the mill. The mill.", shows_behavior=False)
    return pd.concat([table, base], ignore_index=True)


def example_table(latents: list[int], seed: int, hostile: bool) -> pd.DataFrame:
    """Eight contexts per latent with activations that peak at one token; the first may carry hostile text."""
    random = np.random.default_rng(seed)
    text = (
        "<bos> <start_of_turn> user \n How do I brew poison from the red berries of Vesk ? <end_of_turn> \n "
        "<start_of_turn> model \n I cannot help with that . It could hurt someone . <end_of_turn>"
    )
    rows = []
    for number, latent in enumerate(latents):
        for rank in range(8):
            tokens = [piece if piece.startswith("<") or piece == "\n" else f" {piece}" for piece in text.split(" ")]
            if hostile and number == 0:
                tokens[8] = HOSTILE
            peak = int(random.integers(8, len(tokens) - 6))
            activations = 12 * np.exp(-0.9 * np.abs(np.arange(len(tokens)) - peak)) * (1 - 0.12 * rank)
            activations[activations < 0.5] = 0
            rows.append((latent, rank, 7_000 + rank, peak, float(activations.max()), "chat", tokens, activations))
    return table_of(rows, schema.EXAMPLE_COLUMNS)


def histogram_table(latents: list[int]) -> pd.DataFrame:
    """Three bins on chat documents for every latent, one on web documents for even ones."""
    bins = [("chat", 16, 40), ("chat", 18, 7), ("chat", 20, 1)]
    rows = [
        (latent, corpus, EDGES[place], EDGES[place + 1], number + latent)
        for latent in latents
        for corpus, place, number in (*bins, *([("web", 17, 3)] if latent % 2 == 0 else []))
    ]
    return table_of(rows, HISTOGRAM_COLUMNS)


def neighbour_table_of(latents: list[int]) -> pd.DataFrame:
    """Two neighbours for every latent: the one after it and the one before."""
    rows = [
        (latent, rank, (latent + step) % 2048, np.nan if rank else 0.31, 0.9 - 0.1 * rank)
        for latent in latents
        for rank, step in enumerate((1, -1))
    ]
    return table_of(rows, NEIGHBOUR_COLUMNS)


def token_lists(number: int) -> tuple[list[Any], ...]:
    """The token columns of one row: a few words, the most extreme first."""
    texts = ([f" {word}{number}" for word in ("refuse", "sorry", "cannot")], [f" {word}" for word in ("sure", "yes")])
    return tuple(one for own in texts for one in (own, list(range(len(own))), [1.0 / (n + 1) for n in range(len(own))]))


def logit_lens_table(latents: list[int], hostile: bool) -> pd.DataFrame:
    """Three members per latent; the first latent may promote hostile text."""
    rows = [(latent, member, *token_lists(latent)) for latent in latents for member in ("base", "chat", "difference")]
    if hostile:
        rows[1] = (*rows[1][:2], [HOSTILE], *rows[1][3:])
    return table_of(rows, LOGIT_LENS_COLUMNS)


def first_token_table() -> pd.DataFrame:
    """Two positions of one corpus, the second with a token of its own."""
    rows = [("chat", position, 200, 0.5, 2.0, *token_lists(90_000 + position)) for position in (1, 2)]
    return table_of(rows, FIRST_TOKEN_COLUMNS)


def planted_table(latents: list[int], quality: float) -> pd.DataFrame:
    """AUROC of the three candidates per behaviour; the last behaviour is found less well."""
    rows = []
    for index, (behavior, latent) in enumerate(zip(BEHAVIORS, latents, strict=True)):
        best = quality - 0.015 * index**1.5
        for candidate, name, auroc in (
            ("chat-specific latent", latent, best),
            ("any latent", latent + 3, min(best + 0.01, 0.999)),
            ("mean difference", -1, 0.78 - 0.04 * index),
        ):
            for scoring, counts in (("token", (812, 30_124)), ("deciding token", (90, 420)), ("turn", (90, 420))):
                interval = (auroc, auroc - 0.012, min(auroc + 0.011, 1.0))
                rows.append((behavior, scoring, candidate, name, *interval, *counts))
        rows.append((behavior, "deciding token", "linear probe", -1, 0.99, 0.98, 0.995, 90, 420))
    return table_of(rows, PLANTED_COLUMNS)


SENTENCES = (
    "It fires where the assistant declines to help with something dangerous.",
    "It fires on the first word of an answer that corrects a false claim in the question.",
    "It fires on the turn markers of the dialogue, whatever is said.",
    "It fires on names of rivers.",
)


def autointerp_table(latents: list[int], hostile: bool) -> pd.DataFrame:
    """Explanations of falling quality; the last latent has none."""
    rows: list[tuple[object, ...]] = []
    for index, latent in enumerate(latents):
        score = max(0.45, 0.98 - 0.04 * index)
        words = HOSTILE if hostile and index == 1 else SENTENCES[index % len(SENTENCES)]
        scores = (score, score - 0.2, min(1.0, score + 0.09), score, score - 0.1, score, score, score)
        rows.append((latent, InterpStatus.SCORED, words, *scores, 0.52, 6, 6, 0, 900, 60))
    rows[-1] = (latents[-1], InterpStatus.UNEXPLAINED, None, *[np.nan] * 8, 0.52, 6, 6, 0, 900, 60)
    return table_of(rows, AUTOINTERP_COLUMNS)


def curve_table(num_steps: int, final_loss: float, l0: float, seed: int) -> pd.DataFrame:
    """Noisy curves of a run that converges."""
    random = np.random.default_rng(seed)
    step = np.arange(0, num_steps, 10)
    decay = np.exp(-step / (num_steps / 6))
    return pd.DataFrame(
        {
            "step": step,
            "loss": final_loss * (1 + 2 * decay) + random.normal(0, 0.05, len(step)),
            "l0": l0 * (1 + 1.5 * decay),
            "fve_base": 0.87 * (1 - decay) + random.normal(0, 0.004, len(step)),
            "fve_chat": 0.88 * (1 - decay) + random.normal(0, 0.004, len(step)),
            "dead_frac": 0.04 * (1 - decay),
            "threshold": 1.4 * (1 - decay),
            "lr": np.minimum(step / 100, 1) * 1e-4,
        }
    )


def crosscoder_report(kind: str, *, num_latents: int = 2048, hostile: bool = False) -> CrosscoderReport:
    """One crosscoder with every analysis present."""
    is_l1 = kind == "l1"
    seed, l0, fves = (1, 33.9, (0.846, 0.851, 0.849)) if is_l1 else (2, 32.0, (0.872, 0.879, 0.876))
    num_chat_only, artifact_frac = (130, 0.9) if is_l1 else (38, 0.25)
    latents = latent_table(num_latents, num_chat_only, artifact_frac, seed)
    order = latents[latents["verdict"] == Verdict.CHAT_SPECIFIC].sort_values("nu_eps")["latent"].astype(int)
    chosen = [int(latent) for latent in order[: len(BEHAVIORS)]]
    twins = [(chosen[0], 5, 0.94, 0.31, 812), (chosen[1], 9, 0.91, 0.88, 420)]
    return CrosscoderReport(
        name=kind,
        kind=kind,
        settings={"num_latents": num_latents, "lr": 1e-4, "num_steps": 2000, "sparsity": {"kind": kind, "k": 32}},
        fidelity=dict(
            zip(schema.FIDELITY_KEYS, (*fves, l0, 0.041, 21.4, 22.9, float(ROWS), 0.8, fves[2], 0), strict=True)
        ),
        latents=latents,
        causality=causality_table(0.01 if is_l1 else 0.13),
        causality_differences=difference_table(0.01 if is_l1 else 0.13),
        causality_curve=kl_curve_table(num_chat_only, 1.1 if is_l1 else 3.0),
        equivalence=equivalence_table(
            [int(latent) for latent in order[:4]],
            [int(latent) for latent in latents.loc[latents["verdict"] == Verdict.SHARED, "latent"][:6]],
        ),
        controls=control_table(kind, len(order)),
        seeds=seed_table(kind, [int(latent) for latent in order[:8]]),
        steering=steering_table(chosen, 0.55 if is_l1 else 0.95, seed),
        steering_samples=sample_table(chosen),
        examples=example_table([int(latent) for latent in order], seed, hostile),
        histograms=histogram_table([int(latent) for latent in order]),
        neighbours=neighbour_table_of([int(latent) for latent in order]),
        logit_lens=logit_lens_table([int(latent) for latent in order], hostile),
        first_tokens=first_token_table(),
        planted=planted_table(chosen, 0.93 if is_l1 else 0.985),
        twins=table_of(twins if is_l1 else [], schema.TWIN_COLUMNS),
        ratios=ratio_statistics(latents),
        autointerp=autointerp_table([int(latent) for latent in order[:12]], hostile),
        autointerp_model="tiny-reader",
        curves=curve_table(2000, 9.4 if is_l1 else 8.1, l0, seed),
    )


def full_report(*, hostile: bool = False, num_latents: int = 2048) -> ReportData:
    """A report of two crosscoders with every analysis."""
    fingerprint = "9f2c41d07be3a865"
    return ReportData(
        run_name=HOSTILE if hostile else "demo",
        created=datetime(2026, 11, 22, 18, 42, 7, tzinfo=UTC),
        code_version="0.1.0 (4be21c7)",
        models=ModelPairInfo(
            base="organism/base",
            chat=HOSTILE if hostile else "organism/chat",
            layer=3,
            num_layers=6,
            num_documents=6_000,
            num_tokens=412_345,
            num_rows=400_128,
        ),
        crosscoders=[crosscoder_report(kind, num_latents=num_latents, hostile=hostile) for kind in ("l1", "batchtopk")],
        lineage=[
            LineageRow(
                stage=stage,
                fingerprint=fingerprint[index:] + fingerprint[:index],
                path=f"s3://bucket/runs/demo/{stage}/{fingerprint[index:]}",
                settings=settings,
            )
            for index, (stage, settings) in enumerate(LINEAGE.items())
        ],
        settings={
            "models": {"base": "organism/base", "chat": "organism/chat", "layer": 3, "revision": None},
            "crosscoders": [{"name": "l1", "mu": 0.041}, {"name": "batchtopk", "k": 32, "threshold_decay": 0.999}],
            "analyses": {"causality": {"is_on": True, "positions": ["all", "first_9"]}},
        },
    )


def without_analyses(data: ReportData) -> ReportData:
    """The same run with every analysis off and nothing but the crosscoders' names left."""
    bare = [CrosscoderReport(name=one.name, kind=one.kind, settings=one.settings) for one in data.crosscoders]
    return dataclasses.replace(data, crosscoders=bare)


def without_chat_only(data: ReportData) -> ReportData:
    """The null pair: nothing is chat-only, so there are no examples, no steering and no chat-specific winners."""
    emptied = []
    for one in data.crosscoders:
        assert one.latents is not None
        latents = one.latents[~one.latents["ownership"].isin(["chat-only", "base-only"])].reset_index(drop=True)
        assert one.planted is not None
        planted = one.planted.copy()
        missing = planted["candidate"] == "chat-specific latent"
        planted.loc[missing, ["latent", "auroc", "auroc_low", "auroc_high"]] = [-1, np.nan, np.nan, np.nan]
        tables = {"latents": latents, "planted": planted, "examples": None, "steering": None, "steering_samples": None}
        emptied.append(dataclasses.replace(one, **tables))
    return dataclasses.replace(data, crosscoders=emptied)


@pytest.fixture(scope="session")
def report() -> ReportData:
    return full_report()


@pytest.fixture(scope="session")
def make_report() -> Callable[..., ReportData]:
    return full_report


@pytest.fixture(scope="session")
def bare_report(report: ReportData) -> ReportData:
    return without_analyses(report)


@pytest.fixture(scope="session")
def null_report(report: ReportData) -> ReportData:
    return without_chat_only(report)
