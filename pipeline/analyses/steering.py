"""Steering: what a model does when a latent's direction is added to its residual stream while it writes.

    h <- h + scale * max(f_j) d_j^chat                          at layer L: everywhere, in the prompt, or in the answer

Scale 1 thus adds the latent's largest contribution on the validation rows, whose norm max(f_j) |d_j^chat| is the same
however a latent's scale is divided between code and decoder.

Each behaviour's neutral prompts are answered by the base or the chat model, greedily or sampled: unsteered, with each
latent at each scale, and with random other latents of the same crosscoder, scaled to equal norm, as control. Three
numbers are measured: the rate of answers that contain one of the behaviour's markers; KL(p || p_steered) of the next
token at every position of the answer, p being the same model unsteered on the same text; and, for fluency, the
unsteered chat model's nats per generated token. All answers of a model share batches, each prompt with its own vector.

Which latent belongs to which behaviour is decided elsewhere. The trade-off: markers are substrings, so a behaviour in
other words does not count; rates of steered and unsteered answers are comparable, not absolute.

Shapes: B prompts, T positions, N new tokens, D width, P positions of answers, V vocabulary.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.steering_columns import STEERING_COLUMNS, STEERING_SAMPLE_COLUMNS
from pipeline.analyses.steering_inputs import Direction
from pipeline.errors import InputError
from pipeline.models.generation import Positions, Sampling, Steering
from pipeline.models.padding import pad_tokens
from pipeline.models.pair import ModelPair
from pipeline.schema import CHAT, MODEL_NAMES
from pipeline.text.prompts import BehaviorPrompts
from pipeline.text.tokenizers import prompt_ids

NONE, LATENT, RANDOM = "none", "latent", "random"
"""Values of the column `control`; an unsteered run's `positions` is NONE too."""


class SteeringRequest(NamedTuple):
    """Prompts and directions of one behaviour; without directions only the unsteered rate is measured."""

    prompts: BehaviorPrompts
    directions: tuple[Direction, ...]
    controls_RD: Tensor
    """Unit directions of random latents (`random_controls`), scaled to each direction's norm; may be empty."""


class SteeringOptions(NamedTuple):
    """Settings of all runs."""

    scales: tuple[float, ...]
    """Multiples of the latent's largest contribution."""
    max_new_tokens: int = 24
    num_samples: int = 3
    """Prompts per run whose answers are written out; of random latents, the first one's."""
    models: tuple[int, ...] = (CHAT,)
    """Models that answer (schema.BASE, schema.CHAT)."""
    positions: tuple[Positions, ...] = ("all",)
    """Where the direction is added; each is a sweep of its own."""
    temperature: float = 0.0
    """0 is greedy; above, every prompt has its own random numbers, the same ones in every run."""
    seed: int = 0
    """Seed of sampled answers."""
    prompts_per_batch: int = 256


class SteeringResult(NamedTuple):
    """Both tables of the analysis."""

    table: pd.DataFrame
    """STEERING_COLUMNS, one row per run; each random latent is a run of its own."""
    samples: pd.DataFrame
    """STEERING_SAMPLE_COLUMNS, answers side by side."""


class _Run(NamedTuple):
    """All prompts of a behaviour, answered in one way."""

    prompts: BehaviorPrompts
    key: Mapping[str, Any]
    """Columns that both tables share."""
    model: int
    positions: Positions
    vector_D: Tensor
    has_samples: bool


class _Answer(NamedTuple):
    text: str
    nll: float
    num_tokens: int
    kl: float
    """Summed over num_tokens + 1 positions: those that predict the answer's tokens, and what comes after."""


def steer(
    pair: ModelPair,
    requests: Sequence[SteeringRequest],
    options: SteeringOptions,
    progress: Callable[[int, int], None] | None = None,
) -> SteeringResult:
    """Answers, rates, KL and fluency of every run; `progress` is called with (answers done, in all) after each batch.

    nll is NaN for a run whose answers are all empty, the rate for prompts without markers. Equal input gives equal
    tables.
    """
    check_requests(requests, options)
    runs = [run for request in requests for run in _runs(request, options, pair.activation_dim)]
    jobs = [(number, place) for number, run in enumerate(runs) for place in range(len(run.prompts.prompts))]
    messages = dict.fromkeys(message for run in runs for message in run.prompts.prompts)
    ids_of = {m: prompt_ids(pair.tokenizer, [{"role": "user", "content": m}]) for m in messages}
    prompts = [ids_of[runs[number].prompts.prompts[place]] for number, place in jobs]
    answers: dict[tuple[int, int], _Answer] = {}
    for batch in _batches(runs, jobs, prompts, options.prompts_per_batch):
        first = runs[jobs[batch[0]][0]]
        vector_BD = torch.stack([runs[jobs[job][0]].vector_D for job in batch])
        places = [jobs[job][1] for job in batch]
        steering = Steering(vector_BD, first.positions)
        answered = _answer(pair, first.model, steering, [prompts[job] for job in batch], places, options)
        answers.update(zip([jobs[job] for job in batch], answered, strict=True))
        if progress is not None:
            progress(len(answers), len(jobs))
    by_run = [[answers[number, place] for place in range(len(run.prompts.prompts))] for number, run in enumerate(runs)]
    rows = [_row(run, run_answers) for run, run_answers in zip(runs, by_run, strict=True)]
    samples = [
        sample
        for run, run_answers in zip(runs, by_run, strict=True)
        if run.has_samples
        for sample in _samples(run, run_answers[: options.num_samples])
    ]
    return SteeringResult(
        pd.DataFrame(rows, columns=[column.name for column in STEERING_COLUMNS]),
        pd.DataFrame(samples, columns=[column.name for column in STEERING_SAMPLE_COLUMNS]),
    )


def shows_behavior(answer: str, markers: Sequence[str]) -> bool | None:
    """Whether the answer contains one of the markers as a substring; None without markers."""
    return any(marker in answer for marker in markers) if markers else None


def check_requests(requests: Sequence[SteeringRequest], options: SteeringOptions) -> None:
    """InputError where nothing can be answered or a number has no meaning."""
    empty = [request.prompts.behavior for request in requests if not request.prompts.prompts]
    if not requests or empty:
        raise InputError(f"expected at least one neutral prompt per behaviour, got none for {empty or 'any behaviour'}")
    for name in ("max_new_tokens", "prompts_per_batch"):
        if getattr(options, name) < 1:
            raise InputError(f"expected {name} of at least 1, got {getattr(options, name)}")
    if options.temperature < 0:
        raise InputError(f"expected a temperature of at least 0 (0 is greedy), got {options.temperature}")
    for name in ("models", "positions"):
        if not getattr(options, name):
            raise InputError(f"expected at least one of {name} to steer, got none")


def _runs(request: SteeringRequest, options: SteeringOptions, width: int) -> list[_Run]:
    def run(
        model: int, where: Positions, vector_D: Tensor, own: Mapping[str, Any], *, has_samples: bool = True
    ) -> _Run:
        shared = {"behavior": request.prompts.behavior, "model": MODEL_NAMES[model], "positions": where}
        return _Run(request.prompts, {**shared, **own}, model, where, vector_D, has_samples)

    first, zero_D = options.positions[0], torch.zeros(width)
    unsteered = {"latent": np.int32(-1), "control": NONE, "positions": NONE, "scale": 0.0}
    runs = [run(model, first, zero_D, unsteered) for model in options.models]
    sweep = itertools.product(options.models, options.positions, request.directions, options.scales)
    for model, positions, direction, scale in sweep:
        norm = scale * direction.max_contribution
        own = {"latent": np.int32(direction.latent), "scale": scale}
        runs.append(run(model, positions, norm * direction.unit_D, {**own, "control": LATENT}))
        runs += [
            run(model, positions, norm * unit_D, {**own, "control": RANDOM}, has_samples=number == 0)
            for number, unit_D in enumerate(request.controls_RD)
        ]
    return runs


def _batches(
    runs: Sequence[_Run], jobs: Sequence[tuple[int, int]], prompts: Sequence[Sequence[int]], size: int
) -> list[list[int]]:
    """Jobs of one model and one choice of positions, prompts of similar length together."""
    groups: dict[tuple[int, Positions], list[int]] = {}
    for job, (number, _) in enumerate(jobs):
        groups.setdefault((runs[number].model, runs[number].positions), []).append(job)
    ordered = [sorted(members, key=lambda job: len(prompts[job])) for members in groups.values()]
    return [members[start : start + size] for members in ordered for start in range(0, len(members), size)]


def _answer(
    pair: ModelPair,
    model: int,
    steering: Steering,
    prompts: Sequence[Sequence[int]],
    places: Sequence[int],
    options: SteeringOptions,
) -> list[_Answer]:
    """Answers of one batch; places are the prompts' numbers, which seed what is drawn for them."""
    sampling = None
    if options.temperature > 0:
        drawn = [np.random.default_rng((options.seed, place)).random(options.max_new_tokens) for place in places]
        sampling = Sampling(options.temperature, torch.from_numpy(np.stack(drawn)))
    generated = pair.generate(prompts, options.max_new_tokens, steering, model=model, sampling=sampling)
    effect = steering_effect(pair, model, prompts, generated, steering)
    nll_B = effect.nll_B if model == CHAT else pair.answer_likelihood(prompts, generated).nll_B
    texts = [str(pair.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in generated]
    numbers = zip(nll_B.tolist(), map(len, generated), effect.kl_B.tolist(), strict=True)
    return [_Answer(text, *own) for text, own in zip(texts, numbers, strict=True)]


class TextEffect(NamedTuple):
    """What steering changes in one model's reading of given answers; float64, one entry per prompt."""

    kl_B: Tensor
    """Summed nats over len(answer) + 1 positions."""
    nll_B: Tensor
    """Summed nats of the answer under this model unsteered; 0 for an empty answer."""


@torch.no_grad()
def steering_effect(
    pair: ModelPair,
    model: int,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    steering: Steering,
) -> TextEffect:
    """KL(p || p_steered) of the next token over the answer, and the answer's nats under p.

    p is one model unsteered, p_steered the same model steered, both reading prompt and answer; the positions are those
    that predict an answer's tokens and the one after it, len(answer) + 1 in all. steering.vector is [B, D].
    """
    documents = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    ids_BT, mask_BT = pad_tokens(documents)
    h_BTD = pair.lower(model, ids_BT, mask_BT)
    is_answer_BT = torch.arange(ids_BT.shape[1])[None] >= torch.tensor([len(prompt) for prompt in prompts])[:, None]
    where_BT = {"all": torch.ones_like(is_answer_BT), "prompt": ~is_answer_BT, "generated": is_answer_BT}
    added_BTD = where_BT[steering.positions].to(h_BTD)[..., None] * steering.vector.to(h_BTD)[:, None]
    rows_P = torch.repeat_interleave(torch.arange(len(answers)), torch.tensor([len(a) + 1 for a in answers]))
    positions_P = torch.cat([torch.arange(len(p) - 1, len(p) + len(a)) for p, a in zip(prompts, answers, strict=True)])
    hidden = [pair.upper(model, edited, mask_BT)[rows_P, positions_P] for edited in (h_BTD, h_BTD + added_BTD)]
    # What each position predicts: the answer's next token, or nothing (-1) after its end.
    target_P = torch.tensor([token for answer in answers for token in (*answer, -1)])
    sums_B2 = torch.zeros(len(documents), 2, dtype=torch.float64)
    for here in pair.decoders[model].head_chunks(len(rows_P)):
        plain_PV, steered_PV = (pair.head(model, hidden_PD[here]).float().log_softmax(-1) for hidden_PD in hidden)
        kl_P = (plain_PV.exp() * (plain_PV - steered_PV)).sum(-1).double().cpu()
        wanted_P1 = target_P[here, None]
        nll_P = -plain_PV.gather(1, wanted_P1.clamp_min(0).to(plain_PV.device))[:, 0].double().cpu()
        nll_P = torch.where(wanted_P1[:, 0] >= 0, nll_P, 0.0)
        sums_B2.index_add_(0, rows_P[here], torch.stack([kl_P, nll_P], dim=1))
    return TextEffect(*sums_B2.unbind(1))


def _row(run: _Run, answers: Sequence[_Answer]) -> dict[str, Any]:
    num_tokens = sum(answer.num_tokens for answer in answers)
    hits = [bool(shows_behavior(answer.text, run.prompts.markers)) for answer in answers]
    return {
        **run.key,
        "rate": sum(hits) / len(hits) if run.prompts.markers else float("nan"),
        "kl": sum(answer.kl for answer in answers) / (num_tokens + len(answers)),
        "nll": sum(answer.nll for answer in answers) / num_tokens if num_tokens else float("nan"),
        "num_prompts": len(answers),
        "num_tokens": num_tokens,
    }


def _samples(run: _Run, answers: Sequence[_Answer]) -> list[dict[str, Any]]:
    return [
        {
            **run.key,
            "prompt": prompt,
            "answer": answer.text,
            "shows_behavior": shows_behavior(answer.text, run.prompts.markers),
        }
        for prompt, answer in zip(run.prompts.prompts, answers, strict=False)
    ]
